/* Every operation of a backend's table against plain arithmetic in double on small models: all architectures, both pair
 * layouts, several weight types, all KV types and instruction sets; and what the table promises beside the numbers. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "base/mem.h"
#include "infer/forward.h"
#include "model/rope.h"
#include "support/random.h"
#include "support/tiny.h"

enum { ROWS = 40, PAGE_SIZE = 32, N_PAGES = 12, N_ANGLES = 512, MAX_LOGITS = 8 };

static rng dice;

/* ---- A model, a backend on it, and one sequence whose stream lies in pages 3, 4, 5, ... -------------------------- */

typedef struct fixture {
    void *bytes;
    mp_model *model;
    mp_rope_table rope;
    mp_backend *b;
    const mp_backend_ops *ops;
    mepic_kv_type kv_type;
    mp_plan plan;
    mp_plan_seq seq;
    mp_cell_ref ref;
    mp_cell cell;
    uint32_t zero;
    mp_row rows[ROWS];
    mp_step step;
} fixture;

static mp_backend_config config_of(const fixture *f, const char *isa, uint32_t threads) {
    return (mp_backend_config){ .model = f->model,
                                .n_angles = N_ANGLES,
                                .kv_type = f->kv_type,
                                .page_size = PAGE_SIZE,
                                .n_pages = N_PAGES,
                                .max_rows = ROWS,
                                .max_seqs = 1,
                                .max_refs = 1,
                                .threads = threads,
                                .isa = isa };
}

static void open_model(fixture *f, const mp_synth_spec *spec, mepic_kv_type kv_type) {
    memset(f, 0, sizeof *f);
    f->model = tiny_model_open(spec, &f->bytes);
    f->kv_type = kv_type;
    f->ops = &mp_backend_cpu;
    assert_int_equal(mp_rope_table_open(f->model, N_ANGLES, &f->rope, NULL), MEPIC_OK);
}

static void open_backend(fixture *f, const char *isa, uint32_t threads) {
    mepic_error err;
    const mp_backend_config config = config_of(f, isa, threads);
    if (f->ops->open(&config, &f->b, &err) != MEPIC_OK) fail_msg("%s", err.message);
}

static void close_model(fixture *f) {
    mp_rope_table_close(&f->rope);
    mp_model_close(f->model);
    free(f->bytes);
}

/* The step that computes tokens [first, first + n) of the stream; positions have a gap of 5 before them all. */
static void set_step(fixture *f, uint32_t first, uint32_t n) {
    uint32_t n_tokens = first + n;
    f->cell = (mp_cell){ .n_pages = (n_tokens + PAGE_SIZE - 1) / PAGE_SIZE, .n_tokens = n_tokens, .n_readers = 1 };
    for (uint32_t i = 0; i < f->cell.n_pages; i++) f->cell.pages[i] = 3 + i;
    f->ref = (mp_cell_ref){
        .next = MP_NONE, .prev = MP_NONE, .hi = MP_CELL_TOKENS_MAX, .mask = UINT64_MAX, .run_start = true
    };
    f->seq = (mp_plan_seq){ .row = 0, .n_rows = n, .n_refs = 1, .refs = &f->ref };
    f->zero = 0;
    f->plan = (mp_plan){ .page_size = PAGE_SIZE,
                         .max_seqs = 1,
                         .max_refs = 1,
                         .max_cells = 1,
                         .seqs = &f->seq,
                         .cells = &f->cell,
                         .used = &f->zero,
                         .n_used = 1,
                         .active = &f->zero,
                         .n_active = 1 };
    f->step = (mp_step){ .rows = f->rows, .n_rows = n, .plan = &f->plan };
    for (uint32_t i = 0; i < n; i++) {
        uint32_t index = first + i;
        f->rows[i] = (mp_row){ .token = (int32_t)((index * 37 + 11) % f->model->hp.n_vocab),
                               .position = (int32_t)index + 5,
                               .index = index,
                               .page = 3 + index / PAGE_SIZE,
                               .slot = index % PAGE_SIZE,
                               .logits = i % 7 == 2 || i + 1 == n };
        f->step.n_logits += f->rows[i].logits;
    }
}

