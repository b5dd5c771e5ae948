/* Engine options: every value checked and named, defaults filled in where they need no model. Pure. */
#ifndef MEPIC_ENGINE_OPTIONS_H
#define MEPIC_ENGINE_OPTIONS_H

#include "base/status.h"

enum { MP_DEFAULT_LINK_TOKENS = 16 };

/* Copies `in` (of any known size) over a zeroed `out` and fills in defaults; strings are borrowed as in `in`. What is
 * left zero depends on the model: pages, context. ERR_ARGUMENT. */
mepic_status mp_options_resolve(const mepic_engine_options *in, mepic_engine_options *out, mepic_error *err);

/* Copies a caller's struct, which starts with its size in bytes (at least `least`), over `out` [known] bytes: an older,
 * shorter one leaves the rest zero, a longer one may only hold zeros there. ERR_ARGUMENT naming `what`. */
mepic_status mp_options_copy(const void *in, size_t least, void *out, size_t known, const char *what, mepic_error *err);

/* The scheduler's number of linked tokens (0 nothing, UINT32_MAX everything) for a MEPIC_LINK_* or plain count. */
uint32_t mp_options_link(uint32_t link_tokens, uint32_t otherwise);

#endif
