/* Real models against facts from outside: logits computed exactly by an independent program, and logits, greedy replies
 * and negative log-likelihoods of llama.cpp (tests/golden/README.md). One model a run:
 *
 *     test_golden MODEL [cuda [fp8]]        smollm2-135m, qwen0.5b, qwen1.5b
 *
 * Exits 77 when the model or its facts are not there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mepic.h>

#include "backend/backend.h"
#include "golden.h"
#include "support/models.h"
#include "support/oracle.h"

static const struct {
    const char *name, *file;
    uint32_t oracle_tokens; /* longest prompt that the oracle is asked for: it is slow */
} models[] = {
    { "smollm2-135m", SMOLLM2, 200 },
    { "qwen0.5b", QWEN_0_5B, 20 },
    { "qwen1.5b", QWEN_1_5B, 0 },
};

static const char *model_name;
static uint32_t oracle_tokens;
static char model_path[4096];
static mepic_engine *engine;
static mepic_model_info info;
static double close_call = 0.1; /* a margin of logits under which another choice is no error */

static json_t *load(const char *kind) {
    char name[64];
    snprintf(name, sizeof name, "%s_%s.json", kind, model_name);
    return golden_load(name);
}

static mepic_prepared *prepare_ids(const json_t *ids, size_t n) {
    int32_t *tokens = calloc(n, sizeof *tokens);
    assert_non_null(tokens);
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    const mepic_segment segment = { .kind = MEPIC_TEXT, .tokens = tokens, .n_tokens = n };
    const mepic_prompt prompt = { .size = sizeof prompt, .segments = &segment, .n_segments = 1, .no_bos = true };
    mepic_prepared *prepared;
    mepic_error err;
    if (mepic_prepare(engine, &prompt, &prepared, &err) != MEPIC_OK) fail_msg("%s", err.message);
    free(tokens);
    return prepared;
}

/* Runs one request alone; its tokens go to reply[cap]. */
static void run(const mepic_request *request, int32_t *reply, size_t cap, mepic_usage *usage) {
    mepic_error err;
    mepic_request_id id;
    size_t n = 0;
    if (mepic_submit(engine, request, &id, &err) != MEPIC_OK) fail_msg("%s", err.message);
    while (mepic_busy(engine)) {
        if (mepic_step(engine, &err) != MEPIC_OK) fail_msg("%s", err.message);
        mepic_event event;
        while (mepic_poll(engine, &event)) {
            if (event.kind == MEPIC_EVENT_TOKEN && n < cap) reply[n++] = event.token;
            if (event.kind == MEPIC_EVENT_DONE) *usage = event.usage;
        }
    }
}

/* ---- Logits ------------------------------------------------------------------------------------------------------ */

typedef struct kept_row {
    uint32_t position; /* whose logits to keep */
    float *logits;     /* [n_vocab] */
} kept_row;

static void keep(void *user, uint32_t position, const float *logits, uint32_t n_vocab) {
    const kept_row *kept = user;
    if (position == kept->position) memcpy(kept->logits, logits, n_vocab * sizeof *logits);
}

/* The value of `id` in a list of [id, logit]; NAN if it is not there. */
static double listed(const json_t *top, int32_t id) {
    size_t i;
    json_t *pair;
    json_array_foreach(top, i, pair) {
        if (json_integer_value(json_array_get(pair, 0)) == id) return json_number_value(json_array_get(pair, 1));
    }
    return NAN;
}

typedef struct distance {
    double sum;
    uint32_t n;
} distance;

static double rms(distance d) {
    return sqrt(d.sum / d.n);
}

/* Our and the peer's squared distances from the exact logits, over the ids that both lists have. */
static void measure(const json_t *exact, const json_t *peer, const float *logits, distance *ours, distance *theirs) {
    size_t i;
    json_t *pair;
    json_array_foreach(exact, i, pair) {
        int32_t id = (int32_t)json_integer_value(json_array_get(pair, 0));
        double want = json_number_value(json_array_get(pair, 1)), other = listed(peer, id);
        if (isnan(other)) continue;
        ours->sum += ((double)logits[id] - want) * ((double)logits[id] - want);
        theirs->sum += (other - want) * (other - want);
        ours->n++;
        theirs->n++;
    }
}

