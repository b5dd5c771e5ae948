/* Segmentation: a prompt's spans become the layout of a sequence (docs/ARCHITECTURE.md, section 5).
 *
 *   prompt      text   | chunk A                       | text | chunk B            |
 *   position    0      5                               40     44                  61
 *   private     xxxxx    aaaa                            xxxx   bbbb          bbbbb
 *   shared               ....AAAAAAAAAAAAAAAAAAAAAAAAAA         ....BBBBBBBBBB.....
 *                        └ linked                  B ends the prompt: its last page is private ┘
 *
 * Every prompt token is private (computed in the request, in position order) or shared (read from the chunk's canonical
 * pages); positions are those of the plain prompt. A chunk that is too short, too long or not to be cached is text; of
 * a chunk that is linked as a whole nothing is shared, so it is no run. Pure function of its input; any thread. */
#ifndef MEPIC_CACHE_SEGMENT_H
#define MEPIC_CACHE_SEGMENT_H

#include "cache/policy.h"

#define MP_CHUNK_TOKENS_MIN 64u

/* A part of a prompt's tokens. Parts cover the prompt in order. */
typedef struct mp_span {
    mepic_segment_kind kind;
    uint32_t first, n;
    bool no_cache, common;
} mp_span;

typedef struct mp_segment_input {
    const int32_t *tokens;
    uint32_t n_tokens;
    const mp_span *spans;
    uint32_t n_spans;
    const mp_policy *policy;
    uint32_t link_tokens;
    const uint16_t *page_masks; /* [pages of the CHUNK spans, in order] nonzero: the page is private; NULL: none */
    uint32_t page_size;
    uint32_t max_chunk_pages;
} mp_segment_input;

/* A prompt token of the private stream. */
typedef struct mp_stream_token {
    uint32_t position : 31;
    uint32_t linked : 1; /* part of a chunk */
} mp_stream_token;

/* A chunk of the prompt; equal chunks of a scope are one. */
typedef struct mp_layout_chunk {
    uint32_t first, n; /* in the prompt's tokens */
    bool common;       /* of the common scope, not the request's */
} mp_layout_chunk;

/* One use of a chunk. Token i is shared when lo <= i < hi and its page is not hidden. */
typedef struct mp_layout_run {
    uint32_t chunk;    /* in layout.chunks */
    uint32_t position; /* of the chunk's token 0 */
    uint32_t lo, hi;
    uint32_t n_shared;
    uint32_t place;         /* stream index of the first private token behind the first shared one */
    const uint16_t *hidden; /* [pages of the chunk]; NULL: no page is */
} mp_layout_run;

typedef struct mp_layout {
    mp_stream_token *stream; /* [n_stream] by position */
    uint32_t n_stream;
    mp_layout_run *runs; /* [n_runs] by position */
    uint32_t n_runs;
    mp_layout_chunk *chunks; /* [n_chunks] by first use */
    uint32_t n_chunks;
    uint16_t *masks;    /* owned copy behind the runs' `hidden` */
    uint32_t n_demoted; /* chunks that became text: too short or too long */
} mp_layout;

/* ERR_ARGUMENT: the spans do not cover the prompt. ERR_NOMEM. */
mepic_status mp_segment(const mp_segment_input *input, mp_layout *out, mepic_error *err);
void mp_layout_free(mp_layout *layout); /* a zeroed layout is a no-op */

#endif
