/* Prefill attention for Hopper, head_dim 64 and 128: wgmma, keys and values by bulk copies. Gives the same bits as the
 * general kernel (attend_prefill.cu).
 *
 *   warps 0..7    two warpgroups of consumers, 64 rows of the block's matrix each: queries and the state of the cell in
 *                 registers, the running state in shared memory
 *   warp 8        the producer: takes units, walks their stages, fills the ring, notes with each stage what it is
 *   warps 9..11   bring queries: those of the next base while the consumers are at the one before
 *
 * A consumer issues the scores of a stage and the values of the one before together: the tensor cores have work while
 * it takes exponentials. What ends a cell is done when the first stage of the next cell is met, of the same unit or of
 * another: there is no gap between units. Queries are turned by the consumers, in registers, where all dimensions turn;
 * else by warps 9..11.
 *
 * Of fp8 pages the producer copies codes, K and V of a stage apart, into a ring of their own. Warps 9..11 bring them to
 * bf16, and queries where a note says so. A place in the consumers' ring then has what is multiplied together: K of a
 * stage and V of the one before it.
 *
 * Between two products the compiler (13.0) must see every wait in the iteration that issued what is waited for, and no
 * branch that touches an accumulator; else it waits after each product (warnings C7514, C7518). */
#include "backend/cuda/attend_block.cuh"
#include "backend/cuda/kv8.cuh"
#include "backend/cuda/wgmma.cuh"

#define CONSUMERS 256
#define TURNERS 96
#define THREADS (CONSUMERS + 32 + TURNERS)

/* What a stage is, for the consumers. */
enum { SHARED = 1, WHOLE = 2, NEW_CELL = 4, NEW_QUERIES = 8, NEW_UNIT = 16, END = 32 };

typedef struct note {
    uint64_t seen;
    int32_t edge;
    uint32_t flags;
    uint32_t first_row, n_rows, head; /* of the unit */
    int32_t base;
} note;

typedef struct ticket { /* a unit, for the turners */
    mp_cu_block block;
    uint32_t head;
    bool end;
} ticket;

#define TICKETS 4

template <int D> struct shape {
    static constexpr int HALF = 16 * D; /* bytes of K, or of V, in a group of 8 keys */
    static constexpr int GROUP = 2 * HALF;
    static constexpr int STAGE = 8 * GROUP;
};

template <int D, bool FP8> struct code_ring {};

template <int D> struct code_ring<D, true> {
    static constexpr int N_CODES = 3 * 128 / D; /* K's and V's of stages */
    uint8_t codes[N_CODES][8 * mp_kv8<D>::HALF];
    note code_notes[N_CODES]; /* with K */
    uint32_t n_keys[N_CODES]; /* with K: of the stage */
    uint64_t codes_full[N_CODES], codes_empty[N_CODES];
};

template <int D, bool FP8> struct shared : code_ring<D, FP8> {
    static constexpr int RING = (FP8 ? 3 : 4) * 128 / D;
    alignas(FP8 ? 1024 : 16) uint8_t ring[RING][shape<D>::STAGE]; /* bf16: it stands at the beginning */
    uint8_t queries[MP_BLOCK_ROWS * 2 * D];
    float4 o[2][D / 8][128]; /* the running state: [warpgroup][8 columns][thread] */
    note notes[RING];
    ticket tickets[TICKETS];
    int2 rows[2][MP_BLOCK_ROWS]; /* position and index + 1 of the matrix's rows; of this unit and the next */
    uint64_t turns[D / 2];
    uint64_t full[RING], empty[RING], posted[TICKETS], read[TICKETS];
    uint64_t turned, loaded; /* queries are in shared memory; are in registers */
};

/* ---- Products ---------------------------------------------------------------------------------------------------- */

template <int D>
static __device__ __forceinline__ void issue_scores(float (&s)[32], const uint32_t q[D / 16][4], const uint8_t *stage) {
    uint64_t keys = mp_matrix(mp_shared(stage), shape<D>::GROUP, 0);
    mp_products_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++) mp_product_qk(s, q[k], keys + (k / 4 * 1024 + k % 4 * 32) / 16, k > 0);
    mp_products_commit();
}

/* o += p v, or o = p v. */
template <int D>
static __device__ __forceinline__ void issue_values(float (&o)[D / 2], const uint32_t p[4][4], const uint8_t *stage,
                                                    int add) {
    uint64_t values = mp_matrix(mp_shared(stage) + shape<D>::HALF, shape<D>::GROUP, 1024);
    mp_products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) mp_product_pv(o, p[k], values + k * (2 * shape<D>::GROUP / 16), k > 0 ? 1 : add);
    mp_products_commit();
}

