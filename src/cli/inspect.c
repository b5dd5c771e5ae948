/* `mepic inspect FILE`: what a model file holds and how it is served.
 *
 * The report is built once, as JSON; --json writes it, otherwise it is laid out as text. What stands in the file is
 * untrusted: it is checked by the loader, and printed without control characters. One thread. */
#include "cli/commands.h"
#include "cli/options.h"

#include <jansson.h>
#include <string.h>

#include "model/rope.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

enum { VALUE_CAP = 256, TEXT_CAP = 4096 };

static const char usage_text[] =
    "usage: mepic inspect [--json] FILE\n\n"
    "Shows a GGUF model's hyper-parameters, tokenizer, keys and tensors, and whether reuse at\n"
    "any position is exact for it.\n"
    "Exit status: 0 the model can be served, 2 it is refused; the reason is printed.\n";

/* ---- Text from a file -------------------------------------------------------------------------------------------- */

/* A JSON string, cut if it is very long. Control characters become '?', all but ASCII too if it is no UTF-8. */
static json_t *text(mp_str s) {
    char clean[TEXT_CAP];
    size_t n = s.len < sizeof clean - 1 ? s.len : sizeof clean - 1;
    memcpy(clean, s.data, n);
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)clean[i] < 0x20 || clean[i] == 0x7f) clean[i] = '?';
    }
    json_t *json = json_stringn(clean, n);
    if (json) return json;
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)clean[i] >= 0x80) clean[i] = '?';
    }
    return json_stringn(clean, n);
}

static json_t *text_of(const char *s) {
    return text((mp_str){ s, strlen(s) });
}

/* ---- The report -------------------------------------------------------------------------------------------------- */

static json_t *report_hparams(const mp_hparams *hp) {
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:b, s:b}", "layers", (int)hp->n_layers,
                     "embedding", (int)hp->n_embd, "feed_forward", (int)hp->n_ff, "vocabulary", (int)hp->n_vocab,
                     "trained_context", (int)hp->n_ctx_train, "heads", (int)hp->n_heads, "kv_heads",
                     (int)hp->n_kv_heads, "head_dim", (int)hp->head_dim, "norm_eps", (double)hp->norm_eps, "qkv_bias",
                     hp->qkv_bias, "qk_norm", hp->qk_norm);
}

static json_t *report_rope(const mp_model *model) {
    static const char *const scalings[] = { "none", "linear", "yarn", "llama3" };
    const mp_hparams *hp = &model->hp;
    const char *why;
    bool exact = mp_rope_exact(model, &why);
    json_t *json =
        json_pack("{s:b, s:s, s:s, s:i, s:f, s:s}", "exact_at_any_position", exact, "why", why, "pairs",
                  hp->rope.pairs == MP_ROPE_ADJACENT ? "adjacent" : "halves", "rotated_dimensions", (int)hp->rope.n_rot,
                  "base", (double)hp->rope.freq_base, "scaling", scalings[hp->rope.scaling]);
    if (hp->rope.scaling == MP_ROPE_LINEAR || hp->rope.scaling == MP_ROPE_YARN) {
        json_object_set_new(json, "factor", json_real((double)hp->rope.factor));
    }
    if (hp->rope.scaling == MP_ROPE_YARN) {
        json_object_set_new(json, "original_context", json_integer(hp->rope.original_ctx));
    }
    return json;
}

static json_t *report_tokenizer(const mp_gguf *gguf, const mp_tokenizer *tokenizer) {
    mp_chat_template chat;
    mp_chat_template_find(gguf, &chat);
    return json_pack("{s:o, s:i, s:i, s:b, s:s}", "kind", text_of(mp_tokenizer_kind(tokenizer)), "tokens",
                     (int)mp_tokenizer_n_vocab(tokenizer), "bos", (int)mp_tokenizer_bos(tokenizer), "adds_bos",
                     mp_tokenizer_adds_bos(tokenizer), "chat", mp_chat_family_name(chat.family));
}

static json_t *report_keys(const mp_gguf *gguf) {
    json_t *list = json_array();
    mp_str key;
    char value[VALUE_CAP];
    for (size_t i = 0; mp_gguf_describe(gguf, i, &key, value, sizeof value); i++) {
        json_array_append_new(list, json_pack("{s:o, s:o}", "key", text(key), "value", text_of(value)));
    }
    return list;
}

