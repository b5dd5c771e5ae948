/* schedule/: admission, jobs, accounting, on paper. Rows are test_step's, what a row may see is test_simulation's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "support/random.h"
#include "support/schedule.h"

static void a_chunk_is_compiled_once_and_then_read(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 20);
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 10);
    mp_request_spec spec = spec_of(&p);
    mepic_usage first = ask(&b, &spec);
    assert_int_equal(first.compiled_tokens, 84);
    assert_int_equal(first.linked_tokens, 16);
    assert_int_equal(first.computed_tokens, 30);
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 4, 50); /* other text, other position */
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 5, 10);
    spec = spec_of(&p);
    mepic_usage second = ask(&b, &spec);
    assert_int_equal(second.chunk_tokens, 84);
    assert_int_equal(second.linked_tokens, 16);
    assert_int_equal(second.computed_tokens, 60);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

static void the_canonical_context_is_computed_once(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    open_bench(&config, &b);
    mepic_stats stats;
    static prompt p;
    for (int32_t i = 0; i < 5; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_CHUNK, 10 + i, 80);
        put_new(&p, MEPIC_TEXT, 20 + i, 10);
        mp_request_spec spec = spec_of(&p);
        ask(&b, &spec);
        mp_scheduler_stats(b.s, &stats);
        assert_int_equal(stats.rows_compile, 40 + 80 * (i + 1));
        assert_int_equal(stats.pages_canonical, 3);
    }
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);

    open_bench(&config, &b); /* its pages from a file */
    uint32_t n;
    bool ready;
    assert_true(mp_scheduler_canonical_take(b.s));
    assert_non_null(mp_scheduler_canonical_pages(b.s, &n, &ready));
    assert_true(n == 3 && !ready);
    mp_scheduler_canonical_loaded(b.s);
    mp_scheduler_canonical_pages(b.s, &n, &ready);
    assert_true(ready);
    mp_request_spec spec = spec_of(&p);
    ask(&b, &spec);
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.rows_compile, 80);
    mp_scheduler_close(b.s);
}

static void equal_needs_share_one_job(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    config.step_tokens = 30;
    open_bench(&config, &b);
    static prompt p;
    mp_request *requests[4];
    for (int32_t i = 0; i < 4; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 10 + i, 20 + (uint32_t)i);
        put_new(&p, MEPIC_CHUNK, 2, 100);
        put_new(&p, MEPIC_TEXT, 3, 5);
        mp_request_spec spec = spec_of(&p);
        requests[i] = submit(&b, &spec);
    }
    step(&b, NULL);
    step(&b, NULL);
    step(&b, NULL); /* in the middle of the chunk, its first asker leaves */
    mp_scheduler_finish(b.s, requests[0]);
    check(&b);
    run_all(&b, NULL);
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.compiles, 1);
    assert_int_equal(stats.rows_compile, 40 + 100);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

static void a_job_nobody_waits_for_keeps_its_finished_pages(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    config.n_canonical = 0;
    config.step_tokens = 40;
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 5);
    mp_request_spec spec = spec_of(&p);
    mp_request *r = submit(&b, &spec);
    assert_int_equal(step(&b, NULL), 40);
    mp_scheduler_finish(b.s, r);
    check(&b);
    assert_int_equal(step(&b, NULL), 0);
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.pages_evictable, 2); /* 40 tokens */
    mepic_usage usage = ask(&b, &spec);
    assert_int_equal(usage.chunk_tokens, 16); /* tokens 16 to 31: token 0 to 15 are linked */
    assert_int_equal(usage.compiled_tokens, 100 - 32);
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.rows_compile, 40 + 100 - 32);
    mp_scheduler_close(b.s);
}

static void an_edited_document_computes_from_the_edit_on(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 512);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_CHUNK, 2, 300);
    put_new(&p, MEPIC_TEXT, 3, 5);
    mp_request_spec spec = spec_of(&p);
    ask(&b, &spec);
    p.tokens[200] = 999999;
    mepic_usage usage = ask(&b, &spec);
    assert_int_equal(usage.chunk_tokens, 192 - 16);
    assert_int_equal(usage.compiled_tokens, 300 - 192);
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.rows_compile, 40 + 300 + 108);
    mp_scheduler_close(b.s);
}

