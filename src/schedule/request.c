#include "schedule/request.h"

#include <string.h>

#include "base/mem.h"
#include "schedule/state.h"

static uint32_t pages_for(const mp_scheduler *s, uint32_t n_tokens) {
    return (n_tokens + s->config.page_size - 1) / s->config.page_size;
}

/* ---- Opening ----------------------------------------------------------------------------------------------------- */

static mepic_status check_spec(const mp_scheduler *s, const mp_request_spec *spec, mepic_error *err) {
    if (spec->n_tokens == 0) return mp_fail(err, MEPIC_ERR_ARGUMENT, "the prompt is empty");
    if (!mp_policy_find(spec->reuse))
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "reuse %d is not a policy of this engine", (int)spec->reuse);
    if (spec->n_tokens >= s->config.context)
        return mp_fail(err, MEPIC_ERR_TOO_LONG,
                       "the prompt has %u tokens and leaves no room for a reply in the context of %u; shorten it%s",
                       spec->n_tokens, s->config.context, s->config.longer ? s->config.longer : "");
    return MEPIC_OK;
}

static mepic_status lay_out(const mp_scheduler *s, const mp_request_spec *spec, mp_request *r, mepic_error *err) {
    mp_segment_input input = {
        .tokens = spec->tokens,
        .n_tokens = spec->n_tokens,
        .spans = spec->spans,
        .n_spans = spec->n_spans,
        .policy = r->policy,
        .link_tokens = spec->link_tokens,
        .page_masks = spec->page_masks,
        .page_size = s->config.page_size,
        .max_chunk_pages = s->config.n_pages / 8,
    };
    return mp_segment(&input, &r->layout, err);
}

/* The longest reply: what is asked for, as far as the context reaches; else as far as the pool reaches. */
static mepic_status limit_reply(const mp_scheduler *s, const mp_request_spec *spec, mp_request *r, mepic_error *err) {
    uint32_t n_chunk_pages = 0, n_canonical = s->canonical ? s->canonical->chunk.n_pages : 0;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) n_chunk_pages += pages_for(s, r->layout.chunks[c].n);
    uint32_t left = s->config.context - spec->n_tokens;
    r->max_tokens = spec->max_tokens && spec->max_tokens < left ? spec->max_tokens : left;
    uint32_t n_stream = pages_for(s, r->layout.n_stream + r->max_tokens);
    uint64_t needed = (uint64_t)n_stream + n_chunk_pages + n_canonical;
    if (needed <= s->config.n_pages) return MEPIC_OK;
    uint64_t spare = (uint64_t)s->config.n_pages * s->config.page_size;
    uint64_t fixed = ((uint64_t)n_chunk_pages + n_canonical) * s->config.page_size + r->layout.n_stream;
    if (spec->max_tokens == 0 && fixed < spare) {
        r->max_tokens = (uint32_t)(spare - fixed);
        return MEPIC_OK;
    }
    return mp_fail(
        err, MEPIC_ERR_TOO_LONG,
        "a prompt of %u tokens with a reply of up to %u needs %llu pages (%u of its own, %u of chunks, %u of the "
        "canonical context), the pool has %u; shorten it or raise the number of pages",
        spec->n_tokens, r->max_tokens, (unsigned long long)needed, n_stream, n_chunk_pages, n_canonical,
        s->config.n_pages);
}

static bool allocate(const mp_scheduler *s, mp_request *r) {
    size_t n_tokens = (size_t)r->n_prompt + r->max_tokens;
    uint32_t n_pages = pages_for(s, r->layout.n_stream + r->max_tokens);
    r->tokens = mp_alloc(n_tokens * sizeof *r->tokens);
    r->names = mp_alloc(n_pages * sizeof *r->names);
    r->stream.pages = mp_alloc(n_pages * sizeof *r->stream.pages);
    r->chunks = mp_calloc(r->layout.n_chunks, sizeof *r->chunks);
    return r->tokens && r->names && r->stream.pages && r->chunks;
}