static void logits_are_closer_to_exact_than_the_peer(void **state) {
    (void)state;
    json_t *exact = load("exact"), *peer = load("logits");
    if (!exact || !peer) skip();
    float *logits = calloc(info.n_vocab, sizeof *logits);
    assert_non_null(logits);
    distance ours = { 0 }, theirs = { 0 };
    size_t i;
    json_t *prompt;
    json_array_foreach(json_object_get(exact, "prompts"), i, prompt) {
        const json_t *ids = json_object_get(prompt, "ids"),
                     *other = json_array_get(json_object_get(peer, "prompts"), i);
        mepic_prepared *prepared = prepare_ids(ids, json_array_size(ids));
        kept_row kept = { .position = (uint32_t)json_array_size(ids) - 1, .logits = logits };
        const mepic_request request = {
            .size = sizeof request, .prompt = prepared, .max_tokens = 1, .on_logits = keep, .user = &kept
        };
        int32_t token;
        mepic_usage usage;
        run(&request, &token, 1, &usage);
        distance a = { 0 }, b = { 0 };
        measure(json_object_get(prompt, "top20"), json_object_get(other, "top20"), logits, &a, &b);
        print_message("prompt %zu, %3zu tokens: rms distance from exact %.5f (llama.cpp %.5f)\n", i,
                      json_array_size(ids), rms(a), rms(b));
        assert_true(rms(a) <= rms(b));
        ours.sum += a.sum, ours.n += a.n;
        theirs.sum += b.sum, theirs.n += b.n;
        mepic_prepared_free(prepared);
    }
    print_message("all: %.5f (llama.cpp %.5f)\n", rms(ours), rms(theirs));
    free(logits);
    json_decref(exact);
    json_decref(peer);
}

/* ---- The oracle -------------------------------------------------------------------------------------------------- */

enum { MAX_ORACLE_TOKENS = 256 };

static mp_model *oracle_model;
static oracle *the_oracle;

/* Logits [n_vocab] behind the last of n tokens, by the tests' own slow forward pass. */
static void ask_oracle(const int32_t *tokens, uint32_t n, double *logits) {
    mepic_error err;
    if (!the_oracle) {
        if (mp_model_open(model_path, &oracle_model, &err) != MEPIC_OK) fail_msg("%s", err.message);
        the_oracle = oracle_open(oracle_model);
    }
    int32_t positions[MAX_ORACLE_TOKENS];
    assert_true(n <= MAX_ORACLE_TOKENS);
    for (uint32_t i = 0; i < n; i++) positions[i] = (int32_t)i;
    oracle_kv kv;
    oracle_compute(the_oracle, tokens, positions, n, NULL, 0, &kv);
    oracle_logits(the_oracle, &kv, n - 1, logits);
    oracle_kv_free(&kv);
}

/* The oracle of the other tests is itself held against the independent program. */
static void the_oracle_meets_the_exact_logits(void **state) {
    (void)state;
    json_t *exact = load("exact");
    if (!exact) skip();
    double *logits = calloc(info.n_vocab, sizeof *logits), worst = 0;
    assert_non_null(logits);
    size_t i;
    json_t *prompt;
    json_array_foreach(json_object_get(exact, "prompts"), i, prompt) {
        const json_t *ids = json_object_get(prompt, "ids");
        uint32_t n = (uint32_t)json_array_size(ids);
        if (n > oracle_tokens) continue;
        int32_t tokens[MAX_ORACLE_TOKENS];
        for (uint32_t t = 0; t < n; t++) tokens[t] = (int32_t)json_integer_value(json_array_get(ids, t));
        ask_oracle(tokens, n, logits);
        size_t k;
        json_t *pair;
        json_array_foreach(json_object_get(prompt, "top20"), k, pair) {
            int64_t id = json_integer_value(json_array_get(pair, 0));
            worst = fmax(worst, fabs(logits[id] - json_number_value(json_array_get(pair, 1))));
        }
        double sum = 0;
        for (uint32_t v = 0; v < info.n_vocab; v++) sum += exp(logits[v] - logits[0]);
        worst = fmax(worst, fabs(logits[0] + log(sum) - json_number_value(json_object_get(prompt, "logsumexp"))));
    }
    print_message("largest distance of the oracle from exact: %.6f\n", worst);
    assert_true(worst < 1e-3);
    free(logits);
    json_decref(exact);
}

