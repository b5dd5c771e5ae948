#include "cli/http_client.h"

#include "cli/interrupt.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- Addresses --------------------------------------------------------------------------------------------------- */

mepic_status mp_url_parse(const char *text, mp_url *out, mepic_error *err) {
    static const char scheme[] = "http://";
    const char *at = text;
    if (strncasecmp(at, scheme, sizeof scheme - 1) == 0) {
        at += sizeof scheme - 1;
    } else if (strstr(at, "://")) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "'%.80s': only http:// is spoken; put a proxy in between", text);
    }
    bool bracket = *at == '[';
    at += bracket;
    size_t n_host = strcspn(at, bracket ? "]" : ":/");
    bool closed = !bracket || at[n_host] == ']';
    const char *behind = at + n_host + (bracket && closed);
    const char *port = *behind == ':' ? behind + 1 : "80";
    size_t n_port = strspn(port, "0123456789");
    const char *path = *behind == ':' ? port + n_port : behind;
    size_t n_path = strlen(path);
    while (n_path > 0 && path[n_path - 1] == '/') n_path--;
    bool clean = strcspn(text, " \t\r\n?#@") == strlen(text); // nothing else can get into the head of a request
    if (!clean || !closed || n_host == 0 || n_host >= sizeof out->host || n_port == 0 || n_port >= sizeof out->port ||
        strtoul(port, NULL, 10) > 65535 || (*path && *path != '/') || n_path >= sizeof out->path) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "'%.80s' is no address such as http://127.0.0.1:8080", text);
    }
    snprintf(out->host, sizeof out->host, "%.*s", (int)n_host, at);
    snprintf(out->port, sizeof out->port, "%.*s", (int)n_port, port);
    snprintf(out->path, sizeof out->path, "%.*s", (int)n_path, path);
    return MEPIC_OK;
}

/* ---- Answers ----------------------------------------------------------------------------------------------------- */

static mepic_status fail_format(const char *what, const char *line, mepic_error *err) {
    return mp_fail(err, MEPIC_ERR_FORMAT, "this is no HTTP server's answer: %s '%.60s'", what, line);
}

/* The line is whole. */
static mepic_status take_status(mp_http_reader *r, mepic_error *err) {
    unsigned status;
    if (sscanf(r->line, "HTTP/1.%*1[01] %3u", &status) != 1 || status < 100) {
        return fail_format("it begins with", r->line, err);
    }
    r->status = status;
    r->place = MP_HTTP_HEADERS;
    return MEPIC_OK;
}

static bool read_number(const char *text, int base, uint64_t *out) {
    static const char digits[] = "0123456789abcdefABCDEF";
    size_t n = strspn(text, digits);
    if (n == 0 || n > 15 || (base == 10 && strspn(text, "0123456789") != strlen(text))) return false;
    *out = strtoull(text, NULL, base);
    return true;
}

static mepic_status take_header(mp_http_reader *r, mepic_error *err) {
    if (r->line[0] == 0) { // the head's end
        if (r->status < 200) {
            r->place = MP_HTTP_STATUS;
        } else if (r->chunked) {
            r->place = MP_HTTP_CHUNK_SIZE;
        } else {
            r->place = r->has_length && r->left == 0 ? MP_HTTP_END : MP_HTTP_BODY;
        }
        return MEPIC_OK;
    }
    char *colon = strchr(r->line, ':');
    if (!colon) return fail_format("no header is", r->line, err);
    *colon = 0;
    const char *value = colon + 1 + strspn(colon + 1, " \t");
    if (strcasecmp(r->line, "Transfer-Encoding") == 0) {
        r->chunked = strcasecmp(value, "chunked") == 0;
        if (!r->chunked) return fail_format("Transfer-Encoding", value, err);
    } else if (strcasecmp(r->line, "Content-Length") == 0) {
        r->has_length = read_number(value, 10, &r->left);
        if (!r->has_length) return fail_format("Content-Length", value, err);
    }
    return MEPIC_OK;
}

