/* `mepic bench reuse`: many requests over a pool of paragraphs, the policies side by side.
 *
 * A request holds K different paragraphs out of a pool of M, drawn by a Zipf law and shuffled, and asks a question
 * about one of them. For every policy, on one engine: the cache is emptied, N requests run (phase `cold`); every
 * paragraph of the pool is put into the cache, another N requests run (phase `resident`). C of them are in flight.
 *
 * Pages on paper, at the moment of the peak: the canonical pages of the different paragraphs in flight, plus the
 * private stream of every request in flight (text, linked tokens, reply so far), a common beginning once. */
#include "cli/bench.h"

#include "base/clock.h"
#include "cli/conversation.h"
#include "cli/xquad.h"

#include <string.h>

enum { PARAGRAPHS_MAX = 64, REPEATS_MAX = 99, N_PHASES = 2, N_POLICIES = 3, MIN_CHUNK_TOKENS = 64, LINK_DEFAULT = 16 };

static const char usage_text[] = "usage: mepic bench reuse -m FILE [OPTIONS]\n\n"
                                 "Requests over a shared pool of paragraphs: time to first token, prompt tokens "
                                 "computed, pages, by policy. Cold: the\n"
                                 "cache is empty at the start; resident: every paragraph is in it. Every figure has "
                                 "its ratio to `none` beside it.\n";

static const char system_text[] = "Answer the question with a short span copied from the documents. Do not explain.";

static const mepic_reuse policies[N_POLICIES] = { MEPIC_REUSE_NONE, MEPIC_REUSE_PREFIX, MEPIC_REUSE_MEPIC };
static const char *const phase_names[N_PHASES] = { "cold", "resident" };

typedef struct reuse_flags {
    mp_engine_flags engine;
    const char *data, *csv;
    uint32_t requests, concurrency, paragraphs, pool, max_tokens, repeats;
    double zipf;
    uint64_t seed;
} reuse_flags;

typedef struct load {
    mp_xquad xquad;
    uint32_t *pool;         /* [M] paragraphs, the most popular first */
    uint32_t *chunk_tokens; /* [M] */
    unsigned char *taken;   /* [M] scratch */
} load;

typedef struct work {
    uint32_t ranks[PARAGRAPHS_MAX]; /* in the pool, in the prompt's order */
    mepic_prepared *prepared;
    uint32_t n_tokens;
    mp_reply reply;
} work;

/* What one run of one policy in one phase gave. */
typedef enum figure {
    TTFT_P50, /* seconds */
    TTFT_P90,
    ROWS,        /* prompt tokens computed */
    PAGES_PEAK,  /* referenced, at the peak; and then: */
    PAGES_PAPER, /* by definition */
    PAGES_UNSHARED,
    CHUNK_HITS,  /* 0..1 */
    PREFIX_HITS, /* 0..1 of the prompt tokens */
    RATE,        /* reply tokens a second, prefill included */
    N_FIGURES,
} figure;
typedef struct outcome {
    double of[N_FIGURES];
} outcome;

/* ---- Building the load ------------------------------------------------------------------------------------------- */

static mepic_status load_open(load *l, mp_session *session, const reuse_flags *f, mepic_error *err) {
    mepic_status status = mp_xquad_open(&l->xquad, f->data, err);
    if (status != MEPIC_OK) return status;
    uint32_t n = l->xquad.n_paragraphs;
    if (f->pool > n) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--pool: the file has %u paragraphs, not %u", n, f->pool);
    }
    uint32_t *all = mp_calloc(n, sizeof *all);
    l->pool = all;
    l->chunk_tokens = mp_calloc(f->pool, sizeof *l->chunk_tokens);
    l->taken = mp_calloc(f->pool, 1);
    if (!all || !l->chunk_tokens || !l->taken) return mp_fail_nomem(err, "the paragraphs", n * sizeof *all);
    for (uint32_t i = 0; i < n; i++) all[i] = i;
    mp_random random = { .state = f->seed };
    mp_shuffle(&random, all, n);
    for (uint32_t i = 0; i < f->pool; i++) {
        const char *text = l->xquad.paragraphs[all[i]];
        size_t tokens;
        status = mepic_tokenize(session->engine, text, strlen(text), false, NULL, 0, &tokens, err);
        if (status != MEPIC_OK) return status;
        l->chunk_tokens[i] = (uint32_t)tokens;
    }
    return MEPIC_OK;
}

static void load_close(load *l) {
    if (l->xquad.root) mp_xquad_close(&l->xquad);
    mp_free(l->pool);
    mp_free(l->chunk_tokens);
    mp_free(l->taken);
}

