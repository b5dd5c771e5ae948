/* Who is next: feeds that wait for a seat in the engine, by tenant in turn, so that one key's thousand requests do not
 * stand in front of another's one. Within a tenant the order is that of arrival.
 *
 * Owned by the loop's thread; uses the `behind` of the feeds in it. */
#ifndef MEPIC_SERVE_LINE_H
#define MEPIC_SERVE_LINE_H

#include "serve/feed.h"

typedef struct mp_line mp_line;

/* Tenants are 0 .. n_tenants - 1. NULL: out of memory. */
mp_line *mp_line_open(uint32_t n_tenants);
void mp_line_close(mp_line *line); /* NULL is a no-op; what is in it is not touched */
void mp_line_push(mp_line *line, mp_feed *feed);
/* NULL: nobody waits. */
mp_feed *mp_line_pop(mp_line *line);
bool mp_line_empty(const mp_line *line);
/* Takes out those whose reader has left or that were stopped; a list by `behind`. */
mp_feed *mp_line_take_left(mp_line *line);

#endif
