/* An engine on a tiny model, and requests run to their end: for the tests of engine/. Any error fails the test. */
#ifndef MEPIC_TESTS_SUPPORT_REPLIES_H
#define MEPIC_TESTS_SUPPORT_REPLIES_H

#include <mepic.h>

/* The tiny model, one thread, 256 pages, a context of 512, 8 running and 16 queued, no canonical context, hashes. */
mepic_engine_options tiny_options(void);
mepic_engine *open_engine(const mepic_engine_options *options);
/* Called with every engine that open_engine opens; NULL: nothing is. */
extern void (*on_open)(mepic_engine *engine);

extern const char question[];
extern char document[400]; /* random letters */
mepic_segment text_of(const char *text);
mepic_prepared *prepare(const mepic_engine *engine, const mepic_segment *segments, size_t n);
mepic_prepared *prepare_text(const mepic_engine *engine, const char *text);
/* before, then the document as a chunk, then the question. */
mepic_prepared *prepare_document(const mepic_engine *engine, const char *before);

enum { MAX_REPLY = 400 };

/* What a request gave. */
typedef struct result {
    mepic_request_id id;
    int32_t tokens[MAX_REPLY];
    uint32_t n_tokens;
    char text[8 * MAX_REPLY];
    size_t text_len, rest_len; /* rest: given with DONE */
    bool done;
    mepic_finish finish;
    const char *error;
    int32_t stop;
    double logprobs;          /* of all tokens together */
    mepic_usage first, usage; /* with the first token, with DONE */
    uint64_t hash;
} result;

/* `user` of the request becomes r. */
void submit(mepic_engine *engine, const mepic_request *request, result *r);
void step(mepic_engine *engine);
void drain(mepic_engine *engine);
void run(mepic_engine *engine, const mepic_request *request, result *r);
/* A whole life: open, four greedy tokens after prepare_document(before), close. The hash of the logits. */
uint64_t ask(const mepic_engine_options *options, const char *before, mepic_usage *usage, mepic_stats *stats);

/* Fails unless `got` is `want`, the error says so as well, and its message contains `word`. */
void expect(mepic_status got, mepic_status want, const mepic_error *err, const char *word);

#endif
