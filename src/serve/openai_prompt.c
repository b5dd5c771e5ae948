/* From "messages" and "prompt" to prepared prompts. */
#include <stdio.h>
#include <string.h>

#include "serve/documents.h"
#include "serve/json.h"
#include "serve/openai.h"
#include "serve/prompt.h"
#include "serve/tools.h"

enum { MESSAGES_MAX = 8192, PATH_CAP = 64, INSIDE_CAP = PATH_CAP + 48 };

/* ---- Chat -------------------------------------------------------------------------------------------------------- */

static const char *role_of(const json_t *message, const char *path, mp_api_error *err) {
    static const char *const roles[][2] = { { "system", "system" },
                                            { "developer", "system" },
                                            { "user", "user" },
                                            { "assistant", "assistant" },
                                            { "tool", "tool" } };
    const json_t *role = json_object_get(message, "role");
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) {
        if (mp_json_is(role, roles[i][0])) return roles[i][1];
    }
    mp_refuse(err, 400, "invalid_value", path, "'%s.role' must be system, developer, user, assistant or tool", path);
    return NULL;
}

/* A text that the client wrote, where a part is not marked. */
static bool add_text(mp_prompt_draft *draft, const mp_api *api, const char *role, const char *opening, const char *text,
                     size_t len) {
    if (strcmp(role, "tool") == 0) return mp_draft_add_result(draft, api, text, len);
    if (strcmp(role, "assistant") == 0) return mp_draft_add_text(draft, opening, text, len, "");
    return mp_draft_add_written(draft, api, opening, text, len, "");
}

/* `opening` stands in front of the message's text. */
static bool add_parts(mp_prompt_draft *draft, const mp_api *api, const json_t *parts, const char *path,
                      const char *role, const char *opening, mp_api_error *err) {
    for (size_t i = 0; i < json_array_size(parts); i++) {
        char inside[PATH_CAP + 32];
        snprintf(inside, sizeof inside, "%s.content[%zu]", path, i);
        mepic_segment segment;
        if (!mp_text_part_read(json_array_get(parts, i), inside, &segment, err)) return false;
        bool marked = segment.kind == MEPIC_CHUNK, ok = true;
        if (i > 0) opening = "";
        if (marked && *opening) ok = mp_draft_add_text(draft, opening, "", 0, "");
        if (ok && marked) ok = mp_draft_add(draft, segment);
        if (ok && !marked) ok = add_text(draft, api, role, opening, segment.text, segment.len);
        if (!ok) return mp_refuse_memory(err, "a message");
    }
    return true;
}

static bool add_content(mp_prompt_draft *draft, const mp_api *api, const json_t *message, const char *path,
                        const char *role, const char *opening, mp_api_error *err) {
    const json_t *content = json_object_get(message, "content");
    if (json_is_string(content)) {
        return add_text(draft, api, role, opening, json_string_value(content), json_string_length(content)) ||
               mp_refuse_memory(err, "a message");
    }
    if (json_is_array(content)) return add_parts(draft, api, content, path, role, opening, err);
    bool calls = json_array_size(json_object_get(message, "tool_calls")) > 0;
    if (calls && (!content || json_is_null(content))) return true;
    return mp_refuse(err, 400, "invalid_type", path, "'%s.content' is %s; it must be a string or an array of parts",
                     path, content ? mp_json_kind(content) : "missing");
}

/* [{"id", "type": "function", "function": {"name", "arguments": "..."}}] */
static bool add_calls(mp_prompt_draft *draft, const json_t *message, const char *path, const char *role,
                      mp_api_error *err) {
    const json_t *calls = json_object_get(message, "tool_calls");
    if (!calls || json_is_null(calls) || strcmp(role, "assistant") != 0) return true;
    if (!json_is_array(calls)) {
        return mp_refuse(err, 400, "invalid_type", path, "'%s.tool_calls' is %s; it must be an array", path,
                         mp_json_kind(calls));
    }
    for (size_t i = 0; i < json_array_size(calls); i++) {
        char inside[INSIDE_CAP];
        snprintf(inside, sizeof inside, "%s.tool_calls[%zu].function", path, i);
        const json_t *call = json_array_get(calls, i), *function = json_object_get(call, "function");
        if (!json_is_object(function)) return mp_refuse_type(err, inside, function, "an object");
        const json_t *name = json_object_get(function, "name"), *arguments = json_object_get(function, "arguments");
        if (!mp_tools_add_call(draft, name, json_object_get(call, "id"), arguments, inside, err)) return false;
    }
    return true;
}

