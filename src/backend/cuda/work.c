#include "backend/cuda/work.h"

#include <string.h>

#include "base/mem.h"

/* What a bucket of costs is sorted by: its power of two. */
enum { N_COSTS = 64 };

typedef enum part {
    PART_COUNTS,
    PART_ROWS,
    PART_LOGIT_ROWS,
    PART_ZERO_PAGES,
    PART_PAGES,
    PART_CELLS,
    PART_ITEMS,
    PART_READERS,
    PART_FOLDS,
    PART_BLOCKS,
    PART_REFS,
    N_PARTS,
} part;

struct mp_cu_lists {
    mp_cu_lists_config config;
    size_t size[N_PARTS], cap[N_PARTS], at[N_PARTS]; /* bytes of an element, elements, offset in either buffer */
    size_t n[N_PARTS];                               /* elements of this step */
    uint8_t *buffers[2];                             /* in turn for one step and the next */
    uint8_t *host, *device;                          /* host: this step's buffer */
    mp_cu_work on_device, on_host;

    uint32_t *cell_of;   /* [max_cells of the plan] the cell's place in the step's list; MP_NONE */
    uint32_t *plan_cell; /* [cells of the step] the other way */
    uint32_t *n_readers; /* [cells of the step] */
    uint32_t *next;      /* [cells of the step] where its next reader goes */
    uint32_t *n_before;  /* [cells of the step] its tokens that no row of this step is */
    uint32_t *order;     /* [cells or blocks of the step] by cost */
    uint64_t *cost;
    mp_cu_block *blocks; /* [PART_BLOCKS] before they are sorted */
    uint32_t max_cells;
};

_Static_assert((int)N_PARTS <= (int)MP_CU_PIECES_MAX, "a step's lists are copied in one launch");

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static uint32_t cells_of(const mp_cu_lists_config *c) {
    return c->n_pages + c->max_seqs; /* the plan's own bound */
}

/* A cell has a page that no other finished cell has, so a step lists at most MP_CELL_PAGES_MAX pages for each page of
 * the pool; the tables stop at 8 M, which is 128 M tokens of context in one step. */
static size_t pages_of(const mp_cu_lists_config *c) {
    size_t all = (size_t)cells_of(c) * MP_CELL_PAGES_MAX, most = (size_t)8 << 20;
    return all < most ? all : most;
}

static size_t lay_out(const mp_cu_lists_config *c, size_t *size, size_t *cap, size_t *at) {
    size_t refs = (size_t)c->max_seqs * c->max_refs;
    const struct {
        size_t size, cap;
    } parts[N_PARTS] = {
        [PART_COUNTS] = { sizeof(mp_cu_counts), 1 },
        [PART_ROWS] = { sizeof(mp_cu_row), c->max_rows },
        [PART_LOGIT_ROWS] = { sizeof(uint32_t), c->max_rows },
        [PART_ZERO_PAGES] = { sizeof(uint32_t), (size_t)c->max_rows + 1 },
        [PART_PAGES] = { sizeof(uint32_t), pages_of(c) },
        [PART_CELLS] = { sizeof(mp_cu_cell), cells_of(c) },
        [PART_ITEMS] = { sizeof(mp_cu_item), cells_of(c) + (c->item_readers ? c->max_slots / c->item_readers : 0) },
        [PART_READERS] = { sizeof(mp_cu_reader), c->max_slots },
        [PART_FOLDS] = { sizeof(mp_cu_fold), c->max_rows },
        [PART_BLOCKS] = { sizeof(mp_cu_block), (size_t)c->max_rows + c->max_seqs },
        [PART_REFS] = { sizeof(mp_cu_ref), refs },
    };
    size_t total = 0;
    for (uint32_t p = 0; p < N_PARTS; p++) {
        size[p] = parts[p].size;
        cap[p] = parts[p].cap;
        at[p] = total;
        total += (parts[p].size * parts[p].cap + 255) / 256 * 256;
    }
    return total;
}

