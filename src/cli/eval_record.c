#include "cli/eval_record.h"

#include "base/hash.h"
#include "cli/table.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 8192 };

static const char titles[] =
    "question,canonical,link,f1,kl,same,prompt_tokens,linked_tokens,shared_tokens,ttft_s,answer_hash,answer";

static const char *const context_names[] = { "-", "none", "given" };

const char *mp_eval_context_name(mp_eval_context context) {
    return context_names[context];
}

static mepic_status keep_line(mp_eval_record *record, const mp_eval_line *line, mepic_error *err) {
    if (record->n == record->cap) {
        size_t cap = record->cap ? record->cap * 2 : 256;
        mp_eval_line *grown = mp_realloc(record->lines, cap * sizeof *grown);
        if (!grown) return mp_fail_nomem(err, "results", cap * sizeof *grown);
        record->lines = grown;
        record->cap = cap;
    }
    record->lines[record->n++] = *line;
    return MEPIC_OK;
}

/* The answer's own field is not read back: its hash says whether two are equal. */
static bool parse_line(const char *text, mp_eval_line *out) {
    char context[8];
    unsigned same;
    mp_eval_line line = { 0 };
    int n =
        sscanf(text, "%" SCNu32 ",%7[^,],%" SCNu32 ",%lf,%lf,%u,%" SCNu32 ",%" SCNu32 ",%" SCNu32 ",%lf,%" SCNx64 ",",
               &line.key.question, context, &line.key.link_tokens, &line.f1, &line.kl, &same, &line.prompt_tokens,
               &line.linked_tokens, &line.shared_tokens, &line.ttft_s, &line.answer_hash);
    if (n != 11) return false;
    line.same = same != 0;
    for (uint32_t i = 0; i < 3; i++) {
        if (strcmp(context, context_names[i]) != 0) continue;
        line.key.context = (mp_eval_context)i;
        *out = line;
        return true;
    }
    return false;
}

/* Reads what is there; *end is where whole lines end. */
static mepic_status read_lines(mp_eval_record *record, FILE *file, const char *path, const char *settings, long *end,
                               mepic_error *err) {
    char text[LINE_MAX_BYTES];
    *end = 0;
    for (uint32_t number = 1; fgets(text, sizeof text, file); number++) {
        size_t len = strlen(text);
        if (len == 0 || text[len - 1] != '\n') return MEPIC_OK; // cut by an interruption
        text[len - 1] = 0;
        if (number == 1 && strcmp(text, settings) != 0) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s was made with other settings (%.150s); give another --out",
                           path, text);
        }
        mp_eval_line line;
        if (number > 2) {
            if (!parse_line(text, &line)) {
                return mp_fail(err, MEPIC_ERR_FORMAT, "%s, line %u, is not a result; repair or remove it", path,
                               number);
            }
            mepic_status status = keep_line(record, &line, err);
            if (status != MEPIC_OK) return status;
        }
        *end = ftell(file);
    }
    return MEPIC_OK;
}

