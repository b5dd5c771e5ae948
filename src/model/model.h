/* A model: validated hyper-parameters and the table of its weights. This is the whole contract between the loader and
 * the backends; differences between architectures are flags here, not classes.
 *
 * Every tensor named below was checked for presence, type and shape. Shapes are written [outputs, inputs]; GGUF's ne is
 * the reverse. Immutable after open; any thread. */
#ifndef MEPIC_MODEL_MODEL_H
#define MEPIC_MODEL_MODEL_H

#include "base/hash.h"
#include "base/log.h"
#include "base/status.h"
#include "model/gguf.h"

typedef enum mp_arch { MP_ARCH_LLAMA, MP_ARCH_QWEN2, MP_ARCH_QWEN3 } mp_arch;
typedef enum mp_rope_pairs {
    MP_ROPE_ADJACENT, /* dimensions (2i, 2i + 1): llama in GGUF */
    MP_ROPE_HALVES,   /* dimensions (i, i + n_rot / 2): qwen2, qwen3 */
} mp_rope_pairs;
typedef enum mp_rope_scaling { MP_ROPE_PLAIN, MP_ROPE_LINEAR, MP_ROPE_YARN, MP_ROPE_LLAMA3 } mp_rope_scaling;

typedef struct mp_hparams {
    mp_arch arch;
    uint32_t n_layers, n_embd, n_ff, n_vocab, n_ctx_train;
    uint32_t n_heads, n_kv_heads; /* n_heads a multiple of n_kv_heads, at most 16 of them share one */
    uint32_t head_dim;            /* multiple of 16, at most 256 */
    float norm_eps;
    bool qkv_bias; /* qwen2 */
    bool qk_norm;  /* qwen3: RMS norm of every head of q and k before rotation */
    struct {
        mp_rope_pairs pairs;
        mp_rope_scaling scaling;
        uint32_t n_rot; /* even, <= head_dim: the first n_rot dimensions turn */
        float freq_base;
        float factor; /* of LINEAR and YARN: > 0 */
        uint32_t original_ctx;
        float yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    } rope;
} mp_hparams;

typedef struct mp_layer {
    const mp_tensor *attn_norm;      /* [n_embd] F32, as every norm and bias */
    const mp_tensor *wq, *wk, *wv;   /* [n_heads * head_dim, n_embd], [n_kv_heads * head_dim, n_embd] twice */
    const mp_tensor *bq, *bk, *bv;   /* NULL without qkv_bias */
    const mp_tensor *q_norm, *k_norm; /* [head_dim]; NULL without qk_norm */
    const mp_tensor *wo;             /* [n_embd, n_heads * head_dim] */
    const mp_tensor *ffn_norm;       /* [n_embd] */
    const mp_tensor *gate, *up;      /* [n_ff, n_embd] */
    const mp_tensor *down;           /* [n_embd, n_ff] */
} mp_layer;

typedef struct mp_model {
    mp_gguf *gguf; /* owned */
    mp_hparams hp;
    const mp_tensor *token_embd;   /* [n_vocab, n_embd] */
    const mp_tensor *output_norm;  /* [n_embd] */
    const mp_tensor *output;       /* [n_vocab, n_embd]; token_embd when tied */
    const mp_tensor *rope_factors; /* [n_rot / 2] F32, of LLAMA3; else NULL */
    mp_layer *layers;              /* [n_layers], owned */
} mp_model;

/* ERR_IO, ERR_FORMAT, ERR_UNSUPPORTED (an architecture or tensor type, by name), ERR_NOMEM. */
mepic_status mp_model_open(const char *path, mp_model **out, mepic_error *err);
/* Takes ownership of `gguf`, also on failure. */
mepic_status mp_model_open_gguf(mp_gguf *gguf, mp_model **out, mepic_error *err);
void mp_model_close(mp_model *model); /* NULL is a no-op */

const char *mp_arch_name(mp_arch arch);

/* SHA-256 of the file's bytes. With `cache_dir`, remembered there by (device, inode, size, mtime): it is read once. */
mepic_status mp_model_digest(const mp_model *model, const char *cache_dir, const mp_log *log, mp_digest *out,
                             mepic_error *err);

#endif
