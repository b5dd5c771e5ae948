#include "support/oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/rope.h"

struct oracle {
    const mp_model *model;
    const mp_hparams *hp;
    double freq[128], magnitude;
    struct weights {
        float *attn_norm, *wq, *wk, *wv, *bq, *bk, *bv, *q_norm, *k_norm, *wo, *ffn_norm, *gate, *up, *down;
    } * layers;
    float *embd, *out_norm, *output;
};

static float *weights_of(const mp_tensor *t) {
    if (!t) return NULL;
    size_t n = (size_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]);
    float *w = malloc(n * sizeof *w);
    mp_dtype_dequantize(t->type, t->data, w, n);
    return w;
}

oracle *oracle_open(const mp_model *model) {
    oracle *o = calloc(1, sizeof *o);
    o->model = model;
    o->hp = &model->hp;
    mp_rope_frequencies(model, o->freq, &o->magnitude);
    o->embd = weights_of(model->token_embd);
    o->out_norm = weights_of(model->output_norm);
    o->output = model->output == model->token_embd ? o->embd : weights_of(model->output);
    o->layers = calloc(model->hp.n_layers, sizeof *o->layers);
    for (uint32_t l = 0; l < model->hp.n_layers; l++) {
        const mp_layer *m = &model->layers[l];
        o->layers[l] = (struct weights){
            weights_of(m->attn_norm), weights_of(m->wq),   weights_of(m->wk),       weights_of(m->wv),
            weights_of(m->bq),        weights_of(m->bk),   weights_of(m->bv),       weights_of(m->q_norm),
            weights_of(m->k_norm),    weights_of(m->wo),   weights_of(m->ffn_norm), weights_of(m->gate),
            weights_of(m->up),        weights_of(m->down),
        };
    }
    return o;
}

void oracle_close(oracle *o) {
    for (uint32_t l = 0; l < o->hp->n_layers; l++) {
        struct weights *w = &o->layers[l];
        float *all[] = { w->attn_norm, w->wq,     w->wk, w->wv,       w->bq,   w->bk, w->bv,
                         w->q_norm,    w->k_norm, w->wo, w->ffn_norm, w->gate, w->up, w->down };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    }
    if (o->output != o->embd) free(o->output);
    free(o->embd);
    free(o->out_norm);
    free(o->layers);
    free(o);
}

void oracle_kv_free(oracle_kv *kv) {
    free(kv->k);
    free(kv->v);
    free(kv->x);
    memset(kv, 0, sizeof *kv);
}

/* y [n_out] = w [n_out, n_in] x + bias */
static void product(double *y, const float *w, const float *bias, const double *x, uint32_t n_out, uint32_t n_in) {
    for (uint32_t i = 0; i < n_out; i++) {
        double part[8] = { 0 }; /* eight sums, so that the compiler may use vectors; double leaves room to spare */
        const float *row = w + (size_t)i * n_in;
        for (uint32_t j = 0; j < n_in; j++) part[j % 8] += (double)row[j] * x[j];
        double sum = bias ? (double)bias[i] : 0;
        for (int p = 0; p < 8; p++) sum += part[p];
        y[i] = sum;
    }
}

static void rms_norm(double *y, const double *x, const float *weight, uint32_t n, double eps) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += x[i] * x[i];
    double scale = 1 / sqrt(sum / n + eps);
    for (uint32_t i = 0; i < n; i++) y[i] = x[i] * scale * (double)weight[i];
}

/* out = R(position) in, for one head */
static void turn(const oracle *o, double *out, const double *in, int32_t position) {
    uint32_t half = o->hp->rope.n_rot / 2;
    memcpy(out, in, o->hp->head_dim * sizeof *out);
    for (uint32_t i = 0; i < half; i++) {
        bool adjacent = o->hp->rope.pairs == MP_ROPE_ADJACENT;
        uint32_t a = adjacent ? 2 * i : i, b = adjacent ? 2 * i + 1 : i + half;
        double c = cos(position * o->freq[i]) * o->magnitude, s = sin(position * o->freq[i]) * o->magnitude;
        out[a] = in[a] * c - in[b] * s;
        out[b] = in[a] * s + in[b] * c;
    }
}

