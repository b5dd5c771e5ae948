/* The canonical context: the fixed text that chunks are computed after (docs/ARCHITECTURE.md, 5), and its KV in a file
 * so that a restart does not compute it again.
 *
 * File: header | pages. The header names what the pages are of (key: model, numerics and tokens) and carries the
 * SHA-256 of itself and of the pages. A file is verified completely before a byte reaches a page; whatever is wrong
 * with it, it is as if it were not there, and the log says why. Stepping thread; all memory is allocated at open. */
#ifndef MEPIC_ENGINE_CANONICAL_H
#define MEPIC_ENGINE_CANONICAL_H

#include "backend/backend.h"
#include "schedule/scheduler.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

/* data/canonical-v1.txt, embedded by cmake/embed.cmake. */
extern const unsigned char mp_canonical_text[];
extern const size_t mp_canonical_text_len;

enum { MP_CANONICAL_TOKENS = 1200 };

/* BOS if the model adds one, the opening of a system turn, and text; cut to MP_CANONICAL_TOKENS and to a quarter of the
 * context the model was trained for. path: NULL the built-in text, "" none (out->n 0), else a file. out->ids is the
 * caller's. ERR_IO, ERR_NOMEM. */
mepic_status mp_canonical_tokens(const char *path, const mp_tokenizer *tokenizer, const mp_chat_template *chat,
                                 uint32_t n_ctx_train, mp_tokens *out, mepic_error *err);

typedef struct mp_canonical_file {
    char *path;     /* NULL: there is no file */
    mp_digest key;
    void *page;     /* [page_bytes] scratch */
    size_t page_bytes;
    mp_sha256 *sha;
    bool settled;   /* loaded, written, or given up: nothing more to do */
    uint32_t n_loaded; /* pages */
    uint64_t load_ns;
} mp_canonical_file;

/* dir NULL or n_tokens 0: a file that is never read or written. ERR_NOMEM. */
mepic_status mp_canonical_file_open(mp_canonical_file *f, const char *dir, const mp_digest *model,
                                    const int32_t *tokens, uint32_t n_tokens, size_t page_bytes, mepic_error *err);
void mp_canonical_file_close(mp_canonical_file *f);
/* Fills the scheduler's canonical pages from the file if it is there and right. */
void mp_canonical_file_load(mp_canonical_file *f, mp_scheduler *scheduler, mp_backend *backend, const mp_log *log);
/* Writes the file once the pages are computed; cheap to call after every step. */
void mp_canonical_file_save(mp_canonical_file *f, const mp_scheduler *scheduler, mp_backend *backend,
                            const mp_log *log);

#endif
