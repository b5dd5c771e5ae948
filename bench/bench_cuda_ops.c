/* bench_cuda_ops: every kernel and product of the CUDA backend (but attention) against what the card can do, both
 * measured in this run.
 *
 *   bench_cuda_ops [--only TEXT]... [--rows N]... [--load MODEL.gguf]
 *
 * Ceilings: reading memory once through, and a matrix product of 8,192 x 8,192 x 8,192 on random data in bf16, and in
 * e4m3 for products of that (and a large copy, for comparison). A line's bound is its least bytes over the one or its
 * operations over the other, whichever is longer. A graph of runs is replayed, so launches cost what they cost in a
 * step; weights and what else is large have more copies than L2 holds, passed over in turn as in a step. Times are
 * medians of the replays. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/few_rows.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/sample.h"
#include "backend/cuda/weights.h"
#include "bench/cuda_read.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/mem.h"
#include "model/dtype.h"

enum { REPLAYS = 7, MAX_COPIES = 128 };
static const size_t SPAN = (size_t)160 << 20; /* bytes passed over in turn: three times an L2 */

typedef struct model {
    const char *name;
    uint32_t n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab;
    bool bias;
} model;

static const model models[] = {
    { "8B", 4096, 14336, 32, 8, 128, 128256, false },
    { "0.5B", 896, 4864, 14, 2, 64, 151936, true },
};

typedef struct bench {
    mp_cu_device device;
    double bytes_per_us, flops_per_us, flops_per_us_e4m3;
    const char *only[16]; /* what is in a line's name; none: all lines */
    uint32_t n_only;
    uint8_t *data; /* random bf16, SPAN bytes and more: inputs and weights */
    uint8_t *out;
    size_t data_bytes, out_bytes;
    mepic_error err;
} bench;

#define TRY(b, call) (CUDA_TRY(&(b)->device, call))

/* ---- Time -------------------------------------------------------------------------------------------------------- */

/* One operation; i chooses the copy of its data. */
typedef struct op op;
struct op {
    bool (*run)(bench *b, const op *o, uint32_t i);
    const model *model;
    bool e4m3;
    uint32_t rows, index; /* index: of the product */
    mp_cu_matmul *matmul;
    size_t in_bytes, out_bytes; /* of one copy */
    const void *fixed[2];       /* what all copies share */
    uint32_t repeat;            /* runs in the graph */
};

