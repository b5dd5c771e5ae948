/* Connections that begin a request, go on with a byte a second and never end it ("slowloris"), beside the load's good
 * ones. Every other one hangs in its headers, the others in their body. One that the server ends is opened again.
 * One that does not come in is tried again. Belongs to the loop in main.c, which lets them send. One thread. */
#ifndef MEPIC_BENCH_LOAD_SLOW_H
#define MEPIC_BENCH_LOAD_SLOW_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct load_slow load_slow;

/* NULL: no memory. `path` is a route that takes a body; `key` may be NULL. */
load_slow *load_slow_open(const struct sockaddr_in *server, uint32_t n, const char *path, const char *key);
/* A byte of each connection whose turn it is. To be called often. */
void load_slow_send(load_slow *slow, uint64_t now);
/* Waits until all hang in the server, ten seconds at most; how many do. *why: what keeps the others out, if any. */
uint32_t load_slow_wait(load_slow *slow, const char **why);
/* How many the server has ended so far. */
uint64_t load_slow_ended(const load_slow *slow);
void load_slow_close(load_slow *slow); /* NULL is a no-op */

#endif
