#include "tokenizer/vocab.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "tokenizer/split.h"

/* ---- Texts ------------------------------------------------------------------------------------------------------- */

static bool same(mp_str a, const char *text, size_t len) {
    return a.len == len && memcmp(a.data, text, len) == 0;
}

/* The slot that holds `text`, or the empty one where it belongs. */
static size_t find_slot(const mp_vocab *vocab, const char *text, size_t len) {
    size_t slot = (size_t)mp_hash64(0, text, len) & vocab->slot_mask;
    while (vocab->slots[slot] && !same(vocab->texts[vocab->slots[slot] - 1], text, len)) {
        slot = (slot + 1) & vocab->slot_mask;
    }
    return slot;
}

int32_t mp_vocab_find(const mp_vocab *vocab, const char *text, size_t len) {
    if (len == 0 || len > vocab->longest) return -1;
    return (int32_t)vocab->slots[find_slot(vocab, text, len)] - 1;
}

int32_t mp_vocab_find_plain(const mp_vocab *vocab, const char *text, size_t len) {
    int32_t id = mp_vocab_find(vocab, text, len);
    if (id < 0) return -1;
    uint8_t type = vocab->types[id];
    return type == MP_TOKEN_CONTROL || type == MP_TOKEN_UNKNOWN || type == MP_TOKEN_BYTE ? -1 : id;
}

mp_str mp_vocab_bytes(const mp_vocab *vocab, int32_t id) {
    uint32_t from = vocab->bytes_at[id];
    return (mp_str){ vocab->bytes + from, vocab->bytes_at[id + 1] - from };
}

static mepic_status load_texts(const mp_gguf *gguf, mp_vocab *vocab, mepic_error *err) {
    mp_gguf_array array;
    mepic_status status = mp_gguf_array_find(gguf, "tokenizer.ggml.tokens", MP_GGUF_STRING, &array, err);
    if (status == MEPIC_ERR_NOT_FOUND) return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens is missing");
    if (status) return status;
    if (array.count == 0 || array.count > MP_VOCAB_MAX) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens has %zu entries; 1 to %d are possible",
                       array.count, MP_VOCAB_MAX);
    }
    vocab->n = (uint32_t)array.count;
    vocab->slot_mask = 1;
    while (vocab->slot_mask < 2 * array.count) vocab->slot_mask *= 2;
    vocab->texts = mp_calloc(vocab->n, sizeof *vocab->texts);
    vocab->slots = mp_calloc(vocab->slot_mask, sizeof *vocab->slots);
    vocab->slot_mask--;
    if (!vocab->texts || !vocab->slots) return mp_fail_nomem(err, "the vocabulary", vocab->n * sizeof *vocab->texts);

    size_t offset = 0;
    for (uint32_t id = 0; id < vocab->n && mp_gguf_array_str(&array, &offset, &vocab->texts[id]); id++) {
        mp_str text = vocab->texts[id];
        if (text.len > MP_TOKEN_TEXT_MAX) {
            return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens[%u] has %zu bytes; at most %d are possible",
                           id, text.len, MP_TOKEN_TEXT_MAX);
        }
        if (text.len == 0) continue; /* never found in text */
        if (text.len > vocab->longest) vocab->longest = (uint32_t)text.len;
        size_t slot = find_slot(vocab, text.data, text.len);
        if (!vocab->slots[slot]) vocab->slots[slot] = id + 1;
    }
    return MEPIC_OK;
}

/* An array with one element a token. *data is NULL when the key is not there. */
static mepic_status find_column(const mp_gguf *gguf, const char *key, mp_gguf_type type, uint32_t n,
                                const uint8_t **data, mepic_error *err) {
    mp_gguf_array array;
    mepic_error missing;
    mepic_status status = mp_gguf_array_find(gguf, key, type, &array, &missing);
    if (status == MEPIC_ERR_NOT_FOUND) {
        *data = NULL;
        return MEPIC_OK;
    }
    if (status) return mp_fail(err, status, "%s", missing.message);
    if (array.count != n) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s has %zu entries for %u tokens", key, array.count, n);
    }
    *data = array.data;
    return MEPIC_OK;
}

