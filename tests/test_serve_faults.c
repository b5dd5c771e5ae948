/* The server when something goes wrong: clients that leave, read slowly or never finish, an engine that breaks, and its
 * own end. A reply here would take minutes; what ends it is what is tested. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "engine/engine.h"
#include "serve/dialect.h"
#include "support/replies.h"
#include "support/server.h"
#include "support/tiny.h"

#define LONG "\"max_tokens\":60000,\"ignore_eos\":true"
static const char long_stream[] = "{\"prompt\":\"x\"," LONG ",\"stream\":true}";
static const char long_body[] = "{\"prompt\":\"x\"," LONG "}";
static const char aborted[] = "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} ";

static void open_long(const mp_server_options *given, uint32_t max_running) {
    mepic_engine_options options = long_options();
    options.max_running = max_running;
    engine = open_engine(&options);
    mp_server_options serve = given ? *given : default_options();
    serve.engine = engine;
    start(&serve);
}

static void assert_no_page_is_held(void) {
    assert_true(pages_of("private") == 0.0 && pages_of("prefix") == 0.0 && pages_of("chunk") == 0.0);
}

static void close_long(void) {
    stop();
    mepic_engine_close(engine);
}

/* ---- Clients ----------------------------------------------------------------------------------------------------- */

static void a_client_that_leaves_frees_its_pages(void **state) {
    (void)state;
    open_long(NULL, 8);
    http_client streaming, waiting;
    open_stream(&streaming, "/v1/completions", long_stream);
    assert_non_null(http_read_line(&streaming));
    http_open(&waiting, port);
    http_send_request(&waiting, "POST", "/v1/completions", "", long_body);
    http_close(&streaming);
    http_close(&waiting);
    wait_until_metric(aborted, 2.0);
    assert_no_page_is_held();
    json_decref(http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":2}", 200));
    close_long();
}

static double row_seconds(const char *kind) {
    char line[80];
    snprintf(line, sizeof line, "mepic:rows_seconds_total{model_name=\"tiny\",kind=\"%s\"} ", kind);
    return metric(line);
}

/* While a request runs that found a document and a prefix: pages and moments are each of one kind. */
static void pages_and_time_are_told_by_kind(void **state) {
    (void)state;
    char words[800] = "", body[2048], stream_body[2048];
    for (size_t n = 0; n < 60; n++) snprintf(words + 12 * n, 13, "word %02zu and ", n % 100);
    static const char format[] = "{\"documents\":[\"%s\"],\"prompt\":\"x\",\"ignore_eos\":true,%s}";
    snprintf(body, sizeof body, format, words, "\"max_tokens\":40");
    snprintf(stream_body, sizeof stream_body, format, words, "\"max_tokens\":60000,\"stream\":true");
    open_long(NULL, 8);
    mepic_model_info info;
    mepic_model_info_read(engine, &info);
    json_decref(http_ask_json(port, "POST", "/v1/completions", body, 200));
    assert_no_page_is_held();
    assert_true(pages_of("evictable") > 0.0);
    http_client c;
    open_stream(&c, "/v1/completions", stream_body);
    static const char *const held[] = { "private", "prefix", "chunk" };
    double pages[3] = { 0 };
    while (pages[0] == 0.0 || pages[1] == 0.0 || pages[2] <= 5.0) { /* read on, or the stream is cancelled as stuck */
        assert_non_null(http_read_line(&c));
        pages_of_kinds(held, 3, pages);
    }
    http_close(&c);
    wait_until_metric(aborted, 1.0);
    assert_no_page_is_held();
    double all = pages_of("free") + pages_of("evictable") + pages_of("canonical");
    assert_true(all == info.pages);
    assert_true(metric("mepic:page_bytes{model_name=\"tiny\"} ") == info.page_bytes);
    static const char *const kinds[] = { "decode", "text", "link", "compile" };
    double sum = 0.0, forward = metric("mepic:step_seconds_total{model_name=\"tiny\",part=\"forward\"} ");
    for (uint32_t i = 0; i < 4; i++) {
        assert_true(row_seconds(kinds[i]) > 0.0);
        sum += row_seconds(kinds[i]);
    }
    assert_true(sum > 0.999 * forward && sum < 1.001 * forward);
    close_long();
}

