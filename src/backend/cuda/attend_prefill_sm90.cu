/* Prefill attention for Hopper, head_dim 64 and 128: wgmma, keys and values by bulk copies. Gives the same bits as the
 * general kernel (attend_prefill.cu).
 *
 *   warps 0..7    two warpgroups of consumers, 64 rows of the block's matrix each: queries and the state of the cell in
 *                 registers, the running state in shared memory
 *   warp 8        the producer: takes units, walks their stages, fills the ring, notes with each stage what it is
 *   warps 9..11   turn queries: those of the next base while the consumers are at the one before
 *
 * A consumer issues the scores of a stage and the values of the one before together: the tensor cores have work while
 * it takes exponentials. What ends a cell is done when the first stage of the next cell is met, of the same unit or of
 * another: there is no gap between units. */
#include "backend/cuda/attend_block.cuh"

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
} note;

typedef struct job { /* of the turners */
    mp_cu_block block;
    uint32_t head;
    int32_t base;
    bool end;
} job;

template <int D> struct shape {
    static constexpr int HALF = 16 * D; /* bytes of K, or of V, in a group of 8 keys */
    static constexpr int GROUP = 2 * HALF;
    static constexpr int STAGE = 8 * GROUP;
    static constexpr int RING = D == 128 ? 4 : 8;
};

template <int D> struct shared {
    uint8_t ring[shape<D>::RING][shape<D>::STAGE];
    uint8_t queries[MP_BLOCK_ROWS * 2 * D];
    float4 o[2][D / 8][128]; /* the running state: [warpgroup][8 columns][thread] */
    note notes[shape<D>::RING];
    job jobs[shape<D>::RING];    /* each belongs to a stage of the ring, so there are never more */
    int2 rows[2][MP_BLOCK_ROWS]; /* position and index + 1 of the rows of the matrix; of this job and the next */
    uint64_t full[shape<D>::RING], empty[shape<D>::RING], posted[shape<D>::RING];
    uint64_t turned, loaded; /* queries are in shared memory; are in registers */
};

/* ---- Barriers ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void barrier_init(uint64_t *b, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(b)), "r"(count) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *b) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(b)) : "memory");
}

static __device__ __forceinline__ void barrier_expect(uint64_t *b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t phase) {
    uint32_t done = 0;
#ifdef MP_CU_GUARD
    for (uint32_t i = 0; !done; i++) {
        if (i > 1u << 24) __trap();
#else
    while (!done) {
#endif
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(address(b)), "r"(phase)
                     : "memory");
    }
}

static __device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *b) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
        "l"(from), "r"(bytes), "r"(address(b))
        : "memory");
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void product_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void product_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* An operand in shared memory, panels of 128 bytes in the 128-byte swizzle. leap: between panels; step: between groups
 * of 8 keys. */
static __device__ __forceinline__ uint64_t operand(uint32_t at, uint32_t leap, uint32_t step) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(leap >> 4) << 16 | (uint64_t)(step >> 4) << 32 | 1ull << 62;
}

#define C8(c, i)                                                                                                       \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])