static bool open_chunks(mp_scheduler *s, const mp_request_spec *spec, mp_request *r) {
    uint32_t n_canonical = s->canonical ? s->canonical->chunk.n_tokens : 0;
    mp_digest own = mp_canonical_root(s, &spec->scope), common = own;
    bool has_common = false;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        const mp_layout_chunk *part = &r->layout.chunks[c];
        mp_request_chunk *chunk = &r->chunks[c];
        chunk->request = r;
        chunk->job = mp_job_open(spec->tokens + part->first, part->n, s->config.page_size, n_canonical);
        chunk->pages = mp_alloc(pages_for(s, part->n) * sizeof *chunk->pages);
        if (!chunk->job || !chunk->pages) return false;
        if (part->common && !has_common) common = mp_canonical_root(s, &spec->common_scope);
        has_common = has_common || part->common;
        mp_key_chunk(s->sha, part->common ? &common : &own, chunk->job->chunk.tokens, part->n, s->config.page_size,
                     mp_job_keys(chunk->job));
    }
    return true;
}

mepic_status mp_request_open(mp_scheduler *s, const mp_request_spec *spec, mp_request **out, mepic_error *err) {
    mepic_status status = check_spec(s, spec, err);
    if (status != MEPIC_OK) return status;
    mp_request *r = mp_calloc(1, sizeof *r);
    if (!r) return mp_fail_nomem(err, "a request", sizeof *r);
    r->policy = mp_policy_find(spec->reuse);
    r->n_prompt = r->n_tokens = r->n_known = spec->n_tokens;
    r->logits_of_prompt = spec->logits_of_prompt;
    r->user = spec->user;
    r->page_size = s->config.page_size;
    r->stream.seq = MP_NONE;
    status = lay_out(s, spec, r, err);
    if (status == MEPIC_OK) status = limit_reply(s, spec, r, err);
    if (status == MEPIC_OK && !(allocate(s, r) && open_chunks(s, spec, r)))
        status = mp_fail_nomem(err, "a request", ((size_t)r->n_prompt + r->max_tokens) * sizeof *r->tokens);
    if (status != MEPIC_OK) {
        mp_request_close(r);
        return status;
    }
    memcpy(r->tokens, spec->tokens, spec->n_tokens * sizeof *r->tokens);
    r->prefix_root = mp_key_prefix_root(s->sha, &s->config.model, &spec->scope, spec->reuse);
    r->usage.prompt_tokens = r->n_prompt;
    *out = r;
    return MEPIC_OK;
}

void mp_request_close(mp_request *r) {
    if (!r) return;
    for (uint32_t c = 0; r->chunks && c < r->layout.n_chunks; c++) {
        mp_job_let_go(r->chunks[c].job);
        mp_free(r->chunks[c].pages);
    }
    mp_layout_free(&r->layout);
    mp_free(r->tokens);
    mp_free(r->names);
    mp_free(r->stream.pages);
    mp_free(r->chunks);
    mp_free(r);
}

/* ---- The stream -------------------------------------------------------------------------------------------------- */

uint32_t mp_request_length(const mp_request *r) {
    return r->layout.n_stream + (r->n_tokens - r->n_prompt);
}

uint32_t mp_request_known(const mp_request *r) {
    return r->layout.n_stream + (r->n_known - r->n_prompt);
}

uint32_t mp_request_position(const mp_request *r, uint32_t index) {
    return index < r->layout.n_stream ? r->layout.stream[index].position : r->n_prompt + (index - r->layout.n_stream);
}

static mp_digest name_refs(mp_scheduler *s, mp_request *r, uint32_t page) {
    mp_digest refs = { { 0 } };
    uint32_t first = page * s->config.page_size;
    for (; r->next_ref < r->layout.n_runs; r->next_ref++) {
        const mp_layout_run *run = &r->layout.runs[r->next_ref];
        if (run->place >= first + s->config.page_size) break;
        const mp_chunk *chunk = &r->chunks[run->chunk].job->chunk;
        mp_chunk_ref ref = { .identity = chunk->keys[chunk->n_pages - 1],
                             .slot = run->place - first,
                             .lo = run->lo,
                             .hi = run->hi,
                             .hidden = run->hidden,
                             .n_pages = chunk->n_pages };
        refs = mp_key_add_ref(s->sha, &refs, &ref);
    }
    return refs;
}

static void gather(const mp_scheduler *s, const mp_request *r, uint32_t page, int32_t *tokens) {
    uint32_t first = page * s->config.page_size;
    for (uint32_t i = 0; i < s->config.page_size; i++) tokens[i] = r->tokens[mp_request_position(r, first + i)];
}

