/* The KV manager: one pool for the prefix cache and the chunk cache. It ties three tables together, all by page:
 *
 *      kv/pool       who references a page                    cached and unreferenced  ⇔  in an eviction queue
 *      cache/index   what a cached page holds                 cached                   ⇔  has a node
 *      cache/evict   in which order unreferenced ones leave
 *
 * Whoever references a page references all pages before it in its chain. So what follows an unreferenced page is
 * unreferenced too, and every evictable page can really be had: `mp_kv_room` is exact, and admission may trust it.
 *
 * What leaves: a page of a chunk takes everything behind it along, tail first, and the pages before it that no other
 * chunk needs, since a chunk with a hole is of no use; of a prefix chain only its last page goes. One thread. */
#ifndef MEPIC_CACHE_KV_MANAGER_H
#define MEPIC_CACHE_KV_MANAGER_H

#include "cache/evict.h"
#include "cache/index.h"
#include "kv/pool.h"

typedef struct mp_kv {
    mp_pool pool;
    mp_index index;
    mp_evict evict;
    mp_fault *fault;    /* borrowed */
    uint64_t n_evicted; /* pages, so far */
    uint32_t n_read[MP_NODE_KINDS]; /* cached pages that somebody references, by kind */
} mp_kv;

mepic_status mp_kv_open(uint32_t n_pages, uint32_t page_size, mepic_eviction eviction, mp_fault *fault, mp_kv *out,
                        mepic_error *err);
void mp_kv_close(mp_kv *kv); /* a zeroed one is a no-op */

/* Pages that can be had now. */
uint32_t mp_kv_room(const mp_kv *kv);
/* Takes n pages, evicting what is needed, or none at all. */
bool mp_kv_take(mp_kv *kv, uint32_t n, mp_page *out);
void mp_kv_hold(mp_kv *kv, mp_page page);
void mp_kv_drop(mp_kv *kv, mp_page page);
/* Drops in reverse order: the end of a chain should leave before its beginning. */
void mp_kv_drop_all(mp_kv *kv, const mp_page *pages, uint32_t n);
/* Drops pages that nobody should trust: those nobody else references leave the cache, and what follows them. */
void mp_kv_discard_all(mp_kv *kv, const mp_page *pages, uint32_t n);
/* A request reads a page that was in the cache. */
void mp_kv_hit(mp_kv *kv, mp_page page);

/* Enters a private, fully written page under its key and returns it; if the same content is there already, drops `page`
 * and returns that page, held. */
mp_page mp_kv_publish(mp_kv *kv, mp_page page, mp_node_kind kind, mp_page parent, const mp_digest *key,
                      const mp_elements *elements);
/* A chunk ends at this cached page. */
void mp_kv_mark_terminal(mp_kv *kv, mp_page page);
/* Evicts everything that nobody references. */
void mp_kv_clear(mp_kv *kv);

/* O(n): the three tables agree; false with the reason. */
bool mp_kv_check(const mp_kv *kv, mepic_error *err);

#endif