/* ---- Producer ---------------------------------------------------------------------------------------------------- */

/* Where the producer is in its rings. */
typedef struct cursor {
    uint32_t slot, phase;
} cursor;

static __device__ __forceinline__ void advance(cursor *c, uint32_t n) {
    if (++c->slot == n) {
        c->slot = 0;
        c->phase ^= 1;
    }
}

/* turn: its queries are others than those of the stage before; first: of its unit. */
static __device__ __forceinline__ note note_of(const mp_stage *s, bool turn, bool first, const mp_cu_block *b,
                                               uint32_t head) {
    uint32_t flags = (s->shared ? SHARED : 0) | (s->whole ? WHOLE : 0) | (s->new_cell ? NEW_CELL : 0) |
                     (turn ? NEW_QUERIES : 0) | (first ? NEW_UNIT : 0);
    note n = { s->seen, s->edge, flags, b->first_row, b->n_rows, head, s->base };
    return n;
}

/* Rows that see nothing at all: zeros. */
static __device__ void write_nothing(const mp_cu_attend *a, const mp_cu_block *b, uint32_t head, uint32_t lane) {
    uint32_t width = a->n_heads / a->n_kv_heads * a->head_dim;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        mp_bf16 *out = a->out + (size_t)(b->first_row + r) * a->n_heads * a->head_dim + head * width;
        for (uint32_t i = lane; i < width; i += 32) out[i] = 0;
    }
}

/* A stage's codes into their ring: eight lanes copy a group of K each, then of V, with its marks. Whole groups: what is
 * behind the end is not looked at. piece: where the lane's piece begins. */
template <int D>
static __device__ __forceinline__ void copy_codes(shared<D, true> *sh, uint64_t piece, uint32_t shift, uint32_t n_keys,
                                                  const note &n, cursor *at) {
    const uint32_t lane = threadIdx.x & 31, HALF = mp_kv8<D>::HALF;
    const uint8_t *group = (const uint8_t *)piece + (lane & ((1u << shift) / 8 - 1)) * mp_kv8<D>::GROUP;
#pragma unroll
    for (uint32_t v = 0; v < 2; v++) {
        mp_barrier_wait(mp_shared(&sh->codes_empty[at->slot]), at->phase ^ 1);
        uint32_t full = mp_shared(&sh->codes_full[at->slot]);
        if (lane == 0) {
            if (!v) {
                sh->code_notes[at->slot] = n;
                sh->n_keys[at->slot] = n_keys;
            }
            mp_barrier_expect(full, (n_keys + 7) / 8 * HALF);
        }
        __syncwarp();
        if (lane * 8 < n_keys) {
            mp_bulk_copy(mp_shared(sh->codes[at->slot]) + lane * HALF, group + (v ? mp_kv8<D>::V : 0), HALF, full,
                         mp_policy_again());
        }
        advance(at, sh->N_CODES);
    }
}

/* One unit's stages into the ring. A piece, 2^shift tokens, lies together in a page and in a stage. A cell has up to
 * 64 pieces: lane l finds l and l + 32 when the cell begins. */
