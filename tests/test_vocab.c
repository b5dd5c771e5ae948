/* tokenizer/vocab: what is refused, special tokens against a plain search, bytes of tokens, ends of replies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "support/random.h"
#include "support/vocab.h"
#include "tokenizer/tokenizer.h"
#include "tools/synth_vocab.h"

enum { SEED = 20261124 };

/* Opens the file as a tokenizer; it must be refused, and the message must contain `word`. Clears the file. */
static void expect_refused(vocab_file *file, unsigned arrays, mepic_status status, const char *word) {
    mp_gguf *gguf = vocab_open(file, arrays);
    mp_tokenizer *tokenizer = NULL;
    mepic_error err = { 0 };
    mepic_status got = mp_tokenizer_open(gguf, &tokenizer, &err);
    if (got != status || !strstr(err.message, word)) {
        fail_msg("%s, \"%s\"; expected %s with \"%s\"", mepic_status_name(got), err.message, mepic_status_name(status),
                 word);
    }
    assert_int_equal(err.status, status);
    assert_null(tokenizer);
    mp_gguf_close(gguf);
    vocab_clear(file);
}

static void begin_bpe(vocab_file *file) {
    vocab_begin(file, "gpt2", "qwen2");
    vocab_byte_symbols(file);
}

static void begin_spm(vocab_file *file) {
    vocab_begin(file, "llama", NULL);
    vocab_byte_tokens(file);
}

static void other_kinds_are_refused_by_name(void **state) {
    (void)state;
    vocab_file file;
    vocab_begin(&file, "bert", NULL);
    vocab_token(&file, "a", 1, MP_TOKEN_NORMAL, 0);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_UNSUPPORTED, "\"bert\"");
    vocab_begin(&file, "gpt2", "tekken");
    vocab_byte_symbols(&file);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_UNSUPPORTED, "\"tekken\" is not supported; these are: llama-bpe");
}

static void missing_arrays_are_refused(void **state) {
    (void)state;
    vocab_file file;
    begin_bpe(&file);
    expect_refused(&file, VOCAB_ALL & ~VOCAB_TOKENS, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens is missing");
    begin_bpe(&file);
    expect_refused(&file, VOCAB_ALL & ~VOCAB_MERGES, MEPIC_ERR_FORMAT, "tokenizer.ggml.merges");
    begin_spm(&file);
    expect_refused(&file, VOCAB_ALL & ~VOCAB_SCORES, MEPIC_ERR_FORMAT, "tokenizer.ggml.scores");
}

/* V4: every array with every other element type, and with one element more or less. */
static void wrong_arrays_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *key;
        unsigned array;
        mp_gguf_type type;
        bool per_token;
    } columns[] = { { "tokenizer.ggml.tokens", VOCAB_TOKENS, MP_GGUF_STRING, false },
                    { "tokenizer.ggml.token_type", VOCAB_TYPES, MP_GGUF_I32, true },
                    { "tokenizer.ggml.scores", VOCAB_SCORES, MP_GGUF_F32, true },
                    { "tokenizer.ggml.merges", VOCAB_MERGES, MP_GGUF_STRING, false } };
    static const size_t bytes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8 }; /* of an element; a string: its length */
    for (size_t c = 0; c < sizeof columns / sizeof columns[0]; c++) {
        for (int type = 0; type < 13; type++) {
            for (int more = -1; more <= 1; more++) {
                bool right = type == (int)columns[c].type && (more == 0 || !columns[c].per_token);
                if (type == MP_GGUF_ARRAY || right) continue;
                vocab_file file;
                if (columns[c].array == VOCAB_MERGES) {
                    begin_bpe(&file);
                } else {
                    begin_spm(&file);
                }
                uint64_t n = (uint64_t)((int64_t)file.n_tokens + more);
                vocab_array(&file, columns[c].key, (mp_gguf_type)type, n);
                for (uint64_t i = 0; i < n * bytes[type]; i++) assert_true(mp_buf_append(&file.keys, "", 1));
                expect_refused(&file, VOCAB_ALL & ~columns[c].array, MEPIC_ERR_FORMAT, columns[c].key);
            }
        }
    }
}

static void wrong_values_are_refused(void **state) {
    (void)state;
    vocab_file file;
    begin_bpe(&file);
    vocab_token(&file, "x", 1, (mp_token_type)7, 0);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.token_type[256] is 7");
    begin_bpe(&file);
    vocab_token(&file, "x", 1, (mp_token_type)-1, 0);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.token_type[256] is -1");
    begin_spm(&file);
    vocab_token(&file, "x", 1, MP_TOKEN_NORMAL, NAN);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.scores[256]");
    static char big[MP_TOKEN_TEXT_MAX + 1];
    memset(big, 'x', sizeof big);
    begin_bpe(&file);
    vocab_token(&file, big, sizeof big, MP_TOKEN_NORMAL, 0);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens[256] has 4097 bytes");
    static const char *const keys[] = { "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                        "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.eot_token_id",
                                        "tokenizer.ggml.eom_token_id" };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        begin_bpe(&file);
        vocab_u32(&file, keys[i], i ? 256 : UINT32_MAX);
        expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, keys[i]);
    }
    begin_bpe(&file);
    vocab_bool(&file, "tokenizer.ggml.add_bos_token", true);
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "bos_token_id is missing");
    begin_bpe(&file);
    vocab_string(&file, "tokenizer.ggml.add_bos_token", "yes");
    expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.add_bos_token");
}

