#include "engine/options.h"

#include <string.h>

mepic_status mp_options_copy(const void *in, size_t least, void *out, size_t known, const char *what,
                             mepic_error *err) {
    if (!in) return mp_fail(err, MEPIC_ERR_ARGUMENT, "the %s is NULL", what);
    size_t size;
    memcpy(&size, in, sizeof size);
    if (size < least) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s.size is %zu; set it to sizeof(%s)", what, size, what);
    }
    const unsigned char *bytes = in;
    for (size_t i = known; i < size; i++) {
        if (bytes[i]) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s.size is %zu: the caller is newer than this library (%zu)", what,
                           size, known);
        }
    }
    memset(out, 0, known);
    memcpy(out, in, size < known ? size : known);
    return MEPIC_OK;
}

uint32_t mp_options_link(uint32_t link_tokens, uint32_t otherwise) {
    switch (link_tokens) {
    case 0: return otherwise;
    case MEPIC_LINK_NONE: return 0;
    case MEPIC_LINK_ALL: return UINT32_MAX;
    default: return link_tokens;
    }
}

static mepic_status resolve_count(const char *name, uint32_t *value, uint32_t least, uint32_t most, uint32_t otherwise,
                                  mepic_error *err) {
    if (*value == 0) {
        *value = otherwise;
        return MEPIC_OK;
    }
    if (*value >= least && *value <= most) return MEPIC_OK;
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s is %u; it must be 0 (default) or from %u to %u", name, *value, least,
                   most);
}

mepic_status mp_options_resolve(const mepic_engine_options *in, mepic_engine_options *out, mepic_error *err) {
    mepic_engine_options o;
    size_t least = offsetof(mepic_engine_options, threads);
    mepic_status st = mp_options_copy(in, least, &o, sizeof o, "mepic_engine_options", err);
    if (st != MEPIC_OK) return st;
    if (!o.model_path || !*o.model_path)
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "model_path is empty; name a GGUF file");

    const struct {
        const char *name;
        uint32_t *value, least, most, otherwise;
    } counts[] = {
        { "threads", &o.threads, 1, 256, 0 },
        { "pages", &o.pages, 4, 1u << 24, 0 },
        { "context", &o.context, 16, 1u << 24, 0 },
        { "max_running", &o.max_running, 1, 4096, 0 },
        { "max_queued", &o.max_queued, 1, 1u << 20, 1024 },
        { "step_tokens", &o.step_tokens, 1, 65536, 0 },
        { "page_size", &o.page_size, 16, 128, 16 },
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        st = resolve_count(counts[i].name, counts[i].value, counts[i].least, counts[i].most, counts[i].otherwise, err);
        if (st != MEPIC_OK) return st;
    }
    if (o.page_size & (o.page_size - 1)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "page_size is %u; it must be 16, 32, 64 or 128", o.page_size);
    }
    if ((unsigned)o.kv_type > MEPIC_KV_FP8) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "kv_type is %d; it must be one of mepic_kv_type, 0 to 4",
                       (int)o.kv_type);
    }
    if ((unsigned)o.reuse > MEPIC_REUSE_MEPIC) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "reuse is %d; it must be one of mepic_reuse, 0 to 3", (int)o.reuse);
    }
    if ((unsigned)o.eviction > MEPIC_EVICT_LRU) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "eviction is %d; it must be one of mepic_eviction, 0 to 2",
                       (int)o.eviction);
    }
    if ((unsigned)o.weights > MEPIC_WEIGHTS_FP8) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "weights is %d; it must be one of mepic_weights, 0 to 2",
                       (int)o.weights);
    }
    if (!(o.gpu_memory >= 0.0f && o.gpu_memory <= 1.0f)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "gpu_memory is %g; it must be above 0 and at most 1, or 0 (default)",
                       (double)o.gpu_memory);
    }
    if (o.gpu_memory == 0.0f) o.gpu_memory = 0.9f;
    if (o.reuse == MEPIC_REUSE_DEFAULT) o.reuse = MEPIC_REUSE_MEPIC;
    if (o.eviction == MEPIC_EVICT_DEFAULT) o.eviction = MEPIC_EVICT_S3FIFO;
    o.link_tokens = mp_options_link(o.link_tokens, MP_DEFAULT_LINK_TOKENS);
    *out = o;
    return MEPIC_OK;
}
