/* Matrix products on the CPU: packed weights times rows of activations.
 *
 * Packing (once, at open): 32 outputs side by side are a panel; along the inputs a panel is a sequence of blocks of 32,
 * in which the codes of 16 outputs each are interleaved as pairs of 16-bit words at their native width, with their
 * scales behind. All threads read panels front to back. Only the outputs are split over threads, never the inputs.
 *
 * Activations: each block of 32 inputs of a row becomes int16 with one fp32 scale (max |x| / 32767). A block's product
 * is an exact integer; blocks are folded from left to right into one fp32 sum an output. That order is the same for one
 * row and for many and on every thread, so a row's result never depends on its company; F32, F16 and BF16 weights
 * multiply the fp32 activations, one input after the other, in the same way. 16-bit activations cost no more than 8-bit
 * ones where memory is the limit, and make the product as exact as the weights are. */
#ifndef MEPIC_BACKEND_CPU_MATMUL_H
#define MEPIC_BACKEND_CPU_MATMUL_H

#include "base/log.h"
#include "base/thread.h"
#include "model/gguf.h"

typedef struct mp_cpu_kernels mp_cpu_kernels; /* cpu/kernels.h */

/* A weight matrix [n_out, n_in], packed. */
typedef struct mp_packed mp_packed;
/* Bytes it takes, a multiple of 64. */
size_t mp_packed_size(const mp_tensor *weight);
/* Packs into `memory`: mp_packed_size bytes, zeroed, on a cache line, borrowed until close. One piece of memory for all
 * matrices of a model can be of huge pages, most matrices alone cannot: reading 576 x 576 at 4 bits from small pages
 * costs a fifth more. ERR_NOMEM only: the model has checked type and shape. */
mepic_status mp_packed_open(const mp_tensor *weight, mp_threads *threads, uint8_t *memory, mp_packed **out,
                            mepic_error *err);
void mp_packed_close(mp_packed *w); /* NULL is a no-op */
uint32_t mp_packed_outputs(const mp_packed *w);

/* Quantized activations of up to max_rows rows of up to max_in inputs; keeps a reference to the fp32 rows as well. */
typedef struct mp_qrows mp_qrows;
mepic_status mp_qrows_open(uint32_t max_rows, uint32_t max_in, mp_qrows **out, mepic_error *err);
void mp_qrows_close(mp_qrows *q);
/* x: [n_rows, n_in], borrowed until the last product with q. */
void mp_qrows_set(mp_qrows *q, const mp_cpu_kernels *kernels, mp_threads *threads, const float *x, uint32_t n_rows,
                  uint32_t n_in);

/* y[r][o] (+)= sum over i of w[o][i] * x[r][i], for up to 3 matrices with the same inputs at once (q, k, v; gate, up).
 * y[j]: [n_rows, mp_packed_outputs(w[j])], row-major. */
void mp_matmul(const mp_cpu_kernels *kernels, mp_threads *threads, const mp_packed *const *w, uint32_t n_w,
               const mp_qrows *q, float *const *y, bool add);

#endif
