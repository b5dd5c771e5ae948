#include "cli/xquad.h"

#include "base/mem.h"

#include <jansson.h>
#include <unistd.h>

static const char *const usual_places[] = { "../shared/data/xquad.en.json", "data/xquad.en.json", "xquad.en.json",
                                            NULL };

static size_t count_of(json_t *array) {
    return json_array_size(array); // 0 for anything but an array
}

/* Counts first, so that one allocation each is enough. */
static void count_all(json_t *data, size_t *paragraphs, size_t *questions, size_t *answers) {
    size_t i, j, k;
    json_t *article, *paragraph, *question;
    json_array_foreach(data, i, article) {
        json_array_foreach(json_object_get(article, "paragraphs"), j, paragraph) {
            ++*paragraphs;
            json_array_foreach(json_object_get(paragraph, "qas"), k, question) {
                ++*questions;
                *answers += count_of(json_object_get(question, "answers"));
            }
        }
    }
}

static void add_question(mp_xquad *xquad, json_t *question, size_t *n_answers) {
    const char *text = json_string_value(json_object_get(question, "question"));
    if (!text) return;
    mp_xquad_question *q = &xquad->questions[xquad->n_questions];
    *q = (mp_xquad_question){ .text = text, .answers = &xquad->answers[*n_answers], .paragraph = xquad->n_paragraphs };
    size_t i;
    json_t *answer;
    json_array_foreach(json_object_get(question, "answers"), i, answer) {
        const char *value = json_string_value(json_object_get(answer, "text"));
        if (!value) continue;
        xquad->answers[(*n_answers)++] = value;
        q->n_answers++;
    }
    if (q->n_answers > 0) xquad->n_questions++;
}

static void fill(mp_xquad *xquad, json_t *data) {
    size_t i, j, k, n_answers = 0;
    json_t *article, *paragraph, *question;
    json_array_foreach(data, i, article) {
        json_array_foreach(json_object_get(article, "paragraphs"), j, paragraph) {
            const char *context = json_string_value(json_object_get(paragraph, "context"));
            if (!context) continue;
            json_array_foreach(json_object_get(paragraph, "qas"), k, question)
                add_question(xquad, question, &n_answers);
            xquad->paragraphs[xquad->n_paragraphs++] = context;
        }
    }
}

mepic_status mp_xquad_open(mp_xquad *out, const char *path, mepic_error *err) {
    for (size_t i = 0; !path && usual_places[i]; i++) {
        if (access(usual_places[i], R_OK) == 0) path = usual_places[i];
    }
    if (!path) {
        return mp_fail(err, MEPIC_ERR_IO, "no question file found; give one in SQuAD's JSON layout with --data FILE");
    }
    if (access(path, R_OK) != 0) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be read", path);
    json_error_t parse;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &parse);
    if (!root) return mp_fail(err, MEPIC_ERR_FORMAT, "%s, line %d: %s", path, parse.line, parse.text);
    json_t *data = json_object_get(root, "data");
    size_t n_paragraphs = 0, n_questions = 0, n_answers = 0;
    count_all(data, &n_paragraphs, &n_questions, &n_answers);
    mp_xquad xquad = { .root = root,
                       .paragraphs = mp_calloc(n_paragraphs, sizeof *xquad.paragraphs),
                       .questions = mp_calloc(n_questions, sizeof *xquad.questions),
                       .answers = mp_calloc(n_answers, sizeof *xquad.answers) };
    if (!xquad.paragraphs || !xquad.questions || !xquad.answers) {
        mp_xquad_close(&xquad);
        return mp_fail_nomem(err, path, n_questions * sizeof *xquad.questions);
    }
    fill(&xquad, data);
    if (xquad.n_questions == 0) {
        mp_xquad_close(&xquad);
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s holds no questions in SQuAD's layout (data[].paragraphs[].qas[])",
                       path);
    }
    *out = xquad;
    return MEPIC_OK;
}

void mp_xquad_close(mp_xquad *xquad) {
    mp_free(xquad->paragraphs);
    mp_free(xquad->questions);
    mp_free(xquad->answers);
    json_decref(xquad->root);
    *xquad = (mp_xquad){ 0 };
}