template <int D, bool FP8>
static __device__ void produce_unit(const mp_cu_attend *a, shared<D, FP8> *sh, const mp_cu_block *b, uint32_t head,
                                    uint32_t shift, cursor *at) {
    const uint32_t lane = threadIdx.x & 31, ahead = lane << shift; /* ahead: of the lane's keys in a stage */
    constexpr uint32_t GROUP = FP8 ? mp_kv8<D>::GROUP : shape<D>::GROUP; /* bytes, in a page */
    const uint8_t *slab = a->slab + a->layer_offset + head * a->block_bytes;
    uint64_t piece[2] = { 0, 0 };
    mp_walk w;
    int32_t base = 0;
    bool first = true;
    mp_walk_begin(&w, &a->work, b);
    for (; mp_walk_next(&w, &a->work, a->page_size); first = false) {
        if (w.stage.new_cell) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t key = (lane + 32 * i) << shift, page = key / a->page_size, in = key - page * a->page_size;
                if ((int32_t)key >= w.n_tokens) break; /* what is behind the cell's end is not asked for */
                piece[i] = (uint64_t)(slab + (size_t)__ldg(w.pages + page) * a->page_bytes + in / 8 * GROUP);
            }
        }
        const uint32_t index = ((uint32_t)w.key >> shift) + (FP8 ? (lane & 7) * 8 >> shift : lane);
        uint64_t low = __shfl_sync(~0u, piece[0], index & 31), high = __shfl_sync(~0u, piece[1], index & 31);
        const uint32_t n_keys = min(w.n_tokens - w.key, (int32_t)MP_CU_STAGE_TOKENS);
        const bool turn = first || (w.stage.new_cell && w.stage.base != base);
        base = w.stage.base;
        if constexpr (FP8) {
            note n = note_of(&w.stage, turn, first, b, head);
            copy_codes<D>(sh, index < 32 ? low : high, shift, n_keys, n, at);
            continue;
        }
        mp_barrier_wait(mp_shared(&sh->empty[at->slot]), at->phase ^ 1);
        if (n_keys < MP_CU_STAGE_TOKENS) mp_clear_values<D>(sh->ring[at->slot], n_keys);
        if (lane == 0) {
            sh->notes[at->slot] = note_of(&w.stage, turn, first, b, head);
            mp_barrier_expect(mp_shared(&sh->full[at->slot]), mp_keys_bytes<D>(n_keys));
        }
        __syncwarp();
        if (ahead < n_keys) { /* seen or not: what stays in the ring may be NaN */
            uint32_t to = mp_shared(sh->ring[at->slot]) + ahead / 8 * shape<D>::GROUP;
            mp_copy_keys<D>(to, (const uint8_t *)(index < 32 ? low : high), min(n_keys - ahead, 1u << shift),
                            mp_shared(&sh->full[at->slot]), mp_policy_again());
        }
        advance(at, sh->RING);
    }
    if (first) write_nothing(a, b, head, lane);
}

/* The next unit: taken, and told to the turners, unless notes do. */
template <int D, bool FP8>
static __device__ __forceinline__ ticket take(const mp_cu_attend *a, shared<D, FP8> *sh, cursor *at) {
    const uint32_t lane = threadIdx.x & 31, n_units = a->work.counts->n_blocks * a->n_kv_heads;
    uint32_t unit = lane == 0 ? mp_take_unit(a->work.counts, n_units, gridDim.x) : 0;
    unit = __shfl_sync(~0u, unit, 0);
    ticket t = { { 0, 0, 0, 0 }, unit % a->n_kv_heads, unit >= n_units };
    if (!t.end) t.block = a->work.blocks[unit / a->n_kv_heads];
    if (FP8) return t;
    mp_barrier_wait(mp_shared(&sh->read[at->slot]), at->phase ^ 1);
    if (lane == 0) {
        sh->tickets[at->slot] = t;
        mp_barrier_arrive(mp_shared(&sh->posted[at->slot]));
    }
    advance(at, TICKETS);
    return t;
}

template <int D, bool FP8>
static __device__ __forceinline__ void produce(const mp_cu_attend *a, shared<D, FP8> *sh, uint32_t shift) {
    cursor at = { 0, 0 }, tickets = { 0, 0 };
    ticket next = take(a, sh, &tickets);
    while (!next.end) {
        ticket now = next;
        next = take(a, sh, &tickets); /* the turners look ahead */
        produce_unit<D, FP8>(a, sh, &now.block, now.head, shift, &at);
    }
    if constexpr (FP8) {
        mp_barrier_wait(mp_shared(&sh->codes_empty[at.slot]), at.phase ^ 1);
        if ((threadIdx.x & 31) == 0) {
            sh->code_notes[at.slot].flags = END;
            mp_barrier_arrive(mp_shared(&sh->codes_full[at.slot]));
        }
        return;
    }
    mp_barrier_wait(mp_shared(&sh->empty[at.slot]), at.phase ^ 1);
    if ((threadIdx.x & 31) == 0) {
        sh->notes[at.slot].flags = END;
        mp_barrier_arrive(mp_shared(&sh->full[at.slot]));
    }
}

/* ---- Turners ----------------------------------------------------------------------------------------------------- */

/* Starts to copy rows of the matrix as they are to where mp_turn_queries would put them. */
template <int D>
static __device__ __forceinline__ void copy_queries(const mp_queries *s, uint8_t *out, uint32_t thread) {
    for (uint32_t i = thread; i < s->n * (D / 8); i += TURNERS) {
        uint32_t m = i / (D / 8), column = i % (D / 8) * 8, row = m / s->group;
        const __nv_bfloat16 *q = s->q + (size_t)row * s->stride + (m - row * s->group) * D + column;
        uint32_t to = mp_shared(out) + m / 8 * shape<D>::HALF + mp_kv_offset(D, m % 8, column);
        mp_copy16(to, q, true);
    }
    mp_copy_commit();
}

