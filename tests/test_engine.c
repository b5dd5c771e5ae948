/* engine/: events, text, ends, cancellation, chunks and faults of mepic.h on a tiny synthetic model. Argument "ahead":
 * on a backend that runs ahead (support/ahead.h), without hashes, which nobody could take there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "support/ahead.h"
#include "support/replies.h"

/* A reply of lower-case letters and spaces: what the tiny model says is noise, but it should be text. */
static mepic_sampling letters(const mepic_engine *engine, struct mepic_logit_bias bias[27], uint64_t seed) {
    int32_t ids[27];
    size_t n;
    for (int i = 0; i < 27; i++) {
        char letter = i < 26 ? (char)('a' + i) : ' ';
        assert_int_equal(mepic_tokenize(engine, &letter, 1, false, ids, 27, &n, NULL), MEPIC_OK);
        assert_int_equal(n, 1);
        bias[i] = (struct mepic_logit_bias){ ids[0], 1000 };
    }
    return (mepic_sampling){ .temperature = 1, .seed = seed, .logit_bias = bias, .n_logit_bias = 27 };
}

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

static void a_reply_is_tokens_then_an_end(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .prompt = prompt, .max_tokens = 20, .ignore_eos = true };
    result r;
    assert_false(mepic_busy(engine));
    run(engine, &request, &r);
    assert_int_equal(r.n_tokens, 20);
    assert_int_equal(r.finish, MEPIC_FINISH_LENGTH);
    const mepic_usage *u = &r.usage;
    size_t n_prompt;
    mepic_prepared_tokens(prompt, &n_prompt);
    assert_int_equal(u->prompt_tokens, n_prompt);
    assert_int_equal(u->prefix_tokens + u->chunk_tokens + u->linked_tokens + u->compiled_tokens + u->computed_tokens,
                     n_prompt);
    assert_true(u->queue_ns <= u->ttft_ns && u->ttft_ns <= u->total_ns && u->ttft_ns > 0);
    assert_true(r.hash != 0 || !engine->options.hash_logits);
    mepic_stats stats;
    mepic_stats_read(engine, &stats);
    assert_true(stats.steps >= 20 && stats.forward_ns > 0 && stats.running == 0 && stats.queued == 0);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static void greedy_is_the_default_and_repeats(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .prompt = prompt, .max_tokens = 30, .ignore_eos = true };
    result first, again;
    run(engine, &request, &first);
    run(engine, &request, &again);
    assert_int_equal(first.hash, again.hash);
    assert_memory_equal(first.tokens, again.tokens, sizeof first.tokens);
    assert_memory_equal(first.text, again.text, sizeof first.text);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

/* The same request gives the same logits alone or in company, on any number of threads, at any step budget. */
static void an_answer_does_not_depend_on_the_rest(void **state) {
    (void)state;
    uint64_t want = 0;
    const uint32_t threads[] = { 1, 2, 3 }, budgets[] = { 512, 7, 1 };
    for (int round = 0; round < 3; round++) {
        mepic_engine_options options = tiny_options();
        options.threads = threads[round];
        options.step_tokens = budgets[round];
        mepic_engine *engine = open_engine(&options);
        mepic_prepared *prompt = prepare_text(engine, question);
        mepic_request request = { .prompt = prompt, .max_tokens = 12, .ignore_eos = true };
        request.sampling = (mepic_sampling){ .temperature = 0.9f, .top_k = 40, .seed = 5 };
        result alone, many[12];
        run(engine, &request, &alone);
        if (!want) want = alone.hash;
        assert_int_equal(alone.hash, want);
        for (int i = 0; i < 12; i++) {
            mepic_request q = request;
            q.max_tokens = 12 + (uint32_t)i % 3;
            q.reuse = (mepic_reuse)(i % 4);
            submit(engine, &q, &many[i]);
        }
        drain(engine);
        for (int i = 0; i < 12; i++) {
            assert_true(many[i].done);
            assert_memory_equal(many[i].tokens, alone.tokens, 12 * sizeof *alone.tokens);
            if (i % 3 == 0) assert_int_equal(many[i].hash, want);
        }
        mepic_prepared_free(prompt);
        mepic_engine_close(engine);
    }
}

