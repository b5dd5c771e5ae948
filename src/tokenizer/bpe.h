/* Byte-level BPE: the merges of a GGUF file, and words to token ids.
 *
 * Every byte of a word begins as the token of that byte; a byte without a token is dropped, as the reference
 * implementations do (small vocabularies lack some that do not occur in text). The merge table is a hash table over
 * pairs of ids, built once. Immutable after open; any thread. */
#ifndef MEPIC_TOKENIZER_BPE_H
#define MEPIC_TOKENIZER_BPE_H

#include "tokenizer/merge.h"
#include "tokenizer/split.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/vocab.h"

enum { MP_MERGES_MAX = 1 << 22 };

typedef struct mp_bpe_merge {
    int32_t left, right; /* left < 0: an empty slot */
    int32_t id;          /* what they become */
    uint32_t rank;
} mp_bpe_merge;

typedef struct mp_bpe {
    const mp_vocab *vocab; /* borrowed */
    const mp_split_family *family;
    mp_split *split;
    mp_bpe_merge *merges; /* hash table, linear probing */
    size_t mask;
} mp_bpe;

mepic_status mp_bpe_open(const mp_gguf *gguf, const mp_vocab *vocab, mp_bpe *out, mepic_error *err);
void mp_bpe_clear(mp_bpe *bpe);
/* Appends the ids of a text without special tokens. False: out of memory. */
bool mp_bpe_tokenize(const mp_bpe *bpe, mp_merger *merger, const char *text, size_t len, mp_tokens *out);

#endif
