#include "kv/plan_edit.h"

#include <string.h>

#include "base/mem.h"

/* What only editing needs. */
typedef struct seq_state {
    uint32_t n_shared;  /* refs of shared runs; the private stream's follow */
    uint32_t n_tokens;  /* in the private stream */
    uint32_t n_settled; /* its cells that others may share */
} seq_state;

struct mp_plan_index {
    uint32_t n_pages;
    uint32_t *by_last; /* [n_pages] the cell that ends in this page and may be shared; MP_NONE */
    uint32_t *used_at; /* [max_cells] place in plan->used */
    uint32_t *free;    /* [n_free] */
    uint32_t n_free;
    seq_state *state; /* [max_seqs] */
    mp_fault *fault;
};

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static bool allocate(mp_plan *plan, const mp_plan_config *config) {
    size_t n_refs;
    if (!mp_mul_size(plan->max_seqs, plan->max_refs, &n_refs) || n_refs >= MP_NONE) return false;
    struct mp_plan_index *index = plan->index = mp_calloc(1, sizeof *plan->index);
    plan->seqs = mp_calloc(plan->max_seqs, sizeof *plan->seqs);
    plan->cells = mp_calloc(plan->max_cells, sizeof *plan->cells);
    plan->used = mp_calloc(plan->max_cells, sizeof *plan->used);
    plan->active = mp_calloc(plan->max_seqs, sizeof *plan->active);
    if (!index || !plan->seqs || !plan->cells || !plan->used || !plan->active) return false;
    plan->seqs[0].refs = mp_calloc(n_refs, sizeof *plan->seqs[0].refs);
    index->by_last = mp_calloc(config->n_pages, sizeof *index->by_last);
    index->used_at = mp_calloc(plan->max_cells, sizeof *index->used_at);
    index->free = mp_calloc(plan->max_cells, sizeof *index->free);
    index->state = mp_calloc(plan->max_seqs, sizeof *index->state);
    return plan->seqs[0].refs && index->by_last && index->used_at && index->free && index->state;
}

mepic_status mp_plan_open(const mp_plan_config *config, mp_plan **out, mepic_error *err) {
    mp_plan *plan = mp_calloc(1, sizeof *plan);
    if (!plan) return mp_fail_nomem(err, "the plan", sizeof *plan);
    plan->page_size = config->page_size;
    plan->cell_tokens = config->cell_tokens;
    plan->max_seqs = config->max_seqs;
    plan->max_refs = config->max_refs;
    plan->max_cells = config->n_pages + config->max_seqs;
    if (!allocate(plan, config)) {
        mp_plan_close(plan);
        return mp_fail_nomem(err, "the plan's tables",
                             (size_t)config->max_seqs * config->max_refs * sizeof(mp_cell_ref));
    }
    struct mp_plan_index *index = plan->index;
    index->n_pages = config->n_pages;
    index->fault = config->fault;
    for (uint32_t i = 1; i < plan->max_seqs; i++) plan->seqs[i].refs = plan->seqs[0].refs + (size_t)i * plan->max_refs;
    for (uint32_t i = 0; i < config->n_pages; i++) index->by_last[i] = MP_NONE;
    for (uint32_t i = 0; i < plan->max_cells; i++) {
        plan->cells[i].first_reader = MP_NONE;
        index->free[i] = plan->max_cells - 1 - i;
    }
    index->n_free = plan->max_cells;
    *out = plan;
    return MEPIC_OK;
}

void mp_plan_close(mp_plan *plan) {
    if (!plan) return;
    if (plan->index) {
        mp_free(plan->index->by_last);
        mp_free(plan->index->used_at);
        mp_free(plan->index->free);
        mp_free(plan->index->state);
    }
    if (plan->seqs) mp_free(plan->seqs[0].refs);
    mp_free(plan->index);
    mp_free(plan->seqs);
    mp_free(plan->cells);
    mp_free(plan->used);
    mp_free(plan->active);
    mp_free(plan);
}

/* ---- Cells and their readers ------------------------------------------------------------------------------------- */

static mp_page last_page(const mp_cell *cell) {
    return cell->pages[cell->n_pages - 1];
}

static mp_cell_ref *ref_of(mp_plan *plan, uint32_t id) {
    return &plan->seqs[id / plan->max_refs].refs[id % plan->max_refs];
}

