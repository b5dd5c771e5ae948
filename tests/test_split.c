/* tokenizer/split: words of every family against a plain matcher over code points, on random text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/random.h"
#include "tokenizer/split.h"

enum { SEED = 20261124 };

/* ---- The reference: code points with their class, one function a pattern ----------------------------------------- */

typedef enum kind { LETTER, NUMBER, SPACE, PUNCTUATION, OTHER } kind;

/* Everything the random text is made of. */
static const struct {
    const char *utf8;
    uint32_t c;
    kind kind;
} alphabet[] = {
    { "a", 'a', LETTER },
    { "B", 'B', LETTER },
    { "s", 's', LETTER },
    { "t", 't', LETTER },
    { "r", 'r', LETTER },
    { "e", 'e', LETTER },
    { "V", 'V', LETTER },
    { "l", 'l', LETTER },
    { "L", 'L', LETTER },
    { "d", 'd', LETTER },
    { "m", 'm', LETTER },
    { "\xc3\xa9", 0xE9, LETTER },
    { "\xe4\xbd\xa0", 0x4F60, LETTER },
    { "\xc5\xbf", 0x17F, LETTER },
    { "1", '1', NUMBER },
    { "7", '7', NUMBER },
    { "\xd9\xa3", 0x663, NUMBER },
    { "\xc2\xbd", 0xBD, NUMBER },
    { "\xe2\x85\xa8", 0x2168, NUMBER },
    { "'", '\'', PUNCTUATION },
    { ".", '.', PUNCTUATION },
    { "_", '_', PUNCTUATION },
    { "\xe3\x80\x82", 0x3002, PUNCTUATION },
    { "$", '$', OTHER },
    { "+", '+', OTHER },
    { "`", '`', OTHER },
    { "\xf0\x9f\x98\x80", 0x1F600, OTHER },
    { "\xcc\x81", 0x301, OTHER },
    { "\xe2\x80\x8b", 0x200B, OTHER },
    { "\x01", 1, OTHER },
    { "\x1c", 0x1C, OTHER },
    { "\xe1\xa0\x8e", 0x180E, OTHER },
    { "\xef\xbf\xbd", 0xFFFD, OTHER },
    { " ", ' ', SPACE },
    { " ", ' ', SPACE },
    { " ", ' ', SPACE },
    { "\n", '\n', SPACE },
    { "\n", '\n', SPACE },
    { "\r", '\r', SPACE },
    { "\t", '\t', SPACE },
    { "\xc2\x85", 0x85, SPACE },
    { "\xc2\xa0", 0xA0, SPACE },
    { "\xe3\x80\x80", 0x3000, SPACE },
};
enum { ALPHABET = sizeof alphabet / sizeof alphabet[0], MAX_TEXT = 64 };

typedef struct text {
    uint32_t n;
    uint32_t at[MAX_TEXT + 1]; /* byte where each character begins */
    uint8_t letter[MAX_TEXT];  /* index into the alphabet */
    char bytes[4 * MAX_TEXT];
} text;

static kind kind_of(const text *t, uint32_t i) {
    return alphabet[t->letter[i]].kind;
}
static uint32_t code(const text *t, uint32_t i) {
    return alphabet[t->letter[i]].c;
}
static bool newline(const text *t, uint32_t i) {
    return code(t, i) == '\n' || code(t, i) == '\r';
}
static bool symbol(const text *t, uint32_t i) {
    return kind_of(t, i) == PUNCTUATION || kind_of(t, i) == OTHER;
}

/* All matchers: characters matched at i, seeing nothing from `end` on; 0: no match. */
typedef uint32_t (*matcher)(const text *t, uint32_t i, uint32_t end);

static uint32_t run_of(const text *t, uint32_t i, uint32_t end, kind k) {
    uint32_t n = 0;
    while (i + n < end && kind_of(t, i + n) == k) n++;
    return n;
}

