/* The text of a reply as it comes: whole UTF-8 characters, and never bytes that may turn out to be a stop string.
 *
 *   text:  | shown by the last push | withheld |       withheld: the longest end of the text that begins a stop string
 *
 * All memory is allocated at open. One thread. */
#ifndef MEPIC_ENGINE_STREAM_H
#define MEPIC_ENGINE_STREAM_H

#include "base/status.h"
#include "tokenizer/tokenizer.h"

enum { MP_MAX_STOPS = 16, MP_MAX_STOP_BYTES = 1024 };

typedef struct mp_stream {
    const mp_tokenizer *tokenizer; /* borrowed */
    mp_detokenizer detokenizer;
    mp_buf text;
    size_t shown;
    char *stop_bytes; /* all stop strings, one after the other */
    mp_str stops[MP_MAX_STOPS];
    size_t n_stops;
    int32_t stop; /* the one that ended the reply; -1 before */
} mp_stream;

/* max_token_bytes: of the vocabulary's longest token. Nothing is kept on failure. ERR_ARGUMENT, ERR_NOMEM. */
mepic_status mp_stream_open(mp_stream *s, const mp_tokenizer *tokenizer, size_t max_token_bytes,
                            const char *const *stop, size_t n_stop, mepic_error *err);
void mp_stream_close(mp_stream *s);

/* Adds a token. *shown: the text that may be seen now, valid until the next call. *stopped: a stop string is complete;
 * it and what follows it are dropped. False: the token was longer than max_token_bytes. */
bool mp_stream_push(mp_stream *s, int32_t token, mp_str *shown, bool *stopped);
/* The end of a reply that no stop string ended: what was withheld. The text of the last push stays valid. */
bool mp_stream_end(mp_stream *s, mp_str *rest);

#endif
