/* The engine against the oracle: random prompts of 1 to 12 chunks in any order, any link_tokens, repeated and edited
 * chunks, chunk first, chunk last, page masks; on tiny models of every architecture, and on SmolLM2 with fewer and
 * shorter prompts. Arguments: a seed; "cuda" for the first CUDA device; "kv8" for pages of fp8 there; "model" for
 * SmolLM2. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/kernels.h"
#include "support/oracle.h"
#include "support/random.h"
#include "support/rig.h"
#include "support/models.h"

enum { MAX_LIBRARY = 7, MAX_CHUNK = 150, MAX_CHUNKS = 12, MAX_PROMPT = 2400, MIN_CHUNK = 64 };

static uint64_t seed = 1;

typedef struct chunk {
    int32_t tokens[MAX_CHUNK];
    uint32_t n;
    oracle_kv kv; /* canonical */
} chunk;

/* A model, a canonical context, a library of chunks with their canonical KV by the oracle, and an engine. */
typedef struct world {
    const mp_model *model;
    oracle *oracle;
    rig *rig;
    uint32_t page_size, n_canonical, n_library, max_chunks;
    int32_t canonical[64];
    oracle_kv canonical_kv;
    chunk library[MAX_LIBRARY];
} world;

static int32_t random_token(world *w, rng *r) {
    return (int32_t)rng_below(r, w->model->hp.n_vocab);
}

/* Keys of the first n tokens of `kv`, seen from `position` on. */
static uint32_t add_keys(oracle_key *keys, uint32_t at, const oracle_kv *kv, int32_t position) {
    for (uint32_t i = 0; i < kv->n; i++) keys[at++] = (oracle_key){ kv, i, position + (int32_t)i };
    return at;
}

static void compute_canonical(world *w, rng *r) {
    int32_t positions[64 + MAX_CHUNK];
    for (uint32_t i = 0; i < 64 + MAX_CHUNK; i++) positions[i] = (int32_t)i;
    for (uint32_t i = 0; i < w->n_canonical; i++) w->canonical[i] = random_token(w, r);
    oracle_compute(w->oracle, w->canonical, positions, w->n_canonical, NULL, 0, &w->canonical_kv);
    for (uint32_t c = 0; c < w->n_library; c++) {
        chunk *k = &w->library[c];
        k->n = c == 2 ? MIN_CHUNK - 1 : MIN_CHUNK + rng_below(r, MAX_CHUNK - MIN_CHUNK + 1);
        if (c == 3) k->n = 96; /* whole pages */
        for (uint32_t i = 0; i < k->n; i++) k->tokens[i] = random_token(w, r);
        if (c == 1) { /* chunk 0, edited in the middle */
            k->n = w->library[0].n;
            memcpy(k->tokens, w->library[0].tokens, sizeof k->tokens);
            k->tokens[k->n / 2] = (k->tokens[k->n / 2] + 1) % (int32_t)w->model->hp.n_vocab;
        }
        oracle_key keys[64];
        uint32_t n = add_keys(keys, 0, &w->canonical_kv, 0);
        oracle_compute(w->oracle, k->tokens, positions + w->n_canonical, k->n, keys, n, &k->kv);
    }
}

static void world_open(world *w, const mp_model *model, rng *r, uint32_t n_canonical, uint32_t n_library,
                       uint32_t max_chunks, rig_options options) {
    memset(w, 0, sizeof *w);
    w->model = model;
    w->n_library = n_library;
    w->max_chunks = max_chunks;
    w->n_canonical = n_canonical;
    w->page_size = options.page_size;
    w->oracle = oracle_open(model);
    compute_canonical(w, r);
    options.model = model;
    options.canonical = w->canonical;
    options.n_canonical = n_canonical;
    options.context = MAX_PROMPT + 16;
    w->rig = rig_open(&options);
}

static void world_close(world *w) {
    rig_close(w->rig);
    for (uint32_t c = 0; c < w->n_library; c++) oracle_kv_free(&w->library[c].kv);
    oracle_kv_free(&w->canonical_kv);
    oracle_close(w->oracle);
}

typedef struct prompt {
    int32_t tokens[MAX_PROMPT];
    uint32_t n;
    mp_span spans[2 * MAX_CHUNKS + 1];
    uint32_t chunk_of[2 * MAX_CHUNKS + 1]; /* library index of a chunk span */
    uint32_t n_spans, n_chunks, link_tokens;
    uint16_t masks[MAX_CHUNKS * (MAX_CHUNK / 16 + 1)];
    bool masked;
} prompt;

static void add_span(prompt *p, mepic_segment_kind kind, const int32_t *tokens, uint32_t n, uint32_t library) {
    memcpy(p->tokens + p->n, tokens, n * sizeof *tokens);
    p->chunk_of[p->n_spans] = library;
    p->spans[p->n_spans++] = (mp_span){ .kind = kind, .first = p->n, .n = n };
    p->n += n;
}

