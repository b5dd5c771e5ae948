#include "backend/cpu/attend.h"

#include <math.h>
#include <string.h>

#include "backend/cpu/kernels_attend.h"
#include "backend/cpu/kernels_rows.h"
#include "base/mem.h"

/* Queries of an item. Bounds the scratch of a thread and, at prefill, what a core keeps in its cache beside a cell. */
enum { ITEM_QUERIES = 64 };

/* A decode row that reads the cell of an item; its state goes to `slot` of the workspace. */
typedef struct reader {
    const mp_cell_ref *ref;
    uint32_t row, slot;
} reader;

typedef struct cell_item {
    uint32_t cell;
    uint32_t first, n; /* readers */
} cell_item;

typedef struct block_item {
    uint32_t seq;
    uint32_t row, n; /* rows */
} block_item;

typedef struct fold_item {
    uint32_t seq, row, slot; /* the row's states: slot + k for the k-th ref */
} fold_item;

/* What one thread needs for an item; float arrays are [ITEM_QUERIES, ...]. */
typedef struct scratch {
    float *q;       /* [, head_dim] turned and scaled */
    float *runs;    /* [, stride] state of the current run */
    float *results; /* [, stride] state of the runs before it */
    float *cells;   /* [MP_QUERY_TILE, stride] */
    float *weights; /* [MP_QUERY_TILE, MP_CPU_CELL_TOKENS] */
    mp_key_range ranges[ITEM_QUERIES];
    float *states[ITEM_QUERIES];
} scratch;

struct mp_attend {
    mp_attend_config cfg;
    const struct mp_attend_kernels *kernels;
    const struct mp_row_kernels *rows;
    uint32_t head_dim, group; /* group: query heads that share a kv head */
    uint32_t stride;          /* floats a state */
    float scale;

    float *workspace; /* [n_slots, n_heads, stride] */
    size_t workspace_bytes;
    uint32_t n_slots;
    reader *readers;       /* [n_slots] */
    cell_item *items;      /* [n_slots] */
    block_item *blocks;    /* [max_rows] */
    fold_item *folds;      /* [max_rows] */
    uint32_t *slot_of_row; /* [max_rows] first slot of a decode row, MP_NONE: not one */
    uint32_t n_readers, n_items, n_blocks, n_folds;

    scratch *scratch; /* [threads] */
    float *scratch_floats;
    size_t scratch_bytes;

    /* The call under way. */
    const mp_step *step;
    uint32_t layer;
    const float *q;
    float *out;
};

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static bool open_scratch(mp_attend *at) {
    uint32_t n = mp_threads_count(at->cfg.threads);
    size_t per_thread = (size_t)ITEM_QUERIES * (at->head_dim + 2 * at->stride) +
                        (size_t)MP_QUERY_TILE * (at->stride + MP_CPU_CELL_TOKENS);
    at->scratch = mp_calloc(n, sizeof *at->scratch);
    at->scratch_bytes = n * per_thread * sizeof(float);
    at->scratch_floats = mp_alloc_aligned(64, at->scratch_bytes);
    if (!at->scratch || !at->scratch_floats) return false;
    for (uint32_t i = 0; i < n; i++) {
        scratch *s = &at->scratch[i];
        s->q = at->scratch_floats + i * per_thread;
        s->runs = s->q + (size_t)ITEM_QUERIES * at->head_dim;
        s->results = s->runs + (size_t)ITEM_QUERIES * at->stride;
        s->cells = s->results + (size_t)ITEM_QUERIES * at->stride;
        s->weights = s->cells + (size_t)MP_QUERY_TILE * at->stride;
    }
    return true;
}