/* Adds the tensors, and the whole model's size, parameters and bytes a type to `report`. */
static json_t *report_tensors(const mp_gguf *gguf, json_t *report) {
    json_t *list = json_array(), *types = json_object();
    json_int_t parameters = 0;
    for (size_t i = 0; i < mp_gguf_n_tensors(gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(gguf, i);
        const char *type = mp_dtype_name((uint32_t)t->type);
        json_t *shape = json_array();
        json_int_t n = 1;
        for (uint32_t d = 0; d < t->n_dims; d++) {
            n *= (json_int_t)t->ne[d];
            json_array_append_new(shape, json_integer((json_int_t)t->ne[d]));
        }
        parameters += n;
        json_int_t bytes = (json_int_t)t->bytes;
        json_object_set_new(types, type, json_integer(json_integer_value(json_object_get(types, type)) + bytes));
        json_array_append_new(list, json_pack("{s:o, s:s, s:o, s:I}", "name", text(t->name), "type", type, "shape",
                                              shape, "bytes", bytes));
    }
    json_object_set_new(report, "parameters", json_integer(parameters));
    json_object_set_new(report, "bytes_by_type", types);
    return list;
}

/* NULL: out of memory. */
static json_t *build_report(const mp_model *model, const mp_tokenizer *tokenizer) {
    const mp_gguf *gguf = model->gguf;
    const mp_hparams *hp = &model->hp;
    json_int_t kv_values = 2 * (json_int_t)hp->n_layers * hp->n_kv_heads * hp->head_dim;
    mp_str name = { "", 0 };
    if (mp_gguf_str(gguf, "general.name", &name, NULL) != MEPIC_OK) name = (mp_str){ "", 0 };
    json_t *report = json_pack("{s:o, s:o, s:s, s:I}", "file", text_of(mp_gguf_path(gguf)), "name", text(name),
                               "architecture", mp_arch_name(hp->arch), "bytes", (json_int_t)mp_gguf_file_bytes(gguf));
    if (!report) return NULL;
    json_object_set_new(report, "kv_bytes_per_token_f16", json_integer(2 * kv_values));
    json_int_t marks = 8 * (json_int_t)hp->n_layers * hp->n_kv_heads; /* an angle and two scales */
    json_object_set_new(report, "kv_bytes_per_token_fp8", json_integer(kv_values + marks));
    json_t *tensors = report_tensors(gguf, report);
    json_object_set_new(report, "hyper_parameters", report_hparams(hp));
    json_object_set_new(report, "position", report_rope(model));
    json_object_set_new(report, "tokenizer", report_tokenizer(gguf, tokenizer));
    json_object_set_new(report, "keys", report_keys(gguf));
    json_object_set_new(report, "tensors", tensors);
    return report;
}

/* ---- Output ------------------------------------------------------------------------------------------------------ */

static void print_value(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_STRING: printf("%s", json_string_value(value)); break;
    case JSON_INTEGER: printf("%" JSON_INTEGER_FORMAT, json_integer_value(value)); break;
    case JSON_REAL: printf("%g", json_real_value(value)); break;
    case JSON_TRUE: printf("yes"); break;
    case JSON_FALSE: printf("no"); break;
    default: break;
    }
}

static void print_fields(json_t *object, const char *indent) {
    const char *name;
    json_t *value;
    json_object_foreach(object, name, value) {
        if (json_is_object(value)) {
            printf("\n%s\n", name);
            print_fields(value, "  ");
        } else if (!json_is_array(value)) {
            printf("%s%-24s ", indent, name);
            print_value(value);
            printf("\n");
        }
    }
}

static void print_text(json_t *report) {
    size_t i, d;
    json_t *item, *size;
    print_fields(report, "");
    printf("\nkeys\n");
    json_array_foreach(json_object_get(report, "keys"), i, item) {
        printf("  %s = %s\n", json_string_value(json_object_get(item, "key")),
               json_string_value(json_object_get(item, "value")));
    }
    printf("\ntensors\n");
    json_array_foreach(json_object_get(report, "tensors"), i, item) {
        char shape[96];
        int n = 0;
        json_array_foreach(json_object_get(item, "shape"), d, size) {
            n += snprintf(shape + n, sizeof shape - (size_t)n, "%s%" JSON_INTEGER_FORMAT, d ? " x " : "",
                          json_integer_value(size));
        }
        printf("  %-28s %-5s %-20s %12" JSON_INTEGER_FORMAT " bytes\n",
               json_string_value(json_object_get(item, "name")), json_string_value(json_object_get(item, "type")),
               shape, json_integer_value(json_object_get(item, "bytes")));
    }
}

static int inspect(const char *path, bool as_json) {
    mepic_error err;
    mp_model *model = NULL;
    mp_tokenizer *tokenizer = NULL;
    mepic_status status = mp_model_open(path, &model, &err);
    if (status == MEPIC_OK) status = mp_tokenizer_open(model->gguf, &tokenizer, &err);
    if (status != MEPIC_OK) {
        fprintf(stderr, "mepic inspect: %s\n", err.message);
        mp_model_close(model);
        return MP_EXIT_USAGE;
    }
    json_t *report = build_report(model, tokenizer);
    mp_tokenizer_close(tokenizer);
    mp_model_close(model);
    if (!report) {
        fprintf(stderr, "mepic inspect: out of memory\n");
        return MP_EXIT_FAILURE;
    }
    if (as_json) {
        json_dumpf(report, stdout, JSON_INDENT(2));
        printf("\n");
    } else {
        print_text(report);
    }
    json_decref(report);
    return fflush(stdout) == 0 ? MP_EXIT_OK : MP_EXIT_FAILURE;
}

int mp_cli_inspect(int argc, char **argv) {
    bool as_json = false;
    const mp_option options[] = { MP_FLAG(0, "json", &as_json, "write the report as JSON") };
    const mp_option_group group = { "Options", options, 1 };
    /* The file is the one argument that is no option; the parser gets the rest. */
    const char *path = NULL;
    int n = 0, n_paths = 0;
    for (int i = 0; i < argc; i++) {
        if (i > 0 && argv[i][0] != '-') {
            path = argv[i];
            n_paths++;
        } else {
            argv[n++] = argv[i];
        }
    }
    int exit_status;
    if (!mp_options_begin("inspect", usage_text, &group, 1, n, argv, &exit_status)) return exit_status;
    if (n_paths != 1) {
        fprintf(stderr, "mepic inspect: %s; mepic inspect --help says more\n",
                n_paths ? "give one model file" : "give a model file");
        return MP_EXIT_USAGE;
    }
    return inspect(path, as_json);
}
