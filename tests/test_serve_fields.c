/* What the fields of a request do: sampling, stops, documents and chunks, scopes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "support/replies.h"
#include "support/server.h"

static const char chat[] = "/v1/chat/completions", completions[] = "/v1/completions";

/* `format` makes a body. */
static json_t *ask_for(const char *path, const char *format, ...) {
    char body[8192];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(body, sizeof body, format, args);
    va_end(args);
    assert_true(n > 0 && (size_t)n < sizeof body);
    return http_ask_json(port, "POST", path, body, 200);
}

#define GREEDY "\"prompt\":\"once upon\",\"temperature\":0,\"max_tokens\":40,\"ignore_eos\":true"

/* ---- Sampling ---------------------------------------------------------------------------------------------------- */

static void a_seed_gives_the_same_reply(void **state) {
    (void)state;
    static const char format[] = "{\"prompt\":\"x\",\"max_tokens\":30,\"ignore_eos\":true,\"seed\":%d}";
    json_t *a = ask_for(completions, format, 5), *b = ask_for(completions, format, 5),
           *c = ask_for(completions, format, 6);
    assert_true(json_equal(at(a, "choices"), at(b, "choices")));
    assert_false(json_equal(at(a, "choices"), at(c, "choices")));
    json_decref(a);
    json_decref(b);
    json_decref(c);
}

static void without_a_seed_replies_differ(void **state) {
    (void)state;
    json_t *a = ask_for(completions, "{\"prompt\":\"x\",\"max_tokens\":30,\"ignore_eos\":true}");
    json_t *b = ask_for(completions, "{\"prompt\":\"x\",\"max_tokens\":30,\"ignore_eos\":true}");
    assert_false(json_equal(at(a, "choices"), at(b, "choices")));
    json_decref(a);
    json_decref(b);
}

static void a_bias_decides(void **state) {
    (void)state;
    json_t *root =
        ask_for(completions, "{\"prompt\":\"x\",\"max_tokens\":5,\"temperature\":0,\"logit_bias\":{\"65\":100}}");
    char byte[8];
    size_t n;
    const int32_t token = 65;
    assert_int_equal(mepic_detokenize(engine, &token, 1, byte, sizeof byte, &n, NULL), MEPIC_OK);
    assert_int_equal(n, 1);
    char want[6] = { byte[0], byte[0], byte[0], byte[0], byte[0], 0 };
    assert_string_equal(text_at(root, "choices/0/text"), want);
    json_decref(root);
}

static void filters_and_penalties_change_a_reply(void **state) {
    (void)state;
    static const char *const fields[] = { "\"top_k\":1", "\"top_p\":0.01", "\"min_p\":1", "\"top_p\":0",
                                          "\"top_p\":1e-60" };
    json_t *greedy = ask_for(completions, "{" GREEDY "}");
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) { // each leaves the likeliest token only
        json_t *root =
            ask_for(completions, "{\"prompt\":\"once upon\",\"max_tokens\":40,\"ignore_eos\":true,%s}", fields[i]);
        assert_true(json_equal(at(root, "choices"), at(greedy, "choices")));
        json_decref(root);
    }
    static const char *const penalties[] = { "\"presence_penalty\":2", "\"frequency_penalty\":2",
                                             "\"repetition_penalty\":3", "\"repeat_penalty\":3" };
    for (size_t i = 0; i < 4; i++) {
        json_t *root = ask_for(completions, "{" GREEDY ",%s}", penalties[i]);
        assert_false(json_equal(at(root, "choices"), at(greedy, "choices")));
        json_decref(root);
    }
    json_decref(greedy);
}

/* ---- Ends -------------------------------------------------------------------------------------------------------- */

