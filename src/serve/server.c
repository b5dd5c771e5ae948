/* The daemon: sockets, limits, the checks every request passes before its route sees it. */
#include "serve/server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "serve/exchange.h"
#include "serve/json.h"

enum {
    HEADER_BYTES_MAX = 32 << 10,
    HEADERS_MAX = 64,
    PATH_BYTES_MAX = 1024,
    IDLE_SECONDS = 75,
    BODY_BYTES_PER_SECOND = 1024,
    REFUSED_BODY_MAX = 64 << 10,
    KEEPALIVE_SECONDS = 30,
    FLUSH_SECONDS = 2,
    STREAM_BLOCK = 16 << 10,
    JSON_BYTES_MAX = 256 << 20,
    SEND_BUFFER = 128 << 10, /* a socket's: what a slow reader may leave in the system, times two */
};

static const uint64_t SECOND = 1000000000, MILLISECOND = 1000000;

/* ---- Answers ----------------------------------------------------------------------------------------------------- */

static enum MHD_Result queue(mp_exchange *x, unsigned status, const char *type, struct MHD_Response *response) {
    if (!response) {
        x->unanswered = true;
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(response, "X-Request-Id", x->request_id);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    if (status == 401) MHD_add_response_header(response, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
    if (x->other) MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, x->other->method);
    /* What is left of a refused body is not read. */
    if (!x->body_complete) MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    if (x->refused.retry_after > 0) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%u", x->refused.retry_after);
        MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, seconds);
    }
    enum MHD_Result result = MHD_queue_response(x->connection, status, response);
    MHD_destroy_response(response);
    x->unanswered = result != MHD_YES;
    if (!x->unanswered) x->status = status;
    return result;
}

bool mp_exchange_hold(mp_exchange *x, size_t bytes) {
    mp_server *server = x->server;
    size_t before = x->held;
    x->held = bytes;
    return atomic_fetch_add(&server->held, bytes - before) + bytes - before <= server->options.max_bodies;
}

enum MHD_Result mp_exchange_answer(mp_exchange *x, unsigned status, const char *type, mp_buf *body) {
    mp_exchange_hold(x, x->held + body->cap);
    struct MHD_Response *response = MHD_create_response_from_buffer_with_free_callback(body->len, body->data, mp_free);
    if (!response) return queue(x, status, type, NULL);
    *body = (mp_buf){ .limit = body->limit };
    return queue(x, status, type, response);
}

enum MHD_Result mp_exchange_answer_json(mp_exchange *x, unsigned status, json_t *value) {
    mp_buf body = { .limit = JSON_BYTES_MAX };
    if (mp_json_write(value, &body)) return mp_exchange_answer(x, status, "application/json", &body);
    mp_buf_clear(&body);
    return mp_exchange_lose(x);
}

enum MHD_Result mp_exchange_refuse(mp_exchange *x, const mp_api_error *error) {
    const mp_route *route = x->route ? x->route : x->other;
    const mp_dialect *dialect = route ? route->dialect : &mp_openai_chat;
    mp_buf body = { .limit = 16 << 10 };
    if (error != &x->refused) x->refused = *error;
    if (dialect->error(error, &body)) return mp_exchange_answer(x, error->status, "application/json", &body);
    mp_buf_clear(&body);
    /* In the words of all dialects. */
    static char out_of_memory[] = "{\"type\":\"error\",\"error\":{\"message\":\"out of memory\",\"type\":\"api_error\","
                                  "\"param\":null,\"code\":\"out_of_memory\"}}";
    return queue(x, error->status, "application/json",
                 MHD_create_response_from_buffer(sizeof out_of_memory - 1, out_of_memory, MHD_RESPMEM_PERSISTENT));
}

enum MHD_Result mp_exchange_lose(mp_exchange *x) {
    mp_api_error err;
    mp_refuse(&err, 500, "out_of_memory", NULL, "out of memory for the answer");
    return mp_exchange_refuse(x, &err);
}

enum MHD_Result mp_exchange_stream(mp_exchange *x, const char *type, MHD_ContentReaderCallback reader) {
    struct MHD_Response *response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, STREAM_BLOCK, reader, x, NULL);
    if (response) MHD_add_response_header(response, "X-Accel-Buffering", "no");
    return queue(x, 200, type, response);
}

