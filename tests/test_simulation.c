/* The metadata half of the engine under random operations: submit, step, commit, append, finish, cancel in every state,
 * clear, in pools so small that chunks are evicted and requests preempted all the time. A forward pass that follows the
 * plan as a backend does computes contents for every row; the twin says what they must be. After every operation the
 * scheduler's own invariants (I1 to I5) are checked. Some worlds run ahead: a step's tokens are appended after the next
 * step, and rows are computed for replies that have ended.
 *
 *     test_simulation [operations [seed]]         the seed is printed; the same seed repeats the same run */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "schedule/request.h"
#include "support/random.h"
#include "support/twin.h"

enum {
    N_DOCS = 16,
    N_SCOPES = 2,
    SPANS_MAX = 64,
    LIVE_MAX = 64,
    PAGES_MAX = 512,
    PAST_MAX = 8, /* finished conversations that may go on */
    CONTEXT = 1400,
};

/* ---- Randomness and failure -------------------------------------------------------------------------------------- */

typedef struct world world;

static rng random_numbers;
static uint64_t seed, n_operations;

static uint32_t random_below(uint32_t n) {
    return rng_below(&random_numbers, n);
}

static bool chance(uint32_t percent) {
    return random_below(100) < percent;
}

static void MP_PRINTF(1, 2) die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "seed %llu, operation %llu: ", (unsigned long long)seed, (unsigned long long)n_operations);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

/* ---- The world --------------------------------------------------------------------------------------------------- */

/* One slot of a page: what the forward pass wrote. */
typedef struct slot {
    uint64_t value;
    int32_t angle;
} slot;

typedef struct page_state {
    uint64_t zeroed, written; /* versions */
    bool unspoiled;           /* written since it was spoiled last */
    uint32_t n_written;       /* slots of that version */
    uint64_t owned;           /* version whose scope is known */
    uint32_t scope;
} page_state;

/* A prompt with what is needed to go on with it. */
typedef struct prompt {
    int32_t tokens[CONTEXT];
    mp_span spans[SPANS_MAX];
    const twin_doc *docs[SPANS_MAX];
    uint32_t n, n_spans;
    uint32_t scope;
    mepic_reuse reuse;
} prompt;

typedef struct live {
    mp_request *request;
    twin_request *twin;
    prompt prompt;
    uint32_t n_reply_wanted, n_taken; /* n_taken: tokens that were appended; the twin has what was sampled, too */
    uint64_t id;
} live;

/* What a step sampled and nobody has looked at yet. */
typedef struct flight {
    struct {
        uint64_t id;
        int32_t token;
    } sampled[64];
    uint32_t n;
} flight;

struct world {
    mp_scheduler_config config;
    mp_fault fault;
    mp_scheduler *s;
    twin_canonical canonical;
    twin_doc docs[N_DOCS];
    slot *slots; /* [n_pages, page_size] */
    page_state pages[PAGES_MAX];
    live live[LIVE_MAX];
    uint32_t n_live;
    prompt past[PAST_MAX];
    uint32_t n_past;
    uint32_t check_every;
    bool ahead;
    flight flights[2];       /* of the last step, and of the one before */
    int32_t sampled[64];     /* by sequence, as a device has it */
    bool monotonous;         /* all tokens are the same: streams differ only in what stands between their tokens */
    uint32_t plain_requests; /* so many requests use no chunks, at first */
};

/* How often what should happen did happen. */
static struct {
    uint64_t rows, submits, busy, too_long, finished, cancelled[4], audits, clears, preempted, evicted, compiled,
        prefix_hits, chunk_hits, multi_readers, spoiled, ahead_rows, dropped;
    uint64_t n_ids;
} seen;

static mp_digest scope_digest(uint32_t scope) {
    mp_digest d = { { (uint8_t)(scope + 1) } };
    return d;
}

