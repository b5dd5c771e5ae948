/* Products of few rows on Hopper.
 *
 * A block has `width` neighbouring outputs (then the next such tile, if they are more than the grid covers at once) and
 * all of k. One thread copies: a ring of stages, each `depth` panels of 64 k of w and of x in the tensor cores'
 * 128-byte swizzle. A warpgroup multiplies 64 outputs by all rows: w is the product's A, x its B, so few rows cost
 * little. What lies behind a tile's last output is multiplied, too, whatever it is, and not stored: every output has
 * numbers of its own.
 *
 * The ring takes all the shared memory there is and is filled with w before the kernels in front have ended: 26 MB over
 * an H100, what memory delivers while they hand their rows on. */
#include <cuda_bf16.h>

#include "backend/cuda/few_rows.cuh"

namespace {

enum {
    PANEL = 64,         /* k */
    PANEL_BYTES = 128,  /* of a row */
    BEHIND = (MP_FEW_GROUP - 8) * PANEL_BYTES, /* bytes that may be read behind the last tile */
    MAX_MEMORY = 232448,
    MAX_DEPTH = 16,
};

struct params {
    uint32_t n_out, n_rows, n_panels;
    uint32_t width, passes, depth, n_stages;
    bool bf16;
    void *out;
};

enum { FIXED_MEMORY = sizeof(mp_few_barriers) + MP_FEW_ALIGN + BEHIND };

MP_FEW_MULTIPLIES("k16.f32.bf16.bf16", ", 0, 0")

/* ---- The ring ---------------------------------------------------------------------------------------------------- */

/* Where somebody is in the stages of a block: stage `i` of all, in pass `pass`, from panel `panel`, and its slot. */
template <int ROWS> struct place {
    uint32_t i, pass, panel, slot, round;

    __device__ __forceinline__ void next(const params &p) {
        i++;
        panel += p.depth;
        if (panel >= p.n_panels) {
            panel = 0;
            pass++;
        }
        if (++slot == p.n_stages) {
            slot = 0;
            round ^= 1;
        }
    }
    __device__ __forceinline__ uint32_t panels(const params &p) const {
        return min(p.depth, p.n_panels - panel);
    }
    __device__ __forceinline__ uint32_t w(const params &p, uint32_t memory) const {
        return memory + slot * p.depth * (p.width + ROWS) * PANEL_BYTES;
    }
    __device__ __forceinline__ uint32_t x(const params &p, uint32_t memory) const {
        return w(p, memory) + p.depth * p.width * PANEL_BYTES;
    }
};

struct ring {
    uint32_t memory, full, empty;
};

/* ---- Copying ----------------------------------------------------------------------------------------------------- */

/* The part of w: the barrier counts all that this stage will get. */
template <int ROWS>
__device__ __forceinline__ void copy_w(const params &p, const CUtensorMap *w, const ring &r, const place<ROWS> &at,
                                       uint64_t policy) {
    uint32_t n = at.panels(p), barrier = r.full + at.slot * 8, to = at.w(p, r.memory);
    uint32_t first = (at.pass * gridDim.x + blockIdx.x) * p.width;
    mp_barrier_expect(barrier, n * (p.width + ROWS) * PANEL_BYTES);
    for (uint32_t j = 0; j < n; j++) {
        mp_copy_box(to + j * p.width * PANEL_BYTES, w, (at.panel + j) * PANEL, first, barrier, policy);
    }
}

template <int ROWS>
__device__ __forceinline__ void copy_x(const params &p, const CUtensorMap *x, const ring &r, const place<ROWS> &at,
                                       uint64_t policy) {
    uint32_t n = at.panels(p), barrier = r.full + at.slot * 8, to = at.x(p, r.memory);
    for (uint32_t j = 0; j < n; j++) {
        mp_copy_box(to + j * ROWS * PANEL_BYTES, x, (at.panel + j) * PANEL, 0, barrier, policy);
    }
}

/* One thread. */
template <int ROWS>
__device__ void copy_stages(const params &p, const CUtensorMap *w, const CUtensorMap *x, const ring &r) {
    uint64_t once = mp_policy_once(), keep = mp_policy_keep();
    uint32_t total = p.passes * ((p.n_panels + p.depth - 1) / p.depth);
    place<ROWS> at_w = {}, at_x = {};
    mp_let_next_begin(); /* a product that comes next waits for shared memory, until this block ends */
    for (; at_w.i < min(total, p.n_stages); at_w.next(p)) copy_w(p, w, r, at_w, once);
    mp_wait_for_inputs();
    for (; at_x.i < at_w.i; at_x.next(p)) copy_x(p, x, r, at_x, keep);
    for (; at_w.i < total; at_w.next(p)) {
        mp_barrier_wait(r.empty + at_w.slot * 8, at_w.round ^ 1);
        copy_w(p, w, r, at_w, once);
        copy_x(p, x, r, at_w, keep);
    }
}

/* ---- Multiplying ------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void hand_back(const ring &r, uint32_t slot) {
    if ((threadIdx.x & 31) == 0) mp_barrier_arrive(r.empty + slot * 8);
}

template <int N>
__device__ __forceinline__ void store(const params &p, const float (&d)[N], uint32_t first, uint32_t end) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t n = first + mp_output_of(i);
        if (n >= end || mp_row_of(i) >= p.n_rows) continue;
        size_t at = (size_t)mp_row_of(i) * p.n_out + n;
        if (p.bf16) {
            ((__nv_bfloat16 *)p.out)[at] = __float2bfloat16_rn(d[i]);
        } else {
            ((float *)p.out)[at] = d[i];
        }
    }
}

/* What is added to: asked for before the products, which take longer than it does to come. */
template <int N>
__device__ __forceinline__ void load(const params &p, float (&before)[N], uint32_t first, uint32_t end) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t n = first + mp_output_of(i);
        uint32_t row = mp_row_of(i);
        before[i] = n < end && row < p.n_rows ? ((const float *)p.out)[(size_t)row * p.n_out + n] : 0.0f;
    }
}

