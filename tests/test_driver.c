/* The threads of HTTP, by a server's many connections. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "serve/exchange.h"
#include "support/replies.h"
#include "support/server.h"

enum {
    BATCH = 128,                           /* events that libmicrohttpd takes from epoll at once */
    CLIENTS = BATCH * MP_HTTP_THREADS + 1, /* so that one thread has a batch and one more */
};

/* The records of requests, which the thread of their connection writes. */
typedef struct crowd {
    http_client clients[CLIENTS];
    pthread_t threads[CLIENTS]; /* that serve them */
    sem_t seen, held, go;
} crowd;

/* A request that says so holds up its thread. */
static void record(void *user, const mp_record *r) {
    crowd *all = user;
    if (strcmp(r->path, "/health") != 0) return;
    if (strcmp(r->id, "hold") == 0) {
        sem_post(&all->held);
        sem_wait(&all->go);
        return;
    }
    all->threads[strtoul(r->id, NULL, 10)] = pthread_self();
    sem_post(&all->seen);
}

static void ask_health(http_client *c, const char *id, const char *connection) {
    char headers[96];
    snprintf(headers, sizeof headers, "X-Request-Id: %s\r\nConnection: %s\r\n", id, connection);
    http_send_request(c, "GET", "/health", headers, NULL);
    http_reply reply;
    assert_true(http_read(c, &reply));
    assert_int_equal(reply.status, 200);
    http_reply_clear(&reply);
}

static void open_crowd(crowd *all) {
    sem_init(&all->seen, 0, 0);
    sem_init(&all->held, 0, 0);
    sem_init(&all->go, 0, 0);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        char id[16];
        snprintf(id, sizeof id, "%u", i);
        http_open(&all->clients[i], port);
        ask_health(&all->clients[i], id, "keep-alive");
        sem_wait(&all->seen);
    }
}

/* The clients of the thread that has the most, first; how many they are. */
static uint32_t choose_thread(const crowd *all, uint32_t *chosen) {
    uint32_t best = 0;
    for (uint32_t i = 0; i < CLIENTS; i++) {
        uint32_t same[CLIENTS], n = 0;
        for (uint32_t j = 0; j < CLIENTS; j++) {
            if (pthread_equal(all->threads[i], all->threads[j])) same[n++] = j;
        }
        if (n > best) memcpy(chosen, same, n * sizeof *same);
        if (n > best) best = n;
    }
    return best;
}

/* libmicrohttpd's own thread waits for one more. */
static void a_full_batch_of_ready_connections_is_served(void **state) {
    (void)state;
    static crowd all;
    mepic_engine_options options = tiny_options();
    options.max_queued = BATCH;
    engine = open_engine(&options);
    mp_server_options serve = default_options();
    serve.max_replies = BATCH;
    serve.record = record;
    serve.log.user = &all;
    start(&serve);
    open_crowd(&all);
    uint32_t chosen[CLIENTS];
    assert_true(choose_thread(&all, chosen) > BATCH);
    ask_health(&all.clients[chosen[BATCH]], "hold", "close"); // behind it the thread has nothing to do
    sem_wait(&all.held);
    for (uint32_t i = 0; i < BATCH; i++) {
        http_send_request(&all.clients[chosen[i]], "POST", "/v1/completions", "",
                          "{\"prompt\":\"x\",\"max_tokens\":2,\"ignore_eos\":true,\"stream\":true}");
    }
    sem_post(&all.go);
    for (uint32_t i = 0; i < BATCH; i++) {
        char head[8192];
        assert_int_equal(http_read_head(&all.clients[chosen[i]], head, sizeof head), 200);
        stream s;
        read_stream(&all.clients[chosen[i]], &s);
        assert_true(s.done);
        json_decref(s.last);
    }
    for (uint32_t i = 0; i < CLIENTS; i++) http_close(&all.clients[i]);
    stop();
    mepic_engine_close(engine);
}

/* The other thread has no connection at all then. */
static void a_full_server_listens_again(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    engine = open_engine(&options);
    mp_server_options serve = default_options();
    serve.max_connections = 1;
    start(&serve);
    for (int i = 0; i < 8; i++) {
        json_decref(http_ask_json(port, "POST", "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":2}", 200));
    }
    stop();
    mepic_engine_close(engine);
}

/* Entries in the table of this process. */
static long descriptors_reserved(void) {
    FILE *status = fopen("/proc/self/status", "r");
    char line[256];
    long n = 0;
    assert_non_null(status);
    while (fgets(line, sizeof line, status)) {
        if (strncmp(line, "FDSize:", 7) == 0) n = strtol(line + 7, NULL, 10);
    }
    fclose(status);
    return n;
}

/* Both threads stood still while it grew, again and again. Before any test that opens as many. */
static void the_first_burst_of_connections_finds_room_for_their_descriptors(void **state) {
    (void)state;
    const mepic_engine_options options = tiny_options();
    engine = open_engine(&options);
    mp_server_options serve = default_options();
    serve.max_connections = 900; // most systems give 1,024
    assert_true(descriptors_reserved() < 900);
    start(&serve);
    assert_true(descriptors_reserved() >= 900);
    stop();
    mepic_engine_close(engine);
}

/* ---- No descriptor is left --------------------------------------------------------------------------------------- */

static pthread_t tester;
static sem_t rests; /* a thread of HTTP waits without being told who knocks */

int __real_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout) {
    if (n == 1 && timeout > 0 && !pthread_equal(pthread_self(), tester)) sem_post(&rests);
    return __real_poll(fds, n, timeout);
}

/* Whoever opens a file is told that there are too many; gives what was allowed. */
static struct rlimit take_all_descriptors(void) {
    struct rlimit all, none;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &all), 0);
    none = all;
    int lowest = dup(STDIN_FILENO);
    assert_true(lowest >= 0);
    close(lowest);
    none.rlim_cur = (rlim_t)lowest;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    return all;
}

/* With no connection, libmicrohttpd tries to take the one that knocks again and again. */
static void a_thread_without_a_descriptor_for_a_client_rests(void **state) {
    (void)state;
    tester = pthread_self();
    sem_init(&rests, 0, 0);
    const mepic_engine_options options = tiny_options();
    engine = open_engine(&options);
    const mp_server_options serve = default_options();
    start(&serve);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    http_client c = { .fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) };
    assert_true(c.fd >= 0);
    const struct rlimit all = take_all_descriptors();
    assert_int_equal(connect(c.fd, (struct sockaddr *)&address, sizeof address), 0);
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    for (int i = 0; i < MP_HTTP_THREADS; i++) {
        if (sem_timedwait(&rests, &until) != 0) fail_msg("a thread did not rest for a minute");
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &all), 0);
    ask_health(&c, "after", "close");
    http_close(&c);
    stop();
    mepic_engine_close(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_burst_of_connections_finds_room_for_their_descriptors),
        cmocka_unit_test(a_full_batch_of_ready_connections_is_served),
        cmocka_unit_test(a_full_server_listens_again),
        cmocka_unit_test(a_thread_without_a_descriptor_for_a_client_rests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
