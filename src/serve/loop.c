#include "serve/loop.h"

#include <pthread.h>

#include "base/clock.h"
#include "serve/line.h"

/* Requests that may wait in the engine, where the order is that of arrival: enough to fill its steps. */
enum { AHEAD = 16 };

struct mp_loop {
    mepic_engine *engine;
    mp_loop_options options;
    pthread_t thread;
    bool started, joined;

    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t wake;
    mp_feed *first, *last; /* submitted, not seen by the thread yet */
    uint32_t n_choices;    /* of these, of those in line and of the live ones */
    uint64_t n_tokens;     /* of their prompts */
    uint32_t *by_tenant;   /* [n_tenants] of n_choices */
    bool stop, broken;
    mp_api_error refusal; /* status 0: submissions are welcome */
    mp_metrics metrics;

    mp_line *line; /* the thread's own: seen, not in the engine yet */
    mp_feed *live; /* the thread's own: in the engine */
    bool idle;     /* the thread's own: on_idle was called and nothing came since */
};

/* ---- Of the thread ----------------------------------------------------------------------------------------------- */

/* Gives a feed's seats back. Before its reader hears of the end: who has an answer may ask again. */
static void leave_seats(mp_loop *loop, const mp_feed *feed) {
    pthread_mutex_lock(&loop->lock);
    loop->n_choices -= feed->n_choices;
    loop->n_tokens -= feed->n_tokens;
    loop->by_tenant[feed->tenant] -= feed->n_choices;
    pthread_mutex_unlock(&loop->lock);
}

static void note_broken(mp_loop *loop, const mepic_error *err);

static void link_feed(mp_loop *loop, mp_feed *feed) {
    feed->previous = NULL;
    feed->next = loop->live;
    if (loop->live) loop->live->previous = feed;
    loop->live = feed;
}

static void unlink_feed(mp_loop *loop, mp_feed *feed) {
    if (feed->next) feed->next->previous = feed->previous;
    if (feed->previous)
        feed->previous->next = feed->next;
    else
        loop->live = feed->next;
}

static void cancel_choices(mp_loop *loop, mp_feed *feed) {
    feed->stopped = true;
    for (uint32_t i = 0; i < feed->n_choices; i++) {
        const mp_choice *choice = &feed->choices[i];
        if (choice->submitted && !choice->done) mepic_cancel(loop->engine, choice->id);
    }
}

/* Choices that will give no more events; the last one may free the feed. */
static void end_choices(mp_loop *loop, mp_feed *feed, uint32_t n) {
    feed->n_ended += n;
    if (feed->n_ended < feed->n_choices) return;
    unlink_feed(loop, feed);
    mp_feed_drop(feed);
}

/* Choices that have not begun never will, of a feed out of the line; counted as `finish`. why: told if the feed ends
 * with them, or NULL. */
static void end_rest(mp_loop *loop, mp_feed *feed, mepic_finish finish, const mp_api_error *why) {
    uint32_t rest = feed->n_choices - feed->n_started;
    if (feed->n_started == 0) link_feed(loop, feed); // among those that end
    feed->n_started = feed->n_choices;
    pthread_mutex_lock(&loop->lock);
    loop->metrics.finished[finish] += rest;
    pthread_mutex_unlock(&loop->lock);
    if (feed->n_ended + rest == feed->n_choices) {
        leave_seats(loop, feed);
        if (why) mp_feed_fail(feed, why);
    }
    end_choices(loop, feed, rest);
}

/* Puts the next request of a feed that is not in the line into the engine. */
static void start_choice(mp_loop *loop, mp_feed *feed) {
    mp_choice *choice = &feed->choices[feed->n_started];
    mepic_request request = mp_generation_request(feed->generation, feed->n_started, feed->scope, choice);
    mepic_request_id id;
    mepic_error err;
    choice->waited_ns = mp_now_ns() - feed->submitted_ns;
    if (mepic_submit(loop->engine, &request, &id, &err) == MEPIC_OK) {
        if (feed->n_started++ == 0) link_feed(loop, feed);
        if (!mp_feed_started(feed, choice, id)) mepic_cancel(loop->engine, id);
        if (feed->n_started < feed->n_choices) mp_line_push(loop->line, feed);
        return;
    }
    if (err.status == MEPIC_ERR_BROKEN) {
        mp_line_push(loop->line, feed); // where the rest hears of it
        note_broken(loop, &err);
        return;
    }
    mp_api_error why;
    mp_refuse_engine(&why, &err);
    if (feed->n_ended < feed->n_started) mp_feed_fail(feed, &why); // the others' ends come later
    cancel_choices(loop, feed);
    end_rest(loop, feed, MEPIC_FINISH_FAILED, &why);
}

