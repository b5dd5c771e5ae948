/* Keys: the names of cached pages. A key is SHA-256 over the key before it and what the page holds, so it names the
 * whole chain up to the page; the first page's is chained to a root, which says for whom it was computed and how.
 *
 *     canonical root (format, model, scope, canonical context) ── page 0 ── page 1 ── ...      a chunk
 *     prefix root    (format, model, scope, policy)            ── page 0 ── page 1 ── ...      a private stream
 *
 * A page holds tokens and, in a private stream, references to chunks that stand between them. The scope is in the root:
 * nothing found by key is another tenant's. Fields are fixed-width, little-endian: a key is the same everywhere. */
#ifndef MEPIC_CACHE_KEY_H
#define MEPIC_CACHE_KEY_H

#include "base/hash.h"
#include "base/status.h"

#define MP_PAGE_TOKENS_MAX 128u

/* What a cached page holds; compared as well as the key when a page is looked up. */
typedef struct mp_elements {
    const int32_t *tokens; /* [n_tokens], at most a page */
    uint32_t n_tokens;
    mp_digest refs; /* of the chunk references between the tokens; all zero: none */
} mp_elements;

/* A chunk reference in a private stream: what a token behind it may see of the chunk. */
typedef struct mp_chunk_ref {
    mp_digest identity; /* key of the chunk's last page */
    uint32_t slot;      /* of the token it stands before */
    uint32_t lo, hi;
    const uint16_t *hidden; /* [n_pages] nonzero: page not seen; NULL: all are */
    uint32_t n_pages;
} mp_chunk_ref;

mp_digest mp_key_canonical_root(mp_sha256 *sha, const mp_digest *model, const mp_digest *scope,
                                const int32_t *canonical, uint32_t n_canonical);
mp_digest mp_key_prefix_root(mp_sha256 *sha, const mp_digest *model, const mp_digest *scope, mepic_reuse policy);
mp_digest mp_key_next(mp_sha256 *sha, const mp_digest *before, const mp_elements *elements);
/* One more reference on top of those already in `refs` (zero for the first). */
mp_digest mp_key_add_ref(mp_sha256 *sha, const mp_digest *refs, const mp_chunk_ref *ref);
/* keys[0 .. ceil(n / page_size)) of a chunk's pages; the last, partly filled page has a key of its own. */
void mp_key_chunk(mp_sha256 *sha, const mp_digest *root, const int32_t *tokens, uint32_t n, uint32_t page_size,
                  mp_digest *keys);

#endif
