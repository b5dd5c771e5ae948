#include "serve/prompt.h"

#include <stdio.h>
#include <string.h>

#include "serve/documents.h"
#include "serve/json.h"

/* Tokens are about four bytes; code and tables have longer ones. */
enum { DOCUMENT_BYTES_MAX = 16 << 20, BYTES_PER_TOKEN_MAX = 16, PATH_BYTES_MAX = 192, ORDERED_MAX = 64 };

/* ---- Parts ------------------------------------------------------------------------------------------------------- */

void mp_draft_clear(mp_prompt_draft *draft) {
    for (uint32_t i = 0; i < draft->n_owned; i++) mp_free(draft->owned[i]);
    mp_free(draft->owned);
    mp_free(draft->calls);
    mp_free(draft->call_ids);
    mp_free(draft->tools);
    mp_free(draft->segments);
    mp_free(draft->messages);
    *draft = (mp_prompt_draft){ 0 };
}

/* Room for one more item of `size` bytes. */
static bool grow(void *items, uint32_t n, uint32_t *cap, size_t size) {
    if (n < *cap) return true;
    uint32_t more = *cap ? 2 * *cap : 16;
    void *old;
    memcpy(&old, items, sizeof old);
    void *grown = mp_realloc(old, more * size);
    if (!grown) return false;
    memcpy(items, &grown, sizeof grown);
    *cap = more;
    return true;
}

bool mp_draft_add(mp_prompt_draft *draft, mepic_segment segment) {
    if (!grow(&draft->segments, draft->n_segments, &draft->cap_segments, sizeof *draft->segments)) return false;
    draft->segments[draft->n_segments++] = segment;
    return true;
}

/* The draft frees `text` when it is cleared, or at once on failure. */
static bool own(mp_prompt_draft *draft, char *text) {
    if (!text) return false;
    if (!grow(&draft->owned, draft->n_owned, &draft->cap_owned, sizeof *draft->owned)) {
        mp_free(text);
        return false;
    }
    draft->owned[draft->n_owned++] = text;
    return true;
}

bool mp_draft_add_text(mp_prompt_draft *draft, const char *before, const char *text, size_t len, const char *after) {
    size_t n_before = strlen(before), n_after = strlen(after);
    if (n_before + n_after == 0) return mp_draft_add(draft, (mepic_segment){ .text = text, .len = len });
    char *joined = mp_alloc(n_before + len + n_after);
    if (!own(draft, joined)) return false;
    memcpy(joined, before, n_before);
    if (len > 0) memcpy(joined + n_before, text, len);
    memcpy(joined + n_before + len, after, n_after);
    return mp_draft_add(draft, (mepic_segment){ .text = joined, .len = n_before + len + n_after });
}

/* Where `separator` begins in text[from, len); len: nowhere. */
static size_t find_separator(const char *text, size_t from, size_t len, const char *separator, size_t n) {
    const char *at = from + n <= len ? memmem(text + from, len - from, separator, n) : NULL;
    return at ? (size_t)(at - text) : len;
}

bool mp_draft_add_written(mp_prompt_draft *draft, const mp_api *api, const char *before, const char *text, size_t len,
                          const char *after) {
    const char *separator = api->chunk_separator;
    size_t n = separator ? strlen(separator) : 0, open = n ? find_separator(text, 0, len, separator, n) : len;
    size_t close = open < len ? find_separator(text, open + n, len, separator, n) : len;
    for (size_t i = open; i < len; i = find_separator(text, i + n, len, separator, n)) draft->n_separators++;
    bool crowded = draft->n_separators > api->info->context; // each is a token at least: prepare says so
    if (close == len || crowded) return mp_draft_add_text(draft, before, text, len, after);
    bool ok = mp_draft_add_text(draft, before, text, open + n, "");
    for (; ok && close < len; open = close, close = find_separator(text, open + n, len, separator, n)) {
        ok = mp_draft_add(draft,
                          (mepic_segment){ .kind = MEPIC_CHUNK, .text = text + open + n, .len = close - open - n });
        size_t next = find_separator(text, close + n, len, separator, n);
        ok = ok && mp_draft_add_text(draft, "", text + close, next < len ? n : len - close, next < len ? "" : after);
    }
    return ok;
}

bool mp_draft_add_raw(mp_prompt_draft *draft, const mp_api *api, const char *text, size_t len) {
    uint32_t i = draft->n_segments;
    bool ok = mp_draft_add_written(draft, api, "", text, len, "");
    for (; ok && i < draft->n_segments; i++) {
        draft->segments[i].parse_special = draft->segments[i].kind == MEPIC_TEXT;
    }
    return ok;
}

