/* schedule/step: whose rows a step has, and who gives way where there are too few rows or pages. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "support/schedule.h"

static void rows_come_in_the_order_of_the_rules(void **state) {
    (void)state;
    bench b = { 0 };
    mp_scheduler_config config = small(&b, 512);
    config.n_canonical = 0;
    config.step_tokens = 50;
    open_bench(&config, &b);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 20);
    mp_request_spec spec = spec_of(&p);
    spec.max_tokens = 100;
    mp_request *decoding = submit(&b, &spec);
    step(&b, NULL);
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 2, 30);
    mp_request *oldest = submit(&b, &(mp_request_spec){ .tokens = p.tokens,
                                                        .n_tokens = 30,
                                                        .spans = p.spans,
                                                        .n_spans = 1,
                                                        .reuse = MEPIC_REUSE_NONE,
                                                        .max_tokens = 100 });
    p = (prompt){ 0 };
    put_new(&p, MEPIC_CHUNK, 3, 90);
    put_new(&p, MEPIC_TEXT, 4, 5);
    spec = spec_of(&p);
    submit(&b, &spec);
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 5, 60);
    spec = spec_of(&p);
    mp_request *newest = submit(&b, &spec);
    const mp_step *s;
    assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK);
    assert_int_equal(s->n_rows, 50); /* 1 decode, 30 of the oldest, 19 of the job */
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[0].seq), decoding);
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[1].seq), oldest);
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[30].seq), oldest);
    assert_true(s->rows[30].logits && !s->rows[29].logits);
    for (uint32_t i = 31; i < 50; i++) assert_null(mp_scheduler_request(b.s, s->rows[i].seq));
    mp_scheduler_commit(b.s);
    for (uint32_t i = 0; i < 2; i++) mp_scheduler_append(b.s, i ? oldest : decoding, 77);
    assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK);
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[0].seq), decoding);
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[1].seq), oldest);
    assert_null(mp_scheduler_request(b.s, s->rows[2].seq)); /* its owner is older than the newest */
    mp_scheduler_commit(b.s);
    for (uint32_t i = 0; i < 2; i++) mp_scheduler_append(b.s, i ? oldest : decoding, 77);
    assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK); /* 2 decode, 23 of the job, 25 of the newest */
    assert_int_equal(s->rows[49].position, 24);
    assert_ptr_equal(mp_scheduler_request(b.s, s->rows[49].seq), newest);
    mp_scheduler_commit(b.s);
    mp_scheduler_close(b.s);
}

enum { N_TURNS = 7 };

/* A step with a budget of few rows; which of the requests decoded. */
static void note_turns(bench *b, mp_request *const *r, bool *decoded) {
    const mp_step *s;
    assert_int_equal(mp_scheduler_step(b->s, &s, NULL), MEPIC_OK);
    assert_true(s->n_rows > 0);
    memset(decoded, 0, N_TURNS * sizeof *decoded);
    uint32_t oldest = 0; /* that may come next: a step's rows are in the order of age */
    for (uint32_t i = 0; i < s->n_rows; i++) {
        mp_request *owner = mp_scheduler_request(b->s, s->rows[i].seq);
        for (uint32_t k = 0; owner && k < N_TURNS; k++) {
            uint32_t n, n_prompt;
            mp_request_tokens(r[k], &n, &n_prompt);
            if (owner != r[k] || n == n_prompt) continue;
            assert_true(k >= oldest);
            decoded[k] = true;
            oldest = k + 1;
        }
    }
    uint32_t n_rows = s->n_rows;
    mp_scheduler_commit(b->s);
    for (uint32_t i = 0; i < n_rows; i++) {
        if (s->rows[i].logits) mp_scheduler_append(b->s, mp_scheduler_request(b->s, s->rows[i].seq), 77);
    }
    check(b);
}

/* Long replies on fewer rows than there are requests: prompts and jobs come to their end all the same, and then who
 * decodes goes around. Without turns the oldest take every row until they end. */
static void all_get_their_turn_when_decoding_takes_every_row(void **state) {
    (void)state;
    for (uint32_t budget = 1; budget <= N_TURNS + 1; budget++) {
        bench b = { 0 };
        mp_scheduler_config config = small(&b, 512);
        config.step_tokens = budget;
        open_bench(&config, &b);
        static prompt p;
        mp_request *r[N_TURNS];
        for (uint32_t i = 0; i < N_TURNS; i++) {
            p = (prompt){ 0 };
            if (i == 4) put_new(&p, MEPIC_CHUNK, 50, 80);
            put_new(&p, MEPIC_TEXT, 1 + (int32_t)i, 5 + 2 * i);
            mp_request_spec spec = spec_of(&p);
            spec.max_tokens = 1500;
            r[i] = submit(&b, &spec);
        }
        bool decoded[N_TURNS];
        uint32_t rows = budget < N_TURNS ? budget : N_TURNS, n_decoding = 0, n_counted = 0;
        uint32_t turns[N_TURNS] = { 0 }, waited[N_TURNS] = { 0 };
        for (uint32_t i = 0; n_counted < 10 * N_TURNS; i++) {
            assert_true(i < 1400);
            bool all = n_decoding == N_TURNS;
            n_counted += all;
            note_turns(&b, r, decoded);
            n_decoding = 0;
            for (uint32_t k = 0; k < N_TURNS; k++) {
                uint32_t n, n_prompt;
                mp_request_tokens(r[k], &n, &n_prompt);
                n_decoding += n > n_prompt;
                turns[k] += all && decoded[k];
                waited[k] = n == n_prompt || decoded[k] ? 0 : waited[k] + 1;
                assert_true(waited[k] <= N_TURNS / rows + 1); /* a round, and who joined it */
            }
        }
        for (uint32_t k = 0; k < N_TURNS; k++) assert_int_equal(turns[k], 10 * rows);
        mp_scheduler_close(b.s);
    }
}