/* V5: a byte token is "<0x", two hexadecimal digits, ">", and nothing else. */
static void byte_tokens_are_read_strictly(void **state) {
    (void)state;
    static const char *const bad[] = { "<0x-1>", "<0x4>",  "<0x004>", "<0xGG>", "<0X41>",  "<0x41",    "0x41>",
                                       "",       "<0x 1>", "<0x+1>",  "A",      "<0x41>x", "<0x4\xff>" };
    vocab_file file;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        begin_spm(&file);
        vocab_token(&file, bad[i], strlen(bad[i]), MP_TOKEN_BYTE, 0);
        expect_refused(&file, VOCAB_ALL, MEPIC_ERR_FORMAT, "tokenizer.ggml.tokens[256] is a byte token");
    }
    begin_spm(&file);
    uint32_t lower = vocab_token(&file, "<0xaf>", 6, MP_TOKEN_BYTE, 0);
    mp_gguf *gguf = vocab_open(&file, VOCAB_ALL);
    mp_vocab vocab;
    assert_int_equal(mp_vocab_open(gguf, &vocab, NULL), MEPIC_OK);
    mp_str bytes = mp_vocab_bytes(&vocab, (int32_t)lower);
    assert_int_equal(bytes.len, 1);
    assert_int_equal((uint8_t)bytes.data[0], 0xAF);
    assert_int_equal(vocab.byte_ids[0xAF], 0xAF); /* the usual spelling is the one that is used */
    mp_vocab_clear(&vocab);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

