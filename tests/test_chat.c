/* tokenizer/chat: families recognized by their template's text, and what each renders. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "support/vocab.h"
#include "tokenizer/chat.h"

/* Templates cut down to what tells families and their variants apart. */
static const char chatml[] =
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>'}}"
    "{% endfor %}";
static const char smollm[] =
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role']}}";
static const char qwen[] =
    "{{- '<|im_start|>system\\n' }}{{- messages[0].content }}{{- '<|im_start|>system\\n' + "
    "messages[0].content + '<|im_end|>\\n' }}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}"
    "{{- '\\n<tool_response>\\n' }}";
/* Lists its tools, in words of its own. */
static const char qwen_tools[] =
    "{{- '<|im_start|>system\\n' }}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}"
    "{{- \"\\n\\n# Tools\\n\\nThey are \\\"these\\\", in <tools></tools>:\\n<tools>\" }}{{- tool | tojson }}"
    "{{- \"\\n</tools>\\n\\nCall one so:\\n<tool_call>\\n{\\\"name\\\": N, \\\"arguments\\\": A}\\n</tool_call>"
    "<|im_end|>\\n\" }}{{- '\\n<tool_response>\\n' }}";
static const char llama3[] =
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' }}";
static const char gemma[] = "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}";
static const char mistral_old[] =
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{{ message['content'] + eos_token }}";
static const char mistral_v1[] = "{% if loop.first and system_message is defined %}{{ ' [INST] ' + system_message + "
                                 "message['content'] + ' [/INST]' }}{{ ' ' + message['content'] + eos_token }}";
static const char mistral_v3[] =
    "{% if loop.last and system_message is defined %}{{ \"[INST] \" + message[\"content\"] + "
    "\"[/INST]\" }}{{ \" \" + message[\"content\"]|trim + eos_token }}";
static const char mistral_v3_tekken[] =
    "{% if loop.last and system_message is defined %}{{ \"[INST]\" + message[\"content\"] "
    "+ \"[/INST]\" }}{{ message[\"content\"] + eos_token }}";
