#include "backend/cuda/matmul.h"

#include <cublasLt.h>
#include <math.h>
#include <string.h>

#include "backend/cuda/few_rows.h"
#include "base/hash.h"
#include "base/mem.h"

enum {
    MAX_MEASURED = 8192, /* rows; what is larger takes the algorithm of this bucket */
    MAX_BUCKETS = 24,
    MAX_FOUND = 12,      /* algorithms asked for at once */
    MAX_CANDIDATES = 48, /* measured in a bucket */
    MAX_JOINED = 192,    /* with those of other buckets */
    MAX_TRIED = 16,      /* bits of a shape */
    FEW_ROWS = 256,      /* up to here a product is bound by its weights, and an algorithm for one count suits others */
    PATTERN_ROWS = 64,   /* rows of random x before they repeat; a power of two */
    COMPARED_MIN = 8,    /* of them at least are compared; and as many outputs, */
    COMPARED = 1 << 18,  /* since of two orders of adding few results differ once they are rounded to bf16 */
};
static const size_t WORKSPACE = (size_t)4 << 20;
static const size_t FLUSH =
    (size_t)128 << 20; /* more than L2 holds, and long enough that launches queue up behind it */

/* The library's, or one of our own kernels for few rows. */
typedef struct algorithm {
    cublasLtMatmulAlgo_t lt;
    bool own;            /* and not lt */
    mp_cu_few_plan plan; /* of our own for bf16 */
} algorithm;

typedef struct candidate {
    algorithm algo;
    uint64_t hash;         /* of the compared rows' results, once hashed; 0: they depend on where a row stands */
    float once, us;        /* a short measurement; a longer one, where that was not far behind */
    bool can, hashed;      /* do this number of rows */
    bool loaded, hopeless; /* hopeless: far behind with fewer rows. Not timed, but there for its bits */
    bool timed;
} candidate;

typedef struct bucket {
    uint32_t rows, n_candidates;
    bool joined; /* it has the other buckets' candidates, too, for their bits */
    candidate candidates[MAX_JOINED];
} bucket;

typedef struct product {
    mp_cu_shape shape;
    uint64_t hash; /* of results of its first weights; 0: its algorithms differ */
    uint32_t n_buckets;
    struct {
        algorithm algo;
        uint32_t pad; /* rows to compute at least */
        mp_cu_measured measured;
    } buckets[MAX_BUCKETS];
} product;

struct mp_cu_matmul {
    mp_cu_device *device;
    cublasLtHandle_t handle;
    mp_cu_few_rows few_rows;
    void *workspace;
    bool same_bits;
    uint32_t n_products;
    product *products;
};

/* While measuring. */
typedef struct scratch {
    void *x, *out, *flush; /* x: bf16 */
    mp_cu_matrix codes;    /* the same in e4m3, where a shape wants it */
    mp_cu_matrix in;       /* x of the shape at hand: one or the other */
    uint32_t n_compared;   /* rows of its results */
    void *rows, *before;   /* rows of out, as many as are compared; what they hold before a run that adds */
    uint8_t *host;         /* rows again */
    cudaEvent_t start[MAX_CANDIDATES], stop[MAX_CANDIDATES];
    bucket buckets[MAX_BUCKETS];
} scratch;

uint32_t mp_cu_bucket(uint32_t n_rows) {
    uint32_t power = 1;
    while (power < n_rows) power *= 2;
    return power >= 96 && n_rows <= power / 4 * 3 ? power / 4 * 3 : power;
}

static uint32_t bucket_index(uint32_t n_rows) {
    uint32_t i = 0;
    for (uint32_t b = 1; b < n_rows; b = mp_cu_bucket(b + 1)) i++;
    return i;
}

static bool try_cublas(mp_cu_device *d, cublasStatus_t status, const char *what, int line) {
    return mp_cu_check(d, status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown, what, __FILE__, line);
}
#define CUBLAS_TRY(device, call) try_cublas(device, call, #call, __LINE__)

bool mp_cu_matmul_has_e4m3(const mp_cu_device *device) {
    return device->arch == 90;
}

/* ---- One product ------------------------------------------------------------------------------------------------- */

static size_t out_size(mp_cu_out out) {
    return out == MP_CU_OUT_BF16 ? sizeof(mp_bf16) : sizeof(float);
}

/* The library counts columns first: what it multiplies is w (transposed) by x, giving out [n_out, rows]. */
typedef struct call {
    cublasLtMatmulDescOpaque_t what;
    cublasLtMatrixLayoutOpaque_t w, x, out;
} call;

