/* GGUF blocks to bf16. model/dtype.c is the definition: the same operations in the same order, no product fused with a
 * sum, rounded to nearest even at the end, so the bits are those of the CPU's dequantizer and rounding.
 *
 * A thread makes 8 neighbouring weights and stores them at once. Bytes are read one by one (blocks have 18, 22, 34 ...
 * bytes); the bus that brings them is the bound. */
#include "backend/cuda/kernels.h"

#include "backend/cuda/fold.cuh"
#include "model/dtype.h"

enum { UNIT = 8, THREADS = 256 };

static __device__ __forceinline__ uint32_t u16(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8;
}

static __device__ __forceinline__ float f16(const uint8_t *p) {
    return __half2float(__ushort_as_half((unsigned short)u16(p)));
}

/* As mp_f32_to_bf16. */
static __device__ __forceinline__ uint32_t to_bf16(float f) {
    uint32_t bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

/* As group_scale of model/dtype.c: factor and minimum of a group of Q4_K and Q5_K. */
static __device__ __forceinline__ void group_scale(const uint8_t *b, uint32_t g, float *scale, float *minimum) {
    const uint8_t *s = b + 4;
    uint32_t d, m;
    if (g < 4) {
        d = s[g] & 63;
        m = s[g + 4] & 63;
    } else {
        d = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        m = s[g + 4] >> 4 | (s[g] >> 6) << 4;
    }
    *scale = __fmul_rn(f16(b), (float)d);
    *minimum = __fmul_rn(f16(b + 2), (float)m);
}

/* Weights i .. i + 7 of block b; i is a multiple of 8, so where a byte holds two weights all 8 are in one half. */
template <uint32_t TYPE>
static __device__ __forceinline__ void block_weights(const uint8_t *b, uint32_t i, float *y) {
    if (TYPE == MP_DTYPE_Q4_0 || TYPE == MP_DTYPE_Q4_1 || TYPE == MP_DTYPE_Q5_0 || TYPE == MP_DTYPE_Q5_1) {
        const bool fifth = TYPE == MP_DTYPE_Q5_0 || TYPE == MP_DTYPE_Q5_1;
        const bool offset = TYPE == MP_DTYPE_Q4_1 || TYPE == MP_DTYPE_Q5_1;
        float d = f16(b), m = offset ? f16(b + 2) : 0.0f;
        const uint8_t *high = b + (offset ? 4 : 2), *codes = high + (fifth ? 4 : 0);
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) {
            int q = codes[(i + j) % 16] >> (i < 16 ? 0 : 4) & 15;
            if (fifth) q |= (high[i / 8] >> j & 1) << 4;
            if (offset) {
                y[j] = __fadd_rn(__fmul_rn(d, (float)q), m);
            } else {
                y[j] = __fmul_rn(d, (float)(q - (fifth ? 16 : 8)));
            }
        }
    } else if (TYPE == MP_DTYPE_Q8_0) {
        float d = f16(b);
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) y[j] = __fmul_rn(d, (float)(int8_t)b[2 + i + j]);
    } else if (TYPE == MP_DTYPE_Q4_K || TYPE == MP_DTYPE_Q5_K) {
        float scale, minimum;
        uint32_t g = i / 32;
        group_scale(b, g, &scale, &minimum);
        const uint8_t *codes = b + (TYPE == MP_DTYPE_Q5_K ? 48 : 16) + g / 2 * 32, *high = b + 16;
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) {
            uint32_t at = i % 32 + j;
            int q = codes[at] >> g % 2 * 4 & 15;
            if (TYPE == MP_DTYPE_Q5_K) q |= (high[at] >> g & 1) << 4;
            y[j] = __fsub_rn(__fmul_rn(scale, (float)q), minimum);
        }
    } else if (TYPE == MP_DTYPE_Q6_K) {
        float scale = __fmul_rn(f16(b + 208), (float)(int8_t)b[192 + i / 16]);
        uint32_t half = i / 128, quarter = i % 128 / 32;
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) {
            uint32_t at = i % 32 + j;
            int low = b[half * 64 + quarter % 2 * 32 + at] >> quarter / 2 * 4 & 15;
            int high = b[128 + half * 32 + at] >> 2 * quarter & 3;
            y[j] = __fmul_rn(scale, (float)((low | high << 4) - 32));
        }
    }
}

template <uint32_t TYPE>
static __global__ void dequantize_blocks(const uint8_t *src, uint4 *dst, size_t n_units, uint32_t len,
                                         uint32_t bytes) {
    size_t u = blockIdx.x * (size_t)THREADS + threadIdx.x;
    if (u >= n_units) return;
    float y[UNIT];
    block_weights<TYPE>(src + u / (len / UNIT) * bytes, (uint32_t)(u % (len / UNIT)) * UNIT, y);
    uint32_t w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = to_bf16(y[2 * j]) | to_bf16(y[2 * j + 1]) << 16;
    dst[u] = make_uint4(w[0], w[1], w[2], w[3]);
}

/* F32, F16 and BF16: blocks of one weight. */
template <uint32_t TYPE> static __global__ void convert(const uint8_t *src, mp_bf16 *dst, size_t n) {
    size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x;
    if (i >= n) return;
    float y;
    if (TYPE == MP_DTYPE_F32) {
        y = ((const float *)src)[i];
    } else if (TYPE == MP_DTYPE_F16) {
        y = f16(src + 2 * i);
    } else {
        y = __uint_as_float(u16(src + 2 * i) << 16);
    }
    dst[i] = (mp_bf16)to_bf16(y);
}

cudaError_t mp_cu_dequantize(uint32_t type, const void *src, mp_bf16 *dst, size_t n, cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    const uint8_t *from = (const uint8_t *)src;
    uint4 *to = (uint4 *)dst;
    size_t units = n / UNIT;
    if ((n + THREADS - 1) / THREADS > INT32_MAX) return cudaErrorInvalidValue; /* a grid's first dimension */
    uint32_t blocks = (uint32_t)((units + THREADS - 1) / THREADS), singles = (uint32_t)((n + THREADS - 1) / THREADS);
    switch (type) {
#define BLOCKS(name, len, bytes)                                                                                       \
    case MP_DTYPE_##name:                                                                                              \
        dequantize_blocks<MP_DTYPE_##name><<<blocks, THREADS, 0, stream>>>(from, to, units, len, bytes);               \
        break;
        BLOCKS(Q4_0, 32, 18)
        BLOCKS(Q4_1, 32, 20)
        BLOCKS(Q5_0, 32, 22)
        BLOCKS(Q5_1, 32, 24)
        BLOCKS(Q8_0, 32, 34)
        BLOCKS(Q4_K, 256, 144)
        BLOCKS(Q5_K, 256, 176)
        BLOCKS(Q6_K, 256, 210)
#undef BLOCKS
    case MP_DTYPE_F32: convert<MP_DTYPE_F32><<<singles, THREADS, 0, stream>>>(from, dst, n); break;
    case MP_DTYPE_F16: convert<MP_DTYPE_F16><<<singles, THREADS, 0, stream>>>(from, dst, n); break;
    case MP_DTYPE_BF16: convert<MP_DTYPE_BF16><<<singles, THREADS, 0, stream>>>(from, dst, n); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
