/* bench_ops: the CPU's matrix products against what the machine can do, measured in the same run with the same threads.
 *
 *   bench_ops [--threads N] [--isa NAME] [--rows N]... [--only TEXT]
 *
 * Ceilings: reading memory once through (for few rows, where weights must come from memory), and multiply-adds of 16-bit
 * integers from registers (for many rows). Each product has its own copies of the weights, more than the caches hold, and
 * passes over them in turn, as a decode step does. A neighbour on the cores disturbs both sides: every figure is the best
 * of several rounds in which ceilings and product alternate. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/kernels.h"
#include "backend/cpu/matmul.h"
#include "base/clock.h"
#include "base/mem.h"
#include "base/thread.h"

enum { ROUNDS = 7, MAX_COPIES = 512 };
static const size_t SPAN = 160u << 20; /* bytes of weights a round passes over; the caches hold less */

typedef struct shape {
    const char *model, *what;
    mp_dtype type;
    uint32_t n_out, n_in;
} shape;

static const shape shapes[] = {
    { "smollm2-135m", "attn q, out", MP_DTYPE_Q4_1, 576, 576 },
    { "smollm2-135m", "gate, up", MP_DTYPE_Q4_1, 1536, 576 },
    { "smollm2-135m", "down", MP_DTYPE_Q4_1, 576, 1536 },
    { "smollm2-135m", "logits", MP_DTYPE_Q8_0, 49152, 576 },
    { "qwen2.5-0.5b", "attn q, out", MP_DTYPE_Q5_0, 896, 896 },
    { "qwen2.5-0.5b", "gate, up", MP_DTYPE_Q5_0, 4864, 896 },
    { "qwen2.5-0.5b", "down", MP_DTYPE_Q4_K, 896, 4864 },
    { "qwen2.5-0.5b", "down", MP_DTYPE_Q6_K, 896, 4864 },
    { "qwen2.5-0.5b", "logits", MP_DTYPE_Q8_0, 151936, 896 },
    { "qwen2.5-1.5b", "gate, up", MP_DTYPE_Q4_K, 8960, 1536 },
    { "qwen2.5-1.5b", "down", MP_DTYPE_Q5_K, 1536, 8960 },
    { "", "", MP_DTYPE_Q4_0, 4096, 4096 },
    { "", "", MP_DTYPE_Q5_1, 4096, 4096 },
    { "", "", MP_DTYPE_BF16, 2048, 2048 },
    { "", "", MP_DTYPE_F32, 2048, 2048 },
};

typedef struct bench {
    const mp_cpu_kernels *kernels;
    mp_threads *threads;
    uint8_t *span; /* SPAN bytes for the ceiling */
    uint64_t sink; /* keeps results alive */
} bench;

/* Ceilings */

enum { READ_ITEM = 256 << 10 };

static void read_item(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    bench *b = ctx;
    const uint64_t *p = (const uint64_t *)(b->span + (size_t)item * READ_ITEM);
    uint64_t sum[8] = { 0 };
    for (size_t i = 0; i < READ_ITEM / sizeof *p; i += 8) {
        for (int j = 0; j < 8; j++) sum[j] |= p[i + (size_t)j];
    }
    for (int j = 1; j < 8; j++) sum[0] |= sum[j];
    if (sum[0]) b->sink = 1;
}

static double read_gb_s(bench *b) {
    uint64_t start = mp_now_ns();
    mp_threads_run(b->threads, (uint32_t)(SPAN / READ_ITEM), read_item, b);
    return (double)SPAN / (double)(mp_now_ns() - start);
}

#if defined(__x86_64__)
#include <immintrin.h>

enum { MAC_LOOPS = 20000, MAC_CHAINS = 12 };

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static int mac_avx512vnni(void) {
    __m512i acc[MAC_CHAINS], w = _mm512_set1_epi16(3);
    for (int i = 0; i < MAC_CHAINS; i++) acc[i] = _mm512_set1_epi32(i);
    for (int n = 0; n < MAC_LOOPS; n++) {
        for (int i = 0; i < MAC_CHAINS; i++) acc[i] = _mm512_dpwssd_epi32(acc[i], w, w);
        __asm__ volatile("" : "+v"(w));
    }
    for (int i = 1; i < MAC_CHAINS; i++) acc[0] = _mm512_xor_si512(acc[0], acc[i]);
    return _mm512_reduce_add_epi32(acc[0]);
}