/* Where the rows of the block's matrix stand in the step; for the consumers. */
static __device__ __forceinline__ void copy_rows(const mp_queries *q, int2 *to, uint32_t thread) {
    for (uint32_t i = thread; i < q->n; i += TURNERS) {
        const mp_cu_row *r = &q->rows[i / q->group];
        to[i] = make_int2(r->position, (int32_t)r->index + 1);
    }
}

/* Queries of one unit, for base after base, each as soon as the consumers have those before in registers. */
template <int D, bool WHOLE_ROPE>
static __device__ __forceinline__ bool turn_unit(const mp_cu_attend *a, shared<D, false> *sh, const ticket *t,
                                                 uint32_t thread, uint32_t *n_jobs, uint32_t n_unit) {
    const uint32_t group = a->n_heads / a->n_kv_heads;
    const __nv_bfloat16 *first = (const __nv_bfloat16 *)a->q;
    first += ((size_t)t->block.first_row * a->n_heads + t->head * group) * D;
    mp_queries q = { a->work.rows + t->block.first_row, first, a->n_heads * D, group, 0, t->block.n_rows * group, 0 };
    mp_walk w;
    mp_walk_begin(&w, &a->work, &t->block);
    bool begun = false;
    for (; mp_walk_next(&w, &a->work, a->page_size); w.key = w.stop) { /* one stage of each cell */
        if (begun && w.stage.base == q.base) continue;
        q.base = w.stage.base;
        uint32_t n = (*n_jobs)++;
        mp_barrier_wait(mp_shared(&sh->loaded), (n & 1) ^ 1);
        if (!begun) copy_rows(&q, sh->rows[n_unit & 1], thread);
        begun = true;
        if (WHOLE_ROPE) {
            copy_queries<D>(&q, sh->queries, thread);
            mp_copy_wait<0>();
        } else {
            mp_turn_queries<D>(&a->rope, &q, sh->queries, thread, TURNERS);
        }
        mp_barrier_arrive(mp_shared(&sh->turned));
    }
    return begun;
}

template <int D, bool WHOLE_ROPE>
static __device__ __forceinline__ void turn(const mp_cu_attend *a, shared<D, false> *sh, uint32_t thread) {
    uint32_t n_jobs = 0, n_units = 0;
    for (cursor at = { 0, 0 };; advance(&at, TICKETS)) {
        mp_barrier_wait(mp_shared(&sh->posted[at.slot]), at.phase);
        ticket t = sh->tickets[at.slot];
        mp_barrier_arrive(mp_shared(&sh->read[at.slot]));
        if (t.end) return;
        n_units +=
            turn_unit<D, WHOLE_ROPE>(a, sh, &t, thread, &n_jobs, n_units); /* those that see nothing have no stages */
    }
}