/* The engine counts from its own submit; for the client, time in the line is waiting too. */
static void add_line(mepic_usage *usage, uint64_t waited_ns) {
    usage->queue_ns += waited_ns;
    if (usage->ttft_ns) usage->ttft_ns += waited_ns; // 0: no token came
    usage->total_ns += waited_ns;
}

static void take_event(mp_loop *loop, mepic_event *event, uint64_t now) {
    mp_choice *choice = event->user;
    mp_feed *feed = choice->feed;
    bool done = event->kind == MEPIC_EVENT_DONE;
    if (done) add_line(&event->usage, choice->waited_ns);
    pthread_mutex_lock(&loop->lock);
    if (done)
        mp_metrics_count_reply(&loop->metrics, event->finish, &event->usage);
    else if (choice->last_ns)
        mp_metrics_count_token(&loop->metrics, now - choice->last_ns);
    pthread_mutex_unlock(&loop->lock);
    choice->last_ns = now;
    if (done) {
        choice->done = true;
        if (feed->n_ended + 1 == feed->n_choices) leave_seats(loop, feed);
    }
    bool failed = done && event->finish == MEPIC_FINISH_FAILED;
    if (failed) {
        mp_api_error why;
        mp_refuse(&why, 500, "reply_failed", NULL, "%s", event->error);
        mp_feed_fail(feed, &why);
    }
    if (!mp_feed_push(feed, choice->index, event) || failed) cancel_choices(loop, feed);
    if (done) end_choices(loop, feed, 1);
}

/* Feeds of which something has begun stay among the live: who calls this tells them. */
static void fail_line(mp_loop *loop, const mp_api_error *why) {
    for (mp_feed *feed = mp_line_pop(loop->line); feed; feed = mp_line_pop(loop->line))
        end_rest(loop, feed, MEPIC_FINISH_CANCELLED, why);
}

static void fail_all(mp_loop *loop, const mp_api_error *why) {
    fail_line(loop, why);
    for (mp_feed *feed = loop->live; feed; feed = feed->next) {
        mp_feed_fail(feed, why);
        cancel_choices(loop, feed);
    }
}

static void note_broken(mp_loop *loop, const mepic_error *err) {
    mp_api_error why;
    mp_refuse_engine(&why, err);
    pthread_mutex_lock(&loop->lock);
    loop->broken = true;
    loop->refusal = why;
    pthread_mutex_unlock(&loop->lock);
    fail_line(loop, &why);
    while (loop->live) { // no events will come
        mp_feed *feed = loop->live;
        leave_seats(loop, feed);
        mp_feed_fail(feed, &why);
        unlink_feed(loop, feed);
        mp_feed_drop(feed);
    }
    if (loop->options.on_broken) loop->options.on_broken(loop->options.user);
}

static void step(mp_loop *loop) {
    mepic_error err;
    mepic_event event;
    mepic_status status = mepic_step(loop->engine, &err);
    mepic_stats stats; // told before what came of the step: who has an answer sees it counted
    mepic_stats_read(loop->engine, &stats);
    pthread_mutex_lock(&loop->lock);
    loop->metrics.engine = stats;
    pthread_mutex_unlock(&loop->lock);
    uint64_t now = mp_now_ns();
    while (mepic_poll(loop->engine, &event)) {
        if (status == MEPIC_OK) take_event(loop, &event, now);
    }
    if (status != MEPIC_OK) note_broken(loop, &err);
}

