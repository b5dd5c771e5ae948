/* `mepic eval`: what reuse costs in accuracy.
 *
 * Every question is asked over its own paragraph and distractors in a fixed random order, greedily, under each
 * configuration: `none`, and `mepic` with several numbers of linked tokens, after each canonical context. Kept per
 * (question, configuration) as one line of a CSV file: F1 against the references, the divergence of the first answer
 * token's distribution from that of `none`, whether the answer equals that of `none`. Lines that are there are not
 * computed again, so a run can be stopped and continued; for that the log-probabilities of `none` lie in OUT.none.
 *
 * The canonical context belongs to an engine, so engines are opened one after the other. */
#include "cli/commands.h"
#include "cli/conversation.h"
#include "cli/eval_record.h"
#include "cli/interrupt.h"
#include "cli/numbers.h"
#include "cli/reply.h"
#include "cli/score.h"
#include "cli/table.h"
#include "cli/xquad.h"

#include "base/clock.h"

#include <string.h>

enum { DISTRACTORS_MAX = 63, LINKS_MAX = 8, CONTEXTS_MAX = 2 };

static const char usage_text[] =
    "usage: mepic eval -m FILE --out FILE.csv [OPTIONS]\n\n"
    "Asks questions over paragraphs with everything computed and with documents shared, and compares the answers.\n"
    "Can be stopped and started again: what FILE.csv holds is not computed twice.\n";

static const char system_text[] = "Answer the question with a short span copied from the documents. Do not explain.";

/* Which canonical contexts are compared. */
enum { CONTEXT_NONE = 1, CONTEXT_GIVEN = 2 };
static const mp_word context_words[] = {
    { "none", CONTEXT_NONE }, { "given", CONTEXT_GIVEN }, { "both", CONTEXT_NONE | CONTEXT_GIVEN }, { NULL, 0 }
};

typedef struct eval_flags {
    mp_engine_flags engine;
    const char *data, *out;
    mp_counts links;
    uint32_t questions, distractors, max_tokens, contexts;
    uint64_t seed;
} eval_flags;

/* A request under way: the reply, and the logits of its first token. */
typedef struct attempt {
    mp_reply reply; /* first: a request's `user` is its reply */
    float *logits;  /* [n_vocab] */
    bool has_logits;
    mp_eval_key key;
} attempt;

typedef struct eval {
    const eval_flags *flags;
    mp_xquad xquad;
    uint32_t *order; /* questions, shuffled: the first N are asked */
    mp_eval_record record;
    mp_session *session;
    attempt attempts[LINKS_MAX + 1];
    float *none; /* [n_vocab] log-probabilities of `none` */
} eval;

/* ---- One question ------------------------------------------------------------------------------------------------ */

static void keep_first_logits(void *user, uint32_t position, const float *logits, uint32_t n_vocab) {
    attempt *a = user;
    (void)position;
    if (a->has_logits) return;
    memcpy(a->logits, logits, n_vocab * sizeof *logits);
    a->has_logits = true;
}

/* Its paragraph and distractors from the whole file, in an order that depends on seed and question only. */
static mepic_status prepare_question(const eval *e, uint32_t index, mepic_prepared **out, mepic_error *err) {
    const mp_xquad_question *q = &e->xquad.questions[index];
    mp_random random = { .state = e->flags->seed * 1000003 + index };
    uint32_t chosen[DISTRACTORS_MAX + 1] = { q->paragraph }, n = 1;
    while (n <= e->flags->distractors) {
        uint32_t candidate = mp_random_below(&random, e->xquad.n_paragraphs);
        bool taken = false;
        for (uint32_t i = 0; i < n; i++) taken |= chosen[i] == candidate;
        if (!taken) chosen[n++] = candidate;
    }
    mp_shuffle(&random, chosen, n);
    mp_document documents[DISTRACTORS_MAX + 1];
    for (uint32_t i = 0; i < n; i++) {
        const char *text = e->xquad.paragraphs[chosen[i]];
        documents[i] = (mp_document){ .text = (char *)text, .len = strlen(text) };
    }
    mp_turn turn = { .question = (char *)q->text };
    const mp_conversation conversation = {
        .system = (char *)system_text, .documents = documents, .n_documents = n, .turns = &turn, .n_turns = 1
    };
    return mp_conversation_prepare(&conversation, e->session->engine, out, err);
}

static mepic_status submit_attempt(eval *e, attempt *a, const mp_eval_key *key, const mepic_prepared *prepared,
                                   mepic_error *err) {
    float *logits = a->logits;
    *a = (attempt){ .logits = logits, .key = *key };
    const mepic_request request = {
        .size = sizeof request,
        .prompt = prepared,
        .max_tokens = e->flags->max_tokens,
        .reuse = key->context == MP_EVAL_NONE ? MEPIC_REUSE_NONE : MEPIC_REUSE_MEPIC,
        .link_tokens = key->link_tokens == 0 ? MEPIC_LINK_NONE : key->link_tokens,
        .on_logits = keep_first_logits,
    };
    return mp_reply_submit(e->session, request, &a->reply, err);
}

