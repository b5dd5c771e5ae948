/* engine/: what mepic.h refuses, by name and with the numbers, and every allocation that may fail. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "support/replies.h"

static void a_bad_option_is_named(void **state) {
    (void)state;
    const mepic_engine_options good = tiny_options();
    mepic_engine_options o[18];
    for (size_t i = 0; i < 18; i++) o[i] = good;
    const char *words[18] = {
        "size",     "model_path",  "threads",           "page_size",   "page_size", "pages",
        "context",  "max_running", "max_queued",        "step_tokens", "kv_type",   "reuse",
        "eviction", "isa",         "canonical_context", "kv_memory",   "context",   "weights",
    };
    o[0].size = 0;
    o[1].model_path = NULL;
    o[2].threads = 257;
    o[3].page_size = 48;
    o[4].page_size = 256;
    o[5].pages = 1;
    o[6].context = 1u << 30;
    o[7].max_running = 5000;
    o[8].max_queued = 1u << 21;
    o[9].step_tokens = 1u << 17;
    o[10].kv_type = (mepic_kv_type)9;
    o[11].reuse = (mepic_reuse)9;
    o[12].eviction = (mepic_eviction)9;
    o[13].isa = "sse9";
    o[14].canonical_context = "/nowhere/text";
    o[15].pages = 16;       /* 256 tokens; the context asked for has 512 */
    o[16].context = 100000; /* trained for 4096 */
    o[17].weights = (mepic_weights)9;
    for (size_t i = 0; i < 18; i++) {
        mepic_engine *engine = NULL;
        mepic_error err = { 0 };
        mepic_status st = mepic_engine_open(&o[i], &engine, &err);
        expect(st, i == 14 ? MEPIC_ERR_IO : MEPIC_ERR_ARGUMENT, &err, words[i]);
        assert_null(engine);
    }
    mepic_engine *none = NULL;
    mepic_error null_err = { 0 };
    expect(mepic_engine_open(NULL, &none, &null_err), MEPIC_ERR_ARGUMENT, &null_err, "mepic_engine_options is NULL");
    mepic_engine_options missing = good;
    missing.model_path = "/nowhere/model.gguf";
    mepic_engine *engine = NULL;
    mepic_error err = { 0 };
    expect(mepic_engine_open(&missing, &engine, &err), MEPIC_ERR_IO, &err, "/nowhere/model.gguf");
}

static void a_bad_request_is_named(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options), *other = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question), *foreign = prepare_text(other, question);
    const char *const empty[] = { "" };
    const char *const many[17] = {
        "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a"
    };
    const mepic_request good = { .size = sizeof good, .prompt = prompt, .max_tokens = 1 };
    mepic_request q[9];
    for (size_t i = 0; i < 9; i++) q[i] = good;
    const char *words[9] = { "size",    "prompt", "another engine", "reuse",      "top_logprobs",
                             "stop[0]", "n_stop", "stop_tokens",    "temperature" };
    q[0].size = 3;
    q[1].prompt = NULL;
    q[2].prompt = foreign;
    q[3].reuse = (mepic_reuse)7;
    q[4].top_logprobs = 21;
    q[5].stop = empty, q[5].n_stop = 1;
    q[6].stop = many, q[6].n_stop = 17;
    q[7].n_stop_tokens = 3;
    q[8].sampling.temperature = NAN;
    for (size_t i = 0; i < 9; i++) {
        mepic_error err = { 0 };
        mepic_request_id id = 77;
        expect(mepic_submit(engine, &q[i], &id, &err), MEPIC_ERR_ARGUMENT, &err, words[i]);
        assert_int_equal(id, 77);
    }
    mepic_error err = { 0 };
    expect(mepic_submit(engine, NULL, &(mepic_request_id){ 0 }, &err), MEPIC_ERR_ARGUMENT, &err,
           "mepic_request is NULL");
    assert_false(mepic_busy(engine));
    mepic_prepared_free(foreign);
    mepic_prepared_free(prompt);
    mepic_engine_close(other);
    mepic_engine_close(engine);
}

/* Asking for a longer context does not help where the model has none, or the pool. */
static void too_long_says_what_helps(void **state) {
    (void)state;
    static const struct {
        uint32_t context, pages; /* 0: the default, which is the trained length, 4096 */
        const char *helps;
    } cases[] = {
        { 512, 64, "in the context of 512; shorten it or raise context" },
        { 0, 512, "in the context of 4096; shorten it; the model was trained for no longer context" },
        { 4096, 512, "in the context of 4096; shorten it; the model was trained for no longer context" },
        { 0, 64, "in the context of 1024; shorten it or raise kv_memory or pages, which hold no longer context" },
    };
    static int32_t tokens[4096];
    const mepic_segment segment = { .kind = MEPIC_TEXT, .tokens = tokens, .n_tokens = 4096 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mepic_engine_options options = tiny_options();
        options.context = cases[i].context;
        options.pages = cases[i].pages;
        mepic_engine *engine = open_engine(&options);
        mepic_prepared *prompt = prepare(engine, &segment, 1);
        const mepic_request request = { .size = sizeof request, .prompt = prompt };
        mepic_error err = { 0 };
        mepic_request_id id;
        expect(mepic_submit(engine, &request, &id, &err), MEPIC_ERR_TOO_LONG, &err, cases[i].helps);
        mepic_prepared_free(prompt);
        mepic_engine_close(engine);
    }
}

