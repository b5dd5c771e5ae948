/* Anthropic's messages: bodies, streams, documents, where a prompt's tokens came from. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/server.h"
#include "support/tools.h"

static json_t *ask_ok(const char *body) {
    return http_ask_json(port, "POST", "/v1/messages", body, 200);
}

/* A body of text pieces. */
typedef struct text {
    char data[32768];
    size_t len;
} text;

__attribute__((format(printf, 2, 3))) static void add(text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(t->data + t->len, sizeof t->data - t->len, format, args);
    va_end(args);
    assert_true(n >= 0 && t->len + (size_t)n < sizeof t->data);
    t->len += (size_t)n;
}

/* 4 tokens a repetition: no two of these letters merge. */
static const char *words(uint32_t n) {
    static char out[2048];
    assert_true(4 * n < sizeof out);
    for (uint32_t i = 0; i < n; i++) memcpy(out + 4 * i, "xyz ", 4);
    out[4 * n] = 0;
    return out;
}

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

#define ASK(more) "{\"max_tokens\":12,\"messages\":[{\"role\":\"user\",\"content\":\"Hello there\"}]" more "}"
#define GREEDY ",\"temperature\":0,\"ignore_eos\":true"

static void a_message_is_the_chats_reply(void **state) {
    (void)state;
    json_t *root = ask_ok(ASK(GREEDY ",\"model\":\"tiny\",\"system\":[{\"type\":\"text\",\"text\":\"Be "
                                     "brief.\"},{\"type\":\"text\",\"text\":\"\"}]"));
    json_t *chat = http_ask_json(port, "POST", "/v1/chat/completions",
                                 "{\"max_tokens\":12,\"messages\":[{\"role\":\"system\",\"content\":\"Be "
                                 "brief.\"},{\"role\":\"user\",\"content\":"
                                 "\"Hello there\"}]" GREEDY "}",
                                 200);
    assert_string_equal(text_at(root, "content/0/text"), text_at(chat, "choices/0/message/content"));
    assert_string_equal(text_at(root, "type"), "message");
    assert_string_equal(text_at(root, "role"), "assistant");
    assert_string_equal(text_at(root, "model"), "tiny");
    assert_string_equal(text_at(root, "stop_reason"), "max_tokens");
    assert_true(json_is_null(at(root, "stop_sequence")));
    assert_int_equal(strncmp(text_at(root, "id"), "msg_", 4), 0);
    assert_int_equal(number_at(root, "usage/output_tokens"), 12);
    assert_int_equal(number_at(root, "usage/input_tokens"), number_at(chat, "usage/prompt_tokens"));
    json_decref(root);
    json_decref(chat);
}

static void a_top_p_of_zero_leaves_the_likeliest_token(void **state) {
    (void)state;
    json_t *greedy = ask_ok(ASK(GREEDY)), *root = ask_ok(ASK(",\"top_p\":0,\"ignore_eos\":true"));
    assert_string_equal(text_at(root, "content/0/text"), text_at(greedy, "content/0/text"));
    json_decref(root);
    json_decref(greedy);
}

static void a_stop_sequence_is_named(void **state) {
    (void)state;
    json_t *whole = ask_ok(ASK(GREEDY));
    const char *reply = text_at(whole, "content/0/text");
    /* a printable character of the reply, written so that the whole is JSON */
    size_t k = 0;
    while (reply[k] && ((unsigned char)reply[k] < '0' || (unsigned char)reply[k] > 'z' || reply[k] == '\\')) k++;
    assert_true(reply[k] != 0);
    char body[512];
    snprintf(body, sizeof body, ASK(GREEDY ",\"stop_sequences\":[\"never\",\"%c\"]"), reply[k]);
    json_t *cut = ask_ok(body);
    char sequence[2] = { reply[k], 0 };
    assert_string_equal(text_at(cut, "stop_reason"), "stop_sequence");
    assert_string_equal(text_at(cut, "stop_sequence"), sequence);
    json_decref(cut);
    snprintf(body, sizeof body, ASK(GREEDY ",\"stop_sequences\":\"%c\""), reply[k]); // one is taken without brackets
    cut = ask_ok(body);
    assert_string_equal(text_at(cut, "stop_reason"), "stop_sequence");
    assert_string_equal(text_at(cut, "stop_sequence"), sequence);
    json_decref(cut);
    json_decref(whole);
}