static mepic_status load_types(const mp_gguf *gguf, mp_vocab *vocab, mepic_error *err) {
    static const char key[] = "tokenizer.ggml.token_type";
    vocab->types = mp_alloc(vocab->n);
    vocab->ends = mp_calloc(vocab->n, sizeof *vocab->ends);
    if (!vocab->types || !vocab->ends) return mp_fail_nomem(err, "token types", vocab->n);
    memset(vocab->types, MP_TOKEN_NORMAL, vocab->n);
    const uint8_t *data;
    mepic_status status = find_column(gguf, key, MP_GGUF_I32, vocab->n, &data, err);
    if (status || !data) return status;
    for (uint32_t id = 0; id < vocab->n; id++) {
        int32_t type;
        memcpy(&type, data + 4 * (size_t)id, 4);
        if (type < MP_TOKEN_UNDEFINED || type > MP_TOKEN_BYTE) {
            return mp_fail(err, MEPIC_ERR_FORMAT, "%s[%u] is %d; 0 to 6 are possible", key, id, type);
        }
        vocab->types[id] = (uint8_t)type;
    }
    return MEPIC_OK;
}

static mepic_status load_scores(const mp_gguf *gguf, mp_vocab *vocab, mepic_error *err) {
    static const char key[] = "tokenizer.ggml.scores";
    const uint8_t *data;
    mepic_status status = find_column(gguf, key, MP_GGUF_F32, vocab->n, &data, err);
    if (status) return status;
    if (!data) return mp_fail(err, MEPIC_ERR_FORMAT, "%s is missing; SentencePiece merges by score", key);
    vocab->scores = mp_alloc(vocab->n * sizeof *vocab->scores);
    if (!vocab->scores) return mp_fail_nomem(err, "token scores", vocab->n * sizeof *vocab->scores);
    memcpy(vocab->scores, data, vocab->n * sizeof *vocab->scores);
    for (uint32_t id = 0; id < vocab->n; id++) {
        if (isnan(vocab->scores[id])) return mp_fail(err, MEPIC_ERR_FORMAT, "%s[%u] is not a number", key, id);
    }
    return MEPIC_OK;
}

/* ---- Roles of tokens --------------------------------------------------------------------------------------------- */

/* Tokens known by their text, whatever type the file gives them (often that of plain text): they are control tokens.
 * A reply ends at those of the first list: ends of turns and of documents, and the marks between files of fill-in-the-
 * middle models. */
/* clang-format off */
static const char *const ending[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>", "<turn|>",
    "<end_of_utterance>", "<\357\275\234end\342\226\201of\342\226\201sentence\357\275\234>", "<|fim_pad|>",
    "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
};
static const char *const not_ending[] = {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
    "<SUF>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>",
};
/* clang-format on */

static void mark_control(mp_vocab *vocab, const char *const *texts, size_t n, bool ends) {
    for (size_t i = 0; i < n; i++) {
        int32_t id = mp_vocab_find(vocab, texts[i], strlen(texts[i]));
        if (id < 0) continue;
        vocab->types[id] = MP_TOKEN_CONTROL;
        vocab->ends[id] = ends;
    }
}

static mepic_status find_id(const mp_gguf *gguf, const char *key, const mp_vocab *vocab, int32_t *id,
                            mepic_error *err) {
    uint32_t value;
    mepic_error missing;
    mepic_status status = mp_gguf_u32(gguf, key, &value, &missing);
    if (status == MEPIC_ERR_NOT_FOUND) {
        if (*id >= (int32_t)vocab->n) *id = -1;
        return MEPIC_OK;
    }
    if (status) return mp_fail(err, status, "%s", missing.message);
    if (value >= vocab->n) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s is %u; the vocabulary has %u tokens", key, value, vocab->n);
    }
    *id = (int32_t)value;
    return MEPIC_OK;
}

static mepic_status find_flag(const mp_gguf *gguf, const char *key, bool *flag, mepic_error *err) {
    mepic_error missing;
    mepic_status status = mp_gguf_bool(gguf, key, flag, &missing);
    if (status && status != MEPIC_ERR_NOT_FOUND) return mp_fail(err, status, "%s", missing.message);
    return MEPIC_OK;
}

