/* `mepic bench decode` and `mepic bench prefill`: the speed of one model pass, by length and batch. */
#include "cli/bench.h"

#include "base/clock.h"

#include <string.h>

enum { BATCH_MAX = 256, REPEATS_MAX = 99 };

typedef struct speed_flags {
    mp_engine_flags engine;
    mp_counts lengths, batches;
    uint32_t tokens, repeats, chunks, chunk_tokens;
    uint64_t seed;
    const char *csv;
} speed_flags;

typedef struct load {
    uint32_t batch, length; /* requests at a time, tokens of each prompt */
    uint32_t repeat;
} load;

typedef struct speed_bench {
    const char *name;
    const char *columns[8];
    uint32_t n_columns;
    /* Tokens a second. */
    mepic_status (*measure)(mp_session *session, const speed_flags *f, const load *l, double *rate, mepic_error *err);
    void (*add_cells)(mp_table *table, const load *l, double rate); /* of all columns but the last */
} speed_bench;

/* ---- What both share --------------------------------------------------------------------------------------------- */

static bool fits(const mp_session *session, const load *l, uint32_t tokens) {
    uint64_t tokens_each = (uint64_t)l->length + tokens + 64;
    uint64_t pages = (tokens_each / session->info.page_size + 1) * l->batch;
    return tokens_each <= session->info.context && pages <= session->info.pages;
}

static mepic_status measure_median(const speed_bench *bench, mp_session *session, const speed_flags *f, load *l,
                                   double *rate, mepic_error *err) {
    double rates[REPEATS_MAX];
    for (l->repeat = 0; l->repeat < f->repeats; l->repeat++) {
        mp_progress_show(&session->progress, "%s: batch %u at %u, run %u of %u", bench->name, l->batch, l->length,
                         l->repeat + 1, f->repeats);
        mepic_status status = bench->measure(session, f, l, &rates[l->repeat], err);
        if (status != MEPIC_OK) return status;
    }
    *rate = mp_quantile(rates, f->repeats, 0.5);
    return MEPIC_OK;
}

static mepic_status measure_all(const speed_bench *bench, mp_session *session, const speed_flags *f, mp_table *table,
                                mepic_error *err) {
    for (uint32_t b = 0; b < f->batches.n; b++) {
        double first = 0.0, rate;
        for (uint32_t i = 0; i < f->lengths.n; i++) {
            load l = { .batch = f->batches.items[b], .length = f->lengths.items[i] };
            if (!fits(session, &l, f->tokens + f->chunks * f->chunk_tokens)) {
                fprintf(stderr, "mepic bench %s: %u x %u tokens do not fit (%u pages, context %u); left out\n",
                        bench->name, l.batch, l.length, session->info.pages, session->info.context);
                continue;
            }
            mepic_status status = measure_median(bench, session, f, &l, &rate, err);
            if (status != MEPIC_OK) return status;
            if (first == 0.0) first = rate;
            bench->add_cells(table, &l, rate);
            mp_table_add(table, "%.3f", rate / first);
        }
    }
    return MEPIC_OK;
}

static int run(const speed_bench *bench, const char *usage, const speed_flags *f, const mp_option_group *groups,
               int argc, char **argv) {
    char command[32];
    snprintf(command, sizeof command, "bench %s", bench->name);
    mp_session session;
    int result;
    if (!mp_options_begin(command, usage, groups, 2, argc, argv, &result)) return result;
    if (!mp_session_begin(&session, command, &f->engine, NULL, &result)) return result;
    mp_table table;
    mp_table_init(&table, bench->columns, bench->n_columns);
    mp_bench_header(&session);
    mepic_error err;
    mepic_status status = measure_all(bench, &session, f, &table, &err);
    mp_progress_clear(&session.progress);
    result = mp_bench_finish(&table, bench->name, f->csv);
    if (status != MEPIC_OK) result = mp_bench_fail(bench->name, &session, &err);
    mp_session_close(&session);
    return result;
}

/* ---- decode ------------------------------------------------------------------------------------------------------ */

static const char decode_usage[] =
    "usage: mepic bench decode -m FILE [OPTIONS]\n\n"
    "Tokens a second of a batch of requests at a context length, all decoding; random prompts, nothing shared.\n";