/* MP_NONE only if the bound of plan_edit.h is wrong. */
static uint32_t take_cell(mp_plan *plan) {
    struct mp_plan_index *index = plan->index;
    if (!mp_invariant(index->fault, index->n_free > 0, "there is a free cell")) return MP_NONE;
    uint32_t id = index->free[--index->n_free];
    plan->cells[id] = (mp_cell){ .first_reader = MP_NONE };
    index->used_at[id] = plan->n_used;
    plan->used[plan->n_used++] = id;
    return id;
}

static void free_cell(mp_plan *plan, uint32_t id) {
    struct mp_plan_index *index = plan->index;
    mp_page last = last_page(&plan->cells[id]);
    if (index->by_last[last] == id) index->by_last[last] = MP_NONE;
    uint32_t moved = plan->used[--plan->n_used];
    plan->used[index->used_at[id]] = moved;
    index->used_at[moved] = index->used_at[id];
    index->free[index->n_free++] = id;
}

static void add_reader(mp_plan *plan, uint32_t cell_id, uint32_t ref_id) {
    mp_cell *cell = &plan->cells[cell_id];
    mp_cell_ref *ref = ref_of(plan, ref_id);
    ref->cell = cell_id;
    ref->prev = MP_NONE;
    ref->next = cell->first_reader;
    if (ref->next != MP_NONE) ref_of(plan, ref->next)->prev = ref_id;
    cell->first_reader = ref_id;
    cell->n_readers++;
}

static void remove_reader(mp_plan *plan, uint32_t ref_id) {
    mp_cell_ref *ref = ref_of(plan, ref_id);
    mp_cell *cell = &plan->cells[ref->cell];
    if (ref->prev == MP_NONE) {
        cell->first_reader = ref->next;
    } else {
        ref_of(plan, ref->prev)->next = ref->next;
    }
    if (ref->next != MP_NONE) ref_of(plan, ref->next)->prev = ref->prev;
    if (--cell->n_readers == 0) free_cell(plan, ref->cell);
}

/* The next ref of a sequence reads the cell. NULL only if max_refs is wrong. */
static mp_cell_ref *add_ref(mp_plan *plan, uint32_t seq_id, uint32_t cell_id) {
    mp_plan_seq *seq = &plan->seqs[seq_id];
    if (!mp_invariant(plan->index->fault, seq->n_refs < plan->max_refs, "a sequence has room for a cell")) return NULL;
    uint32_t k = seq->n_refs++;
    seq->refs[k] = (mp_cell_ref){ .seq = seq_id };
    add_reader(plan, cell_id, seq_id * plan->max_refs + k);
    return &seq->refs[k];
}

/* ---- Shared runs ------------------------------------------------------------------------------------------------- */

static uint32_t shared_cell(mp_plan *plan, const mp_page *pages, uint32_t n_pages, uint32_t n_tokens) {
    uint32_t *by_last = &plan->index->by_last[pages[n_pages - 1]];
    if (*by_last == MP_NONE) {
        uint32_t id = take_cell(plan);
        if (id == MP_NONE) return MP_NONE;
        mp_cell *cell = &plan->cells[id];
        memcpy(cell->pages, pages, n_pages * sizeof *pages);
        cell->n_pages = n_pages;
        cell->n_tokens = n_tokens;
        *by_last = id;
    }
    const mp_cell *cell = &plan->cells[*by_last];
    bool same = cell->n_pages == n_pages && cell->n_tokens == n_tokens && cell->pages[0] == pages[0];
    return mp_invariant(plan->index->fault, same, "a last page names one cell") ? *by_last : MP_NONE;
}

/* Bits of the cell's pages that hold a token of [lo, hi) and are not hidden. */
static uint64_t seen_pages(uint32_t page_size, uint32_t lo, uint32_t hi, const uint16_t *hidden) {
    uint64_t mask = 0;
    for (uint32_t p = lo / page_size; p * page_size < hi; p++) {
        if (!hidden || !hidden[p]) mask |= UINT64_C(1) << p;
    }
    return mask;
}