/* One row a step, and the newest needs a page when there is none: it goes, and the row is another's. By the lengths it
 * is now the older one that needs a page first, now the newer. */
static void a_step_is_not_empty_where_the_newest_preempts_itself(void **state) {
    (void)state;
    for (uint32_t length = 1; length <= 2 * PAGE; length++) {
        bench b = { 0 };
        mp_scheduler_config config = small(&b, 10);
        config.n_canonical = 0;
        config.step_tokens = 1;
        open_bench(&config, &b);
        static prompt p;
        for (uint32_t i = 0; i < 2; i++) {
            p = (prompt){ 0 };
            put_new(&p, MEPIC_TEXT, 1 + (int32_t)i, i ? length : PAGE);
            mp_request_spec spec = spec_of(&p);
            spec.reuse = MEPIC_REUSE_NONE;
            spec.max_tokens = 100;
            submit(&b, &spec);
        }
        while (mp_scheduler_busy(b.s)) assert_int_equal(step(&b, NULL), 1);
        mepic_stats stats;
        mp_scheduler_stats(b.s, &stats);
        assert_true(stats.preemptions > 0);
        mp_scheduler_close(b.s);
    }
}

static void the_newest_is_preempted_and_comes_back(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 40);
    static prompt p;
    mp_request *requests[3];
    for (int32_t i = 0; i < 3; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 1 + i, 100);
        mp_request_spec spec = spec_of(&p);
        spec.max_tokens = 300;
        requests[i] = submit(&b, &spec);
    }
    mepic_usage usage;
    uint32_t preemptions = 0;
    for (uint32_t n_steps = 0; mp_scheduler_busy(b.s); n_steps++) {
        assert_true(n_steps < 2000);
        mp_request_usage(requests[0], &usage);
        assert_int_equal(usage.preemptions, 0);
        if (usage.completion_tokens == 299) break;
        step(&b, NULL);
    }
    for (uint32_t i = 1; i < 3; i++) {
        mp_request_usage(requests[i], &usage);
        preemptions += usage.preemptions;
    }
    assert_true(preemptions >= 2);
    mp_request_usage(requests[1], &usage);
    run_all(&b, &usage);
    assert_int_equal(usage.completion_tokens, 300);
    assert_int_equal(usage.computed_tokens, 100); /* the first admission's account */
    mepic_stats stats;
    mp_scheduler_stats(b.s, &stats);
    assert_true(stats.preemptions >= preemptions);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

static void what_failed_after_its_preemption_leaves_the_cache(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 40);
    static prompt prompts[2];
    mp_request *requests[2];
    for (int32_t i = 0; i < 2; i++) {
        put_new(&prompts[i], MEPIC_TEXT, 1 + i, 200);
        mp_request_spec spec = spec_of(&prompts[i]);
        spec.max_tokens = 300;
        requests[i] = submit(&b, &spec);
    }
    mepic_usage usage = { 0 };
    for (uint32_t i = 0; usage.preemptions == 0; i++) {
        assert_true(i < 600);
        step(&b, NULL);
        mp_request_usage(requests[1], &usage);
    }
    mp_scheduler_fail(b.s, requests[1]);
    mp_scheduler_finish(b.s, requests[0]);
    mp_request_spec spec = spec_of(&prompts[1]);
    spec.max_tokens = 20;
    mp_request *again = submit(&b, &spec);
    step(&b, NULL);
    mp_request_usage(again, &usage);
    assert_int_equal(usage.prefix_tokens, 0);
    mp_scheduler_close(b.s);
}

static void what_a_preemption_frees_is_not_given_to_the_queue(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 40);
    static prompt p;
    for (int32_t i = 0; i < 2; i++) {
        p = (prompt){ 0 };
        put_new(&p, MEPIC_TEXT, 1 + i, 200);
        mp_request_spec spec = spec_of(&p);
        spec.reuse = MEPIC_REUSE_NONE; /* leaves nothing in the cache */
        spec.max_tokens = 300;
        submit(&b, &spec);
    }
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 9, 5);
    mp_request_spec spec = spec_of(&p);
    mepic_stats stats = { 0 };
    for (uint32_t i = 0; stats.preemptions == 0; i++) {
        mp_request *late = submit(&b, &spec);
        step(&b, NULL);
        mp_scheduler_stats(b.s, &stats);
        if (stats.preemptions > 0) {
            assert_int_equal(stats.queued, 2);
            break;
        }
        mp_scheduler_finish(b.s, late);
        assert_true(i < 300);
    }
    mp_scheduler_close(b.s);
}

