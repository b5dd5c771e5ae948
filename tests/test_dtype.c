/* model/dtype: every block format against blocks written out by hand from the format's definition, conversions of all
 * 16-bit floats and of every rounding boundary between them, and the encoders of tools/quantize. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/dtype.h"
#include "support/random.h"
#include "tools/quantize.h"

static const mp_dtype all_types[] = { MP_DTYPE_F32,  MP_DTYPE_F16,  MP_DTYPE_BF16, MP_DTYPE_Q4_0,
                                      MP_DTYPE_Q4_1, MP_DTYPE_Q5_0, MP_DTYPE_Q5_1, MP_DTYPE_Q8_0,
                                      MP_DTYPE_Q4_K, MP_DTYPE_Q5_K, MP_DTYPE_Q6_K };
enum { N_TYPES = sizeof all_types / sizeof *all_types };

typedef struct expected {
    int index;
    float value;
} expected;

static void check_block(mp_dtype type, const uint8_t *block, const expected *want, size_t n) {
    float y[256];
    mp_dtype_dequantize(type, block, y, mp_dtype_find((uint32_t)type)->len);
    for (size_t i = 0; i < n; i++) {
        if (y[want[i].index] == want[i].value) continue;
        fail_msg("%s weight %d: %g, not %g", mp_dtype_name((uint32_t)type), want[i].index, (double)y[want[i].index],
                 (double)want[i].value);
    }
}
#define CHECK_BLOCK(type, block, ...)                                                                                  \
    check_block(type, block, (const expected[])__VA_ARGS__, sizeof((const expected[])__VA_ARGS__) / sizeof(expected))

/* Byte j of the codes: low half j, high half 15 - j. */
static void put_nibbles(uint8_t *codes) {
    for (int j = 0; j < 16; j++) codes[j] = (uint8_t)(j | (15 - j) << 4);
}

static void blocks_of_32(void **state) {
    (void)state;
    uint8_t q4_0[18] = { 0x00, 0x38 }; /* d = 0.5 */
    put_nibbles(q4_0 + 2);
    CHECK_BLOCK(MP_DTYPE_Q4_0, q4_0, { { 0, -4 }, { 1, -3.5f }, { 15, 3.5f }, { 16, 3.5f }, { 31, -4 } });

    uint8_t q4_1[20] = { 0x00, 0x34, 0x00, 0xbc }; /* d = 0.25, m = -1 */
    put_nibbles(q4_1 + 4);
    CHECK_BLOCK(MP_DTYPE_Q4_1, q4_1, { { 0, -1 }, { 3, -0.25f }, { 15, 2.75f }, { 16, 2.75f }, { 31, -1 } });

    /* Fifth bits of weights 0..31: 11000011 (from bit 7 down), 10100101, 11110000, 00001111. */
    uint8_t q5_0[22] = { 0x00, 0x40, 0xc3, 0xa5, 0xf0, 0x0f }; /* d = 2 */
    put_nibbles(q5_0 + 6);
    CHECK_BLOCK(
        MP_DTYPE_Q5_0, q5_0,
        { { 0, 0 }, { 2, -28 }, { 6, 12 }, { 9, -14 }, { 10, 20 }, { 16, -2 }, { 20, 22 }, { 27, 8 }, { 31, -32 } });
    uint8_t q5_1[24] = { 0x00, 0x40, 0x00, 0xc2, 0xc3, 0xa5, 0xf0, 0x0f }; /* d = 2, m = -3 */
    put_nibbles(q5_1 + 8);
    CHECK_BLOCK(
        MP_DTYPE_Q5_1, q5_1,
        { { 0, 29 }, { 2, 1 }, { 6, 41 }, { 9, 15 }, { 10, 49 }, { 16, 27 }, { 20, 51 }, { 27, 37 }, { 31, -3 } });

    uint8_t q8_0[34] = { 0x00, 0xb8 }; /* d = -0.5 */
    for (int j = 0; j < 32; j++) q8_0[2 + j] = (uint8_t)(8 * j - 128);
    CHECK_BLOCK(MP_DTYPE_Q8_0, q8_0, { { 0, 64 }, { 1, 60 }, { 16, 0 }, { 31, -60 } });
}

