/* Decode attention on every GPU since sm_80: mma.sync, cp.async.
 *
 * Persistent blocks of four warps take units (item, kv head) from a counter, and of a unit tiles of up to 64 rows. K
 * and V of a stage (64 keys) are entries of a ring in shared memory. Of a wide tile every warp has 16 rows, all keys
 * and all columns. Of a narrow one (16 rows) the warps split the keys for S = Q K^T, exchange maxima and weights
 * through shared memory, and split the columns for P V: every warp then goes through all keys in order, so both kinds,
 * and the kernel for Hopper, give the same bits (fold.cuh).
 *
 * Of fp8 pages the ring holds codes. The warps of a narrow tile, each of which has keys, then columns, of its own, make
 * bf16 operands of them in registers; for a wide tile the block brings K, then V, of a stage to bf16 beside the ring.
 */
#include "backend/cuda/attend_item.cuh"
#include "backend/cuda/kv8.cuh"

namespace {

enum { THREADS = 128, WARPS = 4, TILE_ROWS = 64, NARROW_ROWS = 16 };

template <int D, bool FP8> struct shared {
    static const int WIDE = 64 * D * 2;                        /* bytes of K or V of a stage in bf16 */
    static const int ENTRY = FP8 ? 8 * mp_kv8<D>::HALF : WIDE; /* and in the ring */
    static const int N_ENTRIES = D > 128 ? 2 : 4;              /* 99 KB are all that sm_89 has */
    static const int BLOCKS = D <= 64 ? 3 : D <= 128 ? FP8 ? 3 : 2 : 1; /* of a multiprocessor */
    uint8_t kv[N_ENTRIES][ENTRY];
    uint8_t wide[FP8 ? WIDE : 16];
    uint8_t q[TILE_ROWS * D * 2];
    uint64_t mask[TILE_ROWS]; /* of the tile's readers */
    uint32_t window[TILE_ROWS];
    uint32_t slot[TILE_ROWS], row[TILE_ROWS];
    int32_t delta[TILE_ROWS];
    float top[WARPS][NARROW_ROWS];
    uint32_t unit;
};

struct tile {
    uint32_t kv_head, group, n_readers, n_rows;
    uint32_t first_stage, end_stage;
    const uint32_t *pages;
    uint32_t n_tokens; /* of the cell */
    uint32_t shift;
    const mp_cu_key_bias *bias; /* of the kv head */
};

/* Starts the copy of entry e (stage e / 2; K, then V). */
template <int D, bool FP8>
__device__ __forceinline__ void fetch(const mp_cu_attend &a, const tile &t, shared<D, FP8> &sh, uint32_t e,
                                      uint32_t end) {
    const uint32_t GROUP = FP8 ? mp_kv8<D>::GROUP : D * 32, V = FP8 ? mp_kv8<D>::V : D * 16;
    const uint32_t HALF = shared<D, FP8>::ENTRY / 8, PER_GROUP = THREADS / 8; /* bytes of a group; threads */
    if (e < end) {
        uint32_t group = threadIdx.x / PER_GROUP, unit = threadIdx.x % PER_GROUP, key = e / 2 * 64 + group * 8;
        bool there = key < t.n_tokens;
        uint32_t page = there ? __ldg(&t.pages[key >> t.shift]) : 0, in_page = key & ((1u << t.shift) - 1);
        const uint8_t *from = there ? a.slab + page * a.page_bytes + a.layer_offset + t.kv_head * a.block_bytes +
                                          in_page / 8 * GROUP + (e & 1 ? V : 0)
                                    : a.slab;
        uint32_t to = mp_shared(sh.kv[e % shared<D, FP8>::N_ENTRIES]) + group * HALF;
#pragma unroll
        for (uint32_t first = 0; first < HALF; first += PER_GROUP * 16) {
            uint32_t at = first + unit * 16;
            if (HALF % (PER_GROUP * 16) && at >= HALF) break;
            bool seen = there && (FP8 || key + mp_kv_token<D>(at / 16) < t.n_tokens); /* behind the cell's end: zeros */
            mp_copy16(to + at, from + at, seen);
        }
    }
    mp_copy_commit(); /* also an empty one, so that groups count entries */
}

/* K or V of an entry that is there for all, as products and gather read it. */
template <int D, bool FP8, bool V>
__device__ __forceinline__ uint32_t bf16_of(const tile &t, shared<D, FP8> &sh, const uint8_t *entry) {
    if (!FP8) return mp_shared(entry);
    mp_kv8_widen<D, V, THREADS, mp_kv8<D>::HALF, 16 * D>(entry, sh.wide, t.bias, threadIdx.x, 64);
    __syncthreads();
    return mp_shared(sh.wide);
}

/* Reader info and turned queries of a tile. */
template <int D, bool FP8>
__device__ void open_tile(const mp_cu_attend &a, tile &t, shared<D, FP8> &sh, const mp_cu_reader *readers) {
    uint32_t thread = threadIdx.x;
    for (uint32_t i = thread; i < t.n_readers; i += THREADS) {
        mp_cu_reader r = readers[i];
        sh.mask[i] = r.mask;
        sh.window[i] = r.lo | (uint32_t)r.hi << 16;
        sh.slot[i] = r.slot;
        sh.row[i] = r.row;
        sh.delta[i] = r.delta;
    }
    __syncthreads();
    uint32_t lo = 0xffff, hi = 0;
    for (uint32_t i = thread & 31; i < t.n_readers; i += 32) {
        lo = min(lo, sh.window[i] & 0xffff);
        hi = max(hi, sh.window[i] >> 16);
    }
    t.first_stage = __reduce_min_sync(~0u, lo) / 64;
    t.end_stage = (__reduce_max_sync(~0u, hi) + 63) / 64;
    for (uint32_t i = thread; i < t.n_rows * (D / 8); i += THREADS) {
        uint32_t row = i / (D / 8), unit = i % (D / 8), reader = row / t.group;
        size_t head = (size_t)sh.row[reader] * a.n_heads + t.kv_head * t.group + (row - reader * t.group);
        uint32_t to = mp_shared(sh.q) + row / 8 * (D * 16) + mp_kv_offset(D, row % 8, unit * 8);
        mp_copy16(to, a.q + head * D + unit * 8, true);
    }
    mp_copy_commit();
    mp_copy_wait<0>();
    __syncthreads();
    mp_turn_tile<D>(sh.q, a.rope, t.n_readers, t.group, sh.delta, thread, THREADS);
}

/* The state of rows lane / 4 and lane / 4 + 8 of the warp's 16. */
template <int D, bool NARROW> struct state {
    static const int PAIRS = NARROW ? (D / 16 + WARPS - 1) / WARPS : D / 16; /* of n-tiles: 16 columns */
    static const int KEYS = NARROW ? 2 : 8;                                  /* n-tiles of S */
    float o[PAIRS][2][4], l[4], top[2], m[2], f[2];
    uint64_t mask[2];
    uint32_t window[2];
    uint32_t p[4][4]; /* weights of a stage, as A */
};

/* S of a stage: 16 rows by 64 keys, or of a narrow tile by this warp's 16. */
template <int D, bool NARROW> __device__ __forceinline__ void products(float (*s)[4], uint32_t q, uint32_t k) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint32_t row = (NARROW ? 0 : warp * 16) + (lane & 15), key = (NARROW ? warp * 16 : 0) + (lane & 7) + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < state<D, NARROW>::KEYS; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t x[4], b[4];
        mp_load4(x, q + row / 8 * (D * 16) + mp_kv_offset(D, row & 7, d + lane / 16 * 8));
#pragma unroll
        for (int i = 0; i < state<D, NARROW>::KEYS / 2; i++) {
            mp_load4(b, k + (key / 8 + i * 2) * (D * 16) + mp_kv_offset(D, lane & 7, d + (lane / 8 & 1) * 8));
            mp_mma(s[2 * i], x, b[0], b[1]);
            mp_mma(s[2 * i + 1], x, b[2], b[3]);
        }
    }
}