bool mp_draft_add_result(mp_prompt_draft *draft, const mp_api *api, const char *text, size_t len) {
    uint32_t least = api->chunk_tool_results;
    size_t n = 0;
    bool counted = least == 0 || len < least || // a token has at least one byte
                   mepic_tokenize(api->engine, text, len, false, NULL, 0, &n, NULL) == MEPIC_OK;
    if (least == 0 || n < least) return counted && mp_draft_add_written(draft, api, "", text, len, "");
    return mp_draft_add(draft, (mepic_segment){ .kind = MEPIC_CHUNK, .text = text, .len = len });
}

bool mp_draft_add_chunk(mp_prompt_draft *draft, const char *before, mp_buf *text) {
    while (text->len > 0 && text->data[text->len - 1] == '\n') text->len--;
    const mepic_segment segment = { .kind = MEPIC_CHUNK, .text = text->data, .len = text->len };
    bool ok = own(draft, text->data);
    *text = (mp_buf){ .limit = text->limit };
    return ok && mp_draft_add_text(draft, before, "", 0, "") && mp_draft_add(draft, segment);
}

bool mp_draft_add_call(mp_prompt_draft *draft, const char *borrowed_name, const char *borrowed_id, char *arguments) {
    if (!own(draft, arguments) || !grow(&draft->calls, draft->n_calls, &draft->cap_calls, sizeof *draft->calls) ||
        !grow(&draft->call_ids, draft->n_calls, &draft->cap_call_ids, sizeof *draft->call_ids)) {
        return false;
    }
    draft->call_ids[draft->n_calls] = borrowed_id;
    draft->calls[draft->n_calls++] = (mepic_tool_call){ .name = borrowed_name, .arguments = arguments };
    return true;
}

bool mp_draft_add_tool(mp_prompt_draft *draft, char *tool) {
    if (!own(draft, tool) || !grow(&draft->tools, draft->n_tools, &draft->cap_tools, sizeof *draft->tools)) {
        return false;
    }
    draft->tools[draft->n_tools++] = tool;
    return true;
}

bool mp_draft_close(mp_prompt_draft *draft, const char *role) {
    if (!grow(&draft->messages, draft->n_messages, &draft->cap_messages, sizeof *draft->messages)) return false;
    struct mp_draft_message m = { .role = role };
    if (draft->n_messages > 0) {
        const struct mp_draft_message *last = &draft->messages[draft->n_messages - 1];
        m.first = last->first + last->n;
        m.first_call = last->first_call + last->n_calls;
    }
    m.n = draft->n_segments - m.first;
    m.n_calls = draft->n_calls - m.first_call;
    draft->messages[draft->n_messages++] = m;
    return true;
}

/* ---- Results of tools -------------------------------------------------------------------------------------------- */

bool mp_draft_close_result(mp_prompt_draft *draft, const json_t *call_id) {
    if (!mp_draft_close(draft, "tool")) return false;
    draft->messages[draft->n_messages - 1].result_of = json_string_value(call_id);
    return true;
}

/* Which of a message's calls has this id; their number: none. */
static uint32_t find_call(const mp_prompt_draft *draft, const struct mp_draft_message *m, const char *id) {
    uint32_t i = 0;
    for (; id && i < m->n_calls; i++) {
        const char *other = draft->call_ids[m->first_call + i];
        if (other && strcmp(other, id) == 0) return i;
    }
    return m->n_calls;
}

/* Sorts by insertion, so results that name no call keep their order, behind the others. Absurdly many are left. */
static void order_results(const mp_prompt_draft *draft) {
    for (uint32_t i = 0; i < draft->n_messages; i++) {
        const struct mp_draft_message *m = &draft->messages[i];
        struct mp_draft_message *results = &draft->messages[i + 1];
        uint32_t n = 0;
        if (m->n_calls == 0 || m->n_calls > ORDERED_MAX) continue;
        while (i + 1 + n < draft->n_messages && strcmp(results[n].role, "tool") == 0) n++;
        if (n > ORDERED_MAX) continue;
        for (uint32_t k = 1; k < n; k++) {
            struct mp_draft_message moved = results[k];
            uint32_t rank = find_call(draft, m, moved.result_of), at = k;
            for (; at > 0 && find_call(draft, m, results[at - 1].result_of) > rank; at--) results[at] = results[at - 1];
            results[at] = moved;
        }
    }
}

/* ---- Documents --------------------------------------------------------------------------------------------------- */

uint32_t mp_documents_count(const json_t *documents) {
    return documents ? (uint32_t)json_array_size(documents) : 0;
}

static bool is_content(const char *name) {
    return strcmp(name, "text") == 0 || strcmp(name, "snippet") == 0 || strcmp(name, "content") == 0;
}

bool mp_document_line(mp_buf *out, const char *name, const char *text, size_t len) {
    return (out->len == 0 || mp_buf_append(out, "\n", 1)) &&
           (!*name || (mp_buf_append(out, name, strlen(name)) && mp_buf_append(out, ": ", 2))) &&
           mp_buf_append(out, text, len);
}