/* One request runs, the other waits behind it: all it can hear is that it waits. */
static void a_stream_without_events_says_so(void **state) {
    (void)state;
    mp_server_options options = default_options();
    options.silence_ms = 1;
    open_long(&options, 1);
    http_client first, second;
    open_stream(&first, "/v1/completions", long_stream);
    open_stream(&second, "/v1/completions", "{\"prompt\":\"y\",\"max_tokens\":3,\"ignore_eos\":true,\"stream\":true}");
    const char *line = http_read_line(&second);
    assert_non_null(line);
    assert_string_equal(line, ": waiting");
    http_close(&first);
    stream s;
    read_stream(&second, &s);
    assert_true(s.done);
    json_decref(s.last);
    http_close(&second);
    close_long();
}

/* Comments in a stream of a thousand tokens whose text is held back, since all of it could begin a stop string. */
static uint32_t comments_while_held_back(uint32_t silence_ms) {
    mp_server_options options = default_options();
    options.silence_ms = silence_ms;
    open_long(&options, 8);
    json_t *ids = http_ask_json(port, "POST", "/tokenize", "{\"content\":\"a\"}", 200);
    char letters[1001] = "", body[2048];
    memset(letters, 'a', 1000);
    snprintf(body, sizeof body,
             "{\"prompt\":\"x\",\"temperature\":0,\"logit_bias\":{\"%d\":100},\"stop\":\"%s\"," LONG
             ",\"stream\":true}",
             (int)number_at(ids, "tokens/0"), letters);
    static stream s;
    ask_stream("/v1/completions", body, &s);
    assert_string_equal(text_at(s.last, "choices/0/finish_reason"), "stop");
    assert_int_equal(s.text_len, 0);
    json_decref(s.last);
    json_decref(ids);
    close_long();
    return s.n_comments;
}

static void comments_go_by_time_and_not_by_events(void **state) {
    (void)state;
    assert_int_equal(comments_while_held_back(3600000), 0);
    assert_true(comments_while_held_back(1) > 0);
}

/* Lines of `c` are read until that many replies wait. */
static void read_until_waiting(http_client *c, double n) {
    while (metric("vllm:num_requests_waiting{model_name=\"tiny\"} ") != n) assert_non_null(http_read_line(c));
}

/* One runs and sixteen wait in the engine, so the next one waits in front of it. */
static void waiting_in_front_of_the_engine_is_waiting(void **state) {
    (void)state;
    mp_server_options options = default_options();
    options.max_replies = 32;
    open_long(&options, 1);
    http_client running, ahead[2], late;
    open_stream(&running, "/v1/completions", long_stream);
    assert_non_null(http_read_line(&running));
    for (uint32_t i = 0; i < 2; i++) {
        http_open(&ahead[i], port);
        http_send_request(&ahead[i], "POST", "/v1/completions", "", "{\"prompt\":\"x\",\"n\":8," LONG "}");
        read_until_waiting(&running, 8.0 * (i + 1));
    }
    http_open(&late, port);
    http_send_request(&late, "POST", "/v1/completions", "", "{\"prompt\":\"x\",\"max_tokens\":3,\"ignore_eos\":true}");
    read_until_waiting(&running, 17);
    uint64_t since = mp_now_ns();
    for (uint32_t i = 0; i < 300; i++) assert_non_null(http_read_line(&running));
    double least = (double)(mp_now_ns() - since) * 1e-9;
    http_close(&running);
    for (uint32_t i = 0; i < 2; i++) http_close(&ahead[i]);
    http_reply reply;
    assert_true(http_read(&late, &reply));
    assert_int_equal(reply.status, 200);
    json_t *root = json_loads(reply.body, JSON_ALLOW_NUL, NULL);
    assert_true(json_real_value(at(root, "timings/prompt_ms")) >= least * 1e3);
    static const char *const sums[] = { "time_to_first_token", "e2e_request_latency", "request_queue_time" };
    for (uint32_t i = 0; i < 3; i++) { // of the one that was not cancelled
        char line[96];
        snprintf(line, sizeof line, "vllm:%s_seconds_sum{model_name=\"tiny\"} ", sums[i]);
        assert_true(metric(line) >= least);
    }
    json_decref(root);
    http_reply_clear(&reply);
    http_close(&late);
    close_long();
}