/* Scales 1 2 3 4 26 44 62 1 and minima 5 6 7 8 25 43 61 15, with bits of a value in every place they can be in. */
static const uint8_t group_bytes[16] = {
    0x00, 0x3c, 0x00, 0x38, /* d = 1, dmin = 0.5 */
    0x41, 0x82, 0xc3, 0x04, 0x45, 0x86, 0xc7, 0x08, 0x9a, 0xbc, 0xde, 0xf1,
};

static void blocks_of_256(void **state) {
    (void)state;
    uint8_t q4_k[144];
    memcpy(q4_k, group_bytes, 16);
    memset(q4_k + 16, 0x53, 128); /* even groups 3, odd groups 5 */
    q4_k[16 + 2 * 32 + 7] = 0xe1; /* weight 7 of groups 4 and 5 */
    CHECK_BLOCK(MP_DTYPE_Q4_K, q4_k,
                { { 0, 0.5f },
                  { 31, 0.5f },
                  { 32, 7 },
                  { 64, 5.5f },
                  { 96, 16 },
                  { 128, 65.5f },
                  { 135, 13.5f },
                  { 160, 198.5f },
                  { 167, 594.5f },
                  { 192, 155.5f },
                  { 224, -2.5f },
                  { 255, -2.5f } });

    uint8_t q5_k[176] = { 0 };
    memcpy(q5_k, group_bytes, 16);
    q5_k[16 + 3] = 0x92; /* weight 3 of groups 1, 4 and 7 */
    memset(q5_k + 48, 0x53, 128);
    CHECK_BLOCK(MP_DTYPE_Q5_K, q5_k,
                { { 0, 0.5f },
                  { 3, 0.5f },
                  { 32, 7 },
                  { 35, 39 },
                  { 128, 65.5f },
                  { 131, 481.5f },
                  { 224, -2.5f },
                  { 227, 13.5f } });

    uint8_t q6_k[210];
    memset(q6_k, 0x53, 128);
    memset(q6_k + 128, 0xe4, 64); /* high bits 0, 1, 2, 3 of quarters 0..3: codes -29, -13, 5, 21 */
    for (int g = 0; g < 16; g++) q6_k[192 + g] = (uint8_t)(g - 8);
    q6_k[208] = 0x00, q6_k[209] = 0x34; /* d = 0.25 */
    q6_k[64 + 32 + 9] = 0x1f;           /* weights 9 of quarters 1 and 3 of the second half: -1, 17 */
    CHECK_BLOCK(MP_DTYPE_Q6_K, q6_k,
                { { 0, 58 },
                  { 16, 50.75f },
                  { 32, 19.5f },
                  { 64, -5 },
                  { 96, -10.5f },
                  { 128, 0 },
                  { 160, -6.5f },
                  { 169, -0.5f },
                  { 233, 25.5f },
                  { 255, 36.75f } });
}

/* The value of a half-precision number by IEEE 754, in double. */
static double f16_value(uint32_t h) {
    int exponent = (int)(h >> 10 & 31);
    double m = h & 1023, v = exponent == 0 ? ldexp(m, -24) : ldexp(m + 1024, exponent - 25);
    return h & 0x8000 ? -v : v;
}

static void every_f16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = mp_f16_to_f32((uint16_t)h);
        if ((h & 0x7fff) > 0x7c00) {
            assert_true(isnan(f));
            assert_true((mp_f32_to_f16(f) & 0x7fff) > 0x7c00);
            continue;
        }
        if ((h & 0x7fff) == 0x7c00)
            assert_true(isinf(f) && (f < 0) == (h >> 15));
        else
            assert_true((double)f == f16_value(h));
        assert_int_equal(mp_f32_to_f16(f), h);
    }
}

