/* The invariants, recomputed from scratch: I1 every page is in one state, I2 the references are those of the streams,
 * I3 what may be written has one owner, I4 the index holds whole chains, and the plan reads what its sequences hold. */
#include "base/mem.h"
#include "schedule/state.h"

static void count(uint32_t *refs, const mp_page *pages, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) refs[pages[i]]++;
}

static bool check_stream(const mp_scheduler *s, const mp_stream *stream, mp_node_kind kind, mepic_error *err) {
    uint32_t page_size = s->config.page_size;
    const mp_pool *pool = &s->kv.pool;
    for (uint32_t i = 0; i < stream->n_pages; i++) {
        mp_page page = stream->pages[i];
        uint32_t written = stream->n_done > i * page_size ? stream->n_done - i * page_size : 0;
        if (written > page_size) written = page_size;
        if (i < stream->n_published) {
            const mp_node *node = &s->kv.index.nodes[page];
            bool ok = pool->cached[page] && node->kind == kind && node->parent == (i ? stream->pages[i - 1] : MP_NONE);
            if (!ok)
                return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: published, but not in its chain", page) == MEPIC_OK;
        } else if (pool->cached[page] || pool->refs[page] != 1) {
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: written by one, read by %u", page, pool->refs[page]) ==
                   MEPIC_OK;
        } else if (pool->fill[page] < written || (!s->in_step && pool->fill[page] != written)) {
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: %u of %u slots written", page, pool->fill[page], written) ==
                   MEPIC_OK;
        }
    }
    return true;
}

static bool check_request(const mp_scheduler *s, const mp_request *r, uint32_t *refs, mepic_error *err) {
    uint32_t n_waits = 0;
    count(refs, r->stream.pages, r->stream.n_pages);
    if (s->requests[r->stream.seq] != r)
        return mp_fail(err, MEPIC_ERR_BROKEN, "a sequence has another request") == MEPIC_OK;
    for (uint32_t c = 0; c < r->layout.n_chunks; c++) {
        const mp_request_chunk *chunk = &r->chunks[c];
        count(refs, chunk->pages, chunk->n_pages);
        n_waits += chunk->waits != NULL;
        uint32_t expected = chunk->waits ? 0 : chunk->job->chunk.n_pages;
        if (chunk->n_pages != expected || (chunk->waits && !chunk->waits->under_way))
            return mp_fail(err, MEPIC_ERR_BROKEN, "a request holds %u of %u pages of a chunk", chunk->n_pages,
                           expected) == MEPIC_OK;
    }
    if (n_waits != r->n_waits || (n_waits > 0) != (r->state == MP_REQUEST_WAITING))
        return mp_fail(err, MEPIC_ERR_BROKEN, "a request waits for %u jobs, not %u", n_waits, r->n_waits) == MEPIC_OK;
    return check_stream(s, &r->stream, MP_NODE_PREFIX, err);
}

static bool check_job(const mp_scheduler *s, const mp_job *job, uint32_t *refs, mepic_error *err) {
    count(refs, job->stream.pages, job->stream.n_pages);
    if (!job->waiters || !job->under_way) return mp_fail(err, MEPIC_ERR_BROKEN, "a job has no waiters") == MEPIC_OK;
    for (const mp_request_chunk *waiter = job->waiters; waiter; waiter = waiter->next) {
        if (waiter->waits != job) return mp_fail(err, MEPIC_ERR_BROKEN, "a waiter waits for another job") == MEPIC_OK;
    }
    if (mp_residency_under_way(&s->residency, &job->chunk) != &job->chunk)
        return mp_fail(err, MEPIC_ERR_BROKEN, "a chunk has two jobs or none") == MEPIC_OK;
    return check_stream(s, &job->stream, MP_NODE_CHUNK, err);
}

