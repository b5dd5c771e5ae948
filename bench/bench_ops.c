/* bench_ops: the CPU's matrix products against what the machine can do, measured in the same run with the same threads.
 *
 *   bench_ops [--threads N] [--isa NAME] [--rows N]... [--only TEXT]
 *
 * Ceilings: reading memory once through (for few rows, where weights must come from memory), and multiply-adds of
 * 16-bit integers from registers (for many rows). Each product has its own copies of the weights, more than the caches
 * hold, and passes over them in turn, as a decode step does. Neighbours on the cores disturb both sides, so samples are
 * short (a millisecond or so), ceilings and product alternate, and every figure is the best of many samples. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/kernels.h"
#include "backend/cpu/matmul.h"
#include "base/clock.h"
#include "base/mem.h"
#include "base/thread.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { SAMPLES = 100, MAX_COPIES = 1024 };
static const size_t SPAN = 160u << 20;        /* bytes of weights passed over in turn; the caches hold less */
static const size_t SAMPLE_BYTES = 16u << 20; /* of a sample, where memory is the limit */
static const double SAMPLE_MACS = 3e8;        /* of a sample, where arithmetic is: many rows get fewer outputs */
enum { MANY_ROWS = 64 };

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
    size_t at;     /* where in it */
    uint64_t sink; /* keeps results alive */
} bench;

/* Ceilings */

enum { READ_ITEM = 256 << 10 };

/* From two places at once, as the kernels do, in the widest loads everybody has, so that enough lines are under way. */
#if defined(__x86_64__)
__attribute__((target("avx2"))) static bool read_any(const uint8_t *p, const uint8_t *p2, size_t bytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < bytes; i += 64) {
        a = _mm256_or_si256(a, _mm256_loadu_si256((const __m256i *)(p + i)));
        b = _mm256_or_si256(b, _mm256_loadu_si256((const __m256i *)(p + i + 32)));
        c = _mm256_or_si256(c, _mm256_loadu_si256((const __m256i *)(p2 + i)));
        d = _mm256_or_si256(d, _mm256_loadu_si256((const __m256i *)(p2 + i + 32)));
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    return !_mm256_testz_si256(a, a);
}
#else
static bool read_any(const uint8_t *p, const uint8_t *p2, size_t bytes) {
    uint64_t any = 0;
    for (size_t i = 0; i < bytes; i += sizeof any) {
        uint64_t a, b;
        memcpy(&a, p + i, sizeof a);
        memcpy(&b, p2 + i, sizeof b);
        any |= a | b;
    }
    return any != 0;
}
#endif

static void read_item(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    bench *b = ctx;
    const uint8_t *p = b->span + b->at + (size_t)item * READ_ITEM;
    if (read_any(p, p + READ_ITEM / 2, READ_ITEM / 2)) b->sink = 1;
}

/* Reads the next SAMPLE_BYTES of the span. */
static double read_gb_s(bench *b) {
    b->at = (b->at + SAMPLE_BYTES) % SPAN;
    uint64_t start = mp_now_ns();
    mp_threads_run(b->threads, (uint32_t)(SAMPLE_BYTES / READ_ITEM), read_item, b);
    return (double)SAMPLE_BYTES / (double)(mp_now_ns() - start);
}

