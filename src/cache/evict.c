#include "cache/evict.h"

#include <string.h>

#include "base/mem.h"

enum { HITS_MAX = 3 };

typedef struct mp_evict_order {
    mp_queue_id (*place)(mp_evict *evict, mp_page page, uint64_t name); /* which queue a released page goes to */
    mp_page (*victim)(mp_evict *evict);
    bool remembers; /* keys of pages that left the small queue */
} mp_evict_order;

/* ---- Queues ------------------------------------------------------------------------------------------------------ */

static void push(mp_evict *evict, mp_queue_id id, mp_page page) {
    mp_evict_queue *queue = &evict->queues[id];
    mp_evict_page *entry = &evict->pages[page];
    entry->queue = (uint8_t)id;
    entry->next = MP_NONE;
    entry->prev = queue->newest;
    if (queue->newest != MP_NONE) {
        evict->pages[queue->newest].next = page;
    } else {
        queue->oldest = page;
    }
    queue->newest = page;
    queue->n++;
}

static void take_out(mp_evict *evict, mp_page page) {
    mp_evict_page *entry = &evict->pages[page];
    mp_evict_queue *queue = &evict->queues[entry->queue];
    if (entry->prev != MP_NONE) {
        evict->pages[entry->prev].next = entry->next;
    } else {
        queue->oldest = entry->next;
    }
    if (entry->next != MP_NONE) {
        evict->pages[entry->next].prev = entry->prev;
    } else {
        queue->newest = entry->prev;
    }
    queue->n--;
    entry->queue = MP_QUEUE_NONE;
}

/* ---- Ghost list -------------------------------------------------------------------------------------------------- */

typedef struct mp_ghost_entry {
    uint64_t name;
    uint32_t chained; /* next of the bucket */
    bool live;
} mp_ghost_entry;

static uint32_t *ghost_bucket(const mp_ghost *ghost, uint64_t name) {
    return &ghost->buckets[name & (ghost->n_buckets - 1)];
}

static void ghost_unlink(mp_ghost *ghost, uint32_t at) {
    mp_ghost_entry *entry = &ghost->entries[at];
    uint32_t *link = ghost_bucket(ghost, entry->name);
    while (*link != at) link = &ghost->entries[*link].chained;
    *link = entry->chained;
    entry->live = false;
}

static void ghost_add(mp_ghost *ghost, uint64_t name) {
    uint32_t at = ghost->next;
    ghost->next = (at + 1) % ghost->cap;
    if (ghost->entries[at].live) ghost_unlink(ghost, at);
    uint32_t *bucket = ghost_bucket(ghost, name);
    ghost->entries[at] = (mp_ghost_entry){ .name = name, .chained = *bucket, .live = true };
    *bucket = at;
}

/* Whether the name was there; it is not any more. */
static bool ghost_take(mp_ghost *ghost, uint64_t name) {
    for (uint32_t at = *ghost_bucket(ghost, name); at != MP_NONE; at = ghost->entries[at].chained) {
        if (ghost->entries[at].name != name) continue;
        ghost_unlink(ghost, at);
        return true;
    }
    return false;
}

/* ---- S3-FIFO ----------------------------------------------------------------------------------------------------- */

static mp_queue_id s3fifo_place(mp_evict *evict, mp_page page, uint64_t name) {
    mp_evict_page *entry = &evict->pages[page];
    if (entry->settled || entry->hits > 0) return MP_QUEUE_MAIN;
    return ghost_take(&evict->ghost, name) ? MP_QUEUE_MAIN : MP_QUEUE_SMALL;
}

static mp_page s3fifo_victim(mp_evict *evict) {
    mp_evict_queue *small = &evict->queues[MP_QUEUE_SMALL], *main = &evict->queues[MP_QUEUE_MAIN];
    /* What is hit is held, and what was held comes back to main: a page in the small queue was never hit. */
    if (small->n > 0 && (main->n == 0 || small->n * 10 >= small->n + main->n)) return small->oldest;
    while (main->n > 0 && evict->pages[main->oldest].hits > 0) {
        mp_page page = main->oldest;
        take_out(evict, page);
        evict->pages[page].hits--;
        push(evict, MP_QUEUE_MAIN, page);
    }
    return main->oldest;
}

/* ---- LRU --------------------------------------------------------------------------------------------------------- */

static mp_queue_id lru_place(mp_evict *evict, mp_page page, uint64_t name) {
    (void)evict, (void)page, (void)name;
    return MP_QUEUE_MAIN;
}

static mp_page lru_victim(mp_evict *evict) {
    return evict->queues[MP_QUEUE_MAIN].oldest;
}

static const mp_evict_order s3fifo = { .place = s3fifo_place, .victim = s3fifo_victim, .remembers = true };
static const mp_evict_order lru = { .place = lru_place, .victim = lru_victim };

/* ---- Interface --------------------------------------------------------------------------------------------------- */

mepic_status mp_evict_open(mepic_eviction kind, uint32_t n_pages, mp_evict *out, mepic_error *err) {
    mp_evict evict = { .order = kind == MEPIC_EVICT_LRU ? &lru : &s3fifo, .n_pages = n_pages };
    mp_ghost *ghost = &evict.ghost;
    ghost->cap = n_pages; /* as many as main can hold */
    ghost->n_buckets = 16;
    while (ghost->n_buckets < n_pages) ghost->n_buckets *= 2;
    evict.pages = mp_calloc(n_pages, sizeof *evict.pages);
    ghost->entries = mp_calloc(ghost->cap, sizeof *ghost->entries);
    ghost->buckets = mp_calloc(ghost->n_buckets, sizeof *ghost->buckets);
    if (!evict.pages || !ghost->entries || !ghost->buckets) {
        mp_evict_close(&evict);
        return mp_fail_nomem(err, "the order of eviction", n_pages * (sizeof *evict.pages + sizeof *ghost->entries));
    }
    for (uint32_t i = 0; i < ghost->n_buckets; i++) ghost->buckets[i] = MP_NONE;
    for (uint32_t i = 0; i < 3; i++) evict.queues[i] = (mp_evict_queue){ .oldest = MP_NONE, .newest = MP_NONE };
    *out = evict;
    return MEPIC_OK;
}

void mp_evict_close(mp_evict *evict) {
    mp_free(evict->pages);
    mp_free(evict->ghost.entries);
    mp_free(evict->ghost.buckets);
    memset(evict, 0, sizeof *evict);
}

void mp_evict_add(mp_evict *evict, mp_page page, uint64_t name) {
    mp_queue_id id = evict->order->place(evict, page, name);
    evict->pages[page].settled = id == MP_QUEUE_MAIN;
    push(evict, id, page);
}

void mp_evict_remove(mp_evict *evict, mp_page page) {
    take_out(evict, page);
}

void mp_evict_hit(mp_evict *evict, mp_page page) {
    if (evict->pages[page].hits < HITS_MAX) evict->pages[page].hits++;
}

mp_page mp_evict_victim(mp_evict *evict) {
    return evict->order->victim(evict);
}

void mp_evict_forget(mp_evict *evict, mp_page page, uint64_t name) {
    mp_evict_page *entry = &evict->pages[page];
    if (entry->queue == MP_QUEUE_SMALL && evict->order->remembers) ghost_add(&evict->ghost, name);
    take_out(evict, page);
    entry->hits = 0;
    entry->settled = false;
}

uint32_t mp_evict_count(const mp_evict *evict) {
    return evict->queues[MP_QUEUE_SMALL].n + evict->queues[MP_QUEUE_MAIN].n;
}
