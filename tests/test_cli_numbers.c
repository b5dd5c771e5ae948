/* cli/numbers and cli/score: quantiles, draws, the bootstrap, F1, divergence. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cli/numbers.h"
#include "cli/score.h"

static void quantiles_interpolate(void **state) {
    (void)state;
    double v[] = { 4, 1, 3, 2 };
    assert_true(mp_quantile(v, 4, 0.5) == 2.5);
    assert_true(mp_quantile(v, 4, 0.0) == 1.0);
    assert_true(mp_quantile(v, 4, 1.0) == 4.0);
    assert_true(mp_quantile(v, 1, 0.9) == 1.0);
    assert_true(mp_quantile(v, 0, 0.5) == 0.0);
}

static void draws_follow_the_weights(void **state) {
    (void)state;
    enum { M = 10, DRAWS = 20000 };
    mp_random random = { .state = 5 };
    uint32_t counts[M] = { 0 }, out[M];
    unsigned char taken[M];
    double total = 0.0;
    for (uint32_t r = 0; r < M; r++) total += 1.0 / (r + 1.0);
    for (uint32_t i = 0; i < DRAWS; i++) {
        mp_zipf_draw(&random, M, 1.0, 1, out, taken);
        counts[out[0]]++;
    }
    for (uint32_t r = 0; r < M; r++) {
        double expected = DRAWS / (r + 1.0) / total;
        assert_true(fabs(counts[r] - expected) < 5.0 * sqrt(expected));
    }
    /* All of them: a permutation. */
    uint32_t seen = 0;
    mp_zipf_draw(&random, M, 1.5, M, out, taken);
    for (uint32_t i = 0; i < M; i++) seen |= 1u << out[i];
    assert_int_equal(seen, (1u << M) - 1);
}

static void shuffles_reach_every_order_equally(void **state) {
    (void)state;
    enum { ROUNDS = 12000 };
    mp_random random = { .state = 9 };
    uint32_t counts[27] = { 0 };
    for (uint32_t i = 0; i < ROUNDS; i++) {
        uint32_t items[3] = { 0, 1, 2 };
        mp_shuffle(&random, items, 3);
        counts[items[0] * 9 + items[1] * 3 + items[2]]++;
    }
    uint32_t orders = 0;
    for (uint32_t i = 0; i < 27; i++) {
        if (counts[i] == 0) continue;
        orders++;
        assert_true(fabs(counts[i] - ROUNDS / 6.0) < 5.0 * sqrt(ROUNDS / 6.0));
    }
    assert_int_equal(orders, 6);
}

static void bootstrap_interval_is_two_standard_errors(void **state) {
    (void)state;
    double values[400];
    for (int i = 0; i < 400; i++) values[i] = i % 2 ? 1.0 : 0.0;
    mp_interval interval = mp_bootstrap(values, 400, 3);
    double standard_error = 0.5 / sqrt(400.0);
    assert_true(interval.mean == 0.5);
    assert_true(fabs((interval.high - interval.low) / (2 * 1.96 * standard_error) - 1.0) < 0.1);
    interval = mp_bootstrap(values, 1, 3);
    assert_true(interval.low == interval.high);
}

static double f1(const char *answer, const char *reference) {
    return mp_score_f1(answer, strlen(answer), &reference, 1);
}

static void f1_is_that_of_squad(void **state) {
    (void)state;
    assert_true(f1("The Denver Broncos.", "denver broncos") == 1.0);
    assert_true(f1("308", "308 points") == 2.0 / 3.0);
    assert_true(f1("Kurt Warner's team", "warners") == 0.5);
    assert_true(f1("no no no", "no") == 0.5); // a word counts as often as both have it
    assert_true(f1("", "x") == 0.0);
    assert_true(f1("the", "a") == 1.0); // nothing is left of both
    assert_true(f1("blue", "red") == 0.0);
    const char *references[] = { "four", "4", "four of them" };
    assert_true(mp_score_f1("4", 1, references, 3) == 1.0);
}

static void divergence_matches_the_definition(void **state) {
    (void)state;
    float p[3] = { 1.0f, 2.0f, 0.5f }, q[3] = { 0.0f, 1.5f, 3.0f };
    double ep[3], eq[3], sp = 0, sq = 0, expected = 0;
    for (int i = 0; i < 3; i++) {
        sp += ep[i] = exp(p[i]);
        sq += eq[i] = exp(q[i]);
    }
    for (int i = 0; i < 3; i++) expected += ep[i] / sp * log(ep[i] / sp / (eq[i] / sq));
    mp_log_softmax(p, 3);
    mp_log_softmax(q, 3);
    assert_true(fabs(mp_kl_divergence(p, q, 3) - expected) < 1e-6);
    assert_true(mp_kl_divergence(p, p, 3) == 0.0);
    float far[2] = { 1000.0f, -1000.0f };
    mp_log_softmax(far, 2);
    assert_true(far[0] == 0.0f && far[1] == -2000.0f);
    assert_true(mp_kl_divergence(far, far, 2) == 0.0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantiles_interpolate),
        cmocka_unit_test(draws_follow_the_weights),
        cmocka_unit_test(shuffles_reach_every_order_equally),
        cmocka_unit_test(bootstrap_interval_is_two_standard_errors),
        cmocka_unit_test(f1_is_that_of_squad),
        cmocka_unit_test(divergence_matches_the_definition),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
