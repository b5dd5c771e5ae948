/* tokenizer/: text with special tokens, what is put around it, text back from tokens, long runs, memory that fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/random.h"
#include "support/vocab.h"
#include "tokenizer/tokenizer.h"

enum { SEED = 20261124 };

typedef struct fixture {
    vocab_file file;
    mp_gguf *gguf;
    mp_tokenizer *t;
} fixture;

static void open_fixture(fixture *f) {
    f->gguf = vocab_open(&f->file, VOCAB_ALL);
    mepic_error err = { 0 };
    if (mp_tokenizer_open(f->gguf, &f->t, &err)) fail_msg("%s", err.message);
}

static void close_fixture(fixture *f) {
    mp_tokenizer_close(f->t);
    mp_gguf_close(f->gguf);
    vocab_clear(&f->file);
}

enum { TURN = 256, TURN_LONG, TOOL, UNKNOWN }; /* special tokens of the BPE fixture */

static void begin_bpe(fixture *f, const char *pre) {
    vocab_begin(&f->file, "gpt2", pre);
    vocab_byte_symbols(&f->file);
    vocab_token(&f->file, "<turn>", 6, MP_TOKEN_CONTROL, 0);
    vocab_token(&f->file, "<turn><end>", 11, MP_TOKEN_CONTROL, 0);
    vocab_token(&f->file, "<tool>", 6, MP_TOKEN_USER_DEFINED, 0);
    vocab_token(&f->file, "<unk>", 5, MP_TOKEN_UNKNOWN, 0);
}

static void expect(const mp_tokenizer *t, const char *text, bool add_special, bool parse_special, const int32_t *want,
                   size_t n) {
    mp_tokens got = { 0 };
    assert_int_equal(mp_tokenize(t, text, strlen(text), add_special, parse_special, &got, NULL), MEPIC_OK);
    bool equal = got.n == n && (n == 0 || memcmp(got.ids, want, n * sizeof *want) == 0);
    for (size_t i = 0; !equal && i < got.n; i++) fprintf(stderr, " %d", got.ids[i]);
    if (!equal) fail_msg("\n\"%s\" gives other ids", text);
    mp_free(got.ids);
}
#define EXPECT(t, text, add, parse, ...)                                                                               \
    expect(t, text, add, parse, (const int32_t[]){ __VA_ARGS__ }, sizeof((const int32_t[]){ __VA_ARGS__ }) / 4)

/* ---- Special tokens, BOS, EOS, spaces ---------------------------------------------------------------------------- */

static void special_tokens_are_parsed_on_demand(void **state) {
    (void)state;
    fixture f;
    begin_bpe(&f, "gpt-2");
    open_fixture(&f);
    assert_string_equal(mp_tokenizer_kind(f.t), "bpe/gpt-2");
    assert_int_equal(mp_tokenizer_n_vocab(f.t), 260);
    assert_int_equal(mp_tokenizer_bos(f.t), -1);
    EXPECT(f.t, "a<turn>b", false, true, 'a', TURN, 'b');
    EXPECT(f.t, "<turn><turn>", true, true, TURN, TURN);
    EXPECT(f.t, "<turn><end><turn", false, true, TURN_LONG, '<', 't', 'u', 'r', 'n');
    EXPECT(f.t, "<turn><en", false, true, TURN, '<', 'e', 'n');
    EXPECT(f.t, "<<tool>><unk>", false, true, '<', TOOL, '>', UNKNOWN);
    EXPECT(f.t, "<turn><tool><unk>", false, false, '<', 't', 'u', 'r', 'n', '>', TOOL, '<', 'u', 'n', 'k', '>');
    close_fixture(&f);
}