/* c [64, 64] (+)= a [64, 16] b [64, 16]^T: scores. */
static __device__ __forceinline__ void product_keys(float c[32], const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/* c [64, 64] (+)= a [64, 16] b [16, 64]: values of head_dim 64. */
static __device__ __forceinline__ void product_values(float (&c)[32], const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
                 : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/* c [64, 128] (+)= a [64, 16] b [16, 128]: values of head_dim 128. */
static __device__ __forceinline__ void product_values(float (&c)[64], const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
                 : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24), C8(c, 32), C8(c, 40), C8(c, 48), C8(c, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

template <int D>
static __device__ __forceinline__ void issue_scores(float s[32], const uint32_t q[D / 16][4], const uint8_t *stage) {
    uint64_t keys = operand(address(stage), 0, shape<D>::GROUP);
    product_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++) product_keys(s, q[k], keys + (k / 4 * 1024 + k % 4 * 32) / 16, k > 0);
    product_commit();
}

template <int D>
static __device__ __forceinline__ void issue_values(float (&o)[D / 2], const uint32_t p[4][4], const uint8_t *stage,
                                                    int add) {
    uint64_t values = operand(address(stage) + shape<D>::HALF, 1024, shape<D>::GROUP);
    product_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) product_values(o, p[k], values + k * (2 * shape<D>::GROUP / 16), k > 0 ? 1 : add);
    product_commit();
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

template <int D> static __device__ __forceinline__ void post(shared<D> *sh, cursor *at, const job *j) {
    sh->jobs[at->slot] = *j;
    barrier_arrive(&sh->posted[at->slot]);
    advance(at, shape<D>::RING);
}

/* Rows that see nothing at all: zeros. */
static __device__ void write_nothing(const mp_cu_attend *a, const mp_cu_block *b, uint32_t head, uint32_t lane) {
    uint32_t width = a->n_heads / a->n_kv_heads * a->head_dim;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        mp_bf16 *out = a->out + (size_t)(b->first_row + r) * a->n_heads * a->head_dim + head * width;
        for (uint32_t i = lane; i < width; i += 32) out[i] = 0;
    }
}

/* One unit's stages into the ring. piece: tokens that lie together in a page and in a stage. */
template <int D>
static __device__ void produce_unit(const mp_cu_attend *a, shared<D> *sh, const mp_cu_block *b, uint32_t head,
                                    uint32_t piece, cursor *at, cursor *jobs) {
    const uint32_t lane = threadIdx.x & 31;
    const uint8_t *slab = a->slab + a->layer_offset + head * a->block_bytes;
    mp_walk w;
    int32_t base = 0;
    bool first = true;
    mp_walk_begin(&w, &a->work, b);
    for (; mp_walk_next(&w, &a->work, a->page_size); first = false) {
        int32_t key = w.key + (int32_t)(lane * piece);
        bool mine = lane * piece < MP_CU_STAGE_TOKENS && key < w.n_tokens &&
                    (w.stage.seen & mp_bits((int32_t)(lane * piece), (int32_t)(lane * piece + piece)));
        const uint8_t *from = NULL;
        if (mine) {
            uint32_t page = (uint32_t)key / a->page_size, in = (uint32_t)key - page * a->page_size;
            from = slab + (size_t)__ldg(w.pages + page) * a->page_bytes + in / 8 * shape<D>::GROUP;
        }
        uint32_t n_pieces = __popc(__ballot_sync(~0u, mine)), bytes = piece / 8 * shape<D>::GROUP;
        bool turn = first || (w.stage.new_cell && w.stage.base != base);
        base = w.stage.base;
        barrier_wait(&sh->empty[at->slot], at->phase ^ 1);
        if (lane == 0) {
            uint32_t flags = (w.stage.shared ? SHARED : 0) | (w.stage.whole ? WHOLE : 0) |
                             (w.stage.new_cell ? NEW_CELL : 0) | (turn ? NEW_QUERIES : 0) | (first ? NEW_UNIT : 0);
            note n = { w.stage.seen, w.stage.edge, flags, b->first_row, b->n_rows, head };
            sh->notes[at->slot] = n;
            if (turn) {
                job j = { *b, head, base, false };
                post(sh, jobs, &j);
            }
            barrier_expect(&sh->full[at->slot], n_pieces * bytes);
        }
        __syncwarp();
        if (mine) copy_bulk(sh->ring[at->slot] + lane * bytes, from, bytes, &sh->full[at->slot]);
        advance(at, shape<D>::RING);
    }
    if (first) write_nothing(a, b, head, lane);
}

template <int D> static __device__ __forceinline__ void produce(const mp_cu_attend *a, shared<D> *sh, uint32_t piece) {
    const uint32_t lane = threadIdx.x & 31, n_units = a->work.counts->n_blocks * a->n_kv_heads;
    cursor at = { 0, 0 }, jobs = { 0, 0 };
    for (;;) {
        uint32_t unit = lane == 0 ? mp_take_unit(a->work.counts, n_units, gridDim.x) : 0;
        unit = __shfl_sync(~0u, unit, 0);
        if (unit >= n_units) break;
        mp_cu_block b = a->work.blocks[unit / a->n_kv_heads];
        produce_unit<D>(a, sh, &b, unit % a->n_kv_heads, piece, &at, &jobs);
    }
    barrier_wait(&sh->empty[at.slot], at.phase ^ 1);
    if (lane == 0) {
        sh->notes[at.slot].flags = END;
        job j = { { 0, 0, 0, 0 }, 0, 0, true };
        post(sh, &jobs, &j);
        barrier_arrive(&sh->full[at.slot]);
    }
}

/* ---- Turners ----------------------------------------------------------------------------------------------------- */

template <int D> static __device__ __forceinline__ void turn(const mp_cu_attend *a, shared<D> *sh, uint32_t thread) {
    const uint32_t group = a->n_heads / a->n_kv_heads;
    cursor at = { 0, 0 };
    for (uint32_t n = 0;; n++, advance(&at, shape<D>::RING)) {
        barrier_wait(&sh->posted[at.slot], at.phase);
        job j = sh->jobs[at.slot];
        if (j.end) return;
        mp_queries q = { a->work.rows + j.block.first_row,
                         (const __nv_bfloat16 *)a->q + ((size_t)j.block.first_row * a->n_heads + j.head * group) * D,
                         a->n_heads * D,
                         group,
                         0,
                         j.block.n_rows * group,
                         j.base };
        barrier_wait(&sh->loaded, (n & 1) ^ 1);
        for (uint32_t i = thread; i < q.n; i += TURNERS) {
            const mp_cu_row *r = &q.rows[i / group];
            sh->rows[n & 1][i] = make_int2(r->position, (int32_t)r->index + 1);
        }
        mp_turn_queries<D>(&a->rope, &q, sh->queries, thread, TURNERS);
        barrier_arrive(&sh->turned);
    }
}

/* ---- Consumers --------------------------------------------------------------------------------------------------- */

/* The state of a cell: lane l of a warp has rows l / 4 and l / 4 + 8, columns l % 4 * 2 + {0, 1} of every 8. */
typedef struct state {
    float top[2], m[2];
    float l[4]; /* [0] and [2]; the others are the same sums */
} state;

static __device__ __forceinline__ uint32_t pack(float x, float y) {
    __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *(uint32_t *)&v;
}

template <int D> static __device__ __forceinline__ void load_queries(uint32_t q[D / 16][4], const uint8_t *queries) {
    const uint32_t lane = threadIdx.x & 31, row = lane & 7, upper = lane >> 4;
    uint32_t from = address(queries) + (threadIdx.x / 32 * 2 + (lane >> 3 & 1)) * shape<D>::HALF + row * 128;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[k][0]), "=r"(q[k][1]), "=r"(q[k][2]), "=r"(q[k][3])
                     : "r"(from + k / 4 * 1024 + ((k % 4 * 2 + upper) ^ row) * 16)
                     : "memory");
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

