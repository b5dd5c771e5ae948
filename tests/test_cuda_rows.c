/* backend/cuda/rows and dequantize: every kernel against its definition, written here in double or taken from
 * model/dtype; what it must not touch is poisoned; a row has the same bits alone, among others and in any bucket. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "model/dtype.h"
#include "support/cuda_world.h"
#include "support/e4m3.h"
#include "support/gpu.h"
#include "support/random.h"
#include "tools/quantize.h"

static rng random_numbers;
static uint32_t code; /* mp_cu_device.code */

static float real(float low, float high) {
    return low + (high - low) * (float)(rng_next(&random_numbers) >> 40) / (float)(1 << 24);
}

static void *host(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    assert_non_null(p);
    return p;
}

static uint16_t *random_bf16(size_t n, float most) {
    uint16_t *x = host(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = mp_f32_to_bf16(real(-most, most));
    return x;
}

static float *random_f32(size_t n, float low, float high) {
    float *x = host(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = real(low, high);
    return x;
}

/* Within one rounding to bf16 of `want`, and `slack` for the arithmetic before it. */
static void check_bf16(uint16_t got, double want, double slack, const char *what, size_t i) {
    double error = fabs((double)mp_bf16_to_f32(got) - want);
    if (error <= fabs(want) / 256 * 1.002 + slack) return; /* false for NaN */
    fail_msg("%s [%zu]: %g, not %g", what, i, (double)mp_bf16_to_f32(got), want);
}

/* A step of n rows; only what row kernels read. */
static mp_cu_work make_work(const mp_cu_row *rows, uint32_t n) {
    mp_cu_counts counts = { .n_rows = n };
    return (mp_cu_work){ .counts = gpu_put(&counts, sizeof counts), .rows = gpu_put(rows, n * sizeof *rows) };
}

static void free_work(mp_cu_work *w) {
    gpu_free(w->counts);
    gpu_free((void *)(uintptr_t)w->rows);
}

/* ---- Dequantize -------------------------------------------------------------------------------------------------- */

static void check_dequantize(mp_dtype type, const void *blocks, size_t n) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)type);
    float *want = host(n * sizeof *want);
    mp_dtype_dequantize(type, blocks, want, n);
    void *src = gpu_put(blocks, n / info->len * info->bytes);
    mp_bf16 *dst = gpu_new((n + 8) * sizeof *dst, 0xff);
    GPU_DONE(mp_cu_dequantize((uint32_t)type, src, dst, n, NULL));
    uint16_t *got = gpu_get(dst, (n + 8) * sizeof *got);
    for (size_t i = 0; i < n; i++) {
        if (got[i] == mp_f32_to_bf16(want[i])) continue;
        fail_msg("%s weight %zu: %04x, not %04x (%g)", info->name, i, got[i], mp_f32_to_bf16(want[i]), (double)want[i]);
    }
    for (size_t i = n; i < n + 8; i++) assert_int_equal(got[i], 0xffff);
    free(got);
    free(want);
    gpu_free(src);
    gpu_free(dst);
}

static void dequantize(void **state) {
    (void)state;
    static const mp_dtype types[] = { MP_DTYPE_F32,  MP_DTYPE_F16,  MP_DTYPE_BF16, MP_DTYPE_Q4_0,
                                      MP_DTYPE_Q4_1, MP_DTYPE_Q5_0, MP_DTYPE_Q5_1, MP_DTYPE_Q8_0,
                                      MP_DTYPE_Q4_K, MP_DTYPE_Q5_K, MP_DTYPE_Q6_K };
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        const mp_dtype_info *info = mp_dtype_find((uint32_t)types[t]);
        size_t n = info->len == 1 ? 3001 : 37 * (size_t)256, bytes = n / info->len * info->bytes;
        float *x = random_f32(n, -3, 3);
        uint8_t *blocks = host(bytes);
        mp_quantize(types[t], x, blocks, n);
        check_dequantize(types[t], blocks, n);
        if (info->len > 1) { /* all codes, scales and minima; of the f16 factors, only bits of finite numbers */
            for (size_t i = 0; i < bytes; i++) blocks[i] = (uint8_t)rng_next(&random_numbers);
            for (size_t b = 0; b < bytes; b += info->bytes) {
                size_t at = types[t] == MP_DTYPE_Q6_K ? b + 208 : b;
                blocks[at + 1] &= 0xbf;
                if (types[t] != MP_DTYPE_Q6_K) blocks[at + 3] &= 0xbf;
            }
            check_dequantize(types[t], blocks, n);
        }
        free(blocks);
        free(x);
    }
    assert_int_equal(mp_cu_dequantize(7777, NULL, NULL, 8, NULL), cudaErrorInvalidValue);
}

/* ---- Lists ------------------------------------------------------------------------------------------------------- */

