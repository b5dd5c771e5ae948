#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

void mp_log_write(const mp_log *log, mepic_log_level level, const char *format, ...) {
    if (!log || !log->write) return;
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    log->write(log->user, level, message);
}

void mp_log_progress(const mp_log *log, const char *what, uint64_t done, uint64_t total) {
    if (log && log->progress) log->progress(log->user, what, done, total);
}
