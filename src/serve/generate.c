/* Routes that ask the engine: from a body to a feed, and from the feed's events to an answer or a stream. */
#include <string.h>

#include "base/clock.h"
#include "serve/exchange.h"
#include "serve/json.h"

enum {
    OUT_MAX = 64 << 20,
    STREAM_WAITING_MAX = 256 << 10, /* bytes of a reply's events that a reader who is stuck may leave behind */
    WAITING_MAX = 16 << 20,         /* of all replies, and of a body: there only this thread can be late */
    STREAM_OUT = 64 << 10,          /* bytes of a stream that are made at once, and an event's */
    BODY_WAKE_AT = 64 << 10,
};

/* ---- Begin ------------------------------------------------------------------------------------------------------- */

static void pause_connection(void *exchange) {
    const mp_exchange *x = exchange;
    MHD_suspend_connection(x->connection);
}

static void wake_connection(void *exchange) {
    const mp_exchange *x = exchange;
    mp_driver *driver = x->driver; // once resumed, the connection may end at any time, and the exchange with it
    MHD_resume_connection(x->connection);
    mp_driver_wake(driver);
}

/* What is certain without the engine is said before anything waits. */
static bool check_length(const mp_exchange *x, const mp_generation *g, mp_api_error *err) {
    uint32_t context = x->server->info.context;
    for (uint32_t i = 0; i < g->n_prompts; i++) {
        size_t n;
        mepic_prepared_tokens(g->prompts[i], &n);
        if (n < context) continue;
        return mp_refuse(err, 400, "context_length_exceeded", NULL,
                         "the prompt has %zu tokens and the reply needs at least one; the context is %u", n, context);
    }
    return true;
}

static bool begin(mp_exchange *x, mp_api_error *err) {
    mp_server *server = x->server;
    if (!mp_loop_welcome(server->loop, x->key ? x->key->index + 1 : 0, err)) return false;
    json_t *body = mp_json_parse(x->body.data, x->body.len, err);
    if (!body) return false;
    mepic_error why;
    mp_generation *generation = NULL;
    uint64_t id = mp_server_next_id(server);
    bool ok = mp_generation_open(&generation, &why) == MEPIC_OK || mp_refuse_engine(err, &why);
    ok = ok && x->route->dialect->read(&server->api, body, id, generation, &x->writer, err);
    json_decref(body);
    mp_buf_clear(&x->body);
    mp_exchange_hold(x, 0);
    if (!ok || !check_length(x, generation, err)) {
        mp_generation_free(generation);
        return false;
    }
    x->streaming = generation->stream;
    size_t waiting_max = (size_t)mp_generation_choices(generation) * STREAM_WAITING_MAX;
    const mp_feed_reader reader = {
        .pause = pause_connection,
        .wake = wake_connection,
        .connection = x,
        .limit = x->streaming && waiting_max < WAITING_MAX ? waiting_max : WAITING_MAX,
        .patience_ns = server->options.stuck_ms * UINT64_C(1000000),
        .most = WAITING_MAX,
        .wake_at = x->streaming ? 0 : BODY_WAKE_AT,
    };
    if (mp_feed_open(generation, &reader, &x->feed, &why) != MEPIC_OK) {
        mp_generation_free(generation);
        return mp_refuse_engine(err, &why);
    }
    if (x->key) {
        x->feed->scope = x->key->scope;
        x->feed->tenant = x->key->index + 1;
    }
    if (!mp_loop_submit(server->loop, x->feed, err)) return false;
    x->accepted = true;
    mp_exchange_record(x, false, false);
    mp_watch_feed(x->watched, x->feed);
    return true;
}

/* ---- Events ------------------------------------------------------------------------------------------------------ */

