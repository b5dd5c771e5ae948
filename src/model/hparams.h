/* Hyper-parameters from a file's keys, each checked against its range. Called by model.c only; pure. */
#ifndef MEPIC_MODEL_HPARAMS_H
#define MEPIC_MODEL_HPARAMS_H

#include "model/model.h"

/* Fills all but n_vocab, and rope.scaling is never LLAMA3: both are decided by tensors. ERR_FORMAT, ERR_UNSUPPORTED. */
mepic_status mp_hparams_read(const mp_gguf *gguf, mp_hparams *out, mepic_error *err);

#endif