/* Of fp8 pages: stage after stage to bf16, and the queries of those with which new ones begin. */
template <int D, bool WHOLE_ROPE>
static __device__ __forceinline__ void widen(const mp_cu_attend *a, shared<D, true> *sh, uint32_t thread) {
    constexpr int HALF = mp_kv8<D>::HALF, GROUP = shape<D>::GROUP;
    const uint32_t group = a->n_heads / a->n_kv_heads;
    uint32_t n_jobs = 0, n_units = 0, n_keys = 0; /* n_keys: of the stage before */
    uint32_t place = thread;                      /* goes round, for not all warps have the same to do each time */
    for (cursor at = { 0, 0 }, from = { 0, 0 };; advance(&at, sh->RING)) {
        mp_barrier_wait(mp_shared(&sh->empty[at.slot]), at.phase ^ 1);
        if (n_keys) { /* else there are no values yet; what comes of those that lie there is written nowhere */
            mp_barrier_wait(mp_shared(&sh->codes_full[from.slot]), from.phase);
            mp_kv8_widen<D, true, TURNERS, HALF, GROUP>(sh->codes[from.slot], sh->ring[at.slot] + shape<D>::HALF,
                                                        nullptr, place, n_keys);
            mp_barrier_arrive(mp_shared(&sh->codes_empty[from.slot]));
            advance(&from, sh->N_CODES);
            place = place < 32 ? place + 64 : place - 32;
        }
        mp_barrier_wait(mp_shared(&sh->codes_full[from.slot]), from.phase);
        const note *now = &sh->code_notes[from.slot];
        if (thread == 0) sh->notes[at.slot] = *now;
        const uint32_t flags = now->flags;
        if (!(flags & END)) {
            const uint32_t head = now->head;
            if (flags & NEW_QUERIES) {
                const __nv_bfloat16 *first = (const __nv_bfloat16 *)a->q;
                first += ((size_t)now->first_row * a->n_heads + head * group) * D;
                mp_queries q = { a->work.rows + now->first_row, first, a->n_heads * D, group, 0, now->n_rows * group,
                                 now->base };
                mp_barrier_wait(mp_shared(&sh->loaded), (n_jobs++ & 1) ^ 1);
                if (flags & NEW_UNIT) copy_rows(&q, sh->rows[n_units++ & 1], thread);
                if (WHOLE_ROPE) {
                    copy_queries<D>(&q, sh->queries, thread);
                } else {
                    mp_turn_queries<D>(&a->rope, &q, sh->queries, thread, TURNERS);
                }
            }
            n_keys = sh->n_keys[from.slot];
            mp_kv8_widen<D, false, TURNERS, HALF, GROUP>(sh->codes[from.slot], sh->ring[at.slot],
                                                         a->key_bias ? a->key_bias + head * D : nullptr, place, n_keys);
            mp_barrier_arrive(mp_shared(&sh->codes_empty[from.slot]));
            advance(&from, sh->N_CODES);
            place = place < 32 ? place + 64 : place - 32;
            if (flags & NEW_QUERIES) {
                if (WHOLE_ROPE) mp_copy_wait<0>();
                mp_barrier_arrive(mp_shared(&sh->turned));
            }
        }
        mp_fence_async();
        mp_barrier_arrive(mp_shared(&sh->full[at.slot]));
        if (flags & END) return;
    }
}

/* ---- Consumers --------------------------------------------------------------------------------------------------- */

/* The state of a cell: lane l of a warp has rows l / 4 and l / 4 + 8, columns l % 4 * 2 + {0, 1} of every 8. */
typedef struct state {
    float top[2], m[2];
} state;

template <int D> static __device__ __forceinline__ void load_queries(uint32_t q[D / 16][4], const uint8_t *queries) {
    const uint32_t lane = threadIdx.x & 31, row = lane & 7, upper = lane >> 4;
    uint32_t from = mp_shared(queries) + (threadIdx.x / 32 * 2 + (lane >> 3 & 1)) * shape<D>::HALF + row * 128;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[k][0]), "=r"(q[k][1]), "=r"(q[k][2]), "=r"(q[k][3])
                     : "r"(from + k / 4 * 1024 + ((k % 4 * 2 + upper) ^ row) * 16)
                     : "memory");
    }
}

static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

/* Queries in registers, turned; delta: of the lane's two rows. */
template <int D>
static __device__ __forceinline__ void turn_registers(uint32_t q[D / 16][4], const mp_cu_rope *rope,
                                                      const uint64_t *turns, const int32_t delta[2]) {
    const uint32_t lane = threadIdx.x & 3;
    if (rope->halves) {
#pragma unroll
        for (int k = 0; k < D / 32; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) { /* row i % 2, the columns of k, or 8 further on */
                const uint64_t *t = turns + 16 * k + 2 * lane + i / 2 * 8;
                float2 x = unpack(q[k][i]), y = unpack(q[k + D / 32][i]);
                float2 a = mp_turned(x.x, y.x, mp_turn(t[0], delta[i & 1], rope->magnitude));
                float2 b = mp_turned(x.y, y.y, mp_turn(t[1], delta[i & 1], rope->magnitude));
                q[k][i] = mp_pack(a.x, b.x);
                q[k + D / 32][i] = mp_pack(a.y, b.y);
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack(q[k][i]);
                x = mp_turned(x.x, x.y, mp_turn(turns[8 * k + lane + i / 2 * 4], delta[i & 1], rope->magnitude));
                q[k][i] = mp_pack(x.x, x.y);
            }
        }
    }
}

/* Hides what a row does not see. */
static __device__ __forceinline__ void hide(float s[32], uint64_t seen, const int32_t limit[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint64_t bits = mp_stage_row(seen, limit[h]) >> (threadIdx.x & 3) * 2;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!(bits >> (8 * n + i) & 1)) s[4 * n + 2 * h + i] = -CUDART_INF_F;
            }
        }
    }
}

