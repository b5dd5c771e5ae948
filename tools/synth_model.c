/* A file is written in one pass: the header is built in memory from a list of tensors, then every tensor is generated,
 * encoded and written row by row. A tensor's random numbers depend on the seed and its name only. */
#include "tools/synth_model.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "tools/quantize.h"
#include "tools/synth_vocab.h"

enum { ALIGNMENT = 32, NAME_CAP = 64, MAX_HEADER = 1 << 28 };

/* How a tensor's values are drawn. */
typedef enum values {
    MATRIX,    /* deviation 1 / sqrt(inputs): outputs as large as inputs */
    EMBEDDING, /* deviation 1 */
    NORM,      /* around 1, deviation 0.1 */
    BIAS,      /* deviation 0.5 */
    FACTORS,   /* llama3's rule, nothing random */
} values;

typedef struct item {
    char name[NAME_CAP];
    values values;
    mp_dtype type;
    uint64_t inputs, outputs; /* outputs 1: a vector */
    uint64_t bytes;
} item;

typedef struct plan {
    const mp_synth_spec *spec;
    uint32_t n_vocab;
    item *items; /* [n] */
    size_t n, cap;
    mp_buf header;
    mepic_error *err;
} plan;

/* ---- The list of tensors ----------------------------------------------------------------------------------------- */

static mepic_status add(plan *p, const char *name, values v, mp_dtype type, uint64_t outputs, uint64_t inputs) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)type);
    if (!info || inputs % info->len != 0) {
        return mp_fail(p->err, MEPIC_ERR_ARGUMENT, "%s: a row of %zu weights cannot be of type %s", name,
                       (size_t)inputs, mp_dtype_name((uint32_t)type));
    }
    if (p->n == p->cap) return mp_fail(p->err, MEPIC_ERR_ARGUMENT, "%s: too many tensors", name);
    item *it = &p->items[p->n++];
    *it = (item){ .values = v, .type = type, .inputs = inputs, .outputs = outputs };
    snprintf(it->name, sizeof it->name, "%s", name);
    it->bytes = inputs / info->len * info->bytes * outputs;
    return MEPIC_OK;
}

static mepic_status add_layer(plan *p, uint32_t index) {
    const mp_hparams *hp = &p->spec->hp;
    const mp_dtype *types = p->spec->types;
    bool bias = hp->arch == MP_ARCH_QWEN2, norm = hp->arch == MP_ARCH_QWEN3;
    uint64_t q = (uint64_t)hp->n_heads * hp->head_dim, kv = (uint64_t)hp->n_kv_heads * hp->head_dim;
    const struct {
        const char *name;
        values values;
        mp_dtype type;
        uint64_t outputs, inputs;
        bool wanted;
    } tensors[] = {
        { "attn_norm.weight", NORM, MP_DTYPE_F32, 1, hp->n_embd, true },
        { "attn_q.weight", MATRIX, types[MP_SYNTH_Q], q, hp->n_embd, true },
        { "attn_k.weight", MATRIX, types[MP_SYNTH_K], kv, hp->n_embd, true },
        { "attn_v.weight", MATRIX, types[MP_SYNTH_V], kv, hp->n_embd, true },
        { "attn_q.bias", BIAS, MP_DTYPE_F32, 1, q, bias },
        { "attn_k.bias", BIAS, MP_DTYPE_F32, 1, kv, bias },
        { "attn_v.bias", BIAS, MP_DTYPE_F32, 1, kv, bias },
        { "attn_q_norm.weight", NORM, MP_DTYPE_F32, 1, hp->head_dim, norm },
        { "attn_k_norm.weight", NORM, MP_DTYPE_F32, 1, hp->head_dim, norm },
        { "attn_output.weight", MATRIX, types[MP_SYNTH_O], hp->n_embd, q, true },
        { "ffn_norm.weight", NORM, MP_DTYPE_F32, 1, hp->n_embd, true },
        { "ffn_gate.weight", MATRIX, types[MP_SYNTH_GATE], hp->n_ff, hp->n_embd, true },
        { "ffn_up.weight", MATRIX, types[MP_SYNTH_UP], hp->n_ff, hp->n_embd, true },
        { "ffn_down.weight", MATRIX, types[MP_SYNTH_DOWN], hp->n_embd, hp->n_ff, true },
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (!tensors[i].wanted) continue;
        char name[NAME_CAP];
        snprintf(name, sizeof name, "blk.%u.%s", index, tensors[i].name);
        mepic_status status = add(p, name, tensors[i].values, tensors[i].type, tensors[i].outputs, tensors[i].inputs);
        if (status != MEPIC_OK) return status;
    }
    return MEPIC_OK;
}

