/* bench_cuda_attend: decode attention on the GPU, with shared runs read once and with pages of their own for every
 * request, beside the time that reading the unique bytes takes at the rate measured in the same run.
 *
 *     bench_cuda_attend [small] [page N] [layers N] [split N] [back N] [general] [fp8] [biased] [only PART] [noapart]
 *
 * Pages lie in random order; a replayed graph goes over as many copies of the problem as make 400 MB; medians of 9.
 * layers: of a page; each copy of the problem is another layer of the same pages instead of other pages. split: readers
 * of an item at most, back: blocks that begin at the end of the list, if not what the backend takes. general: the
 * kernels for every architecture. fp8: pages of fp8; biased: with keys that lie there without their bias. only: scenes
 * whose name has this in it. noapart: without the comparison. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/work.h"
#include "base/mem.h"
#include "bench/cuda_read.h"

enum { N_REPLAYS = 9, MAX_COPIES = 64, CELL = MP_CU_CELL_TOKENS, MAX_HEADS = 8, MAX_HEAD_DIM = 128 };

typedef struct scene {
    const char *name;
    uint32_t batch, prefix, pool, per_request, chunk, own; /* tokens; pool and per_request: chunks */
} scene;

static const scene scenes[] = {
    { "A none shared, 1 x 32768", 1, 0, 0, 0, 0, 32768 },
    { "A none shared, 16 x 8192", 16, 0, 0, 0, 0, 8192 },
    { "A none shared, 64 x 4096", 64, 0, 0, 0, 0, 4096 },
    { "B prefix 16384 + 256, 16", 16, 16384, 0, 0, 0, 256 },
    { "B prefix 16384 + 256, 64", 64, 16384, 0, 0, 0, 256 },
    { "B prefix 16384 + 256, 128", 128, 16384, 0, 0, 0, 256 },
    { "C 16 of 64 chunks of 1024, 16", 16, 0, 64, 16, 1024, 256 },
    { "C 16 of 64 chunks of 1024, 64", 64, 0, 64, 16, 1024, 256 },
    { "C 16 of 64 chunks of 1024, 128", 128, 0, 64, 16, 1024, 256 },
    { "C 16 of 64 chunks of 1024, 256", 256, 0, 64, 16, 1024, 256 },
    { "D 16 of 64 chunks of 100, 64", 64, 0, 64, 16, 100, 256 },
    { "D 16 of 64 chunks of 100, 256", 256, 0, 64, 16, 100, 256 },
};

typedef struct bench {
    mp_cu_device device;
    mepic_error err;
    uint64_t random;
    uint8_t *slab;
    size_t slab_bytes;
    const mp_cu_key_bias *key_bias;
    uint32_t page_size, n_layers, split, back;
    bool general, noapart, split_given, fp8, biased;
    const char *only;
    double read; /* bytes a microsecond */
    mp_cu_attend attend;
    void *taken[64];
    uint32_t n_taken;
} bench;

/* A scene as a step of decode rows and its plan; pages are numbered in the order of the cells. */
typedef struct problem {
    mp_plan plan;
    mp_step step;
    mp_row *rows;
    uint32_t n_cells, n_pages, n_slots;
    double bytes; /* unique */
} problem;

static uint32_t below(bench *b, uint32_t n) {
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((b->random >> 33) * n >> 31);
}

static bool ok(bench *b, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return true;
    fprintf(stderr, "bench_cuda_attend: %s: %s\n", what, cudaGetErrorString(error));
    return CUDA_TRY(&b->device, error);
}
#define TRY(b, call) ok(b, call, #call)

/* Device memory until release(); with the host's data, if there is some. */
static void *upload(bench *b, const void *data, size_t bytes) {
    void *p = NULL;
    if (!TRY(b, cudaMalloc(&p, bytes ? bytes : 1))) return NULL;
    b->taken[b->n_taken++] = p;
    if (data) TRY(b, cudaMemcpy(p, data, bytes, cudaMemcpyHostToDevice));
    return p;
}

static void release(bench *b, uint32_t down_to) {
    while (b->n_taken > down_to) cudaFree(b->taken[--b->n_taken]);
}

/* ---- Problems ---------------------------------------------------------------------------------------------------- */

static uint32_t cells_in(uint32_t n_tokens) {
    return (n_tokens + CELL - 1) / CELL;
}