static __device__ __forceinline__ state fresh() {
    state t = { { -CUDART_INF_F, -CUDART_INF_F }, { 0.0f, 0.0f } };
    return t;
}

static __device__ __forceinline__ float max4(float a, float b, float c, float d) {
    return fmaxf(fmaxf(a, b), fmaxf(c, d));
}

/* Scores to weights, in place; f: what the state of before is to be scaled by. */
static __device__ __forceinline__ void weigh(float s[32], state *t, float c, float f[2]) {
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float *x = s + 2 * h;
        float a = max4(x[0], x[1], x[4], x[5]), b = max4(x[8], x[9], x[12], x[13]);
        float d = max4(x[16], x[17], x[20], x[21]), e = max4(x[24], x[25], x[28], x[29]);
        top[h] = fmaxf(t->top[h], max4(a, b, d, e));
    }
#pragma unroll
    for (int i = 1; i <= 2; i *= 2) {
        float other[2] = { __shfl_xor_sync(~0u, top[0], i), __shfl_xor_sync(~0u, top[1], i) };
        top[0] = fmaxf(top[0], other[0]);
        top[1] = fmaxf(top[1], other[1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float m = mp_row_max(top[h], c);
        f[h] = mp_rescale(t->top[h], t->m[h], m);
        t->top[h] = top[h];
        t->m[h] = m;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s[4 * n + 2 * h] = mp_weight(s[4 * n + 2 * h], c, m);
            s[4 * n + 2 * h + 1] = mp_weight(s[4 * n + 2 * h + 1], c, m);
        }
    }
}

/* Weights as an operand, and their sums. When the values of the stage before have been added: p has their weights till
 * then. */
static __device__ __forceinline__ void take_weights(const float s[32], uint32_t p[4][4], float l[4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i / 4][i % 4] = mp_pack(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int k = 0; k < 4; k++) mp_mma(l, p[k], MP_BF16_ONES, MP_BF16_ONES);
}

template <int D> static __device__ __forceinline__ void rescale(float o[D / 2], const float f[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = __fmul_rn(o[i], f[i / 2 % 2]);
}

/* The unit whose rows are in the running state. */
typedef struct unit {
    uint32_t first_row, n_rows, head;
    bool begun; /* a cell has been folded */
    mp_running run[2];
} unit;

/* The cell's state, rounded as a stored one is, into the running state; behind a unit's last cell, out. */
template <int D, bool FP8>
static __device__ __forceinline__ void fold(const mp_cu_attend *a, shared<D, FP8> *sh, unit *u, const float m[2],
                                            const float sums[4], float o[D / 2], bool last) {
    float4 *run = &sh->o[threadIdx.x / 128][0][threadIdx.x % 128];
    float keep[2], add[2], inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = sums[2 * h];
        keep[h] = 1.0f;
        add[h] = 0.0f;
        inverse[h] = mp_inverse(l);
        if (mp_saw(l)) mp_fold(&u->run[h], m[h], l, &keep[h], &add[h]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        float4 r = run[n * 128]; /* anything when nothing was folded yet */
        float2 x = __half22float2(mp_partial(o[4 * n], o[4 * n + 1], inverse[0]));
        float2 y = __half22float2(mp_partial(o[4 * n + 2], o[4 * n + 3], inverse[1]));
        o[4 * n] = mp_fold_o(u->begun ? r.x : 0.0f, keep[0], x.x, add[0]);
        o[4 * n + 1] = mp_fold_o(u->begun ? r.y : 0.0f, keep[0], x.y, add[0]);
        o[4 * n + 2] = mp_fold_o(u->begun ? r.z : 0.0f, keep[1], y.x, add[1]);
        o[4 * n + 3] = mp_fold_o(u->begun ? r.w : 0.0f, keep[1], y.y, add[1]);
    }
    u->begun = true;
    if (!last) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            run[n * 128] = make_float4(o[4 * n], o[4 * n + 1], o[4 * n + 2], o[4 * n + 3]);
        }
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t group = a->n_heads / a->n_kv_heads;
        uint32_t i = threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4 + 8 * h, row = i / group;
        if (row >= u->n_rows) continue;
        float final = mp_inverse(u->run[h].l);
        mp_bf16 *out = a->out + ((size_t)(u->first_row + row) * a->n_heads + u->head * group + i % group) * D +
                       (threadIdx.x & 3) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(uint32_t *)(out + 8 * n) =
                mp_pack(__fmul_rn(o[4 * n + 2 * h], final), __fmul_rn(o[4 * n + 2 * h + 1], final));
        }
    }
}

