/* cache/segment: layouts on paper, and every token of random prompts against the rule for one token. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "cache/segment.h"
#include "support/random.h"

enum { PAGE = 16, N_MAX = 2048, SPANS_MAX = 12 };

static int32_t tokens[N_MAX];

static mp_segment_input input_of(const mp_span *spans, uint32_t n_spans) {
    return (mp_segment_input){ .tokens = tokens,
                               .n_tokens = spans[n_spans - 1].first + spans[n_spans - 1].n,
                               .spans = spans,
                               .n_spans = n_spans,
                               .policy = mp_policy_find(MEPIC_REUSE_MEPIC),
                               .link_tokens = 16,
                               .page_size = PAGE,
                               .max_chunk_pages = 16 };
}

static mp_layout lay_out(const mp_segment_input *in) {
    mp_layout layout;
    mepic_error err;
    if (mp_segment(in, &layout, &err) != MEPIC_OK) fail_msg("%s", err.message);
    return layout;
}

static void heads_are_linked_and_the_rest_is_shared(void **state) {
    (void)state;
    for (uint32_t i = 0; i < N_MAX; i++) tokens[i] = (int32_t)i;
    mp_span spans[] = { { MEPIC_TEXT, 0, 5, false, false },
                        { MEPIC_CHUNK, 5, 100, false, false },
                        { MEPIC_TEXT, 105, 3, false, false } };
    mp_segment_input in = input_of(spans, 3);
    mp_layout layout = lay_out(&in);
    assert_int_equal(layout.n_stream, 5 + 16 + 3);
    assert_int_equal(layout.n_runs, 1);
    const mp_layout_run *run = layout.runs;
    assert_int_equal(run->position, 5);
    assert_int_equal(run->lo, 16);
    assert_int_equal(run->hi, 100);
    assert_int_equal(run->n_shared, 84);
    assert_int_equal(run->place, 21); /* before the first token of the text behind the chunk */
    assert_int_equal(layout.stream[20].position, 20);
    assert_int_equal(layout.stream[21].position, 105);
    assert_true(layout.stream[20].linked && !layout.stream[21].linked && !layout.stream[4].linked);
    mp_layout_free(&layout);
}

static void a_chunk_at_the_end_leaves_a_row_for_the_logits(void **state) {
    (void)state;
    for (uint32_t n = 64; n < 100; n++) {
        mp_span spans[] = { { MEPIC_TEXT, 0, 5, false, false },
                            { MEPIC_CHUNK, 5, n, false, false },
                            { MEPIC_TEXT, 5 + n, 0, false, false } };
        mp_segment_input in = input_of(spans, 3);
        mp_layout layout = lay_out(&in);
        assert_int_equal(layout.runs[0].hi, (n - 1) / PAGE * PAGE);
        assert_int_equal(layout.stream[layout.n_stream - 1].position, 5 + n - 1);
        mp_layout_free(&layout);
    }
}

static void what_is_no_chunk_is_text(void **state) {
    (void)state;
    mp_span spans[] = { { MEPIC_CHUNK, 0, 63, false, false },    /* too short */
                        { MEPIC_CHUNK, 63, 257, false, false },  /* more than 16 pages */
                        { MEPIC_CHUNK, 320, 100, true, false },  /* not to be cached */
                        { MEPIC_CHUNK, 420, 256, false, false }, /* a chunk, */
                        { MEPIC_CHUNK, 676, 64, false, false },  /* a chunk, */
                        { MEPIC_TEXT, 740, 1, false, false } };
    mp_segment_input in = input_of(spans, 6);
    mp_layout layout = lay_out(&in);
    assert_int_equal(layout.n_runs, 2);
    assert_int_equal(layout.n_demoted, 2);
    assert_int_equal(layout.n_stream, 420 + 16 + 16 + 1);
    mp_layout_free(&layout);
    in.link_tokens = 100; /* the second chunk is linked as a whole: nothing of it is shared */
    layout = lay_out(&in);
    assert_int_equal(layout.n_runs, 1);
    assert_int_equal(layout.n_chunks, 1);
    mp_layout_free(&layout);
    in.policy = mp_policy_find(MEPIC_REUSE_PREFIX);
    layout = lay_out(&in);
    assert_int_equal(layout.n_runs, 0);
    assert_int_equal(layout.n_stream, 741);
    mp_layout_free(&layout);
}

static void equal_chunks_are_one(void **state) {
    (void)state;
    for (uint32_t i = 0; i < N_MAX; i++) tokens[i] = (int32_t)(i % 100);
    mp_span spans[] = { { MEPIC_CHUNK, 0, 100, false, false },
                        { MEPIC_CHUNK, 100, 100, false, false },
                        { MEPIC_CHUNK, 200, 99, false, false },
                        { MEPIC_TEXT, 299, 1, false, false } };
    mp_segment_input in = input_of(spans, 4);
    mp_layout layout = lay_out(&in);
    assert_int_equal(layout.n_runs, 3);
    assert_int_equal(layout.n_chunks, 2);
    assert_int_equal(layout.runs[1].chunk, 0);
    assert_int_equal(layout.runs[1].position, 100);
    assert_int_equal(layout.runs[2].chunk, 1);
    mp_layout_free(&layout);
    spans[1].common = true; /* equal tokens of another scope are another chunk */
    layout = lay_out(&in);
    assert_int_equal(layout.n_chunks, 3);
    assert_true(layout.chunks[layout.runs[1].chunk].common);
    mp_layout_free(&layout);
}

