/* What the kernels for products of few rows share (few_rows_sm90.cu, few_rows_e4m3_sm90.cu): copies of boxes of a matrix,
 * and products with w as A, whose results stand as row_of and output_of say. */
#ifndef MEPIC_BACKEND_CUDA_FEW_ROWS_CUH
#define MEPIC_BACKEND_CUDA_FEW_ROWS_CUH

#include <cuda.h>

#include "backend/cuda/early.cuh"
#include "backend/cuda/few_rows.h"
#include "backend/cuda/mma.cuh"
#include "backend/cuda/wgmma.cuh"

enum {
    MP_FEW_GROUP = 64, /* outputs of a warpgroup */
    MP_FEW_WIDTH = 256, /* of a tile, at most */
    MP_FEW_STAGES = 32,
    MP_FEW_ALIGN = 1024,
    MP_FEW_CODE = 90, /* these kernels exist for 9.0 alone */
};

/* Of the stages of the ring. */
struct mp_few_barriers {
    uint64_t full[MP_FEW_STAGES], empty[MP_FEW_STAGES];
};

/* One thread; then a barrier of the block. */
static __device__ __forceinline__ void mp_few_open_barriers(uint32_t full, uint32_t empty, uint32_t n_stages,
                                                            uint32_t n_groups) {
    for (uint32_t i = 0; i < n_stages; i++) {
        mp_barrier_init(full + i * 8, 1);
        mp_barrier_init(empty + i * 8, n_groups * 4);
    }
    mp_fence_async();
}

static inline uint32_t mp_few_round_up(uint32_t x, uint32_t to) {
    return (x + to - 1) / to * to;
}

/* Threads of a block: warpgroups for `width` outputs, and the warp that copies. */
static inline uint32_t mp_few_threads(uint32_t width) {
    return (width + MP_FEW_GROUP - 1) / MP_FEW_GROUP * 128 + 32;
}

/* Of a matrix [n_rows, n_in] of `bytes` an element, boxes of 128 bytes by box_rows. */
static inline bool mp_few_map(const mp_cu_few_rows *f, CUtensorMapDataType type, uint32_t bytes, const void *from,
                              uint32_t n_rows, uint32_t n_in, uint32_t box_rows, CUtensorMap *map) {
    const cuuint64_t size[] = { n_in, n_rows }, stride[] = { (cuuint64_t)n_in * bytes };
    const cuuint32_t box[] = { 128 / bytes, box_rows }, step[] = { 1, 1 };
    auto encode = (decltype(&cuTensorMapEncodeTiled))f->describe;
    return encode(map, type, 2, (void *)from, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* For x, which every block wants; w passes through the caches once. */
static __device__ __forceinline__ uint64_t mp_policy_keep(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

static __device__ __forceinline__ void mp_copy_box(uint32_t to, const CUtensorMap *map, uint32_t k, uint32_t row,
                                                   uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(k), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

/* Which value this thread has at d[i]: row of x, and output of the warpgroup's 64. */
static __device__ __forceinline__ uint32_t mp_row_of(int i) {
    return i / 4 * 8 + (threadIdx.x & 3) * 2 + (i & 1);
}

static __device__ __forceinline__ uint32_t mp_output_of(int i) {
    return threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4 + (i & 2) * 4;
}

/* clang-format off */
#define MP_IO4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MP_IO8(i) MP_IO4(i), MP_IO4(i + 4)
#define MP_IO16(i) MP_IO8(i), MP_IO8(i + 8)
#define MP_D4 "%0, %1, %2, %3"
#define MP_D8 MP_D4 ", %4, %5, %6, %7"
#define MP_D16 MP_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MP_FEW_PRODUCT(n, kind, list, a, b, p, tail) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" n kind " {" list "}, " a ", " b ", p, 1, 1" tail ";\n}"
#define MP_FEW_MULTIPLY(N, n, kind, list, io, a, b, p, tail) \
    static __device__ __forceinline__ void multiply(float (&d)[N], uint64_t w, uint64_t x, bool add) { \
        asm volatile(MP_FEW_PRODUCT(n, kind, list, a, b, p, tail) : io : "l"(w), "l"(x), "r"((uint32_t)add)); \
    }
/* Defines multiply: d[64 outputs, 8 to 64 rows] (+)= w x^T; kind: k and types, as the instruction has them. */
#define MP_FEW_MULTIPLIES(kind, tail) \
    MP_FEW_MULTIPLY(4, "8", kind, MP_D4, MP_IO4(0), "%4", "%5", "%6", tail) \
    MP_FEW_MULTIPLY(8, "16", kind, MP_D8, MP_IO8(0), "%8", "%9", "%10", tail) \
    MP_FEW_MULTIPLY(16, "32", kind, MP_D16, MP_IO16(0), "%16", "%17", "%18", tail) \
    MP_FEW_MULTIPLY(32, "64", kind, MP_D32, MP_F32(d, 0), "%32", "%33", "%34", tail)
/* clang-format on */

#endif