/* From the line into the engine, as long as few wait there: a reply at a time, so that a request for many takes no more
 * turns than many requests. */
static void fill_engine(mp_loop *loop) {
    for (mp_feed *feed = mp_line_take_left(loop->line), *next; feed; feed = next) {
        next = feed->behind;
        end_rest(loop, feed, MEPIC_FINISH_CANCELLED, NULL);
    }
    mepic_stats stats;
    mepic_stats_read(loop->engine, &stats);
    for (uint32_t ahead = stats.queued; ahead < AHEAD && !loop->broken;) {
        mp_feed *feed = mp_line_pop(loop->line);
        if (!feed) break;
        ahead++;
        start_choice(loop, feed);
    }
}

/* Waits until there is something to do. The feeds that came, as a list by `next`; *stop: the end. */
static mp_feed *wait_for_work(mp_loop *loop, bool *stop) {
    bool busy = !mp_line_empty(loop->line) || (!loop->broken && mepic_busy(loop->engine));
    if (!busy && !loop->live && !loop->idle) {
        loop->idle = true;
        if (loop->options.on_idle) loop->options.on_idle(loop->options.user);
    }
    pthread_mutex_lock(&loop->lock);
    while (!busy && !loop->stop && !loop->first) pthread_cond_wait(&loop->wake, &loop->lock);
    mp_feed *feeds = loop->first;
    loop->first = loop->last = NULL;
    *stop = loop->stop;
    pthread_mutex_unlock(&loop->lock);
    return feeds;
}

static void *run(void *arg) {
    mp_loop *loop = arg;
    for (bool stop = false; !stop;) {
        mp_feed *feed = wait_for_work(loop, &stop);
        while (feed) {
            mp_feed *next = feed->next;
            loop->idle = false;
            mp_line_push(loop->line, feed);
            feed = next;
        }
        if (loop->broken) fail_line(loop, &loop->refusal); // they came before it was noted
        if (!stop && !mp_line_empty(loop->line)) fill_engine(loop);
        if (!stop && !loop->broken && mepic_busy(loop->engine)) step(loop);
    }
    fail_all(loop, &loop->refusal); // set before `stop`, and not changed afterwards
    while (loop->live) step(loop);  // two, for the cancelled to end
    return NULL;
}

/* ---- Of others --------------------------------------------------------------------------------------------------- */

mepic_status mp_loop_open(mepic_engine *engine, const mp_loop_options *options, mp_loop **out, mepic_error *err) {
    mp_loop *loop = mp_calloc(1, sizeof *loop);
    if (!loop) return mp_fail_nomem(err, "the engine's loop", sizeof *loop);
    loop->engine = engine;
    loop->options = *options;
    mepic_stats_read(engine, &loop->metrics.engine);
    pthread_mutex_init(&loop->lock, NULL);
    pthread_cond_init(&loop->wake, NULL);
    loop->line = mp_line_open(options->n_tenants);
    loop->by_tenant = mp_calloc(options->n_tenants, sizeof *loop->by_tenant);
    if (!loop->line || !loop->by_tenant) {
        mp_loop_close(loop);
        return mp_fail_nomem(err, "the engine's loop", options->n_tenants * sizeof *loop->by_tenant);
    }
    if (pthread_create(&loop->thread, NULL, run, loop) != 0) {
        mp_loop_close(loop);
        return mp_fail(err, MEPIC_ERR_NOMEM, "a thread for the engine could not be started");
    }
    loop->started = true;
    *out = loop;
    return MEPIC_OK;
}

