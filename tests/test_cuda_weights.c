/* backend/cuda/weights: what lies on the device against the dequantizer; backend/cuda/device: running out of memory. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>

#include "backend/cuda/weights.h"
#include "support/gpu.h"
#include "support/tiny.h"

static mp_cu_device device;

static void ok(mepic_status status, const mepic_error *err) {
    if (status != MEPIC_OK) fail_msg("%s", err->message);
}

static void check_matrix(const mp_bf16 *at, const mp_tensor *const tensors[3], const char *what) {
    assert_int_equal((uintptr_t)at % 256, 0);
    for (int t = 0; t < 3 && tensors[t]; t++) {
        size_t n = (size_t)(tensors[t]->ne[0] * tensors[t]->ne[1]);
        float *want = malloc(n * sizeof *want);
        assert_non_null(want);
        mp_dtype_dequantize(tensors[t]->type, tensors[t]->data, want, n);
        uint16_t *got = gpu_get(at, n * sizeof *got);
        for (size_t i = 0; i < n; i++) {
            if (got[i] != mp_f32_to_bf16(want[i])) fail_msg("%s, part %d, weight %zu", what, t, i);
        }
        free(got);
        free(want);
        at += n;
    }
}
#define CHECK_MATRIX(at, what, ...) check_matrix(at, (const mp_tensor *const[3]){ __VA_ARGS__ }, what)

static void check_vector(const float *at, const mp_tensor *const tensors[3]) {
    if (!tensors[0]) {
        assert_null(at);
        return;
    }
    for (int t = 0; t < 3 && tensors[t]; t++) {
        float *got = gpu_get(at, tensors[t]->bytes);
        assert_memory_equal(got, tensors[t]->data, tensors[t]->bytes);
        free(got);
        at += tensors[t]->ne[0];
    }
}
#define CHECK_VECTOR(at, ...) check_vector(at, (const mp_tensor *const[3]){ __VA_ARGS__ })

static void check_model(const mp_synth_spec *spec) {
    void *bytes;
    mepic_error err;
    mp_model *model = tiny_model_open(spec, &bytes);
    mp_cu_weights w;
    ok(mp_cu_weights_open(&device, model, NULL, &w, &err), &err);
    assert_int_equal(w.bytes, mp_cu_weights_bytes(model));
    CHECK_MATRIX(w.token_embd, "token_embd", model->token_embd);
    if (spec->tied) {
        assert_ptr_equal(w.output, w.token_embd);
    } else {
        CHECK_MATRIX(w.output, "output", model->output);
    }
    CHECK_VECTOR(w.output_norm, model->output_norm);
    for (uint32_t i = 0; i < model->hp.n_layers; i++) {
        const mp_layer *t = &model->layers[i];
        const mp_cu_layer *l = &w.layers[i];
        CHECK_MATRIX(l->wqkv, "qkv", t->wq, t->wk, t->wv);
        CHECK_MATRIX(l->wo, "o", t->wo);
        CHECK_MATRIX(l->gate_up, "gate, up", t->gate, t->up);
        CHECK_MATRIX(l->down, "down", t->down);
        CHECK_VECTOR(l->attn_norm, t->attn_norm);
        CHECK_VECTOR(l->ffn_norm, t->ffn_norm);
        CHECK_VECTOR(l->bias, t->bq, t->bk, t->bv);
        CHECK_VECTOR(l->q_norm, t->q_norm);
        CHECK_VECTOR(l->k_norm, t->k_norm);
    }
    mp_cu_weights_close(&device, &w);
    mp_model_close(model);
    free(bytes);
}

static void weights(void **state) {
    (void)state;
    static const mp_arch archs[] = { MP_ARCH_LLAMA, MP_ARCH_QWEN2, MP_ARCH_QWEN3 };
    static const mp_dtype types[] = { MP_DTYPE_F32, MP_DTYPE_BF16, MP_DTYPE_Q8_0, MP_DTYPE_Q5_1 };
    for (size_t a = 0; a < 3; a++) {
        for (size_t t = 0; t < 4; t++) {
            mp_synth_spec spec = mp_synth_tiny(archs[a]);
            mp_synth_set_type(&spec, types[t]);
            spec.tied = t % 2 == 1;
            check_model(&spec);
        }
    }
    /* Pieces: a matrix larger than a staging buffer, of blocks of 256. */
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    mp_synth_set_type(&spec, MP_DTYPE_Q4_K);
    spec.hp.n_embd = spec.hp.n_ff = 1024;
    spec.hp.n_vocab = 40000;
    spec.types[MP_SYNTH_EMBD] = MP_DTYPE_F16;
    spec.hp.n_heads = 16;
    check_model(&spec);
}

/* More than a device has: the message has the numbers, and the device goes on. */
static void no_room(void **state) {
    (void)state;
    void *p;
    mepic_error err;
    assert_int_equal(mp_cu_take(&device, (size_t)1 << 45, "the moon", &p, &err), MEPIC_ERR_NOMEM);
    assert_non_null(strstr(err.message, "the moon takes 33554432 MiB"));
    assert_int_equal(mp_cu_status(&device, &err), MEPIC_OK);
    ok(mp_cu_take(&device, 1 << 20, "a MiB", &p, &err), &err);
    mp_cu_drop(&device, p);
}

int main(void) {
    if (mp_cu_device_count() == 0) return 77;
    mepic_error err;
    if (mp_cu_device_open(0, &device, &err) != MEPIC_OK) {
        printf("%s\n", err.message);
        return 1;
    }
    const struct CMUnitTest tests[] = { cmocka_unit_test(weights), cmocka_unit_test(no_room) };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    mp_cu_device_close(&device);
    return failed;
}
