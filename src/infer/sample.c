/* Truncation works on a stream: a max-heap of candidates is popped in order of probability until top-k, top-p or min-p
 * says stop, so a vocabulary of 150,000 is never sorted. */
#include "infer/sample.h"

#include <float.h>
#include <math.h>

#include "base/hash.h"
#include "base/mem.h"

struct mp_sampler {
    uint32_t n_vocab;
    float *logits;   /* [n_vocab] adjusted copy; -infinity: no candidate */
    float *weights;  /* [n_vocab] of candidates, relative to the most probable one's 1 */
    uint32_t *count; /* [n_vocab] zero between uses */
    uint32_t *heap;  /* [n_vocab] token ids */
};

mepic_status mp_sampler_open(uint32_t n_vocab, mp_sampler **out, mepic_error *err) {
    mp_sampler *s = mp_calloc(1, sizeof *s);
    if (!s) return mp_fail_nomem(err, "the sampler", sizeof *s);
    s->n_vocab = n_vocab;
    s->logits = mp_calloc(n_vocab, sizeof *s->logits);
    s->weights = mp_calloc(n_vocab, sizeof *s->weights);
    s->count = mp_calloc(n_vocab, sizeof *s->count);
    s->heap = mp_calloc(n_vocab, sizeof *s->heap);
    if (!s->logits || !s->weights || !s->count || !s->heap) {
        mp_sampler_close(s);
        return mp_fail_nomem(err, "the sampler's scratch", (size_t)n_vocab * 16);
    }
    *out = s;
    return MEPIC_OK;
}

void mp_sampler_close(mp_sampler *s) {
    if (!s) return;
    mp_free(s->heap);
    mp_free(s->count);
    mp_free(s->weights);
    mp_free(s->logits);
    mp_free(s);
}

static mepic_status check_range(const char *name, float value, float low, float high, mepic_error *err) {
    if (value >= low && value <= high) return MEPIC_OK; /* false for NaN */
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "sampling.%s is %g; it must be from %g to %g", name, (double)value,
                   (double)low, (double)high);
}

mepic_status mp_sampling_check(const mepic_sampling *p, uint32_t n_vocab, mepic_error *err) {
    const struct {
        const char *name;
        float value, low, high;
    } ranges[] = {
        { "temperature", p->temperature, -FLT_MAX, 100.0f },
        { "top_p", p->top_p, 0.0f, FLT_MAX },
        { "min_p", p->min_p, 0.0f, 1.0f },
        { "repeat_penalty", p->repeat_penalty, 0.0f, 100.0f },
        { "presence_penalty", p->presence_penalty, -100.0f, 100.0f },
        { "frequency_penalty", p->frequency_penalty, -100.0f, 100.0f },
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        mepic_status st = check_range(ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high, err);
        if (st != MEPIC_OK) return st;
    }
    if (p->n_logit_bias > 0 && !p->logit_bias) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "sampling.n_logit_bias is %zu but logit_bias is NULL", p->n_logit_bias);
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        int32_t token = p->logit_bias[i].token;
        if (token < 0 || (uint32_t)token >= n_vocab) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT,
                           "sampling.logit_bias[%zu].token is %d; the vocabulary has %u tokens", i, token, n_vocab);
        }
        mepic_status st = check_range("logit_bias", p->logit_bias[i].bias, -1e6f, 1e6f, err);
        if (st != MEPIC_OK) return st;
    }
    return MEPIC_OK;
}

/* -infinity: no candidate. */
static float usable(float x) {
    return isnan(x) ? -INFINITY : x > FLT_MAX ? FLT_MAX : x;
}

/* Steps 1 to 3 on s->logits. `count` marks what was seen and is zeroed again by a second walk. */
static void adjust(mp_sampler *s, const mepic_sampling *p, const int32_t *tokens, uint32_t n, uint32_t n_prompt) {
    float penalty = p->repeat_penalty;
    if (penalty > 0 && penalty != 1) {
        uint32_t window = p->repeat_window ? p->repeat_window : 64;
        uint32_t first = n > window ? n - window : 0;
        for (uint32_t i = first; i < n; i++) {
            float *x = &s->logits[tokens[i]];
            if (s->count[tokens[i]]++ == 0) *x = usable(*x > 0 ? *x / penalty : *x * penalty);
        }
        for (uint32_t i = first; i < n; i++) s->count[tokens[i]] = 0;
    }
    if (p->presence_penalty != 0 || p->frequency_penalty != 0) {
        for (uint32_t i = n_prompt; i < n; i++) s->count[tokens[i]]++;
        for (uint32_t i = n_prompt; i < n; i++) {
            uint32_t *count = &s->count[tokens[i]];
            if (*count == 0) continue; /* done at its first occurrence */
            s->logits[tokens[i]] -= p->presence_penalty + p->frequency_penalty * (float)*count;
            *count = 0;
        }
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) s->logits[p->logit_bias[i].token] += p->logit_bias[i].bias;
}

/* The largest adjusted logit, of equal ones the smallest id; false without a candidate. */
static bool largest(const mp_sampler *s, uint32_t *best) {
    bool found = false;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        if (s->logits[i] == -INFINITY || (found && s->logits[i] <= s->logits[*best])) continue;
        *best = i;
        found = true;
    }
    return found;
}

