/* mepic-synth: writes a model of random weights, of any shape and type. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/synth_model.h"

static const char usage[] =
    "usage: mepic-synth [options] FILE\n"
    "Writes a GGUF model of random weights; the same options give the same bytes.\n"
    "  --preset NAME      tiny (default), 0.5b, 7b (qwen2), 8b (llama): sets everything below but --vocab\n"
    "  --arch NAME        llama, qwen2, qwen3\n"
    "  --layers N  --embd N  --ff N  --heads N  --kv-heads N  --head-dim N  --context N\n"
    "  --vocab-size N     pads the built-in vocabulary to N tokens\n"
    "  --vocab FILE       copies the tokenizer of another GGUF file instead\n"
    "  --type TYPE        of every matrix: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K\n"
    "  --ROLE-type TYPE   of one: embd output q k v o gate up down\n"
    "  --rope BASE[,SCALING,FACTOR[,ORIGINAL_CONTEXT]]   scaling: linear, yarn, llama3\n"
    "  --tied | --untied  whether the embedding is the output matrix\n"
    "  --drawn-rows N     draws N rows of every matrix and repeats them: a large file in seconds, for speed alone\n"
    "  --seed N           default 1\n";

static mp_synth_spec preset_0_5b(void) {
    mp_synth_spec s = mp_synth_tiny(MP_ARCH_QWEN2);
    s.hp.n_layers = 24, s.hp.n_embd = 896, s.hp.n_ff = 4864, s.hp.n_ctx_train = 32768;
    s.hp.n_heads = 14, s.hp.n_kv_heads = 2, s.hp.head_dim = 64, s.hp.n_vocab = 151936, s.hp.norm_eps = 1e-6f;
    s.hp.rope.n_rot = 64, s.hp.rope.freq_base = 1e6f;
    mp_synth_set_type(&s, MP_DTYPE_Q5_0);
    s.types[MP_SYNTH_V] = s.types[MP_SYNTH_OUTPUT] = MP_DTYPE_Q8_0;
    s.types[MP_SYNTH_DOWN] = MP_DTYPE_Q6_K;
    return s;
}

static mp_synth_spec preset_7b(void) {
    mp_synth_spec s = mp_synth_tiny(MP_ARCH_QWEN2);
    s.hp.n_layers = 28, s.hp.n_embd = 3584, s.hp.n_ff = 18944, s.hp.n_ctx_train = 32768;
    s.hp.n_heads = 28, s.hp.n_kv_heads = 4, s.hp.head_dim = 128, s.hp.n_vocab = 152064, s.hp.norm_eps = 1e-6f;
    s.hp.rope.n_rot = 128, s.hp.rope.freq_base = 1e6f;
    mp_synth_set_type(&s, MP_DTYPE_Q4_K);
    s.types[MP_SYNTH_V] = s.types[MP_SYNTH_DOWN] = s.types[MP_SYNTH_OUTPUT] = MP_DTYPE_Q6_K;
    return s;
}

static mp_synth_spec preset_8b(void) {
    mp_synth_spec s = mp_synth_tiny(MP_ARCH_LLAMA);
    s.hp.n_layers = 32, s.hp.n_embd = 4096, s.hp.n_ff = 14336, s.hp.n_ctx_train = 131072;
    s.hp.n_heads = 32, s.hp.n_kv_heads = 8, s.hp.head_dim = 128, s.hp.n_vocab = 128256, s.hp.norm_eps = 1e-5f;
    s.hp.rope.n_rot = 128, s.hp.rope.freq_base = 5e5f;
    s.hp.rope.scaling = MP_ROPE_LLAMA3, s.hp.rope.factor = 8, s.hp.rope.original_ctx = 8192;
    mp_synth_set_type(&s, MP_DTYPE_Q4_K);
    s.types[MP_SYNTH_V] = s.types[MP_SYNTH_DOWN] = s.types[MP_SYNTH_OUTPUT] = MP_DTYPE_Q6_K;
    return s;
}

static bool parse_preset(const char *name, mp_synth_spec *out) {
    if (strcmp(name, "tiny") == 0)
        *out = mp_synth_tiny(MP_ARCH_LLAMA);
    else if (strcmp(name, "0.5b") == 0)
        *out = preset_0_5b();
    else if (strcmp(name, "7b") == 0)
        *out = preset_7b();
    else if (strcmp(name, "8b") == 0)
        *out = preset_8b();
    else
        return false;
    return true;
}

static bool parse_u64(const char *text, uint64_t max, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-' || v > max) return false;
    *out = v;
    return true;
}

static bool parse_u32(const char *text, uint32_t *out) {
    uint64_t v;
    if (!parse_u64(text, UINT32_MAX, &v)) return false;
    *out = (uint32_t)v;
    return true;
}

static bool parse_type(const char *text, mp_dtype *out) {
    for (uint32_t t = 0; t < 64; t++) {
        const mp_dtype_info *info = mp_dtype_find(t);
        if (!info || strcasecmp(info->name, text) != 0) continue;
        *out = (mp_dtype)t;
        return true;
    }
    return false;
}

static bool parse_arch(const char *text, mp_arch *out) {
    for (int a = MP_ARCH_LLAMA; a <= MP_ARCH_QWEN3; a++) {
        if (strcmp(text, mp_arch_name((mp_arch)a)) != 0) continue;
        *out = (mp_arch)a;
        return true;
    }
    return false;
}

/* BASE[,SCALING,FACTOR[,ORIGINAL_CONTEXT]] */
static bool parse_rope(const char *text, mp_hparams *hp) {
    static const struct {
        const char *name;
        mp_rope_scaling scaling;
    } known[] = { { "linear", MP_ROPE_LINEAR }, { "yarn", MP_ROPE_YARN }, { "llama3", MP_ROPE_LLAMA3 } };
    char scaling[16] = "", rest;
    int n = sscanf(text, "%f,%15[a-z0-9],%f,%" SCNu32 "%c", &hp->rope.freq_base, scaling, &hp->rope.factor,
                   &hp->rope.original_ctx, &rest);
    if (n == 1) {
        hp->rope.scaling = MP_ROPE_PLAIN;
        return strchr(text, ',') == NULL;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known && (n == 3 || n == 4); i++) {
        if (strcmp(known[i].name, scaling) != 0) continue;
        hp->rope.scaling = known[i].scaling;
        return true;
    }
    return false;
}