static mepic_status load_roles(const mp_gguf *gguf, mp_vocab *vocab, mepic_error *err) {
    bool spm = vocab->model == MP_VOCAB_SPM; /* older files of this kind leave the usual values out */
    int32_t eot = -1, eom = -1;
    vocab->bos = spm ? 1 : -1;
    vocab->eos = spm ? 2 : -1;
    vocab->unk = spm ? 0 : -1;
    vocab->space_prefix = vocab->add_bos = spm;
    mp_str pre;
    if (!spm && mp_gguf_str(gguf, "tokenizer.ggml.pre", &pre, NULL) == MEPIC_OK) {
        const mp_split_family *family = mp_split_family_find(pre);
        vocab->add_bos = family && family->adds_bos;
    }
    mepic_status status;
    if ((status = find_id(gguf, "tokenizer.ggml.bos_token_id", vocab, &vocab->bos, err)) ||
        (status = find_id(gguf, "tokenizer.ggml.eos_token_id", vocab, &vocab->eos, err)) ||
        (status = find_id(gguf, "tokenizer.ggml.unknown_token_id", vocab, &vocab->unk, err)) ||
        (status = find_id(gguf, "tokenizer.ggml.eot_token_id", vocab, &eot, err)) ||
        (status = find_id(gguf, "tokenizer.ggml.eom_token_id", vocab, &eom, err)) ||
        (status = find_flag(gguf, "tokenizer.ggml.add_bos_token", &vocab->add_bos, err)) ||
        (status = find_flag(gguf, "tokenizer.ggml.add_space_prefix", &vocab->space_prefix, err))) {
        return status;
    }
    vocab->space_prefix = vocab->space_prefix && spm;
    if (vocab->add_bos && vocab->bos < 0) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.add_bos_token is set but bos_token_id is missing");
    }
    mark_control(vocab, ending, sizeof ending / sizeof ending[0], true);
    mark_control(vocab, not_ending, sizeof not_ending / sizeof not_ending[0], false);
    if (vocab->eos >= 0) vocab->ends[vocab->eos] = true;
    if (eot >= 0) vocab->ends[eot] = true;
    if (eom >= 0) vocab->ends[eom] = true;
    return MEPIC_OK;
}

/* ---- Bytes of tokens --------------------------------------------------------------------------------------------- */

