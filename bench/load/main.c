/* bench_load: many streams at once against a server of OpenAI's API, and what became of them.
 *
 * One thread, one epoll; it sends no faster than it reads, and says how much of a core it used: near 100 % the times
 * are its own. Every connection carries one request. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "bench/load/observe.h"
#include "bench/load/slow.h"
#include "bench/load/stream.h"
#include "cli/numbers.h"
#include "cli/options.h"
#include "cli/table.h"

enum {
    STREAMS_MAX = 60000,
    BEGIN_AT_ONCE = 64,
    EVENTS_MAX = 256,
    BODIES_MIN = 256,
    WHYS_MAX = 5,
    ROUNDS_MAX = 99,
};
static const uint64_t SECOND = 1000000000, SETTLE = 60 * UINT64_C(1000000000);

static const char usage_text[] =
    "usage: bench_load [OPTIONS]\n\n"
    "Holds a number of streams open against a server of OpenAI's API until so many requests are through, or for a "
    "time.\n"
    "Prints how they ended, times, and the server before and after. Exit status 1: a request failed, mepic's pages or\n"
    "descriptors did not come back, or what --max-growth and --slow ask for does not hold.\n";

typedef struct load_options {
    const char *host, *path, *model, *key, *bodies, *csv;
    uint32_t port, streams, requests, seconds, tokens, words, leave, bad, whole, silence, pid, every;
    uint32_t warm_up, slow, rounds, goodput;
    uint64_t seed, max_growth;
    bool may_refuse;
} load_options;

typedef struct numbers {
    double *items;
    size_t n, cap;
} numbers;

typedef struct bench {
    load_options o;
    struct sockaddr_in server;
    int epoll;
    load_request *requests; /* [n_requests], taken in turn */
    uint32_t n_requests;
    load_request bad;
    load_stream *streams; /* [o.streams] */
    load_slow *slow;      /* while they are there */
    uint32_t n_open, n_begun, n_of[LOAD_FAILED + 1], n_whys;
    char whys[WHYS_MAX][400];
    numbers first_ms, refusal_ms, total_ms;
    uint64_t n_tokens, n_prompt, n_cached, n_data; /* by the usages; data lines */
    /* While all streams had begun and none had ended. */
    uint32_t n_speaking;
    uint64_t all_from_ns, all_to_ns, all_from_data, all_to_data;
    /* Of a run: what it ends with, and which request is the next. */
    uint32_t run_begun, run_requests, run_seconds, turn;
    uint64_t from_ns;
    uint64_t run_ns; /* of all runs */
    double client_seconds;
    load_view before, after, peak;
    mp_random random;
} bench;

static void out_of_memory(void) {
    fprintf(stderr, "bench_load: out of memory\n");
    exit(MP_EXIT_FAILURE);
}

static void add_number(numbers *list, double value) {
    if (list->n == list->cap) {
        list->cap = list->cap ? 2 * list->cap : 1024;
        list->items = mp_realloc(list->items, list->cap * sizeof *list->items);
        if (!list->items) out_of_memory();
    }
    list->items[list->n++] = value;
}

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

static load_request make_request(const load_options *o, const char *body, size_t n, int status) {
    char head[1024];
    int length = snprintf(head, sizeof head,
                          "POST %s HTTP/1.1\r\nHost: %s:%u\r\nContent-Type: application/json\r\n%s%s%s"
                          "Content-Length: %zu\r\n\r\n",
                          o->path, o->host, o->port, o->key ? "Authorization: Bearer " : "", o->key ? o->key : "",
                          o->key ? "\r\n" : "", n);
    load_request request = { .n = (size_t)length + n, .status = status };
    request.bytes = mp_alloc(request.n);
    if (!request.bytes || length >= (int)sizeof head) out_of_memory();
    memcpy(request.bytes, head, (size_t)length);
    memcpy(request.bytes + length, body, n);
    return request;
}