static bool set(mp_cu_device *d, call *c, cublasLtMatmulDescAttributes_t name, const void *value, size_t size) {
    return CUBLAS_TRY(d, cublasLtMatmulDescSetAttribute(&c->what, name, value, size));
}

static bool describe(mp_cu_device *d, const mp_cu_shape *s, uint32_t rows, mp_cu_matrix x, mp_cu_matrix w, call *c) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t in = s->e4m3 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    cudaDataType_t out = s->out == MP_CU_OUT_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    bool ok = CUBLAS_TRY(d, cublasLtMatmulDescInit(&c->what, CUBLAS_COMPUTE_32F, CUDA_R_32F)) &&
              set(d, c, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) &&
              CUBLAS_TRY(d, cublasLtMatrixLayoutInit(&c->w, in, s->n_in, s->n_out, s->n_in)) &&
              CUBLAS_TRY(d, cublasLtMatrixLayoutInit(&c->x, in, s->n_in, rows, s->n_in)) &&
              CUBLAS_TRY(d, cublasLtMatrixLayoutInit(&c->out, out, s->n_out, rows, s->n_out));
    if (!ok || !s->e4m3) return ok;
    const int32_t row_scales = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const int8_t fast = 0; /* sums of 128 are added in fp32: the tensor cores' own sums are 15 times less exact */
    return set(d, c, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &row_scales, sizeof row_scales) &&
           set(d, c, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &row_scales, sizeof row_scales) &&
           set(d, c, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w.scales, sizeof w.scales) &&
           set(d, c, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x.scales, sizeof x.scales) &&
           set(d, c, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast);
}

static bool multiply(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const algorithm *algo, mp_cu_matrix x,
                     mp_cu_matrix w, void *out, cudaStream_t stream) {
    if (algo->own && s->e4m3) {
        return CUDA_TRY(m->device,
                        mp_cu_few_rows_e4m3_run(&m->few_rows, s->n_out, s->n_in, rows, s->out, x, w, out, stream));
    }
    if (algo->own) {
        return CUDA_TRY(m->device, mp_cu_few_rows_run(&m->few_rows, &algo->plan, s->n_out, s->n_in, rows, s->out,
                                                      x.data, w.data, out, stream));
    }
    const float one = 1.0f, keep = s->out == MP_CU_OUT_ADD_F32 ? 1.0f : 0.0f;
    call c;
    return describe(m->device, s, rows, x, w, &c) &&
           CUBLAS_TRY(m->device, cublasLtMatmul(m->handle, &c.what, &one, w.data, &c.w, x.data, &c.x, &keep, out,
                                                &c.out, out, &c.out, &algo->lt, m->workspace, WORKSPACE, stream));
}

bool mp_cu_matmul_run(mp_cu_matmul *m, uint32_t i, uint32_t n_rows, mp_cu_matrix x, mp_cu_matrix w, void *out,
                      cudaStream_t stream) {
    const product *p = &m->products[i];
    uint32_t b = bucket_index(n_rows);
    if (b >= p->n_buckets) b = p->n_buckets - 1;
    if (n_rows < p->buckets[b].pad) n_rows = p->buckets[b].pad;
    return multiply(m, &p->shape, n_rows, &p->buckets[b].algo, x, w, out, stream);
}

/* ---- Measuring --------------------------------------------------------------------------------------------------- */

