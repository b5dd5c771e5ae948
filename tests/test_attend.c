/* backend/cpu/attend.c and kernels_attend.c against kv/plan.h's definitions in double, on random plans; and the promise
 * that a row's bits do not depend on its company. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "backend/backend.h"
#include "backend/cpu/attend.h"
#include "base/mem.h"
#include "support/random.h"

enum { MAX_SEQS = 6, MAX_REFS = 24, MAX_CELLS = 96, MAX_ROWS = 256, SEQ_ROWS = 40, N_ANGLES = 4096, N_PAGES = 1024 };

#define ROOT_3 1.7320508f /* -ROOT_3 .. ROOT_3 has variance 1 */

static rng dice;

/* ---- A world: pages with random K and V, sequences with positions and queries, a plan over them ------------------ */

typedef struct world {
    mp_hparams hp;
    mp_slab slab;
    size_t slab_bytes;
    mp_rope_table rope;
    uint32_t n_layers, next_page, n_seqs;
    mp_plan plan;
    int32_t position[MAX_SEQS][SEQ_ROWS]; /* of the last rows of each stream, the last one at the end */
    uint32_t stream[MAX_SEQS];            /* tokens of the private stream */
    float *q[MAX_SEQS];                   /* [SEQ_ROWS, n_heads * head_dim] */
    mp_row rows[MAX_ROWS];
    mp_step step;
} world;

/* K (or V) of a token, dimension d, straight from the description in slab.h. */
static size_t element(const world *w, mp_page page, uint32_t layer, uint32_t head, uint32_t slot, uint32_t d, bool v) {
    size_t hd = w->hp.head_dim, block = (size_t)w->slab.page_size * 2 * hd;
    size_t i = page * (w->n_layers * w->hp.n_kv_heads * block) + (layer * w->hp.n_kv_heads + head) * block;
    i += slot / 16 * (32 * hd);
    return i + (v ? 16 * hd + slot % 16 * hd + d : d * 16 + slot % 16);
}

static double kv_read(const world *w, size_t i) {
    switch (w->slab.type) {
    case MEPIC_KV_F16: return (double)mp_f16_to_f32(((const uint16_t *)(const void *)w->slab.data)[i]);
    case MEPIC_KV_BF16: return (double)mp_bf16_to_f32(((const uint16_t *)(const void *)w->slab.data)[i]);
    default: return (double)((const float *)(const void *)w->slab.data)[i];
    }
}

static void fill_slab(world *w) {
    size_t size = w->slab.type == MEPIC_KV_F32 ? 4 : 2;
    for (size_t i = 0; i < w->slab_bytes / size; i++) {
        float x = rng_float(&dice, -ROOT_3, ROOT_3);
        if (size == 4) ((float *)(void *)w->slab.data)[i] = x;
        if (w->slab.type == MEPIC_KV_F16) ((uint16_t *)(void *)w->slab.data)[i] = mp_f32_to_f16(x);
        if (w->slab.type == MEPIC_KV_BF16) ((uint16_t *)(void *)w->slab.data)[i] = mp_f32_to_bf16(x);
    }
}

static uint32_t new_cell(world *w, uint32_t n_tokens) {
    uint32_t id = w->plan.n_used;
    mp_cell *c = &w->plan.cells[id];
    w->plan.used[w->plan.n_used++] = id;
    *c = (mp_cell){ .n_pages = (n_tokens + w->slab.page_size - 1) / w->slab.page_size,
                    .n_tokens = n_tokens,
                    .first_reader = MP_NONE };
    for (uint32_t p = 0; p < c->n_pages; p++) c->pages[p] = (w->next_page++ * 7 + 3) % w->slab.n_pages;
    return id;
}