/* Documents come in families: a document, the same edited at some place, the same cut short (a log that grows). */
static void make_docs(world *w) {
    /* Some are too long to be chunks. */
    uint32_t longest = w->config.n_pages / 8 * w->config.page_size + 40;
    if (longest > TWIN_DOC_TOKENS_MAX) longest = TWIN_DOC_TOKENS_MAX;
    for (uint32_t d = 0; d < N_DOCS; d++) {
        twin_doc *doc = &w->docs[d];
        if (d % 4 == 0 || chance(20)) {
            doc->n = 30 + random_below(longest - 30);
            for (uint32_t i = 0; i < doc->n; i++) doc->tokens[i] = (int32_t)(1000 * (d + 1) + i);
        } else {
            const twin_doc *base = &w->docs[d - 1];
            doc->n = chance(50) ? base->n : 30 + random_below(longest - 30);
            uint32_t edit = chance(50) ? random_below(doc->n) : doc->n;
            for (uint32_t i = 0; i < doc->n; i++) {
                bool copied = i < base->n && i != edit;
                doc->tokens[i] = copied ? base->tokens[i] : (int32_t)(100000 + 1000 * d + i);
            }
        }
        for (uint32_t i = 0; w->monotonous && i < doc->n; i++) doc->tokens[i] = 5;
        twin_doc_init(doc, &w->canonical);
    }
}

static void open_world(world *w) {
    memset(w, 0, sizeof *w);
    mp_scheduler_config *c = &w->config;
    c->page_size = chance(80) ? 16 : 32;
    c->cell_tokens = chance(70) ? 256 : chance(50) ? 128 : 1024;
    c->n_pages = 48 + random_below(chance(70) ? 64 : 400);
    c->max_running = 1 + random_below(16);
    c->max_jobs = 1 + random_below(4);
    c->max_queued = 1 + random_below(30);
    c->step_tokens = 1 + random_below(chance(50) ? 16 : 64);
    c->context = 200 + random_below(CONTEXT - 200);
    c->eviction = chance(70) ? MEPIC_EVICT_S3FIFO : MEPIC_EVICT_LRU;
    c->spoil_freed = true;
    c->fault = &w->fault;
    w->canonical.n = chance(80) ? random_below(c->n_pages > 200 ? TWIN_CANONICAL_MAX : 60) : 0;
    for (uint32_t i = 0; i < w->canonical.n; i++) w->canonical.tokens[i] = (int32_t)(900000 + i);
    twin_canonical_init(&w->canonical);
    c->canonical = w->canonical.tokens;
    c->n_canonical = w->canonical.n;
    w->monotonous = chance(20);
    w->ahead = chance(50);
    w->plain_requests = chance(30) ? 20 + random_below(30) : 0;
    make_docs(w);
    w->slots = calloc((size_t)c->n_pages * c->page_size, sizeof *w->slots);
    w->check_every = c->n_pages < 112 ? 1 : 16;
    mepic_error err;
    if (mp_scheduler_open(c, &w->s, &err) != MEPIC_OK) die("open: %s", err.message);
    if (w->canonical.n && chance(20) && !mp_scheduler_canonical_take(w->s)) die("no room for the canonical context");
}

static void check(world *w) {
    mepic_error err;
    if (!mp_scheduler_check(w->s, &err)) die("%s", err.message);
}

/* ---- A forward pass that follows the plan ------------------------------------------------------------------------ */

static slot *slot_of(world *w, mp_page page, uint32_t i) {
    return &w->slots[(size_t)page * w->config.page_size + i];
}

static void must_be_in_scope(world *w, mp_page page, uint32_t scope) {
    page_state *p = &w->pages[page];
    uint64_t version = mp_scheduler_page_version(w->s, page);
    if (p->owned != version) *p = (page_state){ p->zeroed, p->written, p->unspoiled, p->n_written, version, scope };
    if (p->scope != scope) die("page %u of scope %u is read in scope %u", page, p->scope, scope);
}

static uint64_t forward_row(world *w, const mp_plan *plan, const mp_row *row, const live *owner) {
    const mp_plan_seq *seq = &plan->seqs[row->seq];
    uint64_t h = twin_start(row->token, row->position);
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        const mp_cell *cell = &plan->cells[ref->cell];
        seen.multi_readers += cell->n_readers > 1;
        if (!ref->shared && ref->base != 0) die("a private cell with base %d", ref->base);
        for (uint32_t p = 0; owner && p < cell->n_pages; p++) must_be_in_scope(w, cell->pages[p], owner->prompt.scope);
        for (uint32_t i = ref->lo; i < ref->hi; i++) {
            if (!(ref->mask >> i / plan->page_size & 1)) continue;
            int32_t at = ref->first + (int32_t)i;
            if (ref->shared ? at >= row->position : at >= (int32_t)row->index) continue; /* itself is in the start */
            const slot *read = slot_of(w, cell->pages[i / plan->page_size], i % plan->page_size);
            h = twin_fold(h, read->value, row->position - (read->angle + ref->base));
        }
    }
    return h;
}

