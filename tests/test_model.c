/* model/model, model/hparams, model/digest: synthetic models of every architecture are read as they were written, and a
 * file with one thing wrong is refused by the name of that thing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "support/tiny.h"

/* ---- Editing a model's bytes ------------------------------------------------------------------------------------- */

typedef struct image {
    uint8_t *bytes;
    size_t n;
} image;

static image make(const mp_synth_spec *spec) {
    image m = { 0 };
    m.bytes = tiny_model_bytes(spec, &m.n);
    return m;
}

static void put(uint8_t *p, uint64_t v, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)(v >> 8 * i);
}

/* The bytes after a name in the file: of a key, its type and value; of a tensor, its dimensions, type and offset. */
static uint8_t *after(image m, const char *name) {
    uint8_t want[256];
    size_t len = strlen(name);
    put(want, len, 8);
    memcpy(want + 8, name, len);
    uint8_t *p = memmem(m.bytes, m.n, want, 8 + len);
    if (!p) fail_msg("%s is not in the file", name);
    return p + 8 + len;
}

static void set_u32(image m, const char *key, uint32_t v) {
    put(after(m, key), MP_GGUF_U32, 4);
    put(after(m, key) + 4, v, 4);
}

static void set_f32(image m, const char *key, float v) {
    put(after(m, key), MP_GGUF_F32, 4);
    memcpy(after(m, key) + 4, &v, sizeof v);
}

/* Adds a key in front of the others; another one fills up to the alignment, so that all data stays where it is. */
static void add_key(image *m, const char *key, mp_gguf_type type, const void *value, size_t bytes) {
    size_t entry = 8 + strlen(key) + 4 + bytes, filler = 8 + 6 + 4 + 8;
    size_t pad = (32 - (entry + filler) % 32) % 32, extra = entry + filler + pad;
    uint8_t *grown = calloc(1, m->n + extra), *p = grown + 24;
    assert_non_null(grown);
    memcpy(grown, m->bytes, 24);
    put(grown + 16, grown[16] + 2, 1);
    memcpy(p + extra, m->bytes + 24, m->n - 24);
    put(p, strlen(key), 8);
    memcpy(p + 8, key, strlen(key));
    put(p + 8 + strlen(key), type, 4);
    memcpy(p + 12 + strlen(key), value, bytes);
    p += entry;
    put(p, 6, 8);
    snprintf((char *)p + 8, 7, "x%05u", (unsigned)(m->n % 100000)); /* a name of its own each time */
    put(p + 14, MP_GGUF_STRING, 4);
    put(p + 18, pad, 8);
    free(m->bytes);
    *m = (image){ grown, m->n + extra };
}

static void add_u32(image *m, const char *key, uint32_t v) {
    add_key(m, key, MP_GGUF_U32, &v, sizeof v);
}

static void add_f32(image *m, const char *key, float v) {
    add_key(m, key, MP_GGUF_F32, &v, sizeof v);
}

static void add_text(image *m, const char *key, const char *text) {
    uint8_t value[128];
    put(value, strlen(text), 8);
    memcpy(value + 8, text, strlen(text));
    add_key(m, key, MP_GGUF_STRING, value, 8 + strlen(text));
}

static mepic_status open_image(image m, mp_model **out, mepic_error *err) {
    mp_gguf *gguf;
    memset(err, 0, sizeof *err);
    mepic_status status = mp_gguf_open_memory(m.bytes, m.n, "file", &gguf, err);
    return status == MEPIC_OK ? mp_model_open_gguf(gguf, out, err) : status;
}

/* Consumes the image. */
static void accept(image m, const char *what) {
    mp_model *model;
    mepic_error err;
    if (open_image(m, &model, &err) != MEPIC_OK) fail_msg("%s: %s", what, err.message);
    mp_model_close(model);
    free(m.bytes);
}

static void refuse(image m, const char *what, mepic_status status, const char *culprit) {
    mp_model *model = NULL;
    mepic_error err;
    mepic_status got = open_image(m, &model, &err);
    free(m.bytes);
    if (got == status && strstr(err.message, culprit) && strncmp(err.message, "file", 4) == 0) return;
    fail_msg("%s: %s \"%s\"; expected %s and \"%s\"", what, mepic_status_name(got), err.message,
             mepic_status_name(status), culprit);
}

static image tiny(mp_arch arch) {
    mp_synth_spec spec = mp_synth_tiny(arch);
    return make(&spec);
}