/* Bytes that SPM has no token for: the plain character, then the unknown token. */
static void missing_bytes_fall_back(void **state) {
    (void)state;
    vocab_file file;
    vocab_begin(&file, "llama", NULL);
    vocab_token(&file, "<unk>", 5, MP_TOKEN_UNKNOWN, 0);
    vocab_token(&file, "<s>", 3, MP_TOKEN_CONTROL, 0);
    vocab_token(&file, "a", 1, MP_TOKEN_NORMAL, 0);
    vocab_token(&file, "<0x62>", 6, MP_TOKEN_BYTE, 0);
    mp_gguf *gguf = vocab_open(&file, VOCAB_ALL);
    mp_vocab vocab;
    assert_int_equal(mp_vocab_open(gguf, &vocab, NULL), MEPIC_OK);
    assert_int_equal(vocab.byte_ids['a'], 2);
    assert_int_equal(vocab.byte_ids['b'], 3);
    assert_int_equal(vocab.byte_ids['c'], 0);
    assert_int_equal(vocab.bos, 1); /* what files without the keys mean */
    assert_int_equal(vocab.eos, 2);
    assert_true(vocab.add_bos && vocab.space_prefix);
    mp_vocab_clear(&vocab);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

static void of_equal_texts_the_first_is_found(void **state) {
    (void)state;
    vocab_file file;
    begin_bpe(&file);
    uint32_t first = vocab_token(&file, "<x>", 3, MP_TOKEN_CONTROL, 0);
    uint32_t second = vocab_token(&file, "<x>", 3, MP_TOKEN_CONTROL, 0);
    uint32_t empty = vocab_token(&file, "", 0, MP_TOKEN_CONTROL, 0);
    mp_gguf *gguf = vocab_open(&file, VOCAB_ALL);
    mp_vocab vocab;
    assert_int_equal(mp_vocab_open(gguf, &vocab, NULL), MEPIC_OK);
    size_t match = 0;
    assert_int_equal(mp_vocab_find(&vocab, "<x>", 3), first);
    assert_int_equal(mp_vocab_special(&vocab, "<x>", 3, true, &match), first);
    assert_int_equal(match, 3);
    assert_int_equal(mp_vocab_bytes(&vocab, (int32_t)second).len, 3);
    assert_int_equal(mp_vocab_bytes(&vocab, (int32_t)empty).len, 0);
    assert_int_equal(mp_vocab_find(&vocab, "", 0), -1);
    mp_vocab_clear(&vocab);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

/* Known ends are found by text, become control tokens whatever the file says, and user text never gives one. */
static void replies_end_at_known_tokens(void **state) {
    (void)state;
    vocab_file file;
    begin_bpe(&file);
    uint32_t turn = vocab_token(&file, "<|im_end|>", 10, MP_TOKEN_NORMAL, 0);
    uint32_t prefix = vocab_token(&file, "<|fim_prefix|>", 14, MP_TOKEN_NORMAL, 0);
    uint32_t eos = vocab_token(&file, "<done>", 6, MP_TOKEN_CONTROL, 0);
    uint32_t eot = vocab_token(&file, "<over>", 6, MP_TOKEN_CONTROL, 0);
    uint32_t other = vocab_token(&file, "<other>", 7, MP_TOKEN_CONTROL, 0);
    vocab_u32(&file, "tokenizer.ggml.eos_token_id", eos);
    vocab_u32(&file, "tokenizer.ggml.eot_token_id", eot);
    mp_gguf *gguf = vocab_open(&file, VOCAB_ALL);
    mp_tokenizer *t;
    assert_int_equal(mp_tokenizer_open(gguf, &t, NULL), MEPIC_OK);
    assert_true(mp_tokenizer_ends(t, (int32_t)turn) && mp_tokenizer_ends(t, (int32_t)eos));
    assert_true(mp_tokenizer_ends(t, (int32_t)eot));
    assert_false(mp_tokenizer_ends(t, (int32_t)prefix) || mp_tokenizer_ends(t, (int32_t)other));
    assert_false(mp_tokenizer_ends(t, -1) || mp_tokenizer_ends(t, 1 << 20) || mp_tokenizer_ends(t, 'a'));
    mp_tokens ids = { 0 };
    assert_int_equal(mp_tokenize(t, "<|im_end|>", 10, false, false, &ids, NULL), MEPIC_OK);
    assert_int_equal(ids.n, 10);
    assert_int_equal(mp_tokenize(t, "<|im_end|>", 10, false, true, &ids, NULL), MEPIC_OK);
    assert_int_equal(ids.n, 11);
    assert_int_equal(ids.ids[10], turn);
    assert_int_equal(mp_tokenizer_bytes(t, (int32_t)turn, false).len, 0);
    assert_int_equal(mp_tokenizer_bytes(t, (int32_t)turn, true).len, 10);
    mp_free(ids.ids);
    mp_tokenizer_close(t);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

/* Random special tokens over two letters, so that they begin with one another: the longest one counts. */
static void the_longest_special_token_is_found(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    for (int round = 0; round < 200; round++) {
        vocab_file file;
        begin_bpe(&file);
        char texts[40][12];
        mp_token_type types[40];
        uint32_t n = 1 + rng_below(&random, 40);
        for (uint32_t i = 0; i < n; i++) {
            static const mp_token_type kinds[] = { MP_TOKEN_CONTROL, MP_TOKEN_USER_DEFINED, MP_TOKEN_UNKNOWN,
                                                   MP_TOKEN_NORMAL };
            size_t len = 2 + rng_below(&random, 9);
            for (size_t k = 0; k < len; k++) texts[i][k] = rng_below(&random, 2) ? 'A' : '\xff';
            texts[i][len] = 0;
            types[i] = kinds[rng_below(&random, 4)];
            vocab_token(&file, texts[i], len, types[i], 0);
        }
        mp_gguf *gguf = vocab_open(&file, VOCAB_ALL);
        mp_vocab vocab;
        assert_int_equal(mp_vocab_open(gguf, &vocab, NULL), MEPIC_OK);
        for (int k = 0; k < 200; k++) {
            char text[16];
            size_t len = rng_below(&random, sizeof text), got_match = 0, want_match = 0;
            bool controls = rng_below(&random, 2);
            for (size_t i = 0; i < len; i++) text[i] = rng_below(&random, 2) ? 'A' : '\xff';
            int32_t want = -1;
            for (uint32_t i = 0; i < n; i++) {
                size_t size = strlen(texts[i]);
                bool first = mp_vocab_find(&vocab, texts[i], size) == (int32_t)(256 + i);
                bool counts = types[i] == MP_TOKEN_USER_DEFINED || (controls && types[i] != MP_TOKEN_NORMAL);
                if (first && counts && size <= len && size > want_match && memcmp(text, texts[i], size) == 0) {
                    want = (int32_t)(256 + i);
                    want_match = size;
                }
            }
            int32_t got = mp_vocab_special(&vocab, text, len, controls, &got_match);
            assert_int_equal(got, want);
            if (want >= 0) assert_int_equal(got_match, want_match);
        }
        mp_vocab_clear(&vocab);
        mp_gguf_close(gguf);
        vocab_clear(&file);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(other_kinds_are_refused_by_name),    cmocka_unit_test(missing_arrays_are_refused),
        cmocka_unit_test(wrong_arrays_are_refused),           cmocka_unit_test(wrong_values_are_refused),
        cmocka_unit_test(byte_tokens_are_read_strictly),      cmocka_unit_test(missing_bytes_fall_back),
        cmocka_unit_test(of_equal_texts_the_first_is_found),  cmocka_unit_test(replies_end_at_known_tokens),
        cmocka_unit_test(the_longest_special_token_is_found),
    };
    printf("seed %d\n", SEED);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
