/* Prompts in the making: segments and messages that borrow from a request's JSON, until mepic_prepare has copied them.
 *
 * Dialects add parts and close them to messages in order. One thread. */
#ifndef MEPIC_SERVE_PROMPT_H
#define MEPIC_SERVE_PROMPT_H

#include "serve/dialect.h"

typedef struct mp_prompt_draft {
    mepic_segment *segments;
    uint32_t n_segments, cap_segments;
    struct mp_draft_message {
        const char *role;
        uint32_t first, n;
        uint32_t first_call, n_calls;
        const char *result_of; /* of a result: the id of its call; NULL = unknown */
    } *messages;
    uint32_t n_messages, cap_messages;
    mepic_tool_call *calls;
    const char **call_ids; /* [n_calls], NULL = unknown */
    uint32_t n_calls, cap_calls, cap_call_ids;
    const char **tools;
    uint32_t n_tools, cap_tools;
    uint64_t n_separators; /* of --chunk-separator */
    char **owned; /* texts that were put together */
    uint32_t n_owned, cap_owned;
} mp_prompt_draft;

void mp_draft_clear(mp_prompt_draft *draft);
/* A part of the message that is open. False: out of memory. */
bool mp_draft_add(mp_prompt_draft *draft, mepic_segment segment);
/* As mp_draft_add, with texts put together into one TEXT. */
bool mp_draft_add_text(mp_prompt_draft *draft, const char *before, const char *text, size_t len, const char *after);
/* As mp_draft_add_text, for what a client wrote: with --chunk-separator, what stands between two separators is a chunk.
 * The separators stay in the prompt, as text. */
bool mp_draft_add_written(mp_prompt_draft *draft, const mp_api *api, const char *before, const char *text, size_t len,
                          const char *after);
/* The same for a raw prompt: who writes one writes its template too, so special tokens are parsed outside chunks. */
bool mp_draft_add_raw(mp_prompt_draft *draft, const mp_api *api, const char *text, size_t len);
/* The result of a tool: with --chunk-tool-results, a long one is a chunk. */
bool mp_draft_add_result(mp_prompt_draft *draft, const mp_api *api, const char *text, size_t len);
/* `text`, which is emptied, as a chunk behind `before`; without the newlines at its end. */
bool mp_draft_add_chunk(mp_prompt_draft *draft, const char *before, mp_buf *text);
/* A call of the message that is open, a tool of the conversation. What is not borrowed is a text of mp_alloc, which is
 * taken over, also on failure; it may be NULL, which fails. */
bool mp_draft_add_call(mp_prompt_draft *draft, const char *borrowed_name, const char *borrowed_id, char *arguments);
bool mp_draft_add_tool(mp_prompt_draft *draft, char *tool);
/* Makes a message of the parts and calls added since the last one. `role` is borrowed. */
bool mp_draft_close(mp_prompt_draft *draft, const char *role);
/* As mp_draft_close, for the result of a call: the results behind an assistant's calls are put into the order of the
 * calls, since templates tell them apart by nothing else. */
bool mp_draft_close_result(mp_prompt_draft *draft, const json_t *call_id);

/* Adds `documents` (NULL: none) by the template of serve/documents.h: strings, {title, text}, {id, data}.
 * False: *err names the document. */
bool mp_draft_add_documents(mp_prompt_draft *draft, const json_t *documents, mp_api_error *err);
uint32_t mp_documents_count(const json_t *documents);
/* A line of a document that is put together: "name: text", or the text alone behind "". False: out of memory. */
bool mp_document_line(mp_buf *out, const char *name, const char *text, size_t len);

/* The messages or, if there are none, the segments (behind the model's BOS unless no_bos) as a prepared prompt. What is
 * far too long for a context of so many tokens is refused by its bytes, before it is tokenized. */
bool mp_draft_prepare(const mp_prompt_draft *draft, const mp_api *api, bool no_bos, mepic_prepared **out,
                      mp_api_error *err);
/* A part {"type": "text", "text": ..., "mepic": {"chunk": true, "cache": false}} as a segment that borrows from it. */
bool mp_text_part_read(const json_t *part, const char *path, mepic_segment *out, mp_api_error *err);
/* A token of the model. False: *err names `path`. */
bool mp_token_check(const mp_api *api, json_int_t id, const char *path, int32_t *out, mp_api_error *err);
/* An array of them into out[its size]; *err names the item that is none. */
bool mp_token_ids_copy(const mp_api *api, const json_t *ids, const char *path, int32_t *out, mp_api_error *err);
/* The same into memory of its own; free with mp_free. NULL: *err. */
int32_t *mp_token_ids_read(const mp_api *api, const json_t *ids, const char *path, size_t *n, mp_api_error *err);

#endif
