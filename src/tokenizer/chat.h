/* Chat templates by family: a conversation becomes a list of pieces.
 *
 * The family is recognized from the template text in the GGUF file; templates are never executed. A piece is either
 * template text, in which special tokens are parsed, or a part of a message, in which they are not. Chunks stay pieces
 * of their own, so they can be tokenized and cached on their own. What a template adds of its own (dates, dropped
 * reasoning) is left out, but for the texts it puts around a list of tools. Pure; any thread. */
#ifndef MEPIC_TOKENIZER_CHAT_H
#define MEPIC_TOKENIZER_CHAT_H

#include "base/mem.h"
#include "model/gguf.h"

typedef enum mp_chat_family {
    MP_CHAT_NONE,
    MP_CHAT_CHATML,  /* with the default system turn the template carries, if any (Qwen2.5, SmolLM2) */
    MP_CHAT_LLAMA3,
    MP_CHAT_MISTRAL, /* [INST] ... [/INST] */
    MP_CHAT_GEMMA,
} mp_chat_family;

typedef struct mp_chat_template {
    mp_chat_family family;
    /* put in front when the conversation has no system turn; len 0 = none. Points into static or GGUF memory */
    mp_str default_system;
    /* small variations between templates of one family are fields here */
    bool trim;             /* message content is trimmed (Mistral: of the assistant's turns) */
    bool tool_response;    /* ChatML: role "tool" becomes <tool_response> in a user turn */
    /* ChatML: what stands between the system text and the tools, and behind them up to the turn's end; as written
     * between quotes in the template. len 0 = the template has no tools, or calls them in a way that is not known */
    mp_str tools_before, tools_after;
    bool system_prompt;    /* Mistral: [SYSTEM_PROMPT] instead of a system text inside [INST] */
    bool system_last;      /* Mistral: the system text stands in the last user turn, not in the first */
    bool space_before;     /* Mistral: " [INST]" */
    bool space_end;        /* Mistral: " [/INST]" */
    bool space_after;      /* Mistral: "[INST] ", "[SYSTEM_PROMPT] " */
    bool space_reply;      /* Mistral: a space in front of the assistant's text */
} mp_chat_template;

void mp_chat_template_find(const mp_gguf *gguf, mp_chat_template *out);
const char *mp_chat_family_name(mp_chat_family family);
const char *mp_chat_tool_format(const mp_chat_template *chat); /* mepic_model_info.tool_format */

typedef enum mp_piece_kind { MP_PIECE_TEMPLATE, MP_PIECE_PART } mp_piece_kind;
typedef struct mp_piece {
    mp_piece_kind kind;
    mp_str text;                /* TEMPLATE: the literal, static or from the template; never BOS, the caller adds it */
    const mepic_segment *part;  /* PART: the caller's segment, or a static one for calls and tools; text is what to
                                 * take of it (after trimming, with a newline that belongs to it) */
} mp_piece;
typedef struct mp_pieces {
    mp_piece *items; /* owned */
    size_t n, cap;
    char **texts; /* [n_texts] owned; texts that were put together */
    size_t n_texts, cap_texts;
} mp_pieces;

/* A conversation: see mepic_prompt. */
typedef struct mp_chat {
    const mepic_message *messages;
    size_t n;
    const char *const *tools;
    size_t n_tools;
} mp_chat;

/* Renders a conversation, with the opening of an assistant turn at the end if `generate`. Borrows from it.
 * ERR_ARGUMENT: unknown role or an order the family cannot express; ERR_UNSUPPORTED: MP_CHAT_NONE, tools or calls that
 * the template has no place for; ERR_NOMEM. */
mepic_status mp_chat_render(const mp_chat_template *chat, const mp_chat *conversation, bool generate, mp_pieces *out,
                            mepic_error *err);
void mp_pieces_clear(mp_pieces *pieces);
/* What stands in front of the content of a system turn, for the canonical context; "" without a template. */
mp_str mp_chat_system_opening(const mp_chat_template *chat);

#endif
