/* fp8 e4m3 from its definition: sign, 4 bits of exponent with a bias of 7, 3 of mantissa, no infinity, NaN at 0x7f. */
#ifndef MEPIC_TESTS_E4M3_H
#define MEPIC_TESTS_E4M3_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "model/dtype.h"

static inline float e4m3_value(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float x = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
    if ((code & 0x7f) == 0x7f) x = NAN;
    return code & 0x80 ? -x : x;
}

/* The nearest, ties to the even code; what is larger than the largest becomes that. */
static inline uint8_t e4m3_nearest(float x) {
    float size = fabsf(x);
    int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
    float eighths = rintf(ldexpf(size, 3 - exponent)); /* 8 to 16, or below 8: subnormal */
    int code = size < 448.0f ? (exponent + 6) * 8 + (int)eighths : 0x7e;
    return (uint8_t)(signbit(x) ? code | 0x80 : code);
}

/* A row of bf16 as kernels.h says (mp_cu_quantize). Returns the scale. */
static inline float e4m3_row(const uint16_t *bf16, size_t n, uint8_t *codes) {
    float most = 1e-30f;
    for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(mp_bf16_to_f32(bf16[i])));
    float inverse = 448.0f / most;
    for (size_t i = 0; i < n; i++) codes[i] = e4m3_nearest(mp_bf16_to_f32(bf16[i]) * inverse);
    return most / 448.0f;
}

#endif
