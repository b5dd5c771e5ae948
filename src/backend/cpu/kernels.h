/* The functions compiled once per instruction set, as a table; chosen at open. */
#ifndef MEPIC_BACKEND_CPU_KERNELS_H
#define MEPIC_BACKEND_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct mp_cpu_kernels mp_cpu_kernels;
struct mp_matmul_kernels; /* kernels_matmul.h */
struct mp_attend_kernels; /* kernels_attend.h */
struct mp_row_kernels;    /* kernels_rows.h */

struct mp_cpu_kernels {
    const char *isa; /* "avx512-vnni", "avx512", "avx2", "portable" */
    const struct mp_matmul_kernels *matmul;
    const struct mp_attend_kernels *attend;
    const struct mp_row_kernels *rows;
};

/* The best set this machine runs, or the one asked for: "avx512" (with VNNI where there), "avx2", "portable".
 * ERR_ARGUMENT for a name that is unknown or that this machine cannot run. */
mepic_status mp_cpu_kernels_find(const char *isa, const mp_cpu_kernels **out, mepic_error *err);
/* The i-th set this machine runs, best first; NULL at the end. For tests over all of them. */
const mp_cpu_kernels *mp_cpu_kernels_at(uint32_t i);

#endif
