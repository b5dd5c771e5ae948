/* What no client should send: each with the status it gets, and the server answering as before afterwards. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/exchange.h"
#include "support/replies.h"
#include "support/server.h"

#define JSON "Content-Type: application/json\r\n"
#define HOST "Host: localhost\r\n"
#define POST "POST /v1/completions HTTP/1.1\r\n" HOST
#define BODY "Content-Length: 29\r\n\r\n{\"prompt\":\"x\",\"max_tokens\":1}"

/* CLOSED: the connection is closed without an answer. */
enum { CLOSED = 0 };

static void expect_raw(const char *bytes, size_t n, int status) {
    http_client c;
    http_reply reply;
    http_open(&c, port);
    http_send(&c, bytes, n);
    int got = http_read(&c, &reply) ? reply.status : CLOSED;
    if (got != status) {
        fail_msg("%d instead of %d for: %.*s\n%s", got, status, (int)(n < 300 ? n : 300), bytes, got ? reply.body : "");
    }
    if (got) http_reply_clear(&reply);
    http_close(&c);
}

static void requests_get_their_status(void **state) {
    (void)state;
    static const struct {
        int status;
        const char *bytes;
    } table[] = {
        { 200, POST JSON BODY },
        { 200, POST "Content-Type: application/json; charset=utf-8\r\n" BODY },
        { 200, POST "content-type: Application/JSON\r\n" BODY },
        { 200, POST JSON "Transfer-Encoding: chunked\r\n\r\n1d\r\n{\"prompt\":\"x\",\"max_tokens\":1}\r\n0\r\n\r\n" },
        { 200, POST JSON
          "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1c\r\n\"prompt\":\"x\",\"max_tokens\":1}\r\n0\r\n\r\n" },
        { 200, "GET /health HTTP/1.1\r\n" HOST "\r\n" },
        { 200, "GET /health HTTP/1.0\r\n\r\n" },
        { 200, "GET /health?x=1 HTTP/1.1\r\n" HOST "\r\n" },
        /* framing */
        { 400, POST JSON "Content-Length: 29\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" },
        { 400, POST JSON "Content-Length: 29\r\n" BODY },
        { 400, POST JSON "Content-Length: 0\r\n" BODY },
        { 400, POST JSON "Content-Length: -1\r\n\r\n" },
        { 400, POST JSON "Content-Length: +29\r\n\r\n{\"prompt\":\"x\",\"max_tokens\":1}" },
        { 400, POST JSON "Content-Length: 0x1d\r\n\r\n{\"prompt\":\"x\",\"max_tokens\":1}" },
        { 400, POST JSON "Content-Length: 29,29\r\n\r\n{\"prompt\":\"x\",\"max_tokens\":1}" },
        { 413, POST JSON "Content-Length: 99999999999999999999999\r\n\r\n" },
        { 413, POST JSON "Content-Length: 9999999999\r\n\r\n" },
        { 413, POST JSON "Content-Length: 18446744073709551615\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: chunked\r\n\r\n2\r\n{}}}\r\n0\r\n\r\n" },
        { 413, POST JSON "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: gzip\r\n\r\n{}" },
        { 400, POST JSON "Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" },
        { 400, POST JSON "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" },
        { 415, POST JSON "Content-Encoding: gzip\r\n" BODY },
        { 415, POST "Content-Type: text/plain\r\n" BODY },
        { 415, POST "Content-Type: application/x-www-form-urlencoded\r\n" BODY },
        { 415, POST "Content-Type: application/jsonx\r\n" BODY },
        { 415, POST BODY },
        { 400, POST JSON "\r\n" },
        { 400, POST JSON "Content-Length: 0\r\n\r\n" },
        /* the first line */
        { 404, "POST /v1/completion HTTP/1.1\r\n" HOST JSON BODY },
        { 404, "POST //v1/completions HTTP/1.1\r\n" HOST JSON BODY },
        { 404, "POST /v1/completions/ HTTP/1.1\r\n" HOST JSON BODY },
        { 404, "GET / HTTP/1.1\r\n" HOST "\r\n" },
        { 404, "GET /../etc/passwd HTTP/1.1\r\n" HOST "\r\n" },
        { 404, "GET /v1/models%00 HTTP/1.1\r\n" HOST "\r\n" },
        { 404, "GET * HTTP/1.1\r\n" HOST "\r\n" },
        { 405, "GET /v1/completions HTTP/1.1\r\n" HOST "\r\n" },
        { 405, "PUT /v1/completions HTTP/1.1\r\n" HOST JSON BODY },
        { 405, "POST /v1/models HTTP/1.1\r\n" HOST JSON BODY },
        { 405, "OPTIONS /v1/completions HTTP/1.1\r\n" HOST "Origin: http://x\r\n\r\n" },
        { 405, "TRACE /health HTTP/1.1\r\n" HOST "\r\n" },
        { 405, "get /health HTTP/1.1\r\n" HOST "\r\n" },
        { 400, "GET /health HTTP/1.1\r\n\r\n" },
        { 200, "GET /health HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n" },
        { 200, "GET /health HTTP/1.1\r\nHost: [::1]:80\r\n\r\n" },
        { 200, "GET /health HTTP/1.1\r\nHost: LOCALHOST\r\n\r\n" },
        { 403, "GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n" },
        { 403, "GET /health HTTP/1.1\r\nHost: localhost.evil.example:80\r\n\r\n" },
        { 403, "GET /health HTTP/1.1\r\nHost: \r\n\r\n" },
        { 505, "GET /health HTTP/2.0\r\n" HOST "\r\n" },
        { 505, "GET /health HTTP/0.9\r\n" HOST "\r\n" },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        expect_raw(table[i].bytes, strlen(table[i].bytes), table[i].status);
    }
}

