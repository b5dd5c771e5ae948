#include "serve/public.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/hash.h"
#include "base/mem.h"

struct mp_public {
    mp_digest *items; /* [n], sorted once all are there */
    uint32_t n, cap;
};

static int compare(const void *a, const void *b) {
    return memcmp(a, b, sizeof(mp_digest));
}

static mepic_status add_line(void *ctx, const char *path, uint32_t number, const char *from, mepic_error *err) {
    mp_public *list = ctx;
    mp_digest digest;
    if (!mp_digest_read(from, &digest) || !strchr(" \t", from[MP_DIGEST_DIGITS])) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: '%.80s' is not a SHA-256, 64 hexadecimal digits", path,
                       number, from);
    }
    if (list->n == MP_PUBLIC_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: more than %d documents", path, number, MP_PUBLIC_MAX);
    }
    if (list->n == list->cap) {
        uint32_t cap = list->cap ? 2 * list->cap : 64;
        mp_digest *grown = mp_realloc(list->items, cap * sizeof *grown);
        if (!grown) return mp_fail_nomem(err, path, cap * sizeof *grown);
        list->items = grown;
        list->cap = cap;
    }
    list->items[list->n++] = digest;
    return MEPIC_OK;
}

mepic_status mp_public_read(const char *path, mp_public **out, mepic_error *err) {
    mp_public *list = mp_calloc(1, sizeof *list);
    if (!list) return mp_fail_nomem(err, path, sizeof *list);
    mepic_status status = mp_file_lines(path, add_line, list, err);
    if (status != MEPIC_OK) {
        mp_public_free(list);
        return status;
    }
    if (list->n > 0) qsort(list->items, list->n, sizeof *list->items, compare);
    *out = list;
    return MEPIC_OK;
}

void mp_public_free(mp_public *list) {
    if (!list) return;
    mp_free(list->items);
    mp_free(list);
}

bool mp_public_has(const mp_public *list, const char *text, size_t len) {
    mp_sha256 *sha = list->n > 0 ? mp_sha256_open() : NULL;
    if (!sha) return false;
    while (len > 0 && text[len - 1] == '\n') len--;
    mp_sha256_begin(sha);
    mp_sha256_update(sha, text, len);
    mp_digest digest = mp_sha256_end(sha);
    mp_sha256_close(sha);
    return bsearch(&digest, list->items, list->n, sizeof digest, compare) != NULL;
}
