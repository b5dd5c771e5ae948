/* A step's lists for the device against the plan's own definition, on the host: no device is needed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "backend/cuda/work.h"
#include "kv/plan_edit.h"
#include "support/random.h"

enum {
    N_SEQS = 12,
    N_CHUNKS = 5,
    CHUNK_MAX = 2600,
    STREAM_MAX = 2600,
    N_PAGES = 4096,
    ROWS_MAX = 400,
    KEYS_MAX = 40000
};

typedef struct chunk {
    uint32_t n_tokens;
    mp_page pages[CHUNK_MAX / 16 + 1];
} chunk;

typedef struct world {
    uint32_t page_size;
    mp_fault fault;
    mp_plan *plan;
    chunk chunks[N_CHUNKS];
    mp_page stream[N_SEQS][STREAM_MAX / 16 + 1];
    mp_row rows[ROWS_MAX];
    mp_page zero[3];
    mp_step step;
} world;

/* A key that a row sees: where it lies, and how its query is turned. */
typedef struct key {
    uint32_t page, slot;
    int32_t delta;
} key;

static void fill(world *w, rng *r) {
    mp_page next = 0;
    w->page_size = 16u << rng_below(r, 4);
    const mp_plan_config config = { .page_size = w->page_size,
                                    .cell_tokens = MP_CU_CELL_TOKENS,
                                    .n_pages = N_PAGES,
                                    .max_seqs = N_SEQS,
                                    .max_refs = 64,
                                    .fault = &w->fault };
    assert_int_equal(mp_plan_open(&config, &w->plan, NULL), MEPIC_OK);
    for (uint32_t c = 0; c < N_CHUNKS; c++) {
        w->chunks[c].n_tokens = 1 + rng_below(r, CHUNK_MAX);
        for (uint32_t p = 0; p * w->page_size < w->chunks[c].n_tokens; p++) w->chunks[c].pages[p] = next++;
    }
    mp_plan_begin_step(w->plan);
    uint32_t n_rows = 0, n_logits = 0;
    for (uint32_t seq = 0; seq < N_SEQS; seq++) {
        int32_t position = 0;
        uint16_t hidden[CHUNK_MAX / 16 + 1];
        for (uint32_t i = 0; i < CHUNK_MAX / 16 + 1; i++) hidden[i] = rng_below(r, 3) == 0;
        for (uint32_t c = 0; c < N_CHUNKS; c++) {
            const chunk *ch = &w->chunks[c];
            if (rng_below(r, 3) == 0) continue;
            position += (int32_t)rng_below(r, 30);
            uint32_t lo = rng_below(r, 2) ? rng_below(r, ch->n_tokens) : 0;
            mp_run run = { .pages = ch->pages,
                           .n_tokens = ch->n_tokens,
                           .first = position,
                           .base = position - 1200,
                           .lo = lo,
                           .hi = lo + 1 + rng_below(r, ch->n_tokens - lo),
                           .hidden = rng_below(r, 2) ? hidden : NULL };
            mp_plan_add_run(w->plan, seq, &run);
            position += (int32_t)ch->n_tokens;
        }
        uint32_t n = rng_below(r, 2) ? 1 : 1 + rng_below(r, 30), length = n + rng_below(r, STREAM_MAX - n);
        for (uint32_t p = 0; p * w->page_size < length; p++) w->stream[seq][p] = next++;
        mp_plan_extend(w->plan, seq, w->stream[seq], length);
        if (rng_below(r, 6) == 0) continue; /* it waits in this step */
        mp_plan_set_rows(w->plan, seq, n_rows, n);
        /* Some rows stand before the last chunks. */
        int32_t at = rng_below(r, 2) ? position + (int32_t)length : (int32_t)(length + rng_below(r, 2000));
        for (uint32_t i = 0; i < n; i++) {
            uint32_t index = length - n + i;
            w->rows[n_rows + i] = (mp_row){ .token = (int32_t)rng_below(r, 1000),
                                            .position = at + (int32_t)i,
                                            .seq = seq,
                                            .index = index,
                                            .page = w->stream[seq][index / w->page_size],
                                            .slot = index % w->page_size,
                                            .logits = rng_below(r, 3) == 0 };
            n_logits += w->rows[n_rows + i].logits;
        }
        n_rows += n;
    }
    assert_true(next <= N_PAGES && n_rows <= ROWS_MAX);
    for (uint32_t i = 0; i < 3; i++) w->zero[i] = rng_below(r, N_PAGES);
    w->step = (mp_step){ .rows = w->rows,
                         .n_rows = n_rows,
                         .n_logits = n_logits,
                         .zero_pages = w->zero,
                         .n_zero_pages = rng_below(r, 4),
                         .plan = w->plan };
    assert_false(w->fault.broken);
}

