/* The page index: which page holds what. One hash table over both caches (cache/key.h), and the trees that chains of
 * pages with common beginnings form:
 *
 *     root ── p ── p ── p ■          chunk "report, version 1"
 *                  └── p ── p ■      chunk "report, version 2": the pages before the edit are the same pages
 *     ■ terminal: a chunk ends here, this key is its identity
 *
 * A node describes one cached page and has its number, so the table is as large as the pool and nothing is allocated
 * after open. A lookup compares key, kind, parent and elements: even a collision of keys cannot serve a wrong page.
 * The kv manager is the only writer. One thread; O(1) an operation. */
#ifndef MEPIC_CACHE_INDEX_H
#define MEPIC_CACHE_INDEX_H

#include "cache/key.h"
#include "kv/plan.h"

typedef enum mp_node_kind { MP_NODE_NONE, MP_NODE_CHUNK, MP_NODE_PREFIX, MP_NODE_KINDS } mp_node_kind;

typedef struct mp_node {
    mp_digest key;
    mp_digest refs;              /* of its elements */
    mp_page parent;              /* MP_NONE: the first page of a chain */
    mp_page child;               /* first one; MP_NONE: a leaf */
    mp_page sibling, sibling_up; /* next and previous child of the same parent */
    mp_page chained;             /* next node of the hash bucket */
    uint16_t n_tokens;
    uint8_t kind;  /* mp_node_kind; MP_NODE_NONE: the page is not cached */
    bool terminal; /* a chunk ends here */
} mp_node;

typedef struct mp_index {
    uint32_t n_pages, page_size, n_nodes;
    mp_node *nodes;   /* [n_pages] */
    int32_t *tokens;  /* [n_pages, page_size] */
    mp_page *buckets; /* [n_buckets], a power of two */
    uint32_t n_buckets;
    mp_fault *fault; /* borrowed */
} mp_index;

mepic_status mp_index_open(uint32_t n_pages, uint32_t page_size, mp_fault *fault, mp_index *out, mepic_error *err);
void mp_index_close(mp_index *index); /* a zeroed index is a no-op */

/* The page after `parent` that holds exactly this; MP_NONE: not cached. */
mp_page mp_index_find(const mp_index *index, mp_node_kind kind, mp_page parent, const mp_digest *key,
                      const mp_elements *elements);
/* Enters a page that is not cached, as a child of `parent`, which is. */
void mp_index_add(mp_index *index, mp_page page, mp_node_kind kind, mp_page parent, const mp_digest *key,
                  const mp_elements *elements);
/* Removes a leaf. */
void mp_index_remove(mp_index *index, mp_page page);

/* O(n): every node is found by its key and is its parent's child once; false with the reason. */
bool mp_index_check(const mp_index *index, mepic_error *err);

#endif