template <int N> __device__ __forceinline__ void multiply_panel(float (&d)[N], uint64_t w, uint64_t x, bool add) {
    mp_products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(d, w + 2 * k, x + 2 * k, k > 0 || add);
    mp_products_commit();
}

template <int ROWS, bool ADD> __device__ void multiply_stages(const params &p, const ring &r, uint32_t group) {
    place<ROWS> at = {};
    float d[ROWS / 2], before[ROWS / 2];
    mp_wait_for_inputs();
    while (at.pass < p.passes) {
        uint32_t first = (at.pass * gridDim.x + blockIdx.x) * p.width, end = min(first + p.width, p.n_out), last = 0;
        if (ADD) load(p, before, first + group, end);
        do {
            uint64_t w = mp_matrix(at.w(p, r.memory) + group * PANEL_BYTES, 1024, 0);
            uint64_t x = mp_matrix(at.x(p, r.memory), 1024, 0);
            mp_barrier_wait(r.full + at.slot * 8, at.round);
            mp_hold(d);
            multiply_panel(d, w, x, at.panel > 0);
            mp_products_wait<1>(); /* the stage before */
            if (at.panel > 0) hand_back(r, last);
            for (uint32_t n = at.panels(p); n > 1; n--) {
                w += p.width * PANEL_BYTES >> 4;
                x += ROWS * PANEL_BYTES >> 4;
                multiply_panel(d, w, x, true);
            }
            last = at.slot;
            at.next(p);
        } while (at.panel > 0);
        mp_products_wait<0>();
        mp_hold(d);
        hand_back(r, last);
        asm volatile("" : "+r"(first)); /* places are computed again, not kept on the stack */
        if (ADD) {
#pragma unroll
            for (int k = 0; k < ROWS / 2; k++) d[k] = __fadd_rn(d[k], before[k]);
        }
        store(p, d, first + group, end);
    }
}

template <int ROWS, bool ADD>
__global__ void __launch_bounds__(4 * 128 + 32, 1)
    few_rows(const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x, const params p) {
    extern __shared__ uint8_t memory[];
    __shared__ mp_few_barriers b;
    uint32_t from = (mp_shared(memory) + MP_FEW_ALIGN - 1) / MP_FEW_ALIGN * MP_FEW_ALIGN;
    ring r = { from, mp_shared(b.full), mp_shared(b.empty) };
    uint32_t groups = blockDim.x / 128, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) mp_few_open_barriers(r.full, r.empty, p.n_stages, groups);
    __syncthreads();
    if (warp < groups * 4) {
        multiply_stages<ROWS, ADD>(p, r, warp / 4 * MP_FEW_GROUP);
    } else if (threadIdx.x % 32 == 0) {
        copy_stages<ROWS>(p, &w, &x, r);
    }
}

