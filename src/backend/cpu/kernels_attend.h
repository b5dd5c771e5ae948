/* Attention of a few queries over one cell, compiled once per instruction set.
 *
 * A tile is up to `width` (query row, head) pairs that read the same cell of the same kv head: each K and V vector is
 * loaded and converted once for all of them. A query's numbers never depend on the tile it is in:
 *   score of a key   fold over head_dim, from dimension 0 up
 *   maximum          over the keys the query sees
 *   l                sum of exp(score - maximum): sixteen lanes, each from left to right, then the lanes' sum
 *   o                fold over the keys from left to right of weight * v
 * A masked key has weight exactly 0, so groups of keys that only other queries of the tile see change nothing. (That
 * needs finite V in every slot: pages are zeroed when allocated and stores saturate.)
 *
 * A state is [head_dim] o (not divided by l), then m, then l; m is -inf where nothing was seen: o is undefined then. */
#ifndef MEPIC_BACKEND_CPU_KERNELS_ATTEND_H
#define MEPIC_BACKEND_CPU_KERNELS_ATTEND_H

#include "backend/cpu/slab.h"

#define MP_STATE_EXTRA 16u /* floats behind o: m and l, padded so that states start on a cache line */
#define MP_QUERY_TILE 8u

/* What a query sees of a cell: tokens lo <= i < hi in groups (of 16 tokens) whose bit is set. */
typedef struct mp_key_range {
    uint16_t lo, hi;
    uint16_t groups; /* a set bit has at least one visible token; 0: sees nothing */
} mp_key_range;

typedef struct mp_query_tile {
    const uint8_t *const *groups; /* [MP_CELL_GROUPS]; only those in a range are read */
    uint32_t head_dim;
    uint32_t n;                 /* queries, 1 .. width */
    const float *q;             /* [n, head_dim], turned and scaled */
    const mp_key_range *ranges; /* [n] */
    float *const *states;       /* [n] -> [head_dim + MP_STATE_EXTRA], written */
    float *weights;             /* scratch [MP_QUERY_TILE, MP_CPU_CELL_TOKENS] */
} mp_query_tile;

struct mp_attend_kernels {
    uint32_t width;                             /* most queries of a tile */
    void (*tile[4])(const mp_query_tile *tile); /* by mepic_kv_type */
    /* into = into merged with from: the one expression that joins partial results. */
    void (*merge)(float *into, const float *from, uint32_t head_dim);
    /* out [head_dim] = o / l; zeros where nothing was seen. */
    void (*finish)(const float *state, float *out, uint32_t head_dim);
};

extern const struct mp_attend_kernels mp_attend_kernels_portable;
#if defined(__x86_64__)
extern const struct mp_attend_kernels mp_attend_kernels_avx2;
extern const struct mp_attend_kernels mp_attend_kernels_avx512;
#endif

#endif