static uint64_t later(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

static void count_event(mepic_usage *sum, const mp_feed_event *event) {
    if (event->kind == MEPIC_EVENT_TOKEN) {
        sum->completion_tokens++;
        return;
    }
    const mepic_usage *u = &event->usage;
    sum->prompt_tokens += u->prompt_tokens;
    sum->prefix_tokens += u->prefix_tokens;
    sum->chunk_tokens += u->chunk_tokens;
    sum->linked_tokens += u->linked_tokens;
    sum->compiled_tokens += u->compiled_tokens;
    sum->computed_tokens += u->computed_tokens;
    sum->preemptions += u->preemptions;
    sum->queue_ns = later(sum->queue_ns, u->queue_ns);
    sum->ttft_ns = later(sum->ttft_ns, u->ttft_ns);
    sum->total_ns = later(sum->total_ns, u->total_ns);
}

/* Half of what could not be written would spoil what comes behind it. */
static bool cut(mp_exchange *x, size_t before) {
    x->out.len = before;
    return false;
}

/* Hands what was taken to the writer, until there is `enough` to send. */
static bool write_events(mp_exchange *x, size_t enough) {
    mp_feed_event event;
    while (x->out.len < enough && mp_feed_event_next(&x->taken, &x->taken_at, &event)) {
        count_event(&x->usage, &event);
        size_t before = x->out.len;
        if (!x->route->dialect->event(x->writer, &event, &x->out)) return cut(x, before);
    }
    /* What a stream wrote is gone when it was sent; the writer of a body keeps about as much as the events had. */
    mp_exchange_hold(x, x->streaming ? x->out.cap : x->held + x->taken.len);
    return true;
}

/* ---- One body ---------------------------------------------------------------------------------------------------- */

/* A reply that cannot be put together is told as a failure; what runs of it is cancelled when the exchange ends. */
static enum MHD_Result lose_body(mp_exchange *x) {
    mp_api_error err;
    mp_refuse(&err, 500, "reply_lost", NULL,
              "the reply was lost: out of memory, or it has more than %d MiB; stream it, or ask for less",
              OUT_MAX >> 20);
    return mp_exchange_refuse(x, &err);
}

static enum MHD_Result fail_begun(mp_exchange *x, const mp_api_error *err) {
    x->gone = err->status == MP_STATUS_CLIENT_GONE;
    return x->gone ? MHD_NO : mp_exchange_refuse(x, err);
}

static enum MHD_Result answer_body(mp_exchange *x) {
    mp_api_error err;
    for (;;) {
        switch (mp_feed_take(x->feed, &x->taken, &err)) {
        case MP_FEED_PAUSED: return MHD_YES;
        case MP_FEED_POKED: continue;
        case MP_FEED_MORE:
            x->taken_at = 0;
            if (!write_events(x, SIZE_MAX)) return lose_body(x);
            continue;
        case MP_FEED_FAILED: return fail_begun(x, &err);
        case MP_FEED_END:
            if (!x->route->dialect->end(x->writer, &x->out)) return lose_body(x);
            return mp_exchange_answer(x, 200, "application/json", &x->out);
        }
    }
}

/* ---- A stream ---------------------------------------------------------------------------------------------------- */

/* A comment, where nothing was written for so long: a call that is held back looks like a dead connection. */
static void keep_alive(mp_exchange *x, uint64_t now) {
    uint64_t silence_ns = x->server->options.silence_ms * UINT64_C(1000000);
    if (x->out.len == 0 && now - x->written_ns >= silence_ns) mp_buf_append(&x->out, ": waiting\n\n", 11);
    if (x->out.len > 0) x->written_ns = now;
}

/* From the feed, when all that was taken before is written. */
static mp_feed_state take_more(mp_exchange *x, mp_api_error *err) {
    if (x->taken_at < x->taken.len) return MP_FEED_MORE;
    x->taken_at = 0;
    return mp_feed_take(x->feed, &x->taken, err);
}

/* Puts what is there into `out`. False: nothing is, the connection was paused. */
static bool fill_stream(mp_exchange *x) {
    const mp_dialect *dialect = x->route->dialect;
    mp_api_error err;
    uint64_t now = mp_now_ns();
    x->out.len = x->out_sent = 0;
    switch (take_more(x, &err)) {
    case MP_FEED_PAUSED: return false;
    case MP_FEED_POKED: keep_alive(x, now); return true;
    case MP_FEED_MORE:
        if (write_events(x, STREAM_OUT)) {
            keep_alive(x, now);
            return true;
        }
        mp_refuse(&err, 500, "out_of_memory", NULL, "the reply was cancelled: out of memory");
        break;
    case MP_FEED_FAILED: x->gone = err.status == MP_STATUS_CLIENT_GONE; break;
    case MP_FEED_END:
        x->ended = true;
        if (dialect->end(x->writer, &x->out)) return true;
        cut(x, 0);
        mp_refuse(&err, 500, "out_of_memory", NULL, "the reply's end was lost: out of memory");
        break;
    }
    x->ended = true;
    x->refused = err;
    size_t before = x->out.len;
    if (!x->gone && !dialect->fail(x->writer, &err, &x->out)) x->unanswered = !cut(x, before);
    return true;
}

static ssize_t read_stream(void *cls, uint64_t position, char *to, size_t max) {
    (void)position;
    mp_exchange *x = cls;
    while (x->out_sent == x->out.len) {
        if (x->gone || x->unanswered) return MHD_CONTENT_READER_END_WITH_ERROR;
        if (x->ended) return MHD_CONTENT_READER_END_OF_STREAM;
        if (!fill_stream(x)) return 0;
    }
    size_t n = x->out.len - x->out_sent < max ? x->out.len - x->out_sent : max;
    memcpy(to, x->out.data + x->out_sent, n);
    x->out_sent += n;
    mp_feed_moved(x->feed);
    return (ssize_t)n;
}

/* The status line is written when the first event is there, so what the engine refuses has a status of its own. */
static enum MHD_Result answer_stream(mp_exchange *x) {
    mp_api_error err;
    switch (mp_feed_ready(x->feed, &err)) {
    case MP_FEED_PAUSED: return MHD_YES;
    case MP_FEED_FAILED: return fail_begun(x, &err);
    default: x->written_ns = mp_now_ns(); return mp_exchange_stream(x, "text/event-stream; charset=utf-8", read_stream);
    }
}

enum MHD_Result mp_generate(mp_exchange *x) {
    mp_api_error err;
    if (!x->feed) {
        x->taken.limit = x->out.limit = OUT_MAX;
        if (!begin(x, &err)) return mp_exchange_refuse(x, &err);
    }
    return x->streaming ? answer_stream(x) : answer_body(x);
}

void mp_generate_end(mp_exchange *x) {
    mp_watch_feed(x->watched, NULL);
    if (x->feed) mp_feed_leave(x->feed, x->server->options.engine);
    mp_feed_drop(x->feed);
    if (x->writer) x->route->dialect->close(x->writer);
    mp_buf_clear(&x->taken);
    mp_buf_clear(&x->out);
}