static mepic_status keep_attempt(eval *e, attempt *a, uint32_t index, mepic_error *err) {
    uint32_t n_vocab = e->session->info.n_vocab;
    const mp_xquad_question *q = &e->xquad.questions[index];
    const mepic_usage *usage = &a->reply.usage;
    mp_eval_line line = {
        .key = a->key,
        .f1 = mp_score_f1(a->reply.text.data, a->reply.text.len, q->answers, q->n_answers),
        .prompt_tokens = usage->prompt_tokens,
        .linked_tokens = usage->linked_tokens,
        .shared_tokens = usage->chunk_tokens + usage->compiled_tokens,
        .ttft_s = (double)usage->ttft_ns * 1e-9,
    };
    mp_log_softmax(a->logits, n_vocab);
    if (a->key.context == MP_EVAL_NONE) {
        line.same = true;
        memcpy(e->none, a->logits, n_vocab * sizeof *e->none);
        mepic_status status = mp_eval_record_put_none(&e->record, index, e->none, n_vocab, err);
        if (status != MEPIC_OK) return status;
    } else {
        line.kl = mp_kl_divergence(e->none, a->logits, n_vocab);
        line.same = mp_eval_record_same_answer(&e->record, index, a->reply.text.data, a->reply.text.len);
    }
    return mp_eval_record_add(&e->record, &line, a->reply.text.data, a->reply.text.len, err);
}

/* All missing configurations of one question on this engine together: their decode steps share the weights' reads. */
static mepic_status run_batch(eval *e, uint32_t index, const mp_eval_key *keys, uint32_t n, mepic_error *err) {
    mepic_prepared *prepared;
    mepic_status status = prepare_question(e, index, &prepared, err);
    if (status != MEPIC_OK) return status;
    uint32_t started = 0;
    while (status == MEPIC_OK && started < n) {
        status = submit_attempt(e, &e->attempts[started], &keys[started], prepared, err);
        started += status == MEPIC_OK;
    }
    for (uint32_t i = 0; status == MEPIC_OK && i < n;) {
        if (e->attempts[i].reply.done)
            i++;
        else
            status = mp_replies_step(e->session, err);
    }
    for (uint32_t i = 0; i < started; i++) {
        if (status == MEPIC_OK) status = keep_attempt(e, &e->attempts[i], index, err);
        mp_reply_clear(&e->attempts[i].reply);
    }
    mepic_prepared_free(prepared);
    return status;
}

/* `none` comes first, since the others are compared with it. */
static mepic_status run_question(eval *e, uint32_t index, mp_eval_context context, mepic_error *err) {
    mp_eval_key keys[LINKS_MAX], none = { .question = index, .context = MP_EVAL_NONE };
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->flags->links.n; i++) {
        mp_eval_key key = { .question = index, .context = context, .link_tokens = e->flags->links.items[i] };
        if (!mp_eval_record_has(&e->record, &key)) keys[n++] = key;
    }
    mepic_status status = MEPIC_OK;
    bool has_none = mp_eval_record_has(&e->record, &none);
    if (!has_none) status = run_batch(e, index, &none, 1, err);
    if (status != MEPIC_OK || n == 0) return status;
    if (has_none) status = mp_eval_record_get_none(&e->record, index, e->none, e->session->info.n_vocab, err);
    return status == MEPIC_OK ? run_batch(e, index, keys, n, err) : status;
}

/* ---- One engine -------------------------------------------------------------------------------------------------- */

static mepic_status buffers_open(eval *e, mepic_error *err) {
    size_t n = e->session->info.n_vocab;
    e->none = mp_calloc(n, sizeof *e->none);
    bool ok = e->none != NULL;
    for (uint32_t i = 0; i <= LINKS_MAX; i++) {
        e->attempts[i].logits = mp_calloc(n, sizeof(float));
        ok &= e->attempts[i].logits != NULL;
    }
    return ok ? MEPIC_OK : mp_fail_nomem(err, "logits", n * sizeof(float));
}

static void buffers_close(eval *e) {
    mp_free(e->none);
    e->none = NULL;
    for (uint32_t i = 0; i <= LINKS_MAX; i++) {
        mp_free(e->attempts[i].logits);
        e->attempts[i].logits = NULL;
    }
}