static const char mistral_v7[] =
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{{ '[SYSTEM_PROMPT] ' + message['content'] "
    "+ '[/SYSTEM_PROMPT]' }}{{ ' ' + message['content'] + eos_token }}";
static const char llama2[] = "{{ bos_token + '[INST] <<SYS>>\\n' + content }}";

/* The template keeps pointing into the file, which stays open until the next call. */
static vocab_file file;
static mp_gguf *gguf;

static mp_chat_template find_template(const char *text) {
    mp_gguf_close(gguf);
    vocab_clear(&file);
    vocab_begin(&file, "gpt2", NULL);
    if (text) vocab_string(&file, "tokenizer.chat_template", text);
    gguf = vocab_open(&file, 0);
    mp_chat_template chat;
    mp_chat_template_find(gguf, &chat);
    return chat;
}

static mepic_message say(const char *role, const char *text) {
    static mepic_segment parts[64];
    static size_t next;
    mepic_segment *part = &parts[next++ % 64];
    *part = (mepic_segment){ .text = text, .len = strlen(text) };
    return (mepic_message){ .role = role, .parts = part, .n_parts = 1 };
}

static void join(const mp_pieces *pieces, char *out, size_t cap) {
    size_t n = 0;
    for (size_t i = 0; i < pieces->n; i++) {
        assert_true(n + pieces->items[i].text.len < cap);
        memcpy(out + n, pieces->items[i].text.data, pieces->items[i].text.len);
        n += pieces->items[i].text.len;
    }
    out[n] = 0;
}

static void expect_chat(const mp_chat_template *chat, const mp_chat *conversation, bool generate, const char *want) {
    mp_pieces pieces;
    mepic_error err = { 0 };
    if (mp_chat_render(chat, conversation, generate, &pieces, &err)) fail_msg("%s", err.message);
    char got[2048];
    join(&pieces, got, sizeof got);
    assert_string_equal(got, want);
    mp_pieces_clear(&pieces);
}

static void expect(const mp_chat_template *chat, const mepic_message *messages, size_t n, bool generate,
                   const char *want) {
    const mp_chat conversation = { .messages = messages, .n = n };
    expect_chat(chat, &conversation, generate, want);
}

static void expect_chat_refused(const mp_chat_template *chat, const mp_chat *conversation, mepic_status status,
                                const char *word) {
    mp_pieces pieces;
    mepic_error err = { 0 };
    assert_int_equal(mp_chat_render(chat, conversation, true, &pieces, &err), status);
    if (!strstr(err.message, word)) fail_msg("\"%s\" does not say \"%s\"", err.message, word);
}

static void expect_refused(const mp_chat_template *chat, const mepic_message *messages, size_t n, mepic_status status,
                           const char *word) {
    const mp_chat conversation = { .messages = messages, .n = n };
    expect_chat_refused(chat, &conversation, status, word);
}

/* ---- Recognizing ------------------------------------------------------------------------------------------------- */

static void families_are_recognized_by_their_text(void **state) {
    (void)state;
    static const struct {
        const char *text, *family;
    } cases[] = {
        { chatml, "chatml" },      { smollm, "chatml" },         { qwen, "chatml" },
        { llama3, "llama3" },      { gemma, "gemma" },           { mistral_v1, "mistral" },
        { mistral_v3, "mistral" }, { mistral_v7, "mistral" },    { mistral_v3_tekken, "mistral" },
        { llama2, "none" },        { "{{ messages }}", "none" }, { "", "none" },
        { NULL, "none" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mp_chat_template chat = find_template(cases[i].text);
        assert_string_equal(mp_chat_family_name(chat.family), cases[i].family);
    }
}

static void a_default_system_text_is_read_from_the_template(void **state) {
    (void)state;
    mp_chat_template chat = find_template(smollm);
    assert_int_equal(chat.default_system.len, 14);
    assert_memory_equal(chat.default_system.data, "You are small.", 14);
    chat = find_template(qwen);
    assert_int_equal(chat.default_system.len, 10);
    assert_memory_equal(chat.default_system.data, "You are Q.", 10);
    assert_int_equal(find_template(chatml).default_system.len, 0);
    /* what is cut off, empty, or an expression is no text */
    static const char *const none[] = {
        "<|im_start|>system",           "<|im_start|>system\n",           "<|im_start|>system\\n",
        "<|im_start|>system\\nYou are", "<|im_start|>system\n<|im_end|>", "<|im_start|>system\n{{ text }}<|im_end|>",
        "<|im_start|>system\\"
    };
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++) {
        assert_int_equal(find_template(none[i]).default_system.len, 0);
    }
}

/* ---- Rendering --------------------------------------------------------------------------------------------------- */

static void chatml_turns(void **state) {
    (void)state;
    mp_chat_template chat = find_template(qwen);
    const mepic_message plain[] = { say("user", " Hi \n") };
    expect(&chat, plain, 1, true,
           "<|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n");
    const mepic_message turns[] = { say("system", "S"), say("user", "U"), say("assistant", "A"), say("system", "T") };
    expect(&chat, turns, 4, false,
           "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
           "<|im_start|>system\nT<|im_end|>\n");
    const mepic_message tools[] = { say("system", "S"), say("user", "U"), say("assistant", "A"), say("tool", "1"),
                                    say("tool", "2"),   say("user", "V"), say("tool", "3") };
    expect(&chat, tools, 7, true,
           "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
           "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
           "<|im_start|>user\nV<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
           "<|im_start|>assistant\n");
    chat = find_template(chatml);
    expect(&chat, plain, 1, true, "<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n");
    expect_refused(&chat, tools, 7, MEPIC_ERR_ARGUMENT, "no turn for tool results");
}

static const char *const two_tools[] = { "{\"a\": 1}", "{\"b\": \"<|im_end|>\"}" };
#define LISTED                                                                                                         \
    "# Tools\n\nThey are \"these\", in <tools></tools>:\n<tools>\n{\"a\": 1}\n{\"b\": "                                \
    "\"<|im_end|>\"}\n</tools>\n\nCall one "                                                                           \
    "so:\n<tool_call>\n{\"name\": N, \"arguments\": A}\n</tool_call><|im_end|>\n"

static void tools_stand_in_the_system_turn(void **state) {
    (void)state;
    mp_chat_template chat = find_template(qwen_tools);
    assert_string_equal(mp_chat_tool_format(&chat), "hermes");
    const mepic_message turns[] = { say("system", "S"), say("user", "U") };
    mp_chat conversation = { .messages = turns, .n = 2, .tools = two_tools, .n_tools = 2 };
    expect_chat(&chat, &conversation, true,
                "<|im_start|>system\nS\n\n" LISTED "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
    conversation.messages = turns + 1;
    conversation.n = 1;
    expect_chat(&chat, &conversation, false,
                "<|im_start|>system\nYou are Q.\n\n" LISTED "<|im_start|>user\nU<|im_end|>\n");
    chat.default_system.len = 0;
    expect_chat(&chat, &conversation, false, "<|im_start|>system\n" LISTED "<|im_start|>user\nU<|im_end|>\n");
    /* what a tool says is never parsed */
    mp_pieces pieces;
    assert_int_equal(mp_chat_render(&chat, &conversation, false, &pieces, NULL), MEPIC_OK);
    for (size_t i = 0; i < pieces.n; i++) {
        bool tool = pieces.items[i].text.len > 2 && memcmp(pieces.items[i].text.data, "{\"", 2) == 0;
        if (tool) assert_int_equal(pieces.items[i].kind, MP_PIECE_PART);
    }
    mp_pieces_clear(&pieces);
}

static void calls_follow_the_assistants_text(void **state) {
    (void)state;
    mp_chat_template chat = find_template(qwen_tools);
    const mepic_tool_call calls[] = { { "f", "{\"x\": 1}" }, { "g", "{}" } };
    mepic_message turns[] = { say("user", "U"), say("assistant", "A."), say("tool", "1"), say("tool", "2") };
    turns[1].calls = calls;
    turns[1].n_calls = 2;
    const mp_chat conversation = { .messages = turns, .n = 4 };
    static const char end[] = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n"
                              "{\"name\": \"g\", \"arguments\": {}}\n</tool_call><|im_end|>\n<|im_start|>user\n"
                              "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
                              "<|im_start|>assistant\n";
    static const char start[] = "<|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                                "<|im_start|>assistant\n";
    char want[1024];
    snprintf(want, sizeof want, "%sA.\n%s", start, end);
    expect_chat(&chat, &conversation, true, want);
    turns[1].n_parts = 0;
    snprintf(want, sizeof want, "%s%s", start, end);
    expect_chat(&chat, &conversation, true, want);
    turns[0].calls = calls;
    turns[0].n_calls = 1;
    expect_chat_refused(&chat, &conversation, MEPIC_ERR_ARGUMENT, "only an assistant");
}

/* Templates that have no tools, cut them short, or call them in another way. */
static void tools_that_are_not_understood_are_refused(void **state) {
    (void)state;
    static const char *const none[] = {
        "<|im_start|>",
        "<|im_start|><tool_response>{{ \"<tools>\" }}{{ \"</tools><function=f><|im_end|>\\n\" }}",
        "<|im_start|><tool_response>{{ \"<tools>\" }}{{ \"</tools><tool_call>name arguments\" }}",
        "<|im_start|><tool_response>{{ \"<tools>\" }}{{ \"</tools><tool_call>name arguments<|im_end|>\\n",
        "<|im_start|><tool_response>{{ <tools>\" }}{{ </tools><tool_call>name arguments<|im_end|>\\n\" }}",
        "<|im_start|>{{ \"<tools>\" }}{{ \"</tools><tool_call>name arguments<|im_end|>\\n\" }}",
        "</tools>\"<|im_start|><tool_response><tools>\"",
        "</tools>\"<|im_start|><tool_response>\"\"<tools>\\",
    };
    const mepic_tool_call call = { "f", "{}" };
    mepic_message turns[] = { say("user", "U"), say("assistant", "A") };
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        mp_chat_template chat = find_template(none[i]);
        assert_string_equal(mp_chat_tool_format(&chat), "none");
        const mp_chat asked = { .messages = turns, .n = 2, .tools = two_tools, .n_tools = 1 };
        expect_chat_refused(&chat, &asked, MEPIC_ERR_UNSUPPORTED, "has no tools");
        turns[1].calls = &call;
        turns[1].n_calls = 1;
        const mp_chat called = { .messages = turns, .n = 2 };
        expect_chat_refused(&chat, &called, MEPIC_ERR_UNSUPPORTED, "message 1 calls tools");
        turns[1].n_calls = 0;
    }
}

static void llama3_turns(void **state) {
    (void)state;
    mp_chat_template chat = find_template(llama3);
    const mepic_message turns[] = { say("system", " S\n"), say("user", "U"), say("assistant", "   A   ") };
    expect(&chat, turns, 3, true,
           "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|"
           "eot_id|>"
           "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
           "\n\n");
}

static void gemma_turns(void **state) {
    (void)state;
    mp_chat_template chat = find_template(gemma);
    const mepic_message turns[] = { say("system", " S "), say("user", " U "), say("assistant", "A"), say("user", "V") };
    expect(&chat, turns, 4, true,
           "<start_of_turn>user\n S \n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nV"
           "<end_of_turn>\n<start_of_turn>model\n");
    expect(&chat, turns + 1, 1, false, "<start_of_turn>user\nU<end_of_turn>\n");
    expect_refused(&chat, turns, 1, MEPIC_ERR_ARGUMENT, "system message alone");
    expect_refused(&chat, turns + 2, 1, MEPIC_ERR_ARGUMENT, "message 0 has the role \"assistant\"");
    const mepic_message twice[] = { say("user", "U"), say("user", "V") };
    expect_refused(&chat, twice, 2, MEPIC_ERR_ARGUMENT, "message 1");
    const mepic_message late[] = { say("user", "U"), say("system", "S") };
    expect_refused(&chat, late, 2, MEPIC_ERR_ARGUMENT, "message 1 has the role \"system\"");
}

static void mistral_turns(void **state) {
    (void)state;
    const mepic_message turns[] = { say("system", "S"), say("user", "U"),          say("assistant", "A"),
                                    say("user", " V "), say("assistant", "  B  "), say("user", "W") };
    mp_chat_template chat = find_template(mistral_v1);
    expect(&chat, turns, 6, true, " [INST] S\n\nU [/INST] A</s> [INST]  V  [/INST]   B  </s> [INST] W [/INST]");
    chat = find_template(mistral_old);
    expect(&chat, turns, 6, true, "[INST] S\n\nU [/INST]A</s>[INST]  V  [/INST]  B  </s>[INST] W [/INST]");
    chat = find_template(mistral_v3);
    expect(&chat, turns, 6, true, "[INST] U[/INST] A</s>[INST]  V [/INST] B</s>[INST] S\n\nW[/INST]");
    chat = find_template(mistral_v3_tekken);
    expect(&chat, turns, 6, true, "[INST]U[/INST]A</s>[INST] V [/INST]  B  </s>[INST]S\n\nW[/INST]");
    chat = find_template(mistral_v7);
    expect(&chat, turns, 6, true,
           "[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] U[/INST] A</s>[INST]  V [/INST]   B  </s>[INST] W[/INST]");
    expect_refused(&chat, turns, 1, MEPIC_ERR_ARGUMENT, "system message alone");
    expect_refused(&chat, turns + 2, 2, MEPIC_ERR_ARGUMENT, "message 0");
}

static void what_cannot_be_rendered_is_refused(void **state) {
    (void)state;
    mp_chat_template chat = find_template(chatml);
    const mepic_message wrong[] = { say("user", "U"), say("human", "V") }, unnamed[] = { say(NULL, "U") };
    expect_refused(&chat, wrong, 2, MEPIC_ERR_ARGUMENT, "message 1 has the role \"human\"");
    expect_refused(&chat, unnamed, 1, MEPIC_ERR_ARGUMENT, "message 0 has the role \"\"");
    expect_refused(&chat, wrong, 0, MEPIC_ERR_ARGUMENT, "no messages");
    chat = find_template(NULL);
    expect_refused(&chat, wrong, 1, MEPIC_ERR_UNSUPPORTED, "no chat template");
}

/* ---- Pieces ------------------------------------------------------------------------------------------------------ */

/* Parts stay pieces of their own and point at the caller's segments; trimming works across them. */
static void parts_stay_apart(void **state) {
    (void)state;
    const int32_t ids[] = { 1, 2, 3 };
    const mepic_segment parts[] = { { .text = " \n", .len = 2 },
                                    { .text = "  Intro: ", .len = 9 },
                                    { .kind = MEPIC_CHUNK, .tokens = ids, .n_tokens = 3 },
                                    { .text = NULL, .len = 0 },
                                    { .kind = MEPIC_CHUNK, .text = " doc ", .len = 5 },
                                    { .text = "\t", .len = 1 } };
    const mepic_message message = { .role = "user", .parts = parts, .n_parts = 6 };
    const mp_chat conversation = { .messages = &message, .n = 1 };
    mp_chat_template chat = find_template(llama3);
    mp_pieces pieces;
    assert_int_equal(mp_chat_render(&chat, &conversation, false, &pieces, NULL), MEPIC_OK);
    assert_int_equal(pieces.n, 5);
    assert_int_equal(pieces.items[0].kind, MP_PIECE_TEMPLATE);
    assert_null(pieces.items[0].part);
    static const struct {
        size_t part;
        const char *text;
    } want[] = { { 1, "Intro: " }, { 2, "" }, { 4, " doc" } };
    for (size_t i = 0; i < 3; i++) {
        const mp_piece *piece = &pieces.items[i + 1];
        assert_int_equal(piece->kind, MP_PIECE_PART);
        assert_ptr_equal(piece->part, &parts[want[i].part]);
        assert_int_equal(piece->text.len, strlen(want[i].text));
        if (piece->text.len) assert_memory_equal(piece->text.data, want[i].text, piece->text.len);
    }
    mp_pieces_clear(&pieces);
    chat = find_template(chatml); /* which does not trim */
    assert_int_equal(mp_chat_render(&chat, &conversation, false, &pieces, NULL), MEPIC_OK);
    assert_int_equal(pieces.n, 7);
    assert_int_equal(pieces.items[1].text.len, 2);
    mp_pieces_clear(&pieces);
    const mepic_segment blank[] = { { .text = " ", .len = 1 }, { .text = "\n ", .len = 2 } };
    const mepic_message nothing = { .role = "user", .parts = blank, .n_parts = 2 };
    chat = find_template(llama3);
    expect(&chat, &nothing, 1, false, "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>");
}

static void the_system_opening_is_how_a_system_turn_begins(void **state) {
    (void)state;
    static const struct {
        const char *text, *opening;
    } cases[] = { { qwen, "<|im_start|>system\n" },   { llama3, "<|start_header_id|>system<|end_header_id|>\n\n" },
                  { gemma, "<start_of_turn>user\n" }, { mistral_v1, " [INST] " },
                  { mistral_v3, "[INST] " },          { mistral_v3_tekken, "[INST]" },
                  { mistral_v7, "[SYSTEM_PROMPT] " }, { NULL, "" } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mp_chat_template chat = find_template(cases[i].text);
        mp_str opening = mp_chat_system_opening(&chat);
        assert_int_equal(opening.len, strlen(cases[i].opening));
        assert_memory_equal(opening.data, cases[i].opening, opening.len);
    }
}

static void failing_memory_is_reported(void **state) {
    (void)state;
    mp_chat_template chat = find_template(qwen_tools);
    mepic_message turns[40];
    const mepic_tool_call call = { "f", "{}" };
    for (size_t i = 0; i < 40; i++) turns[i] = say(i % 2 ? "assistant" : "user", "x");
    turns[1].calls = &call;
    turns[1].n_calls = 1;
    const mp_chat conversation = { .messages = turns, .n = 40, .tools = two_tools, .n_tools = 2 };
    mepic_status status = MEPIC_ERR_NOMEM;
    for (uint64_t n = 1; status != MEPIC_OK; n++) {
        assert_true(n < 40);
        mp_pieces pieces = { 0 };
        mepic_error err = { 0 };
        mp_mem_fail_at(n, false);
        status = mp_chat_render(&chat, &conversation, true, &pieces, &err);
        mp_mem_fail_at(0, false);
        assert_int_equal(err.status, status);
        assert_true((status == MEPIC_OK) == (pieces.items != NULL));
        mp_pieces_clear(&pieces);
    }
}

static int close_file(void **state) {
    (void)state;
    mp_gguf_close(gguf);
    vocab_clear(&file);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(families_are_recognized_by_their_text),
        cmocka_unit_test(a_default_system_text_is_read_from_the_template),
        cmocka_unit_test(chatml_turns),
        cmocka_unit_test(tools_stand_in_the_system_turn),
        cmocka_unit_test(calls_follow_the_assistants_text),
        cmocka_unit_test(tools_that_are_not_understood_are_refused),
        cmocka_unit_test(llama3_turns),
        cmocka_unit_test(gemma_turns),
        cmocka_unit_test(mistral_turns),
        cmocka_unit_test(what_cannot_be_rendered_is_refused),
        cmocka_unit_test(parts_stay_apart),
        cmocka_unit_test(the_system_opening_is_how_a_system_turn_begins),
        cmocka_unit_test(failing_memory_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, close_file);
}