/* A prompt of one segment is refused by submit, with its tokens and with what there is room for (512). */
static void expect_too_long(mepic_engine *engine, const mepic_segment *segment) {
    mepic_prepared *prompt = prepare(engine, segment, 1);
    size_t n_prompt;
    mepic_prepared_tokens(prompt, &n_prompt);
    const mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 1 };
    mepic_error err = { 0 };
    mepic_request_id id;
    char number[24];
    snprintf(number, sizeof number, "%zu", n_prompt);
    expect(mepic_submit(engine, &request, &id, &err), MEPIC_ERR_TOO_LONG, &err, number);
    assert_non_null(strstr(err.message, "512"));
    mepic_prepared_free(prompt);
}

static void what_never_fits_is_refused_with_the_numbers(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    int32_t tokens[600];
    for (int i = 0; i < 600; i++) tokens[i] = i % 250;
    const size_t megabytes = 4 << 20;
    char *run_of = malloc(megabytes);
    assert_non_null(run_of);
    for (int kind = MEPIC_TEXT; kind <= MEPIC_CHUNK; kind++) {
        mepic_segment segment = { .kind = (mepic_segment_kind)kind, .tokens = tokens, .n_tokens = 600 };
        expect_too_long(engine, &segment);
        memset(run_of, kind == MEPIC_TEXT ? 'a' : 0, megabytes);
        segment = (mepic_segment){ .kind = (mepic_segment_kind)kind, .text = run_of, .len = megabytes };
        expect_too_long(engine, &segment);
    }
    free(run_of);
    assert_false(mepic_busy(engine));
    mepic_engine_close(engine);
}

/* What holds no token takes no place, wherever it stands. */
static void empty_segments_change_nothing(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    const int32_t none[1] = { 0 };
    const mepic_segment with[] = { { .kind = MEPIC_CHUNK, .tokens = none },
                                   { .kind = MEPIC_CHUNK },
                                   text_of(question),
                                   { .kind = MEPIC_CHUNK, .text = "" },
                                   text_of("") };
    const mepic_segment without[] = { text_of(question) };
    mepic_prepared *p[2];
    const int32_t *ids[2];
    size_t n[2];
    for (int i = 0; i < 2; i++) {
        const mepic_prompt prompt = {
            .size = sizeof prompt, .segments = i ? without : with, .n_segments = i ? 1 : 5, .no_bos = true
        };
        mepic_error err;
        if (mepic_prepare(engine, &prompt, &p[i], &err) != MEPIC_OK) fail_msg("%s", err.message);
        ids[i] = mepic_prepared_tokens(p[i], &n[i]);
    }
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(ids[0], ids[1], n[0] * sizeof **ids);
    result r;
    run(engine, &(mepic_request){ .prompt = p[0], .max_tokens = 2, .ignore_eos = true }, &r);
    for (int i = 0; i < 2; i++) mepic_prepared_free(p[i]);
    mepic_engine_close(engine);
}

static void prompts_are_checked(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    const int32_t bad[1] = { 1 << 20 };
    const mepic_segment segments[] = {
        { .kind = MEPIC_TEXT, .tokens = bad, .n_tokens = 1 },
        { .kind = (mepic_segment_kind)5, .text = "a", .len = 1 },
        { .kind = MEPIC_TEXT, .text = NULL, .len = 4 },
        text_of(""),
    };
    const char *words[] = { "1048576", "kind", "text is NULL", "empty" };
    for (size_t i = 0; i < 4; i++) {
        const mepic_prompt prompt = {
            .size = sizeof prompt, .segments = &segments[i], .n_segments = 1, .no_bos = true
        };
        mepic_prepared *prepared = NULL;
        mepic_error err = { 0 };
        expect(mepic_prepare(engine, &prompt, &prepared, &err), MEPIC_ERR_ARGUMENT, &err, words[i]);
        assert_null(prepared);
    }
    const mepic_message nobody = { .role = "nobody", .parts = &segments[3], .n_parts = 1 };
    const mepic_prompt prompt = { .size = sizeof prompt, .messages = &nobody, .n_messages = 1 };
    mepic_prepared *prepared = NULL;
    mepic_error err = { 0 };
    expect(mepic_prepare(engine, &prompt, &prepared, &err), MEPIC_ERR_ARGUMENT, &err, "nobody");
    const mepic_prompt none = { .size = sizeof none };
    expect(mepic_prepare(engine, &none, &prepared, &err), MEPIC_ERR_ARGUMENT, &err, "empty");
    expect(mepic_prepare(engine, NULL, &prepared, &err), MEPIC_ERR_ARGUMENT, &err, "mepic_prompt is NULL");

    /* any bytes are text */
    char bytes[128];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (char)(i * 2);
    const mepic_segment noise = { .kind = MEPIC_CHUNK, .text = bytes, .len = sizeof bytes };
    mepic_prepared *odd = prepare(engine, &noise, 1);
    const mepic_request request = { .prompt = odd, .max_tokens = 2, .ignore_eos = true };
    result r;
    run(engine, &request, &r);
    mepic_prepared_free(odd);
    mepic_engine_close(engine);
}

