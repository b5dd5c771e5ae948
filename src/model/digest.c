/* The digest of a model file, remembered in the cache directory since hashing gigabytes takes seconds.
 *
 * One small text file per (device, inode); it repeats what it belongs to, so that anything else in its place (an older
 * version of the model, a foreign file) is a miss and the digest is computed again. A cache that
 * cannot be written costs time only and is logged. */
#include "model/model.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/file.h"

enum { PATH_CAP = 4096, LINE_CAP = 256, PIECE = 8 << 20 };

/* A file written again within the clock's grain keeps size and time, so a young one is not remembered. */
static bool settled(const mp_file_id *id) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec - id->mtime_ns > 2000000000;
}

static int owner_line(const mp_file_id *id, char *line) {
    return snprintf(line, LINE_CAP, "mepic-digest-1 %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRId64 " ", id->device,
                    id->inode, id->bytes, id->mtime_ns);
}

static bool recall(const char *path, const mp_file_id *id, mp_digest *out) {
    char want[LINE_CAP], have[LINE_CAP];
    int n = owner_line(id, want);
    FILE *f = fopen(path, "rbe");
    if (!f) return false;
    size_t len = fread(have, 1, sizeof have, f);
    fclose(f);
    return len == (size_t)n + MP_DIGEST_DIGITS + 1 && memcmp(have, want, (size_t)n) == 0 && have[len - 1] == '\n' &&
           mp_digest_read(have + n, out);
}

typedef struct entry {
    const mp_file_id *id;
    const mp_digest *digest;
} entry;

static bool write_line(void *ctx, int fd) {
    const entry *e = ctx;
    char line[LINE_CAP];
    int n = owner_line(e->id, line);
    mp_digest_write(e->digest, line + n);
    line[n + MP_DIGEST_DIGITS] = '\n';
    return mp_write_all(fd, line, (size_t)n + MP_DIGEST_DIGITS + 1);
}

static void remember(const char *path, const mp_file_id *id, const mp_digest *digest, const mp_log *log) {
    entry e = { id, digest };
    mepic_error why;
    if (mp_file_replace(path, write_line, &e, &why) != MEPIC_OK) {
        mp_log_write(log, MEPIC_LOG_WARN, "the model's digest is not remembered: %s", why.message);
    }
}

static mepic_status compute(const mp_gguf *gguf, const mp_log *log, mp_digest *out, mepic_error *err) {
    mp_sha256 *sha = mp_sha256_open();
    if (!sha) return mp_fail_nomem(err, "a hash", 0);
    const uint8_t *bytes = mp_gguf_bytes(gguf);
    size_t n = mp_gguf_file_bytes(gguf);
    mp_sha256_begin(sha);
    for (size_t at = 0; at < n; at += PIECE) {
        mp_log_progress(log, "hashing the model", at, n);
        mp_sha256_update(sha, bytes + at, n - at < PIECE ? n - at : PIECE);
    }
    mp_log_progress(log, "hashing the model", n, n);
    *out = mp_sha256_end(sha);
    mp_sha256_close(sha);
    return MEPIC_OK;
}

mepic_status mp_model_digest(const mp_model *model, const char *cache_dir, const mp_log *log, mp_digest *out,
                             mepic_error *err) {
    const mp_file_id *id = mp_gguf_file_id(model->gguf);
    char path[PATH_CAP];
    bool cached = cache_dir && id &&
                  snprintf(path, sizeof path, "%s/digests/%016" PRIx64 "-%016" PRIx64, cache_dir, id->device,
                           id->inode) < (int)sizeof path;
    if (cached && recall(path, id, out)) return MEPIC_OK;
    mepic_status status = compute(model->gguf, log, out, err);
    if (status == MEPIC_OK && cached && settled(id)) remember(path, id, out, log);
    return status;
}
