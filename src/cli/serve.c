/* `mepic serve`: the HTTP server, until a signal ends it. */
#include "serve/server.h"

#include "base/clock.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/notify.h"
#include "cli/serve_log.h"
#include "cli/settings.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
    N_SERVE_OPTIONS = 16,
    DRAIN_SECONDS = 30,
    REPLIES_DEFAULT = 1024,
    CONNECTIONS_DEFAULT = 4096,
    DESCRIPTORS_BESIDES = 256
};
static const uint64_t NS = 1000000000, FOREVER = UINT64_MAX;

static const char usage_text[] =
    "usage: mepic serve -m FILE [OPTIONS]\n\n"
    "Answers requests of OpenAI's API: POST /v1/chat/completions and /v1/completions, GET /v1/models; of Anthropic's:\n"
    "POST /v1/messages and /v1/messages/count_tokens; besides, POST /tokenize and /detokenize, GET /health, /version\n"
    "and /metrics. The address goes to standard output when it can be reached. SIGTERM or Ctrl-C lets what runs end,\n"
    "a second one does not wait.\n\n" MP_SETTINGS_USAGE;

typedef struct serve_flags {
    mp_engine_flags engine;
    mp_settings settings;
    const char *host, *key_file, *chunk_separator, *public_file;
    mp_texts names;
    uint32_t port, max_replies, max_per_key, max_connections, drain, chunk_tool_results;
    uint64_t max_body, max_bodies;
    uint32_t json_log;
    bool open;
    mp_serve_log lines;
    mp_log log; /* to `lines` */
    mp_option table[N_SERVE_OPTIONS];
} serve_flags;

static const mp_word log_words[] = { { "text", 0 }, { "json", 1 }, { NULL, 0 } };

static mp_option_group serve_group(serve_flags *f) {
    const mp_option options[N_SERVE_OPTIONS] = {
        MP_SETTINGS_OPTION(&f->settings),
        MP_TEXT(0, "host", &f->host, "ADDRESS", "where to listen (default 127.0.0.1)"),
        MP_COUNT(0, "port", &f->port, 0, 65535, "N", "TCP port (default 8080; 0: a free one)"),
        MP_TEXT(0, "api-key-file", &f->key_file, "FILE",
                "keys that may ask, one a line, each with a cache of its own; needed to listen beyond 127.0.0.1"),
        MP_TEXT(0, "public-documents", &f->public_file, "FILE", "SHA-256 of documents that all keys share, one a line"),
        MP_FLAG(0, "allow-everybody", &f->open, "listen beyond 127.0.0.1 without keys"),
        MP_TEXTS('a', "alias", &f->names, "NAME",
                 "name of the model in requests; may be given several times (default: the file's)"),
        MP_COUNT(0, "max-replies", &f->max_replies, 1, 65536, "N",
                 "replies that wait or run; more are refused with 503 (default 1024)"),
        MP_COUNT(0, "max-replies-per-key", &f->max_per_key, 1, 65536, "N",
                 "of these, by one key; more are refused with 429 (default: no bound of its own)"),
        MP_COUNT(0, "max-connections", &f->max_connections, 1, 65536, "N", "open connections (default 4096)"),
        MP_SIZE(0, "max-body", &f->max_body, 1024, 1 << 30, "SIZE", "largest body of a request (default 8M)"),
        MP_SIZE(0, "max-bodies", &f->max_bodies, 1024, UINT64_C(1) << 40, "SIZE",
                "bodies of all requests and replies together; with more, new ones are refused with 503 (default 512M)"),
        MP_TEXT(0, "chunk-separator", &f->chunk_separator, "STRING",
                "what stands between two of them in a request's text is a chunk; they stay in the prompt"),
        MP_COUNT(0, "chunk-tool-results", &f->chunk_tool_results, 1, 1 << 24, "N",
                 "results of tools with N tokens or more are chunks"),
        MP_WORD(0, "log", &f->json_log, log_words, "FORMAT",
                "of what goes to standard error: text (default), or json, an object a line, with each request's start "
                "and end"),
        MP_COUNT(0, "drain", &f->drain, 0, 3600, "SECONDS", "how long SIGTERM waits for what runs (default 30)"),
    };
    memcpy(f->table, options, sizeof options);
    return (mp_option_group){ "Server", f->table, N_SERVE_OPTIONS };
}

/* "dir/model.gguf" -> "model" */
static void name_of_file(const char *path, char *out, size_t cap) {
    const char *slash = strrchr(path, '/');
    snprintf(out, cap, "%s", slash && slash[1] ? slash + 1 : path);
    char *dot = strrchr(out, '.');
    if (dot && dot != out && strcmp(dot, ".gguf") == 0) *dot = 0;
}