/* ---- Records ----------------------------------------------------------------------------------------------------- */

void mp_exchange_record(const mp_exchange *x, bool end, bool gone) {
    const mp_server_options *o = &x->server->options;
    if (!o->record) return;
    const mp_feed *feed = x->accepted ? x->feed : NULL;
    const mp_api_error *why = &x->refused;
    const mp_record record = {
        .end = end,
        .id = x->request_id,
        .path = x->route ? x->route->path : NULL,
        .key = x->key ? x->key->name : NULL,
        .replies = feed ? feed->n_choices : 0,
        .stream = feed && x->streaming,
        .prompt_tokens = feed ? feed->n_tokens : 0,
        .status = !end   ? 0
                  : gone ? MP_STATUS_CLIENT_GONE
                         : x->status,
        .code = end && why->status ? why->code : NULL,
        .error = end && why->status ? why->message : NULL,
        .usage = x->usage,
        .total_ns = mp_now_ns() - x->begun_ns,
    };
    o->record(o->log.user, &record);
}

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

static const char *header(struct MHD_Connection *connection, const char *name) {
    return MHD_lookup_connection_value(connection, MHD_HEADER_KIND, name);
}

typedef struct header_counts {
    uint32_t all, lengths, encodings;
    const char *malformed; /* a name; NULL: none */
} header_counts;

static bool is_or_begins_with(const char *name, const char *known, uint32_t *n_known) {
    size_t len = strlen(known);
    if (strncasecmp(name, known, len) != 0) return false;
    *n_known += !name[len];
    return name[len];
}

/* libmicrohttpd leaves a blank before the colon in the name, and appends a folded line to the name, not to the value,
 * so what others read as a length can have another name here, and the other way round. A name that something was
 * appended to stands elsewhere in memory; one that was sent like that, directly in front of its value. */
static bool is_malformed(header_counts *counts, const char *name, const char *value) {
    static const char token[] = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    size_t len = strlen(name);
    bool folded = value && (uintptr_t)value - (uintptr_t)name - len - 1 > HEADER_BYTES_MAX;
    bool longer = is_or_begins_with(name, MHD_HTTP_HEADER_CONTENT_LENGTH, &counts->lengths);
    longer = is_or_begins_with(name, MHD_HTTP_HEADER_TRANSFER_ENCODING, &counts->encodings) || longer;
    /* A carriage return on its own is a part of a value here, and the end of a line to others. */
    bool broken = value && strchr(value, '\r');
    return len == 0 || strspn(name, token) != len || folded || longer || broken;
}

static enum MHD_Result count_header(void *cls, enum MHD_ValueKind kind, const char *name, const char *value) {
    (void)kind;
    header_counts *counts = cls;
    counts->all++;
    if (is_malformed(counts, name, value)) counts->malformed = name;
    return MHD_YES;
}

/* Two ways to tell where a body ends are how one request is smuggled behind another. */
static bool check_framing(mp_exchange *x, mp_api_error *err) {
    header_counts counts = { 0 };
    MHD_get_connection_values(x->connection, MHD_HEADER_KIND, count_header, &counts);
    if (counts.all > HEADERS_MAX) {
        return mp_refuse(err, 431, "too_many_headers", NULL, "the request has %u headers; at most %d", counts.all,
                         HEADERS_MAX);
    }
    if (counts.malformed) {
        return mp_refuse(
            err, 400, "malformed_header", NULL,
            "the header '%.60s' is malformed: a name has no blanks, ends at the colon, and its value is one "
            "line",
            counts.malformed);
    }
    if (counts.lengths + counts.encodings > 1) {
        return mp_refuse(err, 400, "ambiguous_length", NULL,
                         "the request gives its length more than once (Content-Length, Transfer-Encoding)");
    }
    const char *length = header(x->connection, MHD_HTTP_HEADER_CONTENT_LENGTH);
    if (length && (strlen(length) > 18 || strtoull(length, NULL, 10) > x->body.limit)) {
        return mp_refuse(err, 413, "body_too_large", NULL, "the body has %.40s bytes; at most %zu", length,
                         x->body.limit);
    }
    const char *transfer = header(x->connection, MHD_HTTP_HEADER_TRANSFER_ENCODING);
    if (transfer && strcasecmp(transfer, "chunked") != 0) {
        return mp_refuse(err, 400, "transfer_encoding", NULL, "Transfer-Encoding '%.40s' is not taken", transfer);
    }
    return true;
}

