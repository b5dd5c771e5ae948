#include "support/models.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "support/tiny.h"

static struct {
    mp_model *model;
    void *bytes; /* the file, which the model reads */
} tiny[TINY_COUNT];
uint32_t tiny_head_dim;
static mp_model *real[4];
static size_t n_real;

static void must(mepic_status status, const mepic_error *err) {
    if (status == MEPIC_OK) return;
    fprintf(stderr, "test model: %s\n", err->message);
    abort();
}

static mp_synth_spec spec_of(tiny_kind kind) {
    static const mp_arch archs[] = { MP_ARCH_LLAMA, MP_ARCH_QWEN2, MP_ARCH_QWEN3, MP_ARCH_LLAMA };
    mp_synth_spec spec = mp_synth_tiny(archs[kind]);
    spec.seed = 1000 + (uint64_t)kind;
    spec.tied = kind == TINY_LLAMA;
    if (kind == TINY_QWEN3) {
        spec.hp.head_dim = 32;
        spec.hp.rope.n_rot = 32;
    }
    if (tiny_head_dim) spec.hp.head_dim = spec.hp.rope.n_rot = tiny_head_dim;
    if (kind == TINY_YARN) {
        spec.hp.rope.n_rot = 8;
        spec.hp.rope.scaling = MP_ROPE_YARN;
        spec.hp.rope.factor = 4;
        spec.hp.rope.original_ctx = 256;
        spec.hp.rope.yarn_ext_factor = 1;
        spec.hp.rope.yarn_attn_factor = 1;
        spec.hp.rope.yarn_beta_fast = 32;
        spec.hp.rope.yarn_beta_slow = 1;
    }
    return spec;
}

const mp_model *tiny_model(tiny_kind kind) {
    if (tiny[kind].model) return tiny[kind].model;
    mp_synth_spec spec = spec_of(kind);
    tiny[kind].model = tiny_model_open(&spec, &tiny[kind].bytes);
    return tiny[kind].model;
}

bool real_model_find(const char *file, char *path, size_t cap) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    bool own = cache && *cache;
    int n = snprintf(path, cap, "%s%s/mepic/models/%s", own ? cache : home ? home : "", own ? "" : "/.cache", file);
    return n >= 0 && (size_t)n < cap && access(path, R_OK) == 0;
}

const mp_model *real_model(const char *file) {
    char path[1024];
    if (!real_model_find(file, path, sizeof path) || n_real == sizeof real / sizeof *real) return NULL;
    mepic_error err;
    must(mp_model_open(path, &real[n_real], &err), &err);
    return real[n_real++];
}

void tiny_models_close(void) {
    for (size_t i = 0; i < TINY_COUNT; i++) {
        mp_model_close(tiny[i].model);
        free(tiny[i].bytes);
    }
    while (n_real > 0) mp_model_close(real[--n_real]);
}
