/* `mepic run`: one question over documents, or a conversation. */
#include "cli/chat.h"
#include "cli/commands.h"
#include "cli/reply.h"

#include <jansson.h>
#include <string.h>

enum { PROMPT_MAX_BYTES = 16 << 20, STOP_MAX = 16, N_PROMPT_OPTIONS = 6, N_SAMPLING_OPTIONS = 11 };

static const char usage_text[] =
    "usage: mepic run -m FILE [--doc FILE]... [-p PROMPT] [OPTIONS]\n\n"
    "Answers PROMPT, or without one reads questions and commands (/help) from standard input. The answer goes to\n"
    "standard output; a line with what was reused and what was computed goes to standard error.\n";

typedef struct run_flags {
    mp_engine_flags engine;
    const char *system, *prompt;
    mp_texts documents, stops;
    bool json, hash, ignore_eos;
    uint32_t max_tokens, top_k, repeat_window;
    uint64_t seed;
    double temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    mp_option table[N_PROMPT_OPTIONS], sampling[N_SAMPLING_OPTIONS];
} run_flags;

static mp_option_group prompt_group(run_flags *f) {
    const mp_option options[N_PROMPT_OPTIONS] = {
        MP_TEXT('s', "system", &f->system, "TEXT", "system message (default: the model's own)"),
        MP_TEXTS('d', "doc", &f->documents, "FILE",
                 "a document in front of the question; may be given several times; at most 16 MiB each"),
        MP_TEXT('p', "prompt", &f->prompt, "TEXT", "the question; - reads it from standard input"),
        MP_COUNT('n', "max-tokens", &f->max_tokens, 1, 1u << 24, "N",
                 "longest answer in tokens (default: until the context is full)"),
        MP_FLAG(0, "json", &f->json, "print one JSON object instead of text"),
        MP_FLAG(0, "hash", &f->hash, "print a hash of the logits: equal for equal answers, hit or miss"),
    };
    memcpy(f->table, options, sizeof options);
    return (mp_option_group){ "Prompt", f->table, N_PROMPT_OPTIONS };
}

static mp_option_group sampling_group(run_flags *f) {
    const mp_option options[N_SAMPLING_OPTIONS] = {
        MP_REAL(0, "temperature", &f->temperature, 0, 100, "T", "0 (default) takes the likeliest token"),
        MP_COUNT(0, "top-k", &f->top_k, 0, 1u << 24, "N", "of the N likeliest tokens (0: off)"),
        MP_REAL(0, "top-p", &f->top_p, 0, 1, "P", "of the likeliest tokens that make up P (1: off)"),
        MP_REAL(0, "min-p", &f->min_p, 0, 1, "P", "of tokens at least P times as likely as the first"),
        MP_REAL(0, "repeat-penalty", &f->repeat_penalty, 0.01, 100, "R", "weight against repetition (1: off)"),
        MP_COUNT(0, "repeat-window", &f->repeat_window, 1, 1u << 16, "N",
                 "tokens that --repeat-penalty looks back over (default 64)"),
        MP_REAL(0, "presence-penalty", &f->presence_penalty, -100, 100, "R", "taken off a token that the answer holds"),
        MP_REAL(0, "frequency-penalty", &f->frequency_penalty, -100, 100, "R",
                "taken off a token for each time the answer holds it"),
        MP_NUMBER(0, "seed", &f->seed, 0, UINT64_MAX, "N", "of the random choices (default 0)"),
        MP_TEXTS(0, "stop", &f->stops, "TEXT", "ends the answer and is not part of it; may be given 16 times"),
        MP_FLAG(0, "ignore-eos", &f->ignore_eos, "go on where the model would end"),
    };
    memcpy(f->sampling, options, sizeof options);
    return (mp_option_group){ "Sampling", f->sampling, N_SAMPLING_OPTIONS };
}

static mepic_request make_request(const run_flags *f) {
    return (mepic_request){
        .size = sizeof(mepic_request),
        .sampling = {
            .temperature = (float)f->temperature,
            .top_k = f->top_k,
            .top_p = (float)f->top_p,
            .min_p = (float)f->min_p,
            .repeat_penalty = (float)f->repeat_penalty,
            .repeat_window = f->repeat_window,
            .presence_penalty = (float)f->presence_penalty,
            .frequency_penalty = (float)f->frequency_penalty,
            .seed = f->seed,
        },
        .max_tokens = f->max_tokens,
        .stop = f->stops.items,
        .n_stop = f->stops.n,
        .ignore_eos = f->ignore_eos,
        .reuse = (mepic_reuse)f->engine.reuse,
    };
}

/* ---- One answer -------------------------------------------------------------------------------------------------- */

/* The partner: an engine in this process. */
typedef struct asked {
    mp_session *session;
    mepic_request request; /* without the prompt */
    mp_reply reply;        /* the last one */
} asked;

static void print_text(void *user, const char *text, size_t len) {
    (void)user;
    mp_chat_print(text, len);
}

