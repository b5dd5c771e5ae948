/* The private stream of a request or a job: its own tokens, packed densely into pages it holds.
 *
 *     pages      |■■■■|■■■■|■■■■|■■■■|■■· |    |
 *                 └ published ──┘     │    └ taken at admission, not written
 *                          (shared)   └ n_done
 *
 * Published pages are in the index; pages behind them have no other owner. A stream that is released drops its pages
 * from the end, so what is published of it stays in the cache in the right order. */
#ifndef MEPIC_SCHEDULE_STREAM_H
#define MEPIC_SCHEDULE_STREAM_H

#include "cache/kv_manager.h"

typedef struct mp_stream {
    mp_page *pages; /* [n_pages] held */
    uint32_t n_pages;
    uint32_t n_done;      /* tokens written */
    uint32_t n_published; /* pages */
    uint32_t seq;         /* of the plan; MP_NONE: has none */
} mp_stream;

/* What a published page is found by. */
typedef struct mp_page_name {
    mp_digest key;
    mp_digest refs;
} mp_page_name;

#endif