__attribute__((target("avx2"))) static int mac_avx2(void) {
    __m256i acc[MAC_CHAINS], w = _mm256_set1_epi16(3);
    for (int i = 0; i < MAC_CHAINS; i++) acc[i] = _mm256_set1_epi32(i);
    for (int n = 0; n < MAC_LOOPS; n++) {
        for (int i = 0; i < MAC_CHAINS; i++) {
            acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(w, w));
            __asm__ volatile("" : "+x"(w));
        }
    }
    for (int i = 1; i < MAC_CHAINS; i++) acc[0] = _mm256_xor_si256(acc[0], acc[i]);
    return _mm_cvtsi128_si32(_mm256_castsi256_si128(acc[0]));
}

static void mac_item(void *ctx, uint32_t item, uint32_t thread) {
    (void)item;
    (void)thread;
    bench *b = ctx;
    if ((strcmp(b->kernels->isa, "avx512-vnni") == 0 ? mac_avx512vnni() : mac_avx2()) == 1) b->sink = 1;
}

/* 0: not known for this instruction set. */
static double mac_g_s(bench *b) {
    bool wide = strcmp(b->kernels->isa, "avx512-vnni") == 0;
    if (!wide && strcmp(b->kernels->isa, "avx2") != 0) return 0;
    uint32_t n = mp_threads_count(b->threads) * 16;
    uint64_t start = mp_now_ns();
    mp_threads_run(b->threads, n, mac_item, b);
    return (double)n * MAC_LOOPS * MAC_CHAINS * (wide ? 32 : 16) / (double)(mp_now_ns() - start);
}
#else
static double mac_g_s(bench *b) {
    (void)b;
    return 0;
}
#endif

static void nothing(void *ctx, uint32_t item, uint32_t thread) {
    (void)ctx;
    (void)item;
    (void)thread;
}

static double fork_join_us(bench *b) {
    enum { N = 2000 };
    double best = 1e9;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t start = mp_now_ns();
        for (int i = 0; i < N; i++) mp_threads_run(b->threads, mp_threads_count(b->threads), nothing, NULL);
        double us = (double)(mp_now_ns() - start) / N / 1e3;
        if (us < best) best = us;
    }
    return best;
}

/* Products */

static uint32_t draw(uint64_t *s) {
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*s >> 33);
}

/* Random bytes with the scales' exponents cleared: any value does, as long as no NaN slows or hides anything. */
static void *draw_weights(mp_dtype type, size_t bytes) {
    uint8_t *p = mp_alloc(bytes);
    if (!p) return NULL;
    uint64_t seed = 1;
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(draw(&seed) & (mp_dtype_find(type)->len == 1 ? 0x3f : 0x33));
    return p;
}

static void print_row(const shape *s, uint32_t rows, double us, double gb_s, double g_s, double read, double mac) {
    printf("%-13s %-12s %-5s %6u %5u %5u %11.1f %8.1f %5.0f%% %8.1f", s->model, s->what, mp_dtype_name(s->type),
           s->n_out, s->n_in, rows, us, gb_s, 100 * gb_s / read, g_s);
    if (mac > 0) printf(" %5.0f%%", 100 * g_s / mac);
    printf("\n");
    fflush(stdout);
}