static bool append_line(mp_buf *out, const char *name, const json_t *value) {
    return mp_document_line(out, is_content(name) ? "" : name, json_string_value(value), json_string_length(value));
}

/* The title first, then the others as they stand: a content as it is, anything else behind its name. */
static bool document_of_fields(const json_t *fields, const char *path, mp_buf *out, mp_api_error *err) {
    const json_t *title = json_object_get(fields, "title");
    const char *name;
    json_t *value;
    bool has_content = false;
    if (json_is_string(title) && json_string_length(title) > 0 && !append_line(out, "", title)) {
        return mp_refuse_memory(err, "a document");
    }
    json_object_foreach((json_t *)fields, name, value) {
        if (strcmp(name, "id") == 0 || strcmp(name, "data") == 0 || json_is_null(value)) continue;
        if (!json_is_string(value)) {
            return mp_refuse(err, 400, "invalid_type", path, "'%s.%.40s' is %s; it must be a string", path, name,
                             mp_json_kind(value));
        }
        if (strcmp(name, "title") == 0) continue;
        has_content = true;
        if (!append_line(out, name, value)) return mp_refuse_memory(err, "a document");
    }
    return has_content || mp_refuse(err, 400, "invalid_value", path, "'%s' has no text", path);
}

static bool add_document(mp_prompt_draft *draft, const json_t *document, uint32_t index, mp_api_error *err) {
    char path[32], label[MP_DOCUMENT_LABEL_CAP];
    snprintf(path, sizeof path, "documents[%u]", index);
    const json_t *data = json_object_get(document, "data");
    if (data) document = data;
    mp_buf text = { .limit = DOCUMENT_BYTES_MAX };
    bool ok = true;
    if (json_is_string(document)) {
        ok = append_line(&text, "", document) || mp_refuse_memory(err, "a document");
    } else if (json_is_object(document)) {
        ok = document_of_fields(document, path, &text, err);
    } else {
        ok = mp_refuse(err, 400, "invalid_type", path,
                       "'%s' is %s; it must be a string, {\"title\", \"text\"} or {\"id\", \"data\"}", path,
                       mp_json_kind(document));
    }
    while (text.len > 0 && text.data[text.len - 1] == '\n') text.len--;
    if (ok && text.len == 0) ok = mp_refuse(err, 400, "invalid_value", path, "'%s' is empty", path);
    mp_document_label(index, label);
    if (ok) ok = mp_draft_add_chunk(draft, label, &text) || mp_refuse_memory(err, "a document");
    mp_buf_clear(&text);
    return ok;
}

bool mp_draft_add_documents(mp_prompt_draft *draft, const json_t *documents, mp_api_error *err) {
    if (!documents) return true;
    if (!json_is_array(documents)) {
        return mp_refuse_type(err, "documents", documents, "an array");
    }
    if (json_array_size(documents) > MP_DOCUMENTS_MAX) {
        return mp_refuse(err, 400, "invalid_value", "documents", "'documents' has %zu items; at most %d",
                         json_array_size(documents), MP_DOCUMENTS_MAX);
    }
    for (uint32_t i = 0; i < json_array_size(documents); i++) {
        if (!add_document(draft, json_array_get(documents, i), i, err)) return false;
    }
    return true;
}

/* ---- Parts of requests ------------------------------------------------------------------------------------------- */

bool mp_text_part_read(const json_t *part, const char *path, mepic_segment *out, mp_api_error *err) {
    const json_t *text = json_object_get(part, "text");
    if (!json_is_object(part)) {
        return mp_refuse_type(err, path, part, "an object");
    }
    if (!mp_json_is(json_object_get(part, "type"), "text")) {
        return mp_refuse(err, 400, "unsupported", path, "'%s.type' must be \"text\"; nothing else is understood", path);
    }
    if (!json_is_string(text)) {
        return mp_refuse(err, 400, "invalid_type", path, "'%s.text' is %s; it must be a string", path,
                         text ? mp_json_kind(text) : "missing");
    }
    *out = (mepic_segment){ .text = json_string_value(text), .len = json_string_length(text) };
    const json_t *mepic = json_object_get(part, "mepic");
    if (!mepic || json_is_null(mepic)) return true;
    struct {
        bool chunk, cache;
    } marks = { .cache = true };
    static const mp_field fields[] = { { "chunk", MP_FIELD_BOOL, 0, 0, 0, NULL },
                                       { "cache", MP_FIELD_BOOL, sizeof(bool), 0, 0, NULL } };
    if (!json_is_object(mepic)) {
        return mp_refuse(err, 400, "invalid_type", path, "'%s.mepic' is %s; it must be an object", path,
                         mp_json_kind(mepic));
    }
    char inside[PATH_BYTES_MAX];
    snprintf(inside, sizeof inside, "%s.mepic.", path);
    if (!mp_fields_read(mepic, inside, fields, 2, &marks, NULL, err)) return false;
    if (marks.chunk) out->kind = MEPIC_CHUNK;
    out->no_cache = !marks.cache;
    return true;
}

