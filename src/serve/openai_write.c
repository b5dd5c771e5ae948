/* From events to OpenAI's JSON: one body, or a stream of chunks. */
#include <stdio.h>
#include <string.h>

#include "serve/json.h"
#include "serve/openai.h"
#include "serve/tools.h"

enum {
    TEXT_MAX = 64 << 20,
    TOKEN_BYTES_MAX = 512,
    LOGPROB_BYTES_MAX = 32 << 20, /* of a single body, as JSON */
    LISTS_MAX = 4,
};

/* Names of the lists of log-probabilities. */
static const char *const chat_lists[] = { "content" };
static const char *const text_lists[LISTS_MAX] = { "tokens", "token_logprobs", "top_logprobs", "text_offset" };

typedef struct choice {
    mp_buf text;   /* of a single body */
    json_t *calls; /* of a single body; NULL before the first */
    mp_reply_parser parser;
    mp_buf lists[LISTS_MAX]; /* of a single body: log-probabilities as JSON, but for the end */
    size_t offset;           /* characters so far, for text_offset */
    bool begun;
    mepic_finish finish;
    mepic_usage usage;
} choice;

struct mp_writer {
    const mp_api *api;
    bool chat, stream, include_usage, logprobs;
    uint64_t number; /* ids are made of it */
    char id[48];
    const char *model; /* one of api->names */
    json_int_t created;
    uint32_t n, n_choices;
    size_t n_kept; /* bytes of log-probabilities */
    choice *choices;
};

bool mp_openai_writer_open(const mp_api *api, const mp_openai_request *request, const mp_generation *generation,
                           bool chat, uint64_t id, mp_writer **out, mp_api_error *err) {
    mp_writer *w = mp_calloc(1, sizeof *w);
    if (!w) return mp_refuse_memory(err, "a reply");
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
        .number = id,
    };
    mp_api_id(api, chat ? "chatcmpl-" : "cmpl-", id, w->id, sizeof w->id);
    w->choices = mp_calloc(w->n_choices, sizeof *w->choices);
    if (!w->choices) {
        mp_free(w);
        return mp_refuse_memory(err, "a reply");
    }
    bool tools = chat && json_array_size(request->tools) > 0 && !request->no_tools;
    for (uint32_t i = 0; i < w->n_choices; i++) {
        w->choices[i].text.limit = TEXT_MAX;
        for (uint32_t k = 0; k < LISTS_MAX; k++) w->choices[i].lists[k].limit = LOGPROB_BYTES_MAX;
        if (!tools || mp_reply_parser_init(&w->choices[i].parser, api->info->tool_format, request->tools, "function"))
            continue;
        mp_openai_close(w);
        return mp_refuse_memory(err, "a reply");
    }
    *out = w;
    return true;
}

