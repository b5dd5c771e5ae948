/* From "system" and "messages" to a prepared prompt. */
#include <stdio.h>
#include <string.h>

#include "serve/anthropic.h"
#include "serve/documents.h"
#include "serve/json.h"
#include "serve/prompt.h"
#include "serve/tools.h"

enum {
    MESSAGES_MAX = 8192,
    TEXT_BYTES_MAX = 16 << 20,
    /* Paths grow by a step a level: "messages[1]", ".content[2]", ".content[3]", ".source.content[4]". */
    MESSAGE_PATH = 40,
    BLOCK_PATH = MESSAGE_PATH + 40,
    INNER_PATH = BLOCK_PATH + 40,
    TEXT_PATH = INNER_PATH + 40,
};

typedef struct builder {
    const mp_api *api;
    mp_prompt_draft draft;
    uint32_t n_documents;
    bool begun;          /* the open message has parts */
    bool after_document; /* the last of them is one */
    mp_api_error *err;
} builder;

static bool is_type(const json_t *block, const char *type) {
    return mp_json_is(json_object_get(block, "type"), type);
}

static bool close_message(builder *b, const char *role) {
    b->begun = b->after_document = false;
    return mp_draft_close(&b->draft, role) || mp_refuse_memory(b->err, "a message");
}

static bool close_result(builder *b, const json_t *call_id) {
    b->begun = b->after_document = false;
    return mp_draft_close_result(&b->draft, call_id) || mp_refuse_memory(b->err, "a message");
}

/* ---- Text -------------------------------------------------------------------------------------------------------- */

typedef enum author { USER, ASSISTANT, TOOL } author;

static bool add_text(builder *b, const char *text, size_t len, author by) {
    const char *before = b->after_document ? "\n\n" : "";
    bool ok;
    if (by == TOOL && !*before)
        ok = mp_draft_add_result(&b->draft, b->api, text, len);
    else if (by == ASSISTANT)
        ok = mp_draft_add_text(&b->draft, before, text, len, "");
    else
        ok = mp_draft_add_written(&b->draft, b->api, before, text, len, "");
    b->begun = true;
    b->after_document = false;
    return ok || mp_refuse_memory(b->err, "a message");
}

static bool add_text_block(builder *b, const json_t *block, const char *path, author by) {
    mepic_segment segment;
    if (!mp_text_part_read(block, path, &segment, b->err)) return false;
    if (segment.kind == MEPIC_TEXT) return add_text(b, segment.text, segment.len, by);
    if (b->after_document && !add_text(b, "", 0, by)) return false;
    b->begun = true;
    return mp_draft_add(&b->draft, segment) || mp_refuse_memory(b->err, "a message");
}

/* ---- Documents --------------------------------------------------------------------------------------------------- */

static bool append_line(builder *b, mp_buf *out, const char *name, const char *text, size_t len) {
    return mp_document_line(out, name, text, len) || mp_refuse_memory(b->err, "a document");
}

/* A string of a block, as a line of the document; it may be absent unless `needed`. */
static bool append_field(builder *b, const json_t *block, const char *field, const char *path, const char *name,
                         bool needed, mp_buf *out) {
    const json_t *value = json_object_get(block, field);
    if (!needed && (!value || json_is_null(value))) return true;
    if (!json_is_string(value)) {
        return mp_refuse(b->err, 400, "invalid_type", path, "'%s.%s' is %s; it must be a string", path, field,
                         value ? mp_json_kind(value) : "missing");
    }
    return json_string_length(value) == 0 ||
           append_line(b, out, name, json_string_value(value), json_string_length(value));
}

/* [{"type": "text", "text": ...}], a line each. */
static bool append_blocks(builder *b, const json_t *blocks, const char *path, mp_buf *out) {
    if (!json_is_array(blocks)) return mp_refuse_type(b->err, path, blocks, "an array of text blocks");
    for (size_t i = 0; i < json_array_size(blocks); i++) {
        char inside[TEXT_PATH + 24];
        snprintf(inside, sizeof inside, "%s[%zu]", path, i);
        mepic_segment segment;
        if (!mp_text_part_read(json_array_get(blocks, i), inside, &segment, b->err)) return false;
        if (!append_line(b, out, "", segment.text, segment.len)) return false;
    }
    return true;
}

