/* The vocabulary of a GGUF file: texts, kinds and bytes of tokens, lookup by text, special tokens.
 *
 * Built once at open from the tokenizer.ggml.* keys, every array checked for element type, count and range, since the
 * file is untrusted; then immutable, any thread. Of two tokens with the same text the first is found by lookup, both
 * can be turned into bytes. Cost: one hash probe a lookup. */
#ifndef MEPIC_TOKENIZER_VOCAB_H
#define MEPIC_TOKENIZER_VOCAB_H

#include "model/gguf.h"

enum { MP_VOCAB_MAX = 1 << 20, MP_TOKEN_TEXT_MAX = 4096 };

/* As numbered in tokenizer.ggml.token_type. */
typedef enum mp_token_type {
    MP_TOKEN_UNDEFINED,
    MP_TOKEN_NORMAL,
    MP_TOKEN_UNKNOWN,
    MP_TOKEN_CONTROL,      /* found in text only where special tokens are parsed */
    MP_TOKEN_USER_DEFINED, /* always found in text, before anything else */
    MP_TOKEN_UNUSED,
    MP_TOKEN_BYTE, /* "<0x0A>" */
} mp_token_type;

typedef enum mp_vocab_model { MP_VOCAB_BPE, MP_VOCAB_SPM } mp_vocab_model;

typedef struct mp_vocab {
    mp_vocab_model model;
    uint32_t n;
    mp_str *texts;       /* [n] as the file writes them; in the file's mapping */
    uint8_t *types;      /* [n] mp_token_type */
    bool *ends;          /* [n] a reply ends there */
    float *scores;       /* [n] SPM; NULL for BPE */
    char *bytes;         /* what tokens look like in text, one after the other */
    uint32_t *bytes_at;  /* [n + 1] where each begins in `bytes` */
    uint32_t longest;    /* bytes of the longest text */
    uint32_t *slots;     /* hash table over texts: id + 1, 0 = empty; linear probing */
    size_t slot_mask;
    int32_t bos, eos, unk; /* -1: none */
    bool add_bos;
    bool space_prefix; /* SPM: text begins with a space that is not written */
    int32_t byte_ids[256]; /* the token of a single byte; -1: the vocabulary has none */
    int32_t *special;      /* ids of special tokens, sorted by text */
    uint32_t special_from[257];         /* where those with a first byte begin in `special` */
    bool begins_special[2][256];        /* [controls][first byte]: whether a special token can begin here */
} mp_vocab;

/* ERR_FORMAT names the key; ERR_UNSUPPORTED: another kind of tokenizer; ERR_NOMEM. */
mepic_status mp_vocab_open(const mp_gguf *gguf, mp_vocab *out, mepic_error *err);
void mp_vocab_clear(mp_vocab *vocab);

int32_t mp_vocab_find(const mp_vocab *vocab, const char *text, size_t len); /* -1: not there */
/* The same for text that a user wrote: never a control, unknown or byte token. */
int32_t mp_vocab_find_plain(const mp_vocab *vocab, const char *text, size_t len);
/* The longest special token that `text` begins with: its id, its length in *match; -1: none. Control and unknown tokens
 * only if `controls`. */
int32_t mp_vocab_special(const mp_vocab *vocab, const char *text, size_t len, bool controls, size_t *match);
mp_str mp_vocab_bytes(const mp_vocab *vocab, int32_t id);

/* Byte-level BPE writes each byte as one printable character. The UTF-8 of the character of `byte`: 1 or 2 bytes. */
uint32_t mp_byte_symbol(uint8_t byte, char out[2]);

#endif
