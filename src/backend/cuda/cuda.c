/* A CUDA device behind the backend table: weights in bf16 or e4m3, pages, activations, and the order of launches in
 * each operation.
 *
 * Everything is taken at open; a step copies its lists to the device and puts kernels on one stream, and so does the
 * next while the device is still at it: what the host writes or reads of a step is there twice.
 *
 * What an operation launches depends on the row bucket and on which kinds of work there are, never on counts or on the
 * plan: those are read from memory. So what steps of decode rows alone launch is recorded before the first step, a CUDA
 * graph for each bucket, and replayed whatever the plan (config.whole_steps).
 *
 * Numbers. Residual stream fp32; inputs of products, q, k, v bf16; pages bf16 or fp8; accumulation fp32. With weights
 * in e4m3 the inputs of their products are rounded once more, to e4m3 with a scale a row; where nobody looks between
 * (whole_steps) the kernel that makes a row does that, to the same bits. A row's bits depend on its inputs and the
 * pages it sees alone: products as matmul.h says, attention as fold.cuh says, the rest by row. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backend/backend.h"
#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/key_bias.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/sample.h"
#include "backend/cuda/weights.h"
#include "backend/cuda/work.h"
#include "base/mem.h"
#include "model/rope.h"

/* Part of the numerics class: raise it with every change that can change a bit. */
#define NUMERICS_VERSION 1

enum {
    MAX_ROWS = 49152, /* rounds up to itself; no step of more rows has been run */
    MAX_EMBD = 32768,
    LOGIT_ROWS_MIN = 16,
    GRAPH_ROWS_MAX = 512,  /* steps of more rows keep the device busy longer than launching takes */
    N_GRAPHS = 32,         /* buckets up to GRAPH_ROWS_MAX */
    MAX_ADJUSTS = 1 << 18, /* penalties and biases of a step's rows */
};

/* Partial states of decode rows; what does not fit is computed as blocks. */
static const size_t PARTIALS_BYTES = (size_t)256 << 20;
/* Kept free beside what is counted: the library's own needs, graphs, fragmentation. */
static const size_t SLACK_BYTES = (size_t)400 << 20;

typedef enum product { PRODUCT_QKV, PRODUCT_OUT, PRODUCT_GATE_UP, PRODUCT_DOWN, PRODUCT_LOGITS, N_PRODUCTS } product;

typedef struct graph {
    uint32_t rows; /* the bucket */
    cudaGraphExec_t exec;
} graph;

typedef struct cuda_backend {
    mp_backend base;
    mp_cu_device device;
    const mp_model *model;
    const mp_hparams *hp;
    mp_cu_weights weights;
    mp_cu_matmul *products;
    mp_cu_lists *lists;
    mp_cu_sampler *sampler;
    char numerics[64];
    uint32_t max_rows, logit_rows; /* logit_rows: how many the logits hold at a time */
    uint32_t page_size, n_pages;
    size_t page_bytes, block_bytes;
    bool fp8; /* pages */
    bool whole_steps;
    bool e4m3[N_PRODUCTS]; /* whose weights are */

    uint8_t *slab;
    uint64_t *turns;
    mp_cu_rope rope;
    mp_cu_key_bias *key_bias; /* [n_layers, n_kv_heads * head_dim]; NULL unless keys lie in pages without their bias */
    uint16_t *partial_o;
    float *partial_ml;
    /* Activations; shapes in mp_act, gate and up side by side. */
    float *x, *logits;
    mp_bf16 *h, *qkv, *q, *a, *gate_up, *g;
    mp_cu_matrix codes; /* input of the next product whose weights are e4m3 */
    float *host;        /* pinned [n_vocab]: a row of logits */

    cudaEvent_t ends[2]; /* of the last two steps, in turn */
    uint32_t turn;
    uint32_t n_rows, n_wanted; /* of this step; n_wanted: with logits */
    uint32_t bucket;           /* rows the launches of this step are for */
    bool has_items, has_blocks;
    const graph *replayed;           /* what stands for the operations of this step; NULL: they launch */
    uint32_t first_logits, n_logits; /* rows whose logits the device has: [first, first + n) */
    graph graphs[N_GRAPHS];
    uint32_t n_graphs;
} cuda_backend;

static cuda_backend *self(mp_backend *b) {
    return (cuda_backend *)b;
}

/* ---- Sizes ------------------------------------------------------------------------------------------------------- */

static uint32_t heads_of(const mp_hparams *hp) {
    return hp->n_heads * hp->head_dim;
}

static uint32_t kv_heads_of(const mp_hparams *hp) {
    return hp->n_kv_heads * hp->head_dim;
}

static uint32_t qkv_of(const mp_hparams *hp) {
    return (hp->n_heads + 2 * hp->n_kv_heads) * hp->head_dim;
}

static size_t slot_bytes(const mp_hparams *hp) {
    return (size_t)hp->n_heads * (hp->head_dim * sizeof(uint16_t) + 2 * sizeof(float));
}

/* Bytes are counted by size_t everywhere; rows, items and single numbers of a step by 32 bits, which this checks. */
static mepic_status check_counts(const mp_backend_config *c, mepic_error *err) {
    const mp_hparams *hp = &c->model->hp;
    size_t most = UINT32_MAX / 2 / qkv_of(hp); /* rows are rounded up by less than half */
    /* Items: a cell has a page or a sequence of its own, and is taken apart at most once a partial state. */
    size_t units = (c->n_pages + c->max_seqs + PARTIALS_BYTES / slot_bytes(hp)) * hp->n_kv_heads;
    if (most > MAX_ROWS) most = MAX_ROWS;
    if (c->max_rows > most) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "step_tokens is %u; a CUDA step of this model has at most %zu rows",
                       c->max_rows, most);
    }
    if (units > UINT32_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "pages: %u pages of %u kv heads are too many for CUDA; lower pages",
                       c->n_pages, hp->n_kv_heads);
    }
    return MEPIC_OK;
}

