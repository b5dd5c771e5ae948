/* From events to Anthropic's JSON: one message, or the events that build it up. */
#include <string.h>

#include "serve/anthropic.h"
#include "serve/json.h"
#include "serve/tools.h"

enum { TEXT_MAX = 64 << 20 };

struct mp_writer {
    const mp_api *api;
    bool stream, begun;
    bool in_text; /* a text block is open */
    uint64_t number;
    char id[48];
    const char *model; /* one of api->names */
    json_t *stops;     /* of the request; may be NULL */
    mp_reply_parser parser;
    uint32_t n_blocks; /* of a stream */
    json_t *content;   /* of a single body */
    mp_buf text;       /* of its open text block */
    mepic_finish finish;
    int32_t stop;
    mepic_usage usage;
};

bool mp_anthropic_writer_open(const mp_api *api, const mp_anthropic_request *r, uint64_t id, mp_writer **out,
                              mp_api_error *err) {
    mp_writer *w = mp_calloc(1, sizeof *w);
    json_t *content = json_array();
    if (!w || !content) {
        mp_free(w);
        json_decref(content);
        return mp_refuse_memory(err, "a reply");
    }
    *w = (mp_writer){
        .api = api,
        .stream = r->stream,
        .number = id,
        .model = mp_api_model(api, r->model),
        .stops = json_incref((json_t *)r->stop_sequences),
        .content = content,
        .text = { .limit = TEXT_MAX },
        .stop = -1,
    };
    mp_api_id(api, "msg_", id, w->id, sizeof w->id);
    bool tools = json_array_size(r->tools) > 0 && !r->no_tools;
    if (tools && !mp_reply_parser_init(&w->parser, api->info->tool_format, r->tools, NULL)) {
        mp_anthropic_close(w);
        return mp_refuse_memory(err, "a reply");
    }
    *out = w;
    return true;
}

void mp_anthropic_close(mp_writer *w) {
    json_decref(w->stops);
    json_decref(w->content);
    mp_reply_parser_clear(&w->parser);
    mp_buf_clear(&w->text);
    mp_free(w);
}

/* ---- Parts of both ----------------------------------------------------------------------------------------------- */

/* What was read from a cache, what was computed to be kept for others, and the rest add up to the prompt. */
static json_t *usage_json(const mepic_usage *u) {
    json_int_t read = (json_int_t)u->prefix_tokens + u->chunk_tokens, written = u->compiled_tokens;
    return json_pack("{s:I, s:I, s:I, s:I}", "input_tokens", (json_int_t)u->prompt_tokens - read - written,
                     "cache_creation_input_tokens", written, "cache_read_input_tokens", read, "output_tokens",
                     (json_int_t)u->completion_tokens);
}

/* With the prompt's parts, as OpenAI's usage has them. */
static json_t *final_usage_json(const mepic_usage *u) {
    json_t *usage = usage_json(u), *ours = mp_api_usage(u);
    json_object_set(usage, "prompt_tokens_details", json_object_get(ours, "prompt_tokens_details"));
    json_decref(ours);
    return usage;
}

/* NULL: a string of the request's did not end it. */
static json_t *stop_sequence(const mp_writer *w) {
    if (w->finish != MEPIC_FINISH_STOP || w->stop < 0) return NULL;
    if (json_is_string(w->stops)) return w->stop == 0 ? w->stops : NULL;
    return json_array_get(w->stops, (size_t)w->stop);
}

static const char *stop_reason(const mp_writer *w) {
    if (w->finish == MEPIC_FINISH_LENGTH) return "max_tokens";
    if (w->parser.n_calls > 0) return "tool_use";
    return stop_sequence(w) ? "stop_sequence" : "end_turn";
}

/* {"stop_reason", "stop_sequence"} into `object`; null before the end. */
static void set_stop(json_t *object, const mp_writer *w, bool ended) {
    json_t *sequence = ended ? stop_sequence(w) : NULL;
    json_object_set_new(object, "stop_reason", ended ? json_string(stop_reason(w)) : json_null());
    json_object_set_new(object, "stop_sequence", sequence ? json_incref(sequence) : json_null());
}

/* `content` and `usage` are taken over. */
static json_t *message_json(const mp_writer *w, bool ended, json_t *content, json_t *usage) {
    json_t *message = json_pack("{s:s, s:s, s:s, s:o, s:o}", "id", w->id, "type", "message", "role", "assistant",
                                "model", mp_json_text(w->model, strlen(w->model)), "content", content);
    set_stop(message, w, ended);
    json_object_set_new(message, "usage", usage);
    return message;
}

/* A block {"type": "tool_use"}; `input` is taken over. */
static json_t *call_json(const mp_writer *w, uint32_t index, const char *name, json_t *input) {
    char id[48];
    mp_api_id(w->api, "toolu_", mp_tools_call_number(w->number, 0, index), id, sizeof id);
    return json_pack("{s:s, s:s, s:s, s:o}", "type", "tool_use", "id", id, "name", name, "input", input);
}

/* ---- A stream ---------------------------------------------------------------------------------------------------- */

typedef struct target {
    mp_writer *w;
    mp_buf *out;
} target;