/* The reply's text goes to `text`, so that who asks keeps it. */
static mepic_status ask_engine(void *user, const mp_conversation *conversation, mepic_reuse reuse, mp_buf *text,
                               char *line, size_t cap, mepic_error *err) {
    asked *a = user;
    mepic_prepared *prepared;
    mepic_status status = mp_conversation_prepare(conversation, a->session->engine, &prepared, err);
    if (status != MEPIC_OK) return status;
    mepic_request request = a->request;
    request.prompt = prepared;
    request.reuse = reuse;
    a->reply = (mp_reply){ .on_text = a->reply.on_text };
    status = mp_reply_run(a->session, &request, &a->reply, err);
    mepic_prepared_free(prepared);
    *text = a->reply.text;
    a->reply.text = (mp_buf){ 0 };
    if (status == MEPIC_OK) mp_usage_describe(&a->reply.usage, line, cap);
    return status;
}

static void print_stats(void *user) {
    const asked *a = user;
    mepic_stats s;
    mepic_stats_read(a->session->engine, &s);
    printf("pages: %u of %u free, %u cached, %u of the canonical context\n", s.pages_free, s.pages_total,
           s.pages_evictable, s.pages_canonical);
    printf("rows computed: %llu text, %llu linked, %llu compiled, %llu decoded, in %llu steps\n",
           (unsigned long long)s.rows_text, (unsigned long long)s.rows_link, (unsigned long long)s.rows_compile,
           (unsigned long long)s.rows_decode, (unsigned long long)s.steps);
    printf("documents found in the cache: %llu of %llu; prefix tokens found: %llu; too short to share: %llu\n",
           (unsigned long long)s.chunk_hits, (unsigned long long)s.chunk_lookups,
           (unsigned long long)s.prefix_hit_tokens, (unsigned long long)s.short_chunks);
}

static void print_closing_line(const char *line, const uint64_t *hash) {
    fprintf(stderr, "%s", line);
    if (hash) fprintf(stderr, "; logits %016llx", (unsigned long long)*hash);
    fputc('\n', stderr);
}

/* ---- JSON -------------------------------------------------------------------------------------------------------- */

/* Names and paths may hold any bytes; JSON is UTF-8. */
static json_t *json_bytes(const char *text, size_t len) {
    json_t *string = json_stringn(text ? text : "", len);
    return string ? string : json_string("(not UTF-8)");
}

static json_t *json_usage(const mepic_usage *u) {
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f}", "prompt_tokens",
                     (json_int_t)u->prompt_tokens, "prefix_tokens", (json_int_t)u->prefix_tokens, "chunk_tokens",
                     (json_int_t)u->chunk_tokens, "linked_tokens", (json_int_t)u->linked_tokens, "compiled_tokens",
                     (json_int_t)u->compiled_tokens, "computed_tokens", (json_int_t)u->computed_tokens,
                     "completion_tokens", (json_int_t)u->completion_tokens, "pages_held", (json_int_t)u->pages_held,
                     "pages_unshared", (json_int_t)u->pages_unshared, "preemptions", (json_int_t)u->preemptions,
                     "queue_s", (double)u->queue_ns * 1e-9, "ttft_s", (double)u->ttft_ns * 1e-9, "total_s",
                     (double)u->total_ns * 1e-9, "tokens_per_second", mp_usage_decode_rate(u));
}

static json_t *json_model(const mp_session *session) {
    const mepic_model_info *m = &session->info;
    return json_pack("{s:o, s:o, s:o, s:s, s:s, s:I, s:I, s:I, s:I, s:b, s:f}", "name",
                     json_bytes(m->name, strlen(m->name)), "architecture",
                     json_bytes(m->architecture, strlen(m->architecture)), "file_types",
                     json_bytes(m->file_types, strlen(m->file_types)), "backend", m->backend, "chat_family",
                     m->chat_family, "parameters", (json_int_t)m->parameters, "context", (json_int_t)m->context,
                     "page_size", (json_int_t)m->page_size, "pages", (json_int_t)m->pages, "position_exact",
                     (int)m->position_exact, "open_s", (double)session->open_ns * 1e-9);
}

static bool print_json(const mp_session *session, const mp_conversation *conversation, const mepic_request *request,
                       const mp_reply *reply, const mp_buf *text, bool hash) {
    json_t *documents = json_array();
    for (uint32_t i = 0; i < conversation->n_documents; i++) {
        const mp_document *document = &conversation->documents[i];
        json_array_append_new(documents,
                              json_pack("{s:o, s:I}", "name", json_bytes(document->name, strlen(document->name)),
                                        "bytes", (json_int_t)document->len));
    }
    mepic_reuse reuse = request->reuse == MEPIC_REUSE_DEFAULT ? MEPIC_REUSE_MEPIC : request->reuse;
    json_t *root = json_pack("{s:o, s:s, s:s, s:o, s:o, s:o}", "answer", json_bytes(text->data, text->len), "finish",
                             mp_finish_name(reply->finish), "reuse", mp_reuse_name(reuse), "usage",
                             json_usage(&reply->usage), "model", json_model(session), "documents", documents);
    if (!root) return false;
    if (hash) {
        char digits[20];
        snprintf(digits, sizeof digits, "%016llx", (unsigned long long)reply->logits_hash);
        json_object_set_new(root, "logits_hash", json_string(digits));
    }
    bool ok = json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) == 0;
    putchar('\n');
    json_decref(root);
    return ok;
}

