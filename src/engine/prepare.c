/* Text to tokens: what any thread may do with an engine. Reads the model's tokenizer and chat template, which never
 * change after open. */
#include <limits.h>
#include <string.h>

#include "base/mem.h"
#include "engine/engine.h"
#include "engine/options.h"

mepic_status mepic_tokenize(const mepic_engine *engine, const char *text, size_t len, bool parse_special, int32_t *out,
                            size_t cap, size_t *n, mepic_error *err) {
    if (!text && len > 0) return mp_fail(err, MEPIC_ERR_ARGUMENT, "text is NULL but len is %zu", len);
    mp_tokens tokens = { 0 };
    mepic_status st = mp_tokenize(engine->tokenizer, text, len, false, parse_special, &tokens, err);
    if (st == MEPIC_OK) {
        size_t copied = tokens.n < cap ? tokens.n : cap;
        if (copied > 0) memcpy(out, tokens.ids, copied * sizeof *out);
        *n = tokens.n;
    }
    mp_free(tokens.ids);
    return st;
}

static mepic_status check_ids(const mepic_engine *engine, const char *what, const int32_t *ids, size_t n,
                              mepic_error *err) {
    uint32_t n_vocab = engine->model->hp.n_vocab;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= n_vocab) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s[%zu] is %d; the vocabulary has %u tokens", what, i, ids[i],
                           n_vocab);
        }
    }
    return MEPIC_OK;
}

mepic_status mepic_detokenize(const mepic_engine *engine, const int32_t *ids, size_t n_ids, char *out, size_t cap,
                              size_t *n, mepic_error *err) {
    mepic_status st = check_ids(engine, "ids", ids, n_ids, err);
    if (st != MEPIC_OK) return st;
    size_t total = 0;
    for (size_t i = 0; i < n_ids; i++) {
        mp_str bytes = mp_tokenizer_bytes(engine->tokenizer, ids[i], true);
        size_t room = total < cap ? cap - total : 0;
        if (room > 0 && bytes.len > 0) memcpy(out + total, bytes.data, bytes.len < room ? bytes.len : room);
        total += bytes.len;
    }
    *n = total;
    return MEPIC_OK;
}

/* ---- Prompts ----------------------------------------------------------------------------------------------------- */

static mepic_status push_ids(mp_tokens *tokens, const int32_t *ids, size_t n, mepic_error *err) {
    if (n == 0) return MEPIC_OK;
    if (n > tokens->cap - tokens->n) {
        size_t cap, bytes;
        if (!mp_add_size(tokens->n, n, &cap) || !mp_mul_size(cap, sizeof *ids, &bytes)) {
            return mp_fail_nomem(err, "a prompt's tokens", SIZE_MAX);
        }
        int32_t *grown = mp_realloc(tokens->ids, bytes);
        if (!grown) return mp_fail_nomem(err, "a prompt's tokens", bytes);
        tokens->ids = grown;
        tokens->cap = cap;
    }
    memcpy(tokens->ids + tokens->n, ids, n * sizeof *ids);
    tokens->n += n;
    return MEPIC_OK;
}

/* Covers the tokens from `first` on by a span such as `kind`; text that follows text is one span. */
static mepic_status push_span(mepic_prepared *p, mp_span kind, size_t first, mepic_error *err) {
    if (p->tokens.n > INT32_MAX) {
        return mp_fail(err, MEPIC_ERR_TOO_LONG, "the prompt has %zu tokens; no context is longer than %d", p->tokens.n,
                       INT32_MAX);
    }
    uint32_t n = (uint32_t)(p->tokens.n - first);
    if (n == 0) return MEPIC_OK;
    mp_span *last = p->n_spans ? &p->spans[p->n_spans - 1] : NULL;
    if (kind.kind == MEPIC_TEXT && last && last->kind == MEPIC_TEXT) {
        last->n += n;
        return MEPIC_OK;
    }
    if (p->n_spans == p->cap_spans) {
        uint32_t cap = p->cap_spans ? 2 * p->cap_spans : 16;
        mp_span *grown = mp_realloc(p->spans, cap * sizeof *grown);
        if (!grown) return mp_fail_nomem(err, "a prompt's spans", cap * sizeof *grown);
        p->spans = grown;
        p->cap_spans = cap;
    }
    // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): there is room: cap_spans > n_spans
    p->spans[p->n_spans] = kind;
    p->spans[p->n_spans].first = (uint32_t)first;
    p->spans[p->n_spans++].n = n;
    return MEPIC_OK;
}

/* text: what to take of the segment; special: with what the model puts in front of a text (BOS, a space). */
static mepic_status push_segment(mepic_prepared *p, const mepic_segment *segment, mp_str text, bool special,
                                 mepic_error *err) {
    size_t first = p->tokens.n;
    mepic_status st;
    if (segment->tokens) {
        st = check_ids(p->engine, "tokens", segment->tokens, segment->n_tokens, err);
        if (st == MEPIC_OK) st = push_ids(&p->tokens, segment->tokens, segment->n_tokens, err);
    } else {
        st = mp_tokenize(p->engine->tokenizer, text.data, text.len, special, segment->parse_special, &p->tokens, err);
    }
    const mp_span kind = { .kind = segment->kind, .no_cache = segment->no_cache, .common = segment->common };
    return st == MEPIC_OK ? push_span(p, kind, first, err) : st;
}