static mp_cell_ref *add_ref(world *w, uint32_t seq, uint32_t cell, bool run_start) {
    mp_plan_seq *s = &w->plan.seqs[seq];
    uint32_t id = seq * w->plan.max_refs + s->n_refs;
    mp_cell *c = &w->plan.cells[cell];
    mp_cell_ref *ref = &s->refs[s->n_refs++];
    *ref = (mp_cell_ref){ .cell = cell,
                          .seq = seq,
                          .next = c->first_reader,
                          .prev = MP_NONE,
                          .hi = MP_CPU_CELL_TOKENS,
                          .mask = UINT64_MAX,
                          .run_start = run_start };
    c->first_reader = id;
    c->n_readers++;
    if (rng_below(&dice, 3) == 0) ref->mask = rng_below(&dice, 65536);
    if (rng_below(&dice, 4) == 0) ref->lo = (uint16_t)rng_below(&dice, c->n_tokens);
    if (rng_below(&dice, 4) == 0) ref->hi = (uint16_t)(ref->lo + rng_below(&dice, MP_CPU_CELL_TOKENS - ref->lo + 1));
    return ref;
}

/* Chunks that several sequences read at different places, then each one's stream, of which the first full cell may be
 * another's (a shared beginning). Rows of a sequence may stand before, between and behind its chunks. */
static void fill_plan(world *w) {
    uint32_t n_chunks = rng_below(&dice, 4), length[4], start[4], first_cell[4];
    for (uint32_t i = 0; i < n_chunks; i++) {
        length[i] = 1 + rng_below(&dice, 600);
        start[i] = rng_below(&dice, 800);
        first_cell[i] = w->plan.n_used;
        for (uint32_t t = 0; t < length[i]; t += MP_CPU_CELL_TOKENS) {
            new_cell(w, length[i] - t < MP_CPU_CELL_TOKENS ? length[i] - t : MP_CPU_CELL_TOKENS);
        }
    }
    uint32_t common = MP_NONE;
    for (uint32_t seq = 0; seq < w->n_seqs; seq++) {
        int32_t position = 0;
        for (uint32_t i = 0; i < n_chunks; i++) {
            if (rng_below(&dice, 3) == 0) continue;
            position += (int32_t)rng_below(&dice, 50);
            for (uint32_t t = 0; t < length[i]; t += MP_CPU_CELL_TOKENS) {
                mp_cell_ref *ref = add_ref(w, seq, first_cell[i] + t / MP_CPU_CELL_TOKENS, t == 0);
                ref->shared = true;
                ref->base = position - (int32_t)start[i];
                ref->first = position + (int32_t)t;
            }
            position += (int32_t)length[i];
        }
        w->stream[seq] = SEQ_ROWS + rng_below(&dice, 600);
        for (uint32_t t = 0; t < w->stream[seq]; t += MP_CPU_CELL_TOKENS) {
            uint32_t n = w->stream[seq] - t < MP_CPU_CELL_TOKENS ? w->stream[seq] - t : MP_CPU_CELL_TOKENS, cell;
            if (t == 0 && n == MP_CPU_CELL_TOKENS && common != MP_NONE && rng_below(&dice, 2)) {
                cell = common;
            } else {
                cell = new_cell(w, n);
                if (t == 0 && n == MP_CPU_CELL_TOKENS) common = cell;
            }
            add_ref(w, seq, cell, t == 0)->first = (int32_t)t;
        }
        int32_t last = position + (int32_t)w->stream[seq] + (int32_t)rng_below(&dice, 100);
        for (uint32_t r = SEQ_ROWS; r-- > 0;) {
            w->position[seq][r] = last;
            last -= 1 + (int32_t)(r % 8 == 0 ? rng_below(&dice, 200) : 0);
            if (last < (int32_t)(w->stream[seq] - SEQ_ROWS + r)) last = (int32_t)(w->stream[seq] - SEQ_ROWS + r);
        }
    }
}

