/* tokenizer/: ids and rendered chats equal to the reference's on real vocabularies (tests/golden/README.md). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "golden.h"
#include "support/models.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

typedef struct golden_case {
    const char *model, *tokens, *chat; /* files; chat NULL: the model has no template */
    const char *kind, *tools;          /* tools NULL: the template has none */
} golden_case;

static golden_case cases[] = {
    { SMOLLM2, "tokens_smollm2-135m.json", "chat_smollm2-135m.json", "bpe/smollm", NULL },
    { QWEN_0_5B, "tokens_qwen0.5b.json", "chat_qwen0.5b.json", "bpe/qwen2", "tools_qwen0.5b.json" },
    { QWEN_1_5B, "tokens_qwen1.5b.json", "chat_qwen1.5b.json", "bpe/qwen2", "tools_qwen1.5b.json" },
    { GEMMA3_270M, "tokens_gemma3-270m.json", NULL, "spm", NULL },
};

typedef struct loaded {
    mp_gguf *gguf;
    mp_tokenizer *tokenizer;
} loaded;

static bool load(const golden_case *golden, loaded *out) {
    char path[512];
    if (!real_model_find(golden->model, path, sizeof path)) return false;
    mepic_error err = { 0 };
    if (mp_gguf_open(path, &out->gguf, &err) || mp_tokenizer_open(out->gguf, &out->tokenizer, &err)) {
        fail_msg("%s: %s", golden->model, err.message);
    }
    return true;
}

static void unload(loaded *l) {
    mp_tokenizer_close(l->tokenizer);
    mp_gguf_close(l->gguf);
}

static size_t unhex(const char *hex, char *out, size_t cap) {
    size_t n = strlen(hex) / 2;
    assert_true(n <= cap);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (char)byte;
    }
    return n;
}

static void print_ids(const char *label, const mp_tokens *ids) {
    fprintf(stderr, "%s:", label);
    for (size_t i = 0; i < ids->n; i++) fprintf(stderr, " %d", ids->ids[i]);
    fprintf(stderr, "\n");
}

static bool equal_ids(const mp_tokens *got, const json_t *want, const char *what) {
    mp_tokens expected = { 0 };
    for (size_t i = 0; i < json_array_size(want); i++) {
        assert_true(mp_tokens_push(&expected, (int32_t)json_integer_value(json_array_get(want, i))));
    }
    bool equal =
        got->n == expected.n && (got->n == 0 || memcmp(got->ids, expected.ids, got->n * sizeof *got->ids) == 0);
    if (!equal) {
        fprintf(stderr, "%s\n", what);
        print_ids("  got ", got);
        print_ids("  want", &expected);
    }
    mp_free(expected.ids);
    return equal;
}

static void ids_are_the_references(void **state) {
    const golden_case *golden = *state;
    loaded l;
    json_t *root = golden_load(golden->tokens);
    if (!root || !load(golden, &l)) {
        json_decref(root);
        skip();
    }
    assert_string_equal(mp_tokenizer_kind(l.tokenizer), golden->kind);
    assert_int_equal(mp_tokenizer_n_vocab(l.tokenizer), json_integer_value(json_object_get(root, "n_vocab")));
    assert_int_equal(mp_tokenizer_bos(l.tokenizer), json_integer_value(json_object_get(root, "bos")));
    assert_int_equal(mp_tokenizer_adds_bos(l.tokenizer), json_is_true(json_object_get(root, "add_bos")));
    assert_true(mp_tokenizer_ends(l.tokenizer, (int32_t)json_integer_value(json_object_get(root, "eos"))));

    static const struct {
        const char *key;
        bool add_special, parse_special;
    } modes[] = { { "parse_special", false, true },
                  { "no_special", false, false },
                  { "add_special_parse", true, true } };
    const json_t *strings = json_object_get(root, "strings");
    size_t wrong = 0;
    assert_int_equal(json_array_size(strings), 52);
    for (size_t i = 0; i < json_array_size(strings); i++) {
        const json_t *string = json_array_get(strings, i);
        char text[4096];
        const char *hex = json_string_value(json_object_get(string, "hex"));
        size_t len = unhex(hex, text, sizeof text);
        for (size_t m = 0; m < 3; m++) {
            mp_tokens ids = { 0 };
            assert_int_equal(
                mp_tokenize(l.tokenizer, text, len, modes[m].add_special, modes[m].parse_special, &ids, NULL),
                MEPIC_OK);
            wrong += !equal_ids(&ids, json_object_get(string, modes[m].key), hex);
            mp_free(ids.ids);
        }
    }
    assert_int_equal(wrong, 0);
    json_decref(root);
    unload(&l);
}

/* Renders one golden conversation; fills `text` with the pieces' text and `ids` with the ids of each piece alone. */
/* calls: [{"name", "arguments"}] of a message. */
static size_t read_calls(const json_t *list, mepic_tool_call out[4]) {
    size_t n = json_array_size(list);
    assert_true(n <= 4);
    for (size_t i = 0; i < n; i++) {
        const json_t *call = json_array_get(list, i);
        out[i].name = json_string_value(json_object_get(call, "name"));
        out[i].arguments = json_string_value(json_object_get(call, "arguments"));
    }
    return n;
}