static uint32_t run_of_symbols(const text *t, uint32_t i, uint32_t end) {
    uint32_t n = 0;
    while (i + n < end && symbol(t, i + n)) n++;
    return n;
}

static uint32_t match_contraction(const text *t, uint32_t i, uint32_t end, bool any_case) {
    static const char *const tails[] = { "s", "t", "re", "ve", "m", "ll", "d" };
    if (code(t, i) != '\'') return 0;
    for (size_t k = 0; k < sizeof tails / sizeof tails[0]; k++) {
        uint32_t n = (uint32_t)strlen(tails[k]), same = 0;
        for (uint32_t j = 0; j < n && i + 1 + j < end; j++) {
            uint32_t c = code(t, i + 1 + j), want = (uint8_t)tails[k][j];
            same += c == want || (any_case && c == want - 32);
        }
        if (same == n) return n + 1;
    }
    return 0;
}

/* White space gives its last character to what follows it, if something does. */
static uint32_t match_spaces(const text *t, uint32_t i, uint32_t end) {
    uint32_t n = run_of(t, i, end, SPACE);
    return n > 1 && i + n < end ? n - 1 : n;
}

static uint32_t match_gpt2(const text *t, uint32_t i, uint32_t end) {
    uint32_t n = match_contraction(t, i, end, false), lead = code(t, i) == ' ';
    if (n) return n;
    if ((n = run_of(t, i + lead, end, LETTER)) || (n = run_of(t, i + lead, end, NUMBER)) ||
        (n = run_of_symbols(t, i + lead, end))) {
        return lead + n;
    }
    return match_spaces(t, i, end);
}

static uint32_t match_llama3(const text *t, uint32_t i, uint32_t end, uint32_t digits) {
    uint32_t n = match_contraction(t, i, end, true);
    if (n) return n;
    bool prefix = !newline(t, i) && kind_of(t, i) != LETTER && kind_of(t, i) != NUMBER;
    n = run_of(t, i + prefix, end, LETTER);
    if (n) return prefix + n;
    n = run_of(t, i, end, NUMBER);
    if (n) return n < digits ? n : digits;
    uint32_t lead = code(t, i) == ' ';
    n = run_of_symbols(t, i + lead, end);
    if (n) {
        n += lead;
        while (i + n < end && newline(t, i + n)) n++;
        return n;
    }
    n = run_of(t, i, end, SPACE);
    for (uint32_t k = n; k > 0; k--) {
        if (newline(t, i + k - 1)) return k; /* up to the last newline of the run */
    }
    return match_spaces(t, i, end);
}

static uint32_t match_llama_bpe(const text *t, uint32_t i, uint32_t end) {
    return match_llama3(t, i, end, 3);
}
static uint32_t match_qwen2(const text *t, uint32_t i, uint32_t end) {
    return match_llama3(t, i, end, 1);
}
static uint32_t match_digit(const text *t, uint32_t i, uint32_t end) {
    return i < end && kind_of(t, i) == NUMBER;
}
static uint32_t match_digits(const text *t, uint32_t i, uint32_t end) {
    return run_of(t, i, end, NUMBER);
}

static uint32_t match_marks(const text *t, uint32_t i, uint32_t end) {
    uint32_t n = 0;
    while (i + n < end && (kind_of(t, i + n) == PUNCTUATION || code(t, i + n) == '$' || code(t, i + n) == '+')) n++;
    return n;
}

static uint32_t match_three_ascii(const text *t, uint32_t i, uint32_t end) {
    if (i + 3 > end) return 0;
    for (uint32_t k = 0; k < 3; k++) {
        if (code(t, i + k) < '0' || code(t, i + k) > '9') return 0;
    }
    return 3;
}

typedef struct words {
    uint32_t n, ends[4 * MAX_TEXT]; /* bytes */
} words;

