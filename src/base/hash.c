#include "base/hash.h"

#include <openssl/evp.h>
#include <string.h>

#include "base/mem.h"

struct mp_sha256 {
    EVP_MD_CTX *ctx;
    EVP_MD *md; /* fetched once: a lookup per digest would cost more than a short digest itself */
};

mp_sha256 *mp_sha256_open(void) {
    mp_sha256 *sha = mp_calloc(1, sizeof *sha);
    if (!sha) return NULL;
    sha->ctx = EVP_MD_CTX_new();
    sha->md = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (!sha->ctx || !sha->md || EVP_DigestInit_ex2(sha->ctx, sha->md, NULL) != 1) {
        mp_sha256_close(sha);
        return NULL;
    }
    return sha;
}

void mp_sha256_close(mp_sha256 *sha) {
    if (!sha) return;
    EVP_MD_CTX_free(sha->ctx);
    EVP_MD_free(sha->md);
    mp_free(sha);
}

void mp_sha256_begin(mp_sha256 *sha) {
    EVP_DigestInit_ex2(sha->ctx, NULL, NULL); /* the same algorithm again: cannot fail once it succeeded */
}

void mp_sha256_update(mp_sha256 *sha, const void *bytes, size_t n) {
    EVP_DigestUpdate(sha->ctx, bytes, n);
}

mp_digest mp_sha256_end(mp_sha256 *sha) {
    mp_digest d;
    EVP_DigestFinal_ex(sha->ctx, d.bytes, NULL);
    return d;
}

int mp_hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

void mp_digest_write(const mp_digest *d, char out[MP_DIGEST_DIGITS + 1]) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < MP_DIGEST_DIGITS; i++) out[i] = digits[d->bytes[i / 2] >> (i % 2 ? 0 : 4) & 15];
    out[MP_DIGEST_DIGITS] = 0;
}

bool mp_digest_read(const char *text, mp_digest *out) {
    mp_digest d = { { 0 } };
    for (size_t i = 0; i < MP_DIGEST_DIGITS; i++) {
        int digit = mp_hex_digit(text[i]);
        if (digit < 0) return false;
        d.bytes[i / 2] = (uint8_t)(d.bytes[i / 2] << 4 | digit);
    }
    *out = d;
    return true;
}

bool mp_digest_equal(const mp_digest *a, const mp_digest *b) {
    return memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

uint64_t mp_digest_bucket(const mp_digest *d) {
    uint64_t h;
    memcpy(&h, d->bytes, sizeof h);
    return h;
}

static uint64_t mix(uint64_t h) {
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

uint64_t mp_hash64(uint64_t seed, const void *bytes, size_t n) {
    const uint8_t *p = bytes;
    uint64_t h = mix(seed + 0x9e3779b97f4a7c15u + n);
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w = 0;
        for (int i = 0; i < 8; i++) w |= (uint64_t)p[i] << 8 * i;
        h = mix(h ^ w);
    }
    uint64_t w = 0;
    for (size_t i = 0; i < n; i++) w |= (uint64_t)p[i] << 8 * i;
    return mix(h ^ w);
}

uint64_t mp_hash64_pair(uint64_t seed, uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> 8 * i);
    return mp_hash64(seed, bytes, sizeof bytes);
}
