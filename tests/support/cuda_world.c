#include "support/cuda_world.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/key_bias.h"
#include "base/mem.h"
#include "base/thread.h"
#include "model/dtype.h"
#include "support/random.h"

enum { N_LAYERS = 2, LAYER = 1 };

/* One cell as a sequence sees it; mp_cu_ref before the rows' causal edges are applied. */
typedef struct sight {
    mp_cu_ref ref;
    uint32_t n_tokens;
} sight;

typedef struct sequence {
    uint32_t first_row, n_rows, first_index;
    int32_t offset; /* position - index of its rows */
    uint32_t n_sights;
    sight *sights;
} sequence;

struct cuda_world {
    cuda_world_spec spec;
    rng random;
    uint32_t arch, n_sm;
    uint32_t n_pages, next_page, n_listed, n_cells, n_rows, n_items, n_readers, n_folds, n_blocks, n_refs, n_slots;
    uint32_t *order, *pages; /* the slab's pages shuffled; lists of the cells */
    mp_cu_cell *cells;
    sequence *sequences;
    mp_cu_row *rows;
    mp_cu_item *items;
    mp_cu_reader *readers;
    uint32_t *reader_cells; /* of each reader */
    mp_cu_fold *folds;
    mp_cu_block *blocks;
    mp_cu_ref *refs;
    uint64_t *turns;
    uint8_t *slab;
    size_t block_bytes, page_bytes;
    uint16_t *q;
    float *kv;   /* [n_cells, n_kv_heads, 2, cell_tokens, head_dim] of the layer */
    float *bias; /* [n_kv_heads, head_dim] */
    mp_cu_key_bias *bias_table;
    double *expected;
    mp_cu_attend attend;
    void *taken[32]; /* device memory */
    uint32_t n_taken;
};

static void check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "cuda_world: %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}
#define CHECK(call) check(call, #call)

static void *take(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) {
        fprintf(stderr, "cuda_world: out of memory\n");
        exit(1);
    }
    return p;
}

static float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static uint16_t to_bf16(float x) { /* cut off, not rounded: any number will do */
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    return (uint16_t)(wide >> 16);
}

static float random_normal(rng *r) { /* mean 0, variance 1, within 3.5 */
    uint64_t bits = rng_next(r);
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)(bits >> 16 * i & 0xffff);
    return (sum / 65535.0f - 2.0f) * 1.7320508f;
}

bool cuda_world_device(uint32_t *arch) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < 1) return false;
    struct cudaDeviceProp prop;
    if (cudaGetDeviceProperties(&prop, 0) != cudaSuccess) return false;
    uint32_t compiled;
    if (prop.major < 8 || mp_cu_kernels_arch(&compiled) != cudaSuccess) return false;
    *arch = mp_cu_code((uint32_t)(prop.major * 10 + prop.minor), compiled);
    return true;
}

/* Byte of an element in a block, from the description in kernels.h. */
static size_t element(uint32_t head_dim, uint32_t slot, uint32_t column, bool v) {
    size_t at = (size_t)(slot / 8) * 32 * head_dim + (v ? 16 * head_dim : 0);
    uint32_t row = slot % 8, width = 64, left = head_dim;
    while (true) { /* panels from the left */
        while (width > left) width /= 2;
        if (column < width) break;
        column -= width;
        left -= width;
        at += 16 * width;
    }
    uint32_t x = width == 64 ? (row & 7) : width == 32 ? (row >> 1 & 3) : (row >> 2 & 1);
    return at + row * width * 2 + ((column / 8) ^ x) * 16 + column % 8 * 2;
}

static size_t kv_at(const cuda_world *w, uint32_t cell, uint32_t head, bool v, uint32_t token) {
    size_t i = ((size_t)cell * w->spec.n_kv_heads + head) * 2 + v;
    return (i * w->spec.cell_tokens + token) * w->spec.head_dim;
}

/* ---- Building ---------------------------------------------------------------------------------------------------- */

static uint32_t add_cell(cuda_world *w, uint32_t n_tokens) {
    uint32_t cell = w->n_cells++;
    w->cells[cell] = (mp_cu_cell){ w->n_listed, n_tokens };
    for (uint32_t i = 0; i < n_tokens; i += w->spec.page_size) w->pages[w->n_listed++] = w->order[w->next_page++];
    return cell;
}

