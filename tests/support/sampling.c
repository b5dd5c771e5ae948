#include "support/sampling.h"

#include <math.h>
#include <stdlib.h>

static int by_logit(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

static int by_id_down(const void *a, const void *b) {
    return ((const candidate *)b)->id - ((const candidate *)a)->id;
}

float reference_usable(float x) {
    return isnan(x) ? -INFINITY : x > 3.4e38f ? 3.402823466e38f : x;
}

static uint32_t count_of(const int32_t *tokens, uint32_t first, uint32_t n, int32_t id) {
    uint32_t count = 0;
    for (uint32_t i = first; i < n; i++) count += tokens[i] == id;
    return count;
}

/* A token can be anywhere in the history, which is short: only its tokens are looked at. */
void reference_adjust(float *x, const mp_sample_row *row) {
    const mepic_sampling *p = row->sampling;
    uint32_t n = row->n_tokens, window = p->repeat_window ? p->repeat_window : 64, first = n > window ? n - window : 0;
    for (uint32_t i = 0; i < n; i++) {
        int32_t id = row->tokens[i];
        if (count_of(row->tokens, 0, i, id)) continue;
        if (p->repeat_penalty > 0 && count_of(row->tokens, first, n, id)) {
            x[id] = reference_usable(x[id] > 0 ? x[id] / p->repeat_penalty : x[id] * p->repeat_penalty);
        }
        uint32_t count = count_of(row->tokens, row->n_prompt, n, id);
        if (count) x[id] -= p->presence_penalty + p->frequency_penalty * (float)count;
    }
    for (size_t b = 0; b < p->n_logit_bias; b++) x[p->logit_bias[b].token] += p->logit_bias[b].bias;
}

uint32_t reference_cut(candidate *c, uint32_t n, const mepic_sampling *p, bool *sure) {
    double mass = 0, taken = 0;
    *sure = true;
    qsort(c, n, sizeof *c, by_logit);
    for (uint32_t i = 0; i < n; i++) c[i].weight = expf((c[i].logit - c[0].logit) / p->temperature);
    if (!p->top_k && p->min_p <= 0 && (p->top_p <= 0 || p->top_p >= 1)) {
        qsort(c, n, sizeof *c, by_id_down);
        return n;
    }
    uint32_t k = p->top_k && p->top_k < n ? p->top_k : n, kept = 0;
    for (uint32_t i = 0; i < k; i++) mass += (double)c[i].weight;
    for (; kept < k; kept++) {
        if (p->min_p > 0 && fabsf(c[kept].weight - p->min_p) < 1e-5f * p->min_p) *sure = false;
        if (c[kept].weight < p->min_p) break;
        if (p->top_p > 0 && p->top_p < 1) {
            if (fabs(taken - (double)p->top_p * mass) < REFERENCE_NEAR * mass) *sure = false;
            if (taken >= (double)p->top_p * mass) break;
        }
        taken += (double)c[kept].weight;
    }
    return kept;
}

uint32_t reference_candidates(const float *x, uint32_t n_vocab, candidate *c) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (x[i] != -INFINITY) c[n++] = (candidate){ (int32_t)i, x[i], 0 };
    }
    return n;
}