static uint16_t random_bf16(uint64_t *state) {
    *state = mp_hash64(*state, NULL, 0);
    float f = (float)(int32_t)(*state >> 32) * 0x1p-31f; /* -1 to 1 */
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* x of a shape: PATTERN_ROWS random rows, repeated. In e4m3 all have one scale, so that any row may be the first. */
static bool fill_x(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, scratch *t) {
    size_t row = s->n_in, n = row * (rows < PATTERN_ROWS ? rows : PATTERN_ROWS), total = row * rows;
    uint16_t *host = mp_alloc(n * sizeof *host);
    if (!host) return CUDA_TRY(m->device, cudaErrorMemoryAllocation);
    uint64_t state = 1;
    for (size_t i = 0; i < n; i++) host[i] = random_bf16(&state);
    mp_cu_device *d = m->device;
    bool ok = CUDA_TRY(d, cudaMemcpyAsync(t->x, host, n * sizeof *host, cudaMemcpyHostToDevice, d->stream));
    for (size_t done = n; ok && done < total;) {
        size_t more = done < total - done ? done : total - done;
        ok = CUDA_TRY(d, cudaMemcpyAsync((mp_bf16 *)t->x + done, t->x, more * sizeof(mp_bf16), cudaMemcpyDeviceToDevice,
                                         d->stream));
        done += more;
    }
    t->in = s->e4m3 ? t->codes : (mp_cu_matrix){ t->x, NULL };
    if (ok && s->e4m3) {
        ok = CUDA_TRY(d, mp_cu_quantize(rows, t->x, s->n_in, t->codes, d->stream)) &&
             CUDA_TRY(d, cudaMemsetAsync(t->codes.scales, 0x3d, rows * sizeof(float), d->stream));
    }
    ok = ok && CUDA_TRY(d, cudaStreamSynchronize(d->stream));
    mp_free(host);
    return ok;
}

static uint32_t n_compared(const mp_cu_shape *s, uint32_t most_rows) {
    uint32_t n = PATTERN_ROWS;
    while (n > COMPARED_MIN && (size_t)n * s->n_out > COMPARED) n /= 2;
    while (n > most_rows) n /= 2;
    return n;
}

/* Results of `rows` rows with the first weights, x from row `first` on: rows [at, at + n) of them to t->rows, from its
 * row `to` on. */
static bool run_rows(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const algorithm *algo, scratch *t,
                     uint32_t first, uint32_t at, uint32_t n, uint32_t to) {
    mp_cu_device *d = m->device;
    size_t bytes = s->n_out * out_size(s->out);
    uint8_t *out = (uint8_t *)t->out + at * bytes;
    mp_cu_matrix x = t->in;
    x.data = (uint8_t *)x.data + (size_t)first * s->n_in * (s->e4m3 ? 1 : sizeof(mp_bf16));
    bool ok =
        s->out != MP_CU_OUT_ADD_F32 || CUDA_TRY(d, cudaMemcpyAsync(out, (uint8_t *)t->before + first * bytes, n * bytes,
                                                                   cudaMemcpyDeviceToDevice, d->stream));
    return ok && multiply(m, s, rows, algo, x, s->weights[0], t->out, d->stream) &&
           CUDA_TRY(d, cudaMemcpyAsync((uint8_t *)t->rows + to * bytes, out, n * bytes, cudaMemcpyDeviceToDevice,
                                       d->stream));
}

static bool hash_results(mp_cu_matmul *m, size_t bytes, scratch *t, uint64_t *out) {
    mp_cu_device *d = m->device;
    bool ok = CUDA_TRY(d, cudaMemcpyAsync(t->host, t->rows, bytes, cudaMemcpyDeviceToHost, d->stream)) &&
              CUDA_TRY(d, cudaStreamSynchronize(d->stream));
    *out = mp_hash64(0, t->host, ok ? bytes : 0);
    return ok;
}

/* Hashes what the compared rows give, so many at a time as the bucket has, and at another place where it has more. */
static bool hash_rows(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const algorithm *algo, scratch *t,
                      uint64_t *out) {
    size_t bytes = s->n_out * out_size(s->out);
    uint32_t n = t->n_compared, last = rows > n ? (rows - n) / PATTERN_ROWS * PATTERN_ROWS : 0;
    uint64_t there;
    for (uint32_t first = 0, part; first < n; first += part) {
        part = n - first < rows ? n - first : rows;
        if (!run_rows(m, s, rows, algo, t, first, 0, part, first)) return false;
    }
    if (!hash_results(m, n * bytes, t, out)) return false;
    if (last == 0) return true;
    if (!run_rows(m, s, rows, algo, t, 0, last, n, 0) || !hash_results(m, n * bytes, t, &there)) return false;
    if (there != *out) *out = 0;
    return true;
}

/* Times those candidates of a bucket that are to be timed, in microseconds a run: n of them queued behind a write that
 * empties the cache. The host waits once for all: where others use the device, too, each wait is a turn of theirs. */
static bool time_candidates(mp_cu_matmul *m, const mp_cu_shape *s, bucket *b, uint32_t n, scratch *t) {
    mp_cu_device *d = m->device;
    bool ok = true;
    uint32_t n_timed = 0;
    for (uint32_t i = 0; ok && i < b->n_candidates; i++) {
        if (!b->candidates[i].timed) continue;
        ok = CUDA_TRY(d, cudaMemsetAsync(t->flush, 0, FLUSH, d->stream)) &&
             CUDA_TRY(d, cudaEventRecord(t->start[n_timed], d->stream));
        for (uint32_t k = 0; ok && k < n; k++) {
            const mp_cu_matrix w = s->weights[(k + 1) % s->n_weights];
            ok = multiply(m, s, b->rows, &b->candidates[i].algo, t->in, w, t->out, d->stream);
        }
        ok = ok && CUDA_TRY(d, cudaEventRecord(t->stop[n_timed++], d->stream));
    }
    ok = ok && CUDA_TRY(d, cudaStreamSynchronize(d->stream));
    n_timed = 0;
    for (uint32_t i = 0; ok && i < b->n_candidates; i++) {
        float ms;
        if (!b->candidates[i].timed) continue;
        ok = CUDA_TRY(d, cudaEventElapsedTime(&ms, t->start[n_timed], t->stop[n_timed]));
        n_timed++;
        if (ok) b->candidates[i].us = ms * 1000.0f / (float)n;
    }
    return ok;
}

/* An algorithm that has no such attribute does not split, or its bits will tell. */
static bool splits_k(const cublasLtMatmulAlgo_t *algo) {
    int32_t parts = 1;
    size_t written;
    cublasStatus_t status =
        cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts, &written);
    return status == CUBLAS_STATUS_SUCCESS && parts > 1;
}