static void the_next_turn_computes_what_is_new(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 512);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 30);
    put_new(&p, MEPIC_CHUNK, 2, 200);
    put_new(&p, MEPIC_TEXT, 3, 33);
    for (int32_t turn = 0; turn < 6; turn++) {
        mp_request_spec spec = spec_of(&p);
        mepic_usage usage = ask(&b, &spec);
        uint32_t n_new = turn == 0 ? 30 + 16 + 33 : 7 + 20; /* the reply's last token has never been a row */
        assert_true(usage.computed_tokens + usage.linked_tokens <= n_new + 16);
        assert_int_equal(usage.chunk_tokens, turn == 0 ? 0 : 184);
        int32_t reply[8] = { 77, 77, 77, 77, 77, 77, 77, 77 };
        put(&p, MEPIC_TEXT, reply, 8);
        put_new(&p, MEPIC_TEXT, 10 + turn, 20);
    }
    mp_scheduler_close(b.s);
}

static void pages_of_a_chunk_are_written_once(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 1024);
    open_bench(&config, &b);
    static prompt p;
    mp_digest scope = { { 0 } };
    mp_page pages[16], first[16];
    uint64_t versions[16];
    for (int32_t i = 0; i < 100; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 100 + i, 1 + (uint32_t)i);
        if (i % 3 == 0) put_new(&p, MEPIC_CHUNK, 50 + i % 7, 90);
        uint32_t at = p.n;
        put_new(&p, MEPIC_CHUNK, 2, 100);
        put_new(&p, MEPIC_TEXT, 3, 5);
        mp_request_spec spec = spec_of(&p);
        ask(&b, &spec);
        assert_int_equal(mp_scheduler_chunk_pages(b.s, &scope, p.tokens + at, 100, pages, 16), 7);
        for (uint32_t k = 0; k < 7; k++) {
            if (i == 0) first[k] = pages[k], versions[k] = mp_scheduler_page_version(b.s, pages[k]);
            assert_int_equal(pages[k], first[k]);
            assert_int_equal(mp_scheduler_page_version(b.s, pages[k]), versions[k]);
        }
    }
    mp_scheduler_close(b.s);
}

/* 64 requests of 8 chunks out of 32, all in decode at once: the pages are those on paper. */
static void pages_referenced_are_the_count_on_paper(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 4096);
    open_bench(&config, &b);
    static prompt p;
    bool used[32] = { false };
    uint32_t n_private = 0, n_unshared = 0;
    rng r = rng_open(9);
    for (int32_t i = 0; i < 64; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 100 + i, 10 + rng_below(&r, 20));
        uint32_t first = rng_below(&r, 32),
                 stride = 1 + 2 * rng_below(&r, 16); /* odd: 8 different ones, in some order */
        for (uint32_t k = 0; k < 8; k++) {
            uint32_t c = (first + k * stride) % 32;
            used[c] = true;
            put_new(&p, MEPIC_CHUNK, 1000 + (int32_t)c, 200 + c);
        }
        put_new(&p, MEPIC_TEXT, 200 + i, 10 + rng_below(&r, 20));
        mp_request_spec spec = spec_of(&p);
        spec.max_tokens = 200;
        submit(&b, &spec);
        uint32_t n_chunk = 0;
        for (uint32_t k = 0; k < p.n_spans; k++) n_chunk += p.spans[k].kind == MEPIC_CHUNK ? p.spans[k].n - 16 : 0;
        n_private += (p.n - n_chunk + PAGE - 1) / PAGE;
        n_unshared += (p.n + PAGE - 1) / PAGE;
    }
    uint32_t n_canonical = 0, n_pages = 0;
    for (uint32_t c = 0; c < 32; c++) n_canonical += used[c] ? (200 + c + PAGE - 1) / PAGE : 0;
    while (step(&b, NULL) != 64) {
    } /* until all are in decode */
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    for (uint32_t seq = 0; seq < 64; seq++) { /* replies have begun at different times */
        mepic_usage usage;
        mp_request *request = mp_scheduler_request(b.s, seq);
        mp_request_usage(request, &usage);
        uint32_t shared = usage.chunk_tokens + usage.compiled_tokens;
        uint32_t n_stream = usage.prompt_tokens - shared + usage.completion_tokens - 1;
        n_pages += (n_stream + PAGE - 1) / PAGE;
        uint32_t own = (usage.prompt_tokens - shared + PAGE - 1) / PAGE;
        n_private -= own;
        n_unshared -= (usage.prompt_tokens + PAGE - 1) / PAGE;
    }
    assert_int_equal(n_private, 0);
    assert_int_equal(n_unshared, 0);
    assert_int_equal(stats.pages_referenced, n_canonical + n_pages);
    assert_true(stats.pages_unshared > 4 * stats.pages_referenced);
    printf("%u pages referenced, %u without sharing\n", stats.pages_referenced, stats.pages_unshared);
    run_all(&b, NULL);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

