#include "tokenizer/bpe.h"

#include <string.h>

/* ---- Merges ------------------------------------------------------------------------------------------------------ */

/* The slot of a pair, or the empty one where it belongs. */
static mp_bpe_merge *find_merge(const mp_bpe *bpe, int32_t left, int32_t right) {
    uint64_t hash = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    size_t slot = (size_t)(hash >> 32) & bpe->mask;
    while (bpe->merges[slot].left >= 0 && (bpe->merges[slot].left != left || bpe->merges[slot].right != right)) {
        slot = (slot + 1) & bpe->mask;
    }
    return &bpe->merges[slot];
}

/* "left right" in the file; the parts and what they become must be tokens for the merge to count. */
static void add_merge(mp_bpe *bpe, mp_str line, uint32_t rank) {
    const char *space = line.len > 1 ? memchr(line.data + 1, ' ', line.len - 1) : NULL;
    if (!space || line.len > MP_TOKEN_TEXT_MAX) return;
    size_t n_left = (size_t)(space - line.data), n_right = line.len - n_left - 1;
    char joined[MP_TOKEN_TEXT_MAX];
    memcpy(joined, line.data, n_left);
    memcpy(joined + n_left, space + 1, n_right);
    int32_t left = mp_vocab_find_plain(bpe->vocab, line.data, n_left);
    int32_t right = mp_vocab_find_plain(bpe->vocab, space + 1, n_right);
    int32_t id = mp_vocab_find_plain(bpe->vocab, joined, n_left + n_right);
    if (left < 0 || right < 0 || id < 0) return;
    mp_bpe_merge *slot = find_merge(bpe, left, right);
    if (slot->left < 0) *slot = (mp_bpe_merge){ left, right, id, rank }; /* of equal merges the first counts */
}

static mepic_status load_merges(const mp_gguf *gguf, mp_bpe *bpe, mepic_error *err) {
    mp_gguf_array array;
    mepic_status status = mp_gguf_array_find(gguf, "tokenizer.ggml.merges", MP_GGUF_STRING, &array, err);
    if (status == MEPIC_ERR_NOT_FOUND) return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.merges is missing");
    if (status) return status;
    if (array.count > MP_MERGES_MAX) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "tokenizer.ggml.merges has %zu entries; at most %d are possible",
                       array.count, MP_MERGES_MAX);
    }
    size_t slots = 1;
    while (slots < 2 * array.count + 1) slots *= 2;
    bpe->merges = mp_alloc(slots * sizeof *bpe->merges);
    if (!bpe->merges) return mp_fail_nomem(err, "the merge table", slots * sizeof *bpe->merges);
    bpe->mask = slots - 1;
    memset(bpe->merges, 0xFF, slots * sizeof *bpe->merges); /* all empty */
    size_t offset = 0;
    mp_str line;
    for (uint32_t rank = 0; mp_gguf_array_str(&array, &offset, &line); rank++) add_merge(bpe, line, rank);
    return MEPIC_OK;
}

static bool pair(const void *ctx, const mp_symbol *left, const mp_symbol *right, uint32_t *rank, int32_t *id) {
    if (left->id < 0 || right->id < 0) return false;
    const mp_bpe_merge *merge = find_merge(ctx, left->id, right->id);
    *rank = merge->rank;
    *id = merge->id;
    return merge->left >= 0;
}

/* ---- Words ------------------------------------------------------------------------------------------------------- */

typedef struct bpe_run {
    const mp_bpe *bpe;
    mp_merger *merger;
    mp_tokens *out;
} bpe_run;

/* The token whose text is the whole word; -1: none. */
static int32_t find_word(const mp_vocab *vocab, const char *word, size_t len) {
    if (len > vocab->longest) return -1;
    char text[2 * MP_TOKEN_TEXT_MAX];
    size_t n = 0;
    for (size_t i = 0; i < len; i++) n += mp_byte_symbol((uint8_t)word[i], text + n);
    return mp_vocab_find_plain(vocab, text, n);
}

static bool tokenize_word(void *ctx, const char *word, size_t len) {
    const bpe_run *run = ctx;
    const mp_bpe *bpe = run->bpe;
    if (bpe->family->whole_words) {
        int32_t id = find_word(bpe->vocab, word, len);
        if (id >= 0) return mp_tokens_push(run->out, id);
    }
    mp_merger_begin(run->merger);
    for (size_t i = 0; i < len; i++) {
        if (!mp_merger_add(run->merger, bpe->vocab->byte_ids[(uint8_t)word[i]], (uint32_t)i, 1)) return false;
    }
    if (!mp_merger_run(run->merger, pair, bpe)) return false;
    const mp_symbol *symbols = run->merger->symbols;
    for (int32_t i = 0; i >= 0; i = symbols[i].next) {
        if (symbols[i].id >= 0 && !mp_tokens_push(run->out, symbols[i].id)) return false;
    }
    return true;
}

bool mp_bpe_tokenize(const mp_bpe *bpe, mp_merger *merger, const char *text, size_t len, mp_tokens *out) {
    bpe_run run = { bpe, merger, out };
    return mp_split_run(bpe->split, text, len, tokenize_word, &run);
}

/* ---- Open and clear ---------------------------------------------------------------------------------------------- */

mepic_status mp_bpe_open(const mp_gguf *gguf, const mp_vocab *vocab, mp_bpe *out, mepic_error *err) {
    mp_str pre = { "default", 7 }; /* what a file without the key was made for */
    mepic_error missing;
    mepic_status status = mp_gguf_str(gguf, "tokenizer.ggml.pre", &pre, &missing);
    if (status && status != MEPIC_ERR_NOT_FOUND) return mp_fail(err, status, "%s", missing.message);
    mp_bpe bpe = { .vocab = vocab, .family = mp_split_family_find(pre) };
    if (!bpe.family) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "tokenizer.ggml.pre \"%.*s\" is not supported; these are: %s",
                       (int)(pre.len < 64 ? pre.len : 64), pre.data, mp_split_family_list());
    }
    if ((status = mp_split_open(bpe.family, &bpe.split, err)) || (status = load_merges(gguf, &bpe, err))) {
        mp_bpe_clear(&bpe);
        return status;
    }
    *out = bpe;
    return MEPIC_OK;
}

void mp_bpe_clear(mp_bpe *bpe) {
    mp_split_close(bpe->split);
    mp_free(bpe->merges);
    *bpe = (mp_bpe){ 0 };
}
