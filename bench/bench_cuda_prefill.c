/* bench_cuda_prefill: prefill attention on a GPU against the rate of its matrix units, measured in the same run.
 *
 *   bench_cuda_prefill [--general] [--fp8] [--only TEXT]
 *
 * The ceiling is a bf16 product of 8192 x 8192 x 8192 by cuBLASLt. A figure is the median of launches timed one by one,
 * after a warm-up, on random numbers; only products for keys that a row sees are counted. --general takes the kernel
 * that every architecture has; --fp8 reads pages of fp8. */
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"

enum { LAUNCHES = 15, PAGE = 16 };
static const size_t CHUNK = 16u << 20; /* of random numbers, repeated */

static void check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "bench_cuda_prefill: %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}
#define CHECK(call) check(call, #call)

static void check_blas(cublasStatus_t status, const char *what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "bench_cuda_prefill: %s: cuBLASLt status %d\n", what, (int)status);
    exit(1);
}
#define CHECK_BLAS(call) check_blas(call, #call)

static void *take(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (p) return p;
    fprintf(stderr, "bench_cuda_prefill: out of memory\n");
    exit(1);
}

static void *take_device(size_t bytes) {
    void *p = NULL;
    CHECK(cudaMalloc(&p, bytes));
    return p;
}

static void *upload(const void *data, size_t bytes) {
    void *p = take_device(bytes);
    CHECK(cudaMemcpy(p, data, bytes, cudaMemcpyHostToDevice));
    return p;
}

/* bf16 numbers, mean 0, variance 1; or what in pages of fp8 is every other code at random, and factors to suit. */
static uint16_t *make_numbers(bool codes) {
    uint16_t *numbers = take(CHUNK / 2, 2);
    uint64_t z = 1;
    for (size_t i = 0; i < CHUNK / 2; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) {
            z = z * 6364136223846793005u + 1442695040888963407u;
            sum += (float)(z >> 40) / 16777216.0f - 0.5f;
        }
        sum *= 1.7320508f;
        uint32_t wide;
        memcpy(&wide, &sum, 4);
        numbers[i] = (uint16_t)(codes ? 0x7700 | (wide >> 8 & 0xff) | (wide >> 16 & 0x8000) : wide >> 16);
    }
    return numbers;
}

/* Device memory full of them. */
static void *take_random(const uint16_t *numbers, size_t bytes) {
    uint8_t *p = take_device(bytes);
    for (size_t at = 0; at < bytes; at += CHUNK) {
        CHECK(cudaMemcpy(p + at, numbers, bytes - at < CHUNK ? bytes - at : CHUNK, cudaMemcpyHostToDevice));
    }
    return p;
}

static int compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median of the times of single launches, in microseconds. */
static double time_launches(cudaError_t (*launch)(void *), void *ctx) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    float ms[LAUNCHES];
    for (int i = -3; i < LAUNCHES; i++) {
        CHECK(cudaEventRecord(begin, 0));
        CHECK(launch(ctx));
        CHECK(cudaEventRecord(end, 0));
        CHECK(cudaEventSynchronize(end));
        if (i >= 0) CHECK(cudaEventElapsedTime(&ms[i], begin, end));
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    qsort(ms, LAUNCHES, sizeof *ms, compare);
    return 1000.0 * (double)ms[LAUNCHES / 2];
}

/* ---- The ceiling ------------------------------------------------------------------------------------------------- */

typedef struct product {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout;
    cublasLtMatmulHeuristicResult_t best;
    void *a, *b, *c, *space;
    size_t space_bytes;
} product;

static cudaError_t launch_product(void *ctx) {
    product *p = ctx;
    float one = 1, zero = 0;
    CHECK_BLAS(cublasLtMatmul(p->handle, p->desc, &one, p->a, p->layout, p->b, p->layout, &zero, p->c, p->layout, p->c,
                              p->layout, &p->best.algo, p->space, p->space_bytes, 0));
    return cudaGetLastError();
}