void mp_plan_add_run(mp_plan *plan, uint32_t seq, const mp_run *run) {
    uint32_t per_cell = plan->cell_tokens / plan->page_size;
    bool run_start = true;
    for (uint32_t start = 0; start < run->n_tokens; start += plan->cell_tokens) {
        uint32_t n = run->n_tokens - start < plan->cell_tokens ? run->n_tokens - start : plan->cell_tokens;
        uint32_t lo = run->lo > start ? run->lo - start : 0;
        uint32_t hi = run->hi > start ? run->hi - start : 0;
        if (hi > n) hi = n;
        if (lo >= hi) continue;
        uint32_t page = start / plan->cell_tokens * per_cell;
        uint64_t mask = seen_pages(plan->page_size, lo, hi, run->hidden ? run->hidden + page : NULL);
        if (mask == 0) continue;
        uint32_t n_pages = (n + plan->page_size - 1) / plan->page_size;
        uint32_t cell = shared_cell(plan, run->pages + page, n_pages, n);
        mp_cell_ref *ref = cell == MP_NONE ? NULL : add_ref(plan, seq, cell);
        if (!ref) return;
        ref->base = run->base;
        ref->first = run->first + (int32_t)start;
        ref->lo = (uint16_t)lo;
        ref->hi = (uint16_t)hi;
        ref->mask = mask;
        ref->shared = true;
        ref->run_start = run_start;
        run_start = false;
        plan->index->state[seq].n_shared++;
    }
}

/* ---- The private stream ------------------------------------------------------------------------------------------ */

static mp_cell_ref *private_ref(mp_plan *plan, uint32_t seq, uint32_t cell) {
    return &plan->seqs[seq].refs[plan->index->state[seq].n_shared + cell];
}

static mp_cell_ref *start_private_cell(mp_plan *plan, uint32_t seq, uint32_t first) {
    uint32_t cell = take_cell(plan);
    mp_cell_ref *ref = cell == MP_NONE ? NULL : add_ref(plan, seq, cell);
    if (!ref) return NULL;
    ref->first = (int32_t)first;
    ref->mask = UINT64_MAX;
    ref->run_start = first == 0;
    return ref;
}

void mp_plan_extend(mp_plan *plan, uint32_t seq, const mp_page *pages, uint32_t n_tokens) {
    seq_state *state = &plan->index->state[seq];
    uint32_t per_cell = plan->cell_tokens / plan->page_size;
    while (state->n_tokens < n_tokens) {
        uint32_t k = state->n_tokens / plan->cell_tokens;
        uint32_t first = k * plan->cell_tokens;
        bool fresh = state->n_tokens == first;
        mp_cell_ref *ref = fresh ? start_private_cell(plan, seq, first) : private_ref(plan, seq, k);
        if (!ref) return;
        mp_cell *cell = &plan->cells[ref->cell];
        uint32_t n = n_tokens - first < plan->cell_tokens ? n_tokens - first : plan->cell_tokens;
        while (cell->n_pages * plan->page_size < n) {
            cell->pages[cell->n_pages] = pages[k * per_cell + cell->n_pages];
            cell->n_pages++;
        }
        cell->n_tokens = n;
        ref->hi = (uint16_t)n;
        state->n_tokens = first + n;
    }
}

void mp_plan_replace(mp_plan *plan, uint32_t seq, uint32_t i, mp_page page) {
    uint32_t per_cell = plan->cell_tokens / plan->page_size;
    seq_state *state = &plan->index->state[seq];
    if (!mp_invariant(plan->index->fault, i / per_cell >= state->n_settled, "a replaced page is not shared")) return;
    plan->cells[private_ref(plan, seq, i / per_cell)->cell].pages[i % per_cell] = page;
}

void mp_plan_settle(mp_plan *plan, uint32_t seq) {
    seq_state *state = &plan->index->state[seq];
    for (; (state->n_settled + 1) * plan->cell_tokens <= state->n_tokens; state->n_settled++) {
        mp_cell_ref *ref = private_ref(plan, seq, state->n_settled);
        uint32_t *by_last = &plan->index->by_last[last_page(&plan->cells[ref->cell])];
        if (*by_last == MP_NONE) {
            *by_last = ref->cell;
        } else {
            uint32_t id = seq * plan->max_refs + (uint32_t)(ref - plan->seqs[seq].refs);
            uint32_t there = *by_last;
            remove_reader(plan, id);
            add_reader(plan, there, id);
        }
    }
}

void mp_plan_leave(mp_plan *plan, uint32_t seq_id) {
    mp_plan_seq *seq = &plan->seqs[seq_id];
    for (uint32_t k = 0; k < seq->n_refs; k++) remove_reader(plan, seq_id * plan->max_refs + k);
    seq->n_refs = 0;
    plan->index->state[seq_id] = (seq_state){ 0 };
}

