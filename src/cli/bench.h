/* What the benchmarks share. */
#ifndef MEPIC_CLI_BENCH_H
#define MEPIC_CLI_BENCH_H

#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/numbers.h"
#include "cli/reply.h"
#include "cli/table.h"

/* "# mepic 0.1.0, MODEL (llama, Q4_1), cpu/avx2, 2 threads, PROCESSOR": the conditions of every figure below it. */
void mp_bench_header(const mp_session *session);
/* Prints the table, and writes it to `csv` unless that is NULL. Returns the exit status; clears the table. */
int mp_bench_finish(mp_table *table, const char *command, const char *csv);
/* Prints `err` as "mepic bench NAME: ..." and returns the exit status of a run that failed. */
int mp_bench_fail(const char *command, mp_session *session, const mepic_error *err);

/* A prompt of `n` random tokens without chunks. */
mepic_status mp_bench_random_prompt(const mp_session *session, uint64_t seed, uint32_t n, mepic_prepared **out,
                                    mepic_error *err);

#endif
