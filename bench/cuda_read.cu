/* The rate at which the card reads memory: what nothing that reads its data once can pass. */
#include "bench/cuda_read.h"

static __global__ void read_all(const uint4 *from, size_t n, uint32_t *sink) {
    enum { AT_ONCE = 8 };
    uint32_t any = 0;
    size_t step = (size_t)gridDim.x * blockDim.x, i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    for (; i + (AT_ONCE - 1) * step < n; i += AT_ONCE * step) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) v[j] = __ldcs(from + i + j * step);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) any |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (any == 0x12345678u) *sink = any; /* so that it is read */
}

cudaError_t mp_bench_read(const void *from, size_t bytes, uint32_t n_sm, void *sink, cudaStream_t stream) {
    read_all<<<n_sm * 4, 512, 0, stream>>>((const uint4 *)from, bytes / sizeof(uint4), (uint32_t *)sink);
    return cudaGetLastError();
}
