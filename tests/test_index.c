/* cache/index and cache/key: what is found, what is not, and what the kv manager lets go together. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "cache/kv_manager.h"
#include "cache/residency.h"

enum { N = 64, PAGE = 16, TOKENS = 256 };

typedef struct bench {
    mp_kv kv;
    mp_fault fault;
    mp_sha256 *sha;
    mp_digest root;
} bench;

static void open_bench(bench *b) {
    memset(b, 0, sizeof *b);
    assert_int_equal(mp_kv_open(N, PAGE, MEPIC_EVICT_LRU, &b->fault, &b->kv, NULL), MEPIC_OK);
    b->sha = mp_sha256_open();
    b->root = mp_key_canonical_root(b->sha, &(mp_digest){ { 1 } }, &(mp_digest){ { 2 } }, NULL, 0);
}

static void close_bench(bench *b) {
    mepic_error err;
    if (!mp_kv_check(&b->kv, &err)) fail_msg("%s", err.message);
    assert_false(b->fault.broken);
    mp_kv_close(&b->kv);
    mp_sha256_close(b->sha);
}

/* A document and its keys. */
typedef struct document {
    int32_t tokens[TOKENS];
    mp_digest keys[TOKENS / PAGE];
    mp_chunk chunk;
} document;

static void make(bench *b, document *d, uint32_t n, uint32_t edited_at) {
    for (uint32_t i = 0; i < n; i++) d->tokens[i] = (int32_t)i + (i >= edited_at ? 5000 : 0);
    mp_key_chunk(b->sha, &b->root, d->tokens, n, PAGE, d->keys);
    d->chunk = (mp_chunk){ .n_tokens = n, .n_pages = (n + PAGE - 1) / PAGE, .tokens = d->tokens, .keys = d->keys };
}

/* Compiles what is missing and lets go of everything, as a job does. */
static void store(bench *b, const document *d, bool terminal) {
    mp_page pages[TOKENS / PAGE];
    uint32_t n = mp_residency_pages(&b->kv, &d->chunk, pages);
    for (uint32_t i = 0; i < n; i++) mp_kv_hold(&b->kv, pages[i]);
    for (uint32_t i = n; i < d->chunk.n_pages; i++) {
        uint32_t left = d->chunk.n_tokens - i * PAGE;
        mp_elements elements = { .tokens = d->tokens + i * PAGE, .n_tokens = left < PAGE ? left : PAGE };
        assert_true(mp_kv_take(&b->kv, 1, &pages[i]));
        for (uint32_t slot = 0; slot < elements.n_tokens; slot++) mp_pool_write(&b->kv.pool, pages[i], slot);
        pages[i] = mp_kv_publish(&b->kv, pages[i], MP_NODE_CHUNK, i ? pages[i - 1] : MP_NONE, &d->keys[i], &elements);
    }
    if (terminal) mp_kv_mark_terminal(&b->kv, pages[d->chunk.n_pages - 1]);
    mp_kv_drop_all(&b->kv, pages, d->chunk.n_pages);
}

static uint32_t resident(const bench *b, const document *d) {
    mp_page pages[TOKENS / PAGE];
    return mp_residency_pages(&b->kv, &d->chunk, pages);
}

static void an_edited_document_shares_the_pages_before_the_edit(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    static document first, edited, longer;
    make(&b, &first, 100, TOKENS);
    make(&b, &edited, 100, 50);
    make(&b, &longer, 130, TOKENS);
    store(&b, &first, true);
    assert_int_equal(resident(&b, &first), 7);
    assert_int_equal(resident(&b, &edited), 3); /* 50 = 3 pages and 2 tokens */
    assert_int_equal(resident(&b, &longer), 6); /* the last page of `first` has 4 tokens only */
    store(&b, &edited, true);
    store(&b, &longer, true);
    assert_int_equal(b.kv.index.n_nodes, 7 + 4 + 3);
    close_bench(&b);
}