static int by_time(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Median time of one run; < 0: an error is noted. */
static double measure(bench *b, const op *o) {
    cudaStream_t stream = b->device.stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t start, stop;
    float ms[REPLAYS];
    bool ok = TRY(b, cudaEventCreate(&start)) && TRY(b, cudaEventCreate(&stop)) &&
              TRY(b, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; ok && i < o->repeat; i++) ok = o->run(b, o, i);
    ok = ok && TRY(b, cudaStreamEndCapture(stream, &graph)) && TRY(b, cudaGraphInstantiate(&exec, graph, 0)) &&
         TRY(b, cudaGraphLaunch(exec, stream));
    for (int i = 0; ok && i < REPLAYS; i++) {
        ok = TRY(b, cudaEventRecord(start, stream)) && TRY(b, cudaGraphLaunch(exec, stream)) &&
             TRY(b, cudaEventRecord(stop, stream)) && TRY(b, cudaEventSynchronize(stop)) &&
             TRY(b, cudaEventElapsedTime(&ms[i], start, stop));
    }
    if (!ok) return -1;
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    qsort(ms, REPLAYS, sizeof *ms, by_time);
    return (double)ms[REPLAYS / 2] * 1000 / o->repeat;
}

static bool wanted(const bench *b, const char *name) {
    bool any = b->n_only == 0;
    for (uint32_t i = 0; i < b->n_only; i++) any = any || strstr(name, b->only[i]);
    return any;
}

static uint32_t n_copies(const bench *b, const op *o) {
    size_t n = SPAN / (o->in_bytes + o->out_bytes) + 1;
    if (n > b->data_bytes / o->in_bytes) n = b->data_bytes / o->in_bytes;
    if (o->out_bytes && n > b->out_bytes / 2 / o->out_bytes) n = b->out_bytes / 2 / o->out_bytes;
    return n == 0 ? 1 : n < MAX_COPIES ? (uint32_t)n : MAX_COPIES;
}

static bool report(bench *b, const op *o, const char *name, double bytes, double flops) {
    if (!wanted(b, name)) return true;
    double by_bytes = bytes / b->bytes_per_us, by_flops = flops / (o->e4m3 ? b->flops_per_us_e4m3 : b->flops_per_us);
    double bound = by_bytes > by_flops ? by_bytes : by_flops;
    op repeated = *o;
    repeated.repeat = bound > 300 ? 3 : n_copies(b, o) > 20 ? n_copies(b, o) : 20;
    double us = measure(b, &repeated);
    if (us < 0) return false;
    printf("%-5s %-18s %5u rows %9.2f us  bound %9.2f us (%s)  %5.1f %%\n", o->model->name, name, o->rows, us, bound,
           by_bytes > by_flops ? "bytes" : "flops", 100 * bound / us);
    fflush(stdout);
    return true;
}

static void *in_of(bench *b, const op *o, uint32_t i) {
    return b->data + i % n_copies(b, o) * o->in_bytes;
}

static void *out_of(bench *b, const op *o, uint32_t i) {
    return b->out + i % n_copies(b, o) * o->out_bytes;
}

/* ---- Ceilings ---------------------------------------------------------------------------------------------------- */

static bool run_copy(bench *b, const op *o, uint32_t i) {
    (void)i;
    return TRY(b, cudaMemcpyAsync(b->out, b->data, o->in_bytes, cudaMemcpyDeviceToDevice, b->device.stream));
}

static bool run_read(bench *b, const op *o, uint32_t i) {
    (void)i;
    return TRY(b, mp_bench_read(b->data, o->in_bytes, b->device.n_sm, b->out, b->device.stream));
}

/* Matrices in e4m3 lie in the second half of `out`; any data will do for scales. */
static mp_cu_matrix codes_at(bench *b, size_t at) {
    return (mp_cu_matrix){ b->out + b->out_bytes / 2 + at, (float *)(void *)b->data };
}

static bool make_codes(bench *b) {
    enum { WIDTH = 8192 };
    mp_cu_matrix to = codes_at(b, 0);
    to.scales = (float *)(void *)b->out;
    return TRY(b, mp_cu_quantize((uint32_t)(b->out_bytes / 2 / WIDTH), (const mp_bf16 *)(void *)b->data, WIDTH, to,
                                 b->device.stream));
}

static bool run_product(bench *b, const op *o, uint32_t i) {
    mp_cu_matrix x = { b->data, NULL }, w = { in_of(b, o, i), NULL };
    if (o->e4m3) {
        x = codes_at(b, 0);
        w = codes_at(b, i % n_copies(b, o) * o->in_bytes);
    }
    return mp_cu_matmul_run(o->matmul, o->index, o->rows, x, w, b->out, b->device.stream);
}

/* Operations a microsecond of a large product; < 0: an error is noted. */
static double product_rate(bench *b, bool e4m3) {
    enum { N = 8192 };
    const mp_cu_matrix bf16 = { b->data, NULL }, codes = codes_at(b, 0);
    const mp_cu_shape square = { .name = "ceiling",
                                 .n_out = N,
                                 .n_in = N,
                                 .out = MP_CU_OUT_BF16,
                                 .e4m3 = e4m3,
                                 .max_rows = N,
                                 .weights = e4m3 ? &codes : &bf16,
                                 .n_weights = 1 };
    op o = { .run = run_product,
             .model = &models[0],
             .e4m3 = e4m3,
             .rows = N,
             .in_bytes = (size_t)N * N * (e4m3 ? 1 : 2),
             .repeat = 4 };
    if (mp_cu_matmul_open(&b->device, &square, 1, NULL, &o.matmul, &b->err) != MEPIC_OK) return -1;
    double us = measure(b, &o);
    mp_cu_matmul_close(o.matmul);
    return us < 0 ? us : 2.0 * N * N * N / us;
}

static bool ceilings(bench *b) {
    const op copy = { .run = run_copy, .model = &models[0], .in_bytes = (size_t)512 << 20, .repeat = 4 };
    double us = measure(b, &copy);
    if (us < 0) return false;
    double copied = 2.0 * (double)copy.in_bytes / us;
    const op read = { .run = run_read, .model = &models[0], .in_bytes = b->data_bytes, .repeat = 2 };
    us = measure(b, &read);
    if (us < 0) return false;
    b->bytes_per_us = (double)read.in_bytes / us;
    if ((b->flops_per_us = product_rate(b, false)) < 0) return false;
    printf("%s: read %.0f GB/s, copy %.0f GB/s, product of 8192^3 in bf16 %.0f TFLOP/s", b->device.name,
           b->bytes_per_us / 1e3, copied / 1e3, b->flops_per_us / 1e6);
    if (mp_cu_matmul_has_e4m3(&b->device)) {
        if (!make_codes(b) || (b->flops_per_us_e4m3 = product_rate(b, true)) < 0) return false;
        printf(", in e4m3 %.0f TFLOP/s", b->flops_per_us_e4m3 / 1e6);
    }
    printf("\n");
    return true;
}

/* ---- Sampling ---------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    float temperature, top_p, min_p;
    uint32_t top_k, logprob;
} samplings[] = {
    { "greedy", 0, 0, 0, 0, 0 },           { "greedy, logprob", 0, 0, 0, 0, 1 }, { "temperature", 1, 0, 0, 0, 0 },
    { "top-k, top-p", 1, 0.9f, 0, 50, 0 }, { "min-p", 1, 0, 0.05f, 0, 0 },       { "top-p", 1, 0.9f, 0, 0, 0 },
    { "top-p, flat", 3, 0.9f, 0, 0, 0 },
};
enum { N_SAMPLINGS = sizeof samplings / sizeof *samplings, SAMPLED_ROWS = 256, SHIFT = 976 };

static bool run_sample(bench *b, const op *o, uint32_t i) {
    float *logits = (float *)out_of(b, o, i);
    mp_sampled *drawn = (mp_sampled *)(void *)(b->out + b->out_bytes / 2);
    int32_t *tokens = (int32_t *)(void *)(drawn + SAMPLED_ROWS);
    return TRY(b, mp_cu_sample_rows(o->fixed[0], o->rows, NULL, NULL, logits, o->model->n_vocab,
                                    mp_cu_sample_blocks(&b->device, o->rows), drawn, tokens, b->device.stream));
}

/* Rows of logits like those of a language model: normal, with a few that stand out. */
static bool fill_logits(bench *b, const model *m, uint32_t rows, uint32_t copies) {
    size_t n = m->n_vocab + (size_t)SHIFT * rows;
    float *base = mp_alloc(n * sizeof *base);
    if (!base) return false;
    for (size_t i = 0; i < n; i++) {
        uint64_t h = mp_hash64(i, NULL, 0);
        double u = (double)(h >> 40) * 0x1p-24 + 0x1p-25, v = (double)(h & 0xffffff) * 0x1p-24;
        base[i] = (float)(2.2 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
        if (i % 12007 == 5) base[i] += 9;
    }
    bool ok = true;
    for (uint32_t r = 0; ok && r < rows * copies; r++) {
        ok = TRY(b, cudaMemcpy(b->out + (size_t)r * m->n_vocab * 4, base + (size_t)SHIFT * (r % rows), m->n_vocab * 4,
                               cudaMemcpyHostToDevice));
    }
    mp_free(base);
    return ok && TRY(b, cudaDeviceSynchronize());
}

static bool sampling(bench *b, const model *m, uint32_t rows) {
    bool any = false;
    for (int k = 0; k < N_SAMPLINGS; k++) any = any || wanted(b, samplings[k].name);
    if (rows > SAMPLED_ROWS || !any) return true;
    static mp_cu_draw draws[SAMPLED_ROWS];
    op o = { .run = run_sample, .model = m, .rows = rows, .in_bytes = 1, .out_bytes = (size_t)rows * m->n_vocab * 4 };
    void *device;
    bool ok = TRY(b, mp_cu_sample_open()) && fill_logits(b, m, rows, n_copies(b, &o)) &&
              TRY(b, cudaMalloc(&device, sizeof draws));
    if (!ok) return false;
    o.fixed[0] = device;
    for (int k = 0; ok && k < N_SAMPLINGS; k++) {
        for (uint32_t r = 0; r < rows; r++) {
            draws[r] = (mp_cu_draw){ .random = mp_hash64(r, NULL, 0),
                                     .logits = r,
                                     .seq = r,
                                     .top_k = samplings[k].top_k,
                                     .temperature = samplings[k].temperature,
                                     .top_p = samplings[k].top_p,
                                     .min_p = samplings[k].min_p,
                                     .logprob = samplings[k].logprob };
        }
        ok = TRY(b, cudaMemcpy(device, draws, sizeof draws, cudaMemcpyHostToDevice)) &&
             TRY(b, cudaDeviceSynchronize()) && report(b, &o, samplings[k].name, (double)o.out_bytes, 0);
    }
    cudaFree(device);
    return ok;
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

static bool report_products(bench *b, const model *m, mp_cu_matmul *matmul, const mp_cu_shape *s, uint32_t index,
                            const uint32_t *rows, uint32_t n_rows) {
    bool ok = true;
    double in = s->e4m3 ? 1 : 2, out = s->out == MP_CU_OUT_BF16 ? 2 : s->out == MP_CU_OUT_F32 ? 4 : 8;
    for (uint32_t r = 0; ok && r < n_rows; r++) {
        if (rows[r] > s->max_rows) continue;
        double n = rows[r];
        const op o = { .run = run_product,
                       .model = m,
                       .e4m3 = s->e4m3,
                       .rows = rows[r],
                       .index = index,
                       .matmul = matmul,
                       .in_bytes = (size_t)s->n_out * s->n_in * (s->e4m3 ? 1 : 2) };
        ok = report(b, &o, s->name, (double)o.in_bytes + n * (s->n_in * in + s->n_out * out),
                    2.0 * n * s->n_out * s->n_in);
    }
    mp_cu_measured measured;
    uint32_t differ = 0, tried = 0;
    for (uint32_t k = 0; mp_cu_matmul_measured(matmul, index, k, &measured); k++) {
        differ += measured.n_differ;
        tried += measured.n_candidates;
    }
    printf("%-5s %-18s %u candidates, %u with other bits\n", m->name, s->name, tried, differ);
    return ok;
}

/* Products of few rows without our own kernel for them. */
static bool products_by_library(bench *b, const model *m, const mp_cu_shape *shapes, uint32_t n, const uint32_t *rows,
                                uint32_t n_rows) {
    enum { MOST = 5 };
    mp_cu_shape few[MOST];
    char names[MOST][32];
    mp_cu_matmul *library;
    for (uint32_t i = 0; i < n; i++) {
        snprintf(names[i], sizeof names[i], "%s, cuBLASLt", shapes[i].name);
        few[i] = shapes[i];
        few[i].name = names[i];
        few[i].max_rows = MP_CU_FEW_ROWS_MAX;
        few[i].library_only = true;
    }
    if (mp_cu_matmul_open(&b->device, few, n, NULL, &library, &b->err) != MEPIC_OK) return false;
    bool ok = true;
    for (uint32_t i = 0; ok && i < n; i++) ok = report_products(b, m, library, &few[i], i, rows, n_rows);
    mp_cu_matmul_close(library);
    return ok;
}

static bool products(bench *b, const model *m, bool e4m3, const uint32_t *rows, uint32_t n_rows) {
    uint32_t heads = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
    mp_cu_shape shapes[] = {
        { .name = e4m3 ? "qkv e4m3" : "qkv", .n_out = heads + 2 * kv, .n_in = m->n_embd, .out = MP_CU_OUT_BF16 },
        { .name = e4m3 ? "out e4m3" : "out", .n_out = m->n_embd, .n_in = heads, .out = MP_CU_OUT_ADD_F32 },
        { .name = e4m3 ? "gate, up e4m3" : "gate, up", .n_out = 2 * m->n_ff, .n_in = m->n_embd, .out = MP_CU_OUT_BF16 },
        { .name = e4m3 ? "down e4m3" : "down", .n_out = m->n_embd, .n_in = m->n_ff, .out = MP_CU_OUT_ADD_F32 },
        { .name = "logits", .n_out = m->n_vocab, .n_in = m->n_embd, .out = MP_CU_OUT_F32 },
    };
    enum { N = sizeof shapes / sizeof *shapes };
    const uint32_t n = e4m3 ? N - 1 : N; /* logits are of bf16 always */
    bool any = false;
    for (uint32_t i = 0; i < n; i++) any = any || wanted(b, shapes[i].name);
    if (!any) return true;
    if (e4m3 && !make_codes(b)) return false; /* they have been written over since */
    mp_cu_matrix weights[N][MAX_COPIES];
    for (uint32_t i = 0; i < n; i++) {
        size_t bytes = (size_t)shapes[i].n_out * shapes[i].n_in * (e4m3 ? 1 : 2);
        size_t fit = (e4m3 ? b->out_bytes / 2 : b->data_bytes) / bytes;
        shapes[i].e4m3 = e4m3;
        shapes[i].max_rows = i == 4 ? 256 : 8192;
        shapes[i].n_weights = (uint32_t)(fit < MAX_COPIES ? fit : MAX_COPIES);
        shapes[i].weights = weights[i];
        for (uint32_t w = 0; w < shapes[i].n_weights; w++) {
            weights[i][w] = e4m3 ? codes_at(b, w * bytes) : (mp_cu_matrix){ b->data + w * bytes, NULL };
        }
    }
    mp_cu_matmul *matmul;
    uint64_t start = mp_now_ns();
    if (mp_cu_matmul_open(&b->device, shapes, n, NULL, &matmul, &b->err) != MEPIC_OK) return false;
    printf("%-5s measuring products at open: %.2f s; same bits: %s\n", m->name, (double)(mp_now_ns() - start) * 1e-9,
           mp_cu_matmul_same_bits(matmul) ? "yes" : "NO");
    bool ok = true;
    for (uint32_t i = 0; ok && i < n; i++) ok = report_products(b, m, matmul, &shapes[i], i, rows, n_rows);
    mp_cu_matmul_close(matmul);
    return ok && (e4m3 || products_by_library(b, m, shapes, n, rows, n_rows));
}

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

enum { PAGE = 16, LAYERS = 4 };

static bool run_embed(bench *b, const op *o, uint32_t i) {
    return TRY(b, mp_cu_embed(o->fixed[0], o->rows, NULL, (const mp_bf16 *)(void *)b->data, o->model->n_embd,
                              out_of(b, o, i), b->device.stream));
}

/* Where a kernel puts rows: bf16, or codes with scales in front. */
static mp_cu_matrix rows_to(bench *b, const op *o, uint32_t i) {
    uint8_t *out = out_of(b, o, i);
    if (!o->e4m3) return (mp_cu_matrix){ out, NULL };
    return (mp_cu_matrix){ out + (o->rows * sizeof(float) + 15) / 16 * 16, (float *)(void *)out };
}

static bool run_norm(bench *b, const op *o, uint32_t i) {
    return TRY(b, mp_cu_norm(o->rows, NULL, NULL, in_of(b, o, i), (const float *)(void *)b->data, 1e-5f,
                             o->model->n_embd, rows_to(b, o, i), b->device.code, b->device.stream));
}

static bool run_quantize(bench *b, const op *o, uint32_t i) {
    return TRY(b, mp_cu_quantize(o->rows, in_of(b, o, i), o->model->n_embd, rows_to(b, o, i), b->device.stream));
}

static bool run_swiglu(bench *b, const op *o, uint32_t i) {
    return TRY(
        b, mp_cu_swiglu(o->rows, in_of(b, o, i), o->model->n_ff, rows_to(b, o, i), b->device.code, b->device.stream));
}

static bool run_store(bench *b, const op *o, uint32_t i) {
    const model *m = o->model;
    size_t block = (size_t)PAGE * m->head_dim * 4;
    const mp_cu_store s = {
        .head_dim = m->head_dim,
        .n_heads = m->n_heads,
        .n_kv_heads = m->n_kv_heads,
        .code = b->device.code,
        .rope = { .turns = o->fixed[1], .n_pairs = m->head_dim / 2, .halves = true, .magnitude = 1 },
        .bias = m->bias ? (const float *)(void *)b->data : NULL,
        .qkv = in_of(b, o, i),
        .q = out_of(b, o, i),
        .slab = b->out + b->out_bytes / 2,
        .page_bytes = block * m->n_kv_heads * LAYERS,
        .block_bytes = block,
        .layer_offset = 0,
        .work = *(const mp_cu_work *)o->fixed[0],
    };
    return TRY(b, mp_cu_store_rows(&s, o->rows, b->device.stream));
}

static bool row_kernels(bench *b, const model *m, uint32_t rows) {
    mp_cu_row *list = mp_calloc(rows, sizeof *list);
    uint64_t turns[128] = { 0 };
    if (!list) return false;
    for (uint32_t r = 0; r < rows; r++) {
        list[r] = (mp_cu_row){ .token = (int32_t)(mp_hash64(r, NULL, 0) % m->n_vocab),
                               .position = (int32_t)r,
                               .page = r / PAGE,
                               .slot = r % PAGE };
    }
    for (int i = 0; i < 128; i++) turns[i] = UINT64_MAX / 7 >> i % 20;
    const mp_cu_counts counts = { .n_rows = rows };
    mp_cu_work work = { 0 };
    void *d_list, *d_counts, *d_turns;
    bool ok = TRY(b, cudaMalloc(&d_list, rows * sizeof *list)) && TRY(b, cudaMalloc(&d_counts, sizeof counts)) &&
              TRY(b, cudaMalloc(&d_turns, sizeof turns)) &&
              TRY(b, cudaMemcpy(d_list, list, rows * sizeof *list, cudaMemcpyHostToDevice)) &&
              TRY(b, cudaMemcpy(d_counts, &counts, sizeof counts, cudaMemcpyHostToDevice)) &&
              TRY(b, cudaMemcpy(d_turns, turns, sizeof turns, cudaMemcpyHostToDevice));
    mp_free(list);
    if (!ok) return false;
    work.rows = d_list;
    work.counts = d_counts;
    size_t n = rows, heads = m->n_heads * m->head_dim, kv = 2 * m->n_kv_heads * m->head_dim;
    const struct {
        const char *name;
        op o;
    } ops[] = {
        { "embed", { .run = run_embed, .in_bytes = n * m->n_embd * 2, .out_bytes = n * m->n_embd * 4 } },
        { "norm", { .run = run_norm, .in_bytes = n * m->n_embd * 4, .out_bytes = n * m->n_embd * 2 } },
        { "store", { .run = run_store, .in_bytes = n * (heads + kv) * 2, .out_bytes = n * heads * 2 } },
        { "swiglu", { .run = run_swiglu, .in_bytes = n * m->n_ff * 4, .out_bytes = n * m->n_ff * 2 } },
        { "norm e4m3",
          { .run = run_norm, .e4m3 = true, .in_bytes = n * m->n_embd * 4, .out_bytes = n * (m->n_embd + 16) } },
        { "quantize",
          { .run = run_quantize, .e4m3 = true, .in_bytes = n * m->n_embd * 2, .out_bytes = n * (m->n_embd + 16) } },
        { "swiglu e4m3",
          { .run = run_swiglu, .e4m3 = true, .in_bytes = n * m->n_ff * 4, .out_bytes = n * (m->n_ff + 16) } },
    };
    for (size_t i = 0; ok && i < sizeof ops / sizeof *ops; i++) {
        op o = ops[i].o;
        o.model = m;
        o.rows = rows;
        o.fixed[0] = &work;
        o.fixed[1] = d_turns;
        double bytes = (double)(o.in_bytes + o.out_bytes) + (o.run == run_store ? (double)(n * kv * 2) : 0);
        ok = report(b, &o, ops[i].name, bytes, 0);
    }
    cudaFree(d_list);
    cudaFree(d_counts);
    cudaFree(d_turns);
    return ok;
}

/* ---- Dequantize -------------------------------------------------------------------------------------------------- */

static bool run_dequantize(bench *b, const op *o, uint32_t i) {
    (void)i;
    return TRY(b, mp_cu_dequantize(o->index, b->data, (mp_bf16 *)(void *)b->out, o->out_bytes / 2, b->device.stream));
}

static bool dequantize(bench *b) {
    static const mp_dtype types[] = { MP_DTYPE_F32,  MP_DTYPE_F16,  MP_DTYPE_Q8_0, MP_DTYPE_Q4_0,
                                      MP_DTYPE_Q5_1, MP_DTYPE_Q4_K, MP_DTYPE_Q6_K };
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        const mp_dtype_info *info = mp_dtype_find((uint32_t)types[t]);
        size_t n = (size_t)32 << 20, in = n / info->len * info->bytes;
        const op o = {
            .run = run_dequantize, .model = &models[0], .index = (uint32_t)types[t], .in_bytes = in, .out_bytes = n * 2
        };
        char name[32];
        snprintf(name, sizeof name, "from %s", info->name);
        if (!report(b, &o, name, (double)(in + n * 2), 0)) return false;
    }
    return true;
}

/* ---- Loading ----------------------------------------------------------------------------------------------------- */

/* Twice each: the second time the file is in memory for sure. */
static bool load_model(bench *b, const char *path) {
    mp_model *m;
    if (mp_model_open(path, &m, &b->err) != MEPIC_OK) return false;
    bool ok = true;
    for (int i = 0; ok && i < 4; i++) {
        mp_cu_weights w;
        uint64_t start = mp_now_ns();
        bool e4m3 = i >= 2;
        ok = mp_cu_weights_open(&b->device, m, e4m3, NULL, &w, &b->err) == MEPIC_OK;
        if (!ok) break;
        double s = (double)(mp_now_ns() - start) * 1e-9, gb = (double)mp_gguf_file_bytes(m->gguf) * 1e-9;
        printf("loading %.1f GB as %.1f GB of %s: %.2f s, %.1f GB/s of the file\n", gb, (double)w.bytes * 1e-9,
               e4m3 ? "e4m3 and bf16" : "bf16", s, gb / s);
        mp_cu_weights_close(&b->device, &w);
    }
    mp_model_close(m);
    return ok;
}

/* ---- Main -------------------------------------------------------------------------------------------------------- */

static bool open_data(bench *b) {
    enum { N = 1 << 20 };
    b->data_bytes = (size_t)3 << 30;
    b->out_bytes = (size_t)2 << 30;
    void *data, *out;
    if (mp_cu_take(&b->device, b->data_bytes, "inputs", &data, &b->err) != MEPIC_OK ||
        mp_cu_take(&b->device, b->out_bytes, "results", &out, &b->err) != MEPIC_OK) {
        return false;
    }
    b->data = data;
    b->out = out;
    uint16_t *random = mp_alloc(N * sizeof *random);
    if (!random) return false;
    for (uint64_t i = 0; i < N; i++) { /* sign and mantissa random, from 1/64 to 1 */
        uint64_t h = mp_hash64(i, NULL, 0);
        random[i] = (uint16_t)((h & 0x807f) | (0x78 + h / 65536 % 6) << 7);
    }
    bool ok = TRY(b, cudaMemcpy(b->data, random, N * sizeof *random, cudaMemcpyHostToDevice)) &&
              TRY(b, cudaMemset(b->out, 0, b->out_bytes));
    mp_free(random);
    for (size_t done = N * sizeof *random; ok && done < b->data_bytes;) {
        size_t more = done < b->data_bytes - done ? done : b->data_bytes - done;
        ok = TRY(b, cudaMemcpy(b->data + done, b->data, more, cudaMemcpyDeviceToDevice));
        done += more;
    }
    return ok && TRY(b, cudaDeviceSynchronize()); /* the operations' stream does not wait for this one */
}

int main(int argc, char **argv) {
    static bench b;
    uint32_t rows[16] = { 1, 16, 64, 8192 }, n_rows = 0;
    const char *load = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--only") == 0 && b.n_only < 16) {
            b.only[b.n_only++] = argv[i + 1];
        } else if (strcmp(argv[i], "--load") == 0) {
            load = argv[i + 1];
        } else if (strcmp(argv[i], "--rows") == 0 && n_rows < 16) {
            rows[n_rows++] = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        }
    }
    if (n_rows == 0) n_rows = 4;
    bool ok = mp_cu_device_open(0, &b.device, &b.err) == MEPIC_OK;
    ok = ok && (load ? load_model(&b, load) : open_data(&b) && ceilings(&b));
    for (size_t m = 0; ok && !load && m < sizeof models / sizeof *models; m++) {
        ok = products(&b, &models[m], false, rows, n_rows) &&
             (!mp_cu_matmul_has_e4m3(&b.device) || products(&b, &models[m], true, rows, n_rows));
        for (uint32_t r = 0; ok && r < n_rows; r++) {
            ok = row_kernels(&b, &models[m], rows[r]) && sampling(&b, &models[m], rows[r]);
        }
    }
    ok = ok && (load || dequantize(&b));
    if (!ok) {
        if (b.device.error != cudaSuccess) mp_cu_status(&b.device, &b.err);
        fprintf(stderr, "bench_cuda_ops: %s\n", b.err.message);
    }
    mp_cu_device_close(&b.device);
    return !ok;
}