static live *find_live(world *w, const mp_request *request) {
    for (uint32_t i = 0; i < w->n_live; i++) {
        if (w->live[i].request == request) return &w->live[i];
    }
    return NULL;
}

/* What still reads a freed page sees numbers that nobody wrote. */
static void spoil_pages(world *w, const mp_step *step) {
    for (uint32_t i = 0; i < step->n_spoil_pages; i++) {
        mp_page page = step->spoil_pages[i];
        if (!w->pages[page].unspoiled) die("page %u is spoiled, which nobody wrote", page);
        w->pages[page].unspoiled = false;
        memset(slot_of(w, page, 0), 0xff, w->config.page_size * sizeof(slot));
        seen.spoiled++;
    }
}

static void zero_pages(world *w, const mp_step *step) {
    for (uint32_t i = 0; i < step->n_zero_pages; i++) {
        mp_page page = step->zero_pages[i];
        uint64_t version = mp_scheduler_page_version(w->s, page);
        if (w->pages[page].zeroed == version) die("page %u is zeroed twice", page);
        w->pages[page].zeroed = version;
        memset(slot_of(w, page, 0), 0, w->config.page_size * sizeof(slot));
    }
}

static void write_slot(world *w, const mp_row *row, uint64_t value) {
    page_state *p = &w->pages[row->page];
    uint64_t version = mp_scheduler_page_version(w->s, row->page);
    if (p->zeroed != version) die("page %u is written before it is zeroed", row->page);
    if (p->written != version) {
        p->written = version;
        p->n_written = 0;
    }
    p->unspoiled = true;
    if (p->n_written++ != row->slot) die("slot %u of page %u is not the next one", row->slot, row->page);
    *slot_of(w, row->page, row->slot) = (slot){ .value = value, .angle = row->position };
}

static void sample(world *w, const mp_row *row, live *l) {
    /* From what the row saw, as a model does. */
    int32_t token = w->monotonous ? 5 : (int32_t)(twin_value(l->twin, row->index) % 1000);
    flight *f = &w->flights[0];
    if (l->twin->n_tokens - l->twin->n_prompt == mp_request_max_tokens(l->request)) die("a reply is too long");
    if (!row->logits || f->n == 64) die("a row of no logits is sampled from, or too many are");
    f->sampled[f->n].id = l->id;
    f->sampled[f->n++].token = token;
    w->sampled[row->seq] = token;
    twin_request_append(l->twin, token);
}

static void forward(world *w, const mp_step *step) {
    spoil_pages(w, step);
    zero_pages(w, step);
    uint32_t n_logits = 0;
    if (step->n_rows > w->config.step_tokens) die("%u rows in a step", step->n_rows);
    w->flights[0].n = 0;
    for (uint32_t i = 0; i < step->n_rows; i++) {
        mp_row row = step->rows[i];
        const mp_plan_seq *seq = &step->plan->seqs[row.seq];
        if (i < seq->row || i >= seq->row + seq->n_rows) die("row %u is not among its sequence's", i);
        mp_request *request = mp_scheduler_request(w->s, row.seq);
        live *owner = request ? find_live(w, request) : NULL;
        if (request && !owner) die("a row of an ended request");
        if (row.token == MP_TOKEN_SAMPLED) {
            if (!owner || !w->ahead) die("row %u has no token", i);
            row.token = w->sampled[row.seq];
            seen.ahead_rows++;
        }
        uint64_t value = forward_row(w, step->plan, &row, owner);
        write_slot(w, &row, value);
        n_logits += row.logits;
        seen.rows++;
        if (!owner) continue;
        uint32_t position = twin_position(owner->twin, row.index);
        if (row.position != (int32_t)position || row.token != owner->twin->tokens[position])
            die("row %u: token %d at %d, expected it at %u", i, row.token, row.position, position);
        if (value != twin_value(owner->twin, row.index))
            die("row %u of stream index %u sees the wrong things", i, row.index);
        if (row.samples) sample(w, &row, owner);
    }
    if (n_logits != step->n_logits) die("%u rows with logits, %u said", n_logits, step->n_logits);
}

/* ---- Operations -------------------------------------------------------------------------------------------------- */