/* ---- Greedy replies ---------------------------------------------------------------------------------------------- */

/* Whether, behind the prompt and `same` common tokens, exact arithmetic puts our token above the peer's. */
static bool oracle_agrees(const mepic_prepared *prompt, const int32_t *reply, size_t same, int64_t theirs) {
    size_t n;
    const int32_t *ids = mepic_prepared_tokens(prompt, &n);
    int32_t tokens[MAX_ORACLE_TOKENS];
    assert_true(n + same <= MAX_ORACLE_TOKENS);
    memcpy(tokens, ids, n * sizeof *tokens);
    memcpy(tokens + n, reply, same * sizeof *tokens);
    double *logits = calloc(info.n_vocab, sizeof *logits);
    assert_non_null(logits);
    ask_oracle(tokens, (uint32_t)(n + same), logits);
    double gap = logits[reply[same]] - logits[theirs];
    print_message("    exact: ours is ahead by %.4f\n", gap);
    free(logits);
    return gap > 0;
}

/* Until the first difference, which may only be where the peer's own choice was close, or wrong: its logits lie up to
 * 0.8 from exact ones, so exact arithmetic is asked. */
static void greedy_replies_equal_the_peer_s(void **state) {
    (void)state;
    json_t *peer = load("logits");
    if (!peer) skip();
    double seconds = 0;
    uint32_t n_decoded = 0;
    size_t i;
    json_t *prompt;
    json_array_foreach(json_object_get(peer, "prompts"), i, prompt) {
        const json_t *ids = json_object_get(prompt, "ids"), *want = json_object_get(prompt, "greedy32");
        mepic_prepared *prepared = prepare_ids(ids, json_array_size(ids));
        const mepic_request request = {
            .size = sizeof request, .prompt = prepared, .max_tokens = 32, .ignore_eos = true
        };
        int32_t reply[32];
        mepic_usage usage;
        run(&request, reply, 32, &usage);
        seconds += (double)(usage.total_ns - usage.ttft_ns) * 1e-9;
        n_decoded += usage.completion_tokens - 1;
        size_t same = 0;
        while (same < 32 && reply[same] == json_integer_value(json_array_get(want, same))) same++;
        if (same < 32) {
            int64_t theirs = json_integer_value(json_array_get(want, same));
            double margin = json_number_value(json_array_get(json_object_get(prompt, "greedy_margin_top1_top2"), same));
            print_message("prompt %zu: token %zu is %d, llama.cpp's %d by a margin of %.4f\n", i, same, reply[same],
                          (int)theirs, margin);
            assert_true(margin < close_call || oracle_agrees(prepared, reply, same, theirs));
        }
        mepic_prepared_free(prepared);
    }
    print_message("decode: %.1f tokens/s\n", n_decoded / seconds);
    json_decref(peer);
}

/* ---- Likelihood -------------------------------------------------------------------------------------------------- */

typedef struct likelihood {
    const int32_t *ids;
    uint32_t n, n_seen;
    double sum, first; /* over all predictions, over the first 511 */
} likelihood;