/* Every word of a piece, and not one behind it. */
static void copy_pieces(void **state) {
    (void)state;
    enum { WORDS = 300000, BEHIND = 64 };
    static const uint32_t sizes[MP_CU_PIECES_MAX] = { 1, 2, 3, 4, 5, 1023, 32768, 32769, 4096, WORDS, 7, 131 };
    mp_cu_pieces p = { .n = MP_CU_PIECES_MAX };
    uint32_t *from[MP_CU_PIECES_MAX];
    for (uint32_t i = 0; i < p.n; i++) {
        void *pinned;
        GPU(cudaMallocHost(&pinned, (sizes[i] + BEHIND) * sizeof(uint32_t)));
        from[i] = pinned;
        for (uint32_t k = 0; k < sizes[i] + BEHIND; k++) from[i][k] = (uint32_t)rng_next(&random_numbers) & 0x7fffffff;
        void *to = gpu_new((sizes[i] + BEHIND) * sizeof(uint32_t), 0xff);
        p.pieces[i] = (mp_cu_piece){ .from = from[i], .to = to, .n_words = sizes[i] };
    }
    GPU_DONE(mp_cu_copy_pieces(&p, NULL));
    for (uint32_t i = 0; i < p.n; i++) {
        uint32_t *got = gpu_get(p.pieces[i].to, (sizes[i] + BEHIND) * sizeof *got);
        assert_memory_equal(got, from[i], sizes[i] * sizeof *got);
        for (uint32_t k = sizes[i]; k < sizes[i] + BEHIND; k++) assert_int_equal(got[k], 0xffffffffu);
        free(got);
        gpu_free(p.pieces[i].to);
        GPU(cudaFreeHost(from[i]));
    }
    GPU_DONE(mp_cu_copy_pieces(&(mp_cu_pieces){ 0 }, NULL));
}

/* ---- Embedding, norm, SwiGLU ------------------------------------------------------------------------------------- */

static void embed(void **state) {
    (void)state;
    enum { VOCAB = 50, N = 7, BUCKET = 16, SEQS = 5 };
    static const uint32_t widths[] = { 64, 896, 4096 };
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        uint32_t n_embd = widths[w];
        uint16_t *table = random_bf16((size_t)VOCAB * n_embd, 2);
        mp_cu_row rows[N] = { 0 };
        int32_t tokens[N], sampled[SEQS];
        for (int s = 0; s < SEQS; s++) sampled[s] = (int32_t)rng_below(&random_numbers, VOCAB);
        for (int r = 0; r < N; r++) { /* every other one of what a sequence sampled last */
            int32_t seq = (int32_t)rng_below(&random_numbers, SEQS);
            tokens[r] = r % 2 ? sampled[seq] : (int32_t)rng_below(&random_numbers, VOCAB);
            rows[r].token = r % 2 ? -1 - seq : tokens[r];
        }
        mp_cu_work work = make_work(rows, N);
        int32_t *device_sampled = gpu_put(sampled, sizeof sampled);
        void *device_table = gpu_put(table, (size_t)VOCAB * n_embd * sizeof *table);
        float *x = gpu_new((size_t)BUCKET * n_embd * sizeof *x, 0xff);
        GPU_DONE(mp_cu_embed(&work, BUCKET, device_sampled, device_table, n_embd, x, NULL));
        float *got = gpu_get(x, (size_t)BUCKET * n_embd * sizeof *got);
        for (uint32_t r = 0; r < BUCKET; r++) {
            for (uint32_t i = 0; i < n_embd; i++) {
                float v = got[(size_t)r * n_embd + i];
                if (r < N) {
                    assert_true(v == mp_bf16_to_f32(table[(size_t)tokens[r] * n_embd + i]));
                } else {
                    assert_true(isnan(v));
                }
            }
        }
        free(got);
        free(table);
        gpu_free(x);
        gpu_free(device_table);
        gpu_free(device_sampled);
        free_work(&work);
    }
}

/* Rows in e4m3 on the device: codes, then scales. */
static mp_cu_matrix new_codes(size_t rows, size_t n) {
    return (mp_cu_matrix){ gpu_new(rows * n, 0xff), gpu_new(rows * sizeof(float), 0xff) };
}

static void free_codes(mp_cu_matrix m) {
    gpu_free(m.data);
    gpu_free(m.scales);
}

/* What a kernel wrote as codes is its bf16 result quantized. */
static void check_codes(mp_cu_matrix m, const mp_bf16 *bf16, size_t rows, size_t n, const char *what) {
    uint16_t *x = gpu_get(bf16, rows * n * sizeof *x);
    uint8_t *got = gpu_get(m.data, rows * n), *want = malloc(n);
    float *scales = gpu_get(m.scales, rows * sizeof *scales);
    assert_non_null(want);
    for (size_t r = 0; r < rows; r++) {
        float scale = e4m3_row(x + r * n, n, want);
        if (scales[r] != scale)
            fail_msg("%s of %zu, row %zu: scale %g, not %g", what, n, r, (double)scales[r], (double)scale);
        for (size_t i = 0; i < n; i++) {
            if (got[r * n + i] != want[i]) {
                fail_msg("%s of %zu, row %zu, %zu: %g is code %02x, not %02x", what, n, r, i,
                         (double)mp_bf16_to_f32(x[r * n + i]), got[r * n + i], want[i]);
            }
        }
    }
    free(x);
    free(got);
    free(want);
    free(scales);
}