mepic_status mp_eval_record_open(mp_eval_record *record, const char *path, const char *settings, mepic_error *err) {
    mp_eval_record r = { .none_fd = -1 };
    char none_path[1024];
    mepic_status status = MEPIC_OK;
    long end = 0;
    int n = snprintf(none_path, sizeof none_path, "%s.none", path);
    if (n < 0 || (size_t)n >= sizeof none_path) return mp_fail(err, MEPIC_ERR_ARGUMENT, "--out: the path is too long");
    r.csv = fopen(path, "a+");
    if (!r.csv) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be opened: %s", path, strerror(errno));
    rewind(r.csv);
    status = read_lines(&r, r.csv, path, settings, &end, err);
    if (status != MEPIC_OK) goto fail;
    r.none_fd = open(none_path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (r.none_fd < 0 || ftruncate(fileno(r.csv), end) != 0) {
        status =
            mp_fail(err, MEPIC_ERR_IO, "%s cannot be written: %s", r.none_fd < 0 ? none_path : path, strerror(errno));
        goto fail;
    }
    fseek(r.csv, 0, SEEK_END);
    if (end == 0) fprintf(r.csv, "%s\n%s\n", settings, titles);
    *record = r;
    return MEPIC_OK;
fail:
    mp_eval_record_close(&r);
    return status;
}

void mp_eval_record_close(mp_eval_record *record) {
    if (!record->csv) return;
    fclose(record->csv);
    if (record->none_fd >= 0) close(record->none_fd);
    mp_free(record->lines);
    *record = (mp_eval_record){ .none_fd = -1 };
}

const mp_eval_line *mp_eval_record_find(const mp_eval_record *record, const mp_eval_key *key) {
    for (size_t i = 0; i < record->n; i++) {
        const mp_eval_key *k = &record->lines[i].key;
        if (k->question == key->question && k->context == key->context && k->link_tokens == key->link_tokens) {
            return &record->lines[i];
        }
    }
    return NULL;
}

bool mp_eval_record_has(const mp_eval_record *record, const mp_eval_key *key) {
    return mp_eval_record_find(record, key) != NULL;
}

static uint64_t hash_answer(const char *answer, size_t len) {
    return mp_hash64(0, answer ? answer : "", len);
}

bool mp_eval_record_same_answer(const mp_eval_record *record, uint32_t question, const char *answer, size_t len) {
    const mp_eval_key none = { .question = question, .context = MP_EVAL_NONE };
    const mp_eval_line *line = mp_eval_record_find(record, &none);
    return line && line->answer_hash == hash_answer(answer, len);
}

mepic_status mp_eval_record_add(mp_eval_record *record, const mp_eval_line *line, const char *answer, size_t len,
                                mepic_error *err) {
    mp_eval_line copy = *line;
    copy.answer_hash = hash_answer(answer, len);
    char flat[1024]; // a result is one line
    size_t n = len < sizeof flat ? len : sizeof flat;
    for (size_t i = 0; i < n; i++) flat[i] = (unsigned char)answer[i] < 0x20 ? ' ' : answer[i];
    fprintf(record->csv, "%u,%s,%u,%.6f,%.6f,%d,%u,%u,%u,%.4f,%016" PRIx64 ",", copy.key.question,
            mp_eval_context_name(copy.key.context), copy.key.link_tokens, copy.f1, copy.kl, copy.same,
            copy.prompt_tokens, copy.linked_tokens, copy.shared_tokens, copy.ttft_s, copy.answer_hash);
    mp_csv_field(record->csv, flat, n);
    fputc('\n', record->csv);
    if (fflush(record->csv) != 0) {
        return mp_fail(err, MEPIC_ERR_IO, "a result could not be written: %s", strerror(errno));
    }
    return keep_line(record, &copy, err);
}

mepic_status mp_eval_record_put_none(mp_eval_record *record, uint32_t question, const float *log_p, uint32_t n_vocab,
                                     mepic_error *err) {
    size_t bytes = n_vocab * sizeof *log_p;
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(record->none_fd, (const char *)log_p + done, bytes - done, (off_t)(question * bytes + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return mp_fail(err, MEPIC_ERR_IO, "log-probabilities could not be written: %s", strerror(errno));
        done += (size_t)n;
    }
    return MEPIC_OK;
}

mepic_status mp_eval_record_get_none(mp_eval_record *record, uint32_t question, float *log_p, uint32_t n_vocab,
                                     mepic_error *err) {
    size_t bytes = n_vocab * sizeof *log_p;
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(record->none_fd, (char *)log_p + done, bytes - done, (off_t)(question * bytes + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            return mp_fail(err, MEPIC_ERR_IO,
                           "the log-probabilities of question %u are not there; the .none file does not "
                           "belong to the results; remove both",
                           question);
        }
        done += (size_t)n;
    }
    return MEPIC_OK;
}