static mepic_status take_line(mp_http_reader *r, mepic_error *err) {
    switch (r->place) {
    case MP_HTTP_STATUS: return take_status(r, err);
    case MP_HTTP_HEADERS: return take_header(r, err);
    case MP_HTTP_CHUNK_SIZE:
        if (!read_number(r->line, 16, &r->left)) return fail_format("the size of a piece is", r->line, err);
        r->place = r->left > 0 ? MP_HTTP_CHUNK : MP_HTTP_TRAILERS;
        return MEPIC_OK;
    case MP_HTTP_CHUNK_END:
        if (r->line[0]) return fail_format("behind a piece comes", r->line, err);
        r->place = MP_HTTP_CHUNK_SIZE;
        return MEPIC_OK;
    default:
        if (r->line[0] == 0) r->place = MP_HTTP_END;
        return MEPIC_OK;
    }
}

mepic_status mp_http_feed(mp_http_reader *r, const char *bytes, size_t n, mp_http_take *take, void *user,
                          mepic_error *err) {
    mepic_status status = MEPIC_OK;
    for (size_t i = 0; i < n && status == MEPIC_OK && r->place != MP_HTTP_END;) {
        if (r->place == MP_HTTP_BODY || r->place == MP_HTTP_CHUNK) {
            bool bounded = r->chunked || r->has_length;
            size_t piece = bounded && r->left < n - i ? (size_t)r->left : n - i;
            status = take(user, bytes + i, piece, err);
            i += piece;
            if (bounded) r->left -= piece;
            if (bounded && r->left == 0) r->place = r->chunked ? MP_HTTP_CHUNK_END : MP_HTTP_END;
            continue;
        }
        char c = bytes[i++];
        if (c != '\n') {
            if (r->n_line + 1 == sizeof r->line) return fail_format("a line is too long,", r->line, err);
            r->line[r->n_line++] = c;
            r->line[r->n_line] = 0;
            continue;
        }
        if (r->n_line > 0 && r->line[r->n_line - 1] == '\r') r->n_line--;
        r->line[r->n_line] = 0;
        r->n_line = 0;
        status = take_line(r, err);
    }
    return status;
}

mepic_status mp_http_finish(const mp_http_reader *r, mepic_error *err) {
    bool open_end = r->place == MP_HTTP_BODY && !r->has_length;
    if (r->place == MP_HTTP_END || open_end) return MEPIC_OK;
    return mp_fail(err, MEPIC_ERR_IO, "the server ended the connection before its answer was whole");
}

/* ---- The connection ---------------------------------------------------------------------------------------------- */

static mepic_status connect_to(const mp_url *url, int *out, mepic_error *err) {
    const struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
    struct addrinfo *addresses;
    int failed = getaddrinfo(url->host, url->port, &hints, &addresses), fd = -1, why = 0;
    if (failed) return mp_fail(err, MEPIC_ERR_IO, "%s: %s", url->host, gai_strerror(failed));
    for (const struct addrinfo *a = addresses; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0) break;
        why = errno;
        if (fd >= 0) close(fd);
        fd = -1;
    }
    freeaddrinfo(addresses);
    if (fd < 0) return mp_fail(err, MEPIC_ERR_IO, "%s, port %s: %s", url->host, url->port, strerror(why));
    *out = fd;
    return MEPIC_OK;
}

static bool send_all(int fd, const char *bytes, size_t n) {
    while (n > 0) {
        ssize_t sent = send(fd, bytes, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR && !mp_interrupted()) continue;
        if (sent <= 0) return false;
        bytes += sent;
        n -= (size_t)sent;
    }
    return true;
}

