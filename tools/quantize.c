/* Each encoder mirrors the layout that src/model/dtype.c describes. A scale is rounded to its stored form first and the
 * codes are chosen with the rounded one, so the error of a weight is half a step plus what clamping takes. */
#include "tools/quantize.h"

#include <math.h>
#include <string.h>

static void put_f16(uint8_t *p, uint16_t h) {
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

/* Rounds to what the file can hold, and stores it. */
static float store_f16(uint8_t *p, float v) {
    uint16_t h = mp_f32_to_f16(v);
    put_f16(p, h);
    return mp_f16_to_f32(h);
}

static int nearest(float v, float inverse, int low, int high) {
    float q = v * inverse;
    if (!(q > (float)low)) return low;
    if (q >= (float)high) return high;
    return (int)lrintf(q);
}

static float inverse_of(float step) {
    return step != 0 ? 1 / step : 0;
}

/* The value of largest magnitude, with its sign. */
static float extreme(const float *x, int n) {
    float e = 0;
    for (int i = 0; i < n; i++) {
        if (fabsf(x[i]) > fabsf(e)) e = x[i];
    }
    return e;
}

static void range(const float *x, int n, float *low, float *high) {
    *low = *high = x[0];
    for (int i = 1; i < n; i++) {
        if (x[i] < *low) *low = x[i];
        if (x[i] > *high) *high = x[i];
    }
}

/* The extreme value is given the one code that has no opposite, -2^(bits - 1). */
static void quantize_q4_0(const float *x, uint8_t *b) {
    float inverse = inverse_of(store_f16(b, extreme(x, 32) / -8));
    for (int j = 0; j < 16; j++) {
        int q0 = nearest(x[j], inverse, -8, 7) + 8, q1 = nearest(x[j + 16], inverse, -8, 7) + 8;
        b[2 + j] = (uint8_t)(q0 | q1 << 4);
    }
}

static void quantize_q4_1(const float *x, uint8_t *b) {
    float low, high;
    range(x, 32, &low, &high);
    float inverse = inverse_of(store_f16(b, (high - low) / 15)), m = store_f16(b + 2, low);
    for (int j = 0; j < 16; j++) {
        int q0 = nearest(x[j] - m, inverse, 0, 15), q1 = nearest(x[j + 16] - m, inverse, 0, 15);
        b[4 + j] = (uint8_t)(q0 | q1 << 4);
    }
}

static void put_five_bits(uint8_t *qh, uint8_t *codes, int j, int q0, int q1) {
    codes[j] = (uint8_t)((q0 & 15) | (q1 & 15) << 4);
    qh[j / 8] |= (uint8_t)(q0 >> 4 << j % 8);
    qh[j / 8 + 2] |= (uint8_t)(q1 >> 4 << j % 8);
}

static void quantize_q5_0(const float *x, uint8_t *b) {
    float inverse = inverse_of(store_f16(b, extreme(x, 32) / -16));
    memset(b + 2, 0, 4);
    for (int j = 0; j < 16; j++) {
        put_five_bits(b + 2, b + 6, j, nearest(x[j], inverse, -16, 15) + 16, nearest(x[j + 16], inverse, -16, 15) + 16);
    }
}

static void quantize_q5_1(const float *x, uint8_t *b) {
    float low, high;
    range(x, 32, &low, &high);
    float inverse = inverse_of(store_f16(b, (high - low) / 31)), m = store_f16(b + 2, low);
    memset(b + 4, 0, 4);
    for (int j = 0; j < 16; j++) {
        put_five_bits(b + 4, b + 8, j, nearest(x[j] - m, inverse, 0, 31), nearest(x[j + 16] - m, inverse, 0, 31));
    }
}

static void quantize_q8_0(const float *x, uint8_t *b) {
    float inverse = inverse_of(store_f16(b, fabsf(extreme(x, 32)) / 127));
    for (int j = 0; j < 32; j++) b[2 + j] = (uint8_t)(int8_t)nearest(x[j], inverse, -127, 127);
}

/* Scales and minima of the eight groups of a Q4_K or Q5_K block, six bits each: dg, mg are what the file then says. */
static void quantize_groups(const float *x, int max_code, uint8_t *b, float *dg, float *mg) {
    float step[8], minimum[8], top_step = 0, top_minimum = 0;
    for (int g = 0; g < 8; g++) {
        float low, high;
        range(x + 32 * g, 32, &low, &high);
        minimum[g] = low < 0 ? -low : 0;
        step[g] = high > -minimum[g] ? (high + minimum[g]) / (float)max_code : 0;
        top_step = fmaxf(top_step, step[g]);
        top_minimum = fmaxf(top_minimum, minimum[g]);
    }
    float d = store_f16(b, top_step / 63), dmin = store_f16(b + 2, top_minimum / 63);
    uint8_t *s = b + 4;
    memset(s, 0, 12);
    for (int g = 0; g < 8; g++) {
        int scale = nearest(step[g], inverse_of(d), 0, 63), low = nearest(minimum[g], inverse_of(dmin), 0, 63);
        dg[g] = d * (float)scale;
        mg[g] = dmin * (float)low;
        if (g < 4) {
            s[g] |= (uint8_t)scale;
            s[g + 4] |= (uint8_t)low;
        } else {
            s[g + 4] = (uint8_t)((scale & 15) | (low & 15) << 4);
            s[g - 4] |= (uint8_t)(scale >> 4 << 6);
            s[g] |= (uint8_t)(low >> 4 << 6);
        }
    }
}

static void quantize_q4_k(const float *x, uint8_t *b) {
    float dg[8], mg[8];
    quantize_groups(x, 15, b, dg, mg);
    memset(b + 16, 0, 128);
    for (int i = 0; i < 256; i++) {
        int g = i / 32, q = nearest(x[i] + mg[g], inverse_of(dg[g]), 0, 15);
        b[16 + g / 2 * 32 + i % 32] |= (uint8_t)(q << g % 2 * 4);
    }
}

static void quantize_q5_k(const float *x, uint8_t *b) {
    float dg[8], mg[8];
    quantize_groups(x, 31, b, dg, mg);
    memset(b + 16, 0, 160);
    for (int i = 0; i < 256; i++) {
        int g = i / 32, j = i % 32, q = nearest(x[i] + mg[g], inverse_of(dg[g]), 0, 31);
        b[16 + j] |= (uint8_t)(q >> 4 << g);
        b[48 + g / 2 * 32 + j] |= (uint8_t)((q & 15) << g % 2 * 4);
    }
}

static void quantize_q6_k(const float *x, uint8_t *b) {
    float step[16], top = 0;
    for (int g = 0; g < 16; g++) {
        step[g] = extreme(x + 16 * g, 16) / -32;
        top = fmaxf(top, fabsf(step[g]));
    }
    memset(b, 0, 192);
    float d = store_f16(b + 208, top / 127);
    for (int g = 0; g < 16; g++) {
        int scale = nearest(step[g], inverse_of(d), -127, 127);
        b[192 + g] = (uint8_t)(int8_t)scale;
        float inverse = inverse_of(d * (float)scale);
        for (int i = 16 * g; i < 16 * g + 16; i++) {
            int q = nearest(x[i], inverse, -32, 31) + 32, h = i / 128, k = i % 128 / 32, j = i % 32;
            b[h * 64 + k % 2 * 32 + j] |= (uint8_t)((q & 15) << k / 2 * 4);
            b[128 + h * 32 + j] |= (uint8_t)(q >> 4 << 2 * k);
        }
    }
}

static void quantize_f16(const float *x, uint8_t *b) {
    put_f16(b, mp_f32_to_f16(*x));
}

static void quantize_bf16(const float *x, uint8_t *b) {
    put_f16(b, mp_f32_to_bf16(*x));
}

void mp_quantize(mp_dtype type, const float *src, void *dst, size_t n) {
    void (*block)(const float *, uint8_t *) = NULL;
    switch (type) {
    case MP_DTYPE_F32: memcpy(dst, src, n * sizeof *src); return;
    case MP_DTYPE_F16: block = quantize_f16; break;
    case MP_DTYPE_BF16: block = quantize_bf16; break;
    case MP_DTYPE_Q4_0: block = quantize_q4_0; break;
    case MP_DTYPE_Q4_1: block = quantize_q4_1; break;
    case MP_DTYPE_Q5_0: block = quantize_q5_0; break;
    case MP_DTYPE_Q5_1: block = quantize_q5_1; break;
    case MP_DTYPE_Q8_0: block = quantize_q8_0; break;
    case MP_DTYPE_Q4_K: block = quantize_q4_k; break;
    case MP_DTYPE_Q5_K: block = quantize_q5_k; break;
    case MP_DTYPE_Q6_K: block = quantize_q6_k; break;
    }
    const mp_dtype_info *info = mp_dtype_find((uint32_t)type);
    uint8_t *to = dst;
    for (size_t i = 0; i < n; i += info->len, to += info->bytes) block(src + i, to);
}