/* What lies in files beside the model. */
typedef struct serve_files {
    mp_keys *keys;
    mp_public *public_documents;
} serve_files;

static mepic_status read_files(const serve_flags *f, serve_files *out, mepic_error *err) {
    mepic_error why;
    const char *option = "--api-key-file";
    mepic_status status = f->key_file ? mp_keys_read(f->key_file, &out->keys, &why) : MEPIC_OK;
    if (status == MEPIC_OK && f->public_file) {
        option = "--public-documents";
        status = mp_public_read(f->public_file, &out->public_documents, &why);
    }
    return status == MEPIC_OK ? MEPIC_OK : mp_fail(err, status, "%s: %s", option, why.message);
}

/* All but the engine. file_name stays in use. */
static mepic_status server_options(const serve_flags *f, const serve_files *files, const char *file_name,
                                   mp_server_options *out, mepic_error *err) {
    *out = (mp_server_options){
        .host = f->host,
        .port = (uint16_t)f->port,
        .keys = files->keys,
        .public_documents = files->public_documents,
        .allow_open = f->open,
        .n_names = f->names.n,
        .max_replies = f->max_replies,
        .max_per_key = f->max_per_key,
        .max_connections = f->max_connections,
        .max_body = f->max_body,
        .max_bodies = f->max_bodies,
        .chunk_separator = f->chunk_separator,
        .chunk_tool_results = f->chunk_tool_results,
        .log = f->log,
        .record = mp_serve_log_record,
    };
    if (f->names.n > MP_SERVED_NAMES_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "--alias may be given at most %d times", MP_SERVED_NAMES_MAX);
    }
    for (uint32_t i = 0; i < f->names.n; i++) out->names[i] = f->names.items[i];
    if (f->names.n == 0) {
        out->names[0] = file_name;
        out->n_names = 1;
    }
    return MEPIC_OK;
}

/* Blocks the signals that end the server, for this thread and those it starts, and makes them readable. */
static int catch_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* While a model loads nobody reads the signals. This thread lets one do what it does to any program. */
static void *let_signals_end(void *arg) {
    (void)arg;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    while (pause() != 0) {
    }
    return NULL;
}

static mepic_status load(const serve_flags *f, mp_session *session, mepic_error *err) {
    pthread_t thread;
    bool started = pthread_create(&thread, NULL, let_signals_end, NULL) == 0; // without it, a signal waits
    mepic_status status = mp_session_open(session, &f->engine, NULL, err);
    if (started) {
        pthread_cancel(thread);
        pthread_join(thread, NULL);
    }
    return status;
}

/* Each connection is a descriptor, and many systems give 1,024 unless asked. Where the hard limit is lower than all
 * need, as many are taken as there are descriptors for. */
static void fit_descriptors(serve_flags *f) {
    struct rlimit limit;
    rlim_t wanted = (rlim_t)f->max_connections + DESCRIPTORS_BESIDES;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    rlim_t besides = limit.rlim_cur / 2 < DESCRIPTORS_BESIDES ? limit.rlim_cur / 2 : DESCRIPTORS_BESIDES;
    uint32_t given = f->max_connections, room = (uint32_t)(limit.rlim_cur - besides);
    if (room >= given) return;
    f->max_connections = room;
    mp_log_write(&f->log, MEPIC_LOG_WARN,
                 "%llu open files are allowed, so %u connections are taken at a time; %u need %llu: raise the limit "
                 "(ulimit -n, LimitNOFILE=), or lower --max-connections",
                 (unsigned long long)limit.rlim_cur, f->max_connections, given, (unsigned long long)wanted);
}

static bool take_signal(int fd) {
    struct signalfd_siginfo info;
    return read(fd, &info, sizeof info) == (ssize_t)sizeof info;
}

/* Waits for a signal or for what `server` tells, at most until `deadline`. */
static void wait_for_either(int signals, mp_server *server, uint64_t deadline) {
    struct pollfd fds[] = { { .fd = signals, .events = POLLIN },
                            { .fd = mp_server_event_fd(server), .events = POLLIN } };
    uint64_t now = mp_now_ns(), left = deadline > now ? deadline - now : 0;
    const struct timespec timeout = { .tv_sec = (time_t)(left / NS), .tv_nsec = (long)(left % NS) };
    ppoll(fds, 2, deadline == FOREVER ? NULL : &timeout, NULL);
    mp_server_event_take(server);
}

