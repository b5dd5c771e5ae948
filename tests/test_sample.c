/* infer/sample: against a slow reference that sorts everything, and by cases worked out by hand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "infer/sample.h"
#include "support/random.h"
#include "support/sampling.h"

enum { VOCAB = 97, HISTORY = 40 };

static rng dice;

static uint32_t below(uint32_t n) {
    return rng_below(&dice, n);
}

static float real(float low, float high) {
    return rng_float(&dice, low, high);
}

/* The order of the draw is the library's: truncated candidates from the most probable on, untruncated ones from the
 * largest id on. */
static int32_t reference(const mepic_sampling *p, const float *logits, const int32_t *tokens, uint32_t n,
                         uint32_t n_prompt) {
    float x[VOCAB];
    candidate c[VOCAB];
    bool sure;
    memcpy(x, logits, sizeof x);
    reference_adjust(x, &(mp_sample_row){ .sampling = p, .tokens = tokens, .n_tokens = n, .n_prompt = n_prompt });
    if (p->temperature <= 0) {
        int32_t best = 0;
        for (int32_t i = 1; i < VOCAB; i++) best = x[i] > x[best] ? i : best;
        return best;
    }
    uint32_t k = reference_cut(c, reference_candidates(x, VOCAB, c), p, &sure);
    uint8_t position[8] = { 0 };
    position[0] = (uint8_t)n;
    double left = 0, u = (double)(mp_hash64(p->seed, position, 8) >> 11) / 9007199254740992.0;
    for (uint32_t i = 0; i < k; i++) left += (double)c[i].weight;
    left *= u;
    for (uint32_t i = 0; i < k; i++) {
        left -= (double)c[i].weight;
        if (left < 0) return c[i].id;
    }
    return -1;
}

static void tokens_equal_the_reference(void **state) {
    (void)state;
    dice = rng_open(20261124);
    printf("seed %llu\n", (unsigned long long)dice.state);
    mp_sampler *s;
    assert_int_equal(mp_sampler_open(VOCAB, &s, NULL), MEPIC_OK);
    for (int round = 0; round < 20000; round++) {
        float logits[VOCAB];
        int32_t tokens[HISTORY];
        for (int i = 0; i < VOCAB; i++) logits[i] = real(-8, 8);
        if (round % 7 == 0) logits[below(VOCAB)] = logits[below(VOCAB)]; /* ties */
        uint32_t n = 1 + below(HISTORY), n_prompt = below(n + 1);
        for (uint32_t i = 0; i < n; i++) tokens[i] = (int32_t)below(VOCAB);
        struct mepic_logit_bias bias[2] = { { (int32_t)below(VOCAB), real(-9, 9) }, { 3, real(-9, 9) } };
        mepic_sampling p = {
            .temperature = below(4) ? real(0.1f, 2) : 0,
            .top_k = below(2) ? below(VOCAB + 9) : 0,
            .top_p = below(2) ? real(0, 1.1f) : 0,
            .min_p = below(2) ? real(0, 0.9f) : 0,
            .repeat_penalty = below(2) ? real(0.8f, 1.5f) : 0,
            .repeat_window = below(2) ? below(30) : 0,
            .presence_penalty = below(2) ? real(-2, 2) : 0,
            .frequency_penalty = below(2) ? real(-2, 2) : 0,
            .seed = rng_next(&dice),
            .logit_bias = bias,
            .n_logit_bias = below(3),
        };
        int32_t token = -2;
        uint64_t allocations = mp_mem_count();
        assert_true(mp_sample(s, &p, logits, tokens, n, n_prompt, &token));
        assert_int_equal(mp_mem_count(), allocations);
        int32_t want = reference(&p, logits, tokens, n, n_prompt);
        if (token != want) fail_msg("round %d: token %d, reference %d", round, token, want);
    }
    mp_sampler_close(s);
}

/* A token is a function of seed, position, logits and history: not of what the sampler did before. */
static void a_token_depends_on_its_arguments_only(void **state) {
    (void)state;
    mp_sampler *a, *b;
    assert_int_equal(mp_sampler_open(VOCAB, &a, NULL), MEPIC_OK);
    assert_int_equal(mp_sampler_open(VOCAB, &b, NULL), MEPIC_OK);
    float logits[VOCAB];
    int32_t tokens[HISTORY] = { 5, 5, 5, 8 };
    mepic_sampling p = { .temperature = 1, .top_p = 0.9f, .repeat_penalty = 1.2f, .frequency_penalty = 1, .seed = 11 };
    bool seeds_differ = false, positions_differ = false;
    for (uint32_t round = 1; round < HISTORY; round++) {
        for (int i = 0; i < VOCAB; i++) logits[i] = real(-3, 3);
        int32_t x, y, z;
        assert_true(mp_sample(a, &p, logits, tokens, round, 1, &x));
        assert_true(mp_sample(a, &p, logits, tokens, round, 1, &z));
        assert_true(mp_sample(b, &p, logits, tokens, round, 1, &y));
        assert_int_equal(x, y);
        assert_int_equal(x, z);
        mepic_sampling other = p;
        other.seed = 12;
        assert_true(mp_sample(a, &other, logits, tokens, round, 1, &z));
        seeds_differ |= z != x;
        tokens[round] = 96; /* a position further on; history beyond its length is not read */
        assert_true(mp_sample(a, &p, logits, tokens, round, 1, &z));
        assert_int_equal(z, x);
        assert_true(mp_sample(a, &p, logits, tokens, round + 1, 1, &z));
        positions_differ |= z != x;
    }
    assert_true(seeds_differ && positions_differ);
    mp_sampler_close(a);
    mp_sampler_close(b);
}

