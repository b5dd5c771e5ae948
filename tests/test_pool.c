/* kv/pool: states and counts of pages, the versions, and the invariants it guards. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "kv/pool.h"

enum { N = 8, PAGE = 16 };

static mp_pool open_pool(mp_fault *fault) {
    mp_pool pool;
    *fault = (mp_fault){ 0 };
    assert_int_equal(mp_pool_open(N, PAGE, fault, &pool, NULL), MEPIC_OK);
    return pool;
}

static void counts_are(const mp_pool *pool, uint32_t n_free, uint32_t n_referenced, uint32_t n_evictable) {
    assert_int_equal(pool->n_free, n_free);
    assert_int_equal(pool->n_referenced, n_referenced);
    assert_int_equal(pool->n_evictable, n_evictable);
}

static void all_pages_or_none(void **state) {
    (void)state;
    mp_fault fault;
    mp_pool pool = open_pool(&fault);
    mp_page pages[N + 1];
    assert_true(mp_pool_take(&pool, 5, pages));
    assert_false(mp_pool_take(&pool, 4, pages));
    counts_are(&pool, 3, 5, 0);
    assert_true(mp_pool_take(&pool, 3, pages + 5));
    bool taken[N] = { false };
    for (uint32_t i = 0; i < N; i++) {
        assert_false(taken[pages[i]]);
        taken[pages[i]] = true;
    }
    assert_true(mp_pool_take(&pool, 0, pages));
    mp_pool_close(&pool);
}

static void a_page_goes_through_its_states(void **state) {
    (void)state;
    mp_fault fault;
    mp_pool pool = open_pool(&fault);
    mp_page page;
    assert_true(mp_pool_take(&pool, 1, &page));
    uint64_t version = pool.version[page];
    for (uint32_t i = 0; i < PAGE; i++) mp_pool_write(&pool, page, i);
    mp_pool_publish(&pool, page);
    assert_false(mp_pool_hold(&pool, page)); /* it was referenced */
    assert_false(mp_pool_drop(&pool, page));
    assert_true(mp_pool_drop(&pool, page));
    counts_are(&pool, N - 1, 0, 1);
    assert_true(mp_pool_hold(&pool, page)); /* it was evictable */
    counts_are(&pool, N - 1, 1, 0);
    assert_true(mp_pool_drop(&pool, page));
    mp_pool_evict(&pool, page);
    counts_are(&pool, N, 0, 0);
    assert_int_equal(pool.version[page], version);
    mp_page again;
    assert_true(mp_pool_take(&pool, 1, &again)); /* what was freed last is taken first */
    assert_int_equal(again, page);
    assert_int_equal(pool.version[page], version + 1);
    assert_int_equal(pool.fill[page], 0);
    assert_false(fault.broken);
    mp_pool_close(&pool);
}

/* Each misuse poisons a pool of its own. */
static void misuse_is_a_fault(void **state) {
    (void)state;
    for (int misuse = 0; misuse < 7; misuse++) {
        mp_fault fault;
        mp_pool pool = open_pool(&fault);
        mp_page page;
        assert_true(mp_pool_take(&pool, 1, &page));
        switch (misuse) {
        case 0: mp_pool_drop(&pool, page), mp_pool_drop(&pool, page); break;
        case 1: mp_pool_drop(&pool, page), mp_pool_hold(&pool, page); break;
        case 2: mp_pool_hold(&pool, N); break;
        case 3: mp_pool_write(&pool, page, 1); break;
        case 4: mp_pool_publish(&pool, page), mp_pool_write(&pool, page, 0); break;
        case 5: mp_pool_hold(&pool, page), mp_pool_publish(&pool, page); break;
        case 6: mp_pool_publish(&pool, page), mp_pool_evict(&pool, page); break;
        }
        if (!fault.broken) fail_msg("misuse %d was not noticed", misuse);
        mp_pool_close(&pool);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_pages_or_none),
        cmocka_unit_test(a_page_goes_through_its_states),
        cmocka_unit_test(misuse_is_a_fault),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
