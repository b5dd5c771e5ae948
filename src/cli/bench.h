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

enum { MP_BENCH_CHUNKS_MAX = 256 };

/* A prompt of n_chunks chunks of chunk_tokens random tokens each, and n random tokens. Every seed has the same chunks,
 * starting with another one. */
mepic_status mp_bench_random_prompt(const mp_session *session, uint64_t seed, uint32_t n_chunks, uint32_t chunk_tokens,
                                    uint32_t n, mepic_prepared **out, mepic_error *err);

#endif