static void equal_content_is_one_page(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    static document d;
    make(&b, &d, 16, TOKENS);
    mp_page pages[2];
    mp_elements elements = { .tokens = d.tokens, .n_tokens = 16 };
    assert_true(mp_kv_take(&b.kv, 2, pages));
    for (uint32_t i = 0; i < 32; i++) mp_pool_write(&b.kv.pool, pages[i / 16], i % 16);
    assert_int_equal(mp_kv_publish(&b.kv, pages[0], MP_NODE_CHUNK, MP_NONE, &d.keys[0], &elements), pages[0]);
    assert_int_equal(mp_kv_publish(&b.kv, pages[1], MP_NODE_CHUNK, MP_NONE, &d.keys[0], &elements), pages[0]);
    assert_int_equal(b.kv.pool.refs[pages[0]], 2);
    assert_int_equal(b.kv.pool.n_free, N - 1);
    mp_kv_drop(&b.kv, pages[0]);
    mp_kv_drop(&b.kv, pages[0]);
    close_bench(&b);
}

/* A lookup whose key is right and whose content is not, as by a collision of keys. */
static void a_key_alone_is_not_a_hit(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    static document d, other;
    make(&b, &d, 64, TOKENS);
    make(&b, &other, 64, 20);
    store(&b, &d, true);
    mp_elements right = { .tokens = d.tokens, .n_tokens = 16 }, wrong = right;
    mp_page page = mp_index_find(&b.kv.index, MP_NODE_CHUNK, MP_NONE, &d.keys[0], &right);
    assert_int_not_equal(page, MP_NONE);
    wrong.tokens = d.tokens + 1;
    assert_int_equal(mp_index_find(&b.kv.index, MP_NODE_CHUNK, MP_NONE, &d.keys[0], &wrong), MP_NONE);
    wrong = right;
    wrong.n_tokens = 15;
    assert_int_equal(mp_index_find(&b.kv.index, MP_NODE_CHUNK, MP_NONE, &d.keys[0], &wrong), MP_NONE);
    wrong = right;
    wrong.refs.bytes[31] = 1;
    assert_int_equal(mp_index_find(&b.kv.index, MP_NODE_CHUNK, MP_NONE, &d.keys[0], &wrong), MP_NONE);
    assert_int_equal(mp_index_find(&b.kv.index, MP_NODE_PREFIX, MP_NONE, &d.keys[0], &right), MP_NONE);
    assert_int_equal(mp_index_find(&b.kv.index, MP_NODE_CHUNK, page, &d.keys[0], &right), MP_NONE);
    memcpy(other.keys, d.keys, sizeof d.keys); /* every key collides: still only the equal page is found */
    assert_int_equal(resident(&b, &other), 1);
    close_bench(&b);
}

static void keys_name_scope_model_and_context(void **state) {
    (void)state;
    mp_sha256 *sha = mp_sha256_open();
    int32_t context[2] = { 1, 2 };
    mp_digest a = { { 1 } }, c = { { 3 } };
    mp_digest roots[] = {
        mp_key_canonical_root(sha, &a, &a, context, 2),      mp_key_canonical_root(sha, &c, &a, context, 2),
        mp_key_canonical_root(sha, &a, &c, context, 2),      mp_key_canonical_root(sha, &a, &a, context, 1),
        mp_key_canonical_root(sha, &a, &a, NULL, 0),         mp_key_prefix_root(sha, &a, &a, MEPIC_REUSE_PREFIX),
        mp_key_prefix_root(sha, &a, &a, MEPIC_REUSE_MEPIC),  mp_key_prefix_root(sha, &c, &a, MEPIC_REUSE_PREFIX),
        mp_key_prefix_root(sha, &a, &c, MEPIC_REUSE_PREFIX),
    };
    for (size_t i = 0; i < sizeof roots / sizeof *roots; i++) {
        for (size_t k = 0; k < i; k++) assert_false(mp_digest_equal(&roots[i], &roots[k]));
    }
    mp_sha256_close(sha);
}

static void a_chunk_leaves_as_a_whole(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    static document first, edited, other;
    make(&b, &other, 64, 0);
    make(&b, &first, 128, TOKENS);
    make(&b, &edited, 128, 70);
    store(&b, &first, true); /* the oldest */
    store(&b, &other, true);
    mp_page pages[N];
    assert_true(mp_kv_take(&b.kv, N - 12 + 1, pages)); /* one page more than is free */
    assert_int_equal(resident(&b, &first), 0);
    assert_int_equal(resident(&b, &other), 4);
    assert_int_equal(b.kv.n_evicted, 8);
    mp_kv_drop_all(&b.kv, pages, N - 12 + 1);
    close_bench(&b);
}

