/* Documents through the server, as people found it wanting elsewhere: each way of giving one finds the same pages, they
 * are found behind a text that changed, beside a new one, and held once by many. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "support/server.h"
#include "support/tools.h"

enum { PAGE = 16 };

/* A document of 50 words that begins with its number: about 250 tokens. */
static const char *report(uint32_t number) {
    static char texts[4][1024];
    char *out = texts[number % 4];
    size_t n = (size_t)snprintf(out, sizeof texts[0], "number %u:", number);
    for (uint32_t i = 0; i < 50; i++) n += (size_t)snprintf(out + n, sizeof texts[0] - n, " word%u", i);
    return out;
}

static const char *headers = ""; /* of requests: who asks */

/* Where the prompt of this body came from. `format` makes the body. */
__attribute__((format(printf, 2, 3))) static mepic_usage usage_of(const char *path, const char *format, ...) {
    char body[8192];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(body, sizeof body, format, args);
    va_end(args);
    assert_true(n > 0 && (size_t)n < sizeof body);
    http_reply reply;
    if (http_ask(port, "POST", path, headers, body, &reply) != 200) fail_msg("%s", reply.body);
    json_t *root = json_loads(reply.body, JSON_ALLOW_NUL, NULL);
    assert_non_null(root);
    http_reply_clear(&reply);
    const json_t *details = at(root, "usage/prompt_tokens_details"), *prompt = at(root, "usage/prompt_tokens");
    mepic_usage u = { .prompt_tokens = (uint32_t)json_integer_value(prompt),
                      .prefix_tokens = (uint32_t)number_at(details, "prefix_tokens"),
                      .chunk_tokens = (uint32_t)number_at(details, "chunk_tokens"),
                      .linked_tokens = (uint32_t)number_at(details, "linked_tokens"),
                      .compiled_tokens = (uint32_t)number_at(details, "compiled_tokens") };
    json_decref(root);
    return u;
}

#define END ",\"max_tokens\":1}"
#define CHAT(content) "{\"messages\":[{\"role\":\"user\",\"content\":" content "}]" END

static void every_way_of_giving_a_document_finds_the_same_pages(void **state) {
    (void)state;
    static const char chat[] = "/v1/chat/completions", completions[] = "/v1/completions", messages[] = "/v1/messages";
    static const char *const ways[][2] = {
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"a?\"}],\"documents\":[\"%s\"]" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"b?\"}],\"documents\":[{\"text\":\"%s\\n\"}]" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"c?\"}],\"documents\":[\"x\",{\"data\":\"%s\"}]" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"d?\"}],\"documents\":[{\"id\":\"7\",\"data\":"
                "{\"snippet\":\"%s\"}}]" END },
        { chat, CHAT("[{\"type\":\"text\",\"text\":\"%s\",\"mepic\":{\"chunk\":true}},"
                     "{\"type\":\"text\",\"text\":\"e?\"}]") },
        { chat, "{\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\"%s\",\"mepic\":"
                "{\"chunk\":true}}]},{\"role\":\"user\",\"content\":\"f?\"}]" END },
        { chat, CHAT("\"g: ####%s#### what?\"") },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"h?\"},{\"role\":\"assistant\",\"tool_calls\":[{\"id\":"
                "\"1\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]},{\"role\":\"tool\","
                "\"tool_call_id\":\"1\",\"content\":\"%s\"}]" END },
        { completions, "{\"prompt\":\"i?\",\"documents\":[\"%s\"]" END },
        { completions, "{\"prompt\":\"j: ####%s#### what?\"" END },
        { messages, CHAT("[{\"type\":\"document\",\"source\":{\"type\":\"text\",\"media_type\":\"text/plain\","
                         "\"data\":\"%s\"}},{\"type\":\"text\",\"text\":\"k?\"}]") },
        { messages, CHAT("[{\"type\":\"text\",\"text\":\"l?\"},{\"type\":\"document\",\"cache_control\":{\"type\":"
                         "\"ephemeral\"},\"source\":{\"type\":\"content\",\"content\":\"%s\"}},"
                         "{\"type\":\"text\",\"text\":\"?\"}]") },
        { messages, CHAT("[{\"type\":\"document\",\"source\":{\"type\":\"content\",\"content\":[{\"type\":\"text\","
                         "\"text\":\"%s\"}]}},{\"type\":\"text\",\"text\":\"m?\"}]") },
        { messages, CHAT("[{\"type\":\"text\",\"text\":\"%s\",\"mepic\":{\"chunk\":true}},"
                         "{\"type\":\"text\",\"text\":\"n?\"}]") },
        { messages, CHAT("\"o: ####%s#### what?\"") },
        { messages, "{\"messages\":[{\"role\":\"user\",\"content\":\"p?\"},{\"role\":\"assistant\",\"content\":"
                    "[{\"type\":\"tool_use\",\"id\":\"1\",\"name\":\"f\",\"input\":{}}]},{\"role\":\"user\","
                    "\"content\":[{\"type\":\"tool_result\",\"tool_use_id\":\"1\",\"content\":\"%s\"}]}]" END },
    };
    stop();
    mp_server_options options = default_options();
    options.chunk_separator = "####";
    options.chunk_tool_results = 100;
    start(&options);
    mepic_usage first = { 0 };
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        char body[4096];
        snprintf(body, sizeof body, ways[i][1], report(0)); // NOLINT: of the table above
        mepic_usage u = usage_of(ways[i][0], "%s", body);
        if (i == 0) first = u;
        bool same = i == 0 ? u.compiled_tokens > 200 && u.chunk_tokens == 0
                           : u.compiled_tokens == 0 && u.chunk_tokens == first.compiled_tokens;
        if (!same) fail_msg("way %zu: compiled %u, found %u", i, u.compiled_tokens, u.chunk_tokens);
    }
}