static void cut(const text *t, const matcher *stages, uint32_t from, uint32_t end, words *out) {
    if (from == end) return;
    if (!*stages) {
        out->ends[out->n++] = t->at[end];
        return;
    }
    uint32_t done = from;
    for (uint32_t i = from; i < end;) {
        uint32_t n = (*stages)(t, i, end);
        if (n == 0) {
            i++;
            continue;
        }
        cut(t, stages + 1, done, i, out);
        cut(t, stages + 1, i, i + n, out);
        done = i += n;
    }
    cut(t, stages + 1, done, end, out);
}

static const struct {
    const char *name;
    matcher stages[5];
} references[] = {
    { "llama-bpe", { match_llama_bpe } },
    { "qwen2", { match_qwen2 } },
    { "smollm", { match_digit, match_gpt2 } },
    { "gpt-2", { match_gpt2 } },
    { "default", { match_marks, match_gpt2, match_digits, match_three_ascii } },
};

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

typedef struct collected {
    const char *text;
    size_t at; /* bytes so far */
    words words;
    char joined[1 << 16];
} collected;

static bool collect(void *ctx, const char *word, size_t len) {
    collected *c = ctx;
    assert_true(len > 0 && c->at + len <= sizeof c->joined);
    memcpy(c->joined + c->at, word, len);
    c->at += len;
    assert_true(c->words.n < sizeof c->words.ends / sizeof c->words.ends[0]);
    c->words.ends[c->words.n++] = (uint32_t)c->at;
    return true;
}

static mp_split *open_family(const char *name) {
    const mp_split_family *family = mp_split_family_find((mp_str){ name, strlen(name) });
    assert_non_null(family);
    mp_split *split;
    assert_int_equal(mp_split_open(family, &split, NULL), MEPIC_OK);
    return split;
}

static void random_text(rng *random, text *t) {
    t->n = rng_below(random, MAX_TEXT + 1);
    uint32_t few = 1 + rng_below(random, 8), from = rng_below(random, ALPHABET); /* few letters: long runs */
    bool narrow = rng_below(random, 2);
    uint32_t at = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        t->letter[i] = (uint8_t)(narrow ? (from + rng_below(random, few)) % ALPHABET : rng_below(random, ALPHABET));
        const char *s = alphabet[t->letter[i]].utf8;
        t->at[i] = at;
        memcpy(t->bytes + at, s, strlen(s));
        at += (uint32_t)strlen(s);
    }
    t->at[t->n] = at;
}

static void words_are_the_references(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    static collected got;
    static text t;
    for (size_t f = 0; f < sizeof references / sizeof references[0]; f++) {
        mp_split *split = open_family(references[f].name);
        for (int round = 0; round < 20000; round++) {
            random_text(&random, &t);
            words want = { 0 };
            cut(&t, references[f].stages, 0, t.n, &want);
            got.at = got.words.n = 0;
            assert_true(mp_split_run(split, t.bytes, t.at[t.n], collect, &got));
            if (got.words.n != want.n || memcmp(got.words.ends, want.ends, want.n * sizeof want.ends[0]) != 0) {
                fprintf(stderr, "%s, round %d: \"%.*s\"\n", references[f].name, round, (int)t.at[t.n], t.bytes);
                for (uint32_t i = 0; i < got.words.n; i++) fprintf(stderr, " %u", got.words.ends[i]);
                fprintf(stderr, "\nwant\n");
                for (uint32_t i = 0; i < want.n; i++) fprintf(stderr, " %u", want.ends[i]);
                fail_msg("\nwords differ");
            }
            assert_memory_equal(got.joined, t.bytes, t.at[t.n]);
        }
        mp_split_close(split);
    }
}

