/* A step's work as the device wants it, made on the host from the step and its plan.
 *
 * Owned by the backend, used by its stepping thread once a step: build() fills the lists in pinned memory, send() puts
 * their copies on the stream. Two steps may be under way: a step is built when the stream has come to the end of the
 * last but one. The device's lists stay where they are from step to step, so kernels and recorded graphs read them
 * through the same pointers. All memory is taken at open.
 *
 * What becomes what:
 *   a row that is the only one of its sequence: a reader of every cell it sees (decode), with a state for each; readers
 *       of the same cell are one item, so its keys are read once (item_readers: or as often as it takes);
 *   rows of a sequence with several, and rows whose states no longer fit the workspace: blocks, which walk their
 *       sequence's cells in order. A step of few blocks would leave most of the device idle: then these rows are
 *       readers too, if their states fit.
 * Either way gives the same bits (fold.cuh). */
#ifndef MEPIC_BACKEND_CUDA_WORK_H
#define MEPIC_BACKEND_CUDA_WORK_H

#include "backend/cuda/device.h"
#include "backend/cuda/kernels.h"
#include "kv/plan.h"

typedef struct mp_cu_lists mp_cu_lists;

typedef struct mp_cu_lists_config {
    uint32_t max_rows, max_seqs, max_refs, n_pages;
    uint32_t max_slots;    /* partial states of one step */
    uint32_t block_rows;   /* rows of a block */
    uint32_t item_readers; /* of an item, at most: those of a tile; 0: no limit */
    uint32_t group;        /* rows of a reader */
    uint32_t n_kv_heads;   /* units of an item */
    uint32_t n_sm;         /* blocks of the decode grid */
    uint32_t few_blocks;   /* fewer blocks than that are few; 0: they never are */
    bool on_host;          /* tests: plain memory, and no device */
} mp_cu_lists_config;

/* Bytes of device memory open takes. */
size_t mp_cu_lists_bytes(const mp_cu_lists_config *config);
/* d: NULL with on_host. ERR_NOMEM. */
mepic_status mp_cu_lists_open(mp_cu_device *d, const mp_cu_lists_config *config, mp_cu_lists **out, mepic_error *err);
void mp_cu_lists_close(mp_cu_lists *lists); /* NULL is a no-op; device memory is the device's */

/* False when the plan reads more pages than the tables hold, which the bounds of `config` exclude. */
bool mp_cu_lists_build(mp_cu_lists *lists, const mp_step *step);
/* Puts the copies of what was built on the device's stream. */
void mp_cu_lists_send(mp_cu_lists *lists, mp_cu_device *d);
/* The device's lists, and the host's that were built. */
const mp_cu_work *mp_cu_lists_work(const mp_cu_lists *lists);
const mp_cu_work *mp_cu_lists_host(const mp_cu_lists *lists);
const uint32_t *mp_cu_lists_zero_pages(const mp_cu_lists *lists); /* device: count, then the pages */

#endif
