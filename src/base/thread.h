/* A pool of threads for data-parallel loops inside a step.
 *
 * The caller is one of the threads. Each thread starts with its share of the items, neighbours in order, and then takes
 * from others' shares. A loop ends when its items are done: a worker that the system has taken away delays the loop
 * only if it holds an item, and is not waited for otherwise. Whoever waits spins for some microseconds, then sleeps, so
 * a busy neighbour on the processors costs little more than its share. The pool belongs to one caller at a time.
 * Nothing is allocated after open. */
#ifndef MEPIC_BASE_THREAD_H
#define MEPIC_BASE_THREAD_H

#include "base/status.h"

typedef struct mp_threads mp_threads;

/* n: threads including the caller, 1..256; 0 = the processors this process may run on. */
mepic_status mp_threads_open(uint32_t n, mp_threads **out, mepic_error *err);
void mp_threads_close(mp_threads *threads); /* NULL is a no-op */
uint32_t mp_threads_count(const mp_threads *threads);

/* fn(ctx, item, thread) for item = 0 .. n_items - 1, each once, in any order; returns when all are done.
 * thread < mp_threads_count: for scratch. */
typedef void (*mp_task_fn)(void *ctx, uint32_t item, uint32_t thread);
void mp_threads_run(mp_threads *threads, uint32_t n_items, mp_task_fn fn, void *ctx);

#endif