static void a_slow_reader_is_cancelled(void **state) {
    (void)state;
    mp_server_options options = default_options();
    options.stuck_ms = 1;
    open_long(&options, 8);
    http_client c;
    http_open_small(&c, port, 4096);
    http_send_request(&c, "POST", "/v1/completions", "Connection: close\r\n",
                      "{\"prompt\":\"x\",\"logprobs\":20," LONG ",\"stream\":true}");
    http_client other;
    open_stream(&other, "/v1/completions", "{\"prompt\":\"y\",\"max_tokens\":20,\"ignore_eos\":true,\"stream\":true}");
    stream s;
    read_stream(&other, &s); // nobody waits for the slow one
    assert_true(s.done);
    json_decref(s.last);
    http_close(&other);
    wait_until_metric(aborted, 1.0);
    assert_no_page_is_held();
    char head[4096];
    assert_int_equal(http_read_head(&c, head, sizeof head), 200);
    read_stream(&c, &s); // what was written before, and then the reason
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "error/code"), "slow_reader");
    json_decref(s.last);
    http_close(&c);
    close_long();
}

/* Nothing is read before the end of all eight: what one reply may leave behind would be too little for them. */
static void a_reader_of_many_replies_may_leave_more_behind(void **state) {
    (void)state;
    open_long(NULL, 8);
    http_client c;
    http_open_small(&c, port, 4096);
    http_send_request(
        &c, "POST", "/v1/completions", "Connection: close\r\n",
        "{\"prompt\":\"x\",\"n\":8,\"logprobs\":20,\"max_tokens\":500,\"ignore_eos\":true,\"stream\":true}");
    char head[4096];
    assert_int_equal(http_read_head(&c, head, sizeof head), 200);
    wait_until_idle();
    static stream s;
    read_stream(&c, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "choices/0/finish_reason"), "length");
    json_decref(s.last);
    http_close(&c);
    close_long();
}

static void a_request_that_never_ends_is_cut_off(void **state) {
    (void)state;
    mp_server_options options = default_options();
    options.header_ms = options.body_ms = 1;
    options.silence_ms = 1; // the watch walks as often
    open_long(&options, 8);
    static const char *const beginnings[] = {
        "",
        "POST /v1/comp",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        "10\r\n\r\n{",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    };
    for (size_t i = 0; i < sizeof beginnings / sizeof *beginnings; i++) {
        http_client c;
        http_reply reply;
        http_open(&c, port);
        http_send_text(&c, beginnings[i]);
        assert_false(http_read(&c, &reply));
        http_close(&c);
    }
    /* what comes of a refused body buys no time */
    static char body[64900];
    memset(body, ' ', sizeof body);
    http_client c;
    http_reply reply;
    http_open(&c, port);
    http_send_text(&c, "POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65000\r\n\r\n");
    http_send(&c, body, sizeof body);
    assert_false(http_read(&c, &reply));
    http_close(&c);
    close_long();
}

enum { SLOW = 200 };

/* A byte to each in turn, up to byte n: half of them stay in their headers, half in their body. */
static void send_slowly(http_client *slow, size_t from, size_t to) {
    static const char *const texts[] = {
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: and on and on and on and on and on and on and on",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\n\r\n{\"prompt\":",
    };
    for (size_t at = from; at < to; at++) {
        for (size_t i = 0; i < SLOW; i++) {
            if (at < strlen(texts[i % 2])) http_send(&slow[i], texts[i % 2] + at, 1);
        }
    }
}

static void open_slow(http_client *slow, uint32_t patience_ms) {
    mp_server_options options = default_options();
    options.header_ms = options.body_ms = patience_ms;
    options.silence_ms = 1; // the watch walks as often
    open_long(&options, 8);
    for (size_t i = 0; i < SLOW; i++) http_open(&slow[i], port);
}

static void close_slow(http_client *slow) {
    for (size_t i = 0; i < SLOW; i++) http_close(&slow[i]);
    close_long();
}

