#include "cache/key.h"

#include <string.h>

static void update_u32(mp_sha256 *sha, const uint32_t *values, uint32_t n) {
    uint8_t bytes[4 * MP_PAGE_TOKENS_MAX];
    while (n > 0) {
        uint32_t part = n < MP_PAGE_TOKENS_MAX ? n : MP_PAGE_TOKENS_MAX;
        for (uint32_t i = 0; i < part; i++) {
            for (uint32_t b = 0; b < 4; b++) bytes[4 * i + b] = (uint8_t)(values[i] >> 8 * b);
        }
        mp_sha256_update(sha, bytes, 4 * (size_t)part);
        values += part;
        n -= part;
    }
}

static void begin(mp_sha256 *sha, const char *what) {
    mp_sha256_begin(sha);
    mp_sha256_update(sha, what, strlen(what) + 1);
}

mp_digest mp_key_canonical_root(mp_sha256 *sha, const mp_digest *model, const mp_digest *scope,
                                const int32_t *canonical, uint32_t n_canonical) {
    begin(sha, "mepic canonical 1");
    mp_sha256_update(sha, model->bytes, sizeof model->bytes);
    mp_sha256_update(sha, scope->bytes, sizeof scope->bytes);
    update_u32(sha, &n_canonical, 1);
    update_u32(sha, (const uint32_t *)canonical, n_canonical);
    return mp_sha256_end(sha);
}

mp_digest mp_key_prefix_root(mp_sha256 *sha, const mp_digest *model, const mp_digest *scope, mepic_reuse policy) {
    uint32_t value = (uint32_t)policy;
    begin(sha, "mepic prefix 1");
    mp_sha256_update(sha, model->bytes, sizeof model->bytes);
    mp_sha256_update(sha, scope->bytes, sizeof scope->bytes);
    update_u32(sha, &value, 1);
    return mp_sha256_end(sha);
}

mp_digest mp_key_next(mp_sha256 *sha, const mp_digest *before, const mp_elements *elements) {
    mp_sha256_begin(sha);
    mp_sha256_update(sha, before->bytes, sizeof before->bytes);
    mp_sha256_update(sha, elements->refs.bytes, sizeof elements->refs.bytes);
    update_u32(sha, &elements->n_tokens, 1);
    update_u32(sha, (const uint32_t *)elements->tokens, elements->n_tokens);
    return mp_sha256_end(sha);
}

mp_digest mp_key_add_ref(mp_sha256 *sha, const mp_digest *refs, const mp_chunk_ref *ref) {
    uint32_t fixed[4] = { ref->slot, ref->lo, ref->hi, ref->hidden ? ref->n_pages : 0 };
    begin(sha, "mepic reference 1");
    mp_sha256_update(sha, refs->bytes, sizeof refs->bytes);
    mp_sha256_update(sha, ref->identity.bytes, sizeof ref->identity.bytes);
    update_u32(sha, fixed, 4);
    for (uint32_t p = 0; p < fixed[3]; p++) {
        uint8_t bit = ref->hidden[p] != 0;
        mp_sha256_update(sha, &bit, 1);
    }
    return mp_sha256_end(sha);
}

void mp_key_chunk(mp_sha256 *sha, const mp_digest *root, const int32_t *tokens, uint32_t n, uint32_t page_size,
                  mp_digest *keys) {
    const mp_digest *before = root;
    for (uint32_t at = 0, i = 0; at < n; at += page_size, i++) {
        mp_elements page = { .tokens = tokens + at, .n_tokens = n - at < page_size ? n - at : page_size };
        keys[i] = mp_key_next(sha, before, &page);
        before = &keys[i];
    }
}
