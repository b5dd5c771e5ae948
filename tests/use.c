/* The example of mepic.h in full: two questions over the same document, the second with the document at another place.
 *
 *     use MODEL.gguf
 *
 * Built and run by the gate with nothing but mepic.h. */
#include <mepic.h>

#include <stdio.h>
#include <string.h>

static mepic_segment text_of(const char *text) {
    return (mepic_segment){ .kind = MEPIC_TEXT, .text = text, .len = strlen(text) };
}

static mepic_segment chunk_of(const char *text) {
    return (mepic_segment){ .kind = MEPIC_CHUNK, .text = text, .len = strlen(text) };
}

/* Runs one conversation turn to its end and prints it. */
static mepic_status ask(mepic_engine *engine, const mepic_segment *parts, size_t n_parts, mepic_usage *usage,
                        mepic_error *err) {
    const mepic_message messages[] = {
        { .role = "system", .parts = (mepic_segment[]){ text_of("Answer from the documents.") }, .n_parts = 1 },
        { .role = "user", .parts = parts, .n_parts = n_parts },
    };
    const mepic_prompt prompt = { .size = sizeof prompt, .messages = messages, .n_messages = 2 };
    mepic_prepared *prepared;
    mepic_status status = mepic_prepare(engine, &prompt, &prepared, err);
    if (status != MEPIC_OK) return status;

    const mepic_request request = { .size = sizeof request, .prompt = prepared, .max_tokens = 24 };
    mepic_request_id id;
    status = mepic_submit(engine, &request, &id, err);
    mepic_prepared_free(prepared); /* the engine has taken what it needs */
    if (status != MEPIC_OK) return status;

    while (mepic_busy(engine)) {
        status = mepic_step(engine, err);
        if (status != MEPIC_OK) return status;
        mepic_event event;
        while (mepic_poll(engine, &event)) {
            fwrite(event.text, 1, event.text_len, stdout);
            if (event.kind == MEPIC_EVENT_DONE) *usage = event.usage;
        }
    }
    printf("\n%u prompt tokens: %u prefix, %u chunk, %u linked, %u compiled, %u computed\n", usage->prompt_tokens,
           usage->prefix_tokens, usage->chunk_tokens, usage->linked_tokens, usage->compiled_tokens,
           usage->computed_tokens);
    return MEPIC_OK;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: use MODEL.gguf\n");
        return 2;
    }
    const mepic_engine_options options = { .size = sizeof options, .model_path = argv[1], .kv_memory = 64 << 20 };
    mepic_engine *engine;
    mepic_error err;
    if (mepic_engine_open(&options, &engine, &err) != MEPIC_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 2;
    }

    static const char harbour[] =
        "The harbour of Port Ellis has three piers. The oldest was built of oak in 1804 and carries the fish market. "
        "The second, of granite, is used by the ferries to the islands. The third was added in 1931 for the coal trade "
        "and is today a promenade with a lighthouse at its end, whose lamp is seen from nineteen miles away.";
    const mepic_segment first[] = { chunk_of(harbour), text_of("\n\nHow many piers does the harbour have?") };
    const mepic_segment second[] = { text_of("Here is a text about a harbour.\n\n"), chunk_of(harbour),
                                     text_of("\n\nWhen was the oldest pier built?") };
    mepic_usage usage[2] = { { 0 } };
    mepic_status status = ask(engine, first, 2, &usage[0], &err);
    if (status == MEPIC_OK) status = ask(engine, second, 3, &usage[1], &err);
    if (status != MEPIC_OK) fprintf(stderr, "%s\n", err.message);
    mepic_engine_close(engine);
    if (status != MEPIC_OK) return 1;

    /* The document was computed once, for the first question, and read by the second at another position. */
    return usage[0].compiled_tokens > 0 && usage[1].compiled_tokens == 0 && usage[1].chunk_tokens > 0 ? 0 : 1;
}
