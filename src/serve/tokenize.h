/* Questions that the engine's loop has no part in: tokens of text and text of tokens, in vLLM's shape (prompt,
 * messages) and llama.cpp's (content), and the number of tokens of a message of Anthropic's.
 *
 * From a body to the answer's JSON, which is NULL if there was no memory for it. False: *err. On the HTTP thread. */
#ifndef MEPIC_SERVE_TOKENIZE_H
#define MEPIC_SERVE_TOKENIZE_H

#include "serve/dialect.h"

typedef bool mp_question(const mp_api *api, const json_t *body, json_t **out, mp_api_error *err);

mp_question mp_ask_tokens, mp_ask_text, mp_ask_count;

#endif
