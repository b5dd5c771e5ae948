/* Editing a plan: what the scheduler does to it between steps. The plan itself is read through kv/plan.h.
 *
 * A sequence joins with its shared runs, by position, and then grows its private stream:
 *
 *     add_run  add_run  extend ... extend ... leave
 *
 * A cell of shared pages is found by its last page, since a cached page stands in one chain only. The private stream's
 * last cell belongs to its sequence alone while it grows; when it is full and its pages are published, `settle` looks
 * for the same cell of another sequence, and the two become one cell with two readers.
 *
 * Cost: joining and leaving O(cells of the sequence), a decode step O(1) a sequence, however many cells it reads.
 * Nothing is allocated after open: a sequence has at most max_refs cells, and there are at most n_pages + max_seqs
 * cells, since each is either the growing one of a sequence or the only one that ends in its last page. */
#ifndef MEPIC_KV_PLAN_EDIT_H
#define MEPIC_KV_PLAN_EDIT_H

#include "kv/plan.h"

typedef struct mp_plan_config {
    uint32_t page_size;   /* 16, 32, 64 or 128 */
    uint32_t cell_tokens; /* a power of two: 128 to MP_CELL_TOKENS_MAX, at most MP_CELL_PAGES_MAX pages */
    uint32_t n_pages;     /* of the pool */
    uint32_t max_seqs;
    uint32_t max_refs;    /* cells a sequence reads */
    mp_fault *fault;      /* borrowed */
} mp_plan_config;

mepic_status mp_plan_open(const mp_plan_config *config, mp_plan **out, mepic_error *err);
void mp_plan_close(mp_plan *plan); /* NULL is a no-op */

/* One use of shared pages by a sequence. */
typedef struct mp_run {
    const mp_page *pages;   /* all pages of the run */
    uint32_t n_tokens;      /* in all pages */
    int32_t first;          /* position of token 0 in the request */
    int32_t base;           /* position minus angle */
    uint32_t lo, hi;        /* tokens lo <= i < hi may be seen, */
    const uint16_t *hidden; /* [pages] but for the pages that are not 0 here; NULL: all pages are seen */
} mp_run;

/* Cells of which the sequence sees nothing are left out. Runs are added before the private stream starts. */
void mp_plan_add_run(mp_plan *plan, uint32_t seq, const mp_run *run);
/* The private stream has n_tokens tokens now, in `pages` (all of its pages). It only grows. */
void mp_plan_extend(mp_plan *plan, uint32_t seq, const mp_page *pages, uint32_t n_tokens);
/* Page `i` of the private stream, not yet settled, is another page with the same contents. */
void mp_plan_replace(mp_plan *plan, uint32_t seq, uint32_t i, mp_page page);
/* All pages of the private stream's full cells are published: they may be shared from now on. */
void mp_plan_settle(mp_plan *plan, uint32_t seq);
void mp_plan_leave(mp_plan *plan, uint32_t seq);

/* The rows of a step: begin, then once a sequence that has rows. */
void mp_plan_begin_step(mp_plan *plan);
void mp_plan_set_rows(mp_plan *plan, uint32_t seq, uint32_t row, uint32_t n_rows);

/* O(refs): cells, reader lists, the list of used cells and the index agree; false with the reason. */
bool mp_plan_check(const mp_plan *plan, mepic_error *err);

#endif
