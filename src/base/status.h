/* Status and error text for everything inside.
 *
 * Fallible functions return mepic_status, or bool with true = success when there is one way to fail. The message goes
 * to a caller-owned mepic_error that is passed down and may be NULL. Any thread. */
#ifndef MEPIC_BASE_STATUS_H
#define MEPIC_BASE_STATUS_H

#include <mepic.h>

#define MP_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* Writes status and message to `err` (if not NULL) and returns `status`, for `return mp_fail(...)`. A message that does
 * not fit is cut at a character boundary. */
mepic_status mp_fail(mepic_error *err, mepic_status status, const char *format, ...) MP_PRINTF(3, 4);
/* mp_fail for ERR_NOMEM, naming what could not be allocated and its size. */
mepic_status mp_fail_nomem(mepic_error *err, const char *what, size_t bytes);

/* What clang's analyzer cannot see across files: the status comes back, and what is invariant holds. */
#ifdef __clang_analyzer__
#define mp_fail(err, status, ...) ((void)mp_fail(err, status, __VA_ARGS__), (status))
#define mp_fail_nomem(err, what, bytes) ((void)mp_fail_nomem(err, what, bytes), MEPIC_ERR_NOMEM)
#endif

/* Of a text that may have been cut at `cap` bytes, which must still be UTF-8: drops a character without its end. */
void mp_end_at_character(char *text, size_t cap);

/* Checked arithmetic on sizes: false on overflow, and *out is untouched. */
bool mp_mul_size(size_t a, size_t b, size_t *out);
bool mp_add_size(size_t a, size_t b, size_t *out);

/* A sticky fault: the first broken invariant wins. One per engine; owned by it and lent to pool, caches, scheduler.
 * Checked in release builds too, since the price of a wrong page is a wrong answer. */
typedef struct mp_fault {
    bool broken;
    char what[160];
} mp_fault;
/* Returns `ok`; on false records the fault (first one only). Use as:
 *     if (!mp_invariant(f, x < n, "page in range")) return; */
bool mp_invariant(mp_fault *fault, bool ok, const char *what);
#ifdef __clang_analyzer__
#define mp_invariant(fault, ok, what) (mp_invariant(fault, ok, what) && (ok))
#endif

#endif
