#include "tokenizer/tokenizer.h"

#include <stdio.h>
#include <string.h>

#include "tokenizer/bpe.h"
#include "tokenizer/internal.h"
#include "tokenizer/spm.h"

mepic_status mp_tokenizer_open(const mp_gguf *gguf, mp_tokenizer **out, mepic_error *err) {
    mp_tokenizer *tokenizer = mp_calloc(1, sizeof *tokenizer);
    if (!tokenizer) return mp_fail_nomem(err, "the tokenizer", sizeof *tokenizer);
    mepic_status status = mp_vocab_open(gguf, &tokenizer->vocab, err);
    if (status) goto fail;
    if (tokenizer->vocab.model == MP_VOCAB_BPE) {
        status = mp_bpe_open(gguf, &tokenizer->vocab, &tokenizer->bpe, err);
        if (status) goto fail;
        snprintf(tokenizer->kind, sizeof tokenizer->kind, "bpe/%s", tokenizer->bpe.family->name);
    } else {
        snprintf(tokenizer->kind, sizeof tokenizer->kind, "spm");
    }
    *out = tokenizer;
    return MEPIC_OK;
fail:
    mp_tokenizer_close(tokenizer);
    return status;
}

void mp_tokenizer_close(mp_tokenizer *tokenizer) {
    if (!tokenizer) return;
    mp_bpe_clear(&tokenizer->bpe);
    mp_vocab_clear(&tokenizer->vocab);
    mp_free(tokenizer);
}

bool mp_tokens_push(mp_tokens *tokens, int32_t id) {
    if (tokens->n == tokens->cap) {
        size_t cap = tokens->cap ? 2 * tokens->cap : 64;
        int32_t *ids = mp_realloc(tokens->ids, cap * sizeof *ids);
        if (!ids) return false;
        tokens->ids = ids;
        tokens->cap = cap;
    }
    tokens->ids[tokens->n++] = id;
    return true;
}

/* The ids of text between special tokens. */
static bool tokenize_plain(const mp_tokenizer *tokenizer, mp_merger *merger, const char *text, size_t len, bool space,
                           mp_tokens *out) {
    if (tokenizer->vocab.model == MP_VOCAB_BPE) return mp_bpe_tokenize(&tokenizer->bpe, merger, text, len, out);
    return mp_spm_tokenize(&tokenizer->vocab, merger, text, len, space, out);
}

static bool tokenize(const mp_tokenizer *tokenizer, mp_merger *merger, const char *text, size_t len, bool add_special,
                     bool parse_special, mp_tokens *out) {
    const mp_vocab *vocab = &tokenizer->vocab;
    bool space = vocab->space_prefix && add_special; /* in front of the next plain text */
    if (add_special && vocab->add_bos && !mp_tokens_push(out, vocab->bos)) return false;
    size_t from = 0, at = 0, match = 0;
    while (at < len) {
        int32_t id = mp_vocab_special(vocab, text + at, len - at, parse_special, &match);
        if (id < 0) {
            at++;
            continue;
        }
        if (at > from && !tokenize_plain(tokenizer, merger, text + from, at - from, space, out)) return false;
        if (!mp_tokens_push(out, id)) return false;
        from = at += match;
        space = vocab->space_prefix;
    }
    return at == from || tokenize_plain(tokenizer, merger, text + from, at - from, space, out);
}

mepic_status mp_tokenize(const mp_tokenizer *tokenizer, const char *text, size_t len, bool add_special,
                         bool parse_special, mp_tokens *out, mepic_error *err) {
    size_t n = out->n;
    mp_merger merger = { 0 };
    bool ok = tokenize(tokenizer, &merger, text, len, add_special, parse_special, out);
    mp_merger_clear(&merger);
    if (ok) return MEPIC_OK;
    out->n = n;
    return mp_fail_nomem(err, "the tokens of a text", len);
}

uint32_t mp_tokenizer_n_vocab(const mp_tokenizer *tokenizer) {
    return tokenizer->vocab.n;
}

const char *mp_tokenizer_kind(const mp_tokenizer *tokenizer) {
    return tokenizer->kind;
}

int32_t mp_tokenizer_bos(const mp_tokenizer *tokenizer) {
    return tokenizer->vocab.bos;
}

bool mp_tokenizer_adds_bos(const mp_tokenizer *tokenizer) {
    return tokenizer->vocab.add_bos;
}

bool mp_tokenizer_ends(const mp_tokenizer *tokenizer, int32_t id) {
    return id >= 0 && (uint32_t)id < tokenizer->vocab.n && tokenizer->vocab.ends[id];
}

mp_str mp_tokenizer_bytes(const mp_tokenizer *tokenizer, int32_t id, bool special) {
    const mp_vocab *vocab = &tokenizer->vocab;
    if (id < 0 || (uint32_t)id >= vocab->n) return (mp_str){ "", 0 };
    bool hidden = vocab->types[id] == MP_TOKEN_CONTROL || vocab->types[id] == MP_TOKEN_UNKNOWN;
    return hidden && !special ? (mp_str){ "", 0 } : mp_vocab_bytes(vocab, id);
}
