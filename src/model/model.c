/* The weight table: every tensor an architecture has is looked up by name, its shape and type compared, and a tensor
 * that nobody asked for is refused, since a model that runs without one of its parts gives wrong answers silently. */
#include "model/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "model/hparams.h"

enum { MAX_VOCAB = 1 << 20, NAME_CAP = 65 };

const char *mp_arch_name(mp_arch arch) {
    switch (arch) {
    case MP_ARCH_LLAMA: return "llama";
    case MP_ARCH_QWEN2: return "qwen2";
    case MP_ARCH_QWEN3: return "qwen3";
    }
    return "unknown";
}

typedef struct claims {
    const mp_gguf *gguf;
    bool *claimed; /* [n_tensors] */
    mepic_error *err;
} claims;

static const mp_tensor *look(claims *c, const char *name) {
    const mp_tensor *t = mp_gguf_tensor(c->gguf, name);
    if (t) c->claimed[t - mp_gguf_tensor_at(c->gguf, 0)] = true;
    return t;
}

static mepic_status missing(claims *c, const char *name) {
    return mp_fail(c->err, MEPIC_ERR_FORMAT, "%s: tensor \"%s\" is missing", mp_gguf_path(c->gguf), name);
}

/* [outputs, inputs]; a vector has one output and must be F32: norms and biases are read in place. */
static mepic_status claim(claims *c, const char *name, uint64_t outputs, uint64_t inputs, const mp_tensor **out) {
    const mp_tensor *t = look(c, name);
    if (!t) return missing(c, name);
    if (t->ne[0] != inputs || t->ne[1] != outputs || t->ne[2] != 1 || t->ne[3] != 1) {
        return mp_fail(c->err, MEPIC_ERR_FORMAT,
                       "%s: tensor \"%s\" is %" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                       "; the hyper-parameters want %" PRIu64 " x %" PRIu64,
                       mp_gguf_path(c->gguf), name, t->ne[0], t->ne[1], t->ne[2], t->ne[3], inputs, outputs);
    }
    if (outputs == 1 && t->type != MP_DTYPE_F32) {
        return mp_fail(c->err, MEPIC_ERR_UNSUPPORTED, "%s: tensor \"%s\" has type %s; norms and biases must be F32",
                       mp_gguf_path(c->gguf), name, mp_dtype_name((uint32_t)t->type));
    }
    *out = t;
    return MEPIC_OK;
}

/* ---- Layers ------------------------------------------------------------------------------------------------------ */

typedef enum dim { DIM_ONE, DIM_EMBD, DIM_Q, DIM_KV, DIM_HEAD, DIM_FF } dim;
typedef enum need { ALWAYS, WITH_QKV_BIAS, WITH_QK_NORM } need;

static const struct {
    const char *name; /* after "blk.N." */
    size_t field;
    dim outputs, inputs;
    need need;
} layer_tensors[] = {
    { "attn_norm.weight", offsetof(mp_layer, attn_norm), DIM_ONE, DIM_EMBD, ALWAYS },
    { "attn_q.weight", offsetof(mp_layer, wq), DIM_Q, DIM_EMBD, ALWAYS },
    { "attn_k.weight", offsetof(mp_layer, wk), DIM_KV, DIM_EMBD, ALWAYS },
    { "attn_v.weight", offsetof(mp_layer, wv), DIM_KV, DIM_EMBD, ALWAYS },
    { "attn_q.bias", offsetof(mp_layer, bq), DIM_ONE, DIM_Q, WITH_QKV_BIAS },
    { "attn_k.bias", offsetof(mp_layer, bk), DIM_ONE, DIM_KV, WITH_QKV_BIAS },
    { "attn_v.bias", offsetof(mp_layer, bv), DIM_ONE, DIM_KV, WITH_QKV_BIAS },
    { "attn_q_norm.weight", offsetof(mp_layer, q_norm), DIM_ONE, DIM_HEAD, WITH_QK_NORM },
    { "attn_k_norm.weight", offsetof(mp_layer, k_norm), DIM_ONE, DIM_HEAD, WITH_QK_NORM },
    { "attn_output.weight", offsetof(mp_layer, wo), DIM_EMBD, DIM_Q, ALWAYS },
    { "ffn_norm.weight", offsetof(mp_layer, ffn_norm), DIM_ONE, DIM_EMBD, ALWAYS },
    { "ffn_gate.weight", offsetof(mp_layer, gate), DIM_FF, DIM_EMBD, ALWAYS },
    { "ffn_up.weight", offsetof(mp_layer, up), DIM_FF, DIM_EMBD, ALWAYS },
    { "ffn_down.weight", offsetof(mp_layer, down), DIM_EMBD, DIM_FF, ALWAYS },
};