/* `batch` requests that all decode; replies[i].submitted says how far it came. */
static mepic_status start_batch(mp_session *session, mp_reply *replies, const speed_flags *f, const load *l,
                                mepic_error *err) {
    for (uint32_t i = 0; i < l->batch; i++) {
        mepic_prepared *prepared;
        mepic_status status =
            mp_bench_random_prompt(session, f->seed + i, 0, 0, l->length ? l->length : 1, &prepared, err);
        if (status != MEPIC_OK) return status;
        const mepic_request request = {
            .size = sizeof request, .prompt = prepared, .ignore_eos = true, .reuse = MEPIC_REUSE_NONE
        };
        status = mp_reply_submit(session, request, &replies[i], err);
        mepic_prepared_free(prepared);
        if (status != MEPIC_OK) return status;
    }
    for (;;) {
        uint32_t decoding = 0;
        for (uint32_t i = 0; i < l->batch; i++) {
            if (replies[i].done) {
                return mp_fail(err, MEPIC_ERR_TOO_LONG,
                               "the context ended before all %u requests of %u tokens decoded; give a longer --context",
                               l->batch, l->length);
            }
            decoding += replies[i].n_tokens > 0;
        }
        if (decoding == l->batch) return MEPIC_OK;
        mepic_status status = mp_replies_step(session, err);
        if (status != MEPIC_OK) return status;
    }
}

static uint64_t count_tokens(const mp_reply *replies, uint32_t batch) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < batch; i++) n += replies[i].n_tokens;
    return n;
}

/* Tokens a second over f->tokens steps of the whole batch. */
static mepic_status measure_decode(mp_session *session, const speed_flags *f, const load *l, double *rate,
                                   mepic_error *err) {
    const uint32_t batch = l->batch;
    mp_reply replies[BATCH_MAX];
    memset(replies, 0, sizeof replies);
    mepic_status status = start_batch(session, replies, f, l, err);
    uint64_t before = count_tokens(replies, batch), start = mp_now_ns();
    for (uint32_t step = 0; status == MEPIC_OK && step < f->tokens; step++) status = mp_replies_step(session, err);
    double seconds = (double)(mp_now_ns() - start) * 1e-9;
    if (status == MEPIC_OK) *rate = (double)(count_tokens(replies, batch) - before) / seconds;
    for (uint32_t i = 0; i < batch; i++) {
        if (replies[i].submitted) mepic_cancel(session->engine, replies[i].id);
    }
    mepic_error ignored;
    mepic_status end = mp_replies_wait(session, replies, batch, status == MEPIC_OK ? err : &ignored);
    for (uint32_t i = 0; i < batch; i++) mp_reply_clear(&replies[i]);
    return status == MEPIC_OK ? end : status;
}

static void add_decode_cells(mp_table *table, const load *l, double rate) {
    mp_table_add(table, "%u", l->batch);
    mp_table_add(table, "%u", l->length);
    mp_table_add(table, "%.2f", rate);
    mp_table_add(table, "%.3f", (double)l->batch * 1e3 / rate);
}

int mp_bench_decode(int argc, char **argv) {
    speed_flags f = { .lengths = { { 0, 512, 2048 }, 3 }, .batches = { { 1, 4, 16 }, 3 }, .tokens = 32, .repeats = 3 };
    const mp_option options[] = {
        MP_COUNTS(0, "contexts", &f.lengths, 0, 1u << 24, "N,...", "context lengths (default 0,512,2048)"),
        MP_COUNTS(0, "batches", &f.batches, 1, BATCH_MAX, "N,...", "batch sizes (default 1,4,16)"),
        MP_COUNT(0, "tokens", &f.tokens, 1, 1u << 20, "N", "steps that are timed (default 32)"),
        MP_COUNT(0, "repeats", &f.repeats, 1, REPEATS_MAX, "N", "runs of which the median counts (default 3)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the random prompts"),
        MP_TEXT(0, "csv", &f.csv, "FILE", "write the table there as well"),
    };
    const mp_option_group groups[] = { { "Benchmark", options, 6 }, mp_engine_flags_group(&f.engine) };
    static const speed_bench bench = {
        .name = "decode",
        .columns = { "batch", "context", "tokens/s", "ms/step", "x of first" },
        .n_columns = 5,
        .measure = measure_decode,
        .add_cells = add_decode_cells,
    };
    return run(&bench, decode_usage, &f, groups, argc, argv);
}