static mepic_status check_config(const mp_backend_config *c, mepic_error *err) {
    const mp_hparams *hp = &c->model->hp;
    if (c->kv_type != MEPIC_KV_BF16 && c->kv_type != MEPIC_KV_FP8) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "kv_type: the CUDA backend keeps bf16 or fp8; ask for one of them or for nothing");
    }
    if (c->page_size != 16 && c->page_size != 32 && c->page_size != 64 && c->page_size != 128) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "page_size: %u is none of 16, 32, 64 and 128", c->page_size);
    }
    if (c->max_rows == 0 || c->max_seqs == 0 || c->max_refs == 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "a backend needs at least one row, one sequence and one cell");
    }
    if (hp->n_embd % 8 || hp->n_ff % 8 || hp->n_embd > MAX_EMBD) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "on CUDA the model's n_embd (%u) and n_ff (%u) must be multiples of 8, n_embd at most %u; use "
                       "the CPU (device cpu)",
                       hp->n_embd, hp->n_ff, MAX_EMBD);
    }
    if (hp->head_dim != 64 && hp->head_dim != 80 && hp->head_dim != 96 && hp->head_dim != 128 && hp->head_dim != 256) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "heads of %u dimensions: CUDA has kernels for 64, 80, 96, 128 and 256; use the CPU (device cpu)",
                       hp->head_dim);
    }
    return check_counts(c, err);
}

static bool wants_e4m3(const mp_backend_config *c) {
    return c->weights == MEPIC_WEIGHTS_FP8;
}

static mepic_status check_weights(const mp_backend_config *c, const mp_cu_device *d, mepic_error *err) {
    if (!wants_e4m3(c) || mp_cu_matmul_has_e4m3(d)) return MEPIC_OK;
    return mp_fail(
        err, MEPIC_ERR_UNSUPPORTED,
        "weights: fp8 needs compute capability 9.0 (Hopper); CUDA device %d (%s) has %u.%u; use bf16 weights "
        "there",
        d->id, d->name, d->arch / 10, d->arch % 10);
}

/* Rows whose logits fit at a time: all decode rows there can be. More of them, wanted of a prompt, come in parts. */
static uint32_t logit_rows_of(const mp_backend_config *c) {
    uint32_t n = c->max_seqs > LOGIT_ROWS_MIN ? c->max_seqs : LOGIT_ROWS_MIN;
    return n < c->max_rows ? n : c->max_rows;
}

static mp_cu_lists_config lists_config(const mp_backend_config *c, uint32_t arch, uint32_t n_sm) {
    const mp_hparams *hp = &c->model->hp;
    size_t all = (size_t)c->max_seqs * c->max_refs, most = PARTIALS_BYTES / slot_bytes(hp);
    return (mp_cu_lists_config){ .max_rows = c->max_rows,
                                 .max_seqs = c->max_seqs,
                                 .max_refs = c->max_refs,
                                 .n_pages = c->n_pages,
                                 .max_slots = (uint32_t)(all < most ? all : most),
                                 .block_rows = mp_cu_attend_block_rows(hp->n_heads, hp->n_kv_heads),
                                 .item_readers =
                                     mp_cu_attend_item_readers(arch, hp->head_dim, hp->n_heads, hp->n_kv_heads),
                                 .group = hp->n_heads / hp->n_kv_heads,
                                 .n_kv_heads = hp->n_kv_heads,
                                 .n_sm = n_sm,
                                 .few_blocks = (2 * n_sm + hp->n_kv_heads - 1) / hp->n_kv_heads };
}

/* The buffers of a step: where each goes and how many bytes it takes. */
typedef struct buffer {
    void **to;
    size_t bytes;
    const char *what;
} buffer;

enum { N_BUFFERS = 14 };

/* Where a norm comes behind the bias, what varies cannot be told from it. */
static bool keys_minus_bias(const mp_backend_config *config) {
    return config->kv_type == MEPIC_KV_FP8 && config->model->hp.qkv_bias && !config->model->hp.qk_norm;
}

