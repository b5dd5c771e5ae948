/* The CPU behind the backend table: weights, pages and activations, and the order of kernels in each operation.
 *
 * Everything is taken at open; a step only moves numbers. Rows are split over threads in blocks of ROWS_PER_ITEM, so a
 * decode step of a few rows stays on the calling thread where starting workers would cost more than the work. */
#include "backend/backend.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backend/cpu/attend.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/matmul.h"
#include "base/mem.h"

/* Part of the numerics class: raise it with every change that can change a bit. */
#define NUMERICS_VERSION 1

enum { ROWS_PER_ITEM = 16 };

/* States of decode rows. One takes head_dim + 16 floats a head, cell and row: enough for 64 requests of 2,000 tokens on
 * a model of 1.5B parameters, and small beside the weights; what does not fit is computed the other way. */
static const size_t ATTEND_WORKSPACE = (size_t)32 << 20;

typedef struct cpu_layer {
    mp_packed *wq, *wk, *wv, *wo, *gate, *up, *down;
} cpu_layer;

typedef struct cpu_backend {
    mp_backend base;
    const mp_model *model;
    const mp_hparams *hp;
    mp_rope_table rope;
    uint32_t max_rows;
    char numerics[48];

    const mp_cpu_kernels *kernels;
    const struct mp_row_kernels *rows;
    mp_threads *threads;
    mp_attend *attend;
    mp_qrows *qrows;

    cpu_layer *layers;
    mp_packed *output;
    uint8_t *weights; /* what all of these are packed into */
    size_t weights_bytes;
    mp_slab slab;

    /* Activations, shapes in mp_act. */
    float *act;
    size_t act_bytes;
    float *x, *h, *q, *k, *v, *a, *g, *u, *logits;

    const mp_step *step;
    uint32_t layer; /* of the operation under way */
    const float *norm_weight;
} cpu_backend;

static cpu_backend *self(mp_backend *b) {
    return (cpu_backend *)b;
}

static const float *floats(const mp_tensor *t) {
    return t->data;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static mepic_status check_config(const mp_backend_config *c, mepic_error *err) {
    if (c->weights != MEPIC_WEIGHTS_DEFAULT) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "weights: the CPU multiplies them as they are in the file; leave the option out, or use a GPU "
                       "(device cuda)");
    }
    if (c->kv_type < MEPIC_KV_F16 || c->kv_type > MEPIC_KV_F32) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "kv_type: the CPU backend keeps f16, bf16 or f32; fp8 is for a GPU (device cuda)");
    }
    if (c->page_size != 16 && c->page_size != 32 && c->page_size != 64 && c->page_size != 128) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "page_size: %u is none of 16, 32, 64 and 128", c->page_size);
    }
    if (c->max_rows == 0 || c->n_pages == 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "a backend needs at least one row and one page");
    }
    return MEPIC_OK;
}

static mepic_status pack(cpu_backend *c, const mp_tensor *weight, mp_packed **out, size_t *done, const mp_log *log,
                         mepic_error *err) {
    mepic_status status = mp_packed_open(weight, c->threads, c->weights + *done, out, err);
    if (status != MEPIC_OK) return status;
    *done += mp_packed_size(weight);
    mp_log_progress(log, "packing weights", *done, c->weights_bytes);
    return MEPIC_OK;
}

static size_t weights_size(const mp_model *m) {
    size_t total = mp_packed_size(m->output);
    for (uint32_t i = 0; i < m->hp.n_layers; i++) {
        const mp_layer *l = &m->layers[i];
        const mp_tensor *const weights[] = { l->wq, l->wk, l->wv, l->wo, l->gate, l->up, l->down };
        for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++) total += mp_packed_size(weights[w]);
    }
    return total;
}