static void put(prompt *p, const twin_doc *doc, const int32_t *tokens, uint32_t n, bool no_cache) {
    if (p->n_spans == SPANS_MAX || p->n + n > CONTEXT) return;
    p->docs[p->n_spans] = doc;
    p->spans[p->n_spans++] = (mp_span){ doc ? MEPIC_CHUNK : MEPIC_TEXT, p->n, n, no_cache, false };
    memcpy(p->tokens + p->n, tokens, n * sizeof *tokens);
    p->n += n;
}

static void put_text(const world *w, prompt *p, uint32_t id, uint32_t n) {
    int32_t tokens[400];
    for (uint32_t i = 0; i < n; i++) tokens[i] = w->monotonous ? 5 : (int32_t)(700000 + 1000 * id + i);
    put(p, NULL, tokens, n, false);
}

/* Lengths that are equal often, so that prompts differ in one thing only. */
static uint32_t question_length(void) {
    return chance(50) ? 16 * (1 + random_below(3)) : 1 + random_below(40);
}

static void make_prompt(world *w, prompt *p) {
    memset(p, 0, sizeof *p);
    p->scope = random_below(N_SCOPES);
    p->reuse = w->plain_requests > 0 ? MEPIC_REUSE_NONE
               : chance(75)          ? MEPIC_REUSE_MEPIC
               : chance(50)          ? MEPIC_REUSE_PREFIX
                                     : MEPIC_REUSE_NONE;
    if (chance(70))
        put_text(w, p, random_below(3), chance(10) ? 300 + random_below(2) * 60 : 16 + random_below(2) * 20);
    uint32_t n_chunks = chance(50) ? random_below(2) : random_below(5);
    for (uint32_t i = 0; i < n_chunks; i++) {
        const twin_doc *doc = &w->docs[random_below(1 + random_below(N_DOCS))]; /* some are asked for more often */
        put(p, doc, doc->tokens, doc->n, chance(5));
        if (chance(60)) put_text(w, p, random_below(4), chance(50) ? 16 : random_below(12));
    }
    if (p->n == 0 || chance(80)) put_text(w, p, 10 + random_below(3), question_length());
}

/* What the definitions say must become of the request; MEPIC_OK or MEPIC_ERR_TOO_LONG, and its longest reply. */
static mepic_status expected_status(const world *w, const mp_request_spec *spec, const twin_doc *const *docs,
                                    uint32_t *max) {
    if (spec->n_tokens >= w->config.context) return MEPIC_ERR_TOO_LONG;
    twin_rules rules = { w->config.page_size, w->config.n_pages / 8 };
    uint32_t n_canonical = (w->canonical.n + rules.page_size - 1) / rules.page_size;
    *max = w->config.context - spec->n_tokens;
    if (spec->max_tokens && spec->max_tokens < *max) *max = spec->max_tokens;
    for (;; --*max) {
        twin_request *twin = twin_request_open(&rules, spec, docs, *max);
        bool fits = twin->n_pages_most + n_canonical <= w->config.n_pages;
        twin_request_close(twin);
        if (fits) return MEPIC_OK;
        if (spec->max_tokens || *max == 1) return MEPIC_ERR_TOO_LONG;
    }
}

