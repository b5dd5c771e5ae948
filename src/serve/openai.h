/* OpenAI's chat completions and completions: what the two files behind it share. */
#ifndef MEPIC_SERVE_OPENAI_H
#define MEPIC_SERVE_OPENAI_H

#include "serve/dialect.h"

/* What a request says, as it was read by the table of fields. NULL and the initial values: absent. */
typedef struct mp_openai_request {
    const json_t *model, *messages, *prompt, *stop, *stop_token_ids, *logit_bias, *stream_options, *response_format;
    const json_t *documents, *reuse, *tools, *tool_choice;
    double temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
    int64_t seed, top_k;
    uint32_t n, max_tokens, max_completion_tokens, top_logprobs, repeat_window;
    bool stream, logprobs, ignore_eos, include_usage, parallel_tool_calls;
    bool no_tools; /* by tool_choice: the model is not told of them */
} mp_openai_request;

/* Opens the writer of a request that was read; takes what it needs. */
bool mp_openai_writer_open(const mp_api *api, const mp_openai_request *request, const mp_generation *generation,
                           bool chat, uint64_t id, mp_writer **out, mp_api_error *err);
bool mp_openai_event(mp_writer *writer, const mp_feed_event *event, mp_buf *out);
bool mp_openai_end(mp_writer *writer, mp_buf *out);
bool mp_openai_fail(mp_writer *writer, const mp_api_error *err, mp_buf *out);
void mp_openai_close(mp_writer *writer);

/* Prompts of a request (openai_prompt.c). */
bool mp_openai_chat_prompt(const mp_api *api, const mp_openai_request *request, mp_generation *generation,
                           mp_api_error *err);
bool mp_openai_text_prompts(const mp_api *api, const mp_openai_request *request, mp_generation *generation,
                            mp_api_error *err);

#endif