/* S of this warp's 16 keys from their codes: the halves of two groups. */
template <int D, bool BIASED>
__device__ __forceinline__ void products_of_codes(float (*s)[4], uint32_t q, const uint8_t *half,
                                                  const mp_cu_key_bias *bias) {
    uint32_t lane = threadIdx.x & 31, factors[2], angle[2];
    uint32_t at = mp_shared(half) + lane / 8 % 2 * mp_kv8<D>::HALF + lane / 16 * 128 + (lane & 7) * 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint8_t *marks = half + i * mp_kv8<D>::HALF + 8 * D;
        factors[i] = ((const uint16_t *)marks)[16 + lane / 4] * 0x10001u;
        angle[i] = ((const uint32_t *)marks)[lane / 4];
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < D; d += 32) {
        uint32_t codes[4]; /* of two panels; behind an odd last one a copy may be under way: it is its own neighbour */
        mp_load4(codes, at + d * 8 - (d + 16 < D ? 0 : lane / 16 * 128));
#pragma unroll
        for (int h = 0; h < 2 && d + h * 16 < D; h++) {
            uint32_t x[4], row = lane & 15, column = d + h * 16;
            mp_load4(x, q + row / 8 * (D * 16) + mp_kv_offset(D, row & 7, column + lane / 16 * 8));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t b0 = mp_kv8_pair<false>(codes[2 * h + i], factors[i]);
                uint32_t b1 = mp_kv8_pair<true>(codes[2 * h + i], factors[i]);
                if (BIASED) {
                    b0 = mp_kv8_add_bias(b0, bias + column + (lane & 3) * 2, angle[i]);
                    b1 = mp_kv8_add_bias(b1, bias + column + (lane & 3) * 2 + 8, angle[i]);
                }
                mp_mma(s[i], x, b0, b1);
            }
        }
    }
}

