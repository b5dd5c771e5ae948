/* backend/cuda/attend_decode*.cu and attend_fold.cu against the definition in double, on random worlds; and the promise
 * that a row's bits depend neither on its company nor on the kernel that computed it. Argument "small": the smallest
 * worlds only (for the sanitizers of CUDA, which are slow). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "support/cuda_world.h"

static uint32_t device_arch;
static bool only_small;

typedef struct world_case {
    const char *name;
    bool small;
    cuda_world_spec spec;
} world_case;

/* clang-format off */
static const world_case cases[] = {
    { "one row alone", true,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true,
        .n_sequences = 1, .seq_rows = 1, .private_tokens = 700, .plain = true } },
    { "few readers", true,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true,
        .n_sequences = 4, .seq_rows = 1, .private_tokens = 300, .n_shared = 5, .n_refs = 3 } },
    { "many readers", false,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true,
        .n_sequences = 150, .seq_rows = 1, .private_tokens = 40, .n_shared = 6, .n_refs = 3 } },
    { "two heads of 64, group of 7", false,
      { .n_heads = 14, .n_kv_heads = 2, .head_dim = 64, .page_size = 32, .n_pairs = 32, .halves = true,
        .n_sequences = 40, .seq_rows = 1, .private_tokens = 400, .n_shared = 8, .n_refs = 4 } },
    { "group of 3, pairs side by side", true,
      { .n_heads = 9, .n_kv_heads = 3, .head_dim = 64, .page_size = 16, .n_pairs = 32, .n_sequences = 9,
        .seq_rows = 2, .private_tokens = 150, .n_shared = 3, .n_refs = 2, .cell_tokens = 256 } },
    { "no groups", false,
      { .n_heads = 3, .n_kv_heads = 3, .head_dim = 128, .page_size = 64, .n_pairs = 64, .magnitude = 1.25f,
        .n_sequences = 100, .seq_rows = 2, .private_tokens = 30, .n_shared = 4, .n_refs = 2 } },
    { "group of 16, long pages", false,
      { .n_heads = 16, .n_kv_heads = 1, .head_dim = 128, .page_size = 128, .n_pairs = 30, .halves = true,
        .n_sequences = 40, .seq_rows = 1, .private_tokens = 500, .n_shared = 6, .n_refs = 4 } },
    { "head_dim 80", true,
      { .n_heads = 4, .n_kv_heads = 4, .head_dim = 80, .page_size = 16, .n_pairs = 40, .halves = true,
        .n_sequences = 20, .seq_rows = 1, .private_tokens = 100, .n_shared = 3, .n_refs = 2,
        .cell_tokens = 192 } },
    { "head_dim 96, half turned", false,
      { .n_heads = 12, .n_kv_heads = 2, .head_dim = 96, .page_size = 16, .n_pairs = 24, .n_sequences = 20,
        .seq_rows = 1, .private_tokens = 100, .n_shared = 3, .n_refs = 2 } },
    { "head_dim 256", false,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 256, .page_size = 32, .n_pairs = 128, .halves = true,
        .n_sequences = 20, .seq_rows = 1, .private_tokens = 200, .n_shared = 4, .n_refs = 2 } },
    { "fp8, few readers", true,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true, .fp8 = true,
        .n_sequences = 4, .seq_rows = 1, .private_tokens = 300, .n_shared = 5, .n_refs = 3 } },
    { "fp8, many readers, biased", false,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true, .fp8 = true,
        .biased = true, .n_sequences = 150, .seq_rows = 1, .private_tokens = 40, .n_shared = 6, .n_refs = 3 } },
    { "fp8, heads of 64, group of 7, biased", true,
      { .n_heads = 14, .n_kv_heads = 2, .head_dim = 64, .page_size = 32, .n_pairs = 32, .halves = true, .fp8 = true,
        .biased = true, .n_sequences = 20, .seq_rows = 1, .private_tokens = 400, .n_shared = 8, .n_refs = 4 } },
    { "fp8, head_dim 80, biased, pairs side by side", false,
      { .n_heads = 4, .n_kv_heads = 4, .head_dim = 80, .page_size = 16, .n_pairs = 24, .fp8 = true, .biased = true,
        .n_sequences = 20, .seq_rows = 1, .private_tokens = 100, .n_shared = 3, .n_refs = 2, .cell_tokens = 192 } },
    { "fp8, head_dim 96, half turned", false,
      { .n_heads = 12, .n_kv_heads = 2, .head_dim = 96, .page_size = 64, .n_pairs = 24, .halves = true, .fp8 = true,
        .biased = true, .magnitude = 1.25f, .n_sequences = 20, .seq_rows = 1, .private_tokens = 100, .n_shared = 3,
        .n_refs = 2 } },
    { "fp8, head_dim 256, long pages", false,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 256, .page_size = 128, .n_pairs = 128, .halves = true, .fp8 = true,
        .biased = true, .n_sequences = 20, .seq_rows = 1, .private_tokens = 200, .n_shared = 4, .n_refs = 2 } },
    { "deep", false,
      { .n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .page_size = 16, .n_pairs = 64, .halves = true,
        .n_sequences = 1, .seq_rows = 3, .private_tokens = 14000 } },
};
/* clang-format on */

static void run(cuda_world *w, uint16_t *out) {
    cuda_world_poison(w);
    assert_int_equal(mp_cu_attend_decode(cuda_world_attend(w), 0), cudaSuccess);
    cuda_world_read(w, out);
}

