/* The tokenizer keys of a synthetic model, and the few primitives a GGUF writer needs. Every function appends to a
 * buffer and returns false when that cannot grow. */
#ifndef MEPIC_TOOLS_SYNTH_VOCAB_H
#define MEPIC_TOOLS_SYNTH_VOCAB_H

#include "base/mem.h"
#include "model/gguf.h"

bool mp_synth_put_u32(mp_buf *b, uint32_t v);
bool mp_synth_put_u64(mp_buf *b, uint64_t v);
bool mp_synth_put_str(mp_buf *b, const char *s);
bool mp_synth_put_key(mp_buf *b, const char *key, mp_gguf_type type); /* the value comes after it */

/* The built-in vocabulary: 256 bytes, 40 merges, three control tokens; ids from there to n_vocab are unused tokens.
 * Adds the number of keys written to *n_keys. */
bool mp_synth_put_vocab(mp_buf *b, uint32_t n_vocab, const char *chat_template, uint64_t *n_keys, uint32_t *n_tokens);
/* Copies every key "tokenizer.*" of another file as it is. ERR_FORMAT when it has no token list. */
mepic_status mp_synth_copy_vocab(mp_buf *b, const char *donor, uint64_t *n_keys, uint32_t *n_tokens, mepic_error *err);

#endif
