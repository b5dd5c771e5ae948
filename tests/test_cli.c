/* The program: what it prints, what it refuses and with which exit status, and what it answers with a model of random
 * weights. argv[1] is the program. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/tiny.h"

enum { OUTPUT_MAX = 65536, ARGS_MAX = 48 };

static const char *program;
static char directory[64];

typedef struct result {
    int status; /* exit status; -1: ended by a signal */
    char out[OUTPUT_MAX], err[OUTPUT_MAX];
} result;

static result last;

/* Valid for the next seven calls. */
static const char *path_of(const char *name) {
    static char paths[8][160];
    static unsigned next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

static void write_file(const char *name, const char *bytes, size_t n) {
    FILE *file = fopen(path_of(name), "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

static void read_file(const char *name, char *out) {
    FILE *file = fopen(path_of(name), "r");
    assert_non_null(file);
    out[fread(out, 1, OUTPUT_MAX - 1, file)] = 0;
    fclose(file);
}

static void redirect(const char *name, int flags, int to) {
    int fd = open(path_of(name), flags, 0600);
    if (fd < 0 || dup2(fd, to) < 0) _exit(99);
    close(fd);
}

/* Runs the program with `input` [n_input] on standard input; the last argument is NULL. */
static const result *run(const char *input, size_t n_input, const char *const *args) {
    write_file("in", input, n_input);
    char *argv[ARGS_MAX] = { (char *)program };
    int n = 1;
    for (; args[n - 1]; n++) {
        assert_true(n + 1 < ARGS_MAX);
        argv[n] = (char *)args[n - 1];
    }
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        redirect("in", O_RDONLY, STDIN_FILENO);
        redirect("out", O_WRONLY | O_CREAT | O_TRUNC, STDOUT_FILENO);
        redirect("err", O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO);
        execv(program, argv);
        _exit(98);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    last.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    read_file("out", last.out);
    read_file("err", last.err);
    return &last;
}

#define RUN_BYTES(input, n, ...) run(input, n, (const char *const[]){ __VA_ARGS__, NULL })
#define RUN_WITH(input, ...) RUN_BYTES(input, strlen(input), __VA_ARGS__)
#define RUN(...) RUN_BYTES("", 0, __VA_ARGS__)

static void expect_in(const char *text, const char *words) {
    if (!strstr(text, words)) fail_msg("'%s' is not in:\n%s\n(standard error: %s)", words, text, last.err);
}

static void expect_refused(const result *r, const char *words) {
    if (r->status != 2) fail_msg("status %d instead of 2: %s", r->status, r->err);
    expect_in(r->err, words);
    if (strchr(r->err, '\n') != r->err + strlen(r->err) - 1) fail_msg("not one line: %s", r->err);
    assert_string_equal(r->out, "");
}

/* ---- Without a model --------------------------------------------------------------------------------------------- */

static void help_and_version(void **state) {
    (void)state;
    assert_int_equal(RUN("--version")->status, 0);
    assert_string_equal(last.out, "mepic " MEPIC_VERSION "\n");
    assert_int_equal(RUN("--help")->status, 0);
    expect_in(last.out, "usage: mepic COMMAND");
    static const char *const commands[] = { "run", "serve", "chat", "bench", "eval", "inspect" };
    for (size_t i = 0; i < 6; i++) {
        expect_in(RUN("--help")->out, commands[i]);
        assert_int_equal(RUN(commands[i], "--help")->status, 0);
        expect_in(last.out, "usage: mepic ");
    }
    static const char *const benchmarks[] = { "decode", "prefill", "reuse", "documents" };
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(RUN("bench", benchmarks[i], "--help")->status, 0);
        expect_in(last.out, "--kv-memory SIZE");
    }
    assert_int_equal(RUN("bench")->status, 2);
    expect_refused(RUN("rnu"), "did you mean run?");
    expect_refused(RUN("bench", "deocde"), "did you mean decode");
}

static void bad_options_are_named(void **state) {
    (void)state;
    static const char *const bad[][3] = {
        { "--threads", "0", "1 to 256" },
        { "--page-size", "17", "16, 32, 64 or 128" },
        { "--pages", "3", "4 to 16777216" },
        { "--kv-memory", "12Q", "512M or 2G" },
        { "--context", "1", "16 to" },
        { "--kv-type", "f8", "f16, bf16, f32 or fp8" },
        { "--weights", "q8", "bf16 or fp8" },
        { "--reuse", "all", "none, prefix or mepic" },
        { "--link-tokens", "some", "all" },
        { "--eviction", "fifo", "s3fifo or lru" },
        { "--max-running", "-1", "1 to" },
        { "--step-tokens", "1e3", "1 to" },
        { "--max-tokens", "0", "1 to" },
        { "--temperature", "hot", "0 to 100" },
        { "--top-k", "3.5", "0 to" },
        { "--top-p", "2", "0 to 1" },
        { "--min-p", "-0.1", "0 to 1" },
        { "--repeat-penalty", "0", "0.01 to 100" },
        { "--repeat-window", "0", "1 to" },
        { "--presence-penalty", "x", "-100 to 100" },
        { "--frequency-penalty", "x", "-100 to 100" },
        { "--seed", "-1", "0 to" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        expect_refused(RUN("run", "-m", "x", bad[i][0], bad[i][1]), bad[i][0]);
        expect_in(last.err, bad[i][1]);
        expect_in(last.err, bad[i][2]);
    }
    expect_refused(RUN("run", "--treads", "3"), "did you mean --threads?");
    expect_refused(RUN("run", "-p"), "--prompt needs a value");
    expect_refused(RUN("run", "file"), "unexpected argument 'file'");
    expect_refused(RUN("run", "-p", "x"), "no model given");
    expect_refused(RUN("run", "-m", "x", "-p", ""), "the prompt is empty");
    expect_refused(RUN("run", "-m", "x", "--json"), "--json needs a prompt");
    expect_refused(RUN("run", "-m", "x", "--stop", ""), "--stop");
    expect_refused(RUN("bench", "decode", "--contexts", "1,x"), "--contexts");
    expect_refused(RUN("bench", "reuse", "--pool", "3", "--paragraphs", "4"), "--paragraphs 4");
    expect_refused(RUN("bench", "documents", "-m", "x"), "no documents");
    expect_refused(RUN("eval", "-m", "x"), "--out");
}

static void refused_files_are_named(void **state) {
    (void)state;
    expect_refused(RUN("run", "-m", path_of("missing.gguf"), "-p", "x"), "missing.gguf");
    write_file("junk.gguf", "GGUF junk that is not a model", 29);
    expect_refused(RUN("run", "-m", path_of("junk.gguf"), "-p", "x"), "junk.gguf");
    write_file("empty.gguf", "", 0);
    expect_refused(RUN("bench", "decode", "-m", path_of("empty.gguf")), "empty.gguf");
    expect_refused(RUN("inspect", path_of("junk.gguf")), "junk.gguf");
    write_file("empty.txt", "\n", 1);
    expect_refused(RUN("run", "-m", tiny_model_path(), "-d", path_of("empty.txt"), "-p", "x"), "empty.txt is empty");
    expect_refused(RUN("run", "-m", tiny_model_path(), "-d", path_of("none.txt"), "-p", "x"),
                   "none.txt cannot be opened");
    expect_refused(RUN("run", "-m", tiny_model_path(), "--isa", "mmx", "-p", "x"), "mmx");
}

/* ---- With a model of random weights ------------------------------------------------------------------------------ */

static void write_documents(void) {
    char text[2000];
    for (int d = 0; d < 3; d++) {
        size_t n = 0;
        for (int i = 0; i < 60; i++) n += (size_t)snprintf(text + n, sizeof text - n, "word%d %c ", i, 'a' + d);
        write_file(d == 0 ? "d0" : d == 1 ? "d1" : "d2", text, n);
    }
    /* Any bytes are a document. */
    for (int i = 0; i < 600; i++) text[i] = (char)(i * 7);
    write_file("bytes", text, 600);
}

static json_t *run_json(const char *reuse, const char *first, const char *second) {
    RUN("run", "-m", tiny_model_path(), "--cache-dir", "none", "-d", path_of(first), "-d", path_of("d2"), "-d",
        path_of(second), "-s", "Be brief.", "-p", "What is it?", "-n", "8", "--ignore-eos", "--reuse", reuse, "--json",
        "--hash", "--pages", "512", "--context", "4096", "-q");
    if (last.status != 0) fail_msg("status %d: %s", last.status, last.err);
    json_error_t parse;
    json_t *root = json_loads(last.out, JSON_REJECT_DUPLICATES, &parse);
    if (!root) fail_msg("line %d: %s in %s", parse.line, parse.text, last.out);
    return root;
}

static json_int_t usage_of(json_t *root, const char *name) {
    json_t *value = json_object_get(json_object_get(root, "usage"), name);
    if (!json_is_integer(value)) fail_msg("usage.%s is missing in %s", name, last.out);
    return json_integer_value(value);
}

static json_int_t sum_of_parts(json_t *root) {
    return usage_of(root, "prefix_tokens") + usage_of(root, "chunk_tokens") + usage_of(root, "linked_tokens") +
           usage_of(root, "compiled_tokens") + usage_of(root, "computed_tokens");
}

static void json_has_everything(void **state) {
    (void)state;
    write_documents();
    json_t *mepic = run_json("mepic", "d0", "bytes");
    assert_int_equal(usage_of(mepic, "prompt_tokens"), sum_of_parts(mepic));
    assert_int_equal(usage_of(mepic, "completion_tokens"), 8);
    assert_true(usage_of(mepic, "compiled_tokens") > 0);
    assert_true(usage_of(mepic, "linked_tokens") > 0);
    assert_string_equal(json_string_value(json_object_get(mepic, "finish")), "length");
    assert_string_equal(json_string_value(json_object_get(mepic, "reuse")), "mepic");
    assert_int_equal(json_array_size(json_object_get(mepic, "documents")), 3);
    assert_true(json_is_string(json_object_get(mepic, "answer")));
    json_t *again = run_json("mepic", "d0", "bytes");
    const char *hash = json_string_value(json_object_get(mepic, "logits_hash"));
    assert_string_equal(hash, json_string_value(json_object_get(again, "logits_hash")));
    json_t *none = run_json("none", "d0", "bytes");
    assert_int_equal(usage_of(none, "computed_tokens"), usage_of(none, "prompt_tokens"));
    assert_int_equal(usage_of(none, "prompt_tokens"), usage_of(mepic, "prompt_tokens"));
    json_decref(mepic);
    json_decref(again);
    json_decref(none);
}

static void answers_stream_and_end_with_one_line(void **state) {
    (void)state;
    const result *r = RUN_WITH("a question\n", "run", "-m", tiny_model_path(), "--cache-dir", "none", "-p", "-", "-n",
                               "4", "--ignore-eos", "--pages", "256", "-q");
    assert_int_equal(r->status, 0);
    expect_in(r->err, "prompt ");
    expect_in(r->err, "reply 4 tokens");
    expect_in(r->err, "pages held ");
    assert_true(strchr(r->err, '\n') == r->err + strlen(r->err) - 1);
    assert_true(r->out[0] != 0 && r->out[strlen(r->out) - 1] == '\n');
}

/* The signal is sent when the answer has begun, and long before it could end. */
static void an_interrupted_answer_still_ends_with_its_line(void **state) {
    (void)state;
    int ends[2], status;
    char byte;
    assert_int_equal(pipe(ends), 0);
    const char *model = tiny_model_path();
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        redirect("err", O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO);
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        execl(program, program, "run", "-m", model, "--cache-dir", "none", "-p", "x", "--ignore-eos", "-q",
              (char *)NULL);
        _exit(98);
    }
    close(ends[1]);
    assert_int_equal(read(ends[0], &byte, 1), 1);
    assert_int_equal(kill(child, SIGINT), 0);
    while (read(ends[0], &byte, 1) == 1) {
    }
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    read_file("err", last.err);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 1);
    expect_in(last.err, "reply ");
}

static void expect_too_long(const char *words) {
    assert_int_equal(last.status, 1);
    expect_in(last.err, words);
    expect_in(last.err, "context of 4096");
    assert_true(strchr(last.err, '\n') == last.err + strlen(last.err) - 1);
}

/* As a prompt and as a document. */
static void megabytes_are_refused_with_the_numbers(void **state) {
    (void)state;
    const size_t n = 4 << 20;
    char *bytes = malloc(n);
    assert_non_null(bytes);
    memset(bytes, 'a', n);
    RUN_BYTES(bytes, n, "run", "-m", tiny_model_path(), "--cache-dir", "none", "-p", "-", "-q");
    expect_too_long("the prompt has 4194");
    memset(bytes, 0, n);
    write_file("zeros", bytes, n);
    RUN("run", "-m", tiny_model_path(), "--cache-dir", "none", "-d", path_of("zeros"), "-p", "x", "-q");
    expect_too_long("the prompt has 4194");
    free(bytes);
}

/* Documents hold any bytes (json_has_everything asks about one); in a prompt what is no UTF-8 is replaced. */
static void odd_bytes_are_text_or_refused(void **state) {
    (void)state;
    const char *model = tiny_model_path();
    RUN_WITH("\xff\xfe\xc3", "run", "-m", model, "--cache-dir", "none", "-p", "-", "-n", "2", "--ignore-eos", "-q");
    assert_int_equal(last.status, 0);
    expect_in(last.err, "reply 2 tokens");
    expect_refused(RUN_BYTES("ab\0cd\n", 6, "run", "-m", model, "-p", "-"), "byte 3 of 6");
    expect_refused(RUN_WITH("\n", "run", "-m", model, "-p", "-"), "the prompt is empty");
    RUN_BYTES("a\0b\nwhat?\n", 10, "run", "-m", model, "--cache-dir", "none", "-n", "2", "--ignore-eos", "-q");
    assert_int_equal(last.status, 0);
    expect_in(last.err, "a line with a NUL byte is not taken");
    expect_in(last.err, "reply 2 tokens");
}

static void a_conversation_changes_its_documents(void **state) {
    (void)state;
    write_documents();
    char input[1000];
    snprintf(input, sizeof input,
             "/add %s\n/docs\n/move 2 1\n/docs\n/drop 7\none?\n/drop 1\ntwo?\n/reuse none\n/reuse x\n/stats\n/reset\n"
             "/system S\nthree?\n/frobnicate\n/add %s\n/quit\nnever asked\n",
             path_of("d1"), path_of("missing"));
    const result *r = RUN_WITH(input, "run", "-m", tiny_model_path(), "--cache-dir", "none", "-d", path_of("d0"), "-n",
                               "4", "--pages", "512", "--context", "4096", "-q");
    assert_int_equal(r->status, 0);
    expect_in(r->out, "  1  d0");
    expect_in(r->out, "  2  d1");
    expect_in(r->out, "  1  d1");
    expect_in(r->out, "documents found in the cache");
    expect_in(r->err, "'7' is not the number of a document");
    expect_in(r->err, "'x' is not none, prefix or mepic");
    expect_in(r->err, "no command /frobnicate");
    expect_in(r->err, "missing cannot be opened");
    int answers = 0;
    for (const char *at = r->err; (at = strstr(at, "[prompt ")); at++) answers++;
    assert_int_equal(answers, 3);
}

static void benchmarks_print_their_tables(void **state) {
    (void)state;
    write_documents();
    const char *model = tiny_model_path();
    RUN("bench", "decode", "-m", model, "--contexts", "0,64", "--batches", "1,3", "--tokens", "2", "--repeats", "1",
        "--pages", "256", "--csv", path_of("csv"), "-q");
    assert_int_equal(last.status, 0);
    expect_in(last.out, "tokens/s");
    char csv[OUTPUT_MAX];
    read_file("csv", csv);
    int lines = 0;
    for (const char *at = csv; *at; at++) lines += *at == '\n';
    assert_int_equal(lines, 5);
    assert_int_equal(RUN("bench", "prefill", "-m", model, "--lengths", "40", "--repeats", "1", "-q")->status, 0);
    write_file("questions", "# comment\nwhat? | x\n\nhow?\n", 27);
    RUN("bench", "documents", "-m", model, "-d", path_of("d0"), "-d", path_of("d1"), "--questions",
        path_of("questions"), "-n", "3", "--cache-dir", "none", "--pages", "512", "--context", "4096", "-q");
    assert_int_equal(last.status, 0);
    expect_in(last.out, "1. what?");
    expect_in(last.out, "2. how?");
    expect_in(last.out, "all but the first");
}

static void write_questions(void) {
    FILE *file = fopen(path_of("squad.json"), "w");
    assert_non_null(file);
    fprintf(file, "{\"data\":[{\"paragraphs\":[");
    for (int p = 0; p < 6; p++) {
        fprintf(file, "%s{\"context\":\"", p ? "," : "");
        for (int i = 0; i < 50; i++) fprintf(file, "p%d word%d ", p, i);
        fprintf(file, "\",\"qas\":[{\"question\":\"what is p%d?\",\"answers\":[{\"text\":\"word\"}]}]}", p);
    }
    fprintf(file, "]}]}");
    assert_int_equal(fclose(file), 0);
}

static void reuse_is_measured_and_evaluated(void **state) {
    (void)state;
    write_questions();
    const char *model = tiny_model_path();
    char data[160], out[160];
    snprintf(data, sizeof data, "%s/squad.json", directory);
    snprintf(out, sizeof out, "%s/eval.csv", directory);
    RUN("bench", "reuse", "-m", model, "--data", data, "--requests", "3", "--concurrency", "2", "--paragraphs", "2",
        "--pool", "4", "-n", "2", "--cache-dir", "none", "--pages", "1024", "--context", "4096", "-q");
    if (last.status != 0) fail_msg("%s", last.err);
    expect_in(last.out, "resident  mepic");
    for (int round = 0; round < 2; round++) {
        RUN("eval", "-m", model, "--data", data, "-o", out, "--questions", round ? "3" : "2", "--distractors", "2",
            "--links", "0,16", "-n", "3", "--cache-dir", "none", "--pages", "1024", "--context", "4096", "-q");
        if (last.status != 0) fail_msg("%s", last.err);
        expect_in(last.out, "(everything computed)");
    }
    char csv[OUTPUT_MAX];
    read_file("eval.csv", csv);
    int lines = 0;
    for (const char *at = csv; *at; at++) lines += *at == '\n';
    assert_int_equal(lines, 2 + 3 * 5); // settings, titles; none and two links after two contexts
    expect_refused(
        RUN("eval", "-m", model, "--data", data, "-o", out, "--distractors", "2", "--questions", "2", "--seed", "9"),
        "other settings");
}

static int make_directory(void **state) {
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/mepic-test-XXXXXX");
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    static const char *const names[] = { "in",        "out",       "err",        "junk.gguf", "empty.gguf",
                                         "empty.txt", "d0",        "d1",         "d2",        "bytes",
                                         "csv",       "questions", "squad.json", "eval.csv",  "eval.csv.none",
                                         "zeros" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(path_of(names[i]));
    return rmdir(directory);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: test_cli PROGRAM\n");
        return 2;
    }
    program = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(help_and_version),
        cmocka_unit_test(bad_options_are_named),
        cmocka_unit_test(refused_files_are_named),
        cmocka_unit_test(json_has_everything),
        cmocka_unit_test(answers_stream_and_end_with_one_line),
        cmocka_unit_test(an_interrupted_answer_still_ends_with_its_line),
        cmocka_unit_test(megabytes_are_refused_with_the_numbers),
        cmocka_unit_test(odd_bytes_are_text_or_refused),
        cmocka_unit_test(a_conversation_changes_its_documents),
        cmocka_unit_test(benchmarks_print_their_tables),
        cmocka_unit_test(reuse_is_measured_and_evaluated),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
