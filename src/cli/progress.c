#include "cli/progress.h"

#include "base/clock.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

enum { LINE_MAX_LEN = 110 };

void mp_progress_init(mp_progress *progress, bool wanted) {
    *progress = (mp_progress){ .enabled = wanted && isatty(STDERR_FILENO) };
}

void mp_progress_show(mp_progress *progress, const char *format, ...) {
    if (!progress->enabled) return;
    uint64_t now = mp_now_ns();
    if (progress->shown && now - progress->last_ns < 100000000u) return;
    char line[LINE_MAX_LEN];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    fprintf(stderr, "\r\033[K%s", line);
    fflush(stderr);
    progress->shown = true;
    progress->last_ns = now;
}

void mp_progress_clear(mp_progress *progress) {
    if (!progress->shown) return;
    fputs("\r\033[K", stderr);
    fflush(stderr);
    progress->shown = false;
}