static void random_text(world *w, rng *r, prompt *p, uint32_t least) {
    int32_t text[24];
    uint32_t n = least + rng_below(r, 20);
    for (uint32_t i = 0; i < n; i++) text[i] = random_token(w, r);
    if (n) add_span(p, MEPIC_TEXT, text, n, 0);
}

static void random_prompt(world *w, rng *r, prompt *p) {
    static const uint32_t links[] = { 0, 1, 8, 15, 16, 17, 40, 100, UINT32_MAX };
    memset(p, 0, sizeof *p);
    p->link_tokens = links[rng_below(r, sizeof links / sizeof *links)];
    p->masked = rng_below(r, 3) == 0;
    p->n_chunks = 1 + rng_below(r, w->max_chunks);
    if (rng_below(r, 3)) random_text(w, r, p, 0);
    for (uint32_t i = 0; i < p->n_chunks; i++) {
        uint32_t c = rng_below(r, w->n_library);
        add_span(p, MEPIC_CHUNK, w->library[c].tokens, w->library[c].n, c);
        if (rng_below(r, 2)) random_text(w, r, p, 0);
    }
    if (rng_below(r, 3)) random_text(w, r, p, 1);
    for (size_t i = 0; p->masked && i < sizeof p->masks / sizeof *p->masks; i++) p->masks[i] = rng_below(r, 4) == 0;
}

/* docs/ARCHITECTURE.md, section 5: which tokens of the prompt are read from the canonical pages. */
static void mark_shared(const world *w, const prompt *p, bool *shared) {
    memset(shared, 0, p->n * sizeof *shared);
    const uint16_t *mask = p->masks;
    for (uint32_t s = 0; s < p->n_spans; s++) {
        const mp_span *span = &p->spans[s];
        if (span->kind != MEPIC_CHUNK) continue;
        uint32_t n_pages = (span->n + w->page_size - 1) / w->page_size;
        bool last = s + 1 == p->n_spans;
        for (uint32_t i = 0; i < span->n && span->n >= MIN_CHUNK; i++) {
            uint32_t page = i / w->page_size;
            bool linked = i < p->link_tokens || (p->masked && mask[page]) || (last && page == n_pages - 1);
            shared[span->first + i] = !linked;
        }
        mask += n_pages;
    }
}

typedef struct truth {
    oracle_kv kv;
    int32_t row_of[MAX_PROMPT]; /* position -> row of kv, -1: shared */
} truth;

static void evaluate(const world *w, const prompt *p, truth *t) {
    static bool shared[MAX_PROMPT];
    static oracle_key keys[MAX_PROMPT];
    static int32_t tokens[MAX_PROMPT], positions[MAX_PROMPT];
    mark_shared(w, p, shared);
    uint32_t n = 0, n_keys = 0;
    for (uint32_t s = 0; s < p->n_spans; s++) {
        for (uint32_t i = 0; i < p->spans[s].n; i++) {
            uint32_t at = p->spans[s].first + i;
            t->row_of[at] = shared[at] ? -1 : (int32_t)n;
            if (shared[at]) {
                keys[n_keys++] = (oracle_key){ &w->library[p->chunk_of[s]].kv, i, (int32_t)at };
            } else {
                tokens[n] = p->tokens[at];
                positions[n++] = (int32_t)at;
            }
        }
    }
    oracle_compute(w->oracle, tokens, positions, n, keys, n_keys, &t->kv);
}

/* The largest distance of any computed row's logits from the oracle's, relative to the spread of the oracle's. Of a
 * large vocabulary every 31st row is looked at, and the last. */
static double compare(const world *w, const prompt *p, const rig_request *q, const truth *t) {
    uint32_t n_vocab = w->model->hp.n_vocab;
    double *want = malloc(n_vocab * sizeof *want), worst = 0;
    for (uint32_t at = 0; at < p->n; at++) {
        if (!q->computed[at] || (n_vocab > 1000 && at % 31 != 0 && at + 1 != p->n)) continue;
        assert_true(t->row_of[at] >= 0); /* a shared token is never computed by a request */
        oracle_logits(w->oracle, &t->kv, (uint32_t)t->row_of[at], want);
        double distance = 0, square = 0;
        for (uint32_t i = 0; i < n_vocab; i++) {
            distance = fmax(distance, fabs((double)q->logits[(size_t)at * n_vocab + i] - want[i]));
            square += want[i] * want[i];
        }
        worst = fmax(worst, distance / sqrt(square / n_vocab));
    }
    free(want);
    return worst;
}