/* x turned by an angle. */
static void turn(const cuda_world *w, int32_t angle, const float *x, double *y) {
    uint32_t n = w->spec.n_pairs;
    for (uint32_t d = 0; d < w->spec.head_dim; d++) y[d] = (double)x[d];
    for (uint32_t i = 0; i < n; i++) {
        int64_t fraction = (int64_t)(w->turns[i] * (uint64_t)(int64_t)angle);
        double radians = (double)fraction / 18446744073709551616.0 * 6.283185307179586;
        double c = cos(radians) * (double)w->spec.magnitude, s = sin(radians) * (double)w->spec.magnitude;
        uint32_t a = w->spec.halves ? i : 2 * i, b = w->spec.halves ? i + n : 2 * i + 1;
        double first = y[a], second = y[b];
        y[a] = first * c - second * s;
        y[b] = second * c + first * s;
    }
}

/* An e4m3: sign, 4 bits of exponent, 3 of mantissa. */
static double from_e4m3(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    double x = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return code & 0x80 ? -x : x;
}

static float as_read(double number, double bias) {
    double rounded = (double)mp_bf16_to_f32(mp_f32_to_bf16((float)number));
    return mp_bf16_to_f32(mp_f32_to_bf16((float)(rounded + bias)));
}

/* A token's K or V in an fp8 block, from the description in kernels.h: codes of any size, as numbers about 1. */
static void fill_fp8(cuda_world *w, uint8_t *block, uint32_t slot, uint32_t head, bool v, float *kv) {
    uint32_t hd = w->spec.head_dim;
    uint8_t *group = block + slot / 8 * (16 * hd + 64), *marks = group + 8 * hd;
    uint8_t *codes = v ? marks + 64 : group;
    uint16_t factor = (uint16_t)(mp_f32_to_bf16(0x1p112f) + rng_below(&w->random, 0x80)); /* a scale of 2^-8 to 2^-7 */
    double scale = ldexp((double)mp_bf16_to_f32(factor), -120);
    int32_t angle = (int32_t)rng_below(&w->random, 1000000);
    double turned[256] = { 0 };
    memcpy(marks + (v ? 48 : 32) + slot % 8 * 2, &factor, 2);
    if (!v) memcpy(marks + slot % 8 * 4, &angle, 4);
    if (!v && w->spec.biased) turn(w, angle, w->bias + head * hd, turned);
    for (uint32_t d = 0; d < hd; d++) {
        uint32_t bits = (uint32_t)rng_next(&w->random);
        uint32_t magnitude =
            bits >> 16 & 3 ? 0x70 + (bits & 7) : (bits >> 8) % 0x7f; /* most near the largest; no NaN */
        uint8_t code = (uint8_t)((bits & 0x80) | magnitude);
        codes[d / 16 * 128 + slot % 8 * 16 + d % 8 * 2 + d / 8 % 2] = code;
        kv[d] = as_read(from_e4m3(code) * scale, turned[d]);
    }
}

static void fill_cell(cuda_world *w, uint32_t cell) {
    const mp_cu_cell *c = &w->cells[cell];
    uint32_t page_size = w->spec.page_size, hd = w->spec.head_dim;
    for (uint32_t i = 0; i < c->n_tokens; i++) { /* the rest of its last page stays NaN */
        uint8_t *page = w->slab + w->pages[c->first_page + i / page_size] * w->page_bytes;
        for (uint32_t h = 0; h < w->spec.n_kv_heads; h++) {
            uint8_t *block = page + (LAYER * w->spec.n_kv_heads + h) * w->block_bytes;
            for (uint32_t v = 0; w->spec.fp8 && v < 2; v++) {
                fill_fp8(w, block, i % page_size, h, v, w->kv + kv_at(w, cell, h, v, i));
            }
            if (w->spec.fp8) continue;
            for (uint32_t d = 0; d < 2 * hd; d++) {
                uint16_t x = to_bf16(random_normal(&w->random));
                memcpy(block + element(hd, i % page_size, d % hd, d >= hd), &x, 2);
                w->kv[kv_at(w, cell, h, d >= hd, i) + d % hd] = from_bf16(x);
            }
        }
    }
}

