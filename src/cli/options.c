#include "cli/options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_LEN = 40, HELP_COLUMN = 30, HELP_WIDTH = 110 };

/* ---- Names ------------------------------------------------------------------------------------------------------- */

/* Edits (insert, drop, replace a letter) that turn `a` into `b`. */
static uint32_t edit_distance(const char *a, const char *b) {
    size_t n = strlen(b);
    uint32_t row[NAME_MAX_LEN + 1];
    if (n > NAME_MAX_LEN) return UINT32_MAX;
    for (size_t j = 0; j <= n; j++) row[j] = (uint32_t)j;
    for (size_t i = 0; a[i]; i++) {
        uint32_t diagonal = row[0];
        row[0] = (uint32_t)i + 1;
        for (size_t j = 1; j <= n; j++) {
            uint32_t best = diagonal + (a[i] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[n];
}

static void keep_nearest(const char *given, const char *name, const char **nearest, uint32_t *distance) {
    uint32_t d = edit_distance(given, name);
    if (d < *distance) {
        *distance = d;
        *nearest = name;
    }
}

/* A slip is at most one edit in two letters, two in five, three in longer names (a swap is two). Exclusive. */
static uint32_t slip_limit(const char *given) {
    size_t n = strlen(given);
    return n < 3 ? 2 : n < 6 ? 3 : 4;
}

const char *mp_nearest_name(const char *given, const char *const *names) {
    const char *nearest = NULL;
    uint32_t distance = slip_limit(given);
    for (; *names; names++) keep_nearest(given, *names, &nearest, &distance);
    return nearest;
}

const char *mp_option_nearest(const mp_option_group *groups, size_t n_groups, const char *given) {
    const char *nearest = NULL;
    uint32_t distance = slip_limit(given);
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t i = 0; i < groups[g].n; i++) keep_nearest(given, groups[g].options[i].name, &nearest, &distance);
    }
    return nearest;
}

static mepic_status fail_unknown(const mp_option_group *groups, size_t n_groups, const char *given, mepic_error *err) {
    const char *nearest = mp_option_nearest(groups, n_groups, given);
    if (nearest) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "unknown option --%s; did you mean --%s?", given, nearest);
    }
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "unknown option --%s; --help lists what there is", given);
}

const mp_option *mp_option_find(const mp_option_group *groups, size_t n_groups, const char *name, size_t len) {
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t i = 0; i < groups[g].n; i++) {
            const mp_option *option = &groups[g].options[i];
            if (strlen(option->name) == len && memcmp(option->name, name, len) == 0) return option;
        }
    }
    return NULL;
}

static const mp_option *find_letter(const mp_option_group *groups, size_t n_groups, char letter) {
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t i = 0; i < groups[g].n; i++) {
            if (groups[g].options[i].letter == letter) return &groups[g].options[i];
        }
    }
    return NULL;
}

/* ---- Values ------------------------------------------------------------------------------------------------------ */

/* Digits and nothing else; `*end` is where they end. False: none, or more than 64 bits. */
static bool read_digits(const char *s, const char **end, uint64_t *out) {
    if (*s < '0' || *s > '9') return false;
    char *stop;
    errno = 0;
    unsigned long long value = strtoull(s, &stop, 10);
    if (errno != 0) return false;
    *end = stop;
    *out = value;
    return true;
}

static bool read_whole(const char *s, uint64_t *out) {
    const char *end;
    uint64_t value;
    if (!read_digits(s, &end, &value) || *end) return false;
    *out = value;
    return true;
}

static bool read_size(const char *s, uint64_t *out) {
    const char *end;
    uint64_t value;
    if (!read_digits(s, &end, &value)) return false;
    static const char suffixes[] = "KMGT";
    uint32_t shift = 0;
    if (*end) {
        const char *suffix = strchr(suffixes, *end >= 'a' && *end <= 'z' ? *end - 'a' + 'A' : *end);
        if (!suffix || end[1]) return false;
        shift = 10 * ((uint32_t)(suffix - suffixes) + 1);
    }
    if (value > UINT64_MAX >> shift) return false;
    *out = value << shift;
    return true;
}

static bool read_real(const char *s, double *out) {
    bool starts = (*s >= '0' && *s <= '9') || *s == '.' || *s == '-';
    if (!starts) return false; // strtod would take blanks, "inf" and "nan"
    char *end;
    errno = 0;
    double value = strtod(s, &end);
    if (errno != 0 || end == s || *end || value != value) return false;
    *out = value;
    return true;
}

static bool read_word(const mp_word *words, const char *s, uint32_t *out) {
    for (; words && words->name; words++) {
        if (strcmp(words->name, s) == 0) {
            *out = words->value;
            return true;
        }
    }
    return false;
}

static bool read_count(const mp_option *option, const char *s, uint32_t *out) {
    if (read_word(option->words, s, out)) return true;
    uint64_t value;
    if (!read_whole(s, &value) || value < option->min || value > option->max || value > UINT32_MAX) return false;
    *out = (uint32_t)value;
    return true;
}

