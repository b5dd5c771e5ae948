/* The merging that both kinds of BPE share: of all neighbours that can be joined, the best pair first, the leftmost of
 * equal ones, until none is left.
 *
 * Symbols stand in a linked list over an array; candidate pairs in a binary heap of 64-bit keys, rank above position.
 * A candidate is not removed when a neighbour changes: what is popped is looked up again and dropped when its rank is
 * another one. n symbols cost at most 3 n keys: O(n log n), no recursion. A merger is scratch of one call; it grows to
 * the longest word and is used again for the next. */
#ifndef MEPIC_TOKENIZER_MERGE_H
#define MEPIC_TOKENIZER_MERGE_H

#include "base/mem.h"

enum { MP_SYMBOLS_MAX = 1 << 30 };

typedef struct mp_symbol {
    int32_t prev, next;  /* index; -1: none */
    int32_t id;          /* token; -1: none has this text */
    uint32_t start, len; /* bytes of the word; len 0: joined to its left neighbour */
} mp_symbol;

typedef struct mp_merger {
    mp_symbol *symbols; /* owned */
    size_t n, cap;
    uint64_t *heap; /* owned */
    size_t n_heap, cap_heap;
} mp_merger;

/* Whether two neighbours can be joined: their rank (lower is better) and the token that results. */
typedef bool (*mp_pair_fn)(const void *ctx, const mp_symbol *left, const mp_symbol *right, uint32_t *rank, int32_t *id);

void mp_merger_begin(mp_merger *merger); /* no symbols */
bool mp_merger_add(mp_merger *merger, int32_t id, uint32_t start, uint32_t len); /* false: out of memory */
/* Merges; afterwards the list from symbol 0 (if there is one) over `next` is the result. False: out of memory. */
bool mp_merger_run(mp_merger *merger, mp_pair_fn pair, const void *ctx);
void mp_merger_clear(mp_merger *merger);

#endif
