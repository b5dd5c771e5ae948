/* The table behind which a backend stands: the CPU, or a CUDA device.
 *
 * A backend owns the packed weights, the page slab and the activations; forward (infer/forward.c) calls its operations
 * in order, layer by layer. Nothing outside backend/ knows which one is in use. One thread, the stepping thread; a
 * backend may have worker threads of its own. After open nothing is allocated.
 *
 * Numbers. A row's result depends on that row's inputs and on the pages it sees, never on the other rows of the step,
 * the number of threads or how the work was split (docs/ARCHITECTURE.md, "Same bits"). K and V are read from pages
 * after rounding to the KV type, never from fresh values.
 *
 * Time. Whatever is asked of a backend happens in the order it was asked for. A backend that runs `ahead` may still be
 * at a step when step_end and sample return; wait is where the host waits for it. Pages, logits and activations that
 * the host reads or writes are those behind the last step.
 *
 * A page is opaque bytes [layer][kv_head][block] for everybody else; all layers of a page are contiguous. */
#ifndef MEPIC_BACKEND_BACKEND_H
#define MEPIC_BACKEND_BACKEND_H

#include "base/log.h"
#include "base/status.h"
#include "kv/plan.h"
#include "model/model.h"

typedef struct mp_backend mp_backend;

typedef struct mp_backend_config {
    const mp_model *model;       /* borrowed until close */
    uint32_t n_angles;           /* every position and angle of a row or query is below */
    mepic_kv_type kv_type;       /* not DEFAULT */
    uint32_t page_size, n_pages;
    uint32_t max_rows;           /* rows of a step; any of them may want logits */
    uint32_t max_seqs;           /* sequences of the plan, */
    uint32_t max_refs;           /* and cells one of them reads */
    bool whole_steps;            /* every step runs all layers and nobody looks between: may be recorded and replayed */
    uint32_t threads;            /* CPU: 0 = all */
    const char *isa;             /* CPU: NULL = best; else as mepic_engine_options.isa */
    uint32_t device;             /* CUDA: which */
    mepic_weights weights;       /* CUDA: bf16 or fp8; the CPU takes DEFAULT alone */
    float gpu_memory;            /* CUDA: part of the free device memory to use */
    const mp_log *log;
} mp_backend_config;

typedef enum mp_norm { MP_NORM_ATTN, MP_NORM_FFN } mp_norm;

typedef enum mp_proj {
    MP_PROJ_QKV,     /* q, k, v  = products of h */
    MP_PROJ_OUT,     /* x       += product of a */
    MP_PROJ_GATE_UP, /* g, u     = products of h */
    MP_PROJ_DOWN,    /* x       += product of g (after activate) */
} mp_proj;

/* Activations, row-major fp32, for tests and probes. */
typedef enum mp_act {
    MP_ACT_X,      /* [rows, n_embd] residual stream */
    MP_ACT_H,      /* [rows, n_embd] normed */
    MP_ACT_Q,      /* [rows, n_heads * head_dim] */
    MP_ACT_K,      /* [rows, n_kv_heads * head_dim] */
    MP_ACT_V,      /* [rows, n_kv_heads * head_dim] */
    MP_ACT_A,      /* [rows, n_heads * head_dim] attention output */
    MP_ACT_G,      /* [rows, n_ff] */
    MP_ACT_U,      /* [rows, n_ff] */
    MP_ACT_LOGITS, /* [n_logits, n_vocab] */
} mp_act;

/* A row of logits that a token is sampled from. tokens: what stands before it, of which the first n_prompt are the
 * prompt's; the last may be MP_TOKEN_SAMPLED. */
typedef struct mp_sample_row {
    uint32_t logits; /* which row of logits */
    uint32_t seq;    /* of the row: the token is what MP_TOKEN_SAMPLED means there from then on */
    const mepic_sampling *sampling;
    const int32_t *tokens;
    uint32_t n_tokens, n_prompt;
    bool logprob; /* is wanted, to 2e-5 */
} mp_sample_row;

enum { MP_SAMPLE_ON_HOST = -2, MP_SAMPLE_UNDER_WAY = -3 };

typedef struct mp_sampled {
    int32_t token; /* -1: the row has no number; or what is above */
    float logprob; /* of the token, by the logits as they are; where it was wanted and the host did not sample */
} mp_sampled;