static void list_buffers(cuda_backend *c, const mp_backend_config *config, buffer *out) {
    const mp_hparams *hp = &config->model->hp;
    size_t rows = mp_cu_bucket(config->max_rows), slots = lists_config(config, 0, 0).max_slots;
    size_t logit_rows = mp_cu_bucket(logit_rows_of(config)), widest = hp->n_embd;
    if (widest < hp->n_ff) widest = hp->n_ff;
    if (widest < heads_of(hp)) widest = heads_of(hp);
    const size_t coded_rows = wants_e4m3(config) ? rows : 0;
    const buffer buffers[N_BUFFERS] = {
        { (void **)&c->x, rows * hp->n_embd * sizeof(float), "the residual stream" },
        { (void **)&c->h, rows * hp->n_embd * sizeof(mp_bf16), "normed rows" },
        { (void **)&c->qkv, rows * qkv_of(hp) * sizeof(mp_bf16), "q, k and v" },
        { (void **)&c->q, rows * heads_of(hp) * sizeof(mp_bf16), "queries" },
        { (void **)&c->a, rows * heads_of(hp) * sizeof(mp_bf16), "attention's output" },
        { (void **)&c->gate_up, rows * 2 * hp->n_ff * sizeof(mp_bf16), "gate and up" },
        { (void **)&c->g, rows * hp->n_ff * sizeof(mp_bf16), "the feed-forward's input" },
        { &c->codes.data, coded_rows * widest, "rows in e4m3" },
        { (void **)&c->codes.scales, coded_rows * sizeof(float), "rows in e4m3" },
        { (void **)&c->logits, logit_rows * hp->n_vocab * sizeof(float), "logits" },
        { (void **)&c->partial_o, slots * hp->n_heads * hp->head_dim * sizeof(uint16_t), "partial states" },
        { (void **)&c->partial_ml, slots * hp->n_heads * 2 * sizeof(float), "partial states" },
        { (void **)&c->turns, (size_t)hp->rope.n_rot / 2 * sizeof(uint64_t), "rotations" },
        { (void **)&c->key_bias,
          keys_minus_bias(config) ? (size_t)hp->n_layers * kv_heads_of(hp) * sizeof(mp_cu_key_bias) : 0,
          "the bias of keys" },
    };
    memcpy(out, buffers, sizeof buffers);
}

static mepic_status cuda_kv_memory(const mp_backend_config *config, size_t *bytes, mepic_error *err) {
    cuda_backend c = { 0 };
    mp_cu_device d;
    mepic_status status = check_config(config, err);
    if (status != MEPIC_OK) return status;
    status = mp_cu_device_open(config->device, &d, err);
    if (status != MEPIC_OK) return status;
    status = check_weights(config, &d, err);
    if (status != MEPIC_OK) {
        mp_cu_device_close(&d);
        return status;
    }
    size_t room = (size_t)((double)d.bytes_free * (double)config->gpu_memory);
    mp_backend_config largest = *config;
    largest.n_pages = 1u << 20;
    mp_cu_lists_config lists = lists_config(&largest, d.code, d.n_sm);
    size_t need = SLACK_BYTES + mp_cu_weights_bytes(config->model, wants_e4m3(config)) + mp_cu_weights_staging_bytes() +
                  mp_cu_lists_bytes(&lists);
    buffer buffers[N_BUFFERS];
    list_buffers(&c, config, buffers);
    for (uint32_t i = 0; i < N_BUFFERS; i++) need += buffers[i].bytes;
    size_t free_bytes = d.bytes_free;
    char name[64];
    snprintf(name, sizeof name, "%s", d.name);
    mp_cu_device_close(&d);
    if (need >= room) {
        return mp_fail(
            err, MEPIC_ERR_NOMEM,
            "weights and a step's buffers take %zu MiB, but %.0f %% of the %zu MiB that are free on CUDA "
            "device %u (%s) are %zu MiB; raise gpu_memory, lower step_tokens or max_running, or use a smaller "
            "model",
            need >> 20, 100.0 * (double)config->gpu_memory, free_bytes >> 20, config->device, name, room >> 20);
    }
    *bytes = room - need;
    return MEPIC_OK;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static mepic_status open_slab(cuda_backend *c, const mp_backend_config *config, mepic_error *err) {
    c->page_size = config->page_size;
    c->n_pages = config->n_pages;
    c->page_bytes = mp_kv_page_bytes(c->hp, config->kv_type, config->page_size);
    c->block_bytes = c->page_bytes / c->hp->n_layers / c->hp->n_kv_heads;
    size_t bytes;
    if (!mp_mul_size(c->page_bytes, config->n_pages, &bytes)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "pages: %u pages of %zu bytes are more than memory can be",
                       config->n_pages, c->page_bytes);
    }
    void *slab;
    mepic_status status = mp_cu_take(&c->device, bytes, "the page pool", &slab, err);
    if (status != MEPIC_OK) return status;
    c->slab = slab;
    return MEPIC_OK;
}

static mepic_status open_buffers(cuda_backend *c, const mp_backend_config *config, mepic_error *err) {
    buffer buffers[N_BUFFERS];
    list_buffers(c, config, buffers);
    for (uint32_t i = 0; i < N_BUFFERS; i++) {
        if (buffers[i].bytes == 0) continue;
        mepic_status status = mp_cu_take(&c->device, buffers[i].bytes, buffers[i].what, buffers[i].to, err);
        if (status != MEPIC_OK) return status;
        /* Rows of a bucket past the step's are computed with what lies there. */
        CUDA_TRY(&c->device, cudaMemsetAsync(*buffers[i].to, 0, buffers[i].bytes, c->device.stream));
    }
    void *host;
    size_t bytes = c->hp->n_vocab * sizeof(float);
    mepic_status status = mp_cu_take_pinned(&c->device, bytes, "logits", &host, err);
    if (status != MEPIC_OK) return status;
    c->host = host;
    return MEPIC_OK;
}

/* With c->rope's turns in host memory. */
static mepic_status open_key_bias(cuda_backend *c, mepic_error *err) {
    if (!c->key_bias) return MEPIC_OK;
    size_t n = kv_heads_of(c->hp);
    float *bias = mp_calloc(n, sizeof *bias);
    mp_cu_key_bias *table = mp_calloc(n, sizeof *table);
    for (uint32_t i = 0; bias && table && i < c->hp->n_layers; i++) {
        CUDA_TRY(&c->device, cudaMemcpyAsync(bias, c->weights.layers[i].bias + heads_of(c->hp), n * sizeof *bias,
                                             cudaMemcpyDeviceToHost, c->device.stream));
        CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
        mp_cu_key_bias_table(&c->rope, bias, c->hp->n_kv_heads, c->hp->head_dim, table);
        CUDA_TRY(&c->device, cudaMemcpyAsync(c->key_bias + i * n, table, n * sizeof *table, cudaMemcpyHostToDevice,
                                             c->device.stream));
        CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
    }
    mepic_status status = bias && table ? MEPIC_OK : mp_fail_nomem(err, "the bias of keys", n * sizeof *table);
    mp_free(bias);
    mp_free(table);
    return status;
}

