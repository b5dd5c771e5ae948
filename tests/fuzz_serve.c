/* Bodies of every route: whatever they hold, they are refused with a status and a sentence, or make a generation whose
 * reply can be written. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "serve/dialect.h"
#include "serve/json.h"
#include "serve/tokenize.h"
#include "support/tools_template.h"
#include "tools/synth_model.h"

static void require(bool ok) {
    if (!ok) abort();
}

static mepic_engine *open_tiny(void) {
    char path[] = "/tmp/mepic-fuzz-XXXXXX";
    int fd = mkstemp(path);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.chat_template = tools_template;
    require(file && mp_synth_write(&spec, file, NULL) == MEPIC_OK && fclose(file) == 0);
    const mepic_engine_options options = {
        .size = sizeof options, .model_path = path, .threads = 1, .pages = 64, .canonical_context = ""
    };
    mepic_engine *engine;
    require(mepic_engine_open(&options, &engine, NULL) == MEPIC_OK);
    unlink(path);
    return engine;
}

/* JSON in both shapes, with a sentence. */
static void check_refusal(const mp_api_error *err) {
    bool (*const writers[])(const mp_api_error *, mp_buf *) = { mp_openai_chat.error, mp_anthropic_messages.error };
    require((err->status == 400 || err->status == 404) && err->message[0]);
    for (size_t i = 0; i < 2; i++) {
        mp_buf out = { .limit = 16 << 10 };
        require(writers[i](err, &out));
        json_t *root = json_loadb(out.data, out.len, 0, NULL);
        require(root != NULL);
        json_decref(root);
        mp_buf_clear(&out);
    }
}

/* A reply of one token, which is text and half a call. */
static void write_reply(const mp_dialect *dialect, const mp_generation *g, mp_writer *writer) {
    static const char text[] = "a<tool_call>{\"name\": \"f\"}";
    mp_buf out = { .limit = 1 << 20 };
    const mp_feed_event token = { .kind = MEPIC_EVENT_TOKEN, .token = 65, .text = text, .text_len = sizeof text - 1 };
    mp_feed_event done = { .kind = MEPIC_EVENT_DONE, .text = "", .stop = -1 };
    require(dialect->event(writer, &token, &out));
    for (uint32_t i = 0; i < mp_generation_choices(g); i++) {
        done.choice = i;
        require(dialect->event(writer, &done, &out));
    }
    require(dialect->end(writer, &out));
    json_t *root = g->stream ? NULL : json_loadb(out.data, out.len, 0, NULL);
    require(g->stream ? out.len > 0 : root != NULL);
    json_decref(root);
    mp_buf_clear(&out);
}

static void try_dialect(const mp_api *api, const mp_dialect *dialect, const json_t *body) {
    mp_generation *generation;
    mp_writer *writer = NULL;
    mp_api_error err = { 0 };
    require(mp_generation_open(&generation, NULL) == MEPIC_OK);
    if (!dialect->read(api, body, 1, generation, &writer, &err)) {
        check_refusal(&err);
    } else {
        require(writer && mp_generation_choices(generation) > 0 && mp_generation_tokens(generation) > 0);
        write_reply(dialect, generation, writer);
    }
    if (writer) dialect->close(writer);
    mp_generation_free(generation);
}

static void try_question(const mp_api *api, mp_question *question, const json_t *body) {
    mp_api_error err = { 0 };
    json_t *answer = NULL;
    if (question(api, body, &answer, &err))
        require(answer != NULL);
    else
        check_refusal(&err);
    json_decref(answer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static mepic_engine *engine;
    static mepic_model_info info;
    static const char *const names[] = { "tiny" };
    static mp_question *const questions[] = { mp_ask_tokens, mp_ask_text, mp_ask_count };
    if (!engine) {
        engine = open_tiny();
        mepic_model_info_read(engine, &info);
    }
    const mp_api api = {
        .engine = engine, .info = &info, .names = names, .n_names = 1, .chunk_separator = "##", .chunk_tool_results = 8
    };
    mp_api_error err = { 0 };
    json_t *body = mp_json_parse((const char *)data, size, &err);
    if (!body) {
        check_refusal(&err);
        return 0;
    }
    try_dialect(&api, &mp_openai_chat, body);
    try_dialect(&api, &mp_openai_completions, body);
    try_dialect(&api, &mp_anthropic_messages, body);
    for (size_t i = 0; i < 3; i++) try_question(&api, questions[i], body);
    json_decref(body);
    return 0;
}