static void quantize(void **state) {
    (void)state;
    enum { ROWS = 5 };
    static const uint32_t widths[] = { 8, 576, 896, 4096, 14336, 32768 };
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        size_t n = widths[w];
        uint16_t *x = random_bf16(ROWS * n, 3);
        for (size_t i = 0; i < n; i++) {
            x[n + i] = (uint16_t)(i % 7 == 0 ? 0x8000 : 0);              /* nothing but zeros */
            x[2 * n + i] = mp_f32_to_bf16((float)(i % 256) * 1.75f);     /* many ties */
            x[3 * n + i] = mp_f32_to_bf16(i % 5 == 0 ? 3e38f : -1e-38f); /* the ends of the range */
        }
        x[2 * n + 7] = mp_f32_to_bf16(448.0f);
        mp_bf16 *dx = gpu_put(x, ROWS * n * 2);
        mp_cu_matrix codes = new_codes(ROWS, n);
        GPU_DONE(mp_cu_quantize(ROWS, dx, (uint32_t)n, codes, NULL));
        check_codes(codes, dx, ROWS, n, "quantize");
        free(x);
        gpu_free(dx);
        free_codes(codes);
    }
}

static void norm_of_width(uint32_t n_embd) {
    enum { ROWS = 11, TAKEN = 5, REAL = 4 };
    const float eps = 1e-5f;
    const uint32_t taken[TAKEN] = { 0, 3, 4, 10, 7 }, real_rows = REAL;
    size_t row = n_embd;
    float *x = random_f32(ROWS * row, -4, 4), *weight = random_f32(row, -2, 2);
    for (size_t i = 0; i < row; i++) x[3 * row + i] *= 1e-4f; /* eps counts */
    float *dx = gpu_put(x, ROWS * row * sizeof *x), *dw = gpu_put(weight, row * sizeof *weight);
    uint32_t *d_taken = gpu_put(taken, sizeof taken), *d_real = gpu_put(&real_rows, sizeof real_rows);
    mp_bf16 *all = gpu_new(ROWS * row * 2, 0xff), *some = gpu_new(TAKEN * row * 2, 0xff);
    GPU_DONE(mp_cu_norm(ROWS, NULL, NULL, dx, dw, eps, n_embd, (mp_cu_matrix){ all, NULL }, code, NULL));
    GPU_DONE(mp_cu_norm(TAKEN, d_taken, d_real, dx, dw, eps, n_embd, (mp_cu_matrix){ some, NULL }, code, NULL));
    mp_cu_matrix codes = new_codes(ROWS, row);
    GPU_DONE(mp_cu_norm(ROWS, NULL, NULL, dx, dw, eps, n_embd, codes, code, NULL));
    check_codes(codes, all, ROWS, row, "norm");
    free_codes(codes);
    uint16_t *got = gpu_get(all, ROWS * row * 2), *got_some = gpu_get(some, TAKEN * row * 2);
    for (size_t r = 0; r < ROWS; r++) {
        double squares = 0;
        for (size_t i = 0; i < row; i++) squares += (double)x[r * row + i] * (double)x[r * row + i];
        double scale = 1 / sqrt(squares / n_embd + (double)eps);
        for (size_t i = 0; i < row; i++) {
            check_bf16(got[r * row + i], (double)x[r * row + i] * scale * (double)weight[i], 0, "norm", r * row + i);
        }
    }
    for (size_t r = 0; r < REAL; r++) assert_memory_equal(got_some + r * row, got + taken[r] * row, row * 2);
    for (size_t i = REAL * row; i < TAKEN * row; i++) assert_int_equal(got_some[i], 0xffff);
    free(got);
    free(got_some);
    free(x);
    free(weight);
    gpu_free(dx);
    gpu_free(dw);
    gpu_free(d_taken);
    gpu_free(d_real);
    gpu_free(all);
    gpu_free(some);
}

static void norm(void **state) {
    (void)state;
    static const uint32_t widths[] = { 8, 64, 576, 896, 4096, 8192, 8200, 16384, 32768 };
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) norm_of_width(widths[w]);
}