enum {
    OPT_HELP,
    OPT_PRESET,
    OPT_ARCH,
    OPT_VOCAB,
    OPT_TYPE,
    OPT_ROPE,
    OPT_TIED,
    OPT_UNTIED,
    OPT_SEED,
    OPT_DRAWN,
    OPT_COUNTS
};
static const struct option options[] = {
    { "help", no_argument, NULL, OPT_HELP },
    { "preset", required_argument, NULL, OPT_PRESET },
    { "arch", required_argument, NULL, OPT_ARCH },
    { "vocab", required_argument, NULL, OPT_VOCAB },
    { "type", required_argument, NULL, OPT_TYPE },
    { "rope", required_argument, NULL, OPT_ROPE },
    { "tied", no_argument, NULL, OPT_TIED },
    { "untied", no_argument, NULL, OPT_UNTIED },
    { "seed", required_argument, NULL, OPT_SEED },
    { "drawn-rows", required_argument, NULL, OPT_DRAWN },
    /* The counts, then the roles' types: numbered by their place here. */
    { "layers", required_argument, NULL, OPT_COUNTS },
    { "embd", required_argument, NULL, OPT_COUNTS + 1 },
    { "ff", required_argument, NULL, OPT_COUNTS + 2 },
    { "heads", required_argument, NULL, OPT_COUNTS + 3 },
    { "kv-heads", required_argument, NULL, OPT_COUNTS + 4 },
    { "head-dim", required_argument, NULL, OPT_COUNTS + 5 },
    { "context", required_argument, NULL, OPT_COUNTS + 6 },
    { "vocab-size", required_argument, NULL, OPT_COUNTS + 7 },
    { "embd-type", required_argument, NULL, OPT_COUNTS + 8 },
    { "output-type", required_argument, NULL, OPT_COUNTS + 9 },
    { "q-type", required_argument, NULL, OPT_COUNTS + 10 },
    { "k-type", required_argument, NULL, OPT_COUNTS + 11 },
    { "v-type", required_argument, NULL, OPT_COUNTS + 12 },
    { "o-type", required_argument, NULL, OPT_COUNTS + 13 },
    { "gate-type", required_argument, NULL, OPT_COUNTS + 14 },
    { "up-type", required_argument, NULL, OPT_COUNTS + 15 },
    { "down-type", required_argument, NULL, OPT_COUNTS + 16 },
    { NULL, 0, NULL, 0 },
};

