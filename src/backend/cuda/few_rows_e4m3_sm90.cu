/* Products of few rows in e4m3 on Hopper.
 *
 * A block has `width` neighbouring outputs and all of k. One thread copies: a ring of stages, each `depth` panels of
 * 128 k of w and of x in the tensor cores' 128-byte swizzle. A warpgroup multiplies 64 outputs by all rows: w is the
 * product's A, x its B, so a few rows cost little. What lies behind a tile's last output is multiplied, too, whatever
 * it is, and not stored: every output has numbers of its own. */
#include <cuda_bf16.h>

#include "backend/cuda/few_rows.cuh"

namespace {

enum {
    PANEL = 128,        /* k, and bytes of a row */
    MAX_DEPTH = 8,
    STAGE = 40 << 10,                     /* bytes of one, about: fewer, and copying is busy with waiting */
    BEHIND = (MP_FEW_GROUP - 8) * PANEL, /* bytes that may be read behind the last tile */
    MEMORY = 225 << 10,
};

struct params {
    uint32_t n_out, n_rows, n_panels;
    uint32_t width, depth, n_stages;
    mp_cu_out kind;
    const float *w_scales, *x_scales;
    void *out;
};

MP_FEW_MULTIPLIES("k32.f32.e4m3.e4m3", "")

/* ---- Copying ----------------------------------------------------------------------------------------------------- */

template <int ROWS> struct ring {
    uint32_t memory, full, empty;
    __device__ __forceinline__ uint32_t slot(const params &p, uint32_t i) const {
        return memory + i % p.n_stages * p.depth * (p.width + ROWS) * PANEL;
    }
};

/* Stage i's part of w: the barrier counts all that the stage will get. */
template <int ROWS>
__device__ __forceinline__ void copy_w(const params &p, const CUtensorMap *w, const ring<ROWS> &r, uint32_t i,
                                       uint64_t policy) {
    uint32_t first = i * p.depth, n = min(p.depth, p.n_panels - first), barrier = r.full + i % p.n_stages * 8;
    mp_barrier_expect(barrier, n * (p.width + ROWS) * PANEL);
    for (uint32_t j = 0; j < n; j++) {
        mp_copy_box(r.slot(p, i) + j * p.width * PANEL, w, (first + j) * PANEL, blockIdx.x * p.width, barrier, policy);
    }
}

template <int ROWS>
__device__ __forceinline__ void copy_x(const params &p, const CUtensorMap *x, const ring<ROWS> &r, uint32_t i,
                                       uint64_t policy) {
    uint32_t first = i * p.depth, n = min(p.depth, p.n_panels - first), barrier = r.full + i % p.n_stages * 8;
    uint32_t to = r.slot(p, i) + p.depth * p.width * PANEL;
    for (uint32_t j = 0; j < n; j++) mp_copy_box(to + j * ROWS * PANEL, x, (first + j) * PANEL, 0, barrier, policy);
}

/* One thread. */
template <int ROWS>
__device__ void copy_stages(const params &p, const CUtensorMap *w, const CUtensorMap *x, const ring<ROWS> &r) {
    uint64_t once = mp_policy_once(), keep = mp_policy_keep();
    uint32_t total = (p.n_panels + p.depth - 1) / p.depth, ahead = min(total, p.n_stages);
    for (uint32_t i = 0; i < ahead; i++) copy_w(p, w, r, i, once);
    mp_wait_for_inputs();
    for (uint32_t i = 0; i < ahead; i++) copy_x(p, x, r, i, keep);
    for (uint32_t i = ahead; i < total; i++) {
        mp_barrier_wait(r.empty + i % p.n_stages * 8, (i / p.n_stages & 1) ^ 1);
        copy_w(p, w, r, i, once);
        copy_x(p, x, r, i, keep);
    }
    mp_let_next_begin(); /* nothing is left to ask of memory */
}

/* ---- Multiplying ------------------------------------------------------------------------------------------------- */

/* What a sum is multiplied by and added to: asked for before the products, which take longer than it does to come, but
 * for what is added where that would need too many registers. */
template <int N> struct frame {
    static constexpr bool early = N < 32;
    float w[2], x[N / 2], before[early ? N : 1];
};

__device__ __forceinline__ float added_to(const params &p, uint32_t row, uint32_t n, uint32_t end) {
    bool there = p.kind == MP_CU_OUT_ADD_F32 && n < end && row < p.n_rows;
    return there ? ((const float *)p.out)[(size_t)row * p.n_out + n] : 0.0f;
}

template <int N>
__device__ __forceinline__ void load(const params &p, frame<N> &f, uint32_t first, uint32_t end) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t n = first + mp_output_of(i), row = mp_row_of(i);
        if (i < 4 && !(i & 1)) f.w[i / 2] = n < end ? p.w_scales[n] : 0.0f;
        if (!(i & 2)) f.x[i / 4 * 2 + (i & 1)] = row < p.n_rows ? p.x_scales[row] : 0.0f;
        if (frame<N>::early) f.before[i] = added_to(p, row, n, end);
    }
}

