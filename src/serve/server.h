/* The HTTP server around an engine: what a program needs of src/serve.
 *
 * Two threads read and write all connections (serve/driver.h); one owns the engine (serve/loop.h). A request
 * that waits for tokens is a suspended connection and costs no thread. From open to close the engine belongs to the
 * server. */
#ifndef MEPIC_SERVE_SERVER_H
#define MEPIC_SERVE_SERVER_H

#include "base/log.h"
#include "serve/keys.h"
#include "serve/public.h"
#include "serve/record.h"

enum { MP_SERVED_NAMES_MAX = 16 };

typedef struct mp_server_options {
    mepic_engine *engine;
    const char *host;   /* numeric address or "localhost"; NULL = 127.0.0.1 */
    uint16_t port;      /* 0 = a free one */
    const mp_keys *keys; /* NULL = everybody may ask, and then only over loopback unless allow_open */
    bool allow_open;
    const char *names[MP_SERVED_NAMES_MAX]; /* of the model; the first is told, all are taken */
    uint32_t n_names;
    uint32_t max_replies;     /* that wait or run; 0 = 1024. The engine's max_queued must not be less */
    uint32_t max_per_key;     /* of these, by one key; 0 = no bound of its own */
    uint64_t max_tokens;      /* of their prompts; 0 = 16 Mi */
    uint32_t max_connections; /* 0 = 4096 */
    size_t max_body;          /* bytes; 0 = 8 MiB */
    size_t max_bodies;        /* bytes of all requests and replies together; 0 = 512 MiB. One body always fits */
    uint32_t silence_ms;      /* a stream that says nothing for so long gets a comment; 0 = 4000 */
    uint32_t stuck_ms;        /* a stream's client may take nothing for so long, however much waits; 0 = 2000 */
    uint32_t header_ms;       /* from the connection to the end of the first headers; 0 = 10000 */
    uint32_t body_ms;         /* for a body, and a second more for each KiB of it that came; 0 = 30000 */
    const char *chunk_separator;  /* what stands between two of them in a request's text is a chunk; NULL = off */
    uint32_t chunk_tool_results;  /* tool results of so many tokens are chunks; 0 = off */
    const mp_public *public_documents; /* chunks that all keys share; NULL = none */
    mp_log log;               /* called on several threads */
    void (*record)(void *user, const mp_record *record); /* the same, with the log's user; NULL = none */
} mp_server_options;

typedef struct mp_server mp_server;

/* Takes the address, for who has long to do before the server can be opened; nobody is listened to yet. *out: a socket.
 * Needs no engine. ERR_ARGUMENT, ERR_IO (the address is in use). */
mepic_status mp_server_bind(const mp_server_options *options, int *out, mepic_error *err);
/* bound: of mp_server_bind with the same options, the server takes a copy; -1 = it binds. ERR_ARGUMENT, ERR_IO (the
 * address is in use), ERR_NOMEM. */
mepic_status mp_server_open(const mp_server_options *options, int bound, mp_server **out, mepic_error *err);
uint16_t mp_server_port(const mp_server *server);

/* A descriptor that becomes readable when the last reply has ended, or the engine broke. Reading is not needed: ask. */
int mp_server_event_fd(const mp_server *server);
void mp_server_event_take(mp_server *server); /* makes it unreadable again */
bool mp_server_idle(mp_server *server);       /* no reply waits or runs */
bool mp_server_broken(mp_server *server);

/* New replies are refused with 503, /health too; what is there goes on. */
void mp_server_drain(mp_server *server);
/* Ends what still runs with an error, waits up to two seconds until it was written, and frees everything but the
 * engine. NULL is a no-op. */
void mp_server_close(mp_server *server);

#endif
