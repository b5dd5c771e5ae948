/* Logging through the engine's callback; no global state. Thread-safe if the callback is. */
#ifndef MEPIC_BASE_LOG_H
#define MEPIC_BASE_LOG_H

#include "base/status.h"

typedef struct mp_log {
    void (*write)(void *user, mepic_log_level level, const char *message);
    void (*progress)(void *user, const char *what, uint64_t done, uint64_t total);
    void *user;
} mp_log;

/* log may be NULL */
void mp_log_write(const mp_log *log, mepic_log_level level, const char *format, ...) MP_PRINTF(3, 4);
void mp_log_progress(const mp_log *log, const char *what, uint64_t done, uint64_t total);

#endif
