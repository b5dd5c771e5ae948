/* The bias of keys at any angle, as a table for the kernels that read fp8 pages (mp_cu_key_bias). */
#ifndef MEPIC_BACKEND_CUDA_KEY_BIAS_H
#define MEPIC_BACKEND_CUDA_KEY_BIAS_H

#include "backend/cuda/kernels.h"

/* out [n_kv_heads * head_dim]: of the bias [n_kv_heads, head_dim] turned by rope, whose turns are host memory here. */
void mp_cu_key_bias_table(const mp_cu_rope *rope, const float *bias, uint32_t n_kv_heads, uint32_t head_dim,
                          mp_cu_key_bias *out);

#endif