static void narrow_sight(cuda_world *w, sight *s) {
    rng *r = &w->random;
    if (w->spec.plain) return;
    uint32_t n = s->n_tokens;
    if (rng_below(r, 3) == 0) s->ref.lo = (uint16_t)rng_below(r, n);
    if (rng_below(r, 3) == 0) s->ref.hi = (uint16_t)(s->ref.lo + 1 + rng_below(r, n - s->ref.lo));
    if (rng_below(r, 3) == 0) s->ref.mask = rng_next(r) | rng_next(r);
}

static void add_sequence(cuda_world *w, uint32_t index, const uint32_t *shared) {
    const cuda_world_spec *spec = &w->spec;
    rng *r = &w->random;
    sequence *s = &w->sequences[index];
    uint32_t n_private = spec->private_tokens - rng_below(r, spec->private_tokens / 2 + 1);
    if (n_private < spec->seq_rows) n_private = spec->seq_rows;
    s->n_rows = spec->seq_rows;
    s->first_row = w->n_rows;
    s->first_index = n_private - spec->seq_rows;
    s->offset = (int32_t)rng_below(r, 50000) + 2048;
    for (uint32_t i = 0; i < s->n_rows; i++) {
        uint32_t at = s->first_index + i;
        w->rows[w->n_rows++] = (mp_cu_row){ .position = (int32_t)at + s->offset, .index = at };
    }
    s->sights = take(spec->n_refs + n_private / spec->cell_tokens + 1, sizeof *s->sights);
    int32_t position = (int32_t)s->first_index + s->offset;
    for (uint32_t i = 0; i < spec->n_refs; i++) {
        uint32_t n = w->cells[shared[i]].n_tokens;
        int32_t first = position - (int32_t)(n + rng_below(r, 1000));
        if (!spec->plain && rng_below(r, 4) == 0) first = position - (int32_t)rng_below(r, n + 8); /* across the rows */
        mp_cu_ref ref = { .mask = ~0ull, .cell = shared[i], .first = first, .hi = (uint16_t)n, .shared = 1 };
        ref.base = (int32_t)rng_below(r, 2000000) - 1000000;
        s->sights[s->n_sights++] = (sight){ ref, n };
    }
    for (uint32_t first = 0; first < n_private; first += spec->cell_tokens) {
        uint32_t n = n_private - first < spec->cell_tokens ? n_private - first : spec->cell_tokens;
        mp_cu_ref ref = { .mask = ~0ull, .cell = add_cell(w, n), .first = (int32_t)first, .hi = (uint16_t)n };
        s->sights[s->n_sights++] = (sight){ ref, n };
    }
    for (uint32_t i = 0; i < s->n_sights; i++) {
        uint32_t j = rng_below(r, i + 1);
        sight swap = s->sights[i];
        s->sights[i] = s->sights[j];
        s->sights[j] = swap;
    }
    for (uint32_t i = 0; i < s->n_sights; i++) narrow_sight(w, &s->sights[i]);
}

/* Where row i of the sequence stops to see the cell: hi, cut at the causal edge; may be under lo. */
static int32_t edge_of(const sequence *s, uint32_t i, const mp_cu_ref *ref) {
    int32_t edge = (int32_t)(s->first_index + i) + (ref->shared ? s->offset : 1) - ref->first;
    return edge < ref->hi ? edge : ref->hi;
}

static void add_decode_work(cuda_world *w, const sequence *s) {
    for (uint32_t i = 0; i < s->n_rows; i++) {
        uint32_t row = s->first_row + i, first_slot = w->n_slots;
        for (uint32_t k = 0; k < s->n_sights; k++) {
            const mp_cu_ref *ref = &s->sights[k].ref;
            int32_t hi = edge_of(s, i, ref);
            if (hi <= (int32_t)ref->lo) continue;
            w->reader_cells[w->n_readers] = ref->cell;
            w->readers[w->n_readers++] = (mp_cu_reader){ .mask = ref->mask,
                                                         .row = row,
                                                         .delta = w->rows[row].position - ref->base,
                                                         .slot = w->n_slots++,
                                                         .lo = ref->lo,
                                                         .hi = (uint16_t)hi };
        }
        w->folds[w->n_folds++] = (mp_cu_fold){ row, first_slot, w->n_slots - first_slot };
    }
}