/* Under the lock. n_tokens: of the prompts, 0 where they are not known yet. */
static bool has_room(mp_loop *loop, uint32_t tenant, uint32_t n, uint64_t n_tokens, mp_api_error *err) {
    const mp_loop_options *o = &loop->options;
    if (loop->refusal.status) {
        *err = loop->refusal;
    } else if (n > o->max_choices) {
        mp_refuse(err, 400, "invalid_value", "n", "%u replies are asked for; the server takes %u at a time", n,
                  o->max_choices);
    } else if (tenant && o->max_per_tenant && n > o->max_per_tenant) {
        mp_refuse(err, 400, "invalid_value", "n", "%u replies are asked for; this key has %u at a time", n,
                  o->max_per_tenant);
    } else if (tenant && o->max_per_tenant && n + loop->by_tenant[tenant] > o->max_per_tenant) {
        mp_refuse(err, 429, "too_many_requests", NULL,
                  "%u replies to this key wait or run and %u more are asked for; a key has %u, try again later",
                  loop->by_tenant[tenant], n, o->max_per_tenant);
    } else if (n > o->max_choices - loop->n_choices) {
        mp_refuse(err, 503, "overloaded", NULL,
                  "%u replies wait or run and %u more are asked for; the server takes %u, try again later",
                  loop->n_choices, n, o->max_choices);
    } else if (o->max_tokens && loop->n_choices > 0 && loop->n_tokens + n_tokens > o->max_tokens) {
        mp_refuse(err, 503, "overloaded", NULL,
                  "prompts of %llu tokens wait or run; the server takes %llu, try again later",
                  (unsigned long long)loop->n_tokens, (unsigned long long)o->max_tokens);
    } else {
        return true;
    }
    loop->metrics.refused++;
    return false;
}

bool mp_loop_welcome(mp_loop *loop, uint32_t tenant, mp_api_error *err) {
    pthread_mutex_lock(&loop->lock);
    bool ok = has_room(loop, tenant, 1, 0, err);
    pthread_mutex_unlock(&loop->lock);
    return ok;
}

bool mp_loop_submit(mp_loop *loop, mp_feed *feed, mp_api_error *err) {
    feed->n_tokens = mp_generation_tokens(feed->generation);
    feed->submitted_ns = mp_now_ns();
    pthread_mutex_lock(&loop->lock);
    bool ok = has_room(loop, feed->tenant, feed->n_choices, feed->n_tokens, err);
    if (ok) {
        mp_feed_hold(feed);
        loop->n_choices += feed->n_choices;
        loop->n_tokens += feed->n_tokens;
        loop->by_tenant[feed->tenant] += feed->n_choices;
        feed->next = NULL;
        if (loop->last)
            loop->last->next = feed;
        else
            loop->first = feed;
        loop->last = feed;
        pthread_cond_signal(&loop->wake);
    }
    pthread_mutex_unlock(&loop->lock);
    return ok;
}

void mp_loop_refuse(mp_loop *loop, const mp_api_error *reason) {
    pthread_mutex_lock(&loop->lock);
    if (!loop->refusal.status) loop->refusal = *reason;
    pthread_mutex_unlock(&loop->lock);
}

void mp_loop_stop(mp_loop *loop, const mp_api_error *reason) {
    mp_loop_refuse(loop, reason);
    pthread_mutex_lock(&loop->lock);
    loop->stop = true;
    pthread_cond_signal(&loop->wake);
    pthread_mutex_unlock(&loop->lock);
    if (loop->started && !loop->joined) pthread_join(loop->thread, NULL);
    loop->joined = true;
}

void mp_loop_close(mp_loop *loop) {
    if (!loop) return;
    mp_api_error reason;
    mp_refuse(&reason, 503, "shutting_down", NULL, "the server is shutting down");
    mp_loop_stop(loop, &reason);
    pthread_cond_destroy(&loop->wake);
    pthread_mutex_destroy(&loop->lock);
    mp_line_close(loop->line);
    mp_free(loop->by_tenant);
    mp_free(loop);
}

void mp_loop_metrics(mp_loop *loop, mp_metrics *out) {
    pthread_mutex_lock(&loop->lock);
    *out = loop->metrics;
    out->choices = loop->n_choices;
    pthread_mutex_unlock(&loop->lock);
}

uint32_t mp_loop_choices(mp_loop *loop) {
    pthread_mutex_lock(&loop->lock);
    uint32_t n = loop->n_choices;
    pthread_mutex_unlock(&loop->lock);
    return n;
}

bool mp_loop_broken(mp_loop *loop) {
    pthread_mutex_lock(&loop->lock);
    bool broken = loop->broken;
    pthread_mutex_unlock(&loop->lock);
    return broken;
}