/* ---- Good models ------------------------------------------------------------------------------------------------- */

static void models_are_read_as_written(void **state) {
    (void)state;
    static const mp_arch archs[] = { MP_ARCH_LLAMA, MP_ARCH_QWEN2, MP_ARCH_QWEN3 };
    for (size_t a = 0; a < 3; a++) {
        for (int tied = 0; tied < 2; tied++) {
            mp_synth_spec spec = mp_synth_tiny(archs[a]);
            spec.tied = tied;
            spec.hp.n_layers = 3;
            spec.hp.head_dim = 32; /* heads wider than the embedding gives them */
            spec.hp.rope.n_rot = 24;
            void *bytes;
            mp_model *m = tiny_model_open(&spec, &bytes);
            const mp_hparams *hp = &m->hp;
            assert_int_equal(hp->arch, archs[a]);
            assert_int_equal(hp->n_layers, 3);
            assert_int_equal(hp->n_embd, 64);
            assert_int_equal(hp->n_ff, 128);
            assert_int_equal(hp->n_vocab, 299);
            assert_int_equal(hp->n_ctx_train, 4096);
            assert_int_equal(hp->n_heads, 4);
            assert_int_equal(hp->n_kv_heads, 2);
            assert_int_equal(hp->head_dim, 32);
            assert_float_equal(hp->norm_eps, 1e-5f, 0);
            assert_int_equal(hp->qkv_bias, archs[a] == MP_ARCH_QWEN2);
            assert_int_equal(hp->qk_norm, archs[a] == MP_ARCH_QWEN3);
            assert_int_equal(hp->rope.pairs, archs[a] == MP_ARCH_LLAMA ? MP_ROPE_ADJACENT : MP_ROPE_HALVES);
            assert_int_equal(hp->rope.scaling, MP_ROPE_PLAIN);
            assert_int_equal(hp->rope.n_rot, 24);
            assert_int_equal(m->output == m->token_embd, tied);
            assert_null(m->rope_factors);
            for (uint32_t i = 0; i < 3; i++) {
                const mp_layer *l = &m->layers[i];
                assert_int_equal(l->wq->ne[0] * 1000 + l->wq->ne[1], 64128);
                assert_int_equal(l->wk->ne[0] * 1000 + l->wk->ne[1], 64064);
                assert_int_equal(l->wo->ne[0] * 1000 + l->wo->ne[1], 128064);
                assert_int_equal(l->down->ne[0] * 1000 + l->down->ne[1], 128064);
                assert_int_equal(l->bq != NULL && l->bk != NULL && l->bv != NULL, hp->qkv_bias);
                assert_int_equal(l->q_norm != NULL && l->k_norm != NULL, hp->qk_norm);
                if (hp->qk_norm) assert_int_equal(l->k_norm->ne[0], 32);
            }
            char name[32];
            snprintf(name, sizeof name, "blk.2.ffn_up.weight");
            assert_ptr_equal(m->layers[2].up, mp_gguf_tensor(m->gguf, name));
            mp_model_close(m);
            free(bytes);
        }
    }
    mp_model_close(NULL);
}

static void every_weight_type(void **state) {
    (void)state;
    static const mp_dtype types[] = { MP_DTYPE_F32,  MP_DTYPE_F16,  MP_DTYPE_BF16, MP_DTYPE_Q4_0,
                                      MP_DTYPE_Q4_1, MP_DTYPE_Q5_0, MP_DTYPE_Q5_1, MP_DTYPE_Q8_0,
                                      MP_DTYPE_Q4_K, MP_DTYPE_Q5_K, MP_DTYPE_Q6_K };
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.n_embd = spec.hp.n_ff = 256;
    spec.hp.head_dim = 64;
    spec.hp.n_layers = 1;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        mp_synth_set_type(&spec, types[i]);
        spec.types[MP_SYNTH_V] = MP_DTYPE_F16; /* types may be mixed */
        void *bytes;
        mp_model *m = tiny_model_open(&spec, &bytes);
        assert_int_equal(m->layers[0].gate->type, types[i]);
        assert_int_equal(m->layers[0].wv->type, MP_DTYPE_F16);
        mp_model_close(m);
        free(bytes);
    }
}