static size_t width_of(const mp_hparams *hp, mp_act act) {
    switch (act) {
    case MP_ACT_X:
    case MP_ACT_H: return hp->n_embd;
    case MP_ACT_Q:
    case MP_ACT_A: return (size_t)hp->n_heads * hp->head_dim;
    case MP_ACT_K:
    case MP_ACT_V: return (size_t)hp->n_kv_heads * hp->head_dim;
    case MP_ACT_G:
    case MP_ACT_U: return hp->n_ff;
    default: return hp->n_vocab;
    }
}

/* Random rows written into an activation; the caller frees. */
static float *put(fixture *f, mp_act act, float scale) {
    size_t n = f->step.n_rows * width_of(&f->model->hp, act);
    float *x = mp_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = rng_float(&dice, -1, 1) * scale;
    f->ops->act_write(f->b, act, 0, f->step.n_rows, x);
    return x;
}

static float *get(fixture *f, mp_act act, uint32_t n_rows) {
    float *x = mp_alloc(n_rows * width_of(&f->model->hp, act) * sizeof *x);
    f->ops->act_read(f->b, act, 0, n_rows, x);
    return x;
}

static void check_close(double is, double should, double bound, const char *what, size_t i) {
    if (!(fabs(is - should) <= bound)) fail_msg("%s [%zu]: %.9g instead of %.9g", what, i, is, should);
}

/* ---- The operations ---------------------------------------------------------------------------------------------- */

static const float *vector(const mp_tensor *t) {
    return t->data;
}

/* Row `o` of a matrix, dequantized. */
static void matrix_row(const mp_tensor *t, size_t o, float *row) {
    const mp_dtype_info *info = mp_dtype_find(t->type);
    mp_dtype_dequantize(t->type, (const uint8_t *)t->data + o * (t->ne[0] / info->len * info->bytes), row, t->ne[0]);
}

static void check_embed(fixture *f) {
    size_t n = f->model->hp.n_embd;
    float expected[1024];
    f->ops->embed(f->b);
    float *x = get(f, MP_ACT_X, f->step.n_rows);
    for (uint32_t r = 0; r < f->step.n_rows; r++) {
        matrix_row(f->model->token_embd, (size_t)f->rows[r].token, expected);
        assert_memory_equal(expected, x + r * n, n * sizeof *x);
    }
    mp_free(x);
}

static void norm_slow(const float *x, const float *w, size_t n, double eps, double *y) {
    double squares = 0.0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * (double)x[i];
    for (size_t i = 0; i < n; i++) y[i] = (double)x[i] / sqrt(squares / (double)n + eps) * (double)w[i];
}

static void check_norm(fixture *f, mp_norm which, uint32_t layer) {
    size_t n = f->model->hp.n_embd;
    const mp_layer *l = &f->model->layers[layer];
    double expected[1024];
    float *x = put(f, MP_ACT_X, 3.0f);
    f->ops->norm(f->b, which, layer);
    float *h = get(f, MP_ACT_H, f->step.n_rows);
    for (uint32_t r = 0; r < f->step.n_rows; r++) {
        norm_slow(x + r * n, vector(which == MP_NORM_ATTN ? l->attn_norm : l->ffn_norm), n,
                  (double)f->model->hp.norm_eps, expected);
        for (size_t i = 0; i < n; i++) {
            check_close((double)h[r * n + i], expected[i], 1e-6 * fabs(expected[i]), "norm", r * n + i);
        }
    }
    mp_free(x);
    mp_free(h);
}

/* y (+)= w x for all rows; `before` NULL: plain. */
static void check_product(const fixture *f, const mp_tensor *w, const float *x, const float *before, float *y,
                          uint32_t n_rows, const char *what) {
    (void)f;
    size_t n_in = w->ne[0], n_out = w->ne[1];
    float row[1024];
    for (size_t o = 0; o < n_out; o++) {
        matrix_row(w, o, row);
        for (uint32_t r = 0; r < n_rows; r++) {
            double sum = before ? (double)before[r * n_out + o] : 0.0, size = fabs(sum);
            for (size_t i = 0; i < n_in; i++) {
                double product = (double)row[i] * (double)x[r * n_in + i];
                sum += product;
                size += fabs(product);
            }
            check_close((double)y[r * n_out + o], sum, 5e-5 * size, what, r * n_out + o);
        }
    }
    mp_free(y);
}