static void bos_is_added_on_demand_and_eos_never(void **state) {
    (void)state;
    fixture f;
    begin_bpe(&f, "llama-bpe"); /* adds BOS unless the file says no */
    vocab_u32(&f.file, "tokenizer.ggml.bos_token_id", TURN);
    vocab_u32(&f.file, "tokenizer.ggml.eos_token_id", TOOL);
    vocab_bool(&f.file, "tokenizer.ggml.add_eos_token", true);
    open_fixture(&f);
    assert_true(mp_tokenizer_adds_bos(f.t));
    EXPECT(f.t, "a", true, false, TURN, 'a'); /* a prompt goes on */
    EXPECT(f.t, "", true, false, TURN);
    EXPECT(f.t, "a", false, false, 'a');
    close_fixture(&f);
}

enum { BOS = 256, SPM_A, SPM_SPACE_A, SPM_BC, SPM_SPACE };

static void begin_spm(fixture *f) {
    vocab_begin(&f->file, "llama", NULL);
    vocab_byte_tokens(&f->file);
    vocab_token(&f->file, "<s>", 3, MP_TOKEN_CONTROL, 0);
    vocab_token(&f->file, "a", 1, MP_TOKEN_NORMAL, -1);
    vocab_token(&f->file,
                "\xe2\x96\x81"
                "a",
                4, MP_TOKEN_NORMAL, -2);
    vocab_token(&f->file, "bc", 2, MP_TOKEN_NORMAL, -3);
    vocab_token(&f->file, "\xe2\x96\x81", 3, MP_TOKEN_NORMAL, -4);
    vocab_u32(&f->file, "tokenizer.ggml.bos_token_id", BOS);
    vocab_u32(&f->file, "tokenizer.ggml.eos_token_id", BOS);
}

static void sentencepiece_has_its_spaces_and_bytes(void **state) {
    (void)state;
    fixture f;
    begin_spm(&f);
    open_fixture(&f);
    assert_string_equal(mp_tokenizer_kind(f.t), "spm");
    EXPECT(f.t, "abc", true, true, BOS, SPM_SPACE_A, SPM_BC);
    EXPECT(f.t, "abc", false, true, SPM_A, SPM_BC);
    EXPECT(f.t, "a a", false, true, SPM_A, SPM_SPACE_A);
    EXPECT(f.t, "", true, true, BOS);
    EXPECT(f.t, "a<s>a", false, true, SPM_A, BOS, SPM_SPACE_A); /* text after a special token begins with a space */
    EXPECT(f.t, "<s>", false, false, '<', 's', '>');
    EXPECT(f.t, "<0x41>", false, false, '<', '0', 'x', '4', '1', '>'); /* a byte token is never spelled out */
    EXPECT(f.t, "\xe4\xbd\xff", false, false, 0xE4, 0xBD, 0xFF);
    EXPECT(f.t, "x y", false, false, 'x', SPM_SPACE, 'y');
    close_fixture(&f);
    begin_spm(&f);
    vocab_bool(&f.file, "tokenizer.ggml.add_space_prefix", false);
    open_fixture(&f);
    EXPECT(f.t, "abc", true, true, BOS, SPM_A, SPM_BC);
    close_fixture(&f);
}

/* Even where merges lead to a control or byte token: "<s>" and "<0x41>" written by a user stay text. */
static void user_text_never_gives_a_control_token(void **state) {
    (void)state;
    fixture f;
    begin_spm(&f);
    int32_t s = (int32_t)vocab_token(&f.file, "<s", 2, MP_TOKEN_NORMAL, 0), byte = 0;
    for (size_t len = 2; len < 6; len++) byte = (int32_t)vocab_token(&f.file, "<0x41>", len, MP_TOKEN_NORMAL, 0);
    open_fixture(&f);
    EXPECT(f.t, "<s><0x41>", false, false, s, '>', byte, '>');
    close_fixture(&f);
    begin_bpe(&f, "gpt-2");
    int32_t left = (int32_t)vocab_merge(&f.file, "<", 1, "!", 1);
    int32_t control = (int32_t)vocab_token(&f.file, "<!>", 3, MP_TOKEN_CONTROL, 0);
    vocab_merge(&f.file, "<!", 2, ">", 1);
    open_fixture(&f);
    EXPECT(f.t, "<!>", false, false, left, '>');
    EXPECT(f.t, "<!>", false, true, control);
    close_fixture(&f);
}