/* A generated file must be the same for the same seed, and its values what they are said to be. */
static void synthetic_weights(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_QWEN3);
    image a = make(&spec), b = make(&spec);
    assert_int_equal(a.n, b.n);
    assert_memory_equal(a.bytes, b.bytes, a.n);
    spec.seed = 2;
    image c = make(&spec);
    assert_int_equal(a.n, c.n);
    assert_true(memcmp(a.bytes, c.bytes, a.n) != 0);
    mp_model *m;
    mepic_error err;
    assert_int_equal(open_image(a, &m, &err), MEPIC_OK);
    const struct {
        const mp_tensor *t;
        double mean, deviation;
    } want[] = { { m->layers[0].down, 0, 1 / 11.314 },
                 { m->layers[0].wq, 0, 1 / 8.0 },
                 { m->token_embd, 0, 1 },
                 { m->layers[1].attn_norm, 1, 0.1 } };
    for (size_t i = 0; i < 4; i++) {
        const float *x = want[i].t->data;
        size_t n = want[i].t->bytes / 4;
        double sum = 0, squares = 0;
        for (size_t j = 0; j < n; j++) sum += (double)x[j], squares += (double)x[j] * (double)x[j];
        double mean = sum / (double)n, variance = squares / (double)n - mean * mean;
        assert_float_equal(mean, want[i].mean, 0.05);
        assert_float_equal(variance, want[i].deviation * want[i].deviation,
                           0.3 * want[i].deviation * want[i].deviation);
    }
    mp_model_close(m);
    free(a.bytes);
    free(b.bytes);
    free(c.bytes);
}

static void a_donors_vocabulary_is_copied(void **state) {
    (void)state;
    mp_synth_spec donor = mp_synth_tiny(MP_ARCH_LLAMA);
    donor.hp.n_vocab = 333; /* padded with unused tokens */
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_QWEN2);
    spec.donor = tiny_model_write(&donor);
    void *bytes;
    mp_model *m = tiny_model_open(&spec, &bytes);
    assert_int_equal(m->hp.n_vocab, 333);
    mp_gguf_array tokens;
    assert_int_equal(mp_gguf_array_find(m->gguf, "tokenizer.ggml.tokens", MP_GGUF_STRING, &tokens, NULL), MEPIC_OK);
    mp_str s = { 0 };
    size_t at = 0;
    for (int i = 0; i <= 298; i++) {
        assert_true(mp_gguf_array_str(&tokens, &at, &s));
        if (i == 32) assert_true(s.len == 2 && memcmp(s.data, "\xc4\xa0", 2) == 0); /* the space */
        if (i == 'A') assert_true(s.len == 1 && s.data[0] == 'A');
        if (i == 262) assert_true(s.len == 5 && memcmp(s.data, "\xc4\xa0the", 5) == 0);
    }
    assert_true(s.len == 10 && memcmp(s.data, "<|im_end|>", 10) == 0);
    mp_model_close(m);
    free(bytes);
}

/* ---- V7: hyper-parameters ---------------------------------------------------------------------------------------- */

static void counts_out_of_range(void **state) {
    (void)state;
    static const struct {
        const char *key;
        uint32_t max;
    } keys[] = {
        { "llama.block_count", 1024 },          { "llama.context_length", 1 << 24 },
        { "llama.embedding_length", 1 << 16 },  { "llama.feed_forward_length", 1 << 20 },
        { "llama.attention.head_count", 1024 }, { "llama.attention.head_count_kv", 1024 },
        { "llama.attention.key_length", 256 },  { "llama.attention.value_length", 256 },
        { "llama.rope.dimension_count", 16 }, /* the width of a head */
    };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        static const uint64_t outside[] = { 0, 1 /* stands for max + 1 */, UINT32_MAX, INT32_MAX };
        for (size_t v = 0; v < 4; v++) {
            image m = tiny(MP_ARCH_LLAMA);
            set_u32(m, keys[i].key, v == 1 ? keys[i].max + 1 : (uint32_t)outside[v]);
            refuse(m, keys[i].key, MEPIC_ERR_FORMAT, keys[i].key);
        }
        image m = tiny(MP_ARCH_LLAMA);
        put(after(m, keys[i].key), MP_GGUF_I32, 4);
        put(after(m, keys[i].key) + 4, UINT32_MAX, 4); /* -1 */
        refuse(m, keys[i].key, MEPIC_ERR_FORMAT, "negative");
        m = tiny(MP_ARCH_LLAMA);
        put(after(m, keys[i].key), MP_GGUF_F32, 4);
        refuse(m, keys[i].key, MEPIC_ERR_FORMAT, "not an integer");
        /* The largest value is in range: what is wrong then is another thing, as the tensors' shapes. */
        m = tiny(MP_ARCH_LLAMA);
        set_u32(m, keys[i].key, keys[i].max);
        mp_model *model = NULL;
        mepic_error err;
        if (open_image(m, &model, &err) == MEPIC_OK)
            mp_model_close(model);
        else
            assert_null(strstr(err.message, "possible are"));
        free(m.bytes);
    }
}

