/* What the prefill kernels share: the walk of a block of rows over the stages of its cells, and its queries, turned.
 *
 * Row i of a block's matrix (its M side) is head i % group of the block's row i / group: the heads of a row stand
 * together. Rows of a block are in stream order: the first sees least, the last most. */
#ifndef MEPIC_BACKEND_CUDA_ATTEND_BLOCK_CUH
#define MEPIC_BACKEND_CUDA_ATTEND_BLOCK_CUH

#include "backend/cuda/fold.cuh"
#include "backend/cuda/kernels.h"

#define MP_BLOCK_ROWS 128u /* of a block's matrix, at most */

/* ---- The walk ---------------------------------------------------------------------------------------------------- */

/* 64 keys as a block sees them. Row r sees key j when bit j of seen is set and
 * j < (shared ? position : index + 1) - edge. */
typedef struct mp_stage {
    uint64_t seen;
    int32_t edge;
    int32_t base;
    bool shared;
    bool whole;    /* all rows see all keys */
    bool new_cell; /* the first stage of its cell that is seen */
} mp_stage;

/* Stages come in order; those that no row sees are left out. */
typedef struct mp_walk {
    const mp_cu_ref *next, *end;
    uint64_t mask;
    const uint32_t *pages; /* of the cell */
    int32_t n_tokens;      /* of the cell */
    int32_t key, stop;     /* first key of the stage; where the last row ceases to see */
    int32_t lo, hi, first, base;
    bool shared;
    int32_t position[2], index[2]; /* position and index + 1 of the block's first and last row */
    mp_stage stage;
} mp_walk;

static __device__ __forceinline__ uint64_t mp_bits(int32_t from, int32_t to) { /* [from, to) cut to 64 */
    from = max(from, 0);
    to = min(to, 64);
    return from >= to ? 0 : ~0ull >> (64 - (to - from)) << from;
}

static __device__ __forceinline__ uint64_t mp_walk_seen(const mp_walk *w, uint32_t page_size) {
    int32_t to = min(w->stop - w->key, 64);
    uint64_t range = mp_bits(w->lo - w->key, to);
    if (w->mask == ~0ull) return range;
    uint32_t p = (uint32_t)w->key / page_size, q = (uint32_t)(w->key + to - 1) / page_size;
    uint64_t all = ~0ull >> (63 - (q - p)), pages = w->mask >> p & all;
    if (pages == all) return range;
    uint64_t bits = 0;
    for (uint32_t i = p; i <= q; i++) {
        int32_t from = (int32_t)(i * page_size) - w->key;
        if (w->mask >> i & 1) bits |= mp_bits(from, from + (int32_t)page_size);
    }
    return bits & range;
}

static __device__ __forceinline__ void mp_walk_begin(mp_walk *w, const mp_cu_work *work, const mp_cu_block *b) {
    const mp_cu_row *first = &work->rows[b->first_row], *last = first + b->n_rows - 1;
    w->position[0] = first->position;
    w->position[1] = last->position;
    w->index[0] = (int32_t)first->index + 1;
    w->index[1] = (int32_t)last->index + 1;
    w->next = &work->refs[b->first_ref];
    w->end = w->next + b->n_refs;
    w->key = w->stop = 0;
    w->stage.new_cell = false;
}

/* To the next stage that some row sees; false: there is none. */
static __device__ __forceinline__ bool mp_walk_next(mp_walk *w, const mp_cu_work *work, uint32_t page_size) {
    bool new_cell = false;
    w->key += MP_CU_STAGE_TOKENS;
    for (;;) {
        for (; w->key < w->stop; w->key += MP_CU_STAGE_TOKENS) {
            uint64_t seen = mp_walk_seen(w, page_size);
            if (!seen) continue;
            int32_t least = (w->shared ? w->position[0] : w->index[0]) - w->first - w->key;
            w->stage.seen = seen;
            w->stage.edge = w->first + w->key;
            w->stage.base = w->base;
            w->stage.shared = w->shared;
            w->stage.whole = seen == ~0ull && least >= (int32_t)MP_CU_STAGE_TOKENS;
            w->stage.new_cell = new_cell;
            return true;
        }
        if (w->next == w->end) return false;
        const mp_cu_ref *r = w->next++;
        w->lo = r->lo;
        w->hi = r->hi;
        w->first = r->first;
        w->shared = r->shared != 0;
        w->base = r->base;
        w->mask = r->mask;
        w->stop = min(w->hi, (w->shared ? w->position[1] : w->index[1]) - w->first);
        w->key = w->lo & ~(int32_t)(MP_CU_STAGE_TOKENS - 1);
        new_cell = true;
        if (w->stop > 0) { /* all pages that matter: said once, not asked at every stage */
            uint64_t all = ~0ull >> (63 - (uint32_t)(w->stop - 1) / page_size);
            if ((w->mask & all) == all) w->mask = ~0ull;
        }
        const mp_cu_cell *cell = &work->cells[r->cell];
        w->pages = work->pages + cell->first_page;
        w->n_tokens = (int32_t)cell->n_tokens;
    }
}

/* The keys of a stage that one row sees. */
static __device__ __forceinline__ uint64_t mp_stage_row(uint64_t seen, int32_t limit) {
    return seen & mp_bits(0, limit);
}

/* ---- Queries ----------------------------------------------------------------------------------------------------- */

typedef union mp_vec8 {
    uint4 bits;
    __nv_bfloat162 pair[4];
} mp_vec8;

