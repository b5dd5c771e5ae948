/* Vocabularies made by hand, as the GGUF bytes a tokenizer opens. Fails the test when out of memory. */
#ifndef MEPIC_TESTS_SUPPORT_VOCAB_H
#define MEPIC_TESTS_SUPPORT_VOCAB_H

#include "base/mem.h"
#include "model/gguf.h"
#include "tokenizer/vocab.h"

typedef struct vocab_file {
    mp_buf keys, texts, types, scores, merges, file;
    uint64_t n_keys, n_tokens, n_merges;
} vocab_file;

/* pre NULL: no such key. */
void vocab_begin(vocab_file *v, const char *model, const char *pre);
uint32_t vocab_token(vocab_file *v, const char *text, size_t len, mp_token_type type, float score); /* its id */
/* 256 tokens of one byte each, in byte-level spelling or as <0x00> with type BYTE. */
void vocab_byte_symbols(vocab_file *v);
void vocab_byte_tokens(vocab_file *v);
/* A merge of two raw byte strings and the token that results. Returns its id. */
uint32_t vocab_merge(vocab_file *v, const char *left, size_t n_left, const char *right, size_t n_right);
void vocab_u32(vocab_file *v, const char *key, uint32_t value);
void vocab_bool(vocab_file *v, const char *key, bool value);
void vocab_string(vocab_file *v, const char *key, const char *value);
/* An array key; the elements must follow in v->keys. */
void vocab_array(vocab_file *v, const char *key, mp_gguf_type type, uint64_t count);

enum { VOCAB_TOKENS = 1, VOCAB_TYPES = 2, VOCAB_SCORES = 4, VOCAB_MERGES = 8, VOCAB_ALL = 15 };
/* Opens a file with the keys so far and the arrays named by `arrays`. Close the file before vocab_clear. */
mp_gguf *vocab_open(vocab_file *v, unsigned arrays);
void vocab_clear(vocab_file *v);

#endif
