/* The rig: scheduler, backend and forward pass put together as the engine does it, without text, so that tests can give
 * tokens, page masks and a canonical context of their own and look at logits, pages and the plan. */
#ifndef MEPIC_TESTS_RIG_H
#define MEPIC_TESTS_RIG_H

#include "backend/backend.h"
#include "model/model.h"
#include "schedule/scheduler.h"

typedef struct rig_options {
    const mp_model *model;                                                   /* borrowed */
    mepic_kv_type kv_type;                                                   /* 0 = F32; of the CPU */
    uint32_t page_size, n_pages, step_tokens, max_running, threads, context; /* 0 = 16, 512, 64, 40, 1, 2048 */
    const int32_t *canonical;
    uint32_t n_canonical;
    const char *isa;
    const char *device; /* as mp_backend_find; NULL = rig_device */
    mepic_eviction eviction;
} rig_options;

typedef struct rig_request {
    /* in */
    mp_request_spec spec; /* borrowed pointers must stay until the request is done; `user` is the rig's */
    uint32_t n_reply;     /* greedy tokens to generate, >= 1 */
    bool keep_prompt_logits;
    /* out */
    bool done;
    mp_request *handle;
    uint64_t hash;  /* over the logits of all sampled rows */
    float *logits;  /* [n_tokens, n_vocab] with keep_prompt_logits: rows that were computed, others zero */
    bool *computed; /* [n_tokens] */
    int32_t reply[64];
    uint32_t n_got;
    mepic_usage usage;
} rig_request;

typedef struct rig {
    rig_options o;
    mp_backend *backend;
    mp_scheduler *scheduler;
    mp_fault fault;
    uint64_t steps;
} rig;

/* Where rigs are opened that do not say: "cpu". */
extern const char *rig_device;
/* From now on on the first CUDA device, with tiny models whose heads it can compute; false: there is none. KV is
 * rig_kv_type there, whatever the options say. */
bool rig_use_cuda(void);
/* Which weights rigs have: DEFAULT. Where the device has none of these the program ends as skipped. */
extern mepic_weights rig_weights;
/* How rigs on a CUDA device keep KV: DEFAULT. */
extern mepic_kv_type rig_kv_type;

rig *rig_open(const rig_options *options);
void rig_close(rig *r);
mepic_status rig_submit(rig *r, rig_request *q, mepic_error *err);
bool rig_step(rig *r); /* false: nothing to do; a step that allocates fails the test */
void rig_drain(rig *r);
/* Submits, drains, checks that it ended. */
void rig_run(rig *r, rig_request *q);
void rig_cancel(rig *r, rig_request *q);
void rig_request_free(rig_request *q);

#endif
