/* What happens to single rows and heads between the matrix products, compiled once per instruction set. Every function
 * works on one vector: the caller splits rows over threads, so a row never depends on its company. */
#ifndef MEPIC_BACKEND_CPU_KERNELS_ROWS_H
#define MEPIC_BACKEND_CPU_KERNELS_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "model/model.h"

struct mp_row_kernels {
    /* y = x / sqrt(mean(x^2) + eps) * w, [n] each; y may be x. The mean: 64 lanes folded from left to right, then their
     * sum. */
    void (*norm)(const float *x, const float *w, float eps, uint32_t n, float *y);
    /* x += b, [n] */
    void (*add)(float *x, const float *b, uint32_t n);
    /* g = silu(g) * u, [n] */
    void (*swiglu)(float *g, const float *u, uint32_t n);
    /* y = x turned by the angle whose row of the rope table is cos_sin [2, n_pairs], times scale; [head_dim]. The first
     * 2 * n_pairs dimensions turn. y is not x. */
    void (*turn)(const float *x, const float *cos_sin, mp_rope_pairs pairs, uint32_t n_pairs, uint32_t head_dim,
                 float scale, float *y);
    /* Rounds k and v [head_dim] to the KV type and writes them as token `lane` of a group (cpu/slab.h). What is too
     * large for the type becomes its largest number: an infinity would make NaN of a masked key. By mepic_kv_type. */
    void (*store[4])(const float *k, const float *v, uint32_t head_dim, uint32_t lane, uint8_t *group);
};

extern const struct mp_row_kernels mp_row_kernels_portable;
#if defined(__x86_64__)
extern const struct mp_row_kernels mp_row_kernels_avx2;
extern const struct mp_row_kernels mp_row_kernels_avx512;
#endif

#endif
