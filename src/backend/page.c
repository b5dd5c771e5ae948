#include "backend/backend.h"

size_t mp_kv_page_bytes(const mp_hparams *hp, mepic_kv_type type, uint32_t page_size) {
    size_t element = type == MEPIC_KV_F32 ? 4 : 2;
    return (size_t)hp->n_layers * hp->n_kv_heads * page_size * 2 * hp->head_dim * element;
}