/* Packs every matrix; the file's pages are let go layer by layer, so that no weight is in memory twice for long. */
static mepic_status open_weights(cpu_backend *c, const mp_log *log, mepic_error *err) {
    const mp_model *m = c->model;
    size_t done = 0, bytes = weights_size(m);
    c->weights = mp_alloc_aligned(64, bytes);
    if (!c->weights) return mp_fail_nomem(err, "the packed weights", bytes);
    c->weights_bytes = bytes;
    c->layers = mp_calloc(c->hp->n_layers, sizeof *c->layers);
    if (!c->layers) return mp_fail_nomem(err, "the table of layers", c->hp->n_layers * sizeof *c->layers);
    for (uint32_t i = 0; i < c->hp->n_layers; i++) {
        const mp_layer *l = &m->layers[i];
        cpu_layer *p = &c->layers[i];
        const struct {
            const mp_tensor *from;
            mp_packed **to;
        } weights[] = { { l->wq, &p->wq },     { l->wk, &p->wk }, { l->wv, &p->wv },    { l->wo, &p->wo },
                        { l->gate, &p->gate }, { l->up, &p->up }, { l->down, &p->down } };
        for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++) {
            mepic_status status = pack(c, weights[w].from, weights[w].to, &done, log, err);
            if (status != MEPIC_OK) return status;
        }
        mp_gguf_cool(m->gguf);
    }
    mepic_status status = pack(c, m->output, &c->output, &done, log, err);
    mp_gguf_cool(m->gguf);
    return status;
}

static mepic_status open_slab(cpu_backend *c, const mp_backend_config *config, mepic_error *err) {
    mp_slab *s = &c->slab;
    s->type = config->kv_type;
    s->page_size = config->page_size;
    s->n_kv_heads = c->hp->n_kv_heads;
    s->head_dim = c->hp->head_dim;
    s->page_bytes = mp_kv_page_bytes(c->hp, config->kv_type, config->page_size);
    s->block_bytes = s->page_bytes / c->hp->n_layers / c->hp->n_kv_heads;
    s->group_bytes = s->block_bytes / (config->page_size / MP_GROUP_TOKENS);
    size_t bytes;
    if (!mp_mul_size(s->page_bytes, config->n_pages, &bytes)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "pages: %u pages of %zu bytes are more than memory can be",
                       config->n_pages, s->page_bytes);
    }
    s->data = mp_alloc_aligned(4096, bytes);
    if (!s->data) return mp_fail_nomem(err, "the page pool", bytes);
    s->n_pages = config->n_pages;
    return MEPIC_OK;
}

/* One allocation, cut into the activations; each starts on a cache line. */
static mepic_status open_activations(cpu_backend *c, mepic_error *err) {
    const mp_hparams *hp = c->hp;
    size_t rows = c->max_rows, heads = (size_t)hp->n_heads * hp->head_dim, kv = (size_t)hp->n_kv_heads * hp->head_dim;
    const struct {
        float **to;
        size_t n;
    } parts[] = {
        { &c->x, rows * hp->n_embd }, { &c->h, rows * hp->n_embd }, { &c->q, rows * heads },
        { &c->k, rows * kv },         { &c->v, rows * kv },         { &c->a, rows * heads },
        { &c->g, rows * hp->n_ff },   { &c->u, rows * hp->n_ff },   { &c->logits, rows * hp->n_vocab },
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) total += (parts[i].n + 15) / 16 * 16;
    c->act_bytes = total * sizeof(float);
    c->act = mp_alloc_aligned(64, c->act_bytes);
    if (!c->act) return mp_fail_nomem(err, "activations", c->act_bytes);
    float *at = c->act;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].to = at;
        at += (parts[i].n + 15) / 16 * 16;
    }
    return MEPIC_OK;
}

static uint32_t most_inputs(const mp_hparams *hp) {
    uint32_t most = hp->n_embd > hp->n_ff ? hp->n_embd : hp->n_ff;
    return hp->n_heads * hp->head_dim > most ? hp->n_heads * hp->head_dim : most;
}