static void add_key(const world *w, key *keys, uint32_t *n, const uint32_t *pages, uint32_t i, int32_t delta) {
    assert_true(*n < KEYS_MAX);
    keys[(*n)++] = (key){ pages[i / w->page_size], i % w->page_size, delta };
}

/* By kv/plan.h. */
static uint32_t keys_of_plan(const world *w, uint32_t row_id, key *keys) {
    const mp_row *row = &w->rows[row_id];
    const mp_plan_seq *seq = &w->plan->seqs[row->seq];
    uint32_t n = 0;
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        const mp_cell *cell = &w->plan->cells[ref->cell];
        for (uint32_t i = ref->lo; i < ref->hi && i < cell->n_tokens; i++) {
            if (!(ref->mask >> (i / w->page_size) & 1)) continue;
            int64_t at = (int64_t)ref->first + i;
            if (ref->shared ? at >= row->position : at > row->index) continue;
            add_key(w, keys, &n, cell->pages, i, row->position - ref->base);
        }
    }
    return n;
}

/* By kernels.h: a decode row's states in order of their slots. */
static uint32_t keys_of_fold(const world *w, const mp_cu_work *work, const mp_cu_fold *fold, key *keys) {
    uint32_t n = 0;
    for (uint32_t slot = fold->first_slot; slot < fold->first_slot + fold->n_slots; slot++) {
        uint32_t found = 0;
        for (uint32_t i = 0; i < work->counts->n_items; i++) {
            const mp_cu_item *item = &work->items[i];
            for (uint32_t j = item->first_reader; j < item->first_reader + item->n_readers; j++) {
                const mp_cu_reader *reader = &work->readers[j];
                if (reader->slot != slot) continue;
                found++;
                assert_int_equal(reader->row, fold->row);
                assert_true(reader->lo < reader->hi && reader->hi <= item->n_tokens);
                for (uint32_t t = reader->lo; t < reader->hi; t++) {
                    if (!(reader->mask >> (t / w->page_size) & 1)) continue;
                    add_key(w, keys, &n, work->pages + item->first_page, t, reader->delta);
                }
            }
        }
        assert_int_equal(found, 1);
    }
    return n;
}

static uint32_t keys_of_block(const world *w, const mp_cu_work *work, const mp_cu_block *block, uint32_t row_id,
                              key *keys) {
    const mp_cu_row *row = &work->rows[row_id];
    uint32_t n = 0;
    for (uint32_t k = block->first_ref; k < block->first_ref + block->n_refs; k++) {
        const mp_cu_ref *ref = &work->refs[k];
        const mp_cu_cell *cell = &work->cells[ref->cell];
        assert_true(ref->hi <= cell->n_tokens);
        for (uint32_t t = ref->lo; t < ref->hi; t++) {
            int64_t edge = ref->shared ? row->position : (int64_t)row->index + 1;
            if ((int64_t)ref->first + t >= edge || !(ref->mask >> (t / w->page_size) & 1)) continue;
            add_key(w, keys, &n, work->pages + cell->first_page, t, row->position - ref->base);
        }
    }
    return n;
}

/* Keys that may be read before the step's rows are stored are none of them. */
static void check_before(const world *w, const mp_cu_work *work, const mp_cu_item *item) {
    assert_true(item->n_before <= item->n_tokens);
    for (uint32_t t = 0; t < item->n_before; t++) {
        uint32_t page = work->pages[item->first_page + t / w->page_size];
        for (uint32_t r = 0; r < work->counts->n_rows; r++) {
            assert_false(work->rows[r].page == page && work->rows[r].slot == t % w->page_size);
        }
    }
}

