/* fp8 pages (their layout: kernels.h): from codes to the bf16 that the tensor cores read, and from numbers to codes.
 *
 * A key or value is a function of what its page says and of the model's bias alone, so whoever reads it has the same
 * bits: code times scale, rounded to bf16; for K with a bias, that and the turned bias in fp32, rounded again. */
#ifndef MEPIC_BACKEND_CUDA_KV8_CUH
#define MEPIC_BACKEND_CUDA_KV8_CUH

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <stdint.h>
#include <string.h>

#include "backend/cuda/fold.cuh"
#include "backend/cuda/kernels.h"

/* What a kernel copies of 8 tokens to have their K or V: both have the marks, K behind its codes, V before. */
template <int D> struct mp_kv8 {
    static constexpr uint32_t GROUP = 16 * D + MP_CU_KV8_MARKS;
    static constexpr uint32_t HALF = 8 * D + MP_CU_KV8_MARKS;
    static constexpr uint32_t V = 8 * D; /* where the half of V begins in the group */
};

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

/* The even bytes of a word as a pair of bf16, or the odd ones, times a pair of factors. An e4m3's exponent and mantissa
 * where bf16 has them are a number 2^120 too small, subnormal or not, for which the factor makes up. */
template <bool ODD> static __device__ __forceinline__ uint32_t mp_kv8_pair(uint32_t codes, uint32_t factors) {
    if (!ODD) codes <<= 8;
    uint32_t bits = (codes >> 4 & 0x07f007f0u) | (codes & 0x80008000u);
    __nv_bfloat162 x, f;
    memcpy(&x, &bits, sizeof x);
    memcpy(&f, &factors, sizeof f);
    x = __hmul2(x, f);
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Two neighbouring columns of a key, and the bias in them at its angle. */
static __device__ __forceinline__ uint32_t mp_kv8_add_bias(uint32_t pair, const mp_cu_key_bias *columns,
                                                           uint32_t angle) {
    const float turn = 6.2831853071795865f, before = -9.4247779607693797f; /* [1, 2) turns to [-pi, pi) */
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 b = __ldg((const uint4 *)(columns + i)); /* turns_high, turns_low, phase, amplitude */
        uint32_t fraction = b.x * angle + __umulhi(b.y, angle) + b.z;
        float c;
        asm("cos.approx.ftz.f32 %0, %1;"
            : "=f"(c)
            : "f"(__fmaf_rn(__uint_as_float(0x3f800000u | fraction >> 9), turn, before)));
        x[i] = __fmaf_rn(__uint_as_float(b.w), c, __uint_as_float(i ? pair & 0xffff0000u : pair << 16));
    }
    __nv_bfloat162 sum = __floats2bfloat162_rn(x[0], x[1]);
    memcpy(&pair, &sum, sizeof pair);
    return pair;
}

/* The K (or V) halves of 64 tokens, FROM bytes from one group to the next, to bf16 as a page of bf16 has it, TO bytes
 * from one group to the next. What is behind the first n_keys may be anything, and becomes zero (V). bias: of this kv
 * head, for K; or NULL. Called by THREADS threads with their index. */
template <int D, bool V, int THREADS, int FROM, int TO, bool BIASED>
static __device__ __forceinline__ void mp_kv8_widen_as(const uint8_t *half, uint8_t *to, const mp_cu_key_bias *bias,
                                                       uint32_t thread, uint32_t n_keys) {
    constexpr uint32_t TASKS = 64 * (D / 16), CODES = V ? MP_CU_KV8_MARKS : 0, MARKS = V ? 0 : 8 * D;
#pragma unroll (BIASED || D <= 64 ? 1 : 2)
    for (uint32_t first = 0; first < TASKS; first += THREADS) {
        uint32_t key = (first + thread) % 64, panel = (first + thread) / 64, token = key % 8;
        if (TASKS % THREADS && first + thread >= TASKS) break;
        const uint8_t *group = half + key / 8 * FROM, *marks = group + MARKS;
        uint4 codes = make_uint4(0, 0, 0, 0);
        uint32_t factors = 0, angle = 0;
        if (key < n_keys) {
            codes = *(const uint4 *)(group + CODES + panel * 128 + token * 16);
            factors = ((const uint16_t *)marks)[(V ? 24 : 16) + token] * 0x10001u;
            if (BIASED) angle = ((const uint32_t *)marks)[token];
        }
        uint32_t w[4] = { codes.x, codes.y, codes.z, codes.w }, low[4], high[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            low[i] = mp_kv8_pair<false>(w[i], factors);
            high[i] = mp_kv8_pair<true>(w[i], factors);
            if (!BIASED) continue; /* not asked here: nothing would be interleaved across the branch */
            low[i] = mp_kv8_add_bias(low[i], bias + panel * 16 + 2 * i, angle);
            high[i] = mp_kv8_add_bias(high[i], bias + panel * 16 + 2 * i + 8, angle);
        }
        uint8_t *at = to + key / 8 * TO;
        *(uint4 *)(at + mp_kv_offset(D, token, panel * 16)) = make_uint4(low[0], low[1], low[2], low[3]);
        *(uint4 *)(at + mp_kv_offset(D, token, panel * 16 + 8)) = make_uint4(high[0], high[1], high[2], high[3]);
    }
}

template <int D, bool V, int THREADS, int FROM, int TO>
static __device__ __forceinline__ void mp_kv8_widen(const uint8_t *half, uint8_t *to, const mp_cu_key_bias *bias,
                                                    uint32_t thread, uint32_t n_keys) {
    if (!V && bias) {
        mp_kv8_widen_as<D, V, THREADS, FROM, TO, true>(half, to, bias, thread, n_keys);
    } else {
        mp_kv8_widen_as<D, V, THREADS, FROM, TO, false>(half, to, bias, thread, n_keys);
    }
}

/* ---- Writing ----------------------------------------------------------------------------------------------------- */

/* The factor of a head's K or V from the bits of its largest magnitude; NaN for a head that is not a number. What is
 * beyond f16's largest number saturates, as it would in a partial state. */
static __device__ __forceinline__ uint32_t mp_kv8_factor(uint32_t magnitude) {
    if (magnitude > 0x7f800000u) return 0x7fc0;
    float top = fminf(fmaxf(__uint_as_float(magnitude), 0x1p-60f), 65504.0f); /* below, all is as good as zero */
    return (__float_as_uint(top * (0x1p120f / 448.0f)) + 0x8000u) >> 16; /* 448 is also the code of a little more */
}

/* 8 numbers as codes; all zero under a factor that is NaN. */
static __device__ __forceinline__ uint2 mp_kv8_codes(const float *x, uint32_t factor) {
    if (factor == 0x7fc0) return make_uint2(0, 0);
    float inverse = __frcp_rn(__uint_as_float(factor << 16) * 0x1p-120f);
    uint32_t w[2] = { 0, 0 };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = make_float2(x[2 * i] * inverse, x[2 * i + 1] * inverse);
        uint32_t codes = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
        w[i / 2] |= codes << i % 2 * 16;
    }
    return make_uint2(w[0], w[1]);
}

#endif
