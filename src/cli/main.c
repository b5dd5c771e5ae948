/* `mepic`: finds the command and runs it. */
#include "cli/commands.h"
#include "cli/options.h"

#include <string.h>

typedef struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} command;

static const command commands[] = {
    { "run", mp_cli_run, "ask a model, once or in a conversation, with documents that are computed once" },
    { "serve", mp_cli_serve, "answer over HTTP, as OpenAI's API does" },
    { "chat", mp_cli_chat, "talk to a server on the terminal" },
    { "bench", mp_cli_bench, "measure: decode, prefill, reuse, documents" },
    { "eval", mp_cli_eval, "measure what reuse costs in accuracy, on questions over paragraphs" },
    { "inspect", mp_cli_inspect, "show what a model file holds and how it is served" },
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_help(FILE *file) {
    fprintf(file, "usage: mepic COMMAND [OPTIONS]\n\n"
                  "An LLM engine that computes each document's KV cache once and reads it at any position.\n\n");
    for (int i = 0; i < N_COMMANDS; i++) fprintf(file, "  %-9s %s\n", commands[i].name, commands[i].help);
    fprintf(file, "\n`mepic COMMAND --help` lists a command's options. `mepic --version` prints the version.\n"
                  "Exit status: 0 fine, 1 failed while running, 2 wrong usage or a refused file.\n");
}

static int unknown_command(const char *given) {
    const char *names[N_COMMANDS + 1] = { NULL };
    for (int i = 0; i < N_COMMANDS; i++) names[i] = commands[i].name;
    const char *nearest = mp_nearest_name(given, names);
    fprintf(stderr, "mepic: there is no command '%.40s'", given);
    if (nearest)
        fprintf(stderr, "; did you mean %s?\n", nearest);
    else
        fprintf(stderr, "; mepic --help lists them\n");
    return MP_EXIT_USAGE;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return MP_EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_help(stdout);
        return MP_EXIT_OK;
    }
    if (strcmp(name, "--version") == 0) {
        printf("mepic %s\n", MEPIC_VERSION);
        return MP_EXIT_OK;
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(name, commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
    }
    return unknown_command(name);
}
