/* The engine's inside: what mepic.h's opaque type holds. Shared by the files of this room only.
 *
 *   prepare.c  text -> tokens        any thread
 *   open.c     the ladder of open    once
 *   engine.c   submit, step, poll    the stepping thread; mepic_cancel any thread
 *
 * Everything a step needs is allocated at open or submit. */
#ifndef MEPIC_ENGINE_ENGINE_H
#define MEPIC_ENGINE_ENGINE_H

#include <stdatomic.h>

#include "backend/backend.h"
#include "base/hash.h"
#include "base/log.h"
#include "engine/canonical.h"
#include "engine/stream.h"
#include "infer/sample.h"
#include "model/model.h"
#include "schedule/scheduler.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

enum { MP_MAX_JOBS = 4, MP_MAX_TOP_LOGPROBS = 20, MP_MAX_STOP_TOKENS = 256 };

struct mepic_prepared {
    const mepic_engine *engine; /* whose vocabulary the tokens are of */
    mp_tokens tokens;
    mp_span *spans;
    uint32_t n_spans, cap_spans;
};

/* A request from submit until its DONE event was taken: what the scheduler does not need to know. */
typedef struct mp_reply {
    mepic_request_id id;
    mp_request *request; /* the scheduler's; ends with the reply */
    mepic_sampling sampling;
    struct mepic_logit_bias *bias; /* owned copies */
    int32_t *stop_tokens;
    size_t n_stop_tokens;
    mp_stream stream;
    uint32_t max_tokens; /* at least 1 */
    bool ignore_eos, logprobs, logits_of_prompt;
    uint32_t top_logprobs;
    mepic_logits_fn on_logits;
    void *user;

    uint32_t n_tokens; /* of the reply */
    mepic_logprob top[MP_MAX_TOP_LOGPROBS];
    uint64_t logits_hash;
    uint64_t submitted_ns, started_ns, first_ns; /* 0: not yet */
    struct mp_reply *next_ended;
} mp_reply;

/* A place for a live reply. An id is a multiple of the number of slots plus the slot, and grows: so mepic_cancel needs
 * no lock, only a maximum. */
typedef struct mp_slot {
    mp_reply *reply; /* NULL: free; stepping thread only */
    atomic_uint_fast64_t issued, cancelled;
} mp_slot;

/* A row whose logits are wanted. Its reply may have ended when they come, so it is known by its id. */
typedef struct mp_logits_row {
    mepic_request_id id;
    uint32_t position;
    uint32_t seq;
    bool samples, looked_at; /* looked_at: by the host, and not only to sample from */
} mp_logits_row;

/* A step that was begun and whose tokens were not taken yet. */
typedef struct mp_flight {
    mp_logits_row *rows; /* [step_tokens] by row of logits */
    mp_sampled *sampled; /* [step_tokens] of the rows that sample */
    uint32_t n_rows, n_tokens;
    bool looked_at; /* the host needs its logits, so no other step may begin */
    uint32_t n_of_kind[MP_ROW_KINDS];
    uint64_t forward_ns; /* spent on it so far */
} mp_flight;

struct mepic_engine {
    mp_log log;
    mp_fault fault;
    mepic_engine_options options; /* resolved; its strings are valid during open only */
    mepic_model_info info;
    bool position_exact;
    const char *longer_context; /* static; what helps a prompt that the context has no room for */

    mp_model *model;
    mp_tokenizer *tokenizer;
    mp_chat_template chat;
    size_t max_token_bytes;
    mp_tokens canonical;
    const mp_backend_ops *ops; /* of the device that was asked for; once it is open, backend->ops */
    uint32_t device;
    mp_backend *backend;
    mp_scheduler *scheduler;
    mp_canonical_file canonical_file;
    mp_sampler *sampler;
    mp_sha256 *sha;

    mp_slot *slots; /* [n_slots] */
    uint32_t *free_slots;
    uint32_t n_slots, n_free_slots;
    uint64_t n_submitted;
    atomic_bool cancel_asked;

    mp_flight flights[2];    /* used in turn; flights[newest] is that of the last step */
    uint32_t newest, n_flights;
    mp_sample_row *samples;  /* [step_tokens] scratch */
    mepic_event *events; /* [cap_events] of the last mepic_step: at most a token and an end for every live request */
    uint32_t n_events, next_event, cap_events;
    mp_reply *ended; /* their events may still be read; freed by the next step */

    uint64_t steps, schedule_ns, forward_ns, sample_ns, ns_of_kind[MP_ROW_KINDS];
};

void mp_reply_free(mp_reply *reply); /* NULL is a no-op; not the scheduler's request */

#endif
