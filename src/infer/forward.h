/* One step of the model as backend calls. Owns nothing; stepping thread. */
#ifndef MEPIC_INFER_FORWARD_H
#define MEPIC_INFER_FORWARD_H

#include "backend/backend.h"

/* Runs layers [first, last) on the step's rows; embeds first when `first` is 0, computes logits when `last` is n_layers. */
mepic_status mp_forward(mp_backend *backend, const mp_model *model, const mp_step *step, uint32_t first, uint32_t last,
                        mepic_error *err);

#endif
