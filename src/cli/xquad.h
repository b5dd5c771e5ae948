/* Questions over paragraphs, from a JSON file in SQuAD's layout: data[].paragraphs[].{context, qas[].{question,
 * answers[].text}}. Immutable after open. */
#ifndef MEPIC_CLI_XQUAD_H
#define MEPIC_CLI_XQUAD_H

#include "base/status.h"

typedef struct mp_xquad_question {
    const char *text;
    const char *const *answers; /* [n_answers] */
    uint32_t n_answers;
    uint32_t paragraph;
} mp_xquad_question;

typedef struct mp_xquad {
    const char **paragraphs; /* [n_paragraphs] */
    mp_xquad_question *questions;
    uint32_t n_paragraphs, n_questions;
    const char **answers; /* of all questions */
    void *root;           /* the parsed file, which owns the strings */
} mp_xquad;

/* path NULL: where the project's data lies, or an error that says to give a file. ERR_IO, ERR_FORMAT, ERR_NOMEM. */
mepic_status mp_xquad_open(mp_xquad *out, const char *path, mepic_error *err);
void mp_xquad_close(mp_xquad *xquad);

#endif
