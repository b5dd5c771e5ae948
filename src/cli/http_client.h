/* A small HTTP/1.1 client: one request a connection, the answer's body handed on as it comes. http only.
 *
 * The reader of answers takes bytes in any pieces and keeps nothing but the line it is in. A server is not trusted:
 * what is no HTTP, or has no end, is an error that says so. One thread. */
#ifndef MEPIC_CLI_HTTP_CLIENT_H
#define MEPIC_CLI_HTTP_CLIENT_H

#include "base/mem.h"
#include "base/status.h"

typedef struct mp_url {
    char host[256]; /* without brackets */
    char port[6];
    char path[256]; /* "" or begins with a slash, ends without one */
} mp_url;

/* "http://host:port/path"; the scheme may be left out. ERR_ARGUMENT names what is wrong. */
mepic_status mp_url_parse(const char *text, mp_url *out, mepic_error *err);

/* Takes a piece of the body; not OK ends the request with that. */
typedef mepic_status mp_http_take(void *user, const char *bytes, size_t n, mepic_error *err);

typedef enum mp_http_place {
    MP_HTTP_STATUS,
    MP_HTTP_HEADERS,
    MP_HTTP_BODY,       /* `left` bytes, or until the connection ends */
    MP_HTTP_CHUNK_SIZE,
    MP_HTTP_CHUNK,      /* `left` bytes */
    MP_HTTP_CHUNK_END,
    MP_HTTP_TRAILERS,
    MP_HTTP_END,
} mp_http_place;

/* Zero-initialize. */
typedef struct mp_http_reader {
    mp_http_place place;
    uint32_t status; /* once the place is behind the status line; 100 (Continue) and its like are skipped */
    bool chunked, has_length;
    uint64_t left;
    char line[4096]; /* [n_line] */
    size_t n_line;
} mp_http_reader;

/* ERR_FORMAT: this is not HTTP. */
mepic_status mp_http_feed(mp_http_reader *reader, const char *bytes, size_t n, mp_http_take *take, void *user,
                          mepic_error *err);
/* The connection has ended. ERR_IO: too early. */
mepic_status mp_http_finish(const mp_http_reader *reader, mepic_error *err);

/* A request and its answer. `headers` are lines that end with "\r\n". `body` NULL: GET, else POST of JSON. Ctrl-C ends
 * it: MEPIC_OK with *interrupted. ERR_IO. */
mepic_status mp_http_ask(const mp_url *url, const char *path, const char *headers, const mp_buf *body,
                         mp_http_reader *reader, mp_http_take *take, void *user, bool *interrupted, mepic_error *err);

/* ---- Server-sent events ------------------------------------------------------------------------------------------ */

enum { MP_SSE_MAX_BYTES = 16 << 20 };

/* Zero-initialize and set the limits; clear both buffers. */
typedef struct mp_sse {
    mp_buf line, data;
    bool after_cr, has_data;
    mepic_status (*take)(void *user, const char *data, size_t n, mepic_error *err); /* of one event */
    void *user;
} mp_sse;

/* Comments and fields other than data are left out. */
mepic_status mp_sse_feed(mp_sse *sse, const char *bytes, size_t n, mepic_error *err);
void mp_sse_clear(mp_sse *sse);

#endif
