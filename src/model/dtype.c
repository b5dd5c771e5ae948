/* Block formats of GGUF, written as their definition: one loop a type, weights in order, no vector code. Multi-byte
 * fields are little-endian and may be unaligned. Backends test their kernels against these; speed does not matter here
 * beyond embedding rows and loading. */
#include "model/dtype.h"

#include <math.h>
#include <string.h>

static const struct {
    mp_dtype type;
    mp_dtype_info info;
} supported[] = {
    { MP_DTYPE_F32, { "F32", 1, 4 } },       { MP_DTYPE_F16, { "F16", 1, 2 } },
    { MP_DTYPE_BF16, { "BF16", 1, 2 } },     { MP_DTYPE_Q4_0, { "Q4_0", 32, 18 } },
    { MP_DTYPE_Q4_1, { "Q4_1", 32, 20 } },   { MP_DTYPE_Q5_0, { "Q5_0", 32, 22 } },
    { MP_DTYPE_Q5_1, { "Q5_1", 32, 24 } },   { MP_DTYPE_Q8_0, { "Q8_0", 32, 34 } },
    { MP_DTYPE_Q4_K, { "Q4_K", 256, 144 } }, { MP_DTYPE_Q5_K, { "Q5_K", 256, 176 } },
    { MP_DTYPE_Q6_K, { "Q6_K", 256, 210 } },
};

const mp_dtype_info *mp_dtype_find(uint32_t gguf_type) {
    for (size_t i = 0; i < sizeof supported / sizeof *supported; i++) {
        if ((uint32_t)supported[i].type == gguf_type) return &supported[i].info;
    }
    return NULL;
}

const char *mp_dtype_name(uint32_t gguf_type) {
    /* Indexed by type number; what was withdrawn from the format keeps its number. */
    static const char *const names[] = {
        "F32",        "F16",        "Q4_0",       "Q4_1",  "Q4_2",     "Q4_3",     "Q5_0",     "Q5_1",    "Q8_0",
        "Q8_1",       "Q2_K",       "Q3_K",       "Q4_K",  "Q5_K",     "Q6_K",     "Q8_K",     "IQ2_XXS", "IQ2_XS",
        "IQ3_XXS",    "IQ1_S",      "IQ4_NL",     "IQ3_S", "IQ2_S",    "IQ4_XS",   "I8",       "I16",     "I32",
        "I64",        "F64",        "IQ1_M",      "BF16",  "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",   "TQ2_0",
        "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4", "NVFP4",
    };
    return gguf_type < sizeof names / sizeof *names ? names[gguf_type] : "unknown";
}

float mp_f16_to_f32(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    float v;
    if (exponent == 0) {
        v = ldexpf((float)mantissa, -24);
    } else if (exponent < 31) {
        v = ldexpf((float)(mantissa | 1024), (int)exponent - 25);
    } else {
        uint32_t bits = (uint32_t)(h & 0x8000u) << 16 | 0x7f800000u | mantissa << 13;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    return h & 0x8000u ? -v : v;
}

uint16_t mp_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu)); /* NaN, made quiet */
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;                                         /* 65536 and above */
    int exponent = (int)(magnitude >> 23) - 127;
    if (exponent < -25) return sign; /* under half of the least subnormal */
    /* The 24-bit significand loses `drop` bits: 13, and more below the normal range. */
    uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t drop = exponent >= -14 ? 13 : (uint32_t)(-1 - exponent);
    uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1), half = 1u << (drop - 1);
    if (rest > half || (rest == half && (kept & 1))) kept++;
    /* `kept` has the implicit bit at 10 when normal: adding it to the exponent below carries as rounding wants, up to
     * infinity. */
    uint32_t base = exponent >= -14 ? (uint32_t)(exponent + 14) << 10 : 0;
    return (uint16_t)(sign | (base + kept));
}

float mp_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

