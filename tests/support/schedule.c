#include "support/schedule.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

static int32_t canonical[40];

mp_scheduler_config small(bench *b, uint32_t n_pages) {
    for (int32_t i = 0; i < 40; i++) canonical[i] = 1000000 + i;
    return (mp_scheduler_config){ .page_size = PAGE,
                                  .cell_tokens = 256,
                                  .n_pages = n_pages,
                                  .max_running = 64,
                                  .max_jobs = 4,
                                  .max_queued = 100,
                                  .step_tokens = 512,
                                  .context = TOKENS_MAX,
                                  .canonical = canonical,
                                  .n_canonical = 40,
                                  .spoil_freed = true,
                                  .fault = &b->fault };
}

void open_bench(const mp_scheduler_config *config, bench *b) {
    assert_int_equal(mp_scheduler_open(config, &b->s, &b->err), MEPIC_OK);
}

void open_plain(bench *b, uint32_t n_pages) {
    mp_scheduler_config config = small(b, n_pages);
    config.n_canonical = 0;
    open_bench(&config, b);
}

void check(bench *b) {
    if (!mp_scheduler_check(b->s, &b->err)) fail_msg("%s", b->err.message);
}

void put(prompt *p, mepic_segment_kind kind, const int32_t *tokens, uint32_t n) {
    p->spans[p->n_spans++] = (mp_span){ .kind = kind, .first = p->n, .n = n };
    memcpy(p->tokens + p->n, tokens, n * sizeof *tokens);
    p->n += n;
}

void put_new(prompt *p, mepic_segment_kind kind, int32_t id, uint32_t n) {
    int32_t tokens[TOKENS_MAX];
    for (uint32_t i = 0; i < n; i++) tokens[i] = id * 10000 + (int32_t)i;
    put(p, kind, tokens, n);
}

mp_request_spec spec_of(const prompt *p) {
    return (mp_request_spec){ .tokens = p->tokens,
                              .n_tokens = p->n,
                              .spans = p->spans,
                              .n_spans = p->n_spans,
                              .reuse = MEPIC_REUSE_MEPIC,
                              .link_tokens = 16,
                              .max_tokens = 8 };
}

mp_request *submit(bench *b, const mp_request_spec *spec) {
    mp_request *r = NULL;
    if (mp_scheduler_submit(b->s, spec, &r, &b->err) != MEPIC_OK) fail_msg("%s", b->err.message);
    return r;
}

uint32_t step(bench *b, mepic_usage *last_ended) {
    const mp_step *step;
    if (mp_scheduler_step(b->s, &step, &b->err) != MEPIC_OK) fail_msg("%s", b->err.message);
    uint32_t n_rows = step->n_rows;
    mp_scheduler_commit(b->s);
    for (uint32_t i = 0; i < n_rows; i++) {
        if (!step->rows[i].samples) continue;
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

void run_all(bench *b, mepic_usage *last_ended) {
    for (uint32_t i = 0; mp_scheduler_busy(b->s); i++) {
        assert_true(i < 100000);
        step(b, last_ended);
    }
}

mepic_usage ask(bench *b, const mp_request_spec *spec) {
    mepic_usage usage = { 0 };
    submit(b, spec);
    run_all(b, &usage);
    assert_int_equal(usage.prompt_tokens, usage.prefix_tokens + usage.chunk_tokens + usage.linked_tokens +
                                              usage.compiled_tokens + usage.computed_tokens);
    return usage;
}

void everything_is_free_after_clear(bench *b) {
    mepic_stats stats;
    mp_scheduler_clear(b->s);
    check(b);
    mp_scheduler_stats(b->s, &stats);
    assert_int_equal(stats.pages_free + stats.pages_canonical, stats.pages_total);
}