static void every_f16_rounding_boundary(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) { /* halfway to the next; the next after the largest is 65536 */
        double next = h + 1 < 0x7c00 ? f16_value(h + 1) : 65536;
        float middle = (float)((f16_value(h) + next) / 2); /* exact */
        uint16_t even = (uint16_t)(h + (h & 1));
        assert_int_equal(mp_f32_to_f16(middle), even);
        assert_int_equal(mp_f32_to_f16(-middle), even | 0x8000);
        assert_int_equal(mp_f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(mp_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
    }
    assert_int_equal(mp_f32_to_f16(1e30f), 0x7c00);
    assert_int_equal(mp_f32_to_f16(1e-30f), 0);
}

static void every_bf16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = mp_bf16_to_f32((uint16_t)h);
        if (isnan(f)) {
            assert_true(isnan(mp_bf16_to_f32(mp_f32_to_bf16(f))));
            continue;
        }
        assert_int_equal(mp_f32_to_bf16(f), h);
        if (isinf(f)) continue;
        uint32_t bits = h << 16 | 0x8000; /* halfway to the next one away from zero */
        float middle;
        memcpy(&middle, &bits, sizeof middle);
        assert_int_equal(mp_f32_to_bf16(middle), h + (h & 1));
        assert_int_equal(mp_f32_to_bf16(nextafterf(middle, 0)), h);
        assert_int_equal(mp_f32_to_bf16(nextafterf(middle, f < 0 || h == 0x8000 ? -INFINITY : INFINITY)), h + 1);
    }
    uint32_t low_nan = 0x7f800001; /* its payload is all in the bits that are cut off */
    float f;
    memcpy(&f, &low_nan, sizeof f);
    assert_true(isnan(mp_bf16_to_f32(mp_f32_to_bf16(f))));
}

static float normal(rng *random) {
    float sum = -6;
    for (int i = 0; i < 12; i++) sum += rng_float(random, 0, 1);
    return sum;
}

/* Root mean square error on a Gaussian, relative to its deviation. A uniform step s gives s / sqrt(12); a block of 32
 * spans about 2 x 2.07 deviations, the extreme of 16 or 32 values takes 2^(bits - 1) steps. */
static void encoders_lose_what_their_step_says(void **state) {
    (void)state;
    static const float bound[N_TYPES] = {
        0, 0.0003f, 0.003f, 0.1f, 0.09f, 0.05f, 0.045f, 0.0055f, 0.1f, 0.05f, 0.022f
    };
    enum { N = 256 * 400 };
    static float x[N], y[N];
    static uint8_t coded[N * 4];
    rng random = rng_open(20261124);
    for (int i = 0; i < N; i++) x[i] = 0.02f * normal(&random);
    for (int t = 0; t < N_TYPES; t++) {
        mp_quantize(all_types[t], x, coded, N);
        mp_dtype_dequantize(all_types[t], coded, y, N);
        double error = 0, power = 0;
        for (int i = 0; i < N; i++) error += pow((double)y[i] - (double)x[i], 2), power += pow((double)x[i], 2);
        double relative = sqrt(error / power);
        print_message("%s: %.5f\n", mp_dtype_name((uint32_t)all_types[t]), relative);
        assert_true(relative <= (double)bound[t]);
        assert_true(relative >= (double)bound[t] / 3); /* and no format is better than it can be */
    }
}

static void encoders_keep_zero_and_constants(void **state) {
    (void)state;
    float x[256], y[256];
    uint8_t coded[1024];
    static const float constants[] = { 0, 1, -1, 0.5f };
    for (int t = 0; t < N_TYPES; t++) {
        for (size_t c = 0; c < 4; c++) {
            for (int i = 0; i < 256; i++) x[i] = constants[c];
            memset(coded, 0xa5, sizeof coded); /* an encoder may not rely on zeroed memory */
            mp_quantize(all_types[t], x, coded, 256);
            mp_dtype_dequantize(all_types[t], coded, y, 256);
            for (int i = 0; i < 256; i++) assert_float_equal(y[i], constants[c], 0.002);
        }
    }
}

static void types_have_names(void **state) {
    (void)state;
    for (int t = 0; t < N_TYPES; t++) {
        const mp_dtype_info *info = mp_dtype_find((uint32_t)all_types[t]);
        assert_non_null(info);
        assert_string_equal(info->name, mp_dtype_name((uint32_t)all_types[t]));
    }
    size_t n = 0;
    for (uint32_t t = 0; t < 1000; t++) n += mp_dtype_find(t) != NULL;
    assert_int_equal(n, N_TYPES);
    assert_string_equal(mp_dtype_name(20), "IQ4_NL");
    assert_string_equal(mp_dtype_name(39), "MXFP4");
    assert_string_equal(mp_dtype_name(999), "unknown");
    assert_string_equal(mp_dtype_name(UINT32_MAX), "unknown");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_of_32),
        cmocka_unit_test(blocks_of_256),
        cmocka_unit_test(every_f16),
        cmocka_unit_test(every_f16_rounding_boundary),
        cmocka_unit_test(every_bf16),
        cmocka_unit_test(encoders_lose_what_their_step_says),
        cmocka_unit_test(encoders_keep_zero_and_constants),
        cmocka_unit_test(types_have_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
