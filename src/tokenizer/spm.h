/* SentencePiece BPE: text to token ids by the scores of a vocabulary, bytes for what it does not contain.
 *
 * Spaces become U+2581. Neighbours are joined when the vocabulary has their joined text, the highest score first. No
 * state of its own; any thread. */
#ifndef MEPIC_TOKENIZER_SPM_H
#define MEPIC_TOKENIZER_SPM_H

#include "tokenizer/merge.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/vocab.h"

/* Appends the ids of a text without special tokens, a space in front of it if `space`. False: out of memory. */
bool mp_spm_tokenize(const mp_vocab *vocab, mp_merger *merger, const char *text, size_t len, bool space,
                     mp_tokens *out);

#endif
