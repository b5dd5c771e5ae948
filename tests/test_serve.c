/* The server on a model of random weights, over real sockets, in this process: what it answers, what it refuses, and
 * that what comes through it is what the library gives. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/exchange.h"
#include "support/replies.h"
#include "support/server.h"

static json_t *ask_json(const char *path, const char *body) {
    return http_ask_json(port, "POST", path, body, 200);
}

/* ---- Small routes ------------------------------------------------------------------------------------------------ */

static void small_routes_answer(void **state) {
    (void)state;
    json_t *models = http_ask_json(port, "GET", "/v1/models", NULL, 200);
    assert_string_equal(text_at(models, "data/0/id"), "tiny");
    assert_string_equal(text_at(models, "data/1/id"), "other");
    assert_int_equal(number_at(models, "data/0/max_model_len"), 512);
    json_decref(models);
    json_t *health = http_ask_json(port, "GET", "/health", NULL, 200);
    assert_string_equal(text_at(health, "status"), "ok");
    json_decref(health);
    json_t *version = http_ask_json(port, "GET", "/version", NULL, 200);
    assert_string_equal(text_at(version, "version"), MEPIC_VERSION);
    json_decref(version);
}

static void metrics_count(void **state) {
    (void)state;
    json_decref(ask_json("/v1/completions", "{\"prompt\":\"count me\",\"max_tokens\":3,\"ignore_eos\":true}"));
    http_reply reply;
    assert_int_equal(http_ask(port, "GET", "/metrics", "", NULL, &reply), 200);
    static const char *const lines[] = {
        "vllm:num_requests_running{model_name=\"tiny\"} 0\n",
        "vllm:generation_tokens_total{model_name=\"tiny\"} 3\n",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} 1\n",
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1\n",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"tiny\",le=\"+Inf\"} 1\n",
        "vllm:inter_token_latency_seconds_count{model_name=\"tiny\"} 2\n",
        "vllm:time_per_output_token_seconds_count{model_name=\"tiny\"} 2\n",
        "vllm:gpu_cache_usage_perc{model_name=\"tiny\"} 0\n",
        "mepic:pages{model_name=\"tiny\",kind=\"private\"} 0\n",
        "mepic:pages{model_name=\"tiny\",kind=\"prefix\"} 0\n",
        "mepic:pages{model_name=\"tiny\",kind=\"chunk\"} 0\n",
        "mepic:sharing_factor{model_name=\"tiny\"} 1\n",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        if (!strstr(reply.body, lines[i])) fail_msg("%s is not in:\n%s", lines[i], reply.body);
    }
    http_reply_clear(&reply);
}

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

/* What the library gives for a chat of one question; greedy. */
static void ask_library(const char *text, uint32_t max_tokens, result *out) {
    const mepic_engine_options options = tiny_options();
    mepic_engine *other = open_engine(&options);
    const mepic_segment part = text_of(text);
    const mepic_message message = { .role = "user", .parts = &part, .n_parts = 1 };
    const mepic_prompt prompt = { .size = sizeof prompt, .messages = &message, .n_messages = 1 };
    mepic_request request = { .size = sizeof request, .max_tokens = max_tokens, .ignore_eos = true };
    mepic_prepared *prepared;
    assert_int_equal(mepic_prepare(other, &prompt, &prepared, NULL), MEPIC_OK);
    request.prompt = prepared;
    run(other, &request, out);
    mepic_prepared_free(prepared);
    mepic_engine_close(other);
}

#define CHAT(more) "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello there\"}],\"temperature\":0," more "}"

