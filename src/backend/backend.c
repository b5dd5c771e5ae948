#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>

mepic_status mp_backend_find(const char *device, const mp_backend_ops **ops, uint32_t *index, mepic_error *err) {
    bool any = !device || !*device || strcmp(device, "auto") == 0;
    *ops = &mp_backend_cpu;
    *index = 0;
    if (!any && strcmp(device, "cpu") == 0) return MEPIC_OK;
    const char *number = any || strcmp(device, "cuda") == 0 ? "0" : strncmp(device, "cuda:", 5) == 0 ? device + 5 : "";
    if (strlen(number) == 0 || strlen(number) > 3 || strspn(number, "0123456789") != strlen(number)) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "device is \"%.32s\"; it must be auto, cpu, cuda or cuda:N", device);
    }
#ifdef MEPIC_CUDA
    uint32_t n_devices = any ? mp_backend_cuda.n_devices() : 0, first = 0;
    while (first < n_devices && !mp_backend_cuda.usable(first)) first++;
    if (any && first == n_devices) return MEPIC_OK;
    *ops = &mp_backend_cuda;
    *index = any ? first : (uint32_t)strtoul(number, NULL, 10);
    return MEPIC_OK;
#else
    if (any) return MEPIC_OK;
    return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                   "device is \"%.32s\", but this library was built without CUDA; build it "
                   "where nvcc is found, or use cpu",
                   device);
#endif
}

size_t mp_kv_page_bytes(const mp_hparams *hp, mepic_kv_type type, uint32_t page_size) {
    size_t token = 2 * (size_t)hp->head_dim * (type == MEPIC_KV_F32 ? 4 : 2);
    if (type == MEPIC_KV_FP8) token = 2 * (size_t)hp->head_dim + 8; /* an angle and two scales */
    return (size_t)hp->n_layers * hp->n_kv_heads * page_size * token;
}