/* "Slowloris". */
static void many_that_never_end_cost_others_nothing(void **state) {
    (void)state;
    static http_client slow[SLOW];
    open_slow(slow, 3600000);
    send_slowly(slow, 0, 100);
    for (size_t k = 0; k < 20; k++) {
        send_slowly(slow, 100 + k, 101 + k);
        http_client c;
        open_stream(&c, "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":50,\"ignore_eos\":true,\"stream\":true}");
        json_t *root = http_ask_json(port, "POST", "/v1/completions",
                                     "{\"prompt\":\"y\",\"max_tokens\":50,\"ignore_eos\":true}", 200);
        assert_int_equal(number_at(root, "usage/completion_tokens"), 50);
        json_decref(root);
        stream s;
        read_stream(&c, &s);
        assert_true(s.done);
        json_decref(s.last);
        http_close(&c);
    }
    for (size_t i = 0; i < SLOW; i++) { // neither answered nor ended
        char byte;
        assert_int_equal(recv(slow[i].fd, &byte, 1, MSG_DONTWAIT), -1);
        assert_int_equal(errno, EAGAIN);
    }
    close_slow(slow);
}

/* What they send buys no time. */
static void many_that_never_end_are_all_cut_off(void **state) {
    (void)state;
    static http_client slow[SLOW];
    open_slow(slow, 1);
    send_slowly(slow, 0, 120);
    for (size_t i = 0; i < SLOW; i++) {
        http_reply reply;
        assert_false(http_read(&slow[i], &reply));
    }
    close_slow(slow);
}

#define CHAT "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,\"top_logprobs\":20"

static void more_log_probabilities_than_a_body_holds_are_refused(void **state) {
    (void)state;
    open_long(NULL, 8);
    static const char *const asks[][2] = {
        { "/v1/chat/completions", "{" CHAT ",\"n\":8,\"max_tokens\":1561}" },
        { "/v1/completions", "{\"prompt\":[\"x\",\"y\"],\"n\":4,\"logprobs\":20,\"max_tokens\":1561}" },
    };
    for (size_t i = 0; i < 2; i++) {
        json_t *refused = http_ask_json(port, "POST", asks[i][0], asks[i][1], 400);
        assert_string_equal(text_at(refused, "error/param"), "logprobs");
        assert_non_null(strstr(text_at(refused, "error/message"), "8 replies of 1561 tokens with 21"));
        assert_non_null(strstr(text_at(refused, "error/message"), "262248"));
        json_decref(refused);
    }
    close_long();
}

/* Who does not say how long replies may be gets as many log-probabilities as fit, and not a failure at the end. */
static void replies_of_no_given_length_end_where_their_log_probabilities_do(void **state) {
    (void)state;
    open_long(NULL, 8);
    json_t *root = http_ask_json(port, "POST", "/v1/chat/completions", "{" CHAT ",\"n\":8,\"ignore_eos\":true}", 200);
    for (size_t i = 0; i < 8; i++) {
        const json_t *reply = json_array_get(at(root, "choices"), i);
        assert_string_equal(text_at(reply, "finish_reason"), "length");
        assert_int_equal(json_array_size(at(reply, "logprobs/content")), (1 << 18) / (8 * 21));
    }
    json_decref(root);
    /* of few there is no such end: only the context's */
    root = http_ask_json(port, "POST", "/v1/chat/completions",
                         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,\"max_tokens\":2000,"
                         "\"ignore_eos\":true}",
                         200);
    assert_int_equal(json_array_size(at(root, "choices/0/logprobs/content")), 2000);
    json_decref(root);
    close_long();
}

/* The reply to a request that does not say how long it may be: what is kept of it has an end all the same. */
static void log_probabilities_do_not_grow_for_ever(void **state) {
    (void)state;
    const mepic_engine_options options = long_options();
    engine = open_engine(&options);
    mepic_model_info info;
    mepic_model_info_read(engine, &info);
    static const char *const names[] = { "tiny" };
    const mp_api api = { .engine = engine, .info = &info, .names = names, .n_names = 1 };
    mp_generation *generation;
    mp_writer *writer;
    mp_api_error err;
    json_t *body = json_loads("{" CHAT "}", 0, NULL);
    assert_int_equal(mp_generation_open(&generation, NULL), MEPIC_OK);
    if (!mp_openai_chat.read(&api, body, 1, generation, &writer, &err)) fail_msg("%s", err.message);
    mepic_logprob top[20];
    for (int32_t i = 0; i < 20; i++) top[i] = (mepic_logprob){ .token = i + 40, .logprob = -1.2345678f * (float)i };
    const mp_feed_event token = { .kind = MEPIC_EVENT_TOKEN, .token = 40, .n_top = 20, .top = top, .text = "" };
    mp_buf out = { .limit = 1 << 20 };
    uint32_t n = 0;
    while (n < 40000 && mp_openai_chat.event(writer, &token, &out)) n++;
    assert_in_range(n, 10000, 39999);
    mp_openai_chat.close(writer);
    mp_generation_free(generation);
    mp_buf_clear(&out);
    json_decref(body);
    mepic_engine_close(engine);
}

