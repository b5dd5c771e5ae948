/* `mepic chat URL`: a conversation with a server, over OpenAI's API. */
#include "cli/chat.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/http_client.h"

#include <string.h>

#include "serve/json.h"

enum { N_REMOTE_OPTIONS = 7, KEY_MAX_BYTES = 4096, BODY_MAX_BYTES = 256 << 20, ANSWER_KEPT = 64 << 10 };

static const char usage_text[] =
    "usage: mepic chat [URL] [OPTIONS]\n\n"
    "Talks to a server, such as `mepic serve`, at http://127.0.0.1:8080 or URL: reads questions and commands (/help)\n"
    "from standard input.\n";

typedef struct remote_flags {
    const char *system, *model, *key_file;
    mp_texts documents;
    uint32_t max_tokens, reuse;
    double temperature;
    mp_option table[N_REMOTE_OPTIONS];
} remote_flags;

static mp_option_group remote_group(remote_flags *f) {
    const mp_option options[N_REMOTE_OPTIONS] = {
        MP_TEXT('s', "system", &f->system, "TEXT", "system message (default: the model's own)"),
        MP_TEXTS('d', "doc", &f->documents, "FILE",
                 "a document in front of the first question; may be given several times"),
        MP_TEXT(0, "model", &f->model, "NAME", "of several (default: the server's first)"),
        MP_TEXT(0, "api-key-file", &f->key_file, "FILE", "the key to send, alone in a file"),
        MP_WORD(0, "reuse", &f->reuse, mp_reuse_words, "POLICY", "none, prefix or mepic (default: the server's)"),
        MP_COUNT('n', "max-tokens", &f->max_tokens, 1, 1u << 24, "N",
                 "longest answer in tokens (default: until the context is full)"),
        MP_REAL(0, "temperature", &f->temperature, 0, 100, "T", "0 (default) takes the likeliest token"),
    };
    memcpy(f->table, options, sizeof options);
    return (mp_option_group){ "Chat", f->table, N_REMOTE_OPTIONS };
}

/* A server that answers; `user` of the partner. */
typedef struct remote {
    mp_url url;
    const remote_flags *flags;
    char key_header[KEY_MAX_BYTES + 32];
} remote;

/* One answer. */
typedef struct answer {
    mp_http_reader http;
    mp_sse events;
    mp_buf *text;  /* of the reply */
    mp_buf plain;  /* the body, where it is no stream of events: an error */
    json_t *usage; /* NULL: it did not come */
    bool done;
} answer;

/* ---- The question ------------------------------------------------------------------------------------------------ */

static json_t *text_of(const char *text) {
    return mp_json_text(text, strlen(text));
}

static json_t *message(const char *role, const char *text) {
    return json_pack("{s:s, s:o}", "role", role, "content", text_of(text));
}

static json_t *body_of(const remote *r, const mp_conversation *c, mepic_reuse reuse) {
    json_t *messages = json_array(), *documents = json_array();
    if (c->system) json_array_append_new(messages, message("system", c->system));
    for (uint32_t i = 0; i < c->n_turns; i++) {
        json_array_append_new(messages, message("user", c->turns[i].question));
        if (c->turns[i].answer) json_array_append_new(messages, message("assistant", c->turns[i].answer));
    }
    for (uint32_t i = 0; i < c->n_documents; i++) {
        json_array_append_new(documents, mp_json_text(c->documents[i].text, c->documents[i].len));
    }
    json_t *body = json_pack("{s:o, s:b, s:{s:b}, s:f}", "messages", messages, "stream", 1, "stream_options",
                             "include_usage", 1, "temperature", r->flags->temperature);
    if (c->n_documents > 0)
        json_object_set_new(body, "documents", documents);
    else
        json_decref(documents);
    if (r->flags->max_tokens) json_object_set_new(body, "max_tokens", json_integer(r->flags->max_tokens));
    if (r->flags->model) json_object_set_new(body, "model", text_of(r->flags->model));
    if (reuse != MEPIC_REUSE_DEFAULT) json_object_set_new(body, "reuse", json_string(mp_reuse_name(reuse)));
    return body;
}

