/* A request: its tokens, their layout, the names of its pages, and what it holds. Its life is in scheduler.h.
 *
 * Everything it will ever need is allocated at submit: tokens and page names up to its longest reply, and a job for
 * each of its chunks. Token i of its stream is token `position(i)` of prompt and reply: the stream is not stored.
 * The tokens of up to two steps may be there without being known (scheduler.h, "Running ahead"). */
#ifndef MEPIC_SCHEDULE_REQUEST_H
#define MEPIC_SCHEDULE_REQUEST_H

#include "cache/segment.h"
#include "schedule/jobs.h"

typedef enum mp_request_state {
    MP_REQUEST_QUEUED,  /* holds nothing */
    MP_REQUEST_WAITING, /* admitted: has its pages, waits for jobs */
    MP_REQUEST_PREFILL, /* in the plan */
    MP_REQUEST_DECODE,  /* everything but what is sampled is written */
} mp_request_state;

/* A chunk of a request: held, or waited for, or (queued) neither. */
struct mp_request_chunk {
    mp_request *request;
    mp_job *job;    /* brought along; content and, if it must be compiled, the job that does it */
    mp_job *waits;  /* the job under way that is waited for; NULL */
    mp_page *pages; /* [n_pages] held; room for all of the chunk's */
    uint32_t n_pages;
    uint32_t n_resident;           /* pages that were there at admission */
    mp_request_chunk *next, *prev; /* waiters of the job */
};

struct mp_request {
    mp_request *next, *prev; /* in the queue or among the running, by id */
    uint64_t id;             /* order of submission */
    mp_request_state state;
    bool has_turn;      /* to decode in this step */
    uint32_t overtaken; /* times, while it was the queue's head */
    bool tried;         /* admission failed ... */
    uint64_t tried_at;  /* ... and cannot succeed before scheduler.n_releases changes */
    const mp_policy *policy;
    mp_digest prefix_root;
    mp_layout layout;
    int32_t *tokens;                         /* prompt and reply */
    uint32_t n_prompt, n_tokens, max_tokens; /* max_tokens: of the reply */
    uint32_t n_known;                        /* of n_tokens; the others are MP_TOKEN_SAMPLED */
    uint32_t page_size;
    mp_page_name *names;        /* [n_names] of the stream's full pages, made as they are needed */
    uint32_t n_names, next_ref; /* next_ref: first run whose reference is in no name yet */
    mp_stream stream;
    mp_request_chunk *chunks; /* [layout.n_chunks] */
    uint32_t n_waits;
    bool logits_of_prompt, accounted;
    bool failed; /* its KV is not to be trusted */
    mepic_usage usage;
    void *user;
};

typedef struct mp_request_list {
    mp_request *first, *last;
    uint32_t n;
} mp_request_list;

/* Lays out the prompt, refuses what can never fit, allocates. */
mepic_status mp_request_open(mp_scheduler *s, const mp_request_spec *spec, mp_request **out, mepic_error *err);
void mp_request_close(mp_request *request); /* holds nothing; NULL is a no-op */

/* Tokens of the stream so far, and those of them that are known. */
uint32_t mp_request_length(const mp_request *request);
uint32_t mp_request_known(const mp_request *request);
uint32_t mp_request_position(const mp_request *request, uint32_t index);
/* Page i of the stream: what it holds and its name. `tokens` has room for a page. */
const mp_page_name *mp_request_name(mp_scheduler *s, mp_request *request, uint32_t i);
mp_elements mp_request_elements(const mp_scheduler *s, const mp_request *request, uint32_t i, int32_t *tokens);
/* Where the prompt's tokens come from, as it is admitted for the first time. */
void mp_request_account(mp_request *request);

void mp_request_list_insert(mp_request_list *list, mp_request *request);
void mp_request_list_remove(mp_request_list *list, mp_request *request);

#endif