static mepic_status run_engine(eval *e, mp_eval_context context, mepic_error *err) {
    mepic_status status = buffers_open(e, err);
    uint64_t start = mp_now_ns();
    mp_interrupt_arm();
    for (uint32_t i = 0; status == MEPIC_OK && i < e->flags->questions && !mp_interrupted(); i++) {
        double minutes = (double)(mp_now_ns() - start) / 60e9;
        mp_progress_show(&e->session->progress, "eval: canonical context %s, question %u of %u, %.1f minutes",
                         mp_eval_context_name(context), i + 1, e->flags->questions, minutes);
        status = run_question(e, e->order[i], context, err);
    }
    bool stopped = mp_interrupted();
    mp_interrupt_disarm();
    mp_progress_clear(&e->session->progress);
    buffers_close(e);
    if (status == MEPIC_OK && stopped) {
        status = mp_fail(err, MEPIC_ERR_BUSY, "stopped; the same command goes on from here");
    }
    return status;
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

static const char *const columns[] = { "<canonical", "link", "n",  "recomputed %", "F1", "F1 - none",
                                       "95 % from",  "to",   "KL", "95 % from",    "to", "same %" };
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

typedef struct series {
    double *f1, *difference, *kl; /* [questions] */
    uint32_t n, same;
    double linked, reusable;
} series;

static void collect(const eval *e, mp_eval_context context, uint32_t link_tokens, series *s) {
    s->n = s->same = 0;
    s->linked = s->reusable = 0.0;
    for (uint32_t i = 0; i < e->flags->questions; i++) {
        mp_eval_key key = { .question = e->order[i], .context = context, .link_tokens = link_tokens };
        mp_eval_key none_key = { .question = e->order[i], .context = MP_EVAL_NONE };
        const mp_eval_line *line = mp_eval_record_find(&e->record, &key);
        const mp_eval_line *none = mp_eval_record_find(&e->record, &none_key);
        if (!line || !none) continue;
        s->f1[s->n] = 100.0 * line->f1;
        s->difference[s->n] = 100.0 * (line->f1 - none->f1);
        s->kl[s->n++] = line->kl;
        s->same += line->same;
        s->linked += line->linked_tokens;
        s->reusable += line->linked_tokens + line->shared_tokens;
    }
}

static void add_row(mp_table *table, const eval *e, mp_eval_context context, uint32_t link_tokens, series *s) {
    collect(e, context, link_tokens, s);
    if (s->n == 0) return;
    mp_interval difference = mp_bootstrap(s->difference, s->n, e->flags->seed);
    mp_interval kl = mp_bootstrap(s->kl, s->n, e->flags->seed);
    bool none = context == MP_EVAL_NONE;
    mp_table_add(table, "%s", none ? "(everything computed)" : mp_eval_context_name(context));
    if (none)
        mp_table_add(table, "-");
    else
        mp_table_add(table, "%u", link_tokens);
    mp_table_add(table, "%u", s->n);
    mp_table_add(table, "%.1f", none ? 100.0 : s->reusable > 0.0 ? 100.0 * s->linked / s->reusable : 0.0);
    mp_table_add(table, "%.2f", mp_mean(s->f1, s->n));
    mp_table_add(table, "%+.2f", difference.mean);
    mp_table_add(table, "%+.2f", difference.low);
    mp_table_add(table, "%+.2f", difference.high);
    mp_table_add(table, "%.4f", kl.mean);
    mp_table_add(table, "%.4f", kl.low);
    mp_table_add(table, "%.4f", kl.high);
    mp_table_add(table, "%.1f", 100.0 * s->same / s->n);
}

static void print_summary(const eval *e) {
    uint32_t n = e->flags->questions;
    series s = { .f1 = mp_calloc(n, sizeof(double)),
                 .difference = mp_calloc(n, sizeof(double)),
                 .kl = mp_calloc(n, sizeof(double)) };
    mp_table table;
    mp_table_init(&table, columns, N_COLUMNS);
    if (s.f1 && s.difference && s.kl) {
        add_row(&table, e, MP_EVAL_NONE, 0, &s);
        for (uint32_t c = 0; c < 2; c++) {
            mp_eval_context context = c == 0 ? MP_EVAL_WITHOUT : MP_EVAL_GIVEN;
            for (uint32_t i = 0; i < e->flags->links.n; i++) add_row(&table, e, context, e->flags->links.items[i], &s);
        }
        mp_table_print(&table, stdout);
    }
    mp_table_clear(&table);
    mp_free(s.f1);
    mp_free(s.difference);
    mp_free(s.kl);
}

/* ---- The command ------------------------------------------------------------------------------------------------- */

static mepic_status eval_open(eval *e, const eval_flags *f, mepic_error *err) {
    if (!f->out) return mp_fail(err, MEPIC_ERR_ARGUMENT, "no file for the results; name one with --out FILE.csv");
    if (!f->engine.model) return mp_fail(err, MEPIC_ERR_ARGUMENT, "no model given; name a GGUF file with -m FILE");
    if (f->links.n > LINKS_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--links: at most %d numbers, not %u", LINKS_MAX, f->links.n);
    }
    mepic_status status = mp_xquad_open(&e->xquad, f->data, err);
    if (status != MEPIC_OK) return status;
    if (f->questions > e->xquad.n_questions) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--questions %u: the file has %u", f->questions, e->xquad.n_questions);
    }
    if (f->distractors >= e->xquad.n_paragraphs) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--distractors %u: the file has %u paragraphs in all", f->distractors,
                       e->xquad.n_paragraphs);
    }
    e->order = mp_calloc(e->xquad.n_questions, sizeof *e->order);
    if (!e->order) return mp_fail_nomem(err, "questions", e->xquad.n_questions * sizeof *e->order);
    for (uint32_t i = 0; i < e->xquad.n_questions; i++) e->order[i] = i;
    mp_random random = { .state = f->seed };
    mp_shuffle(&random, e->order, e->xquad.n_questions);
    const char *slash = strrchr(f->engine.model, '/');
    char settings[256];
    snprintf(settings, sizeof settings, "# model %.100s, %u distractors, at most %u tokens, seed %llu, context %.60s",
             slash ? slash + 1 : f->engine.model, f->distractors, f->max_tokens, (unsigned long long)f->seed,
             f->engine.canonical_context ? f->engine.canonical_context : "built-in");
    return mp_eval_record_open(&e->record, f->out, settings, err);
}

