/* From a body to a generation: the fields of Anthropic's messages. */
#include <string.h>

#include "base/hash.h"
#include "serve/anthropic.h"
#include "serve/json.h"
#include "serve/tools.h"

enum { TOKENS_MAX = 1 << 24 };

#define AT(member) offsetof(mp_anthropic_request, member)
#define OTHER(member)                                                                                                  \
    { #member, MP_FIELD_OTHER, AT(member), 0, 0, NULL }
#define FLAG(member)                                                                                                   \
    { #member, MP_FIELD_BOOL, AT(member), 0, 0, NULL }
#define IGNORED(name)                                                                                                  \
    { name, MP_FIELD_IGNORED, 0, 0, 0, NULL }
#define REFUSED(name, why)                                                                                             \
    { name, MP_FIELD_REFUSED, 0, 0, 0, why }

/* cache_control says where clients hope for a cache; here everything is cached where it stands. */
static const mp_field fields[] = {
    OTHER(model),
    OTHER(messages),
    OTHER(system),
    OTHER(stop_sequences),
    OTHER(tools),
    OTHER(tool_choice),
    OTHER(thinking),
    OTHER(reuse),
    { "max_tokens", MP_FIELD_COUNT, AT(max_tokens), 1, TOKENS_MAX, NULL },
    { "temperature", MP_FIELD_REAL, AT(temperature), 0, 100, NULL },
    { "top_p", MP_FIELD_REAL, AT(top_p), 0, 1, NULL },
    { "top_k", MP_FIELD_INTEGER, AT(top_k), -1, TOKENS_MAX, NULL },
    FLAG(stream),
    FLAG(ignore_eos),
    IGNORED("metadata"),
    IGNORED("service_tier"),
    IGNORED("cache_control"),
    IGNORED("inference_geo"),
    REFUSED("output_format", MP_NOT_CONSTRAINED),
    REFUSED("mcp_servers", "; this server has no tools of its own"),
    REFUSED("container", NULL),
};

static bool check_thinking(const json_t *thinking, mp_api_error *err) {
    if (!thinking || mp_json_is(json_object_get(thinking, "type"), "disabled")) return true;
    return mp_refuse(err, 400, "unsupported", "thinking",
                     "'thinking' other than {\"type\": \"disabled\"} is not supported; leave it out");
}

static bool read_tool_choice(const mp_api *api, mp_anthropic_request *r, mp_generation *g, mp_api_error *err) {
    if (!mp_tools_read_choice(r->tool_choice, &r->no_tools, err)) return false;
    bool one = json_is_true(json_object_get(r->tool_choice, "disable_parallel_tool_use"));
    return !one || !r->tools || r->no_tools || mp_tools_one_call(api, g, err);
}

static void set_request(const mp_api *api, const mp_anthropic_request *r, uint64_t id, mp_generation *g) {
    mepic_request *q = &g->request;
    q->sampling.temperature = (float)r->temperature;
    mp_generation_set_top(g, r->top_k, r->top_p);
    q->max_tokens = r->max_tokens;
    q->ignore_eos = r->ignore_eos;
    g->n = 1;
    g->seed = mp_hash64(api->id_seed, &id, sizeof id);
    g->stream = r->stream;
}

static bool read_request(const mp_api *api, const json_t *body, uint64_t id, mp_anthropic_request *r, mp_generation *g,
                         mp_api_error *err) {
    *r = (mp_anthropic_request){ .temperature = 1, .top_p = 1 };
    mp_buf unknown = { .limit = 512 };
    bool ok = mp_fields_read(body, "", fields, sizeof fields / sizeof *fields, r, &unknown, err) &&
              mp_api_check_model(api, r->model, err) && check_thinking(r->thinking, err) &&
              mp_api_read_stops(r->stop_sequences, "stop_sequences", g, err) && read_tool_choice(api, r, g, err) &&
              mp_api_read_reuse(r->reuse, g, err);
    if (ok) {
        set_request(api, r, id, g);
        mp_api_log_unknown(api, &unknown);
        ok = mp_anthropic_prompt(api, r, g, err);
    }
    mp_buf_clear(&unknown);
    return ok;
}

static bool read_messages(const mp_api *api, const json_t *body, uint64_t id, mp_generation *generation,
                          mp_writer **writer, mp_api_error *err) {
    mp_anthropic_request r;
    return read_request(api, body, id, &r, generation, err) && mp_anthropic_writer_open(api, &r, id, writer, err);
}

bool mp_anthropic_count(const mp_api *api, const json_t *body, size_t *n, mp_api_error *err) {
    mepic_error why;
    mp_generation *generation;
    if (mp_generation_open(&generation, &why) != MEPIC_OK) return mp_refuse_engine(err, &why);
    mp_anthropic_request r;
    bool ok = read_request(api, body, 0, &r, generation, err);
    if (ok) mepic_prepared_tokens(generation->prompts[0], n);
    mp_generation_free(generation);
    return ok;
}

const mp_dialect mp_anthropic_messages = {
    .name = "anthropic messages",
    .error = mp_anthropic_error_write,
    .read = read_messages,
    .event = mp_anthropic_event,
    .end = mp_anthropic_end,
    .fail = mp_anthropic_fail,
    .close = mp_anthropic_close,
};