static void spans_must_cover_the_prompt(void **state) {
    (void)state;
    mp_span bad[][2] = { { { MEPIC_TEXT, 0, 5, false, false }, { MEPIC_TEXT, 6, 5, false, false } },
                         { { MEPIC_TEXT, 0, 5, false, false }, { MEPIC_TEXT, 4, 5, false, false } },
                         { { MEPIC_TEXT, 1, 5, false, false }, { MEPIC_TEXT, 6, 5, false, false } },
                         { { MEPIC_TEXT, 0, 5, false, false }, { MEPIC_TEXT, 5, UINT32_MAX, false, false } },
                         { { MEPIC_TEXT, 0, 5, false, false }, { MEPIC_TEXT, 5, 4, false, false } } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        mp_segment_input in = input_of(bad[i], 2);
        in.n_tokens = 10;
        mp_layout layout;
        mepic_error err;
        assert_int_equal(mp_segment(&in, &layout, &err), MEPIC_ERR_ARGUMENT);
    }
}

static void every_token_is_where_its_rule_puts_it(void **state) {
    (void)state;
    rng r = rng_open(3);
    for (uint32_t round = 0; round < 2000; round++) {
        mp_span spans[SPANS_MAX];
        uint16_t masks[SPANS_MAX * 20];
        uint32_t n_spans = 1 + rng_below(&r, SPANS_MAX), at = 0;
        for (uint32_t s = 0; s < n_spans; s++) {
            uint32_t n = s == 0 ? 1 + rng_below(&r, 150) : rng_below(&r, 150);
            spans[s] = (mp_span){ rng_below(&r, 2) ? MEPIC_CHUNK : MEPIC_TEXT, at, n, rng_below(&r, 9) == 0, false };
            at += n;
        }
        for (uint32_t i = 0; i < SPANS_MAX * 20; i++) masks[i] = rng_below(&r, 4) == 0;
        for (uint32_t i = 0; i < at; i++) tokens[i] = (int32_t)rng_below(&r, 3);
        mp_segment_input in = input_of(spans, n_spans);
        in.link_tokens = rng_below(&r, 2) ? 16 : rng_below(&r, 160);
        if (rng_below(&r, 2)) in.page_masks = masks;
        mp_layout layout = lay_out(&in);

        uint32_t n_private = 0, n_shared = 0, mask_at = 0;
        for (uint32_t s = 0; s < n_spans; s++) {
            bool chunk = spans[s].kind == MEPIC_CHUNK && !spans[s].no_cache && spans[s].n >= 64;
            for (uint32_t i = 0; i < spans[s].n; i++) {
                bool last = spans[s].first + spans[s].n == at && i / PAGE == (spans[s].n - 1) / PAGE;
                bool shared = chunk && i >= in.link_tokens && !last && !(in.page_masks && masks[mask_at + i / PAGE]);
                if (shared) {
                    n_shared++;
                    continue;
                }
                assert_true(n_private < layout.n_stream);
                assert_int_equal(layout.stream[n_private].position, spans[s].first + i);
                assert_int_equal(layout.stream[n_private].linked, chunk);
                n_private++;
            }
            if (spans[s].kind == MEPIC_CHUNK) mask_at += (spans[s].n + PAGE - 1) / PAGE;
        }
        assert_int_equal(layout.n_stream, n_private);
        for (uint32_t k = 0; k < layout.n_runs; k++) {
            const mp_layout_run *run = &layout.runs[k];
            uint32_t seen = 0, first = 0;
            for (uint32_t i = run->hi; i-- > run->lo;) {
                if (run->hidden && run->hidden[i / PAGE]) continue;
                seen++;
                first = run->position + i;
            }
            assert_int_equal(seen, run->n_shared);
            assert_true(layout.stream[run->place].position > first);
            assert_true(run->place == 0 || layout.stream[run->place - 1].position < first);
            assert_true(k == 0 || layout.runs[k - 1].position < run->position);
            n_shared -= seen;
        }
        assert_int_equal(n_shared, 0);
        mp_layout_free(&layout);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heads_are_linked_and_the_rest_is_shared),
        cmocka_unit_test(a_chunk_at_the_end_leaves_a_row_for_the_logits),
        cmocka_unit_test(what_is_no_chunk_is_text),
        cmocka_unit_test(equal_chunks_are_one),
        cmocka_unit_test(spans_must_cover_the_prompt),
        cmocka_unit_test(every_token_is_where_its_rule_puts_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