static void the_head_is_overtaken_at_most_eight_times(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 64);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 330); /* 21 pages */
    mp_request_spec spec = spec_of(&p);
    spec.max_tokens = 150;
    submit(&b, &spec);
    step(&b, NULL);
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 2, 700); /* 44 pages: not beside the first */
    spec = spec_of(&p);
    spec.max_tokens = 4;
    mp_request *head = submit(&b, &spec);
    mp_request *later[12];
    for (int32_t i = 0; i < 12; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 10 + i, 10);
        spec = spec_of(&p);
        spec.max_tokens = 4;
        later[i] = submit(&b, &spec);
    }
    uint32_t n_before_head = 0;
    for (bool head_ran = false; mp_scheduler_busy(b.s);) {
        const mp_step *s;
        assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK);
        for (uint32_t i = 0; i < s->n_rows; i++) {
            mp_request *r = mp_scheduler_request(b.s, s->rows[i].seq);
            head_ran |= r == head;
            for (uint32_t k = 0; k < 12; k++) n_before_head += !head_ran && r == later[k] && s->rows[i].index == 0;
        }
        mp_scheduler_commit(b.s);
        for (uint32_t i = 0; i < s->n_rows; i++) {
            if (!s->rows[i].logits) continue;
            mp_request *r = mp_scheduler_request(b.s, s->rows[i].seq);
            uint32_t n, n_prompt;
            mp_scheduler_append(b.s, r, 77);
            mp_request_tokens(r, &n, &n_prompt);
            if (n - n_prompt == mp_request_max_tokens(r)) mp_scheduler_finish(b.s, r);
        }
        check(&b);
    }
    assert_int_equal(n_before_head, 8);
    mp_scheduler_close(b.s);
}

static void what_can_never_fit_is_refused_with_the_numbers(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 100);
    config.context = 2000;
    open_bench(&config, &b);
    static prompt p;
    mp_request *r;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 2000);
    mp_request_spec spec = spec_of(&p);
    assert_int_equal(mp_scheduler_submit(b.s, &spec, &r, &b.err), MEPIC_ERR_TOO_LONG);
    assert_non_null(strstr(b.err.message, "2000"));
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 1300);
    put_new(&p, MEPIC_CHUNK, 2, 150);
    put_new(&p, MEPIC_TEXT, 3, 10);
    spec = spec_of(&p);
    spec.max_tokens = 50; /* 1300 + 16 + 10 + 50 = 86 pages, 10 of the chunk, 3 of the canonical context: 99 */
    r = submit(&b, &spec);
    mp_scheduler_finish(b.s, r);
    spec.max_tokens = 50 + 16;
    submit(&b, &spec);
    spec.max_tokens = 50 + 16 + 1;
    assert_int_equal(mp_scheduler_submit(b.s, &spec, &r, &b.err), MEPIC_ERR_TOO_LONG);
    const char *numbers[] = { "1460", "67", "101 pages", "88", "10", "3", "100" };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (!strstr(b.err.message, numbers[i])) fail_msg("no %s in: %s", numbers[i], b.err.message);
    }
    spec.max_tokens = 0; /* as long as there is room */
    r = submit(&b, &spec);
    assert_int_equal(mp_request_max_tokens(r), 50 + 16);
    run_all(&b, NULL);
    mp_scheduler_close(b.s);
}

