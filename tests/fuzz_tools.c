/* Replies of a model with tools: the same text and calls however they are cut, each call's arguments an object, and
 * nothing of a reply without calls lost. The first byte says how long the pieces are. */
#include <stdlib.h>
#include <string.h>

#include "serve/json.h"
#include "serve/tools.h"

static void require(bool ok) {
    if (!ok) abort();
}

/* What a parser gave out, one after the other; a call between bytes that no text has. */
typedef struct record {
    mp_buf all;
    uint32_t n_calls;
} record;

static bool take_text(void *user, const char *text, size_t len) {
    record *r = user;
    require(len > 0);
    return mp_buf_append(&r->all, text, len);
}

static bool take_call(void *user, uint32_t index, const char *name, const char *arguments) {
    record *r = user;
    mp_api_error err;
    json_t *object = mp_json_parse(arguments, strlen(arguments), &err);
    require(object && index == r->n_calls++ && *name);
    json_decref(object);
    return mp_buf_append(&r->all, "\xff", 1) && mp_buf_append(&r->all, name, strlen(name)) &&
           mp_buf_append(&r->all, arguments, strlen(arguments)) && mp_buf_append(&r->all, "\xff", 1);
}

static void parse(const json_t *tools, const char *reply, size_t n, size_t piece, record *r) {
    mp_reply_parser parser;
    const mp_reply_sink sink = { take_text, take_call, r };
    require(mp_reply_parser_init(&parser, "hermes", tools, NULL));
    for (size_t i = 0; i < n; i += piece) {
        require(mp_reply_parser_push(&parser, reply + i, n - i < piece ? n - i : piece, &sink));
    }
    require(mp_reply_parser_end(&parser, &sink));
    mp_reply_parser_clear(&parser);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    const char *reply = (const char *)data + 1;
    size_t n = size - 1;
    record whole = { .all = { .limit = 64 << 20 } }, cut = whole;
    json_t *tools = json_pack("[{s:s},{s:s}]", "name", "f", "name", "g");
    parse(tools, reply, n, n + 1, &whole);
    parse(tools, reply, n, data[0] + 1u, &cut);
    require(whole.all.len == cut.all.len && whole.n_calls == cut.n_calls);
    require(whole.all.len == 0 || memcmp(whole.all.data, cut.all.data, cut.all.len) == 0);
    require(whole.n_calls > 0 || (whole.all.len == n && (n == 0 || memcmp(whole.all.data, reply, n) == 0)));
    json_decref(tools);
    mp_buf_clear(&whole.all);
    mp_buf_clear(&cut.all);
    return 0;
}
