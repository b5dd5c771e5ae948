/* Fuzz target: any bytes as a model file. Container, hyper-parameters, weight
 * table and what reads them either refuse or work, and touch nothing outside of
 * the bytes.
 *
 * Seeds are synthetic models, made when the fuzzer offers nothing better, so an
 * empty corpus is a good start. Most mutations go to the header, since bytes of
 * weights are all alike. */
#include <stdlib.h>
#include <string.h>

#include "model/rope.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"
#include "tools/synth_model.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size); /* the library's own */

enum { HEADER = 8192 };

/* The library's limit of 4 KiB is too small for a vocabulary; a limit on the
 * command line still wins. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    static char max_len[] = "-max_len=32768";
    char **longer = calloc((size_t)*argc + 2, sizeof *longer);
    if (!longer) return 0;
    longer[0] = (*argv)[0];
    longer[1] = max_len;
    memcpy(longer + 2, *argv + 1, ((size_t)*argc - 1) * sizeof *longer);
    *argv = longer;
    ++*argc;
    return 0;
}

static size_t make_seed(uint8_t *data, size_t max_size, unsigned seed) {
    static const mp_dtype types[] = { MP_DTYPE_Q4_0, MP_DTYPE_Q8_0, MP_DTYPE_Q5_1, MP_DTYPE_BF16 };
    mp_synth_spec spec = mp_synth_tiny((mp_arch)(seed % 3));
    mp_synth_set_type(&spec, types[seed / 3 % 4]);
    spec.hp.n_layers = 1;
    spec.hp.n_embd = spec.hp.n_ff = 32;
    spec.hp.n_heads = 2;
    spec.hp.rope.scaling = (mp_rope_scaling)(seed / 12 % (spec.hp.arch == MP_ARCH_LLAMA ? 4 : 3));
    spec.tied = true;
    char *bytes = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&bytes, &n);
    if (!f) return 0;
    mp_synth_write(&spec, f, NULL);
    fclose(f);
    if (n > max_size) n = max_size;
    memcpy(data, bytes, n);
    free(bytes);
    return n;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static const uint64_t values[] = { 0,          1,          8,          1ull << 20, INT32_MAX,  1ull << 31,
                                       UINT32_MAX, 1ull << 32, 1ull << 62, INT64_MAX,  1ull << 63, UINT64_MAX };
    uint64_t r = mp_hash64(seed, "mutate", 6);
    if (size < 24) return make_seed(data, max_size, seed);
    if (r % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
    for (uint64_t i = 0; i <= (r >> 8) % 4; i++) {
        uint64_t q = mp_hash64(r, &i, sizeof i), v = values[(q >> 8) % 12];
        size_t limit = size < HEADER ? size : HEADER, at = (q >> 16) % limit, width = (size_t)1 << (q & 3);
        if (q >> 4 & 1) memcpy(&v, data + (q >> 32) % (size - 8), 8); /* or what stands elsewhere */
        if (q >> 5 & 1) v = (uint64_t)data[at] + 1 - (q >> 6 & 2);    /* or one more, one less */
        memcpy(data + at, &v, at + width <= size ? width : size - at);
    }
    return size;
}

static void use_tokenizer(const mp_gguf *gguf) {
    static const char prompt[] = "<|im_start|>the 12 of\xff\n";
    mp_tokenizer *tokenizer;
    mp_chat_template chat;
    mp_tokens tokens = { 0 };
    mepic_error err;
    mp_chat_template_find(gguf, &chat);
    if (mp_tokenizer_open(gguf, &tokenizer, &err) != MEPIC_OK) return;
    if (mp_tokenize(tokenizer, prompt, sizeof prompt - 1, true, true, &tokens, &err) == MEPIC_OK) {
        mp_detokenizer state = { 0 };
        mp_buf text = { .limit = 1 << 20 };
        for (size_t i = 0; i < tokens.n; i++) {
            if ((uint32_t)tokens.ids[i] >= mp_tokenizer_n_vocab(tokenizer)) abort();
            mp_detokenize(tokenizer, &state, tokens.ids[i], &text);
        }
        mp_detokenize_end(&state, &text);
        mp_buf_clear(&text);
    }
    mp_free(tokens.ids);
    mp_tokenizer_close(tokenizer);
}

static void use(const mp_model *model) {
    double freq[128], magnitude;
    mp_rope_frequencies(model, freq, &magnitude);
    for (size_t i = 0; i < mp_gguf_n_tensors(model->gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(model->gguf, i);
        const mp_dtype_info *info = mp_dtype_find((uint32_t)t->type);
        float block[256];
        mp_dtype_dequantize(t->type, t->data, block, info->len);
        mp_dtype_dequantize(t->type, (const uint8_t *)t->data + t->bytes - info->bytes, block, info->len);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1); /* aligned, and its end is guarded */
    if (!copy) return 0;
    memcpy(copy, data, size);
    mp_gguf *gguf;
    mp_model *model;
    mepic_error err;
    if (mp_gguf_open_memory(copy, size, "fuzz", &gguf, &err) == MEPIC_OK) {
        mp_str key;
        char value[64];
        for (size_t i = 0; mp_gguf_describe(gguf, i, &key, value, sizeof value); i++) continue;
        use_tokenizer(gguf);
        if (mp_model_open_gguf(gguf, &model, &err) == MEPIC_OK) {
            use(model);
            mp_model_close(model);
        }
    }
    free(copy);
    return 0;
}
