#include "twin.h"

#include <stdlib.h>
#include <string.h>

uint64_t twin_start(int32_t token, int32_t angle) {
    uint64_t h = ((uint64_t)(uint32_t)token << 32 | (uint32_t)angle) * 0x9e3779b97f4a7c15u;
    return (h ^ h >> 31) * 0xd6e8feb86659fd93u;
}

uint64_t twin_fold(uint64_t h, uint64_t value, int32_t distance) {
    h = (h ^ value ^ (uint64_t)(uint32_t)distance * 0xc2b2ae3d27d4eb4fu) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}

void twin_canonical_init(twin_canonical *c) {
    for (uint32_t i = 0; i < c->n; i++) {
        uint64_t h = twin_start(c->tokens[i], (int32_t)i);
        for (uint32_t k = 0; k < i; k++) h = twin_fold(h, c->values[k], (int32_t)(i - k));
        c->values[i] = h;
    }
}

void twin_doc_init(twin_doc *doc, const twin_canonical *c) {
    for (uint32_t i = 0; i < doc->n; i++) {
        uint32_t angle = c->n + i;
        uint64_t h = twin_start(doc->tokens[i], (int32_t)angle);
        for (uint32_t k = 0; k < c->n; k++) h = twin_fold(h, c->values[k], (int32_t)(angle - k));
        for (uint32_t k = 0; k < i; k++) h = twin_fold(h, doc->values[k], (int32_t)(i - k));
        doc->values[i] = h;
    }
}

static bool same_content(const twin_doc *a, const twin_doc *b) {
    return a->n == b->n && memcmp(a->tokens, b->tokens, a->n * sizeof *a->tokens) == 0;
}

twin_request *twin_request_open(const twin_rules *rules, const mp_request_spec *spec, const twin_doc *const *docs,
                                uint32_t max_tokens) {
    twin_request *r = calloc(1, sizeof *r);
    r->n_prompt = r->n_tokens = spec->n_tokens;
    r->cap = spec->n_tokens + max_tokens;
    r->tokens = calloc(r->cap, sizeof *r->tokens);
    r->shared_positions = calloc(r->n_prompt, sizeof *r->shared_positions);
    r->shared_values = calloc(r->n_prompt, sizeof *r->shared_values);
    r->positions = calloc(r->n_prompt, sizeof *r->positions);
    r->values = calloc(r->cap, sizeof *r->values);
    memcpy(r->tokens, spec->tokens, spec->n_tokens * sizeof *r->tokens);

    const uint16_t *mask = spec->page_masks;
    bool *shares = calloc(spec->n_spans, sizeof *shares);
    for (uint32_t s = 0; s < spec->n_spans; s++) {
        const mp_span *span = &spec->spans[s];
        uint32_t n_pages = (span->n + rules->page_size - 1) / rules->page_size;
        bool shared = docs[s] && span->kind == MEPIC_CHUNK && !span->no_cache && spec->reuse == MEPIC_REUSE_MEPIC &&
                      span->n >= 64 && n_pages <= rules->max_chunk_pages;
        uint32_t n_before = r->n_shared;
        for (uint32_t i = 0; i < span->n; i++) {
            bool linked = i < spec->link_tokens || (mask && mask[i / rules->page_size]);
            bool last_page =
                span->first + span->n == spec->n_tokens && i / rules->page_size == (span->n - 1) / rules->page_size;
            if (shared && !linked && !last_page) {
                r->shared_positions[r->n_shared] = span->first + i;
                r->shared_values[r->n_shared++] = docs[s]->values[i];
            } else {
                r->positions[r->n_private++] = span->first + i;
            }
        }
        if (mask && span->kind == MEPIC_CHUNK) mask += n_pages;
        shares[s] = r->n_shared > n_before;
        bool first = shares[s];
        for (uint32_t t = 0; first && t < s; t++) first = !(shares[t] && same_content(docs[s], docs[t]));
        if (first) r->n_pages_most += n_pages;
    }
    free(shares);
    r->n_pages_most += (r->n_private + max_tokens + rules->page_size - 1) / rules->page_size;
    return r;
}

void twin_request_close(twin_request *r) {
    if (!r) return;
    free(r->tokens);
    free(r->shared_positions);
    free(r->shared_values);
    free(r->positions);
    free(r->values);
    free(r);
}

void twin_request_append(twin_request *r, int32_t token) {
    r->tokens[r->n_tokens++] = token;
}

uint32_t twin_position(const twin_request *r, uint32_t index) {
    return index < r->n_private ? r->positions[index] : r->n_prompt + (index - r->n_private);
}

uint64_t twin_value(twin_request *r, uint32_t index) {
    for (; r->n_values <= index; r->n_values++) {
        uint32_t position = twin_position(r, r->n_values);
        uint64_t h = twin_start(r->tokens[position], (int32_t)position);
        for (uint32_t i = 0; i < r->n_shared && r->shared_positions[i] < position; i++)
            h = twin_fold(h, r->shared_values[i], (int32_t)(position - r->shared_positions[i]));
        for (uint32_t i = 0; i < r->n_values; i++)
            h = twin_fold(h, r->values[i], (int32_t)(position - twin_position(r, i)));
        r->values[r->n_values] = h;
    }
    return r->values[index];
}
