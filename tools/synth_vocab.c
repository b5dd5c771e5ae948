/* A small byte-level BPE vocabulary, in the layout that converters write for GPT-2's kind of tokenizer: bytes appear as
 * printable characters, a merge is "left right" and its result is a token. */
#include "tools/synth_vocab.h"

#include <stdio.h>
#include <string.h>

enum { TOKEN_NORMAL = 1, TOKEN_CONTROL = 3, TOKEN_UNUSED = 5 }; /* GGUF's token types */

/* "\xc4\xa0" is how the space byte is spelled. Each pair can be formed when the merges above it are done. */
#define SP "\xc4\xa0"
static const char *const merges[] = {
    SP " t",  "h e",    SP " a", "i n",   "r e",     "o n",    SP "t he", "e r", SP " s",  "a t",
    SP " w",  SP " o",  "e n",   SP " c", "i t",     "i s",    "a n",     "o r", "e s",    SP " b",
    "e d",    SP " f",  "in g",  SP " p", "o u",     SP " an", "a l",     "a r", SP "t o", SP " m",
    SP "o f", SP " in", SP " d", SP " h", SP "an d", "i c",    "a s",     "l e", SP " l",  "i on",
};
static const char *const controls[] = { "<|endoftext|>", "<|im_start|>", "<|im_end|>" };
enum {
    N_MERGES = sizeof merges / sizeof *merges,
    N_CONTROLS = sizeof controls / sizeof *controls,
    FIRST_CONTROL = 256 + N_MERGES,
    N_BUILT_IN = FIRST_CONTROL + N_CONTROLS,
};
static const char plain_chatml[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

bool mp_synth_put_u32(mp_buf *b, uint32_t v) {
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(v >> 8 * i);
    return mp_buf_append(b, bytes, sizeof bytes);
}

bool mp_synth_put_u64(mp_buf *b, uint64_t v) {
    return mp_synth_put_u32(b, (uint32_t)v) && mp_synth_put_u32(b, (uint32_t)(v >> 32));
}

bool mp_synth_put_str(mp_buf *b, const char *s) {
    return mp_synth_put_u64(b, strlen(s)) && mp_buf_append(b, s, strlen(s));
}

bool mp_synth_put_key(mp_buf *b, const char *key, mp_gguf_type type) {
    return mp_synth_put_str(b, key) && mp_synth_put_u32(b, (uint32_t)type);
}

static bool put_array(mp_buf *b, const char *key, mp_gguf_type type, uint64_t n) {
    return mp_synth_put_key(b, key, MP_GGUF_ARRAY) && mp_synth_put_u32(b, (uint32_t)type) && mp_synth_put_u64(b, n);
}

/* GPT-2's spelling of bytes: printable Latin-1 is itself, the others are the code points from 256 on in their order. */
static void spell_byte(unsigned byte, unsigned *next, char *out) {
    bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    unsigned point = printable ? byte : 256 + (*next)++;
    if (point < 0x80) {
        out[0] = (char)point;
        out[1] = 0;
    } else {
        out[0] = (char)(0xc0 | point >> 6);
        out[1] = (char)(0x80 | (point & 63));
        out[2] = 0;
    }
}

static bool put_token(mp_buf *b, uint32_t id, unsigned *next) {
    char text[32];
    if (id < 256) {
        spell_byte(id, next, text);
    } else if (id < FIRST_CONTROL) {
        const char *merge = merges[id - 256], *gap = strchr(merge, ' ');
        snprintf(text, sizeof text, "%.*s%s", (int)(gap - merge), merge, gap + 1);
    } else if (id < N_BUILT_IN) {
        snprintf(text, sizeof text, "%s", controls[id - FIRST_CONTROL]);
    } else {
        snprintf(text, sizeof text, "<|unused_%u|>", id - N_BUILT_IN);
    }
    return mp_synth_put_str(b, text);
}

static bool put_tokens(mp_buf *b, uint32_t n) {
    unsigned next = 0;
    bool ok = put_array(b, "tokenizer.ggml.tokens", MP_GGUF_STRING, n);
    for (uint32_t i = 0; ok && i < n; i++) ok = put_token(b, i, &next);
    ok = ok && put_array(b, "tokenizer.ggml.token_type", MP_GGUF_I32, n);
    for (uint32_t i = 0; ok && i < n; i++) {
        ok = mp_synth_put_u32(b, i < FIRST_CONTROL ? TOKEN_NORMAL : i < N_BUILT_IN ? TOKEN_CONTROL : TOKEN_UNUSED);
    }
    ok = ok && put_array(b, "tokenizer.ggml.merges", MP_GGUF_STRING, N_MERGES);
    for (uint32_t i = 0; ok && i < N_MERGES; i++) ok = mp_synth_put_str(b, merges[i]);
    return ok;
}

bool mp_synth_put_vocab(mp_buf *b, uint32_t n_vocab, const char *chat_template, uint64_t *n_keys, uint32_t *n_tokens) {
    static const struct {
        const char *key;
        uint32_t id;
    } ids[] = {
        { "tokenizer.ggml.bos_token_id", FIRST_CONTROL },
        { "tokenizer.ggml.eos_token_id", FIRST_CONTROL + 2 },
        { "tokenizer.ggml.padding_token_id", FIRST_CONTROL },
    };
    uint32_t n = n_vocab > N_BUILT_IN ? n_vocab : N_BUILT_IN;
    bool ok = mp_synth_put_key(b, "tokenizer.ggml.model", MP_GGUF_STRING) && mp_synth_put_str(b, "gpt2") &&
              mp_synth_put_key(b, "tokenizer.ggml.pre", MP_GGUF_STRING) && mp_synth_put_str(b, "smollm") &&
              put_tokens(b, n);
    for (size_t i = 0; ok && i < sizeof ids / sizeof *ids; i++) {
        ok = mp_synth_put_key(b, ids[i].key, MP_GGUF_U32) && mp_synth_put_u32(b, ids[i].id);
    }
    ok = ok && mp_synth_put_key(b, "tokenizer.ggml.add_bos_token", MP_GGUF_BOOL) && mp_buf_append(b, "", 1) &&
         mp_synth_put_key(b, "tokenizer.chat_template", MP_GGUF_STRING) &&
         mp_synth_put_str(b, chat_template ? chat_template : plain_chatml);
    *n_keys += 5 + sizeof ids / sizeof *ids + 2;
    *n_tokens = n;
    return ok;
}

mepic_status mp_synth_copy_vocab(mp_buf *b, const char *donor, uint64_t *n_keys, uint32_t *n_tokens, mepic_error *err) {
    mp_gguf *gguf;
    mepic_status status = mp_gguf_open(donor, &gguf, err);
    if (status != MEPIC_OK) return status;
    mp_gguf_array tokens = { 0 };
    status = mp_gguf_array_find(gguf, "tokenizer.ggml.tokens", MP_GGUF_STRING, &tokens, err);
    if (status == MEPIC_ERR_NOT_FOUND) {
        status = mp_fail(err, MEPIC_ERR_FORMAT, "%s has no vocabulary (key \"tokenizer.ggml.tokens\")", donor);
    }
    static const char prefix[] = "tokenizer.";
    mp_str key, raw;
    for (size_t i = 0; status == MEPIC_OK && mp_gguf_entry(gguf, i, &key, &raw); i++) {
        if (key.len < sizeof prefix - 1 || memcmp(key.data, prefix, sizeof prefix - 1) != 0) continue;
        if (!mp_buf_append(b, raw.data, raw.len)) status = mp_fail_nomem(err, "a vocabulary", raw.len);
        ++*n_keys;
    }
    if (status == MEPIC_OK) *n_tokens = (uint32_t)tokens.count;
    mp_gguf_close(gguf);
    return status;
}