size_t mp_cu_lists_bytes(const mp_cu_lists_config *config) {
    size_t size[N_PARTS], cap[N_PARTS], at[N_PARTS];
    return lay_out(config, size, cap, at);
}

static mp_cu_work work_in(uint8_t *base, const size_t *at) {
    return (mp_cu_work){
        .counts = (mp_cu_counts *)(void *)(base + at[PART_COUNTS]),
        .rows = (const mp_cu_row *)(void *)(base + at[PART_ROWS]),
        .logit_rows = (const uint32_t *)(void *)(base + at[PART_LOGIT_ROWS]),
        .pages = (const uint32_t *)(void *)(base + at[PART_PAGES]),
        .cells = (const mp_cu_cell *)(void *)(base + at[PART_CELLS]),
        .items = (const mp_cu_item *)(void *)(base + at[PART_ITEMS]),
        .readers = (const mp_cu_reader *)(void *)(base + at[PART_READERS]),
        .folds = (const mp_cu_fold *)(void *)(base + at[PART_FOLDS]),
        .blocks = (const mp_cu_block *)(void *)(base + at[PART_BLOCKS]),
        .refs = (const mp_cu_ref *)(void *)(base + at[PART_REFS]),
    };
}

mepic_status mp_cu_lists_open(mp_cu_device *d, const mp_cu_lists_config *config, mp_cu_lists **out, mepic_error *err) {
    mp_cu_lists *l = mp_calloc(1, sizeof *l);
    if (!l) return mp_fail_nomem(err, "a step's lists", sizeof *l);
    l->config = *config;
    size_t bytes = lay_out(config, l->size, l->cap, l->at);
    l->max_cells = cells_of(config);
    size_t n = l->max_cells > l->cap[PART_BLOCKS] ? l->max_cells : l->cap[PART_BLOCKS];
    l->cell_of = mp_calloc(l->max_cells, sizeof *l->cell_of);
    l->plan_cell = mp_calloc(l->max_cells, sizeof *l->plan_cell);
    l->n_readers = mp_calloc(l->max_cells, sizeof *l->n_readers);
    l->next = mp_calloc(l->max_cells, sizeof *l->next);
    l->n_before = mp_calloc(l->max_cells, sizeof *l->n_before);
    l->order = mp_calloc(n, sizeof *l->order);
    l->cost = mp_calloc(n, sizeof *l->cost);
    l->blocks = mp_calloc(l->cap[PART_BLOCKS], sizeof *l->blocks);
    mepic_status status = MEPIC_OK;
    void *device = NULL;
    if (!l->cell_of || !l->plan_cell || !l->n_readers || !l->next || !l->n_before || !l->order || !l->cost ||
        !l->blocks) {
        status = mp_fail_nomem(err, "a step's lists", n * sizeof *l->cost);
    }
    for (uint32_t i = 0; i < 2 && status == MEPIC_OK; i++) {
        void *host = NULL;
        if (!config->on_host) {
            status = mp_cu_take_pinned(d, bytes, "a step's lists", &host, err);
        } else if (!(host = mp_calloc(1, bytes))) {
            status = mp_fail_nomem(err, "a step's lists", bytes);
        }
        l->buffers[i] = host;
    }
    if (status == MEPIC_OK && !config->on_host) status = mp_cu_take(d, bytes, "a step's lists", &device, err);
    l->device = device;
    if (status != MEPIC_OK) {
        mp_cu_lists_close(l);
        return status;
    }
    /* A bucket's rows past the step's are read too: whatever is there must be an index of some row. */
    if (device) CUDA_TRY(d, cudaMemsetAsync(device, 0, bytes, d->stream));
    for (uint32_t i = 0; i < l->max_cells; i++) l->cell_of[i] = MP_NONE;
    l->host = l->buffers[1];
    if (device) l->on_device = work_in(l->device, l->at);
    *out = l;
    return MEPIC_OK;
}

