/* What a user and a model say to each other over a set of documents, and the prompt this makes.
 *
 * The documents stand in the first question, by the template of serve/documents.h, which the server uses as well; a
 * document's title is the last part of its path.
 *
 * Without documents a question is the whole message. A model without a chat template gets the same texts as segments.
 * One thread. */
#ifndef MEPIC_CLI_CONVERSATION_H
#define MEPIC_CLI_CONVERSATION_H

#include "base/mem.h"
#include "base/status.h"
#include "serve/documents.h"

enum { MP_DOCUMENT_MAX_BYTES = 16 << 20 };

typedef struct mp_document {
    char *name; /* last part of the path */
    char *text; /* the chunk: name, newline, content */
    size_t len;
} mp_document;

/* ERR_IO, ERR_ARGUMENT (empty, or larger than MP_DOCUMENT_MAX_BYTES), ERR_NOMEM. Any bytes are text. */
mepic_status mp_document_read(const char *path, mp_document *out, mepic_error *err);
void mp_document_clear(mp_document *document);
/* The whole of a file ("-": standard input), terminated; free with mp_free. Used for prompts and lists of questions. */
mepic_status mp_file_read(const char *path, size_t limit, char **out, size_t *len, mepic_error *err);

typedef struct mp_turn {
    char *question;
    char *answer; /* NULL in the last turn of a prompt */
} mp_turn;

/* Owns everything in it, unless its owner filled it with borrowed pointers and never clears it. */
typedef struct mp_conversation {
    char *system; /* NULL: the model's default */
    mp_document *documents;
    uint32_t n_documents;
    mp_turn *turns;
    uint32_t n_turns;
} mp_conversation;

void mp_conversation_clear(mp_conversation *conversation);
mepic_status mp_conversation_add(mp_conversation *conversation, const char *path, mepic_error *err);
void mp_conversation_drop(mp_conversation *conversation, uint32_t index);
void mp_conversation_move(mp_conversation *conversation, uint32_t from, uint32_t to);
mepic_status mp_conversation_set_system(mp_conversation *conversation, const char *text, mepic_error *err);
/* A new last turn, without an answer. */
mepic_status mp_conversation_ask(mp_conversation *conversation, const char *question, mepic_error *err);
mepic_status mp_conversation_answer(mp_conversation *conversation, const char *text, size_t len, mepic_error *err);
void mp_conversation_unask(mp_conversation *conversation); /* forgets the last turn */
void mp_conversation_reset(mp_conversation *conversation); /* forgets all turns */

/* The prompt that asks for the last turn's answer. */
mepic_status mp_conversation_prepare(const mp_conversation *conversation, const mepic_engine *engine,
                                     mepic_prepared **out, mepic_error *err);

#endif
