#include "bench/load/observe.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/mem.h"

enum { PAGE_BYTES_MAX = 1 << 20 };

/* The sum over the lines of a metric that have `label` in them; false: there is none. */
static bool read_metric(const char *page, const char *name, const char *label, double *out) {
    size_t n = strlen(name);
    bool found = false;
    *out = 0;
    for (const char *line = page; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        size_t length = strcspn(line, "\n");
        if (strncmp(line, name, n) != 0 || !memchr("{ ", line[n], 2)) continue;
        const char *at = label ? strstr(line, label) : line, *value = memchr(line, ' ', length);
        const char *closed = memchr(line, '}', length); // a label's value may have blanks
        if (closed) value = closed + 1;
        if (!at || at >= line + length || !value) continue;
        *out += strtod(value, NULL);
        found = true;
    }
    return found;
}

static char *get_metrics(const struct sockaddr_in *server, const char *key) {
    char *page = mp_alloc(PAGE_BYTES_MAX), request[512];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const struct timeval patience = { .tv_sec = 30 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    int length =
        snprintf(request, sizeof request, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n%s%s%sConnection: close\r\n\r\n",
                 key ? "Authorization: Bearer " : "", key ? key : "", key ? "\r\n" : "");
    size_t len = 0;
    if (page && fd >= 0 && length < (int)sizeof request &&
        connect(fd, (const struct sockaddr *)(const void *)server, sizeof *server) == 0 &&
        send(fd, request, (size_t)length, MSG_NOSIGNAL) == length) {
        ssize_t n;
        while (len < PAGE_BYTES_MAX - 1 && (n = recv(fd, page + len, PAGE_BYTES_MAX - 1 - len, 0)) > 0)
            len += (size_t)n;
    }
    if (fd >= 0) close(fd);
    if (page) page[len] = 0;
    return page;
}

void load_view_process(uint32_t pid, load_view *out) {
    out->rss_kib = out->descriptors = 0;
    if (!pid) return;
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%u/status", pid);
    FILE *status = fopen(path, "r");
    while (status && fgets(line, sizeof line, status)) {
        if (strncmp(line, "VmRSS:", 6) == 0) out->rss_kib = strtoull(line + 6, NULL, 10);
    }
    if (status) fclose(status);
    snprintf(path, sizeof path, "/proc/%u/fd", pid);
    DIR *directory = opendir(path);
    while (directory) {
        const struct dirent *entry = readdir(directory);
        if (!entry) break;
        out->descriptors += entry->d_name[0] != '.';
    }
    if (directory) closedir(directory);
}

void load_view_read(const struct sockaddr_in *server, const char *key, uint32_t pid, load_view *out) {
    *out = (load_view){ 0 };
    load_view_process(pid, out);
    char *page = get_metrics(server, key);
    if (!page) return;
    static const char pages[] = "mepic:pages";
    double in_private, in_prefix, in_chunk;
    out->metrics = read_metric(page, "vllm:num_requests_running", NULL, &out->running) &&
                   read_metric(page, "vllm:num_requests_waiting", NULL, &out->waiting) &&
                   read_metric(page, "vllm:generation_tokens_total", NULL, &out->generated) &&
                   read_metric(page, pages, "kind=\"private\"", &in_private) &&
                   read_metric(page, pages, "kind=\"prefix\"", &in_prefix) &&
                   read_metric(page, pages, "kind=\"chunk\"", &in_chunk) &&
                   read_metric(page, pages, "kind=\"evictable\"", &out->pages_evictable) &&
                   read_metric(page, pages, "kind=\"free\"", &out->pages_free);
    if (out->metrics) out->pages_referenced = in_private + in_prefix + in_chunk;
    mp_free(page);
}