static void swiglu(void **state) {
    (void)state;
    enum { ROWS = 6 };
    static const uint32_t widths[] = { 8, 96, 4864, 14336 };
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        size_t n_ff = widths[w];
        uint16_t *gu = random_bf16(ROWS * 2 * n_ff, 12);
        gu[0] = mp_f32_to_bf16(-3e38f); /* exp overflows */
        gu[1] = mp_f32_to_bf16(3e38f), gu[n_ff + 1] = mp_f32_to_bf16(0.5f);
        mp_bf16 *from = gpu_put(gu, ROWS * 2 * n_ff * 2), *to = gpu_new((ROWS + 1) * n_ff * 2, 0xff);
        mp_bf16 *alone = gpu_new(n_ff * 2, 0xff);
        GPU_DONE(mp_cu_swiglu(ROWS, from, (uint32_t)n_ff, (mp_cu_matrix){ to, NULL }, code, NULL));
        GPU_DONE(mp_cu_swiglu(1, from + 4 * 2 * n_ff, (uint32_t)n_ff, (mp_cu_matrix){ alone, NULL }, code, NULL));
        mp_cu_matrix codes = new_codes(ROWS, n_ff);
        GPU_DONE(mp_cu_swiglu(ROWS, from, (uint32_t)n_ff, codes, code, NULL));
        check_codes(codes, to, ROWS, n_ff, "swiglu");
        free_codes(codes);
        uint16_t *got = gpu_get(to, (ROWS + 1) * n_ff * 2), *got_alone = gpu_get(alone, n_ff * 2);
        for (size_t i = 0; i < ROWS * n_ff; i++) {
            double g = (double)mp_bf16_to_f32(gu[i / n_ff * 2 * n_ff + i % n_ff]);
            double u = (double)mp_bf16_to_f32(gu[(i / n_ff * 2 + 1) * n_ff + i % n_ff]);
            check_bf16(got[i], g / (1 + exp(-g)) * u, 1e-30, "swiglu", i);
        }
        for (size_t i = ROWS * n_ff; i < (ROWS + 1) * n_ff; i++) assert_int_equal(got[i], 0xffff);
        assert_memory_equal(got_alone, got + 4 * n_ff, n_ff * 2);
        free(got);
        free(got_alone);
        free(gu);
        gpu_free(from);
        gpu_free(to);
        gpu_free(alone);
    }
}

/* ---- Store ------------------------------------------------------------------------------------------------------- */

enum { LAYERS = 3, LAYER = 1, PAGES = 6, STORED = 9, STORE_BUCKET = 300 };

typedef struct store_case {
    uint32_t head_dim, n_heads, n_kv_heads, n_rot, page_size;
    bool halves, bias, head_norm;
    bool fp8; /* with a bias and without a norm, k is stored without the bias */
} store_case;

/* The layout of kernels.h once more, from its words: byte of (token of the group, column) in a group's K or V. */
static size_t offset_in_group(uint32_t head_dim, uint32_t token, uint32_t column) {
    uint32_t start = 0, width = 64;
    for (;;) {
        while (head_dim - start < width) width /= 2;
        if (column < start + width) break;
        start += width;
    }
    uint32_t unit = (column - start) / 8, x = width == 64 ? token & 7 : width == 32 ? token >> 1 & 3 : token >> 2 & 1;
    return start * 8 * 2 + token * width * 2 + (unit ^ x) * 16 + column % 8 * 2;
}

typedef struct store_world {
    store_case c;
    size_t width; /* of a row of qkv */
    uint16_t *qkv;
    float *bias, *q_norm, *k_norm;
    uint64_t turns[128];
    float magnitude;
    mp_cu_row rows[STORED];
    size_t block_bytes, page_bytes;
} store_world;

