/* Open and close. Open acquires in the order of the ladder below; close, also after a failed open, goes backwards. */
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "engine/engine.h"
#include "engine/options.h"
#include "infer/forward.h"
#include "model/rope.h"

/* Raised when a change alters what a cached page of the same tokens holds. */
enum { KV_FORMAT_VERSION = 1 };

static void copy_str(char *dst, size_t cap, const char *src, size_t len) {
    if (len >= cap) len = cap - 1;
    memcpy(dst, src, len);
    dst[len] = 0;
}

/* Weight types by bytes, the largest share first: "Q5_0 Q8_0 F32". */
static void describe_types(const mp_gguf *gguf, char *out, size_t cap) {
    size_t bytes[64] = { 0 };
    for (size_t i = 0; i < mp_gguf_n_tensors(gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(gguf, i);
        bytes[(unsigned)t->type % 64] += t->bytes;
    }
    size_t len = 0;
    out[0] = 0;
    for (;;) {
        unsigned most = 0;
        for (unsigned type = 1; type < 64; type++) {
            if (bytes[type] > bytes[most]) most = type;
        }
        const char *name = mp_dtype_name(most);
        size_t name_len = strlen(name);
        if (bytes[most] == 0 || len + name_len + 2 > cap) return;
        if (len > 0) out[len++] = ' ';
        memcpy(out + len, name, name_len + 1);
        len += name_len;
        bytes[most] = 0;
    }
}

static void fill_info(mepic_engine *e) {
    const mp_hparams *hp = &e->model->hp;
    const mp_gguf *gguf = e->model->gguf;
    mepic_model_info *info = &e->info;
    mp_str name;
    if (mp_gguf_str(gguf, "general.name", &name, NULL) == MEPIC_OK) {
        copy_str(info->name, sizeof info->name, name.data, name.len);
    }
    copy_str(info->architecture, sizeof info->architecture, mp_arch_name(hp->arch), strlen(mp_arch_name(hp->arch)));
    describe_types(gguf, info->file_types, sizeof info->file_types);
    const char *family = mp_chat_family_name(e->chat.family);
    copy_str(info->chat_family, sizeof info->chat_family, family, strlen(family));
    const char *tools = mp_chat_tool_format(&e->chat);
    copy_str(info->tool_format, sizeof info->tool_format, tools, strlen(tools));
    for (size_t i = 0; i < mp_gguf_n_tensors(gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(gguf, i);
        info->parameters += t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
    }
    info->file_bytes = mp_gguf_file_bytes(gguf);
    info->n_layers = hp->n_layers;
    info->n_embd = hp->n_embd;
    info->n_heads = hp->n_heads;
    info->n_kv_heads = hp->n_kv_heads;
    info->head_dim = hp->head_dim;
    info->n_vocab = hp->n_vocab;
    info->trained_context = hp->n_ctx_train;
    info->page_size = e->options.page_size;
    info->position_exact = e->position_exact;
}

static mepic_status open_tokenizer(mepic_engine *e, mepic_error *err) {
    mepic_status st = mp_tokenizer_open(e->model->gguf, &e->tokenizer, err);
    if (st != MEPIC_OK) return st;
    uint32_t n_tokens = mp_tokenizer_n_vocab(e->tokenizer), n_vocab = e->model->hp.n_vocab;
    if (n_tokens > n_vocab) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: the tokenizer has %u tokens but token_embd has rows for %u",
                       e->options.model_path, n_tokens, n_vocab);
    }
    for (uint32_t id = 0; id < n_tokens; id++) {
        size_t len = mp_tokenizer_bytes(e->tokenizer, (int32_t)id, true).len;
        if (len > e->max_token_bytes) e->max_token_bytes = len;
    }
    mp_chat_template_find(e->model->gguf, &e->chat);
    const char *why;
    e->position_exact = mp_rope_exact(e->model, &why);
    if (!e->position_exact) {
        mp_log_write(&e->log, MEPIC_LOG_WARN, "%s: chunks are not shared, only prefixes: %s", e->options.model_path,
                     why);
        return MEPIC_OK; /* without a canonical context: nothing is ever compiled */
    }
    return mp_canonical_tokens(e->options.canonical_context, e->tokenizer, &e->chat, e->model->hp.n_ctx_train,
                               &e->canonical, err);
}

