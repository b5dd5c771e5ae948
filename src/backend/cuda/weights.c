#include "backend/cuda/weights.h"

#include <string.h>

#include "base/mem.h"
#include "base/thread.h"

static const size_t STAGE = (size_t)16 << 20; /* bytes a staging buffer holds */
static const size_t SLICE = (size_t)1 << 20;  /* of them a thread copies at a time */
enum { ALIGN = 256 };

/* The walk over all weights is written once: first with no memory behind it, to count bytes, then to load. */
typedef struct loader {
    const mp_model *model;
    mp_cu_device *device;
    uint8_t *to;        /* device memory; NULL: only count */
    size_t at;          /* bytes of it that are laid out */
    size_t done, total; /* bytes of the file */
    const mp_log *log;
    struct {
        void *host, *raw; /* pinned; the same bytes on the device */
        cudaStream_t stream;
        cudaEvent_t copied;
    } stages[2];
    uint32_t next;
    mp_threads *threads;      /* a thread reads a mapped file one page fault at a time */
    const uint8_t *copy_from; /* of the copy under way */
    uint8_t *copy_to;
    size_t copy_bytes;
} loader;

/* ---- One tensor -------------------------------------------------------------------------------------------------- */

static void copy_slice(void *ctx, uint32_t item, uint32_t thread) {
    (void)thread;
    const loader *l = ctx;
    size_t at = item * SLICE, n = l->copy_bytes - at < SLICE ? l->copy_bytes - at : SLICE;
    memcpy(l->copy_to + at, l->copy_from + at, n);
}

/* A piece of `bytes` from the file, n weights, to dst on the device through the next staging buffer. */
static bool load_piece(loader *l, const mp_tensor *t, const uint8_t *src, size_t bytes, size_t n, bool to_bf16,
                       uint8_t *dst) {
    mp_cu_device *d = l->device;
    uint32_t i = l->next++ % 2;
    cudaStream_t stream = l->stages[i].stream;
    if (!CUDA_TRY(d, cudaEventSynchronize(l->stages[i].copied))) return false;
    l->copy_from = src;
    l->copy_to = l->stages[i].host;
    l->copy_bytes = bytes;
    mp_threads_run(l->threads, (uint32_t)((bytes + SLICE - 1) / SLICE), copy_slice, l);
    bool as_it_is = !to_bf16 || t->type == MP_DTYPE_BF16;
    bool ok = CUDA_TRY(d, cudaMemcpyAsync(as_it_is ? dst : l->stages[i].raw, l->stages[i].host, bytes,
                                          cudaMemcpyHostToDevice, stream)) &&
              CUDA_TRY(d, cudaEventRecord(l->stages[i].copied, stream));
    if (ok && !as_it_is) {
        ok = CUDA_TRY(d, mp_cu_dequantize((uint32_t)t->type, l->stages[i].raw, (mp_bf16 *)(void *)dst, n, stream));
    }
    l->done += bytes;
    mp_log_progress(l->log, "loading weights", l->done, l->total);
    return ok;
}

/* Puts tensor t at dst, as bf16 or as it is. */
static bool load_tensor(loader *l, const mp_tensor *t, bool to_bf16, uint8_t *dst) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)t->type);
    const size_t most = STAGE / ((size_t)info->bytes * 256) * 256; /* blocks a piece: dst stays aligned */
    size_t blocks = t->bytes / info->bytes;
    for (size_t b = 0; b < blocks;) {
        size_t n = blocks - b < most ? blocks - b : most;
        size_t size = to_bf16 ? info->len * sizeof(mp_bf16) : info->bytes;
        const uint8_t *src = (const uint8_t *)t->data + b * info->bytes;
        if (!load_piece(l, t, src, n * info->bytes, n * info->len, to_bf16, dst + b * size)) return false;
        b += n;
    }
    return true;
}

/* Lays out up to three tensors one behind the other (fused outputs; NULL ends them) and loads them; where they are, or
 * NULL: nothing to load, or only counted. What goes wrong is noted in the device. */
static const void *place(loader *l, bool to_bf16, const mp_tensor *const tensors[3]) {
    if (!tensors[0]) return NULL;
    const void *start = l->to ? l->to + l->at : NULL;
    for (int i = 0; i < 3 && tensors[i]; i++) {
        size_t n = 1;
        for (int k = 0; k < 4; k++) n *= (size_t)tensors[i]->ne[k]; /* checked against the file when it was opened */
        if (l->to) {
            load_tensor(l, tensors[i], to_bf16, l->to + l->at);
        } else {
            l->total += tensors[i]->bytes;
        }
        l->at += n * (to_bf16 ? sizeof(mp_bf16) : sizeof(float));
    }
    l->at = (l->at + ALIGN - 1) / ALIGN * ALIGN;
    return start;
}
#define PLACE(l, to_bf16, ...) place(l, to_bf16, (const mp_tensor *const[3]){ __VA_ARGS__ })

/* ---- All of them ------------------------------------------------------------------------------------------------- */

