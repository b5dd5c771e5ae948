/* The oracle: a slow forward pass in double, written from the definitions of docs/ARCHITECTURE.md and from nothing else
 * in the engine.
 *
 * It knows no pages, no plan, no angles and no cache. There are only rows, each with a true position, and keys, each
 * with the position at which the reader sees it:
 *   canonical context   tokens at positions 0 .. s-1, causal
 *   canonical chunk     tokens at s, s+1, ... that see the whole canonical context and the chunk up to themselves
 *   request             private tokens at their true positions; each sees the private tokens up to itself and every
 *                       shared (canonical, not linked) token whose position in the request is before its own
 * Weights are the dequantized ones; nothing is rounded. */
#ifndef MEPIC_TESTS_ORACLE_H
#define MEPIC_TESTS_ORACLE_H

#include "model/model.h"

typedef struct oracle oracle;
oracle *oracle_open(const mp_model *model); /* borrows the model */
void oracle_close(oracle *o);

/* K (not turned) and V of a list of tokens, for all layers, and what the last layer left: x [n, n_embd]. */
typedef struct oracle_kv {
    uint32_t n;
    double *k, *v; /* [layer][n][n_kv_heads * head_dim] */
    double *x;
} oracle_kv;
void oracle_kv_free(oracle_kv *kv);

/* One token of another list, seen at `position`. */
typedef struct oracle_key {
    const oracle_kv *kv;
    uint32_t index;
    int32_t position;
} oracle_key;

/* Computes `n` rows that see `shared` keys before their positions and each other causally. */
void oracle_compute(const oracle *o, const int32_t *tokens, const int32_t *positions, uint32_t n,
                    const oracle_key *shared, uint32_t n_shared, oracle_kv *out);
/* logits [n_vocab] of row i. */
void oracle_logits(const oracle *o, const oracle_kv *kv, uint32_t i, double *logits);

#endif