static uint32_t add_cells(problem *p, uint32_t n_tokens) {
    uint32_t first = p->n_cells;
    for (uint32_t at = 0; at < n_tokens; at += CELL) {
        mp_cell *cell = &p->plan.cells[p->n_cells++];
        cell->n_tokens = n_tokens - at < CELL ? n_tokens - at : CELL;
        cell->n_pages = (cell->n_tokens + p->plan.page_size - 1) / p->plan.page_size;
        for (uint32_t i = 0; i < cell->n_pages; i++) cell->pages[i] = p->n_pages++;
    }
    return first;
}

/* The row reads n_tokens from a cell on: its own (base -1), or what others may read too. */
static void read_run(problem *p, uint32_t row, uint32_t first_cell, uint32_t n_tokens, int32_t base) {
    mp_plan_seq *seq = &p->plan.seqs[row];
    for (uint32_t i = 0; i < cells_in(n_tokens); i++) {
        seq->refs[seq->n_refs++] = (mp_cell_ref){ .cell = first_cell + i,
                                                  .seq = row,
                                                  .base = base < 0 ? 0 : base,
                                                  .first = (int32_t)(i * CELL),
                                                  .mask = ~0ull,
                                                  .hi = (uint16_t)CELL,
                                                  .shared = base >= 0 };
        p->n_slots++;
    }
}

static uint32_t tokens_of(const scene *s, bool shared) {
    uint32_t private = s->own + (shared ? 0 : s->prefix + s->per_request * s->chunk);
    return s->batch * private + (shared ? s->prefix + s->pool * s->chunk : 0);
}

static void *zeroed(size_t n, size_t size) {
    void *p = mp_calloc(n, size);
    if (!p) fprintf(stderr, "bench_cuda_attend: out of memory\n");
    return p;
}

static void close_problem(problem *p) {
    for (uint32_t i = 0; p->plan.seqs && i < p->plan.max_seqs; i++) mp_free(p->plan.seqs[i].refs);
    mp_free(p->plan.seqs);
    mp_free(p->plan.cells);
    mp_free(p->plan.active);
    mp_free(p->rows);
}

static bool open_problem(const bench *b, const scene *s, problem *p) {
    uint32_t refs = cells_in(s->prefix) + s->per_request * cells_in(s->chunk) + cells_in(s->own);
    uint32_t cells = s->batch * refs + s->pool * cells_in(s->chunk) + cells_in(s->prefix);
    *p = (problem){ .rows = zeroed(s->batch, sizeof *p->rows) };
    p->plan = (mp_plan){ .page_size = b->page_size,
                         .cell_tokens = CELL,
                         .max_seqs = s->batch,
                         .max_refs = refs,
                         .max_cells = cells,
                         .seqs = zeroed(s->batch, sizeof *p->plan.seqs),
                         .cells = zeroed(cells, sizeof *p->plan.cells),
                         .active = zeroed(s->batch, sizeof *p->plan.active),
                         .n_active = s->batch };
    bool good = p->rows && p->plan.seqs && p->plan.cells && p->plan.active;
    for (uint32_t i = 0; good && i < s->batch; i++) {
        p->plan.seqs[i] = (mp_plan_seq){ .row = i, .n_rows = 1, .refs = zeroed(refs, sizeof(mp_cell_ref)) };
        p->plan.active[i] = i;
        p->rows[i] = (mp_row){ .position = 1 << 20, .seq = i, .index = s->own - 1 };
        good = p->plan.seqs[i].refs != NULL;
    }
    p->step = (mp_step){ .rows = p->rows, .n_rows = s->batch, .plan = &p->plan };
    return good;
}

static bool build(bench *b, const scene *s, bool shared, problem *p) {
    if (!open_problem(b, s, p)) return false;
    uint32_t prefix = shared && s->prefix ? add_cells(p, s->prefix) : 0, pool[1024], order[1024];
    for (uint32_t i = 0; i < s->pool; i++) {
        order[i] = i;
        if (shared) pool[i] = add_cells(p, s->chunk);
    }
    for (uint32_t row = 0; row < s->batch; row++) {
        if (s->prefix) read_run(p, row, shared ? prefix : add_cells(p, s->prefix), s->prefix, 0);
        for (uint32_t i = 0; i < s->per_request; i++) {
            uint32_t j = i + below(b, s->pool - i), pick = order[j];
            order[j] = order[i];
            order[i] = pick;
            uint32_t cell = shared ? pool[pick] : add_cells(p, s->chunk);
            read_run(p, row, cell, s->chunk, (int32_t)below(b, 100000));
        }
        read_run(p, row, add_cells(p, s->own), s->own, -1);
    }
    p->bytes = (double)tokens_of(s, shared) * b->attend.n_kv_heads * (double)b->attend.block_bytes / b->page_size;
    return true;
}