static mepic_status read_answer(int fd, mp_http_reader *reader, mp_http_take *take, void *user, mepic_error *err) {
    char block[16384];
    while (reader->place != MP_HTTP_END) {
        ssize_t n = recv(fd, block, sizeof block, 0);
        if (n < 0 && errno == EINTR) {
            if (mp_interrupted()) return MEPIC_OK;
            continue;
        }
        if (n < 0) return mp_fail(err, MEPIC_ERR_IO, "the connection is lost: %s", strerror(errno));
        if (n == 0) return mp_http_finish(reader, err);
        mepic_status status = mp_http_feed(reader, block, (size_t)n, take, user, err);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

mepic_status mp_http_ask(const mp_url *url, const char *path, const char *headers, const mp_buf *body,
                         mp_http_reader *reader, mp_http_take *take, void *user, bool *interrupted, mepic_error *err) {
    char head[2048];
    bool v6 = strchr(url->host, ':') != NULL;
    int n =
        snprintf(head, sizeof head, "%s %s%s HTTP/1.1\r\nHost: %s%s%s:%s\r\nConnection: close\r\n%s",
                 body ? "POST" : "GET", url->path, path, v6 ? "[" : "", url->host, v6 ? "]" : "", url->port, headers);
    if (body && n > 0 && (size_t)n < sizeof head) {
        n += snprintf(head + n, sizeof head - (size_t)n, "Content-Type: application/json\r\nContent-Length: %zu\r\n",
                      body->len);
    }
    if (n < 0 || (size_t)n + 2 >= sizeof head)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "the request's head is too long");
    memcpy(head + n, "\r\n", 3);
    *reader = (mp_http_reader){ .place = MP_HTTP_STATUS };
    int fd = -1;
    mp_interrupt_arm();
    mepic_status status = connect_to(url, &fd, err);
    if (status == MEPIC_OK) {
        /* A server may refuse before it has read everything: what it says counts then. */
        bool sent = send_all(fd, head, (size_t)n + 2) && (!body || send_all(fd, body->data, body->len));
        status = read_answer(fd, reader, take, user, err);
        if (status != MEPIC_OK && !sent && reader->status == 0) {
            status = mp_fail(err, MEPIC_ERR_IO, "%s, port %s: the request could not be sent", url->host, url->port);
        }
        close(fd);
    }
    *interrupted = mp_interrupted();
    mp_interrupt_disarm();
    return *interrupted ? MEPIC_OK : status;
}

/* ---- Server-sent events ------------------------------------------------------------------------------------------ */

static bool append(mp_buf *buf, const char *bytes, size_t n) {
    buf->limit = MP_SSE_MAX_BYTES;
    return mp_buf_append(buf, bytes, n);
}

/* The line is whole; an empty one ends an event. */
static mepic_status take_event_line(mp_sse *sse, mepic_error *err) {
    const char *line = sse->line.data;
    size_t n = sse->line.len;
    sse->line.len = 0;
    if (n == 0) {
        if (!sse->has_data) return MEPIC_OK;
        size_t len = sse->data.len;
        sse->has_data = false;
        sse->data.len = 0;
        return sse->take(sse->user, sse->data.data ? sse->data.data : "", len, err);
    }
    if (n < 5 || memcmp(line, "data:", 5) != 0) return MEPIC_OK;
    size_t skip = n > 5 && line[5] == ' ' ? 6 : 5;
    bool ok = (!sse->has_data || append(&sse->data, "\n", 1)) && append(&sse->data, line + skip, n - skip);
    sse->has_data = true;
    return ok ? MEPIC_OK : mp_fail(err, MEPIC_ERR_FORMAT, "an event of more than %d bytes", MP_SSE_MAX_BYTES);
}

mepic_status mp_sse_feed(mp_sse *sse, const char *bytes, size_t n, mepic_error *err) {
    for (size_t i = 0; i < n;) {
        if (sse->after_cr && bytes[i] == '\n') { // of "\r\n"
            sse->after_cr = false;
            i++;
            continue;
        }
        sse->after_cr = false;
        size_t end = i;
        while (end < n && bytes[end] != '\n' && bytes[end] != '\r') end++;
        if (!append(&sse->line, bytes + i, end - i)) {
            return mp_fail(err, MEPIC_ERR_FORMAT, "an event of more than %d bytes", MP_SSE_MAX_BYTES);
        }
        if (end == n) return MEPIC_OK;
        sse->after_cr = bytes[end] == '\r';
        i = end + 1;
        mepic_status status = take_event_line(sse, err);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

void mp_sse_clear(mp_sse *sse) {
    mp_buf_clear(&sse->line);
    mp_buf_clear(&sse->data);
}