#define LOOK(description)                                                                                              \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"look\",\"description\":\"" description                 \
    "\",\"parameters\":{\"type\":\"object\"}}}]"

/* Whatever a request leaves in the caches: to another key everything is as if it had never been asked. */
static void a_key_finds_what_its_own_requests_left_and_nothing_else(void **state) {
    (void)state;
    static const char chat[] = "/v1/chat/completions", completions[] = "/v1/completions", messages[] = "/v1/messages";
    static const char *const ways[][2] = {
        { chat,
          "{\"messages\":[{\"role\":\"system\",\"content\":\"a %s\"},{\"role\":\"user\",\"content\":\"x\"}]" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"b %s\"}],\"reuse\":\"prefix\"" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]," LOOK("c %s") END },
        { completions, "{\"prompt\":\"d %s\"" END },
        { messages, "{\"system\":\"e %s\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]" END },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"documents\":[\"f %s\"]" END },
        { chat, CHAT("[{\"type\":\"text\",\"text\":\"g %s\",\"mepic\":{\"chunk\":true}}]") },
        { chat, CHAT("\"####h %s####what?\"") },
        { chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"tool_calls\":[{\"id\":"
                "\"1\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]},{\"role\":\"tool\","
                "\"tool_call_id\":\"1\",\"content\":\"i %s\"}]" END },
        { messages, CHAT("[{\"type\":\"document\",\"source\":{\"type\":\"text\",\"media_type\":\"text/plain\","
                         "\"data\":\"j %s\"}}]") },
    };
    static const char *const who[] = { "Authorization: Bearer first-key\r\n", "x-api-key: second-key\r\n" };
    mp_keys *keys = keys_of("first-key\nsecond-key\n");
    stop();
    mp_server_options options = default_options();
    options.keys = keys;
    options.chunk_separator = "####";
    options.chunk_tool_results = 100;
    start(&options);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        mepic_usage u[2][2];
        for (int key = 0; key < 2; key++) {
            headers = who[key];
            char body[4096];
            snprintf(body, sizeof body, ways[i][1], report(0)); // NOLINT: of the table above
            for (int again = 0; again < 2; again++) u[key][again] = usage_of(ways[i][0], "%s", body);
            const mepic_usage *first = &u[key][0], *second = &u[key][1];
            uint32_t found = first->prefix_tokens + first->chunk_tokens;
            if (second->prefix_tokens + second->chunk_tokens < found + 200) fail_msg("way %zu: not found again", i);
        }
        if (memcmp(u[0], u[1], sizeof u[0]) != 0) fail_msg("way %zu: the second key sees the first's", i);
    }
    headers = "";
    stop();
    mp_keys_free(keys);
    options.keys = NULL;
    start(&options);
}