static double matrix_rate(const uint16_t *numbers) {
    const uint64_t n = 8192;
    product p = { .space_bytes = 64u << 20 };
    p.a = take_random(numbers, n * n * 2);
    p.b = take_random(numbers, n * n * 2);
    p.c = take_device(n * n * 2);
    p.space = take_device(p.space_bytes);
    CHECK_BLAS(cublasLtCreate(&p.handle));
    CHECK_BLAS(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasOperation_t turned = CUBLAS_OP_T;
    CHECK_BLAS(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned));
    CHECK_BLAS(cublasLtMatrixLayoutCreate(&p.layout, CUDA_R_16BF, n, n, (int64_t)n));
    cublasLtMatmulPreference_t preference;
    CHECK_BLAS(cublasLtMatmulPreferenceCreate(&preference));
    CHECK_BLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &p.space_bytes, sizeof p.space_bytes));
    int found = 0;
    CHECK_BLAS(cublasLtMatmulAlgoGetHeuristic(p.handle, p.desc, p.layout, p.layout, p.layout, p.layout, preference, 1,
                                              &p.best, &found));
    double us = time_launches(launch_product, &p);
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatrixLayoutDestroy(p.layout);
    cublasLtMatmulDescDestroy(p.desc);
    cublasLtDestroy(p.handle);
    void *taken[] = { p.a, p.b, p.c, p.space };
    for (int i = 0; i < 4; i++) CHECK(cudaFree(taken[i]));
    return 2.0 * (double)n * (double)n * (double)n / us * 1e-6;
}

/* ---- Cases ------------------------------------------------------------------------------------------------------- */

typedef struct spec {
    const char *name;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t n_sequences, n_private, n_rows; /* of a sequence; the rows are the last private tokens */
    uint32_t n_chunks, n_pool, chunk_tokens; /* chunks of a sequence, of all */
} spec;

static const spec specs[] = {
    { "causal 2048 x 4", 32, 8, 128, 4, 2048, 2048, 0, 0, 0 },
    { "causal 8192", 32, 8, 128, 1, 8192, 8192, 0, 0, 0 },
    { "causal 16384", 32, 8, 128, 1, 16384, 16384, 0, 0, 0 },
    { "causal 8192, head_dim 64", 32, 8, 64, 1, 8192, 8192, 0, 0, 0 },
    { "64 rows, 16 chunks of 1024, B=16", 32, 8, 128, 16, 256, 64, 16, 64, 1024 },
    { "64 rows, 16 chunks of 1024, B=64", 32, 8, 128, 64, 256, 64, 16, 64, 1024 },
    { "64 rows, 64 chunks of 100, B=16", 32, 8, 128, 16, 256, 64, 64, 256, 100 },
    { "64 rows, 64 chunks of 100, B=64", 32, 8, 128, 64, 256, 64, 64, 256, 100 },
};

typedef struct problem {
    mp_cu_attend attend;
    void *taken[16];
    uint32_t n_taken, n_pages;
    size_t out_bytes;
    double flops;
} problem;

static const void *keep(problem *p, void *data) {
    return p->taken[p->n_taken++] = data;
}

/* n_cells cells, each with pages of its own, in shuffled order. */
static void make_cells(problem *p, uint32_t n_cells, const uint32_t *tokens) {
    mp_cu_cell *cells = take(n_cells, sizeof *cells);
    for (uint32_t i = 0; i < n_cells; i++) {
        cells[i] = (mp_cu_cell){ p->n_pages, tokens[i] };
        p->n_pages += (tokens[i] + PAGE - 1) / PAGE;
    }
    uint32_t *pages = take(p->n_pages, sizeof *pages);
    uint64_t z = 1;
    for (uint32_t i = 0; i < p->n_pages; i++) {
        z = z * 6364136223846793005u + 1442695040888963407u;
        uint32_t j = (uint32_t)((z >> 33) % (i + 1));
        pages[i] = pages[j];
        pages[j] = i;
    }
    p->attend.work.cells = keep(p, upload(cells, n_cells * sizeof *cells));
    p->attend.work.pages = keep(p, upload(pages, p->n_pages * sizeof *pages));
    free(cells);
    free(pages);
}

