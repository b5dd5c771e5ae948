/* What a request asks the engine for, in whatever dialect it came: prompts, how many replies to each, how to sample.
 *
 * Filled by a dialect's reader on an HTTP thread, then submitted by the loop. Owns everything it points to. */
#ifndef MEPIC_SERVE_GENERATION_H
#define MEPIC_SERVE_GENERATION_H

#include "base/mem.h"
#include "base/status.h"

enum { MP_REPLIES_MAX = 8, MP_PROMPTS_MAX = 64, MP_STOPS_MAX = 16, MP_STOP_TOKENS_MAX = 256, MP_BIASES_MAX = 1024 };

typedef struct mp_generation {
    mepic_prepared *prompts[MP_PROMPTS_MAX];
    uint32_t n_prompts, n; /* n replies to each: choice i is reply i % n to prompt i / n */
    mepic_request request; /* of every choice, but for prompt, scope, seed and user; its arrays are the ones below */
    uint64_t seed;         /* of reply 0; each further one has the next */
    bool stream;
    char *stops[MP_STOPS_MAX];
    int32_t stop_tokens[MP_STOP_TOKENS_MAX];
    struct mepic_logit_bias *biases;
} mp_generation;

mepic_status mp_generation_open(mp_generation **out, mepic_error *err);
void mp_generation_free(mp_generation *generation); /* NULL is a no-op */
uint32_t mp_generation_choices(const mp_generation *generation);
/* As requests have them: -1 and 0 switch top_k off, and a top_p of 0 leaves the likeliest token only. */
void mp_generation_set_top(mp_generation *generation, int64_t top_k, double top_p);
/* The request of choice `i`. It borrows from the generation. */
mepic_request mp_generation_request(const mp_generation *generation, uint32_t i, const char *scope, void *user);
/* Tokens of all prompts, each counted once per reply. */
uint64_t mp_generation_tokens(const mp_generation *generation);

#endif
