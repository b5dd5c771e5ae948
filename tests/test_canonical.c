/* engine/canonical: the file that keeps the canonical context over a restart. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "support/replies.h"

static char dir[32], text_path[64], kv_path[512];
static uint32_t warnings;

static void count_warnings(void *user, mepic_log_level level, const char *message) {
    (void)user;
    (void)message;
    warnings += level <= MEPIC_LOG_WARN;
}

/* The same number of tokens whatever `name` is. */
static void write_text(char name) {
    FILE *f = fopen(text_path, "w");
    assert_non_null(f);
    for (int i = 0; i < 20; i++) fprintf(f, "Line %d of text %c that stands before every chunk.\n", i, name);
    fclose(f);
}

/* Finds the one record in dir. */
static void find_record(void) {
    DIR *d = opendir(dir);
    assert_non_null(d);
    int n = 0;
    for (struct dirent *entry; (entry = readdir(d));) {
        if (strncmp(entry->d_name, "canonical-", 10) != 0) continue;
        snprintf(kv_path, sizeof kv_path, "%s/%s", dir, entry->d_name);
        n++;
    }
    closedir(d);
    assert_int_equal(n, 1);
}

static int make_directory(void **state) {
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/mepic-canonical-XXXXXX");
    if (!mkdtemp(dir)) return -1;
    snprintf(text_path, sizeof text_path, "%s/text", dir);
    write_text('a');
    warnings = 0;
    return 0;
}

static int remove_directory(void **state) {
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

static mepic_engine_options options_with_file(void) {
    mepic_engine_options options = tiny_options();
    options.canonical_context = text_path;
    options.cache_dir = dir;
    options.log = count_warnings;
    options.pages = 512;
    return options;
}

static bool loaded; /* whether compiled_rows' last engine had its context from the file */

/* Opens an engine, asks over a document, closes it: how many rows were compiled, the context's among them or not. */
static uint64_t compiled_rows(const mepic_engine_options *options, uint64_t *hash) {
    mepic_usage usage;
    mepic_stats stats;
    *hash = ask(options, "Read: ", &usage, &stats);
    assert_true(usage.compiled_tokens > 0 && stats.pages_canonical > 0);
    loaded = stats.load_ns > 0;
    assert_int_equal(stats.loaded_pages, loaded ? stats.pages_canonical : 0);
    return stats.rows_compile;
}

static void a_restart_does_not_compute_it_again(void **state) {
    (void)state;
    mepic_engine_options options = options_with_file(), without = options;
    without.cache_dir = NULL;
    uint64_t want, hash;
    uint64_t rows = compiled_rows(&without, &want);
    assert_int_equal(compiled_rows(&options, &hash), rows); /* writes the file */
    assert_int_equal(hash, want);
    assert_false(loaded);
    assert_true(compiled_rows(&options, &hash) < rows); /* reads it */
    assert_true(loaded);
    assert_int_equal(hash, want);
    assert_int_equal(warnings, 0);
    options.kv_type = MEPIC_KV_BF16; /* other contents: another file */
    assert_int_equal(compiled_rows(&options, &hash), rows);
    assert_true(hash != want);
    assert_int_equal(warnings, 0);
}

static void flip_bit(long at) {
    FILE *f = fopen(kv_path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    int byte = fgetc(f);
    assert_true(byte >= 0);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    fputc(byte ^ 1, f);
    assert_int_equal(fclose(f), 0);
}

static void a_damaged_file_is_a_miss(void **state) {
    (void)state;
    const mepic_engine_options options = options_with_file();
    uint64_t want, hash, rows = compiled_rows(&options, &want);
    find_record();
    FILE *f = fopen(kv_path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    const long size = ftell(f);
    fclose(f);
    const long damaged[] = { 0, 8, 12, 16, 24, 60, 88, size / 2, size - 1, -1, -2 };
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        if (damaged[i] >= 0) {
            flip_bit(damaged[i]);
        } else {
            assert_int_equal(truncate(kv_path, damaged[i] == -1 ? size - 1 : 0), 0);
        }
        warnings = 0;
        assert_int_equal(compiled_rows(&options, &hash), rows); /* and writes it again */
        assert_int_equal(hash, want);
        assert_int_equal(warnings, 1);
        assert_true(compiled_rows(&options, &hash) < rows);
        assert_int_equal(hash, want);
    }
}

static void another_context_s_file_is_a_miss(void **state) {
    (void)state;
    const mepic_engine_options options = options_with_file();
    uint64_t want, other, hash, rows = compiled_rows(&options, &want);
    find_record();
    char path[512];
    memcpy(path, kv_path, sizeof path);
    assert_int_equal(unlink(kv_path), 0);
    write_text('b');
    assert_int_equal(compiled_rows(&options, &other), rows);
    assert_true(other != want);
    find_record();
    assert_int_equal(rename(kv_path, path), 0); /* intact, of the right size, under the wrong name */
    write_text('a');
    assert_int_equal(compiled_rows(&options, &hash), rows);
    assert_int_equal(hash, want);
    assert_int_equal(warnings, 1);
}

static void a_directory_that_cannot_be_written_costs_time_only(void **state) {
    (void)state;
    mepic_engine_options options = options_with_file();
    char nowhere[64];
    snprintf(nowhere, sizeof nowhere, "%s/text/nowhere", dir);
    uint64_t want, hash, rows = compiled_rows(&options, &want);
    options.cache_dir = nowhere;
    assert_int_equal(compiled_rows(&options, &hash), rows);
    assert_int_equal(hash, want);
    assert_true(warnings > 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_restart_does_not_compute_it_again, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(a_damaged_file_is_a_miss, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(another_context_s_file_is_a_miss, make_directory, remove_directory),
        cmocka_unit_test_setup_teardown(a_directory_that_cannot_be_written_costs_time_only, make_directory,
                                        remove_directory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