/* A prompt of its own for each, so that nothing is found in a cache. */
static load_request make_prompt(bench *load, uint32_t i) {
    const load_options *o = &load->o;
    mp_buf body = { .limit = 1 << 20 };
    char text[512];
    bool whole = mp_random_below(&load->random, 100) < o->whole;
    bool ok = mp_buf_append(&body, text, (size_t)snprintf(text, sizeof text, "{\"prompt\":\"%u", i));
    for (uint32_t w = 0; w < o->words; w++) {
        int n = snprintf(text, sizeof text, " word%u", mp_random_below(&load->random, 1000));
        ok = ok && mp_buf_append(&body, text, (size_t)n);
    }
    int n =
        snprintf(text, sizeof text, "\",\"max_tokens\":%u,\"temperature\":0,\"ignore_eos\":true,%s%s%s\"stream\":%s%s}",
                 o->tokens, o->model ? "\"model\":\"" : "", o->model ? o->model : "", o->model ? "\"," : "",
                 whole ? "false" : "true", whole ? "" : ",\"stream_options\":{\"include_usage\":true}");
    if (!ok || n >= (int)sizeof text || !mp_buf_append(&body, text, (size_t)n)) out_of_memory();
    load_request request = make_request(o, body.data, body.len, 200);
    mp_buf_clear(&body);
    return request;
}

/* A body a line. */
static bool read_bodies(bench *load) {
    FILE *file = fopen(load->o.bodies, "r");
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while (file && (n = getline(&line, &cap, file)) > 0) {
        load_request *requests = mp_realloc(load->requests, (load->n_requests + 1) * sizeof *requests);
        if (!requests) out_of_memory();
        load->requests = requests;
        requests[load->n_requests++] = make_request(&load->o, line, (size_t)n, 200);
    }
    free(line); // getline's
    if (file) fclose(file);
    if (load->n_requests == 0) fprintf(stderr, "bench_load: no bodies in %s\n", load->o.bodies);
    return load->n_requests > 0;
}

static bool make_requests(bench *load) {
    static const char cut[] = "{\"prompt\":\"x\",\"max_tokens\":";
    load->bad = make_request(&load->o, cut, sizeof cut - 1, 400);
    if (load->o.bodies) return read_bodies(load);
    load->n_requests = load->o.streams > BODIES_MIN ? load->o.streams : BODIES_MIN;
    load->requests = mp_calloc(load->n_requests, sizeof *load->requests);
    if (!load->requests) out_of_memory();
    for (uint32_t i = 0; i < load->n_requests; i++) load->requests[i] = make_prompt(load, i);
    return true;
}

/* ---- The loop ---------------------------------------------------------------------------------------------------- */

static void note_end(bench *load, load_stream *s) {
    load->n_open--;
    load->n_of[s->state]++;
    load->n_tokens += s->state == LOAD_DONE ? s->n_tokens : 0;
    load->n_prompt += s->state == LOAD_DONE ? s->n_prompt : 0;
    load->n_cached += s->state == LOAD_DONE ? s->n_cached : 0;
    load->n_data += s->n_data;
    double ms = (double)(s->ended_ns - s->begun_ns) * 1e-6;
    if (s->state == LOAD_DONE && s->status == 200) add_number(&load->total_ms, ms);
    if (s->state == LOAD_REFUSED) add_number(&load->refusal_ms, ms);
    if (s->first_ns) {
        add_number(&load->first_ms, (double)(s->first_ns - s->begun_ns) * 1e-6);
        load->n_speaking--;
        if (load->all_from_ns && !load->all_to_ns) load->all_to_ns = s->ended_ns;
    }
    if (s->state == LOAD_FAILED && load->n_whys < WHYS_MAX) {
        snprintf(load->whys[load->n_whys++], sizeof load->whys[0], "%.399s", s->line);
    }
    s->state = LOAD_FREE;
}

static void note_progress(bench *load, const load_stream *s, uint32_t n_data, bool spoke) {
    if (!load->all_to_ns && load->all_from_ns) load->all_to_data += s->n_data - n_data;
    if (!spoke && s->first_ns && ++load->n_speaking == load->o.streams && !load->all_from_ns) {
        load->all_from_ns = mp_now_ns();
    }
}

static bool may_begin(const bench *load) {
    return load->run_seconds ? mp_now_ns() - load->from_ns < load->run_seconds * SECOND
                             : load->run_begun < load->run_requests;
}

static void begin_one(bench *load, load_stream *s) {
    mp_random *random = &load->random;
    const load_request *request = &load->requests[load->turn++ % load->n_requests];
    if (mp_random_below(random, 100) < load->o.bad) request = &load->bad;
    int32_t leave_after = LOAD_NEVER_LEAVE;
    if (mp_random_below(random, 100) < load->o.leave) {
        /* Some before their first token, some in the middle. */
        leave_after = (int32_t)(mp_random_below(random, 3) ? 1 + mp_random_below(random, (load->o.tokens + 1) / 2) : 0);
    }
    load->n_begun++;
    load->run_begun++;
    load->n_open++;
    load_stream_begin(s, load->epoll, &load->server, request, leave_after, mp_random_below(random, 2));
    if (s->state != LOAD_OPEN) note_end(load, s);
}

