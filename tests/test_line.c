/* The order in which waiting feeds get their turn, without a server. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "serve/line.h"

enum { TENANTS = 4, FEEDS = 64 };

static void no_call(void *connection) {
    (void)connection;
}

static mp_feed *feed_of(uint32_t tenant) {
    static const mp_feed_reader reader = { .pause = no_call, .wake = no_call };
    mp_generation *generation;
    mp_feed *feed;
    assert_int_equal(mp_generation_open(&generation, NULL), MEPIC_OK);
    assert_int_equal(mp_feed_open(generation, &reader, &feed, NULL), MEPIC_OK);
    feed->tenant = tenant;
    return feed;
}

/* "0 0 1" -> the order of pops; each tenant's feeds must come in their own order. */
static void expect_order(const char *pushed, const char *popped) {
    mp_line *line = mp_line_open(TENANTS);
    assert_non_null(line);
    mp_feed *feeds[FEEDS];
    uint32_t n = 0, next_of[TENANTS] = { 0 };
    for (const char *c = pushed; *c; c++) {
        feeds[n] = feed_of((uint32_t)(*c - '0'));
        feeds[n]->n_ended = n; // here: the order of arrival
        mp_line_push(line, feeds[n++]);
    }
    for (const char *c = popped; *c; c++) {
        mp_feed *feed = mp_line_pop(line);
        assert_non_null(feed);
        assert_int_equal(feed->tenant, *c - '0');
        assert_true(feed->n_ended >= next_of[feed->tenant]);
        next_of[feed->tenant] = feed->n_ended + 1;
    }
    assert_null(mp_line_pop(line));
    assert_true(mp_line_empty(line));
    for (uint32_t i = 0; i < n; i++) mp_feed_drop(feeds[i]);
    mp_line_close(line);
}

static void tenants_take_turns(void **state) {
    (void)state;
    expect_order("", "");
    expect_order("0", "0");
    expect_order("000", "000");
    expect_order("0001", "0100");
    expect_order("000123", "012300");
    expect_order("3310", "3103");
    expect_order("00112233", "01230123");
}

/* Who comes while others wait does not pass those who came before. */
static void a_newcomer_stands_behind(void **state) {
    (void)state;
    mp_line *line = mp_line_open(TENANTS);
    mp_feed *feeds[] = { feed_of(0), feed_of(0), feed_of(1), feed_of(2) };
    mp_line_push(line, feeds[0]);
    mp_line_push(line, feeds[1]);
    mp_line_push(line, feeds[2]);
    assert_ptr_equal(mp_line_pop(line), feeds[0]);
    mp_line_push(line, feeds[3]);
    assert_ptr_equal(mp_line_pop(line), feeds[2]);
    assert_ptr_equal(mp_line_pop(line), feeds[1]);
    assert_ptr_equal(mp_line_pop(line), feeds[3]);
    assert_null(mp_line_pop(line));
    for (size_t i = 0; i < 4; i++) mp_feed_drop(feeds[i]);
    mp_line_close(line);
}

static void who_left_is_taken_out(void **state) {
    (void)state;
    mp_line *line = mp_line_open(TENANTS);
    mp_feed *feeds[FEEDS];
    uint32_t last[9];
    for (uint32_t i = 0; i < 12; i++) {
        feeds[i] = feed_of(i % 3);
        feeds[i]->n_ended = i; // here: the order of arrival
        mp_line_push(line, feeds[i]);
        if (i % 4 == 1) mp_feed_leave(feeds[i], NULL);
    }
    uint32_t n_left = 0;
    for (mp_feed *feed = mp_line_take_left(line); feed; feed = feed->behind) {
        assert_true(mp_feed_left(feed));
        n_left++;
    }
    assert_int_equal(n_left, 3);
    uint32_t next_of[TENANTS] = { 0 };
    for (uint32_t i = 0; i < 9; i++) {
        mp_feed *feed = mp_line_pop(line);
        assert_non_null(feed);
        assert_false(mp_feed_left(feed));
        assert_true(feed->n_ended >= next_of[feed->tenant]);
        next_of[feed->tenant] = feed->n_ended + 1;
        assert_int_equal(feed->tenant, i < 3 ? feed->tenant : last[i - 3]); // turns
        last[i] = feed->tenant;
    }
    assert_null(mp_line_pop(line));
    for (uint32_t i = 0; i < 12; i++) mp_feed_drop(feeds[i]);
    mp_line_close(line);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tenants_take_turns),
        cmocka_unit_test(a_newcomer_stands_behind),
        cmocka_unit_test(who_left_is_taken_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
