/* Decode attention on Hopper: bulk copies, wgmma; head_dim 64 and 128. The same bits as attend_decode.cu.
 *
 * A persistent block per SM: two warpgroups that compute, 64 rows of a tile each, and two that feed them:
 *
 *   warp 0      copies K and V: a bulk copy for every page of a stage, into a ring of stages
 *   warp 1      takes units (item, kv head) from the counter some stages before warp 0 needs them, cuts them into tiles
 *   warps 2-7   fetch the queries of a tile and turn them, one tile ahead of the products; of fp8 pages, warps 2 and 3,
 *               and warps 4-7 bring the codes of a stage, for which warp 0 has a ring of its own, to bf16
 *
 * A tile of up to 64 rows keeps one warpgroup busy; the others only hand the stages back. One stage comes from memory
 * in about 2,400 clocks and is computed in half of that, so there is no need to divide small tiles further. Everybody
 * counts tiles and stages, and what stands in which buffer follows from the count.
 *
 * Keys that were there before this step are copied before the kernels in front of this one have ended. */
#include "backend/cuda/attend_item.cuh"
#include "backend/cuda/early.cuh"
#include "backend/cuda/kv8.cuh"
#include "backend/cuda/wgmma.cuh"

namespace {

enum {
    GROUPS = 2, /* warpgroups that compute */
    THREADS = (GROUPS + 2) * 128,
    TILE_ROWS = GROUPS * 64,
    TILE_READERS = 32,   /* all heads of them: the rows, when there are 4 a kv head */
    WIDEN_THREADS = 128, /* of fp8 pages */
    N_LISTS = 3,         /* of pages: tiles taken and not yet copied */
    AHEAD = 8,           /* stages taken and not yet copied, when another tile is taken */
    COMPUTE_REGISTERS = 184, /* 2 x 184 + 2 x 72 = 4 x 128: what the launch gets. More would hang. */
    FEED_REGISTERS = 72,
};

struct tile {
    uint32_t first_reader;
    uint16_t n_readers, kv_head; /* n_readers 0: the end */
    uint16_t first_stage, end_stage;
    uint16_t n_tokens, n_before, alone; /* of the item */
};

template <int D, bool FP8> struct shared {
    static const int GROUP = 8 * D * 4; /* bytes of 8 tokens, K and V */
    static const int STAGE = 8 * GROUP;
    static const int N_STAGES = (FP8 ? 3 : 5) * 128 / D;
    static const int N_CODES = FP8 ? 3 * 128 / D : 1, CODES = FP8 ? 8 * mp_kv8<D>::GROUP : 16; /* stages, their bytes */
    static const int N_TILES = 2 * (N_STAGES + (FP8 ? N_CODES : 0)); /* a tile is not over before 3 more than all these
                                                                      * stages have been taken */
    static const int QUERY_THREADS = FP8 ? 64 : 192;
    uint8_t kv[N_STAGES][STAGE];
    uint8_t q[2][TILE_ROWS * D * 2];
    uint32_t ones[64]; /* [16, 8] in bf16 */
    uint64_t full[N_STAGES], empty[N_STAGES], q_full[2], q_empty[2], taken[N_TILES];
    uint64_t copied[N_LISTS]; /* all copies that the list names are under way */
    uint64_t mask[2][TILE_READERS];
    uint32_t window[2][TILE_READERS], slot[2][TILE_READERS];
    int32_t delta[TILE_READERS];
    uint32_t row[TILE_READERS];
    uint32_t pages[N_LISTS][64];
    tile tiles[N_TILES];
    uint32_t issued; /* stages whose copies are under way; atomic, and orders nothing */
    uint64_t codes_full[N_CODES], codes_empty[N_CODES];
    alignas(128) uint8_t codes[N_CODES][CODES];
};

/* ---- Feeding ----------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ mp_cu_item load_item(const mp_cu_attend &a, uint32_t unit) {
    union {
        uint4 bits;
        mp_cu_item item;
    } x = { __ldg((const uint4 *)(a.work.items + unit / a.n_kv_heads)) };
    return x.item;
}

/* The next unit from one end of the list; n_units or more: they are all taken. Each block begins with one. */
__device__ __forceinline__ uint32_t take_unit(mp_cu_counts *counts, uint32_t n_units, uint32_t n_blocks,
                                              uint32_t n_back, bool back) {
    uint64_t taken = atomicAdd((unsigned long long *)&counts->next_unit, back ? 1ull << 32 : 1ull);
    uint32_t front = (uint32_t)taken, end = (uint32_t)(taken >> 32);
    if (front + end + n_blocks >= n_units) return ~0u;
    return back ? n_units - 1 - (n_back + end) : n_blocks - n_back + front;
}

/* Warp 1. */
template <int D, bool FP8> __device__ void take_tiles(const mp_cu_attend &a, shared<D, FP8> &sh) {
    uint32_t lane = threadIdx.x & 31, shift = 31 - __clz(a.page_size);
    mp_cu_item item = load_item(a, blockIdx.x); /* it may not count: asked for while the counts are on their way */
    uint32_t n_units = a.work.counts->n_items * a.n_kv_heads, n_blocks = min(gridDim.x, n_units);
    uint32_t n_back = min(a.work.counts->n_back, n_blocks), unit = blockIdx.x;
    bool back = unit >= n_blocks - n_back && unit < n_blocks; /* takes from the end of the list */
    if (back) {
        unit = n_units - n_blocks + unit;
        item = load_item(a, unit);
    }
    uint32_t at_once = min((uint32_t)TILE_READERS, TILE_ROWS / (a.n_heads / a.n_kv_heads));
    uint32_t first = 0, left = 0, kv_head = 0;
    uint32_t end = 0; /* of the last tile, in stages */
    for (uint32_t n = 0;; n++) {
        tile t = { 0, 0, 0, 0, 0, 0, 0, 0 };
        while (lane == 0 && (int32_t)(end - atomicAdd(&sh.issued, 0)) > AHEAD) __nanosleep(64);
        __syncwarp();
        mp_barrier_wait(mp_shared(&sh.copied[n % N_LISTS]), (n / N_LISTS & 1) ^ 1);
        if (!left) {
            if (n > 0 && unit < n_units) item = load_item(a, unit);
            if (unit < n_units) {
                kv_head = unit % a.n_kv_heads;
                first = item.first_reader;
                left = item.n_readers;
            }
        }
        if (left) {
            uint32_t n_tiles = (left + at_once - 1) / at_once, lo = 0xffff, hi = 0;
            t.n_readers = (uint16_t)((left + n_tiles - 1) / n_tiles);
            t.first_reader = first;
            t.kv_head = (uint16_t)kv_head;
            t.n_tokens = item.n_tokens;
            t.n_before = item.n_before;
            t.alone = item.alone;
#pragma unroll
            for (uint32_t i = lane; i < TILE_READERS; i += 32) {
                if (i >= t.n_readers) break;
                lo = min(lo, (uint32_t)a.work.readers[first + i].lo);
                hi = max(hi, (uint32_t)a.work.readers[first + i].hi);
            }
            const uint32_t *pages = a.work.pages + item.first_page;
            for (uint32_t i = lane; i << shift < t.n_tokens; i += 32) sh.pages[n % N_LISTS][i] = pages[i];
            t.first_stage = (uint16_t)(__reduce_min_sync(~0u, lo) / 64);
            t.end_stage = (uint16_t)((__reduce_max_sync(~0u, hi) + 63) / 64);
            first += t.n_readers;
            left -= t.n_readers;
        }
        if (lane == 0) sh.tiles[n % sh.N_TILES] = t;
        mp_barrier_arrive(mp_shared(&sh.taken[n % sh.N_TILES]));
        if (n == 0) mp_wait_for_inputs(); /* the counter may be that of a decode kernel that has not ended */
        if (!t.n_readers) break;
        end += t.end_stage - t.first_stage;
        if (left) continue;
        if (lane == 0) unit = take_unit(a.work.counts, n_units, n_blocks, n_back, back);
        unit = __shfl_sync(~0u, unit, 0);
    }
    if (lane == 0) mp_leave_decode(a.work.counts, gridDim.x);
}

/* Warp 0. */
template <int D, bool FP8> __device__ void copy_stages(const mp_cu_attend &a, shared<D, FP8> &sh) {
    uint32_t lane = threadIdx.x & 31, shift = 31 - __clz(a.page_size), count = 0;
    const uint32_t N = FP8 ? sh.N_CODES : sh.N_STAGES, GROUP = FP8 ? mp_kv8<D>::GROUP : sh.GROUP;
    uint32_t piece = min(a.page_size, 64u); /* tokens of a copy */
    const uint64_t once = mp_policy_once(), again = mp_policy_again();
    bool waited = false;                    /* what was there before this step is copied without waiting */
    for (uint32_t n = 0;; n++) {
        mp_barrier_wait(mp_shared(&sh.taken[n % sh.N_TILES]), n / sh.N_TILES & 1);
        tile t = sh.tiles[n % sh.N_TILES];
        if (!t.n_readers) break;
        const uint8_t *base = a.slab + a.layer_offset + t.kv_head * a.block_bytes;
        for (uint32_t stage = t.first_stage; stage < t.end_stage; stage++, count++) {
            uint32_t slot = count % N, key = stage * 64, n_keys = min(64u, t.n_tokens - key), mine = key + lane * piece;
            uint32_t full = mp_shared(FP8 ? &sh.codes_full[slot] : &sh.full[slot]);
            if (!waited && (n > 0 || key + n_keys > t.n_before)) {
                mp_wait_for_inputs();
                waited = true;
            }
            mp_barrier_wait(mp_shared(FP8 ? &sh.codes_empty[slot] : &sh.empty[slot]), (count / N & 1) ^ 1);
            if (!FP8 && n_keys < 64) mp_clear_values<D>(sh.kv[slot], n_keys);
            if (lane == 0) mp_barrier_expect(full, FP8 ? (n_keys + 7) / 8 * GROUP : mp_keys_bytes<D>(n_keys));
            __syncwarp();
            if (lane * piece < n_keys) {
                const uint8_t *from = base + sh.pages[n % N_LISTS][mine >> shift] * a.page_bytes;
                from += (mine & (a.page_size - 1)) / 8 * GROUP;
                uint32_t to = mp_shared(FP8 ? sh.codes[slot] : sh.kv[slot]) + lane * piece / 8 * GROUP;
                uint32_t n_here = min(piece, n_keys - lane * piece);
                if (FP8) { /* whole groups: what is behind the end is not looked at */
                    mp_bulk_copy(to, from, (n_here + 7) / 8 * GROUP, full, t.alone ? once : again);
                } else {
                    mp_copy_keys<D>(to, from, n_here, full, t.alone ? once : again);
                }
            }
            __syncwarp();
            if (lane == 0) atomicExch(&sh.issued, count + 1);
        }
        mp_barrier_arrive(mp_shared(&sh.copied[n % N_LISTS]));
    }
}

/* Warps 4 to 7, of fp8 pages. */
template <int D> __device__ void widen_stages(const mp_cu_attend &a, shared<D, true> &sh) {
    uint32_t thread = threadIdx.x - GROUPS * 128 - 128, count = 0;
    for (uint32_t n = 0;; n++) {
        mp_barrier_wait(mp_shared(&sh.taken[n % sh.N_TILES]), n / sh.N_TILES & 1);
        tile t = sh.tiles[n % sh.N_TILES];
        if (!t.n_readers) break;
        const mp_cu_key_bias *bias = a.key_bias ? a.key_bias + t.kv_head * D : nullptr;
        for (uint32_t stage = t.first_stage; stage < t.end_stage; stage++, count++) {
            uint32_t slot = count % sh.N_STAGES, from = count % sh.N_CODES, n_keys = min(64u, t.n_tokens - stage * 64);
            const uint8_t *codes = sh.codes[from];
            mp_barrier_wait(mp_shared(&sh.codes_full[from]), count / sh.N_CODES & 1);
            mp_barrier_wait(mp_shared(&sh.empty[slot]), (count / sh.N_STAGES & 1) ^ 1);
            mp_kv8_widen<D, false, WIDEN_THREADS, mp_kv8<D>::GROUP, 32 * D>(codes, sh.kv[slot], bias, thread, n_keys);
            mp_kv8_widen<D, true, WIDEN_THREADS, mp_kv8<D>::GROUP, 32 * D>(codes + mp_kv8<D>::V, sh.kv[slot] + 16 * D,
                                                                           bias, thread, n_keys);
            mp_fence_async();
            mp_barrier_arrive(mp_shared(&sh.full[slot]));
            mp_barrier_arrive(mp_shared(&sh.codes_empty[from]));
        }
    }
}

/* Warps 2 to 7, or 3. */
template <int D, bool FP8> __device__ void turn_queries(const mp_cu_attend &a, shared<D, FP8> &sh) {
    const uint32_t QUERY_THREADS = sh.QUERY_THREADS;
    const uint32_t UNITS = D / 8, STEP = QUERY_THREADS / UNITS; /* 16 bytes of a row; rows that are copied at a time */
    uint32_t thread = threadIdx.x - GROUPS * 128 - 64, group = a.n_heads / a.n_kv_heads;
    uint32_t inverse = (65536 + group - 1) / group; /* row / group is row * inverse / 65536 for all rows there are */
    for (uint32_t n = 0;; n++) {
        uint32_t buffer = n & 1;
        mp_barrier_wait(mp_shared(&sh.taken[n % sh.N_TILES]), n / sh.N_TILES & 1);
        tile t = sh.tiles[n % sh.N_TILES];
        mp_cu_reader r = { 0, 0, 0, 0, 0, 0 };
        if (thread < t.n_readers) r = a.work.readers[t.first_reader + thread];
        if (n == 0) mp_wait_for_inputs();
        mp_barrier_wait(mp_shared(&sh.q_empty[buffer]), (n / 2 & 1) ^ 1);
        if (!t.n_readers) {
            mp_barrier_arrive(mp_shared(&sh.q_full[buffer]));
            break;
        }
        if (thread < t.n_readers) {
            sh.mask[buffer][thread] = r.mask;
            sh.window[buffer][thread] = r.lo | (uint32_t)r.hi << 16;
            sh.slot[buffer][thread] = r.slot;
            sh.delta[thread] = r.delta;
            sh.row[thread] = r.row;
        }
        mp_named_barrier(1, QUERY_THREADS);
        uint32_t q = mp_shared(sh.q[buffer]), unit = thread % UNITS;
#pragma unroll 4
        for (uint32_t row = thread / UNITS; row < t.n_readers * group; row += STEP) {
            uint32_t reader = row * inverse >> 16;
            uint32_t head = sh.row[reader] * a.n_heads + t.kv_head * group + (row - reader * group);
            uint32_t to = q + row / 8 * (D * 16) + mp_kv_offset(D, row % 8, unit * 8);
            mp_copy16(to, (const uint4 *)a.q + head * UNITS + unit, true);
        }
        mp_copy_commit();
        mp_copy_wait<0>();
        mp_named_barrier(1, QUERY_THREADS);
        mp_turn_tile<D>(sh.q[buffer], a.rope, t.n_readers, group, sh.delta, thread, QUERY_THREADS);
        mp_fence_async();
        mp_barrier_arrive(mp_shared(&sh.q_full[buffer]));
        mp_named_barrier(1, QUERY_THREADS); /* delta is read to the end before the next tile's */
    }
}

/* ---- Computing --------------------------------------------------------------------------------------------------- */

/* The state of rows lane / 4 and lane / 4 + 8 of the warp's 16. */
template <int D> struct state {
    float o[D / 2], l[4], top[2], m[2], f[2]; /* f: what o and l are to be scaled by */
    uint64_t mask[2];
    uint32_t window[2];
    uint32_t whole_from, whole_to; /* the stages that begin here all rows of the warp see whole */
};

/* Both rows see all 64 keys from `key` on. */
template <int D> __device__ __forceinline__ bool sees_all(const state<D> &st, uint32_t key, uint32_t shift) {
    uint64_t pages = shift >= 6 ? 1 : (1ull << (64u >> shift)) - 1;
    bool all = true;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        all = all && (st.window[h] & 0xffff) <= key && st.window[h] >> 16 >= key + 64;
        all = all && (~st.mask[h] >> (key >> shift) & pages) == 0;
    }
    return all;
}

