/* The sampler's steps (infer/sample.h) one after the other, on all candidates, sorted: what the samplers are compared
 * with. */
#ifndef MEPIC_TESTS_SUPPORT_SAMPLING_H
#define MEPIC_TESTS_SUPPORT_SAMPLING_H

#include "backend/backend.h"

/* So near to a boundary, as part of all mass, the last bits of a sum decide. */
#define REFERENCE_NEAR 1e-5

typedef struct candidate {
    int32_t id;
    float logit, weight;
} candidate;

/* What a logit counts as: no NaN, no infinity above. */
float reference_usable(float logit);
/* Steps 1 to 3, on a copy of the row's logits. */
void reference_adjust(float *logits, const mp_sample_row *row);
/* Those of logits[n_vocab] that are possible, into c; how many. */
uint32_t reference_candidates(const float *logits, uint32_t n_vocab, candidate *c);
/* Steps 5 to 8 on candidates c[n]: they end up in the order of the draw; how many are kept. *sure: no cut is so near
 * that a last bit decides it. */
uint32_t reference_cut(candidate *c, uint32_t n, const mepic_sampling *p, bool *sure);

#endif