static void begin_some(bench *load) {
    uint32_t begun = 0;
    for (uint32_t i = 0; i < load->o.streams && begun < BEGIN_AT_ONCE && may_begin(load); i++) {
        if (load->streams[i].state != LOAD_FREE) continue;
        begin_one(load, &load->streams[i]);
        begun++;
    }
}

static void look_after(bench *load, uint64_t now) {
    load_view view;
    load_view_process(load->o.pid, &view);
    if (view.rss_kib > load->peak.rss_kib) load->peak.rss_kib = view.rss_kib;
    if (view.descriptors > load->peak.descriptors) load->peak.descriptors = view.descriptors;
    for (uint32_t i = 0; i < load->o.streams; i++) {
        load_stream *s = &load->streams[i];
        if (s->state != LOAD_OPEN || now - s->last_ns < load->o.silence * SECOND) continue;
        load_stream_fail(s, "nothing came for too long (--silence)");
        note_end(load, s);
    }
}

static void print_view(const char *when, const load_view *v) {
    printf("%-8s", when);
    if (v->rss_kib)
        printf("  RSS %.1f MiB, %llu descriptors", (double)v->rss_kib / 1024, (unsigned long long)v->descriptors);
    if (v->metrics) {
        printf("  pages: %.0f referenced, %.0f evictable, %.0f free; replies: %.0f run, %.0f wait", v->pages_referenced,
               v->pages_evictable, v->pages_free, v->running, v->waiting);
    }
    printf("\n");
    fflush(stdout);
}