static mepic_status push_bos(mepic_prepared *p, mepic_error *err) {
    int32_t bos = mp_tokenizer_bos(p->engine->tokenizer);
    if (!mp_tokenizer_adds_bos(p->engine->tokenizer) || bos < 0) return MEPIC_OK;
    mepic_status st = push_ids(&p->tokens, &bos, 1, err);
    return st == MEPIC_OK ? push_span(p, (mp_span){ .kind = MEPIC_TEXT }, p->tokens.n - 1, err) : st;
}

static mepic_status check_segment(const mepic_segment *segment, mepic_error *err) {
    if (segment->kind != MEPIC_TEXT && segment->kind != MEPIC_CHUNK) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "segment.kind is %d; it must be MEPIC_TEXT or MEPIC_CHUNK",
                       (int)segment->kind);
    }
    if (!segment->tokens && !segment->text && segment->len > 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "segment.text is NULL but len is %zu", segment->len);
    }
    return MEPIC_OK;
}

static mepic_status prepare_segments(mepic_prepared *p, const mepic_prompt *prompt, mepic_error *err) {
    if (!prompt->segments && prompt->n_segments > 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "n_segments is %zu but segments is NULL", prompt->n_segments);
    }
    mepic_status st = MEPIC_OK;
    for (size_t i = 0; i < prompt->n_segments && st == MEPIC_OK; i++) {
        const mepic_segment *segment = &prompt->segments[i];
        st = check_segment(segment, err);
        if (st != MEPIC_OK) break;
        /* A chunk is tokenized the same wherever it stands, so what opens a text stands before it. */
        bool opens = i == 0 && !prompt->no_bos, plain = segment->kind == MEPIC_TEXT && !segment->tokens;
        if (opens && !plain) st = push_bos(p, err);
        if (st == MEPIC_OK) st = push_segment(p, segment, (mp_str){ segment->text, segment->len }, opens && plain, err);
    }
    return st;
}

static mepic_status prepare_messages(mepic_prepared *p, const mepic_prompt *prompt, mepic_error *err) {
    for (size_t i = 0; i < prompt->n_messages; i++) {
        const mepic_message *message = &prompt->messages[i];
        if (!message->role || (!message->parts && message->n_parts > 0)) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "messages[%zu] has no %s", i, message->role ? "parts" : "role");
        }
        for (size_t k = 0; k < message->n_calls; k++) {
            if (message->calls && message->calls[k].name && message->calls[k].arguments) continue;
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "messages[%zu].calls[%zu] has no name or no arguments", i, k);
        }
        for (size_t k = 0; k < message->n_parts; k++) {
            mepic_status st = check_segment(&message->parts[k], err);
            if (st != MEPIC_OK) return st;
        }
    }
    for (size_t i = 0; i < prompt->n_tools; i++) {
        if (prompt->tools && prompt->tools[i]) continue;
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "tools[%zu] is NULL", i);
    }
    mp_pieces pieces = { 0 };
    const mp_chat chat = { prompt->messages, prompt->n_messages, prompt->tools, prompt->n_tools };
    mepic_status st = mp_chat_render(&p->engine->chat, &chat, true, &pieces, err);
    if (st != MEPIC_OK) return st;
    st = push_bos(p, err);
    for (size_t i = 0; i < pieces.n && st == MEPIC_OK; i++) {
        static const mepic_segment literal = { .kind = MEPIC_TEXT, .parse_special = true };
        const mp_piece *piece = &pieces.items[i];
        st = push_segment(p, piece->kind == MP_PIECE_TEMPLATE ? &literal : piece->part, piece->text, false, err);
    }
    mp_pieces_clear(&pieces);
    return st;
}

mepic_status mepic_prepare(const mepic_engine *engine, const mepic_prompt *prompt, mepic_prepared **out,
                           mepic_error *err) {
    mepic_prompt in;
    size_t least = offsetof(mepic_prompt, no_bos);
    mepic_status st = mp_options_copy(prompt, least, &in, sizeof in, "mepic_prompt", err);
    if (st != MEPIC_OK) return st;
    mepic_prepared *p = mp_calloc(1, sizeof *p);
    if (!p) return mp_fail_nomem(err, "a prompt", sizeof *p);
    p->engine = engine;
    st = in.n_messages > 0 ? prepare_messages(p, &in, err) : prepare_segments(p, &in, err);
    if (st == MEPIC_OK && (p->tokens.n == 0 || in.n_messages + in.n_segments == 0)) {
        st = mp_fail(err, MEPIC_ERR_ARGUMENT, "the prompt is empty; give it at least one message or segment with text");
    }
    if (st != MEPIC_OK) {
        mepic_prepared_free(p);
        return st;
    }
    *out = p;
    return MEPIC_OK;
}

void mepic_prepared_free(mepic_prepared *prepared) {
    if (!prepared) return;
    mp_free(prepared->spans);
    mp_free(prepared->tokens.ids);
    mp_free(prepared);
}

const int32_t *mepic_prepared_tokens(const mepic_prepared *prepared, size_t *n) {
    *n = prepared->tokens.n;
    return prepared->tokens.ids;
}
