/* Every route with its auth, in one table, and the small ones. */
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "serve/exchange.h"
#include "serve/json.h"
#include "serve/tokenize.h"

static json_t *describe_model(const mp_api *api, const char *name) {
    const mepic_model_info *m = api->info;
    json_t *meta = json_pack("{s:I, s:I, s:I, s:I, s:I}", "n_vocab", (json_int_t)m->n_vocab, "n_ctx_train",
                             (json_int_t)m->trained_context, "n_embd", (json_int_t)m->n_embd, "n_params",
                             (json_int_t)m->parameters, "size", (json_int_t)m->file_bytes);
    return json_pack("{s:o, s:s, s:I, s:s, s:I, s:o}", "id", mp_json_text(name, strlen(name)), "object", "model",
                     "created", (json_int_t)api->created, "owned_by", "mepic", "max_model_len", (json_int_t)m->context,
                     "meta", meta);
}

static enum MHD_Result handle_models(mp_exchange *x) {
    const mp_api *api = &x->server->api;
    json_t *data = json_array();
    for (uint32_t i = 0; i < api->n_names; i++) json_array_append_new(data, describe_model(api, api->names[i]));
    return mp_exchange_answer_json(x, 200, json_pack("{s:s, s:o}", "object", "list", "data", data));
}

/* The length of what stands in front of a route's {name}; all of it if it has none. */
static size_t fixed_part(const char *route_path) {
    return strcspn(route_path, "{");
}

/* What a part of a path says, in which characters may be escaped (%2F); a NUL stays as it was sent. NULL: no memory. */
static char *unescape(const char *sent) {
    char *text = mp_alloc(strlen(sent) + 1), *end = text;
    if (!text) return NULL;
    while (*sent) {
        int high = *sent == '%' ? mp_hex_digit(sent[1]) : -1, low = high >= 0 ? mp_hex_digit(sent[2]) : -1;
        bool escaped = low >= 0 && (high | low);
        *end++ = (char)(escaped ? high << 4 | low : *sent);
        sent += escaped ? 3 : 1;
    }
    *end = 0;
    return text;
}

/* The name may have slashes, as they are or escaped: clients do both. */
static enum MHD_Result handle_model(mp_exchange *x) {
    const mp_api *api = &x->server->api;
    char *asked = unescape(x->path + fixed_part(x->route->path));
    const char *name = NULL;
    for (uint32_t i = 0; asked && !name && i < api->n_names; i++) {
        if (strcmp(asked, api->names[i]) == 0) name = api->names[i];
    }
    mp_api_error err;
    if (!asked)
        mp_refuse_memory(&err, "the model's name");
    else if (!name)
        mp_refuse_model(&err, asked, api->names[0]);
    mp_free(asked);
    return name ? mp_exchange_answer_json(x, 200, describe_model(api, name)) : mp_exchange_refuse(x, &err);
}

static enum MHD_Result handle_health(mp_exchange *x) {
    mp_server *server = x->server;
    pthread_mutex_lock(&server->lock);
    bool draining = server->draining;
    pthread_mutex_unlock(&server->lock);
    if (mp_loop_broken(server->loop)) return mp_exchange_answer_json(x, 503, json_pack("{s:s}", "status", "broken"));
    if (draining) return mp_exchange_answer_json(x, 503, json_pack("{s:s}", "status", "draining"));
    return mp_exchange_answer_json(x, 200, json_pack("{s:s}", "status", "ok"));
}

static enum MHD_Result handle_version(mp_exchange *x) {
    return mp_exchange_answer_json(x, 200, json_pack("{s:s}", "version", MEPIC_VERSION));
}

static enum MHD_Result handle_metrics(mp_exchange *x) {
    mp_metrics metrics;
    mp_loop_metrics(x->server->loop, &metrics);
    mp_buf body = { .limit = 1 << 20 };
    if (mp_metrics_write(&metrics, x->server->api.info, x->server->api.names[0], &body)) {
        return mp_exchange_answer(x, 200, "text/plain; version=0.0.4; charset=utf-8", &body);
    }
    mp_buf_clear(&body);
    return mp_exchange_lose(x);
}

static enum MHD_Result answer(mp_exchange *x, mp_question *question) {
    mp_api_error err;
    json_t *answer = NULL, *body = mp_json_parse(x->body.data, x->body.len, &err);
    bool ok = body && question(&x->server->api, body, &answer, &err);
    json_decref(body);
    return ok ? mp_exchange_answer_json(x, 200, answer) : mp_exchange_refuse(x, &err);
}

static enum MHD_Result handle_count_tokens(mp_exchange *x) {
    return answer(x, mp_ask_count);
}

static enum MHD_Result handle_tokenize(mp_exchange *x) {
    return answer(x, mp_ask_tokens);
}

static enum MHD_Result handle_detokenize(mp_exchange *x) {
    return answer(x, mp_ask_text);
}

static const mp_route routes[] = {
    { "GET", "/health", MP_ACCESS_PUBLIC, &mp_openai_chat, handle_health },
    { "GET", "/v1/health", MP_ACCESS_PUBLIC, &mp_openai_chat, handle_health },
    { "GET", "/version", MP_ACCESS_KEY, &mp_openai_chat, handle_version },
    { "GET", "/metrics", MP_ACCESS_KEY, &mp_openai_chat, handle_metrics },
    { "GET", "/v1/models", MP_ACCESS_KEY, &mp_openai_chat, handle_models },
    { "GET", "/v1/models/{model}", MP_ACCESS_KEY, &mp_openai_chat, handle_model },
    { "POST", "/v1/chat/completions", MP_ACCESS_KEY, &mp_openai_chat, mp_generate },
    { "POST", "/v1/completions", MP_ACCESS_KEY, &mp_openai_completions, mp_generate },
    { "POST", "/v1/messages", MP_ACCESS_KEY, &mp_anthropic_messages, mp_generate },
    { "POST", "/v1/messages/count_tokens", MP_ACCESS_KEY, &mp_anthropic_messages, handle_count_tokens },
    { "POST", "/tokenize", MP_ACCESS_KEY, &mp_openai_chat, handle_tokenize },
    { "POST", "/detokenize", MP_ACCESS_KEY, &mp_openai_chat, handle_detokenize },
};

const mp_route *mp_routes(uint32_t *n) {
    *n = sizeof routes / sizeof *routes;
    return routes;
}

static bool is_path_of(const mp_route *route, const char *path) {
    size_t n = fixed_part(route->path);
    return route->path[n] ? strncmp(route->path, path, n) == 0 && path[n] : strcmp(route->path, path) == 0;
}

const mp_route *mp_route_find(const char *method, const char *path, const mp_route **other, mp_api_error *err) {
    *other = NULL;
    const char *wanted = strcmp(method, "HEAD") == 0 ? "GET" : method;
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!is_path_of(&routes[i], path)) continue;
        if (strcmp(routes[i].method, wanted) == 0) return &routes[i];
        *other = &routes[i];
    }
    if (*other)
        mp_refuse(err, 405, "method_not_allowed", NULL, "%.200s takes %s, not %.16s", path, (*other)->method, method);
    else
        mp_refuse(err, 404, "no_such_route", NULL, "there is no route %.16s %.200s", method, path);
    return NULL;
}