/* ---- Text from tokens -------------------------------------------------------------------------------------------- */

static bool is_utf8(const char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        uint32_t c = (uint8_t)s[i], more = c < 0x80 ? 0 : c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : c >= 0xC0 ? 1 : 9;
        if (more > 3 || i + more >= n + (more == 0)) return false;
        c &= 0x7Fu >> (more ? more + 1 : 0);
        for (uint32_t k = 1; k <= more; k++) {
            if (((uint8_t)s[i + k] & 0xC0) != 0x80) return false;
            c = c << 6 | ((uint8_t)s[i + k] & 0x3F);
        }
        static const uint32_t smallest[] = { 0, 0x80, 0x800, 0x10000 };
        if (c < smallest[more] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return false;
        i += more + 1;
    }
    return true;
}

static void detokenize_all(const mp_tokenizer *t, const mp_tokens *ids, mp_buf *out) {
    mp_detokenizer state = { 0 };
    for (size_t i = 0; i < ids->n; i++) {
        assert_true(mp_detokenize(t, &state, ids->ids[i], out));
        assert_true(is_utf8(out->data, out->len)); /* at every moment */
    }
    assert_true(mp_detokenize_end(&state, out));
    assert_true(is_utf8(out->data, out->len));
}

/* BPE fixture: token id = byte, so bytes can be streamed one by one. */
static void broken_characters_become_one_replacement_each(void **state) {
    (void)state;
#define R "\xef\xbf\xbd"
    static const struct {
        const char *bytes, *text;
    } cases[] = {
        { "a\xe2\x82\xac"
          "b",
          "a\xe2\x82\xac"
          "b" },
        { "\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80" },
        { "\xe2(", R "(" },
        { "\xe2\x82(", R "(" },
        { "\xed\xa0\x80", R R R },
        { "\xf4\x90\x80\x80", R R R R },
        { "\xc0\xaf", R R },
        { "\xe0\x80\x80", R R R },
        { "\xf0\x9f\x98", R },
        { "\xf0\x9f\xe2\x82\xac", R "\xe2\x82\xac" },
        { "\x80\xff", R R },
        { "\xc3\xc3\xa9", R "\xc3\xa9" },
        { "\xe4\xbd", R },
        { "\xf0\x80\x80", R R R },
    };
    fixture f;
    begin_bpe(&f, "gpt-2");
    open_fixture(&f);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mp_tokens ids = { 0 };
        for (const char *p = cases[i].bytes; *p; p++) assert_true(mp_tokens_push(&ids, (uint8_t)*p));
        mp_buf out = { .limit = 1024 };
        detokenize_all(f.t, &ids, &out);
        assert_int_equal(out.len, strlen(cases[i].text));
        assert_memory_equal(out.data, cases[i].text, out.len);
        mp_buf_clear(&out);
        mp_free(ids.ids);
    }
    rng random = rng_open(SEED);
    for (int round = 0; round < 20000; round++) {
        static const uint8_t likely[] = { 'a', 0x80, 0xBF, 0xC3, 0xE0, 0xE4, 0xED, 0xF0, 0xF4, 0xA0, 0x90 };
        mp_tokens ids = { 0 };
        for (uint32_t n = rng_below(&random, 12); n > 0; n--) {
            assert_true(mp_tokens_push(&ids, likely[rng_below(&random, sizeof likely)]));
        }
        mp_buf out = { .limit = 1024 };
        detokenize_all(f.t, &ids, &out);
        mp_buf_clear(&out);
        mp_free(ids.ids);
    }
    close_fixture(&f);
}

/* A full buffer leaves everything as it was, so the same token can be given again. */
static void a_full_buffer_takes_nothing(void **state) {
    (void)state;
    fixture f;
    begin_bpe(&f, "gpt-2");
    int32_t euro = (int32_t)vocab_merge(&f.file, "\x82\xac\xe2", 3, "\x82\xac!", 3);
    open_fixture(&f);
    mp_detokenizer d = { 0 };
    mp_buf out = { .limit = 5 };
    assert_true(mp_detokenize(f.t, &d, 0xE2, &out));
    assert_false(mp_detokenize(f.t, &d, euro, &out));
    assert_int_equal(out.len, 0);
    out.limit = 7;
    assert_true(mp_detokenize(f.t, &d, euro, &out));
    assert_int_equal(out.len, 7);
    assert_memory_equal(out.data, "\xe2\x82\xac\xe2\x82\xac!", 7);
    mp_buf_clear(&out);
    close_fixture(&f);
}

