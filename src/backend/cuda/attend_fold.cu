/* The left fold of a decode row's partial states, in the order of its cells. A thread has 8 columns of one head. */
#include "backend/cuda/fold.cuh"
#include "backend/cuda/kernels.h"

enum { THREADS = 128, AHEAD = 8 /* slots under way */ };

static __device__ __forceinline__ void fold_slot(mp_running *state, float o[8], uint4 bits, float2 ml) {
    if (!(ml.y > 0.0f)) return;
    float keep, add;
    mp_fold(state, ml.x, ml.y, &keep, &add);
    const __half2 *x = (const __half2 *)&bits;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __half22float2(x[i]);
        o[2 * i] = mp_fold_o(o[2 * i], keep, pair.x, add);
        o[2 * i + 1] = mp_fold_o(o[2 * i + 1], keep, pair.y, add);
    }
}

static __global__ void __launch_bounds__(THREADS) attend_fold(const __grid_constant__ mp_cu_attend a) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory"); /* the decode kernel has ended */
#endif
    uint32_t units = a.head_dim / 8, width = a.n_heads * units;
    uint32_t index = blockIdx.x * THREADS + threadIdx.x, i = index / width, in = index - i * width;
    if (i >= a.work.counts->n_folds) return;
    mp_cu_fold fold = a.work.folds[i];
    const uint4 *partial = (const uint4 *)a.partial_o + (size_t)fold.first_slot * width + in;
    const float2 *ml = (const float2 *)a.partial_ml + (size_t)fold.first_slot * a.n_heads + in / units;
    mp_running state = { 0.0f, 0.0f };
    float o[8] = { 0.0f };
    for (uint32_t s = 0; s < fold.n_slots; s += AHEAD) {
        uint4 bits[AHEAD];
        float2 pair[AHEAD];
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++) {
            bool there = s + k < fold.n_slots;
            pair[k] = there ? ml[(size_t)(s + k) * a.n_heads] : make_float2(0.0f, 0.0f);
            bits[k] = there ? partial[(size_t)(s + k) * width] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++) fold_slot(&state, o, bits[k], pair[k]);
    }
    __nv_bfloat162 out[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        out[k] = __halves2bfloat162(mp_output(o[2 * k], state.l), mp_output(o[2 * k + 1], state.l));
    }
    ((uint4 *)a.out)[(size_t)fold.row * width + in] = *(const uint4 *)out;
}

cudaError_t mp_cu_attend_fold(const mp_cu_attend *a, cudaStream_t stream) {
    if (!a->max_folds) return cudaSuccess;
    uint32_t threads = a->max_folds * a->n_heads * (a->head_dim / 8);
    cudaLaunchAttribute early = { cudaLaunchAttributeProgrammaticStreamSerialization, { 0 }, { 0 } };
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = { dim3((threads + THREADS - 1) / THREADS), dim3(THREADS), 0, stream, &early, 0 };
    config.numAttrs = a->arch >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, attend_fold, *a);
}
