/* engine/: a model whose position encoding is not a fixed rotation is served, and shares beginnings only.
 *
 * The loader refuses every encoding that is not known to be one, so no file leads here yet; the linker puts this
 * program's mp_rope_exact in the place of the library's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "model/rope.h"
#include "support/replies.h"
#include "support/tiny.h"

bool __real_mp_rope_exact(const mp_model *model, const char **why);
bool __wrap_mp_rope_exact(const mp_model *model, const char **why);

static bool exact;
static uint32_t n_warnings;
static char warning[256];

bool __wrap_mp_rope_exact(const mp_model *model, const char **why) {
    if (exact) return __real_mp_rope_exact(model, why);
    *why = "its angles depend on the length of the text";
    return false;
}

static void keep_warning(void *user, mepic_log_level level, const char *message) {
    (void)user;
    if (level > MEPIC_LOG_WARN) return;
    n_warnings++;
    strncpy(warning, message, sizeof warning - 1);
}

static mepic_engine *open_with(bool is_exact, mepic_reuse reuse, mepic_model_info *info) {
    exact = is_exact;
    n_warnings = 0;
    mepic_engine_options options = tiny_options();
    options.canonical_context = NULL; /* the built-in one */
    options.pages = 512;
    options.context = 1024;
    options.reuse = reuse;
    options.log = keep_warning;
    mepic_engine *engine = open_engine(&options);
    mepic_model_info_read(engine, info);
    return engine;
}

static void opening_says_so(void **state) {
    (void)state;
    mepic_model_info info;
    mepic_engine_close(open_with(true, MEPIC_REUSE_MEPIC, &info));
    assert_true(info.position_exact);
    assert_int_equal(n_warnings, 0);
    mepic_engine_close(open_with(false, MEPIC_REUSE_MEPIC, &info));
    assert_false(info.position_exact);
    assert_int_equal(n_warnings, 1);
    assert_non_null(strstr(warning, "chunks are not shared, only prefixes"));
    assert_non_null(strstr(warning, "its angles depend on the length of the text"));
    assert_non_null(strstr(warning, tiny_model_path()));
}

static void no_room_is_kept_for_a_canonical_context(void **state) {
    (void)state;
    mepic_engine_options options = tiny_options();
    options.canonical_context = NULL;
    options.pages = 32; /* the context's */
    mepic_engine *engine;
    mepic_error err = { 0 };
    exact = true;
    expect(mepic_engine_open(&options, &engine, &err), MEPIC_ERR_ARGUMENT, &err, "for the canonical context");
    exact = false;
    mepic_engine_close(open_engine(&options));
}

enum { N_REQUESTS = 4 };

/* The document at three places, the first one again: what each request reused and computed. */
static void ask_all(mepic_engine *engine, mepic_reuse reuse, result *r, mepic_stats *stats) {
    static const char *const before[N_REQUESTS] = { "Read this: ", "And now, read this: ", "", "Read this: " };
    for (size_t i = 0; i < N_REQUESTS; i++) {
        mepic_prepared *prompt = prepare_document(engine, before[i]);
        const mepic_request request = { .prompt = prompt, .max_tokens = 8, .ignore_eos = true, .reuse = reuse };
        run(engine, &request, &r[i]);
        mepic_prepared_free(prompt);
    }
    mepic_stats_read(engine, stats);
}

static void expect_same(const result *a, const result *b) {
    for (size_t i = 0; i < N_REQUESTS; i++) {
        const mepic_usage *u = &a[i].usage, *v = &b[i].usage;
        assert_int_equal(a[i].hash, b[i].hash);
        assert_int_equal(a[i].n_tokens, b[i].n_tokens);
        assert_memory_equal(a[i].tokens, b[i].tokens, a[i].n_tokens * sizeof *a[i].tokens);
        assert_int_equal(u->prompt_tokens, v->prompt_tokens);
        assert_int_equal(u->prefix_tokens, v->prefix_tokens);
        assert_int_equal(u->computed_tokens, v->computed_tokens);
        assert_int_equal(u->chunk_tokens + u->linked_tokens + u->compiled_tokens, 0);
        assert_int_equal(v->chunk_tokens + v->linked_tokens + v->compiled_tokens, 0);
        assert_int_equal(u->pages_held, v->pages_held);
    }
}

static void mepic_is_served_as_prefix(void **state) {
    (void)state;
    static const mepic_reuse ways[][2] = {
        /* the engine's policy, the request's */
        { MEPIC_REUSE_MEPIC, MEPIC_REUSE_DEFAULT },
        { MEPIC_REUSE_DEFAULT, MEPIC_REUSE_DEFAULT },
        { MEPIC_REUSE_PREFIX, MEPIC_REUSE_MEPIC },
    };
    static result want[N_REQUESTS], got[N_REQUESTS];
    mepic_model_info info;
    mepic_stats stats;
    mepic_engine *engine = open_with(true, MEPIC_REUSE_PREFIX, &info); /* an exact model that shares no chunks */
    ask_all(engine, MEPIC_REUSE_DEFAULT, want, &stats);
    mepic_engine_close(engine);
    assert_int_equal(want[1].usage.prefix_tokens, 0);
    assert_true(want[3].usage.prefix_tokens > 300); /* the whole document */

    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        engine = open_with(false, ways[i][0], &info);
        ask_all(engine, ways[i][1], got, &stats);
        expect_same(got, want);
        assert_int_equal(stats.rows_link + stats.rows_compile + stats.chunk_lookups + stats.compiles, 0);
        assert_int_equal(stats.pages_canonical, 0);
        /* what was asked as `mepic` lies under the same names as what is asked as `prefix` */
        ask_all(engine, MEPIC_REUSE_PREFIX, got, &stats);
        for (size_t q = 0; q < N_REQUESTS; q++) {
            assert_int_equal(got[q].hash, want[q].hash);
            assert_true(got[q].usage.computed_tokens <= info.page_size);
        }
        mepic_engine_close(engine);
    }

    engine = open_with(true, MEPIC_REUSE_MEPIC, &info); /* what would be shared if it were exact */
    ask_all(engine, MEPIC_REUSE_DEFAULT, got, &stats);
    assert_true(got[1].usage.chunk_tokens > 300 && got[2].usage.chunk_tokens > 300);
    mepic_engine_close(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(opening_says_so),
        cmocka_unit_test(no_room_is_kept_for_a_canonical_context),
        cmocka_unit_test(mepic_is_served_as_prefix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
