#include "backend/cpu/matmul.h"

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_matmul.h"
#include "base/mem.h"

struct mp_packed {
    mp_panel_type type;
    uint32_t n_out, n_in, n_panels;
    size_t panel_bytes;
    uint8_t *panels; /* [n_panels], borrowed */
};

struct mp_qrows {
    uint32_t max_rows, max_in;
    uint32_t n_rows, n_in, n_blocks;
    uint32_t tile_rows;
    const float *x;    /* [n_rows, n_in] */
    mp_qblock *blocks; /* tile after tile; rows of a tile block by block (kernels_matmul.h) */
    size_t bytes;
};

/* A work item of the product is some panels times some tiles of rows. Its panels stay in the second-level cache while
 * the tiles pass over them: enough bytes to be worth handing out, and where the activations do not fit in beside them
 * enough to be worth fetching those again; but so few that every thread finds several items. */
enum {
    ITEM_MIN_BYTES = 8 << 10,
    ITEM_ROWS_BYTES = 128 << 10,
    ITEM_MAX_BYTES = 256 << 10,
    ROWS_NEAR_BYTES = 256 << 10,
    ITEMS_A_THREAD = 8,
};
/* Quantizing fewer inputs than this is quicker than waking anybody. */
enum { QUANTIZE_ALONE = 16 << 10 };

static uint32_t div_up(uint32_t a, uint32_t b) {
    return (a + b - 1) / b;
}

struct pack_job {
    const mp_tensor *weight;
    mp_packed *w;
};

static void pack_item(void *ctx, uint32_t panel, uint32_t thread) {
    (void)thread;
    const struct pack_job *job = ctx;
    mp_packed *w = job->w;
    uint32_t first = panel * MP_PANEL_LANES, left = w->n_out - first;
    size_t row_bytes = job->weight->bytes / w->n_out;
    mp_panel_pack(job->weight->type, (const uint8_t *)job->weight->data + first * row_bytes, row_bytes,
                  left < MP_PANEL_LANES ? left : MP_PANEL_LANES, w->n_in, w->panels + panel * w->panel_bytes);
}

size_t mp_packed_size(const mp_tensor *weight) {
    size_t panel_bytes = mp_panel_bytes(mp_panel_type_of(weight->type), (uint32_t)weight->ne[0]);
    return div_up((uint32_t)weight->ne[1], MP_PANEL_LANES) * panel_bytes;
}

mepic_status mp_packed_open(const mp_tensor *weight, mp_threads *threads, uint8_t *memory, mp_packed **out,
                            mepic_error *err) {
    mp_packed *w = mp_calloc(1, sizeof *w);
    if (!w) return mp_fail_nomem(err, "a packed weight", sizeof *w);
    w->type = mp_panel_type_of(weight->type);
    w->n_in = (uint32_t)weight->ne[0];
    w->n_out = (uint32_t)weight->ne[1];
    w->n_panels = div_up(w->n_out, MP_PANEL_LANES);
    w->panel_bytes = mp_panel_bytes(w->type, w->n_in);
    w->panels = memory;
    struct pack_job job = { weight, w };
    mp_threads_run(threads, w->n_panels, pack_item, &job);
    *out = w;
    return MEPIC_OK;
}

void mp_packed_close(mp_packed *w) {
    mp_free(w);
}

uint32_t mp_packed_outputs(const mp_packed *w) {
    return w->n_out;
}

mepic_status mp_qrows_open(uint32_t max_rows, uint32_t max_in, mp_qrows **out, mepic_error *err) {
    mp_qrows *q = mp_calloc(1, sizeof *q);
    if (!q) return mp_fail_nomem(err, "quantized activations", sizeof *q);
    q->max_rows = max_rows;
    q->max_in = max_in;
    q->bytes = (size_t)max_rows * div_up(max_in, MP_PANEL_BLOCK) * sizeof *q->blocks;
    q->blocks = mp_alloc_aligned(64, q->bytes);
    if (!q->blocks) {
        mepic_status status = mp_fail_nomem(err, "quantized activations", q->bytes);
        mp_free(q);
        return status;
    }
    *out = q;
    return MEPIC_OK;
}

void mp_qrows_close(mp_qrows *q) {
    if (!q) return;
    mp_free_aligned(q->blocks, q->bytes);
    mp_free(q);
}

/* Rows of the tile that begins at row `first`. */
static uint32_t tile_rows(const mp_qrows *q, uint32_t first) {
    uint32_t left = q->n_rows - first;
    return left < q->tile_rows ? left : q->tile_rows;
}

struct quantize_job {
    const mp_matmul_kernels *kernels;
    mp_qrows *q;
};

static void quantize_tile(void *ctx, uint32_t tile, uint32_t thread) {
    (void)thread;
    const struct quantize_job *job = ctx;
    mp_qrows *q = job->q;
    uint32_t first = tile * q->tile_rows, rows = tile_rows(q, first);
    mp_qblock *blocks = q->blocks + (size_t)first * q->n_blocks;
    for (uint32_t r = 0; r < rows; r++) {
        job->kernels->quantize(q->x + (size_t)(first + r) * q->n_in, q->n_in, blocks + r, rows);
    }
}

