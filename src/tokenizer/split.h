/* Pre-tokenizers of byte-level BPE: text is cut into words that are tokenized on their own.
 *
 * A family is up to four patterns, applied in order: each one cuts every piece left by the one before into its matches
 * and what lies between them, and sees nothing beyond its piece. Matched by PCRE2 (JIT where there is one) on the
 * models' own patterns. Text need not be UTF-8: every byte that belongs to no character becomes U+FFFD first, which is
 * what the reference implementations do. Immutable after open; any thread. Time is linear in the text, the stack a
 * constant; where PCRE2 gives up (its limits), the rest of the piece is one word. */
#ifndef MEPIC_TOKENIZER_SPLIT_H
#define MEPIC_TOKENIZER_SPLIT_H

#include "base/mem.h"
#include "model/gguf.h"

enum { MP_SPLIT_PATTERNS = 4 };

typedef struct mp_split_family {
    const char *name;
    const char *patterns[MP_SPLIT_PATTERNS]; /* the unused ones are NULL */
    bool whole_words; /* a word that is in the vocabulary is one token whatever the merges say */
    bool adds_bos;    /* unless the file says otherwise */
} mp_split_family;

/* For a value of tokenizer.ggml.pre; NULL: not supported. */
const mp_split_family *mp_split_family_find(mp_str pre);
/* "llama-bpe, qwen2, ...", for messages. */
const char *mp_split_family_list(void);

typedef struct mp_split mp_split;

mepic_status mp_split_open(const mp_split_family *family, mp_split **out, mepic_error *err);
void mp_split_close(mp_split *split); /* NULL is a no-op */

/* Calls word() for the words of `text` in order; stops and returns false when it does, or when out of memory. */
typedef bool (*mp_word_fn)(void *ctx, const char *word, size_t len);
bool mp_split_run(const mp_split *split, const char *text, size_t len, mp_word_fn word, void *ctx);

#endif