/* ---- The command ------------------------------------------------------------------------------------------------- */

static int run_once(asked *a, mp_conversation *conversation, const run_flags *f, const char *question) {
    a->reply.on_text = f->json ? NULL : print_text;
    char line[512];
    mp_buf text = { 0 };
    mepic_error err;
    mepic_status status = mp_conversation_ask(conversation, question, &err);
    if (status == MEPIC_OK) {
        status = ask_engine(a, conversation, a->request.reuse, &text, line, sizeof line, &err);
    }
    int result = MP_EXIT_OK;
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic run: %s\n", err.message);
        result = MP_EXIT_FAILURE;
    } else if (f->json) {
        if (!print_json(a->session, conversation, &a->request, &a->reply, &text, f->hash)) result = MP_EXIT_FAILURE;
    } else {
        putchar('\n');
        fflush(stdout);
        print_closing_line(line, f->hash ? &a->reply.logits_hash : NULL);
    }
    if (status == MEPIC_OK && a->reply.finish == MEPIC_FINISH_CANCELLED) result = MP_EXIT_FAILURE;
    mp_buf_clear(&text);
    return result;
}

/* Everything that may be refused without a model, before the model is loaded. */
static mepic_status read_inputs(const run_flags *f, mp_conversation *conversation, char **question, mepic_error *err) {
    if (f->stops.n > STOP_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--stop may be given at most %d times, not %u", STOP_MAX, f->stops.n);
    }
    for (uint32_t i = 0; i < f->stops.n; i++) {
        if (!f->stops.items[i][0])
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "--stop: an empty text would stop everything");
    }
    if (f->json && !f->prompt) return mp_fail(err, MEPIC_ERR_ARGUMENT, "--json needs a prompt: -p TEXT");
    mepic_status status = MEPIC_OK;
    if (f->system) status = mp_conversation_set_system(conversation, f->system, err);
    for (uint32_t i = 0; status == MEPIC_OK && i < f->documents.n; i++) {
        status = mp_conversation_add(conversation, f->documents.items[i], err);
    }
    if (status != MEPIC_OK || !f->prompt) return status;
    size_t len;
    if (strcmp(f->prompt, "-") == 0) {
        status = mp_file_read("-", PROMPT_MAX_BYTES, question, &len, err);
        if (status == MEPIC_OK && strlen(*question) < len) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT,
                           "--prompt: byte %zu of %zu on standard input is NUL; only a document may hold such bytes",
                           strlen(*question) + 1, len);
        }
        while (status == MEPIC_OK && len > 0 && (*question)[len - 1] == '\n') (*question)[--len] = 0;
    } else {
        *question = mp_strndup(f->prompt, strlen(f->prompt));
        if (!*question) status = mp_fail_nomem(err, "the prompt", strlen(f->prompt));
    }
    if (status == MEPIC_OK && !(*question)[0])
        status = mp_fail(err, MEPIC_ERR_ARGUMENT, "--prompt: the prompt is empty");
    return status;
}

static void want_hash(mepic_engine_options *options) {
    options->hash_logits = true;
}

int mp_cli_run(int argc, char **argv) {
    run_flags f = { .top_p = 1.0, .repeat_penalty = 1.0 };
    const mp_option_group groups[] = { prompt_group(&f), sampling_group(&f), mp_engine_flags_group(&f.engine) };
    int result;
    if (!mp_options_begin("run", usage_text, groups, 3, argc, argv, &result)) return result;
    mp_conversation conversation = { 0 };
    char *question = NULL;
    mepic_error err;
    mepic_status status = read_inputs(&f, &conversation, &question, &err);
    mp_session session;
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic run: %s\n", err.message);
        result = mp_exit_status(status);
    } else if (mp_session_begin(&session, "run", &f.engine, f.hash ? want_hash : NULL, &result)) {
        asked a = { .session = &session, .request = make_request(&f), .reply = { .on_text = print_text } };
        const mp_partner partner = { .name = session.info.name,
                                     .reuse = a.request.reuse,
                                     .ask = ask_engine,
                                     .print_stats = print_stats,
                                     .user = &a };
        result = question ? run_once(&a, &conversation, &f, question) : mp_chat(&partner, &conversation);
        mp_session_close(&session);
    }
    mp_free(question);
    mp_conversation_clear(&conversation);
    return result;
}
