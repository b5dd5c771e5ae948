/* Requests and what comes back of them: the loop around mepic_step that every program needs.
 *
 * A reply is where the events of one request are collected; the request's `user` is the reply. One thread. */
#ifndef MEPIC_CLI_REPLY_H
#define MEPIC_CLI_REPLY_H

#include "base/mem.h"
#include "cli/engine_flags.h"

typedef struct mp_reply {
    mp_buf text;
    uint32_t n_tokens; /* so far */
    bool submitted, done;
    mepic_request_id id;
    mepic_finish finish;
    mepic_usage usage;
    uint64_t logits_hash;
    void (*on_text)(void *user, const char *text, size_t len); /* as it comes; NULL = none */
    void *user;
} mp_reply;

/* Zero-initialize a reply and set on_text before. */
mepic_status mp_reply_submit(mp_session *session, mepic_request request, mp_reply *reply, mepic_error *err);
void mp_reply_clear(mp_reply *reply);

/* One step, and its events. */
mepic_status mp_replies_step(mp_session *session, mepic_error *err);
/* Until all `n` are done, with a progress line until the first token. Ctrl-C cancels them (finish says so). */
mepic_status mp_replies_wait(mp_session *session, mp_reply *replies, size_t n, mepic_error *err);

/* Submit and wait. */
mepic_status mp_reply_run(mp_session *session, const mepic_request *request, mp_reply *reply, mepic_error *err);

/* Tokens of the reply a second, after the first one; 0 when there is no second one. */
double mp_usage_decode_rate(const mepic_usage *usage);
/* Tokens of the prompt that had to be computed: linked, compiled and text. */
uint32_t mp_usage_computed(const mepic_usage *usage);
/* "prompt 1200 tokens = prefix 0 + chunk ..." */
void mp_usage_describe(const mepic_usage *usage, char *out, size_t cap);
const char *mp_finish_name(mepic_finish finish);

#endif