static void a_reply_is_what_the_library_gives(void **state) {
    (void)state;
    static result want;
    ask_library("Hello there", 40, &want);
    json_t *root = ask_json("/v1/chat/completions", CHAT("\"max_tokens\":40,\"ignore_eos\":true"));
    assert_string_equal(text_at(root, "object"), "chat.completion");
    assert_string_equal(text_at(root, "model"), "tiny");
    assert_string_equal(text_at(root, "choices/0/message/role"), "assistant");
    assert_string_equal(text_at(root, "choices/0/finish_reason"), "length");
    assert_int_equal(json_string_length(at(root, "choices/0/message/content")), want.text_len);
    assert_memory_equal(text_at(root, "choices/0/message/content"), want.text, want.text_len);
    assert_int_equal(number_at(root, "usage/prompt_tokens"), want.usage.prompt_tokens);
    assert_int_equal(number_at(root, "usage/completion_tokens"), 40);
    assert_int_equal(number_at(root, "usage/total_tokens"), want.usage.prompt_tokens + 40);
    assert_int_equal(number_at(root, "usage/prompt_tokens_details/cached_tokens"), 0);
    assert_int_equal(number_at(root, "timings/predicted_n"), 40);
    json_decref(root);
}

static void a_stream_is_the_body_in_pieces(void **state) {
    (void)state;
    static const char whole[] = CHAT("\"max_tokens\":40,\"ignore_eos\":true");
    static const char piecewise[] =
        CHAT("\"max_tokens\":40,\"ignore_eos\":true,\"stream\":true,\"stream_options\":{\"include_usage\":true}");
    json_t *root = ask_json("/v1/chat/completions", whole);
    static stream s;
    ask_stream("/v1/chat/completions", piecewise, &s);
    assert_int_equal(s.text_len, json_string_length(at(root, "choices/0/message/content")));
    assert_memory_equal(s.text, text_at(root, "choices/0/message/content"), s.text_len);
    assert_int_equal(json_array_size(at(s.last, "choices")), 0);
    assert_int_equal(number_at(s.last, "usage/completion_tokens"), 40);
    assert_true(s.n_data > 10);
    json_decref(s.last);
    json_decref(root);
}

static void the_last_chunk_says_why(void **state) {
    (void)state;
    static stream s;
    ask_stream("/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":2,\"ignore_eos\":true,\"stream\":true}", &s);
    assert_string_equal(text_at(s.last, "choices/0/finish_reason"), "length");
    assert_string_equal(text_at(s.last, "object"), "text_completion");
    assert_null(at(s.last, "usage"));
    json_decref(s.last);
}

static void prompts_and_replies_multiply(void **state) {
    (void)state;
    json_t *root = ask_json("/v1/completions", "{\"prompt\":[\"first\",\"second\"],\"n\":3,\"max_tokens\":5,"
                                               "\"ignore_eos\":true,\"seed\":7}");
    assert_int_equal(json_array_size(at(root, "choices")), 6);
    for (json_int_t i = 0; i < 6; i++) {
        assert_int_equal(json_integer_value(at(json_array_get(at(root, "choices"), (size_t)i), "index")), i);
    }
    assert_int_equal(number_at(root, "usage/completion_tokens"), 30);
    /* Reply 1 has the next seed: alone it is the same. */
    json_t *alone =
        ask_json("/v1/completions", "{\"prompt\":\"first\",\"max_tokens\":5,\"ignore_eos\":true,\"seed\":8}");
    assert_string_equal(text_at(alone, "choices/0/text"), text_at(root, "choices/1/text"));
    json_decref(alone);
    json_decref(root);
}

static void token_ids_are_a_prompt(void **state) {
    (void)state;
    int32_t ids[64];
    size_t n;
    char body[1024] = "{\"temperature\":0,\"max_tokens\":5,\"ignore_eos\":true,\"prompt\":[";
    assert_int_equal(mepic_tokenize(engine, "what is it", 10, true, ids, 64, &n, NULL), MEPIC_OK);
    for (size_t i = 0; i < n; i++) {
        snprintf(body + strlen(body), sizeof body - strlen(body), "%s%d", i ? "," : "", ids[i]);
    }
    snprintf(body + strlen(body), sizeof body - strlen(body), "]}");
    json_t *by_ids = ask_json("/v1/completions", body);
    json_t *by_text = ask_json("/v1/completions", "{\"temperature\":0,\"max_tokens\":5,\"ignore_eos\":true,"
                                                  "\"prompt\":\"what is it\"}");
    assert_string_equal(text_at(by_ids, "choices/0/text"), text_at(by_text, "choices/0/text"));
    json_decref(by_ids);
    json_decref(by_text);
}