static void check_step(const world *w, const mp_cu_work *work, const mp_cu_lists_config *config, uint32_t seed) {
    static key want[KEYS_MAX], got[KEYS_MAX];
    uint8_t seen[ROWS_MAX] = { 0 };
    uint32_t logits = 0;
    assert_int_equal(work->counts->n_rows, w->step.n_rows);
    assert_int_equal(work->counts->n_logits, w->step.n_logits);
    for (uint32_t i = 0; i < w->step.n_rows; i++) {
        assert_int_equal(work->rows[i].token, w->rows[i].token);
        assert_int_equal(work->rows[i].page, w->rows[i].page);
        assert_int_equal(work->rows[i].slot, w->rows[i].slot);
        if (w->rows[i].logits) assert_int_equal(work->logit_rows[logits++], i);
    }
    for (uint32_t i = 0; i < work->counts->n_folds; i++) {
        const mp_cu_fold *fold = &work->folds[i];
        uint32_t n = keys_of_plan(w, fold->row, want);
        assert_int_equal(keys_of_fold(w, work, fold, got), n);
        if (memcmp(want, got, n * sizeof *want)) fail_msg("seed %u: decode row %u sees other keys", seed, fold->row);
        seen[fold->row]++;
    }
    for (uint32_t i = 0; i < work->counts->n_blocks; i++) {
        const mp_cu_block *block = &work->blocks[i];
        assert_true(block->n_rows > 0 && block->n_rows <= config->block_rows);
        for (uint32_t r = block->first_row; r < block->first_row + block->n_rows; r++) {
            assert_int_equal(w->rows[r].seq, w->rows[block->first_row].seq);
            uint32_t n = keys_of_plan(w, r, want);
            assert_int_equal(keys_of_block(w, work, block, r, got), n);
            if (memcmp(want, got, n * sizeof *want)) fail_msg("seed %u: row %u of a block sees other keys", seed, r);
            seen[r]++;
        }
    }
    for (uint32_t r = 0; r < w->step.n_rows; r++) assert_int_equal(seen[r], 1);
    for (uint32_t i = 0; i < work->counts->n_items; i++) {
        check_before(w, work, &work->items[i]);
        if (config->item_readers) assert_in_range(work->items[i].n_readers, 1, config->item_readers);
    }
}

static void every_row_sees_what_the_plan_says(void **state) {
    (void)state;
    static world w;
    for (uint32_t seed = 1; seed <= 40; seed++) {
        rng r = rng_open(seed);
        memset(&w, 0, sizeof w);
        fill(&w, &r);
        mp_cu_lists_config config = { .max_rows = ROWS_MAX,
                                      .max_seqs = N_SEQS,
                                      .max_refs = 64,
                                      .n_pages = N_PAGES,
                                      .max_slots = seed % 3 == 0 ? 10 : 4000, /* 10: most rows become blocks */
                                      .block_rows = 1u << rng_below(&r, 6),
                                      .item_readers = seed % 4,
                                      .few_blocks = seed % 2 ? 0 : 1000,
                                      .on_host = true };
        mp_cu_lists *lists;
        assert_int_equal(mp_cu_lists_open(NULL, &config, &lists, NULL), MEPIC_OK);
        for (uint32_t again = 0; again < 2; again++) { /* a step leaves nothing behind */
            assert_true(mp_cu_lists_build(lists, &w.step));
            check_step(&w, mp_cu_lists_host(lists), &config, seed);
        }
        mp_cu_lists_close(lists);
        mp_plan_close(w.plan);
    }
}