/* Fractions of a turn per position, as 64-bit fixed point. */
static mepic_status open_rope(cuda_backend *c, mepic_error *err) {
    double freq[128], magnitude;
    uint64_t turns[128];
    uint32_t n = c->hp->rope.n_rot / 2;
    mp_rope_frequencies(c->model, freq, &magnitude);
    for (uint32_t i = 0; i < n; i++) {
        double per_position = freq[i] / 6.283185307179586477;
        per_position -= floor(per_position); /* whole turns do not count */
        turns[i] = (uint64_t)(per_position * 18446744073709551616.0);
    }
    c->rope = (mp_cu_rope){
        .turns = turns, .n_pairs = n, .halves = c->hp->rope.pairs == MP_ROPE_HALVES, .magnitude = (float)magnitude
    };
    mepic_status status = open_key_bias(c, err);
    CUDA_TRY(&c->device, cudaMemcpyAsync(c->turns, turns, n * sizeof *turns, cudaMemcpyHostToDevice, c->device.stream));
    CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
    c->rope.turns = c->turns;
    return status;
}

static mepic_status open_products(cuda_backend *c, const mp_backend_config *config, mepic_error *err) {
    const mp_hparams *hp = c->hp;
    uint32_t n = hp->n_layers;
    mp_cu_matrix *weights = mp_calloc(4 * (size_t)n + 1, sizeof *weights);
    if (!weights) return mp_fail_nomem(err, "the table of weights", 4 * (size_t)n * sizeof *weights);
    for (uint32_t i = 0; i < n; i++) {
        const mp_cu_layer *l = &c->weights.layers[i];
        weights[PRODUCT_QKV * n + i] = l->wqkv;
        weights[PRODUCT_OUT * n + i] = l->wo;
        weights[PRODUCT_GATE_UP * n + i] = l->gate_up;
        weights[PRODUCT_DOWN * n + i] = l->down;
    }
    weights[4 * n].data = c->weights.output;
    mp_cu_shape shapes[N_PRODUCTS] = {
        [PRODUCT_QKV] = { .name = "q, k, v", .n_out = qkv_of(hp), .n_in = hp->n_embd, .out = MP_CU_OUT_BF16 },
        [PRODUCT_OUT] = { .name = "attention output",
                          .n_out = hp->n_embd,
                          .n_in = heads_of(hp),
                          .out = MP_CU_OUT_ADD_F32 },
        [PRODUCT_GATE_UP] = { .name = "gate, up", .n_out = 2 * hp->n_ff, .n_in = hp->n_embd, .out = MP_CU_OUT_BF16 },
        [PRODUCT_DOWN] = { .name = "down", .n_out = hp->n_embd, .n_in = hp->n_ff, .out = MP_CU_OUT_ADD_F32 },
        [PRODUCT_LOGITS] = { .name = "logits", .n_out = hp->n_vocab, .n_in = hp->n_embd, .out = MP_CU_OUT_F32 },
    };
    for (uint32_t p = 0; p < N_PRODUCTS; p++) {
        shapes[p].weights = weights + p * n;
        shapes[p].n_weights = p == PRODUCT_LOGITS ? 1 : n;
        shapes[p].max_rows = p == PRODUCT_LOGITS ? c->logit_rows : config->max_rows;
        c->e4m3[p] = shapes[p].e4m3 = shapes[p].weights->scales != NULL;
    }
    mepic_status status = mp_cu_matmul_open(&c->device, shapes, N_PRODUCTS, config->log, &c->products, err);
    mp_free(weights);
    return status;
}

static void cuda_close(mp_backend *b) {
    if (!b) return;
    cuda_backend *c = self(b);
    if (c->device.stream) cudaStreamSynchronize(c->device.stream);
    for (uint32_t i = 0; i < c->n_graphs; i++) cudaGraphExecDestroy(c->graphs[i].exec);
    for (uint32_t i = 0; i < 2; i++) {
        if (c->ends[i]) cudaEventDestroy(c->ends[i]);
    }
    mp_cu_sampler_close(c->sampler);
    mp_cu_lists_close(c->lists);
    mp_cu_matmul_close(c->products);
    mp_cu_weights_close(&c->device, &c->weights);
    mp_cu_device_close(&c->device);
    mp_free(c);
}

