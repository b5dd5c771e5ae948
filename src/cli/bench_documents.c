/* `mepic bench documents`: questions over one set of documents, each with the documents in another order, answered with
 * everything computed (`none`) and with the documents' KV shared (`mepic`).
 *
 * Both policies run on one engine, one after the other, each from an empty cache. Pages: what a question adds to the
 * pages in use, so the total is what it takes to keep all questions' KV. */
#include "cli/bench.h"
#include "cli/conversation.h"

#include <string.h>

enum { QUESTIONS_MAX = 256, QUESTIONS_MAX_BYTES = 1 << 20, N_POLICIES = 2 };

static const char usage_text[] =
    "usage: mepic bench documents -m FILE --doc FILE... --questions FILE [OPTIONS]\n\n"
    "Asks every question (one a line; behind a bar, the words a right answer holds) with the documents in another\n"
    "order, with --reuse none and with --reuse mepic, and compares tokens computed, time to first token and pages.\n";

static const mepic_reuse policies[N_POLICIES] = { MEPIC_REUSE_NONE, MEPIC_REUSE_MEPIC };

typedef struct documents_flags {
    mp_engine_flags engine;
    mp_texts documents;
    const char *questions, *system, *csv;
    uint32_t max_tokens;
    uint64_t seed;
} documents_flags;

typedef struct question {
    const char *text;
    const char *expected; /* NULL: not given */
    uint32_t *order;      /* [n_documents] */
    mp_reply replies[N_POLICIES];
    uint32_t pages[N_POLICIES];
} question;

typedef struct document_set {
    mp_conversation conversation; /* the documents, in the order they were given */
    char *lines;                  /* the file that the questions point into */
    question *questions;          /* [n] */
    uint32_t n;
} document_set;

/* ---- Input ------------------------------------------------------------------------------------------------------- */

static mepic_status split_questions(document_set *set, const char *path, mepic_error *err) {
    for (char *line = set->lines; *line;) {
        char *end = line + strcspn(line, "\n");
        char *next = *end ? end + 1 : end;
        *end = 0;
        if (*line && *line != '#') {
            if (set->n == QUESTIONS_MAX) {
                return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s has more than %d questions", path, QUESTIONS_MAX);
            }
            question *q = &set->questions[set->n++];
            char *bar = strchr(line, '|');
            q->text = line;
            q->expected = bar ? bar + 1 + strspn(bar + 1, " ") : NULL;
            if (bar) *bar = 0;
            for (size_t len = strlen(line); len > 0 && line[len - 1] == ' '; len--) line[len - 1] = 0;
        }
        line = next;
    }
    return set->n > 0 ? MEPIC_OK : mp_fail(err, MEPIC_ERR_ARGUMENT, "%s has no questions; write one a line", path);
}

/* The first question sees the order given; the others shuffled ones. */
static mepic_status choose_orders(document_set *set, uint64_t seed, mepic_error *err) {
    uint32_t n = set->conversation.n_documents;
    mp_random random = { .state = seed };
    for (uint32_t i = 0; i < set->n; i++) {
        uint32_t *order = mp_calloc(n, sizeof *order);
        if (!order) return mp_fail_nomem(err, "an order", n * sizeof *order);
        for (uint32_t d = 0; d < n; d++) order[d] = d;
        if (i > 0) mp_shuffle(&random, order, n);
        set->questions[i].order = order;
    }
    return MEPIC_OK;
}

static mepic_status set_open(document_set *set, const documents_flags *f, mepic_error *err) {
    if (f->documents.n == 0) return mp_fail(err, MEPIC_ERR_ARGUMENT, "no documents; name them with --doc FILE");
    if (!f->questions) return mp_fail(err, MEPIC_ERR_ARGUMENT, "no questions; name a file with --questions FILE");
    set->questions = mp_calloc(QUESTIONS_MAX, sizeof *set->questions);
    if (!set->questions) return mp_fail_nomem(err, "questions", QUESTIONS_MAX * sizeof *set->questions);
    size_t len;
    mepic_status status = mp_file_read(f->questions, QUESTIONS_MAX_BYTES, &set->lines, &len, err);
    if (status == MEPIC_OK) status = split_questions(set, f->questions, err);
    for (uint32_t i = 0; status == MEPIC_OK && i < f->documents.n; i++) {
        status = mp_conversation_add(&set->conversation, f->documents.items[i], err);
    }
    return status == MEPIC_OK ? choose_orders(set, f->seed, err) : status;
}