static bool append_source(builder *b, const json_t *block, const char *path, mp_buf *out) {
    const json_t *source = json_object_get(block, "source");
    char inside[TEXT_PATH];
    snprintf(inside, sizeof inside, "%s.source", path);
    if (!json_is_object(source)) return mp_refuse_type(b->err, inside, source, "an object");
    if (is_type(source, "text")) return append_field(b, source, "data", inside, "", true, out);
    if (!is_type(source, "content")) {
        return mp_refuse(b->err, 400, "unsupported", inside,
                         "'%s.type' must be \"text\" or \"content\"; files and addresses are not read here", inside);
    }
    const json_t *content = json_object_get(source, "content");
    if (json_is_string(content)) return append_field(b, source, "content", inside, "", true, out);
    snprintf(inside, sizeof inside, "%s.source.content", path);
    return append_blocks(b, content, inside, out);
}

static bool append_result(builder *b, const json_t *block, const char *path, mp_buf *out) {
    char inside[TEXT_PATH];
    snprintf(inside, sizeof inside, "%s.content", path);
    return append_blocks(b, json_object_get(block, "content"), inside, out);
}

/* The title belongs to the document, so it is inside; the number belongs to the place. */
static bool add_document(builder *b, const json_t *block, const char *path) {
    mp_buf text = { .limit = TEXT_BYTES_MAX };
    bool result = is_type(block, "search_result");
    bool ok = append_field(b, block, "title", path, "", result, &text) &&
              append_field(b, block, "context", path, "", false, &text) &&
              (!result || append_field(b, block, "source", path, "source", true, &text));
    size_t before_content = text.len;
    ok = ok && (result ? append_result(b, block, path, &text) : append_source(b, block, path, &text));
    while (text.len > 0 && text.data[text.len - 1] == '\n') text.len--;
    if (ok && text.len <= before_content) {
        ok = mp_refuse(b->err, 400, "invalid_value", path, "'%s' has no text", path);
    }
    if (ok) {
        char label[MP_DOCUMENT_LABEL_CAP], before[MP_DOCUMENT_LABEL_CAP + 2];
        mp_document_label(b->n_documents++, label);
        snprintf(before, sizeof before, "%s%s", b->begun ? "\n\n" : "", label + strspn(label, "\n"));
        ok = mp_draft_add_chunk(&b->draft, before, &text) || mp_refuse_memory(b->err, "a document");
        b->begun = b->after_document = true;
    }
    mp_buf_clear(&text);
    return ok;
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

/* What may stand in a user's message and in a tool's result. */
static bool add_block(builder *b, const json_t *block, const char *path, author by) {
    if (is_type(block, "document") || is_type(block, "search_result")) return add_document(b, block, path);
    if (is_type(block, "text")) return add_text_block(b, block, path, by);
    const json_t *type = json_object_get(block, "type");
    return mp_refuse(b->err, 400, "unsupported", path,
                     "'%s' has the type '%.40s'; text, document and search_result are understood%s", path,
                     json_is_string(type) ? json_string_value(type) : "", by == USER ? ", and tool_result" : "");
}

/* A string or blocks. */
static bool add_content(builder *b, const json_t *content, const char *path, author by) {
    if (json_is_string(content)) return add_text(b, json_string_value(content), json_string_length(content), by);
    if (!json_is_array(content)) return mp_refuse_type(b->err, path, content, "a string or an array of blocks");
    for (size_t i = 0; i < json_array_size(content); i++) {
        char inside[INNER_PATH + 40];
        snprintf(inside, sizeof inside, "%s[%zu]", path, i);
        if (!add_block(b, json_array_get(content, i), inside, by)) return false;
    }
    return true;
}

static bool add_tool_result(builder *b, const json_t *block, const char *path) {
    const json_t *content = json_object_get(block, "content");
    char inside[INNER_PATH];
    snprintf(inside, sizeof inside, "%s.content", path);
    bool failed = json_is_true(json_object_get(block, "is_error"));
    if (failed && !mp_draft_add_text(&b->draft, "Error: ", "", 0, "")) return mp_refuse_memory(b->err, "a message");
    bool empty = !content || json_is_null(content);
    return (empty || add_content(b, content, inside, TOOL)) && close_result(b, json_object_get(block, "tool_use_id"));
}

/* Results are messages of their own. */
static bool add_user(builder *b, const json_t *content, const char *path) {
    size_t before = b->draft.n_messages;
    if (!json_is_array(content)) return add_content(b, content, path, USER) && close_message(b, "user");
    for (size_t i = 0; i < json_array_size(content); i++) {
        char inside[BLOCK_PATH + 24];
        snprintf(inside, sizeof inside, "%s[%zu]", path, i);
        const json_t *block = json_array_get(content, i);
        bool ok = true;
        if (is_type(block, "tool_result"))
            ok = (!b->begun || close_message(b, "user")) && add_tool_result(b, block, inside);
        else
            ok = add_block(b, block, inside, USER);
        if (!ok) return false;
    }
    return (!b->begun && b->draft.n_messages > before) || close_message(b, "user");
}

static bool add_assistant_block(builder *b, const json_t *block, const char *path) {
    if (is_type(block, "thinking") || is_type(block, "redacted_thinking")) return true;
    if (is_type(block, "text")) return add_text_block(b, block, path, ASSISTANT);
    if (!is_type(block, "tool_use")) {
        return mp_refuse(b->err, 400, "unsupported", path,
                         "'%s.type' must be text, tool_use or thinking in a message of the assistant", path);
    }
    return mp_tools_add_call(&b->draft, json_object_get(block, "name"), json_object_get(block, "id"),
                             json_object_get(block, "input"), path, b->err);
}

static bool add_assistant(builder *b, const json_t *content, const char *path) {
    if (!json_is_array(content)) return add_content(b, content, path, ASSISTANT) && close_message(b, "assistant");
    for (size_t i = 0; i < json_array_size(content); i++) {
        char inside[BLOCK_PATH + 24];
        snprintf(inside, sizeof inside, "%s[%zu]", path, i);
        if (!add_assistant_block(b, json_array_get(content, i), inside)) return false;
    }
    return close_message(b, "assistant");
}

/* ---- The whole --------------------------------------------------------------------------------------------------- */

static bool add_system(builder *b, const json_t *system) {
    if (!system) return true;
    bool ok = true;
    if (json_is_string(system))
        ok = add_text(b, json_string_value(system), json_string_length(system), USER);
    else if (!json_is_array(system))
        ok = mp_refuse_type(b->err, "system", system, "a string or an array of text blocks");
    for (size_t i = 0; ok && json_is_array(system) && i < json_array_size(system); i++) {
        char path[MESSAGE_PATH];
        snprintf(path, sizeof path, "system[%zu]", i);
        ok = add_text_block(b, json_array_get(system, i), path, USER);
    }
    return ok && close_message(b, "system");
}

static bool add_messages(builder *b, const json_t *messages) {
    if (!json_is_array(messages)) return mp_refuse_type(b->err, "messages", messages, "an array");
    size_t n = json_array_size(messages);
    if (n == 0 || n > MESSAGES_MAX) {
        return mp_refuse(b->err, 400, "invalid_value", "messages", "'messages' has %zu items; it must have 1 to %d", n,
                         MESSAGES_MAX);
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(messages, i), *role = json_object_get(message, "role");
        char path[MESSAGE_PATH], inside[BLOCK_PATH];
        snprintf(path, sizeof path, "messages[%zu]", i);
        snprintf(inside, sizeof inside, "%s.content", path);
        if (!json_is_object(message)) return mp_refuse_type(b->err, path, message, "an object");
        bool user = mp_json_is(role, "user");
        if (!user && !mp_json_is(role, "assistant")) {
            return mp_refuse(b->err, 400, "invalid_value", path, "'%s.role' must be user or assistant", path);
        }
        if (!user && i + 1 == n) {
            return mp_refuse(b->err, 400, "unsupported", path,
                             "'%s': a reply that begins with the assistant's text is not supported; end with the user",
                             path);
        }
        const json_t *content = json_object_get(message, "content");
        if (!(user ? add_user(b, content, inside) : add_assistant(b, content, inside))) return false;
    }
    return true;
}

bool mp_anthropic_prompt(const mp_api *api, const mp_anthropic_request *r, mp_generation *generation,
                         mp_api_error *err) {
    builder b = { .api = api, .err = err };
    mepic_prepared *prepared;
    bool ok = (r->no_tools || mp_tools_read_anthropic(&b.draft, r->tools, err)) && add_system(&b, r->system) &&
              add_messages(&b, r->messages) && mp_draft_prepare(&b.draft, api, false, &prepared, err);
    if (ok) generation->prompts[generation->n_prompts++] = prepared;
    mp_draft_clear(&b.draft);
    return ok;
}