static void logprobs_come_with_every_token(void **state) {
    (void)state;
    json_t *chat = ask_json("/v1/chat/completions",
                            CHAT("\"max_tokens\":6,\"ignore_eos\":true,\"logprobs\":true,\"top_logprobs\":3"));
    const json_t *content = at(chat, "choices/0/logprobs/content");
    assert_int_equal(json_array_size(content), 6);
    for (size_t i = 0; i < 6; i++) {
        const json_t *entry = json_array_get(content, i);
        assert_int_equal(json_array_size(at(entry, "top_logprobs")), 3);
        assert_true(json_real_value(at(entry, "logprob")) == json_real_value(at(entry, "top_logprobs/0/logprob")));
    }
    json_decref(chat);
    json_t *text =
        ask_json("/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":4,\"ignore_eos\":true,\"logprobs\":2}");
    assert_int_equal(json_array_size(at(text, "choices/0/logprobs/tokens")), 4);
    assert_int_equal(json_array_size(at(text, "choices/0/logprobs/token_logprobs")), 4);
    assert_int_equal(json_object_size(at(text, "choices/0/logprobs/top_logprobs/0")), 2);
    json_decref(text);
}

static void one_connection_carries_many_requests(void **state) {
    (void)state;
    http_client c;
    http_reply reply;
    http_open(&c, port);
    for (int i = 0; i < 5; i++) {
        http_send_request(&c, "POST", "/v1/completions", "X-Request-Id: mine-7\r\n",
                          i == 2 ? "{" : "{\"prompt\":\"x\",\"max_tokens\":1}");
        assert_true(http_read(&c, &reply));
        assert_int_equal(reply.status, i == 2 ? 400 : 200);
        char id[64] = "";
        http_header(reply.head, "X-Request-Id", id, sizeof id);
        assert_string_equal(id, "mine-7");
        http_reply_clear(&reply);
    }
    http_close(&c);
}

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

static void what_does_not_fit_is_refused_with_its_numbers(void **state) {
    (void)state;
    char body[4096], prompt[2048];
    memset(prompt, 'x', sizeof prompt - 1);
    prompt[sizeof prompt - 1] = 0;
    snprintf(body, sizeof body, "{\"prompt\":\"%s\",\"stream\":true}", prompt);
    json_t *root = http_ask_json(port, "POST", "/v1/completions", body, 400);
    assert_string_equal(text_at(root, "error/code"), "context_length_exceeded");
    assert_non_null(strstr(text_at(root, "error/message"), "2047"));
    assert_non_null(strstr(text_at(root, "error/message"), "512"));
    json_decref(root);
}

static void a_text_far_too_long_is_not_tokenized(void **state) {
    (void)state;
    enum { SIZE = 16 * 512 + 200 };
    char body[SIZE + 64];
    size_t n = (size_t)snprintf(body, sizeof body, "{\"prompt\":\"");
    memset(body + n, 'x', SIZE);
    snprintf(body + n + SIZE, sizeof body - n - SIZE, "\"}");
    json_t *root = http_ask_json(port, "POST", "/v1/completions", body, 400);
    assert_string_equal(text_at(root, "error/code"), "context_length_exceeded");
    assert_non_null(strstr(text_at(root, "error/message"), "8392 bytes"));
    json_decref(root);
}