static __device__ __forceinline__ void begin_unit(unit *u, const note *n) {
    u->first_row = n->first_row;
    u->n_rows = n->n_rows;
    u->head = n->head;
    u->begun = false;
    u->run[0] = u->run[1] = { 0.0f, 0.0f };
}

/* Waits for a stage, and for its queries if they are new. */
template <int D, bool WHOLE_ROPE, bool FP8>
static __device__ __forceinline__ uint32_t meet(const mp_cu_attend *a, shared<D, FP8> *sh, const cursor *at,
                                                uint32_t q[D / 16][4], uint32_t *n_jobs, uint32_t *n_units) {
    mp_barrier_wait(mp_shared(&sh->full[at->slot]), at->phase);
    const note *now = &sh->notes[at->slot];
    uint32_t flags = now->flags;
    if (flags & NEW_UNIT) ++*n_units;
    if (__builtin_expect(flags & NEW_QUERIES, 0)) {
        mp_barrier_wait(mp_shared(&sh->turned), (*n_jobs)++ & 1);
        load_queries<D>(q, sh->queries);
        mp_barrier_arrive(mp_shared(&sh->loaded));
        if (WHOLE_ROPE) {
            const int2 *rows = &sh->rows[*n_units & 1][threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4];
            int32_t delta[2] = { rows[0].x - now->base, rows[8].x - now->base };
            turn_registers<D>(q, &a->rope, sh->turns, delta);
        }
    }
    return flags;
}

