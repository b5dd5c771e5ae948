/* backend/cuda/matmul: products against double, and the bits of a row for every number of rows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "backend/cuda/few_rows.h"
#include "backend/cuda/matmul.h"
#include "base/hash.h"
#include "model/dtype.h"
#include "support/e4m3.h"
#include "support/gpu.h"
#include "support/random.h"

static rng random_numbers;
static mp_cu_device device;
static bool small; /* for tools that check every access: less of everything */

static float real(float low, float high) {
    return low + (high - low) * (float)(rng_next(&random_numbers) >> 40) / (float)(1 << 24);
}

static uint16_t *random_bf16(size_t n, float most) {
    uint16_t *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) x[i] = mp_f32_to_bf16(real(-most, most));
    return x;
}

static void ok(mepic_status status, const mepic_error *err) {
    if (status != MEPIC_OK) fail_msg("%s", err->message);
}

static void buckets(void **state) {
    (void)state;
    static const uint32_t want[] = { 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048 };
    uint32_t i = 0;
    for (uint32_t n = 1; n <= 2048; n++) {
        while (want[i] < n) i++;
        assert_int_equal(mp_cu_bucket(n), want[i]);
    }
    assert_int_equal(mp_cu_bucket(8192), 8192);
    assert_int_equal(mp_cu_bucket(6145), 8192);
}

/* ROOM: a product may compute the rows of a larger bucket, up to that of MAX_ROWS = 768. */
enum { MAX_ROWS = 600, ROOM = 768 };

typedef struct product_case {
    mp_cu_shape shape;
    uint16_t *x, *w;            /* host, bf16 */
    uint8_t *codes_x, *codes_w; /* host: of them in e4m3, with scales; NULL: the product is of bf16 */
    float *scales_x, *scales_w;
    mp_cu_matrix dx, dw;
    void *out;
    uint8_t *before; /* host: what out holds before a product */
    size_t row_bytes;
} product_case;

/* The matrix on the device, bf16 or in e4m3, of which then copies come back. */
static mp_cu_matrix put_matrix(const uint16_t *x, uint32_t rows, uint32_t n, bool e4m3, uint8_t **codes,
                               float **scales) {
    mp_cu_matrix m = { gpu_put(x, (size_t)rows * n * 2), NULL };
    if (!e4m3) return m;
    mp_cu_matrix coded = { gpu_new((size_t)rows * n, 0xff), gpu_new(rows * sizeof(float), 0xff) };
    GPU_DONE(mp_cu_quantize(rows, m.data, n, coded, NULL));
    gpu_free(m.data);
    *codes = gpu_get(coded.data, (size_t)rows * n);
    *scales = gpu_get(coded.scales, rows * sizeof(float));
    return coded;
}

static void make_case(product_case *p, uint32_t n_out, uint32_t n_in, mp_cu_out out, bool e4m3) {
    *p = (product_case){ .x = random_bf16((size_t)(MAX_ROWS + ROOM) * n_in, 1),
                         .w = random_bf16((size_t)n_out * n_in, 1) };
    p->dx = put_matrix(p->x, MAX_ROWS + ROOM, n_in, e4m3, &p->codes_x, &p->scales_x);
    p->dw = put_matrix(p->w, n_out, n_in, e4m3, &p->codes_w, &p->scales_w);
    p->row_bytes = n_out * (out == MP_CU_OUT_BF16 ? sizeof(mp_bf16) : sizeof(float));
    p->out = gpu_new((ROOM + 1) * p->row_bytes, 0xff);
    p->before = malloc((MAX_ROWS + 1) * p->row_bytes);
    assert_non_null(p->before);
    memset(p->before, 0xff, (MAX_ROWS + 1) * p->row_bytes);
    for (size_t i = 0; out == MP_CU_OUT_ADD_F32 && i < (size_t)MAX_ROWS * n_out; i++) {
        float f = real(-100, 100);
        memcpy(p->before + i * sizeof f, &f, sizeof f);
    }
    p->shape = (mp_cu_shape){ .name = "test",
                              .n_out = n_out,
                              .n_in = n_in,
                              .out = out,
                              .e4m3 = e4m3,
                              .max_rows = MAX_ROWS,
                              .weights = &p->dw,
                              .n_weights = 1 };
}

static void free_case(product_case *p) {
    free(p->x);
    free(p->w);
    free(p->before);
    free(p->codes_x);
    free(p->codes_w);
    free(p->scales_x);
    free(p->scales_w);
    gpu_free(p->dx.data);
    gpu_free(p->dw.data);
    gpu_free(p->dx.scales);
    gpu_free(p->dw.scales);
    gpu_free(p->out);
}

