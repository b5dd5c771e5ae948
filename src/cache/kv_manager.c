#include "cache/kv_manager.h"

#include <string.h>

mepic_status mp_kv_open(uint32_t n_pages, uint32_t page_size, mepic_eviction eviction, mp_fault *fault, mp_kv *out,
                        mepic_error *err) {
    mp_kv kv = { .fault = fault };
    mepic_status status = mp_pool_open(n_pages, page_size, fault, &kv.pool, err);
    if (status == MEPIC_OK) status = mp_index_open(n_pages, page_size, fault, &kv.index, err);
    if (status == MEPIC_OK) status = mp_evict_open(eviction, n_pages, &kv.evict, err);
    if (status != MEPIC_OK) {
        mp_kv_close(&kv);
        return status;
    }
    *out = kv;
    return MEPIC_OK;
}

void mp_kv_close(mp_kv *kv) {
    mp_pool_close(&kv->pool);
    mp_index_close(&kv->index);
    mp_evict_close(&kv->evict);
}

/* ---- Eviction ---------------------------------------------------------------------------------------------------- */

static uint64_t name_of(const mp_kv *kv, mp_page page) {
    return mp_digest_bucket(&kv->index.nodes[page].key);
}

static void evict_leaf(mp_kv *kv, mp_page page) {
    if (!mp_invariant(kv->fault, kv->pool.refs[page] == 0, "what follows an unreferenced page is unreferenced")) return;
    mp_evict_forget(&kv->evict, page, name_of(kv, page));
    mp_index_remove(&kv->index, page);
    mp_pool_evict(&kv->pool, page);
    kv->n_evicted++;
}

static mp_page leaf_below(const mp_kv *kv, mp_page page) {
    while (kv->index.nodes[page].child != MP_NONE) page = kv->index.nodes[page].child;
    return page;
}

/* The pages before an evicted one that only served what is gone now. */
static bool is_remainder(const mp_kv *kv, mp_page page) {
    const mp_node *node = &kv->index.nodes[page];
    return kv->pool.refs[page] == 0 && node->child == MP_NONE && !node->terminal;
}

static void evict_chain(mp_kv *kv, mp_page victim) {
    mp_page page = leaf_below(kv, victim), parent;
    for (;; page = leaf_below(kv, parent)) {
        parent = kv->index.nodes[page].parent;
        evict_leaf(kv, page);
        if (page == victim || kv->fault->broken) break;
    }
    while (parent != MP_NONE && is_remainder(kv, parent)) {
        page = parent;
        parent = kv->index.nodes[page].parent;
        evict_leaf(kv, page);
    }
}

static bool evict_some(mp_kv *kv) {
    mp_page victim = mp_evict_victim(&kv->evict);
    if (victim == MP_NONE) return false;
    if (kv->index.nodes[victim].kind == MP_NODE_CHUNK) {
        evict_chain(kv, victim);
    } else {
        evict_leaf(kv, leaf_below(kv, victim));
    }
    return !kv->fault->broken;
}

void mp_kv_clear(mp_kv *kv) {
    while (evict_some(kv)) {
    }
}

/* ---- References -------------------------------------------------------------------------------------------------- */

uint32_t mp_kv_room(const mp_kv *kv) {
    return kv->pool.n_free + kv->pool.n_evictable;
}

bool mp_kv_take(mp_kv *kv, uint32_t n, mp_page *out) {
    if (n > mp_kv_room(kv)) return false;
    while (kv->pool.n_free < n) {
        if (!mp_invariant(kv->fault, evict_some(kv), "every evictable page can be evicted")) return false;
    }
    return mp_pool_take(&kv->pool, n, out);
}

void mp_kv_hold(mp_kv *kv, mp_page page) {
    if (!mp_pool_hold(&kv->pool, page)) return;
    mp_evict_remove(&kv->evict, page);
    kv->n_read[kv->index.nodes[page].kind]++;
}

