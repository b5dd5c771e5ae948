/* tokenizer/merge, bpe, spm: ids against slow merging by text on random vocabularies, and the work counted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "support/random.h"
#include "support/vocab.h"
#include "tokenizer/merge.h"
#include "tokenizer/tokenizer.h"

enum { SEED = 20261124 };

/* ---- The reference: a row of strings, all neighbours looked at for every merge ----------------------------------- */

enum { MAX_TOKENS = 512, MAX_LEN = 24, MAX_TEXT = 96 };

typedef struct entry {
    char text[MAX_LEN]; /* raw bytes; SPM: as in the vocabulary */
    size_t len;
    int32_t id;
    float score; /* SPM */
} entry;

typedef struct merge_line {
    uint32_t left, right; /* entries */
} merge_line;

typedef struct slow_vocab {
    entry tokens[MAX_TOKENS];
    uint32_t n;
    merge_line merges[MAX_TOKENS];
    uint32_t n_merges;
} slow_vocab;

static const entry *find_text(const slow_vocab *v, const char *text, size_t len) {
    for (uint32_t i = 0; i < v->n; i++) {
        if (v->tokens[i].len == len && memcmp(v->tokens[i].text, text, len) == 0) return &v->tokens[i];
    }
    return NULL;
}

/* BPE: the number of the merge that joins two texts; -1: none. */
static int slow_rank(const slow_vocab *v, const char *a, size_t n_a, const char *b, size_t n_b) {
    for (uint32_t i = 0; i < v->n_merges; i++) {
        const entry *left = &v->tokens[v->merges[i].left], *right = &v->tokens[v->merges[i].right];
        if (left->len == n_a && right->len == n_b && memcmp(left->text, a, n_a) == 0 &&
            memcmp(right->text, b, n_b) == 0) {
            return (int)i;
        }
    }
    return -1;
}

/* Cuts text at starts[0 .. *n) by merging, best pair first, leftmost of equals. `spm`: by score, else by rank. */
static void slow_merge(const slow_vocab *v, bool spm, const char *text, size_t len, size_t *starts, size_t *n) {
    starts[*n] = len;
    for (;;) {
        size_t best = SIZE_MAX;
        double best_rank = 0;
        for (size_t i = 0; i + 1 < *n; i++) {
            size_t a = starts[i], b = starts[i + 1], end = starts[i + 2];
            double rank;
            if (spm) {
                const entry *joined = find_text(v, text + a, end - a);
                if (!joined) continue;
                rank = -(double)joined->score;
            } else {
                int found = slow_rank(v, text + a, b - a, text + b, end - b);
                if (found < 0) continue;
                rank = found;
            }
            if (best == SIZE_MAX || rank < best_rank) {
                best = i;
                best_rank = rank;
            }
        }
        if (best == SIZE_MAX) return;
        memmove(&starts[best + 1], &starts[best + 2], (*n - best - 1) * sizeof *starts);
        --*n;
    }
}

static void expect_ids(const mp_tokenizer *tokenizer, const char *text, size_t len, const int32_t *want, size_t n) {
    mp_tokens got = { 0 };
    assert_int_equal(mp_tokenize(tokenizer, text, len, false, false, &got, NULL), MEPIC_OK);
    if (got.n != n || (n && memcmp(got.ids, want, n * sizeof *want) != 0)) {
        fprintf(stderr, "\"%.*s\"\n got", (int)len, text);
        for (size_t i = 0; i < got.n; i++) fprintf(stderr, " %d", got.ids[i]);
        fprintf(stderr, "\nwant");
        for (size_t i = 0; i < n; i++) fprintf(stderr, " %d", want[i]);
        fail_msg("\nids differ");
    }
    mp_free(got.ids);
}

/* ---- Byte-level BPE ---------------------------------------------------------------------------------------------- */

/* All bytes and up to n merges of random tokens over a few letters, so that pairs overlap, ranks out of order. */
static void random_bpe(rng *random, uint32_t n, vocab_file *file, slow_vocab *v) {
    static const char letters[] = { 'a', 'b', 'c', '\xc3', '\xa9' };
    vocab_begin(file, "gpt2", "gpt-2");
    vocab_byte_symbols(file);
    v->n = v->n_merges = 0;
    for (size_t i = 0; i < sizeof letters; i++) {
        v->tokens[v->n++] = (entry){ .text = { letters[i] }, .len = 1, .id = (uint8_t)letters[i] };
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t left = rng_below(random, v->n), right = rng_below(random, v->n);
        const entry *a = &v->tokens[left], *b = &v->tokens[right];
        entry joined = { .len = a->len + b->len };
        if (joined.len > MAX_LEN) continue;
        memcpy(joined.text, a->text, a->len);
        memcpy(joined.text + a->len, b->text, b->len);
        if (find_text(v, joined.text, joined.len)) continue; /* its text must be one token only */
        joined.id = (int32_t)vocab_merge(file, a->text, a->len, b->text, b->len);
        v->merges[v->n_merges++] = (merge_line){ left, right };
        v->tokens[v->n++] = joined;
    }
}

