/* Policies: what of a request may be shared, as a row of a table. Nobody asks which policy a request has, only what the
 * policy allows. Immutable. */
#ifndef MEPIC_CACHE_POLICY_H
#define MEPIC_CACHE_POLICY_H

#include "base/status.h"

typedef struct mp_policy {
    mepic_reuse reuse;
    const char *name;
    bool shares_prefix; /* pages of private streams are looked up and published under their prefix */
    bool shares_chunks; /* chunks are read in canonical form; else they are text */
} mp_policy;

/* NULL: no such policy. */
const mp_policy *mp_policy_find(mepic_reuse reuse);

#endif