static void reals_out_of_range(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.rope.scaling = MP_ROPE_YARN;
    static const struct {
        const char *key;
        float bad[4];
    } keys[] = {
        { "llama.attention.layer_norm_rms_epsilon", { 0, -1, 0.2f, INFINITY } },
        { "llama.rope.freq_base", { 0, 1, -1, 2e12f } },
        { "llama.rope.scaling.factor", { 0, -1, 2e6f, INFINITY } },
        { "llama.rope.scaling.yarn_ext_factor", { -0.5f, 1.5f, -1, INFINITY } },
        { "llama.rope.scaling.yarn_attn_factor", { 0, -1, 101, INFINITY } },
        { "llama.rope.scaling.yarn_beta_fast", { 0, -1, 20000, INFINITY } },
        { "llama.rope.scaling.yarn_beta_slow", { 0, -1, 20000, INFINITY } },
    };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        for (int v = 0; v < 5; v++) {
            image m = make(&spec);
            set_f32(m, keys[i].key, v == 4 ? NAN : keys[i].bad[v]);
            refuse(m, keys[i].key, MEPIC_ERR_FORMAT, keys[i].key);
        }
    }
    image m = make(&spec);
    set_f32(m, "llama.rope.scaling.yarn_beta_fast", 1);
    refuse(m, "beta", MEPIC_ERR_FORMAT, "beta_fast");
    m = make(&spec);
    set_u32(m, "llama.rope.scaling.original_context_length", 0);
    refuse(m, "original", MEPIC_ERR_FORMAT, "original_context_length");
}

static void heads_that_do_not_fit(void **state) {
    (void)state;
    image m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.attention.head_count_kv", 3);
    refuse(m, "4 heads on 3", MEPIC_ERR_FORMAT, "3 KV heads");
    m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.attention.head_count", 34);
    refuse(m, "17 heads share one", MEPIC_ERR_UNSUPPORTED, "at most 16");
    static const uint32_t widths[] = { 8, 17, 24 + 4, 250 };
    for (size_t i = 0; i < 4; i++) {
        m = tiny(MP_ARCH_LLAMA);
        set_u32(m, "llama.attention.key_length", widths[i]);
        refuse(m, "width", MEPIC_ERR_UNSUPPORTED, "multiples of 16");
    }
    m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.attention.value_length", 32);
    refuse(m, "value width", MEPIC_ERR_UNSUPPORTED, "values of 32");
    m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.rope.dimension_count", 15);
    refuse(m, "odd rotation", MEPIC_ERR_FORMAT, "even");
    m = tiny(MP_ARCH_LLAMA);
    memcpy(after(m, "llama.attention.key_length") - 3, "xxx", 3); /* the key is gone: 64 / 4 = 16 */
    accept(m, "width from the embedding");
    m = tiny(MP_ARCH_LLAMA);
    memcpy(after(m, "llama.attention.head_count_kv") - 2, "xx", 2); /* gone: one KV head per head */
    refuse(m, "no sharing", MEPIC_ERR_FORMAT, "attn_k.weight");
}

/* ---- What would change answers silently -------------------------------------------------------------------------- */

