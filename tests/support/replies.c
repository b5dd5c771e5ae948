#include "support/replies.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "support/tiny.h"

mepic_engine_options tiny_options(void) {
    return (mepic_engine_options){
        .size = sizeof(mepic_engine_options),
        .model_path = tiny_model_path(),
        .threads = 1,
        .pages = 256,
        .context = 512,
        .max_running = 8,
        .max_queued = 16,
        .canonical_context = "",
        .hash_logits = true,
    };
}

void (*on_open)(mepic_engine *engine);

mepic_engine *open_engine(const mepic_engine_options *options) {
    mepic_engine *engine;
    mepic_error err;
    if (mepic_engine_open(options, &engine, &err) != MEPIC_OK) fail_msg("%s", err.message);
    if (on_open) on_open(engine);
    return engine;
}

mepic_segment text_of(const char *text) {
    return (mepic_segment){ .kind = MEPIC_TEXT, .text = text, .len = strlen(text) };
}

mepic_prepared *prepare(const mepic_engine *engine, const mepic_segment *segments, size_t n) {
    const mepic_prompt prompt = { .size = sizeof prompt, .segments = segments, .n_segments = n };
    mepic_prepared *prepared;
    mepic_error err;
    if (mepic_prepare(engine, &prompt, &prepared, &err) != MEPIC_OK) fail_msg("%s", err.message);
    return prepared;
}

mepic_prepared *prepare_text(const mepic_engine *engine, const char *text) {
    const mepic_segment segment = text_of(text);
    return prepare(engine, &segment, 1);
}

void submit(mepic_engine *engine, const mepic_request *request, result *r) {
    memset(r, 0, sizeof *r);
    mepic_request q = *request;
    q.size = sizeof q;
    q.user = r;
    mepic_error err;
    if (mepic_submit(engine, &q, &r->id, &err) != MEPIC_OK) fail_msg("%s", err.message);
}

/* What the first token says of the prompt is what the end says. */
static void assert_same_prompt(const mepic_usage *first, const mepic_usage *end) {
    assert_int_equal(first->prompt_tokens, end->prompt_tokens);
    assert_int_equal(first->prefix_tokens, end->prefix_tokens);
    assert_int_equal(first->chunk_tokens, end->chunk_tokens);
    assert_int_equal(first->linked_tokens, end->linked_tokens);
    assert_int_equal(first->compiled_tokens, end->compiled_tokens);
    assert_int_equal(first->computed_tokens, end->computed_tokens);
    assert_int_equal(first->completion_tokens, 1);
}

static void take_events(mepic_engine *engine) {
    mepic_event event;
    while (mepic_poll(engine, &event)) {
        result *r = event.user;
        assert_true(event.id == r->id);
        assert_false(r->done);
        assert_true(r->text_len + event.text_len < sizeof r->text);
        memcpy(r->text + r->text_len, event.text, event.text_len);
        r->text_len += event.text_len;
        if (event.kind == MEPIC_EVENT_TOKEN) {
            assert_true(r->n_tokens < MAX_REPLY);
            if (r->n_tokens == 0) r->first = event.usage;
            assert_int_equal(event.usage.prompt_tokens > 0, r->n_tokens == 0);
            r->tokens[r->n_tokens++] = event.token;
            r->logprobs += (double)event.logprob;
            continue;
        }
        r->done = true;
        r->rest_len = event.text_len;
        r->finish = event.finish;
        r->error = event.error;
        r->stop = event.stop;
        r->usage = event.usage;
        r->hash = event.logits_hash;
        if (r->n_tokens > 0) assert_same_prompt(&r->first, &r->usage);
    }
}

void step(mepic_engine *engine) {
    mepic_error err;
    if (mepic_step(engine, &err) != MEPIC_OK) fail_msg("%s", err.message);
    take_events(engine);
}

void drain(mepic_engine *engine) {
    for (int i = 0; mepic_busy(engine); i++) {
        assert_true(i < 10000);
        step(engine);
    }
}

void run(mepic_engine *engine, const mepic_request *request, result *r) {
    submit(engine, request, r);
    drain(engine);
    assert_true(r->done);
    assert_int_equal(r->usage.completion_tokens, r->n_tokens);
}

const char question[] = "What is the capital of France?";

char document[400];
static void fill_document(void) {
    for (size_t i = 0; i < sizeof document; i++) document[i] = (char)('a' + (i * i + i / 7) % 26);
}

mepic_prepared *prepare_document(const mepic_engine *engine, const char *before) {
    fill_document();
    const mepic_segment segments[] = { text_of(before),
                                       { .kind = MEPIC_CHUNK, .text = document, .len = sizeof document },
                                       text_of(question) };
    return prepare(engine, segments, 3);
}

uint64_t ask(const mepic_engine_options *options, const char *before, mepic_usage *usage, mepic_stats *stats) {
    mepic_engine *engine = open_engine(options);
    mepic_prepared *prompt = prepare_document(engine, before);
    const mepic_request request = { .prompt = prompt, .max_tokens = 4, .ignore_eos = true };
    result r;
    run(engine, &request, &r);
    *usage = r.usage;
    mepic_stats_read(engine, stats);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
    return r.hash;
}

void expect(mepic_status got, mepic_status want, const mepic_error *err, const char *word) {
    if (got != want || err->status != want || !strstr(err->message, word)) {
        fail_msg("%s \"%s\", expected %s with \"%s\"", mepic_status_name(got), err->message, mepic_status_name(want),
                 word);
    }
}
