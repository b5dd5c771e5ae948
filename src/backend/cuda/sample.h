/* Sampling where the logits are: steps and order of infer/sample.h, for all rows of a step in one launch; the host gets
 * token ids.
 *
 * Equal to the host's sampler but for the last bits of exp and of sums: masses are added as 64-bit integers (2^-44 of
 * the most probable token's), so the order of adding does not matter and a row's token depends on that row alone. The
 * draw walks as the host's does: from the most probable down where something truncates, else from the largest id.
 *
 * One to eight blocks of threads a row, from the row in L2; nothing is sorted but the candidates that top-k, top-p or
 * min-p can leave. Owned by the backend; one thread. After open nothing is allocated. */
#ifndef MEPIC_BACKEND_CUDA_SAMPLE_H
#define MEPIC_BACKEND_CUDA_SAMPLE_H

#include "backend/backend.h"
#include "backend/cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A row as the kernel sees it. */
typedef struct mp_cu_draw {
    uint64_t random;    /* mp_hash64_pair(seed, position) */
    uint32_t logits;    /* which row of logits; no two draws of a launch have the same */
    uint32_t first_adjust, n_adjust;
    uint32_t top_k;     /* 0: off */
    float temperature;  /* <= 0: greedy */
    float top_p, min_p; /* 0: off */
    uint32_t logprob;   /* not 0: the token's log-probability by the raw logits */
    uint32_t seq;       /* where the token goes in `tokens`; no two draws of a launch have the same */
    /* Not 0: what `tokens` has there now stands right before this token, and the adjustments do not count it yet. If it
     * is in none of them, it gets these numbers and the row's adjustment of MP_CU_LAST, which is room for it. */
    uint32_t penalizes_last;
    float last_repeat, last_minus;
} mp_cu_draw;

#define MP_CU_LAST (-1)

/* Steps 1 to 3 of the sampler for one token; every token at most once a row. */
typedef struct mp_cu_adjust {
    int32_t token;
    float repeat; /* a positive logit is divided by it, another multiplied; 1: none */
    float minus;  /* then subtracted: presence and frequency penalty, */
    float more;   /* and this instead, if the token comes once more */
    float bias;   /* then added */
} mp_cu_adjust;

/* Kernel: all device memory, but draws and out may be pinned host memory. saved: as long as adjusts. tokens: what was
 * sampled last for each sequence, 0 where nothing could be. Rows of logits are changed while it runs and are as they
 * were when it ends. n_blocks: blocks a row, 1, 2, 4 or 8; more than 1 needs code for 9.0. */
cudaError_t mp_cu_sample_open(void); /* before the first launch on a device; again is harmless */
cudaError_t mp_cu_sample_rows(const mp_cu_draw *draws, uint32_t n, const mp_cu_adjust *adjusts, float *saved,
                              float *logits, uint32_t n_vocab, uint32_t n_blocks, mp_sampled *out, int32_t *tokens,
                              cudaStream_t stream);
/* The number of blocks that is fastest for n rows. */
uint32_t mp_cu_sample_blocks(const mp_cu_device *device, uint32_t n);


/* The host's side: what mp_sample_row says, as draws and adjustments. */
typedef struct mp_cu_sampler mp_cu_sampler;

/* max_rows, max_adjusts: of all rows of a step together. */
mepic_status mp_cu_sampler_open(mp_cu_device *device, uint32_t n_vocab, uint32_t max_rows, uint32_t max_adjusts,
                                uint32_t max_seqs, mp_cu_sampler **out, mepic_error *err);
void mp_cu_sampler_close(mp_cu_sampler *s); /* NULL is a no-op; before the device's */

/* A step: begin, then add rows and run, as often as their logits come in parts. add is false when there is no room for
 * the row or its adjustments; the caller samples it on the host. Two steps may be under way: begin when the stream has
 * come to the end of the last but one. */
void mp_cu_sampler_begin(mp_cu_sampler *s);
bool mp_cu_sampler_add(mp_cu_sampler *s, const mp_sample_row *row);
bool mp_cu_sampler_run(mp_cu_sampler *s, float *logits, cudaStream_t stream); /* false: noted in the device */
/* [rows added] in their order, of the step that was begun `ago` (0 or 1) before the last; pinned, and there once the
 * stream has come so far. */
const mp_sampled *mp_cu_sampler_drawn(const mp_cu_sampler *s, uint32_t ago);
/* Device: [max_seqs] as above. */
const int32_t *mp_cu_sampler_tokens(const mp_cu_sampler *s);

#ifdef __cplusplus
}
#endif

#endif
