/* Admission and its reverse. A request is admitted when all pages of its prompt can be had at once, those of chunks
 * that it is the first to need included, with some left for the reply; it never waits for a page before it decodes. */
#include "schedule/state.h"

/* ---- Holding what is there --------------------------------------------------------------------------------------- */

static void hold_prefix(mp_scheduler *s, mp_request *r) {
    mp_stream *stream = &r->stream;
    int32_t tokens[MP_PAGE_TOKENS_MAX];
    /* At least one token is computed: there must be a row for the logits. */
    uint32_t most = r->policy->shares_prefix ? (mp_request_length(r) - 1) / s->config.page_size : 0;
    for (uint32_t i = 0; i < most; i++) {
        const mp_page_name *name = mp_request_name(s, r, i);
        mp_elements elements = mp_request_elements(s, r, i, tokens);
        mp_page parent = i ? stream->pages[i - 1] : MP_NONE;
        mp_page page = mp_index_find(&s->kv.index, MP_NODE_PREFIX, parent, &name->key, &elements);
        if (page == MP_NONE) break;
        mp_kv_hold(&s->kv, page);
        stream->pages[stream->n_pages++] = page;
    }
    stream->n_published = stream->n_pages;
    stream->n_done = stream->n_pages * s->config.page_size;
}

static mp_job *under_way(const mp_scheduler *s, const mp_request_chunk *chunk) {
    return (mp_job *)mp_residency_under_way(&s->residency, &chunk->job->chunk);
}

/* Holds every hit; returns the pages that are missing. */
static uint32_t hold_hits(mp_scheduler *s, mp_request *r) {
    uint32_t needed = 0;
    bool compiles = false;
    hold_prefix(s, r);
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        mp_request_chunk *chunk = &r->chunks[c];
        chunk->n_resident = 0;
        if (under_way(s, chunk)) continue;
        chunk->n_resident = chunk->n_pages = mp_residency_pages(&s->kv, &chunk->job->chunk, chunk->pages);
        for (uint32_t i = 0; i < chunk->n_pages; i++) mp_kv_hold(&s->kv, chunk->pages[i]);
        needed += chunk->job->chunk.n_pages - chunk->n_pages;
        compiles |= chunk->n_pages < chunk->job->chunk.n_pages;
    }
    if (compiles && s->canonical && s->canonical->stream.n_pages == 0) needed += s->canonical->chunk.n_pages;
    return needed + (mp_request_length(r) + s->config.page_size - 1) / s->config.page_size - r->stream.n_pages;
}

static void drop_pages(mp_scheduler *s, mp_request *r) {
    void (*drop)(mp_kv * kv, const mp_page *pages, uint32_t n) = r->failed ? mp_kv_discard_all : mp_kv_drop_all;
    drop(&s->kv, r->stream.pages, r->stream.n_pages);
    r->stream.n_pages = r->stream.n_done = r->stream.n_published = 0;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        drop(&s->kv, r->chunks[c].pages, r->chunks[c].n_pages);
        r->chunks[c].n_pages = 0;
    }
}

void mp_request_forget(mp_scheduler *s, mp_request *r) {
    hold_hits(s, r);
    drop_pages(s, r);
}

/* ---- Taking what is missing -------------------------------------------------------------------------------------- */

static void count_hits(mp_scheduler *s, const mp_request *r) {
    for (uint32_t i = 0; i < r->stream.n_pages; i++) mp_kv_hit(&s->kv, r->stream.pages[i]);
    s->stats.prefix_lookups += r->policy->shares_prefix;
    s->stats.prefix_hit_tokens += r->stream.n_done;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        const mp_request_chunk *chunk = &r->chunks[c];
        for (uint32_t i = 0; i < chunk->n_pages; i++) mp_kv_hit(&s->kv, chunk->pages[i]);
        s->stats.chunk_lookups++;
        s->stats.chunk_hits += chunk->n_pages == chunk->job->chunk.n_pages;
    }
}

/* The chunk's job gets the pages that are there and takes the others. */
static bool begin_job(mp_scheduler *s, mp_request_chunk *chunk) {
    mp_job *job = chunk->job;
    mp_stream *stream = &job->stream;
    for (uint32_t i = 0; i < chunk->n_pages; i++) stream->pages[i] = chunk->pages[i];
    if (!mp_kv_take(&s->kv, job->chunk.n_pages - chunk->n_pages, stream->pages + chunk->n_pages)) return false;
    stream->n_published = chunk->n_pages;
    stream->n_done = chunk->n_pages * s->config.page_size;
    stream->n_pages = job->chunk.n_pages;
    chunk->n_pages = 0;
    mp_job_begin(s, job);
    return true;
}

