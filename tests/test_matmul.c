/* backend/cpu/matmul.h on every instruction set of this machine, against sums in double over dequantized weights. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/kernels.h"
#include "backend/cpu/matmul.h"
#include "base/mem.h"
#include "support/random.h"

enum { MAX_ROWS = 20, MAX_IN = 1024, MAX_OUT = 150 };

static const mp_dtype all_types[] = {
    MP_DTYPE_F32,  MP_DTYPE_F16,  MP_DTYPE_BF16, MP_DTYPE_Q4_0, MP_DTYPE_Q4_1, MP_DTYPE_Q5_0,
    MP_DTYPE_Q5_1, MP_DTYPE_Q8_0, MP_DTYPE_Q4_K, MP_DTYPE_Q5_K, MP_DTYPE_Q6_K,
};
enum { N_TYPES = sizeof all_types / sizeof all_types[0] };

static rng dice = { 20261124 };

static float draw_float(float scale) {
    return rng_float(&dice, -scale, scale);
}

static void put_f16(uint8_t *p, float x) {
    uint16_t h = mp_f32_to_f16(x);
    memcpy(p, &h, 2);
}

/* A random block: any bytes are valid codes, but the scales must be numbers. */
static void draw_block(mp_dtype type, const mp_dtype_info *info, uint8_t *p) {
    for (uint32_t i = 0; i < info->bytes; i++) p[i] = (uint8_t)rng_next(&dice);
    float x = draw_float(0.1f);
    uint16_t bf16 = mp_f32_to_bf16(x);
    switch (type) {
    case MP_DTYPE_F32: memcpy(p, &x, 4); break;
    case MP_DTYPE_BF16: memcpy(p, &bf16, 2); break;
    case MP_DTYPE_Q6_K: put_f16(p + 208, x * 0.01f); break;
    case MP_DTYPE_Q4_1:
    case MP_DTYPE_Q5_1:
    case MP_DTYPE_Q4_K:
    case MP_DTYPE_Q5_K:
        put_f16(p, x);
        put_f16(p + 2, draw_float(0.1f));
        break;
    default: put_f16(p, x); break;
    }
}

typedef struct matrix {
    mp_tensor tensor;
    uint8_t *bytes;
    float *floats; /* [n_out, n_in] */
    uint32_t n_out, n_in;
    uint8_t *memory;
    mp_packed *packed;
} matrix;

static void matrix_pack(matrix *m, mp_threads *threads) {
    size_t bytes = mp_packed_size(&m->tensor);
    assert_int_equal(bytes % 64, 0);
    m->memory = mp_alloc_aligned(64, bytes);
    assert_int_equal(mp_packed_open(&m->tensor, threads, m->memory, &m->packed, NULL), MEPIC_OK);
    assert_int_equal(mp_packed_outputs(m->packed), m->n_out);
}

static void matrix_unpack(matrix *m) {
    mp_packed_close(m->packed);
    mp_free_aligned(m->memory, mp_packed_size(&m->tensor));
}

static void matrix_init(matrix *m, mp_dtype type, uint32_t n_out, uint32_t n_in, mp_threads *threads) {
    const mp_dtype_info *info = mp_dtype_find(type);
    size_t n_blocks = (size_t)n_out * n_in / info->len;
    *m = (matrix){ .n_out = n_out, .n_in = n_in };
    m->bytes = malloc(n_blocks * info->bytes);
    m->floats = malloc((size_t)n_out * n_in * sizeof *m->floats);
    for (size_t i = 0; i < n_blocks; i++) draw_block(type, info, m->bytes + i * info->bytes);
    mp_dtype_dequantize(type, m->bytes, m->floats, (size_t)n_out * n_in);
    m->tensor = (mp_tensor){
        .type = type, .n_dims = 2, .ne = { n_in, n_out, 1, 1 }, .data = m->bytes, .bytes = n_blocks * info->bytes
    };
    matrix_pack(m, threads);
}

static void matrix_clear(matrix *m) {
    matrix_unpack(m);
    free(m->bytes);
    free(m->floats);
}