/* Without keys, being on this machine is what lets a client in. A web page elsewhere that has its own name point here
 * would be let in with its reader's browser, but for the name it sends. */
static bool check_host(const mp_exchange *x, mp_api_error *err) {
    const mp_server_options *o = &x->server->options;
    const char *given = header(x->connection, MHD_HTTP_HEADER_HOST);
    if (o->keys || o->allow_open || !given) return true;
    char host[80];
    bool bracket = given[0] == '[';
    snprintf(host, sizeof host, "%.*s", (int)strcspn(given + bracket, bracket ? "]" : ":"), given + bracket);
    unsigned char address[16];
    bool local = !bracket && strcasecmp(host, "localhost") == 0;
    if (local || inet_pton(bracket ? AF_INET6 : AF_INET, host, address) == 1) return true;
    return mp_refuse(err, 403, "host", NULL,
                     "the name '%.60s' in the header Host is not this machine's; without API keys only localhost and "
                     "addresses are taken",
                     host);
}

static bool check_coding(const mp_exchange *x, mp_api_error *err) {
    const char *coding = header(x->connection, MHD_HTTP_HEADER_CONTENT_ENCODING);
    if (coding && strcasecmp(coding, "identity") != 0) {
        return mp_refuse(err, 415, "content_encoding", NULL, "a body in Content-Encoding '%.40s' is not taken", coding);
    }
    return true;
}

static bool check_key(mp_exchange *x, mp_api_error *err) {
    const mp_keys *keys = x->server->options.keys;
    if (!keys || x->route->access == MP_ACCESS_PUBLIC) return true;
    static const char bearer[] = "Bearer ";
    const char *given = header(x->connection, MHD_HTTP_HEADER_AUTHORIZATION);
    if (given && strncasecmp(given, bearer, sizeof bearer - 1) == 0)
        given += sizeof bearer - 1;
    else
        given = header(x->connection, "x-api-key");
    if (!given) {
        return mp_refuse(err, 401, "missing_api_key", NULL, "no API key; send the header 'Authorization: Bearer KEY'");
    }
    if (!mp_keys_find(keys, given, strlen(given), &x->key)) {
        return mp_refuse_memory(err, "the API key");
    }
    return x->key || mp_refuse(err, 401, "invalid_api_key", NULL, "the API key is not known here");
}

/* A form is what a web page may send to another site without asking: not taken. */
static bool check_type(const mp_exchange *x, mp_api_error *err) {
    if (strcmp(x->route->method, "POST") != 0) return true;
    static const char json[] = "application/json";
    const char *type = header(x->connection, MHD_HTTP_HEADER_CONTENT_TYPE);
    if (type && strncasecmp(type, json, sizeof json - 1) == 0 && strchr("; \t", type[sizeof json - 1])) return true;
    return mp_refuse(err, 415, "content_type", NULL,
                     "the body must be JSON: send the header 'Content-Type: application/json'");
}

static bool refuse_crowded(mp_api_error *err) {
    return mp_refuse(err, 503, "overloaded", NULL,
                     "the server holds as many bytes of requests and replies as it may; try again later");
}

/* Bodies that are there already, of all clients, leave room for another. */
static bool check_room(mp_exchange *x, mp_api_error *err) {
    return strcmp(x->route->method, "POST") != 0 || mp_exchange_hold(x, 0) || refuse_crowded(err);
}

static bool admit(mp_exchange *x, const char *method, const char *path, mp_api_error *err) {
    if (!check_host(x, err) || !check_coding(x, err)) return false;
    if (strlen(path) > PATH_BYTES_MAX) {
        return mp_refuse(err, 414, "path_too_long", NULL, "the path has more than %d bytes", PATH_BYTES_MAX);
    }
    x->route = mp_route_find(method, path, &x->other, err);
    return x->route && check_key(x, err) && check_type(x, err) && check_room(x, err);
}

