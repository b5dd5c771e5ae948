/* The options that every command with an engine shares, and the engine they open.
 *
 * Owns the translation from words on the command line to mepic_engine_options. One thread. */
#ifndef MEPIC_CLI_ENGINE_FLAGS_H
#define MEPIC_CLI_ENGINE_FLAGS_H

#include "base/log.h"
#include "cli/options.h"
#include "cli/progress.h"

enum { MP_ENGINE_FLAGS_N = 20 };

typedef struct mp_engine_flags {
    const char *model, *canonical_context, *cache_dir, *isa, *device;
    uint32_t threads, page_size, pages, context, max_running, step_tokens, kv_type, weights, reuse, link_tokens;
    uint32_t eviction;
    uint32_t max_queued; /* these two are no options of this group: set by the command */
    const mp_log *log;   /* where the engine's words go; NULL: standard error */
    uint64_t kv_memory;
    double gpu_memory;
    bool quiet, verbose;
    mp_option table[MP_ENGINE_FLAGS_N];
} mp_engine_flags;

/* Fills the group; it points into `flags`. */
mp_option_group mp_engine_flags_group(mp_engine_flags *flags);

extern const mp_word mp_reuse_words[];       /* none, prefix, mepic */
extern const mp_word mp_link_words[];        /* all, none, 0 */
const char *mp_reuse_name(mepic_reuse reuse); /* "mepic" */

/* An open engine and what its programs need beside it. */
typedef struct mp_session {
    mepic_engine *engine;
    mepic_model_info info;
    mp_progress progress;
    const mp_log *log; /* of the flags */
    bool verbose;
    uint64_t open_ns; /* time it took to open */
    uint32_t threads;
    char cache_dir[512];
} mp_session;

/* Opens the engine with a progress line. `adjust` (or NULL) changes the options last. ERR_ARGUMENT without a model. */
mepic_status mp_session_open(mp_session *session, const mp_engine_flags *flags,
                             void (*adjust)(mepic_engine_options *options), mepic_error *err);
void mp_session_close(mp_session *session);

/* The exit status of a program whose engine did not open: usage for what the user gave, failure for the machine. */
int mp_exit_status(mepic_status status);

/* Opens for `command`; prints the error. False: end with *exit_status. */
bool mp_session_begin(mp_session *session, const char *command, const mp_engine_flags *flags,
                      void (*adjust)(mepic_engine_options *options), int *exit_status);

#endif
