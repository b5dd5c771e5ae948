#include "kv/pool.h"

#include <string.h>

#include "base/mem.h"

mepic_status mp_pool_open(uint32_t n_pages, uint32_t page_size, mp_fault *fault, mp_pool *out, mepic_error *err) {
    mp_pool pool = { .n_pages = n_pages, .page_size = page_size, .n_free = n_pages, .fault = fault };
    pool.refs = mp_calloc(n_pages, sizeof *pool.refs);
    pool.version = mp_calloc(n_pages, sizeof *pool.version);
    pool.fill = mp_calloc(n_pages, sizeof *pool.fill);
    pool.cached = mp_calloc(n_pages, sizeof *pool.cached);
    pool.free = mp_calloc(n_pages, sizeof *pool.free);
    if (!pool.refs || !pool.version || !pool.fill || !pool.cached || !pool.free) {
        mp_pool_close(&pool);
        return mp_fail_nomem(err, "the page pool's tables", (size_t)n_pages * 24);
    }
    for (uint32_t i = 0; i < n_pages; i++) pool.free[i] = n_pages - 1 - i;
    *out = pool;
    return MEPIC_OK;
}

void mp_pool_close(mp_pool *pool) {
    mp_free(pool->refs);
    mp_free(pool->version);
    mp_free(pool->fill);
    mp_free(pool->cached);
    mp_free(pool->free);
    memset(pool, 0, sizeof *pool);
}

bool mp_pool_take(mp_pool *pool, uint32_t n, mp_page *out) {
    if (n > pool->n_free) return false;
    for (uint32_t i = 0; i < n; i++) {
        mp_page page = pool->free[--pool->n_free];
        pool->refs[page] = 1;
        pool->fill[page] = 0;
        pool->version[page]++;
        out[i] = page;
    }
    pool->n_referenced += n;
    return true;
}

bool mp_pool_hold(mp_pool *pool, mp_page page) {
    if (!mp_invariant(pool->fault, page < pool->n_pages, "a held page is in the pool")) return false;
    bool idle = pool->refs[page] == 0;
    if (!mp_invariant(pool->fault, !idle || pool->cached[page], "a held page is referenced or cached")) return false;
    pool->refs[page]++;
    if (!idle) return false;
    pool->n_evictable--;
    pool->n_referenced++;
    return true;
}

bool mp_pool_drop(mp_pool *pool, mp_page page) {
    if (!mp_invariant(pool->fault, page < pool->n_pages && pool->refs[page] > 0, "a dropped page is held"))
        return false;
    if (--pool->refs[page] > 0) return false;
    pool->n_referenced--;
    if (pool->cached[page]) {
        pool->n_evictable++;
    } else {
        pool->free[pool->n_free++] = page;
    }
    return true;
}

void mp_pool_publish(mp_pool *pool, mp_page page) {
    bool ok = page < pool->n_pages && pool->refs[page] == 1 && !pool->cached[page];
    if (!mp_invariant(pool->fault, ok, "a published page is private")) return;
    pool->cached[page] = true;
}

void mp_pool_evict(mp_pool *pool, mp_page page) {
    bool ok = page < pool->n_pages && pool->refs[page] == 0 && pool->cached[page];
    if (!mp_invariant(pool->fault, ok, "an evicted page is cached and read by nobody")) return;
    pool->cached[page] = false;
    pool->n_evictable--;
    pool->free[pool->n_free++] = page;
}

void mp_pool_write(mp_pool *pool, mp_page page, uint32_t slot) {
    bool ok = page < pool->n_pages && pool->refs[page] == 1 && !pool->cached[page];
    if (!mp_invariant(pool->fault, ok, "a written page has one owner")) return;
    if (!mp_invariant(pool->fault, slot == pool->fill[page], "slots are written once, in order")) return;
    if (!mp_invariant(pool->fault, slot < pool->page_size, "a slot is in its page")) return;
    pool->fill[page]++;
}
