/* The slow connections of bench_load, beside a listener that takes none of them: the kernel does. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bench/load/slow.h"

enum { N = 8 };

static int n_refused, refusal; /* so many connects fail at once, with this errno */

int __real_connect(int fd, const struct sockaddr *address, socklen_t n);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t n);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t n) {
    if (n_refused == 0) return __real_connect(fd, address, n);
    n_refused--;
    errno = refusal;
    return -1;
}

static int lowest_descriptor(void) {
    int fd = dup(STDIN_FILENO);
    assert_true(fd >= 0);
    close(fd);
    return fd;
}

static void a_connect_that_fails_at_once_is_tried_again(void **state) {
    (void)state;
    static const int errors[] = { EADDRNOTAVAIL, ECONNREFUSED };
    int before = lowest_descriptor(), listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in server = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t n = sizeof server;
    assert_int_equal(bind(listener, (const struct sockaddr *)(const void *)&server, n), 0);
    assert_int_equal(listen(listener, 2 * N), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)(void *)&server, &n), 0);
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        refusal = errors[i];
        n_refused = 2 * N + 1;
        load_slow *slow = load_slow_open(&server, N, "/v1/completions", NULL);
        assert_non_null(slow);
        const char *why;
        assert_int_equal(load_slow_wait(slow, &why), N);
        assert_int_equal(n_refused, 0);
        assert_int_equal(load_slow_ended(slow), 0);
        load_slow_close(slow);
    }
    close(listener);
    assert_int_equal(lowest_descriptor(), before);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_connect_that_fails_at_once_is_tried_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
