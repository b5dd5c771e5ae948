/* docs/grafana.json against /metrics: what the dashboard asks for is there, and what only mepic counts is on it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/server.h"

typedef struct board {
    json_t *root;
    const char *expressions[128];
    size_t n;
} board;

static char *metrics; /* all of /metrics, behind a newline */

/* Every "expr" and every query of a variable. */
static void collect(const json_t *value, board *b) {
    const char *name;
    const json_t *item;
    size_t i;
    json_object_foreach((json_t *)value, name, item) {
        bool asks = strcmp(name, "expr") == 0 || strcmp(name, "definition") == 0;
        if (asks && json_is_string(item)) {
            assert_true(b->n < sizeof b->expressions / sizeof *b->expressions);
            b->expressions[b->n++] = json_string_value(item);
        }
        collect(item, b);
    }
    json_array_foreach((json_t *)value, i, item) {
        collect(item, b);
    }
}

static int open_board(void **state) {
    static board b;
    json_error_t err;
    if (setup(state) != 0) return 1;
    b = (board){ .root = json_load_file("docs/grafana.json", JSON_REJECT_DUPLICATES, &err) };
    if (!b.root) fail_msg("docs/grafana.json, line %d: %s", err.line, err.text);
    collect(b.root, &b);
    http_reply reply;
    assert_int_equal(http_ask(port, "GET", "/metrics", "", NULL, &reply), 200);
    metrics = malloc(reply.body_len + 2);
    assert_non_null(metrics);
    snprintf(metrics, reply.body_len + 2, "\n%s", reply.body);
    http_reply_clear(&reply);
    *state = &b;
    return 0;
}

static int close_board(void **state) {
    board *b = *state;
    json_decref(b->root);
    free(metrics);
    return teardown(state);
}

static bool is_name_char(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == ':';
}

/* The next name of a metric in an expression, and moves behind it. */
static bool next_metric(const char **text, char *name, size_t cap) {
    const char *vllm = strstr(*text, "vllm:"), *mepic = strstr(*text, "mepic:");
    const char *at_name = !vllm || (mepic && mepic < vllm) ? mepic : vllm;
    if (!at_name) return false;
    size_t n = 0;
    while (is_name_char(at_name[n])) n++;
    assert_true(n < cap);
    snprintf(name, cap, "%.*s", (int)n, at_name);
    *text = at_name + n;
    return true;
}

static void every_metric_it_asks_for_is_there(void **state) {
    const board *b = *state;
    assert_true(b->n > 20);
    size_t n = 0;
    for (size_t i = 0; i < b->n; i++) {
        const char *text = b->expressions[i];
        char name[128], line[160];
        while (next_metric(&text, name, sizeof name)) {
            snprintf(line, sizeof line, "\n%s{", name);
            if (!strstr(metrics, line)) fail_msg("%s is not in /metrics: %s", name, b->expressions[i]);
            n++;
        }
    }
    assert_true(n >= b->n - 1); // each asks for one at least, but for the variable of the data source
}

/* "sum by (kind) (rate(mepic:rows_total{...": /metrics has that label on that metric. */
static void every_label_it_groups_by_is_there(void **state) {
    const board *b = *state;
    size_t n = 0;
    for (size_t i = 0; i < b->n; i++) {
        const char *text = strstr(b->expressions[i], "sum by (");
        if (!text) continue;
        char label[64], name[128], words[80];
        assert_int_equal(sscanf(text, "sum by (%63[a-z_])", label), 1);
        assert_true(next_metric(&text, name, sizeof name));
        snprintf(words, sizeof words, ",%s=\"", label);
        char line[160];
        snprintf(line, sizeof line, "\n%s{", name);
        const char *found = strstr(metrics, line);
        assert_non_null(found);
        const char *end = strchr(found + 1, '\n'), *has = strstr(found, words);
        if (!has || has > end) fail_msg("%s has no label %s", name, label);
        n++;
    }
    assert_true(n > 10);
}

static void everything_of_mepic_is_on_it(void **state) {
    const board *b = *state;
    static const char type[] = "\n# TYPE mepic:";
    size_t n_types = 0;
    for (const char *at_type = strstr(metrics, type); at_type; at_type = strstr(at_type + 1, type), n_types++) {
        char name[128], seen[128];
        assert_int_equal(sscanf(at_type, "\n# TYPE %127s", name), 1);
        bool found = false;
        for (size_t i = 0; i < b->n && !found; i++) {
            const char *text = b->expressions[i];
            while (!found && next_metric(&text, seen, sizeof seen)) found = strcmp(seen, name) == 0;
        }
        if (!found) fail_msg("%s is on no panel of docs/grafana.json", name);
    }
    assert_true(n_types > 8);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_metric_it_asks_for_is_there),
        cmocka_unit_test(every_label_it_groups_by_is_there),
        cmocka_unit_test(everything_of_mepic_is_on_it),
    };
    return cmocka_run_group_tests(tests, open_board, close_board);
}