/* Scores to weights, in place; f: what the state of before is to be scaled by. */
static __device__ __forceinline__ void weigh(float s[32], state *t, float c, float f[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = t->top[h];
#pragma unroll
        for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float m = mp_row_max(top, c);
        f[h] = mp_rescale(t->top[h], t->m[h], m);
        t->top[h] = top;
        t->m[h] = m;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s[4 * n + 2 * h] = mp_weight(s[4 * n + 2 * h], c, m);
            s[4 * n + 2 * h + 1] = mp_weight(s[4 * n + 2 * h + 1], c, m);
        }
        t->l[2 * h] = __fmul_rn(t->l[2 * h], f[h]);
        t->l[2 * h + 1] = __fmul_rn(t->l[2 * h + 1], f[h]);
    }
}

/* Weights as an operand, and their sums. */
static __device__ __forceinline__ void add_weights(const float s[32], uint32_t p[4][4], state *t) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, "
            "{%0, %1, %2, %3};"
            : "+f"(t->l[0]), "+f"(t->l[1]), "+f"(t->l[2]), "+f"(t->l[3])
            : "r"(p[k][0]), "r"(p[k][1]), "r"(p[k][2]), "r"(p[k][3]), "r"(0x3f803f80u));
    }
}

/* mp_partial of two columns. */
static __device__ __forceinline__ float2 partial(float x, float y, float inverse) {
    __half2 v = __floats2half2_rn(__fmul_rn(x, inverse), __fmul_rn(y, inverse)), most = __float2half2_rn(65504.0f);
    return __half22float2(__hmin2(__hmax2(v, __hneg2(most)), most));
}

