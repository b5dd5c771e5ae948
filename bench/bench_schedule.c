/* Scheduling alone, no model: microseconds a step in steady decode, and to admit a request; where CUDA is built, also
 * what it costs to turn a step's plan into the lists a device reads.
 *
 *     bench_schedule [requests [chunks [steps]]]       256 requests of 32 chunks, 1,000 steps */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "schedule/scheduler.h"
#ifdef MEPIC_CUDA
#include "backend/cuda/work.h"
#endif

enum { CHUNK = 128, TEXT = 40, N_DOCUMENTS = 128 };

static void die(const char *what) {
    fprintf(stderr, "bench_schedule: %s\n", what);
    exit(1);
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Request i: its own text, then chunks of the library from a place of its own on, then text. */
static void submit(mp_scheduler *s, uint32_t i, uint32_t n_chunks, uint32_t n_reply) {
    uint32_t n = 2 * TEXT + n_chunks * CHUNK;
    int32_t *tokens = mp_alloc(n * sizeof *tokens);
    mp_span *spans = mp_calloc(n_chunks + 2, sizeof *spans);
    if (!tokens || !spans) die("out of memory");
    uint32_t at = 0;
    for (uint32_t k = 0; k < n_chunks + 2; k++) {
        bool text = k == 0 || k == n_chunks + 1;
        uint32_t id = text ? 1000 + 2 * i + (k > 0) : (i * 7 + k * 3) % N_DOCUMENTS;
        spans[k] = (mp_span){ text ? MEPIC_TEXT : MEPIC_CHUNK, at, text ? TEXT : CHUNK, false, false };
        for (uint32_t t = 0; t < spans[k].n; t++) tokens[at++] = (int32_t)(id * 1000 + t);
    }
    mp_request_spec spec = { .tokens = tokens,
                             .n_tokens = n,
                             .spans = spans,
                             .n_spans = n_chunks + 2,
                             .reuse = MEPIC_REUSE_MEPIC,
                             .link_tokens = 16,
                             .max_tokens = n_reply };
    mp_request *request;
    mepic_error err;
    if (mp_scheduler_submit(s, &spec, &request, &err) != MEPIC_OK) die(err.message);
    mp_free(tokens);
    mp_free(spans);
}

/* The lists of a step for a CUDA device, in host memory. */
typedef struct lists {
#ifdef MEPIC_CUDA
    mp_cu_lists *cuda;
#else
    int none;
#endif
} lists;

static void lists_open(lists *l, const mp_scheduler_config *config) {
#ifdef MEPIC_CUDA
    uint32_t max_refs = mp_scheduler_max_refs(config);
    const mp_cu_lists_config c = { .max_rows = config->step_tokens,
                                   .max_seqs = config->max_running + config->max_jobs,
                                   .max_refs = max_refs,
                                   .n_pages = config->n_pages,
                                   .max_slots = config->max_running * max_refs,
                                   .block_rows = 32,
                                   .on_host = true };
    mepic_error err;
    if (mp_cu_lists_open(NULL, &c, &l->cuda, &err) != MEPIC_OK) die(err.message);
#else
    (void)l, (void)config;
#endif
}

static void lists_close(lists *l) {
#ifdef MEPIC_CUDA
    mp_cu_lists_close(l->cuda);
#else
    (void)l;
#endif
}

/* Nanoseconds; 0 without CUDA. */
static uint64_t lists_build(lists *l, const mp_step *step) {
#ifdef MEPIC_CUDA
    uint64_t start = mp_now_ns();
    if (!mp_cu_lists_build(l->cuda, step)) die("the lists are too small");
    return mp_now_ns() - start;
#else
    (void)l, (void)step;
    return 0;
#endif
}

/* One step without a model; its rows and the nanoseconds that scheduling took, and the lists. */
static uint32_t step(mp_scheduler *s, lists *l, uint64_t *ns, uint64_t *lists_ns) {
    const mp_step *step;
    mepic_error err;
    uint64_t start = mp_now_ns();
    if (mp_scheduler_step(s, &step, &err) != MEPIC_OK) die(err.message);
    uint64_t scheduled = mp_now_ns() - start;
    *lists_ns = lists_build(l, step);
    start = mp_now_ns();
    mp_scheduler_commit(s);
    for (uint32_t i = 0; i < step->n_rows; i++) {
        const mp_row *row = &step->rows[i];
        if (row->samples) mp_scheduler_append(s, mp_scheduler_request(s, row->seq), 1);
    }
    *ns = scheduled + mp_now_ns() - start;
    return step->n_rows;
}

int main(int argc, char **argv) {
    uint32_t n_requests = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 256;
    uint32_t n_chunks = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 32;
    uint32_t n_steps = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 1000;
    if (n_requests == 0 || n_requests > 65536 || n_chunks > 1000 || n_steps == 0 || n_steps > 1000000)
        die("bad argument");
    mp_fault fault = { 0 };
#ifdef MEPIC_CUDA
    const uint32_t cell_tokens = MP_CU_CELL_TOKENS;
#else
    const uint32_t cell_tokens = 256;
#endif
    uint32_t context = 2 * TEXT + n_chunks * CHUNK + n_steps + 1000;
    mp_scheduler_config config = { .page_size = 16,
                                   .cell_tokens = cell_tokens,
                                   .n_pages =
                                       N_DOCUMENTS * CHUNK / 16 + n_requests * (context - n_chunks * CHUNK / 2) / 16,
                                   .max_running = n_requests,
                                   .max_jobs = 4,
                                   .max_queued = n_requests,
                                   .step_tokens = 2048,
                                   .context = context,
                                   .fault = &fault };
    mp_scheduler *s;
    mepic_error err;
    if (mp_scheduler_open(&config, &s, &err) != MEPIC_OK) die(err.message);
    lists l = { 0 };
    lists_open(&l, &config);
    uint64_t ns, lists_ns, start = mp_now_ns();
    for (uint32_t i = 0; i < n_requests; i++) submit(s, i, n_chunks, n_steps + 900);
    printf("submit: %.1f us a request of %u chunks (layout, keys)\n", (double)(mp_now_ns() - start) / 1e3 / n_requests,
           n_chunks);
    start = mp_now_ns();
    while (step(s, &l, &ns, &lists_ns) != n_requests) {
    }
    printf("until all decode: %.2f ms\n", (double)(mp_now_ns() - start) / 1e6);

    uint64_t *times = mp_alloc(2 * (size_t)n_steps * sizeof *times), *lists_times = times + n_steps;
    if (!times) die("out of memory");
    for (uint32_t i = 0; i < n_steps; i++) {
        if (step(s, &l, &times[i], &lists_times[i]) != n_requests) die("a request is missing in a step");
    }
    qsort(times, n_steps, sizeof *times, by_value);
    qsort(lists_times, n_steps, sizeof *lists_times, by_value);
    mepic_stats stats;
    mp_scheduler_stats(s, &stats);
    printf(
        "decode, %u requests of %u chunks: %.1f us a step (median), %.1f us (p99); %u pages referenced, %u unshared\n",
        n_requests, n_chunks, (double)times[n_steps / 2] / 1e3, (double)times[n_steps * 99 / 100] / 1e3,
        stats.pages_referenced, stats.pages_unshared);
    if (lists_times[n_steps / 2] > 0)
        printf("lists for a CUDA device: %.1f us a step (median)\n", (double)lists_times[n_steps / 2] / 1e3);
    mp_free(times);
    lists_close(&l);
    mp_scheduler_close(s);
    return 0;
}
