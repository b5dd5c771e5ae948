/* `mepic bench`: finds the benchmark; and what they share. */
#include "cli/bench.h"

#include <string.h>

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} benchmarks[] = {
    { "decode", mp_bench_decode, "tokens a second, by context length and batch size" },
    { "prefill", mp_bench_prefill, "prompt tokens a second, by prompt length" },
    { "reuse", mp_bench_reuse, "requests over shared paragraphs, the policies side by side" },
    { "documents", mp_bench_documents, "questions over your own documents in changing order, mepic against none" },
};
enum { N_BENCHMARKS = sizeof benchmarks / sizeof benchmarks[0] };

static void print_help(FILE *file) {
    fprintf(file, "usage: mepic bench BENCHMARK -m FILE [OPTIONS]\n\n");
    for (int i = 0; i < N_BENCHMARKS; i++) fprintf(file, "  %-10s %s\n", benchmarks[i].name, benchmarks[i].help);
    fprintf(file, "\n`mepic bench BENCHMARK --help` lists the options.\n");
}

int mp_cli_bench(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return MP_EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        print_help(stdout);
        return MP_EXIT_OK;
    }
    const char *names[N_BENCHMARKS + 1] = { NULL };
    for (int i = 0; i < N_BENCHMARKS; i++) {
        if (strcmp(name, benchmarks[i].name) == 0) return benchmarks[i].run(argc - 1, argv + 1);
        names[i] = benchmarks[i].name;
    }
    const char *nearest = mp_nearest_name(name, names);
    fprintf(stderr, "mepic bench: there is no benchmark '%.40s'; %s%s\n", name, nearest ? "did you mean " : "",
            nearest ? nearest : "mepic bench --help lists them");
    return MP_EXIT_USAGE;
}

/* The processor's name as the system has it, cut; "unknown processor" where it does not say. */
static void read_processor(char *out, size_t cap) {
    snprintf(out, cap, "unknown processor");
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file) return;
    char line[256];
    while (fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(out, cap, "%s", colon + 2);
        break;
    }
    fclose(file);
}

void mp_bench_header(const mp_session *session) {
    const mepic_model_info *m = &session->info;
    char processor[128];
    read_processor(processor, sizeof processor);
    printf("# mepic %s, %s (%s, %s), %s, %u threads, pages of %u, %s\n", MEPIC_VERSION, m->name, m->architecture,
           m->file_types, m->backend, session->threads, m->page_size, processor);
    fflush(stdout);
}

int mp_bench_finish(mp_table *table, const char *command, const char *csv) {
    int result = MP_EXIT_OK;
    mepic_error err;
    if (table->failed) {
        fprintf(stderr, "mepic bench %s: out of memory; the table is not whole\n", command);
        result = MP_EXIT_FAILURE;
    }
    mp_table_print(table, stdout);
    if (csv && mp_table_write_csv(table, csv, &err) != MEPIC_OK) {
        fprintf(stderr, "mepic bench %s: %s\n", command, err.message);
        result = MP_EXIT_FAILURE;
    }
    mp_table_clear(table);
    return result;
}

int mp_bench_fail(const char *command, mp_session *session, const mepic_error *err) {
    mp_progress_clear(&session->progress);
    fprintf(stderr, "mepic bench %s: %s\n", command, err->message);
    return MP_EXIT_FAILURE;
}

mepic_status mp_bench_random_prompt(const mp_session *session, uint64_t seed, uint32_t n_chunks, uint32_t chunk_tokens,
                                    uint32_t n, mepic_prepared **out, mepic_error *err) {
    mepic_segment segments[MP_BENCH_CHUNKS_MAX + 1];
    size_t total = (size_t)n_chunks * chunk_tokens + n;
    int32_t *tokens = mp_alloc(total * sizeof *tokens);
    if (!tokens) return mp_fail_nomem(err, "a random prompt", total * sizeof *tokens);
    mp_random random = { .state = 0 };
    for (size_t i = 0; i < total; i++) {
        if (i == total - n) random = (mp_random){ .state = seed };
        tokens[i] = (int32_t)mp_random_below(&random, session->info.n_vocab);
    }
    for (uint32_t c = 0; c < n_chunks; c++) {
        segments[c] = (mepic_segment){ .kind = MEPIC_CHUNK,
                                       .tokens = tokens + (c + seed) % n_chunks * chunk_tokens,
                                       .n_tokens = chunk_tokens };
    }
    segments[n_chunks] = (mepic_segment){ .kind = MEPIC_TEXT, .tokens = tokens + total - n, .n_tokens = n };
    const mepic_prompt prompt = {
        .size = sizeof prompt, .segments = segments, .n_segments = n_chunks + 1, .no_bos = true
    };
    mepic_status status = mepic_prepare(session->engine, &prompt, out, err);
    mp_free(tokens);
    return status;
}
