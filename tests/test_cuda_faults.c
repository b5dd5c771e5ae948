/* backend/cuda when something is too large, too little, or fails: sentences with the numbers, an engine that says so
 * from then on, and a close that works. What needs no device is tested without one. The last test leaves the device's
 * context broken. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "backend/backend.h"
#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "support/models.h"
#include "support/replies.h"
#include "support/tiny.h"

static mp_backend_config good_config(void) {
    return (mp_backend_config){ .model = tiny_model(TINY_LLAMA),
                                .n_angles = 1024,
                                .kv_type = MEPIC_KV_BF16,
                                .page_size = 16,
                                .n_pages = 64,
                                .max_rows = 32,
                                .max_seqs = 4,
                                .max_refs = 8,
                                .gpu_memory = 0.9f };
}

/* In open and in what sizes the pool before it. */
static void expect_refused(const mp_backend_config *config, const char *word, const char *number) {
    size_t bytes = 7;
    mp_backend *none = NULL;
    mepic_error err = { 0 };
    expect(mp_backend_cuda.open(config, &none, &err), MEPIC_ERR_ARGUMENT, &err, word);
    assert_non_null(strstr(err.message, number));
    assert_null(none);
    expect(mp_backend_cuda.kv_memory(config, &bytes, &err), MEPIC_ERR_ARGUMENT, &err, word);
    assert_int_equal(bytes, 7);
}

static void counts_past_32_bits_are_refused(void **state) {
    (void)state;
    mp_backend_config config = good_config();
    config.max_rows = 49153;
    expect_refused(&config, "step_tokens", "49152");
    config.max_rows = UINT32_MAX;
    expect_refused(&config, "step_tokens", "49152");
    config = good_config();
    config.n_pages = INT32_MAX; /* times 2 kv heads, and the sequences' */
    expect_refused(&config, "pages", "2147483647");
    mp_model large = *config.model; /* 1,280 heads of 256, as rows of q, k and v */
    config = good_config();
    large.hp.n_heads = 1024;
    large.hp.n_kv_heads = 128;
    large.hp.head_dim = 256;
    config.model = &large;
    config.max_rows = 8192;
    expect_refused(&config, "step_tokens", "6553 rows");
}

/* ---- With a device ----------------------------------------------------------------------------------------------- */

static void a_pool_larger_than_the_device_is_refused_with_the_numbers(void **state) {
    (void)state;
    mp_backend_config config = good_config();
    mp_backend *b = NULL;
    mepic_error err = { 0 };
    assert_int_equal(mp_backend_cuda.open(&config, &b, &err), MEPIC_OK); /* what CUDA takes for itself, it has now */
    mp_backend_cuda.close(b);
    size_t left, total;
    assert_int_equal(cudaMemGetInfo(&left, &total), cudaSuccess);
    config.page_size = 128;
    size_t page = mp_kv_page_bytes(&config.model->hp, config.kv_type, config.page_size);
    config.n_pages = (uint32_t)(total / page + 1);
    b = NULL;
    char number[64];
    snprintf(number, sizeof number, "%zu MiB of device memory", config.n_pages * page >> 20);
    expect(mp_backend_cuda.open(&config, &b, &err), MEPIC_ERR_NOMEM, &err, number);
    printf("%s\n", err.message);
    snprintf(number, sizeof number, "of %zu MiB free", total >> 20);
    assert_non_null(strstr(err.message, number));
    assert_null(b);
}

static mepic_engine *open_on_device(const mepic_engine_options *given, mepic_status want, mepic_error *err) {
    static const char *path;
    mepic_engine_options options = *given;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.head_dim = spec.hp.rope.n_rot = tiny_head_dim;
    if (!path) path = tiny_model_write(&spec);
    options.model_path = path;
    options.device = "cuda";
    mepic_engine *engine = NULL;
    mepic_status got = mepic_engine_open(&options, &engine, err);
    if (got != want) fail_msg("%s", err->message);
    return engine;
}

/* A kernel that reads where nothing is: from then on every call of the process's context fails. */
static void a_device_that_fails_breaks_the_engine_and_close_works(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    mepic_error err = { 0 };
    mepic_engine *engine = open_on_device(&options, MEPIC_OK, &err), *idle = open_on_device(&options, MEPIC_OK, &err);
    mepic_prepared *prompt = prepare_text(engine, question);
    mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 20, .ignore_eos = true };
    mepic_request_id id;
    assert_int_equal(mepic_submit(engine, &request, &id, &err), MEPIC_OK);
    for (int i = 0; i < 3; i++) {
        mepic_event event;
        assert_int_equal(mepic_step(engine, &err), MEPIC_OK);
        while (mepic_poll(engine, &event)) assert_int_equal(event.kind, MEPIC_EVENT_TOKEN);
    }
    void *slab = NULL;
    assert_int_equal(cudaMalloc(&slab, 4096), cudaSuccess);
    assert_int_equal(mp_cu_zero_pages((const uint32_t *)64, (const uint32_t *)128, 1, slab, 4096, NULL), cudaSuccess);
    assert_int_not_equal(cudaDeviceSynchronize(), cudaSuccess);

    expect(mepic_step(engine, &err), MEPIC_ERR_BROKEN, &err, "restart the program");
    printf("%s\n", err.message);
    for (int i = 0; i < 2; i++) expect(mepic_step(engine, &err), MEPIC_ERR_BROKEN, &err, "the engine is broken");
    expect(mepic_submit(engine, &request, &id, &err), MEPIC_ERR_BROKEN, &err, "the engine is broken");
    assert_false(mepic_busy(engine));
    mepic_stats stats;
    mepic_stats_read(engine, &stats);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
    mepic_engine_close(idle);

    memset(&err, 0, sizeof err); /* another one says so at once */
    mepic_engine *none = NULL;
    mepic_engine_options again = options;
    again.device = "cuda";
    assert_int_not_equal(mepic_engine_open(&again, &none, &err), MEPIC_OK);
    assert_null(none);
    printf("%s\n", err.message);
    assert_true(err.message[0] != 0);
}

int main(void) {
    tiny_head_dim = 64;
    const struct CMUnitTest on_host[] = { cmocka_unit_test(counts_past_32_bits_are_refused) };
    const struct CMUnitTest on_device[] = {
        cmocka_unit_test(a_pool_larger_than_the_device_is_refused_with_the_numbers),
        cmocka_unit_test(a_device_that_fails_breaks_the_engine_and_close_works),
    };
    int failed = cmocka_run_group_tests_name("cuda_faults", on_host, NULL, NULL);
    if (mp_backend_cuda.n_devices() > 0 && mp_backend_cuda.usable(0)) {
        failed += cmocka_run_group_tests_name("cuda_faults on a device", on_device, NULL, NULL);
    }
    tiny_models_close();
    return failed;
}
