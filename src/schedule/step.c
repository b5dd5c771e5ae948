/* A step's rows, and what happens when they are written. Under the budget of step_tokens: decode rows, oldest request
 * first; the rows of the oldest request that is not decoding; jobs; further requests. Where decoding would take every
 * row, it goes around. */
#include "schedule/state.h"

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

static uint32_t budget(const mp_scheduler *s) {
    return s->config.step_tokens - s->step.n_rows;
}

static void add_row(mp_scheduler *s, const mp_stream *stream, mp_row row) {
    row.seq = stream->seq;
    row.page = stream->pages[row.index / s->config.page_size];
    row.slot = row.index % s->config.page_size;
    mp_pool_write(&s->kv.pool, row.page, row.slot);
    if (row.slot == 0) s->zero_pages[s->step.n_zero_pages++] = row.page;
    s->step.n_logits += row.logits;
    s->rows[s->step.n_rows++] = row;
}

static void add_request_rows(mp_scheduler *s, mp_request *r, uint32_t n) {
    mp_stream *stream = &r->stream;
    uint32_t length = mp_request_length(r), last = length - 1;
    mp_plan_set_rows(s->plan, stream->seq, s->step.n_rows, n);
    mp_plan_extend(s->plan, stream->seq, stream->pages, stream->n_done + n);
    for (uint32_t index = stream->n_done; index < stream->n_done + n; index++) {
        uint32_t position = mp_request_position(r, index);
        bool of_prompt = index < r->layout.n_stream;
        add_row(s, stream,
                (mp_row){ .token = r->tokens[position],
                          .position = (int32_t)position,
                          .index = index,
                          .logits = index == last || (of_prompt && r->logits_of_prompt),
                          .samples = index == last });
        if (r->state == MP_REQUEST_DECODE) {
            s->stats.rows_decode += index < mp_request_known(r); /* else it counts when its token is appended */
            s->step.n_of_kind[MP_ROW_DECODE]++;
        } else if (of_prompt && r->layout.stream[index].linked) {
            s->stats.rows_link++;
            s->step.n_of_kind[MP_ROW_LINK]++;
        } else {
            s->stats.rows_text++;
            s->step.n_of_kind[MP_ROW_TEXT]++;
        }
    }
}

static void add_job_rows(mp_scheduler *s, mp_job *job) {
    mp_stream *stream = &job->stream;
    uint32_t left = job->chunk.n_tokens - stream->n_done, n = left < budget(s) ? left : budget(s);
    if (n == 0) return;
    mp_plan_set_rows(s->plan, stream->seq, s->step.n_rows, n);
    mp_plan_extend(s->plan, stream->seq, stream->pages, stream->n_done + n);
    for (uint32_t i = stream->n_done; i < stream->n_done + n; i++) {
        add_row(s, stream,
                (mp_row){ .token = job->chunk.tokens[i], .position = (int32_t)(job->angle + i), .index = i });
    }
    s->stats.rows_compile += n;
    s->step.n_of_kind[MP_ROW_COMPILE] += n;
}

/* ---- The parts of a step ----------------------------------------------------------------------------------------- */

/* The next token's page, if need be at the expense of the newest request. False: this request was the newest. */
static bool has_page(mp_scheduler *s, mp_request *r) {
    mp_stream *stream = &r->stream;
    if (stream->n_done < stream->n_pages * s->config.page_size) return true;
    while (!mp_kv_take(&s->kv, 1, stream->pages + stream->n_pages)) {
        mp_request *newest = s->running.last;
        bool can = newest != s->running.first && !s->fault->broken;
        if (!mp_invariant(s->fault, can, "the oldest request alone fits the pool")) return false;
        mp_preempt(s, newest);
        if (newest == r) return false;
    }
    stream->n_pages++;
    return true;
}

/* The last token that a reply may have needs no row. */
static bool decodes(const mp_request *r) {
    uint32_t length = mp_request_length(r), last = r->layout.n_stream + r->max_tokens - 1;
    return r->state == MP_REQUEST_DECODE && r->stream.n_done < (length < last ? length : last);
}

/* Whether somebody but those that decode could use rows. */
static bool others_wait(const mp_scheduler *s) {
    if (s->jobs.first) return true;
    for (const mp_request *r = s->running.first; r; r = r->next) {
        if (r->state == MP_REQUEST_PREFILL) return true;
    }
    return false;
}

/* Turns go around by age from where the step before stopped, one a row; all that does not decode has one turn, behind
 * the newest. So whoever has his turn waits at most one round, and where there are rows for all nobody waits. */
static void give_turns(mp_scheduler *s) {
    uint64_t from = s->next_turn;
    uint32_t left = budget(s);
    for (int part = 0; part < 2; part++) {
        for (mp_request *r = s->running.first; r; r = r->next) {
            if ((r->id < from) != part) continue;
            r->has_turn = left > 0 && decodes(r);
            if (!r->has_turn) continue;
            s->next_turn = r->id + 1;
            left--;
        }
        if (part == 0 && left > 0 && others_wait(s)) {
            s->next_turn = 0;
            left--;
        }
    }
}

/* False: the newest was preempted, or the scheduler is broken. */
static bool take_turns(mp_scheduler *s) {
    give_turns(s);
    for (mp_request *r = s->running.first; r; r = r->next) {
        if (!r->has_turn) continue;
        if (!has_page(s, r)) return false; /* there is no r->next */
        add_request_rows(s, r, 1);
    }
    return true;
}

/* Where only the newest had a turn, the next one gets it: the oldest always has a page. */
static void decode(mp_scheduler *s) {
    while (!take_turns(s) && s->step.n_rows == 0 && !s->fault->broken) continue;
}

