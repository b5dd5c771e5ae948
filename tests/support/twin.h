/* A twin of KV contents: what a slot must hold, computed from the definitions (docs/ARCHITECTURE.md) with explicit
 * positions and no pages, plan, keys or caches.
 *
 * The contents of a slot are one 64-bit number in place of K and V: a hash of the token, the angle it is stored at,
 * and, in order, of everything its row sees, each with its distance. So a wrong page, position, mask, base, order or a
 * missing token changes the number, and every number computed from it. */
#ifndef MEPIC_TESTS_TWIN_H
#define MEPIC_TESTS_TWIN_H

#include "schedule/scheduler.h"

enum { TWIN_DOC_TOKENS_MAX = 600, TWIN_CANONICAL_MAX = 300 };

uint64_t twin_start(int32_t token, int32_t angle);
uint64_t twin_fold(uint64_t h, uint64_t value, int32_t distance);

/* A chunk's tokens and its canonical contents. */
typedef struct twin_doc {
    uint32_t n;
    int32_t tokens[TWIN_DOC_TOKENS_MAX];
    uint64_t values[TWIN_DOC_TOKENS_MAX];
} twin_doc;

typedef struct twin_canonical {
    uint32_t n;
    int32_t tokens[TWIN_CANONICAL_MAX];
    uint64_t values[TWIN_CANONICAL_MAX];
} twin_canonical;

void twin_canonical_init(twin_canonical *canonical);                /* tokens given; computes the values */
void twin_doc_init(twin_doc *doc, const twin_canonical *canonical); /* likewise */

/* A request, token by token. */
typedef struct twin_request {
    uint32_t n_prompt, n_tokens, cap;
    int32_t *tokens;
    uint32_t n_shared; /* prompt tokens read from chunks, by position */
    uint32_t *shared_positions;
    uint64_t *shared_values;
    uint32_t n_private; /* prompt tokens in the private stream */
    uint32_t *positions;
    uint32_t n_values; /* private values computed so far */
    uint64_t *values;
    uint32_t n_pages_most; /* pages it may need at once, by the definitions; without the canonical context's */
} twin_request;

typedef struct twin_rules {
    uint32_t page_size, max_chunk_pages;
} twin_rules;

/* docs[i]: the doc behind span i; NULL for text. */
twin_request *twin_request_open(const twin_rules *rules, const mp_request_spec *spec, const twin_doc *const *docs,
                                uint32_t max_tokens);
void twin_request_close(twin_request *r);
void twin_request_append(twin_request *r, int32_t token);
uint32_t twin_position(const twin_request *r, uint32_t index);
/* What the slot of stream token `index` must hold. */
uint64_t twin_value(twin_request *r, uint32_t index);

#endif
