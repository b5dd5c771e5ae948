/* From a row of logits to a token.
 *
 * The steps, in this order (the order of vLLM and of the OpenAI API's wording; llama.cpp applies temperature last):
 *     1. repetition penalty: tokens among the last repeat_window of prompt and reply; a positive logit is divided, a
 *        negative one multiplied
 *     2. presence and frequency penalty, over the reply: logit - presence - frequency * count
 *     3. logit bias
 *     4. temperature <= 0: the largest logit, of equal ones the smallest id; done
 *     5. temperature, softmax
 *     6. top-k: the k most probable
 *     7. top-p: of these, renormalized, the fewest whose mass reaches top_p
 *     8. min-p: of these, those at least min_p times as probable as the most probable
 *     9. one draw in proportion
 * A token depends on (seed, position, logits, tokens before it) only: the draw's random number is a function of seed
 * and position, there is no generator state. A NaN logit is no candidate; +infinity is the largest finite one.
 *
 * All scratch is allocated at open. One thread. */
#ifndef MEPIC_INFER_SAMPLE_H
#define MEPIC_INFER_SAMPLE_H

#include "base/status.h"

typedef struct mp_sampler mp_sampler;

mepic_status mp_sampler_open(uint32_t n_vocab, mp_sampler **out, mepic_error *err);
void mp_sampler_close(mp_sampler *sampler); /* NULL is a no-op */

/* ERR_ARGUMENT, naming the field and its range. */
mepic_status mp_sampling_check(const mepic_sampling *sampling, uint32_t n_vocab, mepic_error *err);

/* The token for position n, after tokens [n], of which the first n_prompt are the prompt's. logits: [n_vocab].
 * False when the row has no number that could be a candidate: the model's arithmetic is broken. */
bool mp_sample(mp_sampler *sampler, const mepic_sampling *sampling, const float *logits, const int32_t *tokens,
               uint32_t n, uint32_t n_prompt, int32_t *token);

/* Log-probabilities by the raw logits, before any of the steps above: of `token`, and of the n_top most probable, best
 * first, written to `top`; returns how many (n_top, but for a smaller vocabulary). */
uint32_t mp_logprobs(const float *logits, uint32_t n_vocab, int32_t token, float *logprob, mepic_logprob *top,
                     uint32_t n_top);

#endif
