/* What can be seen of a server from outside: its /metrics, and its process where that is on this machine. One thread;
 * it blocks. */
#ifndef MEPIC_BENCH_LOAD_OBSERVE_H
#define MEPIC_BENCH_LOAD_OBSERVE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct load_view {
    bool metrics; /* the server has the ones below */
    double running, waiting, generated; /* vllm:num_requests_*, vllm:generation_tokens_total */
    double pages_referenced, pages_evictable, pages_free;
    uint64_t rss_kib, descriptors; /* 0: unknown */
} load_view;

/* `key` may be NULL; pid 0: no process to look at. */
void load_view_read(const struct sockaddr_in *server, const char *key, uint32_t pid, load_view *out);
void load_view_process(uint32_t pid, load_view *out);

#endif