static void *upload(cuda_world *w, const void *data, size_t bytes) {
    void *p = NULL;
    CHECK(cudaMalloc(&p, bytes ? bytes : 1));
    if (data) CHECK(cudaMemcpy(p, data, bytes, cudaMemcpyHostToDevice));
    w->taken[w->n_taken++] = p;
    return p;
}

static void write_counts(cuda_world *w) {
    mp_cu_counts counts = {
        .n_rows = w->n_rows,
        .n_items = w->n_items,
        .n_folds = w->n_folds,
        .n_blocks = w->n_blocks,
        .n_back = rng_below(&w->random, 2) ? rng_below(&w->random, 200) : 0,
    };
    CHECK(cudaMemcpy(w->attend.work.counts, &counts, sizeof counts, cudaMemcpyHostToDevice));
    w->attend.max_items = w->n_items;
    w->attend.max_folds = w->n_folds;
    w->attend.max_blocks = w->n_blocks;
}

void cuda_world_regroup(cuda_world *w, uint32_t max_readers) {
    if (!max_readers) max_readers = UINT32_MAX;
    for (uint32_t i = 1; i < w->n_readers; i++) {
        uint32_t j = rng_below(&w->random, i + 1), cell = w->reader_cells[i];
        mp_cu_reader swap = w->readers[i];
        w->readers[i] = w->readers[j];
        w->reader_cells[i] = w->reader_cells[j];
        w->readers[j] = swap;
        w->reader_cells[j] = cell;
    }
    mp_cu_reader *sorted = take(w->n_readers, sizeof *sorted);
    uint32_t n = 0, turn = rng_below(&w->random, w->n_cells);
    w->n_items = 0;
    for (uint32_t k = 0; k < w->n_cells; k++) {
        uint32_t cell = (k + turn) % w->n_cells;
        mp_cu_item *item = NULL;
        for (uint32_t i = 0; i < w->n_readers; i++) {
            if (w->reader_cells[i] != cell) continue;
            if (!item || item->n_readers == max_readers) {
                item = &w->items[w->n_items++];
                uint16_t n_tokens = (uint16_t)w->cells[cell].n_tokens;
                uint16_t n_before = (uint16_t)rng_below(&w->random, n_tokens + 1u);
                *item =
                    (mp_cu_item){ w->cells[cell].first_page, n_tokens, n_before, n, 0, rng_below(&w->random, 2) & 1 };
            }
            sorted[n++] = w->readers[i];
            item->n_readers++;
        }
    }
    CHECK(cudaMemcpy((void *)w->attend.work.readers, sorted, n * sizeof *sorted, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy((void *)w->attend.work.items, w->items, w->n_items * sizeof *w->items, cudaMemcpyHostToDevice));
    free(sorted);
    write_counts(w);
}

void cuda_world_reblock(cuda_world *w, uint32_t block_rows) {
    w->n_blocks = 0;
    uint32_t first_ref = 0;
    for (uint32_t i = 0; i < w->spec.n_sequences; i++) {
        const sequence *s = &w->sequences[i];
        for (uint32_t row = 0; row < s->n_rows; row += block_rows) {
            uint32_t n = s->n_rows - row < block_rows ? s->n_rows - row : block_rows;
            w->blocks[w->n_blocks++] = (mp_cu_block){ s->first_row + row, n, first_ref, s->n_sights };
        }
        first_ref += s->n_sights;
    }
    CHECK(
        cudaMemcpy((void *)w->attend.work.blocks, w->blocks, w->n_blocks * sizeof *w->blocks, cudaMemcpyHostToDevice));
    write_counts(w);
}

static void allocate(cuda_world *w) {
    const cuda_world_spec *spec = &w->spec;
    uint32_t rows = spec->n_sequences * spec->seq_rows;
    uint32_t private_cells = spec->private_tokens / spec->cell_tokens + 1;
    uint32_t cells = spec->n_shared + spec->n_sequences * private_cells;
    uint32_t cell_pages = (spec->cell_tokens + spec->page_size - 1) / spec->page_size;
    uint32_t sights = spec->n_refs + private_cells;
    w->n_pages = cells * cell_pages + 8;
    w->block_bytes = (size_t)spec->page_size * (spec->fp8 ? 2 * spec->head_dim + 8 : 4 * spec->head_dim);
    w->page_bytes = w->block_bytes * spec->n_kv_heads * N_LAYERS;
    w->order = take(w->n_pages, sizeof *w->order);
    w->pages = take(w->n_pages, sizeof *w->pages);
    w->cells = take(cells, sizeof *w->cells);
    w->sequences = take(spec->n_sequences, sizeof *w->sequences);
    w->rows = take(rows, sizeof *w->rows);
    w->items = take((size_t)rows * sights, sizeof *w->items);
    w->readers = take((size_t)rows * sights, sizeof *w->readers);
    w->reader_cells = take((size_t)rows * sights, sizeof *w->reader_cells);
    w->folds = take(rows, sizeof *w->folds);
    w->blocks = take(rows, sizeof *w->blocks);
    w->refs = take((size_t)spec->n_sequences * sights, sizeof *w->refs);
    w->turns = take(spec->n_pairs, sizeof *w->turns);
    w->slab = take(w->n_pages, w->page_bytes);
    w->q = take((size_t)rows * spec->n_heads * spec->head_dim, sizeof *w->q);
    w->kv = take((size_t)cells * spec->n_kv_heads * 2 * spec->cell_tokens * spec->head_dim, sizeof *w->kv);
    memset(w->slab, 0xff, w->n_pages * w->page_bytes); /* NaN */
    for (uint32_t i = 0; i < w->n_pages; i++) {
        uint32_t j = rng_below(&w->random, i + 1);
        w->order[i] = w->order[j];
        w->order[j] = i;
    }
    w->bias = take((size_t)spec->n_kv_heads * spec->head_dim, sizeof *w->bias);
    w->bias_table = take((size_t)spec->n_kv_heads * spec->head_dim, sizeof *w->bias_table);
    for (uint32_t i = 0; i < spec->n_kv_heads * spec->head_dim; i++) w->bias[i] = random_normal(&w->random);
    for (uint32_t i = 0; i < spec->n_pairs; i++) {
        double per_position = pow(10000.0, -(double)i / spec->n_pairs) / 6.283185307179586;
        w->turns[i] = (uint64_t)(per_position * 18446744073709551616.0);
    }
}

static void fill_queries(cuda_world *w) {
    size_t width = (size_t)w->spec.n_heads * w->spec.head_dim;
    for (uint32_t r = 0; r < w->n_rows; r++) {
        float scale = 1.0f + (float)rng_below(&w->random, 3); /* flat to sharp weights */
        for (size_t i = 0; i < width; i++) w->q[r * width + i] = to_bf16(scale * random_normal(&w->random));
    }
}

static void send(cuda_world *w) {
    const cuda_world_spec *spec = &w->spec;
    size_t width = (size_t)spec->n_heads * spec->head_dim;
    mp_cu_attend *a = &w->attend;
    a->head_dim = spec->head_dim;
    a->n_heads = spec->n_heads;
    a->n_kv_heads = spec->n_kv_heads;
    a->page_size = spec->page_size;
    a->scale = (float)(1.0 / sqrt(spec->head_dim));
    a->rope = (mp_cu_rope){ upload(w, w->turns, spec->n_pairs * sizeof *w->turns), spec->n_pairs, spec->halves,
                            spec->magnitude };
    a->fp8 = spec->fp8;
    if (spec->biased) {
        mp_cu_rope rope = { w->turns, spec->n_pairs, spec->halves, spec->magnitude };
        size_t n = (size_t)spec->n_kv_heads * spec->head_dim;
        mp_cu_key_bias_table(&rope, w->bias, spec->n_kv_heads, spec->head_dim, w->bias_table);
        a->key_bias = upload(w, w->bias_table, n * sizeof *w->bias_table);
    }
    a->slab = upload(w, w->slab, w->n_pages * w->page_bytes);
    a->page_bytes = w->page_bytes;
    a->block_bytes = w->block_bytes;
    a->layer_offset = LAYER * spec->n_kv_heads * w->block_bytes;
    a->q = upload(w, w->q, w->n_rows * width * 2);
    a->out = upload(w, NULL, w->n_rows * width * 2);
    a->partial_o = upload(w, NULL, w->n_slots * width * 2);
    a->partial_ml = upload(w, NULL, (size_t)w->n_slots * spec->n_heads * 2 * sizeof(float));
    a->work.counts = upload(w, NULL, sizeof *a->work.counts);
    a->work.rows = upload(w, w->rows, w->n_rows * sizeof *w->rows);
    a->work.pages = upload(w, w->pages, w->n_listed * sizeof *w->pages);
    a->work.cells = upload(w, w->cells, w->n_cells * sizeof *w->cells);
    a->work.items = upload(w, NULL, w->n_readers * sizeof *w->items);
    a->work.readers = upload(w, NULL, w->n_readers * sizeof *w->readers);
    a->work.folds = upload(w, w->folds, w->n_folds * sizeof *w->folds);
    a->work.blocks = upload(w, NULL, w->n_rows * sizeof *w->blocks);
    a->work.refs = upload(w, w->refs, w->n_refs * sizeof *w->refs);
    struct cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    cuda_world_device(&a->arch);
    a->n_sm = (uint32_t)prop.multiProcessorCount;
}

void cuda_world_open(const cuda_world_spec *spec, cuda_world **out) {
    cuda_world *w = take(1, sizeof *w);
    w->spec = *spec;
    if (!w->spec.cell_tokens) w->spec.cell_tokens = MP_CU_CELL_TOKENS;
    if (w->spec.magnitude == 0) w->spec.magnitude = 1;
    w->random = rng_open(spec->seed);
    allocate(w);
    uint32_t *shared = take(spec->n_shared, sizeof *shared);
    for (uint32_t i = 0; i < spec->n_shared; i++) {
        uint32_t n = spec->plain ? w->spec.cell_tokens : 1 + rng_below(&w->random, w->spec.cell_tokens);
        shared[i] = add_cell(w, n);
    }
    for (uint32_t i = 0; i < spec->n_sequences; i++) {
        for (uint32_t k = 0; k < spec->n_refs; k++) { /* the first n_refs of a partial shuffle */
            uint32_t j = k + rng_below(&w->random, spec->n_shared - k), swap = shared[k];
            shared[k] = shared[j];
            shared[j] = swap;
        }
        add_sequence(w, i, shared);
        add_decode_work(w, &w->sequences[i]);
        for (uint32_t k = 0; k < w->sequences[i].n_sights; k++) w->refs[w->n_refs++] = w->sequences[i].sights[k].ref;
    }
    free(shared);
    for (uint32_t i = 0; i < w->n_cells; i++) fill_cell(w, i);
    fill_queries(w);
    send(w);
    cuda_world_regroup(w, spec->max_readers);
    cuda_world_reblock(w, spec->block_rows ? spec->block_rows : 16);
    cuda_world_poison(w);
    *out = w;
}

void cuda_world_close(cuda_world *w) {
    for (uint32_t i = 0; i < w->n_taken; i++) CHECK(cudaFree(w->taken[i]));
    for (uint32_t i = 0; i < w->spec.n_sequences; i++) free(w->sequences[i].sights);
    void *owned[] = { w->order,        w->pages,    w->cells,  w->sequences, w->rows,  w->items, w->readers,
                      w->reader_cells, w->folds,    w->blocks, w->refs,      w->turns, w->slab,  w->q,
                      w->kv,           w->expected, w->bias,   w->bias_table };
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(w);
}

mp_cu_attend *cuda_world_attend(cuda_world *w) {
    return &w->attend;
}

uint32_t cuda_world_rows(const cuda_world *w) {
    return w->n_rows;
}

void cuda_world_poison(cuda_world *w) {
    size_t width = (size_t)w->spec.n_heads * w->spec.head_dim;
    CHECK(cudaMemset(w->attend.out, 0xff, w->n_rows * width * 2));
    CHECK(cudaMemset(w->attend.partial_o, 0xff, w->n_slots * width * 2));
    CHECK(cudaMemset(w->attend.partial_ml, 0xff, (size_t)w->n_slots * w->spec.n_heads * 2 * sizeof(float)));
    CHECK(cudaDeviceSynchronize());
}

void cuda_world_read(cuda_world *w, uint16_t *out) {
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    size_t width = (size_t)w->spec.n_heads * w->spec.head_dim;
    CHECK(cudaMemcpy(out, w->attend.out, w->n_rows * width * 2, cudaMemcpyDeviceToHost));
    mp_cu_counts counts;
    CHECK(cudaMemcpy(&counts, w->attend.work.counts, sizeof counts, cudaMemcpyDeviceToHost));
    if (counts.next_unit || counts.next_back || counts.next_block || counts.done) {
        fprintf(stderr, "cuda_world: work counters left at %u, %u, %u, %u\n", counts.next_unit, counts.next_back,
                counts.next_block, counts.done);
        exit(1);
    }
}

/* ---- Spoiling ---------------------------------------------------------------------------------------------------- */

static void spoil_cell(cuda_world *w, uint32_t cell, uint32_t kinds) {
    uint32_t hd = w->spec.head_dim;
    for (uint32_t i = 0; i < w->cells[cell].n_tokens; i++) {
        uint8_t *page = w->slab + w->pages[w->cells[cell].first_page + i / w->spec.page_size] * w->page_bytes;
        for (uint32_t h = 0; h < w->spec.n_kv_heads; h++) {
            uint8_t *block = page + (LAYER * w->spec.n_kv_heads + h) * w->block_bytes;
            for (uint32_t v = 0; w->spec.fp8 && v < 2; v++) { /* the factors */
                uint8_t *marks = block + i % w->spec.page_size / 8 * (16 * hd + 64) + 8 * hd;
                if (kinds & (v ? CUDA_SPOIL_VALUES : CUDA_SPOIL_KEYS))
                    memset(marks + (v ? 48 : 32) + i % 8 * 2, 0xff, 2);
            }
            for (uint32_t d = 0; !w->spec.fp8 && d < 2 * hd; d++) {
                if (kinds & (d < hd ? CUDA_SPOIL_KEYS : CUDA_SPOIL_VALUES)) {
                    memset(block + element(hd, i % w->spec.page_size, d % hd, d >= hd), 0xff, 2);
                }
            }
        }
    }
}

static bool sees_any(const cuda_world *w, const sequence *s, uint32_t row, const mp_cu_ref *ref) {
    for (int32_t i = ref->lo; i < edge_of(s, row, ref); i++) {
        if (ref->mask >> ((uint32_t)i / w->spec.page_size) & 1) return true;
    }
    return false;
}

void cuda_world_spoil(cuda_world *w, uint32_t index, uint32_t kinds, cuda_world_touch *touched) {
    const sequence *s = &w->sequences[index];
    for (uint32_t r = 0; r < w->n_rows; r++) touched[r] = CUDA_WORLD_UNTOUCHED;
    for (uint32_t i = 0; i < s->n_rows; i++) touched[s->first_row + i] = CUDA_WORLD_BESIDE;
    for (uint32_t k = 0; k < s->n_sights; k++) {
        const mp_cu_ref *ref = &s->sights[k].ref;
        if (ref->shared) continue;
        spoil_cell(w, ref->cell, kinds);
        for (uint32_t i = 0; i < s->n_rows; i++) {
            if (sees_any(w, s, i, ref)) touched[s->first_row + i] = CUDA_WORLD_SEES;
        }
    }
    CHECK(cudaMemcpy((void *)w->attend.slab, w->slab, w->n_pages * w->page_bytes, cudaMemcpyHostToDevice));
}

bool cuda_world_contained(const cuda_world *w, const cuda_world_touch *touched, const uint16_t *before,
                          const uint16_t *after) {
    size_t width = (size_t)w->spec.n_heads * w->spec.head_dim;
    for (size_t i = 0; i < w->n_rows * width; i++) {
        cuda_world_touch touch = touched[i / width];
        bool is_nan = (after[i] & 0x7fff) > 0x7f80;
        if (touch == CUDA_WORLD_SEES ? is_nan : touch == CUDA_WORLD_BESIDE || after[i] == before[i]) continue;
        fprintf(stderr, "row %zu, column %zu: %04x after %04x; the row %s what was spoiled\n", i / width, i % width,
                after[i], before[i], touch == CUDA_WORLD_SEES ? "sees" : "does not see");
        return false;
    }
    return true;
}

/* ---- The reference ----------------------------------------------------------------------------------------------- */

/* Query of (row, head) turned by delta. */
static void turned_query(const cuda_world *w, uint32_t row, uint32_t head, int32_t delta, double *q) {
    uint32_t hd = w->spec.head_dim;
    const uint16_t *raw = w->q + ((size_t)row * w->spec.n_heads + head) * hd;
    float x[256] = { 0 };
    for (uint32_t d = 0; d < hd; d++) x[d] = from_bf16(raw[d]);
    turn(w, delta, x, q);
}

typedef struct state {
    double m, l;
    double q[256], o[256];
} state;

static void attend_key(const cuda_world *w, state *st, uint32_t cell, uint32_t kv_head, uint32_t token) {
    uint32_t hd = w->spec.head_dim;
    const float *k = w->kv + kv_at(w, cell, kv_head, false, token), *v = w->kv + kv_at(w, cell, kv_head, true, token);
    double s = 0;
    for (uint32_t d = 0; d < hd; d++) s += st->q[d] * (double)k[d];
    s *= (double)w->attend.scale;
    if (st->l == 0 || s > st->m) {
        double f = st->l > 0 ? exp(st->m - s) : 0;
        st->l *= f;
        for (uint32_t d = 0; d < hd; d++) st->o[d] *= f;
        st->m = s;
    }
    double p = exp(s - st->m);
    st->l += p;
    for (uint32_t d = 0; d < hd; d++) st->o[d] += p * (double)v[d];
}

static void expect_row(void *ctx, uint32_t row, uint32_t thread) {
    cuda_world *w = ctx;
    (void)thread;
    const sequence *s = w->sequences;
    while (row >= s->first_row + s->n_rows) s++;
    uint32_t hd = w->spec.head_dim;
    for (uint32_t h = 0; h < w->spec.n_heads; h++) {
        state st = { 0 };
        for (uint32_t k = 0; k < s->n_sights; k++) {
            const mp_cu_ref *ref = &s->sights[k].ref;
            int32_t hi = edge_of(s, row - s->first_row, ref);
            turned_query(w, row, h, w->rows[row].position - ref->base, st.q);
            for (int32_t i = ref->lo; i < hi; i++) {
                if (!(ref->mask >> ((uint32_t)i / w->spec.page_size) & 1)) continue;
                attend_key(w, &st, ref->cell, h / (w->spec.n_heads / w->spec.n_kv_heads), (uint32_t)i);
            }
        }
        double *out = w->expected + ((size_t)row * w->spec.n_heads + h) * hd;
        for (uint32_t d = 0; d < hd; d++) out[d] = st.l > 0 ? st.o[d] / st.l : 0;
    }
}

const double *cuda_world_expect(cuda_world *w) {
    if (w->expected) return w->expected;
    w->expected = take((size_t)w->n_rows * w->spec.n_heads * w->spec.head_dim, sizeof *w->expected);
    mp_threads *threads = NULL;
    mepic_error err;
    if (mp_threads_open(0, &threads, &err) != MEPIC_OK) {
        fprintf(stderr, "cuda_world: %s\n", err.message);
        exit(1);
    }
    mp_threads_run(threads, w->n_rows, expect_row, w);
    mp_threads_close(threads);
    return w->expected;
}

double cuda_world_error(cuda_world *w, const uint16_t *out, double *worst) {
    const double *expected = cuda_world_expect(w);
    uint32_t hd = w->spec.head_dim;
    double diff = 0, norm = 0;
    *worst = 0;
    for (size_t i = 0; i < (size_t)w->n_rows * w->spec.n_heads; i++) {
        double d2 = 0, n2 = 0;
        for (uint32_t d = 0; d < hd; d++) {
            double x = expected[i * hd + d], e = (double)from_bf16(out[i * hd + d]) - x;
            d2 += e * e;
            n2 += x * x;
        }
        double one = d2 == 0 ? 0 : sqrt(d2 / n2);
        if (isnan(one) || one > *worst) *worst = one; /* NaN stays */
        diff += d2;
        norm += n2;
    }
    return sqrt(diff / norm);
}
