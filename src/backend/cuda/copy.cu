/* A step's lists, read from pinned host memory by a kernel: one launch in front of a step takes less of the device's
 * time than a copy for each list. */
#include "backend/cuda/kernels.h"

enum { THREADS = 256, BLOCKS = 32 }; /* blocks a piece */

static __global__ void copy_pieces(mp_cu_pieces p) {
    const mp_cu_piece piece = p.pieces[blockIdx.y];
    uint32_t n_units = piece.n_words / 4, at = blockIdx.x * THREADS + threadIdx.x;
    for (uint32_t i = at; i < n_units; i += BLOCKS * THREADS) ((uint4 *)piece.to)[i] = ((const uint4 *)piece.from)[i];
    uint32_t rest = n_units * 4 + at; /* not a word more: what lies behind stays as it is */
    if (rest < piece.n_words && at < 4) ((uint32_t *)piece.to)[rest] = ((const uint32_t *)piece.from)[rest];
}

cudaError_t mp_cu_copy_pieces(const mp_cu_pieces *p, cudaStream_t stream) {
    if (p->n == 0) return cudaSuccess;
    copy_pieces<<<dim3(BLOCKS, p->n), THREADS, 0, stream>>>(*p);
    return cudaGetLastError();
}
