/* Bodies of chat and completion requests: whatever they hold, they are refused with a status and a sentence, or make a
 * generation. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "serve/dialect.h"
#include "serve/json.h"
#include "tools/synth_model.h"

static mepic_engine *open_tiny(void) {
    char path[] = "/tmp/mepic-fuzz-XXXXXX";
    int fd = mkstemp(path);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    const mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    if (!file || mp_synth_write(&spec, file, NULL) != MEPIC_OK || fclose(file) != 0) abort();
    const mepic_engine_options options = {
        .size = sizeof options, .model_path = path, .threads = 1, .pages = 64, .canonical_context = ""
    };
    mepic_engine *engine;
    if (mepic_engine_open(&options, &engine, NULL) != MEPIC_OK) abort();
    unlink(path);
    return engine;
}

static void check_refusal(const mp_api_error *err) {
    mp_buf out = { .limit = 16 << 10 };
    bool client = err->status == 400 || err->status == 404;
    if (!client || !err->message[0] || !mp_openai_error_write(err, &out)) abort();
    mp_buf_clear(&out);
}

static void try_dialect(const mp_api *api, const mp_dialect *dialect, const json_t *body) {
    mp_generation *generation;
    mp_writer *writer = NULL;
    mp_api_error err = { 0 };
    if (mp_generation_open(&generation, NULL) != MEPIC_OK) abort();
    if (!dialect->read(api, body, 1, generation, &writer, &err)) {
        check_refusal(&err);
    } else if (!writer || mp_generation_choices(generation) == 0 || mp_generation_tokens(generation) == 0) {
        abort();
    }
    if (writer) dialect->close(writer);
    mp_generation_free(generation);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static mepic_engine *engine;
    static mepic_model_info info;
    static const char *const names[] = { "tiny" };
    if (!engine) {
        engine = open_tiny();
        mepic_model_info_read(engine, &info);
    }
    const mp_api api = { .engine = engine, .info = &info, .names = names, .n_names = 1 };
    mp_api_error err = { 0 };
    json_t *body = mp_json_parse((const char *)data, size, &err);
    if (!body) {
        check_refusal(&err);
        return 0;
    }
    try_dialect(&api, &mp_openai_chat, body);
    try_dialect(&api, &mp_openai_completions, body);
    json_decref(body);
    return 0;
}
