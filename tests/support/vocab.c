#include "support/vocab.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "tools/synth_vocab.h"

static void put(bool ok) {
    if (!ok) fail_msg("out of memory");
}

static void put_text(mp_buf *b, const char *text, size_t len) {
    put(mp_synth_put_u64(b, len) && mp_buf_append(b, text, len));
}

void vocab_begin(vocab_file *v, const char *model, const char *pre) {
    *v = (vocab_file){ 0 };
    mp_buf *all[] = { &v->keys, &v->texts, &v->types, &v->scores, &v->merges, &v->file };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) all[i]->limit = 64 << 20;
    vocab_string(v, "tokenizer.ggml.model", model);
    if (pre) vocab_string(v, "tokenizer.ggml.pre", pre);
}

uint32_t vocab_token(vocab_file *v, const char *text, size_t len, mp_token_type type, float score) {
    put_text(&v->texts, text, len);
    put(mp_synth_put_u32(&v->types, (uint32_t)type));
    put(mp_buf_append(&v->scores, &score, sizeof score));
    return (uint32_t)v->n_tokens++;
}

/* Independent of the library's: bytes 33-126, 161-172 and 174-255 are themselves, the rest 256, 257, ... in order. */
static size_t spell(const char *bytes, size_t n, char *out) {
    size_t len = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned byte = (unsigned char)bytes[i], c = 256;
        for (unsigned b = 0; b <= byte; b++) {
            bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
            if (b == byte && printable) c = byte;
            if (b < byte && !printable) c++;
        }
        if (c >= 128) out[len++] = (char)(0xC0 | c >> 6);
        out[len++] = (char)(c < 128 ? c : 0x80 | (c & 63));
    }
    return len;
}

void vocab_byte_symbols(vocab_file *v) {
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte, symbol[2];
        vocab_token(v, symbol, spell(&c, 1, symbol), MP_TOKEN_NORMAL, 0);
    }
}

void vocab_byte_tokens(vocab_file *v) {
    for (int byte = 0; byte < 256; byte++) {
        char text[8];
        snprintf(text, sizeof text, "<0x%02X>", byte);
        vocab_token(v, text, 6, MP_TOKEN_BYTE, 0);
    }
}

uint32_t vocab_merge(vocab_file *v, const char *left, size_t n_left, const char *right, size_t n_right) {
    char line[1024], joined[1024];
    assert_true(2 * (n_left + n_right) + 1 <= sizeof line);
    size_t n = spell(left, n_left, joined);
    size_t total = n + spell(right, n_right, joined + n);
    memcpy(line, joined, n);
    line[n] = ' ';
    memcpy(line + n + 1, joined + n, total - n);
    put_text(&v->merges, line, total + 1);
    v->n_merges++;
    return vocab_token(v, joined, total, MP_TOKEN_NORMAL, 0);
}

void vocab_u32(vocab_file *v, const char *key, uint32_t value) {
    put(mp_synth_put_key(&v->keys, key, MP_GGUF_U32) && mp_synth_put_u32(&v->keys, value));
    v->n_keys++;
}

void vocab_bool(vocab_file *v, const char *key, bool value) {
    char byte = value;
    put(mp_synth_put_key(&v->keys, key, MP_GGUF_BOOL) && mp_buf_append(&v->keys, &byte, 1));
    v->n_keys++;
}

void vocab_string(vocab_file *v, const char *key, const char *value) {
    put(mp_synth_put_key(&v->keys, key, MP_GGUF_STRING) && mp_synth_put_str(&v->keys, value));
    v->n_keys++;
}

static void put_array(mp_buf *b, const char *key, mp_gguf_type type, uint64_t count) {
    put(mp_synth_put_key(b, key, MP_GGUF_ARRAY) && mp_synth_put_u32(b, (uint32_t)type) && mp_synth_put_u64(b, count));
}

void vocab_array(vocab_file *v, const char *key, mp_gguf_type type, uint64_t count) {
    put_array(&v->keys, key, type, count);
    v->n_keys++;
}

mp_gguf *vocab_open(vocab_file *v, unsigned arrays) {
    static const char *const names[] = { "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores",
                                         "tokenizer.ggml.merges" };
    static const mp_gguf_type types[] = { MP_GGUF_STRING, MP_GGUF_I32, MP_GGUF_F32, MP_GGUF_STRING };
    const mp_buf *elements[] = { &v->texts, &v->types, &v->scores, &v->merges };
    const uint64_t counts[] = { v->n_tokens, v->n_tokens, v->n_tokens, v->n_merges };
    mp_buf *f = &v->file;
    uint64_t n_arrays = 0;
    for (int i = 0; i < 4; i++) n_arrays += arrays >> i & 1;
    f->len = 0;
    put(mp_buf_append(f, "GGUF", 4) && mp_synth_put_u32(f, 3) && mp_synth_put_u64(f, 0) &&
        mp_synth_put_u64(f, v->n_keys + n_arrays) && mp_buf_append(f, v->keys.data, v->keys.len));
    for (int i = 0; i < 4; i++) {
        if (!(arrays >> i & 1)) continue;
        put_array(f, names[i], types[i], counts[i]);
        if (elements[i]->len) put(mp_buf_append(f, elements[i]->data, elements[i]->len));
    }
    mp_gguf *gguf;
    mepic_error err = { 0 };
    if (mp_gguf_open_memory(f->data, f->len, "vocabulary", &gguf, &err)) fail_msg("%s", err.message);
    return gguf;
}

void vocab_clear(vocab_file *v) {
    mp_buf *all[] = { &v->keys, &v->texts, &v->types, &v->scores, &v->merges, &v->file };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) mp_buf_clear(all[i]);
}
