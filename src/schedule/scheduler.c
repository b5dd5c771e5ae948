#include "schedule/scheduler.h"

#include <string.h>

#include "base/mem.h"
#include "schedule/state.h"

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static mepic_status check_config(const mp_scheduler_config *c, mepic_error *err) {
    bool power = (c->page_size & (c->page_size - 1)) == 0;
    if (!power || c->page_size < 16 || c->page_size > MP_PAGE_TOKENS_MAX)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "page_size %u is not 16, 32, 64 or 128", c->page_size);
    power = (c->cell_tokens & (c->cell_tokens - 1)) == 0;
    if (!power || c->cell_tokens < MP_PAGE_TOKENS_MAX || c->cell_tokens > MP_CELL_TOKENS_MAX)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "cell_tokens %u is not a power of two from %u to %u", c->cell_tokens,
                       MP_PAGE_TOKENS_MAX, MP_CELL_TOKENS_MAX);
    if (c->n_pages == 0 || c->n_pages > INT32_MAX)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "pages %u is not between 1 and %d", c->n_pages, INT32_MAX);
    if (c->context < 2 || c->context > (1u << 30))
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "context %u is not between 2 and %u", c->context, 1u << 30);
    if (c->max_running == 0 || c->max_jobs == 0 || c->max_queued == 0 || c->step_tokens == 0)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "max_running, max_jobs, max_queued and step_tokens must be at least 1");
    if (c->max_running > 65536 || c->max_jobs > 65536)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "max_running and max_jobs must be at most 65536");
    if ((uint64_t)c->n_canonical > (uint64_t)c->n_pages / 2 * c->page_size)
        return mp_fail(err, MEPIC_ERR_ARGUMENT,
                       "the canonical context has %u tokens, more than half of the pool of %u pages; raise the pages",
                       c->n_canonical, c->n_pages);
    return MEPIC_OK;
}

/* Cells one sequence can have. A request: shared and private tokens are at most the context, every chunk and the stream
 * may end in a cell that is not full; a chunk's linked tokens may stand in cells of its shared run as well. A job: the
 * canonical context and a chunk. */
uint32_t mp_scheduler_max_refs(const mp_scheduler_config *c) {
    uint32_t of_request = 2 * (c->context / c->cell_tokens) + c->context / MP_CHUNK_TOKENS_MIN + 2;
    uint32_t of_job = c->n_canonical / c->cell_tokens + c->context / c->cell_tokens + 2;
    return of_request > of_job ? of_request : of_job;
}

static bool open_seqs(mp_seq_stack *stack, uint32_t first, uint32_t n) {
    stack->ids = mp_alloc(n * sizeof *stack->ids);
    if (!stack->ids) return false;
    for (stack->n = 0; stack->n < n; stack->n++) stack->ids[stack->n] = first + n - 1 - stack->n;
    return true;
}

static bool open_spoiling(mp_scheduler *s) {
    if (!s->config.spoil_freed) return true;
    s->spoil_pages = mp_calloc(s->config.n_pages, sizeof *s->spoil_pages);
    s->written = mp_calloc(s->config.n_pages, sizeof *s->written);
    return s->spoil_pages && s->written;
}

static mepic_status open_tables(mp_scheduler *s, mepic_error *err) {
    const mp_scheduler_config *c = &s->config;
    s->sha = mp_sha256_open();
    s->requests = mp_calloc(c->max_running, sizeof(mp_request *));
    s->by_seq = mp_calloc(c->max_jobs, sizeof(mp_job *));
    s->rows = mp_calloc(c->step_tokens, sizeof *s->rows);
    s->zero_pages = mp_calloc(c->step_tokens, sizeof *s->zero_pages);
    bool ok = s->sha && s->requests && s->by_seq && s->rows && s->zero_pages && open_spoiling(s) &&
              open_seqs(&s->request_seqs, 0, c->max_running) && open_seqs(&s->job_seqs, c->max_running, c->max_jobs);
    if (ok && c->n_canonical > 0) {
        s->canonical = mp_job_open(c->canonical, c->n_canonical, c->page_size, 0);
        ok = s->canonical != NULL;
    }
    return ok ? MEPIC_OK : mp_fail_nomem(err, "the scheduler's tables", c->step_tokens * sizeof *s->rows);
}

