/* schedule/: admission, jobs, rows, preemption, accounting, on paper. What a row may see is test_simulation's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "schedule/scheduler.h"

enum { PAGE = 16, TOKENS_MAX = 8192 };

/* ---- A scheduler whose tokens are written by nobody -------------------------------------------------------------- */

typedef struct bench {
    mp_scheduler *s;
    mp_fault fault;
    mepic_error err;
} bench;

static int32_t canonical[40];

static mp_scheduler_config small(bench *b, uint32_t n_pages) {
    for (int32_t i = 0; i < 40; i++) canonical[i] = 1000000 + i;
    return (mp_scheduler_config){ .page_size = PAGE,
                                  .n_pages = n_pages,
                                  .max_running = 64,
                                  .max_jobs = 4,
                                  .max_queued = 100,
                                  .step_tokens = 512,
                                  .context = TOKENS_MAX,
                                  .canonical = canonical,
                                  .n_canonical = 40,
                                  .fault = &b->fault };
}

static bench open_bench(const mp_scheduler_config *config, bench *b) {
    assert_int_equal(mp_scheduler_open(config, &b->s, &b->err), MEPIC_OK);
    return *b;
}

static void check(bench *b) {
    if (!mp_scheduler_check(b->s, &b->err)) fail_msg("%s", b->err.message);
}

/* A prompt under construction. */
typedef struct prompt {
    int32_t tokens[TOKENS_MAX];
    mp_span spans[256];
    uint32_t n, n_spans;
} prompt;

static void put(prompt *p, mepic_segment_kind kind, const int32_t *tokens, uint32_t n) {
    p->spans[p->n_spans++] = (mp_span){ .kind = kind, .first = p->n, .n = n };
    memcpy(p->tokens + p->n, tokens, n * sizeof *tokens);
    p->n += n;
}

/* n tokens that are the same for the same id. */
static void put_new(prompt *p, mepic_segment_kind kind, int32_t id, uint32_t n) {
    int32_t tokens[TOKENS_MAX];
    for (uint32_t i = 0; i < n; i++) tokens[i] = id * 10000 + (int32_t)i;
    put(p, kind, tokens, n);
}

static mp_request_spec spec_of(const prompt *p) {
    return (mp_request_spec){ .tokens = p->tokens,
                              .n_tokens = p->n,
                              .spans = p->spans,
                              .n_spans = p->n_spans,
                              .reuse = MEPIC_REUSE_MEPIC,
                              .link_tokens = 16,
                              .max_tokens = 8 };
}

static mp_request *submit(bench *b, const mp_request_spec *spec) {
    mp_request *r = NULL;
    if (mp_scheduler_submit(b->s, spec, &r, &b->err) != MEPIC_OK) fail_msg("%s", b->err.message);
    return r;
}

/* One step; sampled rows get a token, and requests that have all theirs end. Returns the rows. */
static uint32_t step(bench *b, mepic_usage *last_ended) {
    const mp_step *step;
    if (mp_scheduler_step(b->s, &step, &b->err) != MEPIC_OK) fail_msg("%s", b->err.message);
    uint32_t n_rows = step->n_rows;
    mp_scheduler_commit(b->s);
    for (uint32_t i = 0; i < n_rows; i++) {
        if (!step->rows[i].logits || !mp_scheduler_samples(b->s, &step->rows[i])) continue;
        mp_request *r = mp_scheduler_request(b->s, step->rows[i].seq);
        mp_scheduler_append(b->s, r, 77);
        uint32_t n, n_prompt;
        mp_request_tokens(r, &n, &n_prompt);
        if (n - n_prompt < mp_request_max_tokens(r)) continue;
        if (last_ended) mp_request_usage(r, last_ended);
        mp_scheduler_finish(b->s, r);
    }
    check(b);
    return n_rows;
}

static void run_all(bench *b, mepic_usage *last_ended) {
    for (uint32_t i = 0; mp_scheduler_busy(b->s); i++) {
        assert_true(i < 100000);
        step(b, last_ended);
    }
}

static mepic_usage ask(bench *b, const mp_request_spec *spec) {
    mepic_usage usage = { 0 };
    submit(b, spec);
    run_all(b, &usage);
    assert_int_equal(usage.prompt_tokens, usage.prefix_tokens + usage.chunk_tokens + usage.linked_tokens +
                                              usage.compiled_tokens + usage.computed_tokens);
    return usage;
}

static void everything_is_free_after_clear(bench *b) {
    mepic_stats stats;
    mp_scheduler_clear(b->s);
    check(b);
    mp_scheduler_stats(b->s, &stats);
    assert_int_equal(stats.pages_free + stats.pages_canonical, stats.pages_total);
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

static void a_chunk_is_compiled_once_and_then_read(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 20);
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 10);
    mp_request_spec spec = spec_of(&p);
    mepic_usage first = ask(&b, &spec);
    assert_int_equal(first.compiled_tokens, 84);
    assert_int_equal(first.linked_tokens, 16);
    assert_int_equal(first.computed_tokens, 30);
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 4, 50); /* other text, other position */
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 5, 10);
    spec = spec_of(&p);
    mepic_usage second = ask(&b, &spec);
    assert_int_equal(second.chunk_tokens, 84);
    assert_int_equal(second.linked_tokens, 16);
    assert_int_equal(second.computed_tokens, 60);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_chunk_is_compiled_once_and_then_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
