/* backend/cuda/sample against infer/sample and against a slow reference that sorts everything: the same token, but
 * where the draw's number is so near to a boundary between two candidates that the last bits of a sum decide. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>

#include "backend/cuda/sample.h"
#include "base/hash.h"
#include "infer/sample.h"
#include "support/gpu.h"
#include "support/random.h"
#include "support/sampling.h"

enum { HISTORY = 40, MAX_ROWS = 512 };

static rng dice;
static mp_cu_device device;
static bool small; /* for tools that check every access: less of everything */

static float real(float low, float high) {
    return low + (high - low) * (float)(rng_next(&dice) >> 40) / (float)(1 << 24);
}
static uint32_t below(uint32_t n) {
    return rng_below(&dice, n);
}
static float normal(void) {
    float a = real(1e-6f, 1), b = real(0, 6.2831853f);
    return sqrtf(-2 * logf(a)) * cosf(b);
}

static void *memory(size_t bytes) {
    void *p = malloc(bytes);
    assert_non_null(p);
    return p;
}

/* ---- Reference --------------------------------------------------------------------------------------------------- */

/* Whether a draw of u may give `token`. */
static void check_token(const candidate *c, uint32_t kept, bool sure, double u, int32_t token, const char *what) {
    double mass = 0, at = 0;
    for (uint32_t i = 0; i < kept; i++) mass += (double)c[i].weight;
    for (uint32_t i = 0; i < kept; i++) {
        double end = at + (double)c[i].weight / mass;
        if (c[i].id == token) {
            if (u >= at - REFERENCE_NEAR && u <= end + REFERENCE_NEAR) return;
            fail_msg("%s: token %d is drawn from %.7f to %.7f, not by %.7f", what, token, at, end, u);
        }
        at = end;
    }
    if (sure) fail_msg("%s: token %d is none of the %u kept", what, token, kept);
}

/* ---- A batch ----------------------------------------------------------------------------------------------------- */

typedef struct batch {
    uint32_t n_vocab, n_rows;
    float *logits; /* [n_rows, n_vocab] */
    mepic_sampling sampling[MAX_ROWS];
    struct mepic_logit_bias bias[MAX_ROWS][2];
    int32_t tokens[MAX_ROWS][HISTORY];
    mp_sample_row rows[MAX_ROWS];
} batch;

/* The sampler's answers for the batch; the logits must be as they were. */
static void run_batch(mp_cu_sampler *s, const batch *b, mp_sampled *out) {
    size_t bytes = (size_t)b->n_rows * b->n_vocab * sizeof(float);
    float *logits = gpu_put(b->logits, bytes);
    mp_cu_sampler_begin(s);
    for (uint32_t i = 0; i < b->n_rows; i++) {
        mp_sample_row row = b->rows[i];
        row.logprob = i % 2 == 0;
        assert_true(mp_cu_sampler_add(s, &row));
    }
    GPU(cudaDeviceSynchronize());
    assert_true(mp_cu_sampler_run(s, logits, device.stream));
    GPU(cudaStreamSynchronize(device.stream));
    memcpy(out, mp_cu_sampler_drawn(s, 0), b->n_rows * sizeof *out);
    float *after = gpu_get(logits, bytes);
    assert_memory_equal(after, b->logits, bytes);
    free(after);
    gpu_free(logits);
}