/* Names may have slashes, which clients escape or not. */
static void a_model_is_told_by_its_name(void **state) {
    (void)state;
    stop();
    mp_server_options options = default_options();
    options.names[1] = "Org/the other";
    start(&options);
    static const struct {
        const char *path, *id, *error; /* one of both is NULL */
    } models[] = { { "tiny", "tiny", NULL },
                   { "t%69ny", "tiny", NULL },
                   { "Org/the%20other", "Org/the other", NULL },
                   { "Org%2Fthe%20other", "Org/the other", NULL },
                   { "Org%2fthe%20other", "Org/the other", NULL },
                   { "gpt-x", NULL, "'gpt-x'" },
                   { "Org%2Fgpt%20x%C3%A9", NULL, "'Org/gpt x\u00e9'" },
                   { "%FFtiny", NULL, "'\ufffdtiny'" },
                   { "tin", NULL, "'tin'" },
                   { "tinyy", NULL, "'tinyy'" },
                   { "tiny/", NULL, "'tiny/'" },
                   { "tiny%", NULL, "'tiny%'" },
                   { "tiny%0", NULL, "'tiny%0'" },
                   { "tiny%00", NULL, "'tiny%00'" },
                   { "Org/the", NULL, "'Org/the'" } };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char path[64];
        snprintf(path, sizeof path, "/v1/models/%s", models[i].path);
        json_t *model = http_ask_json(port, "GET", path, NULL, models[i].id ? 200 : 404);
        if (models[i].id) {
            assert_string_equal(text_at(model, "id"), models[i].id);
            assert_string_equal(text_at(model, "object"), "model");
            assert_int_equal(number_at(model, "max_model_len"), 512);
        } else {
            assert_string_equal(text_at(model, "error/code"), "model_not_found");
            assert_non_null(strstr(text_at(model, "error/message"), models[i].error));
        }
        json_decref(model);
    }
}

/* Of a request: a {name} in the table stands for any. */
static const char *path_of(const mp_route *route) {
    static char path[64];
    const char *name = strchr(route->path, '{');
    if (!name) return route->path;
    snprintf(path, sizeof path, "%.*stiny", (int)(name - route->path), route->path);
    return path;
}

static void routes_and_methods_are_named(void **state) {
    (void)state;
    http_reply reply;
    char allow[32];
    assert_int_equal(http_ask(port, "GET", "/nowhere", "", NULL, &reply), 404);
    assert_false(http_header(reply.head, "Allow", allow, sizeof allow));
    http_reply_clear(&reply);
    uint32_t n;
    const mp_route *routes = mp_routes(&n);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(http_ask(port, "DELETE", path_of(&routes[i]), "", NULL, &reply), 405);
        assert_true(http_header(reply.head, "Allow", allow, sizeof allow));
        assert_string_equal(allow, routes[i].method);
        http_reply_clear(&reply);
    }
}

/* A line of the file, up to its colon, when it is indented so deep; NULL: it is another one. */
static char *name_of_line(char *line, size_t indent) {
    char *colon = strstr(line, ":\n");
    bool is_name = strspn(line, " ") == indent && colon && line[indent] != '#';
    if (is_name) *colon = 0;
    return is_name ? line + indent : NULL;
}

/* What the routes answer is tested against that file by a client; here, that it has the table's routes, and who may ask
 * for each. */
static void routes_are_described(void **state) {
    (void)state;
    uint32_t n;
    const mp_route *routes = mp_routes(&n), *route = NULL;
    char line[256], path[256] = "", *name;
    bool in_paths = false, by_key = false, open[64] = { false }, described[64] = { false };
    assert_true(n <= 64);
    FILE *file = fopen("docs/openapi.yaml", "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file)) {
        by_key |= strcmp(line, "security: [{key: []}]\n") == 0; // all that do not say otherwise
        if ((name = name_of_line(line, 0))) in_paths = strcmp(name, "paths") == 0;
        if (!in_paths) continue;
        if ((name = name_of_line(line, 2))) {
            snprintf(path, sizeof path, "%s", name);
        } else if ((name = name_of_line(line, 4))) {
            for (route = routes; route < routes + n; route++) {
                if (strcmp(route->path, path) == 0 && strcasecmp(route->method, name) == 0) break;
            }
            if (route == routes + n) fail_msg("there is no route %s %s, as docs/openapi.yaml says", name, path);
            described[route - routes] = true;
        } else if (strcmp(line, "      security: []\n") == 0 && route) {
            open[route - routes] = true;
        }
    }
    fclose(file);
    assert_true(by_key);
    for (uint32_t i = 0; i < n; i++) {
        if (!described[i]) fail_msg("%s %s is not in docs/openapi.yaml", routes[i].method, routes[i].path);
        if (open[i] != (routes[i].access == MP_ACCESS_PUBLIC)) {
            fail_msg("%s %s: docs/openapi.yaml is wrong about its key", routes[i].method, routes[i].path);
        }
    }
}

