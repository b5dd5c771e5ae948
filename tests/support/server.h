/* A server on an engine of random weights in this process, and readers of what it answers. Everything fails the test on
 * error. */
#ifndef MEPIC_TESTS_SUPPORT_SERVER_H
#define MEPIC_TESTS_SUPPORT_SERVER_H

#include "serve/server.h"
#include "support/http.h"

extern mepic_engine *engine;
extern mp_server *server;
extern uint16_t port;

/* Names tiny and other, 16 replies. */
mp_server_options default_options(void);
void start(const mp_server_options *options);
void stop(void);
/* Of an engine with a context of 65,536 tokens: its replies can last as long as a test needs them to. */
mepic_engine_options long_options(void);
/* For a test with the fixtures: another engine in the place of theirs, without a server. */
void use_long_engine(void);
/* Fixtures: an engine of tiny_options (support/replies.h) and a server of default_options. */
int setup(void **state);
int teardown(void **state);
/* A file of this text in /tmp; unlink it. The name is valid until the next call. */
const char *text_file(const char *text);
/* API keys of a file of this text; NULL: it is refused, and said why. */
mp_keys *keys_of(const char *text);
/* Until no reply waits or runs. */
void wait_until_idle(void);

/* A value by a path such as "choices/0/text"; NULL: there is none. */
const json_t *at(const json_t *root, const char *path);
const char *text_at(const json_t *root, const char *path);
json_int_t number_at(const json_t *root, const char *path);
/* The value of a line of /metrics, as "vllm:generation_tokens_total{model_name=\"tiny\"}". */
double metric(const char *line);
/* Of mepic:pages, of one kind or of several at one moment. */
double pages_of(const char *kind);
void pages_of_kinds(const char *const *kinds, uint32_t n, double *pages);
/* Waits for the server to be idle again and again until it has that value. */
void wait_until_metric(const char *line, double value);

/* The data of a stream up to its end; its pieces of text are put together. */
typedef struct stream {
    char text[8192]; /* [text_len], as much as fits; may hold NUL */
    size_t text_len;
    json_t *last; /* before [DONE]; drop it */
    uint32_t n_data, n_comments;
    bool done; /* [DONE] came */
} stream;
void read_stream(http_client *c, stream *s);
/* Opens a stream and reads its head, which must be a 200. */
void open_stream(http_client *c, const char *path, const char *body);
void ask_stream(const char *path, const char *body, stream *s);

#endif
