#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What status.h shows the analyzer instead of these is for callers. */
#undef mp_fail
#undef mp_fail_nomem
#undef mp_invariant

const char *mepic_status_name(mepic_status status) {
    switch (status) {
#define X(name, value, text)                                                                                           \
    case MEPIC_##name: return #name;
        MEPIC_STATUS_MAP(X)
#undef X
    }
    return "UNKNOWN";
}

void mp_end_at_character(char *s, size_t cap) {
    size_t len = strlen(s);
    if (len + 1 < cap) return;
    size_t i = len;
    while (i > 0 && len - i < 4 && ((unsigned char)s[i - 1] & 0xC0u) == 0x80u) i--;
    if (i == 0) return;
    unsigned char lead = (unsigned char)s[i - 1];
    size_t need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (len - (i - 1) < need) s[i - 1] = 0;
}

mepic_status mp_fail(mepic_error *err, mepic_status status, const char *format, ...) {
    if (!err) return status;
    err->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    mp_end_at_character(err->message, sizeof err->message);
    /* Names from a file may hold anything; one sentence stays one line. */
    for (char *p = err->message; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = ' ';
    }
    return status;
}

mepic_status mp_fail_nomem(mepic_error *err, const char *what, size_t bytes) {
    return mp_fail(err, MEPIC_ERR_NOMEM, "out of memory: %zu bytes for %s could not be allocated", bytes, what);
}

bool mp_mul_size(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

bool mp_add_size(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

bool mp_invariant(mp_fault *fault, bool ok, const char *what) {
    if (!ok && !fault->broken) {
        fault->broken = true;
        snprintf(fault->what, sizeof fault->what, "%s", what);
    }
    return ok;
}