mepic_status mp_attend_open(const mp_attend_config *config, mp_attend **out, mepic_error *err) {
    mp_attend *at = mp_calloc(1, sizeof *at);
    if (!at) return mp_fail_nomem(err, "attention", sizeof *at);
    at->cfg = *config;
    at->kernels = config->kernels->attend;
    at->rows = config->kernels->rows;
    at->head_dim = config->hp->head_dim;
    at->group = config->hp->n_heads / config->hp->n_kv_heads;
    at->stride = at->head_dim + MP_STATE_EXTRA;
    at->scale = 1.0f / sqrtf((float)at->head_dim);

    size_t slot_bytes = (size_t)config->hp->n_heads * at->stride * sizeof(float);
    at->n_slots = (uint32_t)(config->workspace / slot_bytes);
    at->workspace_bytes = at->n_slots * slot_bytes;
    at->workspace = mp_alloc_aligned(64, at->workspace_bytes);
    at->readers = mp_calloc(at->n_slots, sizeof *at->readers);
    at->items = mp_calloc(at->n_slots, sizeof *at->items);
    at->blocks = mp_calloc(config->max_rows, sizeof *at->blocks);
    at->folds = mp_calloc(config->max_rows, sizeof *at->folds);
    at->slot_of_row = mp_calloc(config->max_rows, sizeof *at->slot_of_row);
    if (!at->workspace || !at->readers || !at->items || !at->blocks || !at->folds || !at->slot_of_row ||
        !open_scratch(at)) {
        mp_attend_close(at);
        return mp_fail_nomem(err, "the workspace of attention", config->workspace);
    }
    *out = at;
    return MEPIC_OK;
}

void mp_attend_close(mp_attend *at) {
    if (!at) return;
    mp_free_aligned(at->workspace, at->workspace_bytes);
    mp_free(at->readers);
    mp_free(at->items);
    mp_free(at->blocks);
    mp_free(at->folds);
    mp_free(at->slot_of_row);
    mp_free(at->scratch);
    mp_free_aligned(at->scratch_floats, at->scratch_bytes);
    mp_free(at);
}

/* ---- Items ------------------------------------------------------------------------------------------------------- */

static void add_blocks(mp_attend *at, uint32_t seq, const mp_plan_seq *s) {
    uint32_t most = ITEM_QUERIES / at->group;
    /* From the end, where a row sees most: long items first keep the threads busy to the end. */
    for (uint32_t left = s->n_rows; left > 0;) {
        uint32_t n = left < most ? left : most;
        left -= n;
        at->blocks[at->n_blocks++] = (block_item){ seq, s->row + left, n };
    }
}

static void add_cell_items(mp_attend *at, uint32_t cell) {
    const mp_plan *plan = at->step->plan;
    uint32_t most = ITEM_QUERIES / at->group;
    cell_item *item = NULL;
    for (uint32_t id = plan->cells[cell].first_reader; id != MP_NONE;) {
        const mp_cell_ref *ref = mp_plan_ref(plan, id);
        const mp_plan_seq *seq = &plan->seqs[ref->seq];
        id = ref->next;
        if (seq->n_rows != 1 || at->slot_of_row[seq->row] == MP_NONE) continue;
        if (!item || item->n == most) {
            item = &at->items[at->n_items++];
            *item = (cell_item){ cell, at->n_readers, 0 };
        }
        at->readers[at->n_readers++] =
            (reader){ ref, seq->row, at->slot_of_row[seq->row] + (uint32_t)(ref - seq->refs) };
        item->n++;
    }
}

void mp_attend_begin(mp_attend *at, const mp_step *step) {
    const mp_plan *plan = step->plan;
    at->step = step;
    at->n_readers = at->n_items = at->n_blocks = at->n_folds = 0;
    uint32_t slots = 0;
    for (uint32_t i = 0; i < plan->n_active; i++) {
        uint32_t seq = plan->active[i];
        const mp_plan_seq *s = &plan->seqs[seq];
        if (s->n_rows == 1 && s->n_refs <= at->n_slots - slots) {
            at->slot_of_row[s->row] = slots;
            at->folds[at->n_folds++] = (fold_item){ seq, s->row, slots };
            slots += s->n_refs;
        } else {
            for (uint32_t r = 0; r < s->n_rows; r++) at->slot_of_row[s->row + r] = MP_NONE;
            add_blocks(at, seq, s);
        }
    }
    if (at->n_folds == 0) return;
    for (uint32_t i = 0; i < plan->n_used; i++) add_cell_items(at, plan->used[i]);
}