static mepic_status add_all(plan *p) {
    const mp_hparams *hp = &p->spec->hp;
    const mp_dtype *types = p->spec->types;
    p->cap = 4 + (size_t)hp->n_layers * 14;
    p->items = mp_calloc(p->cap, sizeof *p->items);
    if (!p->items) return mp_fail_nomem(p->err, "the list of tensors", p->cap * sizeof *p->items);
    mepic_status status = add(p, "token_embd.weight", EMBEDDING, types[MP_SYNTH_EMBD], p->n_vocab, hp->n_embd);
    if (status == MEPIC_OK) status = add(p, "output_norm.weight", NORM, MP_DTYPE_F32, 1, hp->n_embd);
    if (status == MEPIC_OK && !p->spec->tied) {
        status = add(p, "output.weight", MATRIX, types[MP_SYNTH_OUTPUT], p->n_vocab, hp->n_embd);
    }
    if (status == MEPIC_OK && hp->rope.scaling == MP_ROPE_LLAMA3) {
        status = add(p, "rope_freqs.weight", FACTORS, MP_DTYPE_F32, 1, hp->rope.n_rot / 2);
    }
    for (uint32_t i = 0; status == MEPIC_OK && i < hp->n_layers; i++) status = add_layer(p, i);
    return status;
}

/* ---- The header -------------------------------------------------------------------------------------------------- */

static bool put_arch_key(mp_buf *b, const mp_hparams *hp, const char *name, mp_gguf_type type) {
    char key[96];
    snprintf(key, sizeof key, "%s.%s", mp_arch_name(hp->arch), name);
    return mp_synth_put_key(b, key, type);
}

static bool put_count(mp_buf *b, const mp_hparams *hp, const char *name, uint32_t v) {
    return put_arch_key(b, hp, name, MP_GGUF_U32) && mp_synth_put_u32(b, v);
}

static bool put_real(mp_buf *b, const mp_hparams *hp, const char *name, float v) {
    return put_arch_key(b, hp, name, MP_GGUF_F32) && mp_buf_append(b, &v, sizeof v);
}

/* Appends the hyper-parameters and adds their number to *n. */
static bool put_hparams(mp_buf *b, const mp_hparams *hp, uint64_t *n) {
    bool ok = mp_synth_put_key(b, "general.architecture", MP_GGUF_STRING) &&
              mp_synth_put_str(b, mp_arch_name(hp->arch)) && mp_synth_put_key(b, "general.name", MP_GGUF_STRING) &&
              mp_synth_put_str(b, "synthetic") && put_count(b, hp, "block_count", hp->n_layers) &&
              put_count(b, hp, "context_length", hp->n_ctx_train) && put_count(b, hp, "embedding_length", hp->n_embd) &&
              put_count(b, hp, "feed_forward_length", hp->n_ff) &&
              put_count(b, hp, "attention.head_count", hp->n_heads) &&
              put_count(b, hp, "attention.head_count_kv", hp->n_kv_heads) &&
              put_count(b, hp, "attention.key_length", hp->head_dim) &&
              put_count(b, hp, "attention.value_length", hp->head_dim) &&
              put_real(b, hp, "attention.layer_norm_rms_epsilon", hp->norm_eps) &&
              put_count(b, hp, "rope.dimension_count", hp->rope.n_rot) &&
              put_real(b, hp, "rope.freq_base", hp->rope.freq_base);
    *n += 13;
    bool yarn = hp->rope.scaling == MP_ROPE_YARN;
    if (ok && (yarn || hp->rope.scaling == MP_ROPE_LINEAR)) {
        ok = put_arch_key(b, hp, "rope.scaling.type", MP_GGUF_STRING) &&
             mp_synth_put_str(b, yarn ? "yarn" : "linear") && put_real(b, hp, "rope.scaling.factor", hp->rope.factor);
        *n += 2;
    }
    if (ok && yarn) {
        ok = put_count(b, hp, "rope.scaling.original_context_length", hp->rope.original_ctx) &&
             put_real(b, hp, "rope.scaling.yarn_ext_factor", hp->rope.yarn_ext_factor) &&
             put_real(b, hp, "rope.scaling.yarn_attn_factor", hp->rope.yarn_attn_factor) &&
             put_real(b, hp, "rope.scaling.yarn_beta_fast", hp->rope.yarn_beta_fast) &&
             put_real(b, hp, "rope.scaling.yarn_beta_slow", hp->rope.yarn_beta_slow);
        *n += 5;
    }
    return ok;
}

