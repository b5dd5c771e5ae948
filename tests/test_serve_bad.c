/* The rows of bad_requests.txt: each is refused with its exact answer, and costs the server nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "support/server.h"
#include "support/tools.h"

enum { LINE_CAP = 512, REQUEST_CAP = 4 << 20, ROWS_MAX = 2000, ROWS_MIN = 600 };

typedef struct section {
    bool raw;
    char method[16], path[64];
    char around[LINE_CAP]; /* @ is where a row's text is put */
} section;

typedef struct row {
    int status;
    char code[32], param[64], words[96];
    const char *text;
} row;

static uint32_t n_failed;
static mp_keys *keys;

/* Says what is wrong with a row, and goes on. */
__attribute__((format(printf, 3, 4))) static void wrong(uint32_t line, const http_reply *reply, const char *format,
                                                        ...) {
    va_list args;
    n_failed++;
    print_error("tests/bad_requests.txt:%u: ", line);
    va_start(args, format);
    vprint_error(format, args);
    va_end(args);
    print_error("; the answer: %.300s\n", reply && reply->body ? reply->body : "none");
}

/* ---- The file ---------------------------------------------------------------------------------------------------- */

static size_t write_text(const char *text, size_t len, bool raw, char *out);

/* What stands behind ~ at text[i]: a byte, or a repetition. Returns where it ends. */
static size_t write_escape(const char *text, size_t i, size_t len, bool raw, char *out, size_t *n) {
    char *end;
    if (text[i] == 'x') {
        char digits[3] = { text[i + 1], text[i + 2], 0 };
        out[(*n)++] = (char)strtoul(digits, &end, 16);
        assert_true(*end == 0);
        return i + 3;
    }
    size_t times = strtoul(text + i, &end, 10);
    const char *close = strstr(end, "}~");
    if (*end != '{' || !close || close >= text + len) fail_msg("a ~ that is no escape: %s", text);
    for (size_t k = 0; k < times; k++) *n += write_text(end + 1, (size_t)(close - end - 1), raw, out + *n);
    return (size_t)(close + 2 - text);
}

static size_t write_text(const char *text, size_t len, bool raw, char *out) {
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        if (text[i] == '~') {
            i = write_escape(text, i + 1, len, raw, out, &n);
        } else if (raw && text[i] == '^') {
            memcpy(out + n, "\r\n", 2);
            n += 2;
            i++;
        } else {
            out[n++] = text[i++];
        }
    }
    return n;
}

/* The bytes of a row in its section. */
static size_t write_request(const section *s, const char *text, char *out) {
    const char *hole = strchr(s->around, '@');
    assert_non_null(hole);
    size_t n = write_text(s->around, (size_t)(hole - s->around), s->raw, out);
    n += write_text(text, strlen(text), s->raw, out + n);
    n += write_text(hole + 1, strlen(hole + 1), s->raw, out + n);
    assert_true(n < REQUEST_CAP);
    return n;
}

/* "on METHOD PATH [BODY]" or "raw [BYTES]". False: another line. */
static bool read_section(const char *line, section *out) {
    section s = { .raw = strncmp(line, "raw", 3) == 0 };
    int n = 3;
    if (!s.raw && sscanf(line, "on %15s %63s%n", s.method, s.path, &n) != 2) return false;
    snprintf(s.around, sizeof s.around, "%s", line[n] ? line + n + 1 : "@");
    *out = s;
    return true;
}

/* "STATUS CODE PARAM WORDS | TEXT"; cuts the line. */
static bool read_row(char *line, row *out) {
    char *bar = strstr(line, " |");
    int n = 0;
    if (!bar || sscanf(line, "%d %31s %63s%n", &out->status, out->code, out->param, &n) != 3) return false;
    out->text = bar[2] ? bar + 3 : "";
    bar[0] = 0;
    snprintf(out->words, sizeof out->words, "%s", line[n] ? line + n + 1 : "");
    return true;
}

/* ---- Answers ----------------------------------------------------------------------------------------------------- */

static bool same(const char *wanted, const json_t *given) {
    if (strcmp(wanted, "-") == 0) return json_is_null(given);
    return json_is_string(given) && strcmp(wanted, json_string_value(given)) == 0;
}

static const char *type_of(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    default: return "invalid_request_error";
    }
}

static void check_error(uint32_t line, const row *r, const http_reply *reply, const json_t *root) {
    const json_t *error = at(root, "error"), *message = at(error, "message");
    bool anthropic = at(root, "type") != NULL;
    if (!json_is_string(message)) {
        wrong(line, reply, "there is no message");
        return;
    }
    const char *text = json_string_value(message);
    if (anthropic && !same("error", at(root, "type"))) wrong(line, reply, "no error of Anthropic's");
    if (!same(type_of(r->status), at(error, "type"))) wrong(line, reply, "the type is not %s", type_of(r->status));
    if (!anthropic && !same(r->code, at(error, "code"))) wrong(line, reply, "the code is not %s", r->code);
    if (!anthropic && !same(r->param, at(error, "param"))) wrong(line, reply, "the param is not %s", r->param);
    if (strcmp(r->param, "-") != 0 && !strstr(text, r->param)) wrong(line, reply, "%s is not named", r->param);
    if (!strstr(text, r->words)) wrong(line, reply, "'%s' is not said", r->words);
}

