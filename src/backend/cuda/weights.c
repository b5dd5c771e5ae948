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
    bool e4m3;
    mp_cu_device *device;
    uint8_t *to;        /* device memory; NULL: only count */
    size_t at;          /* bytes of it that are laid out */
    size_t done, total; /* bytes of the file */
    const mp_log *log;
    struct {
        void *host, *raw; /* pinned; the same bytes on the device */
        void *bf16;       /* with e4m3: what is to be quantized */
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

/* How a tensor is to lie on the device. */
typedef enum form { AS_IT_IS, BF16, E4M3 } form;

/* `bytes` of tensor t, n weights, to `to` on the device through the next staging buffer. E4M3: whole rows. */
static bool load_piece(loader *l, const mp_tensor *t, const uint8_t *src, size_t bytes, size_t n, form as,
                       mp_cu_matrix to) {
    mp_cu_device *d = l->device;
    uint32_t i = l->next++ % 2;
    cudaStream_t stream = l->stages[i].stream;
    if (!CUDA_TRY(d, cudaEventSynchronize(l->stages[i].copied))) return false;
    l->copy_from = src;
    l->copy_to = l->stages[i].host;
    l->copy_bytes = bytes;
    mp_threads_run(l->threads, (uint32_t)((bytes + SLICE - 1) / SLICE), copy_slice, l);
    bool dequantize = as != AS_IT_IS && t->type != MP_DTYPE_BF16;
    void *unpacked = as == E4M3 ? l->stages[i].bf16 : to.data;
    bool ok = CUDA_TRY(d, cudaMemcpyAsync(dequantize ? l->stages[i].raw : unpacked, l->stages[i].host, bytes,
                                          cudaMemcpyHostToDevice, stream)) &&
              CUDA_TRY(d, cudaEventRecord(l->stages[i].copied, stream));
    if (ok && dequantize) {
        ok = CUDA_TRY(d, mp_cu_dequantize((uint32_t)t->type, l->stages[i].raw, unpacked, n, stream));
    }
    if (ok && as == E4M3) {
        uint32_t n_in = (uint32_t)t->ne[0];
        ok = CUDA_TRY(d, mp_cu_quantize((uint32_t)(n / n_in), unpacked, n_in, to, stream));
    }
    l->done += bytes;
    mp_log_progress(l->log, "loading weights", l->done, l->total);
    return ok;
}

/* Blocks of tensor t that a staging buffer takes: whole rows for E4M3; else what leaves the next piece aligned. */
static size_t blocks_a_piece(const mp_tensor *t, const mp_dtype_info *info, form as) {
    if (as != E4M3) return STAGE / ((size_t)info->bytes * 256) * 256;
    size_t row = (size_t)t->ne[0] / info->len, in = row * info->bytes, bf16 = (size_t)t->ne[0] * sizeof(mp_bf16);
    return STAGE / (in > bf16 ? in : bf16) * row;
}

static bool load_tensor(loader *l, const mp_tensor *t, form as, mp_cu_matrix to) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)t->type);
    const size_t most = blocks_a_piece(t, info, as);
    size_t blocks = t->bytes / info->bytes;
    for (size_t b = 0; b < blocks;) {
        size_t n = blocks - b < most ? blocks - b : most;
        size_t size = as == E4M3 ? info->len : as == BF16 ? info->len * sizeof(mp_bf16) : info->bytes;
        const uint8_t *src = (const uint8_t *)t->data + b * info->bytes;
        mp_cu_matrix piece = { (uint8_t *)to.data + b * size, NULL };
        if (as == E4M3) piece.scales = to.scales + b * info->len / (size_t)t->ne[0];
        if (!load_piece(l, t, src, n * info->bytes, n * info->len, as, piece)) return false;
        b += n;
    }
    return true;
}

/* Whether products take these outputs of one input in e4m3. */
static bool fits_e4m3(const mp_tensor *const tensors[3]) {
    size_t n_in = (size_t)tensors[0]->ne[0], n_out = 0;
    for (int i = 0; i < 3 && tensors[i]; i++) n_out += (size_t)tensors[i]->ne[1];
    return n_in % 16 == 0 && n_out % 16 == 0 && n_in <= MP_CU_MAX_QUANTIZED;
}

/* Takes the next bytes of what is laid out; NULL: only counted. */
static void *lay_out(loader *l, size_t bytes) {
    void *start = l->to ? l->to + l->at : NULL;
    l->at = (l->at + bytes + ALIGN - 1) / ALIGN * ALIGN;
    return start;
}

/* Lays out up to three tensors one behind the other (fused outputs; NULL ends them) and loads them; where they are,
 * without data: nothing to load, or only counted. What goes wrong is noted in the device. */
