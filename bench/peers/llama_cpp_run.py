"""One measurement with llama.cpp, through llama-cpp-python; run by compare.py in a process of its own.

    llama_cpp_run.py MODEL decode|prefill CONTEXT TOKENS THREADS FLASH REPACK

decode: TOKENS single-token steps after CONTEXT tokens; prefill: TOKENS tokens in one batch after CONTEXT tokens. Logits
of the last token are computed, as for serving. Prints tokens per second: the median of three, after a warm-up.
"""
import statistics
import sys
import time

import llama_cpp as lib

quiet = lib.llama_log_callback(lambda level, text, data: None)  # the library keeps a pointer to it


def open_model(path, repack):
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repack
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"llama.cpp cannot open {path}")
    return model


def open_context(model, n_ctx, threads, flash):
    params = lib.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 1 if flash else 0
    context = lib.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp cannot open a context")
    return context


def feed(context, n_vocab, start, n, step):
    """Computes n tokens in batches of `step`; which tokens does not matter for the time."""
    for first in range(start, start + n, step):
        count = min(step, start + n - first)
        tokens = (lib.llama_token * count)(*(1000 + (first + i) * 7919 % (n_vocab - 2000) for i in range(count)))
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)) != 0:
            sys.exit("llama_decode failed")
        lib.llama_synchronize(context)


def main():
    path, what, context_len, n, threads, flash, repack = sys.argv[1:]
    context_len, n, threads = int(context_len), int(n), int(threads)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model = open_model(path, repack == "1")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    context = open_context(model, context_len + n + 64, threads, flash == "1")
    memory = lib.llama_get_memory(context)
    step = 1 if what == "decode" else n
    if context_len:
        feed(context, n_vocab, 0, context_len, 512)
    rates = []
    for attempt in range(4):
        lib.llama_memory_seq_rm(memory, 0, context_len, -1)
        began = time.perf_counter()
        feed(context, n_vocab, context_len, n, step)
        if attempt:
            rates.append(n / (time.perf_counter() - began))
    print(f"{statistics.median(rates):.2f}")


main()
