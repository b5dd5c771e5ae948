/* A scheduler whose tokens are written by nobody, and prompts for it: for the tests of schedule/. Errors fail the test,
 * and every step checks the scheduler's invariants. */
#ifndef MEPIC_TESTS_SUPPORT_SCHEDULE_H
#define MEPIC_TESTS_SUPPORT_SCHEDULE_H

#include "schedule/scheduler.h"

enum { PAGE = 16, TOKENS_MAX = 8192 };

typedef struct bench {
    mp_scheduler *s;
    mp_fault fault;
    mepic_error err;
} bench;

/* Pages of 16, 64 running, 4 jobs, 512 rows a step, a canonical context of 40 tokens. */
mp_scheduler_config small(bench *b, uint32_t n_pages);
void open_bench(const mp_scheduler_config *config, bench *b);
/* Small, without a canonical context. */
void open_plain(bench *b, uint32_t n_pages);
void check(bench *b);

/* A prompt under construction. */
typedef struct prompt {
    int32_t tokens[TOKENS_MAX];
    mp_span spans[256];
    uint32_t n, n_spans;
} prompt;

void put(prompt *p, mepic_segment_kind kind, const int32_t *tokens, uint32_t n);
/* n tokens that are the same for the same id. */
void put_new(prompt *p, mepic_segment_kind kind, int32_t id, uint32_t n);
/* `mepic`, 16 linked tokens, a reply of 8. */
mp_request_spec spec_of(const prompt *p);

mp_request *submit(bench *b, const mp_request_spec *spec);
/* One step; sampled rows get a token, and requests that have all theirs end. Returns the rows. `last_ended` may be
 * NULL. */
uint32_t step(bench *b, mepic_usage *last_ended);
void run_all(bench *b, mepic_usage *last_ended);
/* A whole life. */
mepic_usage ask(bench *b, const mp_request_spec *spec);
void everything_is_free_after_clear(bench *b);

#endif