/* What the rows are, and what they see. Rows stand behind all chunks. */
static void make_work(problem *p, const spec *s, const uint16_t *numbers) {
    mp_cu_attend *a = &p->attend;
    uint32_t per_private = (s->n_private + MP_CU_CELL_TOKENS - 1) / MP_CU_CELL_TOKENS,
             n_refs = s->n_chunks + per_private;
    uint32_t n_rows = s->n_sequences * s->n_rows, n_cells = s->n_pool + s->n_sequences * per_private;
    uint32_t most = mp_cu_attend_block_rows(s->n_heads, s->n_kv_heads), per_sequence = (s->n_rows + most - 1) / most;
    uint32_t *tokens = take(n_cells, sizeof *tokens);
    mp_cu_ref *refs = take((size_t)s->n_sequences * n_refs, sizeof *refs), *ref = refs;
    mp_cu_row *rows = take(n_rows, sizeof *rows);
    mp_cu_block *blocks = take((size_t)s->n_sequences * per_sequence, sizeof *blocks);
    for (uint32_t i = 0; i < s->n_pool; i++) tokens[i] = s->chunk_tokens;
    uint32_t before = s->n_chunks * s->chunk_tokens, first_row = s->n_private - s->n_rows, n_blocks = 0;
    for (uint32_t b = 0; b < s->n_sequences; b++) {
        for (uint32_t i = 0; i < s->n_chunks; i++) {
            uint32_t cell = (b * 7 + i * (2 * b + 1)) % s->n_pool; /* odd steps: no chunk twice in a power of two */
            *ref++ = (mp_cu_ref){ ~0ull,
                                  cell,
                                  (int32_t)(i * s->chunk_tokens) - 1200,
                                  (int32_t)(i * s->chunk_tokens),
                                  0,
                                  (uint16_t)s->chunk_tokens,
                                  1 };
        }
        for (uint32_t i = 0; i < per_private; i++) {
            uint32_t left = s->n_private - i * MP_CU_CELL_TOKENS, cell = s->n_pool + b * per_private + i;
            tokens[cell] = left < MP_CU_CELL_TOKENS ? left : MP_CU_CELL_TOKENS;
            *ref++ = (mp_cu_ref){ ~0ull, cell, 0, (int32_t)(i * MP_CU_CELL_TOKENS), 0, (uint16_t)tokens[cell], 0 };
        }
        for (uint32_t i = 0; i < s->n_rows; i++) {
            uint32_t index = first_row + i;
            rows[b * s->n_rows + i] = (mp_cu_row){ .position = (int32_t)(before + index), .index = index };
            p->flops += 4.0 * s->n_heads * s->head_dim * (before + index + 1);
        }
    }
    for (int bit = 31; bit >= 0; bit--) { /* as the lists of a step have them: by the power of two of their keys */
        for (uint32_t i = 0; i < s->n_sequences * per_sequence; i++) {
            uint32_t b = i / per_sequence, row = i % per_sequence * most;
            uint32_t n = s->n_rows - row < most ? s->n_rows - row : most;
            if (31 - __builtin_clz(before + first_row + row + n) != bit) continue;
            blocks[n_blocks++] = (mp_cu_block){ b * s->n_rows + row, n, b * n_refs, n_refs };
        }
    }
    make_cells(p, n_cells, tokens);
    mp_cu_counts counts = { .n_rows = n_rows, .n_blocks = n_blocks };
    a->work.counts = (mp_cu_counts *)keep(p, upload(&counts, sizeof counts));
    a->work.rows = keep(p, upload(rows, n_rows * sizeof *rows));
    a->work.blocks = keep(p, upload(blocks, n_blocks * sizeof *blocks));
    a->work.refs = keep(p, upload(refs, (size_t)s->n_sequences * n_refs * sizeof *refs));
    a->max_blocks = n_blocks;
    size_t width = (size_t)s->n_heads * s->head_dim;
    a->q = keep(p, take_random(numbers, n_rows * width * 2));
    p->out_bytes = n_rows * width * 2;
    a->out = (mp_bf16 *)keep(p, take_device(p->out_bytes));
    free(tokens);
    free(refs);
    free(rows);
    free(blocks);
}

