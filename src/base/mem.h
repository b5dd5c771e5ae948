/* Memory: the only allocator calls in the code, so that tests can count them and make the n-th one fail.
 *
 * Everything a step needs is allocated when an engine opens; submit and parsers may allocate and report ERR_NOMEM.
 * Any thread. */
#ifndef MEPIC_BASE_MEM_H
#define MEPIC_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *mp_alloc(size_t bytes);              /* uninitialized; NULL when out of memory; 0 bytes gives a valid pointer */
void *mp_calloc(size_t count, size_t size); /* zeroed, overflow-checked */
void *mp_realloc(void *p, size_t bytes);
void mp_free(void *p); /* NULL is a no-op */
char *mp_strndup(const char *s, size_t len);

/* Zeroed, aligned to `align` (a power of two), for slabs and packed weights; large ones ask for huge pages. Free with
 * mp_free_aligned and the same size. */
void *mp_alloc_aligned(size_t align, size_t bytes);
void mp_free_aligned(void *p, size_t bytes);

/* Allocations since the process started. */
uint64_t mp_mem_count(void);
/* Test hook: the n-th allocation from now on fails (1 = the next); every_one: all later ones fail as well. 0 = off. */
void mp_mem_fail_at(uint64_t n, bool every_one);

/* A growing byte buffer with a limit it may never pass. Zero-initialize and set `limit`. */
typedef struct mp_buf {
    char *data;
    size_t len, cap, limit;
} mp_buf;
bool mp_buf_append(mp_buf *buf, const void *bytes, size_t n); /* false: out of memory or past the limit; unchanged */
void mp_buf_clear(mp_buf *buf);                               /* frees; may be used again */

#endif