static void other_architectures_and_features(void **state) {
    (void)state;
    image m = tiny(MP_ARCH_LLAMA);
    memcpy(after(m, "general.architecture") + 4 + 8, "llamb", 5);
    refuse(m, "architecture", MEPIC_ERR_UNSUPPORTED, "\"llamb\" is not supported; supported: llama, qwen2, qwen3");
    m = tiny(MP_ARCH_LLAMA);
    memcpy(after(m, "general.architecture") - 3, "xxx", 3);
    refuse(m, "no architecture", MEPIC_ERR_FORMAT, "general.architecture");

    static const struct {
        const char *key;
        float bad, neutral;
    } features[] = {
        { "llama.expert_count", 8, 0 },
        { "llama.logit_scale", 0.5f, 1 },
        { "llama.embedding_scale", 12, 1 },
        { "llama.residual_scale", 0.2f, 1 },
        { "llama.attention.scale", 0.1f, 0 },
        { "llama.attention.temperature_scale", 0.1f, 0 },
        { "llama.attention.clamp_kqv", 8, 0 },
        { "llama.attention.max_alibi_bias", 8, 0 },
        { "llama.attn_logit_softcapping", 50, 0 },
        { "llama.final_logit_softcapping", 30, 0 },
        { "llama.rope.scaling.yarn_log_multiplier", 0.1f, 0 },
        { "llama.attention.sliding_window", 1024, 4096 },
    };
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        m = tiny(MP_ARCH_LLAMA);
        add_f32(&m, features[i].key, features[i].bad);
        refuse(m, features[i].key, MEPIC_ERR_UNSUPPORTED, features[i].key);
        m = tiny(MP_ARCH_LLAMA);
        add_f32(&m, features[i].key, features[i].neutral);
        accept(m, features[i].key);
    }
    m = tiny(MP_ARCH_LLAMA);
    add_u32(&m, "llama.expert_count", 8);
    refuse(m, "experts", MEPIC_ERR_UNSUPPORTED, "mixture of experts");
    m = tiny(MP_ARCH_LLAMA);
    add_u32(&m, "split.count", 2);
    refuse(m, "part", MEPIC_ERR_UNSUPPORTED, "2 parts");
    m = tiny(MP_ARCH_LLAMA);
    add_text(&m, "general.type", "adapter");
    refuse(m, "adapter", MEPIC_ERR_UNSUPPORTED, "\"adapter\"");
    m = tiny(MP_ARCH_LLAMA);
    add_text(&m, "general.type", "model");
    accept(m, "a model that says so");
    static const char *const types[] = { "longrope", "dynamic", "" };
    for (size_t i = 0; i < 3; i++) {
        m = tiny(MP_ARCH_LLAMA);
        add_text(&m, "llama.rope.scaling.type", types[i]);
        refuse(m, "scaling", MEPIC_ERR_UNSUPPORTED, "RoPE scaling");
    }
    m = tiny(MP_ARCH_LLAMA);
    add_text(&m, "llama.rope.scaling.type", "linear");
    refuse(m, "linear by nothing", MEPIC_ERR_FORMAT, "rope.scale_linear");
}