/* Uniform in [0, 1), a function of seed and position. */
static double uniform(uint64_t seed, uint64_t position) {
    return (double)(mp_hash64_pair(seed, position) >> 11) * 0x1p-53;
}

static bool before(const mp_sampler *s, uint32_t a, uint32_t b) {
    return s->logits[a] > s->logits[b] || (s->logits[a] == s->logits[b] && a < b);
}

static void sift_down(mp_sampler *s, uint32_t n, uint32_t i) {
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= n) return;
        if (child + 1 < n && before(s, s->heap[child + 1], s->heap[child])) child++;
        if (!before(s, s->heap[child], s->heap[i])) return;
        uint32_t id = s->heap[i];
        s->heap[i] = s->heap[child];
        s->heap[child] = id;
        i = child;
    }
}

/* Moves the best of the heap's n ids to its end. */
static uint32_t pop(mp_sampler *s, uint32_t n) {
    uint32_t id = s->heap[0];
    s->heap[0] = s->heap[n - 1];
    s->heap[n - 1] = id;
    sift_down(s, n - 1, 0);
    return id;
}

/* Keeps the candidates heap[0, n) that top-k, top-p and min-p leave: they end up as the last *kept ones of the heap,
 * the most probable last. */
static void truncate(mp_sampler *s, const mepic_sampling *p, uint32_t n, uint32_t *kept) {
    bool by_mass = p->top_p > 0 && p->top_p < 1;
    uint32_t limit = p->top_k && p->top_k < n ? p->top_k : n;
    for (uint32_t i = n / 2; i-- > 0;) sift_down(s, n, i);
    double mass = 0; /* of what top-k leaves */
    uint32_t popped = 0;
    if (limit < n) {
        for (; popped < limit; popped++) mass += (double)s->weights[pop(s, n - popped)];
    } else if (by_mass) {
        for (uint32_t i = 0; i < n; i++) mass += (double)s->weights[s->heap[i]];
    }
    double taken = 0;
    for (*kept = 0; *kept < limit; (*kept)++) {
        uint32_t id = *kept < popped ? s->heap[n - 1 - *kept] : pop(s, n - *kept);
        if (s->weights[id] < p->min_p || (by_mass && taken >= (double)p->top_p * mass)) break;
        taken += (double)s->weights[id];
    }
}

/* Draws from ids[n] in proportion, walking from the end. */
static uint32_t draw(const mp_sampler *s, const uint32_t *ids, uint32_t n, double u) {
    double mass = 0;
    for (uint32_t i = n; i-- > 0;) mass += (double)s->weights[ids[i]];
    double left = u * mass;
    uint32_t last = ids[n - 1];
    for (uint32_t i = n; i-- > 0;) {
        double w = (double)s->weights[ids[i]];
        if (w == 0) continue;
        last = ids[i]; /* rounding may leave a rest behind the last one */
        left -= w;
        if (left < 0) break;
    }
    return last;
}

bool mp_sample(mp_sampler *s, const mepic_sampling *p, const float *logits, const int32_t *tokens, uint32_t n,
               uint32_t n_prompt, int32_t *token) {
    for (uint32_t i = 0; i < s->n_vocab; i++) s->logits[i] = usable(logits[i]);
    adjust(s, p, tokens, n, n_prompt);
    uint32_t best = 0;
    if (!largest(s, &best)) return false;
    if (p->temperature <= 0) {
        *token = (int32_t)best;
        return true;
    }
    uint32_t n_candidates = 0;
    float top = s->logits[best];
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        if (s->logits[i] == -INFINITY) continue;
        s->weights[i] = expf((s->logits[i] - top) / p->temperature);
        s->heap[n_candidates++] = i;
    }
    uint32_t kept = n_candidates;
    if (p->top_k || p->min_p > 0 || (p->top_p > 0 && p->top_p < 1)) truncate(s, p, n_candidates, &kept);
    *token = (int32_t)draw(s, s->heap + n_candidates - kept, kept, uniform(p->seed, n));
    return true;
}

uint32_t mp_logprobs(const float *logits, uint32_t n_vocab, int32_t token, float *logprob, mepic_logprob *top,
                     uint32_t n_top) {
    uint32_t n = 0;
    float max = -INFINITY;
    for (uint32_t i = 0; i < n_vocab; i++) {
        float x = usable(logits[i]);
        if (x > max) max = x;
        if (n_top == 0 || (n == n_top && !(x > top[n - 1].logprob))) continue;
        uint32_t at = n < n_top ? n++ : n - 1; /* insertion: n_top is small, and most tokens never get here */
        for (; at > 0 && x > top[at - 1].logprob; at--) top[at] = top[at - 1];
        top[at] = (mepic_logprob){ (int32_t)i, x };
    }
    double sum = 0;
    for (uint32_t i = 0; i < n_vocab; i++) sum += exp((double)usable(logits[i]) - (double)max);
    double norm = (double)max + log(sum);
    *logprob = (float)((double)usable(logits[token]) - norm);
    for (uint32_t i = 0; i < n; i++) top[i].logprob = (float)((double)top[i].logprob - norm);
    return n;
}
