/* kv/plan: what a sequence sees through its cells, against lists of single tokens; which cells are shared. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "kv/plan_edit.h"
#include "support/random.h"

enum { N_PAGES = 400, N_SEQS = 12, N_CHUNKS = 6, STREAM_MAX = 800, SEEN_MAX = 8192 };

/* One token that a sequence may see. */
typedef struct seen {
    mp_page page;
    uint32_t slot;
    int32_t at; /* position (shared) or stream index (private) */
    int32_t base;
    bool shared;
} seen;

typedef struct chunk {
    mp_page pages[40];
    uint32_t n_tokens;
} chunk;

/* A sequence as it was asked for. */
typedef struct naive_seq {
    bool joined;
    seen shared[SEEN_MAX];
    uint32_t n_shared;
    mp_page pages[STREAM_MAX / 16 + 1];
    uint32_t n_tokens;
} naive_seq;

static naive_seq seqs[N_SEQS];
static chunk chunks[N_CHUNKS];

static mp_plan *open_plan(mp_fault *fault, uint32_t page_size, uint32_t cell_tokens) {
    mp_plan_config config = { .page_size = page_size,
                              .cell_tokens = cell_tokens,
                              .n_pages = N_PAGES,
                              .max_seqs = N_SEQS,
                              .max_refs = 64,
                              .fault = fault };
    mp_plan *plan;
    assert_int_equal(mp_plan_open(&config, &plan, NULL), MEPIC_OK);
    return plan;
}

static void compare_seq(const mp_plan *plan, uint32_t id) {
    const naive_seq *naive = &seqs[id];
    const mp_plan_seq *seq = &plan->seqs[id];
    uint32_t n = 0;
    int32_t last_run = -1;
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        const mp_cell *cell = &plan->cells[ref->cell];
        assert_int_equal(mp_plan_ref(plan, id * plan->max_refs + k)->cell, ref->cell);
        if (ref->run_start) last_run = (int32_t)k;
        assert_true(last_run >= 0);
        for (uint32_t i = ref->lo; i < ref->hi; i++) {
            uint32_t page = i / plan->page_size;
            if (!(ref->mask >> page & 1)) continue;
            seen expected;
            if (n < naive->n_shared) {
                expected = naive->shared[n];
            } else {
                uint32_t index = n - naive->n_shared;
                expected =
                    (seen){ naive->pages[index / plan->page_size], index % plan->page_size, (int32_t)index, 0, false };
            }
            seen got = { cell->pages[page], i % plan->page_size, ref->first + (int32_t)i, ref->base, ref->shared };
            bool same = got.page == expected.page && got.slot == expected.slot && got.at == expected.at &&
                        got.base == expected.base && got.shared == expected.shared;
            if (!same) fail_msg("sequence %u, token %u: page %u slot %u at %d", id, n, got.page, got.slot, got.at);
            n++;
        }
    }
    assert_int_equal(n, naive->n_shared + naive->n_tokens);
}

static void add_random_run(mp_plan *plan, rng *r, uint32_t id, int32_t *position) {
    const chunk *c = &chunks[rng_below(r, N_CHUNKS)];
    uint16_t hidden[40];
    bool masked = rng_below(r, 2);
    for (uint32_t p = 0; p < 40; p++) hidden[p] = rng_below(r, 3) == 0;
    mp_run run = { .pages = c->pages,
                   .n_tokens = c->n_tokens,
                   .first = *position,
                   .base = *position - 40,
                   .lo = rng_below(r, 2) ? 16 : rng_below(r, c->n_tokens),
                   .hi = rng_below(r, 2) ? c->n_tokens : rng_below(r, c->n_tokens),
                   .hidden = masked ? hidden : NULL };
    mp_plan_add_run(plan, id, &run);
    for (uint32_t i = run.lo; i < run.hi; i++) {
        if (masked && hidden[i / plan->page_size]) continue;
        seqs[id].shared[seqs[id].n_shared++] =
            (seen){ c->pages[i / plan->page_size], i % plan->page_size, *position + (int32_t)i, run.base, true };
    }
    *position += (int32_t)c->n_tokens + 5;
}