static void check_answer(uint32_t line, const row *r, const http_reply *reply) {
    char type[64] = "";
    if (reply->status != r->status) {
        wrong(line, reply, "%d instead of %d", reply->status, r->status);
        return;
    }
    if (strcasestr(reply->head, "Access-Control-")) wrong(line, reply, "a header of CORS");
    if (r->status == 200 || strcmp(r->code, "!") == 0) return;
    http_header(reply->head, "Content-Type", type, sizeof type);
    json_t *root = json_loads(reply->body, JSON_REJECT_DUPLICATES, NULL);
    if (strcmp(type, "application/json") == 0 && root)
        check_error(line, r, reply, root);
    else
        wrong(line, reply, "no JSON but %s", type);
    json_decref(root);
}

/* On one connection, as long as the server leaves it open. */
static void ask_on(http_client *c, const section *s, const char *body, size_t n, uint32_t line, const row *r) {
    char head[512], connection[32] = "";
    http_reply reply = { 0 };
    if (c->fd < 0) http_open(c, port);
    int len = snprintf(head, sizeof head,
                       "%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
                       "%zu\r\n\r\n",
                       s->method, s->path, n);
    http_send(c, head, (size_t)len);
    http_send(c, body, n);
    bool answered = http_read(c, &reply);
    if (answered)
        check_answer(line, r, &reply);
    else
        wrong(line, NULL, "no answer");
    bool closed = answered && http_header(reply.head, "Connection", connection, sizeof connection);
    http_reply_clear(&reply);
    if (!answered || closed) http_close(c);
}

static void ask_raw(const char *bytes, size_t n, uint32_t line, const row *r) {
    http_client c;
    http_reply reply = { 0 };
    http_open(&c, port);
    http_send(&c, bytes, n);
    if (http_read(&c, &reply))
        check_answer(line, r, &reply);
    else
        wrong(line, NULL, "no answer");
    http_reply_clear(&reply);
    http_close(&c);
}

/* ---- Servers ----------------------------------------------------------------------------------------------------- */

static void close_all(void) {
    if (!server) return;
    json_decref(http_ask_json(port, "GET", "/health", NULL, 200)); // it has seen it all and is as it was
    assert_true(mp_server_idle(server));
    stop();
    mepic_engine_close(engine);
    mp_keys_free(keys);
    keys = NULL;
}

static void open_server(const char *kind) {
    close_all();
    const mepic_engine_options options = strcmp(kind, "plain") == 0 ? tiny_options() : tools_options();
    engine = open_engine(&options);
    if (strcmp(kind, "keys") == 0) keys = keys_of("secret-key-1 alice\n");
    mp_server_options serve = default_options();
    serve.keys = keys;
    start(&serve);
}

/* ---- The test ---------------------------------------------------------------------------------------------------- */

/* Rows that are there twice test once. */
static void note_request(const section *s, const char *text) {
    static uint64_t seen[ROWS_MAX];
    static uint32_t n_seen;
    uint64_t hash = mp_hash64(0, s, sizeof *s);
    hash = mp_hash64(hash, text, strlen(text));
    for (uint32_t i = 0; i < n_seen; i++) {
        if (seen[i] == hash) fail_msg("there twice: %s", text);
    }
    assert_true(n_seen < ROWS_MAX);
    seen[n_seen++] = hash;
}

static void bad_requests_get_their_answers(void **state) {
    (void)state;
    static char line[LINE_CAP];
    static section s;
    FILE *file = fopen("tests/bad_requests.txt", "r");
    char *request = malloc(REQUEST_CAP);
    assert_non_null(file);
    assert_non_null(request);
    http_client c = { .fd = -1 };
    uint32_t n_rows = 0;
    for (uint32_t number = 1; fgets(line, sizeof line, file); number++) {
        size_t len = strcspn(line, "\n");
        row r;
        if (line[len] != '\n') fail_msg("line %u is too long", number);
        line[len] = 0;
        if (len == 0 || line[0] == '#' || read_section(line, &s)) continue;
        if (strncmp(line, "server ", 7) == 0) {
            if (c.fd >= 0) http_close(&c);
            open_server(line + 7);
            continue;
        }
        if (!read_row(line, &r)) fail_msg("line %u is none: %s", number, line);
        note_request(&s, r.text);
        size_t n = write_request(&s, r.text, request);
        if (s.raw)
            ask_raw(request, n, number, &r);
        else
            ask_on(&c, &s, request, n, number, &r);
        n_rows++;
    }
    if (c.fd >= 0) http_close(&c);
    close_all();
    fclose(file);
    free(request);
    if (n_failed > 0) fail_msg("%u of %u answers are wrong", n_failed, n_rows);
    assert_true(n_rows >= ROWS_MIN);
}

