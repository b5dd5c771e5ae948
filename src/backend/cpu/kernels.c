#include "backend/cpu/kernels.h"

#include <string.h>
#ifdef MP_X86_KERNELS
#include <cpuid.h>
#endif

#include "backend/cpu/kernels_attend.h"
#include "backend/cpu/kernels_matmul.h"
#include "backend/cpu/kernels_rows.h"

/* Best first; the portable set is last and runs everywhere. */
static const mp_cpu_kernels sets[] = {
#ifdef MP_X86_KERNELS
    { "avx512-vnni", &mp_matmul_kernels_avx512vnni, &mp_attend_kernels_avx512, &mp_row_kernels_avx512 },
    { "avx512", &mp_matmul_kernels_avx512, &mp_attend_kernels_avx512, &mp_row_kernels_avx512 },
    { "avx2", &mp_matmul_kernels_avx2, &mp_attend_kernels_avx2, &mp_row_kernels_avx2 },
#endif
    { "portable", &mp_matmul_kernels_portable, &mp_attend_kernels_portable, &mp_row_kernels_portable },
};
enum { N_SETS = sizeof sets / sizeof sets[0] };

#ifdef MP_X86_KERNELS
/* clang 14 does not know this one by name. */
static bool has_f16c(void) {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* Whether processor and system (which must save the wide registers) run it; the builtin looks at both. */
static bool runs(const char *isa) {
#ifdef MP_X86_KERNELS
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(isa, "avx512-vnni") == 0) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (strcmp(isa, "avx512") == 0) return avx512;
    if (strcmp(isa, "avx2") == 0) return avx2;
#endif
    return strcmp(isa, "portable") == 0;
}

const mp_cpu_kernels *mp_cpu_kernels_at(uint32_t i) {
    for (uint32_t s = 0; s < N_SETS; s++) {
        if (runs(sets[s].isa) && i-- == 0) return &sets[s];
    }
    return NULL;
}

/* "avx512" asks for either of its two sets. */
static bool answers_to(const char *isa, const char *asked) {
    return strcmp(isa, asked) == 0 || (strcmp(asked, "avx512") == 0 && strcmp(isa, "avx512-vnni") == 0);
}

mepic_status mp_cpu_kernels_find(const char *isa, const mp_cpu_kernels **out, mepic_error *err) {
    bool known = isa == NULL;
    for (uint32_t s = 0; s < N_SETS; s++) {
        if (isa && !answers_to(sets[s].isa, isa)) continue;
        known = true;
        if (!runs(sets[s].isa)) continue;
        *out = &sets[s];
        return MEPIC_OK;
    }
    if (known) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "isa: this machine cannot run \"%s\"; leave it out to get \"%s\"", isa,
                       mp_cpu_kernels_at(0)->isa);
    }
    return mp_fail(err, MEPIC_ERR_ARGUMENT, "isa: \"%s\" is unknown; there are avx512, avx2 and portable", isa);
}