/* ---- Token ids --------------------------------------------------------------------------------------------------- */

bool mp_token_check(const mp_api *api, json_int_t id, const char *path, int32_t *out, mp_api_error *err) {
    if (id < 0 || id >= (json_int_t)api->info->n_vocab) {
        return mp_refuse(err, 400, "invalid_value", path, "'%s': %lld is not a token; the vocabulary has %u", path,
                         (long long)id, api->info->n_vocab);
    }
    *out = (int32_t)id;
    return true;
}

bool mp_token_ids_copy(const mp_api *api, const json_t *ids, const char *path, int32_t *out, mp_api_error *err) {
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        char item[PATH_BYTES_MAX];
        snprintf(item, sizeof item, "%s[%zu]", path, i);
        if (!json_is_integer(id)) return mp_refuse_type(err, item, id, "a token id");
        if (!mp_token_check(api, json_integer_value(id), item, &out[i], err)) return false;
    }
    return true;
}

int32_t *mp_token_ids_read(const mp_api *api, const json_t *ids, const char *path, size_t *n, mp_api_error *err) {
    if (!json_is_array(ids)) {
        mp_refuse_type(err, path, ids, "an array of token ids");
        return NULL;
    }
    *n = json_array_size(ids);
    int32_t *out = mp_calloc(*n, sizeof *out);
    if (!out) mp_refuse_memory(err, "token ids");
    if (out && !mp_token_ids_copy(api, ids, path, out, err)) {
        mp_free(out);
        return NULL;
    }
    return out;
}

/* ---- Prepare ----------------------------------------------------------------------------------------------------- */

static bool check_bytes(const mp_prompt_draft *draft, const mp_api *api, mp_api_error *err) {
    uint64_t bytes = 0, most = (uint64_t)api->info->context * BYTES_PER_TOKEN_MAX;
    for (uint32_t i = 0; i < draft->n_segments; i++) bytes += draft->segments[i].len;
    for (uint32_t i = 0; i < draft->n_tools; i++) bytes += strlen(draft->tools[i]);
    for (uint32_t i = 0; i < draft->n_calls; i++) bytes += strlen(draft->calls[i].arguments);
    if (bytes <= most) return true;
    return mp_refuse(err, 400, "context_length_exceeded", NULL,
                     "the prompt has %llu bytes; a context of %u tokens is not tried with more than %llu",
                     (unsigned long long)bytes, api->info->context, (unsigned long long)most);
}

static void mark_public(const mp_prompt_draft *draft, const mp_public *list) {
    for (uint32_t i = 0; list && i < draft->n_segments; i++) {
        mepic_segment *segment = &draft->segments[i];
        if (segment->kind == MEPIC_CHUNK && segment->text) {
            segment->common = mp_public_has(list, segment->text, segment->len);
        }
    }
}

bool mp_draft_prepare(const mp_prompt_draft *draft, const mp_api *api, bool no_bos, mepic_prepared **out,
                      mp_api_error *err) {
    if (!check_bytes(draft, api, err)) return false;
    if (draft->n_separators > api->info->context) {
        return mp_refuse(err, 400, "context_length_exceeded", NULL,
                         "the prompt has %llu separators of chunks; the context is %u tokens",
                         (unsigned long long)draft->n_separators, api->info->context);
    }
    order_results(draft);
    mark_public(draft, api->public_documents);
    mepic_message *messages = mp_calloc(draft->n_messages, sizeof *messages);
    if (!messages) return mp_refuse_memory(err, "a prompt");
    for (uint32_t i = 0; i < draft->n_messages; i++) {
        const struct mp_draft_message *m = &draft->messages[i];
        messages[i] = (mepic_message){ .role = m->role,
                                       .parts = m->n ? draft->segments + m->first : NULL,
                                       .n_parts = m->n,
                                       .calls = m->n_calls ? draft->calls + m->first_call : NULL,
                                       .n_calls = m->n_calls };
    }
    const mepic_prompt prompt = {
        .size = sizeof prompt,
        .messages = messages,
        .n_messages = draft->n_messages,
        .segments = draft->segments,
        .n_segments = draft->n_segments,
        .no_bos = no_bos,
        .tools = draft->tools,
        .n_tools = draft->n_tools,
    };
    mepic_error why;
    mepic_status status = mepic_prepare(api->engine, &prompt, out, &why);
    mp_free(messages);
    return status == MEPIC_OK || mp_refuse_engine(err, &why);
}
