/* The thread that owns the engine, without a server: readers here are told things at moments a client could not hit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <semaphore.h>
#include <string.h>
#include <time.h>

#include "engine/engine.h"
#include "serve/loop.h"
#include "support/replies.h"

/* Somebody who waits for a feed; `then` is called when it is woken, on the loop's thread. */
typedef struct reader {
    struct world *world;
    mp_feed *feed;
    void (*then)(struct reader *reader);
    uint32_t seats; /* taken when it was woken */
    sem_t woken;
} reader;

typedef struct world {
    mepic_engine *engine;
    mp_loop *loop;
    reader running, refused, next, late;
    uint32_t n_late_done;
    uint64_t n_failed;
} world;

static void pause_reader(void *connection) {
    (void)connection;
}

static void wake_reader(void *connection) {
    reader *r = connection;
    r->seats = mp_loop_choices(r->world->loop);
    void (*then)(reader *) = r->then;
    r->then = NULL;
    if (then) then(r);
    sem_post(&r->woken);
}

/* A feed of n replies whose reader waits already. */
static void open_reader_of(world *w, reader *r, void (*then)(reader *), uint32_t n, mepic_request request) {
    const mp_feed_reader callbacks = {
        .pause = pause_reader, .wake = wake_reader, .connection = r, .limit = 1 << 20, .most = 1 << 20
    };
    mp_generation *generation;
    mp_api_error err;
    *r = (reader){ .world = w, .then = then };
    assert_int_equal(sem_init(&r->woken, 0, 0), 0);
    assert_int_equal(mp_generation_open(&generation, NULL), MEPIC_OK);
    request.size = sizeof request;
    request.ignore_eos = true;
    generation->request = request;
    generation->n = n;
    generation->prompts[generation->n_prompts++] = prepare_text(w->engine, "x");
    assert_int_equal(mp_feed_open(generation, &callbacks, &r->feed, NULL), MEPIC_OK);
    assert_int_equal(mp_feed_ready(r->feed, &err), MP_FEED_PAUSED);
}

static void open_reader(world *w, reader *r, void (*then)(reader *), mepic_request request) {
    open_reader_of(w, r, then, 1, request);
}

static void close_reader(reader *r) {
    mp_feed_drop(r->feed);
    sem_destroy(&r->woken);
}

static void submit_reader(reader *r) {
    mp_api_error err;
    if (!mp_loop_submit(r->world->loop, r->feed, &err)) fail_msg("%s", err.message);
}

static void wait_until_woken(reader *r, const char *who) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    while (sem_timedwait(&r->woken, &until) != 0) {
        if (errno != EINTR) fail_msg("%s was told nothing for a minute", who);
    }
}

/* Replies that have ended since it was asked last. */
static uint32_t take_done(reader *r) {
    mp_buf taken = { 0 };
    mp_api_error err;
    mp_feed_event event;
    size_t at = 0;
    uint32_t n = 0;
    if (mp_feed_take(r->feed, &taken, &err) == MP_FEED_FAILED) fail_msg("%s", err.message);
    while (mp_feed_event_next(&taken, &at, &event)) n += event.kind == MEPIC_EVENT_DONE;
    mp_buf_clear(&taken);
    return n;
}

static void count_done_of_late(reader *r) {
    r->world->n_late_done = take_done(&r->world->late);
}

static void count_failed(reader *r) {
    mp_metrics metrics;
    mp_loop_metrics(r->world->loop, &metrics);
    r->world->n_failed = metrics.finished[MEPIC_FINISH_FAILED];
}

/* Both are in the line before the loop looks at either. */
static void submit_two(reader *r) {
    submit_reader(&r->world->refused);
    submit_reader(&r->world->next);
}

static void break_and_submit(reader *r) {
    mp_invariant(&r->world->engine->fault, false, "broken by the test");
    submit_reader(&r->world->late);
}

