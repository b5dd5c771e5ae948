/* Prefill attention for every architecture: mma.sync, keys and values by cp.async.
 *
 * A thread block takes unit after unit (block of rows, kv head) and walks all its cells in order. Each of 8 warps has
 * 16 rows of the block's matrix; above head_dim 128 two warps share 16 rows, each with half of the output's columns,
 * and the unit takes two passes of 64 rows. The state of the cell and the running state are in registers.
 *
 * Of fp8 pages codes are copied, K and V of a stage apart; all warps bring K, then V, to bf16 in one place, and the
 * codes of the next stage come while the tensor cores are busy with this one. */
#include "backend/cuda/attend_block.cuh"
#include "backend/cuda/kv8.cuh"
#include "backend/cuda/mma.cuh"

#define THREADS 256

template <int D, bool FP8> struct shape {
    static constexpr int SPLIT = D > 128 ? 2 : 1; /* warps over the columns of the output */
    static constexpr int ROWS = MP_BLOCK_ROWS / SPLIT;
    static constexpr int COLUMNS = D / SPLIT;           /* of the output, of a warp */
    static constexpr int HALF = 16 * D;                 /* bytes of K, or of V, in a group of 8 keys */
    static constexpr int GROUP = FP8 ? HALF : 2 * HALF; /* from one to the next of a stage: of fp8, K or V is there */
    static constexpr int V = GROUP - HALF;
    static constexpr int STAGE = 8 * GROUP;
    static constexpr int CODES = 8 * mp_kv8<D>::HALF; /* of K or V of a stage, with their marks */
    static constexpr int QUERIES = ROWS / 8 * HALF;
};

/* Where lane `row` of a matrix of 8 x 8 finds its row: columns [column, column + 16) of 8 keys, the second eight if
 * upper. column is a multiple of 16 known to the compiler. */
template <int D> static __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t upper, int column) {
    int start = column & ~63, width = 64;
    if (start + 64 > D) {
        int rest = D - start, in = column - start;
        width = rest >= 32 && in < 32 ? 32 : 16;
        if (width == 16 && rest >= 32) start += 32;
    }
    uint32_t turn = width == 64 ? row & 7 : width == 32 ? row >> 1 & 3 : row >> 2 & 1;
    return (uint32_t)(start * 16) + row * (uint32_t)(width * 2) +
           ((uint32_t)(column - start) * 2 ^ (upper ^ turn) * 16);
}

/* ---- A stage ----------------------------------------------------------------------------------------------------- */

/* The state of a warp's rows: lane l has rows l / 4 and l / 4 + 8, columns l % 4 * 2 + {0, 1} of every 8. */
template <int D, bool FP8> struct state {
    float o[shape<D, FP8>::COLUMNS / 8][4];
    float top[2], m[2];
    float l[4]; /* [0] and [2]; the others are the same sums */
};

/* Keys and values of the walk's stage on their way to shared memory; zeros behind the cell's end. */
template <int D>
static __device__ __forceinline__ void fetch(const mp_cu_attend *a, const mp_walk *w, size_t offset, uint32_t to) {
    constexpr uint32_t half = 16 * D, units = half / 8; /* of 16 bytes in a group */
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < 8 * units; i += THREADS) {
        uint32_t group = i / units, key = (uint32_t)w->key + group * 8;
        bool there = (int32_t)(key + mp_kv_token<D>(i % units % D)) < w->n_tokens;
        uint32_t page = there ? key / a->page_size : 0, in = there ? (key - page * a->page_size) / 8 : 0;
        const uint8_t *from = a->slab + (size_t)__ldg(w->pages + page) * a->page_bytes + offset +
                              (size_t)in * (2 * half) + i % units * 16;
        mp_copy16(to + i * 16, from, there);
    }
    mp_copy_commit();
}

/* The same for the codes of K or V, where there is a stage; a group of copies in any case. */
template <int D, bool V>
static __device__ __forceinline__ void fetch_codes(const mp_cu_attend *a, const mp_walk *w, bool more, size_t offset,
                                                   uint32_t to) {
    constexpr uint32_t units = mp_kv8<D>::HALF / 16;
    for (uint32_t i = threadIdx.x; more && i < 8 * units; i += THREADS) {
        uint32_t group = i / units, key = (uint32_t)w->key + group * 8;
        if ((int32_t)key >= w->n_tokens) break;
        uint32_t page = key / a->page_size, in = (key - page * a->page_size) / 8;
        const uint8_t *from = a->slab + (size_t)__ldg(w->pages + page) * a->page_bytes + offset +
                              (size_t)in * mp_kv8<D>::GROUP + (V ? mp_kv8<D>::V : 0) + i % units * 16;
        mp_copy16(to + i * 16, from, true);
    }
    mp_copy_commit();
}

