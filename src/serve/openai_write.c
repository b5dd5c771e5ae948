/* From events to OpenAI's JSON: one body, or a stream of chunks. */
#include <stdio.h>
#include <string.h>

#include "serve/json.h"
#include "serve/openai.h"

enum { TEXT_MAX = 64 << 20, TOKEN_BYTES_MAX = 512 };

typedef struct choice {
    mp_buf text;      /* of a single body */
    json_t *logprobs; /* of a single body: what was collected; NULL before the first */
    size_t offset;    /* characters so far, for text_offset */
    bool begun;
    mepic_finish finish;
    mepic_usage usage;
} choice;

struct mp_writer {
    const mp_api *api;
    bool chat, stream, include_usage, logprobs;
    char id[48];
    const char *model; /* one of api->names */
    json_int_t created;
    uint32_t n, n_choices;
    choice *choices;
};

bool mp_openai_writer_open(const mp_api *api, const mp_openai_request *request, const mp_generation *generation,
                           bool chat, uint64_t id, mp_writer **out, mp_api_error *err) {
    mp_writer *w = mp_calloc(1, sizeof *w);
    if (!w) return mp_refuse(err, 503, "out_of_memory", NULL, "out of memory for a reply");
    *w = (mp_writer){
        .api = api,
        .chat = chat,
        .stream = request->stream,
        .include_usage = request->include_usage,
        .logprobs = request->logprobs,
        .model = mp_api_model(api, request->model),
        .created = mp_api_time(),
        .n = generation->n,
        .n_choices = mp_generation_choices(generation),
    };
    mp_api_id(api, chat ? "chatcmpl-" : "cmpl-", id, w->id, sizeof w->id);
    w->choices = mp_calloc(w->n_choices, sizeof *w->choices);
    if (!w->choices) {
        mp_free(w);
        return mp_refuse(err, 503, "out_of_memory", NULL, "out of memory for a reply");
    }
    for (uint32_t i = 0; i < w->n_choices; i++) w->choices[i].text.limit = TEXT_MAX;
    *out = w;
    return true;
}

void mp_openai_close(mp_writer *w) {
    for (uint32_t i = 0; i < w->n_choices; i++) {
        mp_buf_clear(&w->choices[i].text);
        json_decref(w->choices[i].logprobs);
    }
    mp_free(w->choices);
    mp_free(w);
}

/* ---- Log-probabilities ------------------------------------------------------------------------------------------- */

/* A token's bytes; at most `cap`. */
static size_t token_bytes(const mp_writer *w, int32_t token, char *out, size_t cap) {
    size_t n = 0;
    if (mepic_detokenize(w->api->engine, &token, 1, out, cap, &n, NULL) != MEPIC_OK) return 0;
    return n < cap ? n : cap;
}

/* {"token", "logprob", "bytes"} */
static json_t *chat_logprob(const mp_writer *w, int32_t token, float logprob) {
    char bytes[TOKEN_BYTES_MAX];
    size_t n = token_bytes(w, token, bytes, sizeof bytes);
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer((unsigned char)bytes[i]));
    return json_pack("{s:o, s:f, s:o}", "token", mp_json_text(bytes, n), "logprob", (double)logprob, "bytes", list);
}

static bool add_chat_logprob(const mp_writer *w, const mp_feed_event *e, json_t **list) {
    if (!*list) *list = json_pack("{s:[], s:n}", "content", "refusal");
    json_t *entry = chat_logprob(w, e->token, e->logprob), *top = json_array();
    for (uint32_t i = 0; i < e->n_top; i++) {
        json_array_append_new(top, chat_logprob(w, e->top[i].token, e->top[i].logprob));
    }
    json_object_set_new(entry, "top_logprobs", top);
    return json_array_append_new(json_object_get(*list, "content"), entry) == 0;
}