static void set_close(document_set *set) {
    for (uint32_t i = 0; i < set->n; i++) {
        mp_free(set->questions[i].order);
        for (uint32_t p = 0; p < N_POLICIES; p++) mp_reply_clear(&set->questions[i].replies[p]);
    }
    mp_free(set->questions);
    mp_free(set->lines);
    mp_conversation_clear(&set->conversation);
}

/* ---- Running ----------------------------------------------------------------------------------------------------- */

/* Pages with something in them, without the canonical context, which is there once for all documents there will be. */
static uint32_t pages_in_use(const mp_session *session) {
    mepic_stats stats;
    mepic_stats_read(session->engine, &stats);
    return stats.pages_total - stats.pages_free - stats.pages_canonical;
}

static mepic_status prepare_question(const document_set *set, const question *q, const mp_session *session,
                                     const char *system, mepic_prepared **out, mepic_error *err) {
    uint32_t n = set->conversation.n_documents;
    mp_document *documents = mp_calloc(n, sizeof *documents);
    if (!documents) return mp_fail_nomem(err, "documents", n * sizeof *documents);
    for (uint32_t i = 0; i < n; i++) documents[i] = set->conversation.documents[q->order[i]];
    mp_turn turn = { .question = (char *)q->text };
    const mp_conversation reordered = {
        .system = (char *)system, .documents = documents, .n_documents = n, .turns = &turn, .n_turns = 1
    };
    mepic_status status = mp_conversation_prepare(&reordered, session->engine, out, err);
    mp_free(documents);
    return status;
}

/* Steps by hand, to see how many pages are in use while the request runs. */
static mepic_status ask(mp_session *session, const mepic_request *request, mp_reply *reply, uint32_t *pages,
                        mepic_error *err) {
    uint32_t before = pages_in_use(session), most = before;
    mepic_status status = mp_reply_submit(session, *request, reply, err);
    while (status == MEPIC_OK && !reply->done) {
        status = mp_replies_step(session, err);
        uint32_t now = pages_in_use(session);
        if (now > most) most = now;
    }
    *pages = most - before;
    return status;
}

static mepic_status run_policy(mp_session *session, document_set *set, const documents_flags *f, uint32_t policy,
                               mepic_error *err) {
    mepic_status status = MEPIC_OK;
    mepic_cache_clear(session->engine);
    for (uint32_t i = 0; status == MEPIC_OK && i < set->n; i++) {
        question *q = &set->questions[i];
        mp_progress_show(&session->progress, "%s: question %u of %u", mp_reuse_name(policies[policy]), i + 1, set->n);
        mepic_prepared *prepared;
        status = prepare_question(set, q, session, f->system, &prepared, err);
        if (status != MEPIC_OK) break;
        const mepic_request request = {
            .size = sizeof request, .prompt = prepared, .max_tokens = f->max_tokens, .reuse = policies[policy]
        };
        status = ask(session, &request, &q->replies[policy], &q->pages[policy], err);
        mepic_prepared_free(prepared);
    }
    return status;
}

/* ---- Output ------------------------------------------------------------------------------------------------------ */

static bool contains(const mp_buf *text, const char *words) {
    size_t n = strlen(words);
    for (size_t i = 0; i + n <= text->len; i++) {
        if (strncasecmp(text->data + i, words, n) == 0) return true;
    }
    return false;
}

static void print_answer(const char *policy, const mp_buf *text, const char *expected) {
    size_t len = text->len;
    while (len > 0 && strchr(" \n", text->data[len - 1])) len--;
    printf("   %-6s ", policy);
    for (size_t i = 0; i < len; i++) putchar(text->data[i] == '\n' ? ' ' : text->data[i]);
    if (expected) printf(contains(text, expected) ? "   [right]" : "   [expected: %s]", expected);
    putchar('\n');
}

static void print_answers(const document_set *set) {
    for (uint32_t i = 0; i < set->n; i++) {
        const question *q = &set->questions[i];
        printf("\n%u. %s   (documents", i + 1, q->text);
        for (uint32_t d = 0; d < set->conversation.n_documents; d++) printf(" %u", q->order[d] + 1);
        printf(")\n");
        for (uint32_t p = 0; p < N_POLICIES; p++) {
            print_answer(mp_reuse_name(policies[p]), &q->replies[p].text, q->expected);
        }
    }
    putchar('\n');
}

