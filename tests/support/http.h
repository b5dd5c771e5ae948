/* A plain HTTP client over a socket, which can also send what no client should. Everything fails the test on error; a
 * read that gets nothing for a minute does, too. */
#ifndef MEPIC_TESTS_SUPPORT_HTTP_H
#define MEPIC_TESTS_SUPPORT_HTTP_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct http_client {
    int fd;
    char *data; /* what was read and not used yet, and room for more */
    size_t len, cap;
    char *decoded; /* [n_decoded] of a chunked stream, not returned by http_read_line yet */
    size_t n_decoded;
} http_client;

typedef struct http_reply {
    int status;
    char head[8192]; /* status line and headers */
    char *body;      /* terminated; chunks are put together */
    size_t body_len;
} http_reply;

void http_open(http_client *c, uint16_t port);
/* With a receive buffer of so many bytes, for readers that fall behind; 0 = the system's. */
void http_open_small(http_client *c, uint16_t port, int receive_bytes);
void http_close(http_client *c);
void http_send(http_client *c, const void *bytes, size_t n);
void http_send_text(http_client *c, const char *text);
/* `headers`: lines that end with "\r\n", or ""; a body brings its length and type. NULL = none. */
void http_send_request(http_client *c, const char *method, const char *path, const char *headers, const char *body);
/* One whole answer. False: the connection ended before it. Free with http_reply_clear. */
bool http_read(http_client *c, http_reply *out);
void http_reply_clear(http_reply *reply);
/* Status line and headers only, for streams; then each data of it. */
int http_read_head(http_client *c, char *head, size_t cap);
/* The next line of a chunked stream that is not empty; NULL at its end. Valid until the next call. */
const char *http_read_line(http_client *c);

/* A connection of its own for one request. */
int http_ask(uint16_t port, const char *method, const char *path, const char *headers, const char *body,
             http_reply *out);
/* The body as JSON, after checking the status. */
json_t *http_ask_json(uint16_t port, const char *method, const char *path, const char *body, int status);
/* The value of a header in `head`, into `out`; false: it is not there. */
bool http_header(const char *head, const char *name, char *out, size_t cap);

#endif