/* From S to weights, maximum and factor. */
template <int D, bool FP8, bool NARROW>
__device__ __forceinline__ void weigh(state<D, NARROW> &st, float (*s)[4], shared<D, FP8> &sh, uint32_t key,
                                      uint32_t shift, float c) {
    const int KEYS = state<D, NARROW>::KEYS;
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = NARROW ? warp * 16 : 0;
    uint64_t seen[2] = { mp_seen(st.window[0], st.mask[0], key, shift), mp_seen(st.window[1], st.mask[1], key, shift) };
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint64_t bits = seen[h] >> (first + (lane & 3) * 2);
        top[h] = -CUDART_INF_F;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!(bits >> (i * 8 + e) & 1)) s[i][2 * h + e] = -CUDART_INF_F;
                top[h] = fmaxf(top[h], s[i][2 * h + e]);
            }
        }
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
        if (NARROW && (lane & 3) == 0) sh.top[warp][lane / 4 + 8 * h] = top[h];
    }
    if (NARROW) __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (NARROW) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) top[h] = fmaxf(top[h], sh.top[w][lane / 4 + 8 * h]);
        }
        top[h] = fmaxf(top[h], st.top[h]);
        float m = mp_row_max(top[h], c);
        st.f[h] = mp_rescale(st.top[h], st.m[h], m);
        st.top[h] = top[h];
        st.m[h] = m;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            uint32_t pair = mp_pack(mp_weight(s[i][2 * h], c, m), mp_weight(s[i][2 * h + 1], c, m));
            if (!NARROW) st.p[i / 2][i % 2 * 2 + h] = pair;
            if (NARROW) { /* behind the 16 rows of queries */
                uint32_t at = h * 1024 + mp_kv_offset(64, lane / 4, first + i * 8 + (lane & 3) * 2);
                *(uint32_t *)(sh.q + NARROW_ROWS * D * 2 + at) = pair;
            }
        }
    }
}