/* ---- The answer -------------------------------------------------------------------------------------------------- */

static mepic_status fail_as_told(const json_t *root, uint32_t status, mepic_error *err) {
    const char *sentence = NULL, *code = NULL;
    json_unpack((json_t *)root, "{s:{s?s, s?s}}", "error", "message", &sentence, "code", &code);
    bool too_long = code && strcmp(code, "context_length_exceeded") == 0;
    return mp_fail(err, too_long ? MEPIC_ERR_TOO_LONG : MEPIC_ERR_IO, "the server says%s%.0u: %s", status ? " " : "",
                   status, sentence ? sentence : "nothing that could be understood");
}

static mepic_status take_data(void *user, const char *data, size_t n, mepic_error *err) {
    answer *a = user;
    if (n == 6 && memcmp(data, "[DONE]", 6) == 0) {
        a->done = true;
        return MEPIC_OK;
    }
    json_t *root = json_loadb(data, n, JSON_ALLOW_NUL, NULL);
    if (!root)
        return mp_fail(err, MEPIC_ERR_FORMAT, "the server's event is not JSON: '%.*s'", n < 60 ? (int)n : 60, data);
    mepic_status status = MEPIC_OK;
    const json_t *choice = json_array_get(json_object_get(root, "choices"), 0);
    const json_t *piece = json_object_get(json_object_get(choice, "delta"), "content");
    json_t *usage = json_object_get(root, "usage");
    if (json_object_get(root, "error")) {
        status = fail_as_told(root, 0, err);
    } else if (json_is_string(piece)) {
        size_t len = json_string_length(piece);
        if (!mp_buf_append(a->text, json_string_value(piece), len)) status = mp_fail_nomem(err, "the answer", len);
        mp_chat_print(json_string_value(piece), len);
    }
    if (json_is_object(usage)) {
        json_decref(a->usage);
        a->usage = json_incref(usage);
    }
    json_decref(root);
    return status;
}

static mepic_status take_bytes(void *user, const char *bytes, size_t n, mepic_error *err) {
    answer *a = user;
    if (a->http.status == 200) return mp_sse_feed(&a->events, bytes, n, err);
    size_t room = a->plain.limit - a->plain.len; // of a refusal only the beginning counts
    return mp_buf_append(&a->plain, bytes, n < room ? n : room) ? MEPIC_OK : mp_fail_nomem(err, "the answer", n);
}

static long long number_of(const json_t *object, const char *name) {
    return json_integer_value(json_object_get(object, name));
}

static void describe_usage(const json_t *usage, char *line, size_t cap) {
    const json_t *details = json_object_get(usage, "prompt_tokens_details");
    snprintf(line, cap, "prompt %lld tokens, %lld of them cached; reply %lld tokens", number_of(usage, "prompt_tokens"),
             number_of(details, "cached_tokens"), number_of(usage, "completion_tokens"));
}

static mepic_status judge(answer *a, bool interrupted, mepic_error *err) {
    if (interrupted) return MEPIC_OK;
    if (a->http.status == 200) {
        return a->done ? MEPIC_OK : mp_fail(err, MEPIC_ERR_IO, "the answer came without an end");
    }
    json_t *root = a->plain.len ? json_loadb(a->plain.data, a->plain.len, JSON_ALLOW_NUL, NULL) : NULL;
    mepic_status status = fail_as_told(root, a->http.status, err);
    json_decref(root);
    return status;
}