static void every_stop_string_ends_where_it_begins(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    struct mepic_logit_bias bias[27];
    for (uint64_t seed = 1; seed <= 3; seed++) {
        mepic_request request = { .prompt = prompt, .max_tokens = 60, .ignore_eos = true };
        request.sampling = letters(engine, bias, seed);
        result whole, cut;
        run(engine, &request, &whole);
        assert_int_equal(whole.text_len, 60); /* a letter a token */
        assert_int_equal(whole.stop, -1);
        for (size_t len = 1; len <= 9; len += 2) {
            for (size_t at = 0; at + len <= whole.text_len; at += 7) {
                char stop[16], other[24];
                snprintf(stop, sizeof stop, "%.*s", (int)len, whole.text + at);
                snprintf(other, sizeof other, "%s#", stop); /* begins like it, never comes */
                const char *stops[] = { other, stop };
                request.stop = stops;
                request.n_stop = 2;
                run(engine, &request, &cut);
                size_t first = (size_t)(strstr(whole.text, stop) - whole.text);
                assert_int_equal(cut.finish, MEPIC_FINISH_STOP);
                assert_int_equal(cut.text_len, first);
                assert_memory_equal(cut.text, whole.text, first);
                assert_int_equal(cut.n_tokens, first + len);
                assert_int_equal(cut.rest_len, 0);
                assert_int_equal(cut.stop, 1);
            }
        }
    }
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

/* What is withheld because it begins a stop string comes later, with a token or at the end. */
static void withheld_text_is_not_lost(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    struct mepic_logit_bias bias[27];
    mepic_request request = { .prompt = prompt, .max_tokens = 60, .ignore_eos = true };
    request.sampling = letters(engine, bias, 4);
    result whole, kept;
    run(engine, &request, &whole);
    for (size_t begin = 0; begin < 60; begin += 5) {
        char stop[80];
        snprintf(stop, sizeof stop, "%.*s#", (int)(60 - begin), whole.text + begin);
        const char *stops[] = { stop };
        request.stop = stops;
        request.n_stop = 1;
        run(engine, &request, &kept);
        assert_int_equal(kept.finish, MEPIC_FINISH_LENGTH);
        assert_int_equal(kept.text_len, 60);
        assert_memory_equal(kept.text, whole.text, 60);
        assert_true(kept.rest_len >= 60 - begin);
    }
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static bool is_utf8(const char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        unsigned char c = (unsigned char)s[i];
        size_t len = c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : (c & 0xF0) == 0xE0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
        if (len == 0 || len > n - i) return false;
        for (size_t k = 1; k < len; k++) {
            if (((unsigned char)s[i + k] & 0xC0) != 0x80) return false;
        }
        i += len;
    }
    return true;
}

static void text_comes_in_whole_characters(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    /* tokens that are single bytes of two-, three- and four-byte characters */
    int32_t ids[16];
    size_t n;
    assert_int_equal(mepic_tokenize(engine, "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", 9, false, ids, 16, &n, NULL),
                     MEPIC_OK);
    assert_true(n <= 9);
    struct mepic_logit_bias bias[16];
    for (size_t i = 0; i < n; i++) bias[i] = (struct mepic_logit_bias){ ids[i], 1000 };
    mepic_request request = { .prompt = prompt, .max_tokens = 200, .ignore_eos = true };
    request.sampling = (mepic_sampling){ .temperature = 2, .seed = 3, .logit_bias = bias, .n_logit_bias = n };
    mepic_request_id id;
    request.size = sizeof request;
    assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
    size_t characters = 0, with_text = 0;
    while (mepic_busy(engine)) {
        assert_int_equal(mepic_step(engine, NULL), MEPIC_OK);
        mepic_event event;
        while (mepic_poll(engine, &event)) {
            assert_true(is_utf8(event.text, event.text_len));
            with_text += event.text_len > 0;
            characters += event.text_len > 1;
        }
    }
    assert_true(with_text > 20 && characters > 20);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static void stop_tokens_and_the_model_s_own_end_a_reply(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    mepic_request request = { .prompt = prompt, .max_tokens = 50, .ignore_eos = true };
    result r;
    int32_t end;
    size_t n;
    assert_int_equal(mepic_tokenize(engine, "<|im_end|>", 10, true, &end, 1, &n, NULL), MEPIC_OK);
    assert_int_equal(n, 1);
    const struct mepic_logit_bias to_end = { end, 1000 };
    request.sampling = (mepic_sampling){ .logit_bias = &to_end, .n_logit_bias = 1 };
    run(engine, &request, &r);
    assert_int_equal(r.n_tokens, 50);
    request.ignore_eos = false;
    run(engine, &request, &r);
    assert_int_equal(r.finish, MEPIC_FINISH_STOP);
    assert_int_equal(r.n_tokens, 1);
    assert_int_equal(r.text_len, 0);

    request.sampling = (mepic_sampling){ 0 };
    request.ignore_eos = true;
    run(engine, &request, &r);
    uint32_t first = 0;
    const int32_t stop = r.tokens[10];
    while (r.tokens[first] != stop) first++;
    request.stop_tokens = &stop;
    request.n_stop_tokens = 1;
    run(engine, &request, &r);
    assert_int_equal(r.finish, MEPIC_FINISH_STOP);
    assert_int_equal(r.n_tokens, first + 1);
    assert_int_equal(r.stop, -1); /* a token, no string */
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static void a_reply_ends_where_the_context_does(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.context = 64;
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    size_t n_prompt;
    mepic_prepared_tokens(prompt, &n_prompt);
    mepic_request request = { .prompt = prompt, .ignore_eos = true };
    result r;
    run(engine, &request, &r);
    assert_int_equal(r.finish, MEPIC_FINISH_LENGTH);
    assert_int_equal(r.n_tokens, 64 - n_prompt);
    request.max_tokens = 1000;
    run(engine, &request, &r);
    assert_int_equal(r.n_tokens, 64 - n_prompt);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

typedef struct seen_rows {
    uint32_t n, last;
    float best;
} seen_rows;

static void see(void *user, uint32_t position, const float *logits, uint32_t n_vocab) {
    seen_rows *s = user;
    s->n++;
    s->last = position;
    s->best = -INFINITY;
    for (uint32_t i = 0; i < n_vocab; i++) s->best = logits[i] > s->best ? logits[i] : s->best;
}

/* A chunk's head is there twice, in its page and linked: in a pool as small as the context the reply is shorter. */
static void a_reply_ends_where_the_pool_does(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.pages = 32; /* of 16 tokens; the context is 512 */
    mepic_engine *engine = open_engine(&options);
    int32_t tokens[64];
    for (int32_t i = 0; i < 64; i++) tokens[i] = 40 + i % 7;
    const mepic_segment parts[] = { { .kind = MEPIC_CHUNK, .tokens = tokens, .n_tokens = 64 },
                                    { .kind = MEPIC_TEXT, .tokens = tokens, .n_tokens = 64 },
                                    { .kind = MEPIC_TEXT, .tokens = tokens, .n_tokens = 64 } };
    const mepic_prompt prompt = { .size = sizeof prompt, .segments = parts, .n_segments = 3, .no_bos = true };
    mepic_prepared *prepared;
    mepic_error err;
    if (mepic_prepare(engine, &prompt, &prepared, &err) != MEPIC_OK) fail_msg("%s", err.message);
    result r;
    run(engine, &(mepic_request){ .prompt = prepared, .ignore_eos = true }, &r);
    assert_int_equal(r.finish, MEPIC_FINISH_LENGTH);
    assert_int_equal(r.n_tokens, 512 - 16 - 3 * 64);
    mepic_prepared_free(prepared);
    mepic_engine_close(engine);
}

static void logits_and_log_probabilities_are_seen(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    size_t n_prompt;
    mepic_prepared_tokens(prompt, &n_prompt);
    seen_rows rows = { 0 };
    mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 3, .ignore_eos = true };
    request.reuse = MEPIC_REUSE_NONE;
    request.top_logprobs = 5;
    request.on_logits = see;
    request.user = &rows;
    for (int all = 0; all < 2; all++) {
        rows = (seen_rows){ 0 };
        request.logits_of_prompt = all;
        mepic_request_id id;
        assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
        uint32_t n_tokens = 0;
        while (mepic_busy(engine)) {
            assert_int_equal(mepic_step(engine, NULL), MEPIC_OK);
            mepic_event event;
            while (mepic_poll(engine, &event)) {
                if (event.kind != MEPIC_EVENT_TOKEN) continue;
                n_tokens++;
                assert_int_equal(event.n_top, 5);
                assert_int_equal(event.top[0].token, event.token); /* greedy */
                assert_true(event.top[0].logprob == event.logprob && event.logprob <= 0);
                for (int i = 1; i < 5; i++) assert_true(event.top[i].logprob <= event.top[i - 1].logprob);
            }
        }
        assert_int_equal(n_tokens, 3);
        assert_int_equal(rows.n, all ? n_prompt + 2 : 3);
        assert_int_equal(rows.last, n_prompt + 1);
    }
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

/* ---- Cancel ------------------------------------------------------------------------------------------------------ */

typedef struct cancellation {
    mepic_engine *engine;
    mepic_request_id id;
} cancellation;

static void *cancel_from_another_thread(void *arg) {
    const cancellation *c = arg;
    mepic_cancel(c->engine, c->id);
    return NULL;
}

static void a_request_is_cancelled_in_any_state(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.max_running = 2;
    options.step_tokens = 4;
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .prompt = prompt, .max_tokens = 20, .ignore_eos = true };
    for (int steps = 0; steps < 30; steps += 3) {
        result r[6];
        for (int i = 0; i < 6; i++) submit(engine, &request, &r[i]);
        for (int i = 0; i < steps && mepic_busy(engine); i++) step(engine);
        const uint64_t n_slots = options.max_running + options.max_queued;
        mepic_cancel(engine, r[1].id + 1000 * n_slots); /* ids nobody was given */
        mepic_cancel(engine, r[4].id + 1000 * n_slots);
        bool ended[6];
        for (int i = 0; i < 6; i++) ended[i] = r[i].done;
        cancellation arg = { engine, r[1].id };
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, cancel_from_another_thread, &arg), 0);
        pthread_join(thread, NULL);
        mepic_cancel(engine, r[4].id);
        mepic_cancel(engine, r[4].id);
        mepic_cancel(engine, 0);
        mepic_cancel(engine, UINT64_MAX);
        if (!ended[1] || !ended[4]) step(engine);
        for (int i = 0; i < 6; i++) {
            if (i == 1 || i == 4) {
                assert_true(r[i].done);
                if (!ended[i]) assert_int_equal(r[i].finish, MEPIC_FINISH_CANCELLED);
            }
        }
        drain(engine);
        for (int i = 0; i < 6; i++) {
            if (i != 1 && i != 4) assert_int_equal(r[i].n_tokens, 20);
        }
        mepic_cancel(engine, r[0].id); /* ended: ignored, also by the slot's next request */
    }
    mepic_cache_clear(engine);
    mepic_stats stats;
    mepic_stats_read(engine, &stats);
    assert_int_equal(stats.pages_free, stats.pages_total);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

enum { BESIDE = 8 }; /* as many requests as run together */

typedef struct beside {
    mepic_engine *engine;
    const result *replies; /* [BESIDE] */
    atomic_bool running, stop;
    bool ok;
} beside;

/* All that mepic.h allows of any thread, until it is told to stop. */
static void *use_beside_steps(void *arg) {
    beside *b = arg;
    const mepic_segment segment = text_of(question);
    const mepic_prompt prompt = { .size = sizeof prompt, .segments = &segment, .n_segments = 1 };
    b->ok = true;
    for (uint32_t i = 0; b->ok && !atomic_load(&b->stop); i++) {
        mepic_prepared *prepared;
        mepic_model_info info;
        int32_t ids[64];
        char bytes[128];
        size_t n, len;
        b->ok = mepic_prepare(b->engine, &prompt, &prepared, NULL) == MEPIC_OK;
        if (b->ok) mepic_prepared_free(prepared);
        b->ok = b->ok && mepic_tokenize(b->engine, question, strlen(question), false, ids, 64, &n, NULL) == MEPIC_OK &&
                mepic_detokenize(b->engine, ids, n, bytes, sizeof bytes, &len, NULL) == MEPIC_OK;
        mepic_model_info_read(b->engine, &info);
        if (i % BESIDE % 2) mepic_cancel(b->engine, b->replies[i % BESIDE].id);
        atomic_store(&b->running, true);
    }
    return NULL;
}

/* For ThreadSanitizer more than for the assertions. */
static void other_threads_may_prepare_and_cancel_beside_steps(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .prompt = prompt, .max_tokens = 100, .ignore_eos = true };
    static result r[BESIDE];
    for (int i = 0; i < BESIDE; i++) submit(engine, &request, &r[i]);
    beside arg = { .engine = engine, .replies = r };
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, use_beside_steps, &arg), 0);
    while (!atomic_load(&arg.running)) sched_yield();
    drain(engine);
    atomic_store(&arg.stop, true);
    pthread_join(thread, NULL);
    assert_true(arg.ok);
    for (int i = 0; i < BESIDE; i++) {
        assert_true(r[i].done);
        if (i % 2 == 0 || r[i].finish != MEPIC_FINISH_CANCELLED) assert_int_equal(r[i].n_tokens, 100);
    }
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static void a_full_queue_says_so_and_empties(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.max_running = 1;
    options.max_queued = 3;
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 2, .ignore_eos = true };
    mepic_error err = { 0 };
    mepic_request_id id;
    uint32_t n = 0;
    mepic_status st;
    while ((st = mepic_submit(engine, &request, &id, &err)) == MEPIC_OK) n++;
    expect(st, MEPIC_ERR_BUSY, &err, "3");
    assert_true(n >= 3 && n <= 4);
    uint32_t ended = 0;
    while (mepic_busy(engine)) {
        assert_int_equal(mepic_step(engine, NULL), MEPIC_OK);
        mepic_event event;
        while (mepic_poll(engine, &event)) ended += event.kind == MEPIC_EVENT_DONE;
    }
    assert_int_equal(ended, n);
    assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine); /* with a request inside */
}