template <int N>
__device__ __forceinline__ void store(const params &p, const float (&d)[N], const frame<N> &f, uint32_t first,
                                      uint32_t end) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t n = first + mp_output_of(i);
        if (n >= end || mp_row_of(i) >= p.n_rows) continue;
        size_t at = (size_t)mp_row_of(i) * p.n_out + n;
        float before = frame<N>::early ? f.before[i] : added_to(p, mp_row_of(i), n, end);
        float y = __fmul_rn(__fmul_rn(d[i], f.w[i >> 1 & 1]), f.x[i / 4 * 2 + (i & 1)]);
        if (p.kind == MP_CU_OUT_ADD_F32) y = __fadd_rn(y, before);
        if (p.kind == MP_CU_OUT_BF16) {
            ((__nv_bfloat16 *)p.out)[at] = __float2bfloat16_rn(y);
        } else {
            ((float *)p.out)[at] = y;
        }
    }
}

/* The sum over a panel is the tensor cores', which round more than fp32 does; these sums are added in fp32. */
template <int ROWS> __device__ void multiply_tile(const params &p, const ring<ROWS> &r, uint32_t group) {
    uint32_t first = blockIdx.x * p.width, end = min(first + p.width, p.n_out);
    float d[ROWS / 2], sum[ROWS / 2];
    frame<ROWS / 2> f;
    mp_wait_for_inputs();
    load(p, f, first + group, end);
#pragma unroll
    for (int q = 0; q < ROWS / 2; q++) sum[q] = 0.0f;
    for (uint32_t i = 0, panel = 0; panel < p.n_panels; panel += p.depth, i++) {
        uint32_t n = min(p.depth, p.n_panels - panel), w = r.slot(p, i);
        mp_barrier_wait(r.full + i % p.n_stages * 8, i / p.n_stages & 1);
        uint64_t wm = mp_matrix(w + group * PANEL, 1024, 0), xm = mp_matrix(w + p.depth * p.width * PANEL, 1024, 0);
#pragma unroll 1
        for (uint32_t j = 0; j < n; j++) {
            mp_hold(d);
            mp_products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) multiply(d, wm + 2 * k, xm + 2 * k, k > 0);
            mp_products_commit();
            mp_products_wait<0>();
            mp_hold(d);
#pragma unroll
            for (int q = 0; q < ROWS / 2; q++) sum[q] = __fadd_rn(sum[q], d[q]);
            wm += p.width * PANEL >> 4;
            xm += ROWS * PANEL >> 4;
        }
        if (threadIdx.x % 32 == 0) mp_barrier_arrive(r.empty + i % p.n_stages * 8);
    }
    store(p, sum, f, first + group, end);
}