/* NULL: it is there, or has no room among `most`. */
static candidate *add_candidate(bucket *b, const algorithm *algo, uint32_t most) {
    for (uint32_t i = 0; i < b->n_candidates; i++) {
        const algorithm *other = &b->candidates[i].algo;
        if (other->own == algo->own && memcmp(&other->lt, &algo->lt, sizeof algo->lt) == 0 &&
            memcmp(&other->plan, &algo->plan, sizeof algo->plan) == 0) {
            return NULL;
        }
    }
    if (b->n_candidates >= most) return NULL;
    candidate *k = &b->candidates[b->n_candidates++];
    *k = (candidate){ .algo = *algo };
    return k;
}

/* Adds what the library proposes for `rows` rows. */
static bool find_algorithms(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const scratch *t, bucket *b) {
    mp_cu_device *d = m->device;
    const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE, align = 16;
    cublasLtMatmulPreferenceOpaque_t wish;
    cublasLtMatmulHeuristicResult_t found[MAX_FOUND];
    call c;
    int n = 0;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t size;
    } wishes[] = {
        { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE, sizeof WORKSPACE },
        { CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction, sizeof no_reduction },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align, sizeof align },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof align },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align, sizeof align },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align, sizeof align },
    };
    bool ok = describe(d, s, rows, t->in, s->weights[0], &c) && CUBLAS_TRY(d, cublasLtMatmulPreferenceInit(&wish));
    for (size_t i = 0; ok && i < sizeof wishes / sizeof *wishes; i++) {
        ok =
            CUBLAS_TRY(d, cublasLtMatmulPreferenceSetAttribute(&wish, wishes[i].name, wishes[i].value, wishes[i].size));
    }
    if (!ok) return false;
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(m->handle, &c.what, &c.w, &c.x, &c.out, &c.out, &wish, MAX_FOUND, found, &n);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return true; /* choose says it better */
    for (int i = 0; i < n; i++) {
        if (found[i].state == CUBLAS_STATUS_SUCCESS && !splits_k(&found[i].algo)) {
            add_candidate(b, &(algorithm){ .lt = found[i].algo }, MAX_CANDIDATES);
        }
    }
    return CUBLAS_TRY(d, status);
}

/* Adds our own kernel: for e4m3, or for bf16 with stages of several sizes. */
static void add_own(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, bucket *b) {
    if (s->library_only) return;
    if (s->e4m3 && m->few_rows.describe && rows <= MP_CU_FEW_ROWS_MAX) {
        add_candidate(b, &(algorithm){ .own = true }, MAX_CANDIDATES);
    }
    for (uint32_t stage = 16384; stage <= 65536 && !s->e4m3; stage += stage / 2) {
        algorithm a = { .own = true, .plan = mp_cu_few_rows_plan(&m->few_rows, s->n_out, s->n_in, rows, stage) };
        if (a.plan.rows) add_candidate(b, &a, MAX_CANDIDATES);
    }
}

/* Whether an algorithm, found for another number of rows, can do this one. */
static bool can(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const algorithm *algo, const scratch *t) {
    if (algo->own) return rows <= (s->e4m3 ? MP_CU_FEW_ROWS_MAX : algo->plan.rows);
    cublasLtMatmulHeuristicResult_t result;
    call c;
    if (!describe(m->device, s, rows, t->in, s->weights[0], &c)) return false;
    cublasStatus_t status = cublasLtMatmulAlgoCheck(m->handle, &c.what, &c.w, &c.x, &c.out, &c.out, &algo->lt, &result);
    return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE;
}

