/* cli/options: what is parsed, what is refused and with which words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "cli/options.h"

typedef struct values {
    bool flag;
    const char *text;
    mp_texts texts;
    uint32_t word, count;
    mp_counts counts;
    uint64_t size, number;
    double real;
    bool help;
} values;

static const mp_word words[] = { { "all", 77 }, { "none", 78 }, { NULL, 0 } };

static mepic_status parse(values *v, mepic_error *err, int argc, const char *const *args) {
    const mp_option options[] = {
        MP_FLAG('f', "flag", &v->flag, "a flag"),
        MP_TEXT('t', "text", &v->text, "TEXT", "a text"),
        MP_TEXTS(0, "texts", &v->texts, "TEXT", "texts"),
        MP_WORD(0, "word", &v->word, words, "WORD", "a word"),
        MP_COUNT_OR('c', "count", &v->count, 2, 100, words, "N", "a count"),
        MP_COUNTS(0, "counts", &v->counts, 1, 9, "N,...", "counts"),
        MP_SIZE(0, "size", &v->size, 1024, UINT64_C(1) << 40, "SIZE", "a size"),
        MP_NUMBER(0, "number", &v->number, 0, UINT64_MAX, "N", "a number"),
        MP_REAL(0, "real", &v->real, -1.5, 2, "R", "a real"),
    };
    const mp_option_group group = { "Test", options, sizeof options / sizeof *options };
    char *argv[16] = { "test" };
    for (int i = 0; i < argc; i++) argv[i + 1] = (char *)args[i];
    memset(v, 0, sizeof *v);
    return mp_options_parse(&group, 1, argc + 1, argv, &v->help, err);
}

#define PARSE(v, err, ...)                                                                                             \
    parse(v, err, (int)(sizeof((const char *[]){ __VA_ARGS__ }) / sizeof(char *)), (const char *const[]){ __VA_ARGS__ })

static void values_come_apart_or_attached_and_the_last_wins(void **state) {
    (void)state;
    values v;
    mepic_error err;
    assert_int_equal(PARSE(&v, &err, "--text", "a", "-f", "--count=7", "--texts", "x", "--texts=y", "-t", "b"),
                     MEPIC_OK);
    assert_true(v.flag);
    assert_string_equal(v.text, "b");
    assert_int_equal(v.count, 7);
    assert_int_equal(v.texts.n, 2);
    assert_string_equal(v.texts.items[1], "y");
    assert_int_equal(PARSE(&v, &err, "-c9", "--text=--flag", "--word", "none", "--counts", "1,9,3"), MEPIC_OK);
    assert_int_equal(v.count, 9);
    assert_string_equal(v.text, "--flag");
    assert_false(v.flag);
    assert_int_equal(v.word, 78);
    assert_int_equal(v.counts.n, 3);
    assert_int_equal(v.counts.items[2], 3);
    assert_int_equal(PARSE(&v, &err, "--count", "all", "--text="), MEPIC_OK);
    assert_int_equal(v.count, 77);
    assert_string_equal(v.text, "");
    assert_int_equal(PARSE(&v, &err, "--help", "--nonsense"), MEPIC_OK);
    assert_true(v.help);
}

static void numbers_are_strict(void **state) {
    (void)state;
    values v;
    mepic_error err;
    assert_int_equal(PARSE(&v, &err, "--size", "512M", "--number", "18446744073709551615", "--real", "-1.5"), MEPIC_OK);
    assert_true(v.size == UINT64_C(512) << 20);
    assert_true(v.number == UINT64_MAX);
    assert_true(v.real == -1.5);
    assert_int_equal(PARSE(&v, &err, "--size", "2g"), MEPIC_OK);
    assert_true(v.size == UINT64_C(2) << 30);
    static const char *const refused[][2] = {
        { "--count", "1" },
        { "--count", "101" },
        { "--count", "-3" },
        { "--count", "+3" },
        { "--count", " 3" },
        { "--count", "3 " },
        { "--count", "3x" },
        { "--count", "" },
        { "--count", "0x10" },
        { "--count", "4294967298" },
        { "--count", "99999999999999999999" },
        { "--size", "1000" },
        { "--size", "2T" },
        { "--size", "2MM" },
        { "--size", "M" },
        { "--size", "1.5G" },
        { "--size", "18014398509481984K" },
        { "--number", "18446744073709551616" },
        { "--real", "2.1" },
        { "--real", "nan" },
        { "--real", "inf" },
        { "--real", "1,5" },
        { "--real", "1e999" },
        { "--real", "" },
        { "--word", "All" },
        { "--word", "" },
        { "--counts", "1,,2" },
        { "--counts", "1,2," },
        { "--counts", "0" },
        { "--counts", "1,10" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        mepic_status status = PARSE(&v, &err, refused[i][0], refused[i][1]);
        if (status != MEPIC_ERR_ARGUMENT) fail_msg("%s '%s' was taken", refused[i][0], refused[i][1]);
        if (!strstr(err.message, refused[i][0])) fail_msg("'%s' does not name %s", err.message, refused[i][0]);
        if (refused[i][1][0] && !strstr(err.message, refused[i][1]))
            fail_msg("'%s' does not quote the value", err.message);
    }
}

static void expect(const char *message, const char *const *args, int argc) {
    values v;
    mepic_error err;
    assert_int_equal(parse(&v, &err, argc, args), MEPIC_ERR_ARGUMENT);
    assert_string_equal(err.message, message);
}

static void messages_name_the_option_and_what_it_takes(void **state) {
    (void)state;
    expect("--count: '1' is not all or none or a whole number from 2 to 100", (const char *const[]){ "-c", "1" }, 2);
    expect("--size: '1' is not a size from 1K to 1T, such as 512M or 2G", (const char *const[]){ "--size=1" }, 1);
    expect("--real: '9' is not a number from -1.5 to 2", (const char *const[]){ "--real", "9" }, 2);
    expect("--word: 'x' is not all or none", (const char *const[]){ "--word", "x" }, 2);
    expect("--text needs a value: TEXT", (const char *const[]){ "--text" }, 1);
    expect("--flag takes no value", (const char *const[]){ "--flag=1" }, 1);
    expect("unexpected argument 'file'; every argument is an option", (const char *const[]){ "file" }, 1);
    expect("unknown option --coutn; did you mean --count?", (const char *const[]){ "--coutn=3" }, 1);
    expect("unknown option --zebra; --help lists what there is", (const char *const[]){ "--zebra" }, 1);
    expect("unknown option -z; --help lists what there is", (const char *const[]){ "-z" }, 1);
}

static void a_slip_finds_the_nearest_name(void **state) {
    (void)state;
    const char *const names[] = { "run", "bench", "eval", "inspect", NULL };
    assert_string_equal(mp_nearest_name("rnu", names), "run");
    assert_string_equal(mp_nearest_name("bnech", names), "bench");
    assert_string_equal(mp_nearest_name("inspekt", names), "inspect");
    assert_null(mp_nearest_name("serve", names));
    assert_null(mp_nearest_name("", names));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_come_apart_or_attached_and_the_last_wins),
        cmocka_unit_test(numbers_are_strict),
        cmocka_unit_test(messages_name_the_option_and_what_it_takes),
        cmocka_unit_test(a_slip_finds_the_nearest_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
