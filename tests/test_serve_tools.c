/* Tools: calls in a reply's text however it is cut, and what the server makes of tools, calls and results. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/json.h"
#include "serve/tools.h"
#include "support/models.h"
#include "support/random.h"
#include "support/server.h"
#include "support/tools.h"

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

/* What a parser gave out, as "text[name arguments]text". */
typedef struct record {
    char text[4096];
    size_t len;
    uint32_t n_calls;
} record;

static bool take_text(void *user, const char *text, size_t len) {
    record *r = user;
    assert_true(len > 0 && r->len + len < sizeof r->text);
    memcpy(r->text + r->len, text, len);
    r->len += len;
    r->text[r->len] = 0;
    return true;
}

static bool take_call(void *user, uint32_t index, const char *name, const char *arguments) {
    record *r = user;
    assert_int_equal(index, r->n_calls++);
    r->len += (size_t)snprintf(r->text + r->len, sizeof r->text - r->len, "[%s %s]", name, arguments);
    return true;
}

/* The reply in pieces of `piece` bytes. */
static void parse(const char *reply, size_t piece, record *r) {
    mp_reply_parser parser;
    const mp_reply_sink sink = { take_text, take_call, r };
    json_t *tools = json_pack("[{s:s},{s:s}]", "name", "f", "name", "g");
    memset(r, 0, sizeof *r);
    assert_true(mp_reply_parser_init(&parser, "hermes", tools, NULL));
    for (size_t i = 0, n = strlen(reply); i < n; i += piece) {
        assert_true(mp_reply_parser_push(&parser, reply + i, n - i < piece ? n - i : piece, &sink));
    }
    assert_true(mp_reply_parser_end(&parser, &sink));
    mp_reply_parser_clear(&parser);
    json_decref(tools);
}

#define CALL(body) "<tool_call>" body "</tool_call>"

static void calls_are_found_however_a_reply_is_cut(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        { "no call <tool_cal> here </tool_call> \n", "no call <tool_cal> here </tool_call> \n" },
        { CALL("\n{\"name\": \"f\", \"arguments\": {\"a\": [1, 0.1]}}\n"), "[f {\"a\": [1, 0.1]}]" },
        { "I look.\n" CALL("{\"name\":\"f\",\"arguments\":{}}") "\n" CALL("{\"name\":\"g\",\"arguments\":{ }}") "\n",
          "I look.[f {}][g { }]" },
        { CALL("{\"arguments\": {\"name\": \"x\", \"arguments\": {\"}\": \"\\\"{\"}}, \"name\": \"f\"}"),
          "[f {\"name\": \"x\", \"arguments\": {\"}\": \"\\\"{\"}}]" },
        { CALL("{\"name\": \"arguments\", \"x\": [\"arguments\"], \"arguments\": {\"n\": 1e400000}}"),
          CALL("{\"name\": \"arguments\", \"x\": [\"arguments\"], \"arguments\": {\"n\": 1e400000}}") },
        { CALL("{\"name\": \"arguments\", \"x\": [\"arguments\"], \"arguments\": {\"n\": 1}}"),
          "[arguments {\"n\": 1}]" },
        { CALL("{\"name\": \"now\"}"), "[now {}]" },
        { CALL("{\"name\": \"f\", \"arguments\": {\"a\": \"long long long long\"}}") CALL("{\"name\": \"g\"}") "end",
          "[f {\"a\": \"long long long long\"}][g {}]end" },
        { CALL("{\"a\": {\"arguments\": 1}, \"name\": \"f\", \"arguments\": {}}"), "[f {}]" },
        { CALL("{{\"name\": \"f\", \"arguments\": {\"a\": 1}}}"), "[f {\"a\": 1}]" },
        { "a " CALL("{\"name\": \"f\", \"arguments\": {}}") " b", "a[f {}] b" },
        /* what is no call is text, as it was */
        { "a \n" CALL("f(1)") "\n b", "a \n" CALL("f(1)") "\n b" },
        { CALL("{\"name\": \"f\", \"arguments\": \"x\"}"), CALL("{\"name\": \"f\", \"arguments\": \"x\"}") },
        { CALL("{\"name\": \"f g\", \"arguments\": {}}"), CALL("{\"name\": \"f g\", \"arguments\": {}}") },
        { CALL("{\"name\": 1}"), CALL("{\"name\": 1}") },
        { CALL("[]"), CALL("[]") },
        { CALL(""), CALL("") },
        { CALL("{\"name\": \"f\", \"name\": \"g\"}"), CALL("{\"name\": \"f\", \"name\": \"g\"}") },
        { "x" CALL("1") CALL("{\"name\": \"f\"}"), "x" CALL("1") "[f {}]" },
        /* a stop string or the length may take the closing mark away */
        { "<tool_call>{\"name\": \"f\"}", "[f {}]" },
        { "t\n<tool_call>{\"name\": \"f\", \"argu", "t\n<tool_call>{\"name\": \"f\", \"argu" },
        { "t <tool_", "t <tool_" },
        /* without marks: the whole reply, and a tool that there is */
        { "{\"name\": \"f\", \"arguments\": {\"a\": \"`\"}}", "[f {\"a\": \"`\"}]" },
        { "\n```json\n{\n \"arguments\": { },\n \"name\": \"g\"}\n```\n", "[g { }]" },
        { "```\n{{ \"name\": \"g\", \"arguments\": {}}}", "[g {}]" },
        { "{\"name\": \"g\"}", "{\"name\": \"g\"}" },
        { "{\"name\": \"h\", \"arguments\": {}}", "{\"name\": \"h\", \"arguments\": {}}" },
        { "{\"name\": \"f\", \"arguments\": {}} `", "{\"name\": \"f\", \"arguments\": {}} `" },
        { "{\"name\": \"f\", \"arguments\": {}} so", "{\"name\": \"f\", \"arguments\": {}} so" },
        { "```json\n{\"name\": \"f\"", "```json\n{\"name\": \"f\"" },
        { "{\"nam", "{\"nam" },
        { "``", "``" },
        { "``` json {\"nature\": 1}", "``` json {\"nature\": 1}" },
        { "{}", "{}" },
        { "  ", "  " },
        { "", "" },
    };
    record got;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t piece = 1; piece < 40; piece++) {
            parse(cases[i][0], piece, &got);
            if (strcmp(got.text, cases[i][1]) != 0) {
                fail_msg("in pieces of %zu, '%s' gave '%s', not '%s'", piece, cases[i][0], got.text, cases[i][1]);
            }
        }
    }
}