static void a_step_waits_until_events_are_taken(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompt = prepare_text(engine, question);
    const mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 3, .ignore_eos = true };
    mepic_request_id id;
    assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
    assert_int_equal(mepic_step(engine, NULL), MEPIC_OK);
    mepic_error err = { 0 };
    expect(mepic_step(engine, &err), MEPIC_ERR_BUSY, &err, "mepic_poll");
    mepic_event event;
    uint32_t n = 0;
    while (mepic_busy(engine)) {
        if (mepic_poll(engine, &event)) { /* one event a round is enough */
            n++;
        } else {
            assert_int_equal(mepic_step(engine, NULL), MEPIC_OK);
        }
    }
    assert_int_equal(n, 4);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

/* ---- Chunks and the canonical context ---------------------------------------------------------------------------- */

static void a_chunk_is_computed_once_a_scope_and_read_anywhere(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.canonical_context = NULL;
    options.pages = 512;
    mepic_engine *engine = open_engine(&options);
    const struct {
        const char *before, *scope;
        bool first;
    } rounds[] = {
        { "Read: ", NULL, true },
        { "Please read this text to its end and then answer: ", NULL, false },
        { "", "b", true },
        { "Read: ", "c", true },
        { "Read this: ", "b", false },
        { "", NULL, false },
    };
    for (size_t i = 0; i < sizeof rounds / sizeof *rounds; i++) {
        mepic_prepared *prompt = prepare_document(engine, rounds[i].before);
        const mepic_request request = {
            .prompt = prompt, .max_tokens = 2, .ignore_eos = true, .scope = rounds[i].scope
        };
        result r;
        run(engine, &request, &r);
        assert_int_equal(r.usage.compiled_tokens > 0, rounds[i].first);
        assert_int_equal(r.usage.chunk_tokens > 0, !rounds[i].first);
        assert_int_equal(r.usage.linked_tokens, 16);
        mepic_prepared_free(prompt);
    }
    mepic_engine_close(engine);
}