static void hidden_tokens_give_no_text(void **state) {
    (void)state;
    fixture f;
    begin_bpe(&f, "gpt-2");
    open_fixture(&f);
    mp_tokens ids = { 0 };
    const int32_t all[] = { 'a', TURN, TOOL, UNKNOWN, -1, 260, 'b' };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) assert_true(mp_tokens_push(&ids, all[i]));
    mp_buf out = { .limit = 1024 };
    detokenize_all(f.t, &ids, &out);
    assert_int_equal(out.len, 8);
    assert_memory_equal(out.data, "a<tool>b", 8);
    mp_buf_clear(&out);
    mp_free(ids.ids);
    close_fixture(&f);
}

static void put_character(rng *random, mp_buf *text) {
    uint32_t c;
    do {
        static const uint32_t ends[] = { 0x80, 0x80, 0x800, 0x10000, 0x110000 };
        c = rng_below(random, ends[rng_below(random, 5)]);
    } while (c >= 0xD800 && c < 0xE000);
    char s[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n; --i > 0; c >>= 6) s[i] = (char)(0x80 | (c & 0x3F));
    s[0] = (char)(n == 1 ? c : (0xF00u >> n) | c);
    assert_true(mp_buf_append(text, s, n));
}

static void text_survives_the_round_trip(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    static const char *const families[] = { "llama-bpe", "qwen2", "smollm", "gpt-2", "default", NULL, "spm" };
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        fixture f;
        if (families[i] && strcmp(families[i], "spm") == 0) {
            begin_spm(&f);
        } else {
            begin_bpe(&f, families[i]);
            vocab_bool(&f.file, "tokenizer.ggml.add_bos_token", false);
        }
        open_fixture(&f);
        for (int round = 0; round < 300; round++) {
            mp_buf text = { .limit = 4096 }, out = { .limit = 4096 };
            for (uint32_t n = rng_below(&random, 60); n > 0; n--) put_character(&random, &text);
            mp_tokens ids = { 0 };
            assert_int_equal(mp_tokenize(f.t, text.data, text.len, true, false, &ids, NULL), MEPIC_OK);
            detokenize_all(f.t, &ids, &out);
            assert_int_equal(out.len, text.len);
            if (text.len) assert_memory_equal(out.data, text.data, text.len);
            mp_free(ids.ids);
            mp_buf_clear(&text);
            mp_buf_clear(&out);
        }
        close_fixture(&f);
    }
}

/* ---- Long runs --------------------------------------------------------------------------------------------------- */

typedef struct long_run {
    const mp_tokenizer *t;
    const char *text;
    size_t len;
    mp_tokens ids;
    mepic_status status;
} long_run;

static void *tokenize_long(void *arg) {
    long_run *run = arg;
    run->status = mp_tokenize(run->t, run->text, run->len, false, true, &run->ids, NULL);
    return NULL;
}

