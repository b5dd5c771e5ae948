/* The rotation of RoPE: one table for keys and queries, built in double.
 *
 * inv_freq follows the model's scaling (plain, linear, YaRN with its attention factor, llama3 frequency factors), fixed
 * at load, so `<R(m) q, R(n) k> = <R(m - n) q, k>` is exact (docs/ARCHITECTURE.md, 2). Immutable; any thread. */
#ifndef MEPIC_MODEL_ROPE_H
#define MEPIC_MODEL_ROPE_H

#include "model/model.h"

/* Turns per position of each pair: freq [n_rot / 2], and the factor of both cos and sin (1 but for YaRN). */
void mp_rope_frequencies(const mp_model *model, double *freq, double *magnitude);

typedef struct mp_rope_table {
    uint32_t n_angles, n_pairs;
    float *cos_sin; /* [n_angles, 2, n_pairs]: cos of all pairs, then sin of all pairs, times the magnitude */
} mp_rope_table;
mepic_status mp_rope_table_open(const mp_model *model, uint32_t n_angles, mp_rope_table *out, mepic_error *err);
void mp_rope_table_close(mp_rope_table *table);

/* Whether the position formula is exact for this model, and one sentence that says why. */
bool mp_rope_exact(const mp_model *model, const char **why);

#endif