template <int D, bool WHOLE_ROPE, bool FP8>
static __device__ __forceinline__ void consume(const mp_cu_attend *a, shared<D, FP8> *sh) {
    const uint32_t lane = threadIdx.x & 31, m = threadIdx.x / 32 * 16 + lane / 4;
    const float c = a->scale * MP_LOG2E;
    uint32_t q[D / 16][4], p[4][4], n_jobs = 0, n_units = 1; /* 2 at the first unit, whose rows are in rows[0] */
    float s[32], o[D / 2], f[2];
    state t = fresh();
    float old[2]; /* maxima of the cell before */
    float l[4] = { 0.0f, 0.0f, 0.0f,
                   0.0f }; /* sums of weights: [0] and [2] of the lane's rows, the others are the same */
    unit u = { 0, 0, 0, false, { { 0.0f, 0.0f }, { 0.0f, 0.0f } } };
    cursor at = { 0, 0 };
    uint32_t before = 0; /* the stage whose weights are in p; at first none, without weight */
    bool begun = false, add = false;
    uint32_t flags = meet<D, WHOLE_ROPE, FP8>(a, sh, &at, q, &n_jobs, &n_units);
#pragma unroll
    for (int i = 0; i < 16; i++) p[i / 4][i % 4] = 0;
    while (!(flags & END)) {
        issue_scores<D>(s, q, sh->ring[at.slot]);
        issue_values<D>(o, p, sh->ring[FP8 ? at.slot : before], add);
        mp_products_wait<1>();
        if (__builtin_expect(!(flags & WHOLE), 0)) {
            const note *now = &sh->notes[at.slot];
            int32_t limit[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int2 row = sh->rows[n_units & 1][m + 8 * h];
                limit[h] = (flags & SHARED ? row.x : row.y) - now->edge;
            }
            hide(s, now->seen, limit);
        }
        if (flags & NEW_CELL) {
            old[0] = t.m[0];
            old[1] = t.m[1];
            t = fresh();
        }
        weigh(s, &t, c, f);
        uint32_t done = before;
        before = at.slot;
        advance(&at, sh->RING);
        /* Here, because the compiler would move the wait before the weights' arithmetic if nothing stood between. */
        uint32_t next_flags = meet<D, WHOLE_ROPE, FP8>(a, sh, &at, q, &n_jobs, &n_units);
        mp_products_wait<0>();
        if (!FP8 && begun) mp_barrier_arrive(mp_shared(&sh->empty[done]));
        begun = true;
        if (__builtin_expect(flags & NEW_CELL, 0)) {
            fold<D, FP8>(a, sh, &u, old, l, o, flags & NEW_UNIT);
            if (flags & NEW_UNIT) begin_unit(&u, &sh->notes[before]);
            l[0] = l[1] = l[2] = l[3] = 0.0f;
            take_weights(s, p, l);
        } else { /* in one block: the sums wait for each other, and their gaps are filled */
#pragma unroll
            for (int i = 0; i < 4; i++) l[i] = __fmul_rn(l[i], f[i / 2]);
            take_weights(s, p, l);
            rescale<D>(o, f);
        }
        if (FP8) mp_barrier_arrive(mp_shared(&sh->empty[before])); /* and its note has been read */
        add = !(flags & NEW_CELL);
        flags = next_flags;
    }
    if (!begun) return;
    issue_values<D>(o, p, sh->ring[FP8 ? at.slot : before], add);
    mp_products_wait<0>();
    fold<D, FP8>(a, sh, &u, t.m, l, o, true);
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

/* WHOLE_ROPE: all dimensions are turned, as nearly all models do; the consumers do it, in registers. Else the turners,
 * who need the registers. Launched with 168 for each of 3 warpgroups. */
template <int D, bool WHOLE_ROPE, bool FP8>
static __global__ void __launch_bounds__(THREADS, 1) prefill(const __grid_constant__ mp_cu_attend a, uint32_t shift) {
    constexpr int FEW = WHOLE_ROPE ? 72 : 88, MANY = WHOLE_ROPE ? 216 : 208;
    extern __shared__ __align__(1024) uint8_t smem[];
    shared<D, FP8> *sh = (shared<D, FP8> *)smem;
    for (uint32_t i = threadIdx.x; i < min(a.rope.n_pairs, D / 2); i += THREADS) sh->turns[i] = a.rope.turns[i];
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < sh->RING; i++) {
            mp_barrier_init(mp_shared(&sh->full[i]), FP8 ? TURNERS : 1);
            mp_barrier_init(mp_shared(&sh->empty[i]), CONSUMERS);
        }
        for (uint32_t i = 0; i < TICKETS; i++) {
            mp_barrier_init(mp_shared(&sh->posted[i]), 1);
            mp_barrier_init(mp_shared(&sh->read[i]), TURNERS);
        }
        if constexpr (FP8) {
            for (uint32_t i = 0; i < sh->N_CODES; i++) {
                mp_barrier_init(mp_shared(&sh->codes_full[i]), 1);
                mp_barrier_init(mp_shared(&sh->codes_empty[i]), TURNERS);
            }
        }
        mp_barrier_init(mp_shared(&sh->turned), TURNERS);
        mp_barrier_init(mp_shared(&sh->loaded), CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    mp_fence_async();
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
        if (threadIdx.x < CONSUMERS + 32) {
            produce<D, FP8>(&a, sh, shift);
        } else if constexpr (FP8) {
            widen<D, WHOLE_ROPE>(&a, sh, threadIdx.x - CONSUMERS - 32);
        } else {
            turn<D, WHOLE_ROPE>(&a, sh, threadIdx.x - CONSUMERS - 32);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
        consume<D, WHOLE_ROPE, FP8>(&a, sh);
    }
}

template <int D, bool WHOLE_ROPE, bool FP8> static cudaError_t launch_kind(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t shift = 6; /* pieces: the greatest power of two that divides a page and a stage */
    while (a->page_size & ((1u << shift) - 1)) shift--;
    if (shift < 4) return cudaErrorNotSupported; /* a cell would have more than 64 */
    static_assert(sizeof(shared<D, FP8>) <= 232448, "all the shared memory a block may have");
    int bytes = (int)sizeof(shared<D, FP8>);
    cudaError_t error =
        cudaFuncSetAttribute(prefill<D, WHOLE_ROPE, FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    uint32_t units = a->max_blocks * a->n_kv_heads;
    if (units > a->n_sm) units = a->n_sm;
    prefill<D, WHOLE_ROPE, FP8><<<units, THREADS, bytes, stream>>>(*a, shift);
    return cudaGetLastError();
}

template <int D> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    if (2 * a->rope.n_pairs == D) {
        return a->fp8 ? launch_kind<D, true, true>(a, stream) : launch_kind<D, true, false>(a, stream);
    }
    return a->fp8 ? launch_kind<D, false, true>(a, stream) : launch_kind<D, false, false>(a, stream);
}

cudaError_t mp_cu_attend_prefill_sm90(const mp_cu_attend *a, cudaStream_t stream) {
    switch (a->head_dim) {
    case 64: return launch<64>(a, stream);
    case 128: return launch<128>(a, stream);
    }
    return cudaErrorNotSupported;
}