static void check_projections(fixture *f, uint32_t layer) {
    const mp_layer *l = &f->model->layers[layer];
    uint32_t n = f->step.n_rows;
    float *h = put(f, MP_ACT_H, 1.0f), *a = put(f, MP_ACT_A, 1.0f), *x = put(f, MP_ACT_X, 1.0f);
    f->ops->project(f->b, MP_PROJ_QKV, layer);
    check_product(f, l->wq, h, NULL, get(f, MP_ACT_Q, n), n, "q");
    check_product(f, l->wk, h, NULL, get(f, MP_ACT_K, n), n, "k");
    check_product(f, l->wv, h, NULL, get(f, MP_ACT_V, n), n, "v");
    f->ops->project(f->b, MP_PROJ_OUT, layer);
    check_product(f, l->wo, a, x, get(f, MP_ACT_X, n), n, "out");
    f->ops->project(f->b, MP_PROJ_GATE_UP, layer);
    check_product(f, l->gate, h, NULL, get(f, MP_ACT_G, n), n, "gate");
    check_product(f, l->up, h, NULL, get(f, MP_ACT_U, n), n, "up");
    float *g = put(f, MP_ACT_G, 1.0f), *before = get(f, MP_ACT_X, n);
    f->ops->project(f->b, MP_PROJ_DOWN, layer);
    check_product(f, l->down, g, before, get(f, MP_ACT_X, n), n, "down");
    mp_free(h);
    mp_free(a);
    mp_free(x);
    mp_free(g);
    mp_free(before);
}

static void check_activate(fixture *f) {
    size_t n = f->step.n_rows * (size_t)f->model->hp.n_ff;
    float *g = put(f, MP_ACT_G, 20.0f), *u = put(f, MP_ACT_U, 2.0f);
    g[0] = 200.0f;
    g[1] = -200.0f;
    f->ops->act_write(f->b, MP_ACT_G, 0, f->step.n_rows, g);
    f->ops->activate(f->b);
    float *y = get(f, MP_ACT_G, f->step.n_rows);
    for (size_t i = 0; i < n; i++) {
        double expected = (double)g[i] / (1.0 + exp(-(double)g[i])) * (double)u[i];
        check_close((double)y[i], expected, 1e-6 * fabs(expected) + 1e-30, "activate", i);
    }
    mp_free(g);
    mp_free(u);
    mp_free(y);
}

static void check_logits(fixture *f) {
    const mp_model *m = f->model;
    size_t n = m->hp.n_embd;
    double normed[1024];
    float *x = put(f, MP_ACT_X, 2.0f), *h = mp_alloc(f->step.n_logits * n * sizeof *h);
    uint32_t i = 0;
    for (uint32_t r = 0; r < f->step.n_rows; r++) {
        if (!f->rows[r].logits) continue;
        norm_slow(x + r * n, vector(m->output_norm), n, (double)m->hp.norm_eps, normed);
        for (size_t d = 0; d < n; d++) h[i * n + d] = (float)normed[d];
        i++;
    }
    f->ops->logits(f->b);
    float *y = get(f, MP_ACT_LOGITS, f->step.n_logits);
    for (i = 0; i < f->step.n_logits; i++) {
        assert_memory_equal(y + i * (size_t)m->hp.n_vocab, f->ops->logits_row(f->b, i), m->hp.n_vocab * sizeof *y);
    }
    check_product(f, m->output, h, NULL, y, f->step.n_logits, "logits");
    mp_free(x);
    mp_free(h);
}

/* ---- Store and attend -------------------------------------------------------------------------------------------- */

