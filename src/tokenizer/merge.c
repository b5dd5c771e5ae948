#include "tokenizer/merge.h"

void mp_merger_begin(mp_merger *merger) {
    merger->n = merger->n_heap = 0;
}

bool mp_merger_add(mp_merger *merger, int32_t id, uint32_t start, uint32_t len) {
    if (merger->n == merger->cap) {
        size_t cap = merger->cap ? 2 * merger->cap : 64;
        if (cap > MP_SYMBOLS_MAX) return false;
        mp_symbol *symbols = mp_realloc(merger->symbols, cap * sizeof *symbols);
        if (!symbols) return false;
        merger->symbols = symbols;
        merger->cap = cap;
    }
    int32_t i = (int32_t)merger->n++;
    merger->symbols[i] = (mp_symbol){ i - 1, -1, id, start, len };
    if (i > 0) merger->symbols[i - 1].next = i;
    return true;
}

static bool heap_push(mp_merger *merger, uint64_t key) {
    if (merger->n_heap == merger->cap_heap) {
        size_t cap = merger->cap_heap ? 2 * merger->cap_heap : 64;
        uint64_t *heap = mp_realloc(merger->heap, cap * sizeof *heap);
        if (!heap) return false;
        merger->heap = heap;
        merger->cap_heap = cap;
    }
    uint64_t *heap = merger->heap;
    size_t i = merger->n_heap++;
    for (; i > 0 && heap[(i - 1) / 2] > key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = key;
    return true;
}

static uint64_t heap_pop(mp_merger *merger) {
    uint64_t *heap = merger->heap;
    uint64_t top = heap[0], last = heap[--merger->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < merger->n_heap; i = child) {
        if (child + 1 < merger->n_heap && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

/* Makes the symbol at `left` and its right neighbour a candidate if they can be joined. */
static bool propose(mp_merger *merger, int32_t left, mp_pair_fn pair, const void *ctx) {
    if (left < 0) return true;
    const mp_symbol *a = &merger->symbols[left];
    uint32_t rank;
    int32_t id;
    if (a->next < 0 || !pair(ctx, a, &merger->symbols[a->next], &rank, &id)) return true;
    return heap_push(merger, (uint64_t)rank << 32 | (uint32_t)left);
}

bool mp_merger_run(mp_merger *merger, mp_pair_fn pair, const void *ctx) {
    for (size_t i = 0; i < merger->n; i++) {
        if (!propose(merger, (int32_t)i, pair, ctx)) return false;
    }
    while (merger->n_heap) {
        uint64_t key = heap_pop(merger);
        int32_t at = (int32_t)(uint32_t)key;
        mp_symbol *a = &merger->symbols[at];
        if (a->len == 0 || a->next < 0) continue;
        mp_symbol *b = &merger->symbols[a->next];
        uint32_t rank;
        int32_t id;
        if (!pair(ctx, a, b, &rank, &id) || rank != (uint32_t)(key >> 32)) continue; /* outdated */
        a->id = id;
        a->len += b->len;
        a->next = b->next;
        b->len = 0;
        if (a->next >= 0) merger->symbols[a->next].prev = at;
        if (!propose(merger, a->prev, pair, ctx) || !propose(merger, at, pair, ctx)) return false;
    }
    return true;
}

void mp_merger_clear(mp_merger *merger) {
    mp_free(merger->symbols);
    mp_free(merger->heap);
    *merger = (mp_merger){ 0 };
}