static void who_comes_while_the_engine_breaks_is_told(void **state) {
    (void)state;
    const mepic_engine_options engine_options = tiny_options();
    const mp_loop_options options = { .max_choices = 16, .n_tenants = 1 };
    world w = { .engine = open_engine(&engine_options) };
    assert_int_equal(mp_loop_open(w.engine, &options, &w.loop, NULL), MEPIC_OK);
    open_reader(&w, &w.running, submit_two, (mepic_request){ .max_tokens = 400 });
    open_reader(&w, &w.refused, break_and_submit, (mepic_request){ .max_tokens = 4, .top_logprobs = 1000 });
    open_reader(&w, &w.next, NULL, (mepic_request){ .max_tokens = 4 });
    open_reader(&w, &w.late, NULL, (mepic_request){ .max_tokens = 4 });
    submit_reader(&w.running);
    reader *const all[] = { &w.running, &w.refused, &w.next, &w.late };
    static const char *const names[] = { "the first", "the refused one", "the next", "the late one" };
    for (uint32_t i = 0; i < 4; i++) wait_until_woken(all[i], names[i]);
    assert_true(mp_loop_broken(w.loop));
    for (uint32_t i = 1; i < 4; i++) {
        mp_api_error err;
        assert_int_equal(mp_feed_ready(all[i]->feed, &err), MP_FEED_FAILED);
        assert_int_equal(err.status, i == 1 ? 400 : 500);
    }
    assert_int_equal(w.late.seats, 0); // seats are given back before anybody is told
    mp_loop_close(w.loop);
    for (uint32_t i = 0; i < 4; i++) close_reader(all[i]);
    mepic_engine_close(w.engine);
}

/* As replies that failed, and before their reader hears of it. */
static void what_the_engine_refuses_is_counted(void **state) {
    (void)state;
    const mepic_engine_options engine_options = tiny_options();
    const mp_loop_options options = { .max_choices = 16, .n_tenants = 1 };
    world w = { .engine = open_engine(&engine_options) };
    assert_int_equal(mp_loop_open(w.engine, &options, &w.loop, NULL), MEPIC_OK);
    open_reader_of(&w, &w.refused, count_failed, 3, (mepic_request){ .max_tokens = 4, .top_logprobs = 1000 });
    submit_reader(&w.refused);
    wait_until_woken(&w.refused, "the refused one");
    assert_int_equal(w.n_failed, 3);
    assert_int_equal(w.refused.seats, 0);
    mp_loop_close(w.loop);
    close_reader(&w.refused);
    mepic_engine_close(w.engine);
}

/* A request for many replies takes turns with another key's, reply by reply: that one ends long before it does. */
static void many_replies_take_turns_with_one(void **state) {
    (void)state;
    enum { MANY = 96 };
    mepic_engine_options engine_options = tiny_options();
    engine_options.max_running = 1;
    const mp_loop_options options = { .max_choices = 2 * MANY, .n_tenants = 2 };
    world w = { .engine = open_engine(&engine_options) };
    assert_int_equal(mp_loop_open(w.engine, &options, &w.loop, NULL), MEPIC_OK);
    open_reader_of(&w, &w.late, NULL, MANY, (mepic_request){ .max_tokens = 4 });
    open_reader(&w, &w.next, count_done_of_late, (mepic_request){ .max_tokens = 4 });
    w.next.feed->tenant = 1;
    submit_reader(&w.late);
    submit_reader(&w.next);
    wait_until_woken(&w.next, "the other key");
    assert_true(w.n_late_done < MANY / 2);
    for (uint32_t n = w.n_late_done; n < MANY;) n += take_done(&w.late);
    mp_loop_close(w.loop);
    close_reader(&w.late);
    close_reader(&w.next);
    mepic_engine_close(w.engine);
}

/* A reader that waits again when the engine breaks: its seat is free by the time it hears of it. */
static void who_hears_of_the_end_has_no_seat(void **state) {
    (void)state;
    const mepic_engine_options engine_options = tiny_options();
    const mp_loop_options options = { .max_choices = 16, .n_tenants = 1 };
    world w = { .engine = open_engine(&engine_options) };
    mp_invariant(&w.engine->fault, false, "broken by the test");
    assert_int_equal(mp_loop_open(w.engine, &options, &w.loop, NULL), MEPIC_OK);
    open_reader(&w, &w.running, NULL, (mepic_request){ .max_tokens = 4 });
    submit_reader(&w.running);
    wait_until_woken(&w.running, "the only one");
    assert_int_equal(w.running.seats, 0);
    mp_loop_close(w.loop);
    close_reader(&w.running);
    mepic_engine_close(w.engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(who_comes_while_the_engine_breaks_is_told),
        cmocka_unit_test(what_the_engine_refuses_is_counted),
        cmocka_unit_test(many_replies_take_turns_with_one),
        cmocka_unit_test(who_hears_of_the_end_has_no_seat),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