static mepic_status cuda_open(const mp_backend_config *config, mp_backend **out, mepic_error *err) {
    mepic_status status = check_config(config, err);
    if (status != MEPIC_OK) return status;
    cuda_backend *c = mp_calloc(1, sizeof *c);
    if (!c) return mp_fail_nomem(err, "the backend", sizeof *c);
    c->base.ops = &mp_backend_cuda;
    c->model = config->model;
    c->hp = &config->model->hp;
    c->max_rows = config->max_rows;
    c->logit_rows = logit_rows_of(config);
    c->fp8 = config->kv_type == MEPIC_KV_FP8;
    c->whole_steps = config->whole_steps;
    if ((status = mp_cu_device_open(config->device, &c->device, err)) != MEPIC_OK) goto fail;
    if ((status = check_weights(config, &c->device, err)) != MEPIC_OK) goto fail;
    CUDA_TRY(&c->device, mp_cu_attend_open(c->device.id));
    for (uint32_t i = 0; i < 2; i++) {
        CUDA_TRY(&c->device, cudaEventCreateWithFlags(&c->ends[i], cudaEventDisableTiming));
    }
    mp_cu_lists_config lists = lists_config(config, c->device.code, c->device.n_sm);
    if ((status = mp_cu_lists_open(&c->device, &lists, &c->lists, err)) != MEPIC_OK) goto fail;
    if ((status = mp_cu_weights_open(&c->device, c->model, wants_e4m3(config), config->log, &c->weights, err)) !=
        MEPIC_OK)
        goto fail;
    if ((status = open_buffers(c, config, err)) != MEPIC_OK) goto fail;
    status =
        mp_cu_sampler_open(&c->device, c->hp->n_vocab, c->logit_rows, MAX_ADJUSTS, config->max_seqs, &c->sampler, err);
    if (status != MEPIC_OK) goto fail;
    if ((status = open_rope(c, err)) != MEPIC_OK) goto fail;
    if ((status = open_products(c, config, err)) != MEPIC_OK) goto fail;
    snprintf(c->numerics, sizeof c->numerics, "cuda/sm_%u/%u/%d/%s%08x", c->device.arch, c->device.code,
             NUMERICS_VERSION, wants_e4m3(config) ? "fp8/" : "", mp_cu_matmul_class(c->products));
    if ((status = open_slab(c, config, err)) != MEPIC_OK) goto fail;
    if ((status = mp_cu_status(&c->device, err)) != MEPIC_OK) goto fail;
    *out = &c->base;
    return MEPIC_OK;
fail:
    cuda_close(&c->base);
    return status;
}

static const char *cuda_numerics(const mp_backend *b) {
    return ((const cuda_backend *)b)->numerics;
}

/* ---- Graphs ------------------------------------------------------------------------------------------------------ */

/* Rows a recorded step may have. */
static uint32_t graph_rows(const cuda_backend *c) {
    return c->logit_rows < GRAPH_ROWS_MAX ? c->logit_rows : GRAPH_ROWS_MAX;
}

static bool cuda_record(mp_backend *b, uint32_t i) {
    cuda_backend *c = self(b);
    uint32_t bucket = 1, most = graph_rows(c);
    while (i-- > 0) bucket = mp_cu_bucket(bucket + 1);
    if (!c->whole_steps || c->n_graphs == N_GRAPHS || bucket > mp_cu_bucket(most)) return false;
    c->bucket = bucket;
    c->n_rows = c->n_wanted = bucket < most ? bucket : most;
    c->has_items = true;
    c->has_blocks = false;
    c->replayed = NULL;
    CUDA_TRY(&c->device, cudaSetDevice(c->device.id));
    CUDA_TRY(&c->device, cudaStreamBeginCapture(c->device.stream, cudaStreamCaptureModeThreadLocal));
    return true;
}

static mepic_status cuda_recorded(mp_backend *b, mepic_error *err) {
    cuda_backend *c = self(b);
    cudaGraph_t recorded = NULL;
    graph *g = &c->graphs[c->n_graphs];
    g->rows = c->bucket;
    bool ok = CUDA_TRY(&c->device, cudaStreamEndCapture(c->device.stream, &recorded)) &&
              CUDA_TRY(&c->device, cudaGraphInstantiate(&g->exec, recorded, 0));
    if (ok) c->n_graphs++;
    if (ok) CUDA_TRY(&c->device, cudaGraphUpload(g->exec, c->device.stream)); /* else the first launch does that */
    if (recorded) cudaGraphDestroy(recorded);
    return mp_cu_status(&c->device, err);
}

/* A step of decode rows, all of which want logits, launches the same whatever they read. */
static const graph *find_graph(const cuda_backend *c) {
    if (c->has_blocks || c->n_wanted != c->n_rows || c->n_rows > graph_rows(c)) return NULL;
    uint32_t i = 0;
    while (i < c->n_graphs && c->graphs[i].rows != c->bucket) i++;
    return i < c->n_graphs ? &c->graphs[i] : NULL;
}

/* ---- Step -------------------------------------------------------------------------------------------------------- */

/* Whether operations put launches on the stream: not while a recorded step stands for them, not on a broken device. */
static bool launches(const cuda_backend *c) {
    return !c->replayed && c->device.error == cudaSuccess;
}

static void cuda_step_begin(mp_backend *b, const mp_step *step) {
    cuda_backend *c = self(b);
    c->n_rows = step->n_rows;
    c->n_wanted = step->n_logits;
    c->bucket = mp_cu_bucket(step->n_rows);
    c->n_logits = 0;
    c->replayed = NULL;
    c->turn = 1 - c->turn;
    CUDA_TRY(&c->device, cudaSetDevice(c->device.id));
    CUDA_TRY(&c->device, cudaEventSynchronize(c->ends[c->turn])); /* the buffers of that step are used again */
    mp_cu_sampler_begin(c->sampler);
    if (!mp_cu_lists_build(c->lists, step)) {
        CUDA_TRY(&c->device, cudaErrorInvalidValue);
        return;
    }
    const mp_cu_counts *counts = mp_cu_lists_host(c->lists)->counts;
    c->has_items = counts->n_items > 0;
    c->has_blocks = counts->n_blocks > 0;
    mp_cu_lists_send(c->lists, &c->device);
    for (uint32_t i = 0; i < step->n_spoil_pages; i++) { /* all bits set are NaN in every floating-point type */
        CUDA_TRY(&c->device, cudaMemsetAsync(c->slab + step->spoil_pages[i] * c->page_bytes, 0xff, c->page_bytes,
                                             c->device.stream));
    }
    if (step->n_zero_pages > 0) {
        const uint32_t *zero = mp_cu_lists_zero_pages(c->lists);
        CUDA_TRY(&c->device,
                 mp_cu_zero_pages(zero + 1, zero, step->n_zero_pages, c->slab, c->page_bytes, c->device.stream));
    }
    c->replayed = find_graph(c);
}

