/* One line on standard error, rewritten in place while something takes long; nothing when that is no terminal. */
#ifndef MEPIC_CLI_PROGRESS_H
#define MEPIC_CLI_PROGRESS_H

#include "base/status.h"

typedef struct mp_progress {
    bool enabled, shown;
    uint64_t last_ns;
} mp_progress;

void mp_progress_init(mp_progress *progress, bool wanted);
/* At most ten times a second; calls in between are dropped. */
void mp_progress_show(mp_progress *progress, const char *format, ...) MP_PRINTF(2, 3);
/* Must come before anything else is printed. */
void mp_progress_clear(mp_progress *progress);

#endif
