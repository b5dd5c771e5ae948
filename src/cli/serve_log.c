#include "cli/serve_log.h"

#include "serve/json.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LINE_CAP = 2048 };

static const char *const level_names[] = { "error", "warn", "info", "debug" };

static void add(json_t *object, const char *name, uint64_t value) {
    json_object_set_new(object, name, json_integer((json_int_t)value));
}

static void add_ms(json_t *object, const char *name, uint64_t ns) {
    uint64_t microseconds = ns / 1000; // digits behind these say nothing
    json_object_set_new(object, name, json_real((double)microseconds / 1e3));
}

/* Absent where there is none. */
static void add_text(json_t *object, const char *name, const char *text) {
    if (text) json_object_set_new(object, name, mp_json_text(text, strlen(text)));
}

static json_t *open_line(mepic_log_level level, const char *event) {
    struct timespec now;
    struct tm utc;
    char text[32], time[56];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(time, sizeof time, "%s.%03ldZ", text, now.tv_nsec / 1000000);
    return json_pack("{s:s, s:s, s:s}", "time", time, "level", level_names[level], "event", event);
}

/* Drops the line. */
static void write_line(const mp_serve_log *log, json_t *line) {
    mp_buf text = { .limit = 64 << 10 };
    if (mp_json_write(line, &text) && mp_buf_append(&text, "\n", 1)) {
        fwrite(text.data, 1, text.len, log->file);
        fflush(log->file);
    }
    mp_buf_clear(&text);
}

/* Messages quote what clients sent: a line break would forge a line, an escape speak to a terminal. */
static void write_plain(const mp_serve_log *log, char *line) {
    for (unsigned char *c = (unsigned char *)line; *c; c++) {
        bool control = *c < ' ' || *c == 0x7f, high = *c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0;
        if (control || high) *c = '?';
        if (high) *++c = '?';
    }
    fprintf(log->file, "mepic serve: %s\n", line);
    fflush(log->file);
}

void mp_serve_log_write(void *user, mepic_log_level level, const char *message) {
    const mp_serve_log *log = user;
    if (level > (log->json ? MEPIC_LOG_INFO : MEPIC_LOG_WARN) && !log->verbose) return;
    if (!log->json) {
        char text[LINE_CAP];
        snprintf(text, sizeof text, "%s", message);
        write_plain(log, text);
        return;
    }
    json_t *line = open_line(level, "message");
    add_text(line, "message", message);
    write_line(log, line);
}

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

static mepic_log_level level_of(const mp_record *r) {
    bool fault = r->end && r->status == 500;
    bool plain = r->end && r->replies == 0 && r->status < 400;
    return fault ? MEPIC_LOG_ERROR : plain ? MEPIC_LOG_DEBUG : MEPIC_LOG_INFO;
}

static void write_text(const mp_serve_log *log, const mp_record *r) {
    if (!r->end) return;
    char tokens[96] = "", line[LINE_CAP];
    if (r->replies > 0) {
        snprintf(tokens, sizeof tokens, ", prompt %llu tokens (%u cached), reply %u",
                 (unsigned long long)r->prompt_tokens, r->usage.prefix_tokens + r->usage.chunk_tokens,
                 r->usage.completion_tokens);
    }
    snprintf(line, sizeof line, "%s %s %u%s, %.3f s%s%s", r->id, r->path ? r->path : "-", r->status, tokens,
             (double)r->total_ns * 1e-9, r->error ? ": " : "", r->error ? r->error : "");
    write_plain(log, line);
}

static void add_end(json_t *line, const mp_record *r) {
    add(line, "status", r->status);
    add_text(line, "code", r->code);
    add_text(line, "error", r->error);
    if (r->replies > 0) {
        add(line, "prefix_tokens", r->usage.prefix_tokens);
        add(line, "chunk_tokens", r->usage.chunk_tokens);
        add(line, "linked_tokens", r->usage.linked_tokens);
        add(line, "compiled_tokens", r->usage.compiled_tokens);
        add(line, "text_tokens", r->usage.computed_tokens);
        add(line, "completion_tokens", r->usage.completion_tokens);
        add(line, "preemptions", r->usage.preemptions);
        add_ms(line, "queue_ms", r->usage.queue_ns);
        add_ms(line, "ttft_ms", r->usage.ttft_ns);
    }
    add_ms(line, "total_ms", r->total_ns);
}

void mp_serve_log_record(void *user, const mp_record *record) {
    const mp_serve_log *log = user;
    mepic_log_level level = level_of(record);
    if (!log->verbose && (!log->json || level == MEPIC_LOG_DEBUG)) return;
    if (!log->json) {
        write_text(log, record);
        return;
    }
    json_t *line = open_line(level, record->end ? "end" : "request");
    add_text(line, "id", record->id);
    add_text(line, "path", record->path);
    add_text(line, "key", record->key);
    if (record->replies > 0) {
        add(line, "replies", record->replies);
        json_object_set_new(line, "stream", json_boolean(record->stream));
        add(line, "prompt_tokens", record->prompt_tokens);
    }
    if (record->end) add_end(line, record);
    write_line(log, line);
}