static bool write_start(const mp_writer *w, const mepic_usage *usage, mp_buf *out) {
    json_t *message = message_json(w, false, json_array(), usage_json(usage));
    return mp_sse_write("message_start", json_pack("{s:s, s:o}", "type", "message_start", "message", message), out);
}

static bool begin_block(const mp_writer *w, json_t *block, mp_buf *out) {
    return mp_sse_write("content_block_start",
                        json_pack("{s:s, s:I, s:o}", "type", "content_block_start", "index", (json_int_t)w->n_blocks,
                                  "content_block", block),
                        out);
}

static bool write_delta(const mp_writer *w, const char *type, const char *name, const char *text, size_t len,
                        mp_buf *out) {
    json_t *delta = json_pack("{s:s, s:o}", "type", type, name, mp_json_text(text, len));
    return mp_sse_write(
        "content_block_delta",
        json_pack("{s:s, s:I, s:o}", "type", "content_block_delta", "index", (json_int_t)w->n_blocks, "delta", delta),
        out);
}

static bool end_block(mp_writer *w, mp_buf *out) {
    json_int_t index = w->n_blocks++;
    w->in_text = false;
    return mp_sse_write("content_block_stop", json_pack("{s:s, s:I}", "type", "content_block_stop", "index", index),
                        out);
}

static bool write_text(void *user, const char *text, size_t len) {
    const target *t = user;
    if (!t->w->in_text) {
        if (!begin_block(t->w, json_pack("{s:s, s:s}", "type", "text", "text", ""), t->out)) return false;
        t->w->in_text = true;
    }
    return write_delta(t->w, "text_delta", "text", text, len, t->out);
}

static bool write_call(void *user, uint32_t index, const char *name, const char *arguments) {
    const target *t = user;
    return (!t->w->in_text || end_block(t->w, t->out)) &&
           begin_block(t->w, call_json(t->w, index, name, json_object()), t->out) &&
           write_delta(t->w, "input_json_delta", "partial_json", arguments, strlen(arguments), t->out) &&
           end_block(t->w, t->out);
}

static bool end_stream(mp_writer *w, mp_buf *out) {
    json_t *delta = json_object();
    set_stop(delta, w, true);
    return (!w->in_text || end_block(w, out)) &&
           mp_sse_write("message_delta",
                        json_pack("{s:s, s:o, s:o}", "type", "message_delta", "delta", delta, "usage",
                                  final_usage_json(&w->usage)),
                        out) &&
           mp_sse_write("message_stop", json_pack("{s:s}", "type", "message_stop"), out);
}

/* ---- One body ---------------------------------------------------------------------------------------------------- */

static bool keep_text(void *user, const char *text, size_t len) {
    const target *t = user;
    return mp_buf_append(&t->w->text, text, len);
}

static bool flush_text(mp_writer *w) {
    if (w->text.len == 0) return true;
    json_t *block = json_pack("{s:s, s:o}", "type", "text", "text", mp_json_text(w->text.data, w->text.len));
    w->text.len = 0;
    return json_array_append_new(w->content, block) == 0;
}

static bool keep_call(void *user, uint32_t index, const char *name, const char *arguments) {
    const target *t = user;
    mp_api_error ignored;
    json_t *input = mp_json_parse(arguments, strlen(arguments), &ignored);
    return flush_text(t->w) && json_array_append_new(t->w->content, call_json(t->w, index, name, input)) == 0;
}

/* ---- Both -------------------------------------------------------------------------------------------------------- */

bool mp_anthropic_event(mp_writer *w, const mp_feed_event *e, mp_buf *out) {
    target t = { w, out };
    mp_reply_sink sink = { write_text, write_call, &t };
    if (!w->stream) sink = (mp_reply_sink){ keep_text, keep_call, &t };
    if (w->stream && !w->begun && !write_start(w, &e->usage, out)) return false;
    w->begun = true;
    if (!mp_reply_parser_push(&w->parser, e->text, e->text_len, &sink)) return false;
    if (e->kind != MEPIC_EVENT_DONE) return true;
    w->usage = e->usage;
    w->finish = e->finish;
    w->stop = e->stop;
    return mp_reply_parser_end(&w->parser, &sink);
}

bool mp_anthropic_end(mp_writer *w, mp_buf *out) {
    if (w->stream) return end_stream(w, out);
    return flush_text(w) &&
           mp_json_write(message_json(w, true, json_incref(w->content), final_usage_json(&w->usage)), out);
}

static json_t *error_json(const mp_api_error *err) {
    const char *type = mp_api_error_type(err->status);
    if (err->status == 413) type = "request_too_large";
    if (err->status >= 500 && err->status != 503) type = "api_error";
    return json_pack("{s:s, s:{s:s, s:o}}", "type", "error", "error", "type", type, "message",
                     mp_json_text(err->message, strlen(err->message)));
}

bool mp_anthropic_error_write(const mp_api_error *err, mp_buf *out) {
    return mp_json_write(error_json(err), out);
}

bool mp_anthropic_fail(mp_writer *w, const mp_api_error *err, mp_buf *out) {
    (void)w;
    return mp_sse_write("error", error_json(err), out);
}
