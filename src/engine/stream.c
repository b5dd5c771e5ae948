#include "engine/stream.h"

#include <string.h>

static mepic_status copy_stops(mp_stream *s, const char *const *stop, size_t n_stop, size_t *longest,
                               mepic_error *err) {
    size_t total = 0;
    for (size_t i = 0; i < n_stop; i++) {
        size_t len = stop[i] ? strlen(stop[i]) : 0;
        if (len == 0 || len > MP_MAX_STOP_BYTES) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.stop[%zu] has %zu bytes; it must have from 1 to %d", i,
                           len, MP_MAX_STOP_BYTES);
        }
        if (len > *longest) *longest = len;
        total += len;
    }
    s->stop_bytes = mp_alloc(total);
    if (!s->stop_bytes) return mp_fail_nomem(err, "stop strings", total);
    char *at = s->stop_bytes;
    for (s->n_stops = 0; s->n_stops < n_stop; s->n_stops++) {
        mp_str copy = { at, strlen(stop[s->n_stops]) };
        memcpy(at, stop[s->n_stops], copy.len);
        s->stops[s->n_stops] = copy;
        at += copy.len;
    }
    return MEPIC_OK;
}

mepic_status mp_stream_open(mp_stream *s, const mp_tokenizer *tokenizer, size_t max_token_bytes,
                            const char *const *stop, size_t n_stop, mepic_error *err) {
    if (n_stop > MP_MAX_STOPS) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.n_stop is %zu; at most %d stop strings", n_stop, MP_MAX_STOPS);
    }
    if (n_stop > 0 && !stop) return mp_fail(err, MEPIC_ERR_ARGUMENT, "request.n_stop is %zu but stop is NULL", n_stop);
    mp_stream stream = { .tokenizer = tokenizer, .stop = -1 };
    size_t longest = 0;
    mepic_status st = copy_stops(&stream, stop, n_stop, &longest, err);
    if (st != MEPIC_OK) return st;
    /* Withheld bytes, and a token with what the detokenizer had pending; a bad byte becomes three (U+FFFD), once more
     * at the end. */
    size_t cap = longest + 3 * (max_token_bytes + 2 * sizeof stream.detokenizer.pending);
    stream.text = (mp_buf){ .data = mp_alloc(cap), .cap = cap, .limit = cap };
    if (!stream.text.data) {
        mp_free(stream.stop_bytes);
        return mp_fail_nomem(err, "a reply's text", cap);
    }
    *s = stream;
    return MEPIC_OK;
}

void mp_stream_close(mp_stream *s) {
    mp_buf_clear(&s->text);
    mp_free(s->stop_bytes);
    s->stop_bytes = NULL;
}

/* Where the first complete stop string begins; the text's length without one. */
static size_t find_stop(mp_stream *s) {
    for (size_t at = 0; at < s->text.len; at++) {
        for (size_t i = 0; i < s->n_stops; i++) {
            const mp_str *stop = &s->stops[i];
            if (stop->len > s->text.len - at || memcmp(s->text.data + at, stop->data, stop->len) != 0) continue;
            s->stop = (int32_t)i;
            return at;
        }
    }
    return s->text.len;
}

/* Where the longest end of the text begins that is the beginning of a stop string; the text's length without one. */
static size_t find_withheld(const mp_stream *s) {
    for (size_t at = 0; at < s->text.len; at++) {
        size_t len = s->text.len - at;
        for (size_t i = 0; i < s->n_stops; i++) {
            if (len < s->stops[i].len && memcmp(s->text.data + at, s->stops[i].data, len) == 0) return at;
        }
    }
    return s->text.len;
}

bool mp_stream_push(mp_stream *s, int32_t token, mp_str *shown, bool *stopped) {
    memmove(s->text.data, s->text.data + s->shown, s->text.len - s->shown);
    s->text.len -= s->shown;
    s->shown = 0;
    if (!mp_detokenize(s->tokenizer, &s->detokenizer, token, &s->text)) return false;
    size_t stop = find_stop(s);
    *stopped = stop < s->text.len;
    s->shown = *stopped ? stop : find_withheld(s);
    *shown = (mp_str){ s->text.data, s->shown };
    return true;
}

bool mp_stream_end(mp_stream *s, mp_str *rest) {
    if (!mp_detokenize_end(&s->detokenizer, &s->text)) return false;
    *rest = (mp_str){ s->text.data + s->shown, s->text.len - s->shown };
    return true;
}