static uint64_t size_of(const mp_hparams *hp, dim d) {
    switch (d) {
    case DIM_ONE: return 1;
    case DIM_EMBD: return hp->n_embd;
    case DIM_Q: return (uint64_t)hp->n_heads * hp->head_dim;
    case DIM_KV: return (uint64_t)hp->n_kv_heads * hp->head_dim;
    case DIM_HEAD: return hp->head_dim;
    case DIM_FF: return hp->n_ff;
    }
    return 0;
}

static bool needed(const mp_hparams *hp, need n) {
    return n == ALWAYS || (n == WITH_QKV_BIAS && hp->qkv_bias) || (n == WITH_QK_NORM && hp->qk_norm);
}

static mepic_status claim_layer(claims *c, const mp_hparams *hp, uint32_t index, mp_layer *layer) {
    for (size_t i = 0; i < sizeof layer_tensors / sizeof *layer_tensors; i++) {
        if (!needed(hp, layer_tensors[i].need)) continue;
        char name[NAME_CAP];
        snprintf(name, sizeof name, "blk.%u.%s", index, layer_tensors[i].name);
        const mp_tensor *t;
        mepic_status status =
            claim(c, name, size_of(hp, layer_tensors[i].outputs), size_of(hp, layer_tensors[i].inputs), &t);
        if (status != MEPIC_OK) return status;
        memcpy((char *)layer + layer_tensors[i].field, &t, sizeof t);
    }
    return MEPIC_OK;
}

/* ---- What is not a layer ----------------------------------------------------------------------------------------- */

/* The embedding says how many tokens there are; the token list must agree, else an id could lie outside of it. */
static mepic_status claim_vocabulary(claims *c, mp_model *m) {
    const mp_tensor *embd = look(c, "token_embd.weight");
    if (!embd) return missing(c, "token_embd.weight");
    if (embd->ne[1] > MAX_VOCAB) {
        return mp_fail(c->err, MEPIC_ERR_FORMAT, "%s: %" PRIu64 " tokens in \"token_embd.weight\"; the limit is %d",
                       mp_gguf_path(c->gguf), embd->ne[1], MAX_VOCAB);
    }
    m->hp.n_vocab = (uint32_t)embd->ne[1];
    if (mp_gguf_has(c->gguf, "tokenizer.ggml.tokens")) {
        mp_gguf_array tokens = { 0 };
        mepic_status status = mp_gguf_array_find(c->gguf, "tokenizer.ggml.tokens", MP_GGUF_STRING, &tokens, c->err);
        if (status != MEPIC_OK) return status;
        if (tokens.count != m->hp.n_vocab) {
            return mp_fail(c->err, MEPIC_ERR_FORMAT,
                           "%s: %zu tokens in the vocabulary, but %u in \"token_embd.weight\"", mp_gguf_path(c->gguf),
                           tokens.count, m->hp.n_vocab);
        }
    }
    mepic_status status = claim(c, "token_embd.weight", m->hp.n_vocab, m->hp.n_embd, &m->token_embd);
    if (status != MEPIC_OK) return status;
    m->output = m->token_embd;
    if (!look(c, "output.weight")) return MEPIC_OK;
    return claim(c, "output.weight", m->hp.n_vocab, m->hp.n_embd, &m->output);
}

