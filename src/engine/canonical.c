#include "engine/canonical.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/file.h"

/* ---- Tokens ------------------------------------------------------------------------------------------------------ */

enum { MAX_TEXT_BYTES = 1 << 20 }; /* read of an operator's file; far more than the tokens that are kept */

static mepic_status read_text(const char *path, mp_buf *out, mepic_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return mp_fail(err, MEPIC_ERR_IO, "canonical_context \"%s\" cannot be opened: %s", path, strerror(errno));
    }
    mepic_status st = MEPIC_OK;
    char part[4096];
    ssize_t n;
    while ((n = read(fd, part, sizeof part)) > 0 && out->len + (size_t)n <= out->limit) {
        if (!mp_buf_append(out, part, (size_t)n)) {
            st = mp_fail_nomem(err, "the canonical context", out->len + (size_t)n);
            break;
        }
    }
    if (n < 0) {
        st = mp_fail(err, MEPIC_ERR_IO, "canonical_context \"%s\" cannot be read: %s", path, strerror(errno));
    }
    close(fd);
    if (st == MEPIC_OK && out->len == 0) {
        st = mp_fail(err, MEPIC_ERR_ARGUMENT, "canonical_context \"%s\" is empty; pass \"\" for none", path);
    }
    return st;
}

mepic_status mp_canonical_tokens(const char *path, const mp_tokenizer *tokenizer, const mp_chat_template *chat,
                                 uint32_t n_ctx_train, mp_tokens *out, mepic_error *err) {
    mp_buf file = { .limit = MAX_TEXT_BYTES };
    mp_tokens tokens = { 0 };
    mepic_status st = MEPIC_OK;
    if (path && !*path) goto done;
    mp_str text = { (const char *)mp_canonical_text, mp_canonical_text_len };
    if (path) {
        st = read_text(path, &file, err);
        if (st != MEPIC_OK) goto done;
        text = (mp_str){ file.data, file.len };
    }
    mp_str opening = mp_chat_system_opening(chat);
    st = mp_tokenize(tokenizer, opening.data, opening.len, true, true, &tokens, err);
    if (st != MEPIC_OK) goto done;
    st = mp_tokenize(tokenizer, text.data, text.len, false, false, &tokens, err);
    if (st != MEPIC_OK) goto done;
    size_t limit = n_ctx_train / 4 < MP_CANONICAL_TOKENS ? n_ctx_train / 4 : MP_CANONICAL_TOKENS;
    if (tokens.n > limit) tokens.n = limit;
done:
    mp_buf_clear(&file);
    if (st != MEPIC_OK) {
        mp_free(tokens.ids);
    } else {
        *out = tokens;
    }
    return st;
}

/* ---- File -------------------------------------------------------------------------------------------------------- */

enum { RECORD_VERSION = 1 };

/* Fixed-width fields without padding, in the machine's byte order: the key holds the numerics class, so a file never
 * moves between machines of different kinds. */
typedef struct record_header {
    char magic[8];
    uint32_t version, n_pages;
    uint64_t page_bytes;
    uint8_t key[32];
    uint8_t digest[32]; /* SHA-256 of everything before it and of the pages behind it */
} record_header;
_Static_assert(sizeof(record_header) == 88, "no padding");

static record_header header_of(const mp_canonical_file *f, uint32_t n_pages) {
    record_header h = { .version = RECORD_VERSION, .n_pages = n_pages, .page_bytes = f->page_bytes };
    memcpy(h.magic, "MEPICCAN", sizeof h.magic);
    memcpy(h.key, f->key.bytes, sizeof h.key);
    return h;
}

mepic_status mp_canonical_file_open(mp_canonical_file *f, const char *dir, const mp_digest *model,
                                    const int32_t *tokens, uint32_t n_tokens, size_t page_bytes, mepic_error *err) {
    *f = (mp_canonical_file){ .page_bytes = page_bytes, .settled = true };
    if (!dir || n_tokens == 0) return MEPIC_OK;
    f->sha = mp_sha256_open();
    f->page = mp_alloc(page_bytes);
    size_t path_cap = strlen(dir) + 64;
    f->path = mp_alloc(path_cap);
    if (!f->sha || !f->page || !f->path) {
        mp_canonical_file_close(f);
        return mp_fail_nomem(err, "the canonical context's file", page_bytes + path_cap);
    }
    static const char tag[] = "mepic/canonical-file/v1";
    mp_sha256_begin(f->sha);
    mp_sha256_update(f->sha, tag, sizeof tag);
    mp_sha256_update(f->sha, model->bytes, sizeof model->bytes);
    mp_sha256_update(f->sha, tokens, n_tokens * sizeof *tokens);
    f->key = mp_sha256_end(f->sha);
    char key[MP_DIGEST_DIGITS + 1];
    mp_digest_write(&f->key, key);
    snprintf(f->path, path_cap, "%s/canonical-%.32s.kv", dir, key);
    f->settled = false;
    return MEPIC_OK;
}

void mp_canonical_file_close(mp_canonical_file *f) {
    mp_sha256_close(f->sha);
    mp_free(f->page);
    mp_free(f->path);
    *f = (mp_canonical_file){ 0 };
}

