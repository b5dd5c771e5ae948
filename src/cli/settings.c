#include "cli/settings.h"

#include "base/file.h"
#include "base/mem.h"
#include "cli/conversation.h"

#include <stdlib.h>
#include <string.h>

/* Of values, for options that take several. The command line is read twice, to find the file and to have the last
 * word. */
enum { SOURCE_FIRST_LOOK = 1, SOURCE_FILE, SOURCE_ENVIRONMENT, SOURCE_COMMAND_LINE };

static const char blanks[] = " \t\r";

/* ---- The file ---------------------------------------------------------------------------------------------------- */

/* Cuts blanks off both ends. */
static char *trim(char *text) {
    text += strspn(text, blanks);
    size_t n = strlen(text);
    while (n > 0 && strchr(blanks, text[n - 1])) n--;
    text[n] = 0;
    return text;
}

/* One line, which is taken apart in place. */
static mepic_status read_line(const mp_option_group *groups, size_t n_groups, const char *where, char *line,
                              mepic_error *err) {
    char *name = trim(line);
    if (!*name || *name == '#') return MEPIC_OK;
    char *equals = strchr(name, '=');
    if (!equals) return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: '%.80s' is not NAME = VALUE", where, name);
    *equals = 0;
    name = trim(name);
    char *value = trim(equals + 1);
    size_t n = strlen(value);
    if (n >= 2 && value[0] == '"' && value[n - 1] == '"') {
        value[n - 1] = 0;
        value++;
    }
    const mp_option *option = mp_option_find(groups, n_groups, name, strlen(name));
    if (option && strcmp(name, "config") == 0) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: a file does not name another one; take 'config' out", where);
    }
    if (option) {
        char label[320];
        snprintf(label, sizeof label, "%s: %s", where, name);
        return mp_option_store(option, SOURCE_FILE, label, value, err);
    }
    const char *nearest = mp_option_nearest(groups, n_groups, name);
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: unknown option '%.40s'; %s%s", where, name,
                   nearest ? "did you mean " : "--help lists what there is", nearest ? nearest : "");
}

static mepic_status read_file(mp_settings *settings, const mp_option_group *groups, size_t n_groups, mepic_error *err) {
    size_t len;
    mepic_error why;
    if (mp_file_read(settings->path, MP_SETTINGS_MAX_BYTES, &settings->text, &len, &why) != MEPIC_OK) {
        return mp_fail(err, why.status, "--config: %s", why.message);
    }
    if (strlen(settings->text) < len) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--config: %s: byte %zu is NUL; it should be text", settings->path,
                       strlen(settings->text) + 1);
    }
    mepic_status status = MEPIC_OK;
    uint32_t number = 1;
    for (char *line = mp_text_begin(settings->text), *next; line && status == MEPIC_OK; line = next, number++) {
        next = strchr(line, '\n');
        if (next) *next++ = 0;
        char where[256];
        snprintf(where, sizeof where, "%.200s, line %u", settings->path, number);
        status = read_line(groups, n_groups, where, line, err);
    }
    return status;
}

/* ---- The environment --------------------------------------------------------------------------------------------- */

/* "max-replies" -> "MEPIC_MAX_REPLIES" */
static void variable_of(const mp_option *option, char *out, size_t cap) {
    snprintf(out, cap, "MEPIC_%s", option->name);
    for (char *c = out; *c; c++) {
        if (*c == '-') *c = '_';
        if (*c >= 'a' && *c <= 'z') *c = (char)(*c - 'a' + 'A');
    }
}

static mepic_status read_environment(const mp_option_group *groups, size_t n_groups, mepic_error *err) {
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t i = 0; i < groups[g].n; i++) {
            char name[64];
            variable_of(&groups[g].options[i], name, sizeof name);
            const char *value = getenv(name);
            mepic_status status = // compose files write NAME= for what is not set
                value && *value ? mp_option_store(&groups[g].options[i], SOURCE_ENVIRONMENT, name, value, err)
                                : MEPIC_OK;
            if (status != MEPIC_OK) return status;
        }
    }
    return MEPIC_OK;
}

/* ---- All of them ------------------------------------------------------------------------------------------------- */

bool mp_settings_begin(mp_settings *settings, const char *command, const char *usage, const mp_option_group *groups,
                       size_t n_groups, int argc, char **argv, int *exit_status) {
    bool help;
    mepic_error err;
    mepic_status status = mp_options_parse_as(groups, n_groups, SOURCE_FIRST_LOOK, argc, argv, &help, &err);
    if (status == MEPIC_OK && !help) {
        if (!settings->path) settings->path = getenv("MEPIC_CONFIG");
        if (settings->path && !*settings->path) settings->path = NULL; // as with the other variables
        if (settings->path) status = read_file(settings, groups, n_groups, &err);
        if (status == MEPIC_OK) status = read_environment(groups, n_groups, &err);
        if (status == MEPIC_OK) {
            status = mp_options_parse_as(groups, n_groups, SOURCE_COMMAND_LINE, argc, argv, &help, &err);
        }
    }
    if (mp_options_end(command, usage, groups, n_groups, status, help, &err, exit_status)) return true;
    mp_settings_clear(settings);
    return false;
}

void mp_settings_clear(mp_settings *settings) {
    mp_free(settings->text);
    settings->text = NULL;
}