/* A seat is taken by a stream that goes on until its client leaves. */
static void a_full_queue_says_so(void **state) {
    (void)state;
    use_long_engine();
    mp_server_options options = default_options();
    options.max_replies = 1;
    start(&options);
    http_client c;
    char head[4096], wait[16];
    http_open(&c, port);
    http_send_request(&c, "POST", "/v1/completions", "",
                      "{\"prompt\":\"x\",\"n\":1,\"max_tokens\":60000,\"ignore_eos\":true,\"stream\":true}");
    assert_int_equal(http_read_head(&c, head, sizeof head), 200);
    http_reply reply;
    int status = http_ask(port, "POST", "/v1/completions", "", "{\"prompt\":\"x\"}", &reply);
    assert_int_equal(status, 503);
    assert_true(http_header(reply.head, "Retry-After", wait, sizeof wait));
    assert_non_null(strstr(reply.body, "overloaded"));
    http_reply_clear(&reply);
    http_close(&c);
}

/* The tokens of prompts are bounded as well; one that is alone may be longer. */
static void prompts_that_wait_are_bounded_by_their_tokens(void **state) {
    (void)state;
    use_long_engine();
    mp_server_options options = default_options();
    options.max_tokens = 100;
    start(&options);
    static const char format[] = "{\"prompt\":\"%0*d\",\"max_tokens\":%d,\"ignore_eos\":true,\"stream\":%s}";
    char body[512], head[4096], wait[16];
    http_client c;
    http_reply reply;
    snprintf(body, sizeof body, format, 90, 0, 60000, "true"); // a token for each digit
    http_open(&c, port);
    http_send_request(&c, "POST", "/v1/completions", "", body);
    assert_int_equal(http_read_head(&c, head, sizeof head), 200);
    static const struct { int digits, status; } others[] = { { 5, 200 }, { 11, 503 }, { 90, 503 }, { 200, 503 } };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        snprintf(body, sizeof body, format, others[i].digits, 0, 1, "false");
        assert_int_equal(http_ask(port, "POST", "/v1/completions", "", body, &reply), others[i].status);
        bool refused = others[i].status == 503;
        assert_int_equal(http_header(reply.head, "Retry-After", wait, sizeof wait), refused);
        if (refused) assert_non_null(strstr(reply.body, "prompts of 90 tokens"));
        http_reply_clear(&reply);
    }
    http_close(&c);
    wait_until_idle();
    assert_int_equal(http_ask(port, "POST", "/v1/completions", "", body, &reply), 200); // alone
    http_reply_clear(&reply);
}

/* Trying again would not help. */
static void expect_never(const char *key, const char *body, const char *number) {
    http_reply reply;
    char wait[16];
    assert_int_equal(http_ask(port, "POST", "/v1/completions", key, body, &reply), 400);
    assert_false(http_header(reply.head, "Retry-After", wait, sizeof wait));
    assert_non_null(strstr(reply.body, number));
    http_reply_clear(&reply);
}

static void more_replies_than_the_server_ever_takes_are_a_bad_request(void **state) {
    (void)state;
    expect_never("", "{\"prompt\":[\"x\",\"y\",\"z\"],\"n\":6}", "takes 16");
}