static void run_prompts(world *w, rng *r, uint32_t n_prompts, double bound) {
    static prompt p;
    static truth t;
    double furthest = 0;
    for (uint32_t i = 0; i < n_prompts; i++) {
        random_prompt(w, r, &p);
        rig_request q = {
            .spec = { .tokens = p.tokens,
                      .n_tokens = p.n,
                      .spans = p.spans,
                      .n_spans = p.n_spans,
                      .reuse = MEPIC_REUSE_MEPIC,
                      .link_tokens = p.link_tokens,
                      .page_masks = p.masked ? p.masks : NULL },
            .n_reply = 1,
            .keep_prompt_logits = true,
        };
        rig_run(w->rig, &q);
        evaluate(w, &p, &t);
        double worst = compare(w, &p, &q, &t);
        if (worst > furthest) furthest = worst;
        if (worst > bound) {
            print_error("seed %" PRIu64 ", prompt %u (%u tokens, %u chunks, link %u, masks %d): distance %g > %g\n",
                        seed, i, p.n, p.n_chunks, p.link_tokens, p.masked, worst, bound);
        }
        assert_true(worst <= bound);
        assert_true(q.computed[p.n - 1]);
        rig_request_free(&q);
        oracle_kv_free(&t.kv);
    }
    print_message("furthest: %.2g of %.2g\n", furthest, bound);
}

/* The best instruction set instead of one this machine lacks. */
static const char *isa_or_best(const char *isa) {
    const mp_cpu_kernels *kernels;
    return mp_cpu_kernels_find(isa, &kernels, NULL) == MEPIC_OK ? isa : NULL;
}

static void tiny_models(mepic_kv_type kv_type, uint32_t n_prompts, double bound) {
    static const uint32_t canonical[] = { 0, 37, 64 }, page_sizes[] = { 16, 16, 32 };
    static const char *const isas[] = { "avx512", "avx2", "portable" };
    for (uint32_t m = 0; m < TINY_COUNT; m++) {
        for (uint32_t c = 0; c < 3; c++) {
            rng r = rng_open(seed * 100 + m * 10 + c);
            world w;
            world_open(&w, tiny_model((tiny_kind)m), &r, canonical[c], MAX_LIBRARY, MAX_CHUNKS,
                       (rig_options){ .page_size = page_sizes[c],
                                      .kv_type = kv_type,
                                      .step_tokens = 17 + 31 * c,
                                      .threads = 2,
                                      .isa = isa_or_best(isas[(m + c) % 3]) });
            run_prompts(&w, &r, n_prompts, bound);
            world_close(&w);
        }
    }
}

static void engine_equals_oracle_f32(void **state) {
    (void)state;
    tiny_models(MEPIC_KV_F32, 5, 2e-4);
}

static void engine_equals_oracle_f16(void **state) {
    (void)state;
    tiny_models(MEPIC_KV_F16, 1, 2e-2);
}

static void engine_equals_oracle_bf16(void **state) {
    (void)state;
    tiny_models(MEPIC_KV_BF16, 1, 1.5e-1);
}

static void engine_equals_oracle_on_smollm2(void **state) {
    (void)state;
    rng r = rng_open(seed);
    world w;
    world_open(&w, real_model(SMOLLM2), &r, 24, 2, 2,
               (rig_options){ .page_size = 16, .kv_type = MEPIC_KV_F32, .step_tokens = 61, .threads = 2 });
    run_prompts(&w, &r, 2, strcmp(rig_device, "cpu") == 0 ? 5e-3 : rig_kv_type == MEPIC_KV_FP8 ? 1 : 1e-1);
    world_close(&w);
}

static void engine_on_cuda_equals_oracle(void **state) {
    (void)state;
    tiny_models(MEPIC_KV_BF16, 3, rig_kv_type == MEPIC_KV_FP8 ? 4e-1 : 2.5e-1);
}

int main(int argc, char **argv) {
    bool real = false, cuda = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "model") == 0) {
            real = true;
        } else if (strcmp(argv[i], "cuda") == 0) {
            cuda = true;
        } else if (strcmp(argv[i], "kv8") == 0) {
            rig_kv_type = MEPIC_KV_FP8;
        } else {
            seed = strtoull(argv[i], NULL, 10);
        }
    }
    if ((cuda && !rig_use_cuda()) || (real && !real_model(SMOLLM2))) return 77;
    printf("seed %" PRIu64 "\n", seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(engine_equals_oracle_f32),
        cmocka_unit_test(engine_equals_oracle_f16),
        cmocka_unit_test(engine_equals_oracle_bf16),
    };
    const struct CMUnitTest cuda_tests[] = { cmocka_unit_test(engine_on_cuda_equals_oracle) };
    const struct CMUnitTest model_tests[] = { cmocka_unit_test(engine_equals_oracle_on_smollm2) };
    int failed = real   ? cmocka_run_group_tests(model_tests, NULL, NULL)
                 : cuda ? cmocka_run_group_tests(cuda_tests, NULL, NULL)
                        : cmocka_run_group_tests(tests, NULL, NULL);
    tiny_models_close();
    return failed;
}
