/* What the decode kernels share: the rows of a tile, what they see, and their queries, turned.
 *
 * A tile is what one block takes of an item at a time: some of its readers, and the heads of one kv head. Row i of the
 * tile's matrix is head i % group of reader i / group. Queries stand in shared memory as K of a page does: groups of 8
 * rows in panels, at (row / 8) * head_dim * 16 + mp_kv_offset(head_dim, row % 8, column). */
#ifndef MEPIC_BACKEND_CUDA_ATTEND_ITEM_CUH
#define MEPIC_BACKEND_CUDA_ATTEND_ITEM_CUH

#include "backend/cuda/fold.cuh"
#include "backend/cuda/kernels.h"
#include "backend/cuda/mma.cuh"

/* The sm_90a path; head_dim 64 and 128 (attend_decode_sm90.cu). */
extern "C" cudaError_t mp_cu_attend_decode_sm90(const mp_cu_attend *a, cudaStream_t stream);
extern "C" cudaError_t mp_cu_attend_decode_sm90_open(void);
extern "C" cudaError_t mp_cu_attend_fold(const mp_cu_attend *a, cudaStream_t stream); /* of what the others left */
extern "C" uint32_t mp_cu_attend_decode_sm90_readers(uint32_t group); /* of a tile */

/* Which of the 64 keys from `key` on a reader sees; window: lo, hi in the upper half; pages of 1 << shift tokens. */
static __device__ __forceinline__ uint64_t mp_seen(uint32_t window, uint64_t mask, uint32_t key, uint32_t shift) {
    int32_t from = max((int32_t)(window & 0xffff) - (int32_t)key, 0), to = min((int32_t)(window >> 16) - (int32_t)key, 64);
    if (from >= to) return 0;
    uint64_t bits = ~0ull >> (64 - (to - from)) << from;
    uint64_t pages = mask >> (key >> shift);
    if (shift >= 6) return pages & 1 ? bits : 0;
    uint64_t page = (1ull << (1u << shift)) - 1;
    for (uint32_t at = 0; at < 64; at += 1u << shift, pages >>= 1) {
        if (!(pages & 1)) bits &= ~(page << at);
    }
    return bits;
}

/* Four pairs of one row: x[0] and x[1] are 4 columns each, either the firsts and the seconds of the pairs or the pairs
 * side by side. */
static __device__ __forceinline__ void mp_turn_quad(const uint2 x[2], uint2 *const to[2], const float2 cs[4],
                                                    bool halves) {
    float2 a0 = __bfloat1622float2(*(const __nv_bfloat162 *)&x[0].x);
    float2 a1 = __bfloat1622float2(*(const __nv_bfloat162 *)&x[0].y);
    float2 b0 = __bfloat1622float2(*(const __nv_bfloat162 *)&x[1].x);
    float2 b1 = __bfloat1622float2(*(const __nv_bfloat162 *)&x[1].y);
    if (halves) {
        float2 t0 = mp_turned(a0.x, b0.x, cs[0]), t1 = mp_turned(a0.y, b0.y, cs[1]);
        float2 t2 = mp_turned(a1.x, b1.x, cs[2]), t3 = mp_turned(a1.y, b1.y, cs[3]);
        *to[0] = make_uint2(mp_pack(t0.x, t1.x), mp_pack(t2.x, t3.x));
        *to[1] = make_uint2(mp_pack(t0.y, t1.y), mp_pack(t2.y, t3.y));
    } else {
        float2 t0 = mp_turned(a0.x, a0.y, cs[0]), t1 = mp_turned(a1.x, a1.y, cs[1]);
        float2 t2 = mp_turned(b0.x, b0.y, cs[2]), t3 = mp_turned(b1.x, b1.y, cs[3]);
        *to[0] = make_uint2(mp_pack(t0.x, t0.y), mp_pack(t1.x, t1.y));
        *to[1] = make_uint2(mp_pack(t2.x, t2.y), mp_pack(t3.x, t3.y));
    }
}

/* Turns the queries of a tile in place. deltas: of its readers. Called by `threads` threads with their index. */
template <int D>
static __device__ void mp_turn_tile(uint8_t *q, const mp_cu_rope &rope, uint32_t n_readers, uint32_t group,
                                    const int32_t *deltas, uint32_t thread, uint32_t threads) {
    uint32_t n = rope.n_pairs, quads = n / 4;
    if (!n) return;
    if (n % 4) { /* pair by pair */
        for (uint32_t task = thread; task < n_readers * n; task += threads) {
            uint32_t reader = task / n, i = task - reader * n;
            float2 cs = mp_turn(rope.turns[i], deltas[reader], rope.magnitude);
            for (uint32_t row = reader * group; row < (reader + 1) * group; row++) {
                uint8_t *at = q + (row / 8) * (D * 16);
                __nv_bfloat16 *x = (__nv_bfloat16 *)(at + mp_kv_offset(D, row % 8, rope.halves ? i : 2 * i));
                __nv_bfloat16 *y = (__nv_bfloat16 *)(at + mp_kv_offset(D, row % 8, rope.halves ? i + n : 2 * i + 1));
                float2 to = mp_turned(__bfloat162float(*x), __bfloat162float(*y), cs);
                *x = __float2bfloat16_rn(to.x);
                *y = __float2bfloat16_rn(to.y);
            }
        }
        return;
    }
    uint32_t t = thread % quads, step = threads / quads; /* a thread turns the same four pairs of all its readers */
    if (thread >= step * quads) return;
    uint64_t turns[4];
#pragma unroll
    for (int i = 0; i < 4; i++) turns[i] = __ldg(&rope.turns[4 * t + i]);
    uint32_t first = rope.halves ? 4 * t : 8 * t, second = rope.halves ? 4 * t + n : 8 * t + 4;
    for (uint32_t reader = thread / quads; reader < n_readers; reader += step) {
        int32_t delta = deltas[reader];
        float2 cs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) cs[i] = mp_turn(turns[i], delta, rope.magnitude);
#pragma unroll 1
        for (uint32_t row = reader * group, end = row + group; row < end; row += 2) {
            uint2 *at[2][2], x[2][2]; /* two rows at a time, so that one's loads need not wait for the other's stores */
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t r = min(row + k, end - 1);
                uint8_t *rows = q + (r / 8) * (D * 16);
                at[k][0] = (uint2 *)(rows + mp_kv_offset(D, r % 8, first));
                at[k][1] = (uint2 *)(rows + mp_kv_offset(D, r % 8, second));
                x[k][0] = *at[k][0];
                x[k][1] = *at[k][1];
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (row + k < end) mp_turn_quad(x[k], at[k], cs, rope.halves);
            }
        }
    }
}

/* The last block to leave a persistent grid puts its counters back to 0. One thread of each block calls it, once, after
 * its last use of them. */
static __device__ __forceinline__ void mp_leave_decode(mp_cu_counts *counts, uint32_t n_blocks) {
    __threadfence();
    if (atomicAdd(&counts->done, 1) != n_blocks - 1) return;
    counts->next_unit = counts->next_back = 0;
    counts->done = 0;
}

#endif