/* ---- Keys -------------------------------------------------------------------------------------------------------- */

static void every_route_asks_for_a_key(void **state) {
    (void)state;
    mp_keys *keys = keys_of("# ours\nsecret-one-1 alice\nsecret-two-2\n");
    assert_non_null(keys);
    assert_int_equal(mp_keys_count(keys), 2);
    stop();
    mp_server_options options = default_options();
    options.keys = keys;
    start(&options);
    uint32_t n;
    const mp_route *routes = mp_routes(&n);
    http_reply reply;
    for (uint32_t i = 0; i < n; i++) {
        const char *body = strcmp(routes[i].method, "POST") == 0 ? "{}" : NULL;
        bool open = strstr(routes[i].path, "health") != NULL;
        static const char *const wrong[] = { "", "Authorization: Bearer secret-one-\r\n",
                                             "Authorization: Bearer secret-one-11\r\n", "x-api-key: \r\n",
                                             "Authorization: Basic secret-one-1\r\n" };
        for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
            int status = http_ask(port, routes[i].method, path_of(&routes[i]), wrong[k], body, &reply);
            assert_int_equal(status, open ? 200 : 401);
            http_reply_clear(&reply);
        }
        static const char *const right[] = { "Authorization: Bearer secret-one-1\r\n", "x-api-key: secret-two-2\r\n" };
        for (size_t k = 0; k < 2; k++) {
            int status = http_ask(port, routes[i].method, path_of(&routes[i]), right[k], body, &reply);
            assert_int_equal(status, body ? 400 : 200);
            http_reply_clear(&reply);
        }
    }
    stop();
    mp_keys_free(keys);
    const mp_server_options again = default_options();
    start(&again);
}

static void no_memory_is_no_unknown_key(void **state) {
    (void)state;
    mp_keys *keys = keys_of("secret-one-1 alice\n");
    const mp_key *key;
    mp_mem_fail_at(1, false);
    assert_false(mp_keys_find(keys, "secret-one-1", 12, &key));
    mp_mem_fail_at(0, false);
    assert_true(mp_keys_find(keys, "secret-one-1", 12, &key));
    assert_non_null(key);
    assert_true(mp_keys_find(keys, "secret-one-2", 12, &key));
    assert_null(key);
    mp_keys_free(keys);
}

static void a_key_has_its_own_limit(void **state) {
    (void)state;
    mp_keys *keys = keys_of("secret-one-1 alice\n");
    use_long_engine();
    mp_server_options options = default_options();
    options.keys = keys;
    options.max_per_key = 2;
    start(&options);
    http_reply reply;
    char seconds[16];
    static const char key[] = "Authorization: Bearer secret-one-1\r\n";
    expect_never(key, "{\"prompt\":\"x\",\"n\":3}", "has 2");
    http_client c;
    char head[4096];
    http_open(&c, port);
    http_send_request(&c, "POST", "/v1/completions", key,
                      "{\"prompt\":\"x\",\"max_tokens\":60000,\"ignore_eos\":true,\"stream\":true}");
    assert_int_equal(http_read_head(&c, head, sizeof head), 200);
    assert_int_equal(http_ask(port, "POST", "/v1/completions", key, "{\"prompt\":\"x\",\"n\":2}", &reply), 429);
    assert_true(http_header(reply.head, "Retry-After", seconds, sizeof seconds));
    assert_non_null(strstr(reply.body, "rate_limit_error"));
    http_reply_clear(&reply);
    http_close(&c);
    wait_until_idle();
    for (int i = 0; i < 3; i++) { // its seats are free again before the answer is there
        assert_int_equal(
            http_ask(port, "POST", "/v1/completions", key, "{\"prompt\":\"x\",\"n\":2,\"max_tokens\":20}", &reply),
            200);
        http_reply_clear(&reply);
    }
    stop();
    mp_keys_free(keys);
    const mp_server_options again = default_options();
    start(&again);
}