static void bad_numbers_are_no_candidates(void **state) {
    (void)state;
    mp_sampler *s;
    assert_int_equal(mp_sampler_open(4, &s, NULL), MEPIC_OK);
    const mepic_sampling greedy = { 0 }, hot = { .temperature = 1 },
                         narrow = { .temperature = 0.5f, .top_k = 3, .top_p = 0.9f };
    const mepic_sampling *all[] = { &greedy, &hot, &narrow };
    const float no_number[4] = { NAN, NAN, NAN, NAN }, minus[4] = { -INFINITY, NAN, -INFINITY, NAN };
    const float one[4] = { NAN, -INFINITY, 2, NAN }, plus[4] = { 1, INFINITY, 2, NAN };
    for (int i = 0; i < 3; i++) {
        int32_t token = 0;
        assert_false(mp_sample(s, all[i], no_number, NULL, 0, 0, &token));
        assert_false(mp_sample(s, all[i], minus, NULL, 0, 0, &token));
        assert_true(mp_sample(s, all[i], one, NULL, 0, 0, &token));
        assert_int_equal(token, 2);
        assert_true(mp_sample(s, all[i], plus, NULL, 0, 0, &token));
        assert_int_equal(token, 1);
    }
    mp_sampler_close(s);
}

static void greedy_takes_the_first_of_equals(void **state) {
    (void)state;
    mp_sampler *s;
    assert_int_equal(mp_sampler_open(5, &s, NULL), MEPIC_OK);
    const float logits[5] = { 1, 4, 4, 4, 0 };
    const mepic_sampling greedy = { 0 };
    int32_t token;
    assert_true(mp_sample(s, &greedy, logits, NULL, 0, 0, &token));
    assert_int_equal(token, 1);
    mp_sampler_close(s);
}

static void log_probabilities_are_of_raw_logits(void **state) {
    (void)state;
    const float logits[6] = { 0, 1, -INFINITY, 3, NAN, 3 };
    const double norm = log(exp(0) + exp(1) + 2 * exp(3));
    float logprob;
    mepic_logprob top[5];
    assert_int_equal(mp_logprobs(logits, 6, 1, &logprob, top, 3), 3);
    assert_true(fabs((double)logprob - (1 - norm)) < 1e-6);
    const int32_t ids[3] = { 3, 5, 1 };
    const double values[3] = { 3 - norm, 3 - norm, 1 - norm };
    for (int i = 0; i < 3; i++) {
        assert_int_equal(top[i].token, ids[i]);
        assert_true(fabs((double)top[i].logprob - values[i]) < 1e-6);
    }
    assert_int_equal(mp_logprobs(logits, 2, 0, &logprob, top, 5), 2); /* a vocabulary smaller than asked for */
    assert_int_equal(mp_logprobs(logits, 6, 0, &logprob, NULL, 0), 0);
}

static void options_out_of_range_are_named(void **state) {
    (void)state;
    const struct mepic_logit_bias out[1] = { { 97, 0 } }, nan[1] = { { 1, NAN } };
    const struct {
        mepic_sampling p;
        const char *name;
    } cases[] = {
        { { .temperature = NAN }, "temperature" },
        { { .temperature = 1e9f }, "temperature" },
        { { .top_p = -0.1f }, "top_p" },
        { { .min_p = 1.5f }, "min_p" },
        { { .repeat_penalty = -1 }, "repeat_penalty" },
        { { .presence_penalty = INFINITY }, "presence_penalty" },
        { { .frequency_penalty = NAN }, "frequency_penalty" },
        { { .logit_bias = out, .n_logit_bias = 1 }, "logit_bias[0]" },
        { { .logit_bias = nan, .n_logit_bias = 1 }, "logit_bias" },
        { { .n_logit_bias = 1 }, "n_logit_bias" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mepic_error err = { 0 };
        assert_int_equal(mp_sampling_check(&cases[i].p, VOCAB, &err), MEPIC_ERR_ARGUMENT);
        if (!strstr(err.message, cases[i].name)) fail_msg("case %zu: %s", i, err.message);
    }
    assert_int_equal(mp_sampling_check(&(mepic_sampling){ .temperature = -1, .top_p = 1 }, VOCAB, NULL), MEPIC_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokens_equal_the_reference),          cmocka_unit_test(a_token_depends_on_its_arguments_only),
        cmocka_unit_test(bad_numbers_are_no_candidates),       cmocka_unit_test(greedy_takes_the_first_of_equals),
        cmocka_unit_test(log_probabilities_are_of_raw_logits), cmocka_unit_test(options_out_of_range_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
