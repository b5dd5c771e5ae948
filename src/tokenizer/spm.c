#include "tokenizer/spm.h"

#include <string.h>

typedef struct spm_run {
    const mp_vocab *vocab;
    const char *text; /* spaces escaped */
} spm_run;

/* Scores in the order of unsigned numbers, the highest first. */
static uint32_t rank_of_score(float score) {
    uint32_t bits;
    score += 0.0f; /* the two zeros are one */
    memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

static bool pair(const void *ctx, const mp_symbol *left, const mp_symbol *right, uint32_t *rank, int32_t *id) {
    const spm_run *run = ctx;
    *id = mp_vocab_find_plain(run->vocab, run->text + left->start, (size_t)left->len + right->len);
    if (*id < 0) return false;
    *rank = rank_of_score(run->vocab->scores[*id]);
    return true;
}

/* Bytes of a character by its first one; a stray continuation byte is one of its own. */
static size_t character_len(uint8_t first) {
    return first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

/* The text with every space as U+2581; *out_len its bytes. NULL: out of memory. */
static char *escape(const char *text, size_t len, bool space, size_t *out_len) {
    static const char mark[3] = { '\xe2', '\x96', '\x81' };
    size_t n = space ? sizeof mark : 0;
    for (size_t i = 0; i < len; i++) n += text[i] == ' ' ? sizeof mark : 1;
    char *out = mp_alloc(n);
    if (!out) return NULL;
    *out_len = n;
    n = 0;
    if (space) memcpy(out, mark, n = sizeof mark);
    for (size_t i = 0; i < len; i++) {
        if (text[i] == ' ') {
            memcpy(out + n, mark, sizeof mark);
            n += sizeof mark;
        } else {
            out[n++] = text[i];
        }
    }
    return out;
}

/* A symbol that no merge made a token of is one character: a token, or its bytes. */
static bool emit(const mp_vocab *vocab, const char *text, size_t len, mp_tokens *out) {
    int32_t id = mp_vocab_find_plain(vocab, text, len);
    if (id >= 0) return mp_tokens_push(out, id);
    for (size_t i = 0; i < len; i++) {
        id = vocab->byte_ids[(uint8_t)text[i]];
        if (id >= 0 && !mp_tokens_push(out, id)) return false;
    }
    return true;
}

bool mp_spm_tokenize(const mp_vocab *vocab, mp_merger *merger, const char *text, size_t len, bool space,
                     mp_tokens *out) {
    if (len == 0) return true;
    size_t n;
    char *escaped = escape(text, len, space, &n);
    if (!escaped) return false;
    mp_merger_begin(merger);
    bool ok = n <= UINT32_MAX;
    for (size_t i = 0; ok && i < n;) {
        size_t size = character_len((uint8_t)escaped[i]);
        if (size > n - i) size = n - i;
        ok = mp_merger_add(merger, -1, (uint32_t)i, (uint32_t)size);
        i += size;
    }
    spm_run run = { vocab, escaped };
    ok = ok && mp_merger_run(merger, pair, &run);
    for (int32_t i = 0; ok && i >= 0; i = merger->symbols[i].next) {
        const mp_symbol *symbol = &merger->symbols[i];
        ok = symbol->id >= 0 ? mp_tokens_push(out, symbol->id) : emit(vocab, escaped + symbol->start, symbol->len, out);
    }
    mp_free(escaped);
    return ok;
}