/* What libmicrohttpd takes for a header by another name, another server takes for a body's length: what the one sees as
 * a body is a second request to the other. */
static void no_second_request_hides_in_a_body(void **state) {
    (void)state;
    static const char *const heads[] = {
        "Content-Length : %zu\r\n",
        "Content-Length\t: %zu\r\n",
        "Content-Length: 2\r\n 9\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: chunked\r\n\tx\r\n",
        "Conten: %zu\r\n t-Length\r\n",
        "X: y\r\n Content-Length: %zu\r\n",
        "X: y\rContent-Length: %zu\r\n",
        "X y: z\r\n",
        "X\"y: z\r\n",
    };
    static const char hidden[] = "GET /health HTTP/1.1\r\n" HOST "\r\n";
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        char head[128], bytes[512];
        snprintf(head, sizeof head, heads[i], sizeof hidden - 1); // NOLINT: of the table above
        snprintf(bytes, sizeof bytes, "GET /health HTTP/1.1\r\n" HOST "%s\r\n%s", head, hidden);
        http_client c;
        http_reply reply;
        http_open(&c, port);
        http_send_text(&c, bytes);
        if (http_read(&c, &reply)) {
            if (reply.status != 400) fail_msg("%d instead of 400 for: %s", reply.status, head);
            http_reply_clear(&reply);
        }
        if (http_read(&c, &reply)) fail_msg("a second answer, %d, for: %s", reply.status, head);
        http_close(&c);
    }
    static const char fine[] = "GET /health HTTP/1.1\r\n" HOST "X:\r\nY: \r\nZ: \t z\r\nContent-Language: de\r\n\r\n";
    expect_raw(fine, sizeof fine - 1, 200);
}

/* What a header section or a path may grow to. */
static void heads_are_bounded(void **state) {
    (void)state;
    static char bytes[200000];
    size_t n = (size_t)snprintf(bytes, sizeof bytes, "GET /health HTTP/1.1\r\n" HOST);
    for (int i = 0; i < 70; i++) n += (size_t)snprintf(bytes + n, sizeof bytes - n, "X-%d: y\r\n", i);
    n += (size_t)snprintf(bytes + n, sizeof bytes - n, "\r\n");
    expect_raw(bytes, n, 431);
    n = (size_t)snprintf(bytes, sizeof bytes, "GET /health HTTP/1.1\r\n" HOST "X: ");
    memset(bytes + n, 'x', 60000);
    n += 60000;
    n += (size_t)snprintf(bytes + n, sizeof bytes - n, "\r\n\r\n");
    expect_raw(bytes, n, 431);
    n = (size_t)snprintf(bytes, sizeof bytes, "GET /");
    memset(bytes + n, 'x', 2000);
    n += 2000;
    n += (size_t)snprintf(bytes + n, sizeof bytes - n, " HTTP/1.1\r\n" HOST "\r\n");
    expect_raw(bytes, n, 414);
    n = (size_t)snprintf(bytes, sizeof bytes, "GET /");
    memset(bytes + n, 'x', 60000);
    n += 60000;
    n += (size_t)snprintf(bytes + n, sizeof bytes - n, " HTTP/1.1\r\n" HOST "\r\n");
    expect_raw(bytes, n, 414);
}

