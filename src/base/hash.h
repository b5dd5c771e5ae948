/* SHA-256 for identities (libcrypto), a 64-bit hash for hash tables and for the fingerprint of logits. Any thread; a
 * context belongs to one. */
#ifndef MEPIC_BASE_HASH_H
#define MEPIC_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct mp_digest {
    uint8_t bytes[32];
} mp_digest;

/* A reusable SHA-256 context: open once, then begin/update/end any number of times without allocating. */
typedef struct mp_sha256 mp_sha256;
mp_sha256 *mp_sha256_open(void); /* NULL: out of memory */
void mp_sha256_close(mp_sha256 *sha);
void mp_sha256_begin(mp_sha256 *sha);
void mp_sha256_update(mp_sha256 *sha, const void *bytes, size_t n);
mp_digest mp_sha256_end(mp_sha256 *sha);

bool mp_digest_equal(const mp_digest *a, const mp_digest *b);
/* The value of a hexadecimal digit in either case; -1: it is none. */
int mp_hex_digit(char c);
enum { MP_DIGEST_DIGITS = 64 };
/* In hexadecimal. */
void mp_digest_write(const mp_digest *d, char out[MP_DIGEST_DIGITS + 1]);
/* Of the first 64 characters; false: one of them is no digit, and none behind it is looked at. */
bool mp_digest_read(const char *text, mp_digest *out);
/* The first 8 bytes, for hash tables: SHA-256 output needs no further mixing. */
uint64_t mp_digest_bucket(const mp_digest *d);

/* Not cryptographic; the same value on every machine. Chain by passing the previous value as seed. */
uint64_t mp_hash64(uint64_t seed, const void *bytes, size_t n);
/* The hash of a number's 8 bytes, the lowest first: the random bits of a draw are those of (seed, position). */
uint64_t mp_hash64_pair(uint64_t seed, uint64_t value);

#endif
