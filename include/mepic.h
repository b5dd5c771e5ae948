/* mepic.h: an LLM serving engine whose KV cache is position-independent and stored once.
 *
 * A prompt is a list of segments: TEXT is specific to the request, a CHUNK is content that many requests repeat (a
 * document, a code file, a tool result). The KV of a chunk is computed once, kept once, and read by every request that
 * contains the chunk, at whatever position (arXiv 2512.16822). An answer never depends on what happens to be cached.
 *
 *     mepic_engine_options opt = { .size = sizeof opt, .model_path = "model.gguf" };
 *     mepic_engine *engine;
 *     mepic_error err;
 *     if (mepic_engine_open(&opt, &engine, &err) != MEPIC_OK) { fprintf(stderr, "%s\n", err.message); return 2; }
 *     ... mepic_prepare, mepic_submit, then: while (mepic_busy(engine)) { mepic_step(engine, &err); mepic_poll(...); }
 *     mepic_engine_close(engine);
 *
 * tests/use.c is the whole of that example and is compiled and run by the gate.
 *
 * Threads. An engine belongs to one thread, the one that calls mepic_step. Exceptions, callable from any thread while
 * the engine is open: mepic_prepare, mepic_prepared_free, mepic_tokenize, mepic_detokenize, mepic_model_info_read and
 * mepic_cancel. Two engines in one process do not know of each other.
 * Lifetimes. Strings passed in are copied or used during the call only. What a pointer in an event points to is valid
 * until the next call of mepic_step or mepic_poll on that engine.
 * Errors. Every fallible function returns a mepic_status; `err` may be NULL, else it receives the same status and one
 * sentence that names the culprit and says what to do. Outputs are written on success only.
 * Options and requests carry their size as first field and are append-only; a zero means the default. */
#ifndef MEPIC_H
#define MEPIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEPIC_VERSION "0.1.0"

/* ---- Status ------------------------------------------------------------------------------------------------------ */

/* name, value, what it means */
#define MEPIC_STATUS_MAP(X)                                                                   \
    X(OK, 0, "ok")                                                                            \
    X(ERR_ARGUMENT, 1, "an argument or option is wrong; the message names it")                \
    X(ERR_IO, 2, "a file could not be read or written")                                       \
    X(ERR_FORMAT, 3, "a file or text is malformed")                                           \
    X(ERR_UNSUPPORTED, 4, "well-formed, but not supported (architecture, type, feature)")     \
    X(ERR_NOMEM, 5, "out of memory")                                                          \
    X(ERR_BUSY, 6, "the queue is full; try again later")                                      \
    X(ERR_TOO_LONG, 7, "can never fit: longer than the context or the page pool")             \
    X(ERR_NOT_FOUND, 8, "no such request, chunk or file")                                     \
    X(ERR_BROKEN, 9, "the engine met a fault it cannot recover from; close it")               \
    X(ERR_FAILED, 10, "a request failed alone; the engine goes on")

typedef enum mepic_status {
#define X(name, value, text) MEPIC_##name = value,
    MEPIC_STATUS_MAP(X)
#undef X
} mepic_status;

typedef struct mepic_error {
    mepic_status status;
    char message[512]; /* UTF-8, one sentence, no newline */
} mepic_error;

/* The name of a status, as "ERR_BUSY"; never NULL. */
const char *mepic_status_name(mepic_status status);

/* ---- Engine ------------------------------------------------------------------------------------------------------ */

typedef struct mepic_engine mepic_engine;

/* How reusable KV is found, shared and repaired (docs/ARCHITECTURE.md). */
typedef enum mepic_reuse {
    MEPIC_REUSE_DEFAULT = 0, /* in a request: the engine's; in engine options: MEPIC_REUSE_MEPIC */
    MEPIC_REUSE_NONE = 1,    /* every token is computed, nothing is shared */
    MEPIC_REUSE_PREFIX = 2,  /* equal beginnings of prompts are shared */
    MEPIC_REUSE_MEPIC = 3,   /* chunks are shared at any position, beginnings as well */
} mepic_reuse;

