/* Prefill attention on a device: against double precision; the same bits however rows are cut into blocks, by the
 * general kernel and by Hopper's; and the same as a decode step gives. Argument "small": small worlds only (for the
 * sanitizers of CUDA, which are slow). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these before it. */
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/cuda_world.h"

static uint32_t device_arch;
static bool only_small;

typedef struct result {
    uint16_t *out;
    size_t bytes;
} result;

static result outputs_of(cuda_world *w) {
    const mp_cu_attend *a = cuda_world_attend(w);
    result r = { .bytes = (size_t)cuda_world_rows(w) * a->n_heads * a->head_dim * sizeof(uint16_t) };
    r.out = malloc(r.bytes);
    assert_non_null(r.out);
    cuda_world_read(w, r.out);
    return r;
}

static result run(cuda_world *w, uint32_t block_rows, uint32_t arch) {
    mp_cu_attend *a = cuda_world_attend(w);
    a->arch = arch;
    cuda_world_reblock(w, block_rows);
    cuda_world_poison(w);
    assert_int_equal(mp_cu_attend_prefill(a, 0), cudaSuccess);
    return outputs_of(w);
}

/* The same rows as decode work. */
static result run_decode(cuda_world *w, uint32_t arch) {
    mp_cu_attend *a = cuda_world_attend(w);
    a->arch = arch;
    cuda_world_poison(w);
    assert_int_equal(mp_cu_attend_open(0), cudaSuccess);
    assert_int_equal(mp_cu_attend_decode(a, 0), cudaSuccess);
    return outputs_of(w);
}

static void check_error(cuda_world *w, const result *r, const char *what) {
    double worst, error = cuda_world_error(w, r->out, &worst);
    const mp_cu_attend *a = cuda_world_attend(w);
    print_message("%u/%u heads of %u, pages of %u%s, %s: error %.2e, worst row %.2e\n", a->n_heads, a->n_kv_heads,
                  a->head_dim, a->page_size, a->fp8 ? " of fp8" : "", what, error, worst);
    /* Weights are bf16, cells are rounded to f16, turned queries and outputs to bf16; fp8 pages once more, to bf16. */
    assert_true(error < (a->fp8 ? 8e-3 : 5e-3));
    assert_true(worst < 3e-2);
}

static void check_same(const result *expected, result *r, const char *what) {
    size_t n = expected->bytes / sizeof *expected->out, differ = 0;
    for (size_t i = 0; i < n; i++) differ += expected->out[i] != r->out[i];
    if (differ) print_message("%s: %zu of %zu outputs differ\n", what, differ, n);
    assert_int_equal(differ, 0);
    free(r->out);
}

static void check_world(const cuda_world_spec *spec) {
    cuda_world *w;
    cuda_world_open(spec, &w);
    uint32_t most = mp_cu_attend_block_rows(spec->n_heads, spec->n_kv_heads);
    assert_true(most * (spec->n_heads / spec->n_kv_heads) <= 128);
    result general = run(w, most, 80), one = run(w, 1, 80), odd = run(w, most / 2 + 1, 80);
    check_error(w, &general, "mma.sync");
    check_same(&general, &one, "blocks of one row");
    check_same(&general, &odd, "odd blocks");
    if (device_arch == 90) {
        uint32_t cuts[] = { most, 1, most / 2 + 1, most };
        for (int i = 0; i < 4; i++) {
            result hopper = run(w, cuts[i], 90);
            if (i == 0) check_error(w, &hopper, "on Hopper");
            check_same(&general, &hopper, "on Hopper");
        }
    }
    bool power_of_two = (spec->page_size & (spec->page_size - 1)) == 0; /* decode asks for that */
    for (uint32_t arch = 80; power_of_two && arch <= device_arch; arch += 10) {
        result decode = run_decode(w, arch);
        check_same(&general, &decode, arch == 80 ? "decode" : "decode on Hopper");
    }
    free(general.out);
    cuda_world_close(w);
}