/* Numbers at and past every edge: a 400 that names the field, or an answer. */
static void numbers_are_in_range_or_refused(void **state) {
    (void)state;
    static const char *const fields[] = { "n",
                                          "max_tokens",
                                          "max_completion_tokens",
                                          "seed",
                                          "top_k",
                                          "temperature",
                                          "top_p",
                                          "min_p",
                                          "presence_penalty",
                                          "frequency_penalty",
                                          "repetition_penalty",
                                          "repeat_last_n",
                                          "logprobs" };
    static const char *const values[] = { "-1",
                                          "0",
                                          "1",
                                          "2147483647",
                                          "2147483648",
                                          "4294967296",
                                          "9007199254740993",
                                          "9223372036854775807",
                                          "9223372036854775808",
                                          "1e308",
                                          "1e309",
                                          "-1e308",
                                          "\"NaN\"",
                                          "NaN",
                                          "\"1\"",
                                          "1.5",
                                          "null",
                                          "true",
                                          "[]",
                                          "{}",
                                          "-0.0",
                                          "1e-400" };
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) {
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
            char body[256];
            http_reply reply;
            const char *rest = strcmp(fields[f], "max_tokens") == 0 ? "" : ",\"max_tokens\":1";
            snprintf(body, sizeof body, "{\"prompt\":\"x\",\"%s\":%s%s}", fields[f], values[v], rest);
            int status = http_ask(port, "POST", "/v1/completions", "", body, &reply);
            if (status != 200 && status != 400) fail_msg("%d for %s: %s", status, body, reply.body);
            http_reply_clear(&reply);
        }
    }
}

static void expect_body(const char *body, size_t n, int status) {
    char head[256];
    http_client c;
    http_reply reply;
    http_open(&c, port);
    snprintf(head, sizeof head, POST JSON "Content-Length: %zu\r\n\r\n", n);
    http_send_text(&c, head);
    http_send(&c, body, n);
    assert_true(http_read(&c, &reply));
    if (reply.status != status) fail_msg("%d instead of %d: %s", reply.status, status, reply.body);
    http_reply_clear(&reply);
    http_close(&c);
}

static void bodies_are_bounded(void **state) {
    (void)state;
    enum { SIZE = 3 << 20 };
    char *body = malloc(SIZE);
    assert_non_null(body);
    /* deep */
    memset(body, '[', 100000);
    expect_body(body, 100000, 400);
    /* many values */
    memcpy(body, "{\"prompt\":[", 11);
    for (size_t i = 11; i < SIZE - 2; i += 2) memcpy(body + i, "1,", 2);
    expect_body(body, SIZE - 2, 400);
    /* strings with what UTF-8 and JSON do not have */
    static const char *const broken[] = {
        "{\"prompt\":\"\xff\"}",
        "{\"prompt\":\"\xc0\x80\"}",
        "{\"prompt\":\"\xed\xa0\x80\"}",
        "{\"prompt\":\"\\ud800\"}",
        "{\"prompt\":\"\\udc00\\ud800\"}",
        "{\"prompt\":\"\\x\"}",
        "{\"prompt\":\"\n\"}",
        "{\"prompt\":'x'}",
        "{\"prompt\":\"x\"} {}",
        "{\"prompt\":\"x\",}",
        "{prompt:\"x\"}",
        "{\"prompt\":\"x\"",
        "{\"a\\u0000b\":1,\"prompt\":\"x\"}",
        "\xef\xbb\xbf{\"prompt\":\"x\"}",
        "null",
        "\"x\"",
        "7",
        " ",
    };
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) expect_body(broken[i], strlen(broken[i]), 400);
    static const char nul[] = "{\"prompt\":\"a\\u0000b\",\"max_tokens\":1}";
    expect_body(nul, sizeof nul - 1, 200);
    expect_body("{\"prompt\":\"x\"}\0", 15, 400);
    free(body);
    /* larger than the limit, without saying so first */
    stop();
    mp_server_options options = default_options();
    options.max_body = 1024;
    start(&options);
    http_client c;
    http_reply reply;
    http_open(&c, port);
    http_send_text(&c, POST JSON "Transfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 20; i++) {
        char chunk[128];
        http_send(&c, chunk, (size_t)snprintf(chunk, sizeof chunk, "40\r\n%064d\r\n", i));
    }
    http_send_text(&c, "0\r\n\r\n");
    assert_true(http_read(&c, &reply));
    assert_int_equal(reply.status, 413);
    http_reply_clear(&reply);
    http_close(&c);
}