static bool read_counts(const mp_option *option, const char *s, mp_counts *out) {
    mp_counts counts = { .n = 0 };
    for (;;) {
        size_t len = strcspn(s, ",");
        char item[24];
        if (len >= sizeof item || counts.n == MP_COUNTS_MAX) return false;
        memcpy(item, s, len);
        item[len] = 0;
        if (!read_count(option, item, &counts.items[counts.n++])) return false;
        if (!s[len]) break;
        s += len + 1;
    }
    *out = counts;
    return true;
}

/* "none, prefix or mepic" */
static void list_words(const mp_word *words, char *out, size_t cap) {
    size_t used = 0;
    out[0] = 0;
    for (; words && words->name; words++) {
        const char *join = used == 0 ? "" : words[1].name ? ", " : " or ";
        int n = snprintf(out + used, cap - used, "%s%s", join, words->name);
        if (n < 0 || (size_t)n >= cap - used) return;
        used += (size_t)n;
    }
}

static void format_size(uint64_t bytes, char *out, size_t cap) {
    static const char suffixes[] = "\0KMGT";
    uint32_t k = 0;
    while (k < 4 && bytes >= 1024 && bytes % 1024 == 0) {
        bytes /= 1024;
        k++;
    }
    snprintf(out, cap, "%llu%.1s", (unsigned long long)bytes, &suffixes[k]);
}

/* What an option accepts, to end the sentence "... is not". */
static void describe_range(const mp_option *option, char *out, size_t cap) {
    char words[160], low[24], high[24];
    list_words(option->words, words, sizeof words);
    unsigned long long min = option->min, max = option->max;
    switch (option->kind) {
    case MP_OPTION_WORD: snprintf(out, cap, "%s", words); return;
    case MP_OPTION_SIZE:
        format_size(option->min, low, sizeof low);
        format_size(option->max, high, sizeof high);
        snprintf(out, cap, "a size from %s to %s, such as 512M or 2G", low, high);
        return;
    case MP_OPTION_REAL: snprintf(out, cap, "a number from %g to %g", option->low, option->high); return;
    case MP_OPTION_COUNTS:
        snprintf(out, cap, "a list of at most %d, separated by commas, each %s%sa whole number from %llu to %llu",
                 MP_COUNTS_MAX, words, words[0] ? " or " : "", min, max);
        return;
    default:
        snprintf(out, cap, "%s%sa whole number from %llu to %llu", words, words[0] ? " or " : "", min, max);
        return;
    }
}

static mepic_status fail_value(const mp_option *option, const char *label, const char *value, mepic_error *err) {
    char range[256];
    describe_range(option, range, sizeof range);
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: '%.80s' is not %s", label, value, range);
}

static mepic_status add_text(mp_texts *texts, uint32_t source, const char *label, const char *value, mepic_error *err) {
    if (texts->source != source) texts->n = 0;
    texts->source = source;
    if (texts->n == MP_TEXTS_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s may be given at most %d times", label, MP_TEXTS_MAX);
    }
    texts->items[texts->n++] = value;
    return MEPIC_OK;
}

mepic_status mp_option_store(const mp_option *option, uint32_t source, const char *label, const char *value,
                             mepic_error *err) {
    static const mp_word yes_words[] = { { "yes", 1 },   { "true", 1 }, { "1", 1 }, { "no", 0 },
                                         { "false", 0 }, { "0", 0 },    { NULL, 0 } };
    uint64_t number;
    uint32_t word;
    double real;
    switch (option->kind) {
    case MP_OPTION_FLAG:
        if (!value || read_word(yes_words, value, &word)) {
            *option->to.flag = !value || word;
            return MEPIC_OK;
        }
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: '%.80s' is not yes or no", label, value);
    case MP_OPTION_TEXT: *option->to.text = value; return MEPIC_OK;
    case MP_OPTION_TEXTS: return add_text(option->to.texts, source, label, value, err);
    case MP_OPTION_WORD:
        return read_word(option->words, value, option->to.count) ? MEPIC_OK : fail_value(option, label, value, err);
    case MP_OPTION_COUNT:
        return read_count(option, value, option->to.count) ? MEPIC_OK : fail_value(option, label, value, err);
    case MP_OPTION_COUNTS:
        return read_counts(option, value, option->to.counts) ? MEPIC_OK : fail_value(option, label, value, err);
    case MP_OPTION_SIZE:
    case MP_OPTION_NUMBER: {
        bool ok = option->kind == MP_OPTION_SIZE ? read_size(value, &number) : read_whole(value, &number);
        if (!ok || number < option->min || number > option->max) return fail_value(option, label, value, err);
        *option->to.number = number;
        return MEPIC_OK;
    }
    case MP_OPTION_REAL:
        if (!read_real(value, &real) || real < option->low || real > option->high)
            return fail_value(option, label, value, err);
        *option->to.real = real;
        return MEPIC_OK;
    }
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: unknown kind of option", label);
}