static void world_open(world *w, mepic_kv_type type, uint32_t page_size, uint32_t n_kv_heads, uint32_t group,
                       uint32_t head_dim) {
    memset(w, 0, sizeof *w);
    w->n_layers = 2;
    w->hp =
        (mp_hparams){ .n_layers = 2, .n_heads = n_kv_heads * group, .n_kv_heads = n_kv_heads, .head_dim = head_dim };
    w->hp.rope.pairs = rng_below(&dice, 2) ? MP_ROPE_ADJACENT : MP_ROPE_HALVES;
    w->hp.rope.n_rot = rng_below(&dice, 3) ? head_dim : head_dim / 4 * 2;
    w->rope = (mp_rope_table){ .n_angles = N_ANGLES, .n_pairs = w->hp.rope.n_rot / 2 };
    w->rope.cos_sin = mp_alloc((size_t)N_ANGLES * 2 * w->rope.n_pairs * sizeof(float));
    for (uint32_t a = 0; a < N_ANGLES; a++) {
        for (uint32_t p = 0; p < w->rope.n_pairs; p++) {
            double angle = a * pow(10000.0, -(double)p / w->rope.n_pairs);
            w->rope.cos_sin[(size_t)a * 2 * w->rope.n_pairs + p] = (float)cos(angle);
            w->rope.cos_sin[((size_t)a * 2 + 1) * w->rope.n_pairs + p] = (float)sin(angle);
        }
    }
    size_t size = type == MEPIC_KV_F32 ? 4 : 2;
    mp_slab *s = &w->slab;
    *s = (mp_slab){ .page_size = page_size,
                    .n_pages = N_PAGES * 16 / page_size,
                    .n_kv_heads = n_kv_heads,
                    .head_dim = head_dim,
                    .type = type };
    s->group_bytes = 32 * head_dim * size;
    s->block_bytes = s->group_bytes * (page_size / 16);
    s->page_bytes = s->block_bytes * n_kv_heads * w->n_layers;
    assert_int_equal(s->page_bytes, mp_kv_page_bytes(&w->hp, type, page_size));
    w->slab_bytes = s->page_bytes * s->n_pages;
    s->data = mp_alloc_aligned(64, w->slab_bytes);
    fill_slab(w);

    w->plan = (mp_plan){ .page_size = page_size, .max_seqs = MAX_SEQS, .max_refs = MAX_REFS, .max_cells = MAX_CELLS };
    w->plan.seqs = mp_calloc(MAX_SEQS, sizeof *w->plan.seqs);
    w->plan.cells = mp_calloc(MAX_CELLS, sizeof *w->plan.cells);
    w->plan.used = mp_calloc(MAX_CELLS, sizeof *w->plan.used);
    w->plan.active = mp_calloc(MAX_SEQS, sizeof *w->plan.active);
    for (uint32_t i = 0; i < MAX_SEQS; i++) w->plan.seqs[i].refs = mp_calloc(MAX_REFS, sizeof(mp_cell_ref));
    w->n_seqs = 1 + rng_below(&dice, MAX_SEQS);
    fill_plan(w);
    for (uint32_t i = 0; i < w->n_seqs; i++) {
        size_t n = (size_t)SEQ_ROWS * w->hp.n_heads * head_dim;
        w->q[i] = mp_alloc(n * sizeof(float));
        for (size_t j = 0; j < n; j++) w->q[i][j] = rng_float(&dice, -ROOT_3, ROOT_3);
    }
}

static void world_close(world *w) {
    mp_free(w->rope.cos_sin);
    mp_free_aligned(w->slab.data, w->slab_bytes);
    for (uint32_t i = 0; i < MAX_SEQS; i++) mp_free(w->plan.seqs[i].refs);
    for (uint32_t i = 0; i < w->n_seqs; i++) mp_free(w->q[i]);
    mp_free(w->plan.seqs);
    mp_free(w->plan.cells);
    mp_free(w->plan.used);
    mp_free(w->plan.active);
}

/* A step with the last n_rows[seq] rows of each sequence. */
static void set_rows(world *w, const uint32_t *n_rows) {
    uint32_t n = 0;
    w->plan.n_active = 0;
    for (uint32_t seq = 0; seq < w->n_seqs; seq++) {
        w->plan.seqs[seq].row = n;
        w->plan.seqs[seq].n_rows = n_rows[seq];
        if (n_rows[seq]) w->plan.active[w->plan.n_active++] = seq;
        for (uint32_t r = SEQ_ROWS - n_rows[seq]; r < SEQ_ROWS; r++) {
            w->rows[n++] =
                (mp_row){ .position = w->position[seq][r], .seq = seq, .index = w->stream[seq] - SEQ_ROWS + r };
        }
    }
    w->step = (mp_step){ .rows = w->rows, .n_rows = n, .plan = &w->plan };
}