static void a_stop_ends_a_reply(void **state) {
    (void)state;
    json_t *whole = ask_for(completions, "{" GREEDY ",\"logprobs\":0}");
    /* The first token from the tenth on that can stand in a JSON string. */
    const char *stop = NULL;
    size_t i = 10;
    for (; !stop; i++) {
        const char *token = json_string_value(json_array_get(at(whole, "choices/0/logprobs/tokens"), i));
        assert_non_null(token);
        if (strlen(token) == 1 && strchr("\"\\", token[0]) == NULL && token[0] > ' ' && token[0] < 0x7f) stop = token;
    }
    const char *text = text_at(whole, "choices/0/text"), *end = strstr(text, stop);
    assert_non_null(end);
    for (int array = 0; array < 2; array++) {
        json_t *root = ask_for(
            completions, array ? "{" GREEDY ",\"stop\":[\"never\",\"%s\"]}" : "{" GREEDY ",\"stop\":\"%s\"}", stop);
        assert_string_equal(text_at(root, "choices/0/finish_reason"), "stop");
        assert_int_equal(json_string_length(at(root, "choices/0/text")), end - text);
        assert_memory_equal(text_at(root, "choices/0/text"), text, (size_t)(end - text));
        json_decref(root);
    }
    json_decref(whole);
}

static void a_stop_token_ends_a_reply(void **state) {
    (void)state;
    json_t *root =
        ask_for(completions, "{\"prompt\":\"x\",\"max_tokens\":9,\"temperature\":0,\"logit_bias\":{\"65\":100},"
                             "\"stop_token_ids\":[64,65]}");
    assert_string_equal(text_at(root, "choices/0/finish_reason"), "stop");
    assert_string_equal(text_at(root, "choices/0/text"), "");
    assert_int_equal(number_at(root, "usage/completion_tokens"), 1);
    json_decref(root);
}

static void lengths_are_kept(void **state) {
    (void)state;
    json_t *both = ask_for(chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"ignore_eos\":true,"
                                 "\"max_tokens\":9,\"max_completion_tokens\":4}");
    assert_int_equal(number_at(both, "usage/completion_tokens"), 4);
    json_decref(both);
    json_t *completion = ask_for(completions, "{\"prompt\":\"x\",\"ignore_eos\":true}");
    assert_int_equal(number_at(completion, "usage/completion_tokens"), 16);
    json_decref(completion);
    json_t *full = ask_for(chat, "{\"messages\":[{\"role\":\"developer\",\"content\":\"x\"}],\"ignore_eos\":true}");
    assert_int_equal(number_at(full, "usage/total_tokens"), 512);
    json_decref(full);
}

/* ---- Documents --------------------------------------------------------------------------------------------------- */

static const char *long_text(char letter) {
    static char text[600];
    size_t n = 0;
    for (int i = 0; i < 60; i++) n += (size_t)snprintf(text + n, sizeof text - n, "word%d %c ", i, letter);
    return text;
}

static json_int_t detail(const json_t *root, const char *name) {
    return number_at(at(root, "usage/prompt_tokens_details"), name);
}

#define ASK "\"max_tokens\":12,\"temperature\":0,\"ignore_eos\":true"
#define QUESTION "\"messages\":[{\"role\":\"user\",\"content\":\"What?\"}]," ASK

/* The same document in every way there is: one set of pages. */
static void a_document_is_the_same_chunk_in_every_shape(void **state) {
    (void)state;
    static const char *const shapes[] = {
        "{\"documents\":[\"The title\\n%s\"]," QUESTION "}",
        "{\"documents\":[\"The title\\n%s\\n\\n\"]," QUESTION "}",
        "{\"documents\":[{\"title\":\"The title\",\"text\":\"%s\"}]," QUESTION "}",
        "{\"documents\":[{\"text\":\"%s\",\"title\":\"The title\"}]," QUESTION "}",
        "{\"documents\":[{\"id\":\"7\",\"data\":{\"title\":\"The title\",\"snippet\":\"%s\"}}]," QUESTION "}",
        "{\"documents\":[{\"id\":\"8\",\"data\":\"The title\\n%s\"}]," QUESTION "}",
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Document "
        "1:\\n\"},{\"type\":\"text\","
        "\"text\":\"The title\\n%s\",\"mepic\":{\"chunk\":true}},{\"type\":\"text\",\"text\":\"\\n\\nQuestion: "
        "What?\"}]}]," ASK "}",
        "{\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\"The title\\n%s\",\"mepic\":"
        "{\"chunk\":true}}]},{\"role\":\"user\",\"content\":\"What?\"}]," ASK "}",
    };
    json_t *first = NULL;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        json_t *root = ask_for(chat, shapes[i], long_text('a'));
        assert_int_equal(detail(root, "compiled_tokens") > 0, i == 0);
        assert_int_equal(detail(root, "chunk_tokens") > 100, i > 0);
        assert_int_equal(detail(root, "cached_tokens"), detail(root, "prefix_tokens") + detail(root, "chunk_tokens"));
        /* All but the last are the same prompt. */
        if (first && i < 7) assert_true(json_equal(at(root, "choices"), at(first, "choices")));
        if (first)
            json_decref(root);
        else
            first = root;
    }
    json_decref(first);
    json_t *text =
        ask_for(completions, "{\"documents\":[\"The title\\n%s\"],\"prompt\":\"What?\"," ASK "}", long_text('a'));
    assert_true(detail(text, "chunk_tokens") > 100);
    json_decref(text);
}

