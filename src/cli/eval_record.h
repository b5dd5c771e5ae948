/* The results of an evaluation on disk: a CSV file that is only ever appended to, and beside it (FILE.none) the
 * log-probabilities of the first answer token of `none`, n_vocab floats a question in a sparse file.
 *
 * A line that an interruption cut is dropped when the file is opened again. A line of `none` is written after its
 * log-probabilities. One thread. */
#ifndef MEPIC_CLI_EVAL_RECORD_H
#define MEPIC_CLI_EVAL_RECORD_H

#include "base/mem.h"
#include "base/status.h"

#include <stdio.h>

typedef enum mp_eval_context {
    MP_EVAL_NONE,    /* policy none: everything computed */
    MP_EVAL_WITHOUT, /* mepic, chunks computed alone */
    MP_EVAL_GIVEN,   /* mepic, chunks computed after the engine's canonical context */
} mp_eval_context;
const char *mp_eval_context_name(mp_eval_context context); /* "-", "none", "given" */

typedef struct mp_eval_key {
    uint32_t question; /* in the data's order */
    mp_eval_context context;
    uint32_t link_tokens; /* 0 with MP_EVAL_NONE */
} mp_eval_key;

typedef struct mp_eval_line {
    mp_eval_key key;
    double f1, kl, ttft_s;
    bool same; /* answer as that of none */
    uint32_t prompt_tokens, linked_tokens, shared_tokens;
    uint64_t answer_hash;
} mp_eval_line;

typedef struct mp_eval_record {
    FILE *csv;
    int none_fd;
    mp_eval_line *lines;
    size_t n, cap;
} mp_eval_record;

/* `settings`: one line that must be the first of a file that is continued. ERR_IO, ERR_ARGUMENT (other settings),
 * ERR_FORMAT, ERR_NOMEM. */
mepic_status mp_eval_record_open(mp_eval_record *record, const char *path, const char *settings, mepic_error *err);
void mp_eval_record_close(mp_eval_record *record); /* also of a zeroed one */

const mp_eval_line *mp_eval_record_find(const mp_eval_record *record, const mp_eval_key *key); /* until the next add */
bool mp_eval_record_has(const mp_eval_record *record, const mp_eval_key *key);
/* Whether `none` answered the question with these bytes. */
bool mp_eval_record_same_answer(const mp_eval_record *record, uint32_t question, const char *answer, size_t len);
/* Writes and flushes. */
mepic_status mp_eval_record_add(mp_eval_record *record, const mp_eval_line *line, const char *answer, size_t len,
                                mepic_error *err);

mepic_status mp_eval_record_put_none(mp_eval_record *record, uint32_t question, const float *log_p, uint32_t n_vocab,
                                     mepic_error *err);
mepic_status mp_eval_record_get_none(mp_eval_record *record, uint32_t question, float *log_p, uint32_t n_vocab,
                                     mepic_error *err);

#endif