/* The state scaled to its new maximum. */
template <int D, bool NARROW> __device__ __forceinline__ void rescale(state<D, NARROW> &st) {
#pragma unroll
    for (int h = 0; h < 4; h++) st.l[h] = __fmul_rn(st.l[h], st.f[h / 2]);
#pragma unroll
    for (int i = 0; i < state<D, NARROW>::PAIRS; i++) {
#pragma unroll
        for (int h = 0; h < 8; h++) st.o[i][h / 4][h % 4] = __fmul_rn(st.o[i][h / 4][h % 4], st.f[h % 4 / 2]);
    }
}

/* Weights of 16 keys; l of them. */
template <int D, bool FP8, bool NARROW>
__device__ __forceinline__ void weights(state<D, NARROW> &st, const shared<D, FP8> &sh, int k) {
    if (NARROW) {
        uint32_t lane = threadIdx.x & 31, row = lane & 15;
        mp_load4(st.p[k], mp_shared(sh.q) + NARROW_ROWS * D * 2 + row / 8 * 1024 +
                           mp_kv_offset(64, row & 7, k * 16 + lane / 16 * 8));
    }
    mp_mma(st.l, st.p[k], MP_BF16_ONES, MP_BF16_ONES);
}

/* o and l of a stage. */
template <int D, bool FP8, bool NARROW>
__device__ __forceinline__ void gather(state<D, NARROW> &st, const shared<D, FP8> &sh, uint32_t v) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    rescale(st);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        weights(st, sh, k);
#pragma unroll
        for (int i = 0; i < state<D, NARROW>::PAIRS; i++) {
            uint32_t pair = NARROW ? warp + i * WARPS : i, b[4];
            if (D / 16 % WARPS && pair >= D / 16) break;
            mp_load4_turned(b, v + (k * 2 + (lane / 8 & 1)) * (D * 16) +
                                mp_kv_offset(D, lane & 7, pair * 16 + lane / 16 * 8));
            mp_mma(st.o[i][0], st.p[k], b[0], b[1]);
            mp_mma(st.o[i][1], st.p[k], b[2], b[3]);
        }
    }
}

/* The same from the codes of V, for this warp's columns. */
template <int D>
__device__ __forceinline__ void gather_codes(state<D, true> &st, const shared<D, true> &sh, const uint8_t *entry) {
    const uint32_t HALF = mp_kv8<D>::HALF, PAIRS = state<D, true>::PAIRS;
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint32_t at = mp_shared(entry) + lane / 8 % 2 * HALF + MP_CU_KV8_MARKS + (lane & 7) * 16;
    rescale(st);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t factors[2];
#pragma unroll
        for (int g = 0; g < 2; g++) {
            factors[g] = *(const uint32_t *)(entry + (2 * k + g) * HALF + 48 + (lane & 3) * 4); /* of two keys */
        }
        weights(st, sh, k);
#pragma unroll
        for (uint32_t i = 0; i < PAIRS; i += 2) { /* two panels of columns at a time */
            uint32_t panel = warp + (i + (PAIRS > 1 ? lane / 16 : 0)) * WARPS, codes[4];
            mp_load4_turned(codes, at + 2 * k * HALF + min(panel, (uint32_t)D / 16 - 1) * 128);
#pragma unroll
            for (uint32_t n = 0; n < 2 && i + n < PAIRS; n++) {
                if (D / 16 % WARPS && warp + (i + n) * WARPS >= D / 16) break;
                const uint32_t *c = codes + 2 * n;
                mp_mma(st.o[i + n][0], st.p[k], mp_kv8_pair<false>(c[0], factors[0]),
                       mp_kv8_pair<false>(c[1], factors[1]));
                mp_mma(st.o[i + n][1], st.p[k], mp_kv8_pair<true>(c[0], factors[0]),
                       mp_kv8_pair<true>(c[1], factors[1]));
            }
        }
    }
}

template <int D, bool FP8, bool NARROW>
__device__ __forceinline__ void store(const mp_cu_attend &a, const tile &t, const shared<D, FP8> &sh,
                                      const state<D, NARROW> &st) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t row = (NARROW ? 0 : warp * 16) + lane / 4 + 8 * h;
        if (row >= t.n_rows) continue;
        uint32_t reader = row / t.group;
        size_t at = (size_t)sh.slot[reader] * a.n_heads + t.kv_head * t.group + (row - reader * t.group);
        float l = st.l[2 * h], inverse = mp_inverse(l);
        if ((!NARROW || warp == 0) && (lane & 3) == 0) ((float2 *)a.partial_ml)[at] = make_float2(st.m[h], l);
