#include "serve/dialect.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/hash.h"
#include "serve/json.h"

const char *mp_api_model(const mp_api *api, const json_t *model) {
    for (uint32_t i = 0; json_is_string(model) && i < api->n_names; i++) {
        if (strcmp(json_string_value(model), api->names[i]) == 0) return api->names[i];
    }
    return api->names[0];
}

bool mp_api_check_model(const mp_api *api, const json_t *model, mp_api_error *err) {
    if (!model || (json_is_string(model) && json_string_length(model) == 0)) return true;
    if (!json_is_string(model)) {
        return mp_refuse(err, 400, "invalid_type", "model", "'model' is %s; it must be a string", mp_json_kind(model));
    }
    const char *name = mp_api_model(api, model);
    if (strcmp(name, json_string_value(model)) == 0) return true;
    return mp_refuse(err, 404, "model_not_found", "model", "there is no model '%.80s' here; this is '%.80s'",
                     json_string_value(model), name);
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
    double prompt_ms = (double)(u->ttft_ns - u->queue_ns) * 1e-6;
    double predicted_ms = (double)(u->total_ns - u->ttft_ns) * 1e-6;
    if (u->ttft_ns < u->queue_ns) prompt_ms = 0.0; // ended before its first token
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