static void scalings_are_recognized(void **state) {
    (void)state;
    static const struct {
        const char *type, *factor_key;
        mp_rope_scaling scaling;
        float factor;
    } cases[] = {
        { NULL, NULL, MP_ROPE_PLAIN, 1 },
        { "none", "llama.rope.scaling.factor", MP_ROPE_PLAIN, 1 },
        { NULL, "llama.rope.scaling.factor", MP_ROPE_LINEAR, 2 },
        { NULL, "llama.rope.scale_linear", MP_ROPE_LINEAR, 2 },
        { "linear", "llama.rope.scaling.factor", MP_ROPE_LINEAR, 2 },
        { "yarn", "llama.rope.scaling.factor", MP_ROPE_YARN, 2 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        image m = tiny(MP_ARCH_LLAMA);
        if (cases[i].type) add_text(&m, "llama.rope.scaling.type", cases[i].type);
        if (cases[i].factor_key) add_f32(&m, cases[i].factor_key, 2);
        mp_model *model;
        mepic_error err;
        if (open_image(m, &model, &err) != MEPIC_OK) fail_msg("%s", err.message);
        assert_int_equal(model->hp.rope.scaling, cases[i].scaling);
        assert_float_equal(model->hp.rope.factor, cases[i].factor, 0);
        assert_int_equal(model->hp.rope.original_ctx, 4096); /* not given: what the model was trained for */
        if (cases[i].scaling == MP_ROPE_YARN) {
            assert_float_equal(model->hp.rope.yarn_beta_fast, 32, 0);
            assert_float_equal(model->hp.rope.yarn_attn_factor, 1, 0);
        }
        mp_model_close(model);
        free(m.bytes);
    }
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------- */

static void wrong_tensors(void **state) {
    (void)state;
    static const char *const names[] = { "token_embd.weight",     "output_norm.weight",       "blk.0.attn_norm.weight",
                                         "blk.1.attn_q.weight",   "blk.0.attn_k.weight",      "blk.1.attn_v.weight",
                                         "blk.0.attn_k.bias",     "blk.1.attn_output.weight", "blk.0.ffn_norm.weight",
                                         "blk.1.ffn_gate.weight", "blk.0.ffn_up.weight",      "blk.1.ffn_down.weight" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        image m = tiny(MP_ARCH_QWEN2);
        after(m, names[i])[-1] = 'X';
        refuse(m, names[i], MEPIC_ERR_FORMAT, names[i]); /* missing */
        m = tiny(MP_ARCH_QWEN2);
        uint8_t *t = after(m, names[i]);
        t[4] = (uint8_t)(t[4] - 32); /* inputs */
        refuse(m, names[i], MEPIC_ERR_FORMAT, names[i]);
        m = tiny(MP_ARCH_QWEN2);
        t = after(m, names[i]);
        if (t[0] == 1) {
            put(t + 12, MP_DTYPE_F16, 4);
            refuse(m, names[i], MEPIC_ERR_UNSUPPORTED, "F32");
        } else {
            t[12]--; /* outputs */
            refuse(m, names[i], MEPIC_ERR_FORMAT, i == 0 ? "299 tokens" : names[i]);
        }
    }
    image m = tiny(MP_ARCH_QWEN3);
    after(m, "blk.1.attn_q_norm.weight")[4] = 8;
    refuse(m, "q_norm", MEPIC_ERR_FORMAT, "blk.1.attn_q_norm.weight");
    m = tiny(MP_ARCH_LLAMA);
    after(m, "output.weight")[12]--;
    refuse(m, "output", MEPIC_ERR_FORMAT, "output.weight");
    m = tiny(MP_ARCH_LLAMA);
    memcpy(after(m, "output.weight") - 13, "output.weighs", 13);
    refuse(m, "a tensor nobody asked for", MEPIC_ERR_UNSUPPORTED, "output.weighs");
    m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.block_count", 1);
    refuse(m, "a layer too many", MEPIC_ERR_UNSUPPORTED, "blk.1.");
    m = tiny(MP_ARCH_LLAMA);
    set_u32(m, "llama.block_count", 3);
    refuse(m, "a layer too few", MEPIC_ERR_FORMAT, "blk.2.attn_norm.weight");
    m = tiny(MP_ARCH_LLAMA);
    put(after(m, "tokenizer.ggml.tokens") + 4, MP_GGUF_U8, 4);
    mp_model *model;
    mepic_error err;
    assert_int_not_equal(open_image(m, &model, &err), MEPIC_OK);
    free(m.bytes);
}

static void llama3_factors(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.rope.scaling = MP_ROPE_LLAMA3;
    void *bytes;
    mp_model *model = tiny_model_open(&spec, &bytes);
    assert_int_equal(model->hp.rope.scaling, MP_ROPE_LLAMA3);
    assert_non_null(model->rope_factors);
    size_t offset = (size_t)((const uint8_t *)model->rope_factors->data - (const uint8_t *)bytes);
    mp_model_close(model);
    free(bytes);
    static const float bad[] = { 0, -1, NAN, INFINITY, 2e6f };
    for (size_t i = 0; i < 5; i++) {
        image m = make(&spec);
        memcpy(m.bytes + offset + 4, &bad[i], 4);
        refuse(m, "factor", MEPIC_ERR_FORMAT, "factor 1 in \"rope_freqs.weight\"");
    }
    image m = make(&spec);
    add_f32(&m, "llama.rope.scaling.factor", 2);
    refuse(m, "two scalings", MEPIC_ERR_UNSUPPORTED, "rope_freqs.weight");
    spec = mp_synth_tiny(MP_ARCH_QWEN2);
    spec.hp.rope.scaling = MP_ROPE_LLAMA3;
    refuse(make(&spec), "qwen2 has none", MEPIC_ERR_UNSUPPORTED, "rope_freqs.weight");
}

static void out_of_memory(void **state) {
    (void)state;
    image m = tiny(MP_ARCH_QWEN2);
    for (uint64_t n = 1;; n++) {
        mp_model *model = NULL;
        mepic_error err;
        mp_mem_fail_at(n, false);
        mepic_status status = open_image(m, &model, &err);
        mp_mem_fail_at(0, false);
        mp_model_close(model);
        if (status == MEPIC_OK) break;
        assert_int_equal(status, MEPIC_ERR_NOMEM);
        assert_true(n < 20);
    }
    free(m.bytes);
}

/* ---- Digest ------------------------------------------------------------------------------------------------------ */

static mp_digest digest_of(const char *path, const char *cache) {
    mp_model *model;
    mp_digest d;
    assert_int_equal(mp_model_open(path, &model, NULL), MEPIC_OK);
    assert_int_equal(mp_model_digest(model, cache, NULL, &d, NULL), MEPIC_OK);
    mp_model_close(model);
    return d;
}

/* The only file in `dir`. */
static bool only_file(const char *dir, char *path, size_t cap) {
    DIR *d = opendir(dir);
    bool found = false;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        assert_false(found);
        snprintf(path, cap, "%s/%s", dir, e->d_name);
        found = true;
    }
    if (d) closedir(d);
    return found;
}

static void write_text(const char *path, const char *text, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    fclose(f);
}

static void the_digest_is_remembered(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_QWEN2);
    const char *path = tiny_model_write(&spec);
    size_t n;
    uint8_t *bytes = tiny_model_bytes(&spec, &n);
    mp_sha256 *sha = mp_sha256_open();
    mp_sha256_begin(sha);
    mp_sha256_update(sha, bytes, n);
    mp_digest want = mp_sha256_end(sha);
    mp_sha256_close(sha);
    free(bytes);

    char root[] = "/tmp/mepic-digest-XXXXXX", dir[64], entry[512], text[256];
    assert_non_null(mkdtemp(root));
    snprintf(dir, sizeof dir, "%s/digests", root);
    mp_digest d = digest_of(path, NULL);
    assert_true(mp_digest_equal(&d, &want));
    d = digest_of(path, root); /* just written: could be written again within the clock's grain */
    assert_true(mp_digest_equal(&d, &want));
    assert_false(only_file(dir, entry, sizeof entry));
    struct timespec times[2] = { { .tv_sec = 1000000 }, { .tv_sec = 1000000, .tv_nsec = 5 } };
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    d = digest_of(path, root);
    assert_true(mp_digest_equal(&d, &want));
    assert_true(only_file(dir, entry, sizeof entry));

    FILE *f = fopen(entry, "rb");
    assert_non_null(f);
    size_t len = fread(text, 1, sizeof text, f);
    fclose(f);
    assert_true(len > 65 && len < sizeof text);
    text[len - 2] = text[len - 2] == '0' ? '1' : '0'; /* another digest: it is believed, so nothing was hashed */
    write_text(entry, text, len);
    d = digest_of(path, root);
    assert_false(mp_digest_equal(&d, &want));

    static const size_t cuts[] = { 0, 1, 20, 64 };
    for (size_t i = 0; i < 4; i++) { /* torn: computed again, and repaired */
        write_text(entry, text, len - 1 - cuts[i]);
        d = digest_of(path, root);
        assert_true(mp_digest_equal(&d, &want));
    }
    text[len] = '\n'; /* something after it */
    write_text(entry, text, len + 1);
    d = digest_of(path, root);
    assert_true(mp_digest_equal(&d, &want));
    text[len - 2] = 'g'; /* no hexadecimal digit */
    write_text(entry, text, len);
    d = digest_of(path, root);
    assert_true(mp_digest_equal(&d, &want));

    text[len - 2] = '0';
    write_text(entry, text, len);
    times[1].tv_nsec = 6; /* the model was written since */
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    d = digest_of(path, root);
    assert_true(mp_digest_equal(&d, &want));
    assert_true(only_file(dir, entry, sizeof entry));

    unlink(entry);
    rmdir(dir);
    rmdir(root);
    char nowhere[512];
    snprintf(nowhere, sizeof nowhere, "%s/cache", path);
    d = digest_of(path, nowhere); /* costs time only */
    assert_true(mp_digest_equal(&d, &want));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(models_are_read_as_written),
        cmocka_unit_test(every_weight_type),
        cmocka_unit_test(synthetic_weights),
        cmocka_unit_test(a_donors_vocabulary_is_copied),
        cmocka_unit_test(counts_out_of_range),
        cmocka_unit_test(reals_out_of_range),
        cmocka_unit_test(heads_that_do_not_fit),
        cmocka_unit_test(other_architectures_and_features),
        cmocka_unit_test(scalings_are_recognized),
        cmocka_unit_test(wrong_tensors),
        cmocka_unit_test(llama3_factors),
        cmocka_unit_test(out_of_memory),
        cmocka_unit_test(the_digest_is_remembered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
