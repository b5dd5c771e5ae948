#include "support/server.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "support/replies.h"
#include "support/tiny.h"

mepic_engine *engine;
mp_server *server;
uint16_t port;

mp_server_options default_options(void) {
    return (mp_server_options){ .engine = engine, .names = { "tiny", "other" }, .n_names = 2, .max_replies = 16 };
}

void start(const mp_server_options *options) {
    mepic_error err;
    if (mp_server_open(options, -1, &server, &err) != MEPIC_OK) fail_msg("%s", err.message);
    port = mp_server_port(server);
}

void stop(void) {
    mp_server_close(server);
    server = NULL;
}

mepic_engine_options long_options(void) {
    static const char *path;
    if (!path) {
        mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
        spec.hp.n_ctx_train = 65536;
        path = tiny_model_write(&spec);
    }
    mepic_engine_options options = tiny_options();
    options.model_path = path;
    options.context = 65536;
    options.pages = 8300;
    options.hash_logits = false;
    return options;
}

void use_long_engine(void) {
    stop();
    mepic_engine_close(engine);
    const mepic_engine_options options = long_options();
    engine = open_engine(&options);
}

const char *text_file(const char *text) {
    static char path[32];
    snprintf(path, sizeof path, "/tmp/mepic-test-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
    return path;
}

mp_keys *keys_of(const char *text) {
    const char *path = text_file(text);
    mp_keys *keys = NULL;
    mepic_error err;
    if (mp_keys_read(path, &keys, &err) != MEPIC_OK) print_message("%s\n", err.message);
    unlink(path);
    return keys;
}

int setup(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    engine = open_engine(&options);
    const mp_server_options serve = default_options();
    start(&serve);
    return 0;
}

int teardown(void **state) {
    (void)state;
    stop();
    mepic_engine_close(engine);
    return 0;
}

const json_t *at(const json_t *root, const char *path) {
    const json_t *value = root;
    while (value && *path) {
        char name[64];
        size_t n = strcspn(path, "/");
        snprintf(name, sizeof name, "%.*s", (int)n, path);
        value = json_is_array(value) ? json_array_get(value, strtoul(name, NULL, 10)) : json_object_get(value, name);
        path += n + (path[n] == '/');
    }
    return value;
}

const char *text_at(const json_t *root, const char *path) {
    const json_t *value = at(root, path);
    if (!json_is_string(value)) fail_msg("no string at %s in %s", path, json_dumps(root, 0));
    return json_string_value(value);
}

json_int_t number_at(const json_t *root, const char *path) {
    const json_t *value = at(root, path);
    if (!json_is_integer(value)) fail_msg("no number at %s in %s", path, json_dumps(root, 0));
    return json_integer_value(value);
}

static void wait_for_event(void) {
    struct pollfd fd = { .fd = mp_server_event_fd(server), .events = POLLIN };
    if (poll(&fd, 1, 60000) != 1) fail_msg("the server told nothing for a minute");
    mp_server_event_take(server);
}

void wait_until_idle(void) {
    while (!mp_server_idle(server)) wait_for_event();
}

static double metric_in(const char *page, const char *line) {
    const char *found = strstr(page, line);
    if (!found) fail_msg("%s is not in:\n%s", line, page);
    return strtod(found + strlen(line), NULL);
}

double metric(const char *line) {
    http_reply reply;
    assert_int_equal(http_ask(port, "GET", "/metrics", "", NULL, &reply), 200);
    double value = metric_in(reply.body, line);
    http_reply_clear(&reply);
    return value;
}

void pages_of_kinds(const char *const *kinds, uint32_t n, double *pages) {
    http_reply reply;
    assert_int_equal(http_ask(port, "GET", "/metrics", "", NULL, &reply), 200);
    for (uint32_t i = 0; i < n; i++) {
        char line[64];
        snprintf(line, sizeof line, "mepic:pages{model_name=\"tiny\",kind=\"%s\"} ", kinds[i]);
        pages[i] = metric_in(reply.body, line);
    }
    http_reply_clear(&reply);
}

double pages_of(const char *kind) {
    double pages;
    pages_of_kinds(&kind, 1, &pages);
    return pages;
}

void wait_until_metric(const char *line, double value) {
    while (metric(line) != value) wait_for_event();
}

void read_stream(http_client *c, stream *s) {
    memset(s, 0, sizeof *s);
    for (const char *line = http_read_line(c); line; line = http_read_line(c)) {
        if (line[0] == ':') {
            s->n_comments++;
            continue;
        }
        assert_true(strncmp(line, "data: ", 6) == 0);
        assert_false(s->done);
        if (strcmp(line + 6, "[DONE]") == 0) {
            s->done = true;
            continue;
        }
        json_decref(s->last);
        s->last = json_loads(line + 6, JSON_ALLOW_NUL, NULL);
        if (!s->last) fail_msg("not JSON: %s", line);
        s->n_data++;
        const json_t *piece = at(s->last, "choices/0/delta/content");
        if (!piece) piece = at(s->last, "choices/0/text");
        if (piece) {
            size_t n = json_string_length(piece), room = sizeof s->text - s->text_len;
            memcpy(s->text + s->text_len, json_string_value(piece), n < room ? n : room);
            s->text_len += n < room ? n : room;
        }
    }
}

void open_stream(http_client *c, const char *path, const char *body) {
    char head[4096], type[64] = "";
    http_open(c, port);
    http_send_request(c, "POST", path, "Connection: close\r\n", body);
    assert_int_equal(http_read_head(c, head, sizeof head), 200);
    http_header(head, "Content-Type", type, sizeof type);
    assert_string_equal(type, "text/event-stream; charset=utf-8");
}

void ask_stream(const char *path, const char *body, stream *s) {
    http_client c;
    open_stream(&c, path, body);
    read_stream(&c, s);
    assert_true(s->done);
    http_close(&c);
}
