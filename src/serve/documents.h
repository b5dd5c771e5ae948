/* How documents stand in a prompt: one template for the server and for `mepic run`, so both make the same tokens.
 *
 *   first user message   TEXT  "Document 1:\n"            the number belongs to the place, so it stays outside
 *                        CHUNK title "\n" content         the title belongs to the document, so it is inside
 *                        TEXT  "\n\nDocument 2:\n"
 *                        CHUNK ...
 *                        TEXT  "\n\nQuestion: " message
 *   later ones           TEXT  "Question: " message
 *
 * Without a chat template ("plain") every question begins with "\n\nQuestion: " and ends with "\nAnswer:". A chunk's
 * bytes never depend on the request, and end without newlines: the text behind brings its own. Pure; any thread. */
#ifndef MEPIC_SERVE_DOCUMENTS_H
#define MEPIC_SERVE_DOCUMENTS_H

#include <stdbool.h>
#include <stdint.h>

enum { MP_DOCUMENTS_MAX = 1024, MP_DOCUMENT_LABEL_CAP = 32 };

/* What stands in front of document `index`, counted from 0. */
void mp_document_label(uint32_t index, char out[MP_DOCUMENT_LABEL_CAP]);
/* Around a question when there are documents. */
const char *mp_question_opening(bool first, bool plain);
const char *mp_question_ending(bool plain);

#endif