/* CPU: f16, bf16 or f32. CUDA: bf16; or fp8 (e4m3), about half the bytes a token, further from exact. */
typedef enum mepic_kv_type {
    MEPIC_KV_DEFAULT = 0,
    MEPIC_KV_F16 = 1,
    MEPIC_KV_BF16 = 2,
    MEPIC_KV_F32 = 3,
    MEPIC_KV_FP8 = 4
} mepic_kv_type;
/* What weights are kept and multiplied as. FP8: e4m3 with a scale an output, and the rows they multiply in e4m3 with a
 * scale a row; token embeddings and the output matrix stay in bf16. */
typedef enum mepic_weights { MEPIC_WEIGHTS_DEFAULT = 0, MEPIC_WEIGHTS_BF16 = 1, MEPIC_WEIGHTS_FP8 = 2 } mepic_weights;
typedef enum mepic_eviction { MEPIC_EVICT_DEFAULT = 0, MEPIC_EVICT_S3FIFO = 1, MEPIC_EVICT_LRU = 2 } mepic_eviction;
typedef enum mepic_log_level { MEPIC_LOG_ERROR, MEPIC_LOG_WARN, MEPIC_LOG_INFO, MEPIC_LOG_DEBUG } mepic_log_level;

/* link_tokens: nothing of a chunk is recomputed. (0 means the default, 16.) */
#define MEPIC_LINK_NONE UINT32_MAX
/* link_tokens: at least this many recomputes a whole chunk, whatever its length. */
#define MEPIC_LINK_ALL (UINT32_MAX - 1)

typedef struct mepic_engine_options {
    size_t size;                   /* sizeof(mepic_engine_options) */
    const char *model_path;        /* GGUF file */
    uint32_t threads;              /* 0 = the cores this process may use */
    uint32_t page_size;            /* tokens a page: 16 (default), 32, 64 or 128 */
    uint32_t pages;                /* pages of the pool; 0 = as many as kv_memory holds */
    size_t kv_memory;              /* bytes for the pool; 0 = CPU: a quarter of the machine's memory, at most 4 GiB;
                                    * CUDA: what gpu_memory leaves beside the weights */
    uint32_t context;              /* longest request in tokens, prompt and reply; 0 = what the model was trained for */
    uint32_t max_running;          /* requests computed together; 0 = 64, on CUDA 256 */
    uint32_t max_queued;           /* requests waiting; 0 = 1024 */
    uint32_t step_tokens;          /* most rows a step computes; 0 = 512, on CUDA 2048 */
    mepic_kv_type kv_type;         /* default f16; bf16 on CUDA */
    mepic_reuse reuse;             /* default policy of a request */
    uint32_t link_tokens;          /* tokens recomputed at the head of every chunk; 0 = 16, see MEPIC_LINK_* */
    mepic_eviction eviction;       /* default S3-FIFO */
    const char *canonical_context; /* file with the text chunks are computed after; NULL = built-in, "" = none */
    const char *cache_dir;         /* where the canonical context's KV is kept over restarts; NULL = nowhere */
    const char *isa;               /* "avx512", "avx2", "portable"; NULL = the best this machine has */
    bool hash_logits;              /* fill mepic_done.logits_hash (costs one pass over each row of logits) */
    void (*log)(void *user, mepic_log_level level, const char *message);            /* NULL = silent */
    void (*progress)(void *user, const char *what, uint64_t done, uint64_t total); /* loading; NULL = none */
    void *user;                                                                     /* for log and progress */
    const char *device;            /* "cpu", "cuda", "cuda:N"; NULL or "auto" = the first CUDA device, else the CPU */
    float gpu_memory;              /* part of the free device memory to use, above 0 to 1; 0 = 0.9 */
    mepic_weights weights;         /* default: as they are in the file, on CUDA bf16; fp8: CUDA, Hopper only */
} mepic_engine_options;

/* Maps and checks the model, repacks its weights, allocates everything a step needs.
 * ERR_ARGUMENT, ERR_IO, ERR_FORMAT, ERR_UNSUPPORTED, ERR_NOMEM. */
