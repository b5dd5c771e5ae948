#include "schedule/jobs.h"

#include <string.h>

#include "base/mem.h"
#include "schedule/state.h"

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

mp_job *mp_job_open(const int32_t *tokens, uint32_t n, uint32_t page_size, uint32_t angle) {
    uint32_t n_pages = (n + page_size - 1) / page_size;
    /* One block: the job, its keys, its tokens, its pages. */
    size_t keys_at = sizeof(mp_job), tokens_at = keys_at + n_pages * sizeof(mp_digest);
    size_t pages_at = tokens_at + n * sizeof *tokens;
    uint8_t *block = mp_alloc(pages_at + n_pages * sizeof(mp_page));
    if (!block) return NULL;
    memcpy(block + tokens_at, tokens, n * sizeof *tokens);
    mp_job *job = (mp_job *)block;
    *job = (mp_job){
        .chunk = { .n_tokens = n,
                   .n_pages = n_pages,
                   .tokens = (const int32_t *)(block + tokens_at),
                   .keys = (const mp_digest *)(block + keys_at) },
        .holders = 1,
        .angle = angle,
        .stream = { .pages = (mp_page *)(block + pages_at), .seq = MP_NONE },
    };
    return job;
}

mp_digest *mp_job_keys(mp_job *job) {
    return (mp_digest *)(job + 1);
}

void mp_job_let_go(mp_job *job) {
    if (job && --job->holders == 0) mp_free(job);
}

/* ---- The canonical context --------------------------------------------------------------------------------------- */

bool mp_canonical_ready(const mp_scheduler *s) {
    return !s->canonical || s->canonical->stream.n_done == s->canonical->chunk.n_tokens;
}

mp_digest mp_canonical_root(const mp_scheduler *s, const mp_digest *scope) {
    const mp_job *job = s->canonical;
    return mp_key_canonical_root(s->sha, &s->config.model, scope, job ? job->chunk.tokens : NULL,
                                 job ? job->chunk.n_tokens : 0);
}

bool mp_canonical_take(mp_scheduler *s) {
    mp_job *job = s->canonical;
    if (!job || job->stream.n_pages > 0) return true;
    if (!mp_kv_take(&s->kv, job->chunk.n_pages, job->stream.pages)) return false;
    job->stream.n_pages = job->chunk.n_pages;
    return true;
}

/* ---- Waiters ----------------------------------------------------------------------------------------------------- */

void mp_job_add_waiter(mp_job *job, mp_request_chunk *waiter) {
    waiter->waits = job;
    waiter->prev = NULL;
    waiter->next = job->waiters;
    if (waiter->next) waiter->next->prev = waiter;
    job->waiters = waiter;
    waiter->request->n_waits++;
}

static void unlink_waiter(mp_request_chunk *waiter) {
    mp_job *job = waiter->waits;
    // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): it waits for this job
    *(waiter->prev ? &waiter->prev->next : &job->waiters) = waiter->next;
    if (waiter->next) waiter->next->prev = waiter->prev;
    waiter->waits = NULL;
    waiter->next = waiter->prev = NULL;
    waiter->request->n_waits--;
}

/* ---- Beginning and end ------------------------------------------------------------------------------------------- */

void mp_job_begin(mp_scheduler *s, mp_job *job) {
    job->holders++;
    job->under_way = true;
    job->next = NULL;
    job->prev = s->jobs.last;
    *(job->prev ? &job->prev->next : &s->jobs.first) = job;
    s->jobs.last = job;
    mp_residency_begin(&s->residency, &job->chunk);
}

/* The job is over, complete or not: what it published is in the cache, the rest of its pages is free. */
static void leave(mp_scheduler *s, mp_job *job) {
    mp_stream *stream = &job->stream;
    if (stream->seq != MP_NONE) {
        mp_plan_leave(s->plan, stream->seq);
        s->by_seq[stream->seq - s->config.max_running] = NULL;
        s->job_seqs.ids[s->job_seqs.n++] = stream->seq;
        stream->seq = MP_NONE;
    }
    mp_kv_drop_all(&s->kv, stream->pages, stream->n_pages);
    stream->n_pages = stream->n_done = stream->n_published = 0;
    mp_residency_end(&s->residency, &job->chunk);
    *(job->next ? &job->next->prev : &s->jobs.last) = job->prev;
    *(job->prev ? &job->prev->next : &s->jobs.first) = job->next;
    job->next = job->prev = NULL;
    job->under_way = false;
    mp_job_let_go(job);
}

void mp_job_remove_waiter(mp_scheduler *s, mp_request_chunk *waiter) {
    mp_job *job = waiter->waits;
    unlink_waiter(waiter);
    if (!job->waiters) leave(s, job);
}