/* Of the library's candidates, or of our own: should their bits differ, the fastest of both must be known. */
static float fastest_time(const bucket *b, bool own) {
    float best = INFINITY;
    for (uint32_t i = 0; i < b->n_candidates; i++) {
        if (b->candidates[i].algo.own == own) best = fminf(best, b->candidates[i].us);
    }
    return best;
}

/* The first launch of an algorithm loads its kernel: that is not its time. Few rows do for that. */
static bool load_kernel(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, const algorithm *algo, scratch *t) {
    if (rows > FEW_ROWS) rows = FEW_ROWS;
    return !can(m, s, rows, algo, t) || multiply(m, s, rows, algo, t->in, s->weights[0], t->out, m->device->stream);
}

/* Times the candidates of a bucket: all shortly, those not far behind again. */
static bool measure_bucket(mp_cu_matmul *m, const mp_cu_shape *s, bucket *b, scratch *t) {
    bool ok = true;
    for (uint32_t i = 0; ok && i < b->n_candidates; i++) {
        candidate *k = &b->candidates[i];
        k->us = INFINITY;
        k->hashed = false;
        k->can = can(m, s, b->rows, &k->algo, t);
        k->timed = k->can && !k->hopeless;
        if (!k->timed || k->loaded) continue;
        ok = load_kernel(m, s, b->rows, &k->algo, t);
        k->loaded = true;
    }
    ok = ok && time_candidates(m, s, b, b->rows <= FEW_ROWS ? 3 : 1, t);
    float best[] = { fastest_time(b, false), fastest_time(b, true) }, least = fminf(best[0], best[1]);
    for (uint32_t i = 0; i < b->n_candidates; i++) {
        candidate *k = &b->candidates[i];
        k->once = k->us;
        k->timed = k->timed && k->us <= 1.3f * best[k->algo.own];
    }
    return ok && time_candidates(m, s, b, least < 20 ? 24 : least < 100 ? 8 : least < 500 ? 2 : 1, t);
}

/* ---- Choosing ---------------------------------------------------------------------------------------------------- */

/* The hash of a candidate's results. False: the device is broken. */
static bool hash_candidate(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t rows, candidate *k, scratch *t) {
    if (!k->hashed) k->hashed = hash_rows(m, s, rows, &k->algo, t, &k->hash);
    return k->hashed;
}

/* The fastest candidate of a bucket that has these bits; whether there is one is no matter of time. NULL: none, or the
 * device is broken. */
static candidate *with_bits(mp_cu_matmul *m, const mp_cu_shape *s, bucket *b, uint64_t bits, scratch *t) {
    for (;;) {
        candidate *best = NULL;
        for (uint32_t i = 0; i < b->n_candidates; i++) {
            candidate *k = &b->candidates[i];
            if (k->can && (!k->hashed || k->hash == bits) && (!best || k->us < best->us)) best = k;
        }
        if (!best || best->hashed) return best;
        if (!hash_candidate(m, s, b->rows, best, t)) return NULL;
    }
}

/* Gives a bucket the other buckets' algorithms of the library, the nearest bucket's first. */
static void join(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t n_buckets, uint32_t at, scratch *t) {
    bucket *b = &t->buckets[at];
    b->joined = true;
    for (uint32_t away = 1; away < n_buckets; away++) {
        for (int side = 0; side < 2; side++) {
            uint32_t other = side ? at + away : at - away; /* wraps below 0 */
            for (uint32_t i = 0; other < n_buckets && i < t->buckets[other].n_candidates; i++) {
                const algorithm *algo = &t->buckets[other].candidates[i].algo;
                candidate *k = algo->own ? NULL : add_candidate(b, algo, MAX_JOINED);
                if (!k) continue;
                k->us = INFINITY;
                k->can = can(m, s, b->rows, algo, t);
            }
        }
    }
}

static candidate *find_bits(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t n_buckets, uint32_t at, uint64_t bits,
                            scratch *t) {
    bucket *b = &t->buckets[at];
    candidate *k = with_bits(m, s, b, bits, t);
    if (k || b->joined || m->device->error != cudaSuccess) return k;
    join(m, s, n_buckets, at, t);
    return with_bits(m, s, b, bits, t);
}

/* The bits of a shape: the first that every bucket can have, of our own kernel or, where there is none or the library
 * cannot continue what it does, of the library's proposals in their order. Which algorithm is faster plays no part, so
 * that every open on such a device comes to the same. Are there none, the first that any bucket has, and *agreed is
 * false. */