/* llama3's scaling is a tensor of divisors of the frequencies. */
static mepic_status claim_rope_factors(claims *c, mp_model *m) {
    static const char name[] = "rope_freqs.weight";
    if (m->hp.arch != MP_ARCH_LLAMA || !look(c, name)) return MEPIC_OK;
    if (m->hp.rope.scaling != MP_ROPE_PLAIN) {
        return mp_fail(c->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: both the tensor \"%s\" and a RoPE scaling type; only one of them is supported",
                       mp_gguf_path(c->gguf), name);
    }
    mepic_status status = claim(c, name, 1, m->hp.rope.n_rot / 2, &m->rope_factors);
    if (status != MEPIC_OK) return status;
    const float *factor = m->rope_factors->data;
    for (uint32_t i = 0; i < m->hp.rope.n_rot / 2; i++) {
        if (!(factor[i] > 0 && factor[i] <= 1e6f)) {
            return mp_fail(c->err, MEPIC_ERR_FORMAT,
                           "%s: factor %u in \"%s\" is %g; it must be greater than 0 and at most 1e6",
                           mp_gguf_path(c->gguf), i, name, (double)factor[i]);
        }
    }
    m->hp.rope.scaling = MP_ROPE_LLAMA3;
    return MEPIC_OK;
}

static mepic_status refuse_unclaimed(const claims *c, mp_arch arch) {
    for (size_t i = 0; i < mp_gguf_n_tensors(c->gguf); i++) {
        if (c->claimed[i]) continue;
        const mp_tensor *t = mp_gguf_tensor_at(c->gguf, i);
        return mp_fail(c->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: tensor \"%.*s\" is not one of a %s model here, and without it the answers would be wrong",
                       mp_gguf_path(c->gguf), (int)t->name.len, t->name.data, mp_arch_name(arch));
    }
    return MEPIC_OK;
}

static mepic_status fill(mp_model *m, mepic_error *err) {
    mepic_status status = mp_hparams_read(m->gguf, &m->hp, err);
    if (status != MEPIC_OK) return status;
    claims c = { .gguf = m->gguf, .err = err };
    c.claimed = mp_calloc(mp_gguf_n_tensors(m->gguf), sizeof *c.claimed);
    m->layers = mp_calloc(m->hp.n_layers, sizeof *m->layers);
    if (!c.claimed || !m->layers) {
        status = mp_fail_nomem(err, "the weight table", m->hp.n_layers * sizeof *m->layers);
        goto out;
    }
    if ((status = claim_vocabulary(&c, m)) != MEPIC_OK) goto out;
    if ((status = claim(&c, "output_norm.weight", 1, m->hp.n_embd, &m->output_norm)) != MEPIC_OK) goto out;
    if ((status = claim_rope_factors(&c, m)) != MEPIC_OK) goto out;
    for (uint32_t i = 0; i < m->hp.n_layers; i++) {
        if ((status = claim_layer(&c, &m->hp, i, &m->layers[i])) != MEPIC_OK) goto out;
    }
    status = refuse_unclaimed(&c, m->hp.arch);
out:
    mp_free(c.claimed);
    return status;
}

mepic_status mp_model_open_gguf(mp_gguf *gguf, mp_model **out, mepic_error *err) {
    mp_model *m = mp_calloc(1, sizeof *m);
    if (!m) {
        mp_gguf_close(gguf);
        return mp_fail_nomem(err, "a model", sizeof *m);
    }
    m->gguf = gguf;
    mepic_status status = fill(m, err);
    if (status != MEPIC_OK) {
        mp_model_close(m);
        return status;
    }
    *out = m;
    return MEPIC_OK;
}

mepic_status mp_model_open(const char *path, mp_model **out, mepic_error *err) {
    mp_gguf *gguf;
    mepic_status status = mp_gguf_open(path, &gguf, err);
    return status == MEPIC_OK ? mp_model_open_gguf(gguf, out, err) : status;
}

void mp_model_close(mp_model *model) {
    if (!model) return;
    mp_gguf_close(model->gguf);
    mp_free(model->layers);
    mp_free(model);
}