mepic_status mepic_engine_open(const mepic_engine_options *options, mepic_engine **out, mepic_error *err);
/* Cancels what runs and frees everything. NULL is a no-op. */
void mepic_engine_close(mepic_engine *engine);

typedef struct mepic_model_info {
    char name[64];            /* general.name, cut */
    char architecture[32];
    char file_types[64];      /* weight types by bytes, as "Q5_0 Q8_0 F32" */
    char chat_family[32];     /* "chatml", "llama3", ...; "none" if the model has no known template */
    char backend[32];         /* "cpu/avx512-vnni/1" */
    uint64_t parameters, file_bytes;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_vocab, trained_context, context;
    uint32_t page_size, pages, page_bytes;
    bool position_exact;      /* whether `mepic` reuse is exact for this model's position encoding */
    char tool_format[16];     /* how replies call tools: "hermes" ({"name", "arguments"} in <tool_call>), "none" */
} mepic_model_info;
void mepic_model_info_read(const mepic_engine *engine, mepic_model_info *out);

/* ---- Tokens ------------------------------------------------------------------------------------------------------ */

/* Token ids of `text`. Writes at most `cap` ids to `out`; `*n` receives the full count (so a first call may have cap
 * 0). parse_special: text such as "<|im_end|>" becomes the special token. Any bytes are tokenized. ERR_ARGUMENT (text
 * is NULL and len is not 0), ERR_NOMEM. */
mepic_status mepic_tokenize(const mepic_engine *engine, const char *text, size_t len, bool parse_special, int32_t *out,
                            size_t cap, size_t *n, mepic_error *err);
/* The bytes of token ids. Writes at most `cap` bytes, `*n` receives the full count. ERR_ARGUMENT: id out of range. */
mepic_status mepic_detokenize(const mepic_engine *engine, const int32_t *ids, size_t n_ids, char *out, size_t cap,
                              size_t *n, mepic_error *err);

/* ---- Prompts ----------------------------------------------------------------------------------------------------- */

typedef enum mepic_segment_kind { MEPIC_TEXT = 0, MEPIC_CHUNK = 1 } mepic_segment_kind;

/* A part of a prompt. Each segment is tokenized on its own. Give text or tokens; of neither, it takes no place.
 * A CHUNK under 64 tokens, or longer than an eighth of the pool, is computed like text (mepic_stats.short_chunks). */
typedef struct mepic_segment {
    mepic_segment_kind kind;
    const char *text;      /* UTF-8; invalid bytes are taken as U+FFFD */
    size_t len;            /* bytes */
    const int32_t *tokens; /* [n_tokens], used instead of text when not NULL */
    size_t n_tokens;
    bool parse_special;    /* special tokens in text are parsed; leave it off for what users wrote */
    bool no_cache;         /* a CHUNK that is computed in the request like text */
    bool common;           /* a CHUNK that is shared in the common scope, whatever the request's: it is no secret */
} mepic_segment;

/* A call of a tool that the assistant made. */
typedef struct mepic_tool_call {
    const char *name;
    const char *arguments; /* a JSON object, as text */
} mepic_tool_call;

typedef struct mepic_message {
    const char *role; /* "system", "user", "assistant", "tool" (the result of a call) */
    const mepic_segment *parts;
    size_t n_parts;
    const mepic_tool_call *calls; /* of an assistant, behind its parts */
    size_t n_calls;
} mepic_message;

/* A prompt is either messages, rendered by the model's chat template, or segments, taken as they are. */
typedef struct mepic_prompt {
    size_t size;
    const mepic_message *messages;
    size_t n_messages;
    const mepic_segment *segments; /* used when n_messages is 0 */
    size_t n_segments;
    bool no_bos;                   /* segments only: do not put the model's BOS in front */
    const char *const *tools;      /* messages only: each a JSON object, {"type": "function", "function": {"name",
                                    * "description", "parameters"}}, shown to the model as it is written */
    size_t n_tools;
} mepic_prompt;

typedef struct mepic_prepared mepic_prepared; /* immutable; may be submitted many times */