static int run_contexts(eval *e, const eval_flags *f, mepic_status *status, mepic_error *err) {
    int result = MP_EXIT_OK;
    for (uint32_t c = 0; c < CONTEXTS_MAX && *status == MEPIC_OK; c++) {
        mp_eval_context context = c == 0 ? MP_EVAL_WITHOUT : MP_EVAL_GIVEN;
        if (!(f->contexts & (c == 0 ? CONTEXT_NONE : CONTEXT_GIVEN))) continue;
        mp_engine_flags flags = f->engine;
        if (context == MP_EVAL_WITHOUT) flags.canonical_context = "none";
        mp_session session;
        if (!mp_session_begin(&session, "eval", &flags, NULL, &result)) return result;
        e->session = &session;
        *status = run_engine(e, context, err);
        mp_session_close(&session);
    }
    return result;
}

int mp_cli_eval(int argc, char **argv) {
    eval_flags f = { .links = { { 0, 16, 32, 64 }, 4 },
                     .questions = 400,
                     .distractors = 7,
                     .max_tokens = 24,
                     .contexts = CONTEXT_NONE | CONTEXT_GIVEN,
                     .seed = 1 };
    const mp_option options[] = {
        MP_TEXT('o', "out", &f.out, "FILE", "results, one line a question and configuration; continued if it is there"),
        MP_TEXT(0, "data", &f.data, "FILE",
                "questions in SQuAD's JSON layout (default: xquad.en.json in ../shared/data, data or here)"),
        MP_COUNT(0, "questions", &f.questions, 1, 1u << 20, "N", "how many (default 400)"),
        MP_COUNT(0, "distractors", &f.distractors, 0, DISTRACTORS_MAX, "N",
                 "other paragraphs beside the right one (default 7)"),
        MP_COUNTS(0, "links", &f.links, 0, 1u << 20, "N,...", "numbers of linked tokens (default 0,16,32,64)"),
        MP_WORD(0, "contexts", &f.contexts, context_words, "WHICH",
                "canonical contexts: none, given (the engine's option) or both (default)"),
        MP_COUNT('n', "max-tokens", &f.max_tokens, 1, 4096, "N", "longest answer (default 24)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the choices (default 1)"),
    };
    const mp_option_group groups[] = { { "Evaluation", options, sizeof options / sizeof *options },
                                       mp_engine_flags_group(&f.engine) };
    int result;
    if (!mp_options_begin("eval", usage_text, groups, 2, argc, argv, &result)) return result;
    eval e = { .flags = &f };
    mepic_error err;
    mepic_status status = eval_open(&e, &f, &err);
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic eval: %s\n", err.message);
        result = mp_exit_status(status);
    } else {
        result = run_contexts(&e, &f, &status, &err);
        print_summary(&e);
        if (status != MEPIC_OK) {
            fprintf(stderr, "mepic eval: %s\n", err.message);
            result = MP_EXIT_FAILURE;
        }
    }
    mp_eval_record_close(&e.record);
    if (e.xquad.root) mp_xquad_close(&e.xquad);
    mp_free(e.order);
    return result;
}
