/* Hyper-parameters: what is read, its range, and what is refused because ignoring it would change answers silently. */
#include "model/hparams.h"

#include <float.h>
#include <stdio.h>
#include <string.h>

enum {
    MAX_LAYERS = 1024,
    MAX_EMBD = 1 << 16,
    MAX_FF = 1 << 20,
    MAX_CTX = 1 << 24,
    MAX_HEADS = 1024,
    MAX_GROUP = 16,
    MAX_HEAD_DIM = 256,
    HEAD_DIM_STEP = 16,
};

typedef struct source {
    const mp_gguf *gguf;
    const char *arch; /* keys are "ARCH.name" */
    mepic_error *err;
} source;

enum { KEY_CAP = 96 };
static const char *full_key(const source *s, const char *name, char *key) {
    snprintf(key, KEY_CAP, "%s.%s", s->arch, name);
    return key;
}

static mepic_status read_count(const source *s, const char *name, uint32_t max, uint32_t *out) {
    char key[KEY_CAP];
    uint32_t v = 0;
    mepic_status status = mp_gguf_u32(s->gguf, full_key(s, name, key), &v, s->err);
    /* An absent key is the file's fault here; to the caller "not found" would mean the file itself. */
    if (status == MEPIC_ERR_NOT_FOUND) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is missing", mp_gguf_path(s->gguf), key);
    }
    if (status != MEPIC_OK) return status;
    if (v < 1 || v > max) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is %u; possible are 1 to %u", mp_gguf_path(s->gguf),
                       key, v, max);
    }
    *out = v;
    return MEPIC_OK;
}

/* Greater than `low`, at most `high`. */
static mepic_status read_real(const source *s, const char *name, float low, float high, float *out) {
    char key[KEY_CAP];
    float v = 0;
    mepic_status status = mp_gguf_f32(s->gguf, full_key(s, name, key), &v, s->err);
    if (status == MEPIC_ERR_NOT_FOUND) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is missing", mp_gguf_path(s->gguf), key);
    }
    if (status != MEPIC_OK) return status;
    if (!(v > low && v <= high)) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is %g; it must be greater than %g and at most %g",
                       mp_gguf_path(s->gguf), key, (double)v, (double)low, (double)high);
    }
    *out = v;
    return MEPIC_OK;
}

static bool has(const source *s, const char *name) {
    char key[KEY_CAP];
    return mp_gguf_has(s->gguf, full_key(s, name, key));
}

static mepic_status read_count_or(const source *s, const char *name, uint32_t max, uint32_t fallback, uint32_t *out) {
    *out = fallback;
    return has(s, name) ? read_count(s, name, max, out) : MEPIC_OK;
}

static mepic_status read_real_or(const source *s, const char *name, float low, float high, float fallback, float *out) {
    *out = fallback;
    return has(s, name) ? read_real(s, name, low, high, out) : MEPIC_OK;
}

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

static mepic_status refuse(const source *s, const char *name, double value, const char *what) {
    return mp_fail(s->err, MEPIC_ERR_UNSUPPORTED, "%s: key \"%s.%s\" is %g: %s, which is not supported",
                   mp_gguf_path(s->gguf), s->arch, name, value, what);
}

static mepic_status check_features(const source *s, uint32_t n_ctx_train) {
    /* A key that is absent, 0 or at its neutral value asks for nothing. */
    static const struct {
        const char *name;
        float neutral;
        const char *what;
    } features[] = {
        { "expert_count", 0, "a mixture of experts" },
        { "logit_scale", 1, "scaled logits" },
        { "embedding_scale", 1, "scaled embeddings" },
        { "residual_scale", 1, "scaled residuals" },
        { "attention.scale", 0, "an attention scale of its own" },
        { "attention.temperature_scale", 0, "attention scaled by position" },
        { "attention.clamp_kqv", 0, "clamped queries, keys and values" },
        { "attention.max_alibi_bias", 0, "ALiBi" },
        { "attn_logit_softcapping", 0, "capped attention scores" },
        { "final_logit_softcapping", 0, "capped logits" },
        { "rope.scaling.yarn_log_multiplier", 0, "a YaRN magnitude of its own" },
    };
    float v = 0;
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        mepic_status status = read_real_or(s, features[i].name, -FLT_MAX, FLT_MAX, 0, &v);
        if (status != MEPIC_OK) return status;
        if (v != 0 && v != features[i].neutral) return refuse(s, features[i].name, (double)v, features[i].what);
    }
    mepic_status status = read_real_or(s, "attention.sliding_window", -FLT_MAX, FLT_MAX, 0, &v);
    if (status != MEPIC_OK) return status;
    if (v != 0 && v < (float)n_ctx_train) {
        return refuse(s, "attention.sliding_window", (double)v, "a window shorter than the context");
    }
    return MEPIC_OK;
}