static void walk(loader *l, mp_cu_weights *w) {
    const mp_model *m = l->model;
    w->token_embd = PLACE(l, true, m->token_embd);
    w->output = m->output == m->token_embd ? w->token_embd : PLACE(l, true, m->output);
    w->output_norm = PLACE(l, false, m->output_norm);
    for (uint32_t i = 0; i < m->hp.n_layers; i++) {
        const mp_layer *t = &m->layers[i];
        mp_cu_layer p = {
            .wqkv = PLACE(l, true, t->wq, t->wk, t->wv),
            .wo = PLACE(l, true, t->wo),
            .gate_up = PLACE(l, true, t->gate, t->up),
            .down = PLACE(l, true, t->down),
            .attn_norm = PLACE(l, false, t->attn_norm),
            .ffn_norm = PLACE(l, false, t->ffn_norm),
            .bias = PLACE(l, false, t->bq, t->bk, t->bv),
            .q_norm = PLACE(l, false, t->q_norm),
            .k_norm = PLACE(l, false, t->k_norm),
        };
        if (!l->to) continue;
        w->layers[i] = p;
        mp_gguf_cool(m->gguf);
        if (l->device->error != cudaSuccess) return;
    }
}

size_t mp_cu_weights_bytes(const mp_model *model) {
    loader count = { .model = model };
    mp_cu_weights none = { 0 };
    walk(&count, &none);
    return count.at;
}

size_t mp_cu_weights_staging_bytes(void) {
    return 2 * STAGE;
}

static mepic_status check_shapes(const mp_model *model, mepic_error *err) {
    const mp_hparams *hp = &model->hp;
    if (hp->n_embd % 8 || hp->n_ff % 8) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "the CUDA backend needs an embedding and a feed-forward length that are multiples of 8; this "
                       "model's are %u and %u; use the CPU",
                       hp->n_embd, hp->n_ff);
    }
    return MEPIC_OK;
}

static void close_stages(loader *l) {
    mp_threads_close(l->threads);
    for (int i = 0; i < 2; i++) {
        if (l->stages[i].stream) {
            cudaStreamSynchronize(l->stages[i].stream);
            cudaStreamDestroy(l->stages[i].stream);
        }
        if (l->stages[i].copied) cudaEventDestroy(l->stages[i].copied);
        mp_cu_drop(l->device, l->stages[i].host);
        mp_cu_drop(l->device, l->stages[i].raw);
    }
}

static mepic_status open_stages(loader *l, mepic_error *err) {
    mp_cu_device *d = l->device;
    mepic_status status = mp_threads_open(0, &l->threads, err);
    if (status != MEPIC_OK) return status;
    for (int i = 0; i < 2; i++) {
        status = mp_cu_take_pinned(d, STAGE, "loading weights", &l->stages[i].host, err);
        if (status != MEPIC_OK) return status;
        status = mp_cu_take(d, STAGE, "loading weights", &l->stages[i].raw, err);
        if (status != MEPIC_OK) return status;
        bool ok = CUDA_TRY(d, cudaStreamCreateWithFlags(&l->stages[i].stream, cudaStreamNonBlocking)) &&
                  CUDA_TRY(d, cudaEventCreateWithFlags(&l->stages[i].copied, cudaEventDisableTiming)) &&
                  CUDA_TRY(d, cudaEventRecord(l->stages[i].copied, l->stages[i].stream));
        if (!ok) return mp_cu_status(d, err);
    }
    return MEPIC_OK;
}

mepic_status mp_cu_weights_open(mp_cu_device *device, const mp_model *model, const mp_log *log, mp_cu_weights *out,
                                mepic_error *err) {
    mepic_status status = check_shapes(model, err);
    if (status != MEPIC_OK) return status;
    loader l = { .model = model, .device = device, .log = log };
    mp_cu_weights w = { 0 };
    walk(&l, &w);
    w.bytes = l.at;
    l.at = 0;
    size_t table = model->hp.n_layers * sizeof *w.layers;
    w.layers = mp_calloc(model->hp.n_layers, sizeof *w.layers);
    if (!w.layers) return mp_fail_nomem(err, "the table of layers", table);
    void *memory = NULL;
    if ((status = mp_cu_take(device, w.bytes, "the model (bf16)", &memory, err)) != MEPIC_OK) goto fail;
    l.to = memory;
    if ((status = open_stages(&l, err)) != MEPIC_OK) goto fail;
    walk(&l, &w);
    bool ok = device->error == cudaSuccess;
    for (int i = 0; ok && i < 2; i++) ok = CUDA_TRY(device, cudaStreamSynchronize(l.stages[i].stream));
    if (!ok) {
        status = mp_cu_status(device, err);
        goto fail;
    }
    close_stages(&l);
    *out = w;
    return MEPIC_OK;
fail:
    close_stages(&l);
    if (memory) mp_cu_drop(device, memory);
    mp_free(w.layers);
    return status;
}

void mp_cu_weights_close(mp_cu_device *device, mp_cu_weights *w) {
    if (w->layers) mp_cu_drop(device, (void *)(uintptr_t)w->token_embd); /* the first in the allocation */
    mp_free(w->layers);
    *w = (mp_cu_weights){ 0 };
}