static void a_byte_order_mark_is_no_part_of_a_key(void **state) {
    (void)state;
    static const char *const texts[] = { "\xef\xbb\xbfsecret-one-1 alice\n", "\xef\xbb\xbf# ours\r\nsecret-one-1\r\n" };
    for (int i = 0; i < 2; i++) {
        mp_keys *keys = keys_of(texts[i]);
        assert_non_null(keys);
        const mp_key *key;
        assert_true(mp_keys_find(keys, "secret-one-1", 12, &key));
        assert_non_null(key);
        assert_int_equal(mp_keys_count(keys), 1);
        mp_keys_free(keys);
    }
    assert_null(keys_of("secret-one-1\n\xef\xbb\xbfsecret-two-2\n"));
}

static void bad_key_files_are_refused(void **state) {
    (void)state;
    assert_null(keys_of(""));
    assert_null(keys_of("# nothing\n"));
    assert_null(keys_of("short\n"));
    assert_null(keys_of("secret-one-1\nsecret-one-1 again\n"));
    assert_null(keys_of("secret-\xc3\xa9ne-1\n"));
}

static void an_open_server_stays_on_loopback(void **state) {
    (void)state;
    mp_server *other = NULL;
    mepic_error err;
    mp_server_options options = default_options();
    options.host = "0.0.0.0";
    expect(mp_server_open(&options, -1, &other, &err), MEPIC_ERR_ARGUMENT, &err, "API keys");
    options.host = "not a host";
    expect(mp_server_open(&options, -1, &other, &err), MEPIC_ERR_ARGUMENT, &err, "not a host");
    options.host = "127.0.0.1";
    options.port = port;
    expect(mp_server_open(&options, -1, &other, &err), MEPIC_ERR_IO, &err, "in use");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(small_routes_answer, setup, teardown),
        cmocka_unit_test_setup_teardown(metrics_count, setup, teardown),
        cmocka_unit_test_setup_teardown(a_reply_is_what_the_library_gives, setup, teardown),
        cmocka_unit_test_setup_teardown(a_stream_is_the_body_in_pieces, setup, teardown),
        cmocka_unit_test_setup_teardown(the_last_chunk_says_why, setup, teardown),
        cmocka_unit_test_setup_teardown(prompts_and_replies_multiply, setup, teardown),
        cmocka_unit_test_setup_teardown(token_ids_are_a_prompt, setup, teardown),
        cmocka_unit_test_setup_teardown(logprobs_come_with_every_token, setup, teardown),
        cmocka_unit_test_setup_teardown(one_connection_carries_many_requests, setup, teardown),
        cmocka_unit_test_setup_teardown(what_does_not_fit_is_refused_with_its_numbers, setup, teardown),
        cmocka_unit_test_setup_teardown(a_text_far_too_long_is_not_tokenized, setup, teardown),
        cmocka_unit_test(no_memory_is_no_unknown_key),
        cmocka_unit_test_setup_teardown(a_key_has_its_own_limit, setup, teardown),
        cmocka_unit_test_setup_teardown(routes_and_methods_are_named, setup, teardown),
        cmocka_unit_test_setup_teardown(a_model_is_told_by_its_name, setup, teardown),
        cmocka_unit_test(routes_are_described),
        cmocka_unit_test_setup_teardown(a_full_queue_says_so, setup, teardown),
        cmocka_unit_test_setup_teardown(prompts_that_wait_are_bounded_by_their_tokens, setup, teardown),
        cmocka_unit_test_setup_teardown(more_replies_than_the_server_ever_takes_are_a_bad_request, setup, teardown),
        cmocka_unit_test_setup_teardown(every_route_asks_for_a_key, setup, teardown),
        cmocka_unit_test_setup_teardown(a_byte_order_mark_is_no_part_of_a_key, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_key_files_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(an_open_server_stays_on_loopback, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
