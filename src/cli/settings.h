/* Options from the environment and from a file, beside the command line.
 *
 * Every option of a command's table can be given in three places. The command line wins over the environment, and the
 * environment over the file:
 *
 *     --max-replies 64        command line
 *     MEPIC_MAX_REPLIES=64    environment
 *     max-replies = 64        a line of the file that --config (or MEPIC_CONFIG) names
 *
 * A flag is yes or no there. In the file, blanks around a value do not count, and double quotes around it keep those
 * inside; a line may begin with # to be a comment. An option that takes several values has a line for each; a stronger
 * place replaces them all. An empty variable is as good as none. Variables that fit no option are not ours: where
 * mepic runs as a service called mepic, there are some by the name of MEPIC_SERVICE_HOST. One thread. */
#ifndef MEPIC_CLI_SETTINGS_H
#define MEPIC_CLI_SETTINGS_H

#include "cli/options.h"

enum { MP_SETTINGS_MAX_BYTES = 1 << 20 };

/* What the values point to. */
typedef struct mp_settings {
    const char *path; /* where an option "config" puts its value */
    char *text;
} mp_settings;

/* The row of a table that names the file. */
#define MP_SETTINGS_OPTION(settings) \
    MP_TEXT(0, "config", &(settings)->path, "FILE", "lines of NAME = VALUE for these options, as said above")

/* mp_options_begin for the three places. `usage` ends with MP_SETTINGS_USAGE. */
bool mp_settings_begin(mp_settings *settings, const char *command, const char *usage, const mp_option_group *groups,
                       size_t n_groups, int argc, char **argv, int *exit_status);
void mp_settings_clear(mp_settings *settings); /* the values go with it */

#define MP_SETTINGS_USAGE \
    "An option can be given as --max-replies 64, as MEPIC_MAX_REPLIES=64 in the environment, or as a line\n" \
    "max-replies = 64 in the file of --config (a flag: quiet = yes); the first of these that is there counts.\n"

#endif