/* A file may be GGUF and yet not be a model: an adapter, a projector, one part of several. */
static mepic_status check_container(const mp_gguf *gguf, mepic_error *err) {
    mp_str type;
    if (mp_gguf_has(gguf, "general.type")) {
        mepic_status status = mp_gguf_str(gguf, "general.type", &type, err);
        if (status != MEPIC_OK) return status;
        if (type.len != 5 || memcmp(type.data, "model", 5) != 0) {
            return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "%s holds a \"%.*s\", not a model", mp_gguf_path(gguf),
                           (int)type.len, type.data);
        }
    }
    uint32_t parts = 1;
    if (mp_gguf_has(gguf, "split.count")) {
        mepic_status status = mp_gguf_u32(gguf, "split.count", &parts, err);
        if (status != MEPIC_OK) return status;
    }
    if (parts > 1) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "%s is one of %u parts of a model; merge them into one file first",
                       mp_gguf_path(gguf), parts);
    }
    return MEPIC_OK;
}

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

static mepic_status read_arch(const mp_gguf *gguf, mp_arch *out, mepic_error *err) {
    mp_str name = { 0 };
    mepic_status status = mp_gguf_str(gguf, "general.architecture", &name, err);
    if (status == MEPIC_ERR_NOT_FOUND) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"general.architecture\" is missing", mp_gguf_path(gguf));
    }
    if (status != MEPIC_OK) return status;
    static const mp_arch known[] = { MP_ARCH_LLAMA, MP_ARCH_QWEN2, MP_ARCH_QWEN3 };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const char *k = mp_arch_name(known[i]);
        if (name.len == strlen(k) && memcmp(name.data, k, name.len) == 0) {
            *out = known[i];
            return MEPIC_OK;
        }
    }
    return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                   "%s: architecture \"%.*s\" is not supported; supported: llama, qwen2, qwen3", mp_gguf_path(gguf),
                   (int)name.len, name.data);
}

static mepic_status read_sizes(const source *s, mp_hparams *hp) {
    const struct {
        const char *name;
        uint32_t max;
        uint32_t *out;
    } sizes[] = {
        { "block_count", MAX_LAYERS, &hp->n_layers },        { "context_length", MAX_CTX, &hp->n_ctx_train },
        { "embedding_length", MAX_EMBD, &hp->n_embd },       { "feed_forward_length", MAX_FF, &hp->n_ff },
        { "attention.head_count", MAX_HEADS, &hp->n_heads },
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        mepic_status status = read_count(s, sizes[i].name, sizes[i].max, sizes[i].out);
        if (status != MEPIC_OK) return status;
    }
    return read_real(s, "attention.layer_norm_rms_epsilon", 0, 0.1f, &hp->norm_eps);
}

static mepic_status read_heads(const source *s, mp_hparams *hp) {
    const char *path = mp_gguf_path(s->gguf);
    mepic_status status = read_count_or(s, "attention.head_count_kv", MAX_HEADS, hp->n_heads, &hp->n_kv_heads);
    if (status != MEPIC_OK) return status;
    if (hp->n_heads % hp->n_kv_heads != 0) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: %u attention heads cannot share %u KV heads evenly", path,
                       hp->n_heads, hp->n_kv_heads);
    }
    if (hp->n_heads / hp->n_kv_heads > MAX_GROUP) {
        return mp_fail(s->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: %u attention heads share one of %u KV heads; at most %d are supported", path,
                       hp->n_heads / hp->n_kv_heads, hp->n_kv_heads, MAX_GROUP);
    }
    bool given = has(s, "attention.key_length");
    if (!given && hp->n_embd % hp->n_heads != 0) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT,
                       "%s: %u attention heads do not divide the %u dimensions of an embedding, and there is no key "
                       "\"%s.attention.key_length\"",
                       path, hp->n_heads, hp->n_embd, s->arch);
    }
    status = read_count_or(s, "attention.key_length", MAX_HEAD_DIM, hp->n_embd / hp->n_heads, &hp->head_dim);
    if (status != MEPIC_OK) return status;
    if (hp->head_dim == 0 || hp->head_dim % HEAD_DIM_STEP != 0 || hp->head_dim > MAX_HEAD_DIM) {
        return mp_fail(s->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: heads of %u dimensions; supported are multiples of %d up to %d", path, hp->head_dim,
                       HEAD_DIM_STEP, MAX_HEAD_DIM);
    }
    uint32_t value_dim;
    status = read_count_or(s, "attention.value_length", MAX_HEAD_DIM, hp->head_dim, &value_dim);
    if (status != MEPIC_OK) return status;
    if (value_dim != hp->head_dim) {
        return mp_fail(s->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: keys of %u and values of %u dimensions; only equal ones are supported", path, hp->head_dim,
                       value_dim);
    }
    return MEPIC_OK;
}

