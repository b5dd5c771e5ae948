/* The real model files, when they are there: shapes as published, and the file's digest. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "model/rope.h"
#include "support/models.h"

enum { SKIPPED = 77 };

static const struct {
    const char *file;
    mp_arch arch;
    uint32_t n_layers, n_embd, n_ff, n_vocab, n_ctx_train, n_heads, n_kv_heads, head_dim;
    float freq_base;
    bool tied;
    mp_dtype embd, down;
} models[] = {
    { SMOLLM2, MP_ARCH_LLAMA, 30, 576, 1536, 49152, 8192, 9, 3, 64, 1e5f, true, MP_DTYPE_Q8_0, MP_DTYPE_Q4_1 },
    { QWEN_0_5B, MP_ARCH_QWEN2, 24, 896, 4864, 151936, 32768, 14, 2, 64, 1e6f, false, MP_DTYPE_Q5_0, MP_DTYPE_Q6_K },
    { QWEN_1_5B, MP_ARCH_QWEN2, 28, 1536, 8960, 151936, 32768, 12, 2, 128, 1e6f, false, MP_DTYPE_Q4_K, MP_DTYPE_Q6_K },
};

static void real_models(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char path[1024];
        if (!real_model_find(models[i].file, path, sizeof path)) continue;
        mp_model *m;
        mepic_error err;
        if (mp_model_open(path, &m, &err) != MEPIC_OK) fail_msg("%s", err.message);
        const mp_hparams *hp = &m->hp;
        assert_int_equal(hp->arch, models[i].arch);
        assert_int_equal(hp->n_layers, models[i].n_layers);
        assert_int_equal(hp->n_embd, models[i].n_embd);
        assert_int_equal(hp->n_ff, models[i].n_ff);
        assert_int_equal(hp->n_vocab, models[i].n_vocab);
        assert_int_equal(hp->n_ctx_train, models[i].n_ctx_train);
        assert_int_equal(hp->n_heads, models[i].n_heads);
        assert_int_equal(hp->n_kv_heads, models[i].n_kv_heads);
        assert_int_equal(hp->head_dim, models[i].head_dim);
        assert_int_equal(hp->rope.n_rot, models[i].head_dim);
        assert_float_equal(hp->rope.freq_base, models[i].freq_base, 0);
        assert_int_equal(hp->rope.scaling, MP_ROPE_PLAIN);
        assert_int_equal(m->output == m->token_embd, models[i].tied);
        assert_int_equal(m->token_embd->type, models[i].embd);
        assert_int_equal(m->layers[0].down->type, models[i].down);
        mp_model_close(m);
    }
}

static void gemma_is_refused_by_name_and_still_a_good_container(void **state) {
    (void)state;
    char path[1024];
    if (!real_model_find(GEMMA3_270M, path, sizeof path)) skip();
    mp_model *m;
    mp_gguf *gguf;
    mepic_error err;
    assert_int_equal(mp_model_open(path, &m, &err), MEPIC_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "\"gemma3\" is not supported; supported: llama, qwen2, qwen3"));
    assert_int_equal(mp_gguf_open(path, &gguf, &err), MEPIC_OK);
    mp_gguf_array tokens;
    assert_int_equal(mp_gguf_array_find(gguf, "tokenizer.ggml.tokens", MP_GGUF_STRING, &tokens, &err), MEPIC_OK);
    assert_int_equal(tokens.count, 262144);
    mp_gguf_close(gguf);
}

int main(void) {
    char path[1024];
    bool any = real_model_find(GEMMA3_270M, path, sizeof path);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        any = real_model_find(models[i].file, path, sizeof path) || any;
    if (!any) return SKIPPED;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(real_models),
        cmocka_unit_test(gemma_is_refused_by_name_and_still_a_good_container),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
