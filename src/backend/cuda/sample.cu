/* A row is sampled by a cluster of 1 to 8 blocks, each with a part of the vocabulary: they pass over the row in L2 a
 * few times, and sort only a list of the best candidates.
 *
 *   1. steps 1 to 3 in place, keeping what stood there
 *   2. the best token, and the bests of THREADS groups of tokens
 *   3. greedy: done. Nothing truncates: masses of segments, the one that the draw falls into, and its place there
 *   4. else: of the groups' bests the k-th is a bound that at least k candidates reach, and few more than k do; these
 *      are gathered and sorted, and top-k, top-p, min-p and the draw are prefix sums. k is top_k, or a guess
 *   5. where the guess left too little (a flat row): a histogram over all logits of masses and counts; each cut and the
 *      draw fall into a bin, whose candidates are gathered and sorted
 *   6. where a bin has too many (thousands of equal logits): bisection on (logit, id), a pass for two bits
 *
 * Masses are integers, so neither the order of adding nor the number of blocks changes anything. Candidates are
 * compared by one 64-bit number: the logit's bits in order, then the id's complement, so that larger is better and of
 * equal logits the smaller id. 0: no candidate. */
#include "backend/cuda/sample.h"

#include <cfloat>
#include <cooperative_groups.h>
#include <math_constants.h>

enum { THREADS = 1024, WARPS = THREADS / 32, LIST = 4096, BINS = 2048, MAX_BLOCKS = 8 };

#define ALL 0xffffffffu
#define RANGE 45.0f /* a candidate that is 2^45 times less probable than the best has no mass */

typedef unsigned long long u64;