static void choose_request_id(mp_exchange *x) {
    const char *given = header(x->connection, "X-Request-Id");
    size_t n = 0;
    while (given && given[n] > ' ' && given[n] < 0x7f && n < sizeof x->request_id - 1) n++;
    if (given && n > 0 && !given[n])
        memcpy(x->request_id, given, n + 1);
    else
        mp_api_id(&x->server->api, "req-", mp_server_next_id(x->server), x->request_id, sizeof x->request_id);
}

static mp_watched *watched_of(struct MHD_Connection *connection) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info ? info->socket_context : NULL;
}

static mp_exchange *open_exchange(const mp_http *http, struct MHD_Connection *connection) {
    mp_exchange *x = mp_calloc(1, sizeof *x);
    if (!x) return NULL;
    mp_server *server = http->server;
    x->server = server;
    x->driver = http->driver;
    x->connection = connection;
    x->begun_ns = mp_now_ns();
    x->watched = watched_of(connection);
    mp_watch_deadline(x->watched, x->begun_ns + server->options.body_ms * MILLISECOND);
    x->body.limit = server->options.max_body;
    pthread_mutex_lock(&server->lock);
    server->n_exchanges++;
    pthread_mutex_unlock(&server->lock);
    return x;
}

/* Whether what is left of a refused request is so little that reading it keeps the connection of use. */
static bool is_short(const mp_exchange *x) {
    const char *length = header(x->connection, MHD_HTTP_HEADER_CONTENT_LENGTH);
    if (header(x->connection, MHD_HTTP_HEADER_TRANSFER_ENCODING)) return false;
    return !length || strtoull(length, NULL, 10) <= REFUSED_BODY_MAX;
}

/* False: nobody with an interest in the answer sends so much. While a body comes nothing can be answered, so one that
 * turned out too large has a little time to end. */
static bool take_body(mp_exchange *x, const char *bytes, size_t n) {
    x->n_body += n;
    if (x->refused.status) return x->n_body <= 2 * x->body.limit;
    uint64_t patience = x->server->options.body_ms * MILLISECOND + x->n_body / BODY_BYTES_PER_SECOND * SECOND;
    mp_watch_deadline(x->watched, x->begun_ns + patience);
    bool fits = mp_buf_append(&x->body, bytes, n);
    bool room = !fits || mp_exchange_hold(x, x->body.cap);
    if (fits && room) return true;
    if (!room)
        refuse_crowded(&x->refused);
    else if (n > x->body.limit - x->body.len)
        mp_refuse(&x->refused, 413, "body_too_large", NULL, "the body has more than %zu bytes", x->body.limit);
    else
        mp_refuse_memory(&x->refused, "the body");
    mp_buf_clear(&x->body);
    mp_exchange_hold(x, 0);
    return true;
}

/* Called with the headers, then with pieces of the body, then without any, and again whenever the connection wakes. */
static enum MHD_Result on_request(void *cls, struct MHD_Connection *connection, const char *path, const char *method,
                                  const char *version, const char *bytes, size_t *n_bytes, void **state) {
    (void)version;
    mp_exchange *x = *state;
    if (!x) {
        x = open_exchange(cls, connection);
        if (!x) return MHD_NO;
        *state = x;
        choose_request_id(x);
        /* A body whose end is not known, or too far away, is not waited for. */
        bool framed = check_framing(x, &x->refused);
        if (framed && (admit(x, method, path, &x->refused) || is_short(x))) return MHD_YES;
        return mp_exchange_refuse(x, &x->refused);
    }
    if (*n_bytes > 0) {
        bool taken = take_body(x, bytes, *n_bytes);
        *n_bytes = 0;
        return taken ? MHD_YES : MHD_NO;
    }
    if (!x->body_complete) mp_watch_deadline(x->watched, 0);
    x->body_complete = true;
    x->path = path;
    return x->refused.status ? mp_exchange_refuse(x, &x->refused) : x->route->handle(x);
}