/* ---- Steps ------------------------------------------------------------------------------------------------------- */

void mp_plan_begin_step(mp_plan *plan) {
    for (uint32_t i = 0; i < plan->n_active; i++) plan->seqs[plan->active[i]].n_rows = 0;
    plan->n_active = 0;
}

void mp_plan_set_rows(mp_plan *plan, uint32_t seq, uint32_t row, uint32_t n_rows) {
    if (!mp_invariant(plan->index->fault, plan->seqs[seq].n_rows == 0, "a sequence has one block of rows")) return;
    plan->seqs[seq].row = row;
    plan->seqs[seq].n_rows = n_rows;
    plan->active[plan->n_active++] = seq;
}

/* ---- Check ------------------------------------------------------------------------------------------------------- */

static bool check_cell(const mp_plan *plan, uint32_t at, mepic_error *err) {
    uint32_t id = plan->used[at], n = 0, prev = MP_NONE;
    const mp_cell *cell = &plan->cells[id];
    if (plan->index->used_at[id] != at)
        return mp_fail(err, MEPIC_ERR_BROKEN, "cell %u: lost in the list of used", id) == MEPIC_OK;
    for (uint32_t r = cell->first_reader; r != MP_NONE && n <= cell->n_readers; r = mp_plan_ref(plan, r)->next, n++) {
        const mp_cell_ref *ref = mp_plan_ref(plan, r);
        bool ok = ref->cell == id && ref->prev == prev && ref->seq == r / plan->max_refs && ref->hi <= cell->n_tokens &&
                  ref->lo < ref->hi && r % plan->max_refs < plan->seqs[ref->seq].n_refs;
        if (!ok) return mp_fail(err, MEPIC_ERR_BROKEN, "cell %u: reader %u is inconsistent", id, r) == MEPIC_OK;
        prev = r;
    }
    if (n != cell->n_readers || n == 0)
        return mp_fail(err, MEPIC_ERR_BROKEN, "cell %u: %u readers, %u listed", id, cell->n_readers, n) == MEPIC_OK;
    uint32_t room = cell->n_pages * plan->page_size;
    if (cell->n_tokens == 0 || cell->n_tokens > room || cell->n_tokens + plan->page_size <= room)
        return mp_fail(err, MEPIC_ERR_BROKEN, "cell %u: %u tokens in %u pages", id, cell->n_tokens, cell->n_pages) ==
               MEPIC_OK;
    uint32_t found = plan->index->by_last[last_page(cell)];
    if (n > 1 && found != id) return mp_fail(err, MEPIC_ERR_BROKEN, "cell %u: shared but not findable", id) == MEPIC_OK;
    return true;
}

bool mp_plan_check(const mp_plan *plan, mepic_error *err) {
    uint32_t n_refs = 0, n_readers = 0;
    for (uint32_t i = 0; i < plan->n_used; i++) {
        if (!check_cell(plan, i, err)) return false;
        n_readers += plan->cells[plan->used[i]].n_readers;
    }
    for (uint32_t i = 0; i < plan->max_seqs; i++) {
        const seq_state *state = &plan->index->state[i];
        uint32_t n_private = (state->n_tokens + plan->cell_tokens - 1) / plan->cell_tokens;
        if (plan->seqs[i].n_refs != state->n_shared + n_private)
            return mp_fail(err, MEPIC_ERR_BROKEN, "sequence %u: %u refs", i, plan->seqs[i].n_refs) == MEPIC_OK;
        n_refs += plan->seqs[i].n_refs;
    }
    for (uint32_t p = 0; p < plan->index->n_pages; p++) {
        uint32_t id = plan->index->by_last[p];
        if (id != MP_NONE && (plan->cells[id].n_readers == 0 || last_page(&plan->cells[id]) != p))
            return mp_fail(err, MEPIC_ERR_BROKEN, "page %u: names a cell that is gone", p) == MEPIC_OK;
    }
    if (n_refs != n_readers)
        return mp_fail(err, MEPIC_ERR_BROKEN, "%u refs, %u readers", n_refs, n_readers) == MEPIC_OK;
    if (plan->n_used + plan->index->n_free != plan->max_cells)
        return mp_fail(err, MEPIC_ERR_BROKEN, "a cell is lost") == MEPIC_OK;
    return true;
}
