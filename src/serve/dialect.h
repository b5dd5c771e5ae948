/* A dialect is a way to ask for replies over HTTP: OpenAI's chat and completions, and others.
 *
 * It reads a request's JSON into a generation, and writes the events of its replies as one JSON body or as a stream of
 * server-sent events. It knows nothing of connections and threads: everything is called on the HTTP thread. */
#ifndef MEPIC_SERVE_DIALECT_H
#define MEPIC_SERVE_DIALECT_H

#include <jansson.h>

#include "base/log.h"
#include "serve/error.h"
#include "serve/feed.h"
#include "serve/generation.h"
#include "serve/public.h"

/* What dialects may know of the server. Immutable while it runs. */
typedef struct mp_api {
    mepic_engine *engine; /* for what any thread may call */
    const mepic_model_info *info;
    const char *const *names; /* [n_names] of the model */
    uint32_t n_names;
    uint64_t id_seed; /* makes this server's ids differ from another's */
    int64_t created;  /* seconds since 1970: when the model was loaded */
    const char *chunk_separator;  /* what stands between two of them in a request's text is a chunk; NULL = off */
    uint32_t chunk_tool_results;  /* tool results of so many tokens are chunks; 0 = off */
    const mp_public *public_documents; /* NULL = none */
    mp_log log;
} mp_api;

/* A reply in the making; each dialect has its own. */
typedef struct mp_writer mp_writer;

typedef struct mp_dialect {
    const char *name;
    /* The body of a refusal. */
    bool (*error)(const mp_api_error *err, mp_buf *out);
    /* Fills `generation`, and opens the writer that belongs to it; `id` is a number of its own. False: *err. */
    bool (*read)(const mp_api *api, const json_t *body, uint64_t id, mp_generation *generation, mp_writer **writer,
                 mp_api_error *err);
    /* Events in order. A stream appends what can be sent, a single body is kept until the end. False: out of memory,
     * or a limit of `out`; half of the event may stand there. */
    bool (*event)(mp_writer *writer, const mp_feed_event *event, mp_buf *out);
    /* After the last event: what closes a stream, or the whole body. */
    bool (*end)(mp_writer *writer, mp_buf *out);
    /* What ends a stream that failed. */
    bool (*fail)(mp_writer *writer, const mp_api_error *err, mp_buf *out);
    void (*close)(mp_writer *writer);
} mp_dialect;

extern const mp_dialect mp_openai_chat, mp_openai_completions, mp_anthropic_messages;

/* Whether the request may name this model; the field is optional. Of use to every dialect. */
bool mp_api_check_model(const mp_api *api, const json_t *model, mp_api_error *err);
bool mp_refuse_model(mp_api_error *err, const char *asked, const char *name);
/* The name to answer with: the one that was asked for, or the first. */
const char *mp_api_model(const mp_api *api, const json_t *model);
/* Strings that end a reply, one or an array; which reuse; names that mp_fields_read did not know, for a line of log. */
bool mp_api_read_stops(const json_t *stop, const char *name, mp_generation *generation, mp_api_error *err);
bool mp_api_read_reuse(const json_t *reuse, mp_generation *generation, mp_api_error *err);
void mp_api_log_unknown(const mp_api *api, mp_buf *unknown);
/* Of fields that would need it. */
#define MP_NOT_CONSTRAINED "; replies cannot be held to a grammar or schema here"
int64_t mp_api_time(void); /* seconds since 1970, for "created" */
/* OpenAI's "usage", with where the prompt's tokens came from; llama.cpp's "timings". */
json_t *mp_api_usage(const mepic_usage *usage);
json_t *mp_api_timings(const mepic_usage *usage);
/* "chatcmpl-" and a number in hex. */
void mp_api_id(const mp_api *api, const char *prefix, uint64_t id, char *out, size_t cap);
/* "data: " value "\n\n", with "event: NAME\n" in front unless name is NULL; drops `value`. */
bool mp_sse_write(const char *name, json_t *value, mp_buf *out);

#endif