void mp_cu_lists_close(mp_cu_lists *l) {
    if (!l) return;
    for (uint32_t i = 0; i < 2 && l->config.on_host; i++) mp_free(l->buffers[i]);
    mp_free(l->cell_of);
    mp_free(l->plan_cell);
    mp_free(l->n_readers);
    mp_free(l->next);
    mp_free(l->n_before);
    mp_free(l->order);
    mp_free(l->cost);
    mp_free(l->blocks);
    mp_free(l);
}

static void *list(mp_cu_lists *l, part p) {
    return l->host + l->at[p];
}

/* ---- What a row sees --------------------------------------------------------------------------------------------- */

/* The end of what a row sees of the cell behind `ref`, as kv/plan.h defines it; <= ref->lo: nothing. */
static uint32_t edge_of(const mp_plan *plan, const mp_cell_ref *ref, const mp_row *row) {
    int64_t edge = ref->shared ? (int64_t)row->position - ref->first : (int64_t)row->index - ref->first + 1;
    int64_t hi = ref->hi, n_tokens = plan->cells[ref->cell].n_tokens;
    if (hi > n_tokens) hi = n_tokens;
    if (hi > edge) hi = edge;
    return hi > 0 ? (uint32_t)hi : 0;
}

static bool sees(const mp_plan *plan, const mp_cell_ref *ref, uint32_t hi) {
    if (hi <= ref->lo) return false;
    uint32_t first = ref->lo / plan->page_size, last = (hi - 1) / plan->page_size;
    return ref->mask >> first << (63 - last + first) != 0;
}

/* The cell's place in the step's list. */
static bool use_cell(mp_cu_lists *l, const mp_plan *plan, uint32_t id, uint32_t *out) {
    if (l->cell_of[id] == MP_NONE) {
        const mp_cell *cell = &plan->cells[id];
        uint32_t at = (uint32_t)l->n[PART_CELLS];
        size_t page = l->n[PART_PAGES];
        if (at == l->cap[PART_CELLS] || page + cell->n_pages > l->cap[PART_PAGES]) return false;
        ((mp_cu_cell *)list(l, PART_CELLS))[at] = (mp_cu_cell){ (uint32_t)page, cell->n_tokens };
        memcpy((uint32_t *)list(l, PART_PAGES) + page, cell->pages, cell->n_pages * sizeof(uint32_t));
        l->n[PART_PAGES] += cell->n_pages;
        l->n[PART_CELLS]++;
        l->plan_cell[at] = id;
        l->n_readers[at] = 0;
        l->n_before[at] = cell->n_tokens;
        l->cell_of[id] = at;
    }
    *out = l->cell_of[id];
    return true;
}

/* The cell of `ref`, a sequence's own, gets the sequence's rows from `index` of its stream on. */
static void note_rows(mp_cu_lists *l, const mp_cell_ref *ref, uint32_t index, uint32_t cell) {
    int64_t first = (int64_t)index - ref->first;
    if (first < 0) first = 0;
    if (!ref->shared && first < l->n_before[cell]) l->n_before[cell] = (uint32_t)first;
}

/* ---- By cost ----------------------------------------------------------------------------------------------------- */

/* Orders 0 .. n - 1 by the power of two of their cost, the dearest first; equal ones stay in order. */
static void sort_by_cost(mp_cu_lists *l, uint32_t n) {
    uint32_t start[N_COSTS + 1] = { 0 };
    for (uint32_t i = 0; i < n; i++) start[__builtin_clzll(l->cost[i] | 1) + 1]++;
    for (uint32_t i = 0; i < N_COSTS; i++) start[i + 1] += start[i];
    for (uint32_t i = 0; i < n; i++) l->order[start[__builtin_clzll(l->cost[i] | 1)]++] = i;
}

/* ---- Decode ------------------------------------------------------------------------------------------------------ */

/* States that the sequence's rows leave. */
static uint64_t count_states(const mp_step *step, const mp_plan_seq *seq) {
    uint64_t n = 0;
    for (uint32_t r = seq->row; r < seq->row + seq->n_rows; r++) {
        for (uint32_t k = 0; k < seq->n_refs; k++) {
            n += sees(step->plan, &seq->refs[k], edge_of(step->plan, &seq->refs[k], &step->rows[r]));
        }
    }
    return n;
}

