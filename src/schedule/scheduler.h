/* The scheduler: queue, admission, jobs, the rows of a step, preemption. It decides, moves no bytes, knows no model.
 *
 *   submit ─► queued ─► (hold hits, test room) ─► waiting for jobs ─► prefill ─► decode ─► finished
 *                ▲                                                        │
 *                └──────────────── preempted: newest first ◄──────────────┘
 *
 * Who calls it: the engine, on the stepping thread, in this order:
 *     mp_scheduler_step    what to compute now
 *     (the backend computes it)
 *     mp_scheduler_commit  its rows are written: publish pages, end jobs, free waiters
 *     for every row that samples: mp_scheduler_append (it goes on) or mp_scheduler_finish
 * Cancel (finish) and submit may come between any two steps, not between a step and its commit.
 *
 * Running ahead. The tokens of a step may be appended after the next step and its commit. That step takes for granted
 * that every reply goes on: a row's token is MP_TOKEN_SAMPLED where the step before samples it. Where a reply ended
 * instead, `finish` drops the row with its page: a page is published only once all its tokens are known. So `commit`
 * may come as soon as the backend has a step, if it computes steps one after the other.
 *
 * Invariants. A row is emitted for a slot exactly once per page version. Pages of an admitted request or job are held
 * from admission to its end. Requests wait for jobs, never the reverse. The oldest running request is never preempted.
 * Nothing is allocated after submit. */
#ifndef MEPIC_SCHEDULE_SCHEDULER_H
#define MEPIC_SCHEDULE_SCHEDULER_H

#include "base/hash.h"
#include "base/status.h"
#include "cache/segment.h"
#include "kv/plan.h"

typedef struct mp_scheduler mp_scheduler;
typedef struct mp_request mp_request; /* schedule/request.h, private to schedule/ */

typedef struct mp_scheduler_config {
    uint32_t page_size, n_pages;
    uint32_t cell_tokens;  /* the backend's */
    uint32_t max_running;  /* requests; jobs have further sequences of their own */
    uint32_t max_jobs;     /* jobs computed together, e.g. 4 */
    uint32_t max_queued;
    uint32_t step_tokens;  /* most rows a step */
    uint32_t context;      /* longest request, prompt and reply */
    const char *longer;    /* how to have a longer one, behind "shorten it"; NULL: nothing to say; borrowed */
    mepic_eviction eviction;
    mp_digest model;       /* weights, hyper-parameters, KV type, page size, numerics class */
    const int32_t *canonical; /* tokens of the canonical context, copied; n_canonical 0: none */
    uint32_t n_canonical;
    bool spoil_freed;      /* steps list what to fill with NaN: all that was written and is free again; O(pages) */
    mp_fault *fault;       /* borrowed */
} mp_scheduler_config;

/* Cells the plan may have one sequence read: for mp_backend_config. */
uint32_t mp_scheduler_max_refs(const mp_scheduler_config *config);
mepic_status mp_scheduler_open(const mp_scheduler_config *config, mp_scheduler **out, mepic_error *err);
void mp_scheduler_close(mp_scheduler *s); /* NULL is a no-op; requests still inside are freed */

typedef struct mp_request_spec {
    const int32_t *tokens; /* whole prompt, copied */
    uint32_t n_tokens;
    const mp_span *spans;  /* copied */
    uint32_t n_spans;
    mepic_reuse reuse;     /* not DEFAULT */
    uint32_t link_tokens;  /* 0 = nothing; UINT32_MAX = everything */
    const uint16_t *page_masks; /* tests: [pages of the CHUNK spans, in order] 1 = linked as well; NULL */
    mp_digest scope;        /* of the request, */
    mp_digest common_scope; /* and of its common spans */
    uint32_t max_tokens;   /* of the reply; 0 = until the context is full */
    bool logits_of_prompt; /* every computed prompt row wants logits */
    void *user;
} mp_request_spec;

/* ERR_BUSY, ERR_TOO_LONG (with the numbers), ERR_ARGUMENT, ERR_NOMEM. *out is valid until the request has ended. */
mepic_status mp_scheduler_submit(mp_scheduler *s, const mp_request_spec *spec, mp_request **out, mepic_error *err);

/* Admits, and lists the next step's rows. Valid until commit. n_rows 0: nothing to do. */
mepic_status mp_scheduler_step(mp_scheduler *s, const mp_step **out, mepic_error *err);
void mp_scheduler_commit(mp_scheduler *s);
/* The request a row's sequence belongs to; NULL for a job. */
mp_request *mp_scheduler_request(const mp_scheduler *s, uint32_t seq);
/* Tokens the reply may have at most: the spec's, cut to what context and pool can hold. No token goes past it. */
uint32_t mp_request_max_tokens(const mp_request *request);
/* The request's next token, in the order of the rows it was sampled from. */
void mp_scheduler_append(mp_scheduler *s, mp_request *request, int32_t token);
/* Ends a request in any state: completed or cancelled. Its pages are released; `request` is freed. */
void mp_scheduler_finish(mp_scheduler *s, mp_request *request);
/* Ends a request that ran and whose KV cannot be right: what nobody else reads of it, chunks too, leaves the cache. */
void mp_scheduler_fail(mp_scheduler *s, mp_request *request);
bool mp_scheduler_busy(const mp_scheduler *s);

void *mp_request_user(const mp_request *request);
/* Prompt accounting and page counts so far (times are the engine's). */
void mp_request_usage(const mp_request *request, mepic_usage *out);
/* Prompt and reply tokens appended so far, and how many of them are the prompt's. Behind them, up to two steps' tokens
 * to come are MP_TOKEN_SAMPLED. Valid until the request ends. */
const int32_t *mp_request_tokens(const mp_request *request, uint32_t *n, uint32_t *n_prompt);

/* The canonical context's pages, taken from the pool at the first compile. For the file in the cache directory:
 * `take` allocates them without computing; then either `loaded` (contents were written) or nothing (compile). */
bool mp_scheduler_canonical_take(mp_scheduler *s);
void mp_scheduler_canonical_loaded(mp_scheduler *s);
const mp_page *mp_scheduler_canonical_pages(const mp_scheduler *s, uint32_t *n, bool *ready);

/* Fills the page, row, cache and queue counters of `out`. */
void mp_scheduler_stats(const mp_scheduler *s, mepic_stats *out);
/* Evicts everything that nobody reads (the canonical context stays). */
void mp_scheduler_clear(mp_scheduler *s);
/* O(n) check of invariants I1 to I5 over pool, index, plan, requests and jobs; false with the reason. Tests. */
bool mp_scheduler_check(const mp_scheduler *s, mepic_error *err);
/* Canonical pages of a chunk, for tests: up to `cap` pages; returns the number of resident ones. */
uint32_t mp_scheduler_chunk_pages(const mp_scheduler *s, const mp_digest *scope, const int32_t *tokens, uint32_t n,
                                  mp_page *out, uint32_t cap);
/* How often a page was allocated, for tests: its contents are written once per version. */
uint64_t mp_scheduler_page_version(const mp_scheduler *s, mp_page page);

#endif
