/* Products of few rows in e4m3 on Hopper, bound by reading w once: cuBLASLt has one algorithm for them, made for many
 * rows. As matmul.h has them, and to the library's bits: the tensor cores sum 128 k at a time, these sums are added in
 * fp32 from left to right, and the result is multiplied by the output's scale, then by the row's.
 *
 * A block's copies of w begin before the kernel in front of it has ended (programmatic dependent launch): weights
 * depend on nothing. Everything else is touched behind that kernel's end. Nothing is kept on the device. */
#ifndef MEPIC_BACKEND_CUDA_FEW_ROWS_E4M3_H
#define MEPIC_BACKEND_CUDA_FEW_ROWS_E4M3_H

#include "backend/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MP_CU_FEW_ROWS 64u

typedef struct mp_cu_few {
    void *describe; /* the driver's function that makes tensor maps; NULL: there is none */
    uint32_t n_sm;
} mp_cu_few;

/* Of the current device, which has compute capability 9.0. Leaves `describe` NULL where the kernel cannot be used; that
 * is no error. */
void mp_cu_few_open(uint32_t n_sm, mp_cu_few *out);

/* n_rows up to MP_CU_FEW_ROWS; n_out and n_in are multiples of 16; everything starts at multiples of 16 bytes. */
cudaError_t mp_cu_few_run(const mp_cu_few *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows, mp_cu_out kind,
                          mp_cu_matrix x, mp_cu_matrix w, void *out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