/* ---- Numbers ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float usable(float x) {
    return x > FLT_MAX ? FLT_MAX : x == x ? x : -CUDART_INF_F;
}

/* Larger for larger x; 0 for -infinity, which is no candidate. -0 is 0. */
static __device__ __forceinline__ uint32_t order(float x) {
    uint32_t bits = __float_as_uint(x + 0.0f);
    return x == -CUDART_INF_F ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float logit_of(u64 candidate) {
    uint32_t key = (uint32_t)(candidate >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ u64 candidate_of(float x, uint32_t id) {
    uint32_t key = order(x);
    return key ? (u64)key << 32 | (uint32_t)~id : 0;
}

static __device__ __forceinline__ int32_t id_of(u64 candidate) {
    return (int32_t)~(uint32_t)candidate;
}

/* A row, its best logit, how weights follow from logits, and the block's part in it. */
typedef struct row {
    const float *x;
    uint32_t n;
    float top, scale; /* a weight is 2 to the power of (x - top) * scale */
    uint32_t rank, n_blocks;
} row;

#define LOG2E 1.4426950408889634f

/* The range is that of the exponent: what is less has no mass; -infinity too. */
static __device__ __forceinline__ float weight_of(const row &r, float x) {
    float z = (x - r.top) * r.scale, w;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(w) : "f"(z));
    return z > -RANGE ? w : 0.0f;
}

static __device__ __forceinline__ u64 mass_of(float weight) {
    return __float2ull_rn(weight * 0x1p44f);
}

/* ---- Over the blocks of a row ------------------------------------------------------------------------------------ */

/* What the first block tells the others. */
typedef struct verdict {
    u64 candidate, before, total;
    uint32_t bin, ok, hopeless;
} verdict;

/* Shared memory of a block. Lists and what is found from them are the first block's. */
typedef struct shared {
    u64 list[LIST];
    u64 part[WARPS];
    u64 segments[MAX_BLOCKS * WARPS]; /* masses of segments, from the last one down */
    u64 totals[2][MAX_BLOCKS];        /* of all blocks, in turn */
    u64 found;
    verdict told[2];                  /* in turn */
    uint32_t turn, n_list;
    uint32_t low[BINS], high[BINS], count[BINS]; /* masses in two halves: shared memory adds 32 bits at a time */
} shared;

/* The same variable in another block of the cluster. */
template <class T> static __device__ __forceinline__ T *of_block(T *p, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
    (void)rank; /* one block a row */
    return p;
#endif
}

static __device__ __forceinline__ void sync_blocks() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

static __device__ __forceinline__ u64 larger(u64 a, u64 b) {
    return a > b ? a : b;
}

template <bool SUM> static __device__ __forceinline__ u64 reduce_warp(u64 v) {
    for (int step = 16; step > 0; step /= 2) {
        u64 other = __shfl_xor_sync(ALL, v, step);
        v = SUM ? v + other : larger(v, other);
    }
    return v;
}

/* Sum, or maximum, of the values of all threads of all blocks; everybody gets it. */
template <bool SUM> static __device__ u64 reduce(const row &r, u64 v, shared *s) {
    v = reduce_warp<SUM>(v);
    if (threadIdx.x % 32 == 0) s->part[threadIdx.x / 32] = v;
    __syncthreads();
    v = reduce_warp<SUM>(s->part[threadIdx.x % 32]);
    uint32_t turn = s->turn;
    if (threadIdx.x < r.n_blocks) of_block(s->totals[turn], threadIdx.x)[r.rank] = v;
    sync_blocks(); /* nobody is so far ahead that it writes to this turn's places before all have read them */
    if (threadIdx.x == 0) s->turn = 1 - turn;
    v = 0;
    for (uint32_t b = 0; b < r.n_blocks; b++) v = SUM ? v + s->totals[turn][b] : larger(v, s->totals[turn][b]);
    __syncthreads();
    return v;
}

/* Sum of the values of all threads of this block before this one; *total: of all. */
static __device__ u64 sum_before(u64 v, u64 *total, shared *s) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = v;
    for (uint32_t step = 1; step < 32; step *= 2) {
        u64 other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) s->part[warp] = sum;
    __syncthreads();
    u64 before = 0, all = 0;
    for (uint32_t w = 0; w < WARPS; w++) {
        if (w == warp) before = all;
        all += s->part[w];
    }
    __syncthreads();
    *total = all;
    return before + sum - v;
}

/* Tells all threads of this block what the one that has `mine` has; `none` without one. */
static __device__ u64 tell(bool mine, u64 v, u64 none, shared *s) {
    if (threadIdx.x == 0) s->found = none;
    __syncthreads();
    if (mine) s->found = v;
    __syncthreads();
    v = s->found;
    __syncthreads();
    return v;
}

/* Tells all blocks what the first one found: every thread of it calls with the same. */
static __device__ verdict announce(const row &r, const verdict &v, shared *s) {
    uint32_t turn = s->turn;
    if (r.rank == 0 && threadIdx.x < r.n_blocks) *of_block(&s->told[turn], threadIdx.x) = v;
    sync_blocks();
    if (threadIdx.x == 0) s->turn = 1 - turn;
    verdict told = s->told[turn];
    __syncthreads();
    return told;
}

/* Ids of a warp's segment; the segments of a block are neighbours. */
static __device__ __forceinline__ uint32_t segment_length(const row &r) {
    return (r.n + THREADS * r.n_blocks - 1) / (THREADS * r.n_blocks) * 32;
}

/* Walks over the block's part: every warp its segment, each lane its ids upwards, many loads under way. */
template <class F> static __device__ __forceinline__ void walk(const row &r, F each) {
    enum { AT_ONCE = 8 };
    uint32_t length = segment_length(r), first = (r.rank * WARPS + threadIdx.x / 32) * length, end = first + length;
    if (end > r.n) end = r.n;
    uint32_t i = first + threadIdx.x % 32;
    for (; i + (AT_ONCE - 1) * 32 < end; i += AT_ONCE * 32) {
        float v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) v[j] = r.x[i + j * 32];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) each(usable(v[j]), i + j * 32);
    }
    for (; i < end; i += 32) each(usable(r.x[i]), i);
}

/* Sorts list[n], n a power of two up to LIST, the largest first (bitonic). Where partners are at most 32 apart, a warp
 * keeps to 64 neighbours. */