typedef struct rig {
    mp_threads *one, *three;
    mp_qrows *q;
    float x[MAX_ROWS * MAX_IN];
    float y[MAX_ROWS * MAX_OUT], alone[MAX_ROWS * MAX_OUT];
} rig;

static rig *rig_open(void) {
    rig *g = malloc(sizeof *g);
    assert_int_equal(mp_threads_open(1, &g->one, NULL), MEPIC_OK);
    assert_int_equal(mp_threads_open(3, &g->three, NULL), MEPIC_OK);
    assert_int_equal(mp_qrows_open(MAX_ROWS, MAX_IN, &g->q, NULL), MEPIC_OK);
    /* rows of different size, with an outlier here and there, as activations have them; one block of zeros, one of
     * numbers too small to quantize */
    for (uint32_t i = 0; i < MAX_ROWS * MAX_IN; i++) {
        g->x[i] = draw_float(1.0f + (float)(i / MAX_IN)) * (rng_below(&dice, 64) == 0 ? 20.0f : 1.0f);
    }
    memset(g->x + 32, 0, 32 * sizeof(float));
    for (uint32_t i = 64; i < 96; i++) g->x[i] *= 1e-36f;
    return g;
}

static void rig_close(rig *g) {
    mp_qrows_close(g->q);
    mp_threads_close(g->three);
    mp_threads_close(g->one);
    free(g);
}

/* y = w x for one matrix; x: [n_rows, n_in]. */
static void product(rig *g, const mp_cpu_kernels *k, mp_threads *threads, const matrix *m, const float *x,
                    uint32_t n_rows, float *y, bool add) {
    mp_qrows_set(g->q, k, threads, x, n_rows, m->n_in);
    mp_matmul(k, threads, (const mp_packed *const[]){ m->packed }, 1, g->q, (float *[]){ y }, add);
}

static double largest_of(const float *x, uint32_t n) {
    double largest = 0;
    for (uint32_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)x[i]));
    return largest;
}

/* The product and how far off it may be. An input of a quantized product is off by half a step of its block, which is
 * the block's largest input / 32767; rounding of the sums adds less than a third of that. A plain product rounds once
 * an input. */
static double dot(const matrix *m, uint32_t o, const float *x, double *allowed) {
    const float *w = m->floats + (size_t)o * m->n_in;
    bool quantized = mp_dtype_find(m->tensor.type)->len > 1;
    double sum = 0, size = 0, largest = 0;
    for (uint32_t k = 0; k < m->n_in; k++) {
        if (k % 32 == 0) largest = largest_of(x + k, m->n_in - k < 32 ? m->n_in - k : 32);
        sum += (double)w[k] * x[k];
        size += fabs((double)w[k]) * (quantized ? largest : fabs((double)x[k]));
    }
    *allowed = size * (quantized ? 0.5 / 32767 + 5e-6 : (m->n_in + 1) * 0x1p-24);
    return sum;
}

/* The largest error, relative to what is allowed. */
static double worst_error(const matrix *m, const float *x, const float *y, uint32_t n_rows) {
    double worst = 0;
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t o = 0; o < m->n_out; o++) {
            double allowed, want = dot(m, o, x + (size_t)r * m->n_in, &allowed);
            double error = fabs(y[(size_t)r * m->n_out + o] - want) / (allowed + 1e-30);
            if (!(error <= worst)) worst = error; /* NaN as well */
        }
    }
    return worst;
}

static uint32_t draw_inputs(mp_dtype type) {
    uint32_t unit = mp_dtype_find(type)->len;
    if (unit == 1) return 1 + rng_below(&dice, 200);
    return (1 + rng_below(&dice, MAX_IN / unit)) * unit;
}

static void check_shape(rig *g, const mp_cpu_kernels *k, mp_dtype type, uint32_t n_out, uint32_t n_in) {
    matrix m;
    matrix_init(&m, type, n_out, n_in, g->three);
    for (uint32_t rows = 1; rows <= MAX_ROWS; rows += rows < 10 ? 1 : 5) {
        product(g, k, g->three, &m, g->x, rows, g->y, false);
        double error = worst_error(&m, g->x, g->y, rows);
        if (!(error <= 1)) {
            fail_msg("%s %s [%u, %u], %u rows: %.3g of the allowed error", k->isa, mp_dtype_name(type), n_out, n_in,
                     rows, error);
        }
        for (uint32_t r = 0; r < rows; r++) { /* a row alone, on one thread: the same bits */
            product(g, k, g->one, &m, g->x + (size_t)r * n_in, 1, g->alone, false);
            assert_memory_equal(g->alone, g->y + (size_t)r * n_out, n_out * sizeof(float));
        }
    }
    matrix_clear(&m);
}