/* One head as the model defines it: bias, then norm, then for keys the rotation by the row's position. */
static void head_slow(const fixture *f, const float *x, const mp_tensor *bias, const mp_tensor *norm, uint32_t head,
                      int32_t angle, bool turn, double *y) {
    const mp_hparams *hp = &f->model->hp;
    uint32_t hd = hp->head_dim, n = f->rope.n_pairs;
    float biased[256];
    double flat[256];
    for (uint32_t d = 0; d < hd; d++) {
        biased[d] = x[head * hd + d] + (bias ? vector(bias)[head * hd + d] : 0.0f);
        flat[d] = (double)biased[d];
    }
    if (norm) norm_slow(biased, vector(norm), hd, (double)hp->norm_eps, flat);
    memcpy(y, flat, hd * sizeof *y);
    for (uint32_t i = 0; i < n && turn; i++) {
        bool adjacent = hp->rope.pairs == MP_ROPE_ADJACENT;
        uint32_t a = adjacent ? 2 * i : i, b = adjacent ? 2 * i + 1 : i + n;
        double c = (double)f->rope.cos_sin[(size_t)angle * 2 * n + i];
        double s = (double)f->rope.cos_sin[((size_t)angle * 2 + 1) * n + i];
        y[a] = flat[a] * c - flat[b] * s;
        y[b] = flat[a] * s + flat[b] * c;
    }
}

/* K (or V) of a token from the bytes of a page, as cpu/slab.h describes them. */
static double page_value(const fixture *f, const uint8_t *page, uint32_t layer, uint32_t head, uint32_t slot,
                         uint32_t d, bool v) {
    size_t hd = f->model->hp.head_dim;
    size_t i = ((size_t)layer * f->model->hp.n_kv_heads + head) * PAGE_SIZE * 2 * hd + slot / 16 * (32 * hd);
    i += v ? 16 * hd + slot % 16 * hd + d : d * 16 + slot % 16;
    switch (f->kv_type) {
    case MEPIC_KV_F16: return (double)mp_f16_to_f32(((const uint16_t *)(const void *)page)[i]);
    case MEPIC_KV_BF16: return (double)mp_bf16_to_f32(((const uint16_t *)(const void *)page)[i]);
    default: return (double)((const float *)(const void *)page)[i];
    }
}

static double rounding(mepic_kv_type type, double x) {
    double half = type == MEPIC_KV_F16 ? 0x1p-11 : type == MEPIC_KV_BF16 ? 0x1p-8 : 0.0;
    return fabs(x) * half + 2e-6;
}

static void check_store(fixture *f, uint32_t layer) {
    const mp_hparams *hp = &f->model->hp;
    const mp_layer *l = &f->model->layers[layer];
    uint32_t hd = hp->head_dim, n = f->step.n_rows;
    size_t nq = width_of(hp, MP_ACT_Q), nk = width_of(hp, MP_ACT_K);
    double expected[256];
    float *q = put(f, MP_ACT_Q, 2.0f), *k = put(f, MP_ACT_K, 2.0f), *v = put(f, MP_ACT_V, 2.0f);
    uint8_t *page = mp_alloc(f->ops->page_bytes(f->b));
    f->ops->store(f->b, layer);
    float *q_after = get(f, MP_ACT_Q, n);
    for (uint32_t r = 0; r < n; r++) {
        const mp_row *row = &f->rows[r];
        for (uint32_t h = 0; h < hp->n_heads; h++) {
            head_slow(f, q + r * nq, l->bq, l->q_norm, h, row->position, false, expected);
            for (uint32_t d = 0; d < hd; d++) {
                check_close((double)q_after[r * nq + h * hd + d], expected[d], 2e-6, "q after store", d);
            }
        }
        f->ops->page_read(f->b, row->page, page);
        for (uint32_t h = 0; h < hp->n_kv_heads; h++) {
            head_slow(f, k + r * nk, l->bk, l->k_norm, h, row->position, true, expected);
            for (uint32_t d = 0; d < hd; d++) {
                check_close(page_value(f, page, layer, h, row->slot, d, false), expected[d],
                            rounding(f->kv_type, expected[d]), "stored k", d);
            }
            head_slow(f, v + r * nk, l->bv, NULL, h, row->position, false, expected);
            for (uint32_t d = 0; d < hd; d++) {
                check_close(page_value(f, page, layer, h, row->slot, d, true), expected[d],
                            rounding(f->kv_type, expected[d]), "stored v", d);
            }
        }
    }
    mp_free(q);
    mp_free(k);
    mp_free(v);
    mp_free(q_after);
    mp_free(page);
}

