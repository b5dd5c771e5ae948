#include "serve/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- In ---------------------------------------------------------------------------------------------------------- */

/* Counts what a parser would build, by the bytes outside strings. It need not be JSON; but jansson swallows a NUL
 * behind a number or a word. */
static bool check_bounds(const char *bytes, size_t n, mp_api_error *err) {
    size_t depth = 0, values = 1;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        char c = bytes[i];
        if (!c) {
            return mp_refuse(err, 400, "invalid_json", NULL, "the body is not JSON: control character 0x0 at byte %zu",
                             i);
        }
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
            continue;
        }
        if (c == '"') in_string = true;
        if (c == ',' || c == ':' || c == '[' || c == '{') values++;
        if (c == '[' || c == '{') depth++;
        if ((c == ']' || c == '}') && depth > 0) depth--;
        if (depth > MP_JSON_DEPTH_MAX) {
            return mp_refuse(err, 400, "invalid_json", NULL, "the body is nested deeper than %d levels at byte %zu",
                             MP_JSON_DEPTH_MAX, i);
        }
        if (values > MP_JSON_VALUES_MAX) {
            return mp_refuse(err, 400, "invalid_json", NULL, "the body has more than %d values", MP_JSON_VALUES_MAX);
        }
    }
    return true;
}

json_t *mp_json_parse(const char *bytes, size_t n, mp_api_error *err) {
    if (n == 0) {
        mp_refuse(err, 400, "invalid_json", NULL, "the body is empty; send a JSON object");
        return NULL;
    }
    if (!check_bounds(bytes, n, err)) return NULL;
    json_error_t why;
    json_t *root = json_loadb(bytes, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_ANY, &why);
    if (!root) {
        json_t *text = mp_json_text(why.text, strlen(why.text)); // it quotes the body
        mp_refuse(err, 400, "invalid_json", NULL, "the body is not JSON: %s, at line %d, column %d",
                  text ? json_string_value(text) : "malformed", why.line, why.column);
        json_decref(text);
        return NULL;
    }
    if (!json_is_object(root)) {
        mp_refuse(err, 400, "invalid_json", NULL, "the body is %s; send a JSON object", mp_json_kind(root));
        json_decref(root);
        return NULL;
    }
    return root;
}

bool mp_json_is(const json_t *value, const char *text) {
    size_t len = strlen(text);
    return json_is_string(value) && json_string_length(value) == len &&
           memcmp(json_string_value(value), text, len) == 0;
}

const char *mp_json_kind(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "a whole number";
    case JSON_REAL: return "a number";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    case JSON_NULL: return "null";
    }
    return "a value";
}

bool mp_refuse_type(mp_api_error *err, const char *path, const json_t *value, const char *what) {
    return mp_refuse(err, 400, "invalid_type", path, "'%s' is %s; it must be %s", path,
                     value ? mp_json_kind(value) : "missing", what);
}

/* ---- Out --------------------------------------------------------------------------------------------------------- */

/* What stands between the items of a list, and between a name and its value. */
typedef struct layout {
    const char *comma, *colon;
} layout;

static bool append(const char *text, mp_buf *out) {
    return mp_buf_append(out, text, strlen(text));
}

static bool write_string(const char *text, size_t n, mp_buf *out) {
    static const char special[] = "\b\f\n\r\t\"\\", letters[] = "bfnrt\"\\";
    bool ok = mp_buf_append(out, "\"", 1);
    for (size_t i = 0, plain = 0; ok && i <= n; i++) {
        unsigned char c = i < n ? (unsigned char)text[i] : 0;
        if (i < n && c >= ' ' && c != '"' && c != '\\') continue;
        ok = mp_buf_append(out, text + plain, i - plain);
        plain = i + 1;
        if (!ok || i == n) break;
        char escaped[8];
        const char *found = c ? strchr(special, c) : NULL;
        if (found)
            snprintf(escaped, sizeof escaped, "\\%c", letters[found - special]);
        else
            snprintf(escaped, sizeof escaped, "\\u%04X", c);
        ok = append(escaped, out);
    }
    return ok && mp_buf_append(out, "\"", 1);
}

/* With as few of 15 to 17 digits as read as the same number: what a client or a model wrote stays what it was. */
static bool write_real(const json_t *value, mp_buf *out) {
    char text[48];
    for (size_t digits = 15;; digits++) {
        size_t n = json_dumpb(value, text, sizeof text - 1, JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
        if (n == 0 || n >= sizeof text) return false;
        text[n] = 0;
        if (digits == 17 || strtod(text, NULL) == json_real_value(value)) return append(text, out);
    }
}

static bool write_value(const json_t *value, const layout *l, mp_buf *out);

static bool write_array(const json_t *array, const layout *l, mp_buf *out) {
    size_t n = json_array_size(array);
    bool ok = append("[", out);
    for (size_t i = 0; ok && i < n; i++) {
        ok = (i == 0 || append(l->comma, out)) && write_value(json_array_get(array, i), l, out);
    }
    return ok && append("]", out);
}

static bool write_object(const json_t *object, const layout *l, mp_buf *out) {
    bool ok = append("{", out), first = true;
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)object, name, value) {
        ok = ok && (first || append(l->comma, out)) && write_string(name, strlen(name), out) && append(l->colon, out) &&
             write_value(value, l, out);
        first = false;
    }
    return ok && append("}", out);
}

