/* The order of eviction, over cached pages that nobody references. A page leaves the queues while it is held and comes
 * back when it is released. Two orders behind one table:
 *
 *   S3-FIFO (Yang et al., SOSP 2023)
 *        first release ──► small ──────────────► gone, its key goes to the ghost list
 *                            │ a tenth               key in the ghost list: straight to main
 *                            └─ held again ──► main ──► gone
 *                                               ▲  │ hit since: once more round, one hit less
 *                                               └──┘
 *     A page that is never asked for again passes through the small queue and does not push out what is in use.
 *   LRU: one queue in order of release.
 *
 * The queues only propose; the kv manager decides what leaves with the page. O(1) amortized; nothing is allocated after
 * open. One thread. */
#ifndef MEPIC_CACHE_EVICT_H
#define MEPIC_CACHE_EVICT_H

#include "kv/plan.h"

typedef enum mp_queue_id { MP_QUEUE_NONE, MP_QUEUE_SMALL, MP_QUEUE_MAIN } mp_queue_id;

typedef struct mp_evict_page {
    mp_page next, prev; /* in its queue; next is newer */
    uint8_t queue;      /* mp_queue_id */
    uint8_t hits;       /* 0..3 */
    bool settled;       /* belongs to main */
} mp_evict_page;

typedef struct mp_evict_queue {
    mp_page oldest, newest;
    uint32_t n;
} mp_evict_queue;

/* Keys of pages that left the small queue, oldest first, and a hash table over them. */
typedef struct mp_ghost {
    struct mp_ghost_entry *entries; /* [cap] a ring */
    uint32_t *buckets;              /* [n_buckets] */
    uint32_t cap, n_buckets, next;
} mp_ghost;

typedef struct mp_evict {
    const struct mp_evict_order *order;
    mp_evict_page *pages; /* [n_pages] */
    mp_evict_queue queues[3];
    mp_ghost ghost;
    uint32_t n_pages;
} mp_evict;

mepic_status mp_evict_open(mepic_eviction kind, uint32_t n_pages, mp_evict *out, mepic_error *err);
void mp_evict_close(mp_evict *evict); /* a zeroed one is a no-op */

/* The page is cached and lost its last reference. `name`: 64 bits of its key. */
void mp_evict_add(mp_evict *evict, mp_page page, uint64_t name);
/* The page is held again. */
void mp_evict_remove(mp_evict *evict, mp_page page);
/* A request found the page in the cache. */
void mp_evict_hit(mp_evict *evict, mp_page page);
/* The page that should leave next; it stays in its queue. MP_NONE: the queues are empty. */
mp_page mp_evict_victim(mp_evict *evict);
/* A page in a queue leaves the cache. */
void mp_evict_forget(mp_evict *evict, mp_page page, uint64_t name);
/* Pages in the queues. */
uint32_t mp_evict_count(const mp_evict *evict);

#endif