static cuda_world_spec base_spec(uint32_t seed) {
    cuda_world_spec spec = { .seed = seed,
                             .n_heads = 8,
                             .n_kv_heads = 2,
                             .head_dim = 128,
                             .page_size = 16,
                             .n_pairs = 64,
                             .halves = true,
                             .n_sequences = 3,
                             .seq_rows = 50,
                             .private_tokens = 1500,
                             .n_shared = 6,
                             .n_refs = 4 };
    if (only_small) {
        spec.n_sequences = 2;
        spec.seq_rows = 20;
        spec.private_tokens = 200;
        spec.n_shared = spec.n_refs = 2;
        spec.cell_tokens = 192;
    }
    return spec;
}

static void test_head_dims(void **state) {
    (void)state;
    static const uint32_t dims[] = { 64, 80, 96, 128, 256 };
    for (uint32_t i = 0; i < 5; i++) {
        cuda_world_spec spec = base_spec(100 + i);
        spec.head_dim = dims[i];
        spec.n_pairs = dims[i] / 2;
        check_world(&spec);
    }
}

static void test_groups(void **state) {
    (void)state;
    static const uint32_t groups[] = { 1, 2, 3, 7, 8, 16 };
    for (uint32_t i = 0; i < 6; i++) {
        for (uint32_t head_dim = 64; head_dim <= 128; head_dim += 64) {
            cuda_world_spec spec = base_spec(200 + i);
            spec.n_kv_heads = groups[i] > 3 ? 1 : 2;
            spec.n_heads = spec.n_kv_heads * groups[i];
            spec.head_dim = head_dim;
            spec.n_pairs = head_dim / 2;
            if (!only_small) spec.private_tokens = 700;
            check_world(&spec);
        }
    }
}

/* Every head_dim with every number of heads a kv head, bf16 and fp8: prefill and decode. */
static void test_every_shape(void **state) {
    (void)state;
    static const uint32_t dims[] = { 64, 80, 96, 128, 256 };
    for (uint32_t i = 0; i < 10; i++) {
        for (uint32_t group = 1; group <= 16; group += only_small ? 5 : 1) {
            cuda_world_spec spec = { .seed = 700 + 16 * i + group,
                                     .n_kv_heads = 1 + group % 2,
                                     .head_dim = dims[i % 5],
                                     .page_size = 16u << group % 4,
                                     .n_pairs = dims[i % 5] / 2,
                                     .fp8 = i >= 5,
                                     .biased = i >= 5 && group % 4 < 2,
                                     .halves = i % 2 == 0,
                                     .n_sequences = 3,
                                     .seq_rows = 1 + group % 3 * 8,
                                     .private_tokens = 90,
                                     .n_shared = 2,
                                     .n_refs = 2,
                                     .cell_tokens = 128 };
            spec.n_heads = spec.n_kv_heads * group;
            check_world(&spec);
        }
    }
}

/* More rows than a block has, no holes: most stages are seen whole. */
static void test_plain(void **state) {
    (void)state;
    for (uint32_t i = 0; i < 4; i++) {
        cuda_world_spec spec = base_spec(300);
        spec.head_dim = i % 2 ? 128 : 64;
        spec.n_pairs = spec.head_dim / 2;
        spec.fp8 = i >= 2;
        spec.plain = true;
        spec.seq_rows = only_small ? 40 : 300;
        spec.private_tokens = only_small ? 300 : 3000;
        spec.n_sequences = 2;
        check_world(&spec);
    }
}

static void test_pages_and_pairs(void **state) {
    (void)state;
    static const struct {
        uint32_t page_size, n_pairs, cell_tokens;
        bool halves;
        float magnitude;
    } cases[] = { { 32, 32, 0, false, 1.0f },
                  { 64, 20, 0, true, 0.8f },
                  { 128, 64, 0, false, 1.2f },
                  { 48, 16, 0, true, 1.0f },
                  { 16, 64, 100, true, 1.0f } };
    for (uint32_t i = 0; i < 5; i++) {
        cuda_world_spec spec = base_spec(400 + i);
        spec.page_size = cases[i].page_size;
        spec.n_pairs = cases[i].n_pairs;
        spec.halves = cases[i].halves;
        spec.magnitude = cases[i].magnitude;
        if (cases[i].cell_tokens) spec.cell_tokens = cases[i].cell_tokens;
        check_world(&spec);
    }
}

/* NaN in one sequence's pages: in no other's rows, and in all of its own that see it. On one multiprocessor, so that a
 * block of threads comes from one sequence to the next, and on all. */