static void submit(world *w) {
    if (w->n_live == LIVE_MAX) return;
    live *l = &w->live[w->n_live];
    bool goes_on = w->n_past > 0 && chance(25);
    if (goes_on) {
        l->prompt = w->past[random_below(w->n_past)];
        if (chance(70)) put_text(w, &l->prompt, 10 + random_below(3), question_length());
    } else {
        make_prompt(w, &l->prompt);
    }
    prompt *p = &l->prompt;
    uint16_t masks[SPANS_MAX * 64];
    for (uint32_t i = 0; i < SPANS_MAX * 64; i++) masks[i] = chance(15);
    mp_request_spec spec = {
        .tokens = p->tokens,
        .n_tokens = p->n,
        .spans = p->spans,
        .n_spans = p->n_spans,
        .reuse = p->reuse,
        .link_tokens = chance(60)   ? 16
                       : chance(30) ? 0
                       : chance(20) ? UINT32_MAX
                       : chance(50) ? 32
                                    : random_below(300),
        .page_masks = chance(15) ? masks : NULL,
        .scope = scope_digest(p->scope),
        .max_tokens = chance(2) ? 0 : 1 + random_below(chance(50) ? 12 : 200),
        .logits_of_prompt = chance(10),
    };
    uint32_t max_tokens;
    mepic_status expected = expected_status(w, &spec, p->docs, &max_tokens);
    mepic_error err;
    mepic_stats stats;
    mp_scheduler_stats(w->s, &stats);
    mepic_status status = mp_scheduler_submit(w->s, &spec, &l->request, &err);
    if (status == MEPIC_ERR_BUSY && stats.queued >= w->config.max_queued) {
        seen.busy++;
        return;
    }
    if (status != expected) die("submit: %s, expected %s", mepic_status_name(status), mepic_status_name(expected));
    seen.too_long += status == MEPIC_ERR_TOO_LONG;
    if (status != MEPIC_OK) return;
    if (mp_request_max_tokens(l->request) != max_tokens)
        die("a reply of %u tokens, expected %u", mp_request_max_tokens(l->request), max_tokens);
    twin_rules rules = { w->config.page_size, w->config.n_pages / 8 };
    l->twin = twin_request_open(&rules, &spec, p->docs, max_tokens);
    l->n_taken = 0;
    l->id = ++seen.n_ids;
    l->n_reply_wanted = max_tokens > 40 && chance(70) ? 1 + random_below(40) : max_tokens;
    w->n_live++;
    w->plain_requests -= w->plain_requests > 0;
    seen.submits++;
}

static void check_usage(const live *l) {
    mepic_usage u;
    mp_request_usage(l->request, &u);
    uint32_t private = u.prefix_tokens + u.linked_tokens + u.computed_tokens;
    if (private != l->twin->n_private || u.chunk_tokens + u.compiled_tokens != l->twin->n_shared)
        die("%u private and %u shared tokens, expected %u and %u", private, u.chunk_tokens + u.compiled_tokens,
            l->twin->n_private, l->twin->n_shared);
    seen.prefix_hits += u.prefix_tokens > 0;
    seen.chunk_hits += u.chunk_tokens > 0;
}

static void end_request(world *w, live *l, bool completed) {
    if (completed) {
        check_usage(l);
        prompt *past = &w->past[w->n_past < PAST_MAX ? w->n_past++ : random_below(PAST_MAX)];
        *past = l->prompt;
        put(past, NULL, l->twin->tokens + l->twin->n_prompt, l->n_taken < CONTEXT ? l->n_taken : 0, false);
        seen.finished++;
    } else {
        seen.cancelled[l->request->state]++;
    }
    mp_scheduler_finish(w->s, l->request);
    twin_request_close(l->twin);
    live *last = &w->live[--w->n_live];
    if (l != last) *l = *last;
}

/* The tokens of a step become known. */
static void land(world *w, flight *f) {
    for (uint32_t i = 0; i < f->n; i++) {
        live *l = w->live;
        while (l < w->live + w->n_live && l->id != f->sampled[i].id) l++;
        if (l == w->live + w->n_live) {
            seen.dropped++;
            continue;
        }
        mp_scheduler_append(w->s, l->request, f->sampled[i].token);
        if (++l->n_taken >= l->n_reply_wanted) end_request(w, l, true);
    }
    f->n = 0;
}

static void step(world *w) {
    bool busy = mp_scheduler_busy(w->s);
    if (busy != (w->n_live > 0)) die("%u requests, busy %d", w->n_live, busy);
    const mp_step *step;
    mepic_error err;
    if (chance(10)) land(w, &w->flights[0]);
    bool waits = w->flights[0].n > 0;
    uint64_t allocations = mp_mem_count();
    if (mp_scheduler_step(w->s, &step, &err) != MEPIC_OK) die("%s", err.message);
    if (busy && step->n_rows == 0 && !waits && w->n_live > 0) die("requests wait and nothing is done");
    if (!busy && step->n_rows > 0) die("rows for nobody");
    if (mp_mem_count() != allocations) die("a step allocates");
    if (w->check_every == 1) check(w);
    w->flights[1] = w->flights[0];
    forward(w, step);
    allocations = mp_mem_count();
    mp_scheduler_commit(w->s);
    if (mp_mem_count() != allocations) die("a commit allocates");
    if (w->check_every == 1) check(w);
    land(w, &w->flights[1]);
    if (!w->ahead || chance(10)) land(w, &w->flights[0]);
}