template <int D, bool FP8>
static __device__ __forceinline__ void scores(float s[8][4], uint32_t q, uint32_t kv, uint32_t lane) {
    uint32_t row = lane & 7, first = lane >> 3 & 1, second = lane >> 4;
#pragma unroll
    for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t x[4];
        mp_load4(x, q + first * shape<D, FP8>::HALF + place<D>(row, second, k));
        uint32_t from = kv + second * shape<D, FP8>::GROUP + place<D>(row, first, k);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t y[4];
            mp_load4(y, from + n * shape<D, FP8>::GROUP);
            mp_mma(s[n], x, y[0], y[1]);
            mp_mma(s[n + 1], x, y[2], y[3]);
        }
    }
}

/* Hides what a row does not see. */
static __device__ __forceinline__ void hide(float s[8][4], uint64_t seen, const int32_t limit[2], uint32_t lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint64_t bits = mp_stage_row(seen, limit[h]) >> (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!(bits >> (8 * n + i) & 1)) s[n][2 * h + i] = -CUDART_INF_F;
            }
        }
    }
}

/* Scores to weights, in place; the state scaled to its new maximum. */
template <int D, bool FP8> static __device__ __forceinline__ void weigh(float s[8][4], state<D, FP8> *t, float c) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = t->top[h];
#pragma unroll
        for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float m = mp_row_max(top, c), f = mp_rescale(t->top[h], t->m[h], m);
        t->top[h] = top;
        t->m[h] = m;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s[n][2 * h] = mp_weight(s[n][2 * h], c, m);
            s[n][2 * h + 1] = mp_weight(s[n][2 * h + 1], c, m);
        }
        t->l[2 * h] = __fmul_rn(t->l[2 * h], f);
        t->l[2 * h + 1] = __fmul_rn(t->l[2 * h + 1], f);
#pragma unroll
        for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n++) {
            t->o[n][2 * h] = __fmul_rn(t->o[n][2 * h], f);
            t->o[n][2 * h + 1] = __fmul_rn(t->o[n][2 * h + 1], f);
        }
    }
}

template <int D, bool FP8>
static __device__ __forceinline__ void collect(state<D, FP8> *t, const float s[8][4], uint32_t kv, uint32_t lane) {
    uint32_t row = lane & 7, first = lane >> 3 & 1, second = lane >> 4;
    uint32_t split = shape<D, FP8>::SPLIT == 2 ? threadIdx.x / 32 % 2 : 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t p[4] = { mp_pack(s[2 * k][0], s[2 * k][1]), mp_pack(s[2 * k][2], s[2 * k][3]),
                          mp_pack(s[2 * k + 1][0], s[2 * k + 1][1]), mp_pack(s[2 * k + 1][2], s[2 * k + 1][3]) };
        mp_mma(t->l, p, MP_BF16_ONES, MP_BF16_ONES);
        uint32_t from = kv + (2 * k + first) * shape<D, FP8>::GROUP + shape<D, FP8>::V;
#pragma unroll
        for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n += 2) {
            uint32_t y[4];
            uint32_t at = place<D>(row, second, n * 8);
            if (shape<D, FP8>::SPLIT == 2 && split) at = place<D>(row, second, shape<D, FP8>::COLUMNS + n * 8);
            mp_load4_turned(y, from + at);
            mp_mma(t->o[n], p, y[0], y[1]);
            mp_mma(t->o[n + 1], p, y[2], y[3]);
        }
    }
}

/* ---- Cells and blocks -------------------------------------------------------------------------------------------- */

template <int D, bool FP8> static __device__ __forceinline__ void reset(state<D, FP8> *t) {
#pragma unroll
    for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n++) t->o[n][0] = t->o[n][1] = t->o[n][2] = t->o[n][3] = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        t->top[h] = -CUDART_INF_F;
        t->m[h] = t->l[2 * h] = t->l[2 * h + 1] = 0.0f;
    }
}

/* The cell's state, rounded as a stored one is, into the running state. */
template <int D, bool FP8>
static __device__ __forceinline__ void fold(const state<D, FP8> *t, mp_running run[2],
                                            float o[shape<D, FP8>::COLUMNS / 8][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = t->l[2 * h], keep, add;
        if (!mp_saw(l)) continue;
        mp_fold(&run[h], t->m[h], l, &keep, &add);
        float inverse = mp_inverse(l);
#pragma unroll
        for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n++) {
            float2 cell = __half22float2(mp_partial(t->o[n][2 * h], t->o[n][2 * h + 1], inverse));
            o[n][2 * h] = mp_fold_o(o[n][2 * h], keep, cell.x, add);
            o[n][2 * h + 1] = mp_fold_o(o[n][2 * h + 1], keep, cell.y, add);
        }
    }
}

