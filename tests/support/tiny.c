#include "support/tiny.h"

#include <stdlib.h>
#include <unistd.h>

enum { MAX_FILES = 64, PATH_CAP = 64 };
static char paths[MAX_FILES][PATH_CAP];
static int n_paths;

static void die(const char *what) {
    fprintf(stderr, "tiny model: %s\n", what);
    abort();
}

static void remove_files(void) {
    for (int i = 0; i < n_paths; i++) unlink(paths[i]);
}

void *tiny_model_bytes(const mp_synth_spec *spec, size_t *n) {
    char *bytes = NULL;
    FILE *f = open_memstream(&bytes, n);
    mepic_error err = { 0 };
    if (!f) die("out of memory");
    if (mp_synth_write(spec, f, &err) != MEPIC_OK) die(err.message);
    if (fclose(f) != 0) die("out of memory");
    return bytes;
}

mp_model *tiny_model_open(const mp_synth_spec *spec, void **bytes) {
    size_t n;
    mepic_error err = { 0 };
    mp_gguf *gguf;
    mp_model *model;
    *bytes = tiny_model_bytes(spec, &n);
    if (mp_gguf_open_memory(*bytes, n, "tiny", &gguf, &err) != MEPIC_OK) die(err.message);
    if (mp_model_open_gguf(gguf, &model, &err) != MEPIC_OK) die(err.message);
    return model;
}

const char *tiny_model_write(const mp_synth_spec *spec) {
    if (n_paths == MAX_FILES) die("too many files");
    if (n_paths == 0) atexit(remove_files);
    char *path = paths[n_paths];
    const char *dir = getenv("TMPDIR");
    if (snprintf(path, PATH_CAP, "%s/mepic-tiny-XXXXXX", dir ? dir : "/tmp") >= PATH_CAP) die("TMPDIR is too long");
    int fd = mkstemp(path);
    FILE *f = fd >= 0 ? fdopen(fd, "wb") : NULL;
    mepic_error err = { 0 };
    if (!f) die("no temporary file");
    n_paths++;
    if (mp_synth_write(spec, f, &err) != MEPIC_OK) die(err.message);
    if (fclose(f) != 0) die("the temporary file could not be written");
    return path;
}

const char *tiny_model_path(void) {
    static const char *path;
    if (!path) {
        mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
        path = tiny_model_write(&spec);
    }
    return path;
}
