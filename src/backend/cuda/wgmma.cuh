/* Hopper's instructions as functions: barriers of shared memory, bulk copies, products of a warpgroup. sm_90a only. */
#ifndef MEPIC_BACKEND_CUDA_WGMMA_CUH
#define MEPIC_BACKEND_CUDA_WGMMA_CUH

#include <stdint.h>

#include "backend/cuda/fold.cuh"
#include "backend/cuda/mma.cuh"

/* ---- Barriers and copies ----------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void mp_barrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/* Speaks for the calling thread only: where lanes of a warp have read or written, all of them arrive, and all wait who
 * will. One lane for its warp, with __syncwarp, is not faster, and racecheck of compute-sanitizer does not follow it. */
static __device__ __forceinline__ void mp_barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and the phase also waits for so many bytes of bulk copies. */
static __device__ __forceinline__ void mp_barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Waits for the end of the phase with this parity; the caller is never two phases off. */
static __device__ __forceinline__ void mp_barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred p;\n"
                 "wait_%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra wait_%=;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Hints to L2: what is read once leaves before anything else does; what is read again soon stays. */
static __device__ __forceinline__ uint64_t mp_policy_once(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

static __device__ __forceinline__ uint64_t mp_policy_again(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* bytes from global to shared memory, both 16-byte aligned, counted by the barrier. */
static __device__ __forceinline__ void mp_bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                                    uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
                 "%4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

/* What this thread wrote to shared memory is seen by the products and copies that a barrier orders behind it. */
static __device__ __forceinline__ void mp_fence_async(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void mp_named_barrier(uint32_t name, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

/* ---- Keys and values --------------------------------------------------------------------------------------------- */

/* Copies n keys and their values, which lie together, to a stage; both begin with a group. What is behind the last key
 * of its group is left out of the values. */
template <int D>
static __device__ __forceinline__ void mp_copy_keys(uint32_t to, const uint8_t *from, uint32_t n, uint32_t barrier,
                                                    uint64_t policy) {
    const uint32_t whole = n / 8 * (32 * D), rest = n % 8;
    if (whole) mp_bulk_copy(to, from, whole, barrier, policy);
    if (!rest) return;
    mp_bulk_copy(to + whole, from + whole, 16 * D, barrier, policy);
#pragma unroll
    for (uint32_t panel = 16 * D; panel < 32 * D; panel += 1024) {
        mp_bulk_copy(to + whole + panel, from + whole + panel, rest * 128, barrier, policy);
    }
}

/* Bytes of it. */
template <int D> static __device__ __forceinline__ uint32_t mp_keys_bytes(uint32_t n) {
    return n * (4 * D) + (n % 8 ? (8 - n % 8) * (2 * D) : 0);
}

/* Zeros for the values of a stage behind its n keys: weights are 0 there, but 0 times a NaN left by others is not. By a
 * warp; then a barrier may let the products in. */
template <int D> static __device__ __forceinline__ void mp_clear_values(uint8_t *stage, uint32_t n) {
    for (uint32_t group = n / 8; group < 8; group++) {
        uint4 *v = (uint4 *)(stage + group * (32 * D) + 16 * D);
        for (uint32_t unit = threadIdx.x & 31; unit < D; unit += 32) {
            if (group * 8 + mp_kv_token<D>(unit) >= n) v[unit] = make_uint4(0, 0, 0, 0);
        }
    }
    mp_fence_async();
    __syncwarp();
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

/* A matrix in shared memory in the 128-byte swizzle. stride: bytes from 8 rows (of tokens) to the next 8; leading: from
 * 64 columns to the next 64, where columns are the product's N (V); else it is not looked at. */
static __device__ __forceinline__ uint64_t mp_matrix(uint32_t at, uint32_t stride, uint32_t leading) {
    return 1ull << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 | (at & 0x3ffff) >> 4;
}

static __device__ __forceinline__ void mp_products_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void mp_products_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int n> static __device__ __forceinline__ void mp_products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

/* Keeps the compiler from moving what is done with these registers across this line. */
template <int n> static __device__ __forceinline__ void mp_hold(float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(x[i])::"memory");
}

/* clang-format off */
#define MP_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MP_F32(d, i) MP_F8(d, i), MP_F8(d, i + 8), MP_F8(d, i + 16), MP_F8(d, i + 24)
#define MP_D32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MP_D64 MP_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
/* clang-format on */

/* d[64 rows, 64] (+)= a b^T, 16 columns of a [64, 16], in shared memory or in registers, and b [64, 16]. */
static __device__ __forceinline__ void mp_product_qk(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MP_D32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : MP_F32(d, 0)
                 : "l"(a), "l"(b), "r"((uint32_t)add));
}

static __device__ __forceinline__ void mp_product_qk(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MP_D32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : MP_F32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((uint32_t)add));
}

/* d[64 rows, 64 or 128] (+)= p v, with p [64, 16] in registers and v [16, 64 or 128]. */
static __device__ __forceinline__ void mp_product_pv(float (&d)[32], const uint32_t *p, uint64_t v, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MP_D32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
                 : MP_F32(d, 0)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"((uint32_t)add));
}

static __device__ __forceinline__ void mp_product_pv(float (&d)[64], const uint32_t *p, uint64_t v, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MP_D64
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
                 : MP_F32(d, 0), MP_F32(d, 32)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"((uint32_t)add));
}

/* l[64 rows, 8] += p b, with b [16, 8] in shared memory, not swizzled: two times 8 rows of 16 bytes. */
static __device__ __forceinline__ void mp_product_sum(float (&l)[4], const uint32_t *p, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
                 : "+f"(l[0]), "+f"(l[1]), "+f"(l[2]), "+f"(l[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b));
}

static __device__ __forceinline__ uint64_t mp_matrix_plain(uint32_t at, uint32_t stride) {
    return (uint64_t)(stride >> 4) << 32 | (uint64_t)(stride >> 4) << 16 | (at & 0x3ffff) >> 4;
}

#endif
