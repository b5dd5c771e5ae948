#include "serve/generation.h"

mepic_status mp_generation_open(mp_generation **out, mepic_error *err) {
    mp_generation *g = mp_calloc(1, sizeof *g);
    if (!g) return mp_fail_nomem(err, "a request", sizeof *g);
    g->n = 1;
    g->request.size = sizeof g->request;
    *out = g;
    return MEPIC_OK;
}

void mp_generation_free(mp_generation *g) {
    if (!g) return;
    for (uint32_t i = 0; i < g->n_prompts; i++) mepic_prepared_free(g->prompts[i]);
    for (uint32_t i = 0; i < MP_STOPS_MAX; i++) mp_free(g->stops[i]);
    mp_free(g->biases);
    mp_free(g);
}

uint32_t mp_generation_choices(const mp_generation *g) {
    return g->n_prompts * g->n;
}

void mp_generation_set_top(mp_generation *g, int64_t top_k, double top_p) {
    g->request.sampling.top_k = top_k > 0 ? (uint32_t)top_k : 0;
    g->request.sampling.top_p = (float)top_p;
    if (!(g->request.sampling.top_p > 0.0f)) g->request.sampling.top_k = 1; // the engine's 0 is off
}

mepic_request mp_generation_request(const mp_generation *g, uint32_t i, const char *scope, void *user) {
    mepic_request request = g->request;
    request.prompt = g->prompts[i / g->n];
    request.sampling.seed = g->seed + i % g->n;
    request.sampling.logit_bias = g->biases;
    request.stop = (const char *const *)g->stops;
    request.stop_tokens = g->stop_tokens;
    request.scope = scope;
    request.user = user;
    return request;
}

uint64_t mp_generation_tokens(const mp_generation *g) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < g->n_prompts; i++) {
        size_t n;
        mepic_prepared_tokens(g->prompts[i], &n);
        sum += (uint64_t)n * g->n;
    }
    return sum;
}
