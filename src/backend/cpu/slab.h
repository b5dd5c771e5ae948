/* Where K and V lie: the page slab and its geometry.
 *
 *   slab  = pages                          one allocation
 *   page  = [layer][kv_head] blocks
 *   block = page_size / 16 groups
 *   group = 16 tokens: K transposed [head_dim][16 tokens], then V [16 tokens][head_dim]
 *
 * K is transposed so that the sixteen lanes of a vector are sixteen keys, and their scores a plain fold over head_dim;
 * a group's K and V are neighbours so that a page of a head is read front to back. Written by the rows' store, read by
 * attend; the stepping thread and its workers. */
#ifndef MEPIC_BACKEND_CPU_SLAB_H
#define MEPIC_BACKEND_CPU_SLAB_H

#include "kv/plan.h"

#define MP_CPU_CELL_TOKENS 256u
#define MP_GROUP_TOKENS 16u
#define MP_CELL_GROUPS (MP_CPU_CELL_TOKENS / MP_GROUP_TOKENS)

typedef struct mp_slab {
    uint8_t *data;
    size_t page_bytes, block_bytes, group_bytes;
    uint32_t page_size, n_pages, n_kv_heads, head_dim;
    mepic_kv_type type;
} mp_slab;

/* The group that holds slot `slot` of a page. */
static inline uint8_t *mp_slab_group(const mp_slab *slab, mp_page page, uint32_t layer, uint32_t kv_head,
                                     uint32_t slot) {
    return slab->data + page * slab->page_bytes + ((size_t)layer * slab->n_kv_heads + kv_head) * slab->block_bytes +
           slot / MP_GROUP_TOKENS * slab->group_bytes;
}

#endif
