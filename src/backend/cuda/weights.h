/* A model's weights as the CUDA backend multiplies by them: bf16 on the device, what is multiplied together fused; or,
 * where that is asked for, the matrices of the layers in e4m3, quantized from bf16 with a scale an output. A matrix of
 * a shape that e4m3 products do not take stays in bf16.
 *
 * One allocation. Matrices go through two pinned staging buffers, each with a stream of its own, so that reading the
 * file (on all threads), the bus and dequantizing overlap; the file's pages are let go as they are read. Owned by the
 * backend; immutable after open. */
#ifndef MEPIC_BACKEND_CUDA_WEIGHTS_H
#define MEPIC_BACKEND_CUDA_WEIGHTS_H

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "model/model.h"

/* Device memory; shapes [outputs, inputs], each starting at a multiple of 256 bytes. */
typedef struct mp_cu_layer {
    mp_cu_matrix wqkv;             /* [(n_heads + 2 n_kv_heads) * head_dim, n_embd]: q, then k, then v */
    mp_cu_matrix wo;               /* [n_embd, n_heads * head_dim] */
    mp_cu_matrix gate_up;          /* [2 n_ff, n_embd]: gate, then up */
    mp_cu_matrix down;             /* [n_embd, n_ff] */
    const float *attn_norm, *ffn_norm; /* [n_embd] */
    const float *bias;             /* [(n_heads + 2 n_kv_heads) * head_dim]; NULL without qkv_bias */
    const float *q_norm, *k_norm;  /* [head_dim]; NULL without qk_norm */
} mp_cu_layer;

typedef struct mp_cu_weights {
    mp_cu_layer *layers;       /* [n_layers], host memory */
    mp_bf16 *token_embd;       /* [n_vocab, n_embd] */
    mp_bf16 *output;           /* [n_vocab, n_embd]; token_embd when tied */
    const float *output_norm;  /* [n_embd] */
    size_t bytes;              /* of device memory */
} mp_cu_weights;

/* Device memory that open will take for good, and besides while it loads. */
size_t mp_cu_weights_bytes(const mp_model *model, bool e4m3);
size_t mp_cu_weights_staging_bytes(void);

/* ERR_UNSUPPORTED (a shape whose rows are no multiple of 16 bytes), ERR_NOMEM with the numbers, ERR_BROKEN. */
mepic_status mp_cu_weights_open(mp_cu_device *device, const mp_model *model, bool e4m3, const mp_log *log,
                                mp_cu_weights *out, mepic_error *err);
/* A zeroed struct is a no-op; before the device's close. */
void mp_cu_weights_close(mp_cu_device *device, mp_cu_weights *w);

#endif