/* Renders and tokenizes; keeps nothing of `prompt`. Any thread. ERR_ARGUMENT (empty prompt, unknown role, a token that
 * is not in the vocabulary), ERR_UNSUPPORTED (messages for a model without a known chat template, tools or calls for
 * one whose template has none), ERR_TOO_LONG (more than INT32_MAX tokens; the context is checked by mepic_submit),
 * ERR_NOMEM. */
mepic_status mepic_prepare(const mepic_engine *engine, const mepic_prompt *prompt, mepic_prepared **out,
                           mepic_error *err);
/* NULL is a no-op. Requests that were submitted with it go on. */
void mepic_prepared_free(mepic_prepared *prepared);
/* The tokens of the whole prompt, in order; valid as long as `prepared`. */
const int32_t *mepic_prepared_tokens(const mepic_prepared *prepared, size_t *n);

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

typedef uint64_t mepic_request_id;

/* In this order: penalties, bias, temperature, top_k, top_p of what is left, min_p of what is left, one draw. */
typedef struct mepic_sampling {
    float temperature;      /* <= 0: greedy; at most 100 */
    uint32_t top_k;         /* 0 = off */
    float top_p;            /* 0 or >= 1 = off */
    float min_p;            /* 0 = off */
    float repeat_penalty;   /* 0 or 1 = off; at most 100; over the last repeat_window tokens */
    uint32_t repeat_window; /* 0 = 64 */
    float presence_penalty, frequency_penalty; /* -100 to 100, over the reply */
    uint64_t seed;          /* a token depends on (seed, position, logits, tokens before it) only */
    const struct mepic_logit_bias { int32_t token; float bias; } *logit_bias;
    size_t n_logit_bias; /* each from -1e6 to 1e6, added to the token's logit */
} mepic_sampling;

/* Sees the logits of rows on the stepping thread: `position` of the row's token in the prompt and `logits` [n_vocab],
 * valid during the call. Of the engine it may call mepic_cancel only. */
typedef void (*mepic_logits_fn)(void *user, uint32_t position, const float *logits, uint32_t n_vocab);

typedef struct mepic_request {
    size_t size;
    const mepic_prepared *prompt;
    mepic_sampling sampling;
    uint32_t max_tokens;          /* 0 = until the context is full */
    const char *const *stop;      /* strings of 1 to 1024 bytes that end the reply and are not part of it */
    size_t n_stop;                /* at most 16 */
    const int32_t *stop_tokens;   /* besides the model's end-of-turn tokens */
    size_t n_stop_tokens;         /* at most 256 */
    bool ignore_eos;
    uint32_t top_logprobs;        /* log-probabilities with each token, 0..20 alternatives */
    bool logprobs;
    mepic_reuse reuse;
    uint32_t link_tokens;         /* 0 = the engine's */
    const char *scope;            /* cached content is shared within a scope only; NULL = the common one */
    mepic_logits_fn on_logits;    /* NULL = none */
    bool logits_of_prompt;        /* on_logits also sees every prompt row that is computed */
    void *user;                   /* for on_logits, and returned in events */
} mepic_request;

/* Queues a request. ERR_ARGUMENT, ERR_BUSY (queue full), ERR_TOO_LONG (the message has the numbers), ERR_NOMEM,
 * ERR_BROKEN. */
mepic_status mepic_submit(mepic_engine *engine, const mepic_request *request, mepic_request_id *out, mepic_error *err);
/* Asks for the end of a request; it ends with finish MEPIC_FINISH_CANCELLED within two steps. Any thread.
 * Unknown and ended ids are ignored. */
void mepic_cancel(mepic_engine *engine, mepic_request_id id);

/* True while a request is queued or running, or an event waits. A broken engine is busy with events only. */
bool mepic_busy(const mepic_engine *engine);
/* Computes one batch. On a GPU it begins one and gives the events of the one that the last call began, so that the GPU
 * is never without work. ERR_BUSY: events of the last step were not polled yet, nothing was done. ERR_BROKEN: the
 * engine is poisoned, every later call says so, close works. */
mepic_status mepic_step(mepic_engine *engine, mepic_error *err);