/* What is marked common is computed once for all scopes, and nothing else of a request leaves its scope with it. */
static void a_common_chunk_is_computed_once_for_all_scopes(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.pages = 512;
    mepic_engine *engine = open_engine(&options);
    const struct {
        const char *scope;
        bool common, prefix, chunk;
    } rounds[] = {
        { "a", true, false, false },  { "b", true, false, true }, /* computed for a; the text before it is b's own */
        { "b", true, true, true },                                /* found as the beginning of b's last prompt */
        { "b", false, true, false },  /* the same tokens, but not as common ones: only the text before is found */
        { NULL, false, false, true }, /* the common scope's own */
        { "c", true, false, true },
    };
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof rounds / sizeof *rounds; i++) {
        const mepic_segment parts[] = {
            text_of("Read the following text to its end, then answer: "),
            { .kind = MEPIC_CHUNK, .text = document, .len = sizeof document, .common = rounds[i].common },
            text_of(question)
        };
        mepic_prepared *prompt = prepare(engine, parts, 3);
        const mepic_request request = {
            .prompt = prompt, .max_tokens = 4, .ignore_eos = true, .scope = rounds[i].scope
        };
        result r;
        run(engine, &request, &r);
        assert_int_equal(r.usage.chunk_tokens > 0, rounds[i].chunk);
        assert_int_equal(r.usage.prefix_tokens > 0, rounds[i].prefix);
        if (i == 0) hash = r.hash;
        assert_true(r.hash == hash);
        mepic_prepared_free(prompt);
    }
    mepic_engine_close(engine);
}

