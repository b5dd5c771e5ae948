/* What a server tells of a request beside its reply: for logs. No text of prompts, replies or keys is in it. */
#ifndef MEPIC_SERVE_RECORD_H
#define MEPIC_SERVE_RECORD_H

#include "base/status.h"

typedef struct mp_record {
    bool end;         /* false: a request for replies was accepted; what is marked "end" is not known yet */
    const char *id;   /* its X-Request-Id; printable ASCII */
    const char *path; /* the route's; NULL: there is none */
    const char *key;  /* name of the client's key; NULL: none was needed or known */
    uint32_t replies; /* 0: the request was for something else, or was refused */
    bool stream;
    uint64_t prompt_tokens;
    uint32_t status;    /* end: the answer's; 499: the client left before the end */
    const char *code;   /* end: why it failed, in a word and in a sentence; NULL: it did not. A stream can fail after */
    const char *error;  /* its status was sent */
    mepic_usage usage;  /* end: of the replies that ended. Tokens are sums, times are the longest; completion_tokens is
                         * of all replies */
    uint64_t total_ns;  /* end: since the headers were there */
} mp_record;

#endif