/* Attention of the step's rows, [rows, n_heads * head_dim]; the caller frees. */
static float *attend(const world *w, const mp_cpu_kernels *kernels, uint32_t n_threads, size_t workspace,
                     uint32_t layer) {
    size_t width = (size_t)w->hp.n_heads * w->hp.head_dim;
    float *q = mp_alloc(w->step.n_rows * width * sizeof *q), *out = mp_alloc(w->step.n_rows * width * sizeof *out);
    for (uint32_t seq = 0; seq < w->n_seqs; seq++) {
        const mp_plan_seq *s = &w->plan.seqs[seq];
        memcpy(q + s->row * width, w->q[seq] + (SEQ_ROWS - s->n_rows) * width, s->n_rows * width * sizeof *q);
    }
    memset(out, 0x7f, w->step.n_rows * width * sizeof *out);
    mp_threads *threads;
    mp_attend *at;
    assert_int_equal(mp_threads_open(n_threads, &threads, NULL), MEPIC_OK);
    const mp_attend_config config = { kernels, threads, &w->hp, &w->rope, &w->slab, MAX_ROWS, workspace };
    assert_int_equal(mp_attend_open(&config, &at, NULL), MEPIC_OK);
    mp_attend_begin(at, &w->step);
    mp_attend_run(at, 1 - layer, q, out); /* a layer leaves nothing behind for the next */
    mp_attend_run(at, layer, q, out);
    mp_attend_close(at);
    mp_threads_close(threads);
    mp_free(q);
    return out;
}

/* ---- The definition, in double ----------------------------------------------------------------------------------- */

static bool sees(const world *w, const mp_cell_ref *ref, const mp_row *row, uint32_t i) {
    if (i >= w->plan.cells[ref->cell].n_tokens || i < ref->lo || i >= ref->hi) return false;
    if (!(ref->mask >> (i / w->plan.page_size) & 1)) return false;
    return ref->shared ? ref->first + (int32_t)i < row->position : ref->first + (int32_t)i <= (int32_t)row->index;
}

static void turn_slow(const world *w, const float *x, int32_t angle, double *y) {
    uint32_t n = w->rope.n_pairs;
    for (uint32_t d = 0; d < w->hp.head_dim; d++) y[d] = (double)x[d];
    for (uint32_t i = 0; i < n; i++) {
        double c = (double)w->rope.cos_sin[(size_t)angle * 2 * n + i];
        double s = (double)w->rope.cos_sin[((size_t)angle * 2 + 1) * n + i];
        bool adjacent = w->hp.rope.pairs == MP_ROPE_ADJACENT;
        uint32_t a = adjacent ? 2 * i : i, b = adjacent ? 2 * i + 1 : i + n;
        y[a] = (double)x[a] * c - (double)x[b] * s;
        y[b] = (double)x[a] * s + (double)x[b] * c;
    }
}

/* One row and head; two passes over everything it sees. Returns max |v| seen. */
static double attend_slow(const world *w, const mp_row *row, const float *q, uint32_t layer, uint32_t kv_head,
                          double *out) {
    uint32_t hd = w->hp.head_dim;
    const mp_plan_seq *seq = &w->plan.seqs[row->seq];
    double top = -INFINITY, sum = 0.0, largest = 0.0, turned[256];
    for (uint32_t d = 0; d < hd; d++) out[d] = 0.0;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t k = 0; k < seq->n_refs; k++) {
            const mp_cell_ref *ref = &seq->refs[k];
            for (uint32_t i = 0; i < MP_CPU_CELL_TOKENS; i++) {
                if (!sees(w, ref, row, i)) continue;
                mp_page page = w->plan.cells[ref->cell].pages[i / w->plan.page_size];
                uint32_t slot = i % w->plan.page_size;
                turn_slow(w, q, row->position - ref->base, turned);
                double score = 0.0;
                for (uint32_t d = 0; d < hd; d++) {
                    score += turned[d] * kv_read(w, element(w, page, layer, kv_head, slot, d, false));
                }
                score /= sqrt((double)hd);
                if (pass == 0) {
                    top = fmax(top, score);
                    continue;
                }
                double p = exp(score - top);
                sum += p;
                for (uint32_t d = 0; d < hd; d++) {
                    double v = kv_read(w, element(w, page, layer, kv_head, slot, d, true));
                    out[d] += p * v;
                    largest = fmax(largest, fabs(v));
                }
            }
        }
    }
    for (uint32_t d = 0; d < hd && sum > 0.0; d++) out[d] /= sum;
    return largest;
}