/* Recomputing all of a chunk is full recomputation, bit by bit. */
static void linking_everything_is_no_reuse(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.link_tokens = MEPIC_LINK_ALL;
    mepic_usage usage;
    mepic_stats stats;
    uint64_t linked = ask(&options, "Read: ", &usage, &stats);
    assert_int_equal(usage.chunk_tokens + usage.compiled_tokens, 0);
    options.reuse = MEPIC_REUSE_NONE;
    assert_int_equal(ask(&options, "Read: ", &usage, &stats), linked);
    assert_int_equal(usage.linked_tokens, 0);
    options.reuse = MEPIC_REUSE_MEPIC;
    options.link_tokens = MEPIC_LINK_NONE;
    assert_true(ask(&options, "Read: ", &usage, &stats) != linked);
    assert_int_equal(usage.linked_tokens, 0);
}

/* ---- Faults ------------------------------------------------------------------------------------------------------ */

static const float *no_logits(mp_backend *b, uint32_t i) {
    (void)b;
    (void)i;
    return NULL;
}

static mepic_status broken_end(mp_backend *b, mepic_error *err) {
    (void)b;
    return mp_fail(err, MEPIC_ERR_BROKEN, "the device is gone");
}

/* In the next step the page that the victim writes becomes NaN, as a fault of memory might make it. */
static struct {
    const mp_backend_ops *ops;
    const mepic_engine *engine;
    const mp_request *victim;
} memory_fault;