static mp_cu_matrix place(loader *l, form as, const mp_tensor *const tensors[3]) {
    size_t n = 0, n_out = 0;
    if (!tensors[0]) return (mp_cu_matrix){ 0 };
    if (as == E4M3 && !(l->e4m3 && fits_e4m3(tensors))) as = BF16;
    for (int i = 0; i < 3 && tensors[i]; i++) { /* shapes were checked against the file when it was opened */
        n_out += (size_t)tensors[i]->ne[1];
        n += (size_t)(tensors[i]->ne[0] * tensors[i]->ne[1]);
        if (!l->to) l->total += tensors[i]->bytes;
    }
    size_t size = as == E4M3 ? 1 : as == BF16 ? sizeof(mp_bf16) : sizeof(float);
    mp_cu_matrix m = { lay_out(l, n * size), NULL }, to = m;
    if (as == E4M3) m.scales = lay_out(l, n_out * sizeof(float));
    to.scales = m.scales;
    for (int i = 0; l->to && i < 3 && tensors[i]; i++) {
        load_tensor(l, tensors[i], as, to);
        to.data = (uint8_t *)to.data + (size_t)(tensors[i]->ne[0] * tensors[i]->ne[1]) * size;
        if (to.scales) to.scales += tensors[i]->ne[1];
    }
    return m;
}
#define PLACE(l, as, ...) place(l, as, (const mp_tensor *const[3]){ __VA_ARGS__ })

/* ---- All of them ------------------------------------------------------------------------------------------------- */

static void walk(loader *l, mp_cu_weights *w) {
    const mp_model *m = l->model;
    w->token_embd = PLACE(l, BF16, m->token_embd).data;
    w->output = m->output == m->token_embd ? w->token_embd : PLACE(l, BF16, m->output).data;
    w->output_norm = PLACE(l, AS_IT_IS, m->output_norm).data;
    for (uint32_t i = 0; i < m->hp.n_layers; i++) {
        const mp_layer *t = &m->layers[i];
        mp_cu_layer p = {
            .wqkv = PLACE(l, E4M3, t->wq, t->wk, t->wv),
            .wo = PLACE(l, E4M3, t->wo),
            .gate_up = PLACE(l, E4M3, t->gate, t->up),
            .down = PLACE(l, E4M3, t->down),
            .attn_norm = PLACE(l, AS_IT_IS, t->attn_norm).data,
            .ffn_norm = PLACE(l, AS_IT_IS, t->ffn_norm).data,
            .bias = PLACE(l, AS_IT_IS, t->bq, t->bk, t->bv).data,
            .q_norm = PLACE(l, AS_IT_IS, t->q_norm).data,
            .k_norm = PLACE(l, AS_IT_IS, t->k_norm).data,
        };
        if (!l->to) continue;
        w->layers[i] = p;
        mp_gguf_cool(m->gguf);
        if (l->device->error != cudaSuccess) return;
    }
}

size_t mp_cu_weights_bytes(const mp_model *model, bool e4m3) {
    loader count = { .model = model, .e4m3 = e4m3 };
    mp_cu_weights none = { 0 };
    walk(&count, &none);
    return count.at;
}

size_t mp_cu_weights_staging_bytes(void) {
    return 4 * STAGE;
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
        mp_cu_drop(l->device, l->stages[i].bf16);
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
        if (status == MEPIC_OK && l->e4m3) status = mp_cu_take(d, STAGE, "loading weights", &l->stages[i].bf16, err);
        if (status != MEPIC_OK) return status;
        bool ok = CUDA_TRY(d, cudaStreamCreateWithFlags(&l->stages[i].stream, cudaStreamNonBlocking)) &&
                  CUDA_TRY(d, cudaEventCreateWithFlags(&l->stages[i].copied, cudaEventDisableTiming)) &&
                  CUDA_TRY(d, cudaEventRecord(l->stages[i].copied, l->stages[i].stream));
        if (!ok) return mp_cu_status(d, err);
    }
    return MEPIC_OK;
}

mepic_status mp_cu_weights_open(mp_cu_device *device, const mp_model *model, bool e4m3, const mp_log *log,
                                mp_cu_weights *out, mepic_error *err) {
    mepic_status status = check_shapes(model, err);
    if (status != MEPIC_OK) return status;
    loader l = { .model = model, .e4m3 = e4m3, .device = device, .log = log };
    mp_cu_weights w = { 0 };
    walk(&l, &w);
    w.bytes = l.at;
    l.at = 0;
    size_t table = model->hp.n_layers * sizeof *w.layers;
    w.layers = mp_calloc(model->hp.n_layers, sizeof *w.layers);
    if (!w.layers) return mp_fail_nomem(err, "the table of layers", table);
    void *memory = NULL;
    if ((status = mp_cu_take(device, w.bytes, e4m3 ? "the model (e4m3)" : "the model (bf16)", &memory, err)) !=
        MEPIC_OK)
        goto fail;
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
    if (w->layers) mp_cu_drop(device, w->token_embd); /* the first in the allocation */
    mp_free(w->layers);
    *w = (mp_cu_weights){ 0 };
}
