/* The GPU as the backend holds it: device, stream, allocations, and the first error that made it unusable.
 *
 * Owned by the backend, used by its stepping thread. A CUDA error is sticky: after it every call of the context fails,
 * so the first one is kept with its place, and what comes later is not looked at. No state outside this struct: two
 * engines in one process, on one device or two, do not know of each other. */
#ifndef MEPIC_BACKEND_CUDA_DEVICE_H
#define MEPIC_BACKEND_CUDA_DEVICE_H

#include <cuda_runtime_api.h>

#include "base/status.h"

typedef struct mp_cu_allocation mp_cu_allocation;

typedef struct mp_cu_device {
    int id;
    uint32_t arch; /* compute capability times 10: 80, 89, 90 */
    uint32_t code; /* arch, or less where the kernels were compiled for less: what may be asked of them */
    uint32_t n_sm;
    char name[64];
    size_t bytes_total, bytes_free; /* bytes_free: when it was opened */
    cudaStream_t stream;
    mp_cu_allocation *allocations;  /* everything taken, freed by close */
    cudaError_t error;              /* the first one; cudaSuccess: none */
    const char *what, *file;        /* where it was met */
    int line;
} mp_cu_device;

/* How many devices there are; 0 also without a driver. */
uint32_t mp_cu_device_count(void);
/* mp_cu_device.code of a device of capability `arch` whose kernels were compiled for `compiled`: code for 9.0 and more
 * asks the device for what it has (clusters, early launches), older code knows nothing of that. */
uint32_t mp_cu_code(uint32_t arch, uint32_t compiled);
/* Whether the kernels that were built run on it. */
bool mp_cu_device_usable(uint32_t id);
/* ERR_ARGUMENT (no such device), ERR_UNSUPPORTED (too old, or no driver), ERR_NOMEM. */
mepic_status mp_cu_device_open(uint32_t id, mp_cu_device *out, mepic_error *err);
/* Waits for the stream and frees everything. A zeroed struct is a no-op. */
void mp_cu_device_close(mp_cu_device *d);

/* Device or pinned host memory that lives until close; ERR_NOMEM says what it was for, how much is free and how much
 * there is. Contents undefined. */
mepic_status mp_cu_take(mp_cu_device *d, size_t bytes, const char *what, void **out, mepic_error *err);
mepic_status mp_cu_take_pinned(mp_cu_device *d, size_t bytes, const char *what, void **out, mepic_error *err);
/* Frees what was taken before close, once the device is done with it; NULL is a no-op. Waits for the device. */
void mp_cu_drop(mp_cu_device *d, void *taken);

/* Notes the first error; true when there is none. Used through CUDA_TRY. */
bool mp_cu_check(mp_cu_device *d, cudaError_t error, const char *what, const char *file, int line);
#define CUDA_TRY(device, call) mp_cu_check(device, call, #call, __FILE__, __LINE__)
/* The noted error as a status: OK, ERR_NOMEM or ERR_BROKEN. */
mepic_status mp_cu_status(const mp_cu_device *d, mepic_error *err);

#endif