template <int D>
__device__ __forceinline__ void hide_keys(const state<D> &st, float (&s)[32], uint32_t key, uint32_t shift) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint64_t bits = mp_seen(st.window[h], st.mask[h], key, shift) >> (threadIdx.x & 3) * 2;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (!(bits >> (i / 2 * 8 + i % 2) & 1)) s[i / 2 * 4 + 2 * h + i % 2] = -CUDART_INF_F;
        }
    }
}

/* From S to weights; the state's maximum, and the factor for o and l. */
template <int D> __device__ __forceinline__ void weigh(state<D> &st, float (&s)[32], float c) {
    float part[2][4], top[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 4; i++) part[h][i] = fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]);
#pragma unroll
        for (int i = 4; i < 8; i++) {
            part[h][i & 3] = fmaxf(part[h][i & 3], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        }
        top[h] = fmaxf(fmaxf(fmaxf(part[h][0], part[h][1]), fmaxf(part[h][2], part[h][3])), st.top[h]);
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
        float other[2] = { __shfl_xor_sync(~0u, top[0], lanes), __shfl_xor_sync(~0u, top[1], lanes) };
        top[0] = fmaxf(top[0], other[0]);
        top[1] = fmaxf(top[1], other[1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float m = mp_row_max(top[h], c);
        st.f[h] = mp_rescale(st.top[h], st.m[h], m);
        st.top[h] = top[h];
        st.m[h] = m;
#pragma unroll
        for (int i = 0; i < 16; i++) s[i / 2 * 4 + 2 * h + i % 2] = mp_weight(s[i / 2 * 4 + 2 * h + i % 2], c, m);
    }
}

template <int D> __device__ __forceinline__ void scale(state<D> &st) {
    if (__all_sync(~0u, st.f[0] == 1.0f && st.f[1] == 1.0f)) return; /* seldom, later on, does a maximum move */
#pragma unroll
    for (int h = 0; h < 4; h++) st.l[h] = __fmul_rn(st.l[h], st.f[h / 2]);
#pragma unroll
    for (int i = 0; i < D / 2; i++) st.o[i] = __fmul_rn(st.o[i], st.f[i / 2 % 2]);
}

/* One row's 32 columns, spread over four lanes by twos, to 8 columns a lane. */
__device__ __forceinline__ uint4 gather_columns(uint32_t x[4]) {
    uint32_t lane = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(~0u, lane & 1 ? x[i] : x[i + 1], 1);
        if (lane & 1) x[i] = got;
        else x[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t got = __shfl_xor_sync(~0u, lane & 2 ? x[i] : x[i + 2], 2);
        if (lane & 2) x[i] = got;
        else x[i + 2] = got;
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

/* at[h]: partial state of the row, or ~0. */
template <int D>
__device__ __forceinline__ void store(const mp_cu_attend &a, const state<D> &st, const uint32_t at[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = st.l[2 * h], inverse = mp_inverse(l);
        bool there = at[h] != ~0u;
        if (there && (threadIdx.x & 3) == 0) ((float2 *)a.partial_ml)[at[h]] = make_float2(st.m[h], l);
#pragma unroll
        for (int g = 0; g < D / 32; g++) {
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *o = &st.o[(g * 4 + i) * 4 + 2 * h];
                __half2 pair = mp_partial(o[0], o[1], inverse);
                x[i] = *(const uint32_t *)&pair;
            }
            uint4 columns = gather_columns(x);
            if (there) *(uint4 *)(a.partial_o + (size_t)at[h] * D + g * 32 + (threadIdx.x & 3) * 8) = columns;
        }
    }
}

template <int D, bool FP8> __device__ __forceinline__ void hand_back(shared<D, FP8> &sh, uint32_t slot) {
    mp_barrier_arrive(mp_shared(&sh.empty[slot]));
}

/* Starts S of a stage. */
template <int D, bool FP8> __device__ __forceinline__ void start_scores(float (&s)[32], uint32_t q, uint32_t kv) {
    uint64_t qm = mp_matrix(q, D * 16, 0), km = mp_matrix(kv, shared<D, FP8>::GROUP, 0);
    mp_hold(s);
    mp_products_begin();
#pragma unroll
    for (int d = 0; d < D; d += 16) { /* 64 columns are 1,024 bytes of 8 rows, 16 of them 32 bytes of a row */
        uint32_t at = (d / 64 * 1024 + d % 64 * 2) >> 4;
        mp_product_qk(s, qm + at, km + at, d > 0);
    }
    mp_products_commit();
}

/* Starts o and l of a stage. */
template <int D, bool FP8>
__device__ __forceinline__ void start_values(state<D> &st, const uint32_t (&p)[16], uint32_t kv, uint32_t ones) {
    uint64_t vm = mp_matrix(kv + D * 16, shared<D, FP8>::GROUP, 1024), om = mp_matrix_plain(ones, 128);
    mp_hold(st.o);
    mp_hold(st.l);
    mp_products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        mp_product_pv(st.o, &p[4 * k], vm + (k * 2 * shared<D, FP8>::GROUP >> 4), true);
        mp_product_sum(st.l, &p[4 * k], om);
    }
    mp_products_commit();
}

/* Weights of a stage whose S has arrived, in its place. busy: the warp has rows. */
template <int D>
__device__ __forceinline__ void weigh_stage(state<D> &st, float (&s)[32], uint32_t key, uint32_t shift, float c,
                                            bool busy) {
    mp_hold(s);
    if (!busy) return;
    bool whole = key >= st.whole_from && key < st.whole_to;
    if (!whole && !__all_sync(~0u, sees_all(st, key, shift))) hide_keys(st, s, key, shift);
    weigh(st, s, c);
}

/* What the walk over the stages of a tile carries. */
struct walk {
    uint32_t count; /* of all stages so far */
    uint32_t key, q, ones, shift, previous; /* previous: the slot whose V is being multiplied, or ~0 */
    float c;
    bool busy;
};

/* Weights of a stage whose S is there, while o of the one before may be under way; then o is ready for p. */
template <int D, bool FP8>
__device__ __forceinline__ void prepare_stage(state<D> &st, shared<D, FP8> &sh, walk &w, float (&s)[32],
                                              uint32_t (&p)[16]) {
    weigh_stage(st, s, w.key, w.shift, w.c, w.busy);
    mp_products_wait<0>();
    mp_hold(st.o);
    mp_hold(st.l);
    if (w.previous != ~0u) hand_back(sh, w.previous);
    scale(st);
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = mp_pack(s[2 * i], s[2 * i + 1]);
}

/* All stages of a tile. The next S is started together with o, and o is worked on while the next weights are made. */
template <int D, bool FP8>
__device__ __forceinline__ void attend_stages(state<D> &st, shared<D, FP8> &sh, walk &w, uint32_t end_key) {
    float s[32];
    uint32_t p[16], slot = w.count % sh.N_STAGES, kv = mp_shared(sh.kv[slot]);
    mp_barrier_wait(mp_shared(&sh.full[slot]), w.count / sh.N_STAGES & 1);
    start_scores<D, FP8>(s, w.q, kv);
    mp_products_wait<0>();
    for (; w.key + 64 < end_key; w.key += 64) {
        prepare_stage(st, sh, w, s, p);
        w.previous = slot;
        w.count++;
        slot = w.count % sh.N_STAGES;
        mp_barrier_wait(mp_shared(&sh.full[slot]), w.count / sh.N_STAGES & 1);
        start_scores<D, FP8>(s, w.q, mp_shared(sh.kv[slot]));
        start_values<D, FP8>(st, p, kv, w.ones);
        kv = mp_shared(sh.kv[slot]);
        mp_products_wait<1>();
    }
    prepare_stage(st, sh, w, s, p);
    w.count++;
    start_values<D, FP8>(st, p, kv, w.ones);
    mp_products_wait<0>();
    mp_hold(st.o);
    mp_hold(st.l);
    hand_back(sh, slot);
}

/* The tile's stages without work in them. A warpgroup stays in step with the others: the parity of a barrier tells one
 * phase from the next, not from the one after. */
template <int D, bool FP8>
__device__ __forceinline__ void pass_stages(shared<D, FP8> &sh, uint32_t count, uint32_t end) {
    for (; count < end; count++) {
        uint32_t slot = count % sh.N_STAGES;
        mp_barrier_wait(mp_shared(&sh.full[slot]), count / sh.N_STAGES & 1);
        hand_back(sh, slot);
    }
}

/* at: where the partial states go, ~0 for rows that are not there. */
template <int D, bool FP8>
__device__ __forceinline__ void open_state(const mp_cu_attend &a, const shared<D, FP8> &sh, const tile &t,
                                           uint32_t buffer, uint32_t first_row, state<D> &st, uint32_t at[2]) {
    uint32_t group = a.n_heads / a.n_kv_heads;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t row = first_row + (threadIdx.x & 31) / 4 + 8 * h, reader = row / group;
        bool there = reader < t.n_readers;
        if (!there) reader = 0;
        st.mask[h] = sh.mask[buffer][reader];
        st.window[h] = sh.window[buffer][reader];
        at[h] = there ? sh.slot[buffer][reader] * a.n_heads + t.kv_head * group + row - reader * group : ~0u;
        st.top[h] = -CUDART_INF_F;
        st.m[h] = 0.0f;
        st.f[h] = 1.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) st.o[i] = 0.0f;
    st.l[0] = st.l[1] = st.l[2] = st.l[3] = 0.0f;
    uint32_t from = max(st.window[0] & 0xffff, st.window[1] & 0xffff);
    uint32_t to = ~(st.mask[0] & st.mask[1]) ? 0 : min(st.window[0], st.window[1]) >> 16;
    st.whole_from = __reduce_max_sync(~0u, from);
    st.whole_to = __reduce_min_sync(~0u, to) & ~63u;
}