static void check_against_definition(const world *w, const float *out, uint32_t layer) {
    uint32_t hd = w->hp.head_dim, n_heads = w->hp.n_heads;
    double expected[256];
    for (uint32_t r = 0; r < w->step.n_rows; r += 1 + rng_below(&dice, 6)) {
        const mp_row *row = &w->step.rows[r];
        uint32_t back = w->plan.seqs[row->seq].n_rows - (r - w->plan.seqs[row->seq].row);
        uint32_t h = rng_below(&dice, n_heads);
        const float *q = w->q[row->seq] + ((size_t)(SEQ_ROWS - back) * n_heads + h) * hd;
        double largest = attend_slow(w, row, q, layer, h / (n_heads / w->hp.n_kv_heads), expected);
        for (uint32_t d = 0; d < hd; d++) {
            double difference = fabs((double)out[((size_t)r * n_heads + h) * hd + d] - expected[d]);
            if (!(difference <= 1e-5 * largest)) {
                fail_msg("row %u head %u dimension %u: %g instead of %g", r, h, d,
                         (double)out[((size_t)r * n_heads + h) * hd + d], expected[d]);
            }
        }
    }
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

static const uint32_t page_sizes[] = { 16, 32, 64, 128 };
static const uint32_t head_dims[] = { 16, 64, 80, 96, 128, 256 };
static const size_t WORKSPACE = (size_t)8 << 20;

static void open_random_world(world *w, uint32_t round) {
    world_open(w, (mepic_kv_type)(MEPIC_KV_F16 + round % 3), page_sizes[rng_below(&dice, 4)], 1 + rng_below(&dice, 2),
               1 + rng_below(&dice, 8), head_dims[round % 6]);
}

static void test_definition(void **state) {
    (void)state;
    const mp_cpu_kernels *kernels;
    for (uint32_t isa = 0; (kernels = mp_cpu_kernels_at(isa)); isa++) {
        for (uint32_t round = 0; round < 12; round++) {
            static world w;
            open_random_world(&w, round);
            uint32_t n_rows[MAX_SEQS];
            for (uint32_t i = 0; i < w.n_seqs; i++)
                n_rows[i] = rng_below(&dice, 3) ? 1 : rng_below(&dice, SEQ_ROWS + 1);
            set_rows(&w, n_rows);
            float *out = attend(&w, kernels, 1 + rng_below(&dice, 3), rng_below(&dice, 4) ? WORKSPACE : 0, round % 2);
            check_against_definition(&w, out, round % 2);
            mp_free(out);
            world_close(&w);
        }
    }
}

/* The last row of every sequence, however it comes to be computed. */
static void check_last_rows(const world *w, const float *expected, const float *out, const char *how) {
    size_t width = (size_t)w->hp.n_heads * w->hp.head_dim;
    for (uint32_t seq = 0; seq < w->n_seqs; seq++) {
        const mp_plan_seq *s = &w->plan.seqs[seq];
        if (s->n_rows == 0) continue;
        if (memcmp(expected + seq * width, out + (s->row + s->n_rows - 1) * width, width * sizeof *out) != 0) {
            fail_msg("sequence %u has other bits %s", seq, how);
        }
    }
}

static void test_same_bits(void **state) {
    (void)state;
    const mp_cpu_kernels *kernels;
    for (uint32_t isa = 0; (kernels = mp_cpu_kernels_at(isa)); isa++) {
        for (uint32_t round = 0; round < 12; round++) {
            static world w;
            open_random_world(&w, round);
            uint32_t n_rows[MAX_SEQS] = { 1, 1, 1, 1, 1, 1 };
            set_rows(&w, n_rows);
            float *expected = attend(&w, kernels, 1, WORKSPACE, 0), *out;

            out = attend(&w, kernels, 3, WORKSPACE, 0);
            check_last_rows(&w, expected, out, "on three threads");
            mp_free(out);

            out = attend(&w, kernels, 1,
                         (size_t)rng_below(&dice, 40) * w.hp.n_heads * (w.hp.head_dim + 16) * sizeof *out, 0);
            check_last_rows(&w, expected, out, "when its states do not fit the workspace");
            mp_free(out);

            for (uint32_t seq = 0; seq < w.n_seqs; seq++) n_rows[seq] = 1 + rng_below(&dice, SEQ_ROWS);
            set_rows(&w, n_rows);
            out = attend(&w, kernels, 2, WORKSPACE, 0);
            check_last_rows(&w, expected, out, "as the last of several rows");
            mp_free(out);

            memset(n_rows, 0, sizeof n_rows);
            n_rows[rng_below(&dice, w.n_seqs)] = 1;
            set_rows(&w, n_rows);
            out = attend(&w, kernels, 1, WORKSPACE, 0);
            check_last_rows(&w, expected, out, "alone");
            mp_free(out);

            mp_free(expected);
            world_close(&w);
        }
    }
}

/* Slots that nobody may see hold anything: K any bits, V any number. */
static void test_unseen_slots(void **state) {
    (void)state;
    const mp_cpu_kernels *kernels;
    for (uint32_t isa = 0; (kernels = mp_cpu_kernels_at(isa)); isa++) {
        static world w;
        world_open(&w, MEPIC_KV_F32, 16, 1, 3, 64);
        uint32_t n_rows[MAX_SEQS] = { 5, 1, 5, 1, 5, 1 };
        set_rows(&w, n_rows);
        float *expected = attend(&w, kernels, 1, WORKSPACE, 0);
        for (uint32_t c = 0; c < w.plan.n_used; c++) {
            const mp_cell *cell = &w.plan.cells[c];
            for (uint32_t i = cell->n_tokens; i < cell->n_pages * 16; i++) {
                for (uint32_t d = 0; d < 64; d++) {
                    ((float *)(void *)w.slab.data)[element(&w, cell->pages[i / 16], 0, 0, i % 16, d, false)] = NAN;
                    ((float *)(void *)w.slab.data)[element(&w, cell->pages[i / 16], 0, 0, i % 16, d, true)] = 1e30f;
                }
            }
        }
        float *out = attend(&w, kernels, 1, WORKSPACE, 0);
        assert_memory_equal(expected, out, (size_t)w.step.n_rows * 3 * 64 * sizeof *out);
        mp_free(out);
        mp_free(expected);
        world_close(&w);
    }
}

static void test_open_without_memory(void **state) {
    (void)state;
    static world w;
    world_open(&w, MEPIC_KV_F16, 16, 1, 1, 16);
    mp_threads *threads;
    assert_int_equal(mp_threads_open(1, &threads, NULL), MEPIC_OK);
    const mp_attend_config config = { mp_cpu_kernels_at(0), threads, &w.hp, &w.rope, &w.slab, 8, 1 << 16 };
    uint64_t before = mp_mem_count();
    mp_attend *at = NULL;
    assert_int_equal(mp_attend_open(&config, &at, NULL), MEPIC_OK);
    uint64_t n = mp_mem_count() - before;
    mp_attend_close(at);
    for (uint64_t i = 1; i <= n; i++) {
        mp_attend *none = NULL;
        mp_mem_fail_at(i, false);
        assert_int_equal(mp_attend_open(&config, &none, NULL), MEPIC_ERR_NOMEM);
        assert_null(none);
    }
    mp_mem_fail_at(0, false);
    mp_threads_close(threads);
    world_close(&w);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20251;
    printf("seed %llu\n", (unsigned long long)seed);
    dice = rng_open(seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_unseen_slots),
        cmocka_unit_test(test_open_without_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