/* ---- One cell ---------------------------------------------------------------------------------------------------- */

/* Spreads page bits over groups of 16 tokens. */
static uint16_t groups_of_pages(uint64_t mask, uint32_t page_size) {
    uint32_t per_page = page_size / MP_GROUP_TOKENS;
    if (per_page == 1) return (uint16_t)mask;
    uint32_t groups = 0;
    for (uint32_t g = 0; g < MP_CELL_GROUPS; g++) groups |= (uint32_t)(mask >> g / per_page & 1) << g;
    return (uint16_t)groups;
}

/* What a row sees of a cell, as kv/plan.h defines it. */
static mp_key_range visible(const mp_plan *plan, const mp_cell_ref *ref, const mp_row *row) {
    int64_t edge = ref->shared ? (int64_t)row->position - ref->first : (int64_t)row->index - ref->first + 1;
    int64_t hi = ref->hi, n_tokens = plan->cells[ref->cell].n_tokens;
    if (hi > n_tokens) hi = n_tokens;
    if (hi > edge) hi = edge;
    if (hi <= ref->lo) return (mp_key_range){ 0, 0, 0 };
    uint32_t first = ref->lo / MP_GROUP_TOKENS, last = (uint32_t)(hi - 1) / MP_GROUP_TOKENS;
    uint32_t inside = (2u << last) - (1u << first);
    return (mp_key_range){ ref->lo, (uint16_t)hi, (uint16_t)(groups_of_pages(ref->mask, plan->page_size) & inside) };
}

static void find_groups(const mp_attend *at, uint32_t cell, uint32_t kv_head, const uint8_t **groups) {
    const mp_slab *slab = at->cfg.slab;
    const mp_cell *c = &at->step->plan->cells[cell];
    uint32_t n = (c->n_tokens + MP_GROUP_TOKENS - 1) / MP_GROUP_TOKENS;
    for (uint32_t g = 0; g < n; g++) {
        uint32_t token = g * MP_GROUP_TOKENS;
        groups[g] = mp_slab_group(slab, c->pages[token / slab->page_size], at->layer, kv_head, token % slab->page_size);
    }
}

/* Starts the way of the first groups from memory, to be there when the queries are turned; the kernel fetches the rest
 * ahead of its use. */
static void fetch_first_groups(const mp_attend *at, uint32_t cell, const uint8_t *const *groups) {
    uint32_t n = (at->step->plan->cells[cell].n_tokens + MP_GROUP_TOKENS - 1) / MP_GROUP_TOKENS;
    for (uint32_t g = 0; g < n && g < 4; g++) {
        for (size_t i = 0; i < at->cfg.slab->group_bytes; i += 64) __builtin_prefetch(groups[g] + i, 0, 2);
    }
}

/* q [group, head_dim] = the row's queries for a kv head, turned by (position - base) and scaled. An angle outside the
 * table belongs to a row that stands before the run and sees nothing of it; its q stays what it was. */
static void turn_queries(const mp_attend *at, uint32_t row, uint32_t kv_head, int32_t base, float *q) {
    const mp_rope_table *rope = at->cfg.rope;
    const mp_hparams *hp = at->cfg.hp;
    int64_t angle = (int64_t)at->step->rows[row].position - base;
    if (angle < 0 || angle >= rope->n_angles) return;
    const float *cos_sin = rope->cos_sin + (size_t)angle * 2 * rope->n_pairs;
    for (uint32_t h = 0; h < at->group; h++) {
        const float *x = at->q + ((size_t)row * hp->n_heads + kv_head * at->group + h) * at->head_dim;
        at->rows->turn(x, cos_sin, hp->rope.pairs, rope->n_pairs, at->head_dim, at->scale,
                       q + (size_t)h * at->head_dim);
    }
}