/* What the parser of JSON does not see would end the arguments in their middle. */
static void a_nul_makes_a_call_text(void **state) {
    (void)state;
    static const char reply[] = CALL("{\"name\": \"f\", \"arguments\": {\"a\": [1\0]}}");
    record got = { 0 };
    mp_reply_parser parser;
    const mp_reply_sink sink = { take_text, take_call, &got };
    assert_true(mp_reply_parser_init(&parser, "hermes", NULL, NULL));
    assert_true(mp_reply_parser_push(&parser, reply, sizeof reply - 1, &sink));
    assert_true(mp_reply_parser_end(&parser, &sink));
    mp_reply_parser_clear(&parser);
    assert_int_equal(got.n_calls, 0);
    assert_int_equal(got.len, sizeof reply - 1);
    assert_memory_equal(got.text, reply, got.len);
}

/* Replies put together from what could be a call, whole and cut anywhere: the same parts. */
static void cuts_do_not_matter(void **state) {
    (void)state;
    static const char *const words[] = { "<tool_call>",
                                         "</tool_call>",
                                         "{\"name\": \"f\"",
                                         ", \"arguments\": {",
                                         "}}",
                                         "}",
                                         "{",
                                         "<",
                                         "</tool_",
                                         "\n",
                                         " ",
                                         "text",
                                         "```",
                                         "json",
                                         "\"",
                                         "\\",
                                         "{\"name\": \"g\"}" };
    rng r = rng_open(7);
    mp_reply_parser parser;
    for (uint32_t round = 0; round < 20000; round++) {
        char reply[512] = "";
        for (uint32_t n = rng_below(&r, 14); n > 0; n--) {
            size_t len = strlen(reply);
            snprintf(reply + len, sizeof reply - len, "%s", words[rng_below(&r, sizeof words / sizeof *words)]);
        }
        record whole, cut = { 0 };
        parse(reply, sizeof reply, &whole);
        const mp_reply_sink sink = { take_text, take_call, &cut };
        json_t *both = json_pack("[{s:s},{s:s}]", "name", "f", "name", "g");
        assert_true(mp_reply_parser_init(&parser, "hermes", both, NULL));
        for (size_t i = 0, n = strlen(reply); i < n;) {
            size_t piece = 1 + rng_below(&r, 9);
            if (piece > n - i) piece = n - i;
            assert_true(mp_reply_parser_push(&parser, reply + i, piece, &sink));
            i += piece;
        }
        assert_true(mp_reply_parser_end(&parser, &sink));
        mp_reply_parser_clear(&parser);
        json_decref(both);
        if (strcmp(whole.text, cut.text) != 0) fail_msg("'%s' gave '%s' and '%s'", reply, whole.text, cut.text);
    }
}

static void text_is_not_held_back(void **state) {
    (void)state;
    mp_reply_parser parser;
    record r = { 0 };
    const mp_reply_sink sink = { take_text, take_call, &r };
    assert_true(mp_reply_parser_init(&parser, "hermes", NULL, NULL));
    assert_true(mp_reply_parser_push(&parser, "one two", 7, &sink));
    assert_string_equal(r.text, "one two");
    assert_true(mp_reply_parser_push(&parser, " <", 2, &sink));
    assert_string_equal(r.text, "one two");
    assert_true(mp_reply_parser_push(&parser, "b>", 2, &sink));
    assert_string_equal(r.text, "one two <b>");
    mp_reply_parser_clear(&parser);
    mp_reply_parser plain = { 0 };
    memset(&r, 0, sizeof r);
    assert_true(mp_reply_parser_push(&plain, "x \n<tool_call>", 14, &sink));
    assert_string_equal(r.text, "x \n<tool_call>");
}

