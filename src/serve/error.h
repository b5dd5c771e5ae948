/* What an API says when it refuses or fails, before it is put into the words of a dialect.
 *
 * Every sentence names the culprit and says what to do; `param` is the path of the field at fault. Pure; any thread. */
#ifndef MEPIC_SERVE_ERROR_H
#define MEPIC_SERVE_ERROR_H

#include "base/mem.h"
#include "base/status.h"

typedef struct mp_api_error {
    uint32_t status;      /* HTTP; 0 = no error */
    const char *code;     /* a word that programs compare with, static; NULL = none */
    char param[96];       /* "messages[2].content"; "" = none */
    char message[512];    /* one sentence, UTF-8 */
    uint32_t retry_after; /* seconds; 0 = retrying does not help */
} mp_api_error;

/* Fills `err` and returns false, for `return mp_refuse(...)`. param may be NULL. */
bool mp_refuse(mp_api_error *err, uint32_t status, const char *code, const char *param, const char *format, ...)
    MP_PRINTF(5, 6);
/* What clang's analyzer cannot see across files. */
#ifdef __clang_analyzer__
#define mp_refuse(err, ...) ((void)mp_refuse(err, __VA_ARGS__), false)
#endif
/* A 503: "out of memory for WHAT". */
bool mp_refuse_memory(mp_api_error *err, const char *what);
/* The same for what the engine says. */
bool mp_refuse_engine(mp_api_error *err, const mepic_error *engine_error);
/* "invalid_request_error", "authentication_error", ...: by status. */
const char *mp_api_error_type(uint32_t status);

/* {"error": {"message", "type", "param", "code"}}, as OpenAI writes it. */
bool mp_openai_error_write(const mp_api_error *err, mp_buf *out);

#endif