mepic_status mp_scheduler_open(const mp_scheduler_config *config, mp_scheduler **out, mepic_error *err) {
    mepic_status status = check_config(config, err);
    if (status != MEPIC_OK) return status;
    mp_scheduler *s = mp_calloc(1, sizeof *s);
    if (!s) return mp_fail_nomem(err, "the scheduler", sizeof *s);
    s->config = *config;
    s->fault = config->fault;
    mp_plan_config plan = { .page_size = config->page_size,
                            .cell_tokens = config->cell_tokens,
                            .n_pages = config->n_pages,
                            .max_seqs = config->max_running + config->max_jobs,
                            .max_refs = mp_scheduler_max_refs(config),
                            .fault = config->fault };
    status = open_tables(s, err);
    s->config.canonical = NULL; /* the canonical job has its own copy */
    if (status == MEPIC_OK)
        status = mp_kv_open(config->n_pages, config->page_size, config->eviction, config->fault, &s->kv, err);
    if (status == MEPIC_OK) status = mp_residency_open(config->n_pages, &s->residency, err);
    if (status == MEPIC_OK) status = mp_plan_open(&plan, &s->plan, err);
    if (status != MEPIC_OK) {
        mp_scheduler_close(s);
        return status;
    }
    *out = s;
    return MEPIC_OK;
}

void mp_scheduler_close(mp_scheduler *s) {
    if (!s) return;
    s->in_step = false;
    while (s->running.first) mp_scheduler_finish(s, s->running.first);
    while (s->queue.first) mp_scheduler_finish(s, s->queue.first);
    mp_job_let_go(s->canonical);
    mp_plan_close(s->plan);
    mp_residency_close(&s->residency);
    mp_kv_close(&s->kv);
    mp_sha256_close(s->sha);
    mp_free(s->requests);
    mp_free(s->by_seq);
    mp_free(s->request_seqs.ids);
    mp_free(s->job_seqs.ids);
    mp_free(s->rows);
    mp_free(s->zero_pages);
    mp_free(s->spoil_pages);
    mp_free(s->written);
    mp_free(s);
}

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

mepic_status mp_scheduler_submit(mp_scheduler *s, const mp_request_spec *spec, mp_request **out, mepic_error *err) {
    if (s->fault->broken)
        return mp_fail(err, MEPIC_ERR_BROKEN, "the scheduler is broken: not true that %s", s->fault->what);
    if (s->queue.n >= s->config.max_queued)
        return mp_fail(err, MEPIC_ERR_BUSY, "%u requests are queued already; try again later", s->queue.n);
    mp_request *r;
    mepic_status status = mp_request_open(s, spec, &r, err);
    if (status != MEPIC_OK) return status;
    r->id = s->next_id++;
    s->stats.short_chunks += r->layout.n_demoted;
    mp_request_list_insert(&s->queue, r);
    *out = r;
    return MEPIC_OK;
}

mp_request *mp_scheduler_request(const mp_scheduler *s, uint32_t seq) {
    return seq < s->config.max_running ? s->requests[seq] : NULL;
}

void mp_scheduler_append(mp_scheduler *s, mp_request *r, int32_t token) {
    bool ok = r->n_known < r->n_tokens && !s->in_step;
    if (!mp_invariant(s->fault, ok, "a token is appended after the row it is sampled from")) return;
    if (r->stream.n_done > mp_request_known(r)) s->stats.rows_decode++; /* its row was no waste */
    r->tokens[r->n_known++] = token;
    mp_request_publish(s, r);
}

void mp_scheduler_finish(mp_scheduler *s, mp_request *r) {
    if (!mp_invariant(s->fault, !s->in_step, "a request ends between two steps")) return;
    if (r->state == MP_REQUEST_QUEUED) {
        mp_request_list_remove(&s->queue, r);
    } else {
        mp_request_release(s, r);
    }
    mp_request_close(r);
}

void mp_scheduler_fail(mp_scheduler *s, mp_request *r) {
    r->failed = true;
    /* A step may be planned, and preempt, before it is known what the last one computed. */
    if (r->state == MP_REQUEST_QUEUED && r->usage.preemptions > 0) mp_request_forget(s, r);
    mp_scheduler_finish(s, r);
}

bool mp_scheduler_busy(const mp_scheduler *s) {
    return s->queue.n > 0 || s->running.n > 0;
}