static void render(const loaded *l, const json_t *conversation, bool generate, mp_buf *text, mp_tokens *ids) {
    mepic_message turns[16] = { 0 };
    mepic_segment parts[16] = { 0 };
    mepic_tool_call calls[16][4];
    const char *tools[4];
    const json_t *messages = json_object_get(conversation, "messages"), *list = json_object_get(conversation, "tools");
    mp_chat chat = { turns, json_array_size(messages), tools, json_array_size(list) };
    assert_true(chat.n <= 16 && chat.n_tools <= 4);
    for (size_t i = 0; i < chat.n_tools; i++) tools[i] = json_string_value(json_array_get(list, i));
    for (size_t i = 0; i < chat.n; i++) {
        const json_t *message = json_array_get(messages, i), *content = json_object_get(message, "content");
        parts[i].text = json_string_value(content);
        parts[i].len = json_string_length(content);
        turns[i].role = json_string_value(json_object_get(message, "role"));
        turns[i].parts = &parts[i];
        turns[i].n_parts = 1;
        turns[i].calls = calls[i];
        turns[i].n_calls = read_calls(json_object_get(message, "calls"), calls[i]);
    }
    mp_chat_template template;
    mp_chat_template_find(l->gguf, &template);
    mp_pieces pieces;
    assert_int_equal(mp_chat_render(&template, &chat, generate, &pieces, NULL), MEPIC_OK);
    for (size_t i = 0; i < pieces.n; i++) {
        const mp_piece *piece = &pieces.items[i];
        assert_true(mp_buf_append(text, piece->text.data, piece->text.len));
        assert_int_equal(mp_tokenize(l->tokenizer, piece->text.data, piece->text.len, false,
                                     piece->kind == MP_PIECE_TEMPLATE, ids, NULL),
                         MEPIC_OK);
    }
    mp_pieces_clear(&pieces);
}

/* The rendered text is the reference's, and so are its ids as a whole. Piece by piece they are the same, but for the
 * last conversation: its system text begins with spaces, which the reference joins to the template's newline, and its
 * reply contains "<|im_end|>", which is a token for the reference and text for us. */
static void chats_are_the_references(void **state) {
    const golden_case *golden = *state;
    loaded l;
    if (!golden->chat) skip();
    json_t *root = golden_load(golden->chat);
    if (!root || !load(golden, &l)) {
        json_decref(root);
        skip();
    }
    const json_t *conversations = json_object_get(root, "conversations");
    assert_int_equal(json_array_size(conversations), 3);
    for (size_t i = 0; i < json_array_size(conversations); i++) {
        const json_t *chat = json_array_get(conversations, i);
        mp_buf text = { .limit = 1 << 20 };
        mp_tokens pieces = { 0 }, whole = { 0 };
        render(&l, chat, json_is_true(json_object_get(chat, "add_generation_prompt")), &text, &pieces);
        const json_t *want = json_object_get(chat, "rendered");
        assert_int_equal(text.len, json_string_length(want));
        assert_memory_equal(text.data, json_string_value(want), text.len);
        assert_int_equal(mp_tokenize(l.tokenizer, text.data, text.len, true, true, &whole, NULL), MEPIC_OK);
        const json_t *ids = json_object_get(chat, "ids_add_special_parse_special");
        assert_true(equal_ids(&whole, ids, "whole"));
        if (i < 2) assert_true(equal_ids(&pieces, ids, "pieces"));
        mp_free(pieces.ids);
        mp_free(whole.ids);
        mp_buf_clear(&text);
    }
    json_decref(root);
    unload(&l);
}

/* Tools and calls: the text is the reference's. Piece by piece the ids are those of the whole text, so a reply that
 * calls a tool is found in the cache when it comes back; but for tool results, whose text is its own. */
static void tools_are_the_references(void **state) {
    const golden_case *golden = *state;
    loaded l;
    if (!golden->tools) skip();
    json_t *root = golden_load(golden->tools);
    assert_non_null(root);
    if (!load(golden, &l)) {
        json_decref(root);
        skip();
    }
    const json_t *conversations = json_object_get(root, "conversations");
    for (size_t i = 0; i < json_array_size(conversations); i++) {
        const json_t *chat = json_array_get(conversations, i), *want = json_object_get(chat, "rendered");
        mp_buf text = { .limit = 1 << 20 };
        mp_tokens pieces = { 0 }, whole = { 0 };
        render(&l, chat, true, &text, &pieces);
        assert_int_equal(text.len, json_string_length(want));
        assert_memory_equal(text.data, json_string_value(want), text.len);
        assert_int_equal(mp_tokenize(l.tokenizer, text.data, text.len, true, true, &whole, NULL), MEPIC_OK);
        const char *results = strstr(json_string_value(want), "<tool_response>");
        if (!results) {
            assert_int_equal(pieces.n, whole.n);
            assert_memory_equal(pieces.ids, whole.ids, whole.n * sizeof *whole.ids);
        } else {
            mp_tokens before = { 0 };
            size_t len = (size_t)(results - json_string_value(want));
            assert_int_equal(mp_tokenize(l.tokenizer, text.data, len - 1, true, true, &before, NULL), MEPIC_OK);
            assert_true(before.n < pieces.n);
            assert_memory_equal(pieces.ids, before.ids, before.n * sizeof *before.ids);
            mp_free(before.ids);
        }
        mp_free(pieces.ids);
        mp_free(whole.ids);
        mp_buf_clear(&text);
    }
    json_decref(root);
    unload(&l);
}

int main(void) {
    struct CMUnitTest tests[12];
    char path[512];
    size_t n = 0, found = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        found += real_model_find(cases[i].model, path, sizeof path);
        tests[n++] = (struct CMUnitTest){ cases[i].tokens, ids_are_the_references, NULL, NULL, &cases[i] };
        tests[n++] = (struct CMUnitTest){ cases[i].model, chats_are_the_references, NULL, NULL, &cases[i] };
        tests[n++] = (struct CMUnitTest){ "tools", tools_are_the_references, NULL, NULL, &cases[i] };
    }
    return found ? cmocka_run_group_tests(tests, NULL, NULL) : 77;
}
