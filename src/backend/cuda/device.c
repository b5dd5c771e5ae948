#include "backend/cuda/device.h"

#include <stdio.h>
#include <string.h>

#include "backend/cuda/kernels.h"
#include "base/mem.h"

struct mp_cu_allocation {
    mp_cu_allocation *next;
    void *data;
    bool pinned;
};

uint32_t mp_cu_device_count(void) {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 ? (uint32_t)n : 0;
}

bool mp_cu_check(mp_cu_device *d, cudaError_t error, const char *what, const char *file, int line) {
    if (error != cudaSuccess && d->error == cudaSuccess) {
        d->error = error;
        d->what = what;
        d->file = file;
        d->line = line;
    }
    return d->error == cudaSuccess;
}

mepic_status mp_cu_status(const mp_cu_device *d, mepic_error *err) {
    if (d->error == cudaSuccess) return MEPIC_OK;
    const char *slash = d->file ? strrchr(d->file, '/') : NULL;
    bool no_memory = d->error == cudaErrorMemoryAllocation;
    const char *help = no_memory || d->error == cudaErrorInvalidValue ? "close the engine, and open it again"
                                                                      : "restart the program"; /* the context is lost */
    /* What to do comes before the place: the engine keeps the beginning. */
    return mp_fail(err, no_memory ? MEPIC_ERR_NOMEM : MEPIC_ERR_BROKEN, "CUDA device %d (%s): %s; %s (%s:%d: %.120s)",
                   d->id, d->name, cudaGetErrorString(d->error), help, slash ? slash + 1 : "", d->line,
                   d->what ? d->what : "");
}

static mepic_status check_device(mp_cu_device *d, uint32_t id, mepic_error *err) {
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess && error != cudaErrorNoDevice) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "CUDA cannot be used: %s; install an NVIDIA driver, or use the CPU",
                       cudaGetErrorString(error));
    }
    if (id >= (uint32_t)n) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "there is no CUDA device %u: this machine has %d", id, n);
    }
    struct cudaDeviceProp prop;
    error = cudaGetDeviceProperties(&prop, (int)id);
    if (error != cudaSuccess) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "CUDA device %u: %s", id, cudaGetErrorString(error));
    }
    d->id = (int)id;
    d->arch = (uint32_t)(prop.major * 10 + prop.minor);
    d->n_sm = (uint32_t)prop.multiProcessorCount;
    snprintf(d->name, sizeof d->name, "%.63s", prop.name);
    if (d->arch < 80) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED, "CUDA device %u (%s) has compute capability %d.%d; 8.0 is needed",
                       id, d->name, prop.major, prop.minor);
    }
    return MEPIC_OK;
}

uint32_t mp_cu_code(uint32_t arch, uint32_t compiled) {
    return compiled < 90 && compiled < arch ? compiled : arch;
}

bool mp_cu_device_usable(uint32_t id) {
    mp_cu_device d = { 0 };
    uint32_t compiled;
    return check_device(&d, id, NULL) == MEPIC_OK && cudaSetDevice(d.id) == cudaSuccess &&
           mp_cu_kernels_arch(&compiled) == cudaSuccess;
}

mepic_status mp_cu_device_open(uint32_t id, mp_cu_device *out, mepic_error *err) {
    mp_cu_device d = { 0 };
    mepic_status status = check_device(&d, id, err);
    if (status != MEPIC_OK) return status;
    uint32_t compiled = 0;
    cudaError_t error = cudaSetDevice(d.id);
    if (error == cudaSuccess) error = mp_cu_kernels_arch(&compiled);
    d.code = mp_cu_code(d.arch, compiled);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "this build has no kernels for CUDA device %u (%s), compute capability %u.%u; name it in "
                       "MEPIC_CUDA_ARCHITECTURES when building, or use the CPU",
                       id, d.name, d.arch / 10, d.arch % 10);
    }
    bool ok = CUDA_TRY(&d, error) && CUDA_TRY(&d, cudaMemGetInfo(&d.bytes_free, &d.bytes_total)) &&
              CUDA_TRY(&d, cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking));
    if (!ok) return mp_cu_status(&d, err);
    *out = d;
    return MEPIC_OK;
}

void mp_cu_device_close(mp_cu_device *d) {
    if (d->stream) {
        cudaSetDevice(d->id);
        cudaStreamSynchronize(d->stream);
        cudaStreamDestroy(d->stream);
    }
    while (d->allocations) mp_cu_drop(d, d->allocations->data);
    *d = (mp_cu_device){ 0 };
}

void mp_cu_drop(mp_cu_device *d, void *taken) {
    for (mp_cu_allocation **at = &d->allocations; taken && *at; at = &(*at)->next) {
        mp_cu_allocation *a = *at;
        if (a->data != taken) continue;
        *at = a->next;
        if (a->pinned) {
            cudaFreeHost(a->data);
        } else {
            cudaFree(a->data);
        }
        mp_free(a);
        return;
    }
}

static mepic_status take(mp_cu_device *d, size_t bytes, bool pinned, const char *what, void **out, mepic_error *err) {
    mp_cu_allocation *a = mp_calloc(1, sizeof *a);
    if (!a) return mp_fail_nomem(err, what, sizeof *a);
    cudaError_t error = cudaSetDevice(d->id);
    if (error == cudaSuccess) {
        error = pinned ? cudaMallocHost(&a->data, bytes ? bytes : 1) : cudaMalloc(&a->data, bytes ? bytes : 1);
    }
    if (error != cudaSuccess) {
        size_t room = 0, total = 0;
        cudaGetLastError(); /* running out is no state of the device */
        cudaMemGetInfo(&room, &total);
        mp_free(a);
        if (error != cudaErrorMemoryAllocation) {
            CUDA_TRY(d, error);
            return mp_cu_status(d, err);
        }
        return mp_fail(
            err, MEPIC_ERR_NOMEM,
            "%s takes %zu MiB of %s, but CUDA device %d (%s) has %zu of %zu MiB free; lower gpu_memory, pages "
            "or step_tokens, or use a smaller model",
            what, bytes >> 20, pinned ? "pinned host memory" : "device memory", d->id, d->name, room >> 20,
            total >> 20);
    }
    a->pinned = pinned;
    a->next = d->allocations;
    d->allocations = a;
    *out = a->data;
    return MEPIC_OK;
}

mepic_status mp_cu_take(mp_cu_device *d, size_t bytes, const char *what, void **out, mepic_error *err) {
    return take(d, bytes, false, what, out, err);
}

mepic_status mp_cu_take_pinned(mp_cu_device *d, size_t bytes, const char *what, void **out, mepic_error *err) {
    return take(d, bytes, true, what, out, err);
}