#pragma unroll
        for (int i = 0; i < state<D, NARROW>::PAIRS; i++) {
            uint32_t pair = NARROW ? warp + i * WARPS : i;
            if (pair >= D / 16) break;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                __half2 x = mp_partial(st.o[i][n][2 * h], st.o[i][n][2 * h + 1], inverse);
                *(__half2 *)(a.partial_o + at * D + pair * 16 + n * 8 + (lane & 3) * 2) = x;
            }
        }
    }
}

/* Values behind the cell's end are to be zero, whatever lies there: of a group, which comes as a whole, the factors. */
template <int D> __device__ __forceinline__ void end_values(uint8_t *entry, uint32_t n_keys) {
    if (threadIdx.x >= n_keys && threadIdx.x < 64) {
        ((uint16_t *)(entry + threadIdx.x / 8 * mp_kv8<D>::HALF))[24 + threadIdx.x % 8] = 0;
    }
    __syncthreads();
}

template <int D, bool FP8, bool NARROW>
__device__ void attend_tile(const mp_cu_attend &a, const tile &t, shared<D, FP8> &sh) {
    const uint32_t N = shared<D, FP8>::N_ENTRIES;
    uint32_t end = t.end_stage * 2, lane = threadIdx.x & 31;
    state<D, NARROW> st;
    memset(&st, 0, sizeof st);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t row = (NARROW ? 0 : threadIdx.x / 32 * 16) + lane / 4 + 8 * h;
        uint32_t reader = min(row / t.group, t.n_readers - 1);
        st.mask[h] = sh.mask[reader];
        st.window[h] = sh.window[reader];
        st.top[h] = -CUDART_INF_F;
    }
    for (uint32_t i = 0; i < N - 1; i++) fetch(a, t, sh, t.first_stage * 2 + i, end);
    float c = __fmul_rn(a.scale, MP_LOG2E);
    for (uint32_t stage = t.first_stage; stage < t.end_stage; stage++) {
        float s[state<D, NARROW>::KEYS][4];
        mp_copy_wait<N - 2>();
        __syncthreads(); /* K is there for all, and all have left the entry before it */
        fetch(a, t, sh, stage * 2 + N - 1, end);
        uint8_t *k = sh.kv[stage * 2 % N], *v = sh.kv[(stage * 2 + 1) % N];
        if constexpr (FP8 && NARROW) {
            const uint8_t *half = k + threadIdx.x / 32 * 2 * mp_kv8<D>::HALF;
            if (t.bias) {
                products_of_codes<D, true>(s, mp_shared(sh.q), half, t.bias);
            } else {
                products_of_codes<D, false>(s, mp_shared(sh.q), half, t.bias);
            }
        } else {
            products<D, NARROW>(s, mp_shared(sh.q), bf16_of<D, FP8, false>(t, sh, k));
        }
        weigh(st, s, sh, stage * 64, t.shift, c);
        mp_copy_wait<N - 2>();
        __syncthreads();
        fetch(a, t, sh, stage * 2 + N, end);
        if (FP8 && stage * 64 + 64 > t.n_tokens) end_values<D>(v, t.n_tokens - stage * 64);
        if constexpr (FP8 && NARROW) {
            gather_codes<D>(st, sh, v);
        } else {
            gather(st, sh, bf16_of<D, FP8, true>(t, sh, v));
        }
    }
    store(a, t, sh, st);
}