static void a_full_queue_is_busy(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 100);
    config.max_queued = 3;
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 10);
    mp_request_spec spec = spec_of(&p);
    mp_request *r;
    for (uint32_t i = 0; i < 3; i++) submit(&b, &spec);
    assert_int_equal(mp_scheduler_submit(b.s, &spec, &r, &b.err), MEPIC_ERR_BUSY);
    step(&b, NULL);
    submit(&b, &spec);
    mp_scheduler_close(b.s); /* with requests queued and running */
}

static void scopes_share_nothing(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 512);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 40);
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 5);
    mp_request_spec spec = spec_of(&p);
    ask(&b, &spec);
    spec.scope.bytes[31] = 1;
    mepic_usage usage = ask(&b, &spec);
    assert_int_equal(usage.chunk_tokens + usage.prefix_tokens, 0);
    usage = ask(&b, &spec); /* and in pairs: the same scope does */
    assert_true(usage.chunk_tokens == 84 && usage.prefix_tokens == 48);
    mp_scheduler_close(b.s);
}

static void versions_of_a_document_are_computed_once_as_far_as_they_agree(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 512);
    config.max_jobs = 1;
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_CHUNK, 2, 300);
    put_new(&p, MEPIC_TEXT, 3, 5);
    mp_request_spec spec = spec_of(&p);
    submit(&b, &spec);
    p.tokens[200] = 999999;
    submit(&b, &spec); /* neither version is there: two jobs, the second finds what the first has made */
    run_all(&b, NULL);
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    assert_int_equal(stats.compiles, 2);
    assert_int_equal(stats.rows_compile, 40 + 300 + 108);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

static void a_chunk_inside_a_longer_one_outlives_it(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 96);
    static prompt p;
    const uint32_t lengths[] = { 64, 128, 64, 64 }; /* the short one is asked for again: it is worth more */
    for (uint32_t i = 0; i < 4; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_CHUNK, 2, lengths[i]);
        put_new(&p, MEPIC_TEXT, 3, 5);
        mp_request_spec spec = spec_of(&p);
        spec.max_tokens = 1;
        ask(&b, &spec);
    }
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 4, 90 * PAGE); /* takes all pages but 6: something must go */
    mp_request_spec spec = spec_of(&p);
    spec.reuse = MEPIC_REUSE_NONE;
    spec.max_tokens = 1;
    ask(&b, &spec);
    mp_digest scope = { { 0 } };
    mp_page pages[8];
    p = (prompt){ 0 };
    put_new(&p, MEPIC_CHUNK, 2, 128);
    assert_int_equal(mp_scheduler_chunk_pages(b.s, &scope, p.tokens, 128, pages, 8), 4);
    mp_scheduler_close(b.s);
}

static void admission_leaves_room_for_a_reply(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 40);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 20 * PAGE);
    mp_request_spec spec = spec_of(&p);
    spec.reuse = MEPIC_REUSE_NONE;
    spec.max_tokens = 1 + 2 * PAGE;
    submit(&b, &spec);
    step(&b, NULL);
    put_new(&p, MEPIC_TEXT, 2, 0);
    p.n = p.spans[0].n = 17 * PAGE; /* 17 pages and 3 for the reply fit */
    p.n_spans = 1;
    spec = spec_of(&p);
    spec.reuse = MEPIC_REUSE_NONE;
    spec.max_tokens = 3 * PAGE + 1;
    mp_request *too_much = submit(&b, &spec);
    mepic_stats stats;
    step(&b, NULL);
    mp_scheduler_stats(b.s, &stats);
    assert_true(stats.running == 1 && stats.queued == 1);
    mp_scheduler_finish(b.s, too_much);
    spec.max_tokens = 2 * PAGE;
    submit(&b, &spec);
    step(&b, NULL);
    mp_scheduler_stats(b.s, &stats);
    assert_true(stats.running == 2 && stats.queued == 0);
    mp_scheduler_close(b.s);
}