static void begin_with_a_fault(mp_backend *b, const mp_step *step) {
    memory_fault.ops->step_begin(b, step);
    size_t bytes = memory_fault.ops->page_bytes(b);
    void *page = malloc(bytes);
    assert_non_null(page);
    memset(page, 0xff, bytes);
    for (uint32_t i = 0; i < step->n_rows; i++) {
        if (mp_scheduler_request(memory_fault.engine->scheduler, step->rows[i].seq) != memory_fault.victim) continue;
        assert_true(memory_fault.ops->page_write(b, step->rows[i].page, page));
    }
    free(page);
}

static void a_request_without_numbers_fails_alone(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *bad = prepare_document(engine, "Read: "), *good = prepare_text(engine, question);
    result alone[2], r[2];
    mepic_request requests[2] = { { .prompt = bad, .max_tokens = 40, .ignore_eos = true },
                                  { .prompt = good, .max_tokens = 40, .ignore_eos = true } };
    for (int i = 0; i < 2; i++) run(engine, &requests[i], &alone[i]);
    mepic_cache_clear(engine);
    for (int i = 0; i < 2; i++) submit(engine, &requests[i], &r[i]);
    while (r[0].n_tokens < 3) step(engine);
    mp_backend_ops faulty = *engine->backend->ops;
    memory_fault.ops = engine->backend->ops;
    memory_fault.engine = engine;
    memory_fault.victim = engine->slots[r[0].id % engine->n_slots].reply->request;
    faulty.step_begin = begin_with_a_fault;
    engine->backend->ops = &faulty;
    step(engine);
    engine->backend->ops = memory_fault.ops;
    drain(engine);
    assert_int_equal(r[0].finish, MEPIC_FINISH_FAILED);
    assert_non_null(r[0].error);
    assert_non_null(strstr(r[0].error, "hold no number"));
    assert_true(r[0].n_tokens < 40);
    assert_int_equal(r[1].finish, MEPIC_FINISH_LENGTH);
    assert_null(r[1].error);
    assert_int_equal(r[1].hash, alone[1].hash);
    mepic_stats stats; /* what the failed one alone had read is not in the cache */
    mepic_stats_read(engine, &stats);
    assert_int_equal(stats.pages_referenced, 0);
    run(engine, &requests[0], &r[0]);
    assert_int_equal(r[0].usage.prefix_tokens + r[0].usage.chunk_tokens, 0);
    assert_int_equal(r[0].hash, alone[0].hash);
    mepic_prepared_free(bad);
    mepic_prepared_free(good);
    mepic_engine_close(engine);
}