/* A question about paragraph `index`; every paragraph of the data has one, but a file need not. */
static const char *pick_question(const load *l, mp_random *random, uint32_t index) {
    uint32_t seen = 0;
    const char *choice = "What is this about?";
    for (uint32_t i = 0; i < l->xquad.n_questions; i++) {
        if (l->xquad.questions[i].paragraph != index) continue;
        if (mp_random_below(random, ++seen) == 0) choice = l->xquad.questions[i].text;
    }
    return choice;
}

static mepic_status prepare_work(work *w, const load *l, mp_session *session, uint32_t k, const char *question,
                                 mepic_error *err) {
    mp_document documents[PARAGRAPHS_MAX];
    for (uint32_t i = 0; i < k; i++) {
        const char *text = l->xquad.paragraphs[l->pool[w->ranks[i]]];
        documents[i] = (mp_document){ .text = (char *)text, .len = strlen(text) };
    }
    mp_turn turn = { .question = (char *)question };
    const mp_conversation conversation = {
        .system = (char *)system_text, .documents = documents, .n_documents = k, .turns = &turn, .n_turns = 1
    };
    mepic_status status = mp_conversation_prepare(&conversation, session->engine, &w->prepared, err);
    if (status != MEPIC_OK) return status;
    size_t n;
    mepic_prepared_tokens(w->prepared, &n);
    w->n_tokens = (uint32_t)n;
    return MEPIC_OK;
}