/* Every page that the plan reads is referenced, and no reader of a cell is another page's. */
static bool check_plan(const mp_scheduler *s, mepic_error *err) {
    for (uint32_t i = 0; i < s->plan->n_used; i++) {
        const mp_cell *cell = &s->plan->cells[s->plan->used[i]];
        for (uint32_t p = 0; p < cell->n_pages; p++) {
            if (s->kv.pool.refs[cell->pages[p]] == 0)
                return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: in the plan, held by nobody", cell->pages[p]) ==
                       MEPIC_OK;
        }
    }
    for (const mp_request *r = s->running.first; r; r = r->next) {
        const mp_plan_seq *seq = &s->plan->seqs[r->stream.seq];
        uint32_t n_private = 0;
        for (uint32_t k = 0; k < seq->n_refs; k++) {
            const mp_cell *cell = &s->plan->cells[seq->refs[k].cell];
            for (uint32_t p = 0; !seq->refs[k].shared && p < cell->n_pages; p++) {
                if (cell->pages[p] != r->stream.pages[n_private++])
                    return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: in another stream's cell", cell->pages[p]) ==
                           MEPIC_OK;
            }
        }
    }
    return mp_plan_check(s->plan, err);
}

static bool check_lists(const mp_scheduler *s, mepic_error *err) {
    uint32_t n_queued = 0;
    for (const mp_request *r = s->queue.first; r; r = r->next, n_queued++) {
        bool ok = r->state == MP_REQUEST_QUEUED && r->stream.n_pages == 0 && r->n_waits == 0;
        if (!ok || (r->next && r->next->id <= r->id))
            return mp_fail(err, MEPIC_ERR_BROKEN, "a queued request holds pages") == MEPIC_OK;
    }
    for (const mp_request *r = s->running.first; r && r->next; r = r->next) {
        if (r->next->id <= r->id)
            return mp_fail(err, MEPIC_ERR_BROKEN, "running requests are out of order") == MEPIC_OK;
    }
    if (n_queued != s->queue.n)
        return mp_fail(err, MEPIC_ERR_BROKEN, "%u queued, %u counted", s->queue.n, n_queued) == MEPIC_OK;
    return true;
}

static bool check_all(const mp_scheduler *s, uint32_t *refs, mepic_error *err) {
    if (!mp_kv_check(&s->kv, err) || !check_lists(s, err) || !check_plan(s, err)) return false;
    uint32_t n_running = 0;
    for (const mp_request *r = s->running.first; r; r = r->next, n_running++) {
        if (!check_request(s, r, refs, err)) return false;
    }
    for (const mp_job *job = s->jobs.first; job; job = job->next) {
        if (!check_job(s, job, refs, err)) return false;
    }
    if (s->canonical) {
        count(refs, s->canonical->stream.pages, s->canonical->stream.n_pages);
        if (!check_stream(s, &s->canonical->stream, MP_NODE_NONE, err)) return false;
    }
    for (mp_page page = 0; page < s->config.n_pages; page++) {
        if (refs[page] != s->kv.pool.refs[page])
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: %u references, %u counted", page, s->kv.pool.refs[page],
                           refs[page]) == MEPIC_OK;
    }
    if (n_running != s->running.n || n_running + s->request_seqs.n != s->config.max_running)
        return mp_fail(err, MEPIC_ERR_BROKEN, "%u running, %u counted", s->running.n, n_running) == MEPIC_OK;
    return true;
}

bool mp_scheduler_check(const mp_scheduler *s, mepic_error *err) {
    if (s->fault->broken) return mp_fail(err, MEPIC_ERR_BROKEN, "not true that %s", s->fault->what) == MEPIC_OK;
    uint32_t *refs = mp_calloc(s->config.n_pages, sizeof *refs);
    if (!refs) return mp_fail_nomem(err, "a check", s->config.n_pages * sizeof *refs) == MEPIC_OK;
    bool ok = check_all(s, refs, err);
    mp_free(refs);
    return ok;
}