static bool apply(mp_synth_spec *s, int option, const char *text) {
    mp_hparams *hp = &s->hp;
    uint32_t *const counts[] = { &hp->n_layers,   &hp->n_embd,   &hp->n_ff,        &hp->n_heads,
                                 &hp->n_kv_heads, &hp->head_dim, &hp->n_ctx_train, &hp->n_vocab };
    enum { N_COUNTS = sizeof counts / sizeof *counts };
    mp_dtype type;
    switch (option) {
    case OPT_PRESET: return parse_preset(text, s);
    case OPT_ARCH: return parse_arch(text, &hp->arch);
    case OPT_VOCAB: s->donor = text; return true;
    case OPT_TYPE:
        if (!parse_type(text, &type)) return false;
        mp_synth_set_type(s, type);
        return true;
    case OPT_ROPE: return parse_rope(text, hp);
    case OPT_TIED: s->tied = true; return true;
    case OPT_UNTIED: s->tied = false; return true;
    case OPT_SEED: return parse_u64(text, UINT64_MAX, &s->seed);
    case OPT_DRAWN: return parse_u32(text, &s->n_drawn);
    default: break;
    }
    int i = option - OPT_COUNTS;
    if (i >= N_COUNTS) return parse_type(text, &s->types[i - N_COUNTS]);
    if (!parse_u32(text, counts[i])) return false;
    if (counts[i] == &hp->head_dim) hp->rope.n_rot = hp->head_dim;
    return true;
}

/* A line that counts up, on a terminal only. */
static void show_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)user;
    fprintf(stderr, "\r%s %5.1f %%%s", what, total ? 100.0 * (double)done / (double)total : 100.0,
            done == total ? "\n" : "");
}

static int write_model(mp_synth_spec *spec, const char *path) {
    mp_log log = { .progress = isatty(STDERR_FILENO) ? show_progress : NULL };
    spec->log = &log;
    FILE *f = fopen(path, "wbe");
    if (!f) {
        fprintf(stderr, "mepic-synth: %s: %s\n", path, strerror(errno));
        return 1;
    }
    mepic_error err = { 0 };
    mepic_status status = mp_synth_write(spec, f, &err);
    if (fclose(f) != 0 && status == MEPIC_OK) {
        snprintf(err.message, sizeof err.message, "%s: %s", path, strerror(errno));
        status = MEPIC_ERR_IO;
    }
    mp_model *model = NULL; /* what was asked for may be no model: the loader says so */
    if (status == MEPIC_OK) status = mp_model_open(path, &model, &err);
    mp_model_close(model);
    if (status == MEPIC_OK) return 0;
    fprintf(stderr, "mepic-synth: %s\n", err.message);
    unlink(path);
    return 1;
}

int main(int argc, char **argv) {
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    int option, index = 0;
    while ((option = getopt_long(argc, argv, "", options, &index)) != -1) {
        if (option == OPT_HELP) {
            fputs(usage, stdout);
            return 0;
        }
        if (option == '?') {
            fputs("mepic-synth --help lists the options\n", stderr);
            return 2;
        }
        const char *donor = spec.donor;
        if (!apply(&spec, option, optarg)) {
            fprintf(stderr, "mepic-synth: --%s: \"%s\" is not possible; --help lists the values\n", options[index].name,
                    optarg);
            return 2;
        }
        if (option == OPT_PRESET) spec.donor = donor;
    }
    if (optind != argc - 1) {
        fputs(usage, stderr);
        return 2;
    }
    return write_model(&spec, argv[optind]);
}