/* A head's attention of one row over keys given as turned vectors. */
typedef struct sighted {
    const double *k, *v; /* k turned at its position */
} sighted;

static void attention(double *out, const double *q, const sighted *keys, uint32_t n, uint32_t head_dim) {
    double *s = malloc(n * sizeof *s), top = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        s[i] = 0;
        for (uint32_t d = 0; d < head_dim; d++) s[i] += q[d] * keys[i].k[d];
        s[i] /= sqrt(head_dim);
        top = fmax(top, s[i]);
    }
    memset(out, 0, head_dim * sizeof *out);
    for (uint32_t i = 0; i < n; i++) {
        double p = exp(s[i] - top);
        sum += p;
        for (uint32_t d = 0; d < head_dim; d++) out[d] += p * keys[i].v[d];
    }
    for (uint32_t d = 0; d < head_dim; d++) out[d] /= sum;
    free(s);
}

/* All rows of one layer's attention: a [n, n_heads * head_dim] from q (normed, not turned). */
static void attend(const oracle *o, uint32_t layer, const oracle_kv *self, const int32_t *positions,
                   const oracle_key *shared, uint32_t n_shared, const double *q, double *a) {
    const mp_hparams *hp = o->hp;
    uint32_t hd = hp->head_dim, n = self->n, kv_width = hp->n_kv_heads * hd, group = hp->n_heads / hp->n_kv_heads;
    double *turned = malloc((size_t)(n + n_shared) * hd * sizeof *turned);
    sighted *seen = malloc((n + n_shared) * sizeof *seen);
    for (uint32_t h = 0; h < hp->n_kv_heads; h++) {
        for (uint32_t i = 0; i < n_shared; i++) {
            const oracle_key *key = &shared[i];
            size_t at = ((size_t)layer * key->kv->n + key->index) * kv_width + h * hd;
            turn(o, turned + (size_t)i * hd, key->kv->k + at, key->position);
        }
        for (uint32_t i = 0; i < n; i++) {
            size_t at = ((size_t)layer * n + i) * kv_width + h * hd;
            turn(o, turned + (size_t)(n_shared + i) * hd, self->k + at, positions[i]);
        }
        for (uint32_t r = 0; r < n; r++) {
            uint32_t m = 0;
            for (uint32_t i = 0; i < n_shared; i++) {
                const oracle_key *key = &shared[i];
                if (key->position >= positions[r]) continue;
                size_t at = ((size_t)layer * key->kv->n + key->index) * kv_width + h * hd;
                seen[m++] = (sighted){ turned + (size_t)i * hd, key->kv->v + at };
            }
            for (uint32_t i = 0; i <= r; i++) {
                size_t at = ((size_t)layer * n + i) * kv_width + h * hd;
                seen[m++] = (sighted){ turned + (size_t)(n_shared + i) * hd, self->v + at };
            }
            for (uint32_t g = h * group; g < (h + 1) * group; g++) {
                size_t at = ((size_t)r * hp->n_heads + g) * hd;
                double q_turned[256];
                turn(o, q_turned, q + at, positions[r]);
                attention(a + at, q_turned, seen, m, hd);
            }
        }
    }
    free(turned);
    free(seen);
}

