#include "serve/dialect.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/hash.h"
#include "serve/json.h"

enum { STOP_BYTES_MAX = 1024 };

const char *mp_api_model(const mp_api *api, const json_t *model) {
    for (uint32_t i = 0; i < api->n_names; i++) {
        if (mp_json_is(model, api->names[i])) return api->names[i];
    }
    return api->names[0];
}

bool mp_api_check_model(const mp_api *api, const json_t *model, mp_api_error *err) {
    if (!model || mp_json_is(model, "")) return true;
    if (!json_is_string(model)) {
        return mp_refuse_type(err, "model", model, "a string");
    }
    const char *name = mp_api_model(api, model);
    if (mp_json_is(model, name)) return true;
    return mp_refuse_model(err, json_string_value(model), name);
}

bool mp_refuse_model(mp_api_error *err, const char *asked, const char *name) {
    return mp_refuse(err, 404, "model_not_found", "model", "there is no model '%.80s' here; this is '%.80s'", asked,
                     name);
}

bool mp_api_read_stops(const json_t *stop, const char *name, mp_generation *g, mp_api_error *err) {
    if (!stop) return true;
    size_t n = json_is_array(stop) ? json_array_size(stop) : 1;
    if (n > MP_STOPS_MAX) {
        return mp_refuse(err, 400, "invalid_value", name, "'%s' has %zu items; at most %d", name, n, MP_STOPS_MAX);
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *item = json_is_array(stop) ? json_array_get(stop, i) : stop;
        if (!json_is_string(item)) {
            return mp_refuse(err, 400, "invalid_type", name, "'%s' must be a string or an array of strings", name);
        }
        size_t len = json_string_length(item);
        if (len == 0 || len > STOP_BYTES_MAX || strlen(json_string_value(item)) != len) {
            return mp_refuse(err, 400, "invalid_value", name,
                             "'%s': a string of %zu bytes; it must have 1 to %d, without NUL", name, len,
                             STOP_BYTES_MAX);
        }
        g->stops[i] = mp_strndup(json_string_value(item), len);
        if (!g->stops[i]) return mp_refuse_memory(err, name);
        g->request.n_stop++;
    }
    return true;
}

bool mp_api_read_reuse(const json_t *reuse, mp_generation *g, mp_api_error *err) {
    static const char *const words[] = { "none", "prefix", "mepic" };
    if (!reuse) return true;
    for (uint32_t i = 0; i < 3; i++) {
        if (!mp_json_is(reuse, words[i])) continue;
        g->request.reuse = (mepic_reuse)(MEPIC_REUSE_NONE + i);
        return true;
    }
    return mp_refuse(err, 400, "invalid_value", "reuse", "'reuse' must be \"none\", \"prefix\" or \"mepic\"");
}

void mp_api_log_unknown(const mp_api *api, mp_buf *unknown) {
    if (unknown->len == 0) return;
    for (size_t i = 0; i < unknown->len; i++) {
        if ((unsigned char)unknown->data[i] < ' ') unknown->data[i] = '?'; // one line
    }
    mp_log_write(&api->log, MEPIC_LOG_WARN, "fields of a request that are not known here have no effect: %.*s",
                 (int)unknown->len, unknown->data);
}

void mp_api_id(const mp_api *api, const char *prefix, uint64_t id, char *out, size_t cap) {
    uint64_t high = mp_hash64(api->id_seed, &id, sizeof id), low = mp_hash64(high, &id, sizeof id);
    snprintf(out, cap, "%s%016llx%08llx", prefix, (unsigned long long)high, (unsigned long long)(low >> 32));
}

int64_t mp_api_time(void) {
    return (int64_t)time(NULL);
}

json_t *mp_api_usage(const mepic_usage *u) {
    json_t *details =
        json_pack("{s:I, s:I, s:I, s:I, s:I}", "cached_tokens", (json_int_t)u->prefix_tokens + u->chunk_tokens,
                  "prefix_tokens", (json_int_t)u->prefix_tokens, "chunk_tokens", (json_int_t)u->chunk_tokens,
                  "linked_tokens", (json_int_t)u->linked_tokens, "compiled_tokens", (json_int_t)u->compiled_tokens);
    return json_pack("{s:I, s:I, s:I, s:o}", "prompt_tokens", (json_int_t)u->prompt_tokens, "completion_tokens",
                     (json_int_t)u->completion_tokens, "total_tokens",
                     (json_int_t)u->prompt_tokens + u->completion_tokens, "prompt_tokens_details", details);
}

static double per_second(uint32_t n, double ms) {
    return ms > 0.0 ? 1e3 * n / ms : 0.0;
}

json_t *mp_api_timings(const mepic_usage *u) {
    uint32_t cached = u->prefix_tokens + u->chunk_tokens, computed = u->prompt_tokens - cached;
    double prompt_ms = (double)u->ttft_ns / 1e6; // waiting for chunks that are compiled looks like waiting in a queue
    double predicted_ms = u->ttft_ns ? (double)(u->total_ns - u->ttft_ns) / 1e6 : 0.0;
    uint32_t predicted = u->completion_tokens > 0 ? u->completion_tokens - 1 : 0;
    return json_pack("{s:I, s:I, s:f, s:f, s:I, s:f, s:f}", "cache_n", (json_int_t)cached, "prompt_n",
                     (json_int_t)computed, "prompt_ms", prompt_ms, "prompt_per_second", per_second(computed, prompt_ms),
                     "predicted_n", (json_int_t)u->completion_tokens, "predicted_ms", predicted_ms,
                     "predicted_per_second", per_second(predicted, predicted_ms));
}

bool mp_sse_write(const char *name, json_t *value, mp_buf *out) {
    bool ok = value != NULL;
    if (name) {
        ok = ok && mp_buf_append(out, "event: ", 7) && mp_buf_append(out, name, strlen(name)) &&
             mp_buf_append(out, "\n", 1);
    }
    ok = ok && mp_buf_append(out, "data: ", 6);
    if (!ok) {
        json_decref(value);
        return false;
    }
    return mp_json_write(value, out) && mp_buf_append(out, "\n\n", 2);
}
