/* model/rope: frequencies and table against the formulas of the papers, written out again one number at a time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "model/rope.h"
#include "support/tiny.h"

enum { N_ROT = 64, N_PAIRS = N_ROT / 2 };

static mp_synth_spec spec_of(mp_rope_scaling scaling) {
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.head_dim = spec.hp.rope.n_rot = N_ROT;
    spec.hp.rope.freq_base = 500000;
    spec.hp.rope.scaling = scaling;
    spec.hp.rope.factor = 8;
    spec.hp.rope.original_ctx = 8192;
    return spec;
}

static double plain(int i) {
    return 1 / pow(500000, (double)(2 * i) / N_ROT);
}

/* Compares all frequencies with want(i), and one table row with their cosines and sines. */
static void check(const mp_synth_spec *spec, double (*want)(int), double magnitude) {
    void *bytes;
    mp_model *m = tiny_model_open(spec, &bytes);
    double freq[N_PAIRS], got;
    mp_rope_frequencies(m, freq, &got);
    assert_float_equal(got, magnitude, 1e-6);
    for (int i = 0; i < N_PAIRS; i++) {
        if (fabs(freq[i] / want(i) - 1) > 1e-6) fail_msg("pair %d: %.9g, not %.9g", i, freq[i], want(i));
    }
    mp_rope_table table;
    assert_int_equal(mp_rope_table_open(m, 5000, &table, NULL), MEPIC_OK);
    assert_int_equal(table.n_angles, 5000);
    assert_int_equal(table.n_pairs, N_PAIRS);
    for (int a = 0; a < 5000; a += 1 + a / 3) {
        const float *row = table.cos_sin + (size_t)a * 2 * N_PAIRS;
        for (int i = 0; i < N_PAIRS; i++) {
            assert_true(row[i] == (float)(got * cos(a * freq[i])));
            assert_true(row[N_PAIRS + i] == (float)(got * sin(a * freq[i])));
        }
    }
    mp_rope_table_close(&table);
    assert_null(table.cos_sin);
    const char *why = NULL;
    assert_true(mp_rope_exact(m, &why));
    assert_true(why && strlen(why) > 20);
    mp_model_close(m);
    free(bytes);
}

static void plain_frequencies(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_PLAIN);
    check(&spec, plain, 1);
}

static double linear(int i) {
    return plain(i) / 8;
}

static void linear_interpolation(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_LINEAR);
    check(&spec, linear, 1);
}

/* Llama 3.1's published rule on wavelengths. */
static double llama3(int i) {
    double wavelength = 2 * M_PI / plain(i);
    if (wavelength < 8192 / 4.0) return plain(i);
    if (wavelength > 8192 / 1.0) return plain(i) / 8;
    double smooth = (8192 / wavelength - 1) / (4 - 1);
    return (1 - smooth) * plain(i) / 8 + smooth * plain(i);
}

static void llama3_factors(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_LLAMA3);
    check(&spec, llama3, 1);
    assert_true(llama3(0) == plain(0));
    assert_true(llama3(N_PAIRS - 1) == plain(N_PAIRS - 1) / 8);
}

/* YaRN for base 500000, 64 dimensions, 8192 positions: 64 ln(8192 / (32 * 2 pi)) / (2 ln 500000) = 9.04 -> 9, and
 * 64 ln(8192 / (2 pi)) / (2 ln 500000) = 17.49 -> 18. */
static double yarn(int i) {
    double ramp = i <= 9 ? 0 : i >= 18 ? 1 : (i - 9) / 9.0;
    return plain(i) / 8 * ramp + plain(i) * (1 - ramp);
}

static double yarn_half(int i) { /* half of the correction */
    return (yarn(i) + plain(i) / 8) / 2;
}

static void yarn_ramp(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_YARN);
    check(&spec, yarn, 1 + 0.1 * log(8));
    spec.hp.rope.yarn_ext_factor = 0.5f;
    spec.hp.rope.yarn_attn_factor = 0.75f;
    check(&spec, yarn_half, 0.75 * (1 + 0.1 * log(8)));
    spec.hp.rope.yarn_ext_factor = 0; /* then it is linear interpolation, and nothing else */
    spec.hp.rope.yarn_attn_factor = 1;
    check(&spec, linear, 1);
}

static double yarn_shrunk(int i) { /* factor 0.5: the ramp is the same, the interpolation stretches */
    double ramp = i <= 9 ? 0 : i >= 18 ? 1 : (i - 9) / 9.0;
    return plain(i) * 2 * ramp + plain(i) * (1 - ramp);
}

static void a_factor_below_one_has_no_magnitude(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_YARN);
    spec.hp.rope.factor = 0.5f;
    check(&spec, yarn_shrunk, 1);
}

/* The one formula the whole cache stands on: <R(m) q, R(n) k> depends on m - n only. */
static void only_differences_matter(void **state) {
    (void)state;
    mp_synth_spec spec = spec_of(MP_ROPE_YARN);
    void *bytes;
    mp_model *m = tiny_model_open(&spec, &bytes);
    mp_rope_table t;
    assert_int_equal(mp_rope_table_open(m, 4096, &t, NULL), MEPIC_OK);
    double first = 0;
    for (uint32_t shift = 0; shift < 3000; shift += 37) {
        const float *q = t.cos_sin + (size_t)(1000 + shift) * 2 * N_PAIRS,
                    *k = t.cos_sin + (size_t)(77 + shift) * 2 * N_PAIRS;
        double dot = 0; /* of (1, 0.5) with (0.25, 1) in every pair */
        for (int i = 0; i < N_PAIRS; i++) {
            double qc = (double)q[i], qs = (double)q[N_PAIRS + i], kc = (double)k[i], ks = (double)k[N_PAIRS + i];
            dot += (qc - 0.5 * qs) * (0.25 * kc - ks) + (qs + 0.5 * qc) * (0.25 * ks + kc);
        }
        if (shift == 0) first = dot;
        assert_float_equal(dot, first, 1e-4);
    }
    mp_rope_table_close(&t);
    mp_mem_fail_at(1, false);
    mepic_error err;
    assert_int_equal(mp_rope_table_open(m, 4096, &t, &err), MEPIC_ERR_NOMEM);
    mp_mem_fail_at(0, false);
    mp_model_close(m);
    free(bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_frequencies),
        cmocka_unit_test(linear_interpolation),
        cmocka_unit_test(llama3_factors),
        cmocka_unit_test(yarn_ramp),
        cmocka_unit_test(a_factor_below_one_has_no_magnitude),
        cmocka_unit_test(only_differences_matter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
