/* The stepping thread: submit, step, poll, stats; and mepic_cancel, which any thread may call.
 *
 * Events. A step computes only when every event of the last one was taken, so the event list has a fixed size and an
 * event's text can stay where the reply keeps it. */
#include "engine/engine.h"

#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "engine/options.h"
#include "infer/forward.h"

static mepic_status check_fault(const mepic_engine *e, mepic_error *err) {
    if (!e->fault.broken) return MEPIC_OK;
    return mp_fail(err, MEPIC_ERR_BROKEN, "the engine is broken, close it: %s", e->fault.what);
}

/* ---- Submit ------------------------------------------------------------------------------------------------------ */

void mp_reply_free(mp_reply *reply) {
    if (!reply) return;
    mp_stream_close(&reply->stream);
    mp_free(reply->stop_tokens);
    mp_free(reply->bias);
    mp_free(reply);
}

static void *copy_array(const void *array, size_t n, size_t size) {
    void *copy = mp_calloc(n, size);
    if (copy && n > 0) memcpy(copy, array, n * size);
    return copy;
}

static mepic_status check_request(const mepic_engine *e, const mepic_request *r, mepic_error *err) {
    if (!r->prompt) return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.prompt is NULL; make one with mepic_prepare");
    if (r->prompt->engine != e) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.prompt was prepared by another engine");
    }
    if ((unsigned)r->reuse > MEPIC_REUSE_MEPIC) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.reuse is %d; it must be one of mepic_reuse, 0 to 3",
                       (int)r->reuse);
    }
    if (r->top_logprobs > MP_MAX_TOP_LOGPROBS) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.top_logprobs is %u; it must be from 0 to %d", r->top_logprobs,
                       MP_MAX_TOP_LOGPROBS);
    }
    if (r->n_stop_tokens > MP_MAX_STOP_TOKENS || (r->n_stop_tokens > 0 && !r->stop_tokens)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.n_stop_tokens is %zu; at most %d, in stop_tokens",
                       r->n_stop_tokens, MP_MAX_STOP_TOKENS);
    }
    return mp_sampling_check(&r->sampling, e->model->hp.n_vocab, err);
}

static mepic_status open_reply(const mepic_engine *e, const mepic_request *r, mp_reply **out, mepic_error *err) {
    mp_reply *reply = mp_calloc(1, sizeof *reply);
    if (!reply) return mp_fail_nomem(err, "a request", sizeof *reply);
    reply->sampling = r->sampling;
    reply->n_stop_tokens = r->n_stop_tokens;
    reply->ignore_eos = r->ignore_eos;
    reply->logprobs = r->logprobs || r->top_logprobs > 0;
    reply->top_logprobs = r->top_logprobs;
    reply->on_logits = r->on_logits;
    reply->logits_of_prompt = r->logits_of_prompt && r->on_logits;
    reply->user = r->user;
    mepic_status st = mp_stream_open(&reply->stream, e->tokenizer, e->max_token_bytes, r->stop, r->n_stop, err);
    if (st != MEPIC_OK) goto fail;
    reply->bias = copy_array(r->sampling.logit_bias, r->sampling.n_logit_bias, sizeof *reply->bias);
    reply->stop_tokens = copy_array(r->stop_tokens, r->n_stop_tokens, sizeof *reply->stop_tokens);
    if (!reply->bias || !reply->stop_tokens) {
        st = mp_fail_nomem(err, "a request's options", r->sampling.n_logit_bias * sizeof *reply->bias);
        goto fail;
    }
    reply->sampling.logit_bias = reply->bias;
    *out = reply;
    return MEPIC_OK;
fail:
    mp_reply_free(reply);
    return st;
}

/* A named scope never equals the common one, whatever its name. */
static mp_digest scope_digest(mp_sha256 *sha, const char *scope) {
    static const char common[] = "mepic/scope/common", named[] = "mepic/scope/named";
    mp_sha256_begin(sha);
    if (scope) {
        mp_sha256_update(sha, named, sizeof named);
        mp_sha256_update(sha, scope, strlen(scope));
    } else {
        mp_sha256_update(sha, common, sizeof common);
    }
    return mp_sha256_end(sha);
}

