/* base/file: directories, and files that are replaced as a whole or not at all. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/file.h"

static char root[32], path[64]; /* path: root/file */

static int make_root(void **state) {
    (void)state;
    snprintf(root, sizeof root, "/tmp/mepic-file-XXXXXX");
    if (!mkdtemp(root)) return -1;
    snprintf(path, sizeof path, "%s/file", root);
    return 0;
}

static int remove_root(void **state) {
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

static bool fill_text(void *ctx, int fd) {
    return mp_write_all(fd, ctx, strlen(ctx));
}

static void expect_text(const char *file, const char *want) {
    char have[64];
    FILE *f = fopen(file, "rb");
    assert_non_null(f);
    size_t n = fread(have, 1, sizeof have, f);
    fclose(f);
    assert_int_equal(n, strlen(want));
    assert_memory_equal(have, want, n);
}

static void expect_entries(const char *dir, int want) {
    DIR *d = opendir(dir);
    assert_non_null(d);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));) n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(d);
    assert_int_equal(n, want);
}

static void expect_failure(const char *file, mp_file_fill *fill, void *ctx, const char *name, int why) {
    mepic_error err = { 0 };
    assert_int_equal(mp_file_replace(file, fill, ctx, &err), MEPIC_ERR_IO);
    if (!strstr(err.message, name) || !strstr(err.message, strerror(why))) {
        fail_msg("\"%s\" names not %s, or not \"%s\"", err.message, name, strerror(why));
    }
}

static void a_file_is_made_and_replaced(void **state) {
    (void)state;
    char deep[128], dir[64];
    snprintf(dir, sizeof dir, "%s/a/b", root);
    snprintf(deep, sizeof deep, "%s/file", dir);
    assert_int_equal(mp_file_replace(deep, fill_text, "first", NULL), MEPIC_OK);
    expect_text(deep, "first");
    assert_int_equal(mp_file_replace(deep, fill_text, "the second", NULL), MEPIC_OK);
    expect_text(deep, "the second");
    expect_entries(dir, 1);
    struct stat info; /* what is kept there is the user's alone */
    assert_int_equal(stat(dir, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0700);
    assert_int_equal(stat(deep, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0600);

    char here[PATH_MAX];
    assert_non_null(getcwd(here, sizeof here));
    assert_int_equal(chdir(root), 0);
    mepic_status plain = mp_file_replace("file", fill_text, "plain", NULL);
    mepic_status nested = mp_file_replace("c//d/file", fill_text, "nested", NULL);
    assert_int_equal(chdir(here), 0);
    assert_int_equal(plain, MEPIC_OK);
    assert_int_equal(nested, MEPIC_OK);
    expect_text(path, "plain");
}

static void directories_are_made(void **state) {
    (void)state;
    char dir[64];
    static const char *const names[] = { "", "/", "/x", "/x/y/z", "/x/y/z/", "//p//q", "/x/../r" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        for (int again = 0; again < 2; again++) {
            snprintf(dir, sizeof dir, "%s%s", root, names[i]);
            assert_int_equal(mp_dir_make(dir, NULL), MEPIC_OK);
            struct stat info;
            assert_true(stat(dir, &info) == 0 && S_ISDIR(info.st_mode));
        }
    }
    assert_int_equal(mp_dir_make("/", NULL), MEPIC_OK);
    assert_int_equal(mp_dir_make(".", NULL), MEPIC_OK);
}

static bool give_up(void *ctx, int fd) {
    (void)ctx;
    assert_true(mp_write_all(fd, "half", 4));
    errno = ENOSPC;
    return false;
}

static bool give_up_without_reason(void *ctx, int fd) {
    (void)ctx;
    (void)fd;
    return false;
}

static void a_failed_write_leaves_the_old_file(void **state) {
    (void)state;
    expect_failure(path, give_up, NULL, path, ENOSPC);
    expect_entries(root, 0);
    assert_int_equal(mp_file_replace(path, fill_text, "old", NULL), MEPIC_OK);
    expect_failure(path, give_up, NULL, path, ENOSPC);
    expect_failure(path, give_up_without_reason, NULL, path, EIO);
    expect_text(path, "old");

    struct rlimit limit, few;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    few = limit;
    few.rlim_cur = 3; /* the first call writes three bytes, the next one none */
    mepic_error err;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &few), 0);
    mepic_status st = mp_file_replace(path, fill_text, "too long", &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, handler);
    assert_int_equal(st, MEPIC_ERR_IO);
    assert_non_null(strstr(err.message, path));
    assert_non_null(strstr(err.message, strerror(EFBIG)));
    expect_text(path, "old");
    expect_entries(root, 1);
}

static bool die_halfway(void *ctx, int fd) {
    (void)ctx;
    _exit(mp_write_all(fd, "half", 4) ? 7 : 1);
}

static void an_interrupted_write_leaves_the_old_file(void **state) {
    (void)state;
    assert_int_equal(mp_file_replace(path, fill_text, "old", NULL), MEPIC_OK);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        mp_file_replace(path, die_halfway, NULL, NULL);
        _exit(1);
    }
    int how;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFEXITED(how) && WEXITSTATUS(how) == 7);
    expect_text(path, "old");
    assert_int_equal(mp_file_replace(path, fill_text, "new", NULL), MEPIC_OK);
    expect_text(path, "new");
}

static void errors_name_the_culprit(void **state) {
    (void)state;
    char below[128], dir[64];
    assert_int_equal(mp_file_replace(path, fill_text, "a file", NULL), MEPIC_OK);
    snprintf(below, sizeof below, "%s/x/y", path);
    mepic_error err;
    assert_int_equal(mp_dir_make(path, &err), MEPIC_ERR_IO); /* a file is in the way, and is what is named */
    assert_non_null(strstr(err.message, path));
    assert_int_equal(mp_dir_make(below, &err), MEPIC_ERR_IO);
    assert_non_null(strstr(err.message, path));
    assert_null(strstr(err.message, "/x"));
    expect_failure(below, fill_text, "", path, EEXIST);
    expect_text(path, "a file");

    snprintf(dir, sizeof dir, "%s/dir/sub", root);
    assert_int_equal(mp_dir_make(dir, NULL), MEPIC_OK);
    *strrchr(dir, '/') = 0;
    expect_failure(dir, fill_text, "", dir, EISDIR);
    expect_entries(root, 2);

    char *longest = malloc(PATH_MAX + 1);
    assert_non_null(longest);
    memset(longest, 'x', PATH_MAX);
    longest[PATH_MAX] = 0;
    assert_int_equal(mp_dir_make(longest, &err), MEPIC_ERR_IO);
    assert_int_equal(mp_file_replace(longest, fill_text, "", &err), MEPIC_ERR_IO);
    free(longest);
    assert_int_equal(mp_dir_make("", &err), MEPIC_ERR_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_file_is_made_and_replaced, make_root, remove_root),
        cmocka_unit_test_setup_teardown(directories_are_made, make_root, remove_root),
        cmocka_unit_test_setup_teardown(a_failed_write_leaves_the_old_file, make_root, remove_root),
        cmocka_unit_test_setup_teardown(an_interrupted_write_leaves_the_old_file, make_root, remove_root),
        cmocka_unit_test_setup_teardown(errors_name_the_culprit, make_root, remove_root),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