void *mp_request_user(const mp_request *r) {
    return r->user;
}

uint32_t mp_request_max_tokens(const mp_request *r) {
    return r->max_tokens;
}

const int32_t *mp_request_tokens(const mp_request *r, uint32_t *n, uint32_t *n_prompt) {
    *n = r->n_known;
    *n_prompt = r->n_prompt;
    return r->tokens;
}

/* ---- The canonical context --------------------------------------------------------------------------------------- */

bool mp_scheduler_canonical_take(mp_scheduler *s) {
    return s->canonical && mp_canonical_take(s);
}

void mp_scheduler_canonical_loaded(mp_scheduler *s) {
    mp_job *job = s->canonical;
    bool ok = job && job->stream.n_pages > 0 && job->stream.n_done == 0 && job->stream.seq == MP_NONE;
    if (!mp_invariant(s->fault, ok, "the canonical context is loaded into pages nobody has written")) return;
    for (uint32_t i = 0; i < job->chunk.n_tokens; i++)
        mp_pool_write(&s->kv.pool, job->stream.pages[i / s->config.page_size], i % s->config.page_size);
    job->stream.n_done = job->chunk.n_tokens;
}

const mp_page *mp_scheduler_canonical_pages(const mp_scheduler *s, uint32_t *n, bool *ready) {
    *n = s->canonical ? s->canonical->stream.n_pages : 0;
    *ready = s->canonical && mp_canonical_ready(s);
    return *n ? s->canonical->stream.pages : NULL;
}

/* ---- State ------------------------------------------------------------------------------------------------------- */

void mp_scheduler_stats(const mp_scheduler *s, mepic_stats *out) {
    const mepic_stats *c = &s->stats;
    uint32_t n_canonical = s->canonical ? s->canonical->stream.n_pages : 0;
    out->pages_total = s->config.n_pages;
    out->pages_free = s->kv.pool.n_free;
    out->pages_referenced = s->kv.pool.n_referenced - n_canonical;
    out->pages_prefix = s->kv.n_read[MP_NODE_PREFIX];
    out->pages_chunk = s->kv.n_read[MP_NODE_CHUNK];
    out->pages_evictable = s->kv.pool.n_evictable;
    out->pages_canonical = n_canonical;
    out->pages_unshared = 0;
    for (const mp_request *r = s->running.first; r; r = r->next)
        out->pages_unshared += (r->n_known + s->config.page_size - 1) / s->config.page_size;
    out->peak_pages_referenced = c->peak_pages_referenced;
    out->queued = s->queue.n;
    out->running = s->running.n;
    out->steps = c->steps;
    out->rows_decode = c->rows_decode;
    out->rows_text = c->rows_text;
    out->rows_link = c->rows_link;
    out->rows_compile = c->rows_compile;
    out->chunk_lookups = c->chunk_lookups;
    out->chunk_hits = c->chunk_hits;
    out->prefix_lookups = c->prefix_lookups;
    out->prefix_hit_tokens = c->prefix_hit_tokens;
    out->evicted_pages = s->kv.n_evicted;
    out->preemptions = c->preemptions;
    out->compiles = c->compiles;
    out->short_chunks = c->short_chunks;
}

void mp_scheduler_clear(mp_scheduler *s) {
    mp_kv_clear(&s->kv);
}

uint32_t mp_scheduler_chunk_pages(const mp_scheduler *s, const mp_digest *scope, const int32_t *tokens, uint32_t n,
                                  mp_page *out, uint32_t cap) {
    mp_digest key = mp_canonical_root(s, scope);
    mp_page parent = MP_NONE;
    uint32_t n_pages = 0;
    for (uint32_t at = 0; at < n && n_pages < cap; at += s->config.page_size) {
        mp_elements page = { .tokens = tokens + at,
                             .n_tokens = n - at < s->config.page_size ? n - at : s->config.page_size };
        key = mp_key_next(s->sha, &key, &page);
        parent = mp_index_find(&s->kv.index, MP_NODE_CHUNK, parent, &key, &page);
        if (parent == MP_NONE) break;
        out[n_pages++] = parent;
    }
    return n_pages;
}

uint64_t mp_scheduler_page_version(const mp_scheduler *s, mp_page page) {
    return s->kv.pool.version[page];
}
