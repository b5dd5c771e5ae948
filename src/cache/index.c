#include "cache/index.h"

#include <string.h>

#include "base/mem.h"

mepic_status mp_index_open(uint32_t n_pages, uint32_t page_size, mp_fault *fault, mp_index *out, mepic_error *err) {
    mp_index index = { .n_pages = n_pages, .page_size = page_size, .n_buckets = 16, .fault = fault };
    while (index.n_buckets < n_pages) index.n_buckets *= 2;
    size_t n_tokens = (size_t)n_pages * page_size;
    index.nodes = mp_calloc(n_pages, sizeof *index.nodes);
    index.tokens = mp_calloc(n_tokens, sizeof *index.tokens);
    index.buckets = mp_calloc(index.n_buckets, sizeof *index.buckets);
    if (!index.nodes || !index.tokens || !index.buckets) {
        mp_index_close(&index);
        return mp_fail_nomem(err, "the page index", n_pages * sizeof *index.nodes + n_tokens * sizeof *index.tokens);
    }
    for (uint32_t i = 0; i < index.n_buckets; i++) index.buckets[i] = MP_NONE;
    *out = index;
    return MEPIC_OK;
}

void mp_index_close(mp_index *index) {
    mp_free(index->nodes);
    mp_free(index->tokens);
    mp_free(index->buckets);
    memset(index, 0, sizeof *index);
}

static mp_page *bucket_of(const mp_index *index, const mp_digest *key) {
    return &index->buckets[mp_digest_bucket(key) & (index->n_buckets - 1)];
}

static int32_t *tokens_of(const mp_index *index, mp_page page) {
    return index->tokens + (size_t)page * index->page_size;
}

mp_page mp_index_find(const mp_index *index, mp_node_kind kind, mp_page parent, const mp_digest *key,
                      const mp_elements *elements) {
    for (mp_page page = *bucket_of(index, key); page != MP_NONE; page = index->nodes[page].chained) {
        const mp_node *node = &index->nodes[page];
        if (node->kind == kind && node->parent == parent && node->n_tokens == elements->n_tokens &&
            mp_digest_equal(&node->key, key) && mp_digest_equal(&node->refs, &elements->refs) &&
            memcmp(tokens_of(index, page), elements->tokens, elements->n_tokens * sizeof *elements->tokens) == 0)
            return page;
    }
    return MP_NONE;
}

void mp_index_add(mp_index *index, mp_page page, mp_node_kind kind, mp_page parent, const mp_digest *key,
                  const mp_elements *elements) {
    mp_node *node = &index->nodes[page];
    bool ok = node->kind == MP_NODE_NONE && (parent == MP_NONE || index->nodes[parent].kind == kind) &&
              elements->n_tokens <= index->page_size;
    if (!mp_invariant(index->fault, ok, "a page enters the index once, below a page of its kind")) return;
    mp_page *bucket = bucket_of(index, key);
    *node = (mp_node){ .key = *key,
                       .refs = elements->refs,
                       .parent = parent,
                       .child = MP_NONE,
                       .sibling = MP_NONE,
                       .sibling_up = MP_NONE,
                       .chained = *bucket,
                       .n_tokens = (uint16_t)elements->n_tokens,
                       .kind = (uint8_t)kind };
    memcpy(tokens_of(index, page), elements->tokens, elements->n_tokens * sizeof *elements->tokens);
    *bucket = page;
    index->n_nodes++;
    if (parent == MP_NONE) return;
    node->sibling = index->nodes[parent].child;
    if (node->sibling != MP_NONE) index->nodes[node->sibling].sibling_up = page;
    index->nodes[parent].child = page;
}

void mp_index_remove(mp_index *index, mp_page page) {
    mp_node *node = &index->nodes[page];
    bool ok = node->kind != MP_NODE_NONE && node->child == MP_NONE;
    if (!mp_invariant(index->fault, ok, "a page that leaves the index is a leaf")) return;
    mp_page *link = bucket_of(index, &node->key);
    while (*link != page) link = &index->nodes[*link].chained;
    *link = node->chained;
    if (node->sibling != MP_NONE) index->nodes[node->sibling].sibling_up = node->sibling_up;
    if (node->sibling_up != MP_NONE) {
        index->nodes[node->sibling_up].sibling = node->sibling;
    } else if (node->parent != MP_NONE) {
        index->nodes[node->parent].child = node->sibling;
    }
    node->kind = MP_NODE_NONE;
    index->n_nodes--;
}

static bool listed_once(const mp_index *index, mp_page first, mp_page page, bool siblings) {
    uint32_t n = 0, steps = 0;
    for (mp_page p = first; p != MP_NONE && steps++ <= index->n_pages;
         p = siblings ? index->nodes[p].sibling : index->nodes[p].chained)
        n += p == page;
    return n == 1;
}

bool mp_index_check(const mp_index *index, mepic_error *err) {
    uint32_t n_nodes = 0;
    for (mp_page page = 0; page < index->n_pages; page++) {
        const mp_node *node = &index->nodes[page];
        if (node->kind == MP_NODE_NONE) continue;
        n_nodes++;
        if (!listed_once(index, *bucket_of(index, &node->key), page, false))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: not found by its key", page) == MEPIC_OK;
        if (node->child != MP_NONE && index->nodes[node->child].parent != page)
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: its child has another parent", page) == MEPIC_OK;
        bool full = node->n_tokens == index->page_size;
        if (node->n_tokens == 0 || (!full && (node->kind == MP_NODE_PREFIX || node->child != MP_NONE)))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: %u tokens", page, node->n_tokens) == MEPIC_OK;
        if (node->parent == MP_NONE) continue;
        const mp_node *parent = &index->nodes[node->parent];
        if (parent->kind != node->kind || !listed_once(index, parent->child, page, true))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: not a child of its parent", page) == MEPIC_OK;
    }
    if (n_nodes != index->n_nodes)
        return mp_fail(err, MEPIC_ERR_BROKEN, "%u nodes, %u counted", index->n_nodes, n_nodes) == MEPIC_OK;
    return true;
}