/* An everyday prompt: the time in its first line costs a prefix cache everything behind it. */
static void a_changed_first_line_leaves_the_documents(void **state) {
    (void)state;
    static const char format[] = "{\"messages\":[{\"role\":\"system\",\"content\":\"It is %s.\"},{\"role\":\"user\","
                                 "\"content\":\"What?\"}],\"documents\":[\"%s\",\"%s\"],\"reuse\":\"%s\"" END;
    static const char path[] = "/v1/chat/completions";
    mepic_usage before = usage_of(path, format, "10:00:00", report(1), report(2), "mepic");
    mepic_usage after = usage_of(path, format, "10:00:01", report(1), report(2), "mepic");
    assert_int_equal(after.compiled_tokens, 0);
    assert_int_equal(after.chunk_tokens, before.compiled_tokens);
    assert_true(after.chunk_tokens > after.prompt_tokens * 8 / 10);
    usage_of(path, format, "11:00:00", report(1), report(2), "prefix"); // as elsewhere
    after = usage_of(path, format, "11:00:01", report(1), report(2), "prefix");
    assert_true(after.prefix_tokens < 3 * PAGE && after.chunk_tokens == 0);
}

static void what_is_new_beside_a_document_that_is_there_is_kept_too(void **state) {
    (void)state;
    static const char format[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"What?\"}],\"documents\":[\"%s\",\"%s\"]" END;
    static const char path[] = "/v1/chat/completions";
    mepic_usage first = usage_of(path, format, report(0), report(1));
    mepic_usage second = usage_of(path, format, report(1), report(2));
    mepic_usage third = usage_of(path, format, report(2), report(0));
    assert_true(second.chunk_tokens > 200 && second.compiled_tokens > 200);
    assert_true(second.chunk_tokens + second.compiled_tokens == first.compiled_tokens);
    assert_int_equal(third.compiled_tokens, 0);
    assert_int_equal(third.chunk_tokens, first.compiled_tokens);
}

/* The turns of an agent: behind each call and its result, only what is new is computed. */
static void a_result_of_a_tool_computes_nothing_again(void **state) {
    (void)state;
    static const char head[] = "{\"max_tokens\":1,\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"look\","
                               "\"description\":\"Looks something up.\",\"parameters\":{\"type\":\"object\"}}}],"
                               "\"messages\":[{\"role\":\"user\",\"content\":\"Look for it.\"}";
    char body[8192];
    size_t n = (size_t)snprintf(body, sizeof body, "%s", head);
    uint32_t before = 0;
    for (uint32_t turn = 0; turn < 6; turn++) {
        mepic_usage u = usage_of("/v1/chat/completions", "%s]}", body);
        assert_true(turn == 0 || (u.prefix_tokens + PAGE > before && u.prefix_tokens <= before));
        before = u.prompt_tokens;
        n += (size_t)snprintf(body + n, sizeof body - n,
                              ",{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"call_%u\",\"type\":"
                              "\"function\",\"function\":{\"name\":\"look\",\"arguments\":\"{\\\"page\\\": %u}\"}}]},"
                              "{\"role\":\"tool\",\"tool_call_id\":\"call_%u\",\"content\":\"Not on page %u.\"}",
                              turn, turn, turn, turn);
        assert_true(n < sizeof body);
    }
}

/* ---- At the same time -------------------------------------------------------------------------------------------- */

static void open_reader(http_client *c, uint32_t number) {
    char body[4096];
    snprintf(body, sizeof body,
             "{\"prompt\":\"Question %u?\",\"documents\":[\"%s%u\",\"%s\"],\"max_tokens\":60000,\"ignore_eos\":true,"
             "\"stream\":true}",
             number, number % 2 ? "" : "In front, and as long as it takes to be at another place: ", number, report(3));
    open_stream(c, "/v1/completions", body);
    assert_non_null(http_read_line(c));
}

/* At different places of their prompts. */
static void who_reads_a_document_at_the_same_time_holds_it_once(void **state) {
    (void)state;
    enum { READERS = 4 };
    use_long_engine();
    const mp_server_options options = default_options();
    start(&options);
    http_client readers[READERS];
    open_reader(&readers[0], 0);
    double one = pages_of("chunk"), factor = metric("mepic:sharing_factor{model_name=\"tiny\"} ");
    assert_true(one > 10.0);
    for (uint32_t i = 1; i < READERS; i++) open_reader(&readers[i], i);
    assert_true(pages_of("chunk") == one);
    assert_true(metric("mepic:sharing_factor{model_name=\"tiny\"} ") > factor);
    for (uint32_t i = 0; i < READERS; i++) http_close(&readers[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(every_way_of_giving_a_document_finds_the_same_pages, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_key_finds_what_its_own_requests_left_and_nothing_else, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_changed_first_line_leaves_the_documents, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(what_is_new_beside_a_document_that_is_there_is_kept_too, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_result_of_a_tool_computes_nothing_again, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(who_reads_a_document_at_the_same_time_holds_it_once, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
