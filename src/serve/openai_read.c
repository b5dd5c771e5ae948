/* From a body to a generation: the fields of OpenAI's requests and of those that clients of vLLM and llama.cpp send. */
#include <stdio.h>
#include <string.h>

#include "base/hash.h"
#include "serve/json.h"
#include "serve/openai.h"
#include "serve/prompt.h"
#include "serve/tools.h"

enum {
    TOKENS_MAX = 1 << 24,
    LOGPROBS_MAX = 1 << 18, /* of a reply that is not streamed: each token's and its alternatives' */
};

/* ---- The tables -------------------------------------------------------------------------------------------------- */

#define AT(member) offsetof(mp_openai_request, member)
#define FLAG(member)                                                                                                   \
    { #member, MP_FIELD_BOOL, AT(member), 0, 0, NULL }
#define COUNT(member, low, high)                                                                                       \
    { #member, MP_FIELD_COUNT, AT(member), low, high, NULL }
#define REAL(member, low, high)                                                                                        \
    { #member, MP_FIELD_REAL, AT(member), low, high, NULL }
#define OTHER(member)                                                                                                  \
    { #member, MP_FIELD_OTHER, AT(member), 0, 0, NULL }
#define IGNORED(name)                                                                                                  \
    { name, MP_FIELD_IGNORED, 0, 0, 0, NULL }
#define REFUSED(name, why)                                                                                             \
    { name, MP_FIELD_REFUSED, 0, 0, 0, why }
/* Nothing there is something else than no field. */
#define REFUSED_EMPTY(name, why)                                                                                       \
    { name, MP_FIELD_REFUSED, 0, 1, 0, why }
#define CONSTRAINED MP_NOT_CONSTRAINED

/* clang-format off */
#define COMMON_FIELDS \
    OTHER(model), OTHER(stop), OTHER(stop_token_ids), OTHER(logit_bias), OTHER(stream_options), OTHER(documents), \
    OTHER(reuse), OTHER(response_format), FLAG(stream), FLAG(ignore_eos), COUNT(n, 1, MP_REPLIES_MAX), \
    COUNT(max_tokens, 1, TOKENS_MAX), COUNT(max_completion_tokens, 1, TOKENS_MAX), \
    REAL(temperature, 0, 100), REAL(top_p, 0, 1), REAL(min_p, 0, 1), \
    REAL(presence_penalty, -2, 2), REAL(frequency_penalty, -2, 2), REAL(repetition_penalty, 0.01, 100), \
    { "repeat_penalty", MP_FIELD_REAL, AT(repetition_penalty), 0.01, 100, NULL }, \
    { "repeat_last_n", MP_FIELD_COUNT, AT(repeat_window), 0, 1 << 16, NULL }, \
    { "seed", MP_FIELD_INTEGER, AT(seed), (double)INT64_MIN, (double)INT64_MAX, NULL }, \
    { "top_k", MP_FIELD_INTEGER, AT(top_k), -1, TOKENS_MAX, NULL }, \
    IGNORED("user"), IGNORED("metadata"), IGNORED("store"), IGNORED("service_tier"), IGNORED("safety_identifier"), \
    IGNORED("prompt_cache_key"), IGNORED("prompt_cache_retention"), IGNORED("cache_prompt"), \
    REFUSED("grammar", CONSTRAINED), REFUSED_EMPTY("json_schema", CONSTRAINED), \
    REFUSED_EMPTY("structured_outputs", CONSTRAINED), REFUSED_EMPTY("guided_json", CONSTRAINED), \
    REFUSED("guided_regex", CONSTRAINED), REFUSED_EMPTY("guided_choice", CONSTRAINED), \
    REFUSED("guided_grammar", CONSTRAINED), REFUSED("min_tokens", NULL), REFUSED("bad_words", NULL), \
    REFUSED_EMPTY("allowed_token_ids", NULL), REFUSED("include_stop_str_in_output", NULL), \
    REFUSED_EMPTY("prompt_logprobs", NULL), REFUSED_EMPTY("truncate_prompt_tokens", NULL), \
    REFUSED("use_beam_search", NULL)

static const mp_field chat_fields[] = {
    COMMON_FIELDS, OTHER(messages), FLAG(logprobs), COUNT(top_logprobs, 0, 20),
    OTHER(tools), OTHER(tool_choice), FLAG(parallel_tool_calls), IGNORED("reasoning_effort"), IGNORED("verbosity"),
    REFUSED("functions", "; use tools"), REFUSED("function_call", "; use tool_choice"),
    REFUSED("audio", NULL), REFUSED("prediction", NULL), REFUSED("web_search_options", NULL),
    REFUSED("continue_final_message", NULL), REFUSED("chat_template", "; the model's own is used"),
    REFUSED("chat_template_kwargs", "; the model's own template is used"),
};
static const mp_field completion_fields[] = {
    COMMON_FIELDS, OTHER(prompt), { "logprobs", MP_FIELD_COUNT, AT(top_logprobs), 0, 20, NULL },
    REFUSED("echo", NULL), REFUSED("suffix", NULL), { "best_of", MP_FIELD_REFUSED, 0, 1, 1, "; use n" },
};
static const mp_field stream_fields[] = {
    FLAG(include_usage), IGNORED("continuous_usage_stats"), IGNORED("include_obfuscation"),
};
/* clang-format on */
#define N_OF(table) (sizeof table / sizeof *table)

/* ---- Fields with values of their own ----------------------------------------------------------------------------- */

static bool read_stop_tokens(const mp_api *api, const json_t *ids, mp_generation *g, mp_api_error *err) {
    static const char name[] = "stop_token_ids";
    if (!ids) return true;
    if (!json_is_array(ids) || json_array_size(ids) > MP_STOP_TOKENS_MAX) {
        return mp_refuse(err, 400, "invalid_type", name, "'%s' must be an array of at most %d token ids", name,
                         MP_STOP_TOKENS_MAX);
    }
    if (!mp_token_ids_copy(api, ids, name, g->stop_tokens, err)) return false;
    g->request.n_stop_tokens = (uint32_t)json_array_size(ids);
    return true;
}

/* {"1234": -100} */
static bool read_biases(const mp_api *api, const json_t *biases, mp_generation *g, mp_api_error *err) {
    static const char field[] = "logit_bias";
    if (!biases) return true;
    if (!json_is_object(biases) || json_object_size(biases) > MP_BIASES_MAX) {
        return mp_refuse(err, 400, "invalid_type", field, "'%s' must be an object of at most %d token ids", field,
                         MP_BIASES_MAX);
    }
    g->biases = mp_calloc(json_object_size(biases), sizeof *g->biases);
    if (!g->biases) return mp_refuse_memory(err, "'logit_bias'");
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)biases, name, value) {
        struct mepic_logit_bias *bias = &g->biases[g->request.sampling.n_logit_bias];
        if (strlen(name) > 10 || strspn(name, "0123456789") != strlen(name) || !*name) {
            return mp_refuse(err, 400, "invalid_value", field, "'%s': '%.20s' is not a token id", field, name);
        }
        if (!mp_token_check(api, strtoll(name, NULL, 10), field, &bias->token, err)) return false;
        double number = json_number_value(value);
        if (!json_is_number(value) || !(number >= -100 && number <= 100)) {
            return mp_refuse(err, 400, "invalid_value", field, "'%s.%s' must be a number from -100 to 100", field,
                             name);
        }
        bias->bias = (float)number;
        g->request.sampling.n_logit_bias++;
    }
    return true;
}

static bool check_format(const json_t *format, mp_api_error *err) {
    if (!format || mp_json_is(json_object_get(format, "type"), "text")) return true;
    return mp_refuse(err, 400, "unsupported", "response_format",
                     "'response_format' other than {\"type\": \"text\"} is not supported" CONSTRAINED);
}

static bool read_stream_options(mp_openai_request *r, mp_buf *unknown, mp_api_error *err) {
    const json_t *options = r->stream_options;
    if (!options) return true;
    if (!json_is_object(options)) {
        return mp_refuse_type(err, "stream_options", options, "an object");
    }
    return mp_fields_read(options, "stream_options.", stream_fields, N_OF(stream_fields), r, unknown, err);
}

/* ---- The whole --------------------------------------------------------------------------------------------------- */

static void set_request(const mp_api *api, const mp_openai_request *r, uint64_t id, bool chat, mp_generation *g) {
    mepic_request *q = &g->request;
    q->sampling.temperature = (float)r->temperature;
    mp_generation_set_top(g, r->top_k, r->top_p);
    q->sampling.min_p = (float)r->min_p;
    q->sampling.repeat_penalty = (float)r->repetition_penalty;
    q->sampling.repeat_window = r->repeat_window;
    q->sampling.presence_penalty = (float)r->presence_penalty;
    q->sampling.frequency_penalty = (float)r->frequency_penalty;
    q->max_tokens = r->max_completion_tokens ? r->max_completion_tokens : r->max_tokens;
    if (!q->max_tokens && !chat) q->max_tokens = 16; // OpenAI's default
    q->ignore_eos = r->ignore_eos;
    q->logprobs = r->logprobs;
    q->top_logprobs = r->logprobs ? r->top_logprobs : 0;
    g->n = r->n;
    g->seed = r->seed == INT64_MIN ? mp_hash64(api->id_seed, &id, sizeof id) : (uint64_t)r->seed;
    g->stream = r->stream;
}

/* A body's log-probabilities are kept until its end. What would be too much of them is said at the start; who does not
 * say how long the replies may be gets as much as fits. */
static bool bound_logprobs(const mp_api *api, const mp_openai_request *r, mp_generation *g, mp_api_error *err) {
    if (!r->logprobs || r->stream) return true;
    uint32_t choices = mp_generation_choices(g), each = r->top_logprobs + 1, context = api->info->context;
    uint32_t most = LOGPROBS_MAX / (choices * each), asked = g->request.max_tokens;
    uint32_t max_tokens = asked && asked < context ? asked : context;
    if (max_tokens > most && asked) {
        return mp_refuse(err, 400, "invalid_value", "logprobs",
                         "'logprobs': %u replies of %u tokens with %u log-probabilities each are %llu; a reply that is "
                         "not streamed has at most %d: stream it, or ask for less",
                         choices, max_tokens, each, (unsigned long long)choices * max_tokens * each, LOGPROBS_MAX);
    }
    if (max_tokens > most) g->request.max_tokens = most;
    return true;
}

static bool read_values(const mp_api *api, mp_openai_request *r, mp_generation *g, mp_buf *unknown, mp_api_error *err) {
    if (r->top_logprobs > 0 && !r->logprobs) {
        return mp_refuse(err, 400, "invalid_value", "top_logprobs", "'top_logprobs' needs 'logprobs' to be true");
    }
    return mp_api_check_model(api, r->model, err) && check_format(r->response_format, err) &&
           mp_api_read_stops(r->stop, "stop", g, err) && read_stop_tokens(api, r->stop_token_ids, g, err) &&
           read_biases(api, r->logit_bias, g, err) && mp_api_read_reuse(r->reuse, g, err) &&
           read_stream_options(r, unknown, err) && mp_tools_read_choice(r->tool_choice, &r->no_tools, err) &&
           (r->parallel_tool_calls || !r->tools || r->no_tools || mp_tools_one_call(api, g, err));
}

static bool read_request(const mp_api *api, const json_t *body, bool chat, uint64_t id, mp_generation *g,
                         mp_writer **writer, mp_api_error *err) {
    const mp_field *fields = chat ? chat_fields : completion_fields;
    size_t n_fields = chat ? N_OF(chat_fields) : N_OF(completion_fields);
    mp_openai_request r = {
        .temperature = 1, .top_p = 1, .repetition_penalty = 1, .n = 1, .seed = INT64_MIN, .parallel_tool_calls = true
    };
    mp_buf unknown = { .limit = 512 };
    bool ok = mp_fields_read(body, "", fields, n_fields, &r, &unknown, err);
    if (ok && !chat) r.logprobs = json_is_integer(json_object_get(body, "logprobs"));
    ok = ok && read_values(api, &r, g, &unknown, err);
    if (ok) {
        set_request(api, &r, id, chat, g);
        mp_api_log_unknown(api, &unknown);
        ok = (chat ? mp_openai_chat_prompt(api, &r, g, err) : mp_openai_text_prompts(api, &r, g, err)) &&
             bound_logprobs(api, &r, g, err);
    }
    mp_buf_clear(&unknown);
    return ok && mp_openai_writer_open(api, &r, g, chat, id, writer, err);
}

static bool read_chat(const mp_api *api, const json_t *body, uint64_t id, mp_generation *generation, mp_writer **writer,
                      mp_api_error *err) {
    return read_request(api, body, true, id, generation, writer, err);
}

static bool read_completion(const mp_api *api, const json_t *body, uint64_t id, mp_generation *generation,
                            mp_writer **writer, mp_api_error *err) {
    return read_request(api, body, false, id, generation, writer, err);
}

const mp_dialect mp_openai_chat = {
    .name = "openai chat",
    .error = mp_openai_error_write,
    .read = read_chat,
    .event = mp_openai_event,
    .end = mp_openai_end,
    .fail = mp_openai_fail,
    .close = mp_openai_close,
};

const mp_dialect mp_openai_completions = {
    .name = "openai completions",
    .error = mp_openai_error_write,
    .read = read_completion,
    .event = mp_openai_event,
    .end = mp_openai_end,
    .fail = mp_openai_fail,
    .close = mp_openai_close,
};