static void test_spoiled(void **state) {
    (void)state;
    static const uint32_t dims[] = { 64, 80, 96, 128, 256 };
    for (uint32_t i = 0; i < 10; i++) {
        cuda_world_spec spec = base_spec(600 + i);
        spec.fp8 = spec.biased = i >= 5;
        spec.head_dim = dims[i % 5];
        spec.n_pairs = dims[i % 5] / 2 - 8 * (i % 2);
        spec.n_sequences = 4;
        spec.private_tokens = 300;
        spec.page_size = 16u << i % 4;
        spec.cell_tokens = 192;
        for (uint32_t kinds = 1; kinds <= 3; kinds++) {
            cuda_world *w;
            cuda_world_open(&spec, &w);
            mp_cu_attend *a = cuda_world_attend(w);
            uint32_t n_sm = a->n_sm;
            result before = run(w, 16, 80);
            cuda_world_touch *touched = malloc(cuda_world_rows(w) * sizeof *touched);
            assert_non_null(touched);
            cuda_world_spoil(w, kinds, kinds, touched);
            for (uint32_t arch = 80; arch <= device_arch; arch = arch < device_arch ? device_arch : UINT32_MAX) {
                for (int few = 0; few < 2; few++) {
                    a->n_sm = few ? 1 : n_sm;
                    result after = run(w, 16, arch);
                    if (!cuda_world_contained(w, touched, before.out, after.out)) {
                        fail_msg("head_dim %u, kinds %u, arch %u, %u SMs", spec.head_dim, kinds, arch, a->n_sm);
                    }
                    free(after.out);
                }
            }
            free(before.out);
            free(touched);
            cuda_world_close(w);
        }
    }
}

static void test_fp8(void **state) {
    (void)state;
    static const struct {
        uint32_t head_dim, page_size, n_pairs, group;
        bool halves, biased, plain;
    } cases[] = { { 128, 16, 64, 4, true, false, false }, { 128, 32, 64, 7, true, true, true },
                  { 64, 16, 32, 3, true, true, false },   { 64, 48, 20, 1, false, true, false },
                  { 80, 16, 40, 4, true, true, false },   { 96, 64, 24, 2, false, true, false },
                  { 256, 128, 128, 4, true, true, false } };
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cuda_world_spec spec = base_spec(700 + i);
        spec.fp8 = true;
        spec.head_dim = cases[i].head_dim;
        spec.page_size = cases[i].page_size;
        spec.n_pairs = cases[i].n_pairs;
        spec.n_heads = 2 * cases[i].group;
        spec.halves = cases[i].halves;
        spec.biased = cases[i].biased;
        spec.plain = cases[i].plain;
        check_world(&spec);
    }
}

/* No blocks at all, and more thread blocks than units. */
static void test_nothing(void **state) {
    (void)state;
    cuda_world_spec spec = base_spec(500);
    cuda_world *w;
    cuda_world_open(&spec, &w);
    result r = run(w, 8, device_arch);
    mp_cu_attend *a = cuda_world_attend(w);
    mp_cu_counts counts = { .n_rows = cuda_world_rows(w) };
    assert_int_equal(cudaMemcpy(a->work.counts, &counts, sizeof counts, cudaMemcpyHostToDevice), cudaSuccess);
    for (uint32_t arch = 80; arch <= device_arch; arch += 10) {
        a->arch = arch;
        cuda_world_poison(w);
        assert_int_equal(mp_cu_attend_prefill(a, 0), cudaSuccess);
        cuda_world_read(w, r.out);
        for (size_t i = 0; i < r.bytes / 2; i++) assert_int_equal(r.out[i], 0xffff);
    }
    free(r.out);
    cuda_world_close(w);
}

int main(int argc, char **argv) {
    only_small = argc > 1 && strcmp(argv[1], "small") == 0;
    if (!cuda_world_device(&device_arch)) {
        printf("skipped: no CUDA device of compute capability 8.0 or more\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_dims), cmocka_unit_test(test_groups),  cmocka_unit_test(test_every_shape),
        cmocka_unit_test(test_plain),     cmocka_unit_test(test_spoiled), cmocka_unit_test(test_pages_and_pairs),
        cmocka_unit_test(test_fp8),       cmocka_unit_test(test_nothing),
    };
    return cmocka_run_group_tests_name("cuda_prefill", tests, NULL, NULL);
}
