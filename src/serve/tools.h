/* Tools: what a request lists and called before, and the calls in a reply as its text comes.
 *
 * Both dialects' forms become the same JSON in the prompt, so a list of tools has the same pages whoever sends it. A
 * call is given out when it is complete and its arguments are a JSON object; what looks like one and is none stays
 * text. A call without its marks counts if it is the whole reply, as it is or as a code block, and names a tool of the
 * request: models made for code write it so. Pure; any thread. */
#ifndef MEPIC_SERVE_TOOLS_H
#define MEPIC_SERVE_TOOLS_H

#include "serve/dialect.h"
#include "serve/prompt.h"

enum { MP_TOOLS_MAX = 512 };

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

/* [{"type": "function", "function": {...}}], as OpenAI writes it. NULL: none. False: *err names the tool. */
bool mp_tools_read_openai(mp_prompt_draft *draft, const json_t *tools, mp_api_error *err);
/* [{"name", "description", "input_schema"}], as Anthropic writes it. */
bool mp_tools_read_anthropic(mp_prompt_draft *draft, const json_t *tools, mp_api_error *err);
/* A call that the assistant made earlier, of the message that is open: `arguments` is an object, or one as text, which
 * is taken as it is. */
bool mp_tools_add_call(mp_prompt_draft *draft, const json_t *name, const json_t *id, const json_t *arguments,
                       const char *path, mp_api_error *err);
/* The "type" of an OpenAI tool_choice, or Anthropic's: false is a 400 for those that force a call. *none: no calls. */
bool mp_tools_read_choice(const json_t *choice, bool *none, mp_api_error *err);
/* At most one call: the reply ends with its first. */
bool mp_tools_one_call(const mp_api *api, mp_generation *generation, mp_api_error *err);

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

/* Who takes a reply's parts, in order. False: out of memory, which is passed on. */
typedef struct mp_reply_sink {
    bool (*text)(void *user, const char *text, size_t len);
    bool (*call)(void *user, uint32_t index, const char *name, const char *arguments);
    void *user;
} mp_reply_sink;

/* A number for mp_api_id: of a request's number, one of its replies and one of that reply's calls. */
uint64_t mp_tools_call_number(uint64_t request, uint32_t choice, uint32_t call);

typedef struct mp_reply_parser {
    const struct mp_tool_marks *marks; /* NULL: everything is text */
    json_t *names;                     /* of the request's tools */
    mp_buf held;                       /* text that cannot be told yet, or a call that has begun */
    size_t scanned;                    /* no closing mark begins before it */
    bool in_call;
    bool begun;       /* whether the reply is a call without marks is decided */
    bool without_marks;
    uint32_t n_calls; /* given out */
} mp_reply_parser;

/* Zero-initialized is a parser without tools. `format` is mepic_model_info.tool_format, `tools` the request's, which
 * have their names in the member `inside` (NULL: they have them themselves). False: out of memory. */
bool mp_reply_parser_init(mp_reply_parser *parser, const char *format, const json_t *tools, const char *inside);
void mp_reply_parser_clear(mp_reply_parser *parser);
bool mp_reply_parser_push(mp_reply_parser *parser, const char *text, size_t len, const mp_reply_sink *sink);
/* The reply is over: what was held is a call or text. */
bool mp_reply_parser_end(mp_reply_parser *parser, const mp_reply_sink *sink);

#endif