/* Counts the readers of every cell the sequence's rows see, and gives each row its states; there is room for them. */
static bool count_readers(mp_cu_lists *l, const mp_step *step, const mp_plan_seq *seq) {
    uint32_t at;
    for (uint32_t r = seq->row; r < seq->row + seq->n_rows; r++) {
        uint32_t first = (uint32_t)l->n[PART_READERS];
        for (uint32_t k = 0; k < seq->n_refs; k++) {
            if (!sees(step->plan, &seq->refs[k], edge_of(step->plan, &seq->refs[k], &step->rows[r]))) continue;
            if (!use_cell(l, step->plan, seq->refs[k].cell, &at)) return false;
            note_rows(l, &seq->refs[k], step->rows[r].index, at);
            l->n_readers[at]++;
            l->n[PART_READERS]++;
        }
        ((mp_cu_fold *)list(l, PART_FOLDS))[l->n[PART_FOLDS]++] =
            (mp_cu_fold){ .row = r, .first_slot = first, .n_slots = (uint32_t)l->n[PART_READERS] - first };
    }
    return true;
}

/* The readers of an item of a cell with so many left: a whole tile, while there is one. */
static uint32_t part_of(const mp_cu_lists *l, uint32_t n_readers) {
    uint32_t most = l->config.item_readers;
    return most && n_readers > most ? most : n_readers;
}

/* Clocks of a tile on an H100, in hundreds: to begin and end, and per stage; with more rows than one of the two
 * warpgroups takes, and with fewer, of which a multiprocessor has two at a time. */
enum { LARGE_TILE = 50, LARGE_STAGE = 17, SMALL_TILE = 15, SMALL_STAGE = 5, SMALL_ROWS = 64 };

/* Large tiles keep the tensor cores busy and small ones the memory, so some blocks begin with the small ones, which
 * come last in the list: as many as finish them a little before the others finish the large ones. With few large ones
 * it is they that finish last, and all blocks begin with them. */
static uint32_t count_back(const mp_cu_lists *l) {
    const mp_cu_item *items = (const mp_cu_item *)(const void *)(l->host + l->at[PART_ITEMS]);
    uint64_t large = 0, small = 0, n_large = 0, n_sm = l->config.n_sm;
    for (size_t i = 0; i < l->n[PART_ITEMS]; i++) {
        uint64_t n_stages = (items[i].n_tokens + MP_CU_STAGE_TOKENS - 1) / MP_CU_STAGE_TOKENS;
        if (items[i].n_readers * l->config.group > SMALL_ROWS) {
            large += LARGE_TILE + LARGE_STAGE * n_stages;
            n_large++;
        } else {
            small += SMALL_TILE + SMALL_STAGE * n_stages;
        }
    }
    if (!n_large || n_large * l->config.n_kv_heads < 3 * n_sm) return 0;
    uint64_t n = n_sm * small * 8 / ((small + large) * 10);
    return (uint32_t)(n < n_sm / 2 ? n : n_sm / 2);
}

/* Items of a cell stand together, so that what one block reads from memory another finds in L2. */
static void make_items(mp_cu_lists *l) {
    uint32_t n_cells = (uint32_t)l->n[PART_CELLS], at = 0;
    mp_cu_item *items = list(l, PART_ITEMS);
    const mp_cu_cell *cells = list(l, PART_CELLS);
    for (uint32_t i = 0; i < n_cells; i++) {
        l->next[i] = at;
        at += l->n_readers[i];
        l->cost[i] = (uint64_t)part_of(l, l->n_readers[i]) * cells[i].n_tokens;
    }
    sort_by_cost(l, n_cells);
    for (uint32_t i = 0; i < n_cells; i++) {
        uint32_t cell = l->order[i], first = l->next[cell], left = l->n_readers[cell]; /* 0: of blocks only */
        bool alone = part_of(l, left) == left;
        while (left) {
            uint32_t n = part_of(l, left);
            items[l->n[PART_ITEMS]++] = (mp_cu_item){ .first_page = cells[cell].first_page,
                                                      .n_tokens = (uint16_t)cells[cell].n_tokens,
                                                      .n_before = (uint16_t)l->n_before[cell],
                                                      .first_reader = first,
                                                      .n_readers = n & INT32_MAX,
                                                      .alone = alone };
            first += n;
            left -= n;
        }
    }
}