/* After check_store: attention over the tokens just stored, from the pages. */
static void check_attend(fixture *f, uint32_t layer) {
    const mp_hparams *hp = &f->model->hp;
    uint32_t hd = hp->head_dim, n = f->step.n_rows;
    size_t nq = width_of(hp, MP_ACT_Q), page_bytes = f->ops->page_bytes(f->b);
    float *q = put(f, MP_ACT_Q, 1.0f);
    f->ops->attend(f->b, layer);
    float *a = get(f, MP_ACT_A, n);
    uint8_t *pages = mp_alloc(page_bytes * f->cell.n_pages);
    for (uint32_t p = 0; p < f->cell.n_pages; p++) f->ops->page_read(f->b, f->cell.pages[p], pages + p * page_bytes);
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t h = 0; h < hp->n_heads; h++) {
            double turned[256], out[256] = { 0 }, weight[ROWS], top = -INFINITY, sum = 0.0;
            uint32_t kv_head = h / (hp->n_heads / hp->n_kv_heads);
            head_slow(f, q + r * nq, NULL, NULL, h, f->rows[r].position, true, turned);
            for (uint32_t t = 0; t <= r; t++) {
                weight[t] = 0.0;
                for (uint32_t d = 0; d < hd; d++) {
                    weight[t] += turned[d] * page_value(f, pages + t / PAGE_SIZE * page_bytes, layer, kv_head,
                                                        t % PAGE_SIZE, d, false);
                }
                weight[t] /= sqrt((double)hd);
                top = fmax(top, weight[t]);
            }
            for (uint32_t t = 0; t <= r; t++) {
                double p = exp(weight[t] - top);
                sum += p;
                for (uint32_t d = 0; d < hd; d++) {
                    out[d] +=
                        p * page_value(f, pages + t / PAGE_SIZE * page_bytes, layer, kv_head, t % PAGE_SIZE, d, true);
                }
            }
            for (uint32_t d = 0; d < hd; d++) {
                check_close((double)a[r * nq + h * hd + d], out[d] / sum, 3e-5, "attend", d);
            }
        }
    }
    mp_free(q);
    mp_free(a);
    mp_free(pages);
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

/* The i-th model: every architecture, and weight types that have a path of their own. False at the end. */
static bool variant(uint32_t i, mp_synth_spec *spec) {
    static const struct {
        mp_arch arch;
        mp_dtype type;
    } table[] = {
        { MP_ARCH_LLAMA, MP_DTYPE_F32 },  { MP_ARCH_QWEN2, MP_DTYPE_Q8_0 }, { MP_ARCH_QWEN3, MP_DTYPE_Q4_1 },
        { MP_ARCH_LLAMA, MP_DTYPE_BF16 }, { MP_ARCH_QWEN2, MP_DTYPE_Q6_K }, { MP_ARCH_LLAMA, MP_DTYPE_Q4_K }
    };
    if (i >= sizeof table / sizeof table[0]) return false;
    *spec = mp_synth_tiny(table[i].arch);
    mp_synth_set_type(spec, table[i].type);
    if (mp_dtype_find(table[i].type)->len == 256) {
        spec->hp.n_embd = spec->hp.n_ff = 256;
        spec->hp.n_heads = 8;
        spec->hp.head_dim = 32;
        spec->hp.rope.n_rot = 32;
    }
    spec->tied = i % 2;
    if (i == 3) spec->hp.rope.n_rot = 8; // the other half of a head does not turn
    return true;
}

static void test_operations(void **state) {
    (void)state;
    mp_synth_spec spec;
    const mp_cpu_kernels *kernels;
    for (uint32_t i = 0; variant(i, &spec); i++) {
        fixture f;
        open_model(&f, &spec, (mepic_kv_type)(MEPIC_KV_F16 + i % 3));
        for (uint32_t isa = 0; (kernels = mp_cpu_kernels_at(isa)); isa++) {
            open_backend(&f, strncmp(kernels->isa, "avx512", 6) ? kernels->isa : "avx512", 1 + rng_below(&dice, 3));
            for (uint32_t n_rows = ROWS; n_rows > 0; n_rows /= 40) {
                set_step(&f, 0, n_rows);
                f.ops->step_begin(f.b, &f.step);
                uint32_t layer = rng_below(&dice, spec.hp.n_layers);
                check_embed(&f);
                check_norm(&f, MP_NORM_ATTN, layer);
                check_norm(&f, MP_NORM_FFN, layer);
                check_projections(&f, layer);
                check_store(&f, layer);
                check_attend(&f, layer);
                check_activate(&f);
                check_logits(&f);
                assert_int_equal(f.ops->step_end(f.b, NULL), MEPIC_OK);
            }
            f.ops->close(f.b);
        }
        close_model(&f);
    }
}