static void random_sampling(batch *b, uint32_t i, uint32_t most_k) {
    uint32_t n = 1 + below(HISTORY);
    for (uint32_t t = 0; t < n; t++) b->tokens[i][t] = (int32_t)below(b->n_vocab);
    b->bias[i][0] = (struct mepic_logit_bias){ (int32_t)below(b->n_vocab), real(-9, 9) };
    b->bias[i][1] = (struct mepic_logit_bias){ 3, real(-9, 9) };
    b->sampling[i] = (mepic_sampling){
        .temperature = below(4) ? real(0.1f, 2) : 0,
        .top_k = below(2) ? below(most_k) : 0,
        .top_p = below(2) ? real(0.01f, 1.1f) : 0,
        .min_p = below(2) ? real(0, 0.9f) : 0,
        .repeat_penalty = below(2) ? real(0.8f, 1.5f) : 0,
        .repeat_window = below(2) ? below(30) : 0,
        .presence_penalty = below(2) ? real(-2, 2) : 0,
        .frequency_penalty = below(2) ? real(-2, 2) : 0,
        .seed = rng_next(&dice),
        .logit_bias = b->bias[i],
        .n_logit_bias = below(3),
    };
    b->rows[i] = (mp_sample_row){ .logits = b->n_rows - 1 - i,
                                  .seq = i * 7 % MAX_ROWS,
                                  .sampling = &b->sampling[i],
                                  .tokens = b->tokens[i],
                                  .n_tokens = n,
                                  .n_prompt = below(n + 1) };
}

static const float *logits_of(const batch *b, uint32_t i) {
    return b->logits + (size_t)b->rows[i].logits * b->n_vocab;
}

/* The same batch, but for some rows the host does not know the last token: the step before has sampled it. */
static void check_unknown(mp_cu_sampler *s, const batch *b, const mp_sampled *want, const char *what) {
    static batch before, ahead;
    before.n_vocab = b->n_vocab;
    before.n_rows = ahead.n_rows = b->n_rows;
    before.logits = memory((size_t)b->n_rows * b->n_vocab * sizeof(float));
    memset(before.logits, 0, (size_t)b->n_rows * b->n_vocab * sizeof(float));
    ahead.n_vocab = b->n_vocab;
    ahead.logits = b->logits;
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const mp_sample_row *row = &b->rows[i];
        int32_t last = row->n_tokens ? b->tokens[i][row->n_tokens - 1] : 0;
        before.sampling[i] = (mepic_sampling){ 0 };
        before.rows[i] = (mp_sample_row){ .logits = i, .seq = row->seq, .sampling = &before.sampling[i] };
        before.logits[(size_t)i * b->n_vocab + (uint32_t)last] = 1;
        memcpy(ahead.tokens[i], b->tokens[i], sizeof b->tokens[i]);
        ahead.rows[i] = *row;
        ahead.rows[i].tokens = ahead.tokens[i];
        /* A token that is not known is of the reply. */
        if (i % 3 && row->n_tokens > row->n_prompt) ahead.tokens[i][row->n_tokens - 1] = MP_TOKEN_SAMPLED;
    }
    mp_sampled got[MAX_ROWS];
    run_batch(s, &before, got);
    run_batch(s, &ahead, got);
    for (uint32_t i = 0; i < b->n_rows; i++) {
        if (got[i].token != want[i].token) fail_msg("%s %u: ahead %d, not %d", what, i, got[i].token, want[i].token);
    }
    free(before.logits);
}

/* All rows of the batch against both references; how many tokens are not the host's. */
static uint32_t check_batch(mp_cu_sampler *s, mp_sampler *host, const batch *b, const char *what) {
    mp_sampled drawn[MAX_ROWS];
    run_batch(s, b, drawn);
    candidate *c = memory(b->n_vocab * sizeof *c);
    float *x = memory(b->n_vocab * sizeof *x);
    uint32_t others = 0;
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const mp_sample_row *row = &b->rows[i];
        int32_t token = -1;
        bool found = mp_sample(host, row->sampling, logits_of(b, i), row->tokens, row->n_tokens, row->n_prompt, &token);
        if (!found || row->sampling->temperature <= 0) {
            if (drawn[i].token != (found ? token : -1)) fail_msg("%s %u: %d, not %d", what, i, drawn[i].token, token);
        } else if (drawn[i].token != token) { /* then it has to be a near miss */
            others++;
            for (uint32_t k = 0; k < b->n_vocab; k++) x[k] = reference_usable(logits_of(b, i)[k]);
            reference_adjust(x, row);
            bool sure;
            uint32_t kept = reference_cut(c, reference_candidates(x, b->n_vocab, c), row->sampling, &sure);
            double u = (double)(mp_hash64_pair(row->sampling->seed, row->n_tokens) >> 11) * 0x1p-53;
            check_token(c, kept, sure, u, drawn[i].token, what);
        }
        if (i % 2 == 0 && drawn[i].token >= 0) {
            float want;
            mp_logprobs(logits_of(b, i), b->n_vocab, drawn[i].token, &want, NULL, 0);
            if (!(fabsf(drawn[i].logprob - want) <= 2e-5f + 1e-6f * fabsf(want))) {
                fail_msg("%s %u: log-probability %g, not %g", what, i, (double)drawn[i].logprob, (double)want);
            }
        }
    }
    check_unknown(s, b, drawn, what);
    free(c);
    free(x);
    return others;
}

