/* Requests as no client sends them: what is taken, what is bounded, what hides behind another. */
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

static void expect_good(const char *bytes) {
    http_client c;
    http_reply reply;
    http_open(&c, port);
    http_send_text(&c, bytes);
    if (!http_read(&c, &reply)) fail_msg("no answer to: %s", bytes);
    if (reply.status != 200) fail_msg("%d for: %s\n%s", reply.status, bytes, reply.body);
    http_reply_clear(&reply);
    http_close(&c);
}

/* Those that are refused are in bad_requests.txt. */
static void unusual_requests_are_taken(void **state) {
    (void)state;
    static const char *const requests[] = {
        POST JSON BODY,
        POST "Content-Type: application/json; charset=utf-8\r\n" BODY,
        POST "content-type: Application/JSON\r\n" BODY,
        POST JSON "Content-Encoding: identity\r\n" BODY,
        POST JSON "Content-Length: 36\r\n\r\n{\"prompt\":\"a\\u0000b\",\"max_tokens\":1}",
        POST JSON "Transfer-Encoding: chunked\r\n\r\n1d\r\n{\"prompt\":\"x\",\"max_tokens\":1}\r\n0\r\n\r\n",
        POST JSON "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1c\r\n\"prompt\":\"x\",\"max_tokens\":1}\r\n0\r\n\r\n",
        "GET /health HTTP/1.1\r\n" HOST "\r\n",
        "GET /health HTTP/1.0\r\n\r\n",
        "GET /health?x=1 HTTP/1.1\r\n" HOST "\r\n",
        "GET /health HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: LOCALHOST\r\n\r\n",
        "GET /health HTTP/1.1\r\n" HOST "X:\r\nY: \r\nZ: \t z\r\nContent-Language: de\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) expect_good(requests[i]);
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
}

/* Larger than the limit, without saying so first. */
static void bodies_are_bounded(void **state) {
    (void)state;
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

/* Nobody with an interest in the answer sends so much. */
static void a_body_far_too_large_is_not_read_to_its_end(void **state) {
    (void)state;
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
        cmocka_unit_test_setup_teardown(unusual_requests_are_taken, setup, teardown),
        cmocka_unit_test_setup_teardown(no_second_request_hides_in_a_body, setup, teardown),
        cmocka_unit_test_setup_teardown(bodies_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(a_body_far_too_large_is_not_read_to_its_end, setup, teardown),
        cmocka_unit_test_setup_teardown(bodies_are_bounded_together, setup, teardown),
        cmocka_unit_test_setup_teardown(requests_in_a_row_are_answered_in_order, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
