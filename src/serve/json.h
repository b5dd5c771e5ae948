/* JSON of requests and replies: jansson behind limits, and tables of fields.
 *
 * What arrives is bounded in depth and in number of values before it is parsed, and may not name a field twice. A
 * request's fields are described by a table; what is not in it is accepted and listed for one line of log. Pure; any
 * thread. */
#ifndef MEPIC_SERVE_JSON_H
#define MEPIC_SERVE_JSON_H

#include <jansson.h>

#include "serve/error.h"

enum { MP_JSON_DEPTH_MAX = 64, MP_JSON_VALUES_MAX = 1 << 19 };

/* A JSON object, or NULL with a 400 that says what is wrong where. */
json_t *mp_json_parse(const char *bytes, size_t n, mp_api_error *err);
/* Appends `value` and drops the reference; NULL (an allocation failed on the way) gives false. Numbers are written with
 * the digits that they need to stay the same. */
bool mp_json_write(json_t *value, mp_buf *out);
/* Appends `value` as Python's json.dumps writes it, with blanks behind ',' and ':'. */
bool mp_json_dump(const json_t *value, mp_buf *out);
/* A number that is written with the nine digits a float has. */
json_t *mp_json_float(float value);
/* Any bytes as a string; what is not UTF-8 becomes U+FFFD. */
json_t *mp_json_text(const char *bytes, size_t n);
/* Whether it is this string; a string with a NUL is another. */
bool mp_json_is(const json_t *value, const char *text);
/* What a value is, for messages: "a string". */
const char *mp_json_kind(const json_t *value);

/* A 400: the value at `path` (NULL: it is missing) is not what it must be. */
bool mp_refuse_type(mp_api_error *err, const char *path, const json_t *value, const char *what);

typedef enum mp_field_kind {
    MP_FIELD_BOOL,    /* bool */
    MP_FIELD_COUNT,   /* uint32_t in low..high */
    MP_FIELD_INTEGER, /* int64_t in low..high */
    MP_FIELD_REAL,    /* double in low..high */
    MP_FIELD_OTHER,   /* kept as const json_t *, read by the caller */
    MP_FIELD_IGNORED, /* without effect on a reply */
    MP_FIELD_REFUSED, /* has an effect that is not there yet: 400 unless it asks for none; `why` ends the sentence */
} mp_field_kind;

typedef struct mp_field {
    const char *name;
    mp_field_kind kind;
    size_t offset;
    double low, high; /* of a refused one: numbers that ask for nothing; low > high: only null and false do */
    const char *why;
} mp_field;

/* Reads an object by a table; null is as good as absent, an absent field is left alone. `path` stands in front of names
 * ("" or "stream_options."). Names that are not in the table are appended to `unknown` (may be NULL), with commas. */
bool mp_fields_read(const json_t *object, const char *path, const mp_field *fields, size_t n_fields, void *out,
                    mp_buf *unknown, mp_api_error *err);

#endif