static void a_broken_engine_says_so_for_ever(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    const char *words[] = { "cannot be read", "the device is gone" };
    for (int kind = 0; kind < 2; kind++) {
        mepic_engine *engine = open_engine(&options);
        mepic_prepared *prompt = prepare_text(engine, question);
        mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 5, .ignore_eos = true };
        mepic_request_id id;
        assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
        mp_backend_ops ops = *engine->backend->ops;
        if (kind == 0) {
            ops.logits_row = no_logits;
        } else {
            ops.step_end = broken_end;
        }
        engine->backend->ops = &ops;
        mepic_error err = { 0 };
        expect(mepic_step(engine, &err), MEPIC_ERR_BROKEN, &err, words[kind]);
        expect(mepic_step(engine, &err), MEPIC_ERR_BROKEN, &err, words[kind]);
        expect(mepic_submit(engine, &request, &id, &err), MEPIC_ERR_BROKEN, &err, words[kind]);
        assert_false(mepic_busy(engine));
        mepic_prepared_free(prompt);
        mepic_engine_close(engine);
    }
}

static void a_step_allocates_nothing_after_warm_up(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.canonical_context = NULL;
    options.pages = 200; /* tight: eviction and preemption are warm as well */
    mepic_engine *engine = open_engine(&options);
    mepic_prepared *prompts[2] = { prepare_document(engine, "Read: "), prepare_text(engine, question) };
    const char *const stops[] = { "no such text", "never" };
    for (int round = 0; round < 3; round++) {
        result r[12];
        for (int i = 0; i < 12; i++) {
            mepic_request request = { .prompt = prompts[i % 2], .max_tokens = 20, .ignore_eos = true };
            request.sampling =
                (mepic_sampling){ .temperature = 1, .top_p = 0.9f, .repeat_penalty = 1.1f, .seed = (uint64_t)i };
            request.stop = stops;
            request.n_stop = 2;
            request.top_logprobs = 5;
            submit(engine, &request, &r[i]);
        }
        while (mepic_busy(engine)) {
            uint64_t before = mp_mem_count();
            step(engine);
            if (round > 0) assert_int_equal(mp_mem_count(), before);
        }
    }
    for (int i = 0; i < 2; i++) mepic_prepared_free(prompts[i]);
    mepic_engine_close(engine);
}

