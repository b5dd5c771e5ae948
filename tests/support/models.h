/* Models for tests: tiny synthetic ones, opened once a program, and real ones from the model cache. */
#ifndef MEPIC_TESTS_MODELS_H
#define MEPIC_TESTS_MODELS_H

#include <stdbool.h>
#include <stddef.h>

#include "model/model.h"

typedef enum tiny_kind {
    TINY_LLAMA, /* adjacent pairs, tied output */
    TINY_QWEN2, /* halves, q k v bias */
    TINY_QWEN3, /* halves, QK-norm, head_dim apart from n_embd / n_heads */
    TINY_YARN,  /* llama with YaRN scaling and partial rotation */
    TINY_COUNT,
} tiny_kind;

#define SMOLLM2 "SmolLM2-135M-Instruct.Q4_1.gguf"
#define QWEN_0_5B "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
#define QWEN_1_5B "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
#define GEMMA3_270M "gemma3-270m-q4_k_m.gguf"

extern uint32_t tiny_head_dim; /* of all tiny models from now on; 0 = 16 or 32 */
const mp_model *tiny_model(tiny_kind kind);   /* valid until tiny_models_close */
const mp_model *real_model(const char *file); /* NULL: not in the cache */
void tiny_models_close(void);

/* The path of a file where `./dev models` keeps them; false: not there. */
bool real_model_find(const char *file, char *path, size_t cap);

#endif