/* Random joins, growth, leaves. Streams are built over a few common beginnings, as the prefix cache gives them. */
static void sequences_see_what_they_were_given(void **state) {
    (void)state;
    rng r = rng_open(5);
    for (uint32_t round = 0; round < 20; round++) {
        mp_fault fault = { 0 };
        uint32_t page_size = round % 4 == 0 ? 64 : 16;
        mp_plan *plan = open_plan(&fault, page_size, 128u << round % 4);
        mepic_error err;
        mp_page next = 0;
        for (uint32_t c = 0; c < N_CHUNKS; c++) {
            chunks[c].n_tokens = 64 + rng_below(&r, 500);
            for (uint32_t p = 0; p * page_size < chunks[c].n_tokens; p++) chunks[c].pages[p] = next++;
        }
        memset(seqs, 0, sizeof seqs);
        for (uint32_t i = 0; i < 2000; i++) {
            uint32_t id = rng_below(&r, N_SEQS);
            naive_seq *seq = &seqs[id];
            if (!seq->joined) {
                seq->joined = true;
                int32_t position = (int32_t)rng_below(&r, 50);
                for (uint32_t n = rng_below(&r, 4); n > 0; n--) add_random_run(plan, &r, id, &position);
                for (uint32_t p = 0; p * page_size < STREAM_MAX; p++) seq->pages[p] = N_PAGES - 1 - p;
            } else if (rng_below(&r, 12) == 0) {
                mp_plan_leave(plan, id);
                memset(seq, 0, sizeof *seq);
            } else if (seq->n_tokens < STREAM_MAX - 100) {
                seq->n_tokens += rng_below(&r, 4) ? 1 + rng_below(&r, 100) : 1;
                mp_plan_extend(plan, id, seq->pages, seq->n_tokens);
                mp_plan_settle(plan, id); /* all streams have the same pages, so all full cells are shared */
            }
            compare_seq(plan, id);
            if (!mp_plan_check(plan, &err)) fail_msg("%s", err.message);
        }
        assert_false(fault.broken);
        for (uint32_t id = 0; id < N_SEQS; id++) mp_plan_leave(plan, id);
        assert_int_equal(plan->n_used, 0);
        mp_plan_close(plan);
    }
}

static void a_chunk_is_one_list_of_cells_for_all_readers(void **state) {
    (void)state;
    mp_fault fault = { 0 };
    mp_plan *plan = open_plan(&fault, 16, 256);
    mp_page pages[40];
    for (uint32_t i = 0; i < 40; i++) pages[i] = i;
    for (uint32_t id = 0; id < N_SEQS; id++) {
        mp_run run = {
            .pages = pages, .n_tokens = 600, .first = (int32_t)id, .base = (int32_t)id - 7, .lo = 16, .hi = 600
        };
        mp_plan_add_run(plan, id, &run);
        mp_plan_add_run(plan, id, &run); /* twice in one prompt */
    }
    assert_int_equal(plan->n_used, 3);
    for (uint32_t i = 0; i < 3; i++) assert_int_equal(plan->cells[plan->used[i]].n_readers, 2 * N_SEQS);
    for (uint32_t id = 0; id < N_SEQS; id++) mp_plan_leave(plan, id);
    assert_int_equal(plan->n_used, 0);
    assert_true(mp_plan_check(plan, NULL));
    mp_plan_close(plan);
}

static void cells_of_which_nothing_is_seen_are_left_out(void **state) {
    (void)state;
    mp_fault fault = { 0 };
    mp_plan *plan = open_plan(&fault, 16, 256);
    mp_page pages[40];
    uint16_t hidden[40] = { 0 };
    for (uint32_t i = 0; i < 40; i++) pages[i] = i;
    for (uint32_t i = 16; i < 32; i++) hidden[i] = 1;
    mp_run run = { .pages = pages, .n_tokens = 600, .lo = 16, .hi = 600, .hidden = hidden };
    mp_plan_add_run(plan, 0, &run);
    assert_int_equal(plan->seqs[0].n_refs, 2);
    assert_true(plan->seqs[0].refs[0].run_start && !plan->seqs[0].refs[1].run_start);
    run.lo = 300;
    mp_plan_add_run(plan, 1, &run);
    assert_int_equal(plan->seqs[1].n_refs, 1);
    assert_true(plan->seqs[1].refs[0].run_start);
    assert_int_equal(plan->seqs[1].refs[0].first, 512);
    mp_plan_close(plan);
}

static void full_cells_of_equal_streams_become_one(void **state) {
    (void)state;
    mp_fault fault = { 0 };
    mp_plan *plan = open_plan(&fault, 16, 256);
    mp_page a[32], b[32];
    for (uint32_t i = 0; i < 32; i++) a[i] = i, b[i] = 100 + i;
    mp_plan_extend(plan, 0, a, 300);
    mp_plan_extend(plan, 1, b, 300);
    mp_plan_settle(plan, 0);
    assert_int_equal(plan->n_used, 4);
    for (uint32_t i = 0; i < 16; i++) mp_plan_replace(plan, 1, i, a[i]); /* published later: the same pages */
    mp_plan_settle(plan, 1);
    assert_int_equal(plan->n_used, 3);
    assert_int_equal(plan->seqs[0].refs[0].cell, plan->seqs[1].refs[0].cell);
    assert_int_equal(plan->cells[plan->seqs[0].refs[0].cell].n_readers, 2);
    mp_plan_leave(plan, 0);
    mp_plan_extend(plan, 2, a, 256);
    mp_plan_settle(plan, 2);
    assert_int_equal(plan->seqs[2].refs[0].cell, plan->seqs[1].refs[0].cell);
    assert_false(fault.broken);
    mp_plan_replace(plan, 1, 3, 50); /* a shared cell is not edited */
    assert_true(fault.broken);
    mp_plan_close(plan);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequences_see_what_they_were_given),
        cmocka_unit_test(a_chunk_is_one_list_of_cells_for_all_readers),
        cmocka_unit_test(cells_of_which_nothing_is_seen_are_left_out),
        cmocka_unit_test(full_cells_of_equal_streams_become_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