/* ---- prefill ----------------------------------------------------------------------------------------------------- */

static const char prefill_usage[] = "usage: mepic bench prefill -m FILE [OPTIONS]\n\n"
                                    "Prompt tokens a second of one request, to its first token; random prompts. With "
                                    "--chunks, a prompt is that many\n"
                                    "chunks, which are in the cache, and then --lengths tokens; --reuse none beside "
                                    "it says what computing all costs.\n";

static mepic_status prefill(mp_session *session, const speed_flags *f, uint32_t length, uint64_t seed, uint64_t *ns,
                            mepic_error *err) {
    mepic_prepared *prepared;
    mepic_status status = mp_bench_random_prompt(session, seed, f->chunks, f->chunk_tokens, length, &prepared, err);
    if (status != MEPIC_OK) return status;
    mepic_reuse otherwise = f->chunks ? MEPIC_REUSE_MEPIC : MEPIC_REUSE_NONE;
    const mepic_request request = { .size = sizeof request,
                                    .prompt = prepared,
                                    .max_tokens = 1,
                                    .ignore_eos = true,
                                    .reuse = f->engine.reuse ? (mepic_reuse)f->engine.reuse : otherwise };
    mp_reply reply = { 0 };
    status = mp_reply_run(session, &request, &reply, err);
    *ns = reply.usage.ttft_ns;
    mp_reply_clear(&reply);
    mepic_prepared_free(prepared);
    return status;
}

static mepic_status measure_prefill(mp_session *session, const speed_flags *f, const load *l, double *rate,
                                    mepic_error *err) {
    uint64_t ns;
    /* With chunks: puts them into the cache, behind another question. */
    mepic_status status = f->chunks ? prefill(session, f, 1, f->seed + REPEATS_MAX, &ns, err) : MEPIC_OK;
    if (status == MEPIC_OK) status = prefill(session, f, l->length, f->seed + l->repeat, &ns, err);
    if (status == MEPIC_OK) *rate = (double)l->length * 1e9 / (double)ns;
    return status;
}

static void add_prefill_cells(mp_table *table, const load *l, double rate) {
    mp_table_add(table, "%u", l->length);
    mp_table_add(table, "%.1f", rate);
    mp_table_add(table, "%.1f", (double)l->length * 1e3 / rate);
}

int mp_bench_prefill(int argc, char **argv) {
    speed_flags f = {
        .lengths = { { 128, 512, 2048 }, 3 }, .batches = { { 1 }, 1 }, .tokens = 1, .repeats = 3, .chunk_tokens = 1024
    };
    const mp_option options[] = {
        MP_COUNTS(0, "lengths", &f.lengths, 1, 1u << 24, "N,...", "prompt lengths (default 128,512,2048)"),
        MP_COUNT(0, "chunks", &f.chunks, 0, MP_BENCH_CHUNKS_MAX, "N", "chunks in front of them (default 0)"),
        MP_COUNT(0, "chunk-tokens", &f.chunk_tokens, 64, 1u << 20, "N", "tokens of a chunk (default 1024)"),
        MP_COUNT(0, "repeats", &f.repeats, 1, REPEATS_MAX, "N", "runs of which the median counts (default 3)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the random prompts"),
        MP_TEXT(0, "csv", &f.csv, "FILE", "write the table there as well"),
    };
    const mp_option_group groups[] = { { "Benchmark", options, 6 }, mp_engine_flags_group(&f.engine) };
    static const speed_bench bench = {
        .name = "prefill",
        .columns = { "tokens", "tokens/s", "TTFT ms", "x of first" },
        .n_columns = 4,
        .measure = measure_prefill,
        .add_cells = add_prefill_cells,
    };
    return run(&bench, prefill_usage, &f, groups, argc, argv);
}
