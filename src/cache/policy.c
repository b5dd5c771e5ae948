#include "cache/policy.h"

static const mp_policy policies[] = {
    { .reuse = MEPIC_REUSE_NONE, .name = "none" },
    { .reuse = MEPIC_REUSE_PREFIX, .name = "prefix", .shares_prefix = true },
    { .reuse = MEPIC_REUSE_MEPIC, .name = "mepic", .shares_prefix = true, .shares_chunks = true },
};

const mp_policy *mp_policy_find(mepic_reuse reuse) {
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
        if (policies[i].reuse == reuse) return &policies[i];
    }
    return NULL;
}
