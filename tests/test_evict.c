/* cache/evict: both orders against naive twins on random operations. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "cache/evict.h"
#include "support/random.h"

enum { N = 40, N_NAMES = 100 };

/* S3-FIFO and LRU with arrays and loops only. Index 0 is the oldest. */
typedef struct naive {
    bool lru;
    uint32_t small[N], n_small, main[N], n_main;
    uint32_t hits[N];
    bool settled[N];
    uint64_t ghost[N]; /* 0: taken out again */
    uint32_t n_ghost;
} naive;

static void cut(uint32_t *list, uint32_t *n, uint32_t at) {
    memmove(list + at, list + at + 1, (*n - at - 1) * sizeof *list);
    --*n;
}

static bool cut_page(uint32_t *list, uint32_t *n, uint32_t page) {
    for (uint32_t i = 0; i < *n; i++) {
        if (list[i] == page) return cut(list, n, i), true;
    }
    return false;
}

static void naive_add(naive *v, uint32_t page, uint64_t name) {
    bool main = v->lru || v->settled[page] || v->hits[page] > 0;
    for (uint32_t i = 0; !main && i < v->n_ghost; i++) {
        if (v->ghost[i] == name) v->ghost[i] = 0, main = true;
    }
    v->settled[page] = main;
    if (main) {
        v->main[v->n_main++] = page;
    } else {
        v->small[v->n_small++] = page;
    }
}

static uint32_t naive_victim(naive *v) {
    if (v->n_small + v->n_main == 0) return MP_NONE;
    if (v->n_small > 0 && (v->n_main == 0 || v->n_small >= (v->n_small + v->n_main) / 10.0)) return v->small[0];
    while (!v->lru && v->hits[v->main[0]] > 0) {
        uint32_t page = v->main[0];
        cut(v->main, &v->n_main, 0);
        v->hits[page]--;
        v->main[v->n_main++] = page;
    }
    return v->main[0];
}

static void naive_forget(naive *v, uint32_t page, uint64_t name) {
    if (cut_page(v->small, &v->n_small, page)) {
        if (v->n_ghost == N) {
            memmove(v->ghost, v->ghost + 1, (N - 1) * sizeof *v->ghost);
            v->n_ghost--;
        }
        v->ghost[v->n_ghost++] = name;
    } else {
        cut_page(v->main, &v->n_main, page);
    }
    v->hits[page] = 0;
    v->settled[page] = false;
}

/* Equal content is one page, so no two have the same name at a time; a name comes back when its page has left. */
static uint64_t unused_name(rng *r, const uint64_t *names) {
    for (;;) {
        uint64_t name = 1 + rng_below(r, N_NAMES);
        uint32_t page = 0;
        while (page < N && names[page] != name) page++;
        if (page == N) return name;
    }
}

static void compare(mepic_eviction kind, uint64_t seed) {
    rng r = rng_open(seed);
    mp_evict evict;
    assert_int_equal(mp_evict_open(kind, N, &evict, NULL), MEPIC_OK);
    naive twin = { .lru = kind == MEPIC_EVICT_LRU };
    uint64_t names[N] = { 0 }; /* 0: the page is not cached */
    bool held[N] = { false };
    uint64_t n_main = 0, n_victims = 0;
    for (uint32_t i = 0; i < 200000; i++) {
        uint32_t page = rng_below(&r, N);
        if (names[page] == 0) { /* published and released */
            names[page] = unused_name(&r, names);
            mp_evict_add(&evict, page, names[page]);
            naive_add(&twin, page, names[page]);
        } else if (held[page]) {
            held[page] = false;
            mp_evict_add(&evict, page, names[page]);
            naive_add(&twin, page, names[page]);
        } else if (rng_below(&r, 3) > 0) {
            held[page] = true;
            mp_evict_remove(&evict, page);
            if (!cut_page(twin.small, &twin.n_small, page)) cut_page(twin.main, &twin.n_main, page);
            if (rng_below(&r, 4) > 0) { /* else it is let go again, as by an admission that fails */
                mp_evict_hit(&evict, page);
                if (twin.hits[page] < 3) twin.hits[page]++;
            }
        }
        if (rng_below(&r, 2) == 0) {
            mp_page victim = mp_evict_victim(&evict);
            assert_int_equal(victim, naive_victim(&twin));
            if (victim == MP_NONE) continue;
            /* Now and then another page leaves first, as the rest of a chunk does. */
            mp_page gone = victim;
            if (rng_below(&r, 3) == 0) gone = twin.n_main > 0 ? twin.main[rng_below(&r, twin.n_main)] : victim;
            mp_evict_forget(&evict, gone, names[gone]);
            naive_forget(&twin, gone, names[gone]);
            names[gone] = 0;
            n_victims++;
        }
        assert_int_equal(mp_evict_count(&evict), twin.n_small + twin.n_main);
        n_main += twin.n_main;
    }
    assert_true(n_victims > 10000 && n_main > 10000);
    mp_evict_close(&evict);
}

static void s3fifo_equals_its_twin(void **state) {
    (void)state;
    compare(MEPIC_EVICT_S3FIFO, 11);
}

static void lru_equals_its_twin(void **state) {
    (void)state;
    compare(MEPIC_EVICT_LRU, 12);
}

/* What the small queue is for: pages asked for once do not push out those that come again. */
static void pages_asked_for_once_pass_through(void **state) {
    (void)state;
    mp_evict evict;
    assert_int_equal(mp_evict_open(MEPIC_EVICT_S3FIFO, N, &evict, NULL), MEPIC_OK);
    for (mp_page page = 0; page < 20; page++) {
        mp_evict_hit(&evict, page);
        mp_evict_add(&evict, page, 1000 + page);
    }
    for (uint32_t i = 0; i < 500; i++) {
        mp_page page = 20 + i % 20;
        mp_evict_add(&evict, page, 2000 + i);
        if (i < 3) continue;
        mp_page victim = mp_evict_victim(&evict);
        assert_true(victim >= 20);
        mp_evict_forget(&evict, victim, 2000 + i - 3);
    }
    mp_evict_close(&evict);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(s3fifo_equals_its_twin),
        cmocka_unit_test(lru_equals_its_twin),
        cmocka_unit_test(pages_asked_for_once_pass_through),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