static bool count_text(void *user, const char *text, size_t len) {
    (void)text;
    *(size_t *)user += len;
    return true;
}

/* Looking at what is held with each piece again is quadratic in it: a bounded part of it is held. */
static void blanks_without_end_are_text(void **state) {
    (void)state;
    static const char *const beginnings[] = { "", "text", "```json" };
    for (size_t i = 0; i < 3; i++) {
        mp_reply_parser parser;
        size_t n = 0, sent = strlen(beginnings[i]);
        const mp_reply_sink sink = { count_text, take_call, &n };
        assert_true(mp_reply_parser_init(&parser, "hermes", NULL, NULL));
        assert_true(mp_reply_parser_push(&parser, beginnings[i], sent, &sink));
        for (; sent < 20000; sent++) {
            assert_true(mp_reply_parser_push(&parser, "\n", 1, &sink));
            if (sent > 10000) assert_true(n > sent - 8192);
        }
        assert_true(mp_reply_parser_end(&parser, &sink));
        assert_int_equal(n, sent);
        mp_reply_parser_clear(&parser);
    }
}

/* ---- Writers ----------------------------------------------------------------------------------------------------- */

static mepic_model_info info;
static mp_api api_of_engine(void) {
    static const char *const names[] = { "tiny" };
    mepic_model_info_read(engine, &info);
    return (mp_api){ .engine = engine, .info = &info, .names = names, .n_names = 1, .id_seed = 7 };
}

/* What a dialect makes of a reply to `body` with this text, three bytes an event. */
static mp_buf write_reply(const mp_dialect *dialect, const char *body, const char *text, mepic_finish finish,
                          int32_t stop_string) {
    mp_api api = api_of_engine();
    mepic_error why;
    mp_api_error err;
    mp_generation *generation;
    mp_writer *writer;
    json_t *root = json_loads(body, 0, NULL);
    assert_int_equal(mp_generation_open(&generation, &why), MEPIC_OK);
    if (!dialect->read(&api, root, 5, generation, &writer, &err)) fail_msg("%s", err.message);
    json_decref(root);
    mp_buf out = { .limit = 1 << 20 };
    for (size_t i = 0, n = strlen(text); i < n; i += 3) {
        const mp_feed_event event = { .kind = MEPIC_EVENT_TOKEN,
                                      .text = text + i,
                                      .text_len = (uint32_t)(n - i < 3 ? n - i : 3) };
        assert_true(dialect->event(writer, &event, &out));
    }
    const mp_feed_event done = { .kind = MEPIC_EVENT_DONE,
                                 .text = "",
                                 .finish = finish,
                                 .stop = stop_string,
                                 .usage = { .prompt_tokens = 100, .prefix_tokens = 32, .completion_tokens = 9 } };
    assert_true(dialect->event(writer, &done, &out) && dialect->end(writer, &out));
    assert_true(mp_buf_append(&out, "", 1));
    dialect->close(writer);
    mp_generation_free(generation);
    return out;
}

#define OPENAI_TOOL "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\"}}}"
#define ASKED "\"messages\":[{\"role\":\"user\",\"content\":\"U\"}],\"max_tokens\":50"
#define OPENAI(more) "{" ASKED ",\"tools\":[" OPENAI_TOOL "]" more "}"
#define ANTHROPIC(more) "{" ASKED ",\"tools\":[{\"name\":\"f\",\"input_schema\":{\"type\":\"object\"}}]" more "}"
#define TWO_CALLS "Wait. " CALL("{\"name\": \"f\", \"arguments\": {\"a\": 0.1}}") "\n" CALL("{\"name\": \"g\"}")

static json_t *parse_body(mp_buf *out) {
    json_t *root = json_loads(out->data, 0, NULL);
    if (!root) fail_msg("not JSON: %s", out->data);
    mp_buf_clear(out);
    return root;
}

