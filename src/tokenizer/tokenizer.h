/* Text to token ids and back, for the vocabulary in a GGUF file.
 *
 * Kinds: byte-level BPE ("gpt2") with the pre-tokenizers llama-bpe, qwen2, smollm, gpt-2, default; SentencePiece BPE
 * with byte fallback ("llama"). Others are refused by name. Time is linear (n log n) in the text whatever it is; the
 * stack use is constant. Immutable after open; any thread. */
#ifndef MEPIC_TOKENIZER_TOKENIZER_H
#define MEPIC_TOKENIZER_TOKENIZER_H

#include "base/mem.h"
#include "model/gguf.h"

typedef struct mp_tokenizer mp_tokenizer;

/* Borrows `gguf` until close. ERR_FORMAT, ERR_UNSUPPORTED, ERR_NOMEM. */
mepic_status mp_tokenizer_open(const mp_gguf *gguf, mp_tokenizer **out, mepic_error *err);
void mp_tokenizer_close(mp_tokenizer *tokenizer);

typedef struct mp_tokens {
    int32_t *ids; /* owned; mp_free */
    size_t n, cap;
} mp_tokens;
bool mp_tokens_push(mp_tokens *tokens, int32_t id); /* false: out of memory */

/* Appends the ids of `text`. add_special: what the model puts in front of a text (BOS, a space);
 * an EOS is never put behind it, since a prompt is to be continued. parse_special: control
 * tokens written in the text become tokens; without it no text gives one. Any bytes are accepted. ERR_NOMEM only; *out
 * is unchanged on failure. */
mepic_status mp_tokenize(const mp_tokenizer *tokenizer, const char *text, size_t len, bool add_special,
                         bool parse_special, mp_tokens *out, mepic_error *err);

uint32_t mp_tokenizer_n_vocab(const mp_tokenizer *tokenizer);
const char *mp_tokenizer_kind(const mp_tokenizer *tokenizer); /* "bpe/qwen2", "spm" */
int32_t mp_tokenizer_bos(const mp_tokenizer *tokenizer);      /* -1: none */
bool mp_tokenizer_adds_bos(const mp_tokenizer *tokenizer);
/* True for end-of-sequence and end-of-turn tokens: a reply ends there. */
bool mp_tokenizer_ends(const mp_tokenizer *tokenizer, int32_t id);
/* The bytes of one token as they appear in text; control tokens give nothing unless `special`. Valid until close. */
mp_str mp_tokenizer_bytes(const mp_tokenizer *tokenizer, int32_t id, bool special);

/* Streaming detokenization: give tokens, get whole UTF-8 characters; the rest is kept for the next call. Bytes that can
 * never become valid are replaced by U+FFFD. Zero-initialize. */
typedef struct mp_detokenizer {
    uint8_t pending[4];
    uint32_t n_pending;
    bool started; /* SentencePiece: the space in front of the first word was dropped */
} mp_detokenizer;
/* Appends to `out`; false when it is full or out of memory. */
bool mp_detokenize(const mp_tokenizer *tokenizer, mp_detokenizer *state, int32_t id, mp_buf *out);
bool mp_detokenize_end(mp_detokenizer *state, mp_buf *out); /* flushes an unfinished character as U+FFFD */

#endif
