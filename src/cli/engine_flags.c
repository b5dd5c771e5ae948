#include "cli/engine_flags.h"

#include "base/clock.h"
#include "base/file.h"
#include "cli/numbers.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

const mp_word mp_reuse_words[] = {
    { "none", MEPIC_REUSE_NONE }, { "prefix", MEPIC_REUSE_PREFIX }, { "mepic", MEPIC_REUSE_MEPIC }, { NULL, 0 }
};
/* In the library a zero asks for the default; on the command line it is a plain zero. */
const mp_word mp_link_words[] = {
    { "all", MEPIC_LINK_ALL }, { "none", MEPIC_LINK_NONE }, { "0", MEPIC_LINK_NONE }, { NULL, 0 }
};

static const mp_word page_words[] = { { "16", 16 }, { "32", 32 }, { "64", 64 }, { "128", 128 }, { NULL, 0 } };
static const mp_word kv_words[] = {
    { "f16", MEPIC_KV_F16 }, { "bf16", MEPIC_KV_BF16 }, { "f32", MEPIC_KV_F32 }, { "fp8", MEPIC_KV_FP8 }, { NULL, 0 }
};
static const mp_word weights_words[] = { { "bf16", MEPIC_WEIGHTS_BF16 }, { "fp8", MEPIC_WEIGHTS_FP8 }, { NULL, 0 } };
static const mp_word eviction_words[] = { { "s3fifo", MEPIC_EVICT_S3FIFO }, { "lru", MEPIC_EVICT_LRU }, { NULL, 0 } };

const char *mp_reuse_name(mepic_reuse reuse) {
    for (const mp_word *word = mp_reuse_words; word->name; word++) {
        if (word->value == (uint32_t)reuse) return word->name;
    }
    return "default";
}

mp_option_group mp_engine_flags_group(mp_engine_flags *f) {
    const mp_option options[MP_ENGINE_FLAGS_N] = {
        MP_TEXT('m', "model", &f->model, "FILE", "GGUF model file (required)"),
        MP_COUNT('t', "threads", &f->threads, 1, 256, "N",
                 "threads that compute (default: the cores this process may use)"),
        MP_TEXT(0, "isa", &f->isa, "NAME", "instruction set: avx512, avx2 or portable (default: the best there is)"),
        MP_TEXT(0, "device", &f->device, "NAME",
                "auto: the first CUDA device if there is one, else the CPU (default); cpu, cuda or cuda:N"),
        MP_REAL(0, "gpu-memory", &f->gpu_memory, 0.01, 1.0, "PART",
                "part of the free device memory to use for weights and KV (default 0.9)"),
        MP_WORD(0, "reuse", &f->reuse, mp_reuse_words, "POLICY",
                "none: compute every token; prefix: share equal beginnings; mepic: share documents at any position as "
                "well (default)"),
        MP_COUNT_OR(0, "link-tokens", &f->link_tokens, 0, 1u << 24, mp_link_words, "N|all|none",
                    "tokens recomputed at the head of every document (default 16)"),
        MP_TEXT(0, "canonical-context", &f->canonical_context, "FILE|none",
                "text that documents are computed after (default: the built-in one)"),
        MP_COUNT('c', "context", &f->context, 16, 1u << 24, "N",
                 "longest request in tokens, prompt and reply (default: what the model was trained for)"),
        MP_SIZE(
            0, "kv-memory", &f->kv_memory, 1 << 20, UINT64_C(1) << 46, "SIZE",
            "memory for the KV pages, as 512M or 2G (default: a quarter of the machine's, at most 4G; on a GPU what "
            "is left)"),
        MP_COUNT(0, "pages", &f->pages, 4, 1u << 24, "N", "pages of KV, instead of --kv-memory"),
        MP_WORD(0, "page-size", &f->page_size, page_words, "N", "tokens a page: 16 (default), 32, 64 or 128"),
        MP_WORD(
            0, "kv-type", &f->kv_type, kv_words, "TYPE",
            "f16 (default on the CPU), bf16 (default on a GPU), f32 (CPU) or fp8 (GPU): about half of bf16's memory"),
        MP_WORD(0, "weights", &f->weights, weights_words, "TYPE",
                "on a GPU: bf16 (default), or fp8: half the memory and faster, a little less exact; Hopper only"),
        MP_WORD(0, "eviction", &f->eviction, eviction_words, "ORDER", "s3fifo (default) or lru"),
        MP_COUNT(0, "max-running", &f->max_running, 1, 4096, "N",
                 "requests computed together (default 64, on a GPU 256)"),
        MP_COUNT(0, "step-tokens", &f->step_tokens, 1, 65536, "N",
                 "most tokens a step computes (default 512, on a GPU 2048)"),
        MP_TEXT(0, "cache-dir", &f->cache_dir, "DIR|none",
                "where the canonical context's KV is kept (default ${XDG_CACHE_HOME:-~/.cache}/mepic)"),
        MP_FLAG('q', "quiet", &f->quiet, "no progress line"),
        MP_FLAG('v', "verbose", &f->verbose, "print what the engine logs"),
    };
    memcpy(f->table, options, sizeof options);
    return (mp_option_group){ "Engine", f->table, MP_ENGINE_FLAGS_N };
}