static void a_mark_can_be_taken_back(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        json_t *none = ask_for(chat, "{\"documents\":[\"%s\"],\"reuse\":\"none\"," QUESTION "}", long_text('b'));
        assert_int_equal(detail(none, "cached_tokens"), 0);
        json_decref(none);
        json_t *prefix = ask_for(chat, "{\"documents\":[\"%s\"],\"reuse\":\"prefix\"," QUESTION "}", long_text('b'));
        assert_int_equal(detail(prefix, "chunk_tokens"), 0);
        assert_int_equal(detail(prefix, "prefix_tokens") > 100, i == 1);
        json_decref(prefix);
        json_t *uncached = ask_for(chat,
                                   "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"%s\","
                                   "\"mepic\":{\"chunk\":true,\"cache\":false}}]}]," ASK "}",
                                   long_text('c'));
        assert_int_equal(detail(uncached, "chunk_tokens") + detail(uncached, "compiled_tokens"), 0);
        json_decref(uncached);
    }
}

static void special_tokens_are_text_in_messages(void **state) {
    (void)state;
    json_t *said = ask_for(chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"<|im_end|>\"}],\"max_tokens\":1}");
    json_t *raw = ask_for(completions, "{\"prompt\":\"<|im_end|>\",\"max_tokens\":1}");
    assert_int_equal(number_at(raw, "usage/prompt_tokens"), 1);
    assert_true(number_at(said, "usage/prompt_tokens") > 15);
    json_decref(said);
    json_decref(raw);
}

/* ---- Keys -------------------------------------------------------------------------------------------------------- */

static json_int_t chunk_tokens_with(const char *key, const char *body) {
    char headers[128];
    http_reply reply;
    snprintf(headers, sizeof headers, "Authorization: Bearer %s\r\n", key);
    assert_int_equal(http_ask(port, "POST", chat, headers, body, &reply), 200);
    json_t *root = json_loads(reply.body, JSON_ALLOW_NUL, NULL);
    assert_non_null(root);
    json_int_t n = detail(root, "chunk_tokens");
    json_decref(root);
    http_reply_clear(&reply);
    return n;
}

static void a_key_sees_its_own_chunks_only(void **state) {
    (void)state;
    char body[2048];
    mp_keys *keys = keys_of("first-key\nsecond-key\n");
    stop();
    mp_server_options options = default_options();
    options.keys = keys;
    start(&options);
    snprintf(body, sizeof body, "{\"documents\":[\"%s\"]," QUESTION "}", long_text('d'));
    assert_int_equal(chunk_tokens_with("first-key", body), 0);
    assert_true(chunk_tokens_with("first-key", body) > 100);
    assert_int_equal(chunk_tokens_with("second-key", body), 0);
    assert_true(chunk_tokens_with("second-key", body) > 100);
    stop();
    mp_keys_free(keys);
    options.keys = NULL;
    start(&options);
}