/* ---- Parsing ----------------------------------------------------------------------------------------------------- */

/* Splits one argument into option and attached value. */
static mepic_status find_option(const mp_option_group *groups, size_t n_groups, const char *arg, const mp_option **out,
                                const char **value, mepic_error *err) {
    const mp_option *option;
    *value = NULL;
    if (arg[0] != '-' || arg[1] == 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "unexpected argument '%.80s'; every argument is an option", arg);
    }
    if (arg[1] == '-') {
        size_t len = strcspn(arg + 2, "=");
        option = mp_option_find(groups, n_groups, arg + 2, len);
        if (!option) {
            char name[NAME_MAX_LEN + 1];
            snprintf(name, sizeof name, "%.*s", (int)(len < NAME_MAX_LEN ? len : NAME_MAX_LEN), arg + 2);
            return fail_unknown(groups, n_groups, name, err);
        }
        if (arg[2 + len] == '=') *value = arg + 2 + len + 1;
    } else {
        option = find_letter(groups, n_groups, arg[1]);
        if (!option) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "unknown option -%.20s; --help lists what there is", arg + 1);
        }
        if (arg[2]) *value = arg + 2;
    }
    *out = option;
    return MEPIC_OK;
}

mepic_status mp_options_parse_as(const mp_option_group *groups, size_t n_groups, uint32_t source, int argc, char **argv,
                                 bool *help, mepic_error *err) {
    *help = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            *help = true;
            return MEPIC_OK;
        }
        const mp_option *option = NULL;
        const char *value = NULL;
        mepic_status status = find_option(groups, n_groups, argv[i], &option, &value, err);
        if (status != MEPIC_OK) return status;
        // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): found, since the status is OK
        if (option->kind == MP_OPTION_FLAG) {
            if (value) return mp_fail(err, MEPIC_ERR_ARGUMENT, "--%s takes no value", option->name);
        } else if (!value) {
            if (i + 1 == argc) {
                return mp_fail(err, MEPIC_ERR_ARGUMENT, "--%s needs a value: %s", option->name, option->value);
            }
            value = argv[++i];
        }
        char label[NAME_MAX_LEN + 3];
        snprintf(label, sizeof label, "--%s", option->name);
        status = mp_option_store(option, source, label, value, err);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

mepic_status mp_options_parse(const mp_option_group *groups, size_t n_groups, int argc, char **argv, bool *help,
                              mepic_error *err) {
    return mp_options_parse_as(groups, n_groups, 0, argc, argv, help, err);
}

/* ---- Help -------------------------------------------------------------------------------------------------------- */

static void print_wrapped(FILE *file, const char *text) {
    size_t column = HELP_COLUMN;
    while (*text) {
        size_t word = strcspn(text, " ");
        if (column > HELP_COLUMN && column + word > HELP_WIDTH) {
            fprintf(file, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        }
        fprintf(file, "%.*s", (int)word, text);
        column += word + 1;
        text += word;
        if (*text) text++;
        if (*text && column + strcspn(text, " ") <= HELP_WIDTH) fputc(' ', file);
    }
    fputc('\n', file);
}

void mp_options_help(FILE *file, const mp_option_group *groups, size_t n_groups) {
    for (size_t g = 0; g < n_groups; g++) {
        fprintf(file, "\n%s:\n", groups[g].title);
        for (size_t i = 0; i < groups[g].n; i++) {
            const mp_option *option = &groups[g].options[i];
            char left[64];
            char letter[5] = "    ";
            if (option->letter) snprintf(letter, sizeof letter, "-%c, ", option->letter);
            int n =
                snprintf(left, sizeof left, "  %s--%s %s", letter, option->name, option->value ? option->value : "");
            fprintf(file, "%-*s", HELP_COLUMN, left);
            if (n >= HELP_COLUMN) fprintf(file, "\n%*s", HELP_COLUMN, "");
            print_wrapped(file, option->help);
        }
    }
}

bool mp_options_begin(const char *command, const char *usage, const mp_option_group *groups, size_t n_groups, int argc,
                      char **argv, int *exit_status) {
    bool help = false;
    mepic_error err;
    mepic_status status = mp_options_parse(groups, n_groups, argc, argv, &help, &err);
    return mp_options_end(command, usage, groups, n_groups, status, help, &err, exit_status);
}

bool mp_options_end(const char *command, const char *usage, const mp_option_group *groups, size_t n_groups,
                    mepic_status status, bool help, const mepic_error *err, int *exit_status) {
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic %s: %s\n", command, err->message);
        *exit_status = MP_EXIT_USAGE;
        return false;
    }
    if (help) {
        fputs(usage, stdout);
        mp_options_help(stdout, groups, n_groups);
        *exit_status = MP_EXIT_OK;
        return false;
    }
    return true;
}
