/* GGUF tensor types: block formats and their exact meaning.
 *
 * A row of a tensor is a sequence of blocks; a block of `len` weights takes `bytes`. The dequantizers here are the
 * definition every fast kernel is tested against. Pure functions, any thread. Source: the GGUF/ggml block layouts. */
#ifndef MEPIC_MODEL_DTYPE_H
#define MEPIC_MODEL_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Values are GGUF's type numbers. */
typedef enum mp_dtype {
    MP_DTYPE_F32 = 0,
    MP_DTYPE_F16 = 1,
    MP_DTYPE_Q4_0 = 2,
    MP_DTYPE_Q4_1 = 3,
    MP_DTYPE_Q5_0 = 6,
    MP_DTYPE_Q5_1 = 7,
    MP_DTYPE_Q8_0 = 8,
    MP_DTYPE_Q4_K = 12,
    MP_DTYPE_Q5_K = 13,
    MP_DTYPE_Q6_K = 14,
    MP_DTYPE_BF16 = 30,
} mp_dtype;

typedef struct mp_dtype_info {
    const char *name; /* "Q4_K" */
    uint32_t len;     /* weights a block */
    uint32_t bytes;   /* bytes a block */
} mp_dtype_info;

/* NULL for a type that is not supported. */
const mp_dtype_info *mp_dtype_find(uint32_t gguf_type);
/* Name of any GGUF type number, supported or not, for messages: "IQ4_NL"; "unknown" without a name. */
const char *mp_dtype_name(uint32_t gguf_type);

/* n must be a multiple of the block length. dst: [n] */
void mp_dtype_dequantize(mp_dtype type, const void *src, float *dst, size_t n);

float mp_f16_to_f32(uint16_t h);
uint16_t mp_f32_to_f16(float f); /* round to nearest even; overflow to infinity */
float mp_bf16_to_f32(uint16_t h);
uint16_t mp_f32_to_bf16(float f); /* round to nearest even; NaN stays NaN */

#endif
