#include "serve/tokenize.h"

#include <string.h>

#include "serve/anthropic.h"
#include "serve/json.h"
#include "serve/openai.h"
#include "serve/prompt.h"

enum { PIECE_BYTES_MAX = 1024 };

typedef struct tokenize_request {
    const json_t *model, *prompt, *messages, *documents, *tools, *content;
    bool add_special_tokens, return_token_strs, add_generation_prompt; /* vLLM's */
    bool add_special, parse_special, with_pieces;                      /* llama.cpp's */
} tokenize_request;

#define AT(member) offsetof(tokenize_request, member)
#define OTHER(member)                                                                                                  \
    { #member, MP_FIELD_OTHER, AT(member), 0, 0, NULL }
#define FLAG(member)                                                                                                   \
    { #member, MP_FIELD_BOOL, AT(member), 0, 0, NULL }

static const mp_field tokenize_fields[] = {
    OTHER(model),
    OTHER(prompt),
    OTHER(messages),
    OTHER(documents),
    OTHER(tools),
    OTHER(content),
    FLAG(add_special_tokens),
    FLAG(return_token_strs),
    FLAG(add_generation_prompt),
    FLAG(add_special),
    FLAG(parse_special),
    FLAG(with_pieces),
    { "continue_final_message", MP_FIELD_REFUSED, 0, 0, 0, NULL },
    { "chat_template", MP_FIELD_REFUSED, 0, 0, 0, "; the model's own is used" },
};

typedef struct detokenize_request {
    const json_t *model, *tokens;
} detokenize_request;

static const mp_field detokenize_fields[] = {
    { "model", MP_FIELD_OTHER, offsetof(detokenize_request, model), 0, 0, NULL },
    { "tokens", MP_FIELD_OTHER, offsetof(detokenize_request, tokens), 0, 0, NULL },
};

/* ---- Tokens of text ---------------------------------------------------------------------------------------------- */

/* A prompt's tokens are those a request with it is given: prepared, not only tokenized. `raw`: as a prompt; else
 * special tokens are parsed if `parse`. */
static bool prepare_text(const mp_api *api, const json_t *text, bool raw, bool special, bool parse,
                         mepic_prepared **out, mp_api_error *err) {
    const mepic_segment segment = { .text = json_string_value(text),
                                    .len = json_string_length(text),
                                    .parse_special = parse };
    if (segment.len == 0) return true; // no tokens
    mp_prompt_draft draft = { 0 };
    bool ok = raw ? mp_draft_add_raw(&draft, api, segment.text, segment.len) : mp_draft_add(&draft, segment);
    ok = (ok || mp_refuse_memory(err, "a prompt")) && mp_draft_prepare(&draft, api, !special, out, err);
    mp_draft_clear(&draft);
    return ok;
}

static bool prepare_messages(const mp_api *api, const tokenize_request *r, mepic_prepared **out, mp_api_error *err) {
    const mp_openai_request chat = { .messages = r->messages, .documents = r->documents, .tools = r->tools };
    mepic_error why;
    mp_generation *generation;
    if (mp_generation_open(&generation, &why) != MEPIC_OK) return mp_refuse_engine(err, &why);
    bool ok = mp_openai_chat_prompt(api, &chat, generation, err);
    if (ok) {
        *out = generation->prompts[0];
        generation->prompts[0] = NULL;
    }
    mp_generation_free(generation);
    return ok;
}

/* By a table of fields, with a line of log of what is not in it. */
static bool read_fields(const mp_api *api, const json_t *body, const mp_field *fields, size_t n, void *out,
                        mp_api_error *err) {
    mp_buf unknown = { .limit = 512 };
    bool ok = mp_fields_read(body, "", fields, n, out, &unknown, err);
    if (ok) mp_api_log_unknown(api, &unknown);
    mp_buf_clear(&unknown);
    return ok;
}

static bool read_tokenize(const mp_api *api, const json_t *body, tokenize_request *r, mepic_prepared **out,
                          mp_api_error *err) {
    *r = (tokenize_request){ .add_special_tokens = true, .add_generation_prompt = true, .parse_special = true };
    size_t n = sizeof tokenize_fields / sizeof *tokenize_fields;
    if (!read_fields(api, body, tokenize_fields, n, r, err) || !mp_api_check_model(api, r->model, err)) return false;
    if ((r->prompt != NULL) + (r->messages != NULL) + (r->content != NULL) != 1) {
        return mp_refuse(err, 400, "invalid_value", "prompt", "give one of 'prompt', 'messages' and 'content'");
    }
    if (r->messages) {
        if (!r->add_generation_prompt) {
            return mp_refuse(err, 400, "unsupported", "add_generation_prompt",
                             "'add_generation_prompt' must be true: messages are rendered as for a reply");
        }
        return prepare_messages(api, r, out, err);
    }
    const char *name = r->prompt ? "prompt" : "content";
    const json_t *text = r->prompt ? r->prompt : r->content;
    if (!json_is_string(text)) {
        return mp_refuse_type(err, name, text, "a string");
    }
    return r->prompt ? prepare_text(api, text, true, r->add_special_tokens, true, out, err)
                     : prepare_text(api, text, false, r->add_special, r->parse_special, out, err);
}

/* A token's text; where it is no whole characters, for llama.cpp's clients, its bytes. */
static json_t *piece_of(const mp_api *api, int32_t id, bool bytes_if_broken) {
    char bytes[PIECE_BYTES_MAX];
    size_t n = 0;
    if (mepic_detokenize(api->engine, &id, 1, bytes, sizeof bytes, &n, NULL) != MEPIC_OK) return NULL;
    if (n > sizeof bytes) n = sizeof bytes;
    json_t *text = bytes_if_broken ? json_stringn(n > 0 ? bytes : "", n) : mp_json_text(bytes, n);
    if (text || !bytes_if_broken) return text;
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer((unsigned char)bytes[i]));
    return list;
}

static json_t *tokens_json(const mp_api *api, const tokenize_request *r, const int32_t *ids, size_t n) {
    json_t *tokens = json_array(), *strings = r->return_token_strs && !r->content ? json_array() : NULL;
    for (size_t i = 0; i < n; i++) {
        json_t *id = json_integer(ids[i]);
        if (r->content && r->with_pieces) id = json_pack("{s:o, s:o}", "id", id, "piece", piece_of(api, ids[i], true));
        json_array_append_new(tokens, id);
        if (strings) json_array_append_new(strings, piece_of(api, ids[i], false));
    }
    json_t *root = json_pack("{s:o}", "tokens", tokens);
    if (!r->content) {
        json_object_set_new(root, "count", json_integer((json_int_t)n));
        json_object_set_new(root, "max_model_len", json_integer(api->info->context));
    }
    if (strings) json_object_set_new(root, "token_strs", strings);
    return root;
}

bool mp_ask_tokens(const mp_api *api, const json_t *body, json_t **out, mp_api_error *err) {
    tokenize_request r;
    mepic_prepared *prepared = NULL;
    if (!read_tokenize(api, body, &r, &prepared, err)) return false;
    size_t n = 0;
    const int32_t *ids = prepared ? mepic_prepared_tokens(prepared, &n) : NULL;
    *out = tokens_json(api, &r, ids, n);
    mepic_prepared_free(prepared);
    return true;
}

/* ---- Text of tokens ---------------------------------------------------------------------------------------------- */

/* The text as "prompt" for vLLM's clients and as "content" for llama.cpp's. */
static bool write_text(const mp_api *api, const int32_t *ids, size_t n_ids, json_t **out, mp_api_error *err) {
    mepic_error why;
    size_t n = 0;
    if (mepic_detokenize(api->engine, ids, n_ids, NULL, 0, &n, &why) != MEPIC_OK) return mp_refuse_engine(err, &why);
    char *bytes = mp_alloc(n);
    if (!bytes) return mp_refuse_memory(err, "a text");
    mepic_detokenize(api->engine, ids, n_ids, bytes, n, &n, NULL);
    json_t *text = mp_json_text(bytes, n);
    *out = json_pack("{s:O, s:o}", "prompt", text, "content", text);
    mp_free(bytes);
    return true;
}

bool mp_ask_text(const mp_api *api, const json_t *body, json_t **out, mp_api_error *err) {
    detokenize_request r = { 0 };
    if (!read_fields(api, body, detokenize_fields, 2, &r, err) || !mp_api_check_model(api, r.model, err)) return false;
    size_t n;
    int32_t *ids = mp_token_ids_read(api, r.tokens, "tokens", &n, err);
    bool ok = ids && write_text(api, ids, n, out, err);
    mp_free(ids);
    return ok;
}

/* ---- Anthropic --------------------------------------------------------------------------------------------------- */

bool mp_ask_count(const mp_api *api, const json_t *body, json_t **out, mp_api_error *err) {
    size_t n = 0;
    if (!mp_anthropic_count(api, body, &n, err)) return false;
    *out = json_pack("{s:I}", "input_tokens", (json_int_t)n);
    return true;
}