static uint32_t pages_for(size_t n_tokens, uint32_t page_size) {
    return (uint32_t)((n_tokens + page_size - 1) / page_size);
}

static void scheduler_config(const mepic_engine *e, mp_scheduler_config *out) {
    const mepic_engine_options *o = &e->options;
    *out = (mp_scheduler_config){
        .page_size = o->page_size,
        .cell_tokens = e->ops->cell_tokens,
        .n_pages = o->pages,
        .max_running = o->max_running,
        .max_jobs = MP_MAX_JOBS,
        .max_queued = o->max_queued,
        .step_tokens = o->step_tokens,
        .context = o->context ? o->context : e->model->hp.n_ctx_train,
        .longer = e->longer_context,
        .eviction = o->eviction,
        .canonical = e->canonical.ids,
        .n_canonical = (uint32_t)e->canonical.n,
#ifndef NDEBUG
        .spoil_freed = true,
#endif
    };
}

static mp_backend_config backend_config(const mepic_engine *e) {
    const mepic_engine_options *o = &e->options;
    mp_scheduler_config scheduler;
    scheduler_config(e, &scheduler);
    return (mp_backend_config){
        .model = e->model,
        .n_angles = scheduler.context + scheduler.n_canonical, /* a chunk's angles start behind the canonical context */
        .kv_type = o->kv_type,
        .page_size = o->page_size,
        .n_pages = o->pages,
        .max_rows = o->step_tokens,
        .max_seqs = o->max_running + MP_MAX_JOBS,
        .max_refs = mp_scheduler_max_refs(&scheduler),
        .whole_steps = true,
        .threads = o->threads,
        .isa = o->isa,
        .device = e->device,
        .gpu_memory = o->gpu_memory,
        .weights = o->weights,
        .log = &e->log,
    };
}

/* The device, and the options whose defaults are its own. */
static mepic_status find_backend(mepic_engine *e, mepic_error *err) {
    mepic_engine_options *o = &e->options;
    mepic_status st = mp_backend_find(o->device, &e->ops, &e->device, err);
    if (st != MEPIC_OK) return st;
    if (o->kv_type == MEPIC_KV_DEFAULT) o->kv_type = e->ops->kv_type;
    if (o->max_running == 0) o->max_running = e->ops->max_running;
    if (o->step_tokens == 0) o->step_tokens = e->ops->step_tokens;
    return MEPIC_OK;
}

static mepic_status count_pages(mepic_engine *e, size_t page_bytes, mepic_error *err) {
    mepic_engine_options *o = &e->options;
    size_t bytes = o->kv_memory;
    if (!o->pages && !bytes) {
        mp_backend_config config = backend_config(e);
        mepic_status st = e->ops->kv_memory(&config, &bytes, err);
        if (st != MEPIC_OK) return st;
    }
    size_t pages = o->pages ? o->pages : bytes / page_bytes;
    const size_t most = (size_t)1 << 24;
    o->pages = (uint32_t)(pages < most ? pages : most);
    return MEPIC_OK;
}