static mepic_status ask_server(void *user, const mp_conversation *conversation, mepic_reuse reuse, mp_buf *text,
                               char *line, size_t cap, mepic_error *err) {
    const remote *r = user;
    mp_buf body = { .limit = BODY_MAX_BYTES };
    answer a = { .events = { .take = take_data }, .text = text, .plain = { .limit = ANSWER_KEPT } };
    a.events.user = &a;
    bool interrupted = false;
    mepic_status status = MEPIC_OK;
    if (!mp_json_write(body_of(r, conversation, reuse), &body)) status = mp_fail_nomem(err, "the request", body.len);
    if (status == MEPIC_OK) {
        status = mp_http_ask(&r->url, "/v1/chat/completions", r->key_header, &body, &a.http, take_bytes, &a,
                             &interrupted, err);
    }
    if (status == MEPIC_OK) status = judge(&a, interrupted, err);
    if (status == MEPIC_OK) {
        if (a.usage)
            describe_usage(a.usage, line, cap);
        else
            snprintf(line, cap, "%s", interrupted ? "cancelled" : "the server did not count");
    }
    json_decref(a.usage);
    mp_buf_clear(&body);
    mp_buf_clear(&a.plain);
    mp_sse_clear(&a.events);
    return status;
}

/* ---- /stats ------------------------------------------------------------------------------------------------------ */

static mepic_status print_bytes(void *user, const char *bytes, size_t n, mepic_error *err) {
    (void)user;
    (void)err;
    mp_chat_print(bytes, n);
    return MEPIC_OK;
}

static void print_metrics(void *user) {
    const remote *r = user;
    mp_http_reader reader;
    bool interrupted;
    mepic_error err;
    if (mp_http_ask(&r->url, "/metrics", r->key_header, NULL, &reader, print_bytes, NULL, &interrupted, &err) !=
        MEPIC_OK) {
        fprintf(stderr, "%s\n", err.message);
    }
}

/* ---- The command ------------------------------------------------------------------------------------------------- */

static mepic_status read_key(remote *r, mepic_error *err) {
    char *key;
    size_t len;
    mepic_error why;
    if (!r->flags->key_file) return MEPIC_OK;
    if (mp_file_read(r->flags->key_file, KEY_MAX_BYTES, &key, &len, &why) != MEPIC_OK) {
        return mp_fail(err, why.status, "--api-key-file: %s", why.message);
    }
    size_t n = strcspn(key, " \t\r\n"); // a name may follow, as in the server's own file
    mepic_status status = MEPIC_OK;
    if (n == 0 || key[0] == '#') {
        status = mp_fail(err, MEPIC_ERR_ARGUMENT, "--api-key-file: %s does not begin with a key", r->flags->key_file);
    } else {
        snprintf(r->key_header, sizeof r->key_header, "Authorization: Bearer %.*s\r\n", (int)n, key);
    }
    mp_free(key);
    return status;
}

static mepic_status begin(remote *r, const char *address, mp_conversation *conversation, mepic_error *err) {
    mepic_status status = mp_url_parse(address, &r->url, err);
    if (status == MEPIC_OK) status = read_key(r, err);
    if (status == MEPIC_OK && r->flags->system) {
        status = mp_conversation_set_system(conversation, r->flags->system, err);
    }
    for (uint32_t i = 0; status == MEPIC_OK && i < r->flags->documents.n; i++) {
        status = mp_conversation_add(conversation, r->flags->documents.items[i], err);
    }
    return status;
}

int mp_cli_chat(int argc, char **argv) {
    remote_flags f = { 0 };
    remote r = { .flags = &f };
    const mp_option_group group = remote_group(&f);
    const char *address = "http://127.0.0.1:8080";
    int result = MP_EXIT_OK;
    if (argc > 1 && argv[1][0] != '-') {
        address = argv[1];
        argv++;
        argc--;
    }
    if (!mp_options_begin("chat", usage_text, &group, 1, argc, argv, &result)) return result;
    mp_conversation conversation = { 0 };
    mepic_error err;
    mepic_status status = begin(&r, address, &conversation, &err);
    if (status == MEPIC_OK) {
        const mp_partner partner = {
            .name = address, .reuse = (mepic_reuse)f.reuse, .ask = ask_server, .print_stats = print_metrics, .user = &r
        };
        result = mp_chat(&partner, &conversation);
    } else {
        fprintf(stderr, "mepic chat: %s\n", err.message);
        result = mp_exit_status(status);
    }
    mp_conversation_clear(&conversation);
    return result;
}