/* Rows [first, first + n) of x, with what was before; a host copy of the whole out. */
static uint8_t *run_case(mp_cu_matmul *m, uint32_t i, const product_case *p, uint32_t first, uint32_t n) {
    size_t bytes = (ROOM + 1) * p->row_bytes, lead = first * p->row_bytes;
    GPU(cudaMemset(p->out, 0xff, bytes));
    GPU(cudaMemcpy(p->out, p->before + lead, n * p->row_bytes, cudaMemcpyHostToDevice));
    GPU(cudaDeviceSynchronize()); /* the product's stream does not wait for this one */
    mp_cu_matrix x = { (uint8_t *)p->dx.data + (size_t)first * p->shape.n_in * (p->shape.e4m3 ? 1 : 2), NULL };
    if (p->shape.e4m3) x.scales = p->dx.scales + first;
    assert_true(mp_cu_matmul_run(m, i, n, x, p->dw, p->out, device.stream));
    GPU(cudaDeviceSynchronize());
    return gpu_get(p->out, bytes);
}

/* Squares of what e4m3 leaves out, and of what there is. */
typedef struct loss {
    double error, value, worst;
} loss;

static void check_value(const product_case *p, const uint8_t *out, uint32_t r, uint32_t n, loss *l) {
    const mp_cu_shape *s = &p->shape;
    double sum = 0, size = 0, unquantized = 0;
    for (uint32_t k = 0; k < s->n_in; k++) {
        size_t i = (size_t)r * s->n_in + k, j = (size_t)n * s->n_in + k;
        double a = (double)mp_bf16_to_f32(p->x[i]) * (double)mp_bf16_to_f32(p->w[j]);
        unquantized += a;
        if (s->e4m3) a = (double)e4m3_value(p->codes_x[i]) * (double)e4m3_value(p->codes_w[j]);
        sum += a;
        size += fabs(a);
    }
    double scale = s->e4m3 ? (double)p->scales_x[r] * (double)p->scales_w[n] : 1;
    float got, before = 0;
    if (s->out == MP_CU_OUT_BF16) {
        uint16_t bits;
        memcpy(&bits, out + r * p->row_bytes + n * sizeof bits, sizeof bits);
        got = mp_bf16_to_f32(bits);
    } else {
        memcpy(&got, out + r * p->row_bytes + n * sizeof got, sizeof got);
    }
    if (s->out == MP_CU_OUT_ADD_F32) memcpy(&before, p->before + r * p->row_bytes + n * sizeof got, sizeof got);
    double want = sum * scale + (double)before, bound = fabs(want) * 0x1p-22;
    if (s->out == MP_CU_OUT_BF16) bound += fabs(want) / 256;
    double off = fabs((double)got - want);
    l->worst = fmax(l->worst, (off - bound) / (size * scale));
    bound += size * scale * (s->e4m3 ? 0x1p-13 : 0x1p-19);
    if (!(off <= bound)) {
        fail_msg("[%u, %u] %s, out %d, row %u output %u: %.9g, not %.9g", s->n_out, s->n_in, s->e4m3 ? "e4m3" : "bf16",
                 (int)s->out, r, n, (double)got, want);
    }
    double lost = (double)got - (double)before - unquantized;
    l->error += lost * lost;
    l->value += unquantized * unquantized;
}