template <int ROWS> cudaError_t open_kernels(void) {
    const int most = MAX_MEMORY - (int)sizeof(mp_few_barriers);
    cudaError_t e = cudaFuncSetAttribute(few_rows<ROWS, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    return e != cudaSuccess
               ? e
               : cudaFuncSetAttribute(few_rows<ROWS, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <int ROWS>
cudaError_t launch(const mp_cu_few_plan *plan, mp_cu_out kind, const CUtensorMap &w, const CUtensorMap &x,
                   const params &p, cudaStream_t stream) {
    uint32_t threads = mp_few_threads(plan->width);
    size_t memory = MP_FEW_ALIGN + plan->stages * plan->depth * (plan->width + ROWS) * PANEL_BYTES + BEHIND;
    auto kernel = kind == MP_CU_OUT_ADD_F32 ? few_rows<ROWS, true> : few_rows<ROWS, false>;
    return mp_launch_early(MP_FEW_CODE, kernel, plan->blocks, threads, memory, stream, w, x, p);
}

} // namespace

cudaError_t mp_cu_few_rows_bf16_open(void) {
    cudaError_t e = open_kernels<8>();
    if (e == cudaSuccess) e = open_kernels<16>();
    if (e == cudaSuccess) e = open_kernels<32>();
    return e == cudaSuccess ? open_kernels<64>() : e;
}

void mp_cu_few_rows_open(uint32_t n_sm, mp_cu_few_rows *out) {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result;
    *out = { NULL, n_sm };
    bool ok = mp_cu_few_rows_bf16_open() == cudaSuccess && mp_cu_few_rows_e4m3_open() == cudaSuccess &&
              cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) ==
                  cudaSuccess;
    if (ok && result == cudaDriverEntryPointSuccess) {
        out->describe = found;
    } else {
        cudaGetLastError(); /* no fault of the device */
    }
}

mp_cu_few_plan mp_cu_few_rows_plan(const mp_cu_few_rows *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows,
                                   uint32_t stage) {
    mp_cu_few_plan p = {};
    uint32_t panels = (n_in + PANEL - 1) / PANEL;
    if (!f->describe || n_rows > MP_CU_FEW_ROWS_MAX || n_in % 8) return p;
    p.rows = n_rows <= 8 ? 8 : n_rows <= 16 ? 16 : n_rows <= 32 ? 32 : 64;
    do {
        p.passes++;
        p.width = mp_few_round_up((n_out + f->n_sm * p.passes - 1) / (f->n_sm * p.passes), 8);
    } while (p.width > MP_FEW_WIDTH);
    uint32_t tiles = (n_out + p.width - 1) / p.width, panel = (p.width + p.rows) * PANEL_BYTES;
    p.blocks = (tiles + p.passes - 1) / p.passes;
    p.depth = (stage + panel / 2) / panel;
    if (p.depth == 0) p.depth = 1;
    if (p.depth > MAX_DEPTH) p.depth = MAX_DEPTH;
    if (p.depth > panels) p.depth = panels;
    p.stages = (MAX_MEMORY - FIXED_MEMORY) / (p.depth * panel);
    if (p.stages > MP_FEW_STAGES) p.stages = MP_FEW_STAGES;
    return p;
}

cudaError_t mp_cu_few_rows_run(const mp_cu_few_rows *f, const mp_cu_few_plan *plan, uint32_t n_out, uint32_t n_in,
                               uint32_t n_rows, mp_cu_out kind, const mp_bf16 *x, const mp_bf16 *w, void *out,
                               cudaStream_t stream) {
    CUtensorMap wm, xm;
    if (n_rows == 0 || n_rows > plan->rows ||
        !mp_few_map(f, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, sizeof(mp_bf16), w, n_out, n_in, plan->width, &wm) ||
        !mp_few_map(f, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, sizeof(mp_bf16), x, n_rows, n_in, plan->rows, &xm)) {
        return cudaErrorInvalidValue;
    }
    const params p = { n_out,       n_rows,       (n_in + PANEL - 1) / PANEL, plan->width, plan->passes,
                       plan->depth, plan->stages, kind == MP_CU_OUT_BF16,     out };
    switch (plan->rows) {
    case 8: return launch<8>(plan, kind, wm, xm, p, stream);
    case 16: return launch<16>(plan, kind, wm, xm, p, stream);
    case 32: return launch<32>(plan, kind, wm, xm, p, stream);
    default: return launch<64>(plan, kind, wm, xm, p, stream);
    }
}