/* Sizes the pool, and the context to what the pool holds if the caller named none. */
static mepic_status size_pool(mepic_engine *e, mepic_error *err) {
    mepic_engine_options *o = &e->options;
    uint32_t trained = e->model->hp.n_ctx_train;
    if (o->context > trained) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "context is %u; the model was trained for %u", o->context, trained);
    }
    size_t page_bytes = mp_kv_page_bytes(&e->model->hp, o->kv_type, o->page_size);
    mepic_status st = count_pages(e, page_bytes, err);
    if (st != MEPIC_OK) return st;
    uint32_t canonical = pages_for(e->canonical.n, o->page_size);
    uint32_t usable = o->pages > canonical ? o->pages - canonical : 0;
    uint32_t context = o->context ? o->context : trained;
    e->longer_context = context < trained ? " or raise context" : "; the model was trained for no longer context";
    if (pages_for(context, o->page_size) > usable) {
        size_t need = ((size_t)pages_for(context, o->page_size) + canonical) * page_bytes;
        if (o->context || usable < 2) {
            return mp_fail(
                err, MEPIC_ERR_ARGUMENT,
                "the KV pool has %u pages of %u tokens (%zu bytes each), %u of them for the canonical context: "
                "too few for a context of %u tokens; raise kv_memory to %zu bytes (or pages to %zu), or lower context",
                o->pages, o->page_size, page_bytes, canonical, context, need, need / page_bytes);
        }
        context = usable * o->page_size;
        e->longer_context = " or raise kv_memory or pages, which hold no longer context";
        mp_log_write(&e->log, MEPIC_LOG_INFO,
                     "context is %u tokens instead of the trained %u: the KV pool has %u pages of %u tokens; raise "
                     "kv_memory to %zu bytes for all",
                     context, trained, o->pages, o->page_size, need);
    }
    o->context = context;
    e->info.context = context;
    e->info.pages = o->pages;
    e->info.page_bytes = page_bytes < UINT32_MAX ? (uint32_t)page_bytes : UINT32_MAX;
    return MEPIC_OK;
}

static mepic_status open_backend(mepic_engine *e, mepic_error *err) {
    mp_backend_config config = backend_config(e);
    mepic_status st = e->ops->open(&config, &e->backend, err);
    if (st != MEPIC_OK) return st;
    const char *numerics = e->ops->numerics(e->backend);
    copy_str(e->info.backend, sizeof e->info.backend, numerics, strlen(numerics));
    return mp_forward_prepare(e->backend, e->model, err);
}

/* What a cached page of some tokens depends on besides them. The file's digest covers its hyper-parameters. */
static mepic_status model_digest(mepic_engine *e, mp_digest *out, mepic_error *err) {
    mp_digest file;
    mepic_status st = mp_model_digest(e->model, e->options.cache_dir, &e->log, &file, err);
    if (st != MEPIC_OK) return st;
    static const char tag[] = "mepic/model/v1";
    const char *numerics = e->ops->numerics(e->backend);
    const uint32_t numbers[] = { KV_FORMAT_VERSION, (uint32_t)e->options.kv_type, e->options.page_size };
    mp_sha256_begin(e->sha);
    mp_sha256_update(e->sha, tag, sizeof tag);
    mp_sha256_update(e->sha, file.bytes, sizeof file.bytes);
    mp_sha256_update(e->sha, numbers, sizeof numbers);
    mp_sha256_update(e->sha, numerics, strlen(numerics));
    *out = mp_sha256_end(e->sha);
    return MEPIC_OK;
}

static mepic_status open_scheduler(mepic_engine *e, mepic_error *err) {
    const mepic_engine_options *o = &e->options;
    mepic_error why;
    if (o->cache_dir && mp_dir_make(o->cache_dir, &why) != MEPIC_OK) {
        mp_log_write(&e->log, MEPIC_LOG_WARN, "cache_dir: %s; nothing is kept over a restart", why.message);
    }
    e->sha = mp_sha256_open();
    if (!e->sha) return mp_fail_nomem(err, "a hash", 0);
    mp_scheduler_config config;
    scheduler_config(e, &config);
    config.fault = &e->fault;
    mepic_status st = model_digest(e, &config.model, err);
    if (st == MEPIC_OK) st = mp_scheduler_open(&config, &e->scheduler, err);
    if (st != MEPIC_OK) return st;
    st = mp_canonical_file_open(&e->canonical_file, o->cache_dir, &config.model, e->canonical.ids,
                                (uint32_t)e->canonical.n, e->ops->page_bytes(e->backend), err);
    if (st == MEPIC_OK) mp_canonical_file_load(&e->canonical_file, e->scheduler, e->backend, &e->log);
    return st;
}