static bool take_missing(mp_scheduler *s, mp_request *r) {
    uint32_t n_pages = (mp_request_length(r) + s->config.page_size - 1) / s->config.page_size;
    if (!mp_kv_take(&s->kv, n_pages - r->stream.n_pages, r->stream.pages + r->stream.n_pages)) return false;
    r->stream.n_pages = n_pages;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        mp_request_chunk *chunk = &r->chunks[c];
        mp_job *job = under_way(s, chunk);
        if (!job && chunk->n_pages == chunk->job->chunk.n_pages) continue;
        if (!job) {
            if (!mp_canonical_take(s) || !begin_job(s, chunk)) return false;
            job = chunk->job;
        }
        mp_job_add_waiter(job, chunk);
    }
    return true;
}

/* All or nothing. */
static bool admit(mp_scheduler *s, mp_request *r) {
    if (!mp_invariant(s->fault, r->n_known == r->n_tokens, "a step's tokens are appended before the next but one"))
        return false;
    uint32_t page_size = s->config.page_size, length = mp_request_length(r);
    uint32_t left = r->max_tokens - (r->n_tokens - r->n_prompt);
    uint32_t reserve = left < MP_RESERVE_TOKENS ? left : MP_RESERVE_TOKENS;
    uint32_t reserve_pages = (length + reserve + page_size - 1) / page_size - (length + page_size - 1) / page_size;
    uint32_t needed = hold_hits(s, r) + reserve_pages;
    if (needed > mp_kv_room(&s->kv)) {
        drop_pages(s, r);
        return false;
    }
    count_hits(s, r);
    mp_request_account(r);
    if (!mp_invariant(s->fault, take_missing(s, r), "what was tested before admission can be taken")) return false;
    r->stream.seq = s->request_seqs.ids[--s->request_seqs.n];
    s->requests[r->stream.seq] = r;
    mp_request_list_remove(&s->queue, r);
    mp_request_list_insert(&s->running, r);
    r->state = MP_REQUEST_WAITING;
    if (r->n_waits == 0) mp_request_start(s, r);
    return true;
}

void mp_admit(mp_scheduler *s) {
    uint32_t looked_at = 0;
    for (mp_request *r = s->queue.first, *next; r && looked_at < MP_ADMISSION_WINDOW; r = next, looked_at++) {
        next = r->next;
        mp_request *head = s->queue.first;
        if (s->running.n == s->config.max_running || s->fault->broken) return;
        if (r != head && head->overtaken == MP_OVERTAKEN_MAX) return;
        if (r->tried && r->tried_at == s->n_releases) continue;
        if (!admit(s, r)) {
            r->tried = true;
            r->tried_at = s->n_releases;
        } else if (r != head) {
            head->overtaken++;
        }
    }
}

/* ---- Start and release ------------------------------------------------------------------------------------------- */

void mp_request_start(mp_scheduler *s, mp_request *r) {
    uint32_t n_canonical = s->canonical ? s->canonical->chunk.n_tokens : 0;
    for (uint32_t i = 0; i < r->layout.n_runs; i++) {
        const mp_layout_run *part = &r->layout.runs[i];
        const mp_request_chunk *chunk = &r->chunks[part->chunk];
        mp_run run = { .pages = chunk->pages,
                       .n_tokens = chunk->job->chunk.n_tokens,
                       .first = (int32_t)part->position,
                       .base = (int32_t)part->position - (int32_t)n_canonical,
                       .lo = part->lo,
                       .hi = part->hi,
                       .hidden = part->hidden };
        mp_plan_add_run(s->plan, r->stream.seq, &run);
    }
    mp_plan_extend(s->plan, r->stream.seq, r->stream.pages, r->stream.n_done);
    mp_plan_settle(s->plan, r->stream.seq);
    r->state = MP_REQUEST_PREFILL;
}

void mp_request_release(mp_scheduler *s, mp_request *r) {
    mp_plan_leave(s->plan, r->stream.seq);
    s->requests[r->stream.seq] = NULL;
    s->request_seqs.ids[s->request_seqs.n++] = r->stream.seq;
    r->stream.seq = MP_NONE;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        if (r->chunks[c].waits) mp_job_remove_waiter(s, &r->chunks[c]);
    }
    drop_pages(s, r);
    mp_request_list_remove(&s->running, r);
    s->n_releases++;
}

void mp_preempt(mp_scheduler *s, mp_request *r) {
    mp_request_release(s, r);
    r->state = MP_REQUEST_QUEUED;
    r->tried = false;
    r->usage.preemptions++;
    s->stats.preemptions++;
    mp_request_list_insert(&s->queue, r);
}