static bool run_shape(bench *b, const shape *s, uint32_t rows) {
    const mp_dtype_info *info = mp_dtype_find(s->type);
    size_t weights = (size_t)s->n_out * s->n_in, bytes = weights / info->len * info->bytes;
    uint32_t copies = (uint32_t)(SPAN / bytes) + 1, used = copies;
    if (rows >= 64)
        used = 1 + (uint32_t)(2000000000 / ((double)weights * rows)); /* a hundredth of a second is enough */
    if (used > copies) used = copies;
    if (used > MAX_COPIES) used = MAX_COPIES;
    static mp_packed *w[MAX_COPIES];
    mp_qrows *q = NULL;
    mp_tensor tensor = { .type = s->type, .n_dims = 2, .ne = { s->n_in, s->n_out, 1, 1 }, .bytes = bytes };
    tensor.data = draw_weights(s->type, bytes);
    float *x = mp_alloc((size_t)rows * s->n_in * sizeof *x), *y = mp_alloc((size_t)rows * s->n_out * sizeof *y);
    bool ok = tensor.data && x && y && mp_qrows_open(rows, s->n_in, &q, NULL) == MEPIC_OK;
    uint32_t n = 0;
    for (; ok && n < used; n++) ok = mp_packed_open(&tensor, b->threads, &w[n], NULL) == MEPIC_OK;
    uint64_t seed = 2;
    for (size_t i = 0; ok && i < (size_t)rows * s->n_in; i++) x[i] = (float)draw(&seed) / 1073741824.0f - 1.0f;
    double read = 0, mac = 0, ns = 1e30;
    for (int round = 0; ok && round < ROUNDS; round++) {
        double r = rows < 64 ? read_gb_s(b) : 1, m = mac_g_s(b);
        if (r > read) read = r;
        if (m > mac) mac = m;
        uint64_t start = mp_now_ns();
        for (uint32_t i = 0; i < n; i++) {
            mp_qrows_set(q, b->kernels, b->threads, x, rows, s->n_in);
            mp_matmul(b->kernels, b->threads, (const mp_packed *const[]){ w[i] }, 1, q, (float *[]){ y }, false);
        }
        double each = (double)(mp_now_ns() - start) / n;
        if (each < ns) ns = each;
    }
    if (ok) print_row(s, rows, ns / 1e3, (double)mp_packed_bytes(w[0]) / ns, (double)weights * rows / ns, read, mac);
    for (uint32_t i = 0; i < n; i++) mp_packed_close(w[i]);
    mp_qrows_close(q);
    mp_free(x);
    mp_free(y);
    mp_free((void *)(uintptr_t)tensor.data);
    return ok;
}

static int run(bench *b, const uint32_t *rows, int n_rows, const char *only) {
    printf("isa %s, %u threads: reads %.1f GB/s, %.0f G multiply-adds/s, empty fork and join %.2f us\n",
           b->kernels->isa, mp_threads_count(b->threads), read_gb_s(b), mac_g_s(b), fork_join_us(b));
    printf("%-13s %-12s %-5s %6s %5s %5s %11s %8s %6s %8s %6s\n", "model", "product", "type", "out", "in", "rows", "us",
           "GB/s", "read", "GMAC/s", "peak");
    for (int r = 0; r < n_rows; r++) {
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const shape *s = &shapes[i];
            if (only && !strstr(s->model, only) && strcmp(mp_dtype_name(s->type), only) != 0) continue;
            if (rows[r] >= 64 && s->n_out > 40000) continue; /* logits are computed for a few rows only */
            if (!run_shape(b, s, rows[r])) {
                fprintf(stderr, "bench_ops: out of memory at %s [%u, %u]\n", mp_dtype_name(s->type), s->n_out, s->n_in);
                return 1;
            }
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    uint32_t rows[8] = { 1, 4, 512 }, threads = 0;
    int n_rows = 0;
    const char *isa = NULL, *only = NULL;
    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        uint32_t number = (uint32_t)strtoul(value, NULL, 10);
        if (strcmp(argv[i], "--threads") == 0 && number > 0) {
            threads = number;
        } else if (strcmp(argv[i], "--rows") == 0 && number > 0 && n_rows < 8) {
            rows[n_rows++] = number;
        } else if (strcmp(argv[i], "--isa") == 0 && *value) {
            isa = value;
        } else if (strcmp(argv[i], "--only") == 0 && *value) {
            only = value;
        } else {
            fprintf(stderr, "usage: bench_ops [--threads N] [--isa NAME] [--rows N]... [--only MODEL or TYPE]\n");
            return 2;
        }
    }
    bench b = { 0 };
    mepic_error err = { 0 };
    int status = 1;
    if (mp_cpu_kernels_find(isa, &b.kernels, &err) != MEPIC_OK ||
        mp_threads_open(threads, &b.threads, &err) != MEPIC_OK) {
        fprintf(stderr, "bench_ops: %s\n", err.message);
        return 2;
    }
    b.span = mp_alloc_aligned(4096, SPAN);
    if (b.span) {
        for (size_t i = 0; i < SPAN; i += 64) b.span[i] = 1; /* pages that nobody wrote to are all the same page */
        status = run(&b, rows, n_rows ? n_rows : 3, only);
    }
    mp_free_aligned(b.span, SPAN);
    mp_threads_close(b.threads);
    return status;
}