/* Whoever is not let in sends bodies to nobody: the answer comes before their end, and is the connection's last. */
static void a_refused_body_is_not_read_to_its_end(void **state) {
    (void)state;
    static const struct {
        int status;
        const char *bytes;
    } table[] = {
        { 404, "POST /nowhere HTTP/1.1\r\n" HOST JSON "Transfer-Encoding: chunked\r\n\r\n5\r\n{" },
        { 404, "POST /nowhere HTTP/1.1\r\n" HOST JSON "Content-Length: 65537\r\n\r\n{" },
        { 415, POST "Transfer-Encoding: chunked\r\n\r\n5\r\n{" },
        { 403, "POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\n" JSON "Content-Length: 1000000\r\n\r\n{" },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        expect_raw(table[i].bytes, strlen(table[i].bytes), table[i].status);
    }
    /* one that turned out too large */
    enum { SIZE = 1 << 20 };
    stop();
    mp_server_options options = default_options();
    options.max_body = 1024;
    start(&options);
    char *chunk = calloc(1, SIZE);
    assert_non_null(chunk);
    memset(chunk, ' ', SIZE);
    http_client c;
    http_reply reply;
    http_open(&c, port);
    http_send_text(&c, POST JSON "Transfer-Encoding: chunked\r\n\r\n100000\r\n");
    http_send(&c, chunk, SIZE);
    http_send_text(&c, "\r\n0\r\n\r\n");
    assert_false(http_read(&c, &reply));
    http_close(&c);
    free(chunk);
}

static int ask_small(void) {
    http_reply reply;
    char seconds[8] = "";
    int status = http_ask(port, "POST", "/v1/completions", "", "{\"prompt\":\"x\",\"max_tokens\":1}", &reply);
    http_header(reply.head, "Retry-After", seconds, sizeof seconds);
    assert_true(status == 200 || (status == 503 && strcmp(seconds, "1") == 0));
    http_reply_clear(&reply);
    return status;
}

/* Many connections with a body that does not end, each within its own bound. */
static void bodies_are_bounded_together(void **state) {
    (void)state;
    enum { CLIENTS = 3, SIZE = 120000 };
    stop();
    mp_server_options options = default_options();
    options.max_body = 128 << 10;
    options.max_bodies = 300 << 10;
    start(&options);
    static char body[SIZE];
    memset(body, ' ', SIZE);
    http_client clients[CLIENTS];
    for (size_t i = 0; i < CLIENTS; i++) {
        http_open(&clients[i], port);
        http_send_text(&clients[i], POST JSON "Content-Length: 120001\r\n\r\n");
        http_send(&clients[i], body, SIZE);
        while (i < 2 && atomic_load(&server->held) != (i + 1) * options.max_body) sched_yield();
    }
    for (size_t i = CLIENTS; i-- > 0;) { // the third, which was too much, holds nothing
        http_reply reply;
        http_send_text(&clients[i], "{");
        assert_true(http_read(&clients[i], &reply));
        assert_int_equal(reply.status, i < 2 ? 400 : 503);
        http_reply_clear(&reply);
        http_close(&clients[i]);
    }
    while (atomic_load(&server->held) > 0) sched_yield();
    assert_int_equal(ask_small(), 200);
    atomic_fetch_add(&server->held, options.max_bodies + 1); // as if replies held them
    assert_int_equal(ask_small(), 503);
    json_decref(http_ask_json(port, "GET", "/health", NULL, 200));
    atomic_fetch_sub(&server->held, options.max_bodies + 1);
    assert_int_equal(ask_small(), 200);
}

/* Requests behind each other, without waiting for answers. */
static void requests_in_a_row_are_answered_in_order(void **state) {
    (void)state;
    http_client c;
    http_reply reply;
    http_open(&c, port);
    for (int i = 0; i < 6; i++) {
        char id[48];
        snprintf(id, sizeof id, "X-Request-Id: r%d\r\n", i);
        http_send_request(&c, "POST", i % 2 ? "/v1/completions" : "/nowhere", id,
                          "{\"prompt\":\"x\",\"max_tokens\":2}");
    }
    for (int i = 0; i < 6; i++) {
        char id[16] = "", want[16];
        assert_true(http_read(&c, &reply));
        assert_int_equal(reply.status, i % 2 ? 200 : 404);
        snprintf(want, sizeof want, "r%d", i);
        http_header(reply.head, "X-Request-Id", id, sizeof id);
        assert_string_equal(id, want);
        http_reply_clear(&reply);
    }
    http_close(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(requests_get_their_status, setup, teardown),
        cmocka_unit_test_setup_teardown(no_second_request_hides_in_a_body, setup, teardown),
        cmocka_unit_test_setup_teardown(heads_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(numbers_are_in_range_or_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(bodies_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(a_refused_body_is_not_read_to_its_end, setup, teardown),
        cmocka_unit_test_setup_teardown(bodies_are_bounded_together, setup, teardown),
        cmocka_unit_test_setup_teardown(requests_in_a_row_are_answered_in_order, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