static void tokens_and_bytes_convert_both_ways(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    const char text[] = "Any text, <|im_end|> even \xc3\xa4.";
    size_t n, n_special, len;
    int32_t ids[64];
    char bytes[64];
    assert_int_equal(mepic_tokenize(engine, text, strlen(text), false, NULL, 0, &n, NULL), MEPIC_OK);
    assert_int_equal(mepic_tokenize(engine, text, strlen(text), true, ids, 64, &n_special, NULL), MEPIC_OK);
    assert_true(n_special < n && n <= 64);
    assert_int_equal(mepic_detokenize(engine, ids, n_special, NULL, 0, &len, NULL), MEPIC_OK);
    assert_int_equal(len, strlen(text));
    assert_int_equal(mepic_detokenize(engine, ids, n_special, bytes, 64, &len, NULL), MEPIC_OK);
    assert_memory_equal(bytes, text, len);
    ids[0] = -1;
    mepic_error err = { 0 };
    expect(mepic_detokenize(engine, ids, 1, bytes, 64, &len, &err), MEPIC_ERR_ARGUMENT, &err, "-1");
    mepic_engine_close(engine);
}

/* One life of an engine; every allocation in it may fail. */
static mepic_status life(const mepic_engine_options *options) {
    mepic_engine *engine;
    mepic_error err = { 0 };
    mepic_status st = mepic_engine_open(options, &engine, &err);
    if (st != MEPIC_OK) {
        assert_true(err.status == st && err.message[0]);
        return st;
    }
    const mepic_segment parts[] = { text_of("Read: "),
                                    { .kind = MEPIC_CHUNK, .text = document, .len = sizeof document },
                                    text_of(question) };
    const mepic_message message = { .role = "user", .parts = parts, .n_parts = 3 };
    const mepic_prompt prompt = { .size = sizeof prompt, .messages = &message, .n_messages = 1 };
    mepic_prepared *prepared = NULL;
    st = mepic_prepare(engine, &prompt, &prepared, &err);
    if (st == MEPIC_OK) {
        const char *const stops[] = { "x#" };
        mepic_request request = { .size = sizeof request, .prompt = prepared, .max_tokens = 2 };
        request.stop = stops;
        request.n_stop = 1;
        mepic_request_id id;
        st = mepic_submit(engine, &request, &id, &err);
    }
    mepic_prepared_free(prepared);
    while (st == MEPIC_OK && mepic_busy(engine)) {
        st = mepic_step(engine, &err);
        mepic_event event;
        while (mepic_poll(engine, &event)) {
        }
    }
    mepic_engine_close(engine);
    return st;
}

static void any_allocation_may_fail(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.pages = 128;
    options.canonical_context = NULL;
    char dir[] = "/tmp/mepic-torture-XXXXXX";
    assert_non_null(mkdtemp(dir));
    options.cache_dir = dir;
    for (int every_one = 0; every_one < 2; every_one++) {
        uint64_t n = 1;
        for (;; n++) {
            uint64_t before = mp_mem_count();
            mp_mem_fail_at(n, every_one);
            mepic_status st = life(&options);
            mp_mem_fail_at(0, false);
            if (mp_mem_count() - before < n) { /* the failing one was never reached */
                assert_int_equal(st, MEPIC_OK);
                break;
            }
            if (st != MEPIC_OK && st != MEPIC_ERR_NOMEM) fail_msg("allocation %d: %s", (int)n, mepic_status_name(st));
        }
        print_message("%llu allocations failed%s\n", (unsigned long long)n - 1,
                      every_one ? " with all after them" : "");
    }
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_bad_option_is_named),
        cmocka_unit_test(a_bad_request_is_named),
        cmocka_unit_test(too_long_says_what_helps),
        cmocka_unit_test(what_never_fits_is_refused_with_the_numbers),
        cmocka_unit_test(empty_segments_change_nothing),
        cmocka_unit_test(prompts_are_checked),
        cmocka_unit_test(tokens_and_bytes_convert_both_ways),
        cmocka_unit_test(any_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