/* The lists of the problem, as the backend makes them. */
static mepic_status make_lists(bench *b, const problem *p, mp_cu_lists **out) {
    const mp_cu_attend *a = &b->attend;
    const mp_cu_lists_config config = { .max_rows = p->step.n_rows,
                                        .max_seqs = p->plan.max_seqs,
                                        .max_refs = p->plan.max_refs,
                                        .n_pages = p->n_pages,
                                        .max_slots = p->n_slots,
                                        .block_rows = 1,
                                        .item_readers = b->split,
                                        .group = a->n_heads / a->n_kv_heads,
                                        .n_kv_heads = a->n_kv_heads,
                                        .n_sm = a->n_sm,
                                        .on_host = true };
    mepic_status status = mp_cu_lists_open(NULL, &config, out, &b->err);
    if (status == MEPIC_OK && !mp_cu_lists_build(*out, &p->step)) {
        status = mp_fail(&b->err, MEPIC_ERR_NOMEM, "the lists do not hold the scene");
    }
    return status;
}

/* ---- Timing ------------------------------------------------------------------------------------------------------ */

static int by_value(const void *x, const void *y) {
    float a = *(const float *)x, b = *(const float *)y;
    return a < b ? -1 : a > b;
}

/* Microseconds of one of the n problems in the graph. */
static double replay(bench *b, cudaGraph_t graph, uint32_t n) {
    cudaGraphExec_t run = NULL;
    cudaEvent_t from = NULL, to = NULL;
    float ms[N_REPLAYS] = { 0 };
    bool good = TRY(b, cudaGraphInstantiate(&run, graph, 0)) && TRY(b, cudaEventCreate(&from)) &&
                TRY(b, cudaEventCreate(&to)) && TRY(b, cudaGraphLaunch(run, b->device.stream));
    for (int i = 0; good && i < N_REPLAYS; i++) {
        good = TRY(b, cudaEventRecord(from, b->device.stream)) && TRY(b, cudaGraphLaunch(run, b->device.stream)) &&
               TRY(b, cudaEventRecord(to, b->device.stream)) && TRY(b, cudaEventSynchronize(to)) &&
               TRY(b, cudaEventElapsedTime(&ms[i], from, to));
    }
    if (from) cudaEventDestroy(from);
    if (to) cudaEventDestroy(to);
    if (run) cudaGraphExecDestroy(run);
    qsort(ms, N_REPLAYS, sizeof *ms, by_value);
    return good ? (double)ms[N_REPLAYS / 2] * 1e3 / n : 0;
}

static bool measure_read(bench *b) {
    size_t bytes = b->slab_bytes < (size_t)4 << 30 ? b->slab_bytes : (size_t)4 << 30;
    uint32_t *sink = upload(b, NULL, 4);
    cudaGraph_t graph = NULL;
    bool good = sink && TRY(b, cudaStreamBeginCapture(b->device.stream, cudaStreamCaptureModeThreadLocal));
    good = good && TRY(b, mp_bench_read(b->slab, bytes, b->device.n_sm, sink, b->device.stream));
    good = good && TRY(b, cudaStreamEndCapture(b->device.stream, &graph));
    double us = good ? replay(b, graph, 1) : 0;
    if (graph) cudaGraphDestroy(graph);
    b->read = us > 0 ? (double)bytes / us : 0;
    return good && us > 0;
}

static void shuffle_pages(bench *b, uint32_t *pages, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        uint32_t j = below(b, i + 1);
        pages[i] = pages[j];
        pages[j] = i;
    }
}

/* Device copies of the lists but for the pages. */
static void upload_work(bench *b, mp_cu_attend *a, const mp_cu_work *work, uint32_t n_cells, uint32_t n_readers) {
    mp_cu_counts counts = *work->counts;
    if (b->back != ~0u) counts.n_back = b->back;
    a->work.counts = upload(b, &counts, sizeof counts);
    a->work.cells = upload(b, work->cells, n_cells * sizeof *work->cells);
    a->work.items = upload(b, work->items, counts.n_items * sizeof *work->items);
    a->work.readers = upload(b, work->readers, n_readers * sizeof *work->readers);
    a->work.folds = upload(b, work->folds, counts.n_folds * sizeof *work->folds);
    a->max_items = counts.n_items;
    a->max_folds = counts.n_folds;
}

