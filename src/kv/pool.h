/* The page pool: who owns which page. Numbers only; the bytes are the backend's.
 *
 *                take                    publish
 *      free ───────────────► private ───────────────► shared        referenced: refs > 0
 *        ▲                      │ drop to 0              │ ▲
 *        ├──────────────────────┘             drop to 0  ▼ │ hold
 *        └──────────────────────────────────────────  evictable     cached, refs == 0
 *                                evict
 *
 * A private page has one owner, who may write it; slots are written once each, in order. Once published a page is never
 * written again. A page's version is raised when it is taken, so (page, version) names contents that are written once.
 * The kv manager is the only caller of what changes a page's state. One thread; everything is O(1) a page. */
#ifndef MEPIC_KV_POOL_H
#define MEPIC_KV_POOL_H

#include "kv/plan.h"

typedef struct mp_pool {
    uint32_t n_pages, page_size;
    uint32_t n_free, n_referenced, n_evictable; /* add up to n_pages */
    uint32_t *refs;                             /* [n_pages] */
    uint64_t *version;                          /* [n_pages] */
    uint16_t *fill;                             /* [n_pages] slots written */
    bool *cached;                               /* [n_pages] in the index */
    mp_page *free;                              /* [n_free] a stack: what was freed last is taken first */
    mp_fault *fault;                            /* borrowed */
} mp_pool;

mepic_status mp_pool_open(uint32_t n_pages, uint32_t page_size, mp_fault *fault, mp_pool *out, mepic_error *err);
void mp_pool_close(mp_pool *pool); /* a zeroed pool is a no-op */

/* Takes n free pages with one reference each, or none at all. */
bool mp_pool_take(mp_pool *pool, uint32_t n, mp_page *out);
/* One more reference. True: the page was evictable. */
bool mp_pool_hold(mp_pool *pool, mp_page page);
/* One reference less. True: it was the last one; the page is now free, or evictable if cached. */
bool mp_pool_drop(mp_pool *pool, mp_page page);
/* The page entered the index; it is referenced and private until now. */
void mp_pool_publish(mp_pool *pool, mp_page page);
/* The page left the index; it is evictable until now, and free then. */
void mp_pool_evict(mp_pool *pool, mp_page page);
/* Slot `slot` has been written: the next one, of a private page. */
void mp_pool_write(mp_pool *pool, mp_page page, uint32_t slot);

#endif