static void cpu_close(mp_backend *b) {
    if (!b) return;
    cpu_backend *c = self(b);
    for (uint32_t i = 0; c->layers && i < c->hp->n_layers; i++) {
        cpu_layer *l = &c->layers[i];
        mp_packed_close(l->wq);
        mp_packed_close(l->wk);
        mp_packed_close(l->wv);
        mp_packed_close(l->wo);
        mp_packed_close(l->gate);
        mp_packed_close(l->up);
        mp_packed_close(l->down);
    }
    mp_free(c->layers);
    mp_packed_close(c->output);
    mp_free_aligned(c->weights, c->weights_bytes);
    mp_qrows_close(c->qrows);
    mp_attend_close(c->attend);
    mp_free_aligned(c->act, c->act_bytes);
    mp_free_aligned(c->slab.data, c->slab.page_bytes * c->slab.n_pages);
    mp_threads_close(c->threads);
    mp_rope_table_close(&c->rope);
    mp_free(c);
}

/* A quarter of the machine's memory, at most 4 GiB. */
static mepic_status cpu_kv_memory(const mp_backend_config *config, size_t *bytes, mepic_error *err) {
    (void)config;
    (void)err;
    const size_t most = (size_t)4 << 30;
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    size_t total;
    if (pages <= 0 || page_bytes <= 0 || !mp_mul_size((size_t)pages, (size_t)page_bytes, &total)) total = most;
    *bytes = total / 4 < most ? total / 4 : most;
    return MEPIC_OK;
}

static uint32_t cpu_n_devices(void) {
    return 1;
}

static bool cpu_usable(uint32_t device) {
    return device == 0;
}

static mepic_status cpu_open(const mp_backend_config *config, mp_backend **out, mepic_error *err) {
    mepic_status status = check_config(config, err);
    if (status != MEPIC_OK) return status;
    cpu_backend *c = mp_calloc(1, sizeof *c);
    if (!c) return mp_fail_nomem(err, "the backend", sizeof *c);
    c->base.ops = &mp_backend_cpu;
    c->model = config->model;
    c->hp = &config->model->hp;
    c->max_rows = config->max_rows;

    if ((status = mp_cpu_kernels_find(config->isa, &c->kernels, err)) != MEPIC_OK) goto fail;
    c->rows = c->kernels->rows;
    snprintf(c->numerics, sizeof c->numerics, "cpu/%s/%d", c->kernels->isa, NUMERICS_VERSION);
    if ((status = mp_threads_open(config->threads, &c->threads, err)) != MEPIC_OK) goto fail;
    if ((status = mp_rope_table_open(config->model, config->n_angles, &c->rope, err)) != MEPIC_OK) goto fail;
    if ((status = open_slab(c, config, err)) != MEPIC_OK) goto fail;
    if ((status = open_activations(c, err)) != MEPIC_OK) goto fail;
    if ((status = mp_qrows_open(c->max_rows, most_inputs(c->hp), &c->qrows, err)) != MEPIC_OK) goto fail;
    const mp_attend_config attend = {
        .kernels = c->kernels,
        .threads = c->threads,
        .hp = c->hp,
        .rope = &c->rope,
        .slab = &c->slab,
        .max_rows = c->max_rows,
        .workspace = ATTEND_WORKSPACE,
    };
    if ((status = mp_attend_open(&attend, &c->attend, err)) != MEPIC_OK) goto fail;
    if ((status = open_weights(c, config->log, err)) != MEPIC_OK) goto fail;
    *out = &c->base;
    return MEPIC_OK;
fail:
    cpu_close(&c->base);
    return status;
}

static const char *cpu_numerics(const mp_backend *b) {
    return ((const cpu_backend *)b)->numerics;
}

/* ---- Step -------------------------------------------------------------------------------------------------------- */

static uint8_t *page_data(cpu_backend *c, mp_page page) {
    return c->slab.data + page * c->slab.page_bytes;
}