mepic_status mepic_submit(mepic_engine *e, const mepic_request *request, mepic_request_id *out, mepic_error *err) {
    mepic_status st = check_fault(e, err);
    if (st != MEPIC_OK) return st;
    mepic_request r;
    size_t least = offsetof(mepic_request, max_tokens);
    st = mp_options_copy(request, least, &r, sizeof r, "mepic_request", err);
    if (st == MEPIC_OK) st = check_request(e, &r, err);
    if (st != MEPIC_OK) return st;
    if (e->n_free_slots == 0) {
        return mp_fail(err, MEPIC_ERR_BUSY, "%u requests run and %u wait, the most there may be; submit again later",
                       e->options.max_running, e->options.max_queued);
    }
    mp_reply *reply = NULL;
    st = open_reply(e, &r, &reply, err);
    if (st != MEPIC_OK) return st;
    mepic_reuse reuse = r.reuse ? r.reuse : e->options.reuse;
    if (reuse == MEPIC_REUSE_MEPIC && !e->position_exact) reuse = MEPIC_REUSE_PREFIX;
    mp_request_spec spec = {
        .tokens = r.prompt->tokens.ids,
        .n_tokens = (uint32_t)r.prompt->tokens.n,
        .spans = r.prompt->spans,
        .n_spans = r.prompt->n_spans,
        .reuse = reuse,
        .link_tokens = mp_options_link(r.link_tokens, e->options.link_tokens),
        .scope = scope_digest(e->sha, r.scope),
        .common_scope = scope_digest(e->sha, NULL),
        .max_tokens = r.max_tokens,
        .logits_of_prompt = reply->logits_of_prompt,
        .user = reply,
    };
    reply->submitted_ns = mp_now_ns();
    st = mp_scheduler_submit(e->scheduler, &spec, &reply->request, err);
    if (st != MEPIC_OK) {
        mp_reply_free(reply);
        return st;
    }
    reply->max_tokens = mp_request_max_tokens(reply->request);
    uint32_t slot = e->free_slots[--e->n_free_slots];
    reply->id = ++e->n_submitted * e->n_slots + slot;
    e->slots[slot].reply = reply;
    atomic_store(&e->slots[slot].issued, reply->id);
    *out = reply->id;
    return MEPIC_OK;
}

/* Only ever raises `cancelled`, and only up to the id that was issued last: a late cancel of an ended request cannot
 * undo or hit that of the slot's next one. */
void mepic_cancel(mepic_engine *e, mepic_request_id id) {
    mp_slot *slot = &e->slots[id % e->n_slots];
    if (atomic_load(&slot->issued) != id) return;
    uint_fast64_t seen = atomic_load(&slot->cancelled);
    while (seen < id && !atomic_compare_exchange_weak(&slot->cancelled, &seen, id)) {
    }
    atomic_store(&e->cancel_asked, true);
}

/* ---- Events ------------------------------------------------------------------------------------------------------ */

static mepic_event *push_event(mepic_engine *e, mepic_event_kind kind, const mp_reply *reply) {
    if (!mp_invariant(&e->fault, e->n_events < e->cap_events, "a step makes at most two events for a request"))
        return NULL;
    mepic_event *event = &e->events[e->n_events++];
    *event = (mepic_event){ .kind = kind, .id = reply->id, .user = reply->user, .text = "" };
    return event;
}

/* What is wrong with a row that has no number. Other rows do not see it: no kernel lets a NaN cross. */
static const char no_number[] = "the logits of this request hold no number: the model's arithmetic failed on it, and "
                                "on it alone; ask again, and if "
                                "it comes back check the model's file (its digest), then the machine's memory";

static void end_reply(mepic_engine *e, mp_reply *reply, mepic_finish finish, bool by_stop_string) {
    mp_str rest = { "", 0 };
    if (!by_stop_string) {
        bool ok = mp_stream_end(&reply->stream, &rest);
        mp_invariant(&e->fault, ok, "a reply's text fits its buffer");
    }
    mepic_usage usage = { 0 };
    mp_request_usage(reply->request, &usage);
    uint64_t now = mp_now_ns();
    usage.completion_tokens = reply->n_tokens;
    usage.queue_ns = (reply->started_ns ? reply->started_ns : now) - reply->submitted_ns;
    usage.ttft_ns = reply->first_ns ? reply->first_ns - reply->submitted_ns : 0;
    usage.total_ns = now - reply->submitted_ns;
    if (finish == MEPIC_FINISH_FAILED) {
        mp_scheduler_fail(e->scheduler, reply->request);
    } else {
        mp_scheduler_finish(e->scheduler, reply->request);
    }
    reply->request = NULL;

    mepic_event *event = push_event(e, MEPIC_EVENT_DONE, reply);
    if (event) {
        event->text = rest.data;
        event->text_len = rest.len;
        event->finish = finish;
        event->usage = usage;
        event->logits_hash = reply->logits_hash;
        event->stop = by_stop_string ? reply->stream.stop : -1;
        event->error = finish == MEPIC_FINISH_FAILED ? no_number : NULL;
    }
    uint32_t slot = (uint32_t)(reply->id % e->n_slots);
    e->slots[slot].reply = NULL;
    e->free_slots[e->n_free_slots++] = slot;
    reply->next_ended = e->ended;
    e->ended = reply;
}