template <int D, bool FP8>
__global__ void __launch_bounds__(THREADS, shared<D, FP8>::BLOCKS)
    attend_decode(const __grid_constant__ mp_cu_attend a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    shared<D, FP8> &sh = *(shared<D, FP8> *)memory;
    uint32_t n_units = a.work.counts->n_items * a.n_kv_heads;
    tile t;
    t.group = a.n_heads / a.n_kv_heads;
    t.shift = 31 - __clz(a.page_size);
    for (;;) {
        if (threadIdx.x == 0) sh.unit = atomicAdd(&a.work.counts->next_unit, 1);
        __syncthreads();
        uint32_t unit = sh.unit;
        if (unit >= n_units) break;
        mp_cu_item item = a.work.items[unit / a.n_kv_heads];
        t.kv_head = unit % a.n_kv_heads;
        t.bias = FP8 && a.key_bias ? a.key_bias + t.kv_head * D : nullptr;
        t.pages = a.work.pages + item.first_page;
        t.n_tokens = item.n_tokens;
        for (uint32_t first = 0; first < item.n_readers; first += t.n_readers) {
            t.n_readers = min(TILE_ROWS / t.group, item.n_readers - first);
            t.n_rows = t.n_readers * t.group;
            open_tile(a, t, sh, a.work.readers + item.first_reader + first);
            if (t.n_rows <= NARROW_ROWS) {
                attend_tile<D, FP8, true>(a, t, sh);
            } else {
                attend_tile<D, FP8, false>(a, t, sh);
            }
            __syncthreads();
        }
    }
    if (threadIdx.x == 0) mp_leave_decode(a.work.counts, gridDim.x);
}

template <int D> static cudaError_t open_kernel(void) {
    cudaError_t e = cudaFuncSetAttribute(attend_decode<D, false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sizeof(shared<D, false>));
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute(attend_decode<D, true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                sizeof(shared<D, true>));
}

template <int D> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t per_sm = a->fp8 ? shared<D, true>::BLOCKS : shared<D, false>::BLOCKS, units = a->max_items * a->n_kv_heads;
    uint32_t blocks = a->n_sm * per_sm < units ? a->n_sm * per_sm : units;
    if (a->fp8) {
        attend_decode<D, true><<<blocks, THREADS, sizeof(shared<D, true>), stream>>>(*a);
    } else {
        attend_decode<D, false><<<blocks, THREADS, sizeof(shared<D, false>), stream>>>(*a);
    }
    return cudaGetLastError();
}

} // namespace

static bool for_sm90(uint32_t arch, uint32_t head_dim) {
    return arch == 90 && (head_dim == 64 || head_dim == 128);
}

uint32_t mp_cu_attend_item_readers(uint32_t arch, uint32_t head_dim, uint32_t n_heads, uint32_t n_kv_heads) {
    uint32_t group = n_heads / n_kv_heads;
    return for_sm90(arch, head_dim) ? mp_cu_attend_decode_sm90_readers(group) : TILE_ROWS / group;
}

cudaError_t mp_cu_attend_open(int device) {
    cudaError_t e = cudaSetDevice(device);
    if (e == cudaSuccess) e = open_kernel<64>();
    if (e == cudaSuccess) e = open_kernel<80>();
    if (e == cudaSuccess) e = open_kernel<96>();
    if (e == cudaSuccess) e = open_kernel<128>();
    if (e == cudaSuccess) e = open_kernel<256>();
    int major = 0, minor = 0;
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (e == cudaSuccess && major == 9 && minor == 0) e = mp_cu_attend_decode_sm90_open();
    return e;
}

cudaError_t mp_cu_attend_decode(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t group = a->n_heads / a->n_kv_heads;
    if (!a->max_items) return cudaSuccess;
    if (group > 16 || a->page_size & (a->page_size - 1)) return cudaErrorInvalidValue;
    cudaError_t e = cudaErrorInvalidValue;
    if (for_sm90(a->arch, a->head_dim)) {
        e = mp_cu_attend_decode_sm90(a, stream);
    } else {
        switch (a->head_dim) {
        case 64: e = launch<64>(a, stream); break;
        case 80: e = launch<80>(a, stream); break;
        case 96: e = launch<96>(a, stream); break;
        case 128: e = launch<128>(a, stream); break;
        case 256: e = launch<256>(a, stream); break;
        }
    }
    return e == cudaSuccess ? mp_cu_attend_fold(a, stream) : e;
}