/* The size of the next tile when `left` queries remain: even tiles instead of full ones and a rest, since a tile of one
 * query costs nearly as much as one of four. */
static uint32_t tile_size(const mp_attend *at, uint32_t left) {
    uint32_t width = at->kernels->width, n_tiles = (left + width - 1) / width;
    return (left + n_tiles - 1) / n_tiles;
}

/* ---- Decode rows: cells, then folds ------------------------------------------------------------------------------ */

static float *slot_state(const mp_attend *at, uint32_t slot, uint32_t head) {
    return at->workspace + ((size_t)slot * at->cfg.hp->n_heads + head) * at->stride;
}

static void attend_cell(mp_attend *at, const cell_item *item, uint32_t kv_head, scratch *s) {
    const uint8_t *groups[MP_CELL_GROUPS];
    find_groups(at, item->cell, kv_head, groups);
    fetch_first_groups(at, item->cell, groups);
    uint32_t n = 0;
    for (uint32_t i = 0; i < item->n; i++) {
        const reader *rd = &at->readers[item->first + i];
        mp_key_range range = visible(at->step->plan, rd->ref, &at->step->rows[rd->row]);
        if (range.groups == 0) {
            for (uint32_t h = 0; h < at->group; h++) {
                slot_state(at, rd->slot, kv_head * at->group + h)[at->head_dim] = -INFINITY;
            }
            continue;
        }
        turn_queries(at, rd->row, kv_head, rd->ref->base, s->q + (size_t)n * at->head_dim);
        for (uint32_t h = 0; h < at->group; h++, n++) {
            s->ranges[n] = range;
            s->states[n] = slot_state(at, rd->slot, kv_head * at->group + h);
        }
    }
    for (uint32_t done = 0; done < n;) {
        uint32_t size = tile_size(at, n - done);
        at->kernels->tile[at->cfg.slab->type](&(mp_query_tile){ .groups = groups,
                                                                .head_dim = at->head_dim,
                                                                .n = size,
                                                                .q = s->q + (size_t)done * at->head_dim,
                                                                .ranges = s->ranges + done,
                                                                .states = s->states + done,
                                                                .weights = s->weights });
        done += size;
    }
}

static void clear_states(const mp_attend *at, float *states, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) states[(size_t)i * at->stride + at->head_dim] = -INFINITY;
}

/* Closes the run of n queries: result = result merged with run. */
static void end_run(const mp_attend *at, scratch *s, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        at->kernels->merge(s->results + (size_t)i * at->stride, s->runs + (size_t)i * at->stride, at->head_dim);
    }
    clear_states(at, s->runs, n);
}

static void fold_row(mp_attend *at, const fold_item *f, scratch *s) {
    const mp_plan_seq *seq = &at->step->plan->seqs[f->seq];
    for (uint32_t head = 0; head < at->cfg.hp->n_heads; head++) {
        clear_states(at, s->runs, 1);
        clear_states(at, s->results, 1);
        for (uint32_t k = 0; k < seq->n_refs; k++) {
            if (seq->refs[k].run_start) end_run(at, s, 1);
            at->kernels->merge(s->runs, slot_state(at, f->slot + k, head), at->head_dim);
        }
        end_run(at, s, 1);
        float *out = at->out + ((size_t)f->row * at->cfg.hp->n_heads + head) * at->head_dim;
        at->kernels->finish(s->results, out, at->head_dim);
    }
}

/* ---- Blocks of rows of one sequence ------------------------------------------------------------------------------ */

