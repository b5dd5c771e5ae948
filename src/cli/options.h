/* Command line options: tables, strict parsing, help.
 *
 * A command describes its options in groups, each option with the place its value goes to; parsing writes there and
 * nowhere else. `--name VALUE`, `--name=VALUE`, `-x VALUE` and `-xVALUE` are the same; the last one given wins; there
 * are no positional arguments. Every refused value is named together with what would be accepted. Values point into
 * argv. Options can come from more than the command line: cli/settings.h. Any thread. */
#ifndef MEPIC_CLI_OPTIONS_H
#define MEPIC_CLI_OPTIONS_H

#include "base/status.h"

#include <stdio.h>

/* How a program of mepic ends. */
enum { MP_EXIT_OK = 0, MP_EXIT_FAILURE = 1, MP_EXIT_USAGE = 2 };

typedef enum mp_option_kind {
    MP_OPTION_FLAG,   /* no value */
    MP_OPTION_TEXT,
    MP_OPTION_TEXTS,  /* may be given several times */
    MP_OPTION_WORD,   /* one of `words` */
    MP_OPTION_COUNT,  /* whole number in min..max, or one of `words` */
    MP_OPTION_COUNTS, /* COUNT,COUNT,... */
    MP_OPTION_SIZE,   /* bytes in min..max: 512M, 2G, 1048576 */
    MP_OPTION_NUMBER, /* whole number of 64 bits in min..max */
    MP_OPTION_REAL,   /* low..high */
} mp_option_kind;

typedef struct mp_word {
    const char *name; /* NULL ends a list */
    uint32_t value;
} mp_word;

enum { MP_TEXTS_MAX = 1024, MP_COUNTS_MAX = 32 };
typedef struct mp_texts {
    const char *items[MP_TEXTS_MAX];
    uint32_t n;
    uint32_t source; /* who gave them: a value of another source begins anew */
} mp_texts;
typedef struct mp_counts {
    uint32_t items[MP_COUNTS_MAX];
    uint32_t n;
} mp_counts;

typedef struct mp_option {
    const char *name; /* without the dashes */
    char letter;      /* 0 = none */
    mp_option_kind kind;
    union {
        bool *flag;
        const char **text;
        mp_texts *texts;
        uint32_t *count; /* WORD, COUNT */
        mp_counts *counts;
        uint64_t *number; /* SIZE, NUMBER */
        double *real;
    } to;
    const char *value; /* placeholder in the help; NULL for a flag */
    const char *help;
    uint64_t min, max;
    double low, high;
    const mp_word *words;
} mp_option;

/* Rows of a table: letter or 0, name, where the value goes, what it may be, placeholder, help. */
#define MP_FLAG(c, n, out, h) { .letter = c, .name = n, .kind = MP_OPTION_FLAG, .to.flag = out, .help = h }
#define MP_TEXT(c, n, out, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_TEXT, .to.text = out, .value = v, .help = h }
#define MP_TEXTS(c, n, out, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_TEXTS, .to.texts = out, .value = v, .help = h }
#define MP_WORD(c, n, out, list, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_WORD, .to.count = out, .words = list, .value = v, .help = h }
#define MP_COUNT_OR(c, n, out, a, b, list, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_COUNT, .to.count = out, .min = a, .max = b, .words = list, .value = v, \
      .help = h }
#define MP_COUNT(c, n, out, a, b, v, h) MP_COUNT_OR(c, n, out, a, b, NULL, v, h)
#define MP_COUNTS(c, n, out, a, b, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_COUNTS, .to.counts = out, .min = a, .max = b, .value = v, .help = h }
#define MP_SIZE(c, n, out, a, b, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_SIZE, .to.number = out, .min = a, .max = b, .value = v, .help = h }
#define MP_NUMBER(c, n, out, a, b, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_NUMBER, .to.number = out, .min = a, .max = b, .value = v, .help = h }
#define MP_REAL(c, n, out, a, b, v, h) \
    { .letter = c, .name = n, .kind = MP_OPTION_REAL, .to.real = out, .low = a, .high = b, .value = v, .help = h }

typedef struct mp_option_group {
    const char *title;
    const mp_option *options;
    size_t n;
} mp_option_group;

/* argv[0] is skipped. ERR_ARGUMENT with the sentence for the user. `*help` becomes true at -h or --help, and what
 * follows is not looked at. */
mepic_status mp_options_parse(const mp_option_group *groups, size_t n_groups, int argc, char **argv, bool *help,
                              mepic_error *err);
void mp_options_help(FILE *file, const mp_option_group *groups, size_t n_groups);

/* What a command does first: parse, print help or the error. False: the command ends with *exit_status. */
bool mp_options_begin(const char *command, const char *usage, const mp_option_group *groups, size_t n_groups, int argc,
                      char **argv, int *exit_status);

/* ---- For those that bring options from elsewhere ---------------------------------------------------------------- */

const mp_option *mp_option_find(const mp_option_group *groups, size_t n_groups, const char *name, size_t len);
/* The name nearest to `given`, as below. */
const char *mp_option_nearest(const mp_option_group *groups, size_t n_groups, const char *given);
/* Puts a value, which is kept by pointer, where the option says. `label` is what messages call the option. A flag's
 * value is yes or no, NULL is yes. `source` is a number; the command line's is 0. */
mepic_status mp_option_store(const mp_option *option, uint32_t source, const char *label, const char *value,
                             mepic_error *err);
mepic_status mp_options_parse_as(const mp_option_group *groups, size_t n_groups, uint32_t source, int argc, char **argv,
                                 bool *help, mepic_error *err);
/* What begin does with the outcome of parsing. */
bool mp_options_end(const char *command, const char *usage, const mp_option_group *groups, size_t n_groups,
                    mepic_status status, bool help, const mepic_error *err, int *exit_status);

/* The name nearest to `given` if it is near enough to be a slip, else NULL; `names` ends with NULL. */
const char *mp_nearest_name(const char *given, const char *const *names);

#endif