/* The byte that "<0xHH>" stands for; -1: not of this form. */
static int parse_byte_token(mp_str text) {
    if (text.len != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>') return -1;
    int high = mp_hex_digit(text.data[3]), low = mp_hex_digit(text.data[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* Byte-level BPE: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on. */
static bool byte_is_itself(uint32_t byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

uint32_t mp_byte_symbol(uint8_t byte, char out[2]) {
    uint32_t c = byte;
    if (!byte_is_itself(byte)) {
        c = 0x100;
        for (uint32_t b = 0; b < byte; b++) c += !byte_is_itself(b);
    }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

/* The inverse over all characters of the alphabet, which end below U+0144; -1: not in it. */
enum { ALPHABET_END = 0x144 };
static void invert_alphabet(int16_t byte_of[ALPHABET_END]) {
    for (uint32_t c = 0; c < ALPHABET_END; c++) byte_of[c] = -1;
    for (uint32_t byte = 0; byte < 256; byte++) {
        char s[2];
        uint32_t len = mp_byte_symbol((uint8_t)byte, s);
        byte_of[len == 1 ? (uint8_t)s[0] : (uint32_t)(s[0] & 0x1F) << 6 | (s[1] & 0x3F)] = (int16_t)byte;
    }
}

/* Writes the bytes that a normal token stands for, at most text.len; returns how many. A character that is not in the
 * alphabet (an added token in plain text) stays as it is. */
static uint32_t decode_bpe(mp_str text, const int16_t byte_of[ALPHABET_END], char *out) {
    uint32_t n = 0;
    for (size_t i = 0; i < text.len; i++) {
        uint32_t c = (uint8_t)text.data[i];
        bool pair = (c & 0xE0) == 0xC0 && i + 1 < text.len && ((uint8_t)text.data[i + 1] & 0xC0) == 0x80;
        if (pair) c = (c & 0x1F) << 6 | ((uint8_t)text.data[i + 1] & 0x3F);
        if ((pair || c < 0x80) && c < ALPHABET_END && byte_of[c] >= 0) {
            out[n++] = (char)byte_of[c];
            i += pair;
        } else {
            out[n++] = text.data[i];
        }
    }
    return n;
}

static uint32_t decode_spm(mp_str text, char *out) {
    uint32_t n = 0;
    for (size_t i = 0; i < text.len;) {
        if (text.len - i >= 3 && memcmp(text.data + i, "\xe2\x96\x81", 3) == 0) {
            out[n++] = ' ';
            i += 3;
        } else {
            out[n++] = text.data[i++];
        }
    }
    return n;
}

static mepic_status load_bytes(mp_vocab *vocab, mepic_error *err) {
    size_t total = 0; /* at most 2^20 texts of 2^12 bytes: no overflow, and 32 bits hold it */
    for (uint32_t id = 0; id < vocab->n; id++) total += vocab->texts[id].len;
    if (total >= UINT32_MAX)
        return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens has %zu bytes of text", total);
    vocab->bytes = mp_alloc(total);
    vocab->bytes_at = mp_alloc(((size_t)vocab->n + 1) * sizeof *vocab->bytes_at);
    if (!vocab->bytes || !vocab->bytes_at) return mp_fail_nomem(err, "token bytes", total);
    int16_t byte_of[ALPHABET_END];
    invert_alphabet(byte_of);
    uint32_t at = 0;
    for (uint32_t id = 0; id < vocab->n; id++) {
        mp_str text = vocab->texts[id];
        vocab->bytes_at[id] = at;
        switch ((mp_token_type)vocab->types[id]) {
        case MP_TOKEN_NORMAL:
            at += vocab->model == MP_VOCAB_BPE ? decode_bpe(text, byte_of, vocab->bytes + at)
                                               : decode_spm(text, vocab->bytes + at);
            break;
        case MP_TOKEN_BYTE: {
            int byte = parse_byte_token(text);
            if (byte < 0) {
                return mp_fail(err, MEPIC_ERR_FORMAT,
                               "tokenizer.ggml.tokens[%u] is a byte token but \"%.*s\" is not of the form <0x0A>", id,
                               (int)(text.len < 32 ? text.len : 32), text.data);
            }
            vocab->bytes[at++] = (char)byte;
            break;
        }
        case MP_TOKEN_UNKNOWN:
        case MP_TOKEN_CONTROL:
        case MP_TOKEN_USER_DEFINED:
            memcpy(vocab->bytes + at, text.data, text.len);
            at += (uint32_t)text.len;
            break;
        case MP_TOKEN_UNDEFINED:
        case MP_TOKEN_UNUSED: break; /* never shown */
        }
    }
    vocab->bytes_at[vocab->n] = at;
    return MEPIC_OK;
}

static void find_byte_ids(mp_vocab *vocab) {
    static const char hex[] = "0123456789ABCDEF";
    for (uint32_t byte = 0; byte < 256; byte++) {
        char symbol[6] = { '<', '0', 'x', hex[byte >> 4], hex[byte & 15], '>' };
        int32_t id = -1;
        if (vocab->model == MP_VOCAB_SPM) {
            id = mp_vocab_find(vocab, symbol, sizeof symbol);
            symbol[0] = (char)byte;
            if (id < 0) id = mp_vocab_find_plain(vocab, symbol, 1);
            if (id < 0) id = vocab->unk;
        } else {
            id = mp_vocab_find_plain(vocab, symbol, mp_byte_symbol((uint8_t)byte, symbol));
        }
        vocab->byte_ids[byte] = id;
    }
}

/* ---- Special tokens ---------------------------------------------------------------------------------------------- */

static int compare_texts(mp_str a, mp_str b) {
    int order = memcmp(a.data, b.data, a.len < b.len ? a.len : b.len);
    return order ? order : (a.len > b.len) - (a.len < b.len);
}

typedef struct special_key {
    mp_str text;
    int32_t id;
} special_key;

static int compare_specials(const void *a, const void *b) {
    return compare_texts(((const special_key *)a)->text, ((const special_key *)b)->text);
}

static bool is_special(const mp_vocab *vocab, int32_t id, bool controls) {
    uint8_t type = vocab->types[id];
    return type == MP_TOKEN_USER_DEFINED || (controls && (type == MP_TOKEN_CONTROL || type == MP_TOKEN_UNKNOWN));
}

static mepic_status load_specials(mp_vocab *vocab, mepic_error *err) {
    uint32_t n = 0;
    for (uint32_t id = 0; id < vocab->n; id++) n += is_special(vocab, (int32_t)id, true);
    special_key *keys = mp_alloc(n * sizeof *keys);
    vocab->special = mp_alloc(n * sizeof *vocab->special);
    if (!keys || !vocab->special) {
        mp_free(keys);
        return mp_fail_nomem(err, "special tokens", n * sizeof *keys);
    }
    n = 0;
    for (uint32_t id = 0; id < vocab->n; id++) {
        mp_str text = vocab->texts[id];
        if (!is_special(vocab, (int32_t)id, true)) continue;
        if (mp_vocab_find(vocab, text.data, text.len) != (int32_t)id) continue; /* empty, or the same text again */
        keys[n++] = (special_key){ text, (int32_t)id };
        for (int controls = 0; controls < 2; controls++) {
            if (is_special(vocab, (int32_t)id, controls)) vocab->begins_special[controls][(uint8_t)text.data[0]] = true;
        }
    }
    qsort(keys, n, sizeof *keys, compare_specials);
    for (uint32_t i = 0; i < n; i++) {
        vocab->special[i] = keys[i].id;
        vocab->special_from[(uint8_t)keys[i].text.data[0] + 1] = i + 1;
    }
    for (uint32_t c = 0; c < 256; c++) {
        if (vocab->special_from[c + 1] < vocab->special_from[c]) vocab->special_from[c + 1] = vocab->special_from[c];
    }
    mp_free(keys);
    return MEPIC_OK;
}

/* The first of special[lo, hi), which agree before byte `at`, whose byte `at` is not below `byte`. */
static uint32_t lower_bound(const mp_vocab *vocab, uint32_t lo, uint32_t hi, size_t at, uint32_t byte) {
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if ((uint8_t)vocab->texts[vocab->special[mid]].data[at] < byte) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo;
}

int32_t mp_vocab_special(const mp_vocab *vocab, const char *text, size_t len, bool controls, size_t *match) {
    if (len == 0 || !vocab->begins_special[controls][(uint8_t)text[0]]) return -1;
    uint32_t lo = vocab->special_from[(uint8_t)text[0]], hi = vocab->special_from[(uint8_t)text[0] + 1];
    int32_t found = -1;
    for (size_t at = 1; lo < hi; at++) { /* special[lo, hi): those that begin with text[0, at) */
        int32_t id = vocab->special[lo];
        if (vocab->texts[id].len == at) {
            if (is_special(vocab, id, controls)) {
                found = id;
                *match = at;
            }
            lo++;
        }
        if (at == len) break;
        uint32_t byte = (uint8_t)text[at];
        lo = lower_bound(vocab, lo, hi, at, byte);
        hi = lower_bound(vocab, lo, hi, at, byte + 1);
    }
    return found;
}

/* ---- Open and clear ---------------------------------------------------------------------------------------------- */

mepic_status mp_vocab_open(const mp_gguf *gguf, mp_vocab *out, mepic_error *err) {
    mp_vocab vocab = { 0 };
    mp_str model;
    mepic_status status = mp_gguf_str(gguf, "tokenizer.ggml.model", &model, err);
    if (status == MEPIC_ERR_NOT_FOUND) return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.model is missing");
    if (status) return status;
    if (same(model, "gpt2", 4)) {
        vocab.model = MP_VOCAB_BPE;
    } else if (same(model, "llama", 5)) {
        vocab.model = MP_VOCAB_SPM;
    } else {
        return mp_fail(
            err, MEPIC_ERR_UNSUPPORTED,
            "tokenizer.ggml.model \"%.*s\" is not supported; gpt2 (byte-level BPE) and llama (SentencePiece) are",
            (int)(model.len < 64 ? model.len : 64), model.data);
    }
    if ((status = load_texts(gguf, &vocab, err)) || (status = load_types(gguf, &vocab, err)) ||
        (vocab.model == MP_VOCAB_SPM && (status = load_scores(gguf, &vocab, err))) ||
        (status = load_roles(gguf, &vocab, err)) || (status = load_bytes(&vocab, err)) ||
        (status = load_specials(&vocab, err))) {
        mp_vocab_clear(&vocab);
        return status;
    }
    find_byte_ids(&vocab);
    *out = vocab;
    return MEPIC_OK;
}

void mp_vocab_clear(mp_vocab *vocab) {
    mp_free(vocab->texts);
    mp_free(vocab->types);
    mp_free(vocab->ends);
    mp_free(vocab->scores);
    mp_free(vocab->bytes);
    mp_free(vocab->bytes_at);
    mp_free(vocab->slots);
    mp_free(vocab->special);
    *vocab = (mp_vocab){ 0 };
}