/* The warpgroups that compute. Tiles of up to 64 rows are taken in turns, so that the end of one and the beginning of
 * the next are computed together. */
template <int D, bool FP8> __device__ void attend_tiles(const mp_cu_attend &a, shared<D, FP8> &sh) {
    uint32_t wg = threadIdx.x / 128, count = 0;
    state<D> st;
    for (uint32_t n = 0;; n++) {
        uint32_t buffer = n & 1, at[2];
        mp_barrier_wait(mp_shared(&sh.q_full[buffer]), n / 2 & 1);
        tile t = sh.tiles[n % sh.N_TILES];
        if (!t.n_readers) break;
        uint32_t n_rows = t.n_readers * (a.n_heads / a.n_kv_heads), n_stages = t.end_stage - t.first_stage;
        bool large = n_rows > 64, mine = large ? wg * 64 < n_rows : wg == n % GROUPS;
        if (mine) {
            uint32_t first = large ? wg * 64 : 0, first_row = first + threadIdx.x / 32 % 4 * 16;
            open_state(a, sh, t, buffer, first_row, st, at);
            walk w = { count, t.first_stage * 64u, mp_shared(sh.q[buffer]) + first * D * 2, mp_shared(sh.ones),
                       31u - __clz(a.page_size), ~0u, __fmul_rn(a.scale, MP_LOG2E), first_row < n_rows };
            attend_stages(st, sh, w, t.end_stage * 64u);
        } else {
            pass_stages(sh, count, count + n_stages);
        }
        count += n_stages;
        mp_barrier_arrive(mp_shared(&sh.q_empty[buffer]));
        if (mine) store<D>(a, st, at);
    }
}