static bool write_value(const json_t *value, const layout *l, mp_buf *out) {
    char text[24];
    switch (json_typeof(value)) {
    case JSON_OBJECT: return write_object(value, l, out);
    case JSON_ARRAY: return write_array(value, l, out);
    case JSON_STRING: return write_string(json_string_value(value), json_string_length(value), out);
    case JSON_INTEGER:
        snprintf(text, sizeof text, "%lld", (long long)json_integer_value(value));
        return append(text, out);
    case JSON_REAL: return write_real(value, out);
    case JSON_TRUE: return append("true", out);
    case JSON_FALSE: return append("false", out);
    case JSON_NULL: return append("null", out);
    }
    return false;
}

bool mp_json_write(json_t *value, mp_buf *out) {
    static const layout compact = { ",", ":" };
    bool ok = value && write_value(value, &compact, out);
    json_decref(value);
    return ok;
}

bool mp_json_dump(const json_t *value, mp_buf *out) {
    static const layout spaced = { ", ", ": " };
    return write_value(value, &spaced, out);
}

json_t *mp_json_float(float value) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", (double)value);
    return json_real(strtod(text, NULL));
}

/* Bytes of the well-formed UTF-8 character at the start of s, 0: there is none. */
static size_t character_len(const unsigned char *s, size_t n) {
    unsigned char c = s[0];
    if (c < 0x80) return 1;
    size_t len = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || len > n) return 0;
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
    }
    bool overlong = (c == 0xe0 && s[1] < 0xa0) || (c == 0xf0 && s[1] < 0x90);
    bool beyond = (c == 0xed && s[1] >= 0xa0) || (c == 0xf4 && s[1] >= 0x90);
    return overlong || beyond ? 0 : len;
}

json_t *mp_json_text(const char *bytes, size_t n) {
    json_t *string = json_stringn(bytes ? bytes : "", n);
    if (string) return string;
    mp_buf repaired = { .limit = 3 * n };
    bool ok = true;
    for (size_t i = 0; i < n && ok;) {
        size_t len = character_len((const unsigned char *)bytes + i, n - i);
        ok = len > 0 ? mp_buf_append(&repaired, bytes + i, len) : mp_buf_append(&repaired, "\xef\xbf\xbd", 3);
        i += len > 0 ? len : 1;
    }
    if (ok && repaired.len > 0) string = json_stringn(repaired.data, repaired.len);
    mp_buf_clear(&repaired);
    return string;
}

/* ---- Fields ------------------------------------------------------------------------------------------------------ */

static bool fail_field(const char *path, const mp_field *field, const json_t *value, const char *what,
                       mp_api_error *err) {
    char name[96];
    snprintf(name, sizeof name, "%s%s", path, field->name);
    return mp_refuse_type(err, name, value, what);
}

static bool fail_range(const char *path, const mp_field *field, mp_api_error *err) {
    char name[96];
    snprintf(name, sizeof name, "%s%s", path, field->name);
    return mp_refuse(err, 400, "invalid_value", name, "'%s' must be from %.15g to %.15g", name, field->low,
                     field->high);
}

static bool read_whole(const json_t *value, const char *path, const mp_field *field, int64_t *out, mp_api_error *err) {
    if (!json_is_integer(value)) return fail_field(path, field, value, "a whole number", err);
    json_int_t number = json_integer_value(value);
    if ((double)number < field->low || (double)number > field->high) return fail_range(path, field, err);
    *out = number;
    return true;
}

/* Clients send fields they do not use with the value that leaves them out. */
static bool asks_for_nothing(const json_t *value, const mp_field *field) {
    double number = json_number_value(value);
    if (json_is_false(value) || field->low > field->high) return json_is_false(value);
    return (json_is_number(value) && number >= field->low && number <= field->high) ||
           (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0);
}

static bool read_field(const json_t *value, const char *path, const mp_field *field, void *out, mp_api_error *err) {
    char *to = (char *)out + field->offset;
    int64_t whole;
    switch (field->kind) {
    case MP_FIELD_BOOL:
        if (!json_is_boolean(value)) return fail_field(path, field, value, "true or false", err);
        *(bool *)to = json_is_true(value);
        return true;
    case MP_FIELD_COUNT:
        if (!read_whole(value, path, field, &whole, err)) return false;
        *(uint32_t *)to = (uint32_t)whole;
        return true;
    case MP_FIELD_INTEGER: return read_whole(value, path, field, (int64_t *)to, err);
    case MP_FIELD_REAL: {
        if (!json_is_number(value)) return fail_field(path, field, value, "a number", err);
        double real = json_number_value(value);
        if (!(real >= field->low && real <= field->high)) return fail_range(path, field, err);
        *(double *)to = real;
        return true;
    }
    case MP_FIELD_OTHER: *(const json_t **)to = value; return true;
    case MP_FIELD_IGNORED: return true;
    case MP_FIELD_REFUSED:
        if (asks_for_nothing(value, field)) return true;
        return mp_refuse(err, 400, "unsupported", field->name, "'%s%s' is not supported%s", path, field->name,
                         field->why ? field->why : "; leave it out");
    }
    return true;
}

static void note_unknown(mp_buf *unknown, const char *path, const char *name) {
    if (!unknown) return;
    if (unknown->len > 0) mp_buf_append(unknown, ", ", 2);
    mp_buf_append(unknown, path, strlen(path));
    mp_buf_append(unknown, name, strlen(name));
}

bool mp_fields_read(const json_t *object, const char *path, const mp_field *fields, size_t n_fields, void *out,
                    mp_buf *unknown, mp_api_error *err) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)object, name, value) {
        const mp_field *field = NULL;
        for (size_t i = 0; i < n_fields && !field; i++) {
            if (strcmp(fields[i].name, name) == 0) field = &fields[i];
        }
        if (!field)
            note_unknown(unknown, path, name);
        else if (!json_is_null(value) && !read_field(value, path, field, out, err))
            return false;
    }
    return true;
}