static void openai_bodies_have_tool_calls(void **state) {
    (void)state;
    mp_buf out = write_reply(&mp_openai_chat, OPENAI(""), TWO_CALLS, MEPIC_FINISH_STOP, -1);
    json_t *root = parse_body(&out);
    assert_string_equal(text_at(root, "choices/0/finish_reason"), "tool_calls");
    assert_string_equal(text_at(root, "choices/0/message/content"), "Wait.");
    assert_string_equal(text_at(root, "choices/0/message/tool_calls/0/type"), "function");
    assert_string_equal(text_at(root, "choices/0/message/tool_calls/0/function/name"), "f");
    assert_string_equal(text_at(root, "choices/0/message/tool_calls/0/function/arguments"), "{\"a\": 0.1}");
    assert_string_equal(text_at(root, "choices/0/message/tool_calls/1/function/arguments"), "{}");
    assert_string_not_equal(text_at(root, "choices/0/message/tool_calls/0/id"),
                            text_at(root, "choices/0/message/tool_calls/1/id"));
    json_decref(root);
    out = write_reply(&mp_openai_chat, OPENAI(""), CALL("{\"name\": \"f\"}"), MEPIC_FINISH_STOP, -1);
    root = parse_body(&out);
    assert_true(json_is_null(at(root, "choices/0/message/content")));
    json_decref(root);
    /* broken calls are text; so is everything when the model was not told of tools */
    out = write_reply(&mp_openai_chat, OPENAI(""), CALL("{\"name\": f}"), MEPIC_FINISH_STOP, -1);
    root = parse_body(&out);
    assert_string_equal(text_at(root, "choices/0/message/content"), CALL("{\"name\": f}"));
    assert_null(at(root, "choices/0/message/tool_calls"));
    assert_string_equal(text_at(root, "choices/0/finish_reason"), "stop");
    json_decref(root);
    out = write_reply(&mp_openai_chat, OPENAI(",\"tool_choice\":\"none\""), TWO_CALLS, MEPIC_FINISH_STOP, -1);
    root = parse_body(&out);
    assert_string_equal(text_at(root, "choices/0/message/content"), TWO_CALLS);
    json_decref(root);
    out = write_reply(&mp_openai_chat, OPENAI(""), "<tool_call>{\"name\"", MEPIC_FINISH_LENGTH, -1);
    root = parse_body(&out);
    assert_string_equal(text_at(root, "choices/0/message/content"), "<tool_call>{\"name\"");
    assert_string_equal(text_at(root, "choices/0/finish_reason"), "length");
    json_decref(root);
}

/* The data of a stream that lies in memory, one JSON a call; NULL at its end. The names of events are appended. */
static json_t *next_data(char **at_line, char *names, size_t cap) {
    for (char *line = strsep(at_line, "\n"); line; line = strsep(at_line, "\n")) {
        if (strncmp(line, "event: ", 7) == 0) snprintf(names + strlen(names), cap - strlen(names), "%s ", line + 7);
        if (strncmp(line, "data: ", 6) != 0 || strcmp(line + 6, "[DONE]") == 0) continue;
        json_t *root = json_loads(line + 6, 0, NULL);
        if (!root) fail_msg("not JSON: %s", line);
        return root;
    }
    return NULL;
}

static void openai_streams_have_tool_calls(void **state) {
    (void)state;
    mp_buf out = write_reply(&mp_openai_chat, OPENAI(",\"stream\":true"), TWO_CALLS, MEPIC_FINISH_STOP, -1);
    char text[64] = "", calls[256] = "", finish[32] = "", names[16] = "", *line = out.data;
    for (json_t *root = next_data(&line, names, sizeof names); root; root = next_data(&line, names, sizeof names)) {
        const json_t *content = at(root, "choices/0/delta/content"), *call = at(root, "choices/0/delta/tool_calls/0");
        if (content) strncat(text, json_string_value(content), sizeof text - strlen(text) - 1);
        if (call) {
            size_t n = strlen(calls);
            snprintf(calls + n, sizeof calls - n, "%lld %s %s %.5s;", (long long)number_at(call, "index"),
                     text_at(call, "function/name"), text_at(call, "function/arguments"), text_at(call, "id"));
        }
        if (json_is_string(at(root, "choices/0/finish_reason"))) {
            snprintf(finish, sizeof finish, "%s", text_at(root, "choices/0/finish_reason"));
        }
        json_decref(root);
    }
    mp_buf_clear(&out);
    assert_string_equal(text, "Wait.");
    assert_string_equal(calls, "0 f {\"a\": 0.1} call_;1 g {} call_;");
    assert_string_equal(finish, "tool_calls");
}

static void anthropic_bodies_have_tool_use(void **state) {
    (void)state;
    mp_buf out = write_reply(&mp_anthropic_messages, ANTHROPIC(""), TWO_CALLS " So.", MEPIC_FINISH_STOP, -1);
    json_t *root = parse_body(&out);
    assert_string_equal(text_at(root, "stop_reason"), "tool_use");
    assert_int_equal(json_array_size(at(root, "content")), 4);
    assert_string_equal(text_at(root, "content/0/text"), "Wait.");
    assert_string_equal(text_at(root, "content/1/type"), "tool_use");
    assert_string_equal(text_at(root, "content/1/name"), "f");
    assert_true(json_real_value(at(root, "content/1/input/a")) == 0.1);
    assert_int_equal(json_object_size(at(root, "content/2/input")), 0);
    assert_string_equal(text_at(root, "content/3/text"), " So.");
    json_decref(root);
    out =
        write_reply(&mp_anthropic_messages, ANTHROPIC(",\"stop_sequences\":[\"A\",\"B\"]"), "x", MEPIC_FINISH_STOP, 1);
    root = parse_body(&out);
    assert_string_equal(text_at(root, "stop_reason"), "stop_sequence");
    assert_string_equal(text_at(root, "stop_sequence"), "B");
    json_decref(root);
    /* one call at most: the string that ends the reply behind it is nobody's stop sequence */
    out = write_reply(&mp_anthropic_messages,
                      ANTHROPIC(",\"tool_choice\":{\"type\":\"auto\",\"disable_parallel_tool_use\":true}"),
                      "<tool_call>{\"name\":\"f\"}", MEPIC_FINISH_STOP, 0);
    root = parse_body(&out);
    assert_string_equal(text_at(root, "stop_reason"), "tool_use");
    assert_true(json_is_null(at(root, "stop_sequence")));
    json_decref(root);
}

