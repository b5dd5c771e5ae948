/* API keys: who may ask, and whose cached content a request sees.
 *
 * A file has one key a line, optionally followed by a blank and a name for logs; # begins a comment. Only digests are
 * kept, and all of them are compared in full, so the time taken does not tell how much of a guess was right. A key's
 * scope is derived from the key alone. Immutable after reading, but for the count of running replies; any thread. */
#ifndef MEPIC_SERVE_KEYS_H
#define MEPIC_SERVE_KEYS_H

#include "base/hash.h"
#include "base/status.h"

enum { MP_KEYS_MAX = 4096, MP_KEY_LEN_MIN = 8, MP_KEY_LEN_MAX = 256 };

typedef struct mp_key {
    mp_digest digest;
    uint32_t index; /* in the file's order, from 0 */
    char name[48];
    char scope[MP_DIGEST_DIGITS + 1];
} mp_key;

typedef struct mp_keys mp_keys;

/* ERR_IO, ERR_ARGUMENT (names the line, never the key), ERR_NOMEM. */
mepic_status mp_keys_read(const char *path, mp_keys **out, mepic_error *err);
void mp_keys_free(mp_keys *keys); /* NULL is a no-op */
uint32_t mp_keys_count(const mp_keys *keys);
/* *out NULL: there is no such key. False: out of memory. */
bool mp_keys_find(const mp_keys *keys, const char *presented, size_t len, const mp_key **out);

#endif
