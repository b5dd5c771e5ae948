/* Reads `bytes` of device memory once, for a benchmark's ceiling. */
#ifndef MEPIC_BENCH_CUDA_READ_H
#define MEPIC_BENCH_CUDA_READ_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t mp_bench_read(const void *from, size_t bytes, uint32_t n_sm, void *sink, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
