#include "backend/cpu/kernels_rows.h"

#include <float.h>

#include "backend/cpu/simd.h"
#include "backend/cpu/slab.h"

#define HEAD_MAX 256

static void norm(const float *x, const float *w, float eps, uint32_t n, float *y) {
    v16f sum[4] = { v_zero(), v_zero(), v_zero(), v_zero() };
    uint32_t i = 0;
    for (; i + 64 <= n; i += 64) {
        for (int j = 0; j < 4; j++) {
            v16f a = v_load(x + i + 16 * j);
            sum[j] = v_fma(a, a, sum[j]);
        }
    }
    for (; i + 16 <= n; i += 16) {
        v16f a = v_load(x + i);
        sum[0] = v_fma(a, a, sum[0]);
    }
    float tail = 0.0f;
    for (; i < n; i++) tail += x[i] * x[i];
    float squares = v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]))) + tail;
    float scale = 1.0f / sqrtf(squares / (float)n + eps);

    const v16f s = v_set(scale);
    for (i = 0; i + 16 <= n; i += 16) v_store(y + i, v_mul(v_mul(v_load(x + i), s), v_load(w + i)));
    for (; i < n; i++) y[i] = x[i] * scale * w[i];
}

static void add(float *x, const float *b, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) x[i] += b[i];
}

MP_INLINE v16f silu_times(v16f g, v16f u) {
    const v16f one = v_set(1.0f);
    v16f e = v_exp(v_sub(v_zero(), g));
    return v_mul(v_div(g, v_add(one, e)), u);
}

static void swiglu(float *g, const float *u, uint32_t n) {
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) v_store(g + i, silu_times(v_load(g + i), v_load(u + i)));
    if (i < n) {
        float a[16] = { 0 }, b[16] = { 0 };
        memcpy(a, g + i, (n - i) * sizeof *a);
        memcpy(b, u + i, (n - i) * sizeof *b);
        v_store(a, silu_times(v_load(a), v_load(b)));
        memcpy(g + i, a, (n - i) * sizeof *a);
    }
}

static void turn(const float *restrict x, const float *restrict cos_sin, mp_rope_pairs pairs, uint32_t n_pairs,
                 uint32_t head_dim, float scale, float *restrict y) {
    const float *c = cos_sin, *s = cos_sin + n_pairs;
    if (pairs == MP_ROPE_ADJACENT) {
        for (uint32_t i = 0; i < n_pairs; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            y[2 * i] = (a * c[i] - b * s[i]) * scale;
            y[2 * i + 1] = (a * s[i] + b * c[i]) * scale;
        }
    } else {
        for (uint32_t i = 0; i < n_pairs; i++) {
            float a = x[i], b = x[i + n_pairs];
            y[i] = (a * c[i] - b * s[i]) * scale;
            y[i + n_pairs] = (a * s[i] + b * c[i]) * scale;
        }
    }
    for (uint32_t i = 2 * n_pairs; i < head_dim; i++) y[i] = x[i] * scale;
}

/* Operands in this order let a NaN through instead of hiding it behind the bound. */
MP_INLINE v16f saturate(v16f x, float top) {
    return v_min(v_set(top), v_max(v_set(-top), x));
}

MP_INLINE uint16_t round_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);
}

MP_INLINE void round_vector(const mepic_kv_type type, const float *x, uint32_t n, uint16_t *y) {
    for (uint32_t i = 0; i < n; i += 16) {
        if (type == MEPIC_KV_F16) {
            v_store_f16(y + i, saturate(v_load(x + i), 65504.0f));
        } else {
            float a[16];
            v_store(a, saturate(v_load(x + i), 0x1.fep127f));
            for (int j = 0; j < 16; j++) y[i + (uint32_t)j] = round_bf16(a[j]);
        }
    }
}

MP_INLINE void store_half(const mepic_kv_type type, const float *k, const float *v, uint32_t head_dim, uint32_t lane,
                          uint8_t *group) {
    uint16_t *keys = (uint16_t *)(void *)group, column[HEAD_MAX];
    round_vector(type, k, head_dim, column);
    for (uint32_t d = 0; d < head_dim; d++) keys[d * MP_GROUP_TOKENS + lane] = column[d];
    round_vector(type, v, head_dim, keys + (MP_GROUP_TOKENS + lane) * head_dim);
}

static void store_f16(const float *k, const float *v, uint32_t head_dim, uint32_t lane, uint8_t *group) {
    store_half(MEPIC_KV_F16, k, v, head_dim, lane, group);
}

static void store_bf16(const float *k, const float *v, uint32_t head_dim, uint32_t lane, uint8_t *group) {
    store_half(MEPIC_KV_BF16, k, v, head_dim, lane, group);
}

static void store_f32(const float *k, const float *v, uint32_t head_dim, uint32_t lane, uint8_t *group) {
    float *keys = (float *)(void *)group, *values = keys + (size_t)(MP_GROUP_TOKENS + lane) * head_dim;
    for (uint32_t d = 0; d < head_dim; d += 16) {
        float column[16];
        v_store(column, saturate(v_load(k + d), FLT_MAX));
        for (uint32_t i = 0; i < 16; i++) keys[(d + i) * MP_GROUP_TOKENS + lane] = column[i];
        v_store(values + d, saturate(v_load(v + d), FLT_MAX));
    }
}

const struct mp_row_kernels MP_ISA(mp_row_kernels) = {
    .norm = norm,
    .add = add,
    .swiglu = swiglu,
    .turn = turn,
    .store = { [MEPIC_KV_F16] = store_f16, [MEPIC_KV_BF16] = store_bf16, [MEPIC_KV_F32] = store_f32 },
};