/* Logits of the last of ROWS tokens, computed `at_once` rows a step; the caller frees. */
static float *last_logits(fixture *f, const char *isa, uint32_t threads, uint32_t at_once) {
    size_t n = f->model->hp.n_vocab;
    float *out = mp_alloc(n * sizeof *out);
    open_backend(f, isa, threads);
    uint64_t allocations = mp_mem_count();
    for (uint32_t first = 0; first < ROWS; first += at_once) {
        set_step(f, first, first + at_once <= ROWS ? at_once : ROWS - first);
        assert_int_equal(mp_forward(f->b, f->model, &f->step, 0, f->model->hp.n_layers, NULL), MEPIC_OK);
    }
    assert_int_equal(mp_mem_count(), allocations);
    memcpy(out, f->ops->logits_row(f->b, f->step.n_logits - 1), n * sizeof *out);
    f->ops->close(f->b);
    return out;
}

/* Any cut of a prompt and any number of threads: the same bits; and nothing is allocated in a step. */
static void test_same_bits(void **state) {
    (void)state;
    static const char *const isas[] = { "avx512", "avx2", "portable" };
    mp_synth_spec spec;
    for (uint32_t i = 0; variant(i, &spec); i++) {
        fixture f;
        open_model(&f, &spec, (mepic_kv_type)(MEPIC_KV_F16 + i % 3));
        for (uint32_t isa = 0; isa < 3; isa++) {
            const mp_cpu_kernels *kernels;
            if (mp_cpu_kernels_find(isas[isa], &kernels, NULL) != MEPIC_OK) continue;
            float *whole = last_logits(&f, isas[isa], 1, ROWS);
            static const uint32_t cuts[] = { 1, 7, 16 };
            for (uint32_t c = 0; c < 3; c++) {
                float *cut = last_logits(&f, isas[isa], 1 + c, cuts[c]);
                assert_memory_equal(whole, cut, f.model->hp.n_vocab * sizeof *cut);
                mp_free(cut);
            }
            mp_free(whole);
        }
        close_model(&f);
    }
}

static void test_pages(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    fixture f;
    open_model(&f, &spec, MEPIC_KV_F16);
    open_backend(&f, NULL, 1);
    size_t n = f.ops->page_bytes(f.b);
    assert_int_equal(n, mp_kv_page_bytes(&f.model->hp, MEPIC_KV_F16, PAGE_SIZE));
    uint8_t *a = mp_alloc(n), *b = mp_alloc(n);
    for (size_t i = 0; i < n; i++) a[i] = (uint8_t)rng_below(&dice, 256);
    f.ops->page_write(f.b, 7, a);
    f.ops->page_read(f.b, 7, b);
    assert_memory_equal(a, b, n);
    f.ops->page_write(f.b, 8, a);
    set_step(&f, 0, 1);
    static const mp_page zero[] = { 7 };
    f.step.zero_pages = zero;
    f.step.n_zero_pages = 1;
    f.ops->step_begin(f.b, &f.step);
    assert_int_equal(f.ops->step_end(f.b, NULL), MEPIC_OK);
    f.ops->page_read(f.b, 7, b);
    for (size_t i = 0; i < n; i++) assert_int_equal(b[i], 0);
    f.ops->page_read(f.b, 8, b);
    assert_memory_equal(a, b, n);
    mp_free(a);
    mp_free(b);
    f.ops->close(f.b);
    close_model(&f);
}

/* A backend in a step of one row. */
static void begin_row(fixture *f, const mp_synth_spec *spec, mepic_kv_type type) {
    open_model(f, spec, type);
    open_backend(f, NULL, 1);
    set_step(f, 0, 1);
    f->ops->step_begin(f->b, &f->step);
}

