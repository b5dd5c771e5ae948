#include "bench/load/slow.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"

enum { TEXT_MAX = 1024 };
static const uint64_t BYTE_NS = 1000000000, WALK_NS = 10000000, CONNECT_NS = UINT64_C(10000000000);

typedef struct slow_one {
    int fd;
    bool begun; /* it sent its beginning */
    uint64_t next_ns;
} slow_one;

struct load_slow {
    struct sockaddr_in server;
    char head[TEXT_MAX], body[TEXT_MAX]; /* beginnings */
    uint64_t n_ended, next_ns;
    int why; /* errno of the last that did not come in; 0: none */
    uint32_t n;
    slow_one items[]; /* [n] */
};

static void begin(load_slow *slow, slow_one *one) {
    one->begun = false;
    one->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const struct sockaddr *server = (const void *)&slow->server;
    if (one->fd >= 0 && (connect(one->fd, server, sizeof slow->server) == 0 || errno == EINPROGRESS)) return;
    slow->why = errno;
    if (one->fd >= 0) close(one->fd); // it is connected to nothing, and looks as if it were about to be
    one->fd = -1;
}

/* Nothing is ever answered, so what can be read is the end, whatever came before it. */
static bool has_ended(load_slow *slow, const slow_one *one) {
    if (one->fd < 0) return true;
    char byte;
    ssize_t n = recv(one->fd, &byte, 1, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) return false;
    if (n < 0) slow->why = errno;
    return true;
}

static void send_one(load_slow *slow, slow_one *one) {
    if (has_ended(slow, one)) {
        slow->n_ended += one->begun;
        if (one->begun) one->next_ns -= BYTE_NS; // the next one begins at once
        if (one->fd >= 0) close(one->fd);
        begin(slow, one);
        return;
    }
    const char *text = one->begun ? "a" : (one - slow->items) % 2 ? slow->body : slow->head;
    if (send(one->fd, text, strlen(text), MSG_NOSIGNAL) > 0) one->begun = true;
}

/* How many have. */
static uint32_t begin_all(load_slow *slow) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < slow->n; i++) {
        if (!slow->items[i].begun) send_one(slow, &slow->items[i]);
        n += slow->items[i].begun;
    }
    return n;
}

load_slow *load_slow_open(const struct sockaddr_in *server, uint32_t n, const char *path, const char *key) {
    load_slow *slow = mp_calloc(1, sizeof *slow + n * sizeof *slow->items);
    if (!slow) return NULL;
    slow->server = *server;
    slow->n = n;
    snprintf(slow->head, sizeof slow->head, "POST %.200s HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", path);
    snprintf(slow->body, sizeof slow->body,
             "POST %.200s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s%.500s%s"
             "Content-Length: 100000\r\n\r\n{\"prompt\":\"",
             path, key ? "Authorization: Bearer " : "", key ? key : "", key ? "\r\n" : "");
    uint64_t now = mp_now_ns();
    for (uint32_t i = 0; i < n; i++) {
        begin(slow, &slow->items[i]);
        slow->items[i].next_ns = now + BYTE_NS * i / n; // not all at once
    }
    return slow;
}

uint32_t load_slow_wait(load_slow *slow, const char **why) {
    const struct timespec pause = { .tv_nsec = 1000000 };
    uint64_t until = mp_now_ns() + CONNECT_NS;
    uint32_t n;
    while ((n = begin_all(slow)) < slow->n && mp_now_ns() < until) nanosleep(&pause, NULL);
    *why = slow->why ? strerror(slow->why) : "they are not taken";
    return n;
}

void load_slow_send(load_slow *slow, uint64_t now) {
    if (now < slow->next_ns) return;
    slow->next_ns = now + WALK_NS;
    for (uint32_t i = 0; i < slow->n; i++) {
        slow_one *one = &slow->items[i];
        if (now < one->next_ns) continue;
        one->next_ns += BYTE_NS;
        send_one(slow, one);
    }
}

uint64_t load_slow_ended(const load_slow *slow) {
    return slow->n_ended;
}

void load_slow_close(load_slow *slow) {
    if (!slow) return;
    for (uint32_t i = 0; i < slow->n; i++) {
        if (slow->items[i].fd >= 0) close(slow->items[i].fd);
    }
    mp_free(slow);
}