static void bpe_ids_are_those_of_slow_merging(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    static const char *const letters[] = { "a", "b", "c", "\xc3\xa9" }; /* letters only: one word */
    static slow_vocab v;
    for (int round = 0; round < 100; round++) {
        vocab_file file;
        random_bpe(&random, 5 + rng_below(&random, 200), &file, &v);
        mp_gguf *gguf = vocab_open(&file, VOCAB_TOKENS | VOCAB_TYPES | VOCAB_MERGES);
        mp_tokenizer *tokenizer;
        assert_int_equal(mp_tokenizer_open(gguf, &tokenizer, NULL), MEPIC_OK);
        for (int k = 0; k < 50; k++) {
            char text[2 * MAX_TEXT];
            size_t len = 0, starts[2 * MAX_TEXT + 1], n;
            uint32_t count = rng_below(&random, MAX_TEXT), few = 1 + rng_below(&random, 4);
            for (uint32_t i = 0; i < count; i++) {
                const char *letter = letters[rng_below(&random, few)];
                memcpy(text + len, letter, strlen(letter));
                len += strlen(letter);
            }
            for (n = 0; n < len; n++) starts[n] = n;
            slow_merge(&v, false, text, len, starts, &n);
            int32_t want[2 * MAX_TEXT];
            for (size_t i = 0; i < n; i++) want[i] = find_text(&v, text + starts[i], starts[i + 1] - starts[i])->id;
            expect_ids(tokenizer, text, len, want, n);
        }
        mp_tokenizer_close(tokenizer);
        mp_gguf_close(gguf);
        vocab_clear(&file);
    }
}

/* llama-bpe: a word that is a token is one token, even where no merge leads to it. */
static void whole_words_come_before_merges(void **state) {
    (void)state;
    static const char *const families[] = { "llama-bpe", "qwen2" };
    for (int i = 0; i < 2; i++) {
        vocab_file file;
        vocab_begin(&file, "gpt2", families[i]);
        vocab_bool(&file, "tokenizer.ggml.add_bos_token", false);
        vocab_byte_symbols(&file);
        int32_t ab = (int32_t)vocab_merge(&file, "a", 1, "b", 1);
        int32_t word = (int32_t)vocab_token(&file,
                                            "\xc4\xa0"
                                            "abab",
                                            6, MP_TOKEN_NORMAL, 0); /* " abab" */
        mp_gguf *gguf = vocab_open(&file, VOCAB_TOKENS | VOCAB_TYPES | VOCAB_MERGES);
        mp_tokenizer *tokenizer;
        assert_int_equal(mp_tokenizer_open(gguf, &tokenizer, NULL), MEPIC_OK);
        const int32_t whole[] = { 'x', word }, merged[] = { 'x', ' ', ab, ab };
        if (i == 0) {
            expect_ids(tokenizer, "x abab", 6, whole, 2);
        } else {
            expect_ids(tokenizer, "x abab", 6, merged, 4);
        }
        mp_tokenizer_close(tokenizer);
        mp_gguf_close(gguf);
        vocab_clear(&file);
    }
}