static uint64_t common_bits(mp_cu_matmul *m, const mp_cu_shape *s, uint32_t n_buckets, scratch *t, bool *agreed) {
    uint64_t tried[MAX_TRIED] = { 0 };
    uint32_t n_tried = 0;
    *agreed = true;
    for (int own = 1; own >= 0; own--) {
        for (uint32_t i = 0; i < n_buckets; i++) {
            bucket *b = &t->buckets[i];
            for (uint32_t c = 0; c < b->n_candidates && n_tried < MAX_TRIED; c++) {
                candidate *k = &b->candidates[c];
                if (!k->can || k->algo.own != own) continue;
                if (!hash_candidate(m, s, b->rows, k, t)) return 0;
                bool known = k->hash == 0;
                for (uint32_t j = 0; j < n_tried; j++) known = known || tried[j] == k->hash;
                if (known) continue;
                uint32_t have = 0;
                while (have < n_buckets && find_bits(m, s, n_buckets, have, k->hash, t)) have++;
                if (have == n_buckets) return k->hash;
                tried[n_tried++] = k->hash;
            }
        }
    }
    *agreed = false;
    return tried[0];
}

/* What a bucket takes that cannot have the shape's bits: not the fastest, which may be another at the next open. */
static candidate *first_proposed(bucket *b) {
    for (uint32_t i = 0; i < b->n_candidates; i++) {
        if (b->candidates[i].can) return &b->candidates[i];
    }
    return NULL;
}

/* Whether our own kernel could do a bucket's rows, and only other bits of it are known. */
static bool own_differs(const bucket *b, uint64_t bits) {
    bool differs = false;
    for (uint32_t i = 0; i < b->n_candidates; i++) {
        const candidate *k = &b->candidates[i];
        if (!k->algo.own || !k->hashed) continue;
        if (k->hash == bits) return false;
        differs = true;
    }
    return differs;
}

static mepic_status choose(mp_cu_matmul *m, product *p, scratch *t, const mp_log *log, mepic_error *err) {
    const mp_cu_shape *s = &p->shape;
    bool agreed, ok = true;
    p->hash = common_bits(m, s, p->n_buckets, t, &agreed);
    if (!agreed) {
        m->same_bits = false;
        mp_log_write(log, MEPIC_LOG_WARN,
                     "the product %s, [%u, %u], was found no bits that algorithms for all numbers of rows agree on",
                     s->name, s->n_out, s->n_in);
    }
    for (uint32_t i = 0; i < p->n_buckets; i++) {
        bucket *b = &t->buckets[i];
        candidate *k = find_bits(m, s, p->n_buckets, i, p->hash, t);
        if (!k) k = first_proposed(b);
        if (k && isinf(k->us)) { /* it was chosen for its bits alone */
            for (uint32_t c = 0; c < b->n_candidates; c++) b->candidates[c].timed = &b->candidates[c] == k;
            ok = load_kernel(m, s, b->rows, &k->algo, t) && time_candidates(m, s, b, 1, t);
        }
        mepic_status status = mp_cu_status(m->device, err);
        if (status != MEPIC_OK) return status;
        if (!k || !ok) {
            return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                           "cuBLASLt has no algorithm for the product %s, %u rows by [%u, %u], on device %d (%s)",
                           s->name, b->rows, s->n_out, s->n_in, m->device->id, m->device->name);
        }
        if (own_differs(b, p->hash)) {
            mp_log_write(log, MEPIC_LOG_WARN,
                         "the product %s of %u rows is left to cuBLASLt: its bits are not our kernel's", s->name,
                         b->rows);
        }
        uint32_t n_differ = 0;
        for (uint32_t c = 0; c < b->n_candidates; c++) {
            n_differ += b->candidates[c].hashed && b->candidates[c].hash != p->hash;
        }
        p->buckets[i].algo = k->algo;
        p->buckets[i].pad = 0;
        p->buckets[i].measured =
            (mp_cu_measured){ .rows = b->rows, .n_candidates = b->n_candidates, .n_differ = n_differ, .us = k->us };
    }
    /* The library is slow at some small numbers of rows: then a larger one is computed, to the same bits. */
    if (!agreed) return MEPIC_OK;
    for (uint32_t i = p->n_buckets - 1; i-- > 0;) {
        if (p->buckets[i + 1].measured.us * 1.04f > p->buckets[i].measured.us) continue;
        p->buckets[i].algo = p->buckets[i + 1].algo;
        p->buckets[i].pad = p->buckets[i + 1].pad ? p->buckets[i + 1].pad : t->buckets[i + 1].rows;
        p->buckets[i].measured.us = p->buckets[i + 1].measured.us;
    }
    return MEPIC_OK;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static uint32_t most_rows(const mp_cu_shape *s) {
    uint32_t rows = mp_cu_bucket(s->max_rows ? s->max_rows : 1);
    return rows < MAX_MEASURED ? rows : MAX_MEASURED;
}

