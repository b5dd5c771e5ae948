/* Products of few rows on Hopper: out[r, n] = sum over k of x[r, k] * w[n, k], bound by reading w once; to the bits of
 * cuBLASLt's algorithms that do not split K, whatever the rows and however the product is cut.
 *
 *   bf16  the sum over k goes in order by 16 into one fp32 accumulator
 *   e4m3  the tensor cores sum 128 k at a time, these sums are added in fp32 from left to right, and the result is
 *         multiplied by the output's scale, then by the row's
 *
 * A launch may begin while kernels in front of it in the stream still run (early.cuh): until they have ended it reads
 * w alone, which no kernel writes. Nothing is kept on the device; a launch may be captured in a graph. */
#ifndef MEPIC_BACKEND_CUDA_FEW_ROWS_H
#define MEPIC_BACKEND_CUDA_FEW_ROWS_H

#include "backend/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MP_CU_FEW_ROWS_MAX 64u

typedef struct mp_cu_few_rows {
    void *describe; /* makes tensor maps; NULL: this device, driver or build has no such kernel */
    uint32_t n_sm;
} mp_cu_few_rows;

/* For the current device. Leaves `describe` NULL where the kernels cannot be used; that is no error. */
void mp_cu_few_rows_open(uint32_t n_sm, mp_cu_few_rows *out);
/* Their attributes; called by open. */
cudaError_t mp_cu_few_rows_bf16_open(void);
cudaError_t mp_cu_few_rows_e4m3_open(void);

/* How a product is cut. Plain numbers: equal ones are the same way. */
typedef struct mp_cu_few_plan {
    uint32_t rows;   /* computed: 8, 16, 32 or 64; 0: no plan */
    uint32_t width;  /* outputs of a tile: a multiple of 8, up to 256 */
    uint32_t blocks; /* of the grid */
    uint32_t passes; /* tiles of a block */
    uint32_t depth;  /* k of a stage, in 64 */
    uint32_t stages;
} mp_cu_few_plan;

/* stage: bytes of one, about. rows of the result are 0 where the kernel cannot do it. */
mp_cu_few_plan mp_cu_few_rows_plan(const mp_cu_few_rows *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows,
                                   uint32_t stage);

/* x [n_rows, n_in] and w [n_out, n_in] start at multiples of 16 bytes; n_rows <= plan->rows. */
cudaError_t mp_cu_few_rows_run(const mp_cu_few_rows *f, const mp_cu_few_plan *plan, uint32_t n_out, uint32_t n_in,
                               uint32_t n_rows, mp_cu_out kind, const mp_bf16 *x, const mp_bf16 *w, void *out,
                               cudaStream_t stream);

/* The same in e4m3, cut in one way. n_rows <= MP_CU_FEW_ROWS_MAX; n_out and n_in are multiples of 16; everything starts
 * at multiples of 16 bytes. */
cudaError_t mp_cu_few_rows_e4m3_run(const mp_cu_few_rows *f, uint32_t n_out, uint32_t n_in, uint32_t n_rows,
                                    mp_cu_out kind, mp_cu_matrix x, mp_cu_matrix w, void *out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
