/* What a server sends to `mepic chat`: an answer and its events are the same however they are cut, or refused with a
 * sentence. The first byte says how long the pieces are. */
#include <stdlib.h>
#include <string.h>

#include "cli/http_client.h"

static void require(bool ok) {
    if (!ok) abort();
}

typedef struct record {
    mp_http_reader http;
    mp_sse sse;
    mp_buf events; /* each behind its length */
    mepic_status status;
} record;

static mepic_status take_event(void *user, const char *data, size_t n, mepic_error *err) {
    record *r = user;
    (void)err;
    require(mp_buf_append(&r->events, &n, sizeof n) && mp_buf_append(&r->events, data, n));
    return MEPIC_OK;
}

static mepic_status take_body(void *user, const char *bytes, size_t n, mepic_error *err) {
    record *r = user;
    require(r->http.status >= 200);
    return mp_sse_feed(&r->sse, bytes, n, err);
}

static void read_all(const char *bytes, size_t n, size_t piece, record *r) {
    mepic_error err = { 0 };
    memset(r, 0, sizeof *r);
    r->events.limit = 64 << 20;
    r->sse = (mp_sse){ .take = take_event, .user = r };
    for (size_t i = 0; i < n && r->status == MEPIC_OK; i += piece) {
        r->status = mp_http_feed(&r->http, bytes + i, n - i < piece ? n - i : piece, take_body, r, &err);
    }
    if (r->status == MEPIC_OK) r->status = mp_http_finish(&r->http, &err);
    require(r->status == MEPIC_OK || err.message[0]);
}

static void clear(record *r) {
    mp_sse_clear(&r->sse);
    mp_buf_clear(&r->events);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static record whole, cut;
    if (size == 0) return 0;
    const char *bytes = (const char *)data + 1;
    read_all(bytes, size - 1, size, &whole);
    read_all(bytes, size - 1, data[0] + 1u, &cut);
    require(whole.status == cut.status && whole.http.status == cut.http.status);
    require(whole.events.len == cut.events.len);
    require(cut.events.len == 0 || memcmp(whole.events.data, cut.events.data, cut.events.len) == 0);
    clear(&whole);
    clear(&cut);
    return 0;
}