/* The unit whose rows are in the running state. */
typedef struct unit {
    uint32_t first_row, n_rows, head;
    bool begun; /* a cell has been folded */
    mp_running run[2];
} unit;

/* The cell's state, rounded as a stored one is, into the running state; behind a unit's last cell, out. */
template <int D>
static __device__ __forceinline__ void fold(const mp_cu_attend *a, shared<D> *sh, unit *u, const state *t,
                                            const float o[D / 2], bool last) {
    const uint32_t lane = threadIdx.x & 31, group = a->n_heads / a->n_kv_heads;
    float4 *run = &sh->o[threadIdx.x / 128][0][threadIdx.x % 128];
    float keep[2], add[2], inverse[2], final[2];
    mp_bf16 *out[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = t->l[2 * h];
        keep[h] = 1.0f;
        add[h] = inverse[h] = 0.0f;
        if (l > 0.0f) {
            mp_fold(&u->run[h], t->m[h], l, &keep[h], &add[h]);
            inverse[h] = mp_inverse(l);
        }
        final[h] = u->run[h].l > 0.0f ? mp_inverse(u->run[h].l) : 0.0f;
        uint32_t i = threadIdx.x / 32 * 16 + lane / 4 + 8 * h, row = i / group, head = u->head * group + i % group;
        out[h] =
            row < u->n_rows ? a->out + ((size_t)(u->first_row + row) * a->n_heads + head) * D + (lane & 3) * 2 : NULL;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        float4 r = u->begun ? run[n * 128] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float2 x = partial(o[4 * n], o[4 * n + 1], inverse[0]), y = partial(o[4 * n + 2], o[4 * n + 3], inverse[1]);
        r.x = mp_fold_o(r.x, keep[0], x.x, add[0]);
        r.y = mp_fold_o(r.y, keep[0], x.y, add[0]);
        r.z = mp_fold_o(r.z, keep[1], y.x, add[1]);
        r.w = mp_fold_o(r.w, keep[1], y.y, add[1]);
        if (!last) {
            run[n * 128] = r;
        } else {
            if (out[0]) *(uint32_t *)(out[0] + 8 * n) = pack(__fmul_rn(r.x, final[0]), __fmul_rn(r.y, final[0]));
            if (out[1]) *(uint32_t *)(out[1] + 8 * n) = pack(__fmul_rn(r.z, final[1]), __fmul_rn(r.w, final[1]));
        }
    }
    u->begun = true;
}

static __device__ __forceinline__ void begin_unit(unit *u, const note *n) {
    u->first_row = n->first_row;
    u->n_rows = n->n_rows;
    u->head = n->head;
    u->begun = false;
    u->run[0] = u->run[1] = { 0.0f, 0.0f };
}

/* Waits for a stage, and for its queries if they are new. */
template <int D>
static __device__ __forceinline__ uint32_t meet(shared<D> *sh, const cursor *at, uint32_t q[D / 16][4],
                                                uint32_t *n_jobs) {
    barrier_wait(&sh->full[at->slot], at->phase);
    uint32_t flags = sh->notes[at->slot].flags;
    if (flags & NEW_QUERIES) {
        barrier_wait(&sh->turned, *n_jobs & 1);
        load_queries<D>(q, sh->queries);
        if ((threadIdx.x & 31) == 0) barrier_arrive(&sh->loaded);
        ++*n_jobs;
    }
    return flags;
}