template <int D, bool FP8> __device__ void open_shared(shared<D, FP8> &sh) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < sh.N_STAGES; i++) {
            mp_barrier_init(mp_shared(&sh.full[i]), FP8 ? WIDEN_THREADS : 1);
            mp_barrier_init(mp_shared(&sh.empty[i]), GROUPS * 128);
        }
        for (int i = 0; i < 2; i++) {
            mp_barrier_init(mp_shared(&sh.q_full[i]), sh.QUERY_THREADS);
            mp_barrier_init(mp_shared(&sh.q_empty[i]), GROUPS * 128);
        }
        for (int i = 0; i < sh.N_TILES; i++) mp_barrier_init(mp_shared(&sh.taken[i]), 32);
        for (int i = 0; i < N_LISTS; i++) mp_barrier_init(mp_shared(&sh.copied[i]), 32);
        for (int i = 0; FP8 && i < sh.N_CODES; i++) {
            mp_barrier_init(mp_shared(&sh.codes_full[i]), 1);
            mp_barrier_init(mp_shared(&sh.codes_empty[i]), WIDEN_THREADS);
        }
        sh.issued = 0;
    }
    if (threadIdx.x < 64) sh.ones[threadIdx.x] = MP_BF16_ONES;
    mp_fence_async();
    __syncthreads();
}