/* Writes the readers of one fold's row; `fold` was made by count_readers. */
static void add_readers(mp_cu_lists *l, const mp_step *step, const mp_cu_fold *fold) {
    const mp_plan *plan = step->plan;
    const mp_row *row = &step->rows[fold->row];
    const mp_plan_seq *seq = &plan->seqs[row->seq];
    mp_cu_reader *readers = list(l, PART_READERS);
    uint32_t slot = fold->first_slot;
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        uint32_t hi = edge_of(plan, ref, row);
        if (!sees(plan, ref, hi)) continue;
        readers[l->next[l->cell_of[ref->cell]]++] = (mp_cu_reader){ .mask = ref->mask,
                                                                    .row = fold->row,
                                                                    .delta = row->position - ref->base,
                                                                    .slot = slot++,
                                                                    .lo = ref->lo,
                                                                    .hi = (uint16_t)hi };
    }
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

static bool add_blocks(mp_cu_lists *l, const mp_step *step, uint32_t seq_id) {
    const mp_plan *plan = step->plan;
    const mp_plan_seq *seq = &plan->seqs[seq_id];
    mp_cu_ref *refs = list(l, PART_REFS);
    uint32_t first_ref = (uint32_t)l->n[PART_REFS], cell;
    uint64_t n_keys = 0;
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        uint32_t n_tokens = plan->cells[ref->cell].n_tokens, hi = ref->hi < n_tokens ? ref->hi : n_tokens;
        /* The last row sees the most. */
        if (!sees(plan, ref, edge_of(plan, ref, &step->rows[seq->row + seq->n_rows - 1]))) continue;
        if (!use_cell(l, plan, ref->cell, &cell)) return false;
        note_rows(l, ref, step->rows[seq->row].index, cell);
        refs[l->n[PART_REFS]++] = (mp_cu_ref){ .mask = ref->mask,
                                               .cell = cell,
                                               .base = ref->base,
                                               .first = ref->first,
                                               .lo = ref->lo,
                                               .hi = (uint16_t)hi,
                                               .shared = ref->shared };
        n_keys += hi - ref->lo;
    }
    uint32_t n_refs = (uint32_t)l->n[PART_REFS] - first_ref;
    for (uint32_t r = 0; r < seq->n_rows; r += l->config.block_rows) {
        uint32_t n = seq->n_rows - r < l->config.block_rows ? seq->n_rows - r : l->config.block_rows;
        /* Rows of a prompt see about what stands before them. */
        l->cost[l->n[PART_BLOCKS]] = n_keys - (seq->n_rows - r - n < n_keys ? seq->n_rows - r - n : n_keys);
        l->blocks[l->n[PART_BLOCKS]++] =
            (mp_cu_block){ .first_row = seq->row + r, .n_rows = n, .first_ref = first_ref, .n_refs = n_refs };
    }
    return true;
}

static void sort_blocks(mp_cu_lists *l) {
    uint32_t n = (uint32_t)l->n[PART_BLOCKS];
    mp_cu_block *blocks = list(l, PART_BLOCKS);
    sort_by_cost(l, n);
    for (uint32_t i = 0; i < n; i++) blocks[i] = l->blocks[l->order[i]];
}

/* ---- Step -------------------------------------------------------------------------------------------------------- */

