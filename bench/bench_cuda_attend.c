/* bench_cuda_attend: decode attention on the GPU, with shared runs read once and with pages of their own for every
 * request, beside the time that reading the unique bytes takes at the rate measured in the same run.
 *
 *     bench_cuda_attend [small] [page N] [layers N] [split N] [general] [only PART] [noapart] [nofold]
 *
 * Pages lie in random order; a replayed graph goes over as many copies of the problem as make 400 MB; medians of 9.
 * layers: of a page; each copy of the problem is another layer of the same pages instead of other pages. split: readers
 * of an item at most, if not what the backend takes. general: the kernels for every architecture. only: scenes whose
 * name has this in it. noapart: without the comparison; nofold: without the kernel that joins partial states. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "base/mem.h"
#include "bench/cuda_read.h"

enum { N_REPLAYS = 9, MAX_COPIES = 64, CELL = MP_CU_CELL_TOKENS };

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
    uint32_t page_size, n_layers, split, item_readers;
    bool general, nofold, noapart;
    const char *only;
    double read; /* bytes a microsecond */
    mp_cu_attend attend;
    void *taken[64];
    uint32_t n_taken;
} bench;

/* Work of one scene, on the host. */
typedef struct lists {
    uint32_t n_cells, n_pages, n_readers, n_items, n_folds, n_slots;
    mp_cu_cell *cells;
    uint32_t *pages;
    mp_cu_reader *readers; /* by row */
    uint32_t *reader_cells;
    mp_cu_reader *sorted; /* by item */
    mp_cu_item *items;
    mp_cu_fold *folds;
    double bytes; /* unique */
} lists;

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

static uint32_t add_cells(lists *l, uint32_t n_tokens, uint32_t page_size) {
    uint32_t first = l->n_cells;
    for (uint32_t at = 0; at < n_tokens; at += CELL) {
        uint32_t n = n_tokens - at < CELL ? n_tokens - at : CELL;
        l->cells[l->n_cells++] = (mp_cu_cell){ l->n_pages, n };
        l->n_pages += (n + page_size - 1) / page_size;
    }
    return first;
}