bool mepic_busy(const mepic_engine *e) {
    return e->next_event < e->n_events || (!e->fault.broken && mp_scheduler_busy(e->scheduler));
}

bool mepic_poll(mepic_engine *e, mepic_event *out) {
    if (e->next_event == e->n_events) return false;
    *out = e->events[e->next_event++];
    return true;
}

/* ---- Step -------------------------------------------------------------------------------------------------------- */

static void end_cancelled(mepic_engine *e) {
    if (!atomic_exchange(&e->cancel_asked, false)) return;
    for (uint32_t i = 0; i < e->n_slots; i++) {
        mp_reply *reply = e->slots[i].reply;
        if (reply && atomic_load(&e->slots[i].cancelled) == reply->id) {
            end_reply(e, reply, MEPIC_FINISH_CANCELLED, false);
        }
    }
}

static bool is_stop_token(const mepic_engine *e, const mp_reply *reply, int32_t token) {
    if (!reply->ignore_eos && mp_tokenizer_ends(e->tokenizer, token)) return true;
    for (size_t i = 0; i < reply->n_stop_tokens; i++) {
        if (reply->stop_tokens[i] == token) return true;
    }
    return false;
}

/* The reply's next token; the reply goes on or ends. logits [n_vocab]: NULL when nobody looks at them. */
static void take_token(mepic_engine *e, mp_reply *reply, mp_sampled sampled, const float *logits) {
    int32_t token = sampled.token;
    uint32_t n_vocab = e->model->hp.n_vocab;
    if (e->options.hash_logits) {
        reply->logits_hash = mp_hash64(reply->logits_hash, logits, n_vocab * sizeof *logits);
    }
    reply->n_tokens++;
    if (!reply->first_ns) reply->first_ns = mp_now_ns();

    bool ends = is_stop_token(e, reply, token), by_stop_string = false;
    mp_str text = { "", 0 };
    if (!ends) {
        bool ok = mp_stream_push(&reply->stream, token, &text, &by_stop_string);
        if (!mp_invariant(&e->fault, ok, "a reply's text fits its buffer")) return;
    }
    mepic_event *event = push_event(e, MEPIC_EVENT_TOKEN, reply);
    if (!event) return;
    if (reply->n_tokens == 1) {
        mp_request_usage(reply->request, &event->usage);
        event->usage.completion_tokens = 1;
    }
    event->token = token;
    event->text = text.data;
    event->text_len = text.len;
    if (reply->logprobs) {
        event->logprob = sampled.logprob;
        event->top = reply->top;
        if (logits) {
            event->n_top = mp_logprobs(logits, n_vocab, token, &event->logprob, reply->top, reply->top_logprobs);
        }
    }
    if (ends || by_stop_string) {
        end_reply(e, reply, MEPIC_FINISH_STOP, by_stop_string);
    } else if (reply->n_tokens == reply->max_tokens) {
        end_reply(e, reply, MEPIC_FINISH_LENGTH, false);
    } else {
        mp_scheduler_append(e->scheduler, reply->request, token);
    }
}

/* Whether the caller hears of the logits of a row. */
static bool hears_logits(const mp_reply *reply, bool samples) {
    return reply->on_logits && (samples || reply->logits_of_prompt);
}

/* Whether the host looks at logits of a row, and not only to sample from them. */
static bool looks_at(const mepic_engine *e, const mp_reply *reply, const mp_row *row) {
    return hears_logits(reply, row->samples) || (row->samples && (e->options.hash_logits || reply->top_logprobs > 0));
}

/* Notes which rows' logits somebody waits for, and which replies have started. */
static void note_rows(mepic_engine *e, mp_flight *f, const mp_step *step, uint64_t now) {
    f->n_rows = f->n_tokens = 0;
    f->looked_at = false;
    for (uint32_t i = 0; i < step->n_rows; i++) {
        const mp_row *row = &step->rows[i];
        if (!row->logits && i > 0 && row->seq == step->rows[i - 1].seq) continue;
        mp_request *request = mp_scheduler_request(e->scheduler, row->seq);
        mp_reply *reply = request ? mp_request_user(request) : NULL;
        if (reply && !reply->started_ns) reply->started_ns = now;
        if (!row->logits) continue;
        bool ok = reply && f->n_rows < e->options.step_tokens;
        if (!mp_invariant(&e->fault, ok, "logits are wanted by a request")) return;
        mp_logits_row *noted = &f->rows[f->n_rows++];
        *noted = (mp_logits_row){ .id = reply->id,
                                  .position = (uint32_t)row->position,
                                  .seq = row->seq,
                                  .samples = row->samples,
                                  .looked_at = looks_at(e, reply, row) };
        f->n_tokens += row->samples;
        f->looked_at |= noted->looked_at;
    }
}