typedef struct mp_backend_ops {
    const char *name;     /* "cpu" */
    uint32_t cell_tokens; /* of the plans it reads */
    mepic_kv_type kv_type; /* the usual one, and the usual numbers: */
    uint32_t max_running;  /* requests computed together */
    uint32_t step_tokens;  /* rows of a step */
    bool ahead;            /* the next step may begin before this one was waited for, on tokens nobody else knows */
    uint32_t (*n_devices)(void);     /* that this machine has */
    bool (*usable)(uint32_t device); /* whether open could use it at all */
    /* Bytes for pages when nobody names a number: what is left beside the weights and all else that `config` (whose
     * n_pages does not matter) makes open take. */
    mepic_status (*kv_memory)(const mp_backend_config *config, size_t *bytes, mepic_error *err);
    mepic_status (*open)(const mp_backend_config *config, mp_backend **out, mepic_error *err);
    void (*close)(mp_backend *b);
    /* "cpu/avx512-vnni": with the kernel version, part of the model digest. Valid until close. */
    const char *(*numerics)(const mp_backend *b);

    /* Once, between open and the first step: what steps of decode rows do is recorded, so that a step need not. For
     * i = 0, 1, ..., until record says false: record, a step's operations, recorded. NULL, both: nothing is. */
    bool (*record)(mp_backend *b, uint32_t i);
    mepic_status (*recorded)(mp_backend *b, mepic_error *err);

    /* Brackets of a step: begin borrows `step` until end, fills its spoil_pages with NaN and zeroes its zero_pages; end
     * reports what went wrong so far. At most two steps are under way: begin waits for the last but one. */
    void (*step_begin)(mp_backend *b, const mp_step *step);
    mepic_status (*step_end)(mp_backend *b, mepic_error *err);

    void (*embed)(mp_backend *b);                            /* x = token_embd[row token] */
    void (*norm)(mp_backend *b, mp_norm which, uint32_t layer); /* h = rms_norm(x) * weight */
    void (*project)(mp_backend *b, mp_proj which, uint32_t layer);
    /* Bias and QK-norm on q, k, v where the model has them; k turned by the row's position and k, v stored in the row's
     * slot, rounded to the KV type. q stays unturned: attend turns it per base. */
    void (*store)(mp_backend *b, uint32_t layer);
    void (*attend)(mp_backend *b, uint32_t layer);           /* a = softmax(q k / sqrt(head_dim)) v over the plan */
    void (*activate)(mp_backend *b);                         /* g = silu(g) * u */
    void (*logits)(mp_backend *b);                           /* rows with `logits`: output * rms_norm(x) */

    /* Samples a token for each of rows [n], whose logits ascend, as infer/sample.h says, at most once a step. Each of
     * `out` is MP_SAMPLE_UNDER_WAY then, or MP_SAMPLE_ON_HOST where the host is to sample. NULL: the host samples
     * all, as for the CPU. */
    mepic_status (*sample)(mp_backend *b, const mp_sample_row *rows, uint32_t n, mp_sampled *out, mepic_error *err);
    /* Waits for the step that began `ago` (0 or 1) steps before the last one and says what went wrong so far. `out`
     * [n] as sample left it: what was under way is there now. */
    mepic_status (*wait)(mp_backend *b, uint32_t ago, mp_sampled *out, uint32_t n, mepic_error *err);
    /* [n_vocab] of the last step, valid until logits_row is asked for another row or the next step begins. Host memory.
     * NULL: the device failed, which the next step_end says. */
    const float *(*logits_row)(mp_backend *b, uint32_t i);
    /* Copies rows of an activation out of or into the backend. */
    void (*act_read)(mp_backend *b, mp_act act, uint32_t row, uint32_t n, float *dst);
    void (*act_write)(mp_backend *b, mp_act act, uint32_t row, uint32_t n, const float *src);

    size_t (*page_bytes)(const mp_backend *b);
    /* page_bytes bytes; false: the device failed, which the next step_end says. */
    bool (*page_read)(mp_backend *b, mp_page page, void *dst);
    bool (*page_write)(mp_backend *b, mp_page page, const void *src);
} mp_backend_ops;

/* Every backend's object begins with this. */
struct mp_backend {
    const mp_backend_ops *ops;
};

extern const mp_backend_ops mp_backend_cpu;
extern const mp_backend_ops mp_backend_cuda; /* where it was built: mp_backend_find knows */

/* By name: "cpu", "cuda", "cuda:N"; NULL or "auto" is the first CUDA device if there is one, else the CPU.
 * ERR_ARGUMENT, ERR_UNSUPPORTED (built without CUDA). */
mepic_status mp_backend_find(const char *device, const mp_backend_ops **ops, uint32_t *index, mepic_error *err);

/* Bytes one page takes, before a backend exists (to size the pool). */
size_t mp_kv_page_bytes(const mp_hparams *hp, mepic_kv_type type, uint32_t page_size);

#endif