/* T1: one kind of character for a quarter MiB, in a stack of 256 KiB. Two-character merges must be found everywhere. */
static void long_runs_need_no_stack(void **state) {
    (void)state;
    enum { N = 256 << 10 };
    static const struct {
        const char *unit;
        size_t len;
    } families[] = { { "A", 1 },     { "^", 1 },         { "\n", 1 },       { " ", 1 },    { "\xf0\x9f\x99\x82", 4 },
                     { "1", 1 },     { "e\xcc\x81", 3 }, { "\xcc\x81", 2 }, { "\xff", 1 }, { "\0", 1 },
                     { "<turn", 5 }, { "aB3 ,.\n", 7 } };
    static const char *const kinds[] = { "qwen2", "smollm", "default", "spm" };
    char *text = malloc(N);
    assert_non_null(text);
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        fixture f;
        if (strcmp(kinds[k], "spm") == 0) {
            begin_spm(&f);
            vocab_token(&f.file, "AA", 2, MP_TOKEN_NORMAL, -1);
        } else {
            begin_bpe(&f, kinds[k]);
            vocab_merge(&f.file, "A", 1, "A", 1);
        }
        int32_t pair = (int32_t)f.file.n_tokens - 1;
        open_fixture(&f);
        for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
            for (size_t at = 0; at < N; at++) text[at] = families[i].unit[at % families[i].len];
            long_run run = { .t = f.t, .text = text, .len = N };
            pthread_attr_t attr;
            pthread_t thread;
            assert_int_equal(pthread_attr_init(&attr), 0);
            assert_int_equal(pthread_attr_setstacksize(&attr, 256 << 10), 0);
            assert_int_equal(pthread_create(&thread, &attr, tokenize_long, &run), 0);
            assert_int_equal(pthread_join(thread, NULL), 0);
            pthread_attr_destroy(&attr);
            assert_int_equal(run.status, MEPIC_OK);
            assert_true(run.ids.n >= N / 2);
            if (i == 0) {
                assert_int_equal(run.ids.n, N / 2);
                for (size_t at = 0; at < run.ids.n; at++) assert_int_equal(run.ids.ids[at], pair);
            }
            mp_free(run.ids.ids);
        }
        close_fixture(&f);
    }
    free(text);
}

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static void failing_memory_is_reported(void **state) {
    (void)state;
    static const char text[] = "some words, a <turn> and 1234 bytes \xff that are no character  \n";
    for (int spm = 0; spm < 2; spm++) {
        fixture f;
        if (spm) {
            begin_spm(&f);
        } else {
            begin_bpe(&f, "default");
        }
        f.gguf = vocab_open(&f.file, VOCAB_ALL);
        mepic_status status = MEPIC_ERR_NOMEM;
        for (uint64_t n = 1; status != MEPIC_OK; n++) {
            assert_true(n < 1000);
            mepic_error err = { 0 };
            f.t = NULL;
            mp_mem_fail_at(n, false);
            status = mp_tokenizer_open(f.gguf, &f.t, &err);
            mp_mem_fail_at(0, false);
            assert_true(status == MEPIC_OK || status == MEPIC_ERR_NOMEM);
            assert_int_equal(err.status, status);
            assert_true((status == MEPIC_OK) == (f.t != NULL));
        }
        status = MEPIC_ERR_NOMEM;
        mp_tokens ids = { 0 };
        assert_int_equal(mp_tokenize(f.t, "ab", 2, false, false, &ids, NULL), MEPIC_OK);
        size_t before = ids.n;
        for (uint64_t n = 1; status != MEPIC_OK; n++) {
            assert_true(n < 1000);
            mepic_error err = { 0 };
            mp_mem_fail_at(n, false);
            status = mp_tokenize(f.t, text, sizeof text - 1, true, true, &ids, &err);
            mp_mem_fail_at(0, false);
            assert_int_equal(err.status, status);
            assert_true(status == MEPIC_OK ? ids.n > before : ids.n == before);
        }
        mp_free(ids.ids);
        close_fixture(&f);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(special_tokens_are_parsed_on_demand),
        cmocka_unit_test(bos_is_added_on_demand_and_eos_never),
        cmocka_unit_test(sentencepiece_has_its_spaces_and_bytes),
        cmocka_unit_test(user_text_never_gives_a_control_token),
        cmocka_unit_test(broken_characters_become_one_replacement_each),
        cmocka_unit_test(a_full_buffer_takes_nothing),
        cmocka_unit_test(hidden_tokens_give_no_text),
        cmocka_unit_test(text_survives_the_round_trip),
        cmocka_unit_test(long_runs_need_no_stack),
        cmocka_unit_test(failing_memory_is_reported),
    };
    printf("seed %d\n", SEED);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
