/* Synthetic models: GGUF files of any shape with random weights, for tests and benchmarks. The same spec gives the same
 * bytes on every machine. One thread. */
#ifndef MEPIC_TOOLS_SYNTH_MODEL_H
#define MEPIC_TOOLS_SYNTH_MODEL_H

#include <stdio.h>

#include "base/log.h"
#include "model/model.h"

typedef enum mp_synth_role {
    MP_SYNTH_EMBD, MP_SYNTH_OUTPUT, MP_SYNTH_Q, MP_SYNTH_K, MP_SYNTH_V, MP_SYNTH_O, MP_SYNTH_GATE, MP_SYNTH_UP,
    MP_SYNTH_DOWN, MP_SYNTH_N_ROLES,
} mp_synth_role;

typedef struct mp_synth_spec {
    /* Everything but pairs, qkv_bias and qk_norm, which follow from arch. With LLAMA3, factor and original_ctx are
     * those of Llama 3.1's rule (low and high frequency factors 1 and 4). n_vocab: at least that many tokens with the
     * built-in vocabulary, which is padded with unused ones; ignored with a donor. */
    mp_hparams hp;
    mp_dtype types[MP_SYNTH_N_ROLES]; /* norms and biases are F32 */
    bool tied;                        /* no output matrix of its own */
    uint64_t seed;
    uint32_t n_drawn; /* rows of a matrix that are drawn; further ones repeat them. 0 = all */
    const char *chat_template; /* of the built-in vocabulary; NULL = ChatML without tools */
    const char *donor; /* GGUF file whose tokenizer is copied; NULL = built-in: 299 tokens, byte-level BPE, ChatML */
    const mp_log *log; /* progress; NULL = none */
} mp_synth_spec;

/* llama, 2 layers of 64 dimensions, 4 heads on 2 KV heads, F32, untied, built-in vocabulary: a start for variants. */
mp_synth_spec mp_synth_tiny(mp_arch arch);
/* Every weight matrix of `type`. */
void mp_synth_set_type(mp_synth_spec *spec, mp_dtype type);

/* Writes the file from the stream's position; nothing is sought. ERR_ARGUMENT (a row is no multiple of a block; sizes
 * are not checked further: opening the file does that), ERR_IO, ERR_NOMEM, and those of opening the donor. */
mepic_status mp_synth_write(const mp_synth_spec *spec, FILE *out, mepic_error *err);

#endif