static void add_row(void *user, uint32_t position, const float *logits, uint32_t n_vocab) {
    likelihood *l = user;
    if (position + 1 >= l->n) return;
    double sum = 0;
    for (uint32_t v = 0; v < n_vocab; v++) sum += exp((double)logits[v] - (double)logits[0]);
    double nll = (double)logits[0] + log(sum) - (double)logits[l->ids[position + 1]];
    l->n_seen++;
    l->sum += nll;
    if (position < 511) l->first += nll;
}

static void check_mean_within(double bound, const char *what, double got, const char *whose, double want) {
    print_message("mean NLL over %s: %.5f (%s %.5f, %+.3f %%)\n", what, got, whose, want, 100 * (got / want - 1));
    assert_true(fabs(got / want - 1) <= bound);
}

static void check_mean(const char *what, double got, const char *whose, double want) {
    check_mean_within(0.005, what, got, whose, want);
}

/* Of a text's tokens, by the engine `e`. */
static likelihood likelihood_of(const json_t *ids) {
    uint32_t n = (uint32_t)json_array_size(ids);
    mepic_prepared *prepared = prepare_ids(ids, n);
    size_t n_tokens;
    likelihood l = { .ids = mepic_prepared_tokens(prepared, &n_tokens), .n = n };
    assert_int_equal(n_tokens, n);
    mepic_request request = {
        .size = sizeof request, .prompt = prepared, .max_tokens = 1, .on_logits = add_row, .user = &l
    };
    request.logits_of_prompt = true;
    int32_t token;
    mepic_usage usage;
    run(&request, &token, 1, &usage);
    assert_int_equal(l.n_seen, n - 1);
    mepic_prepared_free(prepared);
    return l;
}

static void the_likelihood_of_a_text_equals_the_peer_s(void **state) {
    (void)state;
    json_t *peer = load("nll");
    if (!peer) skip();
    const json_t *ids = json_object_get(peer, "ids"), *want = json_object_get(peer, "f32kv_fa_off");
    likelihood l = likelihood_of(ids);
    uint32_t n = l.n;
    check_mean("511", l.first / 511, "llama.cpp", json_number_value(json_object_get(want, "mean_nll_first512")));
    check_mean("2047", l.sum / (n - 1), "llama.cpp", json_number_value(json_object_get(want, "mean_nll_first2048")));

    /* Without the logits of every row: what prefill costs. */
    mepic_prepared *prepared = prepare_ids(ids, n);
    const mepic_request request = { .size = sizeof request, .prompt = prepared, .max_tokens = 1 };
    int32_t token;
    mepic_usage usage;
    run(&request, &token, 1, &usage);
    print_message("prefill of %u tokens: %.1f tokens/s\n", n, n / ((double)usage.ttft_ns * 1e-9));
    mepic_prepared_free(prepared);
    json_decref(peer);
}

static mepic_status open_engine(const char *device, mepic_weights weights, mepic_kv_type kv_type, mepic_error *err) {
    const mepic_engine_options options = {
        .size = sizeof options,
        .model_path = model_path,
        .context = 4096,
        .pages = 300,
        .kv_type = strcmp(device, "cpu") == 0 ? MEPIC_KV_F32 : kv_type,
        .reuse = MEPIC_REUSE_NONE,
        .canonical_context = "",
        .device = device,
        .weights = weights,
    };
    mepic_status status = mepic_engine_open(&options, &engine, err);
    if (status != MEPIC_OK) return status;
    mepic_model_info_read(engine, &info);
    printf("%s on %s\n", model_name, info.backend);
    return MEPIC_OK;
}

/* Within `bound` of the same model's on another device or with other weights. */
static void compare_likelihoods(double bound, const char *whose, const char *device, mepic_weights weights) {
    json_t *peer = load("nll");
    if (!peer) skip();
    const json_t *ids = json_object_get(peer, "ids");
    likelihood here = likelihood_of(ids);
    mepic_engine *first = engine;
    mepic_error err;
    if (open_engine(device, weights, MEPIC_KV_DEFAULT, &err) != MEPIC_OK) fail_msg("%s", err.message);
    likelihood there = likelihood_of(ids);
    mepic_engine_close(engine);
    engine = first;
    mepic_model_info_read(engine, &info);
    check_mean_within(bound, "511", here.first / 511, whose, there.first / 511);
    check_mean_within(bound, "2047", here.sum / (here.n - 1), whose, there.sum / (there.n - 1));
    json_decref(peer);
}