const mp_page_name *mp_request_name(mp_scheduler *s, mp_request *r, uint32_t page) {
    int32_t tokens[MP_PAGE_TOKENS_MAX];
    for (; r->n_names <= page; r->n_names++) {
        mp_page_name *name = &r->names[r->n_names];
        name->refs = name_refs(s, r, r->n_names);
        gather(s, r, r->n_names, tokens);
        mp_elements elements = { .tokens = tokens, .n_tokens = s->config.page_size, .refs = name->refs };
        name->key = mp_key_next(s->sha, r->n_names ? &r->names[r->n_names - 1].key : &r->prefix_root, &elements);
    }
    return &r->names[page];
}

mp_elements mp_request_elements(const mp_scheduler *s, const mp_request *r, uint32_t page, int32_t *tokens) {
    gather(s, r, page, tokens);
    return (mp_elements){ .tokens = tokens, .n_tokens = s->config.page_size, .refs = r->names[page].refs };
}

/* ---- Accounting -------------------------------------------------------------------------------------------------- */

/* Shared tokens of the run in the chunk's pages [0, n_pages). */
static uint32_t shared_in(uint32_t page_size, const mp_layout_run *run, uint32_t n_pages) {
    uint32_t n = 0;
    for (uint32_t p = run->lo / page_size; p < n_pages && p * page_size < run->hi; p++) {
        if (run->hidden && run->hidden[p]) continue;
        uint32_t lo = run->lo > p * page_size ? run->lo : p * page_size;
        uint32_t hi = run->hi < (p + 1) * page_size ? run->hi : (p + 1) * page_size;
        n += hi - lo;
    }
    return n;
}

void mp_request_account(mp_request *r) {
    if (r->accounted) return; /* what a preempted request computes again is not the prompt's price */
    r->accounted = true;
    mepic_usage *usage = &r->usage;
    usage->prefix_tokens = r->stream.n_done;
    for (uint32_t i = r->stream.n_done; i < r->layout.n_stream; i++) {
        usage->linked_tokens += r->layout.stream[i].linked;
        usage->computed_tokens += !r->layout.stream[i].linked;
    }
    for (uint32_t i = 0; i < r->layout.n_runs; i++) {
        const mp_layout_run *run = &r->layout.runs[i];
        uint32_t n = shared_in(r->page_size, run, r->chunks[run->chunk].n_resident);
        usage->chunk_tokens += n;
        usage->compiled_tokens += run->n_shared - n;
    }
}

/* Pages of chunk c that an earlier chunk of the request holds as well: versions of a document share their beginning. */
static uint32_t pages_in_common(const mp_request *r, uint32_t c) {
    uint32_t most = 0;
    for (uint32_t d = 0; d < c; d++) {
        const mp_request_chunk *a = &r->chunks[d], *b = &r->chunks[c];
        uint32_t n = 0;
        while (n < a->n_pages && n < b->n_pages && a->pages[n] == b->pages[n]) n++;
        if (n > most) most = n;
    }
    return most;
}

void mp_request_usage(const mp_request *r, mepic_usage *out) {
    /* A page that was taken for tokens which may never come does not count. */
    uint32_t n_pages = (mp_request_known(r) + r->page_size - 1) / r->page_size;
    *out = r->usage;
    out->completion_tokens = r->n_known - r->n_prompt;
    out->pages_unshared = (r->n_known + r->page_size - 1) / r->page_size;
    out->pages_held = r->stream.n_pages < n_pages ? r->stream.n_pages : n_pages;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) out->pages_held += r->chunks[c].n_pages - pages_in_common(r, c);
}

/* ---- Lists ------------------------------------------------------------------------------------------------------- */

void mp_request_list_insert(mp_request_list *list, mp_request *r) {
    mp_request *before = list->last;
    while (before && before->id > r->id) before = before->prev;
    r->prev = before;
    r->next = before ? before->next : list->first;
    *(r->next ? &r->next->prev : &list->last) = r;
    *(before ? &before->next : &list->first) = r;
    list->n++;
}

void mp_request_list_remove(mp_request_list *list, mp_request *r) {
    *(r->next ? &r->next->prev : &list->last) = r->prev;
    *(r->prev ? &r->prev->next : &list->first) = r->next;
    r->next = r->prev = NULL;
    list->n--;
}