static void a_tool_may_have_members_of_the_other_dialect(void **state) {
    (void)state;
    static const char body[] =
        "{" ASKED ",\"tools\":[{\"name\":\"f\",\"function\":1,\"input_schema\":{\"type\":\"object\"}}]}";
    mp_buf out =
        write_reply(&mp_anthropic_messages, body, "{\"name\": \"f\", \"arguments\": {}}", MEPIC_FINISH_STOP, -1);
    json_t *root = parse_body(&out);
    assert_string_equal(text_at(root, "stop_reason"), "tool_use");
    json_decref(root);
}

/* Doubles have up to 17 digits, and times and amounts use them; what is written with fewer keeps them. */
static void numbers_in_a_call_keep_their_digits(void **state) {
    (void)state;
    static const char input[] =
        "{\"t\":1718000000.123456,\"u\":0.1,\"v\":0.30000000000000004,\"w\":-1e-7,\"x\":2.0,"
        "\"y\":9007199254740993,\"z\":[\"\\\"\\\\\\n\\t\\u0001\\u0000/\u00e4\",true,false,null,{}]}";
    char call[512], wanted[512];
    snprintf(call, sizeof call, "<tool_call>{\"name\": \"f\", \"arguments\": %s}</tool_call>", input);
    snprintf(wanted, sizeof wanted, "\"input\":%s", input);
    mp_buf out = write_reply(&mp_anthropic_messages, ANTHROPIC(""), call, MEPIC_FINISH_STOP, -1);
    if (!strstr(out.data, wanted)) fail_msg("no %s in %s", wanted, out.data);
    mp_buf_clear(&out);
}

static void anthropic_streams_are_blocks_in_order(void **state) {
    (void)state;
    mp_buf out = write_reply(&mp_anthropic_messages, ANTHROPIC(",\"stream\":true"), TWO_CALLS, MEPIC_FINISH_STOP, -1);
    char names[2048] = "", built[512] = "", *line = out.data;
    json_int_t block = -1;
    for (json_t *root = next_data(&line, names, sizeof names); root; root = next_data(&line, names, sizeof names)) {
        const char *type = text_at(root, "type");
        size_t n = strlen(built);
        if (strcmp(type, "content_block_start") == 0) {
            assert_int_equal(number_at(root, "index"), ++block);
            snprintf(built + n, sizeof built - n, "[%s:", text_at(root, "content_block/type"));
        } else if (strcmp(type, "content_block_delta") == 0) {
            assert_int_equal(number_at(root, "index"), block);
            const json_t *text = at(root, "delta/text");
            snprintf(built + n, sizeof built - n, "%s",
                     text ? json_string_value(text) : text_at(root, "delta/partial_json"));
        } else if (strcmp(type, "content_block_stop") == 0) {
            snprintf(built + n, sizeof built - n, "]");
        } else if (strcmp(type, "message_delta") == 0) {
            assert_string_equal(text_at(root, "delta/stop_reason"), "tool_use");
            assert_int_equal(number_at(root, "usage/input_tokens"), 68);
            assert_int_equal(number_at(root, "usage/cache_read_input_tokens"), 32);
            assert_int_equal(number_at(root, "usage/output_tokens"), 9);
        }
        json_decref(root);
    }
    mp_buf_clear(&out);
    assert_string_equal(built, "[text:Wait.][tool_use:{\"a\": 0.1}][tool_use:{}]");
    assert_string_equal(names,
                        "message_start content_block_start content_block_delta content_block_delta "
                        "content_block_stop content_block_start content_block_delta content_block_stop "
                        "content_block_start content_block_delta content_block_stop message_delta message_stop ");
}

/* ---- Prompts ----------------------------------------------------------------------------------------------------- */

/* The prompt that a request becomes, as text; a chunk stands between braces. */
static char *prompt_of(const mp_dialect *dialect, const char *body) {
    mp_api api = api_of_engine();
    mepic_error why;
    mp_api_error err;
    mp_generation *generation;
    mp_writer *writer;
    json_t *root = json_loads(body, 0, NULL);
    assert_non_null(root);
    assert_int_equal(mp_generation_open(&generation, &why), MEPIC_OK);
    if (!dialect->read(&api, root, 5, generation, &writer, &err)) fail_msg("%s", err.message);
    dialect->close(writer);
    json_decref(root);
    size_t n, len;
    const int32_t *ids = mepic_prepared_tokens(generation->prompts[0], &n);
    static char text[8192];
    assert_int_equal(mepic_detokenize(engine, ids, n, text, sizeof text, &len, NULL), MEPIC_OK);
    assert_true(len < sizeof text);
    text[len] = 0;
    mp_generation_free(generation);
    return text;
}

