#include "serve/watch.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

enum { TICK_MS = 1000, EVENTS_MAX = 64 };
static const uint64_t STOP = UINT64_MAX; /* epoll's data of the descriptor that ends the thread */

struct mp_watched {
    mp_watch *watch;
    mp_feed *feed;
    uint64_t deadline_ns;
    int fd;              /* -1: free */
    uint32_t generation; /* of the place's use: an event of an earlier one is stale */
    uint32_t next_free;
};

struct mp_watch {
    mp_watch_options options;
    pthread_t thread;
    bool started;
    int epoll, stop;
    pthread_mutex_t lock; /* of everything below; taken before a feed's */
    mp_watched *places;   /* [n_places] */
    uint32_t n_places, first_free;
};

/* ---- The thread -------------------------------------------------------------------------------------------------- */

static void leave_if_current(mp_watch *watch, uint64_t data) {
    mp_watched *w = &watch->places[data >> 32];
    if (w->generation == (uint32_t)data && w->feed) mp_feed_leave(w->feed, watch->options.engine);
}

static void walk(mp_watch *watch, uint64_t now) {
    uint64_t silence_ns = watch->options.silence_ms * UINT64_C(1000000);
    for (uint32_t i = 0; i < watch->n_places; i++) {
        mp_watched *w = &watch->places[i];
        if (w->fd < 0) continue;
        if (w->feed) mp_feed_poke_if_silent(w->feed, now, silence_ns);
        if (w->deadline_ns && now >= w->deadline_ns) {
            w->deadline_ns = 0;
            shutdown(w->fd, SHUT_RDWR); // the HTTP thread sees an end and closes
        }
    }
}

static void *run(void *arg) {
    mp_watch *watch = arg;
    int tick = watch->options.silence_ms < TICK_MS ? (int)watch->options.silence_ms : TICK_MS;
    uint64_t walked = mp_now_ns();
    for (bool stop = false; !stop;) {
        struct epoll_event events[EVENTS_MAX];
        int n = epoll_wait(watch->epoll, events, EVENTS_MAX, tick);
        uint64_t now = mp_now_ns();
        pthread_mutex_lock(&watch->lock);
        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 == STOP)
                stop = true;
            else
                leave_if_current(watch, events[i].data.u64);
        }
        if (now - walked >= (uint64_t)tick * 1000000) {
            walk(watch, now);
            walked = now;
        }
        pthread_mutex_unlock(&watch->lock);
    }
    return NULL;
}

/* ---- Of the HTTP thread ------------------------------------------------------------------------------------------ */

mp_watched *mp_watch_begin(mp_watch *watch, int fd) {
    pthread_mutex_lock(&watch->lock);
    mp_watched *w = NULL;
    if (watch->first_free < watch->n_places) {
        w = &watch->places[watch->first_free];
        watch->first_free = w->next_free;
        w->fd = fd;
    }
    pthread_mutex_unlock(&watch->lock);
    return w;
}

void mp_watch_end(mp_watched *w) {
    if (!w) return;
    mp_watch_feed(w, NULL);
    pthread_mutex_lock(&w->watch->lock);
    w->fd = -1;
    w->deadline_ns = 0;
    w->next_free = w->watch->first_free;
    w->watch->first_free = (uint32_t)(w - w->watch->places);
    pthread_mutex_unlock(&w->watch->lock);
}

void mp_watch_deadline(mp_watched *w, uint64_t when_ns) {
    if (!w) return;
    pthread_mutex_lock(&w->watch->lock);
    w->deadline_ns = when_ns;
    pthread_mutex_unlock(&w->watch->lock);
}

void mp_watch_feed(mp_watched *w, mp_feed *feed) {
    if (!w) return;
    mp_watch *watch = w->watch;
    pthread_mutex_lock(&watch->lock);
    if (w->feed && !feed) epoll_ctl(watch->epoll, EPOLL_CTL_DEL, w->fd, NULL);
    if (feed) {
        w->generation++;
        uint64_t place = (uint64_t)(w - watch->places);
        /* A client that only stops sending counts as gone: nothing tells it from one that left. */
        struct epoll_event event = { .events = EPOLLRDHUP | EPOLLONESHOT, .data.u64 = place << 32 | w->generation };
        epoll_ctl(watch->epoll, EPOLL_CTL_ADD, w->fd, &event);
    }
    w->feed = feed;
    pthread_mutex_unlock(&watch->lock);
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

mepic_status mp_watch_open(const mp_watch_options *options, mp_watch **out, mepic_error *err) {
    mp_watch *watch = mp_calloc(1, sizeof *watch);
    if (!watch) return mp_fail_nomem(err, "the watch over connections", sizeof *watch);
    watch->options = *options;
    pthread_mutex_init(&watch->lock, NULL);
    watch->epoll = epoll_create1(EPOLL_CLOEXEC);
    watch->stop = eventfd(0, EFD_CLOEXEC);
    watch->places = mp_calloc(options->max_connections, sizeof *watch->places);
    struct epoll_event event = { .events = EPOLLIN, .data.u64 = STOP };
    if (!watch->places || watch->epoll < 0 || watch->stop < 0 ||
        epoll_ctl(watch->epoll, EPOLL_CTL_ADD, watch->stop, &event) != 0) {
        mp_watch_close(watch);
        return mp_fail(err, MEPIC_ERR_NOMEM, "the watch over connections could not be opened: %s", strerror(errno));
    }
    watch->n_places = options->max_connections;
    for (uint32_t i = 0; i < watch->n_places; i++) {
        watch->places[i] = (mp_watched){ .watch = watch, .fd = -1, .next_free = i + 1 };
    }
    if (pthread_create(&watch->thread, NULL, run, watch) != 0) {
        mp_watch_close(watch);
        return mp_fail(err, MEPIC_ERR_NOMEM, "a thread to watch connections could not be started");
    }
    watch->started = true;
    *out = watch;
    return MEPIC_OK;
}

void mp_watch_stop(mp_watch *watch) {
    if (!watch || !watch->started) return;
    uint64_t one = 1;
    ssize_t n = write(watch->stop, &one, sizeof one);
    (void)n; // the first one always fits
    pthread_join(watch->thread, NULL);
    watch->started = false;
}

void mp_watch_close(mp_watch *watch) {
    if (!watch) return;
    mp_watch_stop(watch);
    if (watch->epoll >= 0) close(watch->epoll);
    if (watch->stop >= 0) close(watch->stop);
    pthread_mutex_destroy(&watch->lock);
    mp_free(watch->places);
    mp_free(watch);
}
