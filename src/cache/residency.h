/* Residency: where a chunk is. Its canonical pages are in the pool, all or the first few of them; or a job is making
 * them; or they are nowhere. Chunks under way are kept here by identity, so that equal needs share one job.
 *
 * mp_chunk is content: tokens and the keys of their pages. Its owner (a job) is asked for by whoever finds it under
 * way. One thread; a look costs one lookup a page. */
#ifndef MEPIC_CACHE_RESIDENCY_H
#define MEPIC_CACHE_RESIDENCY_H

#include "cache/kv_manager.h"

typedef struct mp_chunk {
    uint32_t n_tokens, n_pages;
    const int32_t *tokens;    /* [n_tokens] */
    const mp_digest *keys;    /* [n_pages]; the last one is the chunk's identity */
    struct mp_chunk *chained; /* under way: next of the bucket */
} mp_chunk;

typedef struct mp_residency {
    mp_chunk **buckets; /* [n_buckets] chunks under way */
    uint32_t n_buckets;
} mp_residency;

mepic_status mp_residency_open(uint32_t n_pages, mp_residency *out, mepic_error *err);
void mp_residency_close(mp_residency *residency); /* a zeroed one is a no-op */

/* The equal chunk that is under way; NULL: none is. */
mp_chunk *mp_residency_under_way(const mp_residency *residency, const mp_chunk *chunk);
void mp_residency_begin(mp_residency *residency, mp_chunk *chunk);
void mp_residency_end(mp_residency *residency, mp_chunk *chunk);

/* The page that follows `parent` as page i of the chunk; MP_NONE: not there. */
mp_page mp_residency_page(const mp_kv *kv, const mp_chunk *chunk, uint32_t i, mp_page parent);
/* The chunk's canonical pages that are there, from the first one on; returns their number. They are not held. */
uint32_t mp_residency_pages(const mp_kv *kv, const mp_chunk *chunk, mp_page *out);

#endif