/* Freed pages are listed by the next step that computes something, once, unless it writes them. */
static void what_was_written_and_is_free_is_spoiled_once(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 40);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, 5 * PAGE);
    mp_request_spec spec = spec_of(&p);
    spec.reuse = MEPIC_REUSE_NONE;
    spec.max_tokens = 1;
    uint32_t n_spoiled = 0;
    for (uint32_t round = 0; round < 3; round++) {
        const mp_step *made;
        mp_request *r = submit(&b, &spec);
        assert_int_equal(mp_scheduler_step(b.s, &made, &b.err), MEPIC_OK);
        assert_int_equal(made->n_zero_pages, 5);
        assert_int_equal(made->n_spoil_pages, 0); /* the pages that were freed last are taken first */
        mp_scheduler_commit(b.s);
        mp_scheduler_finish(b.s, r);
        assert_int_equal(mp_scheduler_step(b.s, &made, &b.err), MEPIC_OK); /* nothing to do, and nobody computes it */
        assert_int_equal(made->n_spoil_pages, 0);
    }
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, PAGE);
    spec.tokens = p.tokens;
    spec.n_tokens = p.n;
    spec.n_spans = p.n_spans;
    submit(&b, &spec);
    for (uint32_t i = 0; i < 2; i++) {
        const mp_step *made;
        assert_int_equal(mp_scheduler_step(b.s, &made, &b.err), MEPIC_OK);
        for (uint32_t k = 0; k < made->n_spoil_pages; k++) assert_true(made->spoil_pages[k] < 5);
        n_spoiled += made->n_spoil_pages;
        mp_request *r = mp_scheduler_request(b.s, made->rows[0].seq);
        mp_scheduler_commit(b.s);
        if (i == 0) mp_scheduler_append(b.s, r, 7);
    }
    assert_true(n_spoiled == 3 || n_spoiled == 4);
    mp_scheduler_close(b.s);
}

/* A step before the last one's tokens are known: its rows stand for them, the last token a reply may have gets none,
 * and a page is found by others only once all its tokens are known. */
static void a_step_may_come_before_the_tokens_of_the_last_one(void **state) {
    (void)state;
    bench b = { 0 };
    open_plain(&b, 512);
    static prompt p;
    p = (prompt){ 0 };
    put_new(&p, MEPIC_TEXT, 1, PAGE - 1); /* the first token of the reply fills the page */
    mp_request_spec spec = spec_of(&p);
    spec.max_tokens = 4;
    mp_request *r = submit(&b, &spec);
    const mp_step *s;
    mepic_stats stats;
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK);
        assert_int_equal(s->n_rows, i ? 1 : PAGE - 1);
        const mp_row *row = &s->rows[s->n_rows - 1];
        assert_true(row->samples && row->logits && row->position == (int32_t)(PAGE - 2 + i));
        assert_true((row->token == MP_TOKEN_SAMPLED) == (i > 0));
        mp_scheduler_commit(b.s);
        check(&b);
        mp_scheduler_stats(b.s, &stats);
        assert_int_equal(stats.rows_decode, i > 1 ? i - 1 : 0); /* a row counts when its token is known */
        if (i > 0) mp_scheduler_append(b.s, r, 70 + (int32_t)i);
        check(&b);
    }
    assert_int_equal(mp_scheduler_step(b.s, &s, NULL), MEPIC_OK);
    assert_int_equal(s->n_rows, 0);
    mp_scheduler_append(b.s, r, 74);
    mepic_usage usage;
    mp_request_usage(r, &usage);
    assert_int_equal(usage.completion_tokens, 4);
    mp_scheduler_finish(b.s, r);
    p.tokens[p.n] = 71;
    p.tokens[p.n + 1] = 1;
    p.n += 2;
    p.spans[0].n += 2;
    spec = spec_of(&p);
    assert_int_equal(ask(&b, &spec).prefix_tokens, PAGE);
    everything_is_free_after_clear(&b);
    mp_scheduler_close(b.s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_come_in_the_order_of_the_rules),
        cmocka_unit_test(a_step_may_come_before_the_tokens_of_the_last_one),
        cmocka_unit_test(what_was_written_and_is_free_is_spoiled_once),
        cmocka_unit_test(all_get_their_turn_when_decoding_takes_every_row),
        cmocka_unit_test(a_step_is_not_empty_where_the_newest_preempts_itself),
        cmocka_unit_test(the_newest_is_preempted_and_comes_back),
        cmocka_unit_test(what_failed_after_its_preemption_leaves_the_cache),
        cmocka_unit_test(what_a_preemption_frees_is_not_given_to_the_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