/* A byte the vocabulary has no token for is dropped and joins nothing around it. */
static void a_byte_without_a_token_is_dropped(void **state) {
    (void)state;
    vocab_file file;
    vocab_begin(&file, "gpt2", "gpt-2");
    vocab_token(&file, "a", 1, MP_TOKEN_NORMAL, 0);
    vocab_token(&file, "b", 1, MP_TOKEN_NORMAL, 0);
    int32_t ab = (int32_t)vocab_merge(&file, "a", 1, "b", 1);
    mp_gguf *gguf = vocab_open(&file, VOCAB_TOKENS | VOCAB_TYPES | VOCAB_MERGES);
    mp_tokenizer *tokenizer;
    assert_int_equal(mp_tokenizer_open(gguf, &tokenizer, NULL), MEPIC_OK);
    const int32_t want[] = { ab, 0, 1 };
    expect_ids(tokenizer, "abaxb", 5, want, 3);
    mp_tokenizer_close(tokenizer);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

static void of_equal_merges_the_first_counts(void **state) {
    (void)state;
    vocab_file file;
    vocab_begin(&file, "gpt2", "gpt-2");
    vocab_byte_symbols(&file);
    int32_t ab = (int32_t)vocab_merge(&file, "a", 1, "b", 1);
    vocab_merge(&file, "b", 1, "c", 1);
    vocab_merge(&file, "a", 1, "b", 1);
    mp_gguf *gguf = vocab_open(&file, VOCAB_TOKENS | VOCAB_TYPES | VOCAB_MERGES);
    mp_tokenizer *tokenizer;
    assert_int_equal(mp_tokenizer_open(gguf, &tokenizer, NULL), MEPIC_OK);
    const int32_t want[] = { ab, 'c' };
    expect_ids(tokenizer, "abc", 3, want, 2);
    mp_tokenizer_close(tokenizer);
    mp_gguf_close(gguf);
    vocab_clear(&file);
}

/* ---- SentencePiece ----------------------------------------------------------------------------------------------- */

static const char *const spm_letters[] = { "a", "b", "c", "\xc3\xa9", "\xe4\xbd\xa0", "\xe2\x96\x81" };
enum { SPM_LETTERS = sizeof spm_letters / sizeof spm_letters[0] };

/* Bytes, some letters and random strings of them. Scores are few, so that many are equal. */
static void random_spm(rng *random, uint32_t n, vocab_file *file, slow_vocab *v) {
    vocab_begin(file, "llama", NULL);
    vocab_bool(file, "tokenizer.ggml.add_bos_token", false);
    vocab_byte_tokens(file);
    v->n = 0;
    for (uint32_t i = 0; i < n; i++) {
        entry e = { .score = (float)rng_below(random, 8) - 4 };
        uint32_t letters = i < 3 ? 1 : 1 + rng_below(random, 5);
        for (uint32_t k = 0; k < letters; k++) {
            const char *letter = spm_letters[rng_below(random, SPM_LETTERS)];
            if (e.len + strlen(letter) > MAX_LEN) break;
            memcpy(e.text + e.len, letter, strlen(letter));
            e.len += strlen(letter);
        }
        if (find_text(v, e.text, e.len)) continue;
        e.id = (int32_t)vocab_token(file, e.text, e.len, MP_TOKEN_NORMAL, e.score);
        v->tokens[v->n++] = e;
    }
}

static void spm_ids_are_those_of_slow_merging(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    static slow_vocab v;
    for (int round = 0; round < 100; round++) {
        vocab_file file;
        random_spm(&random, 5 + rng_below(&random, 120), &file, &v);
        mp_gguf *gguf = vocab_open(&file, VOCAB_TOKENS | VOCAB_TYPES | VOCAB_SCORES);
        mp_tokenizer *tokenizer;
        assert_int_equal(mp_tokenizer_open(gguf, &tokenizer, NULL), MEPIC_OK);
        for (int k = 0; k < 50; k++) {
            char text[3 * MAX_TEXT], escaped[3 * MAX_TEXT];
            size_t len = 0, n_escaped = 0, starts[MAX_TEXT + 1], n = 0;
            uint32_t count = rng_below(&random, MAX_TEXT), few = 1 + rng_below(&random, SPM_LETTERS);
            for (uint32_t i = 0; i < count; i++) {
                const char *letter = spm_letters[SPM_LETTERS - 1 - rng_below(&random, few)];
                starts[n++] = n_escaped;
                memcpy(escaped + n_escaped, letter, strlen(letter));
                n_escaped += strlen(letter);
                if (strcmp(letter, "\xe2\x96\x81") == 0) letter = " ";
                memcpy(text + len, letter, strlen(letter));
                len += strlen(letter);
            }
            slow_merge(&v, true, escaped, n_escaped, starts, &n);
            int32_t want[3 * MAX_TEXT];
            size_t n_want = 0;
            for (size_t i = 0; i < n; i++) {
                const entry *e = find_text(&v, escaped + starts[i], starts[i + 1] - starts[i]);
                if (e) want[n_want++] = e->id;
                for (size_t at = starts[i]; !e && at < starts[i + 1]; at++) want[n_want++] = (uint8_t)escaped[at];
            }
            expect_ids(tokenizer, text, len, want, n_want);
        }
        mp_tokenizer_close(tokenizer);
        mp_gguf_close(gguf);
        vocab_clear(&file);
    }
}

/* ---- Work -------------------------------------------------------------------------------------------------------- */

/* Runs of one symbol join by doubling up to 64: many equal ranks, every candidate outdated again and again. */
static size_t calls;
static bool double_up(const void *ctx, const mp_symbol *left, const mp_symbol *right, uint32_t *rank, int32_t *id) {
    (void)ctx;
    calls++;
    *rank = 64 - left->len;
    *id = (int32_t)(left->len + right->len);
    return left->len == right->len && left->len < 64;
}

static void work_is_linear_in_the_symbols(void **state) {
    (void)state;
    mp_merger merger = { 0 };
    for (uint32_t n = 1; n <= 1 << 18; n *= 4) {
        mp_merger_begin(&merger);
        for (uint32_t i = 0; i < n; i++) assert_true(mp_merger_add(&merger, 1, i, 1));
        calls = 0;
        assert_true(mp_merger_run(&merger, double_up, NULL));
        assert_true(calls <= 8 * (size_t)n);
        size_t symbols = 0, covered = 0;
        for (int32_t i = 0; i >= 0; i = merger.symbols[i].next) {
            covered += merger.symbols[i].len;
            symbols++;
        }
        assert_int_equal(covered, n);
        assert_int_equal(symbols, n <= 64 ? 1 : n / 64);
    }
    mp_merger_clear(&merger);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bpe_ids_are_those_of_slow_merging), cmocka_unit_test(whole_words_come_before_merges),
        cmocka_unit_test(a_byte_without_a_token_is_dropped), cmocka_unit_test(of_equal_merges_the_first_counts),
        cmocka_unit_test(spm_ids_are_those_of_slow_merging), cmocka_unit_test(work_is_linear_in_the_symbols),
    };
    printf("seed %d\n", SEED);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