static void products_are_right_and_rows_independent(void **state) {
    (void)state;
    printf("seed %llu\n", (unsigned long long)dice.state);
    rig *g = rig_open();
    const mp_cpu_kernels *k;
    for (uint32_t i = 0; (k = mp_cpu_kernels_at(i)); i++) {
        for (uint32_t t = 0; t < N_TYPES; t++) {
            check_shape(g, k, all_types[t], 1, mp_dtype_find(all_types[t])->len);
            check_shape(g, k, all_types[t], 16, MAX_IN);
            check_shape(g, k, all_types[t], 17 + rng_below(&dice, MAX_OUT - 16), draw_inputs(all_types[t]));
        }
    }
    rig_close(g);
}

static void several_matrices_and_adding(void **state) {
    (void)state;
    rig *g = rig_open();
    matrix m[3];
    const uint32_t n_out[3] = { 70, 16, 5 }, n_in = 512, rows = 11;
    const mp_dtype types[3] = { MP_DTYPE_Q4_K, MP_DTYPE_Q6_K, MP_DTYPE_F16 };
    for (int j = 0; j < 3; j++) matrix_init(&m[j], types[j], n_out[j], n_in, g->one);
    const mp_packed *w[3] = { m[0].packed, m[1].packed, m[2].packed };
    static float y[3][MAX_ROWS * MAX_OUT], start[MAX_ROWS * MAX_OUT];
    for (uint32_t i = 0; i < MAX_ROWS * MAX_OUT; i++) start[i] = draw_float(3.0f);
    const mp_cpu_kernels *k;
    for (uint32_t i = 0; (k = mp_cpu_kernels_at(i)); i++) {
        for (int j = 0; j < 3; j++) memcpy(y[j], start, sizeof start);
        mp_qrows_set(g->q, k, g->three, g->x, rows, n_in);
        mp_matmul(k, g->three, w, 3, g->q, (float *[]){ y[0], y[1], y[2] }, true);
        for (int j = 0; j < 3; j++) {
            product(g, k, g->one, &m[j], g->x, rows, g->alone, false);
            for (uint32_t o = 0; o < rows * n_out[j]; o++) assert_true(y[j][o] == start[o] + g->alone[o]);
            assert_memory_equal(y[j] + rows * n_out[j], start + rows * n_out[j],
                                sizeof start - rows * n_out[j] * sizeof(float));
        }
    }
    for (int j = 0; j < 3; j++) matrix_clear(&m[j]);
    rig_close(g);
}

/* With and without VNNI, and with 256 bits: the same integers and the same fused multiply-adds. */
static void instruction_sets_agree(void **state) {
    (void)state;
    rig *g = rig_open();
    for (uint32_t t = 0; t < N_TYPES; t++) {
        matrix m;
        matrix_init(&m, all_types[t], 50, 512, g->three);
        product(g, mp_cpu_kernels_at(0), g->three, &m, g->x, MAX_ROWS, g->y, false);
        const mp_cpu_kernels *k;
        for (uint32_t i = 1; (k = mp_cpu_kernels_at(i)) && strcmp(k->isa, "portable") != 0; i++) {
            product(g, k, g->three, &m, g->x, MAX_ROWS, g->alone, false);
            assert_memory_equal(g->alone, g->y, MAX_ROWS * 50 * sizeof(float));
        }
        matrix_clear(&m);
    }
    rig_close(g);
}