/* The canonical pages of a document hold what they must, whoever made them. */
static void audit(world *w) {
    const twin_doc *doc = &w->docs[random_below(N_DOCS)];
    uint32_t scope = random_below(N_SCOPES), page_size = w->config.page_size;
    mp_digest digest = scope_digest(scope);
    mp_page pages[PAGES_MAX];
    uint32_t n = mp_scheduler_chunk_pages(w->s, &digest, doc->tokens, doc->n, pages, PAGES_MAX);
    for (uint32_t i = 0; i < n * page_size && i < doc->n; i++) {
        must_be_in_scope(w, pages[i / page_size], scope);
        if (slot_of(w, pages[i / page_size], i % page_size)->value != doc->values[i])
            die("canonical token %u is wrong in page %u", i, pages[i / page_size]);
    }
    seen.audits += n > 0;
}

static void operation(world *w) {
    uint32_t what = random_below(1000);
    if (what < 120) {
        submit(w);
    } else if (what < 140) {
        if (w->n_live > 0) end_request(w, &w->live[random_below(w->n_live)], false);
    } else if (what < 170) {
        audit(w);
    } else if (what < 173) {
        mp_scheduler_clear(w->s);
        seen.clears++;
    } else {
        step(w);
    }
    if (++n_operations % w->check_every == 0) check(w);
}

static void drain(world *w) {
    for (uint32_t i = 0; w->n_live > 0; i++, n_operations++) {
        if (i > 1000000) die("requests do not end");
        step(w);
    }
    mepic_stats stats;
    mp_scheduler_stats(w->s, &stats);
    if (stats.pages_referenced != 0 || stats.running != 0 || stats.queued != 0) die("pages are held for nobody");
    mp_scheduler_clear(w->s);
    check(w);
    mp_scheduler_stats(w->s, &stats);
    if (stats.pages_free + stats.pages_canonical != stats.pages_total) die("pages are lost");
    seen.preempted += stats.preemptions;
    seen.evicted += stats.evicted_pages;
    seen.compiled += stats.compiles;
}

int main(int argc, char **argv) {
    uint64_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000;
    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    printf("%llu operations, seed %llu\n", (unsigned long long)wanted, (unsigned long long)seed);
    random_numbers = rng_open(seed);
    world *w = malloc(sizeof *w);
    uint32_t n_worlds = 0;
    while (n_operations < wanted) {
        open_world(w);
        uint64_t until = n_operations + 500 + random_below(4000);
        while (n_operations < until && n_operations < wanted) operation(w);
        if (chance(90)) drain(w); /* else it is closed with requests inside */
        while (w->n_live > 0) twin_request_close(w->live[--w->n_live].twin);
        mp_scheduler_close(w->s);
        free(w->slots);
        n_worlds++;
    }
    free(w);
    printf("%u schedulers, %llu requests (%llu busy, %llu too long), %llu finished, cancelled while queued %llu, "
           "waiting %llu, in prefill %llu, in decode %llu\n",
           n_worlds, (unsigned long long)seen.submits, (unsigned long long)seen.busy, (unsigned long long)seen.too_long,
           (unsigned long long)seen.finished, (unsigned long long)seen.cancelled[0],
           (unsigned long long)seen.cancelled[1], (unsigned long long)seen.cancelled[2],
           (unsigned long long)seen.cancelled[3]);
    printf("%llu rows, %llu preemptions, %llu evicted pages, %llu compiles, %llu requests with prefix hits, %llu with "
           "chunk hits, %llu reads of shared cells, %llu audits\n",
           (unsigned long long)seen.rows, (unsigned long long)seen.preempted, (unsigned long long)seen.evicted,
           (unsigned long long)seen.compiled, (unsigned long long)seen.prefix_hits, (unsigned long long)seen.chunk_hits,
           (unsigned long long)seen.multi_readers, (unsigned long long)seen.audits);
    printf("%llu rows ahead of their tokens, %llu of them for nothing\n", (unsigned long long)seen.ahead_rows,
           (unsigned long long)seen.dropped);
    bool all = seen.finished && seen.preempted && seen.evicted && seen.prefix_hits && seen.chunk_hits &&
               seen.multi_readers && seen.audits && seen.busy && seen.too_long && seen.clears && seen.spoiled;
    for (int i = 0; i < 4; i++) all = all && seen.cancelled[i];
    all = all && seen.ahead_rows && seen.dropped;
    if (wanted >= 100000 && !all) die("something that the simulation is for never happened");
    return 0;
}