static void test_case(void **state) {
    const world_case *c = *state;
    static uint64_t seed = 20260;
    cuda_world_spec spec = c->spec;
    spec.seed = seed++;
    cuda_world *w;
    cuda_world_open(&spec, &w);
    assert_int_equal(mp_cu_attend_open(0), cudaSuccess);
    size_t bytes = (size_t)cuda_world_rows(w) * spec.n_heads * spec.head_dim * 2;
    uint16_t *out = malloc(bytes), *other = malloc(bytes);
    assert_true(out && other);
    run(w, out);
    double worst, error = cuda_world_error(w, out, &worst);
    printf("%s: seed %llu, error %.2e, worst %.2e\n", c->name, (unsigned long long)spec.seed, error, worst);
    assert_true(error < 6e-3); /* bf16 queries and weights, some of them sharp */
    assert_true(worst < 3e-2);

    static const uint32_t readers[] = { 0, 1, 3, 17, 40 };
    for (uint32_t arch = 80; arch <= device_arch; arch = arch < device_arch ? device_arch : UINT32_MAX) {
        cuda_world_attend(w)->arch = arch;
        for (size_t i = 0; i < sizeof readers / sizeof *readers; i++) {
            cuda_world_regroup(w, readers[i]);
            run(w, other);
            if (memcmp(out, other, bytes)) {
                cuda_world_error(w, other, &worst);
                print_error("%s: %u readers an item, arch %u: other bits (worst %.2e)\n", c->name, readers[i], arch,
                            worst);
            }
            assert_memory_equal(out, other, bytes);
        }
    }
    free(out);
    free(other);
    cuda_world_close(w);
}

/* NaN in one sequence's pages: in no other's rows, and in all of its own that see it. On one multiprocessor, so that a
 * block of threads comes from one sequence to the next, and on all. */
static void test_spoiled(void **state) {
    (void)state;
    static const uint32_t dims[] = { 64, 80, 96, 128, 256 };
    for (uint32_t i = 0; i < 10; i++) {
        cuda_world_spec spec = { .seed = 31 + i,
                                 .n_heads = 6,
                                 .n_kv_heads = 2,
                                 .head_dim = dims[i % 5],
                                 .page_size = 16u << i % 4,
                                 .n_pairs = dims[i % 5] / 2,
                                 .fp8 = i >= 5,
                                 .biased = i >= 5,
                                 .n_sequences = 7,
                                 .seq_rows = 2,
                                 .private_tokens = 300,
                                 .n_shared = 3,
                                 .n_refs = 2,
                                 .cell_tokens = 256 };
        for (uint32_t kinds = 1; kinds <= 3; kinds++) {
            cuda_world *w;
            cuda_world_open(&spec, &w);
            assert_int_equal(mp_cu_attend_open(0), cudaSuccess);
            mp_cu_attend *a = cuda_world_attend(w);
            uint32_t n_rows = cuda_world_rows(w), n_sm = a->n_sm;
            size_t bytes = (size_t)n_rows * spec.n_heads * spec.head_dim * 2;
            uint16_t *before = malloc(bytes), *after = malloc(bytes);
            cuda_world_touch *touched = malloc(n_rows * sizeof *touched);
            assert_true(before && after && touched);
            run(w, before);
            cuda_world_spoil(w, kinds, kinds, touched);
            for (uint32_t arch = 80; arch <= device_arch; arch = arch < device_arch ? device_arch : UINT32_MAX) {
                a->arch = arch;
                for (int few = 0; few < 2; few++) {
                    a->n_sm = few ? 1 : n_sm;
                    cuda_world_regroup(w, few ? 0 : 3);
                    run(w, after);
                    if (!cuda_world_contained(w, touched, before, after)) {
                        fail_msg("%shead_dim %u, kinds %u, arch %u, %u SMs", spec.fp8 ? "fp8, " : "", spec.head_dim,
                                 kinds, arch, a->n_sm);
                    }
                }
            }
            free(before);
            free(after);
            free(touched);
            cuda_world_close(w);
        }
    }
}

static void test_no_work(void **state) {
    (void)state; /* a launch over no work leaves everything as it is */
    cuda_world_spec spec = cases[0].spec;
    cuda_world *w;
    cuda_world_open(&spec, &w);
    mp_cu_attend a = *cuda_world_attend(w);
    a.max_items = a.max_folds = 0;
    assert_int_equal(mp_cu_attend_decode(&a, 0), cudaSuccess);
    cuda_world_close(w);
}

int main(int argc, char **argv) {
    if (!cuda_world_device(&device_arch)) {
        printf("no CUDA device: skipped\n");
        return 77;
    }
    only_small = argc > 1 && !strcmp(argv[1], "small");
    enum { N_CASES = sizeof cases / sizeof *cases };
    struct CMUnitTest tests[N_CASES + 2];
    size_t n = 0;
    tests[n++] = (struct CMUnitTest)cmocka_unit_test(test_no_work);
    tests[n++] = (struct CMUnitTest)cmocka_unit_test(test_spoiled);
    for (size_t i = 0; i < N_CASES; i++) {
        if (only_small && !cases[i].small) continue;
        tests[n++] = (struct CMUnitTest){ cases[i].name, test_case, NULL, NULL, (void *)(uintptr_t)&cases[i] };
    }
    return _cmocka_run_group_tests("cuda_decode", tests, n, NULL, NULL);
}
