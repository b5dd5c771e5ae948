/* A step's attention work: which rows read which runs, each shared cell once (docs/ARCHITECTURE.md, section 7).
 *
 * Owned by the scheduler, edited when a sequence joins, grows or leaves, read by a backend during a step. A steady
 * decode step changes only the rows and the private tails.
 *
 *   sequence s ── refs[0..n) in fold order: shared runs by position, then its private stream ──► cell ──► pages
 *                      each ref: base, range, page mask                  cell ──► its readers (a list through refs)
 *
 * Cell: cell_tokens consecutive tokens of a run counted from the run's start (the last one may be shorter); how many is
 * the backend's wish. A full cell is found by its last page, which names the whole chain before it; so a chunk read by
 * many requests, or a common beginning of private streams, is one cell with many readers.
 *
 * Meaning. A row of sequence s sees token i of the cell behind refs[k] when
 *     lo <= i < hi, bit (i / page_size) of mask is set, and
 *     shared:  first + i <  row position       (first: the position of the cell's token 0 in this request)
 *     private: first + i <= row stream index   (first: the stream index of the cell's token 0)
 * and its query is turned by (row position - base). Private cells have base 0.
 * Merge. The cells of a run are folded from left to right, then the runs of the sequence; `run_start` marks where a run
 * begins. Each cell starts from a fresh state, so splitting work never changes bits.
 *
 * All memory is allocated at open. One thread. */
#ifndef MEPIC_KV_PLAN_H
#define MEPIC_KV_PLAN_H

#include "base/status.h"

#define MP_CELL_TOKENS_MAX 1024u
#define MP_CELL_PAGES_MAX 64u /* page_size >= 16 */
#define MP_NONE UINT32_MAX

typedef uint32_t mp_page; /* index into the pool; MP_NONE: none */

/* A row's token that only the backend knows: what the step before sampled for the row's sequence. */
#define MP_TOKEN_SAMPLED (-1)

typedef struct mp_cell {
    mp_page pages[MP_CELL_PAGES_MAX];
    uint32_t n_pages;
    uint32_t n_tokens;
    uint32_t first_reader; /* ref id, MP_NONE when the cell is free */
    uint32_t n_readers;
} mp_cell;

typedef struct mp_cell_ref {
    uint32_t cell;
    uint32_t seq;
    uint32_t next, prev; /* other readers of the cell, as ref ids; MP_NONE at the ends */
    int32_t base;        /* position minus angle */
    int32_t first;
    uint64_t mask;       /* bit p: page p of the cell may be seen */
    uint16_t lo, hi;
    bool shared;
    bool run_start;
} mp_cell_ref;

typedef struct mp_plan_seq {
    uint32_t row, n_rows; /* this step's rows of the sequence, consecutive and in stream order; n_rows 0: none */
    uint32_t n_refs;
    mp_cell_ref *refs; /* [max_refs]; ref id = seq * max_refs + k */
} mp_plan_seq;

typedef struct mp_plan {
    uint32_t page_size, cell_tokens, max_seqs, max_refs, max_cells;
    mp_plan_seq *seqs; /* [max_seqs] */
    mp_cell *cells;    /* [max_cells] */
    uint32_t *used;    /* [n_used] cells with readers, in no order */
    uint32_t n_used;
    uint32_t *active; /* [n_active] sequences with rows in this step */
    uint32_t n_active;
    struct mp_plan_index *index; /* private to plan.c */
} mp_plan;

static inline const mp_cell_ref *mp_plan_ref(const mp_plan *plan, uint32_t id) {
    return &plan->seqs[id / plan->max_refs].refs[id % plan->max_refs];
}

/* One token to be computed. */
typedef struct mp_row {
    int32_t token;    /* or MP_TOKEN_SAMPLED */
    int32_t position; /* true position; of a compile row its angle (base 0) */
    uint32_t seq;     /* plan sequence */
    uint32_t index;   /* in the sequence's private stream */
    mp_page page;     /* where its K and V go */
    uint32_t slot;    /* in the page */
    bool logits;      /* its logits are wanted, */
    bool samples;     /* and the request's next token is sampled from them */
} mp_row;

typedef enum mp_row_kind { MP_ROW_DECODE, MP_ROW_TEXT, MP_ROW_LINK, MP_ROW_COMPILE, MP_ROW_KINDS } mp_row_kind;

/* A step is data: what to spoil and to zero, what to compute, who reads what. Rows of one sequence are consecutive. */
typedef struct mp_step {
    const mp_row *rows;
    uint32_t n_rows;
    uint32_t n_of_kind[MP_ROW_KINDS]; /* of these */
    uint32_t n_logits;          /* rows with `logits`, in row order: the i-th such row is logits row i */
    const mp_page *spoil_pages; /* free pages to fill with NaN: only where somebody looks for readers of freed pages */
    uint32_t n_spoil_pages;
    const mp_page *zero_pages;  /* pages to zero before anything is written */
    uint32_t n_zero_pages;
    const mp_plan *plan;
} mp_step;

#endif
