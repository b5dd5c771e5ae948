#include "serve/keys.h"

#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

struct mp_keys {
    mp_key *items;
    uint32_t n;
};

static bool digest_of(const char *domain, const char *bytes, size_t n, mp_digest *out) {
    mp_sha256 *sha = mp_sha256_open();
    if (!sha) return false;
    mp_sha256_begin(sha);
    mp_sha256_update(sha, domain, strlen(domain) + 1);
    mp_sha256_update(sha, bytes, n);
    *out = mp_sha256_end(sha);
    mp_sha256_close(sha);
    return true;
}

static bool fill_key(mp_key *key, const char *bytes, size_t n, const char *name) {
    mp_digest scope;
    if (!digest_of("mepic/key", bytes, n, &key->digest) || !digest_of("mepic/key-scope", bytes, n, &scope))
        return false;
    mp_digest_write(&scope, key->scope);
    snprintf(key->name, sizeof key->name, "%s", name);
    return true;
}

static bool is_key_char(char c) {
    return c > ' ' && c < 0x7f;
}

static mepic_status add_line(void *ctx, const char *path, uint32_t number, const char *from, mepic_error *err) {
    mp_keys *keys = ctx;
    size_t n = 0;
    while (is_key_char(from[n])) n++;
    if (n < MP_KEY_LEN_MIN || n > MP_KEY_LEN_MAX || (from[n] && from[n] != ' ' && from[n] != '\t')) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: a key is %d to %d printable ASCII characters", path,
                       number, MP_KEY_LEN_MIN, MP_KEY_LEN_MAX);
    }
    if (keys->n == MP_KEYS_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: more than %d keys", path, number, MP_KEYS_MAX);
    }
    mp_key *grown = mp_realloc(keys->items, (keys->n + 1) * sizeof *grown);
    if (!grown) return mp_fail_nomem(err, path, (keys->n + 1) * sizeof *grown);
    keys->items = grown;
    char name[48];
    const char *given = from + n + strspn(from + n, " \t");
    if (*given)
        snprintf(name, sizeof name, "%s", given);
    else
        snprintf(name, sizeof name, "key %u", keys->n + 1);
    const mp_key *before;
    if (!mp_keys_find(keys, from, n, &before)) return mp_fail_nomem(err, path, sizeof *grown);
    if (before) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: this key was given before", path, number);
    }
    if (!fill_key(&keys->items[keys->n], from, n, name)) return mp_fail_nomem(err, path, sizeof *grown);
    keys->items[keys->n].index = keys->n;
    keys->n++;
    return MEPIC_OK;
}

mepic_status mp_keys_read(const char *path, mp_keys **out, mepic_error *err) {
    mp_keys *keys = mp_calloc(1, sizeof *keys);
    if (!keys) return mp_fail_nomem(err, path, sizeof *keys);
    mepic_status status = mp_file_lines(path, add_line, keys, err);
    if (status == MEPIC_OK && keys->n == 0) {
        status = mp_fail(err, MEPIC_ERR_ARGUMENT, "%s holds no key; write one a line", path);
    }
    if (status == MEPIC_OK)
        *out = keys;
    else
        mp_keys_free(keys);
    return status;
}

void mp_keys_free(mp_keys *keys) {
    if (!keys) return;
    mp_free(keys->items);
    mp_free(keys);
}

uint32_t mp_keys_count(const mp_keys *keys) {
    return keys->n;
}

bool mp_keys_find(const mp_keys *keys, const char *presented, size_t len, const mp_key **out) {
    mp_digest digest;
    *out = NULL;
    if (!digest_of("mepic/key", presented, len, &digest)) return false;
    for (uint32_t i = 0; i < keys->n; i++) {
        unsigned difference = 0;
        for (size_t k = 0; k < sizeof digest.bytes; k++) difference |= digest.bytes[k] ^ keys->items[i].digest.bytes[k];
        if (difference == 0) *out = &keys->items[i];
    }
    return true;
}