static void on_completed(void *cls, struct MHD_Connection *connection, void **state,
                         enum MHD_RequestTerminationCode code) {
    (void)connection;
    mp_server *server = cls;
    mp_exchange *x = *state;
    if (!x) return;
    *state = NULL;
    /* An answer that did not arrive: for want of a client, or of an answer. */
    bool arrived = code == MHD_REQUEST_TERMINATED_COMPLETED_OK;
    bool ours = !arrived && !x->gone && (x->unanswered || code == MHD_REQUEST_TERMINATED_DAEMON_SHUTDOWN);
    if (ours && !x->refused.status)
        mp_refuse(&x->refused, 500, "no_answer", NULL, "the answer was cut off by the server");
    if (ours && !x->status) x->status = x->refused.status;
    mp_exchange_record(x, true, !arrived && !ours);
    mp_generate_end(x);
    mp_watch_deadline(x->watched, mp_now_ns() + IDLE_SECONDS * SECOND);
    mp_buf_clear(&x->body);
    mp_exchange_hold(x, 0);
    mp_free(x);
    pthread_mutex_lock(&server->lock);
    server->n_exchanges--;
    pthread_cond_signal(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

/* A client may read slowly, or vanish without a word. */
static void prepare_socket(int fd) {
    int send_buffer = SEND_BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    int on = 1, idle = KEEPALIVE_SECONDS, interval = KEEPALIVE_SECONDS / 3, probes = 3;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

static void on_connection(void *cls, struct MHD_Connection *connection, void **context,
                          enum MHD_ConnectionNotificationCode code) {
    mp_server *server = cls;
    if (code == MHD_CONNECTION_NOTIFY_CLOSED) {
        mp_watch_end(*context);
        return;
    }
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    prepare_socket(info->connect_fd);
    mp_watched *watched = mp_watch_begin(server->watch, info->connect_fd);
    mp_watch_deadline(watched, mp_now_ns() + server->options.header_ms * MILLISECOND);
    *context = watched;
}

/* ---- The listener ------------------------------------------------------------------------------------------------ */

static bool is_loopback(const struct sockaddr *address) {
    if (address->sa_family == AF_INET) {
        return ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr) >> 24 == 127;
    }
    return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr);
}

static uint16_t port_of(int fd) {
    struct sockaddr_in6 address = { 0 }; // an IPv4 address has its port in the same place
    socklen_t len = sizeof address;
    return getsockname(fd, (struct sockaddr *)&address, &len) == 0 ? ntohs(address.sin6_port) : 0;
}

static const char *host_of(const mp_server_options *o) {
    return o->host ? o->host : "127.0.0.1";
}

static mepic_status fail_address(const mp_server_options *o, mepic_error *err) {
    return mp_fail(err, MEPIC_ERR_IO, "%s, port %u: %s", host_of(o), o->port, strerror(errno));
}

static mepic_status bind_address(const mp_server_options *o, const struct addrinfo *address, int *out,
                                 mepic_error *err) {
    if (!o->keys && !o->allow_open && !is_loopback(address->ai_addr)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT,
                       "host %s can be reached from outside and there are no API keys; name a file of keys "
                       "(--api-key-file), or say "
                       "that everybody may ask (--allow-everybody)",
                       host_of(o));
    }
    int on = 1, fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return mp_fail(err, MEPIC_ERR_IO, "no socket: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, address->ai_addr, address->ai_addrlen) != 0) {
        mepic_status status = fail_address(o, err);
        close(fd);
        return status;
    }
    *out = fd;
    return MEPIC_OK;
}

mepic_status mp_server_bind(const mp_server_options *o, int *out, mepic_error *err) {
    const struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV };
    struct addrinfo *addresses;
    char port[8];
    snprintf(port, sizeof port, "%u", o->port);
    int failed = getaddrinfo(host_of(o), port, &hints, &addresses);
    if (failed) return mp_fail(err, MEPIC_ERR_ARGUMENT, "host %s: %s", host_of(o), gai_strerror(failed));
    mepic_status status = bind_address(o, addresses, out, err);
    freeaddrinfo(addresses);
    return status;
}