typedef struct unit {
    mp_cu_block block;
    uint32_t head, group; /* kv head; heads of a row */
    uint32_t first;       /* row of the block's matrix that this pass begins with */
} unit;

/* Rows of the matrix that this lane has, as far as there are any: position and index + 1 of their row. */
static __device__ __forceinline__ uint32_t own_row(const mp_cu_attend *a, const unit *u, uint32_t m, int32_t *position,
                                                   int32_t *index) {
    uint32_t row = min((u->first + m) / u->group, u->block.n_rows - 1);
    const mp_cu_row *r = &a->work.rows[u->block.first_row + row];
    *position = r->position;
    *index = (int32_t)r->index + 1;
    return row;
}

template <int D, bool FP8>
static __device__ __forceinline__ void write(const mp_cu_attend *a, const unit *u, uint32_t m, const mp_running run[2],
                                             float o[shape<D, FP8>::COLUMNS / 8][4], uint32_t lane) {
    uint32_t split = shape<D, FP8>::SPLIT == 2 ? threadIdx.x / 32 % 2 : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t i = u->first + m + 8 * h, row = i / u->group, head = u->head * u->group + i % u->group;
        if (row >= u->block.n_rows) continue;
        float inverse = mp_inverse(run[h].l);
        mp_bf16 *out = a->out + ((size_t)(u->block.first_row + row) * a->n_heads + head) * D +
                       split * shape<D, FP8>::COLUMNS + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n++) {
            *(uint32_t *)(out + 8 * n) = mp_pack(__fmul_rn(o[n][2 * h], inverse), __fmul_rn(o[n][2 * h + 1], inverse));
        }
    }
}