static mepic_status cuda_step_end(mp_backend *b, mepic_error *err) {
    cuda_backend *c = self(b);
    if (c->replayed && c->device.error == cudaSuccess) {
        CUDA_TRY(&c->device, cudaGraphLaunch(c->replayed->exec, c->device.stream));
    }
    CUDA_TRY(&c->device, cudaEventRecord(c->ends[c->turn], c->device.stream));
    return mp_cu_status(&c->device, err);
}

static void cuda_embed(mp_backend *b) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    CUDA_TRY(&c->device, mp_cu_embed(mp_cu_lists_work(c->lists), c->bucket, mp_cu_sampler_tokens(c->sampler),
                                     c->weights.token_embd, c->hp->n_embd, c->x, c->device.stream));
}

/* Where the kernel that makes the input of product p puts it: x, or codes at once where nobody looks between. */
static mp_cu_matrix target(const cuda_backend *c, product p, mp_bf16 *x) {
    return c->e4m3[p] && c->whole_steps ? c->codes : (mp_cu_matrix){ x, NULL };
}

static void cuda_norm(mp_backend *b, mp_norm which, uint32_t layer) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    const mp_cu_layer *l = &c->weights.layers[layer];
    bool attn = which == MP_NORM_ATTN;
    CUDA_TRY(&c->device,
             mp_cu_norm(c->bucket, NULL, NULL, c->x, attn ? l->attn_norm : l->ffn_norm, c->hp->norm_eps, c->hp->n_embd,
                        target(c, attn ? PRODUCT_QKV : PRODUCT_GATE_UP, c->h), c->device.code, c->device.stream));
}

/* out is product p of n_rows rows of x, [rows, n_in], or of their codes. */
static void multiply(cuda_backend *c, product p, uint32_t n_rows, mp_bf16 *x, uint32_t n_in, mp_cu_matrix w,
                     void *out) {
    mp_cu_matrix in = { x, NULL };
    if (c->e4m3[p]) {
        in = c->codes;
        if (p == PRODUCT_OUT || !c->whole_steps) {
            CUDA_TRY(&c->device, mp_cu_quantize(c->bucket, x, n_in, in, c->device.stream));
        }
    }
    mp_cu_matmul_run(c->products, p, n_rows, in, w, out, c->device.stream);
}

static void cuda_project(mp_backend *b, mp_proj which, uint32_t layer) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    const mp_cu_layer *l = &c->weights.layers[layer];
    const mp_hparams *hp = c->hp;
    uint32_t n = c->bucket < c->max_rows ? c->bucket : c->max_rows;
    switch (which) {
    case MP_PROJ_QKV: multiply(c, PRODUCT_QKV, n, c->h, hp->n_embd, l->wqkv, c->qkv); break;
    case MP_PROJ_OUT: multiply(c, PRODUCT_OUT, n, c->a, heads_of(hp), l->wo, c->x); break;
    case MP_PROJ_GATE_UP: multiply(c, PRODUCT_GATE_UP, n, c->h, hp->n_embd, l->gate_up, c->gate_up); break;
    case MP_PROJ_DOWN: multiply(c, PRODUCT_DOWN, n, c->g, hp->n_ff, l->down, c->x); break;
    }
}

static size_t layer_offset(const cuda_backend *c, uint32_t layer) {
    return (size_t)layer * c->hp->n_kv_heads * c->block_bytes;
}

static void cuda_store(mp_backend *b, uint32_t layer) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    const mp_cu_layer *l = &c->weights.layers[layer];
    const mp_cu_store store = { .head_dim = c->hp->head_dim,
                                .n_heads = c->hp->n_heads,
                                .n_kv_heads = c->hp->n_kv_heads,
                                .code = c->device.code,
                                .rope = c->rope,
                                .bias = l->bias,
                                .q_norm = l->q_norm,
                                .k_norm = l->k_norm,
                                .norm_eps = c->hp->norm_eps,
                                .fp8 = c->fp8,
                                .k_minus_bias = c->key_bias != NULL,
                                .qkv = c->qkv,
                                .q = c->q,
                                .slab = c->slab,
                                .page_bytes = c->page_bytes,
                                .block_bytes = c->block_bytes,
                                .layer_offset = layer_offset(c, layer),
                                .work = *mp_cu_lists_work(c->lists) };
    CUDA_TRY(&c->device, mp_cu_store_rows(&store, c->bucket, c->device.stream));
}