/* ---- Numbers ----------------------------------------------------------------------------------------------------- */

typedef struct number_field {
    const char *path, *body; /* with a %s for the field */
    const char *name;
    double low, high;
    bool whole;
} number_field;

#define COMPLETION(field, whole, low, high)                                                                            \
    {                                                                                                                  \
        "/v1/completions", "{\"prompt\":\"x\",\"ignore_eos\":true,%s,\"stop_token_ids\":[1,2,3]}", field, low, high,   \
            whole                                                                                                      \
    }
#define CHAT(field, whole, low, high)                                                                                  \
    {                                                                                                                  \
        "/v1/chat/completions",                                                                                        \
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,%s,\"stop\":\"e\"}", field, low,  \
            high, whole                                                                                                \
    }
#define MESSAGES(field, whole, low, high)                                                                              \
    {                                                                                                                  \
        "/v1/messages", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],%s,\"stop_sequences\":[\"e\"]}", field, \
            low, high, whole                                                                                           \
    }

/* What a field answers to a value, by its type and range: 200, or a 400 that names it. */
static void try_number(const number_field *field, const char *text) {
    char member[128], body[512], quoted[64];
    http_reply reply;
    snprintf(member, sizeof member, "\"%s\":%s", field->name, text);
    snprintf(body, sizeof body, field->body, member); // NOLINT: of the table below
    json_t *value = json_loads(text, JSON_DECODE_ANY, NULL);
    double number = json_number_value(value);
    bool typed = field->whole ? json_is_integer(value) : json_is_number(value);
    bool good = json_is_null(value) || (typed && number >= field->low && number <= field->high);
    int status = http_ask(port, "POST", field->path, "", body, &reply);
    if (status != (good ? 200 : 400)) fail_msg("%d for %s: %s", status, body, reply.body);
    snprintf(quoted, sizeof quoted, "'%s'", field->name);
    if (!good && value && !strstr(reply.body, quoted)) fail_msg("%s is not named: %s", quoted, reply.body);
    if (!value && !strstr(reply.body, "is not JSON")) fail_msg("for %s: %s", text, reply.body);
    http_reply_clear(&reply);
    json_decref(value);
}

static void numbers_are_in_range_or_refused(void **state) {
    (void)state;
    static const double most = 1 << 24;
    const number_field fields[] = {
        COMPLETION("n", true, 1, 8),
        COMPLETION("max_tokens", true, 1, most),
        COMPLETION("max_completion_tokens", true, 1, most),
        COMPLETION("seed", true, (double)INT64_MIN, (double)INT64_MAX),
        COMPLETION("top_k", true, -1, most),
        COMPLETION("temperature", false, 0, 100),
        COMPLETION("top_p", false, 0, 1),
        COMPLETION("min_p", false, 0, 1),
        COMPLETION("presence_penalty", false, -2, 2),
        COMPLETION("frequency_penalty", false, -2, 2),
        COMPLETION("repetition_penalty", false, 0.01, 100),
        COMPLETION("repeat_penalty", false, 0.01, 100),
        COMPLETION("repeat_last_n", true, 0, 65536),
        COMPLETION("logprobs", true, 0, 20),
        CHAT("n", true, 1, 8),
        CHAT("max_tokens", true, 1, most),
        CHAT("max_completion_tokens", true, 1, most),
        CHAT("seed", true, (double)INT64_MIN, (double)INT64_MAX),
        CHAT("top_k", true, -1, most),
        CHAT("temperature", false, 0, 100),
        CHAT("top_p", false, 0, 1),
        CHAT("min_p", false, 0, 1),
        CHAT("presence_penalty", false, -2, 2),
        CHAT("frequency_penalty", false, -2, 2),
        CHAT("repetition_penalty", false, 0.01, 100),
        CHAT("top_logprobs", true, 0, 20),
        MESSAGES("max_tokens", true, 1, most),
        MESSAGES("temperature", false, 0, 100),
        MESSAGES("top_p", false, 0, 1),
        MESSAGES("top_k", true, -1, most),
    };
    static const char *const values[] = {
        "-1",   "0",          "1",         "2",           "-2",         "20",     "21",
        "100",  "101",        "16777216",  "16777217",    "2147483647", "1.5",    "2147483648",
        "-0.0", "4294967296", "-1e308",    "4294967297",  "1e308",      "1e309",  "9007199254740993",
        "NaN",  "\"NaN\"",    "Infinity",  "\"1\"",       "\"\"",       "null",   "9223372036854775807",
        "true", "false",      "[]",        "[1]",         "{}",         "1e-400", "9223372036854775808",
        "1e0",  "0.01",       "0.0099999", "-2147483649", "65537",      "-0",     "-9223372036854775808",
    };
    open_server("plain");
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) {
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) try_number(&fields[f], values[v]);
    }
    close_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_requests_get_their_answers),
        cmocka_unit_test(numbers_are_in_range_or_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