static __device__ void sort(u64 *list, uint32_t n) {
    for (uint32_t size = 2; size <= n; size *= 2) {
        for (uint32_t step = size / 2; step > 0; step /= 2) {
            for (uint32_t i = threadIdx.x; i < n / 2; i += THREADS) {
                uint32_t a = 2 * i - (i & (step - 1)), b = a + step;
                u64 x = list[a], y = list[b];
                if ((x < y) == ((a & size) == 0)) {
                    list[a] = y;
                    list[b] = x;
                }
            }
            if (step > 32 || (step == 1 && size > 32)) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

/* ---- Draws ------------------------------------------------------------------------------------------------------- */

/* Where a draw from `mass` falls: the first candidate whose masses up to it, itself included, are more than that. */
static __device__ __forceinline__ u64 aim(const mp_cu_draw &d, u64 mass) {
    return __umul64hi(d.random & ~(u64)0x7ff, mass);
}

/* Nothing truncates: from the largest id down. The first block's answer counts. */
static __device__ int32_t draw_by_id(const row &r, const mp_cu_draw &d, shared *s) {
    u64 mine = 0;
    walk(r, [&](float x, uint32_t) { mine += mass_of(weight_of(r, x)); });
    mine = reduce_warp<true>(mine);
    uint32_t n = r.n_blocks * WARPS;
    if (threadIdx.x % 32 == 0) of_block(s->segments, 0)[n - 1 - r.rank * WARPS - threadIdx.x / 32] = mine;
    sync_blocks();
    if (r.rank != 0) return 0;
    u64 part = threadIdx.x < n ? s->segments[threadIdx.x] : 0, mass;
    u64 at = sum_before(part, &mass, s), target = aim(d, mass);
    bool falls = at <= target && target < at + part;
    uint32_t w = (uint32_t)tell(falls, threadIdx.x, 0, s);
    u64 before = tell(falls, at, 0, s);
    uint32_t length = segment_length(r), first = (n - 1 - w) * length;
    uint32_t end = first + length < r.n ? first + length : r.n;
    const u64 none = ~(u64)0;
    u64 token = none;
    for (uint32_t done = 0; token == none && done < length; done += THREADS) { /* thread 0 has the rest's last id */
        uint32_t back = done + threadIdx.x;
        bool here = end > first && back < end - first;
        uint32_t id = here ? end - 1 - back : 0;
        u64 m = here ? mass_of(weight_of(r, usable(r.x[id]))) : 0, all;
        at = before + sum_before(m, &all, s);
        token = tell(at <= target && target < at + m, id, none, s);
        before += all;
    }
    return (int32_t)token;
}

/* Candidates for which `in` holds go to the first block's list; how many there are (more than LIST: not all are
 * listed). total: NULL, or for the mass of the whole row. */
template <class F> static __device__ __forceinline__ uint32_t gather(const row &r, F in, u64 *total, shared *s) {
    if (threadIdx.x == 0) s->n_list = 0;
    sync_blocks();
    uint32_t *n_list = of_block(&s->n_list, 0);
    u64 *list = of_block(s->list, 0), mine = 0;
    walk(r, [&](float x, uint32_t id) {
        if (total) mine += mass_of(weight_of(r, x));
        u64 c = candidate_of(x, id);
        if (c == 0 || !in(x, c)) return;
        uint32_t at = atomicAdd(n_list, 1u);
        if (at < LIST) list[at] = c;
    });
    if (total) *total = reduce<true>(r, mine, s);
    sync_blocks(); /* the list is complete */
    uint32_t n = *n_list;
    sync_blocks();
    return n;
}

/* The first block sorts its list of n. */
static __device__ void sort_list(uint32_t n, shared *s) {
    uint32_t size = 32;
    while (size < n) size *= 2;
    for (uint32_t i = n + threadIdx.x; i < size; i += THREADS) s->list[i] = 0;
    __syncthreads();
    sort(s->list, size);
}

/* The first block cuts a sorted list of n candidates and draws. Not ok: what is not in the list might be kept too. */
static __device__ verdict draw_from_list(const row &r, const mp_cu_draw &d, uint32_t n, u64 total, bool all,
                                         shared *s) {
    enum { EACH = LIST / THREADS };
    const bool by_mass = d.top_p > 0 && d.top_p < 1, by_count = d.top_k > 0;
    uint32_t limit = by_count && d.top_k < n ? d.top_k : n, first = threadIdx.x * EACH;
    float weight[EACH];
    u64 mass[EACH], mine = 0, listed;
    for (int j = 0; j < EACH; j++) {
        bool here = first + j < limit;
        weight[j] = here ? weight_of(r, logit_of(s->list[first + j])) : 0.0f;
        mass[j] = here ? mass_of(weight[j]) : 0;
        mine += mass[j];
    }
    u64 at = sum_before(mine, &listed, s);
    /* Top-p is a part of what top-k leaves, or of everything. */
    bool enough = all || (by_count && d.top_k <= n);
    double most = (double)d.top_p * (double)(by_count && enough ? listed : total);
    u64 kept = 0, sum;
    bool cut = false;
    for (int j = 0; j < EACH; j++) {
        bool keep = first + j < limit && !(weight[j] < d.min_p) && !(by_mass && (double)at >= most);
        at += mass[j];
        if (keep) {
            kept += mass[j];
        } else {
            cut = cut || first + j < limit;
            mass[j] = 0;
        }
    }
    /* A cut in the list means that nothing behind it is kept; by top-p only if its share is of the right whole. */
    bool cuts = __syncthreads_or(cut) && !(by_mass && by_count && !enough);
    u64 before = sum_before(kept, &sum, s), target = aim(d, sum), mark = 0;
    bool found = false;
    for (int j = 0; j < EACH; j++) {
        if (before <= target && target < before + mass[j]) {
            mark = s->list[first + j];
            found = true;
        }
        before += mass[j];
    }
    verdict v = {};
    v.candidate = tell(found, mark, 0, s);
    v.ok = enough || cuts;
    v.hopeless = by_mass && (double)listed < 0.8 * most;
    return v;
}

/* ---- Flat rows --------------------------------------------------------------------------------------------------- */

/* The largest c such that the candidates from c up have more mass (BY_COUNT: are more) than target. There are such. */
template <bool BY_COUNT> static __device__ u64 bisect(const row &r, u64 target, shared *s) {
    u64 c = 0;
    for (int bit = 62; bit >= 0; bit -= 2) {
        u64 sums[3] = { 0, 0, 0 }, tries[3];
        for (int t = 0; t < 3; t++) tries[t] = c | (u64)(t + 1) << bit;
        walk(r, [&](float x, uint32_t id) {
            u64 k = candidate_of(x, id);
            if (k < tries[0]) return;
            u64 m = BY_COUNT ? 1 : mass_of(weight_of(r, x));
            sums[0] += m;
            if (k >= tries[1]) sums[1] += m;
            if (k >= tries[2]) sums[2] += m;
        });
        for (int t = 0; t < 3; t++) sums[t] = reduce<true>(r, sums[t], s);
        for (int t = 2; t >= 0; t--) {
            if (sums[t] <= target) continue;
            c = tries[t];
            break;
        }
    }
    return c;
}

/* Mass of the candidates from `least` up that weigh at least min_p. */
static __device__ u64 mass_from(const row &r, u64 least, float min_p, shared *s) {
    u64 mine = 0;
    walk(r, [&](float x, uint32_t id) {
        float weight = weight_of(r, x);
        if (candidate_of(x, id) >= least && !(weight < min_p)) mine += mass_of(weight);
    });
    return reduce<true>(r, mine, s);
}

/* Bins fall with the logit; only what has mass is in one. */
static __device__ __forceinline__ uint32_t bin_of(const row &r, float x) {
    float z = (r.top - x) * r.scale;
    return z < RANGE ? min((uint32_t)(z * (BINS / RANGE)), BINS - 1u) : BINS;
}

static __device__ __forceinline__ u64 bin_mass(const shared *s, uint32_t bin) {
    return (u64)s->high[bin] << 32 | s->low[bin];
}

/* Masses and counts of all bins in the first block; *mass, *count: of all. */
static __device__ void fill_bins(const row &r, u64 *mass, u64 *count, shared *s) {
    for (uint32_t b = threadIdx.x; b < BINS; b += THREADS) s->low[b] = s->high[b] = s->count[b] = 0;
    __syncthreads();
    u64 sum = 0, n = 0;
    walk(r, [&](float x, uint32_t) {
        uint32_t bin = bin_of(r, x);
        u64 m = mass_of(weight_of(r, x));
        if (bin == BINS || m == 0) return;
        sum += m;
        n++;
        uint32_t low = (uint32_t)m, high = (uint32_t)(m >> 32);
        if (atomicAdd(&s->low[bin], low) + low < low) high++;
        if (high) atomicAdd(&s->high[bin], high);
        atomicAdd(&s->count[bin], 1u);
    });
    *mass = reduce<true>(r, sum, s); /* and a barrier: all bins are complete */
    *count = reduce<true>(r, n, s);
    if (r.rank == 0) {
        for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) {
            u64 m = 0;
            uint32_t c = 0;
            for (uint32_t b = 0; b < r.n_blocks; b++) {
                m += (u64)of_block(s->high, b)[bin] << 32 | of_block(s->low, b)[bin];
                c += of_block(s->count, b)[bin];
            }
            s->low[bin] = (uint32_t)m;
            s->high[bin] = (uint32_t)(m >> 32);
            s->count[bin] = c;
        }
    }
    sync_blocks();
}

/* The candidate that brings the mass (BY_COUNT: number) of the best ones above target, which is less than all of it;
 * *upto: mass of the candidates up to and with it. */
template <bool BY_COUNT> static __device__ u64 find(const row &r, u64 target, u64 *upto, shared *s) {
    verdict v = {};
    if (r.rank == 0) {
        uint32_t bin = threadIdx.x * 2;
        u64 mass[2] = { bin_mass(s, bin), bin_mass(s, bin + 1) }, count[2] = { s->count[bin], s->count[bin + 1] }, all;
        u64 masses = sum_before(mass[0] + mass[1], &all, s), counts = sum_before(count[0] + count[1], &all, s);
        bool mine = false;
        u64 before = 0;
        for (uint32_t j = 0; j < 2; j++) {
            u64 at = BY_COUNT ? counts : masses, end = at + (BY_COUNT ? count[j] : mass[j]);
            if (at <= target && target < end) {
                mine = true;
                v.bin = bin + j;
                before = masses;
                v.total = counts;
            }
            masses += mass[j];
            counts += count[j];
        }
        v.before = tell(mine, before, 0, s);
        v.bin = (uint32_t)tell(mine, v.bin, 0, s);
        v.total = tell(mine, v.total, 0, s);
        v.ok = s->count[v.bin] <= LIST;
    }
    v = announce(r, v, s);
    if (!v.ok) {
        u64 c = bisect<BY_COUNT>(r, target, s);
        *upto = mass_from(r, c, 0.0f, s);
        return c;
    }
    const uint32_t bin = v.bin;
    uint32_t n = gather(r, [&](float x, u64) { return bin_of(r, x) == bin && mass_of(weight_of(r, x)) > 0; }, NULL, s);
    if (r.rank == 0) {
        enum { EACH = LIST / THREADS };
        sort_list(n, s);
        uint32_t first = threadIdx.x * EACH;
        u64 mass[EACH], mine = 0, all;
        for (int j = 0; j < EACH; j++) {
            mass[j] = first + j < n ? mass_of(weight_of(r, logit_of(s->list[first + j]))) : 0;
            mine += mass[j];
        }
        u64 masses = v.before + sum_before(mine, &all, s), mark = 0, end = 0;
        bool found = false;
        for (int j = 0; j < EACH; j++) {
            u64 at = BY_COUNT ? v.total + first + j : masses;
            bool here = first + j < n && at <= target && target < at + (BY_COUNT ? 1 : mass[j]);
            masses += mass[j];
            if (!here) continue;
            found = true;
            mark = s->list[first + j];
            end = masses;
        }
        v.candidate = tell(found, mark, 0, s);
        v.before = tell(found, end, 0, s);
    }
    v = announce(r, v, s);
    *upto = v.before;
    return v.candidate;
}

/* Every cut keeps the best down to some candidate, so what all keep has the least of their masses. */
static __device__ u64 draw_flat(const row &r, const mp_cu_draw &d, shared *s) {
    u64 kept, count, upto;
    fill_bins(r, &kept, &count, s);
    if (d.top_k > 0 && d.top_k < count) find<true>(r, d.top_k - 1, &kept, s);
    if (d.top_p > 0 && d.top_p < 1) {
        u64 most = __double2ull_ru((double)d.top_p * (double)kept);
        find<false>(r, most > 0 ? most - 1 : 0, &upto, s);
        kept = min(kept, upto);
    }
    if (d.min_p > 0) kept = min(kept, mass_from(r, 0, d.min_p, s));
    return find<false>(r, aim(d, kept), &upto, s);
}

/* ---- A row ------------------------------------------------------------------------------------------------------- */

/* Something truncates. `best`: this thread's own. */
static __device__ int32_t draw_truncated(const row &r, const mp_cu_draw &d, u64 best, shared *s) {
    for (uint32_t step = 1; step < r.n_blocks; step *= 2) best = larger(best, __shfl_xor_sync(ALL, best, step));
    uint32_t groups = THREADS / r.n_blocks;
    if (threadIdx.x % r.n_blocks == 0) of_block(s->list, 0)[r.rank * groups + threadIdx.x / r.n_blocks] = best;
    sync_blocks();
    uint32_t guesses[2] = { 256, 1000 };
    if (d.top_k > 0 && d.top_k <= THREADS) guesses[0] = guesses[1] = d.top_k;
    verdict v = {};
    if (r.rank == 0) {
        sort(s->list, THREADS);
        v.candidate = s->list[guesses[0] - 1];
        v.before = s->list[guesses[1] - 1];
    }
    v = announce(r, v, s);
    const uint32_t bounds[2] = { (uint32_t)(v.candidate >> 32), (uint32_t)(v.before >> 32) };
    for (int i = 0; i < 2; i++) {
        if (i > 0 && bounds[1] == bounds[0]) break;
        u64 total;
        uint32_t n = gather(r, [&](float, u64 c) { return (uint32_t)(c >> 32) >= bounds[i]; }, &total, s);
        if (n > LIST) break;
        if (r.rank == 0) {
            sort_list(n, s);
            /* Bound 0: fewer groups than that have a candidate at all, so nobody is left out. */
            v = draw_from_list(r, d, n, total, bounds[i] == 0, s);
        }
        v = announce(r, v, s);
        if (v.ok) return id_of(v.candidate);
        if (v.hopeless) break; /* a few more candidates will not do */
    }
    return id_of(draw_flat(r, d, s));
}

/* This thread's best; *top: the row's. */
static __device__ u64 best_of(const row &r, u64 *top, shared *s) {
    u64 best = 0;
    walk(r, [&](float x, uint32_t id) { best = larger(best, candidate_of(x, id)); });
    *top = reduce<false>(r, best, s);
    return best;
}

/* The token that was sampled last, where it is penalized by what the host did not know; `in_list`: the row has an
 * adjustment of it, so that the one of MP_CU_LAST has no token. Else -1. */
typedef struct last_token {
    int32_t token;
    bool in_list;
} last_token;

static __device__ last_token last_of(const mp_cu_draw &d, const mp_cu_adjust *adjusts, const int32_t *tokens) {
    last_token last = { d.penalizes_last ? tokens[d.seq] : -1, false };
    if (!d.penalizes_last) return last;
    bool found = false;
    for (uint32_t i = threadIdx.x; i < d.n_adjust; i += THREADS) {
        found = found || adjusts[d.first_adjust + i].token == last.token;
    }
    last.in_list = __syncthreads_or(found);
    return last;
}

/* Calls each(i, token) for the adjustments of tokens in this block's part. */
template <class F> static __device__ void for_adjusts(const row &r, const mp_cu_draw &d, const mp_cu_adjust *adjusts,
                                                      const last_token &last, F each) {
    uint32_t part = segment_length(r) * WARPS;
    for (uint32_t i = d.first_adjust + threadIdx.x; i < d.first_adjust + d.n_adjust; i += THREADS) {
        int32_t token = adjusts[i].token;
        if (token == MP_CU_LAST && last.in_list) continue;
        if (token == MP_CU_LAST) token = last.token;
        if ((uint32_t)token / part == r.rank) each(i, (uint32_t)token);
    }
    __syncthreads();
}

/* Adjustment i, of a token that may be the last. */
static __device__ mp_cu_adjust adjust_at(const mp_cu_draw &d, const mp_cu_adjust *adjusts, const last_token &last,
                                         uint32_t i) {
    mp_cu_adjust a = adjusts[i];
    if (d.penalizes_last && a.token == last.token) {
        a.repeat = d.last_repeat;
        a.minus = a.more;
    } else if (a.token == MP_CU_LAST) {
        a.repeat = d.last_repeat;
        a.minus = d.last_minus;
    }
    return a;
}

static __global__ void __launch_bounds__(THREADS, 1)
    sample_rows(const mp_cu_draw *draws, const mp_cu_adjust *adjusts, float *saved, float *logits, uint32_t n_vocab,
                uint32_t n_blocks, mp_sampled *out, int32_t *tokens) {
    extern __shared__ uint4 memory[];
    shared *s = (shared *)memory;
    __shared__ mp_cu_draw draw; /* read once: it may lie on the other side of the bus */
    if (threadIdx.x == 0) draw = draws[blockIdx.x / n_blocks];
    __syncthreads();
    const mp_cu_draw d = draw;
    float *x = logits + (size_t)d.logits * n_vocab, norm = 0.0f;
    row r = { x, n_vocab, 0.0f, LOG2E, blockIdx.x % n_blocks, n_blocks };
    u64 top;
    if (threadIdx.x == 0) s->turn = 0;
    sync_blocks(); /* nobody writes to a block that has not begun */
    if (d.logprob) {
        best_of(r, &top, s);
        r.top = logit_of(top);
        norm = r.top + logf((float)mass_from(r, 0, 0.0f, s) * 0x1p-44f); /* not used without a candidate */
    }
    const last_token last = last_of(d, adjusts, tokens);
    for_adjusts(r, d, adjusts, last, [&](uint32_t i, uint32_t token) {
        mp_cu_adjust a = adjust_at(d, adjusts, last, i);
        saved[i] = x[token];
        float v = usable(saved[i]);
        if (a.repeat != 1.0f) v = v > 0 ? __fdiv_rn(v, a.repeat) : __fmul_rn(v, a.repeat);
        x[token] = __fadd_rn(__fsub_rn(v, a.minus), a.bias);
    });
    r.scale = fminf(LOG2E / d.temperature, FLT_MAX); /* infinity times 0 would be no number */
    u64 best = best_of(r, &top, s);
    r.top = logit_of(top);
    int32_t token = top ? id_of(top) : -1;
    if (top && d.temperature > 0) {
        bool truncates = d.top_k > 0 || d.min_p > 0 || (d.top_p > 0 && d.top_p < 1);
        token = truncates ? draw_truncated(r, d, best, s) : draw_by_id(r, d, s);
    }
    sync_blocks(); /* the first one has looked at all it needs */
    for_adjusts(r, d, adjusts, last, [&](uint32_t i, uint32_t id) { x[id] = saved[i]; });
    sync_blocks();
    if (r.rank == 0 && threadIdx.x == 0) {
        out[blockIdx.x / n_blocks] = (mp_sampled){ token, d.logprob && token >= 0 ? usable(x[token]) - norm : 0.0f };
        tokens[d.seq] = token >= 0 ? token : 0;
    }
}

cudaError_t mp_cu_sample_open(void) {
    return cudaFuncSetAttribute(sample_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(shared));
}

cudaError_t mp_cu_sample_rows(const mp_cu_draw *draws, uint32_t n, const mp_cu_adjust *adjusts, float *saved,
                              float *logits, uint32_t n_vocab, uint32_t n_blocks, mp_sampled *out, int32_t *tokens,
                              cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = n_blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(n * n_blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = sizeof(shared);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = n_blocks > 1;
    return cudaLaunchKernelEx(&config, sample_rows, draws, adjusts, saved, logits, n_vocab, n_blocks, out,
                              tokens);
}