static bool add_messages(mp_prompt_draft *draft, const mp_api *api, const mp_openai_request *request,
                         mp_api_error *err) {
    bool documents = mp_documents_count(request->documents) > 0, placed = false;
    for (size_t i = 0; i < json_array_size(request->messages); i++) {
        const json_t *message = json_array_get(request->messages, i);
        char path[PATH_CAP];
        snprintf(path, sizeof path, "messages[%zu]", i);
        if (!json_is_object(message)) return mp_refuse_type(err, path, message, "an object");
        const char *role = role_of(message, path, err), *opening = "";
        if (!role) return false;
        if (documents && strcmp(role, "user") == 0) {
            opening = mp_question_opening(!placed, false);
            if (!placed && !mp_draft_add_documents(draft, request->documents, err)) return false;
            placed = true;
        }
        if (!add_content(draft, api, message, path, role, opening, err)) return false;
        if (!add_calls(draft, message, path, role, err)) return false;
        bool result = strcmp(role, "tool") == 0;
        bool closed = result ? mp_draft_close_result(draft, json_object_get(message, "tool_call_id"))
                             : mp_draft_close(draft, role);
        if (!closed) return mp_refuse_memory(err, "a message");
    }
    if (documents && !placed) {
        return mp_refuse(err, 400, "invalid_value", "documents",
                         "'documents' stand in the first user message, and there is none");
    }
    return true;
}

static bool add_prompt(mp_generation *generation, const mp_api *api, const mp_prompt_draft *draft, bool no_bos,
                       mp_api_error *err) {
    mepic_prepared *prepared;
    if (!mp_draft_prepare(draft, api, no_bos, &prepared, err)) return false;
    generation->prompts[generation->n_prompts++] = prepared;
    return true;
}

bool mp_openai_chat_prompt(const mp_api *api, const mp_openai_request *request, mp_generation *generation,
                           mp_api_error *err) {
    const json_t *messages = request->messages;
    if (!json_is_array(messages)) return mp_refuse_type(err, "messages", messages, "an array");
    if (json_array_size(messages) == 0 || json_array_size(messages) > MESSAGES_MAX) {
        return mp_refuse(err, 400, "invalid_value", "messages", "'messages' has %zu items; it must have 1 to %d",
                         json_array_size(messages), MESSAGES_MAX);
    }
    if (request->documents && !json_is_array(request->documents)) {
        return mp_refuse_type(err, "documents", request->documents, "an array");
    }
    mp_prompt_draft draft = { 0 };
    bool ok = (request->no_tools || mp_tools_read_openai(&draft, request->tools, err)) &&
              add_messages(&draft, api, request, err) && add_prompt(generation, api, &draft, false, err);
    mp_draft_clear(&draft);
    return ok;
}

/* ---- Completions ------------------------------------------------------------------------------------------------- */

/* A string, or token ids, which are taken as they are. */
static bool add_text_prompt(const mp_api *api, const mp_openai_request *request, const json_t *prompt, const char *path,
                            mp_generation *generation, mp_api_error *err) {
    bool documents = mp_documents_count(request->documents) > 0;
    const char *opening = documents ? mp_question_opening(true, true) : "";
    const char *ending = documents ? mp_question_ending(true) : "";
    mp_prompt_draft draft = { 0 };
    int32_t *ids = NULL;
    bool ok = mp_draft_add_documents(&draft, request->documents, err);
    if (ok && json_is_string(prompt)) {
        const char *text = json_string_value(prompt);
        size_t len = json_string_length(prompt);
        ok = documents ? mp_draft_add_written(&draft, api, opening, text, len, ending)
                       : mp_draft_add_raw(&draft, api, text, len);
        ok = ok || mp_refuse_memory(err, "a prompt");
    } else if (ok && json_is_array(prompt) && json_array_size(prompt) > 0 && !documents) {
        size_t n;
        ids = mp_token_ids_read(api, prompt, path, &n, err);
        ok = ids && (mp_draft_add(&draft, (mepic_segment){ .tokens = ids, .n_tokens = n }) ||
                     mp_refuse_memory(err, "a prompt"));
    } else if (ok) {
        ok = mp_refuse_type(err, path, prompt,
                            documents ? "a string when there are documents" : "a string or token ids");
    }
    ok = ok && add_prompt(generation, api, &draft, ids != NULL, err);
    mp_free(ids);
    mp_draft_clear(&draft);
    return ok;
}

bool mp_openai_text_prompts(const mp_api *api, const mp_openai_request *request, mp_generation *generation,
                            mp_api_error *err) {
    const json_t *prompt = request->prompt;
    bool many = json_is_array(prompt) && json_array_size(prompt) > 0 && !json_is_integer(json_array_get(prompt, 0));
    if (!many) return add_text_prompt(api, request, prompt, "prompt", generation, err);
    if (json_array_size(prompt) > MP_PROMPTS_MAX) {
        return mp_refuse(err, 400, "invalid_value", "prompt", "'prompt' has %zu items; at most %d",
                         json_array_size(prompt), MP_PROMPTS_MAX);
    }
    for (size_t i = 0; i < json_array_size(prompt); i++) {
        char path[PATH_CAP];
        snprintf(path, sizeof path, "prompt[%zu]", i);
        if (!add_text_prompt(api, request, json_array_get(prompt, i), path, generation, err)) return false;
    }
    return true;
}