static void end(mp_scheduler *s, mp_job *job) {
    mp_stream *stream = &job->stream;
    mp_kv_mark_terminal(&s->kv, stream->pages[stream->n_pages - 1]);
    while (job->waiters) {
        mp_request_chunk *waiter = job->waiters;
        unlink_waiter(waiter);
        for (uint32_t i = 0; i < stream->n_pages; i++) {
            waiter->pages[i] = stream->pages[i];
            mp_kv_hold(&s->kv, stream->pages[i]);
        }
        waiter->n_pages = stream->n_pages;
        if (waiter->request->n_waits == 0) mp_request_start(s, waiter->request);
    }
    s->stats.compiles++;
    leave(s, job);
}

/* ---- Work -------------------------------------------------------------------------------------------------------- */

static void join_plan(mp_scheduler *s, mp_job *job) {
    job->stream.seq = s->job_seqs.ids[--s->job_seqs.n];
    s->by_seq[job->stream.seq - s->config.max_running] = job;
    const mp_job *canonical = s->canonical;
    if (canonical && job != canonical) {
        mp_run run = { .pages = canonical->stream.pages,
                       .n_tokens = canonical->chunk.n_tokens,
                       .hi = canonical->chunk.n_tokens };
        mp_plan_add_run(s->plan, job->stream.seq, &run);
    }
    mp_plan_extend(s->plan, job->stream.seq, job->stream.pages, job->stream.n_done);
    mp_plan_settle(s->plan, job->stream.seq);
}

/* At a page boundary: pages that another job has published since are taken over. */
static void adopt(mp_scheduler *s, mp_job *job) {
    mp_stream *stream = &job->stream;
    uint32_t page_size = s->config.page_size, before = stream->n_done;
    while (stream->n_done < job->chunk.n_tokens && stream->n_done % page_size == 0) {
        uint32_t i = stream->n_done / page_size;
        mp_page page = mp_residency_page(&s->kv, &job->chunk, i, i ? stream->pages[i - 1] : MP_NONE);
        if (page == MP_NONE) break;
        mp_kv_hold(&s->kv, page);
        mp_kv_drop(&s->kv, stream->pages[i]);
        stream->pages[i] = page;
        stream->n_published = i + 1;
        uint32_t left = job->chunk.n_tokens - stream->n_done;
        stream->n_done += left < page_size ? left : page_size;
    }
    if (stream->n_done == before) return;
    s->n_releases++;
    mp_plan_extend(s->plan, stream->seq, stream->pages, stream->n_done);
    mp_plan_settle(s->plan, stream->seq);
}

void mp_jobs_prepare(mp_scheduler *s) {
    if (!s->jobs.first) return;
    if (!mp_canonical_ready(s)) {
        if (s->canonical->stream.seq == MP_NONE) join_plan(s, s->canonical);
        return;
    }
    for (mp_job *job = s->jobs.first, *next; job; job = next) {
        next = job->next;
        if (job->stream.seq == MP_NONE && s->job_seqs.n == 0) return;
        if (job->stream.seq == MP_NONE) join_plan(s, job);
        adopt(s, job);
        if (job->stream.n_done == job->chunk.n_tokens) end(s, job);
    }
}

static void commit_canonical(mp_scheduler *s) {
    mp_stream *stream = &s->canonical->stream;
    if (!mp_canonical_ready(s)) return;
    mp_plan_leave(s->plan, stream->seq);
    s->by_seq[stream->seq - s->config.max_running] = NULL;
    s->job_seqs.ids[s->job_seqs.n++] = stream->seq;
    stream->seq = MP_NONE;
}

void mp_job_commit(mp_scheduler *s, mp_job *job, uint32_t n_rows) {
    mp_stream *stream = &job->stream;
    stream->n_done += n_rows;
    if (job == s->canonical) {
        commit_canonical(s);
        return;
    }
    uint32_t page_size = s->config.page_size;
    for (uint32_t i = stream->n_published; i < job->chunk.n_pages; i++) {
        uint32_t left = job->chunk.n_tokens - i * page_size;
        uint32_t n = left < page_size ? left : page_size;
        if (i * page_size + n > stream->n_done) break;
        mp_elements elements = { .tokens = job->chunk.tokens + i * page_size, .n_tokens = n };
        mp_stream_publish(s, stream, i, MP_NODE_CHUNK, &job->chunk.keys[i], &elements);
    }
    mp_plan_settle(s->plan, stream->seq);
    if (stream->n_done == job->chunk.n_tokens) end(s, job);
}