static void make_store(store_world *w, const store_case *c) {
    *w = (store_world){ .c = *c, .magnitude = 1.1f };
    w->width = (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    w->qkv = random_bf16(STORED * w->width, 3);
    if (c->bias) w->bias = random_f32(w->width, -20, 20);
    if (c->head_norm) w->q_norm = random_f32(c->head_dim, -2, 2), w->k_norm = random_f32(c->head_dim, -2, 2);
    for (uint32_t i = 0; i < c->n_rot / 2; i++) w->turns[i] = rng_next(&random_numbers) >> i % 64;
    w->block_bytes = (size_t)c->page_size * (c->fp8 ? 2 * c->head_dim + 8 : 4 * c->head_dim);
    w->page_bytes = w->block_bytes * c->n_kv_heads * LAYERS;
    for (uint32_t r = 0; r < STORED; r++) { /* no two rows in one slot */
        w->rows[r] = (mp_cu_row){ .position = (int32_t)rng_below(&random_numbers, 200000),
                                  .page = PAGES - 1 - r % (PAGES - 1),
                                  .slot = (r * 7 + 3) % c->page_size };
    }
}

static void free_store(store_world *w) {
    free(w->qkv);
    free(w->bias);
    free(w->q_norm);
    free(w->k_norm);
}

static bool minus_bias(const store_case *c) {
    return c->fp8 && c->bias && !c->head_norm;
}

/* Stores rows [first, first + n); q and slab (host copies) as they are afterwards. */
static void run_store(const store_world *w, uint32_t first, uint32_t n, uint32_t bucket, uint16_t **q, uint8_t **slab) {
    const store_case *c = &w->c;
    size_t q_row = c->n_heads * c->head_dim;
    mp_cu_store s = {
        .head_dim = c->head_dim,
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .code = code,
        .rope = { .turns = gpu_put(w->turns, sizeof w->turns),
                  .n_pairs = c->n_rot / 2,
                  .halves = c->halves,
                  .magnitude = w->magnitude },
        .norm_eps = 1e-6f,
        .fp8 = c->fp8,
        .k_minus_bias = minus_bias(c),
        .qkv = gpu_new(STORE_BUCKET * w->width * 2, 0xff),
        .q = gpu_new(STORE_BUCKET * q_row * 2, 0xff),
        .slab = gpu_new(PAGES * w->page_bytes, 0xff),
        .page_bytes = w->page_bytes,
        .block_bytes = w->block_bytes,
        .layer_offset = LAYER * c->n_kv_heads * w->block_bytes,
        .work = make_work(w->rows + first, n),
    };
    if (w->bias) s.bias = gpu_put(w->bias, w->width * sizeof *w->bias);
    if (w->q_norm) s.q_norm = gpu_put(w->q_norm, c->head_dim * sizeof(float));
    if (w->k_norm) s.k_norm = gpu_put(w->k_norm, c->head_dim * sizeof(float));
    GPU(cudaMemcpy(s.qkv, w->qkv + first * w->width, n * w->width * 2, cudaMemcpyHostToDevice));
    GPU_DONE(mp_cu_store_rows(&s, bucket, NULL));
    *q = gpu_get(s.q, STORE_BUCKET * q_row * 2);
    *slab = gpu_get(s.slab, PAGES * w->page_bytes);
    free_work(&s.work);
    void *taken[] = { s.qkv,
                      s.q,
                      s.slab,
                      (void *)(uintptr_t)s.rope.turns,
                      (void *)(uintptr_t)s.bias,
                      (void *)(uintptr_t)s.q_norm,
                      (void *)(uintptr_t)s.k_norm };
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) gpu_free(taken[i]);
}

/* Head h of row r after bias and norm, in double. */
static void reference_head(const store_world *w, uint32_t r, uint32_t h, const float *norm_weight, double *y) {
    uint32_t d = w->c.head_dim;
    bool is_k = h >= w->c.n_heads && h < w->c.n_heads + w->c.n_kv_heads;
    double squares = 0;
    for (uint32_t i = 0; i < d; i++) {
        float v = mp_bf16_to_f32(w->qkv[r * w->width + h * d + i]);
        bool biased = w->bias && !(is_k && minus_bias(&w->c));
        y[i] = (double)(biased ? v + w->bias[h * d + i] : v);
        squares += y[i] * y[i];
    }
    for (uint32_t i = 0; norm_weight && i < d; i++) y[i] *= (double)norm_weight[i] / sqrt(squares / d + 1e-6);
}

static void reference_turn(const store_world *w, int32_t position, const double *x, double *y) {
    uint32_t pairs = w->c.n_rot / 2;
    memcpy(y, x, w->c.head_dim * sizeof *y);
    for (uint32_t i = 0; i < pairs; i++) {
        double angle = (double)(w->turns[i] * (uint64_t)position) * 0x1p-64 * 2 * 3.14159265358979323846;
        uint32_t a = w->c.halves ? i : 2 * i, b = w->c.halves ? i + pairs : 2 * i + 1;
        y[a] = (x[a] * cos(angle) - x[b] * sin(angle)) * (double)w->magnitude;
        y[b] = (x[b] * cos(angle) + x[a] * sin(angle)) * (double)w->magnitude;
    }
}

/* The numbers of a head as fp8, within half a step of what they should be; what was written becomes poison. */
static void check_fp8(const double *want, uint32_t n, uint8_t *codes, uint32_t token, uint8_t *factor,
                      const char *what) {
    double top = 0;
    for (uint32_t i = 0; i < n; i++) top = fmax(top, fabs(want[i]));
    uint16_t bits;
    memcpy(&bits, factor, 2);
    double scale = ldexp((double)mp_bf16_to_f32(bits), -120);
    assert_true(fabs(top / scale / 448 - 1) <= 1.0 / 255);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *place = codes + i / 16 * 128 + token * 16 + i % 8 * 2 + i / 8 % 2;
        int exponent = *place >> 3 & 15, mantissa = *place & 7;
        double got = scale * ldexp(exponent ? 8 + mantissa : 2 * mantissa, exponent - 10);
        if (*place & 0x80) got = -got;
        *place = 0xff;
        double binade = fmax(floor(log2(fmax(fabs(want[i]), 1e-30) / scale)), -6);
        double step = scale * ldexp(1, (int)binade - 3), error = fabs(got - want[i]);
        if (error > step / 2 + 5e-5) fail_msg("%s [%u] as fp8: %g, not %g", what, i, got, want[i]);
    }
    memset(factor, 0xff, 2);
}

