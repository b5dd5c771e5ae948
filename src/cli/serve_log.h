/* What `mepic serve` prints on standard error: lines for people, or one JSON object a line.
 *
 *     {"time": "2026-01-31T12:00:00.123Z", "level": "info", "event": "message", "message": "..."}
 *     {"time": ..., "event": "request", "id": "req-...", "path": "/v1/chat/completions", "key": "key 1", "replies": 1,
 *      "stream": true, "prompt_tokens": 1200}
 *     {"time": ..., "event": "end", (what "request" has), "status": 200, "code": ..., "error": ...,
 *      "prefix_tokens": ..., "chunk_tokens": ..., "linked_tokens": ..., "compiled_tokens": ..., "text_tokens": ...,
 *      "completion_tokens": ..., "preemptions": 0, "queue_ms": ..., "ttft_ms": ..., "total_ms": ...}
 *
 * Requests that ask for no reply and are answered have level debug, and what the server got wrong has level error. What
 * is debug is printed with -v; as text, requests and what is info are printed with -v as well. Any thread: a line is
 * written by one call. */
#ifndef MEPIC_CLI_SERVE_LOG_H
#define MEPIC_CLI_SERVE_LOG_H

#include "serve/record.h"

#include <stdio.h>

typedef struct mp_serve_log {
    FILE *file;
    bool json, verbose;
} mp_serve_log;

/* For mp_log.write and mp_server_options.record; `user` is the mp_serve_log. */
void mp_serve_log_write(void *user, mepic_log_level level, const char *message);
void mp_serve_log_record(void *user, const mp_record *record);

#endif
