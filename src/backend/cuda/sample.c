#include "backend/cuda/sample.h"

#include "base/hash.h"
#include "base/mem.h"

struct mp_cu_sampler {
    mp_cu_device *device;
    uint32_t n_vocab, max_rows, max_adjusts;
    uint32_t n_rows, n_adjusts;
    uint32_t *at;      /* [n_vocab] 1 + which adjustment of the row a token has; 0 between uses */
    mp_cu_draw *draws; /* pinned, and their copies on the device */
    mp_cu_adjust *adjusts;
    mp_cu_drawn *drawn;
    void *device_draws, *device_adjusts, *device_drawn, *saved;
};

void mp_cu_sampler_close(mp_cu_sampler *s) {
    if (!s) return;
    void *const taken[] = { s->draws,          s->adjusts,      s->drawn, s->device_draws,
                            s->device_adjusts, s->device_drawn, s->saved };
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) mp_cu_drop(s->device, taken[i]);
    mp_free(s->at);
    mp_free(s);
}

mepic_status mp_cu_sampler_open(mp_cu_device *device, uint32_t n_vocab, uint32_t max_rows, uint32_t max_adjusts,
                                mp_cu_sampler **out, mepic_error *err) {
    mp_cu_sampler *s = mp_calloc(1, sizeof *s);
    if (!s) return mp_fail_nomem(err, "the sampler", sizeof *s);
    s->device = device;
    s->n_vocab = n_vocab;
    s->max_rows = max_rows;
    s->max_adjusts = max_adjusts;
    s->at = mp_calloc(n_vocab, sizeof *s->at);
    void *draws = NULL, *adjusts = NULL, *drawn = NULL;
    const struct {
        void **to;
        size_t bytes;
        bool pinned;
    } parts[] = {
        { &draws, max_rows * sizeof *s->draws, true },
        { &adjusts, max_adjusts * sizeof *s->adjusts, true },
        { &drawn, max_rows * sizeof *s->drawn, true },
        { &s->device_draws, max_rows * sizeof *s->draws, false },
        { &s->device_adjusts, max_adjusts * sizeof *s->adjusts, false },
        { &s->device_drawn, max_rows * sizeof *s->drawn, false },
        { &s->saved, max_adjusts * sizeof(float), false },
    };
    mepic_status status = s->at ? MEPIC_OK : mp_fail_nomem(err, "the sampler's scratch", n_vocab * sizeof *s->at);
    for (size_t i = 0; status == MEPIC_OK && i < sizeof parts / sizeof *parts; i++) {
        status = parts[i].pinned ? mp_cu_take_pinned(device, parts[i].bytes, "the sampler", parts[i].to, err)
                                 : mp_cu_take(device, parts[i].bytes, "the sampler", parts[i].to, err);
    }
    s->draws = draws;
    s->adjusts = adjusts;
    s->drawn = drawn;
    if (status == MEPIC_OK &&
        (!CUDA_TRY(device, cudaSetDevice(device->id)) || !CUDA_TRY(device, mp_cu_sample_open()))) {
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
    s->n_rows = s->n_adjusts = 0;
}

/* The row's adjustment of a token, made when it has none; NULL: no room. */
static mp_cu_adjust *adjust_of(mp_cu_sampler *s, const mp_cu_draw *d, int32_t token) {
    if (s->at[token] == 0) {
        if (s->n_adjusts == s->max_adjusts) return NULL;
        s->adjusts[s->n_adjusts++] = (mp_cu_adjust){ .token = token, .repeat = 1 };
        s->at[token] = s->n_adjusts - d->first_adjust;
    }
    return &s->adjusts[d->first_adjust + s->at[token] - 1];
}

/* Steps 1 to 3 of infer/sample.h. False: no room. */
static bool add_adjusts(mp_cu_sampler *s, const mp_cu_draw *d, const mp_sample_row *row) {
    const mepic_sampling *p = row->sampling;
    mp_cu_adjust *a;
    if (p->repeat_penalty > 0 && p->repeat_penalty != 1) {
        uint32_t window = p->repeat_window ? p->repeat_window : 64;
        for (uint32_t i = row->n_tokens > window ? row->n_tokens - window : 0; i < row->n_tokens; i++) {
            if (!(a = adjust_of(s, d, row->tokens[i]))) return false;
            a->repeat = p->repeat_penalty;
        }
    }
    if (p->presence_penalty != 0 || p->frequency_penalty != 0) {
        for (uint32_t i = row->n_prompt; i < row->n_tokens; i++) { /* `minus` counts at first */
            if (!(a = adjust_of(s, d, row->tokens[i]))) return false;
            a->minus++;
        }
        for (uint32_t i = d->first_adjust; i < s->n_adjusts; i++) {
            a = &s->adjusts[i];
            if (a->minus > 0) a->minus = p->presence_penalty + p->frequency_penalty * a->minus;
        }
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        if (!(a = adjust_of(s, d, p->logit_bias[i].token))) return false;
        a->bias += p->logit_bias[i].bias;
    }
    return true;
}

bool mp_cu_sampler_add(mp_cu_sampler *s, const mp_sample_row *row, bool logprob) {
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
        .logprob = logprob,
    };
    bool ok = add_adjusts(s, &d, row);
    for (uint32_t i = d.first_adjust; i < s->n_adjusts; i++) s->at[s->adjusts[i].token] = 0;
    if (!ok) {
        s->n_adjusts = d.first_adjust;
        return false;
    }
    d.n_adjust = s->n_adjusts - d.first_adjust;
    s->draws[s->n_rows++] = d;
    return true;
}

bool mp_cu_sampler_run(mp_cu_sampler *s, float *logits, cudaStream_t stream) {
    mp_cu_device *d = s->device;
    if (s->n_rows == 0) return true;
    return CUDA_TRY(d, cudaMemcpyAsync(s->device_draws, s->draws, s->n_rows * sizeof *s->draws, cudaMemcpyHostToDevice,
                                       stream)) &&
           (s->n_adjusts == 0 ||
            CUDA_TRY(d, cudaMemcpyAsync(s->device_adjusts, s->adjusts, s->n_adjusts * sizeof *s->adjusts,
                                        cudaMemcpyHostToDevice, stream))) &&
           CUDA_TRY(d, mp_cu_sample_rows(s->device_draws, s->n_rows, s->device_adjusts, s->saved, logits, s->n_vocab,
                                         mp_cu_sample_blocks(d, s->n_rows), s->device_drawn, stream)) &&
           CUDA_TRY(d, cudaMemcpyAsync(s->drawn, s->device_drawn, s->n_rows * sizeof *s->drawn, cudaMemcpyDeviceToHost,
                                       stream));
}

const mp_cu_drawn *mp_cu_sampler_drawn(const mp_cu_sampler *s) {
    return s->drawn;
}