static void two_engines_do_not_know_of_each_other(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    mepic_engine *a = open_engine(&options);
    options.page_size = 32;
    mepic_engine *b = open_engine(&options);
    mepic_prepared *prompt_a = prepare_text(a, question), *prompt_b = prepare_text(b, question);
    result alone, ra, rb;
    run(a, &(mepic_request){ .prompt = prompt_a, .max_tokens = 20, .ignore_eos = true }, &alone);
    submit(a, &(mepic_request){ .prompt = prompt_a, .max_tokens = 20, .ignore_eos = true }, &ra);
    submit(b, &(mepic_request){ .prompt = prompt_b, .max_tokens = 20, .ignore_eos = true }, &rb);
    while (mepic_busy(a) || mepic_busy(b)) {
        if (mepic_busy(a)) step(a);
        if (mepic_busy(b)) step(b);
    }
    assert_int_equal(ra.hash, alone.hash);
    assert_int_equal(rb.hash, alone.hash);
    mepic_prepared_free(prompt_a);
    mepic_prepared_free(prompt_b);
    mepic_engine_close(a);
    mepic_engine_close(b);
}

static void run_ahead(mepic_engine *engine) {
    engine->options.hash_logits = false;
    ahead_put(engine);
}

int main(int argc, char **argv) {
    bool ahead = argc > 1 && !strcmp(argv[1], "ahead");
    if (ahead) on_open = run_ahead;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_reply_is_tokens_then_an_end),
        cmocka_unit_test(greedy_is_the_default_and_repeats),
        cmocka_unit_test(an_answer_does_not_depend_on_the_rest),
        cmocka_unit_test(every_stop_string_ends_where_it_begins),
        cmocka_unit_test(withheld_text_is_not_lost),
        cmocka_unit_test(text_comes_in_whole_characters),
        cmocka_unit_test(stop_tokens_and_the_model_s_own_end_a_reply),
        cmocka_unit_test(a_reply_ends_where_the_context_does),
        cmocka_unit_test(a_reply_ends_where_the_pool_does),
        cmocka_unit_test(logits_and_log_probabilities_are_seen),
        cmocka_unit_test(a_request_is_cancelled_in_any_state),
        cmocka_unit_test(other_threads_may_prepare_and_cancel_beside_steps),
        cmocka_unit_test(a_full_queue_says_so_and_empties),
        cmocka_unit_test(a_chunk_is_computed_once_a_scope_and_read_anywhere),
        cmocka_unit_test(a_common_chunk_is_computed_once_for_all_scopes),
        cmocka_unit_test(a_request_without_numbers_fails_alone),
        cmocka_unit_test(a_step_allocates_nothing_after_warm_up),
        cmocka_unit_test(two_engines_do_not_know_of_each_other),
        /* Not ahead: they are about hashes, what a first step gives, and how the CPU is made to fail. */
        cmocka_unit_test(linking_everything_is_no_reuse),
        cmocka_unit_test(a_step_waits_until_events_are_taken),
        cmocka_unit_test(a_broken_engine_says_so_for_ever),
    };
    size_t n = sizeof tests / sizeof *tests - (ahead ? 3 : 0);
    return _cmocka_run_group_tests("engine", tests, n, NULL, NULL);
}
