#include "backend/cuda/sample.h"

#include "base/hash.h"
#include "base/mem.h"

struct mp_cu_sampler {
    mp_cu_device *device;
    uint32_t n_vocab, max_rows, max_adjusts;
    uint32_t n_rows, n_adjusts;         /* of this step, */
    uint32_t n_rows_run, n_adjusts_run; /* and those that were run */
    uint32_t *at;                       /* [n_vocab] 1 + which adjustment of the row a token has; 0 between uses */
    /* Pinned, in turn for one step and the next. The kernel reads draws and writes what it has drawn right there: each
     * row's once, which is less than a copy costs. */
    mp_cu_draw *draws[2];
    mp_sampled *drawn[2];
    mp_cu_adjust *adjusts[2];
    uint32_t turn;
    void *device_adjusts, *saved, *tokens; /* on the device */
};

void mp_cu_sampler_close(mp_cu_sampler *s) {
    if (!s) return;
    void *const taken[] = { s->draws[0], s->draws[1], s->adjusts[0], s->adjusts[1],    s->drawn[0],
                            s->drawn[1], s->saved,    s->tokens,     s->device_adjusts };
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) mp_cu_drop(s->device, taken[i]);
    mp_free(s->at);
    mp_free(s);
}

mepic_status mp_cu_sampler_open(mp_cu_device *device, uint32_t n_vocab, uint32_t max_rows, uint32_t max_adjusts,
                                uint32_t max_seqs, mp_cu_sampler **out, mepic_error *err) {
    mp_cu_sampler *s = mp_calloc(1, sizeof *s);
    if (!s) return mp_fail_nomem(err, "the sampler", sizeof *s);
    s->device = device;
    s->n_vocab = n_vocab;
    s->max_rows = max_rows;
    s->max_adjusts = max_adjusts;
    s->at = mp_calloc(n_vocab, sizeof *s->at);
    void *pinned[6] = { 0 };
    const struct {
        void **to;
        size_t bytes;
        bool pinned;
    } parts[] = {
        { &pinned[0], max_rows * sizeof(mp_cu_draw), true },
        { &pinned[1], max_rows * sizeof(mp_cu_draw), true },
        { &pinned[2], max_adjusts * sizeof(mp_cu_adjust), true },
        { &pinned[3], max_adjusts * sizeof(mp_cu_adjust), true },
        { &pinned[4], max_rows * sizeof(mp_sampled), true },
        { &pinned[5], max_rows * sizeof(mp_sampled), true },
        { &s->device_adjusts, max_adjusts * sizeof(mp_cu_adjust), false },
        { &s->saved, max_adjusts * sizeof(float), false },
        { &s->tokens, max_seqs * sizeof(int32_t), false },
    };
    mepic_status status = s->at ? MEPIC_OK : mp_fail_nomem(err, "the sampler's scratch", n_vocab * sizeof *s->at);
    for (size_t i = 0; status == MEPIC_OK && i < sizeof parts / sizeof *parts; i++) {
        status = parts[i].pinned ? mp_cu_take_pinned(device, parts[i].bytes, "the sampler", parts[i].to, err)
                                 : mp_cu_take(device, parts[i].bytes, "the sampler", parts[i].to, err);
    }
    for (uint32_t i = 0; i < 2; i++) {
        s->draws[i] = pinned[i];
        s->adjusts[i] = pinned[2 + i];
        s->drawn[i] = pinned[4 + i];
    }
    if (status == MEPIC_OK &&
        !(CUDA_TRY(device, cudaSetDevice(device->id)) && CUDA_TRY(device, mp_cu_sample_open()) &&
          CUDA_TRY(device, cudaMemsetAsync(s->tokens, 0, max_seqs * sizeof(int32_t), device->stream)))) {
        status = mp_cu_status(device, err);
    }
    if (status != MEPIC_OK) {
        mp_cu_sampler_close(s);
        return status;
    }
    *out = s;
    return MEPIC_OK;
}

/* As many as run at once: clusters of 8 and 4 blocks leave some multiprocessors of the card's partitions unused. Before
 * 9.0 there are no clusters. */
uint32_t mp_cu_sample_blocks(const mp_cu_device *device, uint32_t n) {
    if (device->code < 90) return 1;
    uint32_t part = device->n_sm / 11;
    return n <= part ? 8 : n <= 2 * part ? 4 : n <= device->n_sm / 2 ? 2 : 1;
}

void mp_cu_sampler_begin(mp_cu_sampler *s) {
    s->n_rows = s->n_adjusts = s->n_rows_run = s->n_adjusts_run = 0;
    s->turn = 1 - s->turn;
}

/* A new adjustment; NULL: no room. */
static mp_cu_adjust *new_adjust(mp_cu_sampler *s, int32_t token) {
    if (s->n_adjusts == s->max_adjusts) return NULL;
    mp_cu_adjust *a = &s->adjusts[s->turn][s->n_adjusts++];
    *a = (mp_cu_adjust){ .token = token, .repeat = 1 };
    return a;
}

