/* Synthetic models for tests: in memory, or as a file that is removed when the program ends. Errors fail the test. */
#ifndef MEPIC_TESTS_SUPPORT_TINY_H
#define MEPIC_TESTS_SUPPORT_TINY_H

#include "tools/synth_model.h"

/* The bytes of a model, aligned for mp_gguf_open_memory; free(). */
void *tiny_model_bytes(const mp_synth_spec *spec, size_t *n);
/* Opens a model from memory. Close with mp_model_close, then free(*bytes). */
mp_model *tiny_model_open(const mp_synth_spec *spec, void **bytes);
/* Writes a model to a new temporary file. The path is valid, and the file there, until the program ends. At most 64. */
const char *tiny_model_write(const mp_synth_spec *spec);
/* mp_synth_tiny(MP_ARCH_LLAMA) as a file, written once. */
const char *tiny_model_path(void);

#endif