/* The library's candidates of the bucket before. */
static void take_over(const bucket *before, bucket *b) {
    float best = INFINITY;
    for (uint32_t i = 0; i < before->n_candidates; i++) {
        if (!before->candidates[i].algo.own) best = fminf(best, before->candidates[i].once);
    }
    for (uint32_t i = 0; i < before->n_candidates; i++) {
        const candidate *k = &before->candidates[i];
        if (k->algo.own || b->n_candidates == MAX_CANDIDATES) continue;
        b->candidates[b->n_candidates] = *k;
        b->candidates[b->n_candidates++].hopeless = k->hopeless || k->once > 4 * best;
    }
}

static mepic_status open_product(mp_cu_matmul *m, const mp_cu_shape *shape, product *p, scratch *t, const mp_log *log,
                                 mepic_error *err) {
    mp_cu_device *d = m->device;
    p->shape = *shape;
    p->n_buckets = bucket_index(most_rows(shape)) + 1;
    t->n_compared = n_compared(shape, most_rows(shape));
    bool ok = fill_x(m, shape, most_rows(shape), t);
    uint32_t rows = 1;
    for (uint32_t i = 0; ok && i < p->n_buckets; i++, rows = mp_cu_bucket(rows + 1)) {
        bucket *b = &t->buckets[i];
        b->n_candidates = 0;
        b->joined = false;
        add_own(m, shape, rows, b);
        if (i > 0 && rows <= FEW_ROWS) {
            take_over(&t->buckets[i - 1], b);
        } else if (i > 0) {
            ok = find_algorithms(m, shape, rows, t, b);
        }
        for (uint32_t few = FEW_ROWS; ok && i == 0 && few > 0; few /= 4) ok = find_algorithms(m, shape, few, t, b);
        b->rows = rows;
        ok = ok && measure_bucket(m, shape, b, t);
    }
    if (!ok) return mp_cu_status(d, err);
    mepic_status status = choose(m, p, t, log, err);
    p->shape.weights = NULL; /* were lent for measuring */
    return status != MEPIC_OK ? status : mp_cu_status(d, err);
}

static void close_scratch(mp_cu_device *d, scratch *t) {
    for (uint32_t i = 0; i < MAX_CANDIDATES; i++) {
        if (t->start[i]) cudaEventDestroy(t->start[i]);
        if (t->stop[i]) cudaEventDestroy(t->stop[i]);
    }
    mp_cu_drop(d, t->x);
    mp_cu_drop(d, t->codes.scales);
    mp_cu_drop(d, t->out);
    mp_cu_drop(d, t->flush);
    mp_cu_drop(d, t->rows);
    mp_cu_drop(d, t->before);
    mp_free(t->host);
    mp_free(t);
}