static mepic_status read_public(const char *text, mp_public **out, mepic_error *err) {
    const char *path = text_file(text);
    mepic_status status = mp_public_read(path, out, err);
    unlink(path);
    return status;
}

/* As sha256sum prints it. */
static void hash_text(const char *text, char out[MP_DIGEST_DIGITS + 1]) {
    mp_sha256 *sha = mp_sha256_open();
    assert_non_null(sha);
    mp_sha256_begin(sha);
    mp_sha256_update(sha, text, strlen(text));
    mp_digest digest = mp_sha256_end(sha);
    mp_sha256_close(sha);
    mp_digest_write(&digest, out);
}

static void public_documents_are_shared_by_all_keys(void **state) {
    (void)state;
    char hash[65], titled_hash[65], titled[1024], list[512], body[2048];
    hash_text(long_text('p'), hash);
    snprintf(titled, sizeof titled, "Name\n%s", long_text('q'));
    hash_text(titled, titled_hash);
    snprintf(list, sizeof list, "# hashes\n\n%s  first.txt\n  %s\n", hash, titled_hash);
    mp_keys *keys = keys_of("first-key\nsecond-key\n");
    mp_public *public_documents;
    assert_int_equal(read_public(list, &public_documents, NULL), MEPIC_OK);
    stop();
    mp_server_options options = default_options();
    options.keys = keys;
    options.public_documents = public_documents;
    start(&options);
    const struct {
        const char *document;
        char letter; /* of its text */
        bool is_public;
    } rounds[] = {
        { "\"%s\\n\"", 'p', true }, // newlines at the end do not count
        { "{\"title\":\"Name\",\"text\":\"%s\"}", 'q', true },
        { "\"%s\"", 'q', false }, // without its title it is another text
        { "\"%s\"", 'r', false },
    };
    for (size_t i = 0; i < 4; i++) {
        char quoted[1024];
        snprintf(quoted, sizeof quoted, rounds[i].document, long_text(rounds[i].letter));
        snprintf(body, sizeof body, "{\"documents\":[%s]," QUESTION "}", quoted);
        assert_int_equal(chunk_tokens_with("first-key", body), 0);
        assert_int_equal(chunk_tokens_with("second-key", body) > 100, rounds[i].is_public);
        assert_true(chunk_tokens_with("second-key", body) > 100);
    }
    stop();
    mp_keys_free(keys);
    mp_public_free(public_documents);
    options.keys = NULL;
    options.public_documents = NULL;
    start(&options);
}

static void bad_lists_of_public_documents_are_refused(void **state) {
    (void)state;
    char hash[65], text[256];
    mepic_error err;
    mp_public *list;
    hash_text("x", hash);
    static const char *const formats[] = { "%s\n%.63s\n", "%s\n%s0\n", "%s\n%.63sg\n", "%s\nsha256:%s\n" };
    for (size_t i = 0; i < 4; i++) {
        snprintf(text, sizeof text, formats[i], hash, hash);
        assert_int_equal(read_public(text, &list, &err), MEPIC_ERR_ARGUMENT);
        if (!strstr(err.message, "line 2")) fail_msg("no line in: %s", err.message);
    }
    assert_int_equal(mp_public_read("/nonexistent", &list, &err), MEPIC_ERR_IO);
    assert_int_equal(read_public("# none\n", &list, &err), MEPIC_OK);
    assert_false(mp_public_has(list, "x", 1));
    mp_public_free(list);
    assert_int_equal(read_public(hash, &list, &err), MEPIC_OK);
    assert_true(mp_public_has(list, "x\n\n", 3));
    assert_false(mp_public_has(list, "x ", 2));
    mp_public_free(list);
}

/* ---- Unknown fields ---------------------------------------------------------------------------------------------- */

typedef struct noted {
    pthread_mutex_t lock;
    uint32_t n;
    char last[1024];
} noted;

static void note(void *user, mepic_log_level level, const char *message) {
    noted *log = user;
    if (level > MEPIC_LOG_WARN) return;
    pthread_mutex_lock(&log->lock);
    log->n++;
    snprintf(log->last, sizeof log->last, "%s", message);
    pthread_mutex_unlock(&log->lock);
}