static void cuda_attend(mp_backend *b, uint32_t layer) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    const mp_cu_attend a = { .head_dim = c->hp->head_dim,
                             .n_heads = c->hp->n_heads,
                             .n_kv_heads = c->hp->n_kv_heads,
                             .page_size = c->page_size,
                             .scale = 1.0f / sqrtf((float)c->hp->head_dim),
                             .fp8 = c->fp8,
                             .key_bias = c->key_bias ? c->key_bias + layer * (size_t)kv_heads_of(c->hp) : NULL,
                             .rope = c->rope,
                             .slab = c->slab,
                             .page_bytes = c->page_bytes,
                             .block_bytes = c->block_bytes,
                             .layer_offset = layer_offset(c, layer),
                             .q = c->q,
                             .out = c->a,
                             .partial_o = c->partial_o,
                             .partial_ml = c->partial_ml,
                             .work = *mp_cu_lists_work(c->lists),
                             .arch = c->device.code,
                             .n_sm = c->device.n_sm,
                             .max_items = c->has_items ? c->n_pages : 0,
                             .max_folds = c->has_items ? c->bucket : 0,
                             .max_blocks = c->has_blocks ? c->bucket : 0 };
    if (c->has_items) CUDA_TRY(&c->device, mp_cu_attend_decode(&a, c->device.stream));
    if (c->has_blocks) CUDA_TRY(&c->device, mp_cu_attend_prefill(&a, c->device.stream));
}

static void cuda_activate(mp_backend *b) {
    cuda_backend *c = self(b);
    if (!launches(c)) return;
    CUDA_TRY(&c->device, mp_cu_swiglu(c->bucket, c->gate_up, c->hp->n_ff, target(c, PRODUCT_DOWN, c->g), c->device.code,
                                      c->device.stream));
}

/* ---- Logits ------------------------------------------------------------------------------------------------------ */

/* Puts the logits of rows [first, first + n) of those that want some on the stream. */
static void compute_logits(cuda_backend *c, uint32_t first, uint32_t n) {
    const mp_cu_work *work = mp_cu_lists_work(c->lists);
    uint32_t bucket = mp_cu_bucket(n) < c->logit_rows ? mp_cu_bucket(n) : c->logit_rows;
    /* Behind the first part, which alone is recorded, the list must not be read past its end. */
    uint32_t n_norms = first == 0 ? bucket : n;
    CUDA_TRY(&c->device, mp_cu_norm(n_norms, work->logit_rows + first, first == 0 ? &work->counts->n_logits : NULL,
                                    c->x, c->weights.output_norm, c->hp->norm_eps, c->hp->n_embd,
                                    (mp_cu_matrix){ c->h, NULL }, c->device.code, c->device.stream));
    multiply(c, PRODUCT_LOGITS, bucket, c->h, c->hp->n_embd, (mp_cu_matrix){ c->weights.output, NULL }, c->logits);
    c->first_logits = first;
    c->n_logits = n;
}

static uint32_t part_from(const cuda_backend *c, uint32_t first) {
    uint32_t left = c->n_wanted - first;
    return left < c->logit_rows ? left : c->logit_rows;
}

static void cuda_logits(mp_backend *b) {
    cuda_backend *c = self(b);
    if (launches(c)) {
        compute_logits(c, 0, part_from(c, 0));
    } else {
        c->first_logits = 0;
        c->n_logits = part_from(c, 0);
    }
}

/* Sees to it that the device has the logits of row i. */
static void need_logits(cuda_backend *c, uint32_t i) {
    if (i >= c->first_logits && i < c->first_logits + c->n_logits) return;
    compute_logits(c, i, part_from(c, i));
}

static mepic_status cuda_sample(mp_backend *b, const mp_sample_row *rows, uint32_t n, mp_sampled *out,
                                mepic_error *err) {
    cuda_backend *c = self(b);
    for (uint32_t first = 0, end; first < n && c->device.error == cudaSuccess; first = end) {
        need_logits(c, rows[first].logits);
        for (end = first; end < n && rows[end].logits < c->first_logits + c->n_logits; end++) {
            mp_sample_row row = rows[end];
            row.logits -= c->first_logits;
            out[end].token = mp_cu_sampler_add(c->sampler, &row) ? MP_SAMPLE_UNDER_WAY : MP_SAMPLE_ON_HOST;
        }
        mp_cu_sampler_run(c->sampler, c->logits, c->device.stream);
    }
    CUDA_TRY(&c->device, cudaEventRecord(c->ends[c->turn], c->device.stream));
    return mp_cu_status(&c->device, err);
}

static mepic_status cuda_wait(mp_backend *b, uint32_t ago, mp_sampled *out, uint32_t n, mepic_error *err) {
    cuda_backend *c = self(b);
    if (!CUDA_TRY(&c->device, cudaEventSynchronize(c->ends[c->turn ^ ago]))) return mp_cu_status(&c->device, err);
    const mp_sampled *drawn = mp_cu_sampler_drawn(c->sampler, ago);
    for (uint32_t i = 0; i < n; i++) {
        if (out[i].token == MP_SAMPLE_UNDER_WAY) out[i] = *drawn++;
    }
    return mp_cu_status(&c->device, err);
}

static const float *cuda_logits_row(mp_backend *b, uint32_t i) {
    cuda_backend *c = self(b);
    size_t n_vocab = c->hp->n_vocab;
    need_logits(c, i);
    if (c->device.error != cudaSuccess) return NULL;
    CUDA_TRY(&c->device, cudaMemcpyAsync(c->host, c->logits + (i - c->first_logits) * n_vocab,
                                         n_vocab * sizeof *c->host, cudaMemcpyDeviceToHost, c->device.stream));
    CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
    return c->device.error == cudaSuccess ? c->host : NULL;
}

/* ---- Inspection and pages ---------------------------------------------------------------------------------------- */