/* The row's adjustment of a token, made when it has none; NULL: no room. */
static mp_cu_adjust *adjust_of(mp_cu_sampler *s, const mp_cu_draw *d, int32_t token) {
    if (s->at[token]) return &s->adjusts[s->turn][d->first_adjust + s->at[token] - 1];
    mp_cu_adjust *a = new_adjust(s, token);
    if (a) s->at[token] = s->n_adjusts - d->first_adjust;
    return a;
}

/* Steps 1 to 3 of infer/sample.h. False: no room. */
static bool add_adjusts(mp_cu_sampler *s, mp_cu_draw *d, const mp_sample_row *row) {
    const mepic_sampling *p = row->sampling;
    mp_cu_adjust *a;
    uint32_t n = row->n_tokens, n_known = n > 0 && row->tokens[n - 1] == MP_TOKEN_SAMPLED ? n - 1 : n;
    bool repeats = p->repeat_penalty > 0 && p->repeat_penalty != 1;
    bool counts = p->presence_penalty != 0 || p->frequency_penalty != 0;
    if (repeats) {
        uint32_t window = p->repeat_window ? p->repeat_window : 64;
        for (uint32_t i = n > window ? n - window : 0; i < n_known; i++) {
            if (!(a = adjust_of(s, d, row->tokens[i]))) return false;
            a->repeat = p->repeat_penalty;
        }
    }
    for (uint32_t i = row->n_prompt; counts && i < n_known; i++) { /* `minus` counts at first */
        if (!(a = adjust_of(s, d, row->tokens[i]))) return false;
        a->minus++;
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        if (!(a = adjust_of(s, d, p->logit_bias[i].token))) return false;
        a->bias += p->logit_bias[i].bias;
    }
    for (uint32_t i = d->first_adjust; counts && i < s->n_adjusts; i++) {
        a = &s->adjusts[s->turn][i];
        a->more = p->presence_penalty + p->frequency_penalty * (a->minus + 1);
        if (a->minus > 0) a->minus = p->presence_penalty + p->frequency_penalty * a->minus;
    }
    d->penalizes_last = n_known < n && (repeats || counts);
    d->last_repeat = repeats ? p->repeat_penalty : 1;
    d->last_minus = counts ? p->presence_penalty + p->frequency_penalty : 0;
    return !d->penalizes_last || new_adjust(s, MP_CU_LAST);
}

bool mp_cu_sampler_add(mp_cu_sampler *s, const mp_sample_row *row) {
    if (s->n_rows == s->max_rows) return false;
    const mepic_sampling *p = row->sampling;
    mp_cu_draw d = {
        .random = mp_hash64_pair(p->seed, row->n_tokens),
        .logits = row->logits,
        .first_adjust = s->n_adjusts,
        .top_k = p->top_k,
        .temperature = p->temperature,
        .top_p = p->top_p,
        .min_p = p->min_p,
        .logprob = row->logprob,
        .seq = row->seq,
    };
    bool ok = add_adjusts(s, &d, row);
    for (uint32_t i = d.first_adjust; i < s->n_adjusts; i++) {
        int32_t token = s->adjusts[s->turn][i].token;
        if (token != MP_CU_LAST) s->at[token] = 0;
    }
    if (!ok) {
        s->n_adjusts = d.first_adjust;
        return false;
    }
    d.n_adjust = s->n_adjusts - d.first_adjust;
    s->draws[s->turn][s->n_rows++] = d;
    return true;
}

bool mp_cu_sampler_run(mp_cu_sampler *s, float *logits, cudaStream_t stream) {
    mp_cu_device *d = s->device;
    uint32_t first = s->n_rows_run, n = s->n_rows - first, first_adjust = s->n_adjusts_run;
    if (n == 0) return true;
    s->n_rows_run = s->n_rows;
    s->n_adjusts_run = s->n_adjusts;
    mp_cu_adjust *adjusts = s->device_adjusts;
    bool copied =
        s->n_adjusts == first_adjust ||
        CUDA_TRY(d, cudaMemcpyAsync(adjusts + first_adjust, s->adjusts[s->turn] + first_adjust,
                                    (s->n_adjusts - first_adjust) * sizeof *adjusts, cudaMemcpyHostToDevice, stream));
    return copied &&
           CUDA_TRY(d, mp_cu_sample_rows(s->draws[s->turn] + first, n, adjusts, s->saved, logits, s->n_vocab,
                                         mp_cu_sample_blocks(d, n), s->drawn[s->turn] + first, s->tokens, stream));
}

const mp_sampled *mp_cu_sampler_drawn(const mp_cu_sampler *s, uint32_t ago) {
    return s->drawn[s->turn ^ ago];
}

const int32_t *mp_cu_sampler_tokens(const mp_cu_sampler *s) {
    return s->tokens;
}