static void read_run(bench *b, lists *l, uint32_t row, uint32_t first_cell, uint32_t n_tokens, bool turned) {
    int32_t delta = turned ? (int32_t)below(b, 100000) : 20000;
    for (uint32_t c = first_cell; c < first_cell + (n_tokens + CELL - 1) / CELL; c++) {
        l->reader_cells[l->n_readers] = c;
        l->readers[l->n_readers++] = (mp_cu_reader){
            .mask = ~0ull, .row = row, .delta = delta, .slot = l->n_slots++, .hi = (uint16_t)l->cells[c].n_tokens
        };
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

static void close_lists(lists *l) {
    void *all[] = { l->cells, l->pages, l->readers, l->reader_cells, l->sorted, l->items, l->folds };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mp_free(all[i]);
}

static bool open_lists(const bench *b, const scene *s, lists *l) {
    uint32_t refs = s->batch * (s->per_request * ((s->chunk + CELL - 1) / CELL) + s->prefix / CELL + s->own / CELL + 3);
    uint32_t cells = refs + s->pool * ((s->chunk + CELL - 1) / CELL) + s->prefix / CELL + 2;
    *l = (lists){
        .cells = zeroed(cells, sizeof *l->cells),
        .pages = zeroed(cells * (CELL / b->page_size), sizeof *l->pages),
        .readers = zeroed(refs, sizeof *l->readers),
        .reader_cells = zeroed(refs, sizeof *l->reader_cells),
        .sorted = zeroed(refs, sizeof *l->sorted),
        .items = zeroed(refs, sizeof *l->items),
        .folds = zeroed(s->batch, sizeof *l->folds),
    };
    return l->cells && l->pages && l->readers && l->reader_cells && l->sorted && l->items && l->folds;
}

static int by_cost(const void *x, const void *y) {
    const uint64_t *a = x, *b = y;
    return a[0] < b[0] ? 1 : a[0] > b[0] ? -1 : a[1] < b[1] ? -1 : a[1] > b[1];
}

/* Readers by cell; items of at most item_readers, of about equal numbers, the dearest first. */
static bool make_items(const bench *b, lists *l) {
    uint32_t *at = zeroed(l->n_cells + 1, sizeof *at), n = 0;
    uint64_t *order = zeroed(2 * (size_t)l->n_readers, sizeof *order);
    mp_cu_item *items = zeroed(l->n_readers, sizeof *items);
    bool good = at && order && items;
    for (uint32_t i = 0; good && i < l->n_readers; i++) at[l->reader_cells[i] + 1]++;
    for (uint32_t c = 0; good && c < l->n_cells; c++) {
        uint32_t first = at[c], left = at[c + 1];
        at[c + 1] += first;
        for (uint32_t parts = (left + b->item_readers - 1) / b->item_readers; parts; parts--) {
            uint32_t take = (left + parts - 1) / parts;
            items[n] = (mp_cu_item){ c, first, take };
            order[2 * n] = (uint64_t)take * l->cells[c].n_tokens;
            order[2 * n + 1] = n;
            n++;
            first += take;
            left -= take;
        }
    }
    if (good) {
        for (uint32_t i = 0; i < l->n_readers; i++) l->sorted[at[l->reader_cells[i]]++] = l->readers[i];
        qsort(order, n, 2 * sizeof *order, by_cost);
        for (uint32_t i = 0; i < n; i++) l->items[i] = items[order[2 * i + 1]];
        l->n_items = n;
    }
    mp_free(at);
    mp_free(order);
    mp_free(items);
    return good;
}

static bool build(bench *b, const scene *s, bool shared, lists *l) {
    if (!open_lists(b, s, l)) return false;
    uint32_t prefix = shared && s->prefix ? add_cells(l, s->prefix, b->page_size) : 0, pool[1024], order[1024];
    for (uint32_t i = 0; i < s->pool; i++) {
        order[i] = i;
        if (shared) pool[i] = add_cells(l, s->chunk, b->page_size);
    }
    for (uint32_t row = 0; row < s->batch; row++) {
        uint32_t first_slot = l->n_slots;
        if (s->prefix) {
            uint32_t first = shared ? prefix : add_cells(l, s->prefix, b->page_size);
            read_run(b, l, row, first, s->prefix, false);
        }
        for (uint32_t i = 0; i < s->per_request; i++) {
            uint32_t j = i + below(b, s->pool - i), pick = order[j];
            order[j] = order[i];
            order[i] = pick;
            uint32_t first = shared ? pool[pick] : add_cells(l, s->chunk, b->page_size);
            read_run(b, l, row, first, s->chunk, true);
        }
        read_run(b, l, row, add_cells(l, s->own, b->page_size), s->own, false);
        l->folds[l->n_folds++] = (mp_cu_fold){ row, first_slot, l->n_slots - first_slot };
    }
    l->bytes = (double)tokens_of(s, shared) * b->attend.n_kv_heads * b->attend.head_dim * 4;
    return make_items(b, l);
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

/* Microseconds of a scene; 0 when it does not fit the slab. */
static double measure(bench *b, const scene *s, bool shared, double *bytes) {
    lists l;
    uint32_t kept = b->n_taken, n_copies, n_slab = (uint32_t)(b->slab_bytes / b->attend.page_bytes);
    double us = 0;
    if (!build(b, s, shared, &l)) return 0;
    *bytes = l.bytes;
    n_copies = (uint32_t)(400e6 / l.bytes) + 1;
    if (n_copies > MAX_COPIES) n_copies = MAX_COPIES;
    if (n_copies > b->n_layers && b->n_layers > 1) n_copies = b->n_layers;
    uint32_t n_sets = b->n_layers > 1 ? 1 : n_copies;
    uint32_t *order = zeroed(n_slab, sizeof *order);
    cudaGraph_t graph = NULL;
    mp_cu_attend a = b->attend;
    size_t width = (size_t)a.n_heads * a.head_dim, q_bytes = s->batch * width * 2;
    if (!order || (size_t)l.n_pages * n_sets > n_slab) goto done;
    shuffle_pages(b, order, n_slab);
    mp_cu_counts counts = { .n_rows = s->batch, .n_items = l.n_items, .n_folds = l.n_folds };
    a.q = upload(b, NULL, q_bytes);
    a.out = upload(b, NULL, q_bytes);
    a.partial_o = upload(b, NULL, l.n_slots * width * 2);
    a.partial_ml = upload(b, NULL, (size_t)l.n_slots * a.n_heads * 8);
    a.work.counts = upload(b, &counts, sizeof counts);
    a.work.cells = upload(b, l.cells, l.n_cells * sizeof *l.cells);
    a.work.items = upload(b, l.items, l.n_items * sizeof *l.items);
    a.work.readers = upload(b, l.sorted, l.n_readers * sizeof *l.sorted);
    a.work.folds = upload(b, l.folds, l.n_folds * sizeof *l.folds);
    const uint32_t *pages = upload(b, order, (size_t)l.n_pages * n_sets * 4);
    a.max_items = l.n_items;
    a.max_folds = l.n_folds;
    bool good = pages && TRY(b, cudaMemcpy((void *)(uintptr_t)a.q, b->slab, q_bytes, cudaMemcpyDeviceToDevice)) &&
                TRY(b, cudaStreamBeginCapture(b->device.stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; good && i < n_copies; i++) {
        a.work.pages = pages + (n_sets > 1 ? (size_t)i * l.n_pages : 0);
        a.layer_offset = b->n_layers > 1 ? i * a.page_bytes / b->n_layers : 0;
        good = TRY(b, mp_cu_attend_decode(&a, b->device.stream)) &&
               (b->nofold || TRY(b, mp_cu_attend_fold(&a, b->device.stream)));
    }
    good = good && TRY(b, cudaStreamEndCapture(b->device.stream, &graph));
    if (good) us = replay(b, graph, n_copies);
done:
    if (graph) cudaGraphDestroy(graph);
    mp_free(order);
    close_lists(&l);
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
    a->block_bytes = (size_t)b->page_size * head_dim * 4;
    a->page_bytes = a->block_bytes * n_kv_heads * b->n_layers;
    a->slab = b->slab;
    b->item_readers = b->split ? b->split : mp_cu_attend_item_readers(a->arch, head_dim, n_heads, n_kv_heads);
    printf("%s: %u heads, %u kv heads of %u; pages of %u, %u layers, %u readers an item, %s\n", name, n_heads,
           n_kv_heads, head_dim, b->page_size, b->n_layers, b->item_readers,
           b->general ? "general kernel" : "the card's kernel");
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
    for (size_t i = 0; i < part / 2; i++)
        random[i] = (uint16_t)(0x3f00 + below(b, 256) + (below(b, 2) << 15)); /* 0.5 .. 2 */
    for (int i = 0; i < 64; i++) turns[i] = (uint64_t)below(b, 1u << 30) << 20;
    b->slab_bytes = bytes / part * part;
    b->slab = upload(b, NULL, b->slab_bytes);
    b->attend.rope = (mp_cu_rope){ upload(b, turns, sizeof turns), 64, true, 1.0f };
    bool good = b->slab && TRY(b, cudaMemcpy(b->slab, random, part, cudaMemcpyHostToDevice));
    for (size_t at = part; good && at < b->slab_bytes; at += part) {
        good = TRY(b, cudaMemcpy(b->slab + at, b->slab, part, cudaMemcpyDeviceToDevice));
    }
    mp_free(random);
    return good;
}

int main(int argc, char **argv) {
    bench b = { .random = 1, .page_size = 16, .n_layers = 1 };
    bool small = false;
    for (int i = 1; i < argc; i++) {
        uint32_t value = i + 1 < argc ? (uint32_t)strtoul(argv[i + 1], NULL, 10) : 0;
        if (!strcmp(argv[i], "small")) small = true;
        if (!strcmp(argv[i], "general")) b.general = true;
        if (!strcmp(argv[i], "nofold")) b.nofold = true;
        if (!strcmp(argv[i], "noapart")) b.noapart = true;
        if (!strcmp(argv[i], "page")) b.page_size = value;
        if (!strcmp(argv[i], "layers")) b.n_layers = value;
        if (!strcmp(argv[i], "split")) b.split = value;
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