#if defined(__x86_64__)
enum { MAC_LOOPS = 20000, MAC_CHAINS = 12 };

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static int mac_avx512vnni(void) {
    __m512i acc[MAC_CHAINS], w = _mm512_set1_epi16(3);
    for (int i = 0; i < MAC_CHAINS; i++) acc[i] = _mm512_set1_epi32(i);
    for (int n = 0; n < MAC_LOOPS; n++) {
#pragma GCC unroll 16
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
#pragma GCC unroll 16
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

enum { SPIN_NS = 3000 };

static void spin_item(void *ctx, uint32_t item, uint32_t thread) {
    (void)ctx;
    (void)item;
    (void)thread;
    for (uint64_t end = mp_now_ns() + SPIN_NS; mp_now_ns() < end;) {
    }
}

/* A loop of one item a thread, each busy for SPIN_NS: what it takes beyond that. */
static double fork_join_us(bench *b) {
    enum { LOOPS = 100 };
    double best = 1e9;
    for (int sample = 0; sample < SAMPLES; sample++) {
        uint64_t start = mp_now_ns();
        for (int i = 0; i < LOOPS; i++) mp_threads_run(b->threads, mp_threads_count(b->threads), spin_item, NULL);
        double us = ((double)(mp_now_ns() - start) / LOOPS - SPIN_NS) / 1e3;
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

/* One product with its data. */
typedef struct trial {
    const shape *shape;
    uint32_t rows, n_out;
    uint8_t *memory; /* of all copies */
    size_t w_bytes;  /* of one */
    mp_packed *w[MAX_COPIES];
    uint32_t copies, n_w, at;
    uint32_t loops; /* products a sample */
    mp_qrows *q;
    float *x, *y;
    double read, mac, ns; /* the best so far; ns: of one product */
} trial;

static bool trial_open(bench *b, trial *t, const shape *s, uint32_t rows) {
    const mp_dtype_info *info = mp_dtype_find(s->type);
    *t = (trial){ .shape = s, .rows = rows, .n_out = s->n_out, .ns = 1e30 };
    if (rows >= MANY_ROWS) {
        uint32_t n_out = (uint32_t)(SAMPLE_MACS / s->n_in / rows) / 64 * 64;
        if (t->n_out > n_out) t->n_out = n_out;
        if (t->n_out < 256) t->n_out = 256; /* fewer would measure the quantization of the rows */
    }
    size_t bytes = (size_t)t->n_out * s->n_in / info->len * info->bytes;
    uint32_t copies = rows >= MANY_ROWS ? 1 : (uint32_t)(SPAN / bytes) + 1;
    if (copies > MAX_COPIES) copies = MAX_COPIES;
    t->loops = rows >= MANY_ROWS || bytes > SAMPLE_BYTES ? 1 : (uint32_t)(SAMPLE_BYTES / bytes);
    mp_tensor tensor = { .type = s->type, .n_dims = 2, .ne = { s->n_in, t->n_out, 1, 1 }, .bytes = bytes };
    void *data = draw_weights(s->type, bytes);
    tensor.data = data;
    t->x = mp_alloc((size_t)rows * s->n_in * sizeof *t->x);
    t->y = mp_alloc((size_t)rows * t->n_out * sizeof *t->y);
    t->w_bytes = mp_packed_size(&tensor);
    t->copies = copies;
    t->memory = mp_alloc_aligned(64, copies * t->w_bytes);
    bool ok = data && t->memory && t->x && t->y && mp_qrows_open(rows, s->n_in, &t->q, NULL) == MEPIC_OK;
    while (ok && t->n_w < copies) {
        ok = mp_packed_open(&tensor, b->threads, t->memory + t->n_w * t->w_bytes, &t->w[t->n_w], NULL) == MEPIC_OK;
        if (ok) t->n_w++;
    }
    mp_free(data);
    uint64_t seed = 2;
    for (size_t i = 0; ok && i < (size_t)rows * s->n_in; i++) t->x[i] = (float)draw(&seed) / 1073741824.0f - 1.0f;
    return ok;
}

static void trial_close(trial *t) {
    for (uint32_t i = 0; i < t->n_w; i++) mp_packed_close(t->w[i]);
    mp_free_aligned(t->memory, t->copies * t->w_bytes);
    mp_qrows_close(t->q);
    mp_free(t->x);
    mp_free(t->y);
}

static void trial_sample(bench *b, trial *t) {
    double read = t->rows < MANY_ROWS ? read_gb_s(b) : 0, mac = mac_g_s(b);
    if (read > t->read) t->read = read;
    if (mac > t->mac) t->mac = mac;
    uint64_t start = mp_now_ns();
    for (uint32_t i = 0; i < t->loops; i++) {
        const mp_packed *w = t->w[t->at++ % t->n_w];
        mp_qrows_set(t->q, b->kernels, b->threads, t->x, t->rows, t->shape->n_in);
        mp_matmul(b->kernels, b->threads, &w, 1, t->q, &t->y, false);
    }
    double ns = (double)(mp_now_ns() - start) / t->loops;
    if (ns < t->ns) t->ns = ns;
}

static void print_row(const trial *t) {
    const shape *s = t->shape;
    double gb_s = (double)t->w_bytes / t->ns;
    double g_s = (double)t->n_out * s->n_in * t->rows / t->ns;
    printf("%-13s %-12s %-5s %6u %5u %5u %11.1f %8.1f", s->model, s->what, mp_dtype_name(s->type), t->n_out, s->n_in,
           t->rows, t->ns / 1e3, g_s);
    if (t->mac > 0) printf(" %5.0f%%", 100 * g_s / t->mac);
    if (t->read > 0) printf(" %8.1f %5.0f%%", gb_s, 100 * gb_s / t->read);
    printf("\n");
    fflush(stdout);
}

static int run(bench *b, const uint32_t *rows, int n_rows, const char *only) {
    printf("isa %s, %u threads, fork and join %.2f us\n", b->kernels->isa, mp_threads_count(b->threads),
           fork_join_us(b));
    printf("%-13s %-12s %-5s %6s %5s %5s %11s %8s %6s %8s %6s\n", "model", "product", "type", "out", "in", "rows", "us",
           "GMAC/s", "peak", "GB/s", "read");
    static trial t;
    for (int r = 0; r < n_rows; r++) {
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const shape *s = &shapes[i];
            if (only && !strstr(s->model, only) && strcmp(mp_dtype_name(s->type), only) != 0) continue;
            bool ok = trial_open(b, &t, s, rows[r]);
            for (int sample = 0; ok && sample < SAMPLES; sample++) trial_sample(b, &t);
            if (ok) print_row(&t);
            trial_close(&t);
            if (ok) continue;
            fprintf(stderr, "bench_ops: out of memory at %s [%u, %u]\n", mp_dtype_name(s->type), s->n_out, s->n_in);
            return 1;
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
