/* engine/canonical: the file that keeps the canonical context over a restart. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "support/replies.h"

static void count_warnings(void *user, mepic_log_level level, const char *message) {
    (void)message;
    if (level <= MEPIC_LOG_WARN) ++*(uint32_t *)user;
}

static void the_canonical_context_is_kept_in_a_file(void **state) {
    (void)state;
    char dir[] = "/tmp/mepic-engine-XXXXXX", text_path[64], kv_path[256] = "";
    assert_non_null(mkdtemp(dir));
    snprintf(text_path, sizeof text_path, "%s/text", dir);
    FILE *f = fopen(text_path, "w");
    assert_non_null(f);
    for (int i = 0; i < 20; i++) fprintf(f, "Line %d of a text that stands before every chunk.\n", i);
    fclose(f);
    uint32_t warnings = 0;
    mepic_engine_options options = tiny_options();
    options.canonical_context = text_path;
    options.log = count_warnings;
    options.user = &warnings;
    options.pages = 512;
    mepic_usage usage;
    mepic_stats first, stats;
    uint64_t want = ask(&options, "Read: ", &usage, &first);
    assert_true(usage.compiled_tokens > 0 && first.pages_canonical > 0);

    options.cache_dir = dir;
    assert_int_equal(ask(&options, "Read: ", &usage, &stats), want); /* writes the file */
    assert_int_equal(stats.rows_compile, first.rows_compile);
    assert_int_equal(ask(&options, "Read: ", &usage, &stats), want); /* reads it */
    assert_true(stats.rows_compile < first.rows_compile);
    assert_int_equal(warnings, 0);

    char command[128];
    snprintf(command, sizeof command, "ls %s/canonical-*.kv", dir);
    FILE *list = popen(command, "r");
    assert_non_null(list);
    assert_non_null(fgets(kv_path, sizeof kv_path, list));
    pclose(list);
    kv_path[strcspn(kv_path, "\n")] = 0;
    f = fopen(kv_path, "r+b");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    const long damaged[] = { 0, 8, 12, 16, 24, 60, 88, size / 2, size - 1 };
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        fseek(f, damaged[i], SEEK_SET);
        int byte = fgetc(f);
        fseek(f, damaged[i], SEEK_SET);
        fputc(byte ^ 1, f);
        fflush(f);
        warnings = 0;
        /* The bad file is a miss: computed again, and written again over it. */
        assert_int_equal(ask(&options, "Read: ", &usage, &stats), want);
        assert_int_equal(stats.rows_compile, first.rows_compile);
        assert_int_equal(warnings, 1);
        assert_int_equal(ask(&options, "Read: ", &usage, &stats), want);
        assert_true(stats.rows_compile < first.rows_compile);
        fclose(f);
        f = fopen(kv_path, "r+b");
        assert_non_null(f);
    }
    assert_int_equal(ftruncate(fileno(f), size - 1), 0);
    fclose(f);
    warnings = 0;
    assert_int_equal(ask(&options, "Read: ", &usage, &stats), want);
    assert_int_equal(warnings, 1);
    assert_int_equal(stats.rows_compile, first.rows_compile);
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_canonical_context_is_kept_in_a_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