/* Which scaling a file asks for. Without a type a factor means linear; so does the older key "rope.scale_linear". */
static mepic_status read_scaling(const source *s, mp_rope_scaling *scaling, const char **factor_name) {
    *scaling = MP_ROPE_PLAIN;
    *factor_name = has(s, "rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
    if (!has(s, "rope.scaling.type")) {
        if (has(s, *factor_name)) *scaling = MP_ROPE_LINEAR;
        return MEPIC_OK;
    }
    char key[KEY_CAP];
    mp_str type;
    mepic_status status = mp_gguf_str(s->gguf, full_key(s, "rope.scaling.type", key), &type, s->err);
    if (status != MEPIC_OK) return status;
    static const struct {
        const char *name;
        mp_rope_scaling scaling;
    } known[] = { { "none", MP_ROPE_PLAIN }, { "linear", MP_ROPE_LINEAR }, { "yarn", MP_ROPE_YARN } };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (type.len == strlen(known[i].name) && memcmp(type.data, known[i].name, type.len) == 0) {
            *scaling = known[i].scaling;
            return MEPIC_OK;
        }
    }
    return mp_fail(s->err, MEPIC_ERR_UNSUPPORTED,
                   "%s: RoPE scaling \"%.*s\" is not supported; supported: none, linear, yarn, and llama3 by its "
                   "tensor \"rope_freqs.weight\"",
                   mp_gguf_path(s->gguf), (int)type.len, type.data);
}

static mepic_status read_yarn(const source *s, mp_hparams *hp) {
    float attn_factor = 1;
    const struct {
        const char *name;
        float low, high, fallback;
        float *out;
    } reals[] = {
        { "rope.scaling.yarn_ext_factor", -FLT_TRUE_MIN, 1, 1, &hp->rope.yarn_ext_factor }, // 0 is possible
        { "rope.scaling.yarn_attn_factor", 0, 100, 1, &hp->rope.yarn_attn_factor },
        { "rope.scaling.attn_factor", 0, 100, 1, &attn_factor },
        { "rope.scaling.yarn_beta_fast", 0, 10000, 32, &hp->rope.yarn_beta_fast },
        { "rope.scaling.yarn_beta_slow", 0, 10000, 1, &hp->rope.yarn_beta_slow },
    };
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++) {
        mepic_status status =
            read_real_or(s, reals[i].name, reals[i].low, reals[i].high, reals[i].fallback, reals[i].out);
        if (status != MEPIC_OK) return status;
    }
    hp->rope.yarn_attn_factor *= attn_factor;
    if (hp->rope.yarn_beta_fast <= hp->rope.yarn_beta_slow) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: YaRN's beta_fast (%g) must be greater than beta_slow (%g)",
                       mp_gguf_path(s->gguf), (double)hp->rope.yarn_beta_fast, (double)hp->rope.yarn_beta_slow);
    }
    return MEPIC_OK;
}

static mepic_status read_rope(const source *s, mp_hparams *hp) {
    hp->rope.pairs = hp->arch == MP_ARCH_LLAMA ? MP_ROPE_ADJACENT : MP_ROPE_HALVES;
    mepic_status status = read_count_or(s, "rope.dimension_count", hp->head_dim, hp->head_dim, &hp->rope.n_rot);
    if (status != MEPIC_OK) return status;
    if (hp->rope.n_rot % 2 != 0) {
        return mp_fail(s->err, MEPIC_ERR_FORMAT, "%s: key \"%s.rope.dimension_count\" is %u; it must be even",
                       mp_gguf_path(s->gguf), s->arch, hp->rope.n_rot);
    }
    if ((status = read_real_or(s, "rope.freq_base", 1, 1e12f, 10000, &hp->rope.freq_base)) != MEPIC_OK) return status;
    const char *factor_name;
    if ((status = read_scaling(s, &hp->rope.scaling, &factor_name)) != MEPIC_OK) return status;
    hp->rope.factor = 1;
    if (hp->rope.scaling != MP_ROPE_PLAIN) {
        if ((status = read_real(s, factor_name, 0, 1e6f, &hp->rope.factor)) != MEPIC_OK) return status;
    }
    status = read_count_or(s, "rope.scaling.original_context_length", MAX_CTX, hp->n_ctx_train, &hp->rope.original_ctx);
    if (status == MEPIC_OK && hp->rope.scaling == MP_ROPE_YARN) status = read_yarn(s, hp);
    return status;
}

mepic_status mp_hparams_read(const mp_gguf *gguf, mp_hparams *out, mepic_error *err) {
    mp_hparams hp = { 0 };
    mepic_status status = read_arch(gguf, &hp.arch, err);
    if (status == MEPIC_OK) status = check_container(gguf, err);
    if (status != MEPIC_OK) return status;
    source s = { gguf, mp_arch_name(hp.arch), err };
    hp.qkv_bias = hp.arch == MP_ARCH_QWEN2;
    hp.qk_norm = hp.arch == MP_ARCH_QWEN3;
    status = read_sizes(&s, &hp);
    if (status == MEPIC_OK) status = check_features(&s, hp.n_ctx_train);
    if (status == MEPIC_OK) status = read_heads(&s, &hp);
    if (status == MEPIC_OK) status = read_rope(&s, &hp);
    if (status == MEPIC_OK) *out = hp;
    return status;
}