static void print_between(const bench *load, uint64_t now) {
    load_view view;
    char when[32];
    load_view_read(&load->server, load->o.key, load->o.pid, &view);
    snprintf(when, sizeof when, "%llu s", (unsigned long long)((now - load->from_ns) / SECOND));
    print_view(when, &view);
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Until so many requests have ended; seconds: instead, those of that time. */
static void run(bench *load, uint32_t requests, uint32_t seconds) {
    struct epoll_event events[EVENTS_MAX];
    double client_from = cpu_seconds();
    load->run_begun = 0;
    load->run_requests = requests;
    load->run_seconds = seconds;
    load->from_ns = mp_now_ns();
    uint64_t looked = load->from_ns, printed = load->from_ns;
    while (load->n_open > 0 || may_begin(load)) {
        begin_some(load);
        bool more = load->n_open < load->o.streams && may_begin(load);
        int n = epoll_wait(load->epoll, events, EVENTS_MAX, more ? 0 : load->slow ? 10 : 100);
        for (int i = 0; i < n; i++) {
            load_stream *s = events[i].data.ptr;
            if (s->state != LOAD_OPEN) continue;
            uint32_t n_data = s->n_data;
            bool spoke = s->first_ns != 0;
            load_stream_ready(s, load->epoll);
            note_progress(load, s, n_data, spoke);
            if (s->state != LOAD_OPEN) note_end(load, s);
        }
        uint64_t now = mp_now_ns();
        if (load->slow) load_slow_send(load->slow, now);
        if (now - looked >= SECOND) {
            look_after(load, now);
            looked = now;
        }
        if (load->o.every && now - printed >= load->o.every * SECOND) {
            print_between(load, now);
            printed = now;
        }
    }
    load->run_ns += mp_now_ns() - load->from_ns;
    load->client_seconds += cpu_seconds() - client_from;
}

/* Until nothing is left of the load in the server. */
static bool settle(bench *load) {
    const struct timespec pause = { .tv_nsec = 20000000 };
    for (uint64_t until = mp_now_ns() + SETTLE;;) {
        load_view_read(&load->server, load->o.key, load->o.pid, &load->after);
        const load_view *a = &load->after, *b = &load->before;
        bool back = a->running + a->waiting <= b->running + b->waiting && a->pages_referenced <= b->pages_referenced &&
                    a->descriptors <= b->descriptors;
        if (!b->metrics || (back && a->metrics)) return true;
        if (mp_now_ns() > until) return false;
        nanosleep(&pause, NULL);
    }
}

/* What was measured so far does not count, unless it failed. */
static void forget(bench *load) {
    uint32_t n_failed = load->n_of[LOAD_FAILED];
    memset(load->n_of, 0, sizeof load->n_of);
    load->n_of[LOAD_FAILED] = n_failed;
    load->n_begun = 0;
    load->n_tokens = load->n_prompt = load->n_cached = load->n_data = 0;
    load->first_ms.n = load->refusal_ms.n = load->total_ms.n = 0;
    load->all_from_ns = load->all_to_ns = load->all_from_data = load->all_to_data = 0;
    load->run_ns = 0;
    load->client_seconds = 0;
}

static bool warm_up(bench *load) {
    run(load, load->o.warm_up, 0);
    bool settled = settle(load);
    forget(load);
    return settled;
}

/* ---- Beside slow ones -------------------------------------------------------------------------------------------- */

static bool all_hang(const bench *load) {
    const char *why;
    uint32_t n = load_slow_wait(load->slow, &why);
    if (n == load->o.slow) return true;
    fprintf(stderr, "bench_load: %u of %u slow connections hang in the server; the others do not come in: %s\n", n,
            load->o.slow, why);
    return false;
}

/* Tokens a second of the replies that were whole; negative: not all slow ones hung in the server before and after. */
static double run_beside(bench *load, uint32_t n_slow, bool *settled) {
    uint64_t tokens = load->n_tokens, ns = load->run_ns;
    bool beside = true;
    if (n_slow) {
        load->slow = load_slow_open(&load->server, n_slow, load->o.path, load->o.key);
        if (!load->slow) out_of_memory();
        beside = all_hang(load);
    }
    if (beside) run(load, load->o.requests, load->o.seconds);
    if (load->slow) {
        beside = beside && all_hang(load);
        printf("slow      %llu were ended by the server\n", (unsigned long long)load_slow_ended(load->slow));
        load_slow_close(load->slow);
        load->slow = NULL;
    }
    *settled = settle(load) && *settled;
    return beside ? (double)(load->n_tokens - tokens) / ((double)(load->run_ns - ns) * 1e-9) : -1.0;
}

/* Alone and beside slow ones, in turn. */
static bool run_rounds(bench *load, bool *settled) {
    double ratios[ROUNDS_MAX];
    for (uint32_t i = 0; i < load->o.rounds; i++) {
        double rate[2]; // alone, beside
        for (uint32_t k = 0; k < 2; k++) {
            uint32_t beside = (i + k) % 2;
            rate[beside] = run_beside(load, beside ? load->o.slow : 0, settled);
            if (rate[beside] < 0.0) return false;
        }
        ratios[i] = rate[0] > 0.0 ? rate[1] / rate[0] : 0.0;
        printf("round %-3u %.0f tokens/s alone, %.0f beside %u slow ones: %.1f %%\n", i + 1, rate[0], rate[1],
               load->o.slow, 100.0 * ratios[i]);
        fflush(stdout);
    }
    double percent = 100.0 * mp_quantile(ratios, load->o.rounds, 0.5);
    printf("goodput   %.1f %% of alone (median)\n", percent);
    if (percent >= load->o.goodput) return true;
    fprintf(stderr, "bench_load: goodput beside slow connections is %.1f %% of alone; at least %u %% is asked for\n",
            percent, load->o.goodput);
    return false;
}

/* ---- The report -------------------------------------------------------------------------------------------------- */

static int report(bench *load) {
    static const char *const columns[] = { "streams",   "requests",       "ok",          "refused",
                                           "left",      "failed",         "first p50",   "first p95",
                                           "first p99", "refusal p50",    "refusal p99", "whole p50",
                                           "prompts",   "cached",         "tokens",      "data",
                                           "tokens/s",  "data/s all ran", "seconds",     "client %" };
    enum { N_COLUMNS = sizeof columns / sizeof *columns };
    double seconds = (double)load->run_ns * 1e-9;
    double together = (double)(load->all_to_ns - load->all_from_ns) * 1e-9;
    mp_table table;
    mp_table_init(&table, columns, N_COLUMNS);
    const uint32_t counts[] = { load->o.streams,          load->n_begun,         load->n_of[LOAD_DONE],
                                load->n_of[LOAD_REFUSED], load->n_of[LOAD_LEFT], load->n_of[LOAD_FAILED] };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) mp_table_add(&table, "%u", counts[i]);
    const numbers *first = &load->first_ms, *refusal = &load->refusal_ms, *total = &load->total_ms;
    mp_table_add(&table, "%.1f", mp_quantile(first->items, first->n, 0.5));
    mp_table_add(&table, "%.1f", mp_quantile(first->items, first->n, 0.95));
    mp_table_add(&table, "%.1f", mp_quantile(first->items, first->n, 0.99));
    mp_table_add(&table, "%.1f", mp_quantile(refusal->items, refusal->n, 0.5));
    mp_table_add(&table, "%.1f", mp_quantile(refusal->items, refusal->n, 0.99));
    mp_table_add(&table, "%.1f", mp_quantile(total->items, total->n, 0.5));
    mp_table_add(&table, "%llu", (unsigned long long)load->n_prompt);
    mp_table_add(&table, "%llu", (unsigned long long)load->n_cached);
    mp_table_add(&table, "%llu", (unsigned long long)load->n_tokens);
    mp_table_add(&table, "%llu", (unsigned long long)load->n_data);
    mp_table_add(&table, "%.1f", (double)load->n_tokens / seconds);
    mp_table_add(&table, "%.1f", load->all_to_ns ? (double)load->all_to_data / together : 0.0);
    mp_table_add(&table, "%.2f", seconds);
    mp_table_add(&table, "%.0f", 100 * load->client_seconds / seconds);
    printf("# times in ms, from the connect; tokens by the usages\n");
    int result = table.failed ? MP_EXIT_FAILURE : MP_EXIT_OK;
    mp_table_print(&table, stdout);
    mepic_error err;
    if (load->o.csv && mp_table_write_csv(&table, load->o.csv, &err) != MEPIC_OK) {
        fprintf(stderr, "bench_load: %s\n", err.message);
        result = MP_EXIT_FAILURE;
    }
    mp_table_clear(&table);
    return result;
}