template <int D, bool FP8>
__global__ void __launch_bounds__(THREADS, 1) attend_decode(const __grid_constant__ mp_cu_attend a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    shared<D, FP8> &sh = *(shared<D, FP8> *)memory;
    open_shared(sh);
    mp_let_next_begin(); /* the fold may start to wait */
    if (threadIdx.x >= GROUPS * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)FEED_REGISTERS));
        uint32_t warp = threadIdx.x / 32 - GROUPS * 4;
        if (warp == 0) {
            copy_stages(a, sh);
        } else if (warp == 1) {
            take_tiles(a, sh);
        } else if (!FP8 || warp < 4) {
            turn_queries(a, sh);
        } else if constexpr (FP8) {
            widen_stages(a, sh);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)COMPUTE_REGISTERS));
        attend_tiles(a, sh);
    }
}

template <int D, bool FP8> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t units = a->max_items * a->n_kv_heads, blocks = units < a->n_sm ? units : a->n_sm;
    return mp_launch_early(a->arch, attend_decode<D, FP8>, blocks, THREADS, sizeof(shared<D, FP8>), stream, *a);
}

template <int D, bool FP8> static cudaError_t open_kernel(void) {
    static_assert(sizeof(shared<D, FP8>) <= 232448, "all the shared memory a block may have");
    return cudaFuncSetAttribute(attend_decode<D, FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                sizeof(shared<D, FP8>));
}

} // namespace

cudaError_t mp_cu_attend_decode_sm90_open(void) {
    cudaError_t e = open_kernel<64, false>();
    if (e == cudaSuccess) e = open_kernel<64, true>();
    if (e == cudaSuccess) e = open_kernel<128, false>();
    return e == cudaSuccess ? open_kernel<128, true>() : e;
}

cudaError_t mp_cu_attend_decode_sm90(const mp_cu_attend *a, cudaStream_t stream) {
    if (a->fp8) return a->head_dim == 64 ? launch<64, true>(a, stream) : launch<128, true>(a, stream);
    return a->head_dim == 64 ? launch<64, false>(a, stream) : launch<128, false>(a, stream);
}

uint32_t mp_cu_attend_decode_sm90_readers(uint32_t group) {
    uint32_t rows = TILE_ROWS / group, most = TILE_READERS;
    return rows < most ? rows : most;
}