typedef struct activation {
    void *data;
    size_t width, stride, first; /* elements a row, from one row to the next, before the first */
    bool f32;
} activation;

static activation find_activation(const cuda_backend *c, mp_act act) {
    const mp_hparams *hp = c->hp;
    size_t heads = heads_of(hp), kv = kv_heads_of(hp), qkv = qkv_of(hp), ff = hp->n_ff;
    switch (act) {
    case MP_ACT_X: return (activation){ c->x, hp->n_embd, hp->n_embd, 0, true };
    case MP_ACT_H: return (activation){ c->h, hp->n_embd, hp->n_embd, 0, false };
    case MP_ACT_Q: return (activation){ c->q, heads, heads, 0, false };
    case MP_ACT_K: return (activation){ c->qkv, kv, qkv, heads, false };
    case MP_ACT_V: return (activation){ c->qkv, kv, qkv, heads + kv, false };
    case MP_ACT_A: return (activation){ c->a, heads, heads, 0, false };
    case MP_ACT_G: return (activation){ c->g, ff, ff, 0, false };
    case MP_ACT_U: return (activation){ c->gate_up, ff, 2 * ff, ff, false };
    case MP_ACT_LOGITS: return (activation){ c->logits, hp->n_vocab, hp->n_vocab, 0, true };
    }
    return (activation){ c->x, 0, 0, 0, true };
}

/* Part by part through the host's row of logits: nobody is in a hurry here. */
static void cuda_act_read(mp_backend *b, mp_act act, uint32_t row, uint32_t n, float *dst) {
    cuda_backend *c = self(b);
    activation a = find_activation(c, act);
    size_t size = a.f32 ? sizeof(float) : sizeof(mp_bf16);
    for (uint32_t r = 0; r < n; r++) {
        const uint8_t *src = (const uint8_t *)a.data + ((row + r) * a.stride + a.first) * size;
        for (size_t i = 0; i < a.width; i += c->hp->n_vocab) {
            size_t part = a.width - i < c->hp->n_vocab ? a.width - i : c->hp->n_vocab;
            CUDA_TRY(&c->device,
                     cudaMemcpyAsync(c->host, src + i * size, part * size, cudaMemcpyDeviceToHost, c->device.stream));
            CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
            for (size_t j = 0; j < part; j++) {
                dst[r * a.width + i + j] = a.f32 ? c->host[j] : mp_bf16_to_f32(((const mp_bf16 *)(void *)c->host)[j]);
            }
        }
    }
}

static void cuda_act_write(mp_backend *b, mp_act act, uint32_t row, uint32_t n, const float *src) {
    cuda_backend *c = self(b);
    activation a = find_activation(c, act);
    size_t size = a.f32 ? sizeof(float) : sizeof(mp_bf16);
    for (uint32_t r = 0; r < n; r++) {
        uint8_t *dst = (uint8_t *)a.data + ((row + r) * a.stride + a.first) * size;
        for (size_t i = 0; i < a.width; i += c->hp->n_vocab) {
            size_t part = a.width - i < c->hp->n_vocab ? a.width - i : c->hp->n_vocab;
            for (size_t j = 0; j < part; j++) {
                float x = src[r * a.width + i + j];
                if (a.f32) {
                    c->host[j] = x;
                } else {
                    ((mp_bf16 *)(void *)c->host)[j] = mp_f32_to_bf16(x);
                }
            }
            CUDA_TRY(&c->device,
                     cudaMemcpyAsync(dst + i * size, c->host, part * size, cudaMemcpyHostToDevice, c->device.stream));
            CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
        }
    }
}

static size_t cuda_page_bytes(const mp_backend *b) {
    return ((const cuda_backend *)b)->page_bytes;
}

static bool cuda_page_read(mp_backend *b, mp_page page, void *dst) {
    cuda_backend *c = self(b);
    CUDA_TRY(&c->device, cudaMemcpyAsync(dst, c->slab + page * c->page_bytes, c->page_bytes, cudaMemcpyDeviceToHost,
                                         c->device.stream));
    return CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
}

static bool cuda_page_write(mp_backend *b, mp_page page, const void *src) {
    cuda_backend *c = self(b);
    CUDA_TRY(&c->device, cudaMemcpyAsync(c->slab + page * c->page_bytes, src, c->page_bytes, cudaMemcpyHostToDevice,
                                         c->device.stream));
    return CUDA_TRY(&c->device, cudaStreamSynchronize(c->device.stream));
}

const mp_backend_ops mp_backend_cuda = {
    .name = "cuda",
    .cell_tokens = MP_CU_CELL_TOKENS,
    .kv_type = MEPIC_KV_BF16,
    .max_running = 256,
    .step_tokens = 2048,
    .ahead = true,
    .n_devices = mp_cu_device_count,
    .usable = mp_cu_device_usable,
    .kv_memory = cuda_kv_memory,
    .open = cuda_open,
    .close = cuda_close,
    .numerics = cuda_numerics,
    .record = cuda_record,
    .recorded = cuda_recorded,
    .step_begin = cuda_step_begin,
    .step_end = cuda_step_end,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .project = cuda_project,
    .store = cuda_store,
    .attend = cuda_attend,
    .activate = cuda_activate,
    .logits = cuda_logits,
    .sample = cuda_sample,
    .wait = cuda_wait,
    .logits_row = cuda_logits_row,
    .act_read = cuda_act_read,
    .act_write = cuda_act_write,
    .page_bytes = cuda_page_bytes,
    .page_read = cuda_page_read,
    .page_write = cuda_page_write,
};
