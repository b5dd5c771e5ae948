/* The arithmetic every attention kernel shares, so that few and many readers, decode and prefill, give equal bits.
 *
 * A row's state over one cell starts fresh and is updated in stages of 64 keys from the cell's first key, in order; a
 * stage of which the row sees nothing leaves it as it is, to the bit (weights 0, factor 1), so it may be skipped.
 *
 *   s[j]  = sum over head_dim of q[d] * k[j, d]      tensor cores, bf16, fp32 accumulator from 0, d ascending by 16
 *   top   = max over the keys seen so far of s       (-inf: none yet)
 *   m     = top * c,  c = scale * log2(e)            (c > 0; m of no keys: 0)
 *   p[j]  = exp2(fma(s[j], c, -m)) rounded to bf16; 0 for a key that is not seen
 *   l     = l * f + sum of p[j],  f = exp2(old m - new m)   sum by the tensor cores: p times a column of ones, j ascending
 *   o[d]  = o[d] * f + sum of p[j] * v[j, d]                 by 16; the accumulator holds the scaled old value
 *
 * f is the row's own; 1 when its maximum did not move. At the end of a cell the state is rounded as a stored partial is:
 * o / l to f16, (m, l) as fp32, and the cells of a sequence are folded from the left (mp_fold), in fp32, in the order of
 * its refs. Prefill does the same in registers.
 *
 * NaN. A row that sees a key with a NaN ends as NaN, all of it: its l is NaN, and no test takes that for 0. Another row
 * is not touched: s of a key it does not see is replaced, not multiplied, and where its weight 0 meets a value, that is
 * a number: a token with a NaN is stored as K of NaN and V of 0 (rows.cu), and of a stage what lies behind the cell's
 * last token is zero. */
#ifndef MEPIC_BACKEND_CUDA_FOLD_CUH
#define MEPIC_BACKEND_CUDA_FOLD_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

#define MP_LOG2E 1.4426950408889634f

static __device__ __forceinline__ float mp_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* m of a row whose largest product so far is `top`. */
static __device__ __forceinline__ float mp_row_max(float top, float c) {
    return top == -CUDART_INF_F ? 0.0f : __fmul_rn(top, c);
}

/* The factor of the old state; 0 for the first key seen (old top -inf): nothing is there to scale, and no NaN arises. */
static __device__ __forceinline__ float mp_rescale(float old_top, float old_m, float new_m) {
    return old_top == -CUDART_INF_F ? 0.0f : mp_exp2(__fsub_rn(old_m, new_m));
}

static __device__ __forceinline__ float mp_weight(float s, float c, float m) {
    return mp_exp2(__fmaf_rn(s, c, -m));
}

/* Whether a row with these weights saw something. */
static __device__ __forceinline__ bool mp_saw(float l) {
    return l != 0.0f; /* NaN counts */
}

/* What a cell leaves of two outputs: o / l, as a stored partial has it. V beyond f16's range saturates; NaN stays. */
static __device__ __forceinline__ __half2 mp_partial(float x, float y, float inverse_l) {
    uint32_t pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
        : "=r"(pair)
        : "f"(__fmul_rn(y, inverse_l)), "f"(__fmul_rn(x, inverse_l)));
    return *(const __half2 *)&pair;
}

/* 1 / l; 0 of a row that saw nothing. */
static __device__ __forceinline__ float mp_inverse(float l) {
    return mp_saw(l) ? __frcp_rn(l) : 0.0f;
}

/* Left fold of a cell (m, l) into a running state: factors for the running o and for the cell's o (of o / l). A cell of
 * which the row sees nothing has l = 0 and is left out by the caller. */
typedef struct mp_running {
    float m, l; /* l = 0: nothing yet */
} mp_running;

static __device__ __forceinline__ void mp_fold(mp_running *r, float m, float l, float *keep, float *add) {
    float top = mp_saw(r->l) ? fmaxf(r->m, m) : m;
    *keep = mp_saw(r->l) ? mp_exp2(__fsub_rn(r->m, top)) : 0.0f;
    *add = __fmul_rn(mp_exp2(__fsub_rn(m, top)), l);
    r->l = __fmaf_rn(r->l, *keep, *add);
    r->m = top;
}

/* o' of one output dimension. */
static __device__ __forceinline__ float mp_fold_o(float o, float keep, float cell_o, float add) {
    return __fmaf_rn(cell_o, add, __fmul_rn(o, keep));
}

/* An output: running o / l as bf16; zero for a row that saw nothing (l = 0). */
static __device__ __forceinline__ __nv_bfloat16 mp_output(float o, float l) {
    return __float2bfloat16_rn(__fmul_rn(o, mp_inverse(l)));
}

/* cos and sin of the fraction of a turn that delta positions are. */
static __device__ __forceinline__ float2 mp_turn(uint64_t turns, int32_t delta, float magnitude) {
    uint64_t fraction = turns * (uint64_t)(int64_t)delta; /* mod 1 */
    float angle = __fmul_rn((float)(int32_t)(fraction >> 32), 1.4629180792671596e-9f); /* 2 pi / 2^32 */
    float s, c;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
    return make_float2(__fmul_rn(c, magnitude), __fmul_rn(s, magnitude));
}

/* One pair turned: (x, y) -> (x c - y s, y c + x s). */
static __device__ __forceinline__ float2 mp_turned(float x, float y, float2 cs) {
    return make_float2(__fmaf_rn(x, cs.x, -__fmul_rn(y, cs.y)), __fmaf_rn(y, cs.x, __fmul_rn(x, cs.y)));
}

/* Byte offset of (token of the group, column) inside a group's K (or V) part; see kernels.h. */
static __host__ __device__ __forceinline__ uint32_t mp_kv_offset(uint32_t head_dim, uint32_t token, uint32_t column) {
    uint32_t start = column & ~63u, width = 64;
    if (start + 64 > head_dim) { /* the rest: a panel of 32, then one of 16 */
        uint32_t rest = head_dim - start, in = column - start;
        if (rest >= 32 && in < 32) {
            width = 32;
        } else {
            start += rest >= 32 ? 32 : 0;
            width = 16;
        }
    }
    uint32_t unit = (column - start) >> 3;
    unit ^= width == 64 ? token & 7 : width == 32 ? token >> 1 & 3 : token >> 2 & 1;
    return start * 16 + token * width * 2 + unit * 16 + (column & 7) * 2;
}

/* The token of the group to whose K (or V) the 16-byte unit belongs, the inverse of it; head_dim 64, 80, 96, 128, 256. */
template <int D> static __device__ __forceinline__ uint32_t mp_kv_token(uint32_t unit) {
    const uint32_t whole = D & ~63u;
    static_assert(D % 64 == 0 || D % 64 == 16 || D % 64 == 32, "panels of 64, and one narrower");
    return unit < whole ? unit >> 3 & 7 : (unit - whole) >> (D % 64 == 32 ? 2 : 1);
}

#endif
