/* Anthropic's messages: what the files behind it share. */
#ifndef MEPIC_SERVE_ANTHROPIC_H
#define MEPIC_SERVE_ANTHROPIC_H

#include "serve/dialect.h"

/* What a request says, as it was read by the table of fields. NULL and the initial values: absent. */
typedef struct mp_anthropic_request {
    const json_t *model, *messages, *system, *stop_sequences, *tools, *tool_choice, *thinking, *reuse;
    double temperature, top_p;
    int64_t top_k;
    uint32_t max_tokens;
    bool stream, ignore_eos;
    bool no_tools; /* by tool_choice: the model is not told of them */
} mp_anthropic_request;

/* Adds the request's prompt (anthropic_prompt.c):
 *
 *   system                        TEXT
 *   text                          TEXT
 *   document, search_result       TEXT "Document 1:\n", CHUNK title, context or source, text; numbered as they come,
 *                                 with an empty line to what stands around them
 *   tool_use, tool_result         a call of the assistant; a message of its own
 *   thinking                      nothing: models here are not shown it again */
bool mp_anthropic_prompt(const mp_api *api, const mp_anthropic_request *request, mp_generation *generation,
                         mp_api_error *err);

/* The writer of a request that was read; takes what it needs (anthropic_write.c). */
bool mp_anthropic_writer_open(const mp_api *api, const mp_anthropic_request *request, uint64_t id, mp_writer **out,
                              mp_api_error *err);
bool mp_anthropic_event(mp_writer *writer, const mp_feed_event *event, mp_buf *out);
bool mp_anthropic_end(mp_writer *writer, mp_buf *out);
bool mp_anthropic_fail(mp_writer *writer, const mp_api_error *err, mp_buf *out);
void mp_anthropic_close(mp_writer *writer);
/* {"type": "error", "error": {"type", "message"}} */
bool mp_anthropic_error_write(const mp_api_error *err, mp_buf *out);

/* Tokens of a request's prompt. False: *err. */
bool mp_anthropic_count(const mp_api *api, const json_t *body, size_t *n, mp_api_error *err);

#endif