void mp_qrows_set(mp_qrows *q, const mp_cpu_kernels *kernels, mp_threads *threads, const float *x, uint32_t n_rows,
                  uint32_t n_in) {
    q->x = x;
    q->n_rows = n_rows;
    q->n_in = n_in;
    q->n_blocks = div_up(n_in, MP_PANEL_BLOCK);
    q->tile_rows = kernels->matmul->tile_rows;
    struct quantize_job job = { kernels->matmul, q };
    uint32_t n_tiles = div_up(n_rows, q->tile_rows);
    if ((size_t)n_rows * n_in < QUANTIZE_ALONE) {
        for (uint32_t i = 0; i < n_tiles; i++) quantize_tile(&job, i, 0);
    } else {
        mp_threads_run(threads, n_tiles, quantize_tile, &job);
    }
}

struct product_job {
    const mp_matmul_kernels *kernels;
    const mp_qrows *q;
    uint32_t n_w;
    struct product {
        const mp_packed *w;
        float *y;
        uint32_t item_panels; /* panels of an item */
        uint32_t first_group; /* items come in groups of the same panels */
    } product[3];
    uint32_t item_rows;   /* rows of an item, a multiple of tile_rows */
    uint32_t group_items; /* items of a group: all rows */
    bool add;
};

/* Tiles of rows are the outer loop: a tile's activations stay in the first-level cache, panels in the second. */
static void product_item(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    const struct product_job *job = ctx;
    const struct product *p = job->product;
    uint32_t group = item / job->group_items, row = item % job->group_items * job->item_rows;
    for (uint32_t j = 1; j < job->n_w && group >= job->product[j].first_group; j++) p++;
    const mp_qrows *q = job->q;
    const mp_packed *w = p->w;
    uint32_t panel = (group - p->first_group) * p->item_panels, left = w->n_panels - panel;
    mp_tile tile = {
        .panels = w->panels + panel * w->panel_bytes,
        .panel_bytes = w->panel_bytes,
        .n_panels = left < p->item_panels ? left : p->item_panels,
        .n_in = q->n_in,
        .y_stride = w->n_out,
        .n_out = w->n_out - panel * MP_PANEL_LANES,
        .add = job->add,
    };
    uint32_t end = row + job->item_rows < q->n_rows ? row + job->item_rows : q->n_rows;
    for (; row < end; row += q->tile_rows) {
        tile.q = q->blocks + (size_t)row * q->n_blocks;
        tile.x = q->x + (size_t)row * q->n_in;
        tile.y = p->y + (size_t)row * w->n_out + panel * MP_PANEL_LANES;
        job->kernels->tile[w->type][tile_rows(q, row) - 1](&tile);
    }
}

/* Bytes of weights an item should have. */
static size_t item_size(const mp_qrows *q, size_t weight_bytes, uint32_t items) {
    size_t row_bytes = (size_t)q->n_rows * q->n_blocks * sizeof *q->blocks, bytes = weight_bytes / items;
    size_t least = row_bytes > ROWS_NEAR_BYTES ? ITEM_ROWS_BYTES : ITEM_MIN_BYTES;
    if (bytes < least) return least;
    return bytes < ITEM_MAX_BYTES ? bytes : ITEM_MAX_BYTES;
}

void mp_matmul(const mp_cpu_kernels *kernels, mp_threads *threads, const mp_packed *const *w, uint32_t n_w,
               const mp_qrows *q, float *const *y, bool add) {
    if (q->n_rows == 0) return;
    struct product_job job = { .kernels = kernels->matmul, .q = q, .n_w = n_w, .add = add };
    size_t bytes = 0;
    for (uint32_t j = 0; j < n_w; j++) bytes += w[j]->n_panels * w[j]->panel_bytes;
    uint32_t items = mp_threads_count(threads) * ITEMS_A_THREAD, n_groups = 0;
    size_t item_bytes = item_size(q, bytes, items);
    for (uint32_t j = 0; j < n_w; j++) {
        uint32_t panels = (uint32_t)(item_bytes / w[j]->panel_bytes);
        if (panels == 0) panels = 1;
        job.product[j] = (struct product){ w[j], y[j], panels, n_groups };
        n_groups += div_up(w[j]->n_panels, panels);
    }
    /* Where there are too few panels for the threads, the rows are split as well. */
    uint32_t n_tiles = div_up(q->n_rows, q->tile_rows), parts = div_up(items, n_groups);
    if (parts > n_tiles) parts = n_tiles;
    job.item_rows = div_up(n_tiles, parts) * q->tile_rows;
    job.group_items = div_up(q->n_rows, job.item_rows);
    mp_threads_run(threads, n_groups * job.group_items, product_item, &job);
}
