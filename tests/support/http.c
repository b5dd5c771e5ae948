#include "support/http.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { PATIENCE_SECONDS = 60 };

void http_open(http_client *c, uint16_t port) {
    http_open_small(c, port, 0);
}

void http_open_small(http_client *c, uint16_t port, int receive_bytes) {
    *c = (http_client){ .fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) };
    assert_true(c->fd >= 0);
    int on = 1; // a head and its body do not wait for each other
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    const struct timeval patience = { .tv_sec = PATIENCE_SECONDS };
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (receive_bytes) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes);
    const struct sockaddr_in address = { .sin_family = AF_INET,
                                         .sin_port = htons(port),
                                         .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    assert_int_equal(connect(c->fd, (const struct sockaddr *)&address, sizeof address), 0);
}

void http_close(http_client *c) {
    close(c->fd);
    free(c->data);
    free(c->decoded);
    *c = (http_client){ .fd = -1 };
}

void http_send(http_client *c, const void *bytes, size_t n) {
    while (n > 0) {
        ssize_t sent = send(c->fd, bytes, n, MSG_NOSIGNAL);
        if (sent <= 0) return; // the server may have answered and closed already; reading tells
        bytes = (const char *)bytes + sent;
        n -= (size_t)sent;
    }
}

void http_send_text(http_client *c, const char *text) {
    http_send(c, text, strlen(text));
}

void http_send_request(http_client *c, const char *method, const char *path, const char *headers, const char *body) {
    char head[4096];
    int n = snprintf(head, sizeof head, "%s %s HTTP/1.1\r\nHost: localhost\r\n%s", method, path, headers);
    assert_true(n > 0 && (size_t)n < sizeof head);
    http_send(c, head, (size_t)n);
    if (body) {
        n = snprintf(head, sizeof head, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
        http_send(c, head, (size_t)n);
    }
    http_send_text(c, "\r\n");
    if (body) http_send_text(c, body);
}

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

/* Reads more; false at the end. */
static bool more(http_client *c) {
    if (c->cap - c->len < 65536) {
        c->cap = 2 * c->cap + 65536;
        c->data = realloc(c->data, c->cap);
        assert_non_null(c->data);
    }
    ssize_t n = recv(c->fd, c->data + c->len, c->cap - c->len - 1, 0);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) fail_msg("nothing came for %d s", PATIENCE_SECONDS);
    if (n <= 0) return false;
    c->len += (size_t)n;
    c->data[c->len] = 0;
    return true;
}

static void use_up(http_client *c, size_t n) {
    assert_true(n <= c->len);
    memmove(c->data, c->data + n, c->len - n + 1);
    c->len -= n;
}

/* Bytes up to and with `end`; 0: the connection ended before. */
static size_t find_end(http_client *c, const char *end) {
    for (;;) {
        char *at = c->len > 0 ? memmem(c->data, c->len, end, strlen(end)) : NULL;
        if (at) return (size_t)(at - c->data) + strlen(end);
        if (!more(c)) return 0;
    }
}

int http_read_head(http_client *c, char *head, size_t cap) {
    size_t n = find_end(c, "\r\n\r\n");
    if (n == 0) return 0;
    assert_true(n < cap);
    memcpy(head, c->data, n);
    head[n] = 0;
    use_up(c, n);
    int status = 0;
    assert_int_equal(sscanf(head, "HTTP/1.%*d %d", &status), 1);
    return status == 100 ? http_read_head(c, head, cap) : status;
}

bool http_header(const char *head, const char *name, char *out, size_t cap) {
    size_t len = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, len) != 0 || line[2 + len] != ':') continue;
        const char *value = line + 3 + len + strspn(line + 3 + len, " ");
        snprintf(out, cap, "%.*s", (int)strcspn(value, "\r"), value);
        return true;
    }
    return false;
}

/* A chunk's data at the front of the buffer: its length, or 0 at the last one. */
static size_t begin_chunk(http_client *c) {
    size_t line = find_end(c, "\r\n");
    if (line == 0) return 0;
    size_t n = strtoul(c->data, NULL, 16);
    use_up(c, line);
    while (c->len < n + 2) {
        if (!more(c)) return 0;
    }
    return n;
}

static void append(http_reply *reply, const char *bytes, size_t n) {
    reply->body = realloc(reply->body, reply->body_len + n + 1);
    assert_non_null(reply->body);
    memcpy(reply->body + reply->body_len, bytes, n);
    reply->body_len += n;
    reply->body[reply->body_len] = 0;
}

bool http_read(http_client *c, http_reply *out) {
    memset(out, 0, sizeof *out);
    out->status = http_read_head(c, out->head, sizeof out->head);
    if (out->status == 0) return false;
    append(out, "", 0);
    char value[64];
    if (http_header(out->head, "Content-Length", value, sizeof value)) {
        size_t n = strtoul(value, NULL, 10);
        while (c->len < n) {
            if (!more(c)) return false;
        }
        append(out, c->data ? c->data : "", n);
        if (n > 0) use_up(c, n);
    } else if (http_header(out->head, "Transfer-Encoding", value, sizeof value)) {
        for (size_t n = begin_chunk(c); n > 0; n = begin_chunk(c)) {
            append(out, c->data, n);
            use_up(c, n + 2);
        }
        if (c->len >= 2) use_up(c, 2);
    }
    return true;
}

void http_reply_clear(http_reply *reply) {
    free(reply->body);
    reply->body = NULL;
}

/* Chunks end anywhere, lines too: what was decoded and is no whole line yet is kept. */
const char *http_read_line(http_client *c) {
    static char line[65536];
    for (;;) {
        char *end = c->n_decoded > 0 ? memchr(c->decoded, '\n', c->n_decoded) : NULL;
        if (end) {
            size_t n = (size_t)(end - c->decoded) + 1;
            assert_true(n < sizeof line);
            memcpy(line, c->decoded, n - 1);
            line[n - 1] = 0;
            c->n_decoded -= n;
            memmove(c->decoded, c->decoded + n, c->n_decoded);
            if (n > 1) return line;
            continue;
        }
        size_t n = begin_chunk(c);
        if (n == 0) return NULL;
        c->decoded = realloc(c->decoded, c->n_decoded + n);
        assert_non_null(c->decoded);
        memcpy(c->decoded + c->n_decoded, c->data, n);
        c->n_decoded += n;
        use_up(c, n + 2);
    }
}

/* ---- Whole requests ---------------------------------------------------------------------------------------------- */

int http_ask(uint16_t port, const char *method, const char *path, const char *headers, const char *body,
             http_reply *out) {
    http_client c;
    http_open(&c, port);
    http_send_request(&c, method, path, headers, body);
    if (!http_read(&c, out)) fail_msg("%s %s: no answer", method, path);
    http_close(&c);
    return out->status;
}

json_t *http_ask_json(uint16_t port, const char *method, const char *path, const char *body, int status) {
    http_reply reply;
    http_ask(port, method, path, "", body, &reply);
    if (reply.status != status) fail_msg("%s %s: status %d: %s", method, path, reply.status, reply.body);
    json_error_t why;
    json_t *root = json_loads(reply.body, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    if (!root) fail_msg("%s: not JSON: %s", path, reply.body);
    http_reply_clear(&reply);
    return root;
}