static void add_rows(mp_cu_lists *l, const mp_step *step) {
    mp_cu_row *rows = list(l, PART_ROWS);
    uint32_t *logit_rows = list(l, PART_LOGIT_ROWS), *zero = list(l, PART_ZERO_PAGES), n_logits = 0;
    for (uint32_t i = 0; i < step->n_rows; i++) {
        const mp_row *r = &step->rows[i];
        rows[i] = (mp_cu_row){ .token = r->token == MP_TOKEN_SAMPLED ? -1 - (int32_t)r->seq : r->token,
                               .position = r->position,
                               .index = r->index,
                               .page = r->page,
                               .slot = r->slot };
        if (r->logits) logit_rows[n_logits++] = i;
    }
    zero[0] = step->n_zero_pages;
    memcpy(zero + 1, step->zero_pages, step->n_zero_pages * sizeof *zero);
    l->n[PART_ROWS] = step->n_rows;
    l->n[PART_LOGIT_ROWS] = n_logits;
    l->n[PART_ZERO_PAGES] = (size_t)step->n_zero_pages + 1;
}

bool mp_cu_lists_build(mp_cu_lists *l, const mp_step *step) {
    const mp_plan *plan = step->plan;
    for (size_t i = 0; i < l->n[PART_CELLS]; i++) l->cell_of[l->plan_cell[i]] = MP_NONE;
    memset(l->n, 0, sizeof l->n);
    l->host = l->host == l->buffers[0] ? l->buffers[1] : l->buffers[0];
    l->on_host = work_in(l->host, l->at);
    add_rows(l, step);

    /* Blocks that are too few to keep the device busy are taken apart. */
    uint32_t n_blocks = 0;
    for (uint32_t i = 0; i < plan->n_active; i++) {
        uint32_t n = plan->seqs[plan->active[i]].n_rows;
        if (n > 1) n_blocks += (n + l->config.block_rows - 1) / l->config.block_rows;
    }
    bool few = n_blocks < l->config.few_blocks, ok = true;
    for (uint32_t i = 0; i < plan->n_active && ok; i++) {
        const mp_plan_seq *seq = &plan->seqs[plan->active[i]];
        bool decode = (few || seq->n_rows == 1) && l->n[PART_READERS] + count_states(step, seq) <= l->cap[PART_READERS];
        ok = decode ? count_readers(l, step, seq) : add_blocks(l, step, plan->active[i]);
    }
    if (!ok) return false;
    sort_blocks(l); /* before make_items: both sort by the same costs */
    make_items(l);
    const mp_cu_fold *folds = list(l, PART_FOLDS);
    for (size_t i = 0; i < l->n[PART_FOLDS]; i++) add_readers(l, step, &folds[i]);
    l->n[PART_COUNTS] = 1;
    *(mp_cu_counts *)list(l, PART_COUNTS) = (mp_cu_counts){ .n_rows = step->n_rows,
                                                            .n_logits = (uint32_t)l->n[PART_LOGIT_ROWS],
                                                            .n_items = (uint32_t)l->n[PART_ITEMS],
                                                            .n_folds = (uint32_t)l->n[PART_FOLDS],
                                                            .n_blocks = (uint32_t)l->n[PART_BLOCKS],
                                                            .n_back = count_back(l) };
    return true;
}

void mp_cu_lists_send(mp_cu_lists *l, mp_cu_device *d) {
    mp_cu_pieces pieces = { 0 };
    for (uint32_t p = 0; p < N_PARTS; p++) {
        if (l->n[p] == 0) continue;
        pieces.pieces[pieces.n++] = (mp_cu_piece){ .from = l->host + l->at[p],
                                                   .to = l->device + l->at[p],
                                                   .n_words = (uint32_t)(l->n[p] * l->size[p] / sizeof(uint32_t)) };
    }
    CUDA_TRY(d, mp_cu_copy_pieces(&pieces, d->stream));
}

const mp_cu_work *mp_cu_lists_work(const mp_cu_lists *l) {
    return &l->on_device;
}

const mp_cu_work *mp_cu_lists_host(const mp_cu_lists *l) {
    return &l->on_host;
}

const uint32_t *mp_cu_lists_zero_pages(const mp_cu_lists *l) {
    return (const uint32_t *)(void *)(l->device + l->at[PART_ZERO_PAGES]);
}
