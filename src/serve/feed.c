#include "serve/feed.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "base/clock.h"

struct mp_feed_shared {
    atomic_uint references;
    mp_feed_reader reader;
    pthread_mutex_t lock; /* of everything below, and of the choices' ids */
    mp_buf events;
    uint32_t n_done;
    bool paused, poked;
    atomic_bool left;   /* set under the lock, read anywhere */
    uint64_t paused_ns; /* when */
    uint64_t moved_ns;  /* when the reader was last woken, or got rid of something */
    mp_api_error error;
};

/* How an event lies in the buffer: this, then n_top alternatives, the usage if it has one, and text, padded to 8. */
typedef struct record {
    uint32_t kind, choice;
    int32_t token;
    float logprob;
    uint32_t n_top, text_len, finish;
    int32_t stop;
    bool has_usage;
} record;

enum { RECORD_ALIGN = 8 };

mepic_status mp_feed_open(mp_generation *generation, const mp_feed_reader *reader, mp_feed **out, mepic_error *err) {
    uint32_t n = mp_generation_choices(generation);
    mp_feed *feed = mp_calloc(1, sizeof *feed);
    struct mp_feed_shared *shared = mp_calloc(1, sizeof *shared);
    mp_choice *choices = mp_calloc(n, sizeof *choices);
    if (!feed || !shared || !choices || pthread_mutex_init(&shared->lock, NULL) != 0) {
        mp_free(feed);
        mp_free(shared);
        mp_free(choices);
        return mp_fail_nomem(err, "a reply", n * sizeof *choices);
    }
    for (uint32_t i = 0; i < n; i++) choices[i] = (mp_choice){ .feed = feed, .index = i };
    atomic_init(&shared->references, 1);
    shared->reader = *reader;
    shared->events.limit = reader->most;
    shared->moved_ns = mp_now_ns();
    *feed = (mp_feed){ .generation = generation, .choices = choices, .n_choices = n, .shared = shared };
    *out = feed;
    return MEPIC_OK;
}

void mp_feed_hold(mp_feed *feed) {
    atomic_fetch_add(&feed->shared->references, 1);
}

void mp_feed_drop(mp_feed *feed) {
    if (!feed || atomic_fetch_sub(&feed->shared->references, 1) != 1) return;
    pthread_mutex_destroy(&feed->shared->lock);
    mp_buf_clear(&feed->shared->events);
    mp_generation_free(feed->generation);
    mp_free(feed->choices);
    mp_free(feed->shared);
    mp_free(feed);
}

/* Ends a locked section. A paused connection stays as it is until it is woken, and only who takes `paused` away wakes
 * it: so it is safe to do so after unlocking, and the connection's own lock is taken inside this one by pause only. */
static void unlock_and_wake(struct mp_feed_shared *s, bool wake) {
    wake = wake && s->paused;
    if (wake) {
        s->paused = false;
        s->moved_ns = mp_now_ns();
    }
    pthread_mutex_unlock(&s->lock);
    if (wake) s->reader.wake(s->reader.connection);
}

/* ---- Of the loop ------------------------------------------------------------------------------------------------- */

bool mp_feed_started(mp_feed *feed, mp_choice *choice, mepic_request_id id) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    choice->id = id;
    choice->submitted = true;
    bool left = s->left;
    pthread_mutex_unlock(&s->lock);
    return !left;
}

bool mp_feed_left(mp_feed *feed) {
    return atomic_load(&feed->shared->left);
}

static bool append_padded(mp_buf *events, const void *bytes, size_t n) {
    static const char zeros[RECORD_ALIGN];
    if (n == 0) return true;
    size_t padding = (RECORD_ALIGN - n % RECORD_ALIGN) % RECORD_ALIGN;
    return mp_buf_append(events, bytes, n) && mp_buf_append(events, zeros, padding);
}

static bool append_event(mp_buf *events, uint32_t choice, const mepic_event *event) {
    const record head = {
        .kind = event->kind,
        .choice = choice,
        .token = event->token,
        .logprob = event->logprob,
        .n_top = event->n_top,
        .text_len = (uint32_t)event->text_len,
        .finish = event->finish,
        .stop = event->stop,
        .has_usage = event->usage.prompt_tokens > 0,
    };
    size_t before = events->len;
    bool ok = append_padded(events, &head, sizeof head) &&
              append_padded(events, event->n_top ? event->top : NULL, event->n_top * sizeof *event->top) &&
              (!head.has_usage || append_padded(events, &event->usage, sizeof event->usage)) &&
              append_padded(events, event->text, event->text_len);
    if (!ok) events->len = before;
    return ok;
}

