/* A step of the model as backend calls. Owns nothing; stepping thread. */
#ifndef MEPIC_INFER_FORWARD_H
#define MEPIC_INFER_FORWARD_H

#include "backend/backend.h"

/* Has the backend record what it likes to (mp_backend_ops.record); once, before the first step. */
mepic_status mp_forward_prepare(mp_backend *backend, const mp_model *model, mepic_error *err);

/* Runs layers [first, last) on the step's rows. A step may be cut into several calls that cover the layers in order:
 * the one with `first` 0 begins the backend's step and embeds, the one with `last` n_layers computes the logits, ends
 * the step and reports what went wrong. */
mepic_status mp_forward(mp_backend *backend, const mp_model *model, const mp_step *step, uint32_t first, uint32_t last,
                        mepic_error *err);

#endif