static mepic_status open_requests(mepic_engine *e, mepic_error *err) {
    const mepic_engine_options *o = &e->options;
    mepic_status st = mp_sampler_open(e->model->hp.n_vocab, &e->sampler, err);
    if (st != MEPIC_OK) return st;
    e->n_slots = o->max_running + o->max_queued;
    e->cap_events = 2 * e->n_slots;
    e->slots = mp_calloc(e->n_slots, sizeof *e->slots);
    e->free_slots = mp_calloc(e->n_slots, sizeof *e->free_slots);
    e->events = mp_calloc(e->cap_events, sizeof *e->events);
    e->samples = mp_calloc(o->step_tokens, sizeof *e->samples);
    bool ok = e->slots && e->free_slots && e->events && e->samples;
    for (uint32_t i = 0; i < 2; i++) {
        mp_flight *f = &e->flights[i];
        f->rows = mp_calloc(o->step_tokens, sizeof *f->rows);
        f->sampled = mp_calloc(o->step_tokens, sizeof *f->sampled);
        ok = ok && f->rows && f->sampled;
    }
    if (!ok) {
        return mp_fail_nomem(err, "requests and events", e->cap_events * sizeof *e->events);
    }
    for (uint32_t i = 0; i < e->n_slots; i++) e->free_slots[e->n_free_slots++] = e->n_slots - 1 - i;
    return MEPIC_OK;
}

mepic_status mepic_engine_open(const mepic_engine_options *options, mepic_engine **out, mepic_error *err) {
    mepic_engine *e = mp_calloc(1, sizeof *e);
    if (!e) return mp_fail_nomem(err, "the engine", sizeof *e);
    mepic_status st = mp_options_resolve(options, &e->options, err);
    if (st != MEPIC_OK) goto fail;
    e->log = (mp_log){ e->options.log, e->options.progress, e->options.user };
    st = mp_model_open(e->options.model_path, &e->model, err);
    if (st != MEPIC_OK) goto fail;
    st = open_tokenizer(e, err);
    if (st != MEPIC_OK) goto fail;
    st = find_backend(e, err);
    if (st != MEPIC_OK) goto fail;
    st = size_pool(e, err);
    if (st != MEPIC_OK) goto fail;
    st = open_backend(e, err);
    if (st != MEPIC_OK) goto fail;
    st = open_scheduler(e, err);
    if (st != MEPIC_OK) goto fail;
    st = open_requests(e, err);
    if (st != MEPIC_OK) goto fail;
    fill_info(e);
    *out = e;
    return MEPIC_OK;
fail:
    mepic_engine_close(e);
    return st;
}

void mepic_engine_close(mepic_engine *e) {
    if (!e) return;
    for (mp_reply *reply = e->ended, *next; reply; reply = next) {
        next = reply->next_ended;
        mp_reply_free(reply);
    }
    for (uint32_t i = 0; e->slots && i < e->n_slots; i++) mp_reply_free(e->slots[i].reply);
    for (uint32_t i = 0; i < 2; i++) {
        mp_free(e->flights[i].sampled);
        mp_free(e->flights[i].rows);
    }
    mp_free(e->samples);
    mp_free(e->events);
    mp_free(e->free_slots);
    mp_free(e->slots);
    mp_sampler_close(e->sampler);
    mp_canonical_file_close(&e->canonical_file);
    mp_scheduler_close(e->scheduler);
    mp_sha256_close(e->sha);
    if (e->backend) e->ops->close(e->backend);
    mp_free(e->canonical.ids);
    mp_tokenizer_close(e->tokenizer);
    mp_model_close(e->model);
    mp_free(e);
}

void mepic_model_info_read(const mepic_engine *engine, mepic_model_info *out) {
    *out = engine->info;
}