/* A head of kv in the row's group of 8 tokens, and what else there is of the token. */
static void check_stored_fp8(const store_world *w, uint32_t r, uint32_t h, uint8_t *slab) {
    const store_case *c = &w->c;
    const mp_cu_row *row = &w->rows[r];
    uint32_t d = c->head_dim, token = row->slot % 8;
    uint8_t *group =
        slab + row->page * w->page_bytes + (LAYER * c->n_kv_heads + h) * w->block_bytes + row->slot / 8 * (16 * d + 64);
    uint8_t *marks = group + 8 * d;
    double x[256], y[256];
    int32_t angle;
    memcpy(&angle, marks + token * 4, 4);
    assert_int_equal(angle, row->position);
    memset(marks + token * 4, 0xff, 4);
    reference_head(w, r, c->n_heads + h, w->k_norm, x);
    reference_turn(w, row->position, x, y);
    check_fp8(y, d, group, token, marks + 32 + token * 2, "k");
    reference_head(w, r, c->n_heads + c->n_kv_heads + h, NULL, x);
    check_fp8(x, d, marks + 64, token, marks + 48 + token * 2, "v");
}

/* Checks a stored row, and poisons what it wrote, so that in the end the slab must be poison all over. */
static void check_stored(const store_world *w, uint32_t r, const uint16_t *q, uint8_t *slab) {
    const store_case *c = &w->c;
    double x[256], y[256];
    for (uint32_t h = 0; h < c->n_heads; h++) {
        reference_head(w, r, h, w->q_norm, x);
        for (uint32_t i = 0; i < c->head_dim; i++) {
            check_bf16(q[(r * c->n_heads + h) * c->head_dim + i], x[i], 0, "q", i);
        }
    }
    for (uint32_t h = 0; h < c->n_kv_heads; h++) {
        if (c->fp8) {
            check_stored_fp8(w, r, h, slab);
            continue;
        }
        const mp_cu_row *row = &w->rows[r];
        uint8_t *group = slab + row->page * w->page_bytes + (LAYER * c->n_kv_heads + h) * w->block_bytes +
                         row->slot / 8 * 8 * c->head_dim * 4;
        reference_head(w, r, c->n_heads + h, w->k_norm, x);
        reference_turn(w, row->position, x, y);
        for (uint32_t i = 0; i < c->head_dim; i++) {
            uint16_t bits;
            uint8_t *at = group + offset_in_group(c->head_dim, row->slot % 8, i);
            memcpy(&bits, at, 2);
            check_bf16(bits, y[i], 4e-5, "k", i);
            memset(at, 0xff, 2);
        }
        reference_head(w, r, c->n_heads + c->n_kv_heads + h, NULL, x);
        for (uint32_t i = 0; i < c->head_dim; i++) {
            uint16_t bits;
            uint8_t *at = group + 8 * c->head_dim * 2 + offset_in_group(c->head_dim, row->slot % 8, i);
            memcpy(&bits, at, 2);
            assert_int_equal(bits, mp_f32_to_bf16((float)x[i]));
            memset(at, 0xff, 2);
        }
    }
}

static void check_store(const store_case *c) {
    store_world w;
    make_store(&w, c);
    uint16_t *q, *q_alone;
    uint8_t *slab, *slab_alone;
    run_store(&w, 0, STORED, 16, &q, &slab);
    run_store(&w, 0, STORED, STORE_BUCKET, &q_alone, &slab_alone); /* many rows have a kernel of their own */
    assert_memory_equal(q_alone, q, STORE_BUCKET * c->n_heads * c->head_dim * sizeof *q);
    assert_memory_equal(slab_alone, slab, PAGES * w.page_bytes);
    free(q_alone);
    free(slab_alone);
    for (uint32_t r = 0; r < STORED; r += 4) { /* the same bits alone, in the smallest bucket */
        run_store(&w, r, 1, 1, &q_alone, &slab_alone);
        size_t q_row = c->n_heads * c->head_dim;
        assert_memory_equal(q_alone, q + r * q_row, q_row * 2);
        for (size_t i = 0; i < PAGES * w.page_bytes; i++) {
            if (slab_alone[i] != 0xff) assert_int_equal(slab_alone[i], slab[i]);
        }
        free(q_alone);
        free(slab_alone);
    }
    for (uint32_t r = 0; r < STORED; r++) check_stored(&w, r, q, slab);
    for (size_t i = 0; i < PAGES * w.page_bytes; i++) assert_int_equal(slab[i], 0xff);
    for (size_t i = STORED * c->n_heads * c->head_dim; i < STORE_BUCKET * c->n_heads * c->head_dim; i++) {
        assert_int_equal(q[i], 0xffff);
    }
    free(q);
    free(slab);
    free_store(&w);
}

