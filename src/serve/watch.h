/* What a connection's silence means: a client that left, a reader that should hear something, a sender too slow.
 *
 * libmicrohttpd does not look at a suspended connection. So one thread of the server waits for hang-ups of those that
 * have a feed, and once in a while walks over all: a reader that has heard nothing for some seconds is woken, so that
 * a comment keeps its connection alive, and a client that has not sent its request in time is cut off. Each connection
 * has a place here from its start to its close; all functions take NULL, for a connection that found none free. */
#ifndef MEPIC_SERVE_WATCH_H
#define MEPIC_SERVE_WATCH_H

#include "serve/feed.h"

typedef struct mp_watch mp_watch;
typedef struct mp_watched mp_watched;

typedef struct mp_watch_options {
    mepic_engine *engine;     /* for cancelling */
    uint32_t max_connections;
    uint32_t silence_ms;      /* after which a paused reader is woken */
} mp_watch_options;

mepic_status mp_watch_open(const mp_watch_options *options, mp_watch **out, mepic_error *err);
/* Ends its thread: nobody is woken any more. NULL is a no-op. */
void mp_watch_stop(mp_watch *watch);
/* When no connection is left. NULL is a no-op. */
void mp_watch_close(mp_watch *watch);

/* Of the HTTP thread. */
mp_watched *mp_watch_begin(mp_watch *watch, int fd);
void mp_watch_end(mp_watched *watched); /* before the descriptor is closed */
/* The client is cut off at that time, unless told otherwise before; 0 = it has all the time. */
void mp_watch_deadline(mp_watched *watched, uint64_t when_ns);
/* Until further notice, the client waits for `feed`; NULL: no longer. */
void mp_watch_feed(mp_watched *watched, mp_feed *feed);

#endif
