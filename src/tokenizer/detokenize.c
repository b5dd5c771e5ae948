#include "tokenizer/internal.h"
#include "tokenizer/tokenizer.h"

#include <string.h>

/* How many bytes the character at p[0, n) takes if it is whole; 0: it may still become one; negative: so many bytes can
 * never become one (the longest beginning that could, as Unicode recommends to replace). */
static int character(const uint8_t *p, size_t n) {
    if (p[0] < 0x80) return 1;
    int need = p[0] >= 0xC2 && p[0] <= 0xDF ? 2 : (p[0] & 0xF0) == 0xE0 ? 3 : p[0] >= 0xF0 && p[0] <= 0xF4 ? 4 : 0;
    if (need == 0) return -1;
    for (int i = 1; i < need; i++) {
        if ((size_t)i == n) return 0;
        uint8_t low = 0x80, high = 0xBF;
        if (i == 1) { /* no overlong forms, no surrogates, nothing past U+10FFFF */
            low = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : low;
            high = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : high;
        }
        if (p[i] < low || p[i] > high) return -i;
    }
    return need;
}

static bool append_replacement(mp_buf *out) {
    return mp_buf_append(out, "\xef\xbf\xbd", 3);
}

/* Takes one byte; appends the characters that are whole or lost with it. */
static bool take_byte(mp_detokenizer *state, uint8_t byte, mp_buf *out) {
    state->pending[state->n_pending++] = byte;
    while (state->n_pending) {
        int n = character(state->pending, state->n_pending);
        if (n == 0) return true;
        if (n > 0 ? !mp_buf_append(out, state->pending, (size_t)n) : !append_replacement(out)) return false;
        uint32_t used = (uint32_t)(n > 0 ? n : -n);
        state->n_pending -= used;
        memmove(state->pending, state->pending + used, state->n_pending);
    }
    return true;
}

bool mp_detokenize(const mp_tokenizer *tokenizer, mp_detokenizer *state, int32_t id, mp_buf *out) {
    mp_str bytes = mp_tokenizer_bytes(tokenizer, id, false);
    if (bytes.len == 0) return true;
    mp_detokenizer next = *state;
    size_t len = out->len, i = 0;
    if (!next.started && tokenizer->vocab.space_prefix && bytes.data[0] == ' ') i = 1;
    next.started = true;
    for (; i < bytes.len; i++) {
        if (!take_byte(&next, (uint8_t)bytes.data[i], out)) {
            out->len = len;
            return false;
        }
    }
    *state = next;
    return true;
}

bool mp_detokenize_end(mp_detokenizer *state, mp_buf *out) {
    if (state->n_pending && !append_replacement(out)) return false;
    state->n_pending = 0;
    return true;
}