/* The largest codes, scales and inputs there are: nothing may wrap around. */
static void extremes_do_not_overflow(void **state) {
    (void)state;
    rig *g = rig_open();
    const uint32_t n_in = 256, n_out = 16;
    for (uint32_t sign = 0; sign < 2; sign++) {
        for (uint32_t i = 0; i < n_in; i++) g->x[i] = sign ? -1e4f : 1e4f;
        for (uint32_t t = 0; t < N_TYPES; t++) {
            for (uint32_t fill = 0; fill < 2; fill++) {
                const mp_dtype_info *info = mp_dtype_find(all_types[t]);
                matrix m;
                matrix_init(&m, all_types[t], n_out, n_in, g->one);
                matrix_unpack(&m);
                for (size_t b = 0; b < m.tensor.bytes / info->bytes; b++) {
                    uint8_t *p = m.bytes + b * info->bytes, keep[2][4];
                    memcpy(keep[0], p, info->len == 1 ? info->bytes : 4);
                    memcpy(keep[1], p + info->bytes - 2, 2);
                    if (info->len == 1) continue;
                    memset(p, fill ? 0xff : 0, info->bytes);
                    if (all_types[t] == MP_DTYPE_Q6_K) {
                        memset(p + 192, rng_below(&dice, 2) ? 0x80 : 0x7f, 16); /* both ends of the signed scales */
                        memcpy(p + 208, keep[1], 2);
                    } else {
                        memcpy(p, keep[0], info->bytes == 18 || info->bytes == 22 || info->bytes == 34 ? 2 : 4);
                    }
                    if (all_types[t] == MP_DTYPE_Q8_0) memset(p + 2, fill ? 0x80 : 0x7f, 32);
                }
                mp_dtype_dequantize(all_types[t], m.bytes, m.floats, (size_t)n_out * n_in);
                matrix_pack(&m, g->one);
                const mp_cpu_kernels *k;
                for (uint32_t i = 0; (k = mp_cpu_kernels_at(i)); i++) {
                    product(g, k, g->one, &m, g->x, 1, g->y, false);
                    assert_true(worst_error(&m, g->x, g->y, 1) <= 1);
                }
                matrix_clear(&m);
            }
        }
    }
    rig_close(g);
}

static void sets_are_found_by_name(void **state) {
    (void)state;
    const mp_cpu_kernels *k = NULL;
    mepic_error err;
    assert_int_equal(mp_cpu_kernels_find(NULL, &k, &err), MEPIC_OK);
    assert_ptr_equal(k, mp_cpu_kernels_at(0));
    assert_int_equal(mp_cpu_kernels_find("portable", &k, &err), MEPIC_OK);
    assert_string_equal(k->isa, "portable");
    assert_int_equal(mp_cpu_kernels_find("sse9", &k, &err), MEPIC_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "sse9"));
    assert_string_equal(k->isa, "portable"); /* written on success only */
}

static void no_memory_is_reported(void **state) {
    (void)state;
    rig *g = rig_open();
    matrix m;
    matrix_init(&m, MP_DTYPE_Q4_1, 40, 64, g->one);
    mp_packed *w = NULL;
    mp_qrows *q = NULL;
    mp_mem_fail_at(1, false);
    assert_int_equal(mp_packed_open(&m.tensor, g->one, m.memory, &w, NULL), MEPIC_ERR_NOMEM);
    for (uint64_t n = 1; n <= 2; n++) {
        mp_mem_fail_at(n, false);
        assert_int_equal(mp_qrows_open(4, 64, &q, NULL), MEPIC_ERR_NOMEM);
    }
    mp_mem_fail_at(0, false);
    assert_null(w);
    assert_null(q);
    matrix_clear(&m);
    rig_close(g);
}

/* Once the build forgot to say that the vector sets were compiled, and everything ran on the portable one. */
static void a_machine_with_vectors_uses_them(void **state) {
    (void)state;
#if defined(__x86_64__)
    bool vectors = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (vectors) assert_string_not_equal(mp_cpu_kernels_at(0)->isa, "portable");
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_machine_with_vectors_uses_them),
        cmocka_unit_test(products_are_right_and_rows_independent),
        cmocka_unit_test(several_matrices_and_adding),
        cmocka_unit_test(instruction_sets_agree),
        cmocka_unit_test(extremes_do_not_overflow),
        cmocka_unit_test(sets_are_found_by_name),
        cmocka_unit_test(no_memory_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