static void count_lost(void *user, const mp_record *record) {
    atomic_uint *n_left = user;
    if (record->end && record->status == 499) atomic_fetch_add(n_left, 1);
}

/* Whatever was lost, a line of a stream is whole. */
static void assert_whole_lines(const char *line) {
    for (; *line; line += strspn(line, "\n")) {
        size_t n = strcspn(line, "\n");
        json_t *root = n > 6 ? json_loadb(line + 6, n - 6, JSON_ALLOW_NUL, NULL) : NULL;
        if (!root && strncmp(line, "data: [DONE]", n) != 0) fail_msg("half a line: %.*s", (int)n, line);
        json_decref(root);
        line += n;
    }
}

/* Each allocation fails once, on whatever thread it is: a request may be refused or lost, never the server. */
static void out_of_memory_costs_one_request(void **state) {
    (void)state;
    static const char *const bodies[] = {
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"documents\":[\"a document\"],\"max_tokens\":3,"
        "\"stop\":[\"never\"],\"logit_bias\":{\"1\":-1},\"logprobs\":true,\"unknown\":1}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":3,\"stream\":true}",
    };
    static atomic_uint n_left;
    mp_server_options options = default_options();
    options.record = count_lost;
    options.log.user = &n_left;
    open_long(&options, 8);
    uint32_t n_lost = 0, n_unanswered = 0;
    for (uint32_t n = 1; n <= 120; n++) {
        http_client c;
        http_reply reply;
        http_open(&c, port);
        mp_mem_fail_at(n, false);
        http_send_request(&c, "POST", "/v1/chat/completions", "Connection: close\r\n", bodies[n % 2]);
        bool answered = http_read(&c, &reply);
        mp_mem_fail_at(0, false);
        n_lost += !answered || reply.status != 200;
        n_unanswered += !answered;
        if (answered && reply.status != 200 && reply.status != 500 && reply.status != 503) {
            fail_msg("allocation %u: status %d: %s", n, reply.status, reply.body);
        }
        if (answered && reply.status == 200 && n % 2 == 1) assert_whole_lines(reply.body);
        http_reply_clear(&reply);
        http_close(&c);
        wait_until_idle();
    }
    assert_true(n_lost > 20);
    assert_in_range(n_unanswered, 0, 1); // nothing can be said without memory for the exchange
    assert_int_equal(n_left, 0);         // nobody left
    assert_false(mp_server_broken(server));
    json_decref(http_ask_json(port, "POST", "/v1/chat/completions", bodies[0], 200));
    assert_no_page_is_held();
    close_long();
}

/* ---- The server -------------------------------------------------------------------------------------------------- */

static void an_ending_server_says_why(void **state) {
    (void)state;
    open_long(NULL, 8);
    http_client c;
    open_stream(&c, "/v1/completions", long_stream);
    assert_non_null(http_read_line(&c));
    mp_server_drain(server);
    json_t *refused = http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\"}", 503);
    assert_string_equal(text_at(refused, "error/code"), "shutting_down");
    json_decref(refused);
    json_t *health = http_ask_json(port, "GET", "/health", NULL, 503);
    assert_string_equal(text_at(health, "status"), "draining");
    json_decref(health);
    stop();
    stream s;
    read_stream(&c, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "error/code"), "shutting_down");
    json_decref(s.last);
    http_close(&c);
    mepic_engine_close(engine);
}