static void masked_pages_are_linked_in_the_account(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 256);
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 10);
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 5);
    uint16_t masks[7] = { 0, 0, 1, 0, 0, 0, 1 };
    mp_request_spec spec = spec_of(&p);
    spec.page_masks = masks;
    for (uint32_t i = 0; i < 2; i++) {
        p.tokens[0] = (int32_t)i; /* no prefix hit */
        mepic_usage usage = ask(&b, &spec);
        assert_int_equal(usage.linked_tokens, 16 + 16 + 4);
        assert_int_equal(i ? usage.chunk_tokens : usage.compiled_tokens, 100 - 36);
        assert_int_equal(usage.computed_tokens, 15);
    }
    mp_scheduler_close(b.s);
}

/* Open and submit with the n-th allocation failing, for all n; the address sanitizer sees what leaks. */
static void no_memory_is_an_error_and_no_leak(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 100);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 40);
    put_new(&p, MEPIC_CHUNK, 2, 100);
    put_new(&p, MEPIC_TEXT, 3, 5);
    uint16_t masks[7] = { 0, 1, 0, 1 };
    mp_request_spec spec = spec_of(&p);
    spec.page_masks = masks;
    bool done = false;
    for (uint64_t n = 1; !done; n++) {
        mp_request *r;
        mp_mem_fail_at(n, false);
        mepic_status status = mp_scheduler_open(&config, &b.s, &b.err);
        if (status == MEPIC_OK) {
            status = mp_scheduler_submit(b.s, &spec, &r, &b.err);
            bool injected = status != MEPIC_OK;
            mp_mem_fail_at(0, false);
            if (!injected) run_all(&b, NULL);
            done = !injected;
            mp_scheduler_close(b.s);
        }
        assert_true(status == MEPIC_OK || status == MEPIC_ERR_NOMEM);
        assert_true(n < 1000);
    }
    mp_mem_fail_at(0, false);
}

static void bad_configurations_are_named(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config good = small(&b, 100), bad[7];
    for (uint32_t i = 0; i < 7; i++) bad[i] = good;
    bad[0].page_size = 8;
    bad[1].page_size = 48;
    bad[2].page_size = 256;
    bad[3].n_pages = 0;
    bad[4].max_running = 0;
    bad[5].context = 1;
    bad[6].n_pages = 4; /* the canonical context alone has 3 pages */
    for (uint32_t i = 0; i < 7; i++) assert_int_equal(mp_scheduler_open(&bad[i], &b.s, &b.err), MEPIC_ERR_ARGUMENT);
    mp_scheduler_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_chunk_is_compiled_once_and_then_read),
        cmocka_unit_test(the_canonical_context_is_computed_once),
        cmocka_unit_test(equal_needs_share_one_job),
        cmocka_unit_test(a_job_nobody_waits_for_keeps_its_finished_pages),
        cmocka_unit_test(an_edited_document_computes_from_the_edit_on),
        cmocka_unit_test(the_next_turn_computes_what_is_new),
        cmocka_unit_test(pages_of_a_chunk_are_written_once),
        cmocka_unit_test(pages_referenced_are_the_count_on_paper),
        cmocka_unit_test(the_head_is_overtaken_at_most_eight_times),
        cmocka_unit_test(what_can_never_fit_is_refused_with_the_numbers),
        cmocka_unit_test(a_full_queue_is_busy),
        cmocka_unit_test(scopes_share_nothing),
        cmocka_unit_test(versions_of_a_document_are_computed_once_as_far_as_they_agree),
        cmocka_unit_test(a_chunk_inside_a_longer_one_outlives_it),
        cmocka_unit_test(admission_leaves_room_for_a_reply),
        cmocka_unit_test(masked_pages_are_linked_in_the_account),
        cmocka_unit_test(no_memory_is_an_error_and_no_leak),
        cmocka_unit_test(bad_configurations_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