template <int D> static __device__ __forceinline__ void consume(const mp_cu_attend *a, shared<D> *sh) {
    const uint32_t lane = threadIdx.x & 31, m = threadIdx.x / 32 * 16 + lane / 4;
    const float c = a->scale * MP_LOG2E;
    uint32_t q[D / 16][4], p[4][4], n_jobs = 0;
    float s[32], o[D / 2];
    state t = { { -CUDART_INF_F, -CUDART_INF_F }, { 0.0f, 0.0f }, { 0.0f, 0.0f, 0.0f, 0.0f } };
    unit u = { 0, 0, 0, false, { { 0.0f, 0.0f }, { 0.0f, 0.0f } } };
    cursor at = { 0, 0 };
    uint32_t before = 0;
    bool begun = false, add = false;
#pragma unroll
    for (int k = 0; k < 16; k++)
        p[k / 4][k % 4] = 0; /* of the stage before the first: no weights, numbers for values */
    for (;;) {
        uint32_t flags = meet<D>(sh, &at, q, &n_jobs);
        if (flags & END) break;
        issue_scores<D>(s, q, sh->ring[at.slot]);
        issue_values<D>(o, p, sh->ring[before], add);
        const note *now = &sh->notes[at.slot];
        state old = t;
        float f[2];
        product_wait<1>();
        if (flags & NEW_CELL) t = { { -CUDART_INF_F, -CUDART_INF_F }, { 0.0f, 0.0f }, { 0.0f, 0.0f, 0.0f, 0.0f } };
        if (!(flags & WHOLE)) {
            int32_t limit[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int2 row = sh->rows[(n_jobs - 1) & 1][m + 8 * h];
                limit[h] = (flags & SHARED ? row.x : row.y) - now->edge;
            }
            hide(s, now->seen, limit);
        }
        weigh(s, &t, c, f);
        product_wait<0>();
        if (begun && lane == 0) barrier_arrive(&sh->empty[before]);
        if (flags & NEW_CELL) {
            fold<D>(a, sh, &u, &old, o, flags & NEW_UNIT);
            if (flags & NEW_UNIT) begin_unit(&u, now);
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[4 * n] = __fmul_rn(o[4 * n], f[0]);
                o[4 * n + 1] = __fmul_rn(o[4 * n + 1], f[0]);
                o[4 * n + 2] = __fmul_rn(o[4 * n + 2], f[1]);
                o[4 * n + 3] = __fmul_rn(o[4 * n + 3], f[1]);
            }
        }
        add_weights(s, p, &t);
        add = !(flags & NEW_CELL);
        begun = true;
        before = at.slot;
        advance(&at, shape<D>::RING);
    }
    product_fence();
    issue_values<D>(o, p, sh->ring[before], add);
    product_wait<0>();
    fold<D>(a, sh, &u, &t, o, true);
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

template <int D>
static __global__ void __launch_bounds__(THREADS, 1) prefill(const __grid_constant__ mp_cu_attend a, uint32_t piece) {
    extern __shared__ __align__(1024) uint8_t smem[];
    shared<D> *sh = (shared<D> *)smem;
    /* What a stage leaves of the one before it gets weight 0, and must be a number for that. */
    for (uint32_t i = threadIdx.x; i < sizeof sh->ring / 16; i += THREADS)
        ((uint4 *)sh->ring)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < shape<D>::RING; i++) {
            barrier_init(&sh->full[i], 1);
            barrier_init(&sh->empty[i], CONSUMERS / 32);
            barrier_init(&sh->posted[i], 1);
        }
        barrier_init(&sh->turned, TURNERS);
        barrier_init(&sh->loaded, CONSUMERS / 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (threadIdx.x < CONSUMERS + 32) {
            produce<D>(&a, sh, piece);
        } else {
            turn<D>(&a, sh, threadIdx.x - CONSUMERS - 32);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        consume<D>(&a, sh);
    }
}

template <int D> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t piece = MP_CU_STAGE_TOKENS; /* the greatest common divisor with the page size */
    while (a->page_size % piece) piece /= 2;
    int bytes = (int)sizeof(shared<D>);
    cudaError_t error = cudaFuncSetAttribute(prefill<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    uint32_t units = a->max_blocks * a->n_kv_heads;
    if (units > a->n_sm) units = a->n_sm;
    prefill<D><<<units, THREADS, bytes, stream>>>(*a, piece);
    return cudaGetLastError();
}

cudaError_t mp_cu_attend_prefill_sm90(const mp_cu_attend *a, cudaStream_t stream) {
    switch (a->head_dim) {
    case 64: return launch<64>(a, stream);
    case 128: return launch<128>(a, stream);
    }
    return cudaErrorNotSupported;
}
