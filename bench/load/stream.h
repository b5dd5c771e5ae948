/* One request of a load, over a connection of its own: sent, and read until it ends or is left. It never blocks.
 *
 * It knows HTTP/1.1 as far as a server answers it, and OpenAI's streams: data lines, an error among them, [DONE]. Times
 * run from the connect. Belongs to the loop in main.c; one thread. */
#ifndef MEPIC_BENCH_LOAD_STREAM_H
#define MEPIC_BENCH_LOAD_STREAM_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LOAD_LINE_MAX = 4096, LOAD_FRAME_MAX = 256, LOAD_NEVER_LEAVE = INT32_MAX };

typedef enum load_state {
    LOAD_FREE,
    LOAD_OPEN,    /* under way */
    LOAD_DONE,    /* whole, with the status that was wanted */
    LOAD_REFUSED, /* 429 or 503, whole */
    LOAD_LEFT,    /* hung up on, as planned */
    LOAD_FAILED,  /* anything else; `line` says what */
} load_state;

typedef struct load_request {
    char *bytes; /* head and body */
    size_t n;
    int status;  /* that is wanted */
} load_request;

typedef struct load_stream {
    load_state state;
    int fd;
    const load_request *request;
    size_t sent;
    int32_t leave_after; /* data lines before it hangs up; 0: as soon as the request is sent */
    bool reset;          /* it hangs up with a reset */
    uint64_t begun_ns, first_ns, last_ns, ended_ns; /* connect, first token, last byte, end */
    int status;
    uint32_t n_data;   /* data lines with a choice */
    uint32_t n_tokens, n_prompt, n_cached; /* what the usage says; 0: it did not */
    /* Framing. */
    enum { FRAME_HEAD, FRAME_SIZE, FRAME_DATA, FRAME_DATA_END, FRAME_TRAILER, FRAME_LENGTH, FRAME_CLOSE } frame;
    size_t left; /* bytes of this chunk, or of the body */
    bool chunked, has_length, events, ended_well;
    char head[LOAD_FRAME_MAX]; /* a line of the framing, cut */
    uint32_t n_head;
    char line[LOAD_LINE_MAX]; /* a line of the body, or all of it, cut; at last why it failed */
    uint32_t n_line;
} load_stream;

/* Connects and registers with `epoll`; data.ptr is the stream. A failure is a state. */
void load_stream_begin(load_stream *s, int epoll, const struct sockaddr_in *to, const load_request *request,
                       int32_t leave_after, bool reset);
/* What epoll_wait told. Afterwards `state` says whether it is over; then the connection is closed. */
void load_stream_ready(load_stream *s, int epoll);
void load_stream_fail(load_stream *s, const char *why);

#endif