void mp_openai_close(mp_writer *w) {
    for (uint32_t i = 0; i < w->n_choices; i++) {
        mp_buf_clear(&w->choices[i].text);
        for (uint32_t k = 0; k < LISTS_MAX; k++) mp_buf_clear(&w->choices[i].lists[k]);
        json_decref(w->choices[i].calls);
        mp_reply_parser_clear(&w->choices[i].parser);
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
    return json_pack("{s:o, s:o, s:o}", "token", mp_json_text(bytes, n), "logprob", mp_json_float(logprob), "bytes",
                     list);
}

static json_t *chat_logprobs(const mp_writer *w, const mp_feed_event *e) {
    json_t *entry = chat_logprob(w, e->token, e->logprob), *top = json_array();
    for (uint32_t i = 0; i < e->n_top; i++) {
        json_array_append_new(top, chat_logprob(w, e->top[i].token, e->top[i].logprob));
    }
    json_object_set_new(entry, "top_logprobs", top);
    return json_pack("{s:[o], s:n}", "content", entry, "refusal");
}

/* {"tokens", "token_logprobs", "top_logprobs", "text_offset"} */
static json_t *text_logprobs(const mp_writer *w, const mp_feed_event *e, size_t offset) {
    char bytes[TOKEN_BYTES_MAX];
    size_t n = token_bytes(w, e->token, bytes, sizeof bytes);
    json_t *top = e->n_top > 0 ? json_object() : json_null();
    for (uint32_t i = 0; i < e->n_top; i++) {
        char name_bytes[TOKEN_BYTES_MAX];
        size_t len = token_bytes(w, e->top[i].token, name_bytes, sizeof name_bytes);
        json_t *name = mp_json_text(name_bytes, len), *value = mp_json_float(e->top[i].logprob);
        if (name && strlen(json_string_value(name)) == json_string_length(name))
            json_object_set_new(top, json_string_value(name), value);
        else
            json_decref(value);
        json_decref(name);
    }
    return json_pack("{s:[o], s:[o], s:[o], s:[I]}", text_lists[0], mp_json_text(bytes, n), text_lists[1],
                     mp_json_float(e->logprob), text_lists[2], top, text_lists[3], (json_int_t)offset);
}

/* Of one event: lists of one item. *out stays NULL where there is nothing to say. */
static bool read_logprobs(const mp_writer *w, const mp_feed_event *e, size_t offset, json_t **out) {
    if (!w->logprobs || e->kind != MEPIC_EVENT_TOKEN) return true;
    *out = w->chat ? chat_logprobs(w, e) : text_logprobs(w, e, offset);
    return *out != NULL;
}

/* Appends an array or object that stays open; its items follow those that are there already, unless it is the first. */
static bool append_items(json_t *value, bool first, mp_buf *out) {
    size_t at = out->len;
    if (!mp_json_write(value, out)) return false;
    out->len--;
    if (!first) out->data[at] = ',';
    return true;
}

static uint32_t lists_of(const mp_writer *w, const char *const **names) {
    *names = w->chat ? chat_lists : text_lists;
    return w->chat ? 1 : LISTS_MAX;
}

/* Bytes, since a tree of JSON takes ten times as much. Drops `logprobs`, which may be NULL. */
static bool keep_logprobs(mp_writer *w, choice *c, json_t *logprobs) {
    const char *const *names;
    uint32_t n = logprobs ? lists_of(w, &names) : 0;
    bool ok = true;
    for (uint32_t k = 0; k < n && ok; k++) {
        size_t before = c->lists[k].len;
        ok = append_items(json_incref(json_object_get(logprobs, names[k])), before == 0, &c->lists[k]);
        w->n_kept += c->lists[k].len - before;
    }
    json_decref(logprobs);
    return ok && w->n_kept <= LOGPROB_BYTES_MAX;
}

static bool append_text(const char *text, mp_buf *out) {
    return mp_buf_append(out, text, strlen(text));
}

static bool write_kept_logprobs(const mp_writer *w, const choice *c, mp_buf *out) {
    const char *const *names;
    uint32_t n = lists_of(w, &names);
    if (c->lists[0].len == 0) return append_text("null", out);
    bool ok = true;
    for (uint32_t k = 0; k < n; k++) {
        ok = ok && append_text(k == 0 ? "{\"" : ",\"", out) && append_text(names[k], out) && append_text("\":", out) &&
             mp_buf_append(out, c->lists[k].data, c->lists[k].len) && append_text("]", out);
    }
    return ok && append_text(w->chat ? ",\"refusal\":null}" : "}", out);
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
    if (c->finish == MEPIC_FINISH_LENGTH) return json_string("length");
    return json_string(c->parser.n_calls > 0 ? "tool_calls" : "stop");
}

/* {"id", "type", "function"}, in a stream with its "index". */
static json_t *call_json(const mp_writer *w, uint32_t reply, uint32_t index, const char *name, const char *arguments) {
    char id[48];
    mp_api_id(w->api, "call_", mp_tools_call_number(w->number, reply, index), id, sizeof id);
    json_t *function = json_pack("{s:s, s:o}", "name", name, "arguments", mp_json_text(arguments, strlen(arguments)));
    return json_pack("{s:s, s:s, s:o}", "id", id, "type", "function", "function", function);
}

/* What a chunk and the body have beside their choices. */
static json_t *frame(const mp_writer *w) {
    const char *object = !w->chat ? "text_completion" : w->stream ? "chat.completion.chunk" : "chat.completion";
    return json_pack("{s:s, s:s, s:I, s:o, s:n}", "id", w->id, "object", object, "created", w->created, "model",
                     mp_json_text(w->model, strlen(w->model)), "system_fingerprint");
}

/* `choices` is taken over. */
static json_t *envelope(const mp_writer *w, json_t *choices) {
    json_t *root = frame(w);
    if (json_object_set_new(root, "choices", choices) == 0) return root;
    json_decref(root);
    return NULL;
}

/* What a chunk says of one choice. NULL: nothing of it. */
typedef struct piece {
    const char *role, *text;
    size_t len;
    json_t *call, *logprobs, *finish, *timings; /* taken over */
} piece;

static bool write_chunk(const mp_writer *w, uint32_t index, const piece *p, mp_buf *out) {
    json_t *one = json_pack("{s:i}", "index", (int)index);
    if (w->chat) {
        json_t *delta = json_object();
        if (p->role) json_object_set_new(delta, "role", json_string(p->role));
        if (p->text) json_object_set_new(delta, "content", mp_json_text(p->text, p->len));
        if (p->call) json_object_set_new(delta, "tool_calls", json_pack("[o]", p->call));
        json_object_set_new(one, "delta", delta);
    } else {
        json_object_set_new(one, "text", mp_json_text(p->text ? p->text : "", p->len));
    }
    json_object_set_new(one, "logprobs", p->logprobs ? p->logprobs : json_null());
    json_object_set_new(one, "finish_reason", p->finish ? p->finish : json_null());
    json_t *root = envelope(w, json_pack("[o]", one));
    if (w->include_usage) json_object_set_new(root, "usage", json_null());
    if (p->timings) json_object_set_new(root, "timings", p->timings);
    return mp_sse_write(NULL, root, out);
}

/* Where an event's parts go: chunks of a stream, or the choice of a single body. */
typedef struct target {
    mp_writer *w;
    uint32_t index;
    json_t *logprobs; /* of a stream's event: they go with its first text */
    mp_buf *out;
} target;

static bool write_text(void *user, const char *text, size_t len) {
    target *t = user;
    const piece p = { .text = text, .len = len, .logprobs = t->logprobs };
    t->logprobs = NULL;
    return write_chunk(t->w, t->index, &p, t->out);
}

static bool write_call(void *user, uint32_t index, const char *name, const char *arguments) {
    const target *t = user;
    json_t *call = call_json(t->w, t->index, index, name, arguments);
    json_object_set_new(call, "index", json_integer(index));
    const piece p = { .call = call };
    return call && write_chunk(t->w, t->index, &p, t->out);
}

static bool stream_event(mp_writer *w, const mp_feed_event *e, mp_buf *out) {
    choice *c = &w->choices[e->choice];
    target t = { .w = w, .index = e->choice, .out = out };
    const mp_reply_sink sink = { write_text, write_call, &t };
    const piece role = { .role = "assistant", .text = "" };
    bool done = e->kind == MEPIC_EVENT_DONE, ok = true;
    if (!c->begun && w->chat) ok = write_chunk(w, e->choice, &role, out);
    c->begun = true;
    ok = ok && read_logprobs(w, e, c->offset, &t.logprobs) &&
         mp_reply_parser_push(&c->parser, e->text, e->text_len, &sink) &&
         (!done || mp_reply_parser_end(&c->parser, &sink));
    if (ok && t.logprobs) ok = write_text(&t, "", 0);
    json_decref(t.logprobs);
    c->offset += count_characters(e->text, e->text_len);
    if (!ok || !done) return ok;
    c->usage = e->usage;
    c->finish = e->finish;
    const piece last = { .finish = finish_json(c), .timings = mp_api_timings(&c->usage) };
    return write_chunk(w, e->choice, &last, out);
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

static bool keep_text(void *user, const char *text, size_t len) {
    const target *t = user;
    return mp_buf_append(&t->w->choices[t->index].text, text, len);
}

static bool keep_call(void *user, uint32_t index, const char *name, const char *arguments) {
    const target *t = user;
    choice *c = &t->w->choices[t->index];
    if (!c->calls) c->calls = json_array();
    return json_array_append_new(c->calls, call_json(t->w, t->index, index, name, arguments)) == 0;
}

static bool keep_event(mp_writer *w, const mp_feed_event *e) {
    choice *c = &w->choices[e->choice];
    target t = { .w = w, .index = e->choice };
    const mp_reply_sink sink = { keep_text, keep_call, &t };
    json_t *logprobs = NULL;
    if (!read_logprobs(w, e, c->offset, &logprobs) || !keep_logprobs(w, c, logprobs)) return false;
    c->offset += count_characters(e->text, e->text_len);
    if (!mp_reply_parser_push(&c->parser, e->text, e->text_len, &sink)) return false;
    if (e->kind != MEPIC_EVENT_DONE) return true;
    c->usage = e->usage;
    c->finish = e->finish;
    return mp_reply_parser_end(&c->parser, &sink);
}

/* All but its log-probabilities. */
static json_t *choice_json(const mp_writer *w, uint32_t index) {
    choice *c = &w->choices[index];
    bool no_text = c->calls && c->text.len == 0;
    json_t *text = no_text ? json_null() : mp_json_text(c->text.data, c->text.len);
    if (!w->chat)
        return json_pack("{s:i, s:o, s:o}", "index", (int)index, "text", text, "finish_reason", finish_json(c));
    json_t *message = json_pack("{s:s, s:o}", "role", "assistant", "content", text);
    if (c->calls && json_object_set(message, "tool_calls", c->calls) != 0) {
        json_decref(message);
        message = NULL;
    }
    return json_pack("{s:i, s:o, s:o}", "index", (int)index, "message", message, "finish_reason", finish_json(c));
}

static bool write_choice(const mp_writer *w, uint32_t index, mp_buf *out) {
    return append_items(choice_json(w, index), true, out) && append_text(",\"logprobs\":", out) &&
           write_kept_logprobs(w, &w->choices[index], out) && append_text("}", out);
}

static bool end_body(const mp_writer *w, mp_buf *out) {
    bool ok = append_items(frame(w), true, out) && append_text(",\"choices\":[", out);
    for (uint32_t i = 0; i < w->n_choices; i++) {
        ok = ok && (i == 0 || append_text(",", out)) && write_choice(w, i, out);
    }
    return ok && append_text("]", out) &&
           append_items(
               json_pack("{s:o, s:o}", "usage", usage_json(w), "timings", mp_api_timings(&w->choices[0].usage)), false,
               out) &&
           append_text("}", out);
}

bool mp_openai_event(mp_writer *w, const mp_feed_event *event, mp_buf *out) {
    return w->stream ? stream_event(w, event, out) : keep_event(w, event);
}

bool mp_openai_end(mp_writer *w, mp_buf *out) {
    return w->stream ? end_stream(w, out) : end_body(w, out);
}