static void fold_cell(mp_attend *at, const mp_cell_ref *ref, uint32_t kv_head, uint32_t n, scratch *s) {
    const uint8_t *groups[MP_CELL_GROUPS];
    find_groups(at, ref->cell, kv_head, groups);
    for (uint32_t i = 0; i < MP_QUERY_TILE; i++) s->states[i] = s->cells + (size_t)i * at->stride;
    for (uint32_t done = 0; done < n;) {
        uint32_t size = tile_size(at, n - done), seen = 0;
        for (uint32_t i = 0; i < size; i++) seen |= s->ranges[done + i].groups;
        if (seen) {
            at->kernels->tile[at->cfg.slab->type](&(mp_query_tile){ .groups = groups,
                                                                    .head_dim = at->head_dim,
                                                                    .n = size,
                                                                    .q = s->q + (size_t)done * at->head_dim,
                                                                    .ranges = s->ranges + done,
                                                                    .states = s->states,
                                                                    .weights = s->weights });
            for (uint32_t i = 0; i < size; i++) {
                at->kernels->merge(s->runs + (size_t)(done + i) * at->stride, s->states[i], at->head_dim);
            }
        }
        done += size;
    }
}

static void attend_block(mp_attend *at, const block_item *block, uint32_t kv_head, scratch *s) {
    const mp_plan *plan = at->step->plan;
    const mp_plan_seq *seq = &plan->seqs[block->seq];
    uint32_t n = block->n * at->group;
    bool turned = false;
    int32_t base = 0;
    clear_states(at, s->runs, n);
    clear_states(at, s->results, n);
    for (uint32_t k = 0; k < seq->n_refs; k++) {
        const mp_cell_ref *ref = &seq->refs[k];
        if (ref->run_start) end_run(at, s, n);
        uint32_t seen = 0;
        for (uint32_t r = 0; r < block->n; r++) {
            mp_key_range range = visible(plan, ref, &at->step->rows[block->row + r]);
            for (uint32_t h = 0; h < at->group; h++) s->ranges[r * at->group + h] = range;
            seen |= range.groups;
        }
        if (seen == 0) continue;
        if (!turned || ref->base != base) {
            turned = true;
            base = ref->base;
            for (uint32_t r = 0; r < block->n; r++) {
                turn_queries(at, block->row + r, kv_head, base, s->q + (size_t)r * at->group * at->head_dim);
            }
        }
        fold_cell(at, ref, kv_head, n, s);
    }
    end_run(at, s, n);
    for (uint32_t r = 0; r < block->n; r++) {
        for (uint32_t h = 0; h < at->group; h++) {
            size_t head = (size_t)(block->row + r) * at->cfg.hp->n_heads + kv_head * at->group + h;
            at->kernels->finish(s->results + (size_t)(r * at->group + h) * at->stride, at->out + head * at->head_dim,
                                at->head_dim);
        }
    }
}

/* ---- A layer ----------------------------------------------------------------------------------------------------- */

/* Items are (block or cell, kv head), the heads of one together: their data are neighbours in a page. */
static void run_item(void *ctx, uint32_t item, uint32_t thread) {
    mp_attend *at = ctx;
    uint32_t n_kv = at->cfg.hp->n_kv_heads, i = item / n_kv, kv_head = item % n_kv;
    if (i < at->n_blocks) {
        attend_block(at, &at->blocks[i], kv_head, &at->scratch[thread]);
    } else {
        attend_cell(at, &at->items[i - at->n_blocks], kv_head, &at->scratch[thread]);
    }
}

static void run_fold(void *ctx, uint32_t item, uint32_t thread) {
    mp_attend *at = ctx;
    fold_row(at, &at->folds[item], &at->scratch[thread]);
}

void mp_attend_run(mp_attend *at, uint32_t layer, const float *q, float *out) {
    at->layer = layer;
    at->q = q;
    at->out = out;
    mp_threads_run(at->cfg.threads, (at->n_blocks + at->n_items) * at->cfg.hp->n_kv_heads, run_item, at);
    mp_threads_run(at->cfg.threads, at->n_folds, run_fold, at);
}
