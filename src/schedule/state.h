/* The scheduler's state, shared by the files of this room:
 *     scheduler.c   the interface       request.c    one request
 *     admission.c   who may start       jobs.c       compiling chunks
 *     step.c        rows and commit     check.c      invariants */
#ifndef MEPIC_SCHEDULE_STATE_H
#define MEPIC_SCHEDULE_STATE_H

#include "cache/residency.h"
#include "kv/plan_edit.h"
#include "schedule/jobs.h"
#include "schedule/request.h"
#include "schedule/scheduler.h"

#define MP_OVERTAKEN_MAX 8u
#define MP_RESERVE_TOKENS 64u
#define MP_ADMISSION_WINDOW 16u /* requests of the queue that are looked at in one step */

/* Sequence ids that nobody uses. */
typedef struct mp_seq_stack {
    uint32_t *ids;
    uint32_t n;
} mp_seq_stack;

struct mp_scheduler {
    mp_scheduler_config config; /* canonical: in the canonical job */
    mp_fault *fault;
    mp_sha256 *sha;
    mp_kv kv;
    mp_residency residency;
    mp_plan *plan;
    mp_request_list queue, running; /* both by id, that is by age */
    mp_job_list jobs;
    mp_job *canonical;     /* its pages are held for ever once they are taken; NULL: no canonical context */
    mp_request **requests; /* [max_running] by sequence */
    mp_job **by_seq;       /* [max_jobs] by sequence - max_running */
    mp_seq_stack request_seqs, job_seqs;
    uint64_t next_id;
    uint64_t next_turn;  /* the oldest id whose turn to decode comes first in the next step */
    uint64_t n_releases; /* events that may have made room */
    bool in_step;        /* between step and commit */
    mp_row *rows;        /* [step_tokens] */
    mp_page *zero_pages; /* [step_tokens] */
    mp_page *spoil_pages; /* [n_pages], and */
    bool *written;        /* [n_pages] since the page was spoiled last; both NULL without config.spoil_freed */
    mp_step step;
    mepic_stats stats; /* counters; what can be counted when asked is not kept here */
};

/* admission.c */
void mp_admit(mp_scheduler *s);
/* All jobs of a waiting request have ended: it enters the plan. */
void mp_request_start(mp_scheduler *s, mp_request *request);
/* Leaves the plan, its jobs and its pages. */
void mp_request_release(mp_scheduler *s, mp_request *request);
/* A failed request that was preempted: what it left in the cache, and nobody else reads, leaves that. */
void mp_request_forget(mp_scheduler *s, mp_request *request);
/* Back to the queue. */
void mp_preempt(mp_scheduler *s, mp_request *request);

/* step.c. Full pages of the stream enter the index, once all that is written is known. */
void mp_request_publish(mp_scheduler *s, mp_request *request);
/* Page i of the stream is written: it enters the index, or an equal page takes its place. */
void mp_stream_publish(mp_scheduler *s, mp_stream *stream, uint32_t i, mp_node_kind kind, const mp_digest *key,
                       const mp_elements *elements);

#endif