/* A supervisor that cannot be told is no reason to end. */
static void tell_supervisor(const mp_log *log, const char *state) {
    mepic_error err;
    if (mp_notify(state, &err) != MEPIC_OK) mp_log_write(log, MEPIC_LOG_WARN, "%s", err.message);
}

static int broken(const mp_log *log) {
    mp_log_write(log, MEPIC_LOG_ERROR, "the engine is broken; what ran was ended with an error");
    return MP_EXIT_FAILURE;
}

/* Until the end. Returns the exit status. */
static int run_server(mp_server *server, const mp_log *log, int signals, uint32_t drain_seconds) {
    while (!take_signal(signals)) {
        wait_for_either(signals, server, FOREVER);
        if (mp_server_broken(server)) return broken(log);
    }
    mp_server_drain(server);
    tell_supervisor(log, "STOPPING=1\nSTATUS=draining");
    mp_log_write(log, MEPIC_LOG_WARN, "ending; what runs has %u seconds, a second signal does not wait", drain_seconds);
    uint64_t deadline = mp_now_ns() + drain_seconds * NS;
    while (!mp_server_idle(server) && !mp_server_broken(server) && mp_now_ns() < deadline && !take_signal(signals)) {
        wait_for_either(signals, server, deadline);
    }
    return mp_server_broken(server) ? broken(log) : MP_EXIT_OK;
}

/* The model is loaded behind everything that can be wrong without it. */
static mepic_status open_server(const serve_flags *f, mp_server_options *options, mp_session *session, mp_server **out,
                                mepic_error *err) {
    int bound;
    mepic_status status = mp_server_bind(options, &bound, err);
    if (status != MEPIC_OK) return status;
    status = load(f, session, err);
    if (status == MEPIC_OK) {
        options->engine = session->engine;
        status = mp_server_open(options, bound, out, err);
        if (status != MEPIC_OK) mp_session_close(session);
    }
    close(bound);
    return status;
}

static int serve(const serve_flags *f, const mp_server_options *options, mp_server *server, int signals) {
    bool v6 = f->host && strchr(f->host, ':');
    char where[640];
    snprintf(where, sizeof where, "%s at http://%s%s%s:%u", options->names[0], v6 ? "[" : "",
             f->host ? f->host : "127.0.0.1", v6 ? "]" : "", mp_server_port(server));
    printf("mepic serve: %s\n", where);
    fflush(stdout);
    mp_log_write(&f->log, MEPIC_LOG_INFO, "serving %s", where);
    tell_supervisor(&f->log, "READY=1\nSTATUS=serving");
    int result = run_server(server, &f->log, signals, f->drain);
    mp_server_close(server);
    return result;
}

int mp_cli_serve(int argc, char **argv) {
    serve_flags f = {
        .port = 8080, .max_replies = REPLIES_DEFAULT, .max_connections = CONNECTIONS_DEFAULT, .drain = DRAIN_SECONDS
    };
    const mp_option_group groups[] = { serve_group(&f), mp_engine_flags_group(&f.engine) };
    int result;
    if (!mp_settings_begin(&f.settings, "serve", usage_text, groups, 2, argc, argv, &result)) return result;
    f.engine.max_queued = f.max_replies;
    f.lines = (mp_serve_log){ .file = stderr, .json = f.json_log, .verbose = f.engine.verbose };
    f.log = (mp_log){ .write = mp_serve_log_write, .user = &f.lines };
    f.engine.log = &f.log;
    f.engine.quiet = f.engine.quiet || f.json_log;
    serve_files files = { 0 };
    mepic_error err;
    mepic_status status = read_files(&f, &files, &err);
    int signals = catch_signals();
    fit_descriptors(&f);
    char file_name[256];
    name_of_file(f.engine.model ? f.engine.model : "", file_name, sizeof file_name);
    mp_server_options options;
    mp_session session;
    mp_server *server;
    if (status == MEPIC_OK) status = server_options(&f, &files, file_name, &options, &err);
    if (status == MEPIC_OK) status = open_server(&f, &options, &session, &server, &err);
    if (status == MEPIC_OK) {
        result = serve(&f, &options, server, signals);
        mp_session_close(&session);
    } else {
        mp_log_write(&f.log, MEPIC_LOG_ERROR, "%s", err.message);
        result = mp_exit_status(status);
    }
    close(signals);
    mp_keys_free(files.keys);
    mp_public_free(files.public_documents);
    mp_settings_clear(&f.settings);
    return result;
}