/* Memory that the system gave the server since `before`. */
static bool judge_growth(const bench *load) {
    if (!load->before.rss_kib || !load->after.rss_kib) return !load->o.max_growth;
    double mib = ((double)load->after.rss_kib - (double)load->before.rss_kib) / 1024,
           most = (double)load->o.max_growth / (1 << 20);
    printf("growth    RSS %+.1f MiB\n", mib);
    if (!load->o.max_growth || mib <= most) return true;
    fprintf(stderr, "bench_load: the server's RSS grew by %.1f MiB; --max-growth is %.1f MiB\n", mib, most);
    return false;
}

static int run_and_report(bench *load) {
    load_view_read(&load->server, load->o.key, load->o.pid, &load->before);
    bool settled = !load->o.warm_up || warm_up(load), enough = true;
    if (load->o.warm_up) load->before = load->after;
    load->peak = load->before;
    print_view("before", &load->before);
    if (load->o.slow) {
        enough = run_rounds(load, &settled);
    } else {
        run(load, load->o.requests, load->o.seconds);
        settled = settle(load) && settled;
    }
    if (load->peak.rss_kib) {
        printf("%-8s  RSS %.1f MiB, %llu descriptors\n", "peak", (double)load->peak.rss_kib / 1024,
               (unsigned long long)load->peak.descriptors);
    }
    print_view("after", &load->after);
    enough = judge_growth(load) && enough;
    int result = report(load);
    for (uint32_t i = 0; i < load->n_whys; i++) fprintf(stderr, "bench_load: failed: %s\n", load->whys[i]);
    if (!settled) fprintf(stderr, "bench_load: a minute later the server still holds some of it\n");
    bool refused = load->n_of[LOAD_REFUSED] > 0 && !load->o.may_refuse;
    if (refused) fprintf(stderr, "bench_load: requests were refused (--may-refuse: that is expected)\n");
    return load->n_of[LOAD_FAILED] || !settled || refused || !enough ? MP_EXIT_FAILURE : result;
}

