#include "cache/segment.h"

#include <string.h>

#include "base/mem.h"

static uint32_t pages_of(const mp_segment_input *in, uint32_t n_tokens) {
    return (n_tokens + in->page_size - 1) / in->page_size;
}

static mepic_status check_spans(const mp_segment_input *in, uint32_t *n_chunks, uint32_t *n_chunk_pages,
                                mepic_error *err) {
    uint32_t at = 0;
    for (uint32_t i = 0; i < in->n_spans; i++) {
        const mp_span *span = &in->spans[i];
        if (span->first != at || span->n > in->n_tokens - at)
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "span %u covers tokens %u to %u, expected it to start at %u of %u",
                           i, span->first, span->first + span->n, at, in->n_tokens);
        at += span->n;
        if (span->kind != MEPIC_CHUNK) continue;
        ++*n_chunks;
        *n_chunk_pages += pages_of(in, span->n);
    }
    if (at != in->n_tokens || at == 0)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "the spans cover %u of the prompt's %u tokens", at, in->n_tokens);
    return MEPIC_OK;
}

/* Whether the span is read in canonical form; else its tokens are text. */
static bool is_shared(const mp_segment_input *in, const mp_span *span, mp_layout *layout) {
    if (span->kind != MEPIC_CHUNK || span->no_cache || !in->policy->shares_chunks) return false;
    if (span->n >= MP_CHUNK_TOKENS_MIN && pages_of(in, span->n) <= in->max_chunk_pages) return true;
    layout->n_demoted += span->n > 0;
    return false;
}

static void add_private(mp_layout *layout, uint32_t position, bool linked) {
    layout->stream[layout->n_stream++] = (mp_stream_token){ .position = position & INT32_MAX, .linked = linked };
}

static uint32_t find_chunk(const mp_segment_input *in, mp_layout *layout, const mp_span *span) {
    for (uint32_t c = 0; c < layout->n_chunks; c++) {
        const mp_layout_chunk *chunk = &layout->chunks[c];
        const int32_t *tokens = in->tokens + chunk->first;
        if (chunk->common != span->common) continue;
        if (chunk->n == span->n && memcmp(tokens, in->tokens + span->first, span->n * sizeof *tokens) == 0) return c;
    }
    layout->chunks[layout->n_chunks] = (mp_layout_chunk){ .first = span->first, .n = span->n, .common = span->common };
    return layout->n_chunks++;
}

/* Lays out a shared chunk. `hidden`: its page mask or NULL. */
static void add_chunk(const mp_segment_input *in, mp_layout *layout, const mp_span *span, const uint16_t *hidden) {
    mp_layout_run run = { .position = span->first, .lo = in->link_tokens, .hi = span->n, .hidden = hidden };
    if (span->first + span->n == in->n_tokens) run.hi = (span->n - 1) / in->page_size * in->page_size;
    for (uint32_t i = 0; i < span->n; i++) {
        bool shared = run.lo <= i && i < run.hi && !(hidden && hidden[i / in->page_size]);
        if (!shared) {
            add_private(layout, span->first + i, true);
        } else if (run.n_shared++ == 0) {
            run.place = layout->n_stream;
        }
    }
    if (run.n_shared == 0) return;
    run.chunk = find_chunk(in, layout, span);
    layout->runs[layout->n_runs++] = run;
}

mepic_status mp_segment(const mp_segment_input *input, mp_layout *out, mepic_error *err) {
    uint32_t n_chunks = 0, n_chunk_pages = 0;
    mepic_status status = check_spans(input, &n_chunks, &n_chunk_pages, err);
    if (status != MEPIC_OK) return status;
    mp_layout layout = { 0 };
    layout.stream = mp_calloc(input->n_tokens, sizeof *layout.stream);
    layout.runs = mp_calloc(n_chunks, sizeof *layout.runs);
    layout.chunks = mp_calloc(n_chunks, sizeof *layout.chunks);
    if (input->page_masks) layout.masks = mp_calloc(n_chunk_pages, sizeof *layout.masks);
    if (!layout.stream || !layout.runs || !layout.chunks || (input->page_masks && !layout.masks)) {
        mp_layout_free(&layout);
        return mp_fail_nomem(err, "a prompt's layout", input->n_tokens * sizeof *layout.stream);
    }
    if (input->page_masks && n_chunk_pages)
        memcpy(layout.masks, input->page_masks, n_chunk_pages * sizeof *layout.masks);

    uint32_t mask_at = 0;
    for (uint32_t i = 0; i < input->n_spans; i++) {
        const mp_span *span = &input->spans[i];
        if (is_shared(input, span, &layout)) {
            add_chunk(input, &layout, span, layout.masks ? layout.masks + mask_at : NULL);
        } else {
            for (uint32_t t = 0; t < span->n; t++) add_private(&layout, span->first + t, false);
        }
        if (span->kind == MEPIC_CHUNK) mask_at += pages_of(input, span->n);
    }
    *out = layout;
    return MEPIC_OK;
}

void mp_layout_free(mp_layout *layout) {
    mp_free(layout->stream);
    mp_free(layout->runs);
    mp_free(layout->chunks);
    mp_free(layout->masks);
    memset(layout, 0, sizeof *layout);
}