/* {"tokens", "token_logprobs", "top_logprobs", "text_offset"} */
static bool add_text_logprob(const mp_writer *w, const mp_feed_event *e, size_t offset, json_t **lists) {
    if (!*lists) {
        *lists = json_pack("{s:[], s:[], s:[], s:[]}", "tokens", "token_logprobs", "top_logprobs", "text_offset");
    }
    char bytes[TOKEN_BYTES_MAX];
    size_t n = token_bytes(w, e->token, bytes, sizeof bytes);
    json_t *top = e->n_top > 0 ? json_object() : json_null();
    for (uint32_t i = 0; i < e->n_top; i++) {
        char name_bytes[TOKEN_BYTES_MAX];
        size_t len = token_bytes(w, e->top[i].token, name_bytes, sizeof name_bytes);
        json_t *name = mp_json_text(name_bytes, len), *value = json_real((double)e->top[i].logprob);
        if (name && strlen(json_string_value(name)) == json_string_length(name))
            json_object_set_new(top, json_string_value(name), value);
        else
            json_decref(value);
        json_decref(name);
    }
    return json_array_append_new(json_object_get(*lists, "tokens"), mp_json_text(bytes, n)) == 0 &&
           json_array_append_new(json_object_get(*lists, "token_logprobs"), json_real((double)e->logprob)) == 0 &&
           json_array_append_new(json_object_get(*lists, "top_logprobs"), top) == 0 &&
           json_array_append_new(json_object_get(*lists, "text_offset"), json_integer((json_int_t)offset)) == 0;
}

static bool add_logprob(const mp_writer *w, const mp_feed_event *e, size_t offset, json_t **out) {
    if (!w->logprobs || e->kind != MEPIC_EVENT_TOKEN) return true;
    return w->chat ? add_chat_logprob(w, e, out) : add_text_logprob(w, e, offset, out);
}

/* ---- Usage ------------------------------------------------------------------------------------------------------- */

/* A prompt counts once, however many replies it has: as its first reply found it. */
static json_t *usage_json(const mp_writer *w) {
    mepic_usage sum = { 0 };
    for (uint32_t i = 0; i < w->n_choices; i++) {
        const mepic_usage *u = &w->choices[i].usage;
        sum.completion_tokens += u->completion_tokens;
        if (i % w->n != 0) continue;
        sum.prompt_tokens += u->prompt_tokens;
        sum.prefix_tokens += u->prefix_tokens;
        sum.chunk_tokens += u->chunk_tokens;
        sum.linked_tokens += u->linked_tokens;
        sum.compiled_tokens += u->compiled_tokens;
    }
    return mp_api_usage(&sum);
}