static void what_another_chunk_needs_stays(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    static document first, part, edited;
    make(&b, &first, 128, TOKENS);
    make(&b, &part, 64, TOKENS); /* the beginning of `first`, and a chunk itself */
    make(&b, &edited, 128, 100); /* shares 6 pages with `first` */
    store(&b, &part, true);
    store(&b, &edited, true);
    store(&b, &first, true);
    assert_int_equal(b.kv.index.n_nodes, 10);
    /* `edited` is held from its seventh page's parents on: only the tail of `first` can go. */
    mp_page held[8], pages[N];
    assert_int_equal(mp_residency_pages(&b.kv, &edited.chunk, held), 8);
    for (uint32_t i = 0; i < 8; i++) mp_kv_hold(&b.kv, held[i]);
    assert_int_equal(mp_kv_room(&b.kv), N - 8);
    assert_true(mp_kv_take(&b.kv, N - 8, pages));
    assert_int_equal(resident(&b, &first), 6);
    assert_int_equal(resident(&b, &edited), 8);
    mp_kv_drop_all(&b.kv, pages, N - 8);
    /* Now `edited` may go; `part` ends inside it and is asked for: it stays until its own turn. */
    mp_kv_drop_all(&b.kv, held, 8);
    for (uint32_t i = 0; i < 4; i++) mp_kv_hold(&b.kv, held[i]);
    for (uint32_t i = 4; i > 0; i--) mp_kv_drop(&b.kv, held[i - 1]);
    assert_true(mp_kv_take(&b.kv, N - 8 + 1, pages));
    assert_int_equal(resident(&b, &edited), 4);
    assert_int_equal(resident(&b, &part), 4);
    mp_kv_drop_all(&b.kv, pages, N - 8 + 1);
    close_bench(&b);
}

static void a_prefix_chain_leaves_from_its_end(void **state) {
    (void)state;
    bench b;
    open_bench(&b);
    mp_page pages[6], all[N];
    int32_t tokens[PAGE] = { 0 };
    mp_digest key = mp_key_prefix_root(b.sha, &(mp_digest){ { 1 } }, &(mp_digest){ { 2 } }, MEPIC_REUSE_PREFIX);
    assert_true(mp_kv_take(&b.kv, 6, pages));
    for (uint32_t i = 0; i < 6; i++) {
        tokens[0] = (int32_t)i;
        mp_elements elements = { .tokens = tokens, .n_tokens = PAGE };
        key = mp_key_next(b.sha, &key, &elements);
        for (uint32_t slot = 0; slot < PAGE; slot++) mp_pool_write(&b.kv.pool, pages[i], slot);
        mp_kv_publish(&b.kv, pages[i], MP_NODE_PREFIX, i ? pages[i - 1] : MP_NONE, &key, &elements);
    }
    for (uint32_t i = 0; i < 6; i++) mp_kv_drop(&b.kv, pages[i]); /* the worst order: the beginning is the oldest */
    for (uint32_t gone = 1; gone <= 6; gone++) {
        assert_true(mp_kv_take(&b.kv, N - 6 + gone, all));
        for (uint32_t i = 0; i < 6; i++) assert_int_equal(b.kv.pool.cached[pages[i]], i < 6 - gone);
        mp_kv_drop_all(&b.kv, all, N - 6 + gone);
    }
    close_bench(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_edited_document_shares_the_pages_before_the_edit),
        cmocka_unit_test(equal_content_is_one_page),
        cmocka_unit_test(a_key_alone_is_not_a_hit),
        cmocka_unit_test(keys_name_scope_model_and_context),
        cmocka_unit_test(a_chunk_leaves_as_a_whole),
        cmocka_unit_test(what_another_chunk_needs_stays),
        cmocka_unit_test(a_prefix_chain_leaves_from_its_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