static void a_stream_builds_the_message_up(void **state) {
    (void)state;
    json_t *whole = ask_ok(ASK(GREEDY));
    http_client c;
    open_stream(&c, "/v1/messages", ASK(GREEDY ",\"stream\":true"));
    static const char *const of_prompt[] = { "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens" };
    json_int_t started[3] = { -1, -1, -1 };
    char names[1024] = "", last[64] = "", built[1024] = "";
    for (const char *line = http_read_line(&c); line; line = http_read_line(&c)) {
        if (line[0] == ':') continue;
        if (strncmp(line, "event: ", 7) == 0) {
            if (strcmp(last, line + 7) != 0) strncat(strncat(names, line + 7, 64), " ", 2);
            snprintf(last, sizeof last, "%s", line + 7);
            continue;
        }
        assert_int_equal(strncmp(line, "data: ", 6), 0);
        json_t *root = json_loads(line + 6, JSON_ALLOW_NUL, NULL);
        assert_non_null(root);
        assert_string_equal(text_at(root, "type"), last);
        const json_t *piece = at(root, "delta/text");
        if (piece) strncat(built, json_string_value(piece), sizeof built - strlen(built) - 1);
        for (size_t i = 0; strcmp(last, "message_start") == 0 && i < 3; i++) {
            started[i] = number_at(at(root, "message/usage"), of_prompt[i]);
            assert_int_equal(number_at(root, "message/usage/output_tokens"), 1);
        }
        for (size_t i = 0; strcmp(last, "message_delta") == 0 && i < 3; i++) {
            assert_int_equal(number_at(at(root, "usage"), of_prompt[i]), started[i]);
        }
        if (strcmp(last, "message_delta") == 0) {
            assert_string_equal(text_at(root, "delta/stop_reason"), "max_tokens");
            assert_int_equal(number_at(root, "usage/output_tokens"), 12);
            assert_true(number_at(root, "usage/cache_read_input_tokens") > 0); // the whole came before
        }
        json_decref(root);
    }
    http_close(&c);
    assert_string_equal(names, "message_start content_block_start content_block_delta content_block_stop message_delta "
                               "message_stop ");
    assert_string_equal(built, text_at(whole, "content/0/text"));
    json_decref(whole);
}

static void tokens_are_counted(void **state) {
    (void)state;
    json_t *count = http_ask_json(port, "POST", "/v1/messages/count_tokens", ASK(""), 200);
    json_t *root = ask_ok(ASK(""));
    assert_true(number_at(count, "input_tokens") > 5);
    assert_int_equal(number_at(count, "input_tokens"), number_at(root, "usage/input_tokens") +
                                                           number_at(root, "usage/cache_read_input_tokens") +
                                                           number_at(root, "usage/cache_creation_input_tokens"));
    json_decref(count);
    json_decref(root);
}

/* ---- Documents --------------------------------------------------------------------------------------------------- */

#define TEXT_SOURCE "{\"type\":\"text\",\"media_type\":\"text/plain\",\"data\":\"%s\"}"

