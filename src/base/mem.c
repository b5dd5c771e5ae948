#include "base/mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* The one piece of process-wide state: counters of a process-wide resource. */
static atomic_uint_fast64_t count;
static atomic_uint_fast64_t fail_in; /* allocations until the injected failure; 0 = off */
static atomic_bool fail_all;

static bool may_allocate(void) {
    atomic_fetch_add_explicit(&count, 1, memory_order_relaxed);
    uint64_t left = atomic_load_explicit(&fail_in, memory_order_relaxed);
    if (left == 0) return true;
    if (left > 1) {
        atomic_store_explicit(&fail_in, left - 1, memory_order_relaxed);
        return true;
    }
    if (!atomic_load_explicit(&fail_all, memory_order_relaxed))
        atomic_store_explicit(&fail_in, 0, memory_order_relaxed);
    return false;
}

uint64_t mp_mem_count(void) {
    return atomic_load_explicit(&count, memory_order_relaxed);
}

void mp_mem_fail_at(uint64_t n, bool every_one) {
    atomic_store(&fail_all, every_one);
    atomic_store(&fail_in, n);
}

void *mp_alloc(size_t bytes) {
    return may_allocate() ? malloc(bytes ? bytes : 1) : NULL;
}

void *mp_calloc(size_t n, size_t size) {
    if (!may_allocate()) return NULL;
    return n && size ? calloc(n, size) : calloc(1, 1);
}

void *mp_realloc(void *p, size_t bytes) {
    return may_allocate() ? realloc(p, bytes ? bytes : 1) : NULL;
}

void mp_free(void *p) {
    free(p);
}

char *mp_strndup(const char *s, size_t len) {
    if (len == SIZE_MAX) return NULL;
    char *copy = mp_alloc(len + 1);
    if (!copy) return NULL;
    memcpy(copy, s, len);
    copy[len] = 0;
    return copy;
}

/* From here on memory comes straight from the system: it is zero, page-aligned, and can be huge pages. */
enum { MAP_FROM = 1 << 20, HUGE_PAGE = 2 << 20 };

void *mp_alloc_aligned(size_t align, size_t bytes) {
    if (!may_allocate()) return NULL;
    if (bytes >= MAP_FROM) {
        if (align > 4096) return NULL;
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return NULL;
        if (bytes >= HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE); /* best effort */
        return p;
    }
    size_t rounded = (bytes ? bytes + align - 1 : align) / align * align;
    void *p = aligned_alloc(align, rounded);
    if (p) memset(p, 0, rounded);
    return p;
}

void mp_free_aligned(void *p, size_t bytes) {
    if (!p) return;
    if (bytes >= MAP_FROM) {
        munmap(p, bytes);
    } else {
        free(p);
    }
}

bool mp_buf_append(mp_buf *buf, const void *bytes, size_t n) {
    if (n > buf->limit || buf->len > buf->limit - n) return false;
    size_t need = buf->len + n;
    if (need > buf->cap) {
        size_t cap = buf->cap ? buf->cap : 64;
        while (cap < need) cap = cap > buf->limit / 2 ? buf->limit : cap * 2;
        char *data = mp_realloc(buf->data, cap);
        if (!data) return false;
        buf->data = data;
        buf->cap = cap;
    }
    if (n) memcpy(buf->data + buf->len, bytes, n);
    buf->len = need;
    return true;
}

void mp_buf_clear(mp_buf *buf) {
    mp_free(buf->data);
    buf->data = NULL;
    buf->len = buf->cap = 0;
}