static void qkv(const oracle *o, uint32_t layer, const double *x, double *q, double *k, double *v) {
    const mp_hparams *hp = o->hp;
    const struct weights *w = &o->layers[layer];
    double *h = malloc(hp->n_embd * sizeof *h);
    rms_norm(h, x, w->attn_norm, hp->n_embd, (double)hp->norm_eps);
    product(q, w->wq, w->bq, h, hp->n_heads * hp->head_dim, hp->n_embd);
    product(k, w->wk, w->bk, h, hp->n_kv_heads * hp->head_dim, hp->n_embd);
    product(v, w->wv, w->bv, h, hp->n_kv_heads * hp->head_dim, hp->n_embd);
    for (uint32_t i = 0; hp->qk_norm && i < hp->n_heads; i++) {
        rms_norm(q + i * hp->head_dim, q + i * hp->head_dim, w->q_norm, hp->head_dim, (double)hp->norm_eps);
    }
    for (uint32_t i = 0; hp->qk_norm && i < hp->n_kv_heads; i++) {
        rms_norm(k + i * hp->head_dim, k + i * hp->head_dim, w->k_norm, hp->head_dim, (double)hp->norm_eps);
    }
    free(h);
}

static void feed_forward(const oracle *o, uint32_t layer, const double *a, double *x) {
    const mp_hparams *hp = o->hp;
    const struct weights *w = &o->layers[layer];
    double *h = malloc(hp->n_embd * sizeof *h), *g = malloc(hp->n_ff * sizeof *g), *u = malloc(hp->n_ff * sizeof *u);
    product(h, w->wo, NULL, a, hp->n_embd, hp->n_heads * hp->head_dim);
    for (uint32_t i = 0; i < hp->n_embd; i++) x[i] += h[i];
    rms_norm(h, x, w->ffn_norm, hp->n_embd, (double)hp->norm_eps);
    product(g, w->gate, NULL, h, hp->n_ff, hp->n_embd);
    product(u, w->up, NULL, h, hp->n_ff, hp->n_embd);
    for (uint32_t i = 0; i < hp->n_ff; i++) g[i] = g[i] / (1 + exp(-g[i])) * u[i];
    product(h, w->down, NULL, g, hp->n_embd, hp->n_ff);
    for (uint32_t i = 0; i < hp->n_embd; i++) x[i] += h[i];
    free(h);
    free(g);
    free(u);
}

void oracle_compute(const oracle *o, const int32_t *tokens, const int32_t *positions, uint32_t n,
                    const oracle_key *shared, uint32_t n_shared, oracle_kv *out) {
    const mp_hparams *hp = o->hp;
    size_t q_width = (size_t)hp->n_heads * hp->head_dim, kv_width = (size_t)hp->n_kv_heads * hp->head_dim;
    out->n = n;
    out->k = calloc(hp->n_layers * n * kv_width + 1, sizeof *out->k);
    out->v = calloc(hp->n_layers * n * kv_width + 1, sizeof *out->v);
    out->x = calloc((size_t)n * hp->n_embd + 1, sizeof *out->x);
    double *q = malloc((n * q_width + 1) * sizeof *q), *a = malloc((n * q_width + 1) * sizeof *a);
    for (uint32_t r = 0; r < n; r++) {
        const float *row = o->embd + (size_t)tokens[r] * hp->n_embd;
        for (uint32_t i = 0; i < hp->n_embd; i++) out->x[(size_t)r * hp->n_embd + i] = (double)row[i];
    }
    for (uint32_t l = 0; l < hp->n_layers; l++) {
        for (uint32_t r = 0; r < n; r++) {
            size_t at = ((size_t)l * n + r) * kv_width;
            qkv(o, l, out->x + (size_t)r * hp->n_embd, q + r * q_width, out->k + at, out->v + at);
        }
        attend(o, l, out, positions, shared, n_shared, q, a);
        for (uint32_t r = 0; r < n; r++) feed_forward(o, l, a + r * q_width, out->x + (size_t)r * hp->n_embd);
    }
    free(q);
    free(a);
}

void oracle_logits(const oracle *o, const oracle_kv *kv, uint32_t i, double *logits) {
    const mp_hparams *hp = o->hp;
    double *h = malloc(hp->n_embd * sizeof *h);
    rms_norm(h, kv->x + (size_t)i * hp->n_embd, o->out_norm, hp->n_embd, (double)hp->norm_eps);
    product(logits, o->output, NULL, h, hp->n_vocab, hp->n_embd);
    free(h);
}
