/* Device memory for tests of CUDA kernels: every call is checked, and fails the test with its place. */
#ifndef MEPIC_TESTS_GPU_H
#define MEPIC_TESTS_GPU_H

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define GPU(call) gpu_check(call, #call, __FILE__, __LINE__)
static inline void gpu_check(cudaError_t error, const char *what, const char *file, int line) {
    if (error == cudaSuccess) return;
    print_error("%s: %s\n", what, cudaGetErrorString(error));
    _fail(file, line);
}

/* Waits for everything, so that an error is met where it arose. */
#define GPU_DONE(launch)                                                                                               \
    do {                                                                                                               \
        GPU(launch);                                                                                                   \
        GPU(cudaDeviceSynchronize());                                                                                  \
    } while (0)

/* Filled with `poison` bytes; 0xff makes NaN of bf16 and fp32. */
static inline void *gpu_new(size_t bytes, int poison) {
    void *p = NULL;
    GPU(cudaMalloc(&p, bytes ? bytes : 1));
    GPU(cudaMemset(p, poison, bytes));
    return p;
}

static inline void *gpu_put(const void *host, size_t bytes) {
    void *p = gpu_new(bytes, 0xff);
    GPU(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

/* A copy in host memory; free(). */
static inline void *gpu_get(const void *device, size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) abort();
    GPU(cudaMemcpy(p, device, bytes, cudaMemcpyDeviceToHost));
    return p;
}

static inline void gpu_free(void *p) {
    GPU(cudaFree(p));
}

#endif
