/* Instructions of every GPU since sm_80 as functions: addresses of shared memory, asynchronous copies, loads and
 * products of a warp. */
#ifndef MEPIC_BACKEND_CUDA_MMA_CUH
#define MEPIC_BACKEND_CUDA_MMA_CUH

#include <cuda_bf16.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t mp_shared(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory; zeros when `there` is false. */
static __device__ __forceinline__ void mp_copy16(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

static __device__ __forceinline__ void mp_copy_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All but the last n groups of this thread have arrived. */
template <int n> static __device__ __forceinline__ void mp_copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

/* Four matrices of 8 x 8: lanes 8 i .. 8 i + 7 give the rows of the i-th, a lane gets two neighbours of row lane / 4 of
 * each; or, turned, of column lane / 4. */
static __device__ __forceinline__ void mp_load4(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

static __device__ __forceinline__ void mp_load4_turned(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

/* d += a b, 16x8x16: rows lane / 4 and lane / 4 + 8 of d, columns lane % 4 * 2 and the next. */
static __device__ __forceinline__ void mp_mma(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#define MP_BF16_ONES 0x3f803f80u /* a column of ones, in pairs */

static __device__ __forceinline__ uint32_t mp_pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&pair;
}

#endif
