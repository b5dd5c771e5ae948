/* Where tests find golden data; what is not there is skipped. */
#ifndef MEPIC_TESTS_GOLDEN_H
#define MEPIC_TESTS_GOLDEN_H

#include <jansson.h>
#include <stdio.h>

/* A golden file: tests/golden/NAME, or ../shared/golden/NAME; tests run in the source directory. NULL: not there. */
static inline json_t *golden_load(const char *name) {
    static const char *const places[] = { "tests/golden", "../shared/golden" };
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", places[i], name);
        json_t *root = json_load_file(path, JSON_ALLOW_NUL, NULL);
        if (root) return root;
    }
    return NULL;
}

#endif