static mepic_status open_scratch(mp_cu_device *d, const mp_cu_shape *shapes, uint32_t n, scratch **out,
                                 mepic_error *err) {
    size_t x = 0, y = 0, host = 0;
    bool any_codes = false;
    for (uint32_t i = 0; i < n; i++) {
        const mp_cu_shape *s = &shapes[i];
        size_t bytes = s->n_out * out_size(s->out);
        if (most_rows(s) * (size_t)s->n_in * sizeof(mp_bf16) > x) x = most_rows(s) * (size_t)s->n_in * sizeof(mp_bf16);
        if (most_rows(s) * bytes > y) y = most_rows(s) * bytes;
        if (bytes * n_compared(s, most_rows(s)) > host) host = bytes * n_compared(s, most_rows(s));
        any_codes = any_codes || s->e4m3;
    }
    scratch *t = mp_calloc(1, sizeof *t);
    if (!t) return mp_fail_nomem(err, "what measures products", sizeof *t);
    mepic_status status = MEPIC_OK;
    t->host = mp_alloc(host);
    if (!t->host) status = mp_fail_nomem(err, "what measures products", host);
    if (status == MEPIC_OK) status = mp_cu_take(d, x, "measuring products (their inputs)", &t->x, err);
    if (status == MEPIC_OK && any_codes) { /* scales, then codes */
        void *codes;
        size_t scales = MAX_MEASURED * sizeof(float);
        status = mp_cu_take(d, scales + x / sizeof(mp_bf16), "measuring products (their inputs)", &codes, err);
        if (status == MEPIC_OK) t->codes = (mp_cu_matrix){ (uint8_t *)codes + scales, codes };
    }
    if (status == MEPIC_OK) status = mp_cu_take(d, y, "measuring products (their results)", &t->out, err);
    if (status == MEPIC_OK) status = mp_cu_take(d, host, "measuring products (their results)", &t->rows, err);
    if (status == MEPIC_OK) status = mp_cu_take(d, host, "measuring products (their results)", &t->before, err);
    if (status == MEPIC_OK) status = mp_cu_take(d, FLUSH, "measuring products", &t->flush, err);
    bool ok = status == MEPIC_OK;
    for (size_t i = 0; ok && i < host; i++) t->host[i] = (uint8_t)(i % 2 == 0 ? 0 : i / 2 % 7 == 0 ? 0x3f : 0xbe);
    ok = ok && CUDA_TRY(d, cudaMemcpyAsync(t->before, t->host, host, cudaMemcpyHostToDevice, d->stream)) &&
         CUDA_TRY(d, cudaMemsetAsync(t->out, 0, y, d->stream)) && CUDA_TRY(d, cudaStreamSynchronize(d->stream));
    for (uint32_t i = 0; ok && i < MAX_CANDIDATES; i++) {
        ok = CUDA_TRY(d, cudaEventCreate(&t->start[i])) && CUDA_TRY(d, cudaEventCreate(&t->stop[i]));
    }
    if (status == MEPIC_OK && !ok) status = mp_cu_status(d, err);
    if (status != MEPIC_OK) {
        close_scratch(d, t);
        return status;
    }
    *out = t;
    return MEPIC_OK;
}

mepic_status mp_cu_matmul_open(mp_cu_device *device, const mp_cu_shape *shapes, uint32_t n_shapes, const mp_log *log,
                               mp_cu_matmul **out, mepic_error *err) {
    scratch *t = NULL;
    mp_cu_matmul *m = mp_calloc(1, sizeof *m);
    if (!m) return mp_fail_nomem(err, "matrix products", sizeof *m);
    mepic_status status = MEPIC_OK;
    m->device = device;
    m->same_bits = true;
    m->n_products = n_shapes;
    m->products = mp_calloc(n_shapes, sizeof *m->products);
    if (!m->products) {
        status = mp_fail_nomem(err, "the table of products", n_shapes * sizeof *m->products);
        goto fail;
    }
    if (!CUDA_TRY(device, cudaSetDevice(device->id)) || !CUBLAS_TRY(device, cublasLtCreate(&m->handle))) {
        m->handle = NULL;
        status = mp_cu_status(device, err);
        goto fail;
    }
    if (device->arch == 90) mp_cu_few_rows_open(device->n_sm, &m->few_rows);
    if ((status = mp_cu_take(device, WORKSPACE, "products' workspace", &m->workspace, err)) != MEPIC_OK) goto fail;
    if ((status = open_scratch(device, shapes, n_shapes, &t, err)) != MEPIC_OK) goto fail;
    for (uint32_t i = 0; i < n_shapes; i++) {
        mp_log_progress(log, "measuring products", i, n_shapes);
        if ((status = open_product(m, &shapes[i], &m->products[i], t, log, err)) != MEPIC_OK) goto fail;
    }
    mp_log_progress(log, "measuring products", n_shapes, n_shapes);
    close_scratch(device, t);
    *out = m;
    return MEPIC_OK;
fail:
    if (t) close_scratch(device, t);
    mp_cu_matmul_close(m);
    return status;
}

void mp_cu_matmul_close(mp_cu_matmul *m) {
    if (!m) return;
    if (m->handle) cublasLtDestroy(m->handle);
    if (m->workspace) mp_cu_drop(m->device, m->workspace);
    mp_free(m->products);
    mp_free(m);
}

uint32_t mp_cu_matmul_class(const mp_cu_matmul *m) {
    uint64_t hash = 0;
    for (uint32_t i = 0; i < m->n_products; i++) hash = mp_hash64_pair(hash, m->products[i].hash);
    return (uint32_t)(hash >> 32);
}

bool mp_cu_matmul_same_bits(const mp_cu_matmul *m) {
    return m->same_bits;
}

bool mp_cu_matmul_measured(const mp_cu_matmul *m, uint32_t i, uint32_t b, mp_cu_measured *out) {
    if (i >= m->n_products || b >= m->products[i].n_buckets) return false;
    *out = m->products[i].buckets[b].measured;
    return true;
}
