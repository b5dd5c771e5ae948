/* RoPE frequencies (Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2) and their fixed scalings:
 * linear interpolation (Chen et al., arXiv 2306.15595), YaRN (Peng et al., arXiv 2309.00071, sections 3.2 to 3.4, with
 * the pair indices of the ramp's ends rounded outwards as in the published implementations), and llama3's factors,
 * which the file carries ready as divisors. */
#include "model/rope.h"

#include <math.h>

#include "base/mem.h"

static const double pi = 3.14159265358979323846;

/* The pair that makes `turns` full turns over the original context: the paper's equation for d as a function of r. */
static double pair_of_turns(const mp_hparams *hp, double turns) {
    return hp->rope.n_rot * log(hp->rope.original_ctx / (turns * 2 * pi)) / (2 * log((double)hp->rope.freq_base));
}

/* Pairs below the ramp turn often within the original context and keep their frequency; above it, interpolated. */
static void scale_yarn(const mp_hparams *hp, double *freq, double *magnitude) {
    double low = fmax(0, floor(pair_of_turns(hp, (double)hp->rope.yarn_beta_fast)));
    double high = fmin(hp->rope.n_rot - 1.0, ceil(pair_of_turns(hp, (double)hp->rope.yarn_beta_slow)));
    double factor = (double)hp->rope.factor, ext = (double)hp->rope.yarn_ext_factor;
    for (uint32_t i = 0; i < hp->rope.n_rot / 2; i++) {
        double ramp = fmin(1, fmax(0, (i - low) / fmax(0.001, high - low)));
        double keep = (1 - ramp) * ext;
        freq[i] = freq[i] / factor * (1 - keep) + freq[i] * keep;
    }
    *magnitude = (double)hp->rope.yarn_attn_factor;
    if (ext > 0 && factor > 1) *magnitude *= 1 + 0.1 * log(factor); /* the paper's sqrt(1/t), on both q and k */
}

void mp_rope_frequencies(const mp_model *model, double *freq, double *magnitude) {
    const mp_hparams *hp = &model->hp;
    uint32_t n_pairs = hp->rope.n_rot / 2;
    for (uint32_t i = 0; i < n_pairs; i++) freq[i] = pow((double)hp->rope.freq_base, -2.0 * i / hp->rope.n_rot);
    *magnitude = 1;
    switch (hp->rope.scaling) {
    case MP_ROPE_PLAIN: break;
    case MP_ROPE_LINEAR:
        for (uint32_t i = 0; i < n_pairs; i++) freq[i] /= (double)hp->rope.factor;
        break;
    case MP_ROPE_YARN: scale_yarn(hp, freq, magnitude); break;
    case MP_ROPE_LLAMA3:
        for (uint32_t i = 0; i < n_pairs; i++) freq[i] /= (double)((const float *)model->rope_factors->data)[i];
        break;
    }
}

static size_t table_bytes(const mp_rope_table *t) {
    return (size_t)t->n_angles * 2 * t->n_pairs * sizeof *t->cos_sin;
}

mepic_status mp_rope_table_open(const mp_model *model, uint32_t n_angles, mp_rope_table *out, mepic_error *err) {
    double freq[128], magnitude; /* n_rot / 2 <= head_dim / 2 <= 128 */
    mp_rope_table t = { .n_angles = n_angles, .n_pairs = model->hp.rope.n_rot / 2 };
    mp_rope_frequencies(model, freq, &magnitude);
    /* 2^32 angles * 2 * 128 pairs * 4 bytes stays far below 2^64: table_bytes cannot wrap. */
    t.cos_sin = mp_alloc_aligned(64, table_bytes(&t));
    if (!t.cos_sin) return mp_fail_nomem(err, "the table of rotations", table_bytes(&t));
    for (uint32_t a = 0; a < n_angles; a++) {
        float *row = t.cos_sin + (size_t)a * 2 * t.n_pairs;
        for (uint32_t i = 0; i < t.n_pairs; i++) {
            row[i] = (float)(magnitude * cos(a * freq[i]));
            row[t.n_pairs + i] = (float)(magnitude * sin(a * freq[i]));
        }
    }
    *out = t;
    return MEPIC_OK;
}

void mp_rope_table_close(mp_rope_table *table) {
    mp_free_aligned(table->cos_sin, table_bytes(table));
    *table = (mp_rope_table){ 0 };
}

bool mp_rope_exact(const mp_model *model, const char **why) {
    switch (model->hp.rope.scaling) {
    case MP_ROPE_PLAIN: *why = "RoPE with fixed frequencies: only differences of positions matter"; return true;
    case MP_ROPE_LINEAR:
        *why = "RoPE with linear scaling: the frequencies are fixed, only differences of positions matter";
        return true;
    case MP_ROPE_YARN:
        *why = "RoPE with YaRN: frequencies and attention factor are fixed, only differences of positions matter";
        return true;
    case MP_ROPE_LLAMA3:
        *why = "RoPE with llama3 factors: the frequencies are fixed, only differences of positions matter";
        return true;
    }
    *why = "an unknown position encoding";
    return false;
}