static bool put_directory(plan *p) {
    mp_buf *b = &p->header;
    uint64_t offset = 0;
    for (size_t i = 0; i < p->n; i++) {
        const item *it = &p->items[i];
        uint32_t n_dims = it->outputs == 1 ? 1 : 2;
        if (!mp_synth_put_str(b, it->name) || !mp_synth_put_u32(b, n_dims) || !mp_synth_put_u64(b, it->inputs) ||
            (n_dims == 2 && !mp_synth_put_u64(b, it->outputs)) || !mp_synth_put_u32(b, (uint32_t)it->type) ||
            !mp_synth_put_u64(b, offset)) {
            return false;
        }
        offset += (it->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    static const uint8_t zero[ALIGNMENT];
    return mp_buf_append(b, zero, (ALIGNMENT - b->len % ALIGNMENT) % ALIGNMENT);
}

static mepic_status build_header(plan *p) {
    mp_buf keys = { .limit = MAX_HEADER };
    p->header.limit = 2 * (size_t)MAX_HEADER;
    uint64_t n_keys = 0;
    mepic_status status = MEPIC_OK;
    bool ok = put_hparams(&keys, &p->spec->hp, &n_keys);
    if (ok && p->spec->donor) {
        status = mp_synth_copy_vocab(&keys, p->spec->donor, &n_keys, &p->n_vocab, p->err);
    } else if (ok) {
        ok = mp_synth_put_vocab(&keys, p->spec->hp.n_vocab, p->spec->chat_template, &n_keys, &p->n_vocab);
    }
    if (ok && status == MEPIC_OK) status = add_all(p);
    if (ok && status == MEPIC_OK) {
        ok = mp_buf_append(&p->header, "GGUF", 4) && mp_synth_put_u32(&p->header, 3) &&
             mp_synth_put_u64(&p->header, p->n) && mp_synth_put_u64(&p->header, n_keys) &&
             mp_buf_append(&p->header, keys.data, keys.len) && put_directory(p);
    }
    if (!ok) status = mp_fail_nomem(p->err, "the header of a model file", keys.len + p->header.len);
    mp_buf_clear(&keys);
    return status;
}

/* ---- Values ------------------------------------------------------------------------------------------------------ */

/* SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014). */
static uint64_t random_u64(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Nearly Gaussian, mean 0 and deviation 1: the sum of four uniform 16-bit numbers. No libm, so every machine agrees. */
static float random_normal(uint64_t *state) {
    uint64_t r = random_u64(state);
    int32_t sum =
        (int32_t)(r & 0xffff) + (int32_t)(r >> 16 & 0xffff) + (int32_t)(r >> 32 & 0xffff) + (int32_t)(r >> 48);
    return ((float)sum - 2 * 65535.0f) * (1 / 37837.2f); /* sqrt(4 / 12) * 65536 */
}

/* Llama 3.1's rule: wavelengths under original_ctx / 4 stay, those over original_ctx are divided by the factor, between
 * them 1 / f goes linearly in original_ctx / wavelength. */
static void llama3_factors(const mp_hparams *hp, float *out) {
    for (uint32_t i = 0; i < hp->rope.n_rot / 2; i++) {
        double turns = hp->rope.original_ctx * pow((double)hp->rope.freq_base, -2.0 * i / hp->rope.n_rot) / (2 * M_PI);
        double smooth = fmin(1, fmax(0, (turns - 1) / (4 - 1)));
        out[i] = (float)(1 / ((1 - smooth) / (double)hp->rope.factor + smooth));
    }
}

static void draw_row(const plan *p, const item *it, uint64_t *state, float *row) {
    if (it->values == FACTORS) {
        llama3_factors(&p->spec->hp, row);
        return;
    }
    float mean = it->values == NORM ? 1 : 0, deviation = 1;
    if (it->values == NORM) deviation = 0.1f;
    if (it->values == BIAS) deviation = 0.5f;
    if (it->values == MATRIX) deviation = 1 / sqrtf((float)it->inputs);
    for (uint64_t i = 0; i < it->inputs; i++) row[i] = mean + deviation * random_normal(state);
}

static mepic_status write_data(plan *p, FILE *out) {
    uint64_t widest = 0, total = 0, done = 0;
    for (size_t i = 0; i < p->n; i++) {
        if (p->items[i].inputs > widest) widest = p->items[i].inputs;
        total += p->items[i].bytes;
    }
    float *row = mp_calloc(widest, sizeof *row);
    uint32_t n_kept = p->spec->n_drawn > 0 ? p->spec->n_drawn : 1;
    uint8_t *coded = mp_calloc(widest * n_kept, sizeof *row); /* no type is wider than F32 */
    mepic_status status = MEPIC_OK;
    if (!row || !coded) status = mp_fail_nomem(p->err, "a row of weights", widest * sizeof *row);
    for (size_t i = 0; i < p->n && status == MEPIC_OK; i++) {
        const item *it = &p->items[i];
        uint64_t state = mp_hash64(p->spec->seed, it->name, strlen(it->name));
        bool ok = true;
        uint64_t row_bytes = it->bytes / it->outputs;
        for (uint64_t r = 0; ok && r < it->outputs; r++) {
            uint8_t *kept = coded + r % n_kept * row_bytes;
            if (p->spec->n_drawn == 0 || r < n_kept) {
                draw_row(p, it, &state, row);
                mp_quantize(it->type, row, kept, it->inputs);
            }
            ok = fwrite(kept, row_bytes, 1, out) == 1;
        }
        static const uint8_t zero[ALIGNMENT];
        size_t pad = (size_t)((ALIGNMENT - it->bytes % ALIGNMENT) % ALIGNMENT);
        ok = ok && fwrite(zero, 1, pad, out) == pad;
        if (!ok) status = mp_fail(p->err, MEPIC_ERR_IO, "writing %s: %s", it->name, strerror(errno));
        done += it->bytes;
        mp_log_progress(p->spec->log, "writing", done, total);
    }
    mp_free(row);
    mp_free(coded);
    return status;
}

mepic_status mp_synth_write(const mp_synth_spec *spec, FILE *out, mepic_error *err) {
    plan p = { .spec = spec, .err = err };
    mepic_status status = build_header(&p);
    if (status == MEPIC_OK && fwrite(p.header.data, 1, p.header.len, out) != p.header.len) {
        status = mp_fail(err, MEPIC_ERR_IO, "writing the header: %s", strerror(errno));
    }
    if (status == MEPIC_OK) status = write_data(&p, out);
    if (status == MEPIC_OK && fflush(out) != 0) status = mp_fail(err, MEPIC_ERR_IO, "writing: %s", strerror(errno));
    mp_buf_clear(&p.header);
    mp_free(p.items);
    return status;
}

mp_synth_spec mp_synth_tiny(mp_arch arch) {
    mp_synth_spec spec = {
        .hp = { .arch = arch,
                .n_layers = 2,
                .n_embd = 64,
                .n_ff = 128,
                .n_ctx_train = 4096,
                .n_heads = 4,
                .n_kv_heads = 2,
                .head_dim = 16,
                .norm_eps = 1e-5f,
                .rope = { .n_rot = 16,
                          .freq_base = 10000,
                          .factor = 4,
                          .original_ctx = 1024,
                          .yarn_ext_factor = 1,
                          .yarn_attn_factor = 1,
                          .yarn_beta_fast = 32,
                          .yarn_beta_slow = 1 } },
        .seed = 1,
    };
    mp_synth_set_type(&spec, MP_DTYPE_F32);
    return spec;
}

void mp_synth_set_type(mp_synth_spec *spec, mp_dtype type) {
    for (int i = 0; i < MP_SYNTH_N_ROLES; i++) spec->types[i] = type;
}
