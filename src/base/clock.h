/* Monotonic time. Wall-clock time is used nowhere in the engine. */
#ifndef MEPIC_BASE_CLOCK_H
#define MEPIC_BASE_CLOCK_H

#include <stdint.h>

uint64_t mp_now_ns(void);

#endif