static mepic_status draw_works(work *works, load *l, mp_session *session, const reuse_flags *f, uint64_t seed,
                               mepic_error *err) {
    mp_random random = { .state = seed };
    for (uint32_t i = 0; i < f->requests; i++) {
        mp_zipf_draw(&random, f->pool, f->zipf, f->paragraphs, works[i].ranks, l->taken);
        mp_shuffle(&random, works[i].ranks, f->paragraphs);
        uint32_t about = works[i].ranks[mp_random_below(&random, f->paragraphs)];
        const char *question = pick_question(l, &random, l->pool[about]);
        mepic_status status = prepare_work(&works[i], l, session, f->paragraphs, question, err);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

/* Requests that together hold every paragraph of the pool. Returns how many. */
static mepic_status cover_pool(work *works, const load *l, mp_session *session, const reuse_flags *f, uint32_t *n,
                               mepic_error *err) {
    *n = 0;
    for (uint32_t first = 0; first < f->pool; first += f->paragraphs) {
        work *w = &works[(*n)++];
        uint32_t k = 0;
        for (; k < f->paragraphs && first + k < f->pool; k++) w->ranks[k] = first + k;
        mepic_status status = prepare_work(w, l, session, k, "What is this about?", err);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

static void works_clear(work *works, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        mepic_prepared_free(works[i].prepared);
        mp_reply_clear(&works[i].reply);
    }
    mp_free(works);
}

/* ---- Pages on paper ---------------------------------------------------------------------------------------------- */

static uint32_t linked_of(uint32_t chunk_tokens, uint32_t link_tokens) {
    if (link_tokens == MEPIC_LINK_NONE) return 0;
    if (link_tokens == 0) link_tokens = LINK_DEFAULT;
    return chunk_tokens < link_tokens ? chunk_tokens : link_tokens;
}

/* Tokens at the start of the private streams that all requests in flight have in common: the text in front of the first
 * document. */
static uint32_t common_beginning(const work *works, const uint32_t *flight, uint32_t n) {
    size_t common, other;
    const int32_t *first = mepic_prepared_tokens(works[flight[0]].prepared, &common);
    for (uint32_t i = 1; i < n; i++) {
        const int32_t *tokens = mepic_prepared_tokens(works[flight[i]].prepared, &other);
        size_t same = 0;
        while (same < common && same < other && tokens[same] == first[same]) same++;
        common = same;
    }
    return n > 1 ? (uint32_t)common : 0;
}

/* By definition, without asking the engine: see the head of this file. For `none`, every token is private. */
static uint32_t pages_on_paper(const work *works, const uint32_t *flight, uint32_t n, const load *l,
                               const reuse_flags *f, uint32_t page_size, mepic_reuse policy) {
    uint32_t pages = 0;
    memset(l->taken, 0, f->pool);
    for (uint32_t i = 0; i < n; i++) {
        const work *w = &works[flight[i]];
        uint32_t private_tokens = w->n_tokens + (w->reply.n_tokens > 0 ? w->reply.n_tokens - 1 : 0);
        for (uint32_t k = 0; policy == MEPIC_REUSE_MEPIC && k < f->paragraphs; k++) {
            uint32_t rank = w->ranks[k], tokens = l->chunk_tokens[rank];
            if (tokens < MIN_CHUNK_TOKENS) continue; // such a chunk is text
            private_tokens -= tokens - linked_of(tokens, f->engine.link_tokens);
            if (!l->taken[rank]) pages += (tokens + page_size - 1) / page_size;
            l->taken[rank] = 1;
        }
        pages += (private_tokens + page_size - 1) / page_size;
    }
    if (policy != MEPIC_REUSE_NONE && n > 1) pages -= (n - 1) * (common_beginning(works, flight, n) / page_size);
    return pages;
}

/* ---- Running ----------------------------------------------------------------------------------------------------- */

typedef struct flight_state {
    uint32_t *items; /* [concurrency] */
    uint32_t n, next, finished;
} flight_state;

static mepic_status fill_flight(flight_state *flight, work *works, uint32_t n_works, mp_session *session,
                                const reuse_flags *f, mepic_reuse policy, mepic_error *err) {
    while (flight->n < f->concurrency && flight->next < n_works) {
        work *w = &works[flight->next];
        const mepic_request request = {
            .size = sizeof request,
            .prompt = w->prepared,
            .max_tokens = f->max_tokens,
            .ignore_eos = true,
            .reuse = policy,
            .link_tokens = f->engine.link_tokens,
        };
        mepic_status status = mp_reply_submit(session, request, &w->reply, err);
        if (status == MEPIC_ERR_BUSY && flight->n > 0) return MEPIC_OK;
        if (status != MEPIC_OK) return status;
        flight->items[flight->n++] = flight->next++;
    }
    return MEPIC_OK;
}

static void drop_finished(flight_state *flight, const work *works) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < flight->n; i++) {
        if (works[flight->items[i]].reply.done)
            flight->finished++;
        else
            flight->items[kept++] = flight->items[i];
    }
    flight->n = kept;
}

/* The peak is looked for between steps, where every request's pages are those of the step that was. */
static void watch_pages(outcome *out, const mepic_stats *stats, const flight_state *flight, const work *works,
                        const load *l, const reuse_flags *f, uint32_t page_size, mepic_reuse policy) {
    if ((double)stats->pages_referenced <= out->of[PAGES_PEAK]) return;
    out->of[PAGES_PEAK] = stats->pages_referenced;
    out->of[PAGES_UNSHARED] = stats->pages_unshared;
    out->of[PAGES_PAPER] = pages_on_paper(works, flight->items, flight->n, l, f, page_size, policy);
}

static double ratio(double a, double b) {
    return b > 0.0 ? a / b : 0.0;
}

static mepic_status summarize(outcome *out, const work *works, uint32_t n, double seconds, mepic_error *err) {
    double *ttft = mp_calloc(n, sizeof *ttft), prompts = 0.0, prefixes = 0.0, replies = 0.0;
    if (!ttft) return mp_fail_nomem(err, "times", n * sizeof *ttft);
    for (uint32_t i = 0; i < n; i++) {
        const mepic_usage *usage = &works[i].reply.usage;
        ttft[i] = (double)usage->ttft_ns * 1e-9;
        replies += usage->completion_tokens;
        prompts += usage->prompt_tokens;
        prefixes += usage->prefix_tokens;
    }
    out->of[PREFIX_HITS] = ratio(prefixes, prompts);
    out->of[RATE] = ratio(replies, seconds);
    out->of[TTFT_P50] = mp_quantile(ttft, n, 0.5);
    out->of[TTFT_P90] = mp_quantile(ttft, n, 0.9);
    mp_free(ttft);
    return MEPIC_OK;
}

static mepic_status run_works(mp_session *session, work *works, uint32_t n, const load *l, const reuse_flags *f,
                              mepic_reuse policy, const char *what, outcome *out, mepic_error *err) {
    flight_state flight = { .items = mp_calloc(f->concurrency, sizeof(uint32_t)) };
    if (!flight.items) return mp_fail_nomem(err, "requests in flight", f->concurrency * sizeof(uint32_t));
    mepic_stats before, stats;
    mepic_stats_read(session->engine, &before);
    uint64_t start = mp_now_ns();
    mepic_status status = MEPIC_OK;
    *out = (outcome){ 0 };
    while (status == MEPIC_OK && flight.finished < n) {
        status = fill_flight(&flight, works, n, session, f, policy, err);
        if (status == MEPIC_OK) status = mp_replies_step(session, err);
        mepic_stats_read(session->engine, &stats);
        watch_pages(out, &stats, &flight, works, l, f, session->info.page_size, policy);
        drop_finished(&flight, works);
        mp_progress_show(&session->progress, "reuse: %s, %s, %u of %u requests", mp_reuse_name(policy), what,
                         flight.finished, n);
    }
    mp_free(flight.items);
    if (status != MEPIC_OK) return status;
    mepic_stats_read(session->engine, &stats);
    uint64_t rows = stats.rows_text + stats.rows_link + stats.rows_compile;
    out->of[ROWS] = (double)(rows - before.rows_text - before.rows_link - before.rows_compile);
    uint64_t lookups = stats.chunk_lookups - before.chunk_lookups;
    out->of[CHUNK_HITS] = ratio((double)(stats.chunk_hits - before.chunk_hits), (double)lookups);
    return summarize(out, works, n, (double)(mp_now_ns() - start) * 1e-9, err);
}

/* One policy in one phase, from drawing its requests to its figures. The same seed draws the same requests. */
static mepic_status measure(mp_session *session, load *l, const reuse_flags *f, mepic_reuse policy, uint32_t phase,
                            uint64_t seed, outcome *out, mepic_error *err) {
    work *works = mp_calloc(f->requests, sizeof *works);
    if (!works) return mp_fail_nomem(err, "requests", f->requests * sizeof *works);
    mepic_status status = draw_works(works, l, session, f, seed, err);
    if (status == MEPIC_OK) status = run_works(session, works, f->requests, l, f, policy, phase_names[phase], out, err);
    works_clear(works, f->requests);
    return status;
}

/* Puts every paragraph into the cache (and, the first time, computes the canonical context). */
static mepic_status warm(mp_session *session, load *l, const reuse_flags *f, mepic_reuse policy, mepic_error *err) {
    uint32_t room = f->pool / f->paragraphs + 1, n = 0;
    work *works = mp_calloc(room, sizeof *works);
    if (!works) return mp_fail_nomem(err, "requests", room * sizeof *works);
    reuse_flags once = *f;
    once.max_tokens = 1;
    outcome ignored;
    mepic_status status = cover_pool(works, l, session, f, &n, err);
    if (status == MEPIC_OK) status = run_works(session, works, n, l, &once, policy, "warming", &ignored, err);
    works_clear(works, room);
    return status;
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

static outcome median_outcome(const outcome *runs, uint32_t n) {
    outcome median;
    for (uint32_t k = 0; k < N_FIGURES; k++) {
        double values[REPEATS_MAX];
        for (uint32_t i = 0; i < n; i++) values[i] = runs[i].of[k];
        median.of[k] = mp_quantile(values, n, 0.5);
    }
    return median;
}

static const char *const columns[] = {
    "<phase", "<policy",  "TTFT p50 s", "/none",   "p90 s",       "/none",        "rows",     "/none", "peak pages",
    "/none",  "on paper", "off %",      "sharing", "chunk hit %", "prefix hit %", "tokens/s", "/none",
};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

static void add_figure(mp_table *table, int decimals, double value, double of_none) {
    mp_table_add(table, "%.*f", decimals, value);
    mp_table_add(table, "%.3f", ratio(value, of_none));
}

static void add_row(mp_table *table, uint32_t phase, mepic_reuse policy, const outcome *o, const outcome *none) {
    mp_table_add(table, "%s", phase_names[phase]);
    mp_table_add(table, "%s", mp_reuse_name(policy));
    add_figure(table, 3, o->of[TTFT_P50], none->of[TTFT_P50]);
    add_figure(table, 3, o->of[TTFT_P90], none->of[TTFT_P90]);
    add_figure(table, 0, o->of[ROWS], none->of[ROWS]);
    add_figure(table, 0, o->of[PAGES_PEAK], none->of[PAGES_PEAK]);
    mp_table_add(table, "%.0f", o->of[PAGES_PAPER]);
    mp_table_add(table, "%+.1f", 100.0 * (ratio(o->of[PAGES_PEAK], o->of[PAGES_PAPER]) - 1.0));
    mp_table_add(table, "%.2f", ratio(o->of[PAGES_UNSHARED], o->of[PAGES_PEAK]));
    mp_table_add(table, "%.1f", 100.0 * o->of[CHUNK_HITS]);
    mp_table_add(table, "%.1f", 100.0 * o->of[PREFIX_HITS]);
    add_figure(table, 1, o->of[RATE], none->of[RATE]);
}

/* Policies alternate inside a repeat, so that a machine that slows down slows them all. */
static mepic_status run_all(mp_session *session, load *l, const reuse_flags *f, mp_table *table, mepic_error *err) {
    outcome *runs = mp_calloc((size_t)N_PHASES * N_POLICIES * f->repeats, sizeof *runs);
    if (!runs) return mp_fail_nomem(err, "figures", sizeof *runs * f->repeats);
    mepic_status status = warm(session, l, f, MEPIC_REUSE_MEPIC, err);
    for (uint32_t r = 0; status == MEPIC_OK && r < f->repeats; r++) {
        for (uint32_t i = 0; status == MEPIC_OK && i < N_PHASES * N_POLICIES; i++) {
            uint32_t p = i / N_PHASES, phase = i % N_PHASES;
            uint64_t seed = f->seed + 1 + 2 * (uint64_t)r + phase;
            if (phase == 0)
                mepic_cache_clear(session->engine);
            else if (policies[p] != MEPIC_REUSE_NONE)
                status = warm(session, l, f, policies[p], err);
            outcome *out = &runs[(phase * N_POLICIES + p) * f->repeats + r];
            if (status == MEPIC_OK) status = measure(session, l, f, policies[p], phase, seed, out, err);
        }
    }
    for (uint32_t i = 0; status == MEPIC_OK && i < N_PHASES * N_POLICIES; i++) {
        uint32_t phase = i / N_POLICIES;
        outcome none = median_outcome(&runs[phase * N_POLICIES * f->repeats], f->repeats);
        outcome median = median_outcome(&runs[i * f->repeats], f->repeats);
        add_row(table, phase, policies[i % N_POLICIES], &median, &none);
    }
    mp_free(runs);
    return status;
}

int mp_bench_reuse(int argc, char **argv) {
    reuse_flags f = { .requests = 16,
                      .concurrency = 1,
                      .paragraphs = 8,
                      .pool = 32,
                      .max_tokens = 16,
                      .repeats = 1,
                      .zipf = 0.8,
                      .seed = 1 };
    const mp_option options[] = {
        MP_TEXT(0, "data", &f.data, "FILE",
                "questions in SQuAD's JSON layout (default: xquad.en.json in ../shared/data, data or here)"),
        MP_COUNT(0, "requests", &f.requests, 1, 1u << 16, "N", "requests a phase (default 16)"),
        MP_COUNT(0, "concurrency", &f.concurrency, 1, 4096, "N", "requests in flight (default 1)"),
        MP_COUNT(0, "paragraphs", &f.paragraphs, 1, PARAGRAPHS_MAX, "N", "paragraphs a request (default 8)"),
        MP_COUNT(0, "pool", &f.pool, 1, 1u << 16, "N", "different paragraphs (default 32)"),
        MP_REAL(0, "zipf", &f.zipf, 0, 10, "S", "exponent of their popularity; 0: all alike (default 0.8)"),
        MP_COUNT('n', "max-tokens", &f.max_tokens, 1, 1u << 16, "N", "tokens of every reply (default 16)"),
        MP_COUNT(0, "repeats", &f.repeats, 1, REPEATS_MAX, "N", "runs of which the median counts (default 1)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the choices (default 1)"),
        MP_TEXT(0, "csv", &f.csv, "FILE", "write the table there as well"),
    };
    const mp_option_group groups[] = { { "Benchmark", options, sizeof options / sizeof *options },
                                       mp_engine_flags_group(&f.engine) };
    mp_session session;
    int result;
    if (!mp_options_begin("bench reuse", usage_text, groups, 2, argc, argv, &result)) return result;
    if (f.paragraphs > f.pool) {
        fprintf(stderr, "mepic bench reuse: --paragraphs %u: the pool has only %u (--pool)\n", f.paragraphs, f.pool);
        return MP_EXIT_USAGE;
    }
    if (!mp_session_begin(&session, "bench reuse", &f.engine, NULL, &result)) return result;
    load l = { 0 };
    mp_table table;
    mp_table_init(&table, columns, N_COLUMNS);
    mp_bench_header(&session);
    printf(
        "# %u requests a phase, %u in flight, %u paragraphs each of %u, zipf %g, replies of %u tokens, median of %u, "
        "seed %llu\n",
        f.requests, f.concurrency, f.paragraphs, f.pool, f.zipf, f.max_tokens, f.repeats, (unsigned long long)f.seed);
    mepic_error err;
    mepic_status status = load_open(&l, &session, &f, &err);
    if (status == MEPIC_OK) status = run_all(&session, &l, &f, &table, &err);
    mp_progress_clear(&session.progress);
    result = mp_bench_finish(&table, "reuse", f.csv);
    if (status != MEPIC_OK) result = mp_bench_fail("reuse", &session, &err);
    load_close(&l);
    mp_session_close(&session);
    return result;
}