static mepic_status open_listener(mp_server *server, int bound, mepic_error *err) {
    const mp_server_options *o = &server->options;
    mepic_status status = MEPIC_OK;
    if (bound >= 0) {
        server->listener = fcntl(bound, F_DUPFD_CLOEXEC, 0);
        if (server->listener < 0) status = mp_fail(err, MEPIC_ERR_IO, "no descriptor: %s", strerror(errno));
    } else {
        status = mp_server_bind(o, &server->listener, err);
    }
    if (status != MEPIC_OK) return status;
    /* Somebody else may have begun to listen since it was bound. */
    if (listen(server->listener, 1024) != 0) return fail_address(o, err);
    server->port = port_of(server->listener);
    return MEPIC_OK;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static void note_event(void *user) {
    const mp_server *server = user;
    uint64_t one = 1;
    ssize_t n = write(server->event_fd, &one, sizeof one);
    (void)n; // full: it is readable already
}

static void fill_defaults(mp_server *server) {
    mp_server_options *o = &server->options;
    if (!o->max_replies) o->max_replies = 1024;
    if (!o->max_tokens) o->max_tokens = 16 << 20;
    if (!o->max_connections) o->max_connections = 4096;
    if (!o->max_body) o->max_body = 8 << 20;
    if (!o->max_bodies) o->max_bodies = 512 << 20;
    if (o->max_bodies < o->max_body) o->max_bodies = o->max_body;
    if (!o->silence_ms) o->silence_ms = 4000;
    if (!o->stuck_ms) o->stuck_ms = 2000;
    if (!o->header_ms) o->header_ms = 10000;
    if (!o->body_ms) o->body_ms = 30000;
    if (!o->n_names) {
        o->names[0] = server->info.name;
        o->n_names = 1;
    }
    server->api = (mp_api){
        .engine = o->engine,
        .info = &server->info,
        .names = o->names,
        .n_names = o->n_names,
        .created = (int64_t)time(NULL),
        .chunk_separator = o->chunk_separator && *o->chunk_separator ? o->chunk_separator : NULL,
        .chunk_tool_results = o->chunk_tool_results,
        .public_documents = o->public_documents,
        .log = o->log,
    };
    if (getrandom(&server->api.id_seed, sizeof server->api.id_seed, 0) < 0) server->api.id_seed = mp_now_ns();
}

/* Routes are compared with paths as they were sent: none has an escaped character but in its {name}, which its handler
 * reads. */
static size_t keep_escapes(void *cls, struct MHD_Connection *connection, char *text) {
    (void)cls;
    (void)connection;
    return strlen(text);
}

/* Closes the listener when it ends. */
static struct MHD_Daemon *start_daemon(mp_http *http, int listener, uint32_t max_connections) {
    return MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME, 0, NULL, NULL, on_request, http,
                            MHD_OPTION_LISTEN_SOCKET, listener, MHD_OPTION_NOTIFY_COMPLETED, on_completed, http->server,
                            MHD_OPTION_NOTIFY_CONNECTION, on_connection, http->server, MHD_OPTION_CONNECTION_LIMIT,
                            (unsigned)max_connections, MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)IDLE_SECONDS,
                            MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEADER_BYTES_MAX, MHD_OPTION_STRICT_FOR_CLIENT,
                            1, MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, NULL, MHD_OPTION_END);
}

/* The threads share what listens, and have each their part of the connections. */
static mepic_status start_http(mp_server *server, uint32_t i, mepic_error *err) {
    mp_http *http = &server->http[i];
    http->server = server;
    mepic_status status = mp_driver_open(&http->driver, err);
    if (status != MEPIC_OK) return status;
    uint32_t max_connections = (server->options.max_connections + MP_HTTP_THREADS - 1 - i) / MP_HTTP_THREADS;
    int listener = fcntl(server->listener, F_DUPFD_CLOEXEC, 0);
    struct MHD_Daemon *daemon = listener < 0 ? NULL : start_daemon(http, listener, max_connections);
    if (daemon) return mp_driver_start(http->driver, daemon, err);
    status = mp_fail(err, MEPIC_ERR_NOMEM, "HTTP could not be started: %s", strerror(errno));
    if (listener >= 0) close(listener);
    return status;
}

/* Where the kernel's table of descriptors is full, who takes one makes it twice as large, and in a process of several
 * threads waits until all cores have noticed: some 20 ms, in which no thread takes a connection. So it gets its size
 * before the first burst. If the limit of open files is lower, or memory short, it grows later. */