void mp_kv_drop(mp_kv *kv, mp_page page) {
    if (!mp_pool_drop(&kv->pool, page)) return;
    if (!kv->pool.cached[page]) return;
    mp_evict_add(&kv->evict, page, name_of(kv, page));
    kv->n_read[kv->index.nodes[page].kind]--;
}

void mp_kv_drop_all(mp_kv *kv, const mp_page *pages, uint32_t n) {
    while (n > 0) mp_kv_drop(kv, pages[--n]);
}

void mp_kv_discard_all(mp_kv *kv, const mp_page *pages, uint32_t n) {
    mp_kv_drop_all(kv, pages, n);
    while (n > 0 && !kv->fault->broken) {
        mp_page page = pages[--n];
        if (kv->pool.cached[page] && kv->pool.refs[page] == 0) evict_chain(kv, page);
    }
}

void mp_kv_hit(mp_kv *kv, mp_page page) {
    mp_evict_hit(&kv->evict, page);
}

/* ---- Publication ------------------------------------------------------------------------------------------------- */

mp_page mp_kv_publish(mp_kv *kv, mp_page page, mp_node_kind kind, mp_page parent, const mp_digest *key,
                      const mp_elements *elements) {
    bool written = kv->pool.fill[page] == elements->n_tokens;
    if (!mp_invariant(kv->fault, written, "a published page is written up to its last token")) return page;
    mp_page there = mp_index_find(&kv->index, kind, parent, key, elements);
    if (there != MP_NONE) {
        mp_kv_hold(kv, there);
        mp_kv_drop(kv, page);
        return there;
    }
    mp_pool_publish(&kv->pool, page);
    mp_index_add(&kv->index, page, kind, parent, key, elements);
    kv->n_read[kind]++;
    return page;
}

void mp_kv_mark_terminal(mp_kv *kv, mp_page page) {
    kv->index.nodes[page].terminal = true;
}

/* ---- Check ------------------------------------------------------------------------------------------------------- */

bool mp_kv_check(const mp_kv *kv, mepic_error *err) {
    const mp_pool *pool = &kv->pool;
    if (pool->n_free + pool->n_referenced + pool->n_evictable != pool->n_pages)
        return mp_fail(err, MEPIC_ERR_BROKEN, "%u free + %u referenced + %u evictable pages are not %u", pool->n_free,
                       pool->n_referenced, pool->n_evictable, pool->n_pages) == MEPIC_OK;
    uint32_t n_referenced = 0, n_evictable = 0, n_read[MP_NODE_KINDS] = { 0 };
    for (mp_page page = 0; page < pool->n_pages; page++) {
        const mp_node *node = &kv->index.nodes[page];
        bool evictable = pool->cached[page] && pool->refs[page] == 0;
        n_referenced += pool->refs[page] > 0;
        n_evictable += evictable;
        n_read[node->kind] += node->kind != MP_NODE_NONE && pool->refs[page] > 0;
        if (pool->cached[page] != (node->kind != MP_NODE_NONE))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: cached and in the index differ", page) == MEPIC_OK;
        if (evictable != (kv->evict.pages[page].queue != MP_QUEUE_NONE))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: evictable and in a queue differ", page) == MEPIC_OK;
        if (pool->cached[page] && pool->fill[page] != node->n_tokens)
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: cached with a slot not written", page) == MEPIC_OK;
        if (pool->cached[page] && pool->refs[page] > 0 && node->parent != MP_NONE && pool->refs[node->parent] == 0)
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: referenced without the page before it", page) == MEPIC_OK;
    }
    if (n_referenced != pool->n_referenced || n_evictable != pool->n_evictable ||
        n_evictable != mp_evict_count(&kv->evict) || memcmp(n_read, kv->n_read, sizeof n_read) != 0)
        return mp_fail(err, MEPIC_ERR_BROKEN, "page counts are wrong") == MEPIC_OK;
    for (uint32_t i = 0; i < pool->n_free; i++) {
        if (pool->free[i] >= pool->n_pages || pool->refs[pool->free[i]] > 0 || pool->cached[pool->free[i]])
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: free and in use", pool->free[i]) == MEPIC_OK;
    }
    return mp_index_check(&kv->index, err);
}
