/* A backend that runs ahead, as a device does, over the CPU's: it samples by itself, knows what it sampled for every
 * sequence, and hands tokens over when it is waited for and not before. It computes at once, which nobody can tell:
 * what is asked of a backend happens in order. What the table asks of the engine is checked, and it can be made to
 * fail. */
#ifndef MEPIC_TESTS_AHEAD_H
#define MEPIC_TESTS_AHEAD_H

#include "engine/engine.h"

typedef struct ahead_backend ahead_backend;

typedef enum ahead_failure {
    AHEAD_FAILS_NEVER,
    AHEAD_FAILS_TO_END,
    AHEAD_FAILS_TO_SAMPLE,
    AHEAD_FAILS_TO_WAIT
} ahead_failure;

typedef struct ahead_seen {
    uint64_t steps, rows, ahead; /* ahead: steps begun before the one before was waited for, */
    uint64_t unknown;            /* and rows whose token nobody knew but the backend */
    uint64_t rows_of[MP_ROW_KINDS], ns_of[MP_ROW_KINDS]; /* of the steps that were waited for */
} ahead_seen;

/* Puts it between the engine and its CPU backend, which close closes as well. */
ahead_backend *ahead_put(mepic_engine *engine);
/* From the n-th step on. */
void ahead_fail(ahead_backend *a, ahead_failure how, uint64_t n);
/* Every n-th row is left to the host; 0: none. */
void ahead_leave_to_host(ahead_backend *a, uint32_t n);
/* Each row of the n-th step takes n ns, which pass for whoever waits for the step. */
void ahead_take_time(ahead_backend *a, void (*pass)(uint64_t ns));
const ahead_seen *ahead_look(const ahead_backend *a);

#endif