/* Microseconds of a scene; 0 when it does not fit the slab. */
static double measure(bench *b, const scene *s, bool shared, double *bytes) {
    problem p;
    mp_cu_lists *lists = NULL;
    uint32_t kept = b->n_taken, n_slab = (uint32_t)(b->slab_bytes / b->attend.page_bytes);
    double us = 0;
    uint32_t *order = zeroed(n_slab, sizeof *order), *pages = NULL;
    cudaGraph_t graph = NULL;
    mp_cu_attend a = b->attend;
    if (!build(b, s, shared, &p) || make_lists(b, &p, &lists) != MEPIC_OK || !order) goto done;
    *bytes = p.bytes;
    uint32_t n_copies = (uint32_t)(400e6 / p.bytes) + 1;
    if (n_copies > MAX_COPIES) n_copies = MAX_COPIES;
    if (n_copies > b->n_layers && b->n_layers > 1) n_copies = b->n_layers;
    uint32_t n_sets = b->n_layers > 1 ? 1 : n_copies;
    if ((size_t)p.n_pages * n_sets > n_slab) goto done;
    shuffle_pages(b, order, n_slab);
    pages = zeroed((size_t)p.n_pages * n_sets, sizeof *pages);
    if (!pages) goto done;
    const mp_cu_work *work = mp_cu_lists_host(lists);
    for (uint32_t i = 0; i < p.n_pages * n_sets; i++) {
        pages[i] = order[i / p.n_pages * p.n_pages + work->pages[i % p.n_pages]];
    }
    size_t width = (size_t)a.n_heads * a.head_dim, q_bytes = s->batch * width * 2;
    a.q = upload(b, NULL, q_bytes);
    a.out = upload(b, NULL, q_bytes);
    a.partial_o = upload(b, NULL, p.n_slots * width * 2);
    a.partial_ml = upload(b, NULL, (size_t)p.n_slots * a.n_heads * 8);
    upload_work(b, &a, work, p.n_cells, p.n_slots);
    const uint32_t *on_device = upload(b, pages, (size_t)p.n_pages * n_sets * 4);
    bool good = on_device && TRY(b, cudaMemcpy((void *)(uintptr_t)a.q, b->slab, q_bytes, cudaMemcpyDeviceToDevice)) &&
                TRY(b, cudaStreamBeginCapture(b->device.stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; good && i < n_copies; i++) {
        a.work.pages = on_device + (n_sets > 1 ? (size_t)i * p.n_pages : 0);
        a.layer_offset = b->n_layers > 1 ? i * a.page_bytes / b->n_layers : 0;
        good = TRY(b, mp_cu_attend_decode(&a, b->device.stream));
    }
    good = good && TRY(b, cudaStreamEndCapture(b->device.stream, &graph));
    if (good) us = replay(b, graph, n_copies);
done:
    if (graph) cudaGraphDestroy(graph);
    mp_cu_lists_close(lists);
    mp_free(order);
    mp_free(pages);
    close_problem(&p);
    release(b, kept);
    return us;
}

static void run_shape(bench *b, const char *name, uint32_t n_heads, uint32_t n_kv_heads, uint32_t head_dim) {
    mp_cu_attend *a = &b->attend;
    a->head_dim = head_dim;
    a->n_heads = n_heads;
    a->n_kv_heads = n_kv_heads;
    a->page_size = b->page_size;
    a->scale = 0.088f;
    a->rope.n_pairs = head_dim / 2;
    a->fp8 = b->fp8;
    a->key_bias = b->biased ? b->key_bias : NULL;
    a->block_bytes = (size_t)b->page_size * (b->fp8 ? 2 * head_dim + 8 : 4 * head_dim);
    a->page_bytes = a->block_bytes * n_kv_heads * b->n_layers;
    a->slab = b->slab;
    if (!b->split_given) b->split = mp_cu_attend_item_readers(a->arch, head_dim, n_heads, n_kv_heads);
    printf("%s: %u heads, %u kv heads of %u; pages of %u, %u layers, %u readers an item, %s%s%s\n", name, n_heads,
           n_kv_heads, head_dim, b->page_size, b->n_layers, b->split,
           b->general ? "general kernel" : "the card's kernel", b->fp8 ? ", fp8" : "", b->biased ? ", biased" : "");
    printf("%-32s %9s %8s %9s %12s %9s %9s\n", "", "us", "TB/s", "of limit", "unshared us", "of limit", "speed-up");
    for (size_t i = 0; i < sizeof scenes / sizeof *scenes && b->device.error == cudaSuccess; i++) {
        const scene *s = &scenes[i];
        if (b->only && !strstr(s->name, b->only)) continue;
        double bytes = 0, apart_bytes = 0, us = measure(b, s, true, &bytes);
        double apart = !b->noapart && (s->prefix || s->pool) ? measure(b, s, false, &apart_bytes) : 0;
        printf("%-32s %9.1f %8.2f %8.1f%%", s->name, us, us > 0 ? bytes / us / 1e6 : 0,
               us > 0 ? 100 * bytes / us / b->read : 0);
        if (apart > 0) printf(" %12.1f %8.1f%% %8.1fx", apart, 100 * apart_bytes / apart / b->read, apart / us);
        printf("\n");
    }
}

static bool open_slab(bench *b, size_t bytes) {
    size_t part = (size_t)64 << 20;
    uint64_t turns[64];
    uint16_t *random = mp_calloc(part, 1);
    if (!random) return false;
    for (size_t i = 0; i < part / 2; i++) { /* 0.5 .. 2; of fp8 every other code is random, and all factors are such */
        random[i] = (uint16_t)((b->fp8 ? 0x7700 : 0x3f00) + below(b, 256) + (below(b, 2) << 15));
    }
    for (int i = 0; i < 64; i++) turns[i] = (uint64_t)below(b, 1u << 30) << 20;
    b->slab_bytes = bytes / part * part;
    b->slab = upload(b, NULL, b->slab_bytes);
    b->attend.rope = (mp_cu_rope){ upload(b, turns, sizeof turns), 64, true, 1.0f };
    mp_cu_key_bias bias[MAX_HEADS * MAX_HEAD_DIM];
    for (int i = 0; i < MAX_HEADS * MAX_HEAD_DIM; i++) {
        bias[i] = (mp_cu_key_bias){ below(b, 1u << 30), below(b, 1u << 30), below(b, 1u << 30), 1.0f };
    }
    b->key_bias = upload(b, bias, sizeof bias);
    bool good = b->slab && TRY(b, cudaMemcpy(b->slab, random, part, cudaMemcpyHostToDevice));
    for (size_t at = part; good && at < b->slab_bytes; at += part) {
        good = TRY(b, cudaMemcpy(b->slab + at, b->slab, part, cudaMemcpyDeviceToDevice));
    }
    mp_free(random);
    return good;
}

int main(int argc, char **argv) {
    bench b = { .random = 1, .page_size = 16, .n_layers = 1, .back = ~0u };
    bool small = false;
    for (int i = 1; i < argc; i++) {
        uint32_t value = i + 1 < argc ? (uint32_t)strtoul(argv[i + 1], NULL, 10) : 0;
        if (!strcmp(argv[i], "small")) small = true;
        if (!strcmp(argv[i], "general")) b.general = true;
        if (!strcmp(argv[i], "fp8")) b.fp8 = true;
        if (!strcmp(argv[i], "biased")) b.biased = true;
        if (!strcmp(argv[i], "noapart")) b.noapart = true;
        if (!strcmp(argv[i], "page")) b.page_size = value;
        if (!strcmp(argv[i], "layers")) b.n_layers = value;
        if (!strcmp(argv[i], "split")) {
            b.split = value;
            b.split_given = true;
        }
        if (!strcmp(argv[i], "back")) b.back = value;
        if (!strcmp(argv[i], "only")) b.only = argv[i + 1];
    }
    bool good = mp_cu_device_open(0, &b.device, &b.err) == MEPIC_OK;
    good = good && TRY(&b, mp_cu_attend_open(0)) && open_slab(&b, (size_t)(small ? 2 : 18) << 30) && measure_read(&b);
    if (good) {
        b.attend.arch = b.general ? 80 : b.device.code;
        b.attend.n_sm = b.device.n_sm;
        printf("%s: read limit %.3f TB/s\n", b.device.name, b.read / 1e6);
        run_shape(&b, "8B", 32, 8, 128);
        if (!b.only) run_shape(&b, "0.5B", 14, 2, 64);
        good = measure_read(&b);
        printf("read limit at the end %.3f TB/s\n", b.read / 1e6);
    }
    if (mp_cu_status(&b.device, &b.err) != MEPIC_OK || !good) fprintf(stderr, "bench_cuda_attend: %s\n", b.err.message);
    release(&b, 0);
    mp_cu_device_close(&b.device);
    return good ? 0 : 1;
}