static void cpu_step_begin(mp_backend *b, const mp_step *step) {
    cpu_backend *c = self(b);
    c->step = step;
    /* All bits set are NaN in every floating-point type. */
    for (uint32_t i = 0; i < step->n_spoil_pages; i++) {
        memset(page_data(c, step->spoil_pages[i]), 0xff, c->slab.page_bytes);
    }
    for (uint32_t i = 0; i < step->n_zero_pages; i++) memset(page_data(c, step->zero_pages[i]), 0, c->slab.page_bytes);
    mp_attend_begin(c->attend, step);
}

static mepic_status cpu_step_end(mp_backend *b, mepic_error *err) {
    (void)err; /* nothing on the CPU fails after open */
    self(b)->step = NULL;
    return MEPIC_OK;
}

/* A step was done when it ended, and the host samples. */
static mepic_status cpu_wait(mp_backend *b, uint32_t ago, mp_sampled *out, uint32_t n, mepic_error *err) {
    (void)b;
    (void)ago;
    (void)out;
    (void)n;
    (void)err;
    return MEPIC_OK;
}

/* Runs fn over blocks of rows. */
static void for_row_blocks(cpu_backend *c, uint32_t n_rows, mp_task_fn fn) {
    mp_threads_run(c->threads, (n_rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, fn, c);
}

static uint32_t block_end(uint32_t item, uint32_t n_rows) {
    uint32_t end = (item + 1) * ROWS_PER_ITEM;
    return end < n_rows ? end : n_rows;
}

static void embed_block(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    cpu_backend *c = ctx;
    const mp_tensor *t = c->model->token_embd;
    const mp_dtype_info *info = mp_dtype_find(t->type);
    size_t row_bytes = c->hp->n_embd / info->len * (size_t)info->bytes;
    for (uint32_t r = item * ROWS_PER_ITEM; r < block_end(item, c->step->n_rows); r++) {
        const uint8_t *src = (const uint8_t *)t->data + (size_t)c->step->rows[r].token * row_bytes;
        mp_dtype_dequantize(t->type, src, c->x + (size_t)r * c->hp->n_embd, c->hp->n_embd);
    }
}

static void cpu_embed(mp_backend *b) {
    for_row_blocks(self(b), self(b)->step->n_rows, embed_block);
}

static void norm_block(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    cpu_backend *c = ctx;
    size_t n = c->hp->n_embd;
    for (uint32_t r = item * ROWS_PER_ITEM; r < block_end(item, c->step->n_rows); r++) {
        c->rows->norm(c->x + r * n, c->norm_weight, c->hp->norm_eps, c->hp->n_embd, c->h + r * n);
    }
}

static void cpu_norm(mp_backend *b, mp_norm which, uint32_t layer) {
    cpu_backend *c = self(b);
    const mp_layer *l = &c->model->layers[layer];
    c->norm_weight = floats(which == MP_NORM_ATTN ? l->attn_norm : l->ffn_norm);
    for_row_blocks(c, c->step->n_rows, norm_block);
}

static void multiply(cpu_backend *c, const float *x, uint32_t n_rows, uint32_t n_in, const mp_packed *const *w,
                     uint32_t n_w, float *const *y, bool add) {
    mp_qrows_set(c->qrows, c->kernels, c->threads, x, n_rows, n_in);
    mp_matmul(c->kernels, c->threads, w, n_w, c->qrows, y, add);
}

static void cpu_project(mp_backend *b, mp_proj which, uint32_t layer) {
    cpu_backend *c = self(b);
    const cpu_layer *l = &c->layers[layer];
    uint32_t n = c->step->n_rows;
    switch (which) {
    case MP_PROJ_QKV:
        multiply(c, c->h, n, c->hp->n_embd, (const mp_packed *const[]){ l->wq, l->wk, l->wv }, 3,
                 (float *const[]){ c->q, c->k, c->v }, false);
        break;
    case MP_PROJ_OUT:
        multiply(c, c->a, n, c->hp->n_heads * c->hp->head_dim, (const mp_packed *const[]){ l->wo }, 1,
                 (float *const[]){ c->x }, true);
        break;
    case MP_PROJ_GATE_UP:
        multiply(c, c->h, n, c->hp->n_embd, (const mp_packed *const[]){ l->gate, l->up }, 2,
                 (float *const[]){ c->g, c->u }, false);
        break;
    case MP_PROJ_DOWN:
        multiply(c, c->g, n, c->hp->n_ff, (const mp_packed *const[]){ l->down }, 1, (float *const[]){ c->x }, true);
        break;
    }
}

static void norm_heads(const cpu_backend *c, float *x, uint32_t n_heads, const mp_tensor *weight) {
    for (uint32_t h = 0; h < n_heads; h++) {
        float *head = x + (size_t)h * c->hp->head_dim;
        c->rows->norm(head, floats(weight), c->hp->norm_eps, c->hp->head_dim, head);
    }
}

/* A NaN in a token's value becomes one in its key, and the value 0: rows that see the token end as NaN, and rows that
 * give it weight 0 do not. */
static void keep_nan(uint32_t n, float *k, float *v) {
    bool any = false;
    for (uint32_t i = 0; i < n; i++) any |= isnan(v[i]) != 0;
    for (uint32_t i = 0; any && i < n; i++) {
        k[i] = NAN;
        if (isnan(v[i])) v[i] = 0.0f;
    }
}

static void store_row(cpu_backend *c, uint32_t r) {
    const mp_hparams *hp = c->hp;
    const mp_layer *l = &c->model->layers[c->layer];
    const mp_row *row = &c->step->rows[r];
    uint32_t n_q = hp->n_heads * hp->head_dim, n_kv = hp->n_kv_heads * hp->head_dim;
    float *q = c->q + (size_t)r * n_q, *k = c->k + (size_t)r * n_kv, *v = c->v + (size_t)r * n_kv;
    if (hp->qkv_bias) {
        c->rows->add(q, floats(l->bq), n_q);
        c->rows->add(k, floats(l->bk), n_kv);
        c->rows->add(v, floats(l->bv), n_kv);
    }
    if (hp->qk_norm) {
        norm_heads(c, q, hp->n_heads, l->q_norm);
        norm_heads(c, k, hp->n_kv_heads, l->k_norm);
    }
    const float *cos_sin = c->rope.cos_sin + (size_t)row->position * 2 * c->rope.n_pairs;
    for (uint32_t h = 0; h < hp->n_kv_heads; h++) {
        float turned[256];
        size_t at = (size_t)h * hp->head_dim;
        c->rows->turn(k + at, cos_sin, hp->rope.pairs, c->rope.n_pairs, hp->head_dim, 1.0f, turned);
        keep_nan(hp->head_dim, turned, v + at);
        memcpy(k + at, turned, hp->head_dim * sizeof *turned);
        c->rows->store[c->slab.type](turned, v + at, hp->head_dim, row->slot % MP_GROUP_TOKENS,
                                     mp_slab_group(&c->slab, row->page, c->layer, h, row->slot));
    }
}

static void store_block(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    cpu_backend *c = ctx;
    for (uint32_t r = item * ROWS_PER_ITEM; r < block_end(item, c->step->n_rows); r++) store_row(c, r);
}

static void cpu_store(mp_backend *b, uint32_t layer) {
    self(b)->layer = layer;
    for_row_blocks(self(b), self(b)->step->n_rows, store_block);
}

static void cpu_attend(mp_backend *b, uint32_t layer) {
    cpu_backend *c = self(b);
    mp_attend_run(c->attend, layer, c->q, c->a);
}

static void activate_block(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    cpu_backend *c = ctx;
    size_t n = c->hp->n_ff;
    for (uint32_t r = item * ROWS_PER_ITEM; r < block_end(item, c->step->n_rows); r++) {
        c->rows->swiglu(c->g + r * n, c->u + r * n, c->hp->n_ff);
    }
}

static void cpu_activate(mp_backend *b) {
    for_row_blocks(self(b), self(b)->step->n_rows, activate_block);
}

static void cpu_logits(mp_backend *b) {
    cpu_backend *c = self(b);
    size_t n = c->hp->n_embd;
    uint32_t n_logits = 0;
    for (uint32_t r = 0; r < c->step->n_rows; r++) {
        if (!c->step->rows[r].logits) continue;
        c->rows->norm(c->x + r * n, floats(c->model->output_norm), c->hp->norm_eps, c->hp->n_embd, c->h + n_logits * n);
        n_logits++;
    }
    if (n_logits == 0) return;
    multiply(c, c->h, n_logits, c->hp->n_embd, (const mp_packed *const[]){ c->output }, 1,
             (float *const[]){ c->logits }, false);
}

static const float *cpu_logits_row(mp_backend *b, uint32_t i) {
    return self(b)->logits + (size_t)i * self(b)->hp->n_vocab;
}

/* ---- Inspection and pages ---------------------------------------------------------------------------------------- */

static float *act_rows(cpu_backend *c, mp_act act, size_t *width) {
    const mp_hparams *hp = c->hp;
    size_t heads = (size_t)hp->n_heads * hp->head_dim, kv = (size_t)hp->n_kv_heads * hp->head_dim;
    switch (act) {
    case MP_ACT_X: *width = hp->n_embd; return c->x;
    case MP_ACT_H: *width = hp->n_embd; return c->h;
    case MP_ACT_Q: *width = heads; return c->q;
    case MP_ACT_K: *width = kv; return c->k;
    case MP_ACT_V: *width = kv; return c->v;
    case MP_ACT_A: *width = heads; return c->a;
    case MP_ACT_G: *width = hp->n_ff; return c->g;
    case MP_ACT_U: *width = hp->n_ff; return c->u;
    case MP_ACT_LOGITS: *width = hp->n_vocab; return c->logits;
    }
    *width = 0;
    return c->act;
}

static void cpu_act_read(mp_backend *b, mp_act act, uint32_t row, uint32_t n, float *dst) {
    size_t width;
    const float *src = act_rows(self(b), act, &width);
    memcpy(dst, src + row * width, n * width * sizeof *dst);
}

static void cpu_act_write(mp_backend *b, mp_act act, uint32_t row, uint32_t n, const float *src) {
    size_t width;
    float *dst = act_rows(self(b), act, &width);
    memcpy(dst + row * width, src, n * width * sizeof *dst);
}

static size_t cpu_page_bytes(const mp_backend *b) {
    return ((const cpu_backend *)b)->slab.page_bytes;
}

static bool cpu_page_read(mp_backend *b, mp_page page, void *dst) {
    memcpy(dst, page_data(self(b), page), self(b)->slab.page_bytes);
    return true;
}

static bool cpu_page_write(mp_backend *b, mp_page page, const void *src) {
    memcpy(page_data(self(b), page), src, self(b)->slab.page_bytes);
    return true;
}

const mp_backend_ops mp_backend_cpu = {
    .name = "cpu",
    .cell_tokens = MP_CPU_CELL_TOKENS,
    .kv_type = MEPIC_KV_F16,
    .max_running = 64,
    .step_tokens = 512,
    .n_devices = cpu_n_devices,
    .usable = cpu_usable,
    .kv_memory = cpu_kv_memory,
    .open = cpu_open,
    .close = cpu_close,
    .numerics = cpu_numerics,
    .step_begin = cpu_step_begin,
    .step_end = cpu_step_end,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .project = cpu_project,
    .store = cpu_store,
    .attend = cpu_attend,
    .activate = cpu_activate,
    .logits = cpu_logits,
    .wait = cpu_wait,
    .logits_row = cpu_logits_row,
    .act_read = cpu_act_read,
    .act_write = cpu_act_write,
    .page_bytes = cpu_page_bytes,
    .page_read = cpu_page_read,
    .page_write = cpu_page_write,
};