/* Clients send what they do not use, too. */
static void a_refused_field_may_ask_for_nothing(void **state) {
    (void)state;
    static const char *const fine[] = { "\"best_of\":1",       "\"min_tokens\":0", "\"bad_words\":[]",
                                        "\"suffix\":\"\"",     "\"echo\":false",   "\"guided_regex\":\"\"",
                                        "\"guided_json\":null" };
    static const char *const refused[] = { "\"best_of\":2",         "\"best_of\":0",         "\"min_tokens\":1",
                                           "\"bad_words\":[\"a\"]", "\"suffix\":\"a\"",      "\"echo\":true",
                                           "\"guided_json\":{}",    "\"prompt_logprobs\":0", "\"allowed_token_ids\":[]",
                                           "\"min_tokens\":{}",     "\"guided_json\":\"\"" };
    for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
        json_decref(ask_for(completions, "{\"prompt\":\"x\",\"max_tokens\":1,%s}", fine[i]));
    }
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char body[128];
        snprintf(body, sizeof body, "{\"prompt\":\"x\",\"max_tokens\":1,%s}", refused[i]);
        json_decref(http_ask_json(port, "POST", completions, body, 400));
    }
}

static void unknown_fields_are_one_line_of_log(void **state) {
    (void)state;
    noted log = { .lock = PTHREAD_MUTEX_INITIALIZER };
    stop();
    mp_server_options options = default_options();
    options.log = (mp_log){ .write = note, .user = &log };
    start(&options);
    json_decref(ask_for(chat,
                        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":1,\"colour\":\"red\","
                        "\"user\":\"me\",\"line\\nbreak\":1,\"stream_options\":{\"speed\":1}}"));
    stop();
    assert_int_equal(log.n, 1);
    assert_non_null(strstr(log.last, "colour"));
    assert_non_null(strstr(log.last, "stream_options.speed"));
    assert_null(strstr(log.last, "user"));
    assert_null(strchr(log.last, '\n'));
    static const char *const others[][2] = {
        { "/tokenize", "{\"content\":\"x\",\"color\":1,\"colour\":1}" },
        { "/detokenize", "{\"tokens\":[],\"colour\":1}" },
        { "/v1/messages", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":1,\"colour\":1}" },
        { "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":1,\"colour\":1}" },
    };
    for (uint32_t i = 0; i < 4; i++) {
        log.last[0] = 0;
        start(&options);
        json_decref(http_ask_json(port, "POST", others[i][0], others[i][1], 200));
        stop();
        assert_int_equal(log.n, i + 2);
        assert_non_null(strstr(log.last, "colour"));
    }
    options.log = (mp_log){ 0 };
    start(&options);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_seed_gives_the_same_reply, setup, teardown),
        cmocka_unit_test_setup_teardown(without_a_seed_replies_differ, setup, teardown),
        cmocka_unit_test_setup_teardown(a_bias_decides, setup, teardown),
        cmocka_unit_test_setup_teardown(filters_and_penalties_change_a_reply, setup, teardown),
        cmocka_unit_test_setup_teardown(a_stop_ends_a_reply, setup, teardown),
        cmocka_unit_test_setup_teardown(a_stop_token_ends_a_reply, setup, teardown),
        cmocka_unit_test_setup_teardown(lengths_are_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(a_document_is_the_same_chunk_in_every_shape, setup, teardown),
        cmocka_unit_test_setup_teardown(a_mark_can_be_taken_back, setup, teardown),
        cmocka_unit_test_setup_teardown(special_tokens_are_text_in_messages, setup, teardown),
        cmocka_unit_test_setup_teardown(a_key_sees_its_own_chunks_only, setup, teardown),
        cmocka_unit_test_setup_teardown(public_documents_are_shared_by_all_keys, setup, teardown),
        cmocka_unit_test(bad_lists_of_public_documents_are_refused),
        cmocka_unit_test_setup_teardown(a_refused_field_may_ask_for_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(unknown_fields_are_one_line_of_log, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