static mp_reply *find_reply(const mepic_engine *e, mepic_request_id id) {
    mp_reply *reply = e->slots[id % e->n_slots].reply;
    return reply && reply->id == id ? reply : NULL;
}

/* Logits row i as the sampler wants it. */
static mp_sample_row sample_row(const mp_flight *f, uint32_t i, const mp_reply *reply) {
    mp_sample_row row = {
        .logits = i, .seq = f->rows[i].seq, .sampling = &reply->sampling, .logprob = reply->logprobs
    };
    row.tokens = mp_request_tokens(reply->request, &row.n_tokens, &row.n_prompt);
    row.n_tokens = f->rows[i].position + 1; /* some may not be known yet */
    return row;
}

/* Has the backend sample all rows that want a token. */
static mepic_status begin_sampling(mepic_engine *e, mp_flight *f, mepic_error *err) {
    uint32_t n = 0;
    if (!e->backend->ops->sample) {
        for (; n < f->n_tokens; n++) f->sampled[n].token = MP_SAMPLE_ON_HOST;
        return MEPIC_OK;
    }
    for (uint32_t i = 0; i < f->n_rows; i++) {
        if (f->rows[i].samples) e->samples[n++] = sample_row(f, i, find_reply(e, f->rows[i].id));
    }
    mepic_status st = n ? e->backend->ops->sample(e->backend, e->samples, n, f->sampled, err) : MEPIC_OK;
    for (uint32_t i = 0; i < n; i++) f->looked_at |= f->sampled[i].token == MP_SAMPLE_ON_HOST;
    return st;
}

static int32_t sample_on_host(mepic_engine *e, const mp_sample_row *row, const float *logits) {
    int32_t token;
    bool ok = mp_sample(e->sampler, row->sampling, logits, row->tokens, row->n_tokens, row->n_prompt, &token);
    return ok ? token : -1;
}

static mepic_status use_logits(mepic_engine *e, const mp_flight *f, mepic_error *err) {
    const mp_sampled *next = f->sampled;
    for (uint32_t i = 0; i < f->n_rows && !e->fault.broken; i++) {
        const mp_logits_row *row = &f->rows[i];
        mp_sampled sampled = row->samples ? *next++ : (mp_sampled){ 0 };
        mp_reply *reply = find_reply(e, row->id);
        if (!reply) continue; /* it ended by a token of the step before, or was cancelled */
        bool on_host = sampled.token == MP_SAMPLE_ON_HOST;
        const float *logits = NULL;
        if (on_host || row->looked_at) {
            logits = e->backend->ops->logits_row(e->backend, i);
            if (!logits) return mp_fail(err, MEPIC_ERR_BROKEN, "the logits of a step cannot be read");
        }
        if (on_host) {
            const mp_sample_row sample = sample_row(f, i, reply);
            sampled.token = sample_on_host(e, &sample, logits);
        }
        if (hears_logits(reply, row->samples)) {
            reply->on_logits(reply->user, row->position, logits, e->model->hp.n_vocab);
        }
        if (!row->samples) continue;
        if (sampled.token < 0) {
            end_reply(e, reply, MEPIC_FINISH_FAILED, false);
        } else {
            take_token(e, reply, sampled, logits);
        }
    }
    return MEPIC_OK;
}

static void count_forward(mepic_engine *e, mp_flight *f, uint64_t ns) {
    e->forward_ns += ns;
    f->forward_ns += ns;
}

/* The time of a step that has ended, to the last nanosecond. */
static void share_out_forward(mepic_engine *e, const mp_flight *f) {
    uint64_t n_rows = 0, n = 0, shared = 0;
    for (int kind = 0; kind < MP_ROW_KINDS; kind++) n_rows += f->n_of_kind[kind];
    for (int kind = 0; kind < MP_ROW_KINDS; kind++) {
        n += f->n_of_kind[kind];
        uint64_t until = f->forward_ns * n / n_rows;
        e->ns_of_kind[kind] += until - shared;
        shared = until;
    }
}

