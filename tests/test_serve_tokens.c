/* /tokenize and /detokenize: both shapes, and the same ids as a request's prompt. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "support/replies.h"
#include "support/server.h"

static json_t *ask_ok(const char *path, const char *body) {
    return http_ask_json(port, "POST", path, body, 200);
}

static void assert_ids(const json_t *list, const int32_t *ids, size_t n) {
    assert_int_equal(json_array_size(list), n);
    for (size_t i = 0; i < n; i++) assert_int_equal(json_integer_value(json_array_get(list, i)), ids[i]);
}

static void a_prompt_is_tokenized_as_in_a_request(void **state) {
    (void)state;
    static const char text[] = "the<|im_end|> caf\xc3\xa9";
    mepic_segment segment = text_of(text);
    segment.parse_special = true;
    mepic_prepared *prepared = prepare(engine, &segment, 1);
    size_t n;
    const int32_t *ids = mepic_prepared_tokens(prepared, &n);
    json_t *root = ask_ok("/tokenize", "{\"model\":\"tiny\",\"prompt\":\"the<|im_end|> caf\xc3\xa9\","
                                       "\"return_token_strs\":true}");
    assert_ids(at(root, "tokens"), ids, n);
    assert_int_equal(number_at(root, "count"), n);
    assert_int_equal(number_at(root, "max_model_len"), 512);
    assert_int_equal(json_array_size(at(root, "token_strs")), n);
    assert_string_equal(text_at(root, "token_strs/0"), "t");
    json_decref(root);
    mepic_prepared_free(prepared);
    root = ask_ok("/tokenize", "{\"prompt\":\"\"}");
    assert_int_equal(number_at(root, "count"), 0);
    assert_null(at(root, "token_strs"));
    json_decref(root);
}

static void messages_are_rendered(void **state) {
    (void)state;
    json_t *rendered = ask_ok("/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}");
    json_t *text =
        ask_ok("/tokenize", "{\"prompt\":\"<|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n\"}");
    assert_true(number_at(rendered, "count") > 5);
    assert_true(json_equal(rendered, text));
    json_decref(rendered);
    json_decref(text);
}

static void content_takes_llama_cpps_options(void **state) {
    (void)state;
    json_t *parsed = ask_ok("/tokenize", "{\"content\":\"<|im_end|>\"}");
    assert_int_equal(json_array_size(at(parsed, "tokens")), 1);
    assert_null(at(parsed, "count"));
    json_t *plain = ask_ok("/tokenize", "{\"content\":\"<|im_end|>\",\"parse_special\":false}");
    assert_true(json_array_size(at(plain, "tokens")) > 5);
    json_t *pieces = ask_ok("/tokenize", "{\"content\":\"a\xc3\xa9\",\"with_pieces\":true}");
    assert_int_equal(json_array_size(at(pieces, "tokens")), 3); // no merge makes one of the two bytes of e acute
    assert_string_equal(text_at(pieces, "tokens/0/piece"), "a");
    assert_int_equal(number_at(pieces, "tokens/1/piece/0"), 0xc3);
    assert_int_equal(number_at(pieces, "tokens/2/piece/0"), 0xa9);
    json_decref(parsed);
    json_decref(plain);
    json_decref(pieces);
}

static void tokens_become_their_text_again(void **state) {
    (void)state;
    static const char text[] = "the caf\xc3\xa9<|im_end|>";
    json_t *tokens = ask_ok("/tokenize", "{\"content\":\"the caf\xc3\xa9<|im_end|>\"}");
    char *body = json_dumps(tokens, 0);
    json_t *root = ask_ok("/detokenize", body);
    assert_string_equal(text_at(root, "prompt"), text);
    assert_string_equal(text_at(root, "content"), text);
    free(body);
    json_decref(root);
    json_decref(tokens);
    root = ask_ok("/detokenize", "{\"tokens\":[]}");
    assert_string_equal(text_at(root, "content"), "");
    json_decref(root);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_prompt_is_tokenized_as_in_a_request),
        cmocka_unit_test(messages_are_rendered),
        cmocka_unit_test(content_takes_llama_cpps_options),
        cmocka_unit_test(tokens_become_their_text_again),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