static void store(void **state) {
    (void)state;
    static const store_case cases[] = {
        { 128, 32, 8, 128, 16, true, false, false, false }, { 128, 32, 8, 128, 16, false, false, false, false },
        { 64, 14, 2, 64, 16, true, true, false, false },    { 128, 16, 8, 128, 32, true, false, true, false },
        { 80, 4, 4, 80, 16, true, true, true, false },      { 96, 6, 2, 96, 64, false, false, true, false },
        { 256, 4, 1, 128, 16, true, true, false, false },   { 112, 3, 3, 56, 128, true, false, false, false },
        { 48, 5, 1, 20, 16, false, true, true, false },     { 16, 4, 2, 16, 16, true, false, false, false },
        { 32, 2, 1, 12, 16, true, false, true, false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        store_case c = cases[i];
        check_store(&c);
        c.fp8 = true;
        check_store(&c);
    }
}

static void store_saturates(void **state) {
    (void)state;
    const store_case c = { 64, 1, 1, 64, 16, true, true, false, false };
    store_world w;
    make_store(&w, &c);
    for (size_t i = 0; i < STORED * w.width; i++) w.qkv[i] = 0x7f80; /* infinity */
    for (size_t i = 0; i < w.width; i++) w.bias[i] = 0;
    uint16_t *q;
    uint8_t *slab;
    run_store(&w, 0, 1, 1, &q, &slab);
    uint8_t *values =
        slab + w.rows[0].page * w.page_bytes + LAYER * w.block_bytes + w.rows[0].slot / 8 * 8 * 64 * 4 + 8 * 64 * 2;
    for (uint32_t i = 0; i < 64; i++) {
        uint16_t bits;
        memcpy(&bits, values + offset_in_group(64, w.rows[0].slot % 8, i), 2);
        assert_int_equal(bits, 0x7f7f);
    }
    free(q);
    free(slab);
    free_store(&w);
}

/* A NaN in a token's value is one in its key, and in no value: rows that do not see the token multiply it by 0. */
static void store_keeps_nan_in_the_key(void **state) {
    (void)state;
    static const store_case cases[] = { { 64, 3, 2, 64, 16, true, true, false, false },
                                        { 96, 2, 2, 96, 16, false, false, true, false },
                                        { 256, 2, 2, 128, 32, true, false, false, false } };
    enum { ROW = 4, COLUMN = 21 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (uint32_t bucket = STORED; bucket <= STORE_BUCKET; bucket += STORE_BUCKET - STORED) {
            store_world w;
            uint16_t *q, *q_nan, hd = (uint16_t)cases[i].head_dim;
            uint8_t *slab, *slab_nan;
            make_store(&w, &cases[i]);
            run_store(&w, 0, STORED, bucket, &q, &slab);
            w.qkv[ROW * w.width + (cases[i].n_heads + 3) * hd + COLUMN] = 0x7fc0; /* value of the second kv head */
            run_store(&w, 0, STORED, bucket, &q_nan, &slab_nan);
            uint8_t *token = slab + w.rows[ROW].page * w.page_bytes + (LAYER * 2 + 1) * w.block_bytes +
                             w.rows[ROW].slot / 8 * 8 * hd * 4;
            for (uint32_t d = 0; d < hd; d++) {
                size_t at = (size_t)(token - slab) + offset_in_group(hd, w.rows[ROW].slot % 8, d);
                uint16_t key;
                memcpy(&key, slab_nan + at, 2);
                assert_true((key & 0x7fff) > 0x7f80);
                memcpy(slab + at, &key, 2); /* as it must be, for the comparison below */
            }
            memset(token + 8 * hd * 2 + offset_in_group(hd, w.rows[ROW].slot % 8, COLUMN), 0, 2);
            assert_memory_equal(slab, slab_nan, PAGES * w.page_bytes);
            free(q);
            free(q_nan);
            free(slab);
            free(slab_nan);
            free_store(&w);
        }
    }
}

/* The same where pages hold fp8: the key's factor is NaN, the value's column 0. */
static void store_keeps_nan_in_the_key_of_fp8(void **state) {
    (void)state;
    static const store_case cases[] = { { 64, 3, 2, 64, 16, true, true, false, true },
                                        { 128, 2, 2, 128, 32, true, false, true, true } };
    enum { ROW = 4, COLUMN = 21 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        store_world w;
        uint16_t *q, *q_nan, factors[2];
        uint8_t *slab, *slab_nan;
        uint32_t hd = cases[i].head_dim;
        make_store(&w, &cases[i]);
        run_store(&w, 0, STORED, STORE_BUCKET, &q, &slab);
        w.qkv[ROW * w.width + (cases[i].n_heads + 3) * hd + COLUMN] = 0x7fc0; /* value of the second kv head */
        run_store(&w, 0, STORED, STORE_BUCKET, &q_nan, &slab_nan);
        uint32_t token = w.rows[ROW].slot % 8;
        size_t group = w.rows[ROW].page * w.page_bytes + (LAYER * 2 + 1) * w.block_bytes +
                       w.rows[ROW].slot / 8 * (16 * (size_t)hd + 64);
        for (int half = 0; half < 2; half++) { /* K, V */
            size_t codes = group + (half ? 8 * hd + 64 : 0), factor = group + 8 * hd + 32 + half * 16 + token * 2;
            memcpy(&factors[half], slab_nan + factor, 2);
            memcpy(slab + factor, slab_nan + factor, 2); /* as it must be, for the comparison below */
            for (uint32_t c = 0; c < hd; c++) {
                size_t at = codes + c / 16 * 128 + token * 16 + c % 8 * 2 + c / 8 % 2;
                if (!half || c == COLUMN) assert_int_equal(slab_nan[at], 0);
                slab[at] = slab_nan[at];
            }
        }
        assert_true(isnan(mp_bf16_to_f32(factors[0])) && isfinite(mp_bf16_to_f32(factors[1])));
        assert_memory_equal(slab, slab_nan, PAGES * w.page_bytes);
        free(q);
        free(q_nan);
        free(slab);
        free(slab_nan);
        free_store(&w);
    }
}

/* Zero stays zero, what is too large becomes the largest number, and a token with a NaN has a key of NaN. */
static void store_fp8_extremes(void **state) {
    (void)state;
    const store_case c = { 64, 1, 1, 64, 16, true, false, false, true };
    store_world w;
    make_store(&w, &c);
    static const struct {
        uint16_t value;
        uint8_t code;
        float most; /* 448 of the codes, as stored */
    } cases[] = { { 0, 0, 0x1p-60f }, { 0x7f80, 0x7e, 65504 }, { 0xff7f, 0xfe, 65504 }, { 0x7fc0, 0, 0x1p-60f } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t k = 0; k < STORED * w.width; k++) w.qkv[k] = cases[i].value;
        uint16_t *q;
        uint8_t *slab;
        run_store(&w, 0, 1, 1, &q, &slab);
        const uint8_t *marks =
            slab + w.rows[0].page * w.page_bytes + LAYER * w.block_bytes + w.rows[0].slot / 8 * (16 * 64 + 64) + 8 * 64;
        uint32_t token = w.rows[0].slot % 8;
        uint16_t factor;
        memcpy(&factor, marks + 48 + token * 2, 2);
        double most = 448 * ldexp((double)mp_bf16_to_f32(factor), -120), want = (double)cases[i].most;
        assert_true(fabs(most / want - 1) <= 1.0 / 255);
        memcpy(&factor, marks + 32 + token * 2, 2);
        if (cases[i].value == 0x7fc0) assert_true(isnan(mp_bf16_to_f32(factor)));
        for (uint32_t d = 0; d < 64; d++)
            assert_int_equal(marks[64 + d / 16 * 128 + token * 16 + d % 16], cases[i].code);
        free(q);
        free(slab);
    }
    free_store(&w);
}