uint16_t mp_f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u); /* quiet, else it could become inf */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static uint16_t u16(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

static float f16(const uint8_t *p) {
    return mp_f16_to_f32(u16(p));
}

/* Q4_0: d f16, 16 bytes of codes; Q4_1 has m f16 after d. Byte j holds weight j (low half) and j + 16 (high half). */
static void dequantize_q4_0(const uint8_t *b, float *y) {
    float d = f16(b);
    for (int j = 0; j < 16; j++) {
        y[j] = d * (float)((b[2 + j] & 15) - 8);
        y[j + 16] = d * (float)((b[2 + j] >> 4) - 8);
    }
}

static void dequantize_q4_1(const uint8_t *b, float *y) {
    float d = f16(b), m = f16(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = d * (float)(b[4 + j] & 15) + m;
        y[j + 16] = d * (float)(b[4 + j] >> 4) + m;
    }
}

/* Q5_0, Q5_1: as Q4_*, with 32 fifth bits, bit i of weight i, before the codes. */
static int fifth_bit(const uint8_t *qh, int i) {
    return (qh[i / 8] >> i % 8 & 1) << 4;
}

static void dequantize_q5_0(const uint8_t *b, float *y) {
    float d = f16(b);
    for (int j = 0; j < 16; j++) {
        y[j] = d * (float)(((b[6 + j] & 15) | fifth_bit(b + 2, j)) - 16);
        y[j + 16] = d * (float)(((b[6 + j] >> 4) | fifth_bit(b + 2, j + 16)) - 16);
    }
}

static void dequantize_q5_1(const uint8_t *b, float *y) {
    float d = f16(b), m = f16(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = d * (float)((b[8 + j] & 15) | fifth_bit(b + 4, j)) + m;
        y[j + 16] = d * (float)((b[8 + j] >> 4) | fifth_bit(b + 4, j + 16)) + m;
    }
}

static void dequantize_q8_0(const uint8_t *b, float *y) {
    float d = f16(b);
    for (int j = 0; j < 32; j++) y[j] = d * (float)(int8_t)b[2 + j];
}

/* Q4_K, Q5_K: 8 groups of 32 weights; group g has a 6-bit scale and a 6-bit minimum packed in 12 bytes: groups 0..3 in
 * the low six bits of bytes g and g + 4, groups 4..7 in the halves of byte g + 4 and the top bits of the former. */
static void group_scale(const uint8_t *s, int g, int *scale, int *minimum) {
    if (g < 4) {
        *scale = s[g] & 63;
        *minimum = s[g + 4] & 63;
    } else {
        *scale = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        *minimum = (s[g + 4] >> 4) | (s[g] >> 6) << 4;
    }
}

/* d f16, dmin f16, scales [12], codes [128]: groups 2k and 2k + 1 are the low and high halves of bytes 32k..32k+31. */
static void dequantize_q4_k(const uint8_t *b, float *y) {
    float d = f16(b), dmin = f16(b + 2);
    const uint8_t *codes = b + 16;
    for (int g = 0; g < 8; g++) {
        int scale, minimum;
        group_scale(b + 4, g, &scale, &minimum);
        float dg = d * (float)scale, mg = dmin * (float)minimum;
        for (int j = 0; j < 32; j++) {
            int q = codes[g / 2 * 32 + j] >> g % 2 * 4 & 15;
            y[g * 32 + j] = dg * (float)q - mg;
        }
    }
}

/* As Q4_K with fifth bits [32] before the codes: bit g of byte j belongs to weight j of group g. */
static void dequantize_q5_k(const uint8_t *b, float *y) {
    float d = f16(b), dmin = f16(b + 2);
    const uint8_t *high = b + 16, *codes = b + 48;
    for (int g = 0; g < 8; g++) {
        int scale, minimum;
        group_scale(b + 4, g, &scale, &minimum);
        float dg = d * (float)scale, mg = dmin * (float)minimum;
        for (int j = 0; j < 32; j++) {
            int q = (codes[g / 2 * 32 + j] >> g % 2 * 4 & 15) | (high[j] >> g & 1) << 4;
            y[g * 32 + j] = dg * (float)q - mg;
        }
    }
}

/* low [128], high [64], scales int8 [16], d f16. Two halves of 128 weights; in a half, weight 32k + j has its low four
 * bits in byte 32 (k % 2) + j of low (half k / 2 of the byte) and its high two in bits 2k of byte j of high. */
static void dequantize_q6_k(const uint8_t *b, float *y) {
    float d = f16(b + 208);
    for (int i = 0; i < 256; i++) {
        int h = i / 128, k = i % 128 / 32, j = i % 32;
        int low = b[h * 64 + k % 2 * 32 + j] >> k / 2 * 4 & 15;
        int high = b[128 + h * 32 + j] >> 2 * k & 3;
        int scale = (int8_t)b[192 + i / 16];
        y[i] = d * (float)scale * (float)((low | high << 4) - 32);
    }
}

static void dequantize_f16(const uint8_t *b, float *y) {
    *y = f16(b);
}

static void dequantize_bf16(const uint8_t *b, float *y) {
    *y = mp_bf16_to_f32(u16(b));
}

void mp_dtype_dequantize(mp_dtype type, const void *src, float *dst, size_t n) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)type);
    if (!info) return;
    void (*block)(const uint8_t *, float *) = NULL;
    switch (type) {
    case MP_DTYPE_F32: memcpy(dst, src, n * sizeof *dst); return;
    case MP_DTYPE_F16: block = dequantize_f16; break;
    case MP_DTYPE_BF16: block = dequantize_bf16; break;
    case MP_DTYPE_Q4_0: block = dequantize_q4_0; break;
    case MP_DTYPE_Q4_1: block = dequantize_q4_1; break;
    case MP_DTYPE_Q5_0: block = dequantize_q5_0; break;
    case MP_DTYPE_Q5_1: block = dequantize_q5_1; break;
    case MP_DTYPE_Q8_0: block = dequantize_q8_0; break;
    case MP_DTYPE_Q4_K: block = dequantize_q4_k; break;
    case MP_DTYPE_Q5_K: block = dequantize_q5_k; break;
    case MP_DTYPE_Q6_K: block = dequantize_q6_k; break;
    }
    const uint8_t *from = src;
    for (size_t i = 0; i < n; i += info->len, from += info->bytes) block(from, dst + i);
}