static void dear_items_come_first(void **state) {
    (void)state;
    static world w;
    rng r = rng_open(7);
    memset(&w, 0, sizeof w);
    fill(&w, &r);
    mp_cu_lists_config config = { .max_rows = ROWS_MAX,
                                  .max_seqs = N_SEQS,
                                  .max_refs = 64,
                                  .n_pages = N_PAGES,
                                  .max_slots = 1000,
                                  .block_rows = 8,
                                  .n_sm = 1000,
                                  .on_host = true };
    mp_cu_lists *lists;
    assert_int_equal(mp_cu_lists_open(NULL, &config, &lists, NULL), MEPIC_OK);
    assert_true(mp_cu_lists_build(lists, &w.step));
    const mp_cu_work *work = mp_cu_lists_host(lists);
    assert_int_equal(work->counts->n_back, 0); /* small items only */
    uint64_t last = UINT64_MAX;
    for (uint32_t i = 0; i < work->counts->n_items; i++) {
        uint64_t cost = (uint64_t)work->items[i].n_readers * work->items[i].n_tokens;
        assert_true(cost / 2 < last); /* by powers of two */
        last = cost;
    }
    mp_cu_lists_close(lists);
    config.group = 64; /* what two rows read is large, and there are many heads of it */
    config.n_kv_heads = 100000;
    assert_int_equal(mp_cu_lists_open(NULL, &config, &lists, NULL), MEPIC_OK);
    assert_true(mp_cu_lists_build(lists, &w.step));
    assert_in_range(mp_cu_lists_host(lists)->counts->n_back, 1, config.n_sm / 2);
    mp_cu_lists_close(lists);
    mp_plan_close(w.plan);
}

/* Two prompts, the second with the longer context, among decode rows: costs of cells and of blocks are apart. */
static void deep_blocks_come_first(void **state) {
    (void)state;
    enum { ROWS = 64, SHORT = 100, LONG = 2500 };
    static world w;
    memset(&w, 0, sizeof w);
    w.page_size = 16;
    const mp_plan_config plan = { .page_size = 16,
                                  .cell_tokens = MP_CU_CELL_TOKENS,
                                  .n_pages = N_PAGES,
                                  .max_seqs = N_SEQS,
                                  .max_refs = 64,
                                  .fault = &w.fault };
    assert_int_equal(mp_plan_open(&plan, &w.plan, NULL), MEPIC_OK);
    mp_plan_begin_step(w.plan);
    mp_page next = 0;
    uint32_t n_rows = 0;
    for (uint32_t seq = 0; seq < 4; seq++) {
        uint32_t n = seq < 2 ? ROWS : 1, length = seq % 2 ? LONG : SHORT;
        for (uint32_t p = 0; p * 16 < length; p++) w.stream[seq][p] = next++;
        mp_plan_extend(w.plan, seq, w.stream[seq], length);
        mp_plan_set_rows(w.plan, seq, n_rows, n);
        for (uint32_t i = length - n; i < length; i++) {
            w.rows[n_rows++] = (mp_row){ .position = (int32_t)i, .seq = seq, .index = i };
        }
    }
    w.step = (mp_step){ .rows = w.rows, .n_rows = n_rows, .plan = w.plan };
    mp_cu_lists_config config = { .max_rows = ROWS_MAX,
                                  .max_seqs = N_SEQS,
                                  .max_refs = 64,
                                  .n_pages = N_PAGES,
                                  .max_slots = 1000,
                                  .block_rows = 32,
                                  .item_readers = 48,
                                  .on_host = true };
    mp_cu_lists *lists;
    assert_int_equal(mp_cu_lists_open(NULL, &config, &lists, NULL), MEPIC_OK);
    assert_true(mp_cu_lists_build(lists, &w.step));
    const mp_cu_work *work = mp_cu_lists_host(lists);
    assert_int_equal(work->counts->n_blocks, 4);
    for (uint32_t i = 0; i < 4; i++) assert_int_equal(work->blocks[i].first_row >= ROWS, i < 2);
    mp_cu_lists_close(lists);
    mp_plan_close(w.plan);
}

/* What kernels may be asked for follows what they were compiled for: PTX of 8.0 that the driver translated for 9.0 has
 * no clusters and does not wait for the kernel before it. */
static void code_is_what_was_compiled(void **state) {
    (void)state;
    static const uint32_t cases[][3] = { { 80, 80, 80 }, { 86, 80, 80 }, { 89, 80, 80 },  { 89, 89, 89 },
                                         { 90, 80, 80 }, { 90, 90, 90 }, { 100, 80, 80 }, { 100, 90, 100 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(mp_cu_code(cases[i][0], cases[i][1]), cases[i][2]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_sees_what_the_plan_says),
        cmocka_unit_test(dear_items_come_first),
        cmocka_unit_test(deep_blocks_come_first),
        cmocka_unit_test(code_is_what_was_compiled),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