static void bytes_that_are_no_character_become_replacements(void **state) {
    (void)state;
    static const struct {
        const char *bytes, *text;
    } cases[] = {
        { "ab\xc3", "ab\xef\xbf\xbd" },
        { "\xff\xfe\x80z", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbdz" },
        { "\xe4\xbd", "\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xed\xa0\x80", "\xed\xa0\x80" },                                         /* a surrogate is left alone */
        { "\xc1\x81", "A" },                                                        /* overlong */
        { "\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" }, /* past U+10FFFF */
        { "\xf8\x88", "\xef\xbf\xbd\xef\xbf\xbd" },
    };
    static collected got;
    mp_split *split = open_family("qwen2");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        got.at = got.words.n = 0;
        assert_true(mp_split_run(split, cases[i].bytes, strlen(cases[i].bytes), collect, &got));
        assert_int_equal(got.at, strlen(cases[i].text));
        assert_memory_equal(got.joined, cases[i].text, got.at);
    }
    mp_split_close(split);
}

/* Bytes at random never read outside of the text (sanitizers) and never fail. */
static void any_bytes_are_split(void **state) {
    (void)state;
    rng random = rng_open(SEED);
    static collected got;
    for (size_t f = 0; f < sizeof references / sizeof references[0]; f++) {
        mp_split *split = open_family(references[f].name);
        for (int round = 0; round < 2000; round++) {
            size_t n = rng_below(&random, 64);
            char *bytes = malloc(n + 1);
            assert_non_null(bytes);
            for (size_t i = 0; i < n; i++) bytes[i] = (char)rng_next(&random);
            char *exact = malloc(n ? n : 1); /* of exactly n bytes */
            assert_non_null(exact);
            memcpy(exact, bytes, n);
            got.at = got.words.n = 0;
            assert_true(mp_split_run(split, exact, n, collect, &got));
            assert_true(n == 0 || got.at > 0);
            free(exact);
            free(bytes);
        }
        mp_split_close(split);
    }
}

static bool count_words(void *ctx, const char *word, size_t len) {
    (void)word;
    (void)len;
    ++*(size_t *)ctx;
    return true;
}

/* The patterns that look back over a run must find its end in one go: no limit of the matcher is met. */
static void a_run_of_megabytes_is_one_word(void **state) {
    (void)state;
    enum { N = 2 << 20 };
    char *run = malloc(N);
    assert_non_null(run);
    static const char letters[] = { 'A', '^', ' ', '\n', '\t' };
    for (size_t f = 0; f < sizeof references / sizeof references[0]; f++) {
        mp_split *split = open_family(references[f].name);
        for (size_t i = 0; i < sizeof letters; i++) {
            memset(run, letters[i], N);
            size_t n = 0;
            assert_true(mp_split_run(split, run, N, count_words, &n));
            assert_int_equal(n, 1);
        }
        mp_split_close(split);
    }
    free(run);
}

static bool stop_at_once(void *ctx, const char *word, size_t len) {
    (void)word;
    (void)len;
    ++*(size_t *)ctx;
    return false;
}

static void the_callback_can_stop(void **state) {
    (void)state;
    mp_split *split = open_family("gpt-2");
    size_t n = 0;
    assert_false(mp_split_run(split, "a b c", 5, stop_at_once, &n));
    assert_int_equal(n, 1);
    mp_split_close(split);
}

static void names_are_known_or_not(void **state) {
    (void)state;
    static const char *const aliases[] = { "llama3", "llama-v3", "llama-bpe" };
    for (size_t i = 0; i < 3; i++) {
        assert_string_equal(mp_split_family_find((mp_str){ aliases[i], strlen(aliases[i]) })->name, "llama-bpe");
    }
    assert_null(mp_split_family_find((mp_str){ "tekken", 6 }));
    assert_null(mp_split_family_find((mp_str){ "qwen2x", 6 }));
    assert_null(mp_split_family_find((mp_str){ "", 0 }));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(words_are_the_references), cmocka_unit_test(bytes_that_are_no_character_become_replacements),
        cmocka_unit_test(any_bytes_are_split),      cmocka_unit_test(a_run_of_megabytes_is_one_word),
        cmocka_unit_test(the_callback_can_stop),    cmocka_unit_test(names_are_known_or_not),
    };
    printf("seed %d\n", SEED);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
