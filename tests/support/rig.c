#include "support/rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "infer/forward.h"
#include "support/models.h"

const char *rig_device = "cpu";
mepic_weights rig_weights;
mepic_kv_type rig_kv_type;

static void must(mepic_status status, const mepic_error *err) {
    if (status == MEPIC_OK) return;
    fprintf(stderr, "rig: %s: %s\n", mepic_status_name(status), err->message);
    abort();
}

bool rig_use_cuda(void) {
    const mp_backend_ops *ops;
    uint32_t device;
    if (mp_backend_find("cuda", &ops, &device, NULL) != MEPIC_OK || ops->n_devices() == 0) return false;
    rig_device = "cuda";
    tiny_head_dim = 64;
    return true;
}

static uint32_t or_default(uint32_t x, uint32_t otherwise) {
    return x ? x : otherwise;
}

rig *rig_open(const rig_options *options) {
    mepic_error err;
    rig *r = calloc(1, sizeof *r);
    r->o = *options;
    rig_options *o = &r->o;
    const mp_backend_ops *ops;
    uint32_t device;
    must(mp_backend_find(o->device ? o->device : rig_device, &ops, &device, &err), &err);
    if (ops != &mp_backend_cpu) o->kv_type = rig_kv_type ? rig_kv_type : ops->kv_type;
    if (!o->kv_type) o->kv_type = MEPIC_KV_F32;
    o->page_size = or_default(o->page_size, 16);
    o->n_pages = or_default(o->n_pages, 512);
    o->step_tokens = or_default(o->step_tokens, 64);
    o->max_running = or_default(o->max_running, 40);
    o->threads = or_default(o->threads, 1);
    o->context = or_default(o->context, 2048);
    mp_scheduler_config config = {
        .page_size = o->page_size,
        .cell_tokens = ops->cell_tokens,
        .n_pages = o->n_pages,
        .max_running = o->max_running,
        .max_jobs = 4,
        .max_queued = 1024,
        .step_tokens = o->step_tokens,
        .context = o->context,
        .eviction = o->eviction ? o->eviction : MEPIC_EVICT_S3FIFO,
        .canonical = o->canonical,
        .n_canonical = o->n_canonical,
        .spoil_freed = true,
        .fault = &r->fault,
    };
    mp_backend_config backend = {
        .model = o->model,
        .n_angles = o->context + o->n_canonical + o->page_size,
        .kv_type = o->kv_type,
        .page_size = o->page_size,
        .n_pages = o->n_pages,
        .max_rows = o->step_tokens,
        .max_seqs = o->max_running + 4,
        .max_refs = mp_scheduler_max_refs(&config),
        .whole_steps = true,
        .device = device,
        .gpu_memory = 0.9f,
        .weights = rig_weights,
        .threads = o->threads,
        .isa = o->isa,
    };
    mepic_status status = ops->open(&backend, &r->backend, &err);
    if (rig_weights && status == MEPIC_ERR_UNSUPPORTED) {
        fprintf(stderr, "rig: %s\n", err.message);
        exit(77);
    }
    must(status, &err);
    must(mp_forward_prepare(r->backend, o->model, &err), &err);
    must(mp_scheduler_open(&config, &r->scheduler, &err), &err);
    return r;
}

void rig_close(rig *r) {
    mp_scheduler_close(r->scheduler);
    r->backend->ops->close(r->backend);
    free(r);
}

mepic_status rig_submit(rig *r, rig_request *q, mepic_error *err) {
    if (q->keep_prompt_logits) {
        q->spec.logits_of_prompt = true;
        q->logits = calloc((size_t)q->spec.n_tokens * r->o.model->hp.n_vocab, sizeof *q->logits);
        q->computed = calloc(q->spec.n_tokens, sizeof *q->computed);
    }
    q->spec.max_tokens = q->n_reply;
    q->spec.user = q;
    q->done = false;
    q->hash = 0;
    q->n_got = 0;
    return mp_scheduler_submit(r->scheduler, &q->spec, &q->handle, err);
}

static void sample(rig *r, const mp_row *row, const float *logits) {
    uint32_t n_vocab = r->o.model->hp.n_vocab;
    mp_request *handle = mp_scheduler_request(r->scheduler, row->seq);
    rig_request *q = mp_request_user(handle);
    if (q->keep_prompt_logits && (uint32_t)row->position < q->spec.n_tokens) {
        memcpy(q->logits + (size_t)row->position * n_vocab, logits, n_vocab * sizeof *logits);
        q->computed[row->position] = true;
    }
    if (!row->samples) return;
    q->hash = mp_hash64(q->hash, logits, n_vocab * sizeof *logits);
    uint32_t best = 0;
    for (uint32_t i = 1; i < n_vocab; i++) best = logits[i] > logits[best] ? i : best;
    q->reply[q->n_got++] = (int32_t)best;
    if (q->n_got < q->n_reply) {
        mp_scheduler_append(r->scheduler, handle, (int32_t)best);
    } else {
        mp_request_usage(handle, &q->usage);
        q->done = true;
        mp_scheduler_finish(r->scheduler, handle);
    }
}

bool rig_step(rig *r) {
    mepic_error err;
    const mp_step *step;
    uint64_t allocations = mp_mem_count();
    must(mp_scheduler_step(r->scheduler, &step, &err), &err);
    if (step->n_rows == 0) return false;
    must(mp_forward(r->backend, r->o.model, step, 0, r->o.model->hp.n_layers, &err), &err);
    mp_row rows[1024]; /* commit ends the step's lifetime */
    uint32_t n = step->n_rows;
    if (n > 1024) abort();
    memcpy(rows, step->rows, n * sizeof *rows);
    mp_scheduler_commit(r->scheduler);
    for (uint32_t i = 0, k = 0; i < n; i++) {
        if (rows[i].logits) sample(r, &rows[i], r->backend->ops->logits_row(r->backend, k++));
    }
    if (r->fault.broken) {
        fprintf(stderr, "rig: broken invariant: %s\n", r->fault.what);
        abort();
    }
    if (mp_mem_count() != allocations) {
        fprintf(stderr, "rig: a step allocates\n");
        abort();
    }
    r->steps++;
    return true;
}

void rig_drain(rig *r) {
    while (rig_step(r)) {
    }
}

void rig_run(rig *r, rig_request *q) {
    mepic_error err;
    must(rig_submit(r, q, &err), &err);
    rig_drain(r);
    if (!q->done) {
        fprintf(stderr, "rig: the request did not end\n");
        abort();
    }
}

void rig_cancel(rig *r, rig_request *q) {
    mp_scheduler_finish(r->scheduler, q->handle);
    q->handle = NULL;
}

void rig_request_free(rig_request *q) {
    free(q->logits);
    free(q->computed);
    q->logits = NULL;
    q->computed = NULL;
}