static void prefill(mp_scheduler *s, mp_request *r) {
    if (r->state != MP_REQUEST_PREFILL || budget(s) == 0) return;
    uint32_t left = mp_request_length(r) - r->stream.n_done;
    add_request_rows(s, r, left < budget(s) ? left : budget(s));
}

static void work_on_jobs(mp_scheduler *s) {
    if (!s->jobs.first) return;
    if (!mp_canonical_ready(s)) {
        add_job_rows(s, s->canonical);
        return;
    }
    for (mp_job *job = s->jobs.first; job && budget(s) > 0; job = job->next) {
        if (job->stream.seq != MP_NONE) add_job_rows(s, job);
    }
}

static void list_rows(mp_scheduler *s) {
    uint64_t preemptions = s->stats.preemptions;
    decode(s);
    /* What was just taken from somebody is not given to the next in the queue. */
    if (s->stats.preemptions == preemptions) mp_admit(s);
    mp_jobs_prepare(s);
    mp_request *oldest = s->running.first;
    while (oldest && oldest->state == MP_REQUEST_DECODE) oldest = oldest->next;
    if (oldest) prefill(s, oldest);
    work_on_jobs(s);
    for (mp_request *r = oldest ? oldest->next : NULL; r && budget(s) > 0; r = r->next) prefill(s, r);
}

/* Free pages that have been written since they were spoiled last; those this step writes are not free. */
static void list_spoiled(mp_scheduler *s) {
    const mp_pool *pool = &s->kv.pool;
    for (uint32_t i = 0; i < s->step.n_zero_pages; i++) s->written[s->zero_pages[i]] = true;
    for (uint32_t i = 0; i < pool->n_free; i++) {
        if (!s->written[pool->free[i]]) continue;
        s->written[pool->free[i]] = false;
        s->spoil_pages[s->step.n_spoil_pages++] = pool->free[i];
    }
}

static uint32_t pages_referenced(const mp_scheduler *s) {
    return s->kv.pool.n_referenced - (s->canonical ? s->canonical->stream.n_pages : 0);
}

mepic_status mp_scheduler_step(mp_scheduler *s, const mp_step **out, mepic_error *err) {
    if (mp_invariant(s->fault, !s->in_step, "a step is committed before the next one")) {
        s->step =
            (mp_step){ .rows = s->rows, .spoil_pages = s->spoil_pages, .zero_pages = s->zero_pages, .plan = s->plan };
        mp_plan_begin_step(s->plan);
        list_rows(s);
        s->in_step = s->step.n_rows > 0; /* an empty step needs no commit */
        if (s->in_step && s->config.spoil_freed) list_spoiled(s);
        s->stats.steps += s->step.n_rows > 0;
        uint32_t n = pages_referenced(s);
        if (n > s->stats.peak_pages_referenced) s->stats.peak_pages_referenced = n;
    }
    if (s->fault->broken)
        return mp_fail(err, MEPIC_ERR_BROKEN, "the scheduler is broken: not true that %s", s->fault->what);
    *out = &s->step;
    return MEPIC_OK;
}

/* ---- Commit ------------------------------------------------------------------------------------------------------ */

void mp_stream_publish(mp_scheduler *s, mp_stream *stream, uint32_t i, mp_node_kind kind, const mp_digest *key,
                       const mp_elements *elements) {
    mp_page parent = i ? stream->pages[i - 1] : MP_NONE;
    mp_page page = mp_kv_publish(&s->kv, stream->pages[i], kind, parent, key, elements);
    if (page != stream->pages[i]) {
        stream->pages[i] = page;
        mp_plan_replace(s->plan, stream->seq, i, page);
        s->n_releases++;
    }
    stream->n_published = i + 1;
}

void mp_request_publish(mp_scheduler *s, mp_request *r) {
    mp_stream *stream = &r->stream;
    int32_t tokens[MP_PAGE_TOKENS_MAX];
    uint32_t n_full = stream->n_done / s->config.page_size;
    if (!r->policy->shares_prefix || n_full <= stream->n_published || stream->n_done > mp_request_known(r)) return;
    for (uint32_t i = stream->n_published; i < n_full; i++) {
        const mp_page_name *name = mp_request_name(s, r, i);
        mp_elements elements = mp_request_elements(s, r, i, tokens);
        mp_stream_publish(s, stream, i, MP_NODE_PREFIX, &name->key, &elements);
    }
    mp_plan_settle(s->plan, stream->seq);
}

static void commit_request(mp_scheduler *s, mp_request *r, uint32_t n_rows) {
    r->stream.n_done += n_rows;
    mp_request_publish(s, r);
    if (r->stream.n_done < mp_request_length(r)) return;
    r->state = MP_REQUEST_DECODE;
    if (!mp_invariant(s->fault, r->n_tokens - r->n_prompt < r->max_tokens, "a reply is at most max_tokens long"))
        return;
    r->tokens[r->n_tokens++] = MP_TOKEN_SAMPLED;
}

void mp_scheduler_commit(mp_scheduler *s) {
    if (s->step.n_rows == 0 || !mp_invariant(s->fault, s->in_step, "a commit follows a step")) return;
    s->in_step = false;
    for (uint32_t i = 0; i < s->plan->n_active; i++) {
        uint32_t seq = s->plan->active[i], n_rows = s->plan->seqs[seq].n_rows;
        if (seq < s->config.max_running) {
            commit_request(s, s->requests[seq], n_rows);
        } else {
            mp_job_commit(s, s->by_seq[seq - s->config.max_running], n_rows);
        }
    }
}
