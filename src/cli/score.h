/* How good an answer is, and how far a distribution is from another. Pure; any thread. */
#ifndef MEPIC_CLI_SCORE_H
#define MEPIC_CLI_SCORE_H

#include <stddef.h>
#include <stdint.h>

/* SQuAD's token F1 of an answer against the best of the references: lower case, without punctuation and the articles
 * a, an, the; 0..1. At most 256 words are compared. */
double mp_score_f1(const char *answer, size_t len, const char *const *references, uint32_t n);

/* logits -> log-probabilities, in place, in double inside. */
void mp_log_softmax(float *logits, size_t n);
/* KL(p || q) in nats, of two arrays of log-probabilities. */
double mp_kl_divergence(const float *log_p, const float *log_q, size_t n);

#endif