typedef struct totals {
    double computed[N_POLICIES], ttft[N_POLICIES], pages[N_POLICIES];
} totals;

static void add_row(mp_table *table, const char *name, const totals *t) {
    mp_table_add(table, "%s", name);
    mp_table_add(table, "%.0f", t->computed[0]);
    mp_table_add(table, "%.0f", t->computed[1]);
    mp_table_add(table, "%.1f x", t->computed[1] > 0.0 ? t->computed[0] / t->computed[1] : 0.0);
    mp_table_add(table, "%.2f", t->ttft[0]);
    mp_table_add(table, "%.2f", t->ttft[1]);
    mp_table_add(table, "%.1f x", t->ttft[1] > 0.0 ? t->ttft[0] / t->ttft[1] : 0.0);
    mp_table_add(table, "%.0f", t->pages[0]);
    mp_table_add(table, "%.0f", t->pages[1]);
    mp_table_add(table, "%.1f x", t->pages[1] > 0.0 ? t->pages[0] / t->pages[1] : 0.0);
}

static void fill_table(mp_table *table, const document_set *set) {
    totals all = { 0 }, warm = { 0 };
    for (uint32_t i = 0; i < set->n; i++) {
        const question *q = &set->questions[i];
        totals one;
        for (uint32_t p = 0; p < N_POLICIES; p++) {
            one.computed[p] = mp_usage_computed(&q->replies[p].usage);
            one.ttft[p] = (double)q->replies[p].usage.ttft_ns * 1e-9;
            one.pages[p] = q->pages[p];
            all.computed[p] += one.computed[p];
            all.ttft[p] += one.ttft[p];
            all.pages[p] += one.pages[p];
            warm.computed[p] += i > 0 ? one.computed[p] : 0.0;
            warm.ttft[p] += i > 0 ? one.ttft[p] : 0.0;
            warm.pages[p] += i > 0 ? one.pages[p] : 0.0;
        }
        char name[16];
        snprintf(name, sizeof name, "%u", i + 1);
        add_row(table, name, &one);
    }
    if (set->n > 1) add_row(table, "all but the first", &warm);
    add_row(table, "all", &all);
}

int mp_bench_documents(int argc, char **argv) {
    documents_flags f = { .max_tokens = 32, .seed = 1 };
    const mp_option options[] = {
        MP_TEXTS('d', "doc", &f.documents, "FILE", "a document; may be given several times"),
        MP_TEXT(0, "questions", &f.questions, "FILE", "questions, one a line"),
        MP_TEXT('s', "system", &f.system, "TEXT", "system message (default: the model's own)"),
        MP_COUNT('n', "max-tokens", &f.max_tokens, 1, 1u << 20, "N", "longest answer (default 32)"),
        MP_NUMBER(0, "seed", &f.seed, 0, UINT64_MAX, "N", "of the orders (default 1)"),
        MP_TEXT(0, "csv", &f.csv, "FILE", "write the table there as well"),
    };
    const mp_option_group groups[] = { { "Benchmark", options, sizeof options / sizeof *options },
                                       mp_engine_flags_group(&f.engine) };
    int result;
    if (!mp_options_begin("bench documents", usage_text, groups, 2, argc, argv, &result)) return result;
    document_set set = { 0 };
    mp_session session;
    mepic_error err;
    mepic_status status = set_open(&set, &f, &err);
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic bench documents: %s\n", err.message);
        result = mp_exit_status(status);
    } else if (mp_session_begin(&session, "bench documents", &f.engine, NULL, &result)) {
        static const char *const columns[] = { "<question", "computed: none",    "mepic",
                                               "less",      "TTFT s: none",      "mepic",
                                               "less",      "pages added: none", "mepic",
                                               "less" };
        mp_table table;
        mp_table_init(&table, columns, sizeof columns / sizeof *columns);
        mp_bench_header(&session);
        for (uint32_t p = 0; status == MEPIC_OK && p < N_POLICIES; p++)
            status = run_policy(&session, &set, &f, p, &err);
        mp_progress_clear(&session.progress);
        if (status == MEPIC_OK) {
            print_answers(&set);
            fill_table(&table, &set);
            result = mp_bench_finish(&table, "documents", f.csv);
        } else {
            mp_table_clear(&table);
            result = mp_bench_fail("documents", &session, &err);
        }
        mp_session_close(&session);
    }
    set_close(&set);
    return result;
}
