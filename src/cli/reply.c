#include "cli/reply.h"

#include "base/clock.h"
#include "cli/interrupt.h"

#include <stdio.h>

enum { REPLY_MAX_BYTES = 64 << 20 };

mepic_status mp_reply_submit(mp_session *session, mepic_request request, mp_reply *reply, mepic_error *err) {
    request.user = reply;
    reply->text.limit = REPLY_MAX_BYTES;
    mepic_status status = mepic_submit(session->engine, &request, &reply->id, err);
    reply->submitted = status == MEPIC_OK;
    return status;
}

void mp_reply_clear(mp_reply *reply) {
    mp_buf_clear(&reply->text);
}

static mepic_status take_event(mp_session *session, const mepic_event *event, mepic_error *err) {
    mp_reply *reply = event->user;
    if (event->text_len > 0) {
        if (!mp_buf_append(&reply->text, event->text, event->text_len)) {
            return mp_fail_nomem(err, "the reply", reply->text.len + event->text_len);
        }
        if (reply->on_text) {
            mp_progress_clear(&session->progress);
            reply->on_text(reply->user, event->text, event->text_len);
        }
    }
    if (event->kind == MEPIC_EVENT_TOKEN) {
        reply->n_tokens++;
    } else {
        reply->done = true;
        reply->finish = event->finish;
        reply->usage = event->usage;
        reply->logits_hash = event->logits_hash;
        if (event->finish == MEPIC_FINISH_FAILED) return mp_fail(err, MEPIC_ERR_FAILED, "%s", event->error);
    }
    return MEPIC_OK;
}

mepic_status mp_replies_step(mp_session *session, mepic_error *err) {
    mepic_status status = mepic_step(session->engine, err);
    mepic_event event;
    while (status == MEPIC_OK && mepic_poll(session->engine, &event)) status = take_event(session, &event, err);
    return status;
}

static uint64_t rows_of_prompts(const mp_session *session) {
    mepic_stats stats;
    mepic_stats_read(session->engine, &stats);
    return stats.rows_text + stats.rows_link + stats.rows_compile;
}

static void show_prefill(mp_session *session, uint64_t rows_before, uint64_t start) {
    uint64_t rows = rows_of_prompts(session) - rows_before;
    double seconds = (double)(mp_now_ns() - start) * 1e-9;
    mp_progress_show(&session->progress, "prompt: %llu tokens computed, %.0f a second", (unsigned long long)rows,
                     seconds > 0.0 ? (double)rows / seconds : 0.0);
}

/* *silent: no token has come yet. */
static size_t count_waiting(const mp_reply *replies, size_t n, bool *silent) {
    size_t waiting = 0;
    *silent = true;
    for (size_t i = 0; i < n; i++) {
        waiting += replies[i].submitted && !replies[i].done;
        *silent = *silent && replies[i].n_tokens == 0;
    }
    return waiting;
}

mepic_status mp_replies_wait(mp_session *session, mp_reply *replies, size_t n, mepic_error *err) {
    uint64_t start = mp_now_ns(), rows_before = session->progress.enabled ? rows_of_prompts(session) : 0;
    bool cancelled = false, silent;
    mepic_status status = MEPIC_OK;
    mp_interrupt_arm();
    while (status == MEPIC_OK && count_waiting(replies, n, &silent) > 0) {
        status = mp_replies_step(session, err);
        count_waiting(replies, n, &silent);
        if (silent && session->progress.enabled) show_prefill(session, rows_before, start);
        if (mp_interrupted() && !cancelled) {
            for (size_t i = 0; i < n; i++) {
                if (replies[i].submitted) mepic_cancel(session->engine, replies[i].id);
            }
            cancelled = true;
        }
    }
    mp_interrupt_disarm();
    mp_progress_clear(&session->progress);
    return status;
}

mepic_status mp_reply_run(mp_session *session, const mepic_request *request, mp_reply *reply, mepic_error *err) {
    mepic_status status = mp_reply_submit(session, *request, reply, err);
    return status == MEPIC_OK ? mp_replies_wait(session, reply, 1, err) : status;
}

double mp_usage_decode_rate(const mepic_usage *usage) {
    if (usage->completion_tokens < 2 || usage->total_ns <= usage->ttft_ns) return 0.0;
    return (double)(usage->completion_tokens - 1) * 1e9 / (double)(usage->total_ns - usage->ttft_ns);
}

uint32_t mp_usage_computed(const mepic_usage *usage) {
    return usage->linked_tokens + usage->compiled_tokens + usage->computed_tokens;
}

void mp_usage_describe(const mepic_usage *usage, char *out, size_t cap) {
    snprintf(out, cap,
             "prompt %u tokens = prefix %u + chunk %u + linked %u + compiled %u + computed %u; TTFT %.3f s; "
             "reply %u tokens, %.1f tokens/s; pages held %u, without sharing %u",
             usage->prompt_tokens, usage->prefix_tokens, usage->chunk_tokens, usage->linked_tokens,
             usage->compiled_tokens, usage->computed_tokens, (double)usage->ttft_ns * 1e-9, usage->completion_tokens,
             mp_usage_decode_rate(usage), usage->pages_held, usage->pages_unshared);
}

const char *mp_finish_name(mepic_finish finish) {
    switch (finish) {
    case MEPIC_FINISH_STOP: return "stop";
    case MEPIC_FINISH_LENGTH: return "length";
    case MEPIC_FINISH_CANCELLED: return "cancelled";
    case MEPIC_FINISH_FAILED: return "failed";
    }
    return "unknown";
}