/* The row is stored with this v; its page. */
static uint8_t *store_value(fixture *f, const float *v) {
    f->ops->act_write(f->b, MP_ACT_V, 0, 1, v);
    f->ops->store(f->b, 0);
    uint8_t *page = mp_alloc(f->ops->page_bytes(f->b));
    f->ops->page_read(f->b, f->rows[0].page, page);
    return page;
}

/* Stored values stay finite whatever a layer produces. */
static void test_store_saturates(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    for (uint32_t type = MEPIC_KV_F16; type <= MEPIC_KV_F32; type++) {
        fixture f;
        begin_row(&f, &spec, (mepic_kv_type)type);
        float *v = put(&f, MP_ACT_V, 1.0f);
        v[0] = INFINITY;
        v[1] = -3.4e38f;
        uint8_t *page = store_value(&f, v);
        double top = page_value(&f, page, 0, 0, 0, 0, true), bottom = page_value(&f, page, 0, 0, 0, 1, true);
        assert_true(isfinite(top) && top >= 65504.0 && isfinite(bottom) && bottom <= -65504.0);
        mp_free(page);
        mp_free(v);
        f.ops->close(f.b);
        close_model(&f);
    }
}

/* A NaN in a token's value is one in its key, and in no value: rows that do not see the token multiply it by 0. */
static void test_store_keeps_nan_in_the_key(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    for (uint32_t type = MEPIC_KV_F16; type <= MEPIC_KV_F32; type++) {
        fixture f;
        begin_row(&f, &spec, (mepic_kv_type)type);
        float *k = put(&f, MP_ACT_K, 1.0f), *v = put(&f, MP_ACT_V, 1.0f);
        uint32_t head_dim = spec.hp.head_dim;
        v[head_dim + 3] = NAN; /* of the second kv head */
        uint8_t *page = store_value(&f, v);
        for (uint32_t d = 0; d < head_dim; d++) {
            assert_true(isfinite(page_value(&f, page, 0, 0, 0, d, false)));
            assert_true(isnan(page_value(&f, page, 0, 1, 0, d, false)));
            double value = page_value(&f, page, 0, 1, 0, d, true);
            assert_true(d == 3 ? value == 0 : isfinite(value));
        }
        mp_free(page);
        mp_free(k);
        mp_free(v);
        f.ops->close(f.b);
        close_model(&f);
    }
}

static void test_open_without_memory(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_QWEN2);
    fixture f;
    open_model(&f, &spec, MEPIC_KV_F16);
    const mp_backend_config config = config_of(&f, NULL, 2);
    uint64_t before = mp_mem_count();
    open_backend(&f, NULL, 2);
    uint64_t n = mp_mem_count() - before;
    f.ops->close(f.b);
    for (uint64_t i = 1; i <= n; i++) {
        mp_backend *none = NULL;
        mepic_error err;
        mp_mem_fail_at(i, false);
        assert_int_equal(f.ops->open(&config, &none, &err), MEPIC_ERR_NOMEM);
        assert_null(none);
    }
    mp_mem_fail_at(0, false);
    close_model(&f);
}

static void test_bad_config(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    fixture f;
    open_model(&f, &spec, MEPIC_KV_F16);
    mepic_error err;
    mp_backend *none = NULL;
    mp_backend_config config = config_of(&f, "sse9", 1);
    assert_int_equal(f.ops->open(&config, &none, &err), MEPIC_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "sse9"));
    config = config_of(&f, NULL, 1);
    config.page_size = 24;
    assert_int_equal(f.ops->open(&config, &none, &err), MEPIC_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "24"));
    config = config_of(&f, NULL, 1);
    config.kv_type = MEPIC_KV_FP8;
    assert_int_equal(f.ops->open(&config, &none, &err), MEPIC_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "fp8"));
    config = config_of(&f, NULL, 1);
    config.weights = MEPIC_WEIGHTS_FP8;
    assert_int_equal(f.ops->open(&config, &none, &err), MEPIC_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "use a GPU"));
    assert_null(none);
    f.ops->close(NULL);
    close_model(&f);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 4711;
    printf("seed %llu\n", (unsigned long long)seed);
    dice = rng_open(seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_operations),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_pages),
        cmocka_unit_test(test_store_saturates),
        cmocka_unit_test(test_store_keeps_nan_in_the_key),
        cmocka_unit_test(test_open_without_memory),
        cmocka_unit_test(test_bad_config),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