static bool read_options(load_options *o, int argc, char **argv, int *result) {
    const mp_option options[] = {
        MP_TEXT(0, "host", &o->host, "ADDRESS", "IPv4 address of the server (default 127.0.0.1)"),
        MP_COUNT(0, "port", &o->port, 1, 65535, "N", "its port (default 8080)"),
        MP_TEXT(0, "path", &o->path, "PATH", "route (default /v1/completions, with --bodies /v1/chat/completions)"),
        MP_TEXT(0, "model", &o->model, "NAME", "model to name in requests (default: none)"),
        MP_TEXT(0, "api-key", &o->key, "KEY", "key to send"),
        MP_COUNT(0, "streams", &o->streams, 1, STREAMS_MAX, "N", "requests at a time (default 100)"),
        MP_COUNT(0, "requests", &o->requests, 1, UINT32_MAX, "N", "in all (default: as many as streams, or bodies)"),
        MP_COUNT(0, "seconds", &o->seconds, 1, 1000000, "N", "instead: as many as there are in N seconds"),
        MP_COUNT(0, "tokens", &o->tokens, 1, 1u << 20, "N", "of a reply (default 64)"),
        MP_COUNT(0, "words", &o->words, 0, 10000, "N", "of a prompt (default 8)"),
        MP_TEXT(0, "bodies", &o->bodies, "FILE", "bodies of requests, one a line, instead of made-up prompts"),
        MP_COUNT(0, "leave", &o->leave, 0, 100, "PERCENT", "of the streams hang up: at once, or in the middle"),
        MP_COUNT(0, "bad", &o->bad, 0, 100, "PERCENT", "of the requests are not JSON, to be answered with 400"),
        MP_COUNT(0, "whole", &o->whole, 0, 100, "PERCENT", "of the made-up prompts are not streamed"),
        MP_FLAG(0, "may-refuse", &o->may_refuse, "answers 429 and 503 are no failure"),
        MP_COUNT(0, "silence", &o->silence, 1, 1000000, "SECONDS",
                 "without a byte, and a stream is lost (default 120)"),
        MP_COUNT(0, "pid", &o->pid, 1, UINT32_MAX, "N", "the server's process, for its memory and descriptors"),
        MP_COUNT(0, "warm-up", &o->warm_up, 1, UINT32_MAX, "N", "requests before those that count"),
        MP_SIZE(0, "max-growth", &o->max_growth, 1, UINT64_C(1) << 40, "SIZE",
                "of the server's RSS by the load, as 16M; needs --pid, means little without --warm-up"),
        MP_COUNT(0, "slow", &o->slow, 1, STREAMS_MAX, "N",
                 "run alone and beside N connections that never end their request, in turn"),
        MP_COUNT(0, "rounds", &o->rounds, 1, ROUNDS_MAX, "N", "of both with --slow (default 3)"),
        MP_COUNT(0, "goodput", &o->goodput, 0, 1000000, "PERCENT",
                 "of tokens a second alone that there must be beside them (default 95)"),
        MP_COUNT(0, "every", &o->every, 1, 100000, "SECONDS", "print what the server holds that often"),
        MP_NUMBER(0, "seed", &o->seed, 0, UINT64_MAX, "N", "of prompts, and of who leaves when"),
        MP_TEXT(0, "csv", &o->csv, "FILE", "write the table there as well"),
    };
    const mp_option_group group = { "Options", options, sizeof options / sizeof *options };
    return mp_options_begin("bench_load", usage_text, &group, 1, argc, argv, result);
}

static void clear(bench *load) {
    for (uint32_t i = 0; i < load->n_requests; i++) mp_free(load->requests[i].bytes);
    mp_free(load->requests);
    mp_free(load->bad.bytes);
    mp_free(load->streams);
    mp_free(load->first_ms.items);
    mp_free(load->refusal_ms.items);
    mp_free(load->total_ms.items);
    close(load->epoll);
}

int main(int argc, char **argv) {
    bench load = { .o = { .host = "127.0.0.1",
                          .port = 8080,
                          .streams = 100,
                          .tokens = 64,
                          .words = 8,
                          .silence = 120,
                          .rounds = 3,
                          .goodput = 95 } };
    load_options *o = &load.o;
    int result;
    if (!read_options(o, argc, argv, &result)) return result;
    if (!o->path) o->path = o->bodies ? "/v1/chat/completions" : "/v1/completions";
    load.random.state = o->seed;
    load.server = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons((uint16_t)o->port) };
    if (inet_pton(AF_INET, o->host, &load.server.sin_addr) != 1) {
        fprintf(stderr, "bench_load: --host: '%s' is not an IPv4 address\n", o->host);
        return MP_EXIT_USAGE;
    }
    if (o->max_growth && !o->pid) {
        fprintf(stderr, "bench_load: --max-growth needs the server's process: give --pid\n");
        return MP_EXIT_USAGE;
    }
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    load.streams = mp_calloc(o->streams, sizeof *load.streams);
    load.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!load.streams || load.epoll < 0) out_of_memory();
    if (!make_requests(&load)) {
        clear(&load);
        return MP_EXIT_USAGE;
    }
    if (!o->requests) o->requests = o->bodies ? load.n_requests : o->streams;
    result = run_and_report(&load);
    clear(&load);
    return result;
}