static void make_problem(problem *p, const spec *s, const uint16_t *numbers, uint32_t arch, uint32_t n_sm, bool fp8) {
    *p = (problem){ 0 };
    mp_cu_attend *a = &p->attend;
    a->head_dim = s->head_dim;
    a->n_heads = s->n_heads;
    a->n_kv_heads = s->n_kv_heads;
    a->page_size = PAGE;
    a->scale = 1.0f / sqrtf((float)s->head_dim);
    a->arch = arch;
    a->n_sm = n_sm;
    uint64_t turns[128];
    for (uint32_t i = 0; i < s->head_dim / 2; i++) {
        turns[i] = (uint64_t)(pow(10000.0, -2.0 * i / s->head_dim) / 6.283185307179586 * 18446744073709551616.0);
    }
    a->rope = (mp_cu_rope){ keep(p, upload(turns, sizeof turns)), s->head_dim / 2, true, 1.0f };
    make_work(p, s, numbers);
    a->fp8 = fp8;
    a->block_bytes = (size_t)PAGE * (fp8 ? 2 * s->head_dim + 8 : 4 * s->head_dim);
    a->page_bytes = a->block_bytes * s->n_kv_heads;
    uint16_t *codes = fp8 ? make_numbers(true) : NULL;
    a->slab = keep(p, take_random(fp8 ? codes : numbers, p->n_pages * a->page_bytes));
    free(codes);
}

/* Of the outputs: kernels that keep their promise have the same. */
static uint64_t hash_of(const void *device, size_t bytes) {
    uint64_t *data = take(bytes / 8, 8), hash = 0;
    CHECK(cudaMemcpy(data, device, bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < bytes / 8; i++) hash = (hash ^ data[i]) * 0x9e3779b97f4a7c15u + (hash >> 29);
    free(data);
    return hash;
}

static cudaError_t launch_prefill(void *ctx) {
    return mp_cu_attend_prefill(ctx, 0);
}

int main(int argc, char **argv) {
    const char *only = "";
    bool general = false, fp8 = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--general") == 0) {
            general = true;
        } else if (strcmp(argv[i], "--fp8") == 0) {
            fp8 = true;
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else {
            fprintf(stderr, "usage: bench_cuda_prefill [--general] [--fp8] [--only TEXT]\n");
            return 2;
        }
    }
    struct cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    uint16_t *numbers = make_numbers(false);
    uint32_t compiled;
    CHECK(mp_cu_kernels_arch(&compiled));
    double rate = matrix_rate(numbers);
    printf("%s, %d multiprocessors; bf16 product 8192^3: %.0f TFLOP/s\n", prop.name, prop.multiProcessorCount, rate);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        if (!strstr(specs[i].name, only)) continue;
        problem p;
        uint32_t arch = general ? 80 : mp_cu_code((uint32_t)(prop.major * 10 + prop.minor), compiled);
        make_problem(&p, &specs[i], numbers, arch, (uint32_t)prop.multiProcessorCount, fp8);
        double us = time_launches(launch_prefill, &p.attend), done = p.flops / us * 1e-6;
        printf("%-36s %8.1f us  %6.1f TFLOP/s  %5.1f %%  bits %016llx\n", specs[i].name, us, done, 100 * done / rate,
               (unsigned long long)hash_of(p.attend.out, p.out_bytes));
        for (uint32_t k = 0; k < p.n_taken; k++) CHECK(cudaFree(p.taken[k]));
    }
    return 0;
}
