/* What a reader may leave behind, without a server. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "serve/feed.h"

enum { LIMIT = 1 << 10, MOST = 1 << 16, FAR_TOO_MANY = MOST };
static const uint64_t FOREVER = UINT64_MAX;

static void no_call(void *connection) {
    (void)connection;
}

static mp_feed *open_feed(uint64_t patience_ns, size_t wake_at) {
    const mp_feed_reader reader = {
        .pause = no_call, .wake = no_call, .limit = LIMIT, .patience_ns = patience_ns, .most = MOST, .wake_at = wake_at
    };
    mp_generation *generation;
    mp_feed *feed;
    assert_int_equal(mp_generation_open(&generation, NULL), MEPIC_OK);
    generation->n_prompts = 1;
    assert_int_equal(mp_feed_open(generation, &reader, &feed, NULL), MEPIC_OK);
    generation->n_prompts = 0;
    return feed;
}

/* Bytes of events at the time of the failure. */
static size_t push_until_it_fails(mp_feed *feed) {
    const mepic_event event = { .kind = MEPIC_EVENT_TOKEN, .text = "eight...", .text_len = 8 };
    mp_buf taken = { .limit = MOST };
    mp_api_error err;
    uint32_t n = 0;
    while (n < FAR_TOO_MANY && mp_feed_push(feed, 0, &event)) n++;
    assert_int_equal(mp_feed_take(feed, &taken, &err), MP_FEED_MORE);
    size_t len = taken.len;
    assert_int_equal(mp_feed_take(feed, &taken, &err), MP_FEED_FAILED);
    assert_string_equal(err.code, "slow_reader");
    mp_buf_clear(&taken);
    mp_feed_drop(feed);
    return len;
}

static void a_reader_that_moves_is_not_slow(void **state) {
    (void)state;
    assert_in_range(push_until_it_fails(open_feed(FOREVER, 0)), MOST - 64, MOST);
}

static void a_reader_that_is_stuck_is_slow(void **state) {
    (void)state;
    assert_in_range(push_until_it_fails(open_feed(0, 0)), LIMIT, LIMIT + 64);
}

/* A paused reader waits to be woken: it is not what holds things up. */
static void a_reader_that_waits_is_not_stuck(void **state) {
    (void)state;
    const mepic_event event = { .kind = MEPIC_EVENT_TOKEN,
                                .text_len = 4 * LIMIT,
                                .text = (const char[4 * LIMIT]){ 0 } };
    mp_feed *feed = open_feed(0, 6 * LIMIT);
    mp_api_error err;
    assert_int_equal(mp_feed_ready(feed, &err), MP_FEED_PAUSED);
    assert_true(mp_feed_push(feed, 0, &event));
    assert_true(mp_feed_push(feed, 0, &event)); // this wakes it
    assert_false(mp_feed_push(feed, 0, &event));
    mp_feed_drop(feed);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_reader_that_moves_is_not_slow),
        cmocka_unit_test(a_reader_that_is_stuck_is_slow),
        cmocka_unit_test(a_reader_that_waits_is_not_stuck),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
