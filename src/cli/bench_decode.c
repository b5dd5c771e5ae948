/* `mepic bench decode` and `mepic bench prefill`: the speed of one model pass, by length and batch. */
#include "cli/bench.h"

#include "base/clock.h"

#include <string.h>

enum { BATCH_MAX = 256, REPEATS_MAX = 99 };

typedef struct speed_flags {
    mp_engine_flags engine;
    mp_counts lengths, batches;
    uint32_t tokens, repeats;
    uint64_t seed;
    const char *csv;
} speed_flags;

/* ---- decode ------------------------------------------------------------------------------------------------------ */

static const char decode_usage[] =
    "usage: mepic bench decode -m FILE [OPTIONS]\n\n"
    "Tokens a second of a batch of requests at a context length, all decoding; random prompts, nothing shared.\n";

/* `batch` requests that all decode; replies[i].submitted says how far it came. */
static mepic_status start_batch(mp_session *session, mp_reply *replies, uint32_t batch, uint32_t length,
                                const speed_flags *f, mepic_error *err) {
    for (uint32_t i = 0; i < batch; i++) {
        mepic_prepared *prepared;
        mepic_status status = mp_bench_random_prompt(session, f->seed + i, length ? length : 1, &prepared, err);
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
        for (uint32_t i = 0; i < batch; i++) {
            if (replies[i].done) {
                return mp_fail(err, MEPIC_ERR_TOO_LONG,
                               "the context ended before all %u requests of %u tokens decoded; give a longer --context",
                               batch, length);
            }
            decoding += replies[i].n_tokens > 0;
        }
        if (decoding == batch) return MEPIC_OK;
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
static mepic_status measure_decode(mp_session *session, uint32_t length, uint32_t batch, const speed_flags *f,
                                   double *rate, mepic_error *err) {
    mp_reply replies[BATCH_MAX];
    memset(replies, 0, sizeof replies);
    mepic_status status = start_batch(session, replies, batch, length, f, err);
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

static bool fits(const mp_session *session, uint32_t length, uint32_t batch, uint32_t tokens) {
    uint64_t tokens_each = (uint64_t)length + tokens + 64;
    uint64_t pages = (tokens_each / session->info.page_size + 1) * batch;
    return tokens_each <= session->info.context && pages <= session->info.pages;
}

static mepic_status decode_all(mp_session *session, const speed_flags *f, mp_table *table, mepic_error *err) {
    for (uint32_t b = 0; b < f->batches.n; b++) {
        double first = 0.0;
        for (uint32_t l = 0; l < f->lengths.n; l++) {
            uint32_t batch = f->batches.items[b], length = f->lengths.items[l];
            if (!fits(session, length, batch, f->tokens)) {
                fprintf(stderr,
                        "mepic bench decode: %u requests at %u tokens do not fit (%u pages, context %u); "
                        "left out\n",
                        batch, length, session->info.pages, session->info.context);
                continue;
            }
            double rates[REPEATS_MAX];
            for (uint32_t r = 0; r < f->repeats; r++) {
                mp_progress_show(&session->progress, "decode: batch %u at %u, run %u of %u", batch, length, r + 1,
                                 f->repeats);
                mepic_status status = measure_decode(session, length, batch, f, &rates[r], err);
                if (status != MEPIC_OK) return status;
            }
            double rate = mp_quantile(rates, f->repeats, 0.5);
            if (first == 0.0) first = rate;
            mp_table_add(table, "%u", batch);
            mp_table_add(table, "%u", length);
            mp_table_add(table, "%.2f", rate);
            mp_table_add(table, "%.3f", (double)batch * 1e3 / rate);
            mp_table_add(table, "%.3f", rate / first);
        }
    }
    return MEPIC_OK;
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
    mp_session session;
    int result;
    if (!mp_options_begin("bench decode", decode_usage, groups, 2, argc, argv, &result)) return result;
    if (!mp_session_begin(&session, "bench decode", &f.engine, NULL, &result)) return result;
    static const char *const columns[] = { "batch", "context", "tokens/s", "ms/step", "x of first" };
    mp_table table;
    mp_table_init(&table, columns, 5);
    mp_bench_header(&session);
    mepic_error err;
    mepic_status status = decode_all(&session, &f, &table, &err);
    mp_progress_clear(&session.progress);
    result = mp_bench_finish(&table, "decode", f.csv);
    if (status != MEPIC_OK) result = mp_bench_fail("decode", &session, &err);
    mp_session_close(&session);
    return result;
}

/* ---- prefill ----------------------------------------------------------------------------------------------------- */

static const char prefill_usage[] = "usage: mepic bench prefill -m FILE [OPTIONS]\n\n"
                                    "Prompt tokens a second of one request, to its first token; random prompts.\n";

static mepic_status measure_prefill(mp_session *session, uint32_t length, uint64_t seed, double *rate,
                                    mepic_error *err) {
    mepic_prepared *prepared;
    mepic_status status = mp_bench_random_prompt(session, seed, length, &prepared, err);
    if (status != MEPIC_OK) return status;
    const mepic_request request = {
        .size = sizeof request, .prompt = prepared, .max_tokens = 1, .ignore_eos = true, .reuse = MEPIC_REUSE_NONE
    };
    mp_reply reply = { 0 };
    status = mp_reply_run(session, &request, &reply, err);
    if (status == MEPIC_OK) *rate = (double)length * 1e9 / (double)reply.usage.ttft_ns;
    mp_reply_clear(&reply);
    mepic_prepared_free(prepared);
    return status;
}

static mepic_status prefill_all(mp_session *session, const speed_flags *f, mp_table *table, mepic_error *err) {
    double first = 0.0;
    for (uint32_t l = 0; l < f->lengths.n; l++) {
        uint32_t length = f->lengths.items[l];
        if (!fits(session, length, 1, 1)) {
            fprintf(stderr, "mepic bench prefill: %u tokens do not fit (%u pages, context %u); left out\n", length,
                    session->info.pages, session->info.context);
            continue;
        }
        double rates[REPEATS_MAX];
        for (uint32_t r = 0; r < f->repeats; r++) {
            mepic_status status = measure_prefill(session, length, f->seed + r, &rates[r], err);
            if (status != MEPIC_OK) return status;
        }
        double rate = mp_quantile(rates, f->repeats, 0.5);
        if (first == 0.0) first = rate;
        mp_table_add(table, "%u", length);
        mp_table_add(table, "%.1f", rate);
        mp_table_add(table, "%.1f", (double)length * 1e3 / rate);
        mp_table_add(table, "%.3f", rate / first);
    }
    return MEPIC_OK;
}

int mp_bench_prefill(int argc, char **argv) {
    speed_flags f = { .lengths = { { 128, 512, 2048 }, 3 }, .repeats = 3 };
    const mp_option options[] = {
        MP_COUNTS(0, "lengths", &f.lengths, 1, 1u << 24, "N,...", "prompt lengths (default 128,512,2048)"),
        MP_COUNT(0, "repeats", &f.repeats, 1, REPEATS_MAX, "N", "runs of which the median counts (default 3)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the random prompts"),
        MP_TEXT(0, "csv", &f.csv, "FILE", "write the table there as well"),
    };
    const mp_option_group groups[] = { { "Benchmark", options, 4 }, mp_engine_flags_group(&f.engine) };
    mp_session session;
    int result;
    if (!mp_options_begin("bench prefill", prefill_usage, groups, 2, argc, argv, &result)) return result;
    if (!mp_session_begin(&session, "bench prefill", &f.engine, NULL, &result)) return result;
    static const char *const columns[] = { "tokens", "tokens/s", "TTFT ms", "x of first" };
    mp_table table;
    mp_table_init(&table, columns, 4);
    mp_bench_header(&session);
    mepic_error err;
    mepic_status status = prefill_all(&session, &f, &table, &err);
    result = mp_bench_finish(&table, "prefill", f.csv);
    if (status != MEPIC_OK) result = mp_bench_fail("prefill", &session, &err);
    mp_session_close(&session);
    return result;
}