template <int D, bool FP8>
static __device__ void attend_unit(const mp_cu_attend *a, const unit *u, uint8_t *smem, uint32_t ring) {
    constexpr uint32_t codes = shape<D, FP8>::QUERIES + shape<D, FP8>::STAGE; /* in smem: K's, then V's */
    const mp_cu_key_bias *bias = FP8 && a->key_bias ? a->key_bias + u->head * D : nullptr;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const uint32_t m = warp / shape<D, FP8>::SPLIT * 16 + lane / 4; /* and m + 8 */
    const uint32_t q = mp_shared(smem), kv = q + shape<D, FP8>::QUERIES;
    const uint32_t own_q = q + warp / shape<D, FP8>::SPLIT * 2 * shape<D, FP8>::HALF;
    const size_t offset = a->layer_offset + u->head * a->block_bytes;
    const float c = a->scale * MP_LOG2E;
    int32_t position[2], index[2];
    for (int h = 0; h < 2; h++) own_row(a, u, m + 8 * h, &position[h], &index[h]);
    mp_queries queries = { a->work.rows + u->block.first_row,
                           (const __nv_bfloat16 *)a->q +
                               ((size_t)u->block.first_row * a->n_heads + u->head * u->group) * D,
                           a->n_heads * D,
                           u->group,
                           u->first,
                           min(u->block.n_rows * u->group - u->first, (uint32_t)shape<D, FP8>::ROWS),
                           0 };
    state<D, FP8> t;
    float o[shape<D, FP8>::COLUMNS / 8][4];
    mp_running run[2] = { { 0.0f, 0.0f }, { 0.0f, 0.0f } };
    reset(&t);
#pragma unroll
    for (int n = 0; n < shape<D, FP8>::COLUMNS / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;

    mp_walk walk;
    mp_walk_begin(&walk, &a->work, &u->block);
    bool more = mp_walk_next(&walk, &a->work, a->page_size), turned = false;
    if (FP8) {
        fetch_codes<D, false>(a, &walk, more, offset, q + codes);
        fetch_codes<D, true>(a, &walk, more, offset, q + codes + shape<D, FP8>::CODES);
    } else if (more) {
        fetch<D>(a, &walk, offset, kv);
    }
    for (uint32_t slot = 0; more; slot = ring == 2 ? slot ^ 1 : 0) {
        mp_stage now = walk.stage;
        mp_copy_wait<FP8 ? 1 : 0>(); /* of fp8, V may be under way */
        __syncthreads(); /* the stage is here, and nobody reads the other one, or the queries, any more */
        uint32_t n_keys = min(walk.n_tokens - walk.key, 64); /* up to the cell's end */
        more = mp_walk_next(&walk, &a->work, a->page_size);
        if (!FP8 && more && ring == 2) fetch<D>(a, &walk, offset, kv + (slot ^ 1) * shape<D, FP8>::STAGE);
        if (now.new_cell) {
            fold(&t, run, o);
            reset(&t);
            if (!turned || now.base != queries.base) {
                queries.base = now.base;
                mp_turn_queries<D>(&a->rope, &queries, smem, threadIdx.x, THREADS);
                turned = true;
                if (!FP8) __syncthreads();
            }
        }
        if (FP8) {
            mp_kv8_widen<D, false, THREADS, mp_kv8<D>::HALF, 16 * D>(smem + codes, smem + shape<D, FP8>::QUERIES, bias,
                                                                     threadIdx.x, 64);
            __syncthreads();
            fetch_codes<D, false>(a, &walk, more, offset, q + codes);
        }
        float s[8][4];
        uint32_t at = kv + slot * shape<D, FP8>::STAGE;
        scores<D, FP8>(s, own_q, at, lane);
        if (!now.whole) {
            int32_t limit[2] = { (now.shared ? position[0] : index[0]) - now.edge,
                                 (now.shared ? position[1] : index[1]) - now.edge };
            hide(s, now.seen, limit, lane);
        }
        weigh(s, &t, c);
        if (FP8) {
            mp_copy_wait<1>(); /* the next K may be under way */
            __syncthreads();   /* nobody reads K any more */
            mp_kv8_widen<D, true, THREADS, mp_kv8<D>::HALF, 16 * D>(
                smem + codes + shape<D, FP8>::CODES, smem + shape<D, FP8>::QUERIES, nullptr, threadIdx.x, n_keys);
            __syncthreads();
            fetch_codes<D, true>(a, &walk, more, offset, q + codes + shape<D, FP8>::CODES);
        }
        collect(&t, s, at, lane);
        if (!FP8 && ring == 1) {
            __syncthreads();
            if (more) fetch<D>(a, &walk, offset, kv);
        }
    }
    fold(&t, run, o);
    write<D, FP8>(a, u, m, run, o, lane);
}

template <int D, bool FP8> static __host__ __device__ constexpr uint32_t smem_bytes(uint32_t ring) {
    return shape<D, FP8>::QUERIES + ring * shape<D, FP8>::STAGE + (FP8 ? 2 * shape<D, FP8>::CODES : 0);
}

template <int D, bool FP8>
static __global__ void __launch_bounds__(THREADS, 1) prefill(const __grid_constant__ mp_cu_attend a, uint32_t ring) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ uint32_t next;
    const uint32_t group = a.n_heads / a.n_kv_heads, n_units = a.work.counts->n_blocks * a.n_kv_heads;
    for (;;) {
        if (threadIdx.x == 0) next = mp_take_unit(a.work.counts, n_units, gridDim.x);
        __syncthreads();
        uint32_t taken = next;
        __syncthreads();
        if (taken >= n_units) return;
        unit u = { a.work.blocks[taken / a.n_kv_heads], taken % a.n_kv_heads, group, 0 };
        for (; u.first < u.block.n_rows * group; u.first += shape<D, FP8>::ROWS) {
            attend_unit<D, FP8>(&a, &u, smem, ring);
            __syncthreads(); /* the queries and the stages are free */
        }
    }
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

template <int D, bool FP8> static cudaError_t launch_kind(const mp_cu_attend *a, cudaStream_t stream) {
    int device, most;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    uint32_t ring = !FP8 && smem_bytes<D, FP8>(2) + 1024 <= (uint32_t)most ? 2 : 1, bytes = smem_bytes<D, FP8>(ring);
    error = cudaFuncSetAttribute(prefill<D, FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return error;
    uint32_t units = a->max_blocks * a->n_kv_heads;
    if (units > a->n_sm) units = a->n_sm;
    prefill<D, FP8><<<units, THREADS, bytes, stream>>>(*a, ring);
    return cudaGetLastError();
}

template <int D> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    return a->fp8 ? launch_kind<D, true>(a, stream) : launch_kind<D, false>(a, stream);
}

uint32_t mp_cu_attend_block_rows(uint32_t n_heads, uint32_t n_kv_heads) {
    uint32_t rows = 1, group = n_heads / n_kv_heads;
    while (rows * 2 * group <= MP_BLOCK_ROWS) rows *= 2;
    return rows;
}

cudaError_t mp_cu_attend_prefill(const mp_cu_attend *a, cudaStream_t stream) {
    if (!a->max_blocks) return cudaSuccess;
    if (a->arch == 90) {
        cudaError_t error = mp_cu_attend_prefill_sm90(a, stream);
        if (error != cudaErrorNotSupported) return error;
    }
    switch (a->head_dim) {
    case 64: return launch<64>(a, stream);
    case 80: return launch<80>(a, stream);
    case 96: return launch<96>(a, stream);
    case 128: return launch<128>(a, stream);
    case 256: return launch<256>(a, stream);
    }
    return cudaErrorNotSupported;
}
