/* Matrix products, by cuBLASLt or, where it is faster, by our own kernel for few rows (few_rows.h):
 * out[r, n] = sum over k of x[r, k] * w[n, k]; w [n_out, n_in] and x [rows, n_in] both bf16, or both e4m3: then the sum
 * over codes is multiplied by both rows' scales in fp32, before it is rounded or added.
 *
 * Same bits. The sum over k of one output must not depend on how many rows there are, so only algorithms that do not
 * split K are taken; for those the order along k is that of the tensor cores, whatever the tile. That is measured, not
 * promised by the library: at open a shape's bits are settled first, without a look at any time (our own kernel's, if
 * the library can continue them to many rows), and of the algorithms whose results for some rows, standing in several
 * places, have them bit by bit, the fastest is taken. So every open on such a device comes to the same bits, whoever
 * else keeps it busy. `same_bits` says whether there were such bits for each shape.
 *
 * Which algorithm is fastest depends on the shape and the number of rows, so each shape is measured at open for every
 * row bucket, with weights that come from memory as in a step. A run allocates nothing and may be captured in a graph.
 * Owned by the backend; one thread. */
#ifndef MEPIC_BACKEND_CUDA_MATMUL_H
#define MEPIC_BACKEND_CUDA_MATMUL_H

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "base/log.h"

typedef struct mp_cu_shape {
    const char *name;              /* "gate, up": for messages; borrowed */
    uint32_t n_out, n_in;          /* n_in a multiple of 8 */
    mp_cu_out out;
    bool e4m3;                     /* n_out and n_in are multiples of 16, n_in at most MP_CU_MAX_QUANTIZED */
    uint32_t max_rows;
    const mp_cu_matrix *weights;   /* [n_weights] of all layers, measured with in turn. Borrowed for open */
    uint32_t n_weights;
    bool library_only; /* without our own kernel for few rows: for comparison */
} mp_cu_shape;

/* Row buckets: 1, 2, 4, 8, 16, 32, 64, and from there a power of two or 1.5 times one. The least one >= n_rows > 0. */
uint32_t mp_cu_bucket(uint32_t n_rows);

/* Whether this device and library multiply e4m3 with a scale a row: compute capability 9.0, and no other so far. */
bool mp_cu_matmul_has_e4m3(const mp_cu_device *device);

typedef struct mp_cu_matmul mp_cu_matmul;

/* Measures: about a second for the shapes of a model. ERR_NOMEM, ERR_UNSUPPORTED, ERR_BROKEN. */
mepic_status mp_cu_matmul_open(mp_cu_device *device, const mp_cu_shape *shapes, uint32_t n_shapes, const mp_log *log,
                               mp_cu_matmul **out, mepic_error *err);
void mp_cu_matmul_close(mp_cu_matmul *m); /* NULL is a no-op; before the device's */

/* The product of shape i (as given to open) for n_rows <= max_rows, by the algorithm of their bucket. x, w, their
 * scales and out start at multiples of 16 bytes; x and out have room for the bucket of max_rows, and rows of out from
 * n_rows on are lost. What goes wrong is noted in the device; false then. */
bool mp_cu_matmul_run(mp_cu_matmul *m, uint32_t i, uint32_t n_rows, mp_cu_matrix x, mp_cu_matrix w, void *out,
                      cudaStream_t stream);

/* The bits of this library version's products on this device: of the results that were compared at open. */
uint32_t mp_cu_matmul_class(const mp_cu_matmul *m);
/* Whether the results of all algorithms in use agree for each shape, bit by bit. */
bool mp_cu_matmul_same_bits(const mp_cu_matmul *m);

/* What was measured, for benchmarks: candidates tried and time of the one taken, for the b-th bucket of shape i. False
 * at the end. */
typedef struct mp_cu_measured {
    uint32_t rows, n_candidates, n_differ; /* n_differ: of those whose bits were looked at, others than the shape's */
    float us;
} mp_cu_measured;
bool mp_cu_matmul_measured(const mp_cu_matmul *m, uint32_t i, uint32_t b, mp_cu_measured *out);

#endif