/* More waits than a reader may leave behind that does not move. Who is paused waits for us. */
static bool is_stuck(const struct mp_feed_shared *s) {
    return !s->paused && s->events.len >= s->reader.limit && mp_now_ns() - s->moved_ns >= s->reader.patience_ns;
}

bool mp_feed_push(mp_feed *feed, uint32_t choice, const mepic_event *event) {
    struct mp_feed_shared *s = feed->shared;
    bool ok = true, done = event->kind == MEPIC_EVENT_DONE;
    pthread_mutex_lock(&s->lock);
    if (done) s->n_done++;
    if (!s->left && !s->error.status) {
        ok = !is_stuck(s) && append_event(&s->events, choice, event);
        if (!ok) {
            mp_refuse(&s->error, 503, "slow_reader", NULL,
                      "the reply was cancelled: %zu bytes of it wait to be read and its reader does not keep up",
                      s->events.len);
        }
    }
    unlock_and_wake(s, done || !ok || s->events.len > s->reader.wake_at);
    return ok;
}

void mp_feed_fail(mp_feed *feed, const mp_api_error *error) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    if (!s->error.status) s->error = *error;
    unlock_and_wake(s, true);
}

/* ---- Of the HTTP thread ------------------------------------------------------------------------------------------ */

/* Under the lock. */
static mp_feed_state look(mp_feed *feed, mp_api_error *err) {
    struct mp_feed_shared *s = feed->shared;
    if (s->events.len > 0) return MP_FEED_MORE;
    if (s->error.status) {
        *err = s->error;
        return MP_FEED_FAILED;
    }
    if (s->n_done == feed->n_choices) return MP_FEED_END;
    if (s->poked) {
        s->poked = false;
        return MP_FEED_POKED;
    }
    s->paused = true;
    s->paused_ns = mp_now_ns();
    s->reader.pause(s->reader.connection);
    return MP_FEED_PAUSED;
}

mp_feed_state mp_feed_take(mp_feed *feed, mp_buf *taken, mp_api_error *err) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    taken->len = 0;
    mp_feed_state state = look(feed, err);
    if (state == MP_FEED_MORE) {
        mp_buf full = s->events;
        s->events = *taken;
        s->events.limit = full.limit;
        *taken = full;
    }
    pthread_mutex_unlock(&s->lock);
    return state;
}

mp_feed_state mp_feed_ready(mp_feed *feed, mp_api_error *err) {
    pthread_mutex_lock(&feed->shared->lock);
    mp_feed_state state = look(feed, err);
    pthread_mutex_unlock(&feed->shared->lock);
    return state;
}

void mp_feed_moved(mp_feed *feed) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    s->moved_ns = mp_now_ns();
    pthread_mutex_unlock(&s->lock);
}

static const void *read_padded(const mp_buf *taken, size_t *offset, size_t n) {
    const void *at = taken->data + *offset;
    *offset += n + (RECORD_ALIGN - n % RECORD_ALIGN) % RECORD_ALIGN;
    return at;
}

bool mp_feed_event_next(const mp_buf *taken, size_t *offset, mp_feed_event *out) {
    if (*offset >= taken->len) return false;
    record head;
    memcpy(&head, read_padded(taken, offset, sizeof head), sizeof head);
    *out = (mp_feed_event){
        .kind = (mepic_event_kind)head.kind,
        .choice = head.choice,
        .token = head.token,
        .logprob = head.logprob,
        .n_top = head.n_top,
        .text_len = head.text_len,
        .finish = (mepic_finish)head.finish,
        .stop = head.stop,
    };
    out->top = read_padded(taken, offset, head.n_top * sizeof *out->top);
    if (head.has_usage) {
        memcpy(&out->usage, read_padded(taken, offset, sizeof out->usage), sizeof out->usage);
    }
    out->text = read_padded(taken, offset, head.text_len);
    return true;
}

/* ---- Of any thread ----------------------------------------------------------------------------------------------- */

void mp_feed_leave(mp_feed *feed, mepic_engine *engine) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    s->left = true;
    s->events.len = 0;
    if (!s->error.status) mp_refuse(&s->error, MP_STATUS_CLIENT_GONE, NULL, NULL, "the client is gone");
    for (uint32_t i = 0; i < feed->n_choices; i++) {
        if (feed->choices[i].submitted) mepic_cancel(engine, feed->choices[i].id);
    }
    unlock_and_wake(s, true);
}

void mp_feed_poke_if_silent(mp_feed *feed, uint64_t now_ns, uint64_t silence_ns) {
    struct mp_feed_shared *s = feed->shared;
    pthread_mutex_lock(&s->lock);
    bool silent = s->paused && now_ns >= s->paused_ns + silence_ns;
    if (silent) s->poked = true;
    unlock_and_wake(s, silent);
}