static void products(void **state) {
    (void)state;
    static const struct {
        uint32_t n_out, n_in;
        mp_cu_out out;
        bool e4m3;
    } shapes[] = {
        { 299, 64, MP_CU_OUT_F32, false },      { 72, 200, MP_CU_OUT_BF16, false },
        { 128, 64, MP_CU_OUT_ADD_F32, false },  { 144, 80, MP_CU_OUT_BF16, true },
        { 128, 64, MP_CU_OUT_ADD_F32, true },   { 1152, 896, MP_CU_OUT_BF16, false },
        { 9728, 896, MP_CU_OUT_BF16, false },   { 896, 4864, MP_CU_OUT_ADD_F32, false },
        { 4096, 896, MP_CU_OUT_F32, false },    { 896, 896, MP_CU_OUT_ADD_F32, false },
        { 6144, 4096, MP_CU_OUT_BF16, false },  { 1152, 896, MP_CU_OUT_BF16, true },
        { 896, 4864, MP_CU_OUT_ADD_F32, true }, { 576, 1536, MP_CU_OUT_ADD_F32, true },
        { 6144, 4096, MP_CU_OUT_BF16, true },   { 4096, 14336, MP_CU_OUT_ADD_F32, true },
    };
    enum { MOST = sizeof shapes / sizeof *shapes };
    const uint32_t most = small ? 5 : MOST;
    uint32_t n_shapes = 0;
    product_case cases[MOST];
    mp_cu_shape list[MOST];
    for (uint32_t i = 0; i < most; i++) {
        if (shapes[i].e4m3 && !mp_cu_matmul_has_e4m3(&device)) continue;
        make_case(&cases[n_shapes], shapes[i].n_out, shapes[i].n_in, shapes[i].out, shapes[i].e4m3);
        list[n_shapes] = cases[n_shapes].shape;
        n_shapes++;
    }
    mp_cu_matmul *m;
    mepic_error err;
    ok(mp_cu_matmul_open(&device, list, n_shapes, NULL, &m, &err), &err);
    assert_true(mp_cu_matmul_same_bits(m));
    for (uint32_t i = 0; i < n_shapes; i++) {
        const product_case *p = &cases[i];
        uint8_t *all = run_case(m, i, p, 0, MAX_ROWS);
        loss l = { 0 };
        for (int k = 0; k < 2000; k++) {
            check_value(p, all, rng_below(&random_numbers, MAX_ROWS), rng_below(&random_numbers, p->shape.n_out), &l);
        }
        double lost = sqrt(l.error / l.value);
        print_message("[%u, %u] %s: off by %.3g of the sum of magnitudes at most, by %.3g of the unquantized\n",
                      p->shape.n_out, p->shape.n_in, p->shape.e4m3 ? "e4m3" : "bf16", l.worst, lost);
        assert_true(lost < (p->shape.e4m3 ? 0.06 : 0.004));
        static const uint32_t counts[] = { 1, 2, 3, 7, 8, 13, 16, 31, 64, 65, 100, 129, 200, 256, 300, 511, 513 };
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            uint32_t n = counts[c], first = rng_below(&random_numbers, MAX_ROWS - n) / 4 * 4;
            uint8_t *some = run_case(m, i, p, first, n);
            if (memcmp(some, all + first * p->row_bytes, n * p->row_bytes) != 0) {
                fail_msg("[%u, %u]: rows %u to %u have other bits than among %d", p->shape.n_out, p->shape.n_in, first,
                         first + n, MAX_ROWS);
            }
            for (size_t b = ROOM * p->row_bytes; b < (ROOM + 1) * p->row_bytes; b++) assert_int_equal(some[b], 0xff);
            free(some);
        }
        free(all);
    }
    mp_cu_matmul_close(m);
    for (uint32_t i = 0; i < n_shapes; i++) free_case(&cases[i]);
}

/* Our own kernel for few rows on rows [first, first + rows). NULL: the way has no plan. */
static uint8_t *run_few_rows(const mp_cu_few_rows *few, const product_case *p, uint32_t first, uint32_t rows,
                             uint32_t stage) {
    const mp_cu_shape *s = &p->shape;
    const mp_cu_few_plan plan = mp_cu_few_rows_plan(few, s->n_out, s->n_in, rows, stage);
    const mp_bf16 *x = (const mp_bf16 *)p->dx.data + (size_t)first * s->n_in;
    size_t all = (rows + 1) * p->row_bytes;
    assert_true(plan.rows >= rows && plan.stages >= 2);
    GPU(cudaMemset(p->out, 0xff, all));
    GPU(cudaMemcpy(p->out, p->before + first * p->row_bytes, rows * p->row_bytes, cudaMemcpyHostToDevice));
    GPU(cudaDeviceSynchronize());
    GPU(mp_cu_few_rows_run(few, &plan, s->n_out, s->n_in, rows, s->out, x, p->dw.data, p->out, device.stream));
    GPU(cudaDeviceSynchronize());
    return gpu_get(p->out, all);
}

/* Every number of rows, in stages small and large: the library's bits, where its results are aligned. */
static void few_rows(void **state) {
    (void)state;
    static const struct {
        uint32_t n_out, n_in;
        mp_cu_out out;
        bool aligned;
    } shapes[] = {
        { 299, 64, MP_CU_OUT_F32, false },   { 296, 64, MP_CU_OUT_F32, true },
        { 72, 200, MP_CU_OUT_BF16, true },   { 8, 8, MP_CU_OUT_ADD_F32, false },
        { 1152, 896, MP_CU_OUT_BF16, true }, { 896, 4864, MP_CU_OUT_ADD_F32, true },
        { 40000, 104, MP_CU_OUT_F32, true }, { 6144, 4096, MP_CU_OUT_BF16, true },
    };
    mp_cu_few_rows few;
    mp_cu_few_rows_open(device.n_sm, &few);
    if (!few.describe) skip();
    for (size_t i = 0; i < (small ? 4 : sizeof shapes / sizeof *shapes); i++) {
        product_case p;
        mp_cu_matmul *m;
        mepic_error err;
        make_case(&p, shapes[i].n_out, shapes[i].n_in, shapes[i].out, false);
        p.shape.library_only = true;
        ok(mp_cu_matmul_open(&device, &p.shape, 1, NULL, &m, &err), &err);
        uint8_t *want = run_case(m, 0, &p, 0, MAX_ROWS);
        mp_cu_matmul_close(m);
        for (uint32_t rows = 1; rows <= MP_CU_FEW_ROWS_MAX; rows++) {
            for (uint32_t stage = 1; stage <= 65536; stage = stage == 1 ? 16384 : stage * 2) {
                uint32_t first = shapes[i].aligned ? rng_below(&random_numbers, MAX_ROWS - rows) : 0;
                uint8_t *got = run_few_rows(&few, &p, first, rows, stage);
                if (shapes[i].aligned && memcmp(got, want + first * p.row_bytes, rows * p.row_bytes) != 0) {
                    fail_msg("[%u, %u]: %u rows from %u, stages of %u: not the library's bits", p.shape.n_out,
                             p.shape.n_in, rows, first, stage);
                }
                for (int k = 0; k < 20 && first == 0; k++) {
                    loss l = { 0 };
                    check_value(&p, got, rng_below(&random_numbers, rows), rng_below(&random_numbers, p.shape.n_out),
                                &l);
                }
                for (size_t b = rows * p.row_bytes; b < (rows + 1) * p.row_bytes; b++) assert_int_equal(got[b], 0xff);
                free(got);
            }
        }
        free(want);
        free_case(&p);
    }
}

