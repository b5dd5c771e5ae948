#include "cache/residency.h"

#include <string.h>

#include "base/mem.h"

mepic_status mp_residency_open(uint32_t n_pages, mp_residency *out, mepic_error *err) {
    mp_residency residency = { .n_buckets = 16 };
    while (residency.n_buckets < n_pages / 4) residency.n_buckets *= 2; /* a chunk under way has several pages */
    residency.buckets = mp_calloc(residency.n_buckets, sizeof(mp_chunk *));
    if (!residency.buckets)
        return mp_fail_nomem(err, "the table of chunks under way", residency.n_buckets * sizeof(mp_chunk *));
    *out = residency;
    return MEPIC_OK;
}

void mp_residency_close(mp_residency *residency) {
    mp_free(residency->buckets);
    residency->buckets = NULL;
}

static const mp_digest *identity(const mp_chunk *chunk) {
    return &chunk->keys[chunk->n_pages - 1];
}

static bool equal(const mp_chunk *a, const mp_chunk *b) {
    return a->n_tokens == b->n_tokens && mp_digest_equal(identity(a), identity(b)) &&
           memcmp(a->tokens, b->tokens, a->n_tokens * sizeof *a->tokens) == 0;
}

static mp_chunk **bucket_of(const mp_residency *residency, const mp_chunk *chunk) {
    return &residency->buckets[mp_digest_bucket(identity(chunk)) & (residency->n_buckets - 1)];
}

mp_chunk *mp_residency_under_way(const mp_residency *residency, const mp_chunk *chunk) {
    mp_chunk *other = *bucket_of(residency, chunk);
    while (other && !equal(other, chunk)) other = other->chained;
    return other;
}

void mp_residency_begin(mp_residency *residency, mp_chunk *chunk) {
    mp_chunk **bucket = bucket_of(residency, chunk);
    chunk->chained = *bucket;
    *bucket = chunk;
}

void mp_residency_end(mp_residency *residency, mp_chunk *chunk) {
    mp_chunk **link = bucket_of(residency, chunk);
    while (*link && *link != chunk) link = &(*link)->chained;
    if (*link) *link = chunk->chained;
    chunk->chained = NULL;
}

mp_page mp_residency_page(const mp_kv *kv, const mp_chunk *chunk, uint32_t i, mp_page parent) {
    uint32_t at = i * kv->pool.page_size;
    uint32_t n = chunk->n_tokens - at < kv->pool.page_size ? chunk->n_tokens - at : kv->pool.page_size;
    mp_elements elements = { .tokens = chunk->tokens + at, .n_tokens = n };
    return mp_index_find(&kv->index, MP_NODE_CHUNK, parent, &chunk->keys[i], &elements);
}

uint32_t mp_residency_pages(const mp_kv *kv, const mp_chunk *chunk, mp_page *out) {
    mp_page parent = MP_NONE;
    for (uint32_t i = 0; i < chunk->n_pages; i++) {
        mp_page page = mp_residency_page(kv, chunk, i, parent);
        if (page == MP_NONE) return i;
        out[i] = parent = page;
    }
    return chunk->n_pages;
}