static __device__ __forceinline__ void mp_unpack8(uint4 bits, float x[8]) {
    mp_vec8 v = { bits };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = __bfloat1622float2(v.pair[i]);
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}

static __device__ __forceinline__ uint4 mp_pack8(const float x[8]) {
    mp_vec8 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return v.bits;
}

/* One column of one query, turned: any pair layout. */
static __device__ float mp_turn_column(const mp_cu_rope *rope, const __nv_bfloat16 *q, uint32_t column, int32_t delta) {
    uint32_t n = rope->n_pairs;
    float own = __bfloat162float(q[column]);
    if (column >= 2 * n) return own;
    uint32_t pair = rope->halves ? (column < n ? column : column - n) : column / 2;
    bool second = rope->halves ? column >= n : column & 1;
    uint32_t other = rope->halves ? (second ? column - n : column + n) : column ^ 1;
    float2 cs = mp_turn(rope->turns[pair], delta, rope->magnitude);
    float partner = __bfloat162float(q[other]);
    return second ? mp_turned(partner, own, cs).y : mp_turned(own, partner, cs).x;
}

/* What a block's queries are, for mp_turn_queries. */
typedef struct mp_queries {
    const mp_cu_row *rows;  /* of the block */
    const __nv_bfloat16 *q; /* the block's first row, first head of the group */
    uint32_t stride;        /* elements between rows */
    uint32_t group;         /* heads of a row */
    uint32_t first, n;      /* of the block's matrix */
    int32_t base;
} mp_queries;

/* Columns [column, column + 8) and their partners n further on, of all heads of a row. Four heads' loads are under way
 * together, before the angles. */
template <int D>
static __device__ __forceinline__ void mp_turn_pairs(const mp_cu_rope *rope, const mp_queries *s, uint8_t *out,
                                                     uint32_t row, uint32_t column) {
    const uint32_t n = rope->n_pairs;
    const __nv_bfloat16 *q = s->q + (size_t)row * s->stride + column;
    const int32_t delta = s->rows[row].position - s->base;
    float2 cs[8];
    for (uint32_t head = 0; head < s->group; head += 2) {
        uint4 x[2], y[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            if (head + i >= s->group) break;
            x[i] = *(const uint4 *)(q + (head + i) * D);
            y[i] = *(const uint4 *)(q + (head + i) * D + n);
        }
        if (head == 0) {
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) cs[i] = mp_turn(rope->turns[column + i], delta, rope->magnitude);
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t m = row * s->group + head + i - s->first;
            if (head + i >= s->group) break;
            if (m >= s->n) continue; /* also below first */
            float a[8], b[8];
            mp_unpack8(x[i], a);
            mp_unpack8(y[i], b);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                float2 t = mp_turned(a[k], b[k], cs[k]);
                a[k] = t.x;
                b[k] = t.y;
            }
            uint8_t *to = out + m / 8 * (16 * D);
            *(uint4 *)(to + mp_kv_offset(D, m % 8, column)) = mp_pack8(a);
            *(uint4 *)(to + mp_kv_offset(D, m % 8, column + n)) = mp_pack8(b);
        }
    }
}

/* Rows [first, first + n) of the block's matrix, turned by position - base, to shared memory; 8 rows lie as 8 keys do
 * (mp_kv_offset). */
template <int D>
static __device__ __forceinline__ void mp_turn_queries(const mp_cu_rope *rope, const mp_queries *s, uint8_t *out,
                                                       uint32_t thread, uint32_t n_threads) {
    const uint32_t begin = s->first / s->group, end = (s->first + s->n + s->group - 1) / s->group, n = rope->n_pairs;
    const bool paired = rope->halves && n % 8 == 0;
    const uint32_t units = paired ? (D - n) / 8 : D / 8;
    for (uint32_t task = thread; task < (end - begin) * units; task += n_threads) {
        uint32_t row = begin + task / units, column = task % units * 8;
        if (paired && column < n) {
            mp_turn_pairs<D>(rope, s, out, row, column);
            continue;
        }
        if (paired) column += n; /* behind all pairs */
        for (uint32_t head = 0; head < s->group; head++) {
            uint32_t m = row * s->group + head - s->first;
            if (m >= s->n) continue; /* also below first */
            const __nv_bfloat16 *q = s->q + (size_t)row * s->stride + head * D;
            float x[8];
#pragma unroll 1
            for (uint32_t i = 0; i < 8; i++) {
                float y = mp_turn_column(rope, q, column + i, s->rows[row].position - s->base);
#pragma unroll
                for (uint32_t k = 0; k < 8; k++)
                    x[k] = k == i ? y : x[k]; /* no indexed array: it would lie in memory */
            }
            *(uint4 *)(out + m / 8 * (16 * D) + mp_kv_offset(D, m % 8, column)) = mp_pack8(x);
        }
    }
}

/* ---- Units of work ----------------------------------------------------------------------------------------------- */

/* The next unit, or one >= n_units; a taker stops at the first of those, so the last of them sets the counter back. */
static __device__ __forceinline__ uint32_t mp_take_unit(mp_cu_counts *counts, uint32_t n_units, uint32_t n_takers) {
    uint32_t unit = atomicAdd(&counts->next_block, 1);
    if (unit == n_units + n_takers - 1) atomicExch(&counts->next_block, 0);
    return unit;
}

/* The Hopper kernel, for head_dim 64 and 128; cudaErrorNotSupported when this shape is not its own. */
extern "C" cudaError_t mp_cu_attend_prefill_sm90(const mp_cu_attend *a, cudaStream_t stream);

#endif
