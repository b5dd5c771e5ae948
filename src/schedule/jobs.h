/* Jobs: computing what belongs to nobody in particular. A job compiles one chunk (or the canonical context itself) in a
 * sequence of its own: its private stream is the chunk's pages, at angles s, s + 1, ...; it reads the canonical context
 * and itself, nothing else. So what it publishes depends on no request.
 *
 *     begin ──► waits for a sequence ──► rows, page by page published ──► end: every waiter holds the pages
 *        │                                      │
 *        └─────────── last waiter leaves ───────┴──► abandoned: published pages stay, the rest is free
 *
 * A job has all of its pages from the start and waits for no page; requests wait for jobs, never the reverse. A chunk
 * has one job at a time, whoever needs it. Pages that another job publishes meanwhile (chunks with equal beginnings)
 * are adopted instead of computed.
 *
 * Memory: a request brings a job for each of its chunks when it is submitted, so that none is allocated later; most are
 * never begun. A begun job may outlive the request that brought it. */
#ifndef MEPIC_SCHEDULE_JOBS_H
#define MEPIC_SCHEDULE_JOBS_H

#include "cache/residency.h"
#include "schedule/scheduler.h"
#include "schedule/stream.h"

typedef struct mp_request_chunk mp_request_chunk; /* schedule/request.h: a waiter */

typedef struct mp_job {
    mp_chunk chunk;   /* first: the residency's chunk under way is its job */
    uint32_t holders; /* the request that brought it, and itself while it is under way */
    uint32_t angle;   /* of token 0 */
    bool under_way;
    mp_stream stream;           /* pages [chunk.n_pages] */
    mp_request_chunk *waiters;  /* a list */
    struct mp_job *next, *prev; /* under way, oldest first */
} mp_job;

typedef struct mp_job_list {
    mp_job *first, *last;
} mp_job_list;

/* Copies the tokens; the keys are left to the caller. One holder. NULL: out of memory. */
mp_job *mp_job_open(const int32_t *tokens, uint32_t n, uint32_t page_size, uint32_t angle);
mp_digest *mp_job_keys(mp_job *job);
void mp_job_let_go(mp_job *job); /* one holder less; NULL is a no-op */

/* The job's stream has all pages, the first n_published of them from the cache. */
void mp_job_begin(mp_scheduler *s, mp_job *job);
void mp_job_add_waiter(mp_job *job, mp_request_chunk *waiter);
/* The last one to leave abandons the job. */
void mp_job_remove_waiter(mp_scheduler *s, mp_request_chunk *waiter);
/* Gives sequences to jobs, adopts pages, ends what is complete by that. */
void mp_jobs_prepare(mp_scheduler *s);
/* Rows of the job were written: publishes its finished pages, ends it if it is complete. */
void mp_job_commit(mp_scheduler *s, mp_job *job, uint32_t n_rows);

/* Takes the canonical context's pages; false: no room. */
bool mp_canonical_take(mp_scheduler *s);
bool mp_canonical_ready(const mp_scheduler *s);
/* Of the chains of a scope's chunks. */
mp_digest mp_canonical_root(const mp_scheduler *s, const mp_digest *scope);

#endif