static void open_both(uint32_t n_vocab, mp_cu_sampler **s, mp_sampler **host) {
    mepic_error err;
    if (mp_cu_sampler_open(&device, n_vocab, MAX_ROWS, MAX_ROWS * (HISTORY + 3), MAX_ROWS, s, &err) != MEPIC_OK) {
        fail_msg("%s", err.message);
    }
    assert_int_equal(mp_sampler_open(n_vocab, host, NULL), MEPIC_OK);
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

static void small_rows(void **state) {
    (void)state;
    static batch b;
    static const uint32_t sizes[] = { 1, 97, 1500 };
    for (int size = 0; size < 3; size++) {
        b.n_vocab = sizes[size] < 4 ? 4 : sizes[size];
        mp_cu_sampler *s;
        mp_sampler *host;
        open_both(b.n_vocab, &s, &host);
        uint32_t others = 0;
        for (int round = small ? 6 : 0; round < 8; round++) {
            b.n_rows = (small ? 12 : MAX_ROWS) - (uint32_t)round;
            b.logits = memory((size_t)b.n_rows * b.n_vocab * sizeof *b.logits);
            for (size_t i = 0; i < (size_t)b.n_rows * b.n_vocab; i++) {
                b.logits[i] = real(-8, 8);
                if (round % 2) b.logits[i] = roundf(b.logits[i]); /* ties */
                if (round == 2 && below(3) == 0) b.logits[i] = NAN;
                if (round == 4 && below(3) == 0) b.logits[i] = -INFINITY;
                if (round == 6 && below(99) == 0) b.logits[i] = INFINITY;
                if (round == 7) b.logits[i] = 0;
            }
            for (uint32_t i = 0; i < b.n_rows; i++) random_sampling(&b, i, b.n_vocab + 9);
            char what[32];
            snprintf(what, sizeof what, "small, round %d", round);
            others += check_batch(s, host, &b, what);
            free(b.logits);
        }
        assert_in_range(others, 0, 8 * MAX_ROWS / 500);
        mp_cu_sampler_close(s);
        mp_sampler_close(host);
    }
}

/* Rows as long as vocabularies are, from peaked to flat, so that every path is taken. */
static void large_rows(void **state) {
    (void)state;
    if (small) skip();
    static batch b;
    static const uint32_t sizes[] = { 128256, 151936, 262144 };
    for (int size = 0; size < 3; size++) {
        b.n_vocab = sizes[size];
        b.n_rows = 40;
        b.logits = memory((size_t)b.n_rows * b.n_vocab * sizeof *b.logits);
        for (uint32_t r = 0; r < b.n_rows; r++) {
            float spread = r % 5 == 0 ? 0.5f : r % 5 == 1 ? 1 : r % 5 == 2 ? 2.5f : r % 5 == 3 ? 6 : 0;
            for (uint32_t i = 0; i < b.n_vocab; i++) {
                float x = normal() * spread;
                b.logits[(size_t)r * b.n_vocab + i] = r % 2 ? x : roundf(x * 64) / 64;
            }
        }
        for (uint32_t i = 0; i < b.n_rows; i++) {
            random_sampling(&b, i, i % 3 == 0 ? 40 : i % 3 == 1 ? 3000 : b.n_vocab);
            b.sampling[i].temperature = i % 10 == 9 ? 0 : real(0.5f, 1.5f);
            if (b.sampling[i].min_p > 0.5f) b.sampling[i].min_p *= 0.01f;
        }
        mp_cu_sampler *s;
        mp_sampler *host;
        open_both(b.n_vocab, &s, &host);
        uint32_t others = check_batch(s, host, &b, "large");
        printf("%u of %u tokens are not the host's\n", others, b.n_rows);
        assert_in_range(others, 0, 3);

        /* A row's token does not depend on its company. */
        mp_sampled all[MAX_ROWS], alone;
        run_batch(s, &b, all);
        static batch one;
        one.n_vocab = b.n_vocab;
        one.n_rows = 1;
        for (uint32_t i = 0; i < b.n_rows; i += 7) {
            one.rows[0] = b.rows[i];
            one.rows[0].logits = 0;
            one.logits = b.logits + (size_t)b.rows[i].logits * b.n_vocab;
            run_batch(s, &one, &alone);
            assert_int_equal(alone.token, all[i].token);
        }
        mp_cu_sampler_close(s);
        mp_sampler_close(host);
        free(b.logits);
    }
}

/* One row many times, with numbers that step through 0 to 1: what is drawn is what is kept. */
static void kept_sets(void **state) {
    (void)state;
    enum { N = 400, STEPS = 4096 };
    candidate c[N];
    GPU(mp_cu_sample_open());
    for (int round = 0; round < (small ? 1 : 60); round++) {
        float x[N], *rows = memory(STEPS * sizeof x);
        for (int i = 0; i < N; i++) x[i] = real(-6, 3);
        for (int i = 0; i < STEPS; i++) memcpy(rows + (size_t)i * N, x, sizeof x);
        mepic_sampling p = { .temperature = real(0.3f, 1.5f),
                             .top_k = round % 3 == 0 ? 1 + below(60) : 0,
                             .top_p = round % 2 == 0 ? real(0.1f, 0.95f) : 0,
                             .min_p = round % 3 == 1 ? real(0.01f, 0.5f) : 0 };
        mp_cu_draw *draws = memory(STEPS * sizeof *draws);
        for (uint32_t i = 0; i < STEPS; i++) {
            draws[i] = (mp_cu_draw){ .random = ((uint64_t)i << 52) + (1ull << 51),
                                     .logits = i,
                                     .seq = i,
                                     .top_k = p.top_k,
                                     .temperature = p.temperature,
                                     .top_p = p.top_p,
                                     .min_p = p.min_p };
        }
        float *d_rows = gpu_put(rows, STEPS * sizeof x);
        mp_cu_draw *d_draws = gpu_put(draws, STEPS * sizeof *draws);
        mp_sampled *d_drawn = gpu_new(STEPS * sizeof *d_drawn, 0xff);
        int32_t *d_tokens = gpu_new(STEPS * sizeof *d_tokens, 0xff);
        GPU_DONE(mp_cu_sample_rows(d_draws, STEPS, NULL, NULL, d_rows, N, 1, d_drawn, d_tokens, NULL));
        mp_sampled *drawn = gpu_get(d_drawn, STEPS * sizeof *drawn);
        int32_t *tokens = gpu_get(d_tokens, STEPS * sizeof *tokens);
        for (int i = 0; i < STEPS; i++) assert_int_equal(tokens[i], drawn[i].token);
        if (device.code >= 90) { /* the number of blocks does not matter */
            GPU_DONE(
                mp_cu_sample_rows(d_draws, STEPS, NULL, NULL, d_rows, N, 2u << round % 3, d_drawn, d_tokens, NULL));
            mp_sampled *again = gpu_get(d_drawn, STEPS * sizeof *again);
            for (int i = 0; i < STEPS; i++) assert_int_equal(again[i].token, drawn[i].token);
            free(again);
        }
        uint32_t seen[N] = { 0 };
        bool sure;
        uint32_t kept = reference_cut(c, reference_candidates(x, N, c), &p, &sure);
        double mass = 0;
        for (uint32_t i = 0; i < kept; i++) mass += (double)c[i].weight;
        for (uint32_t i = 0; i < STEPS; i++) {
            assert_in_range(drawn[i].token, 0, N - 1);
            seen[drawn[i].token]++;
            check_token(c, kept, sure, (i + 0.5) / STEPS, drawn[i].token, "set");
        }
        for (uint32_t i = 0; i < kept && sure; i++) {
            if ((double)c[i].weight / mass > 1.01 / STEPS && !seen[c[i].id]) {
                fail_msg("round %d: token %d is kept but never drawn", round, c[i].id);
            }
        }
        free(rows);
        free(draws);
        free(drawn);
        free(tokens);
        gpu_free(d_tokens);
        gpu_free(d_rows);
        gpu_free(d_draws);
        gpu_free(d_drawn);
    }
}

static void nothing_to_draw(void **state) {
    (void)state;
    static batch b;
    b.n_vocab = 5000;
    b.n_rows = 6;
    b.logits = memory((size_t)b.n_rows * b.n_vocab * sizeof *b.logits);
    for (size_t i = 0; i < (size_t)b.n_rows * b.n_vocab; i++) b.logits[i] = i % 2 ? NAN : -INFINITY;
    for (uint32_t i = 0; i < b.n_rows; i++) {
        b.sampling[i] =
            (mepic_sampling){ .temperature = i % 2 ? 1 : 0, .top_k = i == 3 ? 4 : 0, .top_p = i == 5 ? 0.5f : 0 };
        b.rows[i] = (mp_sample_row){ .logits = i, .seq = i, .sampling = &b.sampling[i] };
    }
    mp_cu_sampler *s;
    mp_sampler *host;
    open_both(b.n_vocab, &s, &host);
    mp_sampled drawn[6];
    run_batch(s, &b, drawn);
    for (int i = 0; i < 6; i++) assert_int_equal(drawn[i].token, -1);
    for (uint32_t i = 0; i < 5; i++) b.logits[i * b.n_vocab + 77 + i] = -1e30f; /* the only candidate */
    run_batch(s, &b, drawn);
    for (int i = 0; i < 5; i++) assert_int_equal(drawn[i].token, 77 + i);
    assert_int_equal(drawn[5].token, -1);
    mp_cu_sampler_close(s);
    mp_sampler_close(host);
    free(b.logits);
}

/* A row that does not fit is refused and leaves nothing behind. */
static void no_room(void **state) {
    (void)state;
    mp_cu_sampler *s;
    mepic_error err;
    assert_int_equal(mp_cu_sampler_open(&device, 100, 2, 10, 2, &s, &err), MEPIC_OK);
    const int32_t tokens[12] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };
    const mepic_sampling p = { .repeat_penalty = 2 };
    mp_sample_row row = { .sampling = &p, .tokens = tokens, .n_tokens = 12 };
    mp_cu_sampler_begin(s);
    assert_false(mp_cu_sampler_add(s, &row));
    row.n_tokens = 6;
    assert_true(mp_cu_sampler_add(s, &row));
    assert_false(mp_cu_sampler_add(s, &row));
    row.n_tokens = 4;
    assert_true(mp_cu_sampler_add(s, &row));
    row.n_tokens = 0;
    assert_false(mp_cu_sampler_add(s, &row)); /* two rows */
    mp_cu_sampler_close(s);
}

/* test_cuda_sample [small [single]]; single: no clusters, which racecheck of compute-sanitizer does not come out of. */
int main(int argc, char **argv) {
    if (mp_cu_device_count() == 0) return 77;
    small = argc > 1 && strcmp(argv[1], "small") == 0;
    dice = rng_open(20261124);
    mepic_error err;
    if (mp_cu_device_open(0, &device, &err) != MEPIC_OK) {
        printf("%s\n", err.message);
        return 1;
    }
    if (argc > 2 && strcmp(argv[2], "single") == 0) device.code = 80;
    const struct CMUnitTest tests[] = { cmocka_unit_test(small_rows), cmocka_unit_test(large_rows),
                                        cmocka_unit_test(kept_sets), cmocka_unit_test(nothing_to_draw),
                                        cmocka_unit_test(no_room) };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    mp_cu_device_close(&device);
    return failed;
}
