/* cli/inspect: the report of a good model as JSON and as text, and status 2 with one line for everything else. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/commands.h"
#include "support/tiny.h"

/* Runs the command with stdout and stderr caught. */
static int run(const char *option, const char *path, char *out, char *err, size_t cap) {
    FILE *files[2] = { tmpfile(), tmpfile() };
    char *texts[2] = { out, err };
    int saved[2], status;
    assert_true(files[0] && files[1]);
    fflush(NULL);
    for (int i = 0; i < 2; i++) {
        saved[i] = dup(i + 1);
        assert_true(saved[i] >= 0 && dup2(fileno(files[i]), i + 1) >= 0);
    }
    char name[] = "inspect", first[64], second[256];
    char *argv[4] = { name };
    int argc = 1;
    if (option) {
        snprintf(first, sizeof first, "%s", option);
        argv[argc++] = first;
    }
    if (path) {
        snprintf(second, sizeof second, "%s", path);
        argv[argc++] = second;
    }
    status = mp_cli_inspect(argc, argv);
    fflush(NULL);
    for (int i = 0; i < 2; i++) {
        dup2(saved[i], i + 1);
        close(saved[i]);
        rewind(files[i]);
        texts[i][fread(texts[i], 1, cap - 1, files[i])] = 0;
        fclose(files[i]);
    }
    return status;
}

enum { CAP = 1 << 16 };
static char out[CAP], err[CAP];

static void the_report_as_json(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_QWEN2);
    spec.hp.rope.scaling = MP_ROPE_YARN;
    assert_int_equal(run("--json", tiny_model_write(&spec), out, err, CAP), 0);
    assert_string_equal(err, "");
    json_t *report = json_loads(out, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(report);
    assert_string_equal(json_string_value(json_object_get(report, "architecture")), "qwen2");
    assert_int_equal(json_integer_value(json_object_get(report, "kv_bytes_per_token_f16")), 2 * 2 * 2 * 2 * 16);
    assert_int_equal(json_integer_value(json_object_get(report, "kv_bytes_per_token_fp8")), 2 * 2 * (2 * 16 + 8));
    json_t *hp = json_object_get(report, "hyper_parameters"), *position = json_object_get(report, "position");
    assert_int_equal(json_integer_value(json_object_get(hp, "embedding")), 64);
    assert_true(json_is_true(json_object_get(hp, "qkv_bias")));
    assert_true(json_is_true(json_object_get(position, "exact_at_any_position")));
    assert_non_null(strstr(json_string_value(json_object_get(position, "why")), "YaRN"));
    assert_float_equal(json_real_value(json_object_get(position, "factor")), 4, 0);
    assert_string_equal(json_string_value(json_object_get(json_object_get(report, "tokenizer"), "chat")), "chatml");
    json_t *tensors = json_object_get(report, "tensors"), *embd = json_array_get(tensors, 0);
    assert_int_equal(json_array_size(tensors), 3 + 2 * 12);
    assert_string_equal(json_string_value(json_object_get(embd, "name")), "token_embd.weight");
    assert_int_equal(json_integer_value(json_array_get(json_object_get(embd, "shape"), 1)), 299);
    assert_int_equal(json_integer_value(json_object_get(embd, "bytes")), 299 * 64 * 4);
    json_decref(report);
}

static void the_report_as_text(void **state) {
    (void)state;
    assert_int_equal(run(NULL, tiny_model_path(), out, err, CAP), 0);
    assert_non_null(strstr(out, "only differences of positions matter"));
    assert_non_null(strstr(out, "tokenizer.ggml.tokens = [299 strings]"));
    assert_non_null(strstr(out, "blk.1.ffn_down.weight"));
    assert_non_null(strstr(out, "128 x 64"));
}

static void text_in_a_file_cannot_steer_the_terminal(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    const char *path = tiny_model_write(&spec);
    size_t n;
    uint8_t *bytes = tiny_model_bytes(&spec, &n), *name = memmem(bytes, n, "synthetic", 9);
    assert_non_null(name);
    memcpy(name, "\x1b[2J\n\xff\xfe__", 9);
    name = memmem(bytes, n, "general.name", 12);
    memcpy(name, "\x1b]0;\xc3\x28......", 12);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
    free(bytes);
    for (int as_json = 0; as_json < 2; as_json++) {
        assert_int_equal(run(as_json ? "--json" : NULL, path, out, err, CAP), 0);
        assert_null(strchr(out, 0x1b));
        assert_null(strchr(out, '\xff'));
    }
    json_t *report = json_loads(out, 0, NULL);
    assert_non_null(report);
    json_decref(report);
}

static void a_refused_file_is_one_line_and_status_2(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    const char *path = tiny_model_write(&spec);
    assert_int_equal(truncate(path, 5000), 0);
    const char *const cases[][2] = { { path, "tokenizer.ggml.merges" },
                                     { "/nonexistent.gguf", "/nonexistent.gguf" },
                                     { "/", "not a regular file" },
                                     { NULL, "give a model file" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(run(NULL, cases[i][0], out, err, CAP), 2);
        assert_string_equal(out, "");
        assert_non_null(strstr(err, cases[i][1]));
        assert_ptr_equal(strchr(err, '\n'), err + strlen(err) - 1);
    }
    assert_int_equal(run("--jsn", path, out, err, CAP), 2);
    assert_int_equal(run("--help", NULL, out, err, CAP), 0);
    assert_non_null(strstr(out, "usage: mepic inspect"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_report_as_json),
        cmocka_unit_test(the_report_as_text),
        cmocka_unit_test(text_in_a_file_cannot_steer_the_terminal),
        cmocka_unit_test(a_refused_file_is_one_line_and_status_2),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