static size_t count_characters(const char *text, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

/* ---- A stream ---------------------------------------------------------------------------------------------------- */

static json_t *finish_json(const choice *c) {
    return json_string(c->finish == MEPIC_FINISH_LENGTH ? "length" : "stop");
}

/* The frame of a chunk or of the body; `choices` is taken over. */
static json_t *envelope(const mp_writer *w, json_t *choices) {
    const char *object = !w->chat ? "text_completion" : w->stream ? "chat.completion.chunk" : "chat.completion";
    return json_pack("{s:s, s:s, s:I, s:o, s:n, s:o}", "id", w->id, "object", object, "created", w->created, "model",
                     mp_json_text(w->model, strlen(w->model)), "system_fingerprint", "choices", choices);
}

/* One choice's chunk: `text` (chat: inside a delta, with the role if there is one), logprobs and finish may be NULL. */
static bool write_chunk(const mp_writer *w, uint32_t index, const char *role, const char *text, size_t len,
                        json_t *logprobs, json_t *finish, json_t *timings, mp_buf *out) {
    json_t *one = json_pack("{s:i}", "index", (int)index);
    if (w->chat) {
        json_t *delta = json_object();
        if (role) json_object_set_new(delta, "role", json_string(role));
        if (text) json_object_set_new(delta, "content", mp_json_text(text, len));
        json_object_set_new(one, "delta", delta);
    } else {
        json_object_set_new(one, "text", mp_json_text(text ? text : "", len));
    }
    json_object_set_new(one, "logprobs", logprobs ? logprobs : json_null());
    json_object_set_new(one, "finish_reason", finish ? finish : json_null());
    json_t *root = envelope(w, json_pack("[o]", one));
    if (w->include_usage) json_object_set_new(root, "usage", json_null());
    if (timings) json_object_set_new(root, "timings", timings);
    return mp_sse_write(NULL, root, out);
}

static bool stream_event(mp_writer *w, const mp_feed_event *e, mp_buf *out) {
    choice *c = &w->choices[e->choice];
    json_t *logprobs = NULL;
    bool done = e->kind == MEPIC_EVENT_DONE, ok = true;
    if (!c->begun && w->chat) ok = write_chunk(w, e->choice, "assistant", "", 0, NULL, NULL, NULL, out);
    c->begun = true;
    ok = ok && add_logprob(w, e, c->offset, &logprobs);
    if (ok && (e->text_len > 0 || logprobs)) {
        ok = write_chunk(w, e->choice, NULL, e->text, e->text_len, logprobs, NULL, NULL, out);
    } else {
        json_decref(logprobs);
    }
    c->offset += count_characters(e->text, e->text_len);
    if (!ok || !done) return ok;
    c->usage = e->usage;
    c->finish = e->finish;
    return write_chunk(w, e->choice, NULL, NULL, 0, NULL, finish_json(c), mp_api_timings(&c->usage), out);
}

static bool write_done(mp_buf *out) {
    static const char done[] = "data: [DONE]\n\n";
    return mp_buf_append(out, done, sizeof done - 1);
}

static bool end_stream(mp_writer *w, mp_buf *out) {
    if (w->include_usage) {
        json_t *root = envelope(w, json_array());
        json_object_set_new(root, "usage", usage_json(w));
        if (!mp_sse_write(NULL, root, out)) return false;
    }
    return write_done(out);
}

bool mp_openai_fail(mp_writer *w, const mp_api_error *err, mp_buf *out) {
    (void)w;
    static const char data[] = "data: ";
    return mp_buf_append(out, data, sizeof data - 1) && mp_openai_error_write(err, out) &&
           mp_buf_append(out, "\n\n", 2) && write_done(out);
}

/* ---- One body ---------------------------------------------------------------------------------------------------- */

static bool keep_event(mp_writer *w, const mp_feed_event *e) {
    choice *c = &w->choices[e->choice];
    if (!add_logprob(w, e, c->offset, &c->logprobs)) return false;
    c->offset += count_characters(e->text, e->text_len);
    if (e->text_len > 0 && !mp_buf_append(&c->text, e->text, e->text_len)) return false;
    if (e->kind == MEPIC_EVENT_DONE) {
        c->usage = e->usage;
        c->finish = e->finish;
    }
    return true;
}

static json_t *choice_json(const mp_writer *w, uint32_t index) {
    choice *c = &w->choices[index];
    json_t *one = json_pack("{s:i}", "index", (int)index), *text = mp_json_text(c->text.data, c->text.len);
    if (w->chat) {
        json_object_set_new(one, "message", json_pack("{s:s, s:o}", "role", "assistant", "content", text));
    } else {
        json_object_set_new(one, "text", text);
    }
    json_object_set_new(one, "logprobs", c->logprobs ? json_incref(c->logprobs) : json_null());
    json_object_set_new(one, "finish_reason", finish_json(c));
    return one;
}

static bool end_body(mp_writer *w, mp_buf *out) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < w->n_choices; i++) json_array_append_new(list, choice_json(w, i));
    json_t *root = envelope(w, list);
    json_object_set_new(root, "usage", usage_json(w));
    json_object_set_new(root, "timings", mp_api_timings(&w->choices[0].usage));
    return mp_json_write(root, out);
}

bool mp_openai_event(mp_writer *w, const mp_feed_event *event, mp_buf *out) {
    return w->stream ? stream_event(w, event, out) : keep_event(w, event);
}

bool mp_openai_end(mp_writer *w, mp_buf *out) {
    return w->stream ? end_stream(w, out) : end_body(w, out);
}