#define LISTED                                                                                                         \
    "<|im_start|>system\nT:\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": "       \
    "{\"type\": \"object\"}}}\n</tools>\nE <tool_call>\"name\" \"arguments\"</tool_call><|im_end|>\n"

static void both_dialects_make_the_same_prompt(void **state) {
    (void)state;
    static const char want[] = LISTED
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nI.\n<tool_call>\n{\"name\": \"f\", \"arguments\": "
        "{\"x\": 1, \"y\": [\"z\"]}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nR\n</tool_response>"
        "<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n";
    char *openai = prompt_of(
        &mp_openai_chat,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"U\"},{\"role\":\"assistant\",\"content\":\"I.\",\"tool_"
        "calls\":["
        "{\"id\":\"c\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\" {\\\"x\\\": 1, \\\"y\\\": "
        "[\\\"z\\\"]}\\n\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c\",\"content\":\"R\"},{\"role\":\"user\","
        "\"content\":"
        "\"V\"}],\"tools\":[" OPENAI_TOOL "]}");
    assert_string_equal(openai, want);
    char *anthropic = prompt_of(
        &mp_anthropic_messages,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"U\"},{\"role\":\"assistant\",\"content\":[{\"type\":"
        "\"thinking\","
        "\"thinking\":\"hm\"},{\"type\":\"text\",\"text\":\"I.\"},{\"type\":\"tool_use\",\"id\":\"c\",\"name\":\"f\","
        "\"input\":{\"x\":1,\"y\":[\"z\"]}}]},{\"role\":\"user\",\"content\":[{\"type\":\"tool_result\",\"tool_use_"
        "id\":"
        "\"c\",\"content\":[{\"type\":\"text\",\"text\":\"R\"}]},{\"type\":\"text\",\"text\":\"V\"}]}],\"tools\":[{"
        "\"name\":\"f\",\"input_schema\":{\"type\":\"object\"},\"cache_control\":{\"type\":\"ephemeral\"}}],"
        "\"tool_choice\":{\"type\":\"auto\"},\"max_tokens\":9}");
    assert_string_equal(anthropic, want);
    assert_string_equal(prompt_of(&mp_openai_chat, OPENAI(",\"tool_choice\":\"none\"")),
                        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
    static const char hinted[] =
        "{" ASKED
        ",\"tools\":[{\"type\":\"function\",\"cache_control\":{\"type\":\"ephemeral\"},\"function\":{\"name\":\"f\","
        "\"parameters\":{\"type\":\"object\"},\"cache_control\":{\"type\":\"ephemeral\"}}}]}";
    assert_string_equal(prompt_of(&mp_openai_chat, hinted),
                        LISTED "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
    assert_string_equal(prompt_of(&mp_openai_chat, OPENAI("")),
                        LISTED "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
}

/* Results come in any order; the template shows them without their calls' ids. */
static void results_follow_their_calls(void **state) {
    (void)state;
#define TWO_RESULTS(one, two) "<tool_response>\n" one "\n</tool_response>\n<tool_response>\n" two "\n</tool_response>"
    static const char openai[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"U\"},{\"role\":\"assistant\",\"tool_calls\":["
        "{\"id\":\"a\",\"function\":{\"name\":\"f\",\"arguments\":\"\"}},{\"id\":\"b\",\"function\":{\"name\":\"f\","
        "\"arguments\":\"{}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"%s\",\"content\":\"1\"},{\"role\":\"tool\","
        "\"tool_call_id\":\"%s\",\"content\":\"2\"}]}";
    static const struct {
        const char *ids[2], *want;
    } cases[] = {
        { { "a", "b" }, TWO_RESULTS("1", "2") },
        { { "b", "a" }, TWO_RESULTS("2", "1") },
        { { "x", "b" }, TWO_RESULTS("2", "1") },
        { { "x", "y" }, TWO_RESULTS("1", "2") },
    };
    char body[1024];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(body, sizeof body, openai, cases[i].ids[0], cases[i].ids[1]);
        char *prompt = prompt_of(&mp_openai_chat, body);
        if (!strstr(prompt, cases[i].want)) fail_msg("%s is not in %s", cases[i].want, prompt);
    }
    char *prompt = prompt_of(
        &mp_anthropic_messages,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"U\"},{\"role\":\"assistant\",\"content\":[{\"type\":\"tool_"
        "use\","
        "\"id\":\"a\",\"name\":\"f\",\"input\":{}},{\"type\":\"tool_use\",\"id\":\"b\",\"name\":\"f\",\"input\":{}}]},"
        "{\"role\":\"user\",\"content\":[{\"type\":\"tool_result\",\"tool_use_id\":\"b\",\"content\":\"1\"},{\"type\":"
        "\"tool_result\",\"tool_use_id\":\"a\",\"content\":\"2\"},{\"type\":\"text\",\"text\":\"V\"}]}]}");
    assert_non_null(strstr(prompt, TWO_RESULTS("2", "1") "<|im_end|>\n<|im_start|>user\nV"));
}

/* Whatever allocation of ours fails, a request is refused as such, and nothing is lost. */
static void failing_memory_is_reported(void **state) {
    (void)state;
    static const struct {
        const mp_dialect *dialect;
        const char *body;
    } cases[] = {
        { &mp_openai_chat,
          "{\"messages\":[{\"role\":\"user\",\"content\":\"U # V # W\"},{\"role\":\"assistant\","
          "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]},{\"role\":\"tool\","
          "\"content\":\"long enough\"}],\"documents\":[\"D\"],\"parallel_tool_calls\":false,\"tools\":[" OPENAI_TOOL
          "]}" },
        { &mp_anthropic_messages,
          "{\"system\":\"S\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"document\",\"title\":\"T\","
          "\"source\":{\"type\":\"text\",\"data\":\"D\"}},{\"type\":\"text\",\"text\":\"U\"}]},{\"role\":\"assistant\","
          "\"content\":[{\"type\":\"tool_use\",\"name\":\"f\",\"input\":{}}]},{\"role\":\"user\",\"content\":[{"
          "\"type\":"
          "\"tool_result\",\"is_error\":true,\"content\":\"R\"}]}],\"stop_sequences\":[\"x\"],\"tools\":[{\"name\":"
          "\"f\",\"input_schema\":{}}]}" },
    };
    mp_api api = api_of_engine();
    api.chunk_separator = " # ";
    api.chunk_tool_results = 5;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *body = json_loads(cases[i].body, 0, NULL);
        assert_non_null(body);
        bool ok = false;
        for (uint64_t n = 1; !ok; n++) {
            mepic_error why;
            mp_api_error err = { 0 };
            mp_generation *generation;
            mp_writer *writer;
            assert_true(n < 1000);
            assert_int_equal(mp_generation_open(&generation, &why), MEPIC_OK);
            mp_mem_fail_at(n, false);
            ok = cases[i].dialect->read(&api, body, 1, generation, &writer, &err);
            mp_mem_fail_at(0, false);
            if (!ok && err.status != 503) fail_msg("allocation %d: %s", (int)n, err.message);
            if (ok) cases[i].dialect->close(writer);
            mp_generation_free(generation);
        }
        json_decref(body);
    }
}

/* ---- Over HTTP --------------------------------------------------------------------------------------------------- */

static void a_list_of_tools_is_tokenized(void **state) {
    (void)state;
    json_t *tokens = http_ask_json(port, "POST", "/tokenize", OPENAI(""), 200);
    char *ids = json_dumps(tokens, 0);
    json_t *text = http_ask_json(port, "POST", "/detokenize", ids, 200);
    assert_string_equal(text_at(text, "content"), LISTED "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
    free(ids);
    json_decref(text);
    json_decref(tokens);
}

static void a_model_without_tools_says_so(void **state) {
    (void)state;
    stop();
    mepic_engine *with_tools = engine;
    const mepic_engine_options options = tiny_options();
    engine = open_engine(&options);
    mp_server_options serve = default_options();
    start(&serve);
    json_t *root = http_ask_json(port, "POST", "/v1/chat/completions", OPENAI(""), 400);
    assert_non_null(strstr(text_at(root, "error/message"), "has no tools"));
    json_decref(root);
    json_decref(http_ask_json(port, "POST", "/v1/chat/completions", OPENAI(",\"tool_choice\":\"none\""), 200));
    stop();
    mepic_engine_close(engine);
    engine = with_tools;
    serve = default_options();
    start(&serve);
}

static char *repeat(const char *word, uint32_t n) {
    size_t len = strlen(word);
    char *text = malloc(n * len + 1);
    assert_non_null(text);
    for (uint32_t i = 0; i < n; i++) memcpy(text + i * len, word, len);
    text[n * len] = 0;
    return text;
}

/* `before` and a tool's result: tokens of the result's that were computed for everybody, or found. */
static json_int_t chunk_tokens_of_result(const char *before, const char *content) {
    char body[4096];
    snprintf(
        body, sizeof body,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"},{\"role\":\"tool\",\"content\":%s}],\"max_tokens\":1}",
        before, content);
    json_t *root = http_ask_json(port, "POST", "/v1/chat/completions", body, 200);
    const json_t *details = at(root, "usage/prompt_tokens_details");
    json_int_t n = number_at(details, "chunk_tokens") + number_at(details, "compiled_tokens");
    json_decref(root);
    return n;
}

static void long_tool_results_are_chunks(void **state) {
    (void)state;
    stop();
    mp_server_options options = default_options();
    options.chunk_tool_results = 100;
    start(&options);
    char content[1024], parts[1200];
    char *words = repeat("xyz ", 40); // 160 tokens: no two of these letters merge
    snprintf(content, sizeof content, "\"%s\"", words);
    snprintf(parts, sizeof parts, "[{\"type\":\"text\",\"text\":\"%s\"}]", words);
    assert_true(chunk_tokens_of_result("one", content) > 100);
    assert_true(chunk_tokens_of_result("another", parts) > 100);
    content[80] = '"';
    content[81] = 0;
    assert_int_equal(chunk_tokens_of_result("one", content), 0); // 79 tokens
    free(words);
    stop();
    options = default_options();
    start(&options);
    char *again = repeat("xyz ", 40);
    snprintf(content, sizeof content, "\"%s\"", again);
    assert_int_equal(chunk_tokens_of_result("one more", content), 0); // off
    free(again);
}

/* ---- A real model ------------------------------------------------------------------------------------------------ */

#define WEATHER "\"description\":\"Get the current weather of a city\","
#define SCHEMA "{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\"}},\"required\":[\"city\"]}"
#define QUESTION "{\"role\":\"user\",\"content\":\"What is the weather in Paris right now? Use the tool.\"}"
#define EXACT "\"temperature\":0,\"max_tokens\":60"
#define OPENAI_WEATHER                                                                                                 \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"get_weather\"," WEATHER "\"parameters\":" SCHEMA       \
    "}}]," EXACT

/* Asked over both APIs, it calls the tool with the same arguments; with the result, only that is computed. */
static void a_real_model_calls_its_tool(void **state) {
    (void)state;
    json_t *call =
        http_ask_json(port, "POST", "/v1/chat/completions", "{\"messages\":[" QUESTION "]," OPENAI_WEATHER "}", 200);
    assert_string_equal(text_at(call, "choices/0/finish_reason"), "tool_calls");
    assert_string_equal(text_at(call, "choices/0/message/tool_calls/0/function/name"), "get_weather");
    const char *arguments = text_at(call, "choices/0/message/tool_calls/0/function/arguments");
    json_t *given = json_loads(arguments, 0, NULL);
    assert_string_equal(text_at(given, "city"), "Paris");
    json_t *use = http_ask_json(port, "POST", "/v1/messages",
                                "{\"messages\":[" QUESTION "],\"tools\":[{\"name\":\"get_weather\"," WEATHER
                                "\"input_schema\":" SCHEMA "}]," EXACT "}",
                                200);
    assert_string_equal(text_at(use, "stop_reason"), "tool_use");
    assert_string_equal(text_at(use, "content/0/name"), "get_weather");
    assert_true(json_equal(at(use, "content/0/input"), given));
    assert_true(number_at(use, "usage/cache_read_input_tokens") > number_at(call, "usage/prompt_tokens") - 17);
    char *message = json_dumps(at(call, "choices/0/message"), 0), body[4096];
    snprintf(body, sizeof body,
             "{\"messages\":[" QUESTION ",%s,{\"role\":\"tool\",\"content\":\"{\\\"degrees\\\": 21}\"}]," OPENAI_WEATHER
             "}",
             message);
    json_t *answer = http_ask_json(port, "POST", "/v1/chat/completions", body, 200);
    assert_true(number_at(answer, "usage/prompt_tokens_details/prefix_tokens") >
                number_at(call, "usage/prompt_tokens") - 17);
    free(message);
    json_decref(answer);
    json_decref(use);
    json_decref(given);
    json_decref(call);
}

static int setup_model(void **state) {
    (void)state;
    static char path[512];
    assert_true(real_model_find(QWEN_0_5B, path, sizeof path));
    const mepic_engine_options options = { .size = sizeof options,
                                           .model_path = path,
                                           .device = "cpu",
                                           .context = 2048,
                                           .pages = 256,
                                           .canonical_context = "" };
    engine = open_engine(&options);
    const mp_server_options serve = default_options();
    start(&serve);
    return 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "model") == 0) {
        char path[512];
        const struct CMUnitTest real[] = { cmocka_unit_test(a_real_model_calls_its_tool) };
        return real_model_find(QWEN_0_5B, path, sizeof path) ? cmocka_run_group_tests(real, setup_model, teardown) : 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(calls_are_found_however_a_reply_is_cut),
        cmocka_unit_test(a_nul_makes_a_call_text),
        cmocka_unit_test(cuts_do_not_matter),
        cmocka_unit_test(text_is_not_held_back),
        cmocka_unit_test(blanks_without_end_are_text),
        cmocka_unit_test(a_tool_may_have_members_of_the_other_dialect),
        cmocka_unit_test(openai_bodies_have_tool_calls),
        cmocka_unit_test(openai_streams_have_tool_calls),
        cmocka_unit_test(anthropic_bodies_have_tool_use),
        cmocka_unit_test(numbers_in_a_call_keep_their_digits),
        cmocka_unit_test(anthropic_streams_are_blocks_in_order),
        cmocka_unit_test(both_dialects_make_the_same_prompt),
        cmocka_unit_test(results_follow_their_calls),
        cmocka_unit_test(failing_memory_is_reported),
        cmocka_unit_test(a_list_of_tools_is_tokenized),
        cmocka_unit_test(a_model_without_tools_says_so),
        cmocka_unit_test(long_tool_results_are_chunks),
    };
    return cmocka_run_group_tests(tests, setup_tools, teardown);
}
