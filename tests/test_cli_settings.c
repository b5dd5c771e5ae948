/* cli/settings: which of three places counts, and that what is refused is named with its place. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/settings.h"

typedef struct values {
    mp_settings settings;
    const char *text;
    mp_texts names;
    uint32_t count, word;
    bool flag;
} values;

static const mp_word word_list[] = { { "all", 77 }, { "none", 78 }, { NULL, 0 } };
static char path[] = "/tmp/mepic-settings-XXXXXX", said_path[] = "/tmp/mepic-said-XXXXXX";
static char said[4096];
static int exit_status;

static void write_config(const char *text, size_t n) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

/* Standard output or error goes to a file meanwhile. */
static int turn_aside(int fd) {
    int kept = dup(fd);
    FILE *file = fopen(said_path, "w");
    assert_non_null(file);
    assert_true(kept >= 0 && dup2(fileno(file), fd) >= 0);
    fclose(file);
    return kept;
}

static void turn_back(int fd, int kept) {
    fflush(NULL);
    dup2(kept, fd);
    close(kept);
    FILE *file = fopen(said_path, "r");
    assert_non_null(file);
    said[fread(said, 1, sizeof said - 1, file)] = 0;
    fclose(file);
}

/* Reads the three places; what is printed on `fd` lies in `said` afterwards. */
static bool read_places(values *v, int fd, const char *config, const char *const *args) {
    const mp_option options[] = {
        MP_SETTINGS_OPTION(&v->settings),
        MP_TEXT('t', "text", &v->text, "TEXT", "a text"),
        MP_TEXTS('a', "a-name", &v->names, "NAME", "names"),
        MP_COUNT('c', "a-count", &v->count, 2, 100, "N", "a count"),
        MP_WORD(0, "word", &v->word, word_list, "WORD", "a word"),
        MP_FLAG('f', "flag", &v->flag, "a flag"),
    };
    const mp_option_group group = { "Test", options, sizeof options / sizeof *options };
    char *argv[16] = { "test" };
    int argc = 1;
    for (; args[argc - 1]; argc++) argv[argc] = (char *)args[argc - 1];
    if (config) {
        write_config(config, strlen(config));
        argv[argc++] = "--config";
        argv[argc++] = path;
    }
    *v = (values){ .count = 5 };
    int kept = turn_aside(fd);
    bool ok =
        mp_settings_begin(&v->settings, "test", "usage: test\n" MP_SETTINGS_USAGE, &group, 1, argc, argv, &exit_status);
    turn_back(fd, kept);
    return ok;
}
#define READ(v, config, ...) read_places(v, STDERR_FILENO, config, (const char *const[]){ __VA_ARGS__, NULL })
#define READ_NONE(v, config) read_places(v, STDERR_FILENO, config, (const char *const[]){ NULL })

static int forget_environment(void **state) {
    (void)state;
    static const char *const names[] = { "CONFIG", "TEXT", "A_NAME", "A_COUNT", "WORD", "FLAG" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char name[32];
        snprintf(name, sizeof name, "MEPIC_%s", names[i]);
        unsetenv(name);
    }
    return 0;
}

static void the_command_line_wins_then_the_environment(void **state) {
    (void)state;
    values v;
    static const char config[] = "a-count = 10\ntext=file\nword = all\nflag = yes\n";
    assert_true(READ_NONE(&v, config));
    assert_int_equal(v.count, 10);
    assert_int_equal(v.word, 77);
    assert_string_equal(v.text, "file");
    assert_true(v.flag);
    mp_settings_clear(&v.settings);

    setenv("MEPIC_A_COUNT", "20", 1);
    setenv("MEPIC_TEXT", "environment", 1);
    setenv("MEPIC_FLAG", "no", 1);
    setenv("MEPIC_WORD", "", 1); // as good as none
    assert_true(READ_NONE(&v, config));
    assert_int_equal(v.count, 20);
    assert_int_equal(v.word, 77);
    assert_string_equal(v.text, "environment");
    assert_false(v.flag);
    mp_settings_clear(&v.settings);

    assert_true(READ(&v, config, "-c", "30", "-f"));
    assert_int_equal(v.count, 30);
    assert_string_equal(v.text, "environment");
    assert_true(v.flag);
    mp_settings_clear(&v.settings);
    forget_environment(NULL);

    assert_true(READ_NONE(&v, NULL));
    assert_int_equal(v.count, 5);
    assert_null(v.text);
}

static void a_stronger_place_replaces_all_values(void **state) {
    (void)state;
    values v;
    static const char config[] = "a-name = one\na-name = two\n";
    assert_true(READ_NONE(&v, config));
    assert_int_equal(v.names.n, 2);
    assert_string_equal(v.names.items[1], "two");
    mp_settings_clear(&v.settings);
    assert_true(READ(&v, config, "-a", "three", "-a", "four", "-a", "five"));
    assert_int_equal(v.names.n, 3);
    assert_string_equal(v.names.items[0], "three");
    mp_settings_clear(&v.settings);
    setenv("MEPIC_A_NAME", "six", 1);
    assert_true(READ_NONE(&v, config));
    assert_int_equal(v.names.n, 1);
    assert_string_equal(v.names.items[0], "six");
    mp_settings_clear(&v.settings);
}

static void a_byte_order_mark_is_no_setting(void **state) {
    (void)state;
    values v;
    assert_true(READ_NONE(&v, "\xef\xbb\xbftext = x\n"));
    assert_string_equal(v.text, "x");
    mp_settings_clear(&v.settings);
    assert_false(READ_NONE(&v, "flag = yes\n\xef\xbb\xbftext = x\n"));
}