static void a_drained_server_lets_replies_end(void **state) {
    (void)state;
    open_long(NULL, 8);
    http_client c;
    open_stream(&c, "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":300,\"ignore_eos\":true,\"stream\":true}");
    mp_server_drain(server);
    stream s;
    read_stream(&c, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "choices/0/finish_reason"), "length");
    json_decref(s.last);
    http_close(&c);
    wait_until_idle();
    close_long();
}

static float no_numbers[4096];
static const mp_backend_ops *working;
static uint32_t n_good_rows; /* that come before the first without numbers */
static const float *logits_without_numbers(mp_backend *b, uint32_t i) {
    if (n_good_rows > 0) {
        n_good_rows--;
        return working->logits_row(b, i);
    }
    for (size_t k = 0; k < 4096; k++) no_numbers[k] = NAN;
    return no_numbers;
}

static void a_reply_that_fails_alone_is_told_and_the_server_goes_on(void **state) {
    (void)state;
    const mepic_engine_options options = long_options();
    engine = open_engine(&options);
    working = engine->backend->ops;
    mp_backend_ops failing = *working;
    failing.logits_row = logits_without_numbers;
    mp_server_options serve = default_options();
    engine->backend->ops = &failing;
    start(&serve);
    json_t *failed = http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\",\"n\":3}", 500);
    assert_string_equal(text_at(failed, "error/code"), "reply_failed");
    assert_non_null(strstr(text_at(failed, "error/message"), "hold no number"));
    json_decref(failed);
    n_good_rows = 3; /* the stream has begun before it fails */
    stream s;
    ask_stream("/v1/completions", "{\"prompt\":\"x\",\"stream\":true,\"ignore_eos\":true,\"max_tokens\":50}", &s);
    assert_true(s.n_data >= 2);
    assert_string_equal(text_at(s.last, "error/code"), "reply_failed");
    json_decref(s.last);
    wait_until_idle();
    assert_false(mp_server_broken(server));
    assert_true(metric("vllm:request_success_total{model_name=\"tiny\",finished_reason=\"error\"} ") >= 2.0);
    assert_no_page_is_held();
    engine->backend->ops = working;
    json_decref(http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":2}", 200));
    close_long();
}

static void a_broken_engine_is_told(void **state) {
    (void)state;
    const mepic_engine_options options = long_options();
    engine = open_engine(&options);
    mp_invariant(&engine->fault, false, "broken by the test");
    mp_server_options serve = default_options();
    start(&serve);
    json_t *failed = http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\"}", 500);
    assert_string_equal(text_at(failed, "error/code"), "engine_failed");
    assert_non_null(strstr(text_at(failed, "error/message"), "broken by the test"));
    json_decref(failed);
    wait_until_idle();
    assert_true(mp_server_broken(server));
    json_t *health = http_ask_json(port, "GET", "/health", NULL, 503);
    assert_string_equal(text_at(health, "status"), "broken");
    json_decref(health);
    json_decref(http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\"}", 500));
    close_long();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_client_that_leaves_frees_its_pages),
        cmocka_unit_test(pages_and_time_are_told_by_kind),
        cmocka_unit_test(a_stream_without_events_says_so),
        cmocka_unit_test(comments_go_by_time_and_not_by_events),
        cmocka_unit_test(waiting_in_front_of_the_engine_is_waiting),
        cmocka_unit_test(a_slow_reader_is_cancelled),
        cmocka_unit_test(a_reader_of_many_replies_may_leave_more_behind),
        cmocka_unit_test(a_request_that_never_ends_is_cut_off),
        cmocka_unit_test(many_that_never_end_cost_others_nothing),
        cmocka_unit_test(many_that_never_end_are_all_cut_off),
        cmocka_unit_test(more_log_probabilities_than_a_body_holds_are_refused),
        cmocka_unit_test(replies_of_no_given_length_end_where_their_log_probabilities_do),
        cmocka_unit_test(log_probabilities_do_not_grow_for_ever),
        cmocka_unit_test(out_of_memory_costs_one_request),
        cmocka_unit_test(an_ending_server_says_why),
        cmocka_unit_test(a_drained_server_lets_replies_end),
        cmocka_unit_test(a_reply_that_fails_alone_is_told_and_the_server_goes_on),
        cmocka_unit_test(a_broken_engine_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