static void reserve_descriptors(const mp_server *server) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    uint64_t most = (uint64_t)server->event_fd + server->options.max_connections;
    int last = fcntl(server->event_fd, F_DUPFD_CLOEXEC, (int)(most < files.rlim_cur ? most : files.rlim_cur - 1));
    if (last >= 0) close(last);
}

mepic_status mp_server_open(const mp_server_options *options, int bound, mp_server **out, mepic_error *err) {
    mp_server *server = mp_calloc(1, sizeof *server);
    if (!server) return mp_fail_nomem(err, "the server", sizeof *server);
    server->options = *options;
    server->listener = -1;
    mepic_model_info_read(options->engine, &server->info);
    fill_defaults(server);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    server->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    reserve_descriptors(server);
    const mp_loop_options loop = { .max_choices = server->options.max_replies,
                                   .max_tokens = server->options.max_tokens,
                                   .n_tenants = options->keys ? mp_keys_count(options->keys) + 1 : 1,
                                   .max_per_tenant = server->options.max_per_key,
                                   .on_broken = note_event,
                                   .on_idle = note_event,
                                   .user = server };
    const mp_watch_options watch = {
        .engine = options->engine,
        .max_connections = server->options.max_connections,
        .silence_ms = server->options.silence_ms,
    };
    mepic_status status = open_listener(server, bound, err);
    if (status == MEPIC_OK) status = mp_loop_open(options->engine, &loop, &server->loop, err);
    if (status == MEPIC_OK) status = mp_watch_open(&watch, &server->watch, err);
    for (uint32_t i = 0; status == MEPIC_OK && i < MP_HTTP_THREADS; i++) status = start_http(server, i, err);
    if (status != MEPIC_OK) {
        mp_server_close(server);
        return status;
    }
    *out = server;
    return MEPIC_OK;
}

uint16_t mp_server_port(const mp_server *server) {
    return server->port;
}

uint64_t mp_server_next_id(mp_server *server) {
    return atomic_fetch_add(&server->next_id, 1);
}

int mp_server_event_fd(const mp_server *server) {
    return server->event_fd;
}

void mp_server_event_take(mp_server *server) {
    uint64_t count;
    ssize_t n = read(server->event_fd, &count, sizeof count);
    (void)n; // nothing there is fine
}

bool mp_server_idle(mp_server *server) {
    return mp_loop_choices(server->loop) == 0;
}

bool mp_server_broken(mp_server *server) {
    return mp_loop_broken(server->loop);
}

static void shutting_down(mp_api_error *reason) {
    mp_refuse(reason, 503, "shutting_down", NULL, "the server is shutting down");
}

void mp_server_drain(mp_server *server) {
    pthread_mutex_lock(&server->lock);
    server->draining = true;
    pthread_mutex_unlock(&server->lock);
    mp_api_error reason;
    shutting_down(&reason);
    mp_loop_refuse(server->loop, &reason);
}

static void wait_for_exchanges(mp_server *server) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += FLUSH_SECONDS;
    pthread_mutex_lock(&server->lock);
    while (server->n_exchanges > 0 && pthread_cond_timedwait(&server->changed, &server->lock, &until) == 0) {
    }
    pthread_mutex_unlock(&server->lock);
}

void mp_server_close(mp_server *server) {
    if (!server) return;
    if (server->http[0].driver) {
        mp_server_drain(server);
        mp_api_error reason;
        shutting_down(&reason);
        mp_loop_stop(server->loop, &reason);
        wait_for_exchanges(server);
    }
    mp_watch_stop(server->watch); // it may be about to wake one, and none may be paused then
    for (uint32_t i = 0; i < MP_HTTP_THREADS; i++) mp_driver_stop(server->http[i].driver);
    if (server->listener >= 0) close(server->listener);
    mp_loop_close(server->loop);
    mp_watch_close(server->watch);
    for (uint32_t i = 0; i < MP_HTTP_THREADS; i++) mp_driver_close(server->http[i].driver);
    if (server->event_fd >= 0) close(server->event_fd);
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->lock);
    mp_free(server);
}