/* What a request with these blocks in front of a question read, and what it wrote. */
static void ask_about(const char *blocks, json_int_t *read, json_int_t *written) {
    static text body;
    body.len = 0;
    add(&body,
        "{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":[%s,{\"type\":\"text\",\"text\":\"Q?\"}]}]}",
        blocks);
    json_t *root = ask_ok(body.data);
    *read = number_at(root, "usage/prompt_tokens_details/chunk_tokens");
    *written = number_at(root, "usage/cache_creation_input_tokens");
    json_decref(root);
}

static void a_document_is_a_chunk_wherever_it_stands(void **state) {
    (void)state;
    static text first, later;
    json_int_t read, written;
    first.len = later.len = 0;
    add(&first, "{\"type\":\"document\",\"title\":\"Tales\",\"source\":" TEXT_SOURCE "}", words(40));
    ask_about(first.data, &read, &written);
    assert_int_equal(read, 0);
    assert_true(written > 100);
    /* behind another text and another document, with a breakpoint, and as blocks: the same chunk */
    add(&later, "{\"type\":\"text\",\"text\":\"Before.\"},{\"type\":\"document\",\"source\":" TEXT_SOURCE "},",
        words(45));
    add(&later,
        "{\"type\":\"document\",\"title\":\"Tales\",\"cache_control\":{\"type\":\"ephemeral\"},\"source\":{\"type\":"
        "\"content\",\"content\":[{\"type\":\"text\",\"text\":\"%s\\n\"}]}}",
        words(40));
    json_int_t expected = written;
    ask_about(later.data, &read, &written);
    assert_int_equal(read, expected);
    /* OpenAI's documents are the same pages too */
    static text openai;
    openai.len = 0;
    add(&openai,
        "{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":\"Q\"}],\"documents\":[\"other\",{\"title\":"
        "\"Tales\","
        "\"text\":\"%s\"}]}",
        words(40));
    json_t *root = http_ask_json(port, "POST", "/v1/chat/completions", openai.data, 200);
    assert_int_equal(number_at(root, "usage/prompt_tokens_details/chunk_tokens"), expected);
    json_decref(root);
}

static void a_search_result_is_one_as_well(void **state) {
    (void)state;
    static text block;
    json_int_t read, written, first;
    block.len = 0;
    add(&block,
        "{\"type\":\"search_result\",\"title\":\"T\",\"source\":\"here\",\"content\":[{\"type\":\"text\",\"text\":\"%"
        "s\"}]}",
        words(40));
    ask_about(block.data, &read, &first);
    assert_true(first > 100);
    ask_about(block.data, &read, &written);
    assert_int_equal(read, first);
    assert_int_equal(written, 0);
    char *moved = strdup(block.data);
    block.len = 0;
    add(&block, "{\"type\":\"text\",\"text\":\"Elsewhere.\"},%s", moved);
    free(moved);
    ask_about(block.data, &read, &written);
    assert_int_equal(read, first);
    assert_int_equal(written, 0);
}

/* Told apart by their number of tokens: a byte is a token where nothing merges. */
static void wrappers_stand_outside(void **state) {
    (void)state;
    static const char *const pairs[][2] = {
        { "[{\"type\":\"document\",\"title\":\"X\",\"context\":\"Y\",\"source\":{\"type\":\"text\",\"data\":"
          "\"Z\\n\\n\"}},"
          "{\"type\":\"text\",\"text\":\"q\"}]",
          "Document 1:\\nX\\nY\\nZ\\n\\nq" },
        { "[{\"type\":\"text\",\"text\":\"p\"},{\"type\":\"search_result\",\"title\":\"X\",\"source\":\"Y\","
          "\"content\":["
          "{\"type\":\"text\",\"text\":\"Z\"}]},{\"type\":\"document\",\"source\":{\"type\":\"content\",\"content\":"
          "\"W\"}}]",
          "p\\n\\nDocument 1:\\nX\\nsource: Y\\nZ\\n\\nDocument 2:\\nW" },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char body[1024];
        snprintf(body, sizeof body, "{\"messages\":[{\"role\":\"user\",\"content\":%s}]}", pairs[i][0]);
        json_t *blocks = http_ask_json(port, "POST", "/v1/messages/count_tokens", body, 200);
        snprintf(body, sizeof body, "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}", pairs[i][1]);
        json_t *plain = http_ask_json(port, "POST", "/v1/messages/count_tokens", body, 200);
        assert_int_equal(number_at(blocks, "input_tokens"), number_at(plain, "input_tokens"));
        json_decref(blocks);
        json_decref(plain);
    }
}

/* ---- cache_control ----------------------------------------------------------------------------------------------- */

static const char mark[] = ",\"cache_control\":{\"type\":\"ephemeral\"}";

/* The request of turn `last`: a document and a question, then question after question; if `marked`, a breakpoint on the
 * last block, so that it moves with each turn. */
static void write_turn(text *body, uint32_t last, bool marked) {
    body->len = 0;
    add(body,
        "{\"max_tokens\":1,\"temperature\":0%s,\"system\":[{\"type\":\"text\",\"text\":\"Be "
        "brief.\"%s}],\"messages\":[",
        marked ? mark : "", marked && last % 2 ? mark : "");
    for (uint32_t i = 0; i <= last; i++) {
        add(body, "%s{\"role\":\"user\",\"content\":[", i ? "," : "");
        if (i == 0) add(body, "{\"type\":\"document\",\"source\":" TEXT_SOURCE "},", words(40));
        add(body, "{\"type\":\"text\",\"text\":\"Question %u: xyz?\"%s}]}", i, marked && i == last ? mark : "");
        if (i < last) add(body, ",{\"role\":\"assistant\",\"content\":\"Answer %u.\"}", i);
    }
    add(body, "]}");
}

enum { TURNS = 8, PAGE = 16 };

static void ask_turns(bool marked, mepic_usage out[TURNS]) {
    static text body;
    const mepic_engine_options options = tools_options();
    stop();
    mepic_engine_close(engine);
    engine = open_engine(&options);
    const mp_server_options serve = default_options();
    start(&serve);
    for (uint32_t i = 0; i < TURNS; i++) {
        write_turn(&body, i, marked);
        json_t *root = ask_ok(body.data);
        const json_t *details = at(root, "usage/prompt_tokens_details");
        out[i] = (mepic_usage){ .prefix_tokens = (uint32_t)number_at(details, "prefix_tokens"),
                                .chunk_tokens = (uint32_t)number_at(details, "chunk_tokens"),
                                .linked_tokens = (uint32_t)number_at(details, "linked_tokens"),
                                .compiled_tokens = (uint32_t)number_at(details, "compiled_tokens") };
        out[i].prompt_tokens =
            (uint32_t)(number_at(root, "usage/input_tokens") + number_at(root, "usage/cache_creation_input_tokens") +
                       number_at(root, "usage/cache_read_input_tokens"));
        json_decref(root);
    }
}

/* Agents put the breakpoint on their last block, so it moves every turn. Nothing that was computed is computed again:
 * all but the last, partly filled page of the private stream is found. */
static void a_breakpoint_that_moves_costs_nothing(void **state) {
    (void)state;
    mepic_usage with[TURNS], without[TURNS];
    ask_turns(true, with);
    ask_turns(false, without);
    for (uint32_t i = 0; i < TURNS; i++) {
        assert_memory_equal(&with[i], &without[i], sizeof with[i]);
        if (i == 0) continue;
        uint32_t read = with[i].prefix_tokens + with[i].chunk_tokens, earlier = with[i - 1].prompt_tokens;
        assert_int_equal(with[i].compiled_tokens + with[i].linked_tokens, 0);
        assert_true(read + PAGE > earlier && read <= earlier); // at most a page's rest
        assert_int_equal(with[i].chunk_tokens, with[1].chunk_tokens);
    }
}

static void what_makes_no_difference_is_accepted(void **state) {
    (void)state;
    json_decref(
        ask_ok(ASK(",\"thinking\":{\"type\":\"disabled\"},\"metadata\":{\"user_id\":\"u\"},\"service_tier\":\"auto\","
                   "\"cache_control\":{\"type\":\"ephemeral\"},\"top_k\":5,\"top_p\":0.9,\"tools\":[],"
                   "\"tool_choice\":{\"type\":\"none\"},\"unheard_of\":1")));
}

/* ---- Separators -------------------------------------------------------------------------------------------------- */

static json_int_t chunk_tokens(const char *path, const char *body) {
    json_t *root = http_ask_json(port, "POST", path, body, 200);
    const json_t *details = at(root, "usage/prompt_tokens_details");
    json_int_t n = number_at(details, "chunk_tokens") + number_at(details, "compiled_tokens");
    json_decref(root);
    return n;
}

static void what_stands_between_separators_is_a_chunk(void **state) {
    (void)state;
    static text body;
    stop();
    mp_server_options options = default_options();
    options.chunk_separator = " # # ";
    start(&options);
    char *content = strdup(words(40));
    content[159] = 0;
    body.len = 0;
    add(&body,
        "{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"%s\",\"mepic\":"
        "{\"chunk\":true}},{\"type\":\"text\",\"text\":\"Q\"}]}]}",
        content);
    json_int_t one = chunk_tokens("/v1/chat/completions", body.data);
    assert_true(one > 100);
    static const struct {
        const char *path, *before, *after;
        uint32_t chunks;
    } cases[] = {
        { "/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"s # # ", " # # q\"}]", 1 },
        { "/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\" # # ",
          " # #  # # q\"}]}]", 1 },
        { "/v1/messages", "{\"messages\":[{\"role\":\"user\",\"content\":\"t # # ", " # # \"}]", 1 },
        { "/v1/completions", "{\"prompt\":\"u # # ", " # # q\"", 1 },
        { "/v1/completions", "{\"prompt\":\"v # # ", "\"", 0 },
        { "/v1/completions", "{\"prompt\":\"w # #", " # # q\"", 0 },
        { "/v1/chat/completions", "{\"messages\":[{\"role\":\"assistant\",\"content\":\"s # # ",
          " # # a\"},{\"role\":\"user\",\"content\":\"q\"}]", 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        body.len = 0;
        add(&body, "%s%s%s,\"max_tokens\":1}", cases[i].before, content, cases[i].after);
        if (chunk_tokens(cases[i].path, body.data) != cases[i].chunks * one) fail_msg("case %zu", i);
    }
    /* two in one text, and the separators are still there */
    body.len = 0;
    add(&body, "{\"max_tokens\":1,\"prompt\":\"x # # %s # # %s # # q\"}", content, content);
    assert_int_equal(chunk_tokens("/v1/completions", body.data), 2 * one);
    body.len = 0;
    add(&body, "{\"prompt\":\"x # # %s # # %s # # q\"}", content, content);
    json_t *tokens = http_ask_json(port, "POST", "/tokenize", body.data, 200);
    body.len = 0;
    add(&body, "{\"prompt\":\"x - - %s - - %s - - q\"}", content, content);
    json_t *plain = http_ask_json(port, "POST", "/tokenize", body.data, 200);
    assert_int_equal(number_at(tokens, "count"), number_at(plain, "count"));
    json_decref(tokens);
    json_decref(plain);
    free(content);
    /* more of them than the context has tokens make no parts: a body of short ones would be many times its size */
    stop();
    options.chunk_separator = "#";
    start(&options);
    body.len = 0;
    add(&body, "{\"prompt\":\"");
    for (uint32_t i = 0; i < 2100; i++) add(&body, "#");
    add(&body, "\"}");
    http_reply reply;
    assert_int_equal(http_ask(port, "POST", "/v1/completions", "", body.data, &reply), 400);
    if (!strstr(reply.body, "2100 separators")) fail_msg("%s", reply.body);
    http_reply_clear(&reply);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_message_is_the_chats_reply, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_top_p_of_zero_leaves_the_likeliest_token, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_stop_sequence_is_named, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_stream_builds_the_message_up, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(tokens_are_counted, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_document_is_a_chunk_wherever_it_stands, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_search_result_is_one_as_well, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(wrappers_stand_outside, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(a_breakpoint_that_moves_costs_nothing, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(what_makes_no_difference_is_accepted, setup_tools, teardown),
        cmocka_unit_test_setup_teardown(what_stands_between_separators_is_a_chunk, setup_tools, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