static void write_log(void *user, mepic_log_level level, const char *message) {
    mp_session *session = user;
    if (session->log) {
        mp_progress_clear(&session->progress);
        session->log->write(session->log->user, level, message);
        return;
    }
    if (level > MEPIC_LOG_WARN && !session->verbose) return;
    mp_progress_clear(&session->progress);
    fprintf(stderr, "mepic: %s\n", message);
}

static void show_loading(void *user, const char *what, uint64_t done, uint64_t total) {
    mp_session *session = user;
    double percent = total ? 100.0 * (double)done / (double)total : 0.0;
    mp_progress_show(&session->progress, "%s: %.0f %%", what, percent);
}

/* "" = nowhere. */
static void choose_cache_dir(mp_session *session, const char *given) {
    char *out = session->cache_dir;
    size_t cap = sizeof session->cache_dir;
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = 0;
    out[0] = 0;
    if (given) {
        if (strcmp(given, "none") != 0) n = snprintf(out, cap, "%s", given);
    } else if (xdg && xdg[0] == '/') {
        n = snprintf(out, cap, "%s/mepic", xdg);
    } else if (home && home[0] == '/') {
        n = snprintf(out, cap, "%s/.cache/mepic", home);
    }
    if (n < 0 || (size_t)n >= cap) out[0] = 0;
    mepic_error why;
    if (out[0] && mp_dir_make(out, &why) != MEPIC_OK) {
        const mp_log log = { .write = write_log, .user = session };
        mp_log_write(&log, MEPIC_LOG_WARN, "cache directory: %s; nothing is kept", why.message);
        out[0] = 0;
    }
}

static uint32_t usable_cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

mepic_status mp_session_open(mp_session *session, const mp_engine_flags *flags,
                             void (*adjust)(mepic_engine_options *options), mepic_error *err) {
    if (!flags->model) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "no model given; name a GGUF file with -m FILE");
    }
    memset(session, 0, sizeof *session);
    session->verbose = flags->verbose;
    session->log = flags->log;
    session->threads = flags->threads ? flags->threads : usable_cores();
    mp_progress_init(&session->progress, !flags->quiet);
    choose_cache_dir(session, flags->cache_dir);
    const char *canonical = flags->canonical_context;
    mepic_engine_options options = {
        .size = sizeof options,
        .model_path = flags->model,
        .threads = flags->threads,
        .page_size = flags->page_size,
        .pages = flags->pages,
        .kv_memory = flags->kv_memory,
        .context = flags->context,
        .max_running = flags->max_running,
        .max_queued = flags->max_queued,
        .step_tokens = flags->step_tokens,
        .kv_type = (mepic_kv_type)flags->kv_type,
        .reuse = (mepic_reuse)flags->reuse,
        .link_tokens = flags->link_tokens,
        .eviction = (mepic_eviction)flags->eviction,
        .canonical_context = canonical && strcmp(canonical, "none") == 0 ? "" : canonical,
        .cache_dir = session->cache_dir[0] ? session->cache_dir : NULL,
        .isa = flags->isa,
        .device = flags->device,
        .gpu_memory = (float)flags->gpu_memory,
        .weights = (mepic_weights)flags->weights,
        .log = write_log,
        .progress = show_loading,
        .user = session,
    };
    if (adjust) adjust(&options);
    uint64_t start = mp_now_ns();
    mepic_status status = mepic_engine_open(&options, &session->engine, err);
    mp_progress_clear(&session->progress);
    if (status != MEPIC_OK) return status;
    session->open_ns = mp_now_ns() - start;
    mepic_model_info_read(session->engine, &session->info);
    return MEPIC_OK;
}

void mp_session_close(mp_session *session) {
    mp_progress_clear(&session->progress);
    mepic_engine_close(session->engine);
    session->engine = NULL;
}

int mp_exit_status(mepic_status status) {
    switch (status) {
    case MEPIC_OK: return MP_EXIT_OK;
    case MEPIC_ERR_ARGUMENT:
    case MEPIC_ERR_IO:
    case MEPIC_ERR_FORMAT:
    case MEPIC_ERR_UNSUPPORTED: return MP_EXIT_USAGE;
    default: return MP_EXIT_FAILURE;
    }
}

bool mp_session_begin(mp_session *session, const char *command, const mp_engine_flags *flags,
                      void (*adjust)(mepic_engine_options *options), int *exit_status) {
    mepic_error err;
    mepic_status status = mp_session_open(session, flags, adjust, &err);
    if (status == MEPIC_OK) return true;
    fprintf(stderr, "mepic %s: %s\n", command, err.message);
    *exit_status = mp_exit_status(status);
    return false;
}