typedef enum mepic_finish {
    MEPIC_FINISH_STOP = 0,   /* end-of-turn token, stop token or stop string */
    MEPIC_FINISH_LENGTH = 1, /* max_tokens, or the context or the pool is full */
    MEPIC_FINISH_CANCELLED = 2,
    MEPIC_FINISH_FAILED = 3, /* this request alone; the event says why */
} mepic_finish;

/* Where each prompt token's KV came from. The five parts add up to prompt_tokens. */
typedef struct mepic_usage {
    uint32_t prompt_tokens;
    uint32_t prefix_tokens;   /* reused: prefix cache */
    uint32_t chunk_tokens;    /* reused: canonical pages of chunks that were there */
    uint32_t linked_tokens;   /* heads (and a last page) of chunks, recomputed in this request */
    uint32_t compiled_tokens; /* canonical tokens computed because this request was the first to need them */
    uint32_t computed_tokens; /* text */
    uint32_t completion_tokens;
    uint32_t pages_held;      /* pages this request referenced at its end */
    uint32_t pages_unshared;  /* pages the same request takes in an engine that shares nothing */
    uint32_t preemptions;
    uint64_t queue_ns, ttft_ns, total_ns; /* from submit; ttft: to the first token */
} mepic_usage;

typedef struct mepic_logprob { int32_t token; float logprob; } mepic_logprob;

typedef enum mepic_event_kind { MEPIC_EVENT_TOKEN = 0, MEPIC_EVENT_DONE = 1 } mepic_event_kind;

typedef struct mepic_event {
    mepic_event_kind kind;
    mepic_request_id id;
    void *user;
    /* TOKEN: one for every token sampled, also for the one that ends the reply (which has no text) */
    int32_t token;
    const char *text; /* what can be shown now: whole UTF-8 characters, nothing that may become a stop string */
    size_t text_len;  /* may be 0 */
    float logprob;            /* natural logarithm, by the raw logits, before penalties and temperature */
    const mepic_logprob *top; /* [n_top], best first */
    uint32_t n_top;
    /* DONE: (text holds what was withheld until the end) */
    mepic_finish finish;
    mepic_usage usage;    /* a reply's first TOKEN has its counts, too: of the prompt they are what DONE will say */
    uint64_t logits_hash; /* of all sampled rows in order, if hash_logits */
    int32_t stop;         /* which of request.stop ended the reply; -1: none of them */
    const char *error;    /* a sentence with FINISH_FAILED, else NULL; static */
} mepic_event;

/* Takes the next event; false when there is none. */
bool mepic_poll(mepic_engine *engine, mepic_event *out);

/* ---- State ------------------------------------------------------------------------------------------------------- */

typedef struct mepic_stats {
    uint32_t pages_total, pages_free;
    uint32_t pages_referenced; /* by running requests and jobs, each page once */
    uint32_t pages_prefix, pages_chunk; /* of these, in a cache; the others are private */
    uint32_t pages_evictable;  /* cached, read by nobody */
    uint32_t pages_canonical;  /* of the canonical context */
    uint32_t pages_unshared;   /* what running requests would hold without sharing */
    uint32_t peak_pages_referenced;
    uint32_t queued, running;
    uint64_t steps, rows_decode, rows_text, rows_link, rows_compile; /* rows computed for nobody are in none */
    uint64_t chunk_lookups, chunk_hits, prefix_lookups, prefix_hit_tokens;
    uint64_t evicted_pages, preemptions, compiles;
    uint64_t short_chunks;     /* chunks that became text: too short or too long */
    uint64_t schedule_ns, forward_ns, sample_ns; /* time in steps, by part */
    /* forward_ns by what it was for: a step's time, once it has ended, is shared out to its own rows by their number */
    uint64_t decode_ns, text_ns, link_ns, compile_ns;
    uint64_t loaded_pages, load_ns; /* KV read from storage instead of computed: the canonical context's, so far */
    uint64_t allocations;      /* made by this process's mepic code so far */
} mepic_stats;
void mepic_stats_read(const mepic_engine *engine, mepic_stats *out);
/* Drops every cached page that nobody reads. */
void mepic_cache_clear(mepic_engine *engine);

#ifdef __cplusplus
}
#endif
#endif
