/* base/: status text, checked sizes, buffers, hashes, the thread pool. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/mem.h"
#include "base/status.h"
#include "base/thread.h"

static void error_text_is_one_line_and_cut_at_a_character(void **state) {
    (void)state;
    mepic_error err;
    assert_int_equal(mp_fail(&err, MEPIC_ERR_FORMAT, "key \"%s\" is bad", "a\nb"), MEPIC_ERR_FORMAT);
    assert_string_equal(err.message, "key \"a b\" is bad");
    char long_text[1024];
    for (size_t pad = 0; pad < 4; pad++) { /* an umlaut at every place across the limit */
        memset(long_text, 'x', sizeof long_text);
        for (size_t i = pad; i + 2 < sizeof long_text; i += 2) memcpy(long_text + i, "\xc3\xa4", 2);
        long_text[sizeof long_text - 1] = 0;
        mp_fail(&err, MEPIC_ERR_IO, "%s", long_text);
        size_t len = strlen(err.message);
        assert_true(len >= sizeof err.message - 2);
        assert_true((unsigned char)err.message[len - 1] != 0xc3);
    }
}

static void sizes_are_checked(void **state) {
    (void)state;
    size_t out = 7;
    assert_false(mp_mul_size(SIZE_MAX / 2, 3, &out));
    assert_false(mp_add_size(SIZE_MAX, 1, &out));
    assert_int_equal(out, 7);
    assert_true(mp_mul_size(6, 7, &out));
    assert_int_equal(out, 42);
}

static void a_buffer_never_passes_its_limit(void **state) {
    (void)state;
    mp_buf buf = { .limit = 100 };
    for (int i = 0; i < 10; i++) assert_true(mp_buf_append(&buf, "0123456789", 10));
    assert_false(mp_buf_append(&buf, "x", 1));
    assert_int_equal(buf.len, 100);
    assert_memory_equal(buf.data + 90, "0123456789", 10);
    mp_buf_clear(&buf);
}

static void injected_failures_are_seen(void **state) {
    (void)state;
    mp_mem_fail_at(2, false);
    void *a = mp_alloc(1), *b = mp_alloc(1), *c = mp_alloc(1);
    mp_mem_fail_at(0, false);
    assert_non_null(a);
    assert_null(b);
    assert_non_null(c);
    mp_free(a);
    mp_free(c);
}

static void sha256_of_abc(void **state) {
    (void)state;
    mp_sha256 *sha = mp_sha256_open();
    for (int round = 0; round < 2; round++) { /* a context is reusable */
        mp_sha256_begin(sha);
        mp_sha256_update(sha, "a", 1);
        mp_sha256_update(sha, "bc", 2);
        mp_digest d = mp_sha256_end(sha);
        static const uint8_t want[4] = { 0xba, 0x78, 0x16, 0xbf }; /* FIPS 180-4, example "abc" */
        assert_memory_equal(d.bytes, want, 4);
    }
    mp_sha256_close(sha);
}

static void a_digest_is_written_and_read_in_hexadecimal(void **state) {
    (void)state;
    mp_digest d, back;
    for (size_t i = 0; i < sizeof d.bytes; i++) d.bytes[i] = (uint8_t)(0x09 + 31 * i);
    char text[MP_DIGEST_DIGITS + 1], want[MP_DIGEST_DIGITS + 1];
    mp_digest_write(&d, text);
    for (size_t i = 0; i < sizeof d.bytes; i++) snprintf(want + 2 * i, 3, "%02x", d.bytes[i]);
    assert_string_equal(text, want);
    for (size_t i = 0; i < MP_DIGEST_DIGITS; i++) {
        char bad[MP_DIGEST_DIGITS + 1];
        memcpy(bad, text, sizeof bad);
        bad[i] = i % 2 ? 'g' : 0;
        assert_false(mp_digest_read(bad, &back));
        if (text[i] >= 'a') text[i] = (char)(text[i] - 'a' + 'A');
    }
    assert_true(mp_digest_read(text, &back));
    assert_true(mp_digest_equal(&d, &back));
}

static atomic_uint seen[1000];
static void mark(void *ctx, uint32_t item, uint32_t thread) {
    assert_true(thread < *(uint32_t *)ctx);
    atomic_fetch_add(&seen[item], 1);
}

static void a_loop_runs_every_item_once(void **state) {
    (void)state;
    for (uint32_t n = 1; n <= 5; n++) {
        mp_threads *threads;
        assert_int_equal(mp_threads_open(n, &threads, NULL), MEPIC_OK);
        for (uint32_t round = 0; round < 300; round++) {
            uint32_t items = round * 7 % 1000;
            memset(seen, 0, sizeof seen);
            mp_threads_run(threads, items, mark, &n);
            for (uint32_t i = 0; i < 1000; i++) assert_int_equal(atomic_load(&seen[i]), i < items ? 1 : 0);
        }
        mp_threads_close(threads);
    }
}

/* Items write plain memory, the caller reads and overwrites it between loops: a missing order shows under TSan. The
 * work of an item and the gaps between loops differ, so that all ways to wait occur: spinning, asleep, not at all. */
typedef struct sums {
    uint32_t n, busy_ns;
    uint64_t in[64], out[64];
} sums;

static void spin(uint64_t ns) {
    for (uint64_t end = mp_now_ns() + ns; mp_now_ns() < end;) {
    }
}

static void add_item(void *ctx, uint32_t item, uint32_t thread) {
    sums *s = ctx;
    if (item % 5 == thread % 5) spin(s->busy_ns);
    s->out[item] = s->in[item] + s->n;
}

static void a_loop_sees_and_leaves_plain_memory(void **state) {
    (void)state;
    static const uint32_t waits[] = { 0, 0, 0, 1000, 0, 200000, 0, 0 };
    for (uint32_t n = 2; n <= 4; n++) {
        mp_threads *threads;
        assert_int_equal(mp_threads_open(n, &threads, NULL), MEPIC_OK);
        sums s = { 0 };
        for (uint32_t round = 0; round < 400; round++) {
            s.n = 1 + round % 64;
            s.busy_ns = waits[round % 7];
            for (uint32_t i = 0; i < s.n; i++) s.in[i] = round * i;
            mp_threads_run(threads, s.n, add_item, &s);
            for (uint32_t i = 0; i < s.n; i++) assert_true(s.out[i] == (uint64_t)round * i + s.n);
            spin(waits[round % 8]);
        }
        mp_threads_close(threads);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(error_text_is_one_line_and_cut_at_a_character),
        cmocka_unit_test(sizes_are_checked),
        cmocka_unit_test(a_buffer_never_passes_its_limit),
        cmocka_unit_test(injected_failures_are_seen),
        cmocka_unit_test(sha256_of_abc),
        cmocka_unit_test(a_digest_is_written_and_read_in_hexadecimal),
        cmocka_unit_test(a_loop_runs_every_item_once),
        cmocka_unit_test(a_loop_sees_and_leaves_plain_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
