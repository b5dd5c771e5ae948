#include "serve/driver.h"

#include <errno.h>
#include <limits.h>
#include <microhttpd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/mem.h"

enum { STARVED_MS = 100 };

struct mp_driver {
    struct MHD_Daemon *daemon;
    int wake;                  /* readable when somebody woke */
    atomic_bool woken, ending; /* woken: and no run has begun since, so that a step's many wakes are one write */
    bool started;
    pthread_t thread;
};

static int patience_ms(struct MHD_Daemon *daemon) {
    MHD_UNSIGNED_LONG_LONG ms;
    if (MHD_get_timeout(daemon, &ms) != MHD_YES) return -1;
    return ms < INT_MAX ? (int)ms : INT_MAX;
}

static unsigned connections(struct MHD_Daemon *daemon) {
    return MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_CURRENT_CONNECTIONS)->num_connections;
}

/* Where all connections are taken, the daemon stops listening, and takes it up again at the beginning of a run. */
static void run_daemon(struct MHD_Daemon *daemon) {
    unsigned before;
    do {
        before = connections(daemon);
        MHD_run(daemon);
    } while (connections(daemon) < before);
}

static void take_wakes(int fd) {
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof count);
    (void)n; // who reads nothing finds nothing
}

static bool no_descriptor_is_left(void) {
    int fd = eventfd(0, EFD_CLOEXEC);
    if (fd >= 0) close(fd);
    return fd < 0;
}

/* A daemon that cannot take a connection for want of a descriptor stops listening until one of its own is closed. If it
 * has none, it goes on to be told that somebody knocks: then the thread looks for a descriptor from time to time. */
static void *run(void *arg) {
    mp_driver *driver = arg;
    int events = MHD_get_daemon_info(driver->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
    struct pollfd fds[] = { { .fd = driver->wake, .events = POLLIN }, { .fd = events, .events = POLLIN } };
    bool starved = false;
    while (!atomic_load(&driver->ending)) {
        int patience = starved ? STARVED_MS : patience_ms(driver->daemon);
        if (patience != 0 && poll(fds, starved ? 1 : 2, patience) > 0 && fds[0].revents) take_wakes(driver->wake);
        atomic_store(&driver->woken, false); // before the run: whoever comes later wakes again
        bool had_none = connections(driver->daemon) == 0;
        run_daemon(driver->daemon);
        starved = had_none && connections(driver->daemon) == 0 && no_descriptor_is_left();
    }
    return NULL;
}

mepic_status mp_driver_open(mp_driver **out, mepic_error *err) {
    mp_driver *driver = mp_calloc(1, sizeof *driver);
    if (!driver) return mp_fail_nomem(err, "a thread for HTTP", sizeof *driver);
    driver->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (driver->wake < 0) {
        mp_free(driver);
        return mp_fail(err, MEPIC_ERR_NOMEM, "no descriptor for a thread for HTTP: %s", strerror(errno));
    }
    *out = driver;
    return MEPIC_OK;
}

mepic_status mp_driver_start(mp_driver *driver, struct MHD_Daemon *daemon, mepic_error *err) {
    driver->daemon = daemon;
    int failed = pthread_create(&driver->thread, NULL, run, driver);
    if (failed) return mp_fail(err, MEPIC_ERR_NOMEM, "a thread for HTTP could not be started: %s", strerror(failed));
    driver->started = true;
    return MEPIC_OK;
}

void mp_driver_wake(mp_driver *driver) {
    if (atomic_exchange(&driver->woken, true)) return;
    uint64_t one = 1;
    ssize_t n = write(driver->wake, &one, sizeof one);
    (void)n; // full: it is readable already
}

void mp_driver_stop(mp_driver *driver) {
    if (!driver) return;
    if (driver->started) {
        atomic_store(&driver->ending, true);
        mp_driver_wake(driver);
        pthread_join(driver->thread, NULL);
    }
    if (driver->daemon) MHD_stop_daemon(driver->daemon);
}

void mp_driver_close(mp_driver *driver) {
    if (!driver) return;
    close(driver->wake);
    mp_free(driver);
}