/* Gives a step to the backend. What it writes can be published at once: everything that reads it comes later. */
static mepic_status begin_flight(mepic_engine *e, const mp_step *step, uint64_t now, mepic_error *err) {
    mp_flight *f = &e->flights[1 - e->newest];
    note_rows(e, f, step, now);
    memcpy(f->n_of_kind, step->n_of_kind, sizeof f->n_of_kind);
    f->forward_ns = 0;
    mepic_status st = mp_forward(e->backend, e->model, step, 0, e->model->hp.n_layers, err);
    if (st == MEPIC_OK) st = begin_sampling(e, f, err);
    count_forward(e, f, mp_now_ns() - now);
    if (st != MEPIC_OK) return st;
    mp_scheduler_commit(e->scheduler);
    e->newest = 1 - e->newest;
    e->n_flights++;
    e->steps++;
    return MEPIC_OK;
}

/* Waits for the oldest step under way and takes its tokens. */
static mepic_status end_flight(mepic_engine *e, mepic_error *err) {
    uint64_t start = mp_now_ns();
    uint32_t ago = --e->n_flights;
    mp_flight *f = &e->flights[e->newest ^ ago];
    mepic_status st = e->backend->ops->wait(e->backend, ago, f->sampled, f->n_tokens, err);
    uint64_t computed = mp_now_ns();
    count_forward(e, f, computed - start);
    share_out_forward(e, f);
    if (st == MEPIC_OK) st = use_logits(e, f, err);
    e->sample_ns += mp_now_ns() - computed;
    return st;
}

/* Begins a step, and ends the one before it where the backend runs ahead, so that it is never without work. At most one
 * ends, since an event's text stays only until the reply's next token. */
static mepic_status run_step(mepic_engine *e, mepic_error *err) {
    mepic_status st = MEPIC_OK;
    bool ended = e->n_flights > 0 && e->flights[e->newest].looked_at;
    if (ended) st = end_flight(e, err);
    if (st != MEPIC_OK) return st;
    const mp_step *step;
    uint64_t start = mp_now_ns();
    st = mp_scheduler_step(e->scheduler, &step, err);
    uint64_t scheduled = mp_now_ns();
    e->schedule_ns += scheduled - start;
    if (st != MEPIC_OK) return st;
    bool begins = step->n_rows > 0;
    if (begins) st = begin_flight(e, step, scheduled, err);
    if (st != MEPIC_OK) return st;
    uint32_t n_ahead = begins && e->backend->ops->ahead;
    if (!ended && e->n_flights > n_ahead) st = end_flight(e, err);
    if (st == MEPIC_OK) mp_canonical_file_save(&e->canonical_file, e->scheduler, e->backend, &e->log);
    return st;
}

mepic_status mepic_step(mepic_engine *e, mepic_error *err) {
    mepic_status st = check_fault(e, err);
    if (st != MEPIC_OK) return st;
    if (e->next_event < e->n_events) {
        return mp_fail(err, MEPIC_ERR_BUSY, "%u events of the last step wait; take them with mepic_poll first",
                       e->n_events - e->next_event);
    }
    e->next_event = e->n_events = 0;
    while (e->ended) {
        mp_reply *reply = e->ended;
        e->ended = reply->next_ended;
        mp_reply_free(reply);
    }
    end_cancelled(e);
    mepic_error why = { 0 };
    st = run_step(e, &why);
    mp_invariant(&e->fault, st == MEPIC_OK, why.message);
    return check_fault(e, err);
}

/* ---- State ------------------------------------------------------------------------------------------------------- */

void mepic_stats_read(const mepic_engine *e, mepic_stats *out) {
    mepic_stats stats = { 0 };
    mp_scheduler_stats(e->scheduler, &stats);
    stats.steps = e->steps;
    stats.schedule_ns = e->schedule_ns;
    stats.forward_ns = e->forward_ns;
    stats.decode_ns = e->ns_of_kind[MP_ROW_DECODE];
    stats.text_ns = e->ns_of_kind[MP_ROW_TEXT];
    stats.link_ns = e->ns_of_kind[MP_ROW_LINK];
    stats.compile_ns = e->ns_of_kind[MP_ROW_COMPILE];
    stats.sample_ns = e->sample_ns;
    stats.loaded_pages = e->canonical_file.n_loaded;
    stats.load_ns = e->canonical_file.load_ns;
    stats.allocations = mp_mem_count();
    *out = stats;
}

void mepic_cache_clear(mepic_engine *e) {
    if (!e->fault.broken) mp_scheduler_clear(e->scheduler);
}
