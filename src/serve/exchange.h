/* One HTTP request and its answer: what the routes see of libmicrohttpd.
 *
 * An exchange begins when the headers are there and ends when its answer was sent or the client is gone. It belongs to
 * the HTTP thread. A route is asked when the body is complete, and again each time a paused connection wakes, until it
 * has answered. */
#ifndef MEPIC_SERVE_EXCHANGE_H
#define MEPIC_SERVE_EXCHANGE_H

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>

#include "serve/dialect.h"
#include "serve/driver.h"
#include "serve/loop.h"
#include "serve/server.h"
#include "serve/watch.h"

typedef struct mp_exchange mp_exchange;

typedef enum mp_access { MP_ACCESS_PUBLIC, MP_ACCESS_KEY } mp_access;

/* A row of the one table of routes (routes.c). */
typedef struct mp_route {
    const char *method, *path; /* a path may end with a {name}, which stands for all that is left of a request's */
    mp_access access;
    const mp_dialect *dialect; /* its errors; and its requests, if the route generates */
    enum MHD_Result (*handle)(mp_exchange *exchange);
} mp_route;

/* The route of a request; NULL: *err is a 404, or a 405 and *other the path's route by another method. */
const mp_route *mp_route_find(const char *method, const char *path, const mp_route **other, mp_api_error *err);
/* The table, for the test that walks it. */
const mp_route *mp_routes(uint32_t *n);

enum { MP_HTTP_THREADS = 2 }; /* one goes on while the other tokenizes a long prompt */

/* One of them. */
typedef struct mp_http {
    mp_server *server;
    mp_driver *driver;
} mp_http;

struct mp_server {
    mp_server_options options;
    mp_api api; /* what dialects may know */
    mepic_model_info info;
    mp_http http[MP_HTTP_THREADS];
    mp_loop *loop;
    mp_watch *watch;
    int listener, event_fd;
    uint16_t port;
    bool draining; /* under lock */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* n_exchanges went down */
    uint32_t n_exchanges;   /* under lock */
    atomic_uint_fast64_t next_id;
    atomic_size_t held; /* bytes of bodies, of all exchanges */
};

uint64_t mp_server_next_id(mp_server *server);

struct mp_exchange {
    mp_server *server;
    struct MHD_Connection *connection;
    mp_driver *driver;       /* of the connection's thread */
    mp_watched *watched;     /* of the connection */
    uint64_t begun_ns;       /* when the headers were there */
    const char *path;        /* as it was sent; valid while the route is asked */
    const mp_route *route;   /* NULL: refused before one was found */
    const mp_key *key;       /* NULL: none was needed */
    const mp_route *other;   /* of a 405: the path's, by another method; NULL else */
    mp_buf body;
    uint64_t n_body;         /* bytes that came, kept or not */
    bool body_complete;      /* all bytes of the body came */
    mp_api_error refused;    /* status != 0: the answer when the body was swallowed; later, why a stream failed */
    size_t held;             /* bytes of bodies that the server knows of */
    unsigned status;         /* of the answer; 0: there is none yet */
    bool unanswered;         /* the connection is closed for want of memory for an answer, or of its end */
    mepic_usage usage;       /* of the replies so far, for the record */
    char request_id[136];
    /* of a route that generates (generate.c) */
    mp_feed *feed;
    mp_writer *writer;
    mp_buf taken, out;
    size_t taken_at, out_sent;
    uint64_t written_ns; /* of a stream: when there was something to send */
    bool streaming, accepted, ended, gone;
};

/* Tells the server how many bytes of bodies, of the request and its replies, the exchange holds now. False: all of them
 * are more than there should be. What has begun may go on all the same; what comes is refused. */
bool mp_exchange_hold(mp_exchange *x, size_t bytes);
/* Answers with `body`, which is taken over. */
enum MHD_Result mp_exchange_answer(mp_exchange *x, unsigned status, const char *type, mp_buf *body);
/* The same for JSON; drops `value`. */
enum MHD_Result mp_exchange_answer_json(mp_exchange *x, unsigned status, json_t *value);
/* Answers in the words of the route's dialect. */
enum MHD_Result mp_exchange_refuse(mp_exchange *x, const mp_api_error *error);
/* Answers that there was no memory for the answer. */
enum MHD_Result mp_exchange_lose(mp_exchange *x);
/* Starts an answer whose bytes come from `reader` as they are there. */
enum MHD_Result mp_exchange_stream(mp_exchange *x, const char *type, MHD_ContentReaderCallback reader);

/* Tells the server's owner of the request: that it was accepted, or how it ended. */
void mp_exchange_record(const mp_exchange *x, bool end, bool gone);

/* The handler of routes that ask the engine. */
enum MHD_Result mp_generate(mp_exchange *x);
void mp_generate_end(mp_exchange *x); /* frees what it put into the exchange; the client may be gone */

#endif
