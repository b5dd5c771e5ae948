/* Programmatic dependent launch: a kernel begins while those before it end.
 *
 * A kernel that is launched early may run while any kernel in front of it in the stream still does, until it calls
 * mp_wait_for_inputs; then all of them have ended and what they wrote is there. Before that it reads only what no kernel
 * of its step writes (weights, tables, the step's lists, keys of earlier steps) and writes nothing. Every such kernel
 * waits, whatever it has to do: the kernel behind it counts on that. mp_let_next_begin allows the next kernel's blocks to
 * take what room there is; it says nothing about what this kernel has written. */
#ifndef MEPIC_BACKEND_CUDA_EARLY_CUH
#define MEPIC_BACKEND_CUDA_EARLY_CUH

#include <cuda_runtime.h>
#include <stdint.h>

static __device__ __forceinline__ void mp_wait_for_inputs(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void mp_let_next_begin(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Early where the code that runs on this device (code: mp_cu_device.code) was compiled with the above. */
template <typename... Params, typename... Args>
static cudaError_t mp_launch_early(uint32_t code, void (*kernel)(Params...), dim3 grid, uint32_t threads,
                                   size_t shared, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = code >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