static bool read_all(int fd, void *bytes, size_t n) {
    char *at = bytes;
    while (n > 0) {
        ssize_t got = read(fd, at, n);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        at += got;
        n -= (size_t)got;
    }
    return true;
}

/* Reads and verifies the whole file into memory, since nothing unverified may reach a page. NULL with the reason
 * otherwise. */
static char *read_verified(const mp_canonical_file *f, int fd, uint32_t n_pages, size_t *bytes, const char **why) {
    record_header header, want = header_of(f, n_pages);
    struct stat info;
    size_t total;
    char *pages = NULL;
    *why = "it has another size";
    if (!mp_mul_size(n_pages, f->page_bytes, bytes) || !mp_add_size(*bytes, sizeof header, &total)) return NULL;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || (uint64_t)info.st_size != total) return NULL;
    *why = "it cannot be read";
    if (!read_all(fd, &header, sizeof header)) return NULL;
    memcpy(want.digest, header.digest, sizeof want.digest);
    *why = "its header is of something else";
    if (memcmp(&header, &want, sizeof header) != 0) return NULL;
    *why = "out of memory";
    pages = mp_alloc_aligned(4096, *bytes);
    if (!pages) return NULL;
    *why = "it cannot be read";
    if (!read_all(fd, pages, *bytes)) goto fail;
    *why = "its digest is wrong";
    mp_sha256_begin(f->sha);
    mp_sha256_update(f->sha, &header, offsetof(record_header, digest));
    mp_sha256_update(f->sha, pages, *bytes);
    mp_digest digest = mp_sha256_end(f->sha);
    if (memcmp(digest.bytes, header.digest, sizeof header.digest) != 0) goto fail;
    return pages;
fail:
    mp_free_aligned(pages, *bytes);
    return NULL;
}

void mp_canonical_file_load(mp_canonical_file *f, mp_scheduler *scheduler, mp_backend *backend, const mp_log *log) {
    if (f->settled) return;
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) {
        if (errno != ENOENT) mp_log_write(log, MEPIC_LOG_WARN, "%s cannot be opened: %s", f->path, strerror(errno));
        return;
    }
    uint64_t start = mp_now_ns();
    uint32_t n_pages;
    bool ready;
    if (!mp_scheduler_canonical_take(scheduler)) {
        close(fd);
        return;
    }
    const mp_page *pages = mp_scheduler_canonical_pages(scheduler, &n_pages, &ready);
    size_t bytes;
    const char *why;
    char *contents = read_verified(f, fd, n_pages, &bytes, &why);
    close(fd);
    if (!contents) {
        mp_log_write(log, MEPIC_LOG_WARN, "%s is not used: %s; the canonical context is computed again", f->path, why);
        return;
    }
    for (uint32_t i = 0; i < n_pages; i++) backend->ops->page_write(backend, pages[i], contents + i * f->page_bytes);
    mp_free_aligned(contents, bytes);
    mp_scheduler_canonical_loaded(scheduler);
    f->settled = true;
    f->n_loaded = n_pages;
    f->load_ns = mp_now_ns() - start;
    mp_log_write(log, MEPIC_LOG_DEBUG, "canonical context: %u pages read from %s", n_pages, f->path);
}

typedef struct record {
    mp_canonical_file *file;
    mp_backend *backend;
    const mp_page *pages;
    uint32_t n_pages;
} record;

/* The digest stands in front of what it covers, so the header is written last, over zeros. */
static bool write_record(void *ctx, int fd) {
    const record *r = ctx;
    mp_canonical_file *f = r->file;
    record_header header = header_of(f, r->n_pages);
    static const record_header zeros;
    if (!mp_write_all(fd, &zeros, sizeof zeros)) return false;
    mp_sha256_begin(f->sha);
    mp_sha256_update(f->sha, &header, offsetof(record_header, digest));
    for (uint32_t i = 0; i < r->n_pages; i++) {
        if (!r->backend->ops->page_read(r->backend, r->pages[i], f->page)) return false;
        mp_sha256_update(f->sha, f->page, f->page_bytes);
        if (!mp_write_all(fd, f->page, f->page_bytes)) return false;
    }
    mp_digest digest = mp_sha256_end(f->sha);
    memcpy(header.digest, digest.bytes, sizeof header.digest);
    return lseek(fd, 0, SEEK_SET) == 0 && mp_write_all(fd, &header, sizeof header);
}

void mp_canonical_file_save(mp_canonical_file *f, const mp_scheduler *scheduler, mp_backend *backend,
                            const mp_log *log) {
    if (f->settled) return;
    record r = { .file = f, .backend = backend };
    bool ready;
    r.pages = mp_scheduler_canonical_pages(scheduler, &r.n_pages, &ready);
    if (!ready) return;
    f->settled = true; /* one attempt: a full disk must not slow every step */
    mepic_error why;
    if (mp_file_replace(f->path, write_record, &r, &why) != MEPIC_OK) {
        mp_log_write(log, MEPIC_LOG_WARN, "%s; a restart may compute the canonical context again", why.message);
        return;
    }
    mp_log_write(log, MEPIC_LOG_DEBUG, "canonical context: %u pages written to %s", r.n_pages, f->path);
}