/* Until *done: work of somebody else, of changing size, so that times are noise. */
static void *disturb(void *done) {
    size_t bytes = (size_t)64 << 20;
    void *memory = NULL;
    cudaStream_t stream = NULL;
    bool works = cudaSetDevice(device.id) == cudaSuccess && cudaMalloc(&memory, bytes) == cudaSuccess &&
                 cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess;
    for (uint32_t i = 1; works && !atomic_load((atomic_bool *)done); i++) {
        works = cudaMemsetAsync(memory, 0, bytes >> mp_hash64(i, NULL, 0) % 10, stream) == cudaSuccess &&
                (i % 32 || cudaStreamSynchronize(stream) == cudaSuccess);
    }
    works = works && cudaStreamSynchronize(stream) == cudaSuccess;
    if (stream) cudaStreamDestroy(stream);
    cudaFree(memory);
    return works ? done : NULL;
}

/* What is fastest is a matter of noise, above all where somebody else keeps the device busy, every other time; the bits
 * are not. Small shapes: there many algorithms are nearly as fast. */
static void the_bits_are_those_of_the_last_open(void **state) {
    (void)state;
    static const struct {
        uint32_t n_out, n_in;
        mp_cu_out out;
    } shapes[] = { { 512, 64, MP_CU_OUT_BF16 },
                   { 64, 256, MP_CU_OUT_ADD_F32 },
                   { 256, 64, MP_CU_OUT_BF16 },
                   { 64, 128, MP_CU_OUT_ADD_F32 },
                   { 304, 64, MP_CU_OUT_F32 } };
    enum { N = sizeof shapes / sizeof *shapes };
    product_case cases[N];
    mp_cu_shape list[N];
    for (uint32_t i = 0; i < N; i++) {
        make_case(&cases[i], shapes[i].n_out, shapes[i].n_in, shapes[i].out, false);
        list[i] = cases[i].shape;
        list[i].max_rows = 64;
    }
    uint32_t class = 0;
    for (int open = 0; open < (small ? 1 : 6); open++) {
        mp_cu_matmul *m;
        mepic_error err;
        atomic_bool done = false;
        pthread_t other;
        void *worked = &done;
        if (open % 2) assert_int_equal(pthread_create(&other, NULL, disturb, &done), 0);
        mepic_status status = mp_cu_matmul_open(&device, list, N, NULL, &m, &err);
        atomic_store(&done, true);
        if (open % 2) pthread_join(other, &worked);
        assert_non_null(worked);
        ok(status, &err);
        assert_true(mp_cu_matmul_same_bits(m));
        if (open > 0) assert_int_equal(mp_cu_matmul_class(m), class);
        class = mp_cu_matmul_class(m);
        mp_cu_matmul_close(m);
    }
    for (uint32_t i = 0; i < N; i++) free_case(&cases[i]);
}

/* test_cuda_matmul [small] */
int main(int argc, char **argv) {
    small = argc > 1 && strcmp(argv[1], "small") == 0;
    random_numbers = rng_open(5);
    const struct CMUnitTest anywhere[] = { cmocka_unit_test(buckets) };
    int failed = cmocka_run_group_tests(anywhere, NULL, NULL);
    if (failed || mp_cu_device_count() == 0) return failed ? failed : 77;
    mepic_error err;
    if (mp_cu_device_open(0, &device, &err) != MEPIC_OK) {
        printf("%s\n", err.message);
        return 1;
    }
    const struct CMUnitTest tests[] = { cmocka_unit_test(products), cmocka_unit_test(few_rows),
                                        cmocka_unit_test(the_bits_are_those_of_the_last_open) };
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    mp_cu_device_close(&device);
    return failed;
}