static void the_likelihood_on_cuda_equals_the_cpu_s(void **state) {
    (void)state;
    compare_likelihoods(0.005, "CPU", "cpu", MEPIC_WEIGHTS_DEFAULT);
}

static void the_likelihood_with_fp8_weights_is_near_bf16_s(void **state) {
    (void)state;
    compare_likelihoods(0.02, "bf16", "cuda", MEPIC_WEIGHTS_BF16);
}

static void the_likelihood_with_fp8_kv_is_near_bf16_s(void **state) {
    (void)state;
    compare_likelihoods(0.01, "bf16", "cuda", MEPIC_WEIGHTS_DEFAULT);
}

static bool find_model(const char *name) {
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        if (strcmp(models[i].name, name) != 0) continue;
        model_name = models[i].name;
        oracle_tokens = models[i].oracle_tokens;
        return real_model_find(models[i].file, model_path, sizeof model_path);
    }
    return false;
}

int main(int argc, char **argv) {
    bool cuda = argc >= 3 && strcmp(argv[2], "cuda") == 0, fp8 = cuda && argc == 4 && strcmp(argv[3], "fp8") == 0;
    bool kv8 = cuda && argc == 4 && strcmp(argv[3], "kv8") == 0;
    if (argc != 2 + cuda + fp8 + kv8 || !find_model(argv[1])) {
        fprintf(stderr, "no such model in the cache; ./dev models fetches them\n");
        return 77;
    }
    const mp_backend_ops *ops;
    uint32_t device;
    if (cuda && (mp_backend_find("cuda", &ops, &device, NULL) != MEPIC_OK || ops->n_devices() == 0)) return 77;
    if (cuda) close_call = 0.5; /* logits of bf16 arithmetic lie up to that far from exact ones */
    mepic_error err;
    mepic_status status = open_engine(cuda ? "cuda" : "cpu", fp8 ? MEPIC_WEIGHTS_FP8 : MEPIC_WEIGHTS_DEFAULT,
                                      kv8 ? MEPIC_KV_FP8 : MEPIC_KV_DEFAULT, &err);
    if (status != MEPIC_OK) {
        fprintf(stderr, "%s\n", err.message);
        return fp8 && status == MEPIC_ERR_UNSUPPORTED ? 77 : 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_closer_to_exact_than_the_peer),
        cmocka_unit_test(the_oracle_meets_the_exact_logits),
        cmocka_unit_test(greedy_replies_equal_the_peer_s),
        cmocka_unit_test(the_likelihood_of_a_text_equals_the_peer_s),
    };
    const struct CMUnitTest cuda_tests[] = {
        cmocka_unit_test(greedy_replies_equal_the_peer_s),
        cmocka_unit_test(the_likelihood_on_cuda_equals_the_cpu_s),
    };
    const struct CMUnitTest fp8_tests[] = { cmocka_unit_test(the_likelihood_with_fp8_weights_is_near_bf16_s) };
    const struct CMUnitTest kv8_tests[] = { cmocka_unit_test(the_likelihood_with_fp8_kv_is_near_bf16_s) };
    int failed = kv8    ? cmocka_run_group_tests(kv8_tests, NULL, NULL)
                 : fp8  ? cmocka_run_group_tests(fp8_tests, NULL, NULL)
                 : cuda ? cmocka_run_group_tests(cuda_tests, NULL, NULL)
                        : cmocka_run_group_tests(tests, NULL, NULL);
    if (the_oracle) oracle_close(the_oracle);
    mp_model_close(oracle_model);
    mepic_engine_close(engine);
    return failed;
}