template <int ROWS>
__global__ void __launch_bounds__(4 * 128 + 32, 1)
    few_rows(const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x, const params p) {
    extern __shared__ uint8_t memory[];
    __shared__ mp_few_barriers b;
    uint32_t from = (mp_shared(memory) + MP_FEW_ALIGN - 1) / MP_FEW_ALIGN * MP_FEW_ALIGN;
    ring<ROWS> r = { from, mp_shared(b.full), mp_shared(b.empty) };
    uint32_t groups = blockDim.x / 128, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) mp_few_open_barriers(r.full, r.empty, p.n_stages, groups);
    __syncthreads();
    if (warp < groups * 4) {
        multiply_tile(p, r, warp / 4 * MP_FEW_GROUP);
    } else if (threadIdx.x % 32 == 0) {
        copy_stages(p, &w, &x, r);
    }
}

/* ---- Host -------------------------------------------------------------------------------------------------------- */

template <int ROWS> static cudaError_t open_kernel(void) {
    return cudaFuncSetAttribute(few_rows<ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, MEMORY);
}

/* How a product is cut: as many blocks as there are multiprocessors, or a multiple of that. */
static params plan_for(uint32_t n_sm, uint32_t rows, uint32_t n_out, uint32_t n_in) {
    params p = {};
    uint32_t blocks = 0;
    do {
        blocks += n_sm;
        p.width = mp_few_round_up((n_out + blocks - 1) / blocks, 8);
    } while (p.width > MP_FEW_WIDTH);
    uint32_t panel = (p.width + rows) * PANEL;
    p.n_panels = (n_in + PANEL - 1) / PANEL;
    p.depth = (STAGE + panel / 2) / panel;
    if (p.depth > p.n_panels) p.depth = p.n_panels;
    if (p.depth > MAX_DEPTH) p.depth = MAX_DEPTH;
    if (p.depth == 0) p.depth = 1;
    p.n_stages = (MEMORY - MP_FEW_ALIGN - BEHIND) / (p.depth * panel);
    if (p.n_stages > MP_FEW_STAGES) p.n_stages = MP_FEW_STAGES;
    return p;
}

template <int ROWS>
static cudaError_t run(const mp_cu_few_rows *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows, mp_cu_out kind,
                       mp_cu_matrix x, mp_cu_matrix w, void *out, cudaStream_t stream) {
    CUtensorMap wm, xm;
    params p = plan_for(f->n_sm, ROWS, n_out, n_in);
    p.n_out = n_out, p.n_rows = n_rows, p.kind = kind;
    p.w_scales = w.scales, p.x_scales = x.scales, p.out = out;
    if (!mp_few_map(f, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.data, n_out, n_in, p.width, &wm) ||
        !mp_few_map(f, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, x.data, n_rows, n_in, ROWS, &xm)) {
        return cudaErrorInvalidValue;
    }
    uint32_t threads = mp_few_threads(p.width);
    size_t memory = MP_FEW_ALIGN + p.n_stages * p.depth * (p.width + ROWS) * PANEL + BEHIND;
    uint32_t blocks = (n_out + p.width - 1) / p.width;
    return mp_launch_early(MP_FEW_CODE, few_rows<ROWS>, blocks, threads, memory, stream, wm, xm, p);
}

} // namespace

cudaError_t mp_cu_few_rows_e4m3_open(void) {
    cudaError_t e = open_kernel<8>();
    if (e == cudaSuccess) e = open_kernel<16>();
    if (e == cudaSuccess) e = open_kernel<32>();
    return e == cudaSuccess ? open_kernel<64>() : e;
}

cudaError_t mp_cu_few_rows_e4m3_run(const mp_cu_few_rows *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows,
                                    mp_cu_out kind, mp_cu_matrix x, mp_cu_matrix w, void *out, cudaStream_t stream) {
    if (n_rows == 0 || n_rows > MP_CU_FEW_ROWS_MAX) return cudaErrorInvalidValue;
    auto with = n_rows <= 8 ? run<8> : n_rows <= 16 ? run<16> : n_rows <= 32 ? run<32> : run<64>;
    return with(f, n_out, n_in, n_rows, kind, x, w, out, stream);
}
