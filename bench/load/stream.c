#include "bench/load/stream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

static void end(load_stream *s, load_state state) {
    s->state = state;
    s->ended_ns = mp_now_ns();
    if (s->fd >= 0) close(s->fd); // epoll forgets it
    s->fd = -1;
}

void load_stream_fail(load_stream *s, const char *why) {
    char text[LOAD_LINE_MAX];
    s->line[s->n_line] = 0;
    snprintf(text, sizeof text, "%s; status %d, %u data lines: %.300s", why, s->status, s->n_data, s->line);
    memcpy(s->line, text, sizeof text);
    end(s, LOAD_FAILED);
}

static void leave(load_stream *s) {
    const struct linger now = { .l_onoff = 1 };
    if (s->reset) setsockopt(s->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    end(s, LOAD_LEFT);
}

/* ---- What a server answers --------------------------------------------------------------------------------------- */

static void finish(load_stream *s) {
    if (s->status == s->request->status && (!s->events || s->ended_well))
        end(s, LOAD_DONE);
    else if (s->status == 429 || s->status == 503)
        end(s, LOAD_REFUSED);
    else
        load_stream_fail(s, s->events ? "the stream ended without [DONE], or with an error" : "another status");
}

static uint32_t number_behind(const char *line, const char *name, uint32_t otherwise) {
    const char *at = strstr(line, name);
    return at ? (uint32_t)strtoul(at + strlen(name), NULL, 10) : otherwise;
}

static void note_usage(load_stream *s) {
    s->n_tokens = number_behind(s->line, "\"completion_tokens\":", s->n_tokens);
    s->n_prompt = number_behind(s->line, "\"prompt_tokens\":", s->n_prompt);
    s->n_cached = number_behind(s->line, "\"cached_tokens\":", s->n_cached);
}

/* A line of an event stream, or the whole of another body. */
static void take_line(load_stream *s) {
    s->line[s->n_line] = 0;
    s->n_line = 0;
    if (!s->events) {
        note_usage(s);
        s->n_line = (uint32_t)strlen(s->line);
        return;
    }
    if (strncmp(s->line, "data: ", 6) != 0) return;
    const char *data = s->line + 6;
    if (strcmp(data, "[DONE]") == 0) {
        s->ended_well = s->n_data > 0;
        return;
    }
    if (strncmp(data, "{\"error\"", 8) == 0) {
        load_stream_fail(s, s->line);
        return;
    }
    note_usage(s);
    /* The first data of a chat says who speaks, and nothing else. */
    if (strstr(data, "\"choices\":[]") || strstr(data, "\"choices\": []") || strstr(data, "\"content\":\"\"") ||
        strstr(data, "\"content\":null"))
        return;
    if (s->n_data++ == 0) s->first_ns = mp_now_ns();
    if (s->n_data >= (uint32_t)s->leave_after) leave(s);
}

static void take_body(load_stream *s, const char *bytes, size_t n) {
    for (size_t i = 0; i < n && s->state == LOAD_OPEN; i++) {
        if (s->events && bytes[i] == '\n')
            take_line(s);
        else if (bytes[i] != '\r' && s->n_line < LOAD_LINE_MAX - 1)
            s->line[s->n_line++] = bytes[i];
    }
}

static void end_body(load_stream *s) {
    if (!s->events) take_line(s);
    if (s->state == LOAD_OPEN) finish(s);
}

static void take_header(load_stream *s) {
    const char *value = strchr(s->head, ':');
    if (!s->status) {
        if (sscanf(s->head, "HTTP/1.%*c %d", &s->status) != 1) load_stream_fail(s, "no HTTP");
        return;
    }
    if (!value) return;
    value += 1 + strspn(value + 1, " ");
    if (strncasecmp(s->head, "Transfer-Encoding:", 18) == 0) s->chunked = strcasecmp(value, "chunked") == 0;
    if (strncasecmp(s->head, "Content-Type:", 13) == 0) s->events = strncmp(value, "text/event-stream", 17) == 0;
    if (strncasecmp(s->head, "Content-Length:", 15) == 0) {
        s->has_length = true;
        s->left = strtoull(value, NULL, 10);
    }
}

/* A line of the framing is whole. */
static void take_frame(load_stream *s) {
    s->head[s->n_head] = 0;
    bool empty = s->n_head == 0;
    s->n_head = 0;
    switch (s->frame) {
    case FRAME_HEAD:
        if (!empty) {
            take_header(s);
        } else if (s->status == 100) {
            s->status = 0;
        } else {
            s->frame = s->chunked ? FRAME_SIZE : s->has_length ? FRAME_LENGTH : FRAME_CLOSE;
            if (s->frame == FRAME_LENGTH && s->left == 0) end_body(s);
        }
        break;
    case FRAME_SIZE:
        s->left = strtoull(s->head, NULL, 16);
        s->frame = s->left ? FRAME_DATA : FRAME_TRAILER;
        break;
    case FRAME_DATA_END: s->frame = FRAME_SIZE; break;
    case FRAME_TRAILER:
        if (empty) end_body(s);
        break;
    default: break;
    }
}

static void take(load_stream *s, const char *bytes, size_t n) {
    for (size_t i = 0; i < n && s->state == LOAD_OPEN;) {
        bool data = s->frame == FRAME_DATA || s->frame == FRAME_LENGTH;
        if (data || s->frame == FRAME_CLOSE) {
            size_t m = data && s->left < n - i ? s->left : n - i;
            take_body(s, bytes + i, m);
            i += m;
            s->left -= data ? m : 0;
            if (s->state != LOAD_OPEN || !data || s->left > 0) continue;
            if (s->frame == FRAME_LENGTH) end_body(s);
            s->frame = FRAME_DATA_END;
            continue;
        }
        char c = bytes[i++];
        if (c == '\n')
            take_frame(s);
        else if (c != '\r' && s->n_head < LOAD_FRAME_MAX - 1)
            s->head[s->n_head++] = c;
    }
}

/* ---- The connection ---------------------------------------------------------------------------------------------- */

static void listen_to(load_stream *s, int epoll, int op, uint32_t events) {
    struct epoll_event event = { .events = events, .data.ptr = s };
    if (epoll_ctl(epoll, op, s->fd, &event) != 0) load_stream_fail(s, strerror(errno));
}

void load_stream_begin(load_stream *s, int epoll, const struct sockaddr_in *to, const load_request *request,
                       int32_t leave_after, bool reset) {
    memset(s, 0, offsetof(load_stream, head));
    s->n_head = s->n_line = 0;
    s->state = LOAD_OPEN;
    s->request = request;
    s->leave_after = leave_after;
    s->reset = reset;
    s->begun_ns = s->last_ns = mp_now_ns();
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0 ||
        (connect(s->fd, (const struct sockaddr *)(const void *)to, sizeof *to) != 0 && errno != EINPROGRESS)) {
        load_stream_fail(s, strerror(errno));
        return;
    }
    listen_to(s, epoll, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void send_some(load_stream *s, int epoll) {
    while (s->sent < s->request->n) {
        ssize_t n = send(s->fd, s->request->bytes + s->sent, s->request->n - s->sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) return;
        if (n < 0) {
            load_stream_fail(s, strerror(errno));
            return;
        }
        s->sent += (size_t)n;
    }
    if (s->leave_after == 0)
        leave(s);
    else
        listen_to(s, epoll, EPOLL_CTL_MOD, EPOLLIN);
}

void load_stream_ready(load_stream *s, int epoll) {
    static char bytes[64 << 10];
    if (s->sent < s->request->n) send_some(s, epoll);
    while (s->state == LOAD_OPEN) {
        ssize_t n = recv(s->fd, bytes, sizeof bytes, 0);
        if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) return;
        if (n < 0) {
            load_stream_fail(s, strerror(errno));
            return;
        }
        s->last_ns = mp_now_ns();
        if (n > 0)
            take(s, bytes, (size_t)n);
        else if (s->frame == FRAME_CLOSE)
            end_body(s);
        else
            load_stream_fail(s, "the connection ended before the answer did");
        if (n > 0 && (size_t)n < sizeof bytes) return; // what came since is told again
    }
}
