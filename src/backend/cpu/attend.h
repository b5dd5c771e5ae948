/* Attention of a step over its plan on the CPU: what is read, by whom, on which thread.
 *
 * begin() turns the plan into items of work, once a step, for all layers:
 *   decode rows (the only row of their sequence in this step): an item is a cell with the rows that read it, so a cell
 *       shared by many sequences is read once; it leaves one state a (row, head, cell) in a workspace, and a second
 *       pass folds the states of each row.
 *   blocks (several rows of one sequence): an item walks the sequence's cells in order and folds as it goes.
 * A row whose states do not fit the workspace is a block of one row. Each (row, head) sees the same cells, the same
 * fold and the same arithmetic either way, so the bits are the same:
 *   cell from a fresh state; run = left fold of its cells; result = left fold of the runs.
 *
 * Queries are turned by (row position - base) in fp32 where they are used; base changes from cell to cell.
 * All memory is taken at open. Stepping thread; run() uses the pool's threads. */
#ifndef MEPIC_BACKEND_CPU_ATTEND_H
#define MEPIC_BACKEND_CPU_ATTEND_H

#include "backend/cpu/kernels.h"
#include "backend/cpu/slab.h"
#include "base/thread.h"
#include "model/rope.h"

typedef struct mp_attend mp_attend;

typedef struct mp_attend_config {
    const mp_cpu_kernels *kernels;
    mp_threads *threads;
    const mp_hparams *hp;
    const mp_rope_table *rope;
    const mp_slab *slab;
    uint32_t max_rows;
    size_t workspace; /* bytes for the states of decode rows */
} mp_attend_config;

/* Everything in `config` is borrowed until close. ERR_NOMEM. */
mepic_status mp_attend_open(const mp_attend_config *config, mp_attend **out, mepic_error *err);
void mp_attend_close(mp_attend *at); /* NULL is a no-op */

void mp_attend_begin(mp_attend *at, const mp_step *step);
/* q, out: [rows, n_heads * head_dim]; q is not turned yet. */
void mp_attend_run(mp_attend *at, uint32_t layer, const float *q, float *out);

#endif