static void the_environment_may_name_the_file(void **state) {
    (void)state;
    values v;
    write_config("a-count=11", 10);
    setenv("MEPIC_CONFIG", path, 1);
    assert_true(READ_NONE(&v, NULL));
    assert_int_equal(v.count, 11);
    mp_settings_clear(&v.settings);
    setenv("MEPIC_CONFIG", "", 1); // compose files write NAME= for what is not set
    assert_true(READ_NONE(&v, NULL));
    mp_settings_clear(&v.settings);
    setenv("MEPIC_CONFIG", "/nonexistent", 1);
    assert_true(READ_NONE(&v, "a-count = 12")); // --config is stronger
    assert_int_equal(v.count, 12);
    mp_settings_clear(&v.settings);
    assert_false(READ_NONE(&v, NULL));
    assert_non_null(strstr(said, "--config: /nonexistent cannot be opened"));
}

static void lines_are_read_as_people_write_them(void **state) {
    (void)state;
    values v;
    assert_true(READ_NONE(&v, "# a comment\r\n\r\n  \t\n\t a-count\t=  12 \r\n text = a = # b \r\n# flag = yes"));
    assert_int_equal(v.count, 12);
    assert_string_equal(v.text, "a = # b");
    assert_false(v.flag);
    mp_settings_clear(&v.settings);
    assert_true(READ_NONE(&v, "text = \" # # \"\nflag = false"));
    assert_string_equal(v.text, " # # ");
    mp_settings_clear(&v.settings);
    assert_true(READ_NONE(&v, "text ="));
    assert_string_equal(v.text, "");
    mp_settings_clear(&v.settings);
    assert_true(READ_NONE(&v, "text = \""));
    assert_string_equal(v.text, "\"");
    mp_settings_clear(&v.settings);
    assert_true(READ_NONE(&v, ""));
    mp_settings_clear(&v.settings);
}

static void expect_said(const char *words) {
    if (!strstr(said, words)) fail_msg("'%s' is not in: %s", words, said);
    assert_int_equal(exit_status, MP_EXIT_USAGE);
    const char *end = strchr(said, '\n');
    assert_true(end && !end[1]);
}

static void what_is_refused_is_named_with_its_place(void **state) {
    (void)state;
    static const struct {
        const char *config, *line, *words;
    } bad[] = {
        { "\na-count = 1", ", line 2: ", "a-count: '1' is not a whole number from 2 to 100" },
        { "a-count = 7 # seven", ", line 1: ", "a-count: '7 # seven' is not" },
        { "a-count = 10\nacount = 10", ", line 2: ", "unknown option 'acount'; did you mean a-count" },
        { "zebra = 1", ", line 1: ", "unknown option 'zebra'; --help" },
        { "c = 10", ", line 1: ", "unknown option 'c'" },
        { "--a-count = 10", ", line 1: ", "unknown option '--a-count'; did you mean a-count" },
        { "a-count 10", ", line 1: ", "'a-count 10' is not NAME = VALUE" },
        { "[server]", ", line 1: ", "'[server]' is not NAME = VALUE" },
        { "= 10", ", line 1: ", "unknown option ''" },
        { "flag = maybe", ", line 1: ", "flag: 'maybe' is not yes or no" },
        { "flag", ", line 1: ", "'flag' is not NAME = VALUE" },
        { "word = some", ", line 1: ", "word: 'some' is not all or none" },
        { "config = other", ", line 1: ", "a file does not name another one" },
    };
    values v;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(READ_NONE(&v, bad[i].config));
        expect_said(path);
        expect_said(bad[i].line);
        expect_said(bad[i].words);
        assert_null(v.settings.text);
    }
    setenv("MEPIC_A_COUNT", "tcp://10.0.0.1:80", 1);
    assert_false(READ_NONE(&v, NULL));
    expect_said("MEPIC_A_COUNT: 'tcp://10.0.0.1:80' is not a whole number from 2 to 100");
    assert_false(READ(&v, NULL, "--a-count", "3")); // it is wrong, whether it counts or not
    unsetenv("MEPIC_A_COUNT");
    assert_false(READ(&v, "a-count = 3", "--a-count=101"));
    expect_said("--a-count: '101' is not");
    write_config("text = a\0b", 10);
    setenv("MEPIC_CONFIG", path, 1);
    assert_false(READ_NONE(&v, NULL));
    expect_said("byte 9 is NUL");
}

static void help_says_how(void **state) {
    (void)state;
    values v;
    setenv("MEPIC_A_COUNT", "nonsense", 1); // help comes all the same
    assert_false(read_places(&v, STDOUT_FILENO, "nonsense", (const char *const[]){ "--help", NULL }));
    assert_int_equal(exit_status, MP_EXIT_OK);
    assert_non_null(strstr(said, "MEPIC_MAX_REPLIES=64 in the environment"));
    assert_non_null(strstr(said, "--config FILE"));
}

int main(void) {
    int fds[] = { mkstemp(path), mkstemp(said_path) };
    for (int i = 0; i < 2; i++) {
        if (fds[i] < 0 || close(fds[i]) != 0) return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(the_command_line_wins_then_the_environment, forget_environment),
        cmocka_unit_test_teardown(a_stronger_place_replaces_all_values, forget_environment),
        cmocka_unit_test_teardown(a_byte_order_mark_is_no_setting, forget_environment),
        cmocka_unit_test_teardown(the_environment_may_name_the_file, forget_environment),
        cmocka_unit_test_teardown(lines_are_read_as_people_write_them, forget_environment),
        cmocka_unit_test_teardown(what_is_refused_is_named_with_its_place, forget_environment),
        cmocka_unit_test_teardown(help_says_how, forget_environment),
    };
    forget_environment(NULL);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    unlink(said_path);
    return failed;
}
