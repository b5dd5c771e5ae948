/* The commands of `mepic`: each gets argv from its own name on and returns the exit status. One file each. */
#ifndef MEPIC_CLI_COMMANDS_H
#define MEPIC_CLI_COMMANDS_H

int mp_cli_run(int argc, char **argv);
int mp_cli_chat(int argc, char **argv);
int mp_cli_serve(int argc, char **argv);
int mp_cli_bench(int argc, char **argv);
int mp_cli_eval(int argc, char **argv);
int mp_cli_inspect(int argc, char **argv);

/* Of `mepic bench`. */
int mp_bench_decode(int argc, char **argv);
int mp_bench_prefill(int argc, char **argv);
int mp_bench_reuse(int argc, char **argv);
int mp_bench_documents(int argc, char **argv);

#endif