/* ---- Pages ------------------------------------------------------------------------------------------------------- */

static void zero_pages(void **state) {
    (void)state;
    enum { N = 9, LISTED = 4, MOST = 5 };
    const uint32_t pages[MOST] = { 7, 0, 8, 3, 5 }, counts[] = { 0, LISTED, 77 };
    static const size_t sizes[] = { 256, 49152, 1 << 20 };
    for (size_t s = 0; s < 3; s++) {
        for (size_t k = 0; k < 3; k++) {
            uint32_t *d_pages = gpu_put(pages, sizeof pages), *d_n = gpu_put(&counts[k], sizeof counts[k]);
            uint32_t zeroed = counts[k] < MOST ? counts[k] : MOST;
            uint8_t *slab = gpu_new(N * sizes[s], 0xab);
            GPU_DONE(mp_cu_zero_pages(d_pages, d_n, MOST, slab, sizes[s], NULL));
            uint8_t *got = gpu_get(slab, N * sizes[s]);
            for (uint32_t p = 0; p < N; p++) {
                int want = 0xab;
                for (uint32_t i = 0; i < zeroed; i++) want = pages[i] == p ? 0 : want;
                for (size_t i = 0; i < sizes[s]; i++) {
                    if (got[p * sizes[s] + i] != want) fail_msg("page %u byte %zu", p, i);
                }
            }
            free(got);
            gpu_free(slab);
            gpu_free(d_pages);
            gpu_free(d_n);
        }
    }
}

int main(void) {
    if (mp_cu_device_count() == 0) return 77;
    (void)cuda_world_device(&code); /* without code for the device every test says so */
    random_numbers = rng_open(20261124);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dequantize),
        cmocka_unit_test(quantize),
        cmocka_unit_test(copy_pieces),
        cmocka_unit_test(embed),
        cmocka_unit_test(norm),
        cmocka_unit_test(swiglu),
        cmocka_unit_test(store),
        cmocka_unit_test(store_saturates),
        cmocka_unit_test(zero_pages),
        cmocka_unit_test(store_keeps_nan_in_the_key),
        cmocka_unit_test(store_keeps_nan_in_the_key_of_fp8),
        cmocka_unit_test(store_fp8_extremes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
