/* model/gguf: the container reader against good files, handmade bad ones of every kind, and systematic damage (every
 * field set to every dangerous value, every truncation). Whatever a file says, nothing outside of it may be read: run
 * under the sanitizers too. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "model/gguf.h"
#include "support/random.h"
#include "support/tiny.h"

/* ---- A small writer that can write nonsense ---------------------------------------------------------------------- */

typedef struct file {
    uint8_t bytes[4096];
    size_t n;
} file;

static void put(file *f, uint64_t v, size_t n) {
    assert_true(f->n + n <= sizeof f->bytes);
    for (size_t i = 0; i < n; i++) f->bytes[f->n++] = i < 8 ? (uint8_t)(v >> 8 * i) : 0;
}

static void put_str(file *f, const char *s) {
    put(f, strlen(s), 8);
    for (; *s; s++) put(f, (uint8_t)*s, 1);
}

static void begin(file *f, uint64_t n_tensors, uint64_t n_kv) {
    f->n = 0;
    put(f, 0x46554747, 4); /* "GGUF" */
    put(f, 3, 4);
    put(f, n_tensors, 8);
    put(f, n_kv, 8);
}

static const size_t scalar_bytes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
enum { N_KINDS = 13 };

static void put_scalar(file *f, const char *key, mp_gguf_type type, uint64_t bits) {
    put_str(f, key);
    put(f, type, 4);
    put(f, bits, scalar_bytes[type]);
}

static void put_string(file *f, const char *key, const char *value) {
    put_str(f, key);
    put(f, MP_GGUF_STRING, 4);
    put_str(f, value);
}

static void put_array(file *f, const char *key, mp_gguf_type type, uint64_t count) {
    put_str(f, key);
    put(f, MP_GGUF_ARRAY, 4);
    put(f, type, 4);
    put(f, count, 8);
}

/* A tensor of up to two dimensions. */
static void put_tensor(file *f, const char *name, uint64_t ne0, uint64_t ne1, uint32_t type, uint64_t offset) {
    put_str(f, name);
    put(f, 2, 4);
    put(f, ne0, 8);
    put(f, ne1, 8);
    put(f, type, 4);
    put(f, offset, 8);
}

static void align(file *f, size_t to) {
    while (f->n % to) put(f, 0, 1);
}

/* ---- Opening ----------------------------------------------------------------------------------------------------- */

/* Opens a copy of exactly n bytes, so that a sanitizer sees one byte too many. *copy: free() after close. */
static mepic_status open_copy(const void *bytes, size_t n, mp_gguf **out, void **copy, mepic_error *err) {
    *copy = malloc(n ? n : 1);
    assert_non_null(*copy);
    memcpy(*copy, bytes, n);
    memset(err, 0, sizeof *err);
    mepic_status status = mp_gguf_open_memory(*copy, n, "file", out, err);
    if (status != MEPIC_OK) {
        assert_int_equal(err->status, status);
        assert_true(err->message[0] != 0);
    }
    return status;
}

/* Everything an accepted file offers is inside of it, and is read. */
static void walk(const mp_gguf *gguf, const uint8_t *bytes, size_t n) {
    volatile unsigned sum = 0; /* the reads happen */
    mp_str key, raw, text;
    char value[64];
    for (size_t i = 0; mp_gguf_describe(gguf, i, &key, value, sizeof value); i++) {
        assert_true(mp_gguf_entry(gguf, i, &key, &raw));
        assert_true((const uint8_t *)raw.data >= bytes && raw.len <= n &&
                    (const uint8_t *)raw.data + raw.len <= bytes + n);
        for (size_t j = 0; j < raw.len; j++) sum += (unsigned char)raw.data[j];
        char name[256];
        if (key.len >= sizeof name || memchr(key.data, 0, key.len)) continue;
        memcpy(name, key.data, key.len);
        name[key.len] = 0;
        for (int type = 0; type < N_KINDS; type++) {
            mp_gguf_array array;
            if (mp_gguf_array_find(gguf, name, (mp_gguf_type)type, &array, NULL) != MEPIC_OK) continue;
            size_t at = 0, count = 0;
            for (size_t j = 0; j < array.bytes; j++) sum += array.data[j];
            while (mp_gguf_array_str(&array, &at, &text)) count++;
            assert_true(type != MP_GGUF_STRING || count == array.count);
        }
    }
    for (size_t i = 0; i < mp_gguf_n_tensors(gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(gguf, i);
        const uint8_t *p = t->data;
        assert_true(p >= bytes && t->bytes <= n && p + t->bytes <= bytes + n);
        for (size_t j = 0; j < t->bytes; j++) sum += p[j];
    }
}

/* True if it was accepted. */
static bool try_open(const void *bytes, size_t n) {
    mp_gguf *gguf;
    mepic_error err;
    void *copy;
    bool ok = open_copy(bytes, n, &gguf, &copy, &err) == MEPIC_OK;
    if (ok) walk(gguf, copy, n);
    if (ok) mp_gguf_close(gguf);
    free(copy);
    return ok;
}

/* Refused with this status, and the message has `culprit` in it. */
static void refuse(const char *what, const file *f, mepic_status status, const char *culprit) {
    mp_gguf *gguf;
    mepic_error err;
    void *copy;
    mepic_status got = open_copy(f->bytes, f->n, &gguf, &copy, &err);
    free(copy);
    if (got == status && strstr(err.message, culprit) && strstr(err.message, "file")) return;
    fail_msg("%s: %s \"%s\"; expected %s and \"%s\"", what, mepic_status_name(got), err.message,
             mepic_status_name(status), culprit);
}

/* ---- A good file with everything in it --------------------------------------------------------------------------- */

static const uint64_t minus_two = (uint64_t)-2;

static uint64_t f32_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static uint64_t f64_bits(double v) {
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static void good_file(file *f) {
    begin(f, 3, 28);
    put_scalar(f, "u8", MP_GGUF_U8, 200);
    put_scalar(f, "i8", MP_GGUF_I8, minus_two);
    put_scalar(f, "u16", MP_GGUF_U16, 60000);
    put_scalar(f, "i16", MP_GGUF_I16, minus_two);
    put_scalar(f, "u32", MP_GGUF_U32, 4000000000u);
    put_scalar(f, "i32", MP_GGUF_I32, minus_two);
    put_scalar(f, "f32", MP_GGUF_F32, f32_bits(1.5f));
    put_scalar(f, "bool", MP_GGUF_BOOL, 1);
    put_string(f, "string", "text\n\x1b[1m");
    put_scalar(f, "u64", MP_GGUF_U64, 1ull << 40);
    put_scalar(f, "i64", MP_GGUF_I64, minus_two);
    put_scalar(f, "f64", MP_GGUF_F64, f64_bits(1e300));
    put_scalar(f, "i64_small", MP_GGUF_I64, 7);
    put_scalar(f, "f64_small", MP_GGUF_F64, f64_bits(-0.25));
    put_scalar(f, "bad_bool", MP_GGUF_BOOL, 2);
    put_string(f, "empty", "");
    for (int type = 0; type < N_KINDS; type++) {
        if (type == MP_GGUF_STRING || type == MP_GGUF_ARRAY) continue;
        char key[32];
        snprintf(key, sizeof key, "array_%d", type);
        put_array(f, key, (mp_gguf_type)type, 3);
        for (int i = 0; i < 3; i++) put(f, (uint64_t)(i + 1), scalar_bytes[type]);
    }
    put_array(f, "strings", MP_GGUF_STRING, 3);
    put_str(f, "one");
    put_str(f, "");
    put_str(f, "three");
    put_tensor(f, "a", 32, 2, MP_DTYPE_Q8_0, 0);    /* 68 bytes */
    put_tensor(f, "b", 5, 1, MP_DTYPE_F32, 96);     /* 20 bytes */
    put_tensor(f, "c", 256, 1, MP_DTYPE_Q6_K, 128); /* 210 bytes */
    align(f, 32);
    for (int i = 0; i < 128 + 210; i++) put(f, (uint64_t)i, 1);
}

static void a_good_file(void **state) {
    (void)state;
    file f;
    good_file(&f);
    for (uint32_t version = 2; version <= 3; version++) {
        f.bytes[4] = (uint8_t)version;
        mp_gguf *g;
        mepic_error err;
        void *copy;
        assert_int_equal(open_copy(f.bytes, f.n, &g, &copy, &err), MEPIC_OK);
        uint32_t u = 0;
        float v = 0;
        bool b = false;
        mp_str s;
        assert_int_equal(mp_gguf_u32(g, "u8", &u, NULL) || u != 200, 0);
        assert_int_equal(mp_gguf_u32(g, "u16", &u, NULL) || u != 60000, 0);
        assert_int_equal(mp_gguf_u32(g, "u32", &u, NULL) || u != 4000000000u, 0);
        assert_int_equal(mp_gguf_u32(g, "i64_small", &u, NULL) || u != 7, 0);
        assert_int_equal(mp_gguf_f32(g, "f32", &v, NULL) || v != 1.5f, 0);
        assert_int_equal(mp_gguf_f32(g, "f64_small", &v, NULL) || v != -0.25f, 0);
        assert_int_equal(mp_gguf_f32(g, "i16", &v, NULL) || v != -2, 0);
        assert_int_equal(mp_gguf_f32(g, "u64", &v, NULL) || v != 0x1p40f, 0);
        assert_int_equal(mp_gguf_bool(g, "bool", &b, NULL) || !b, 0);
        assert_int_equal(mp_gguf_str(g, "string", &s, NULL), MEPIC_OK);
        assert_int_equal(s.len, 9);
        assert_true(mp_gguf_has(g, "empty"));
        assert_false(mp_gguf_has(g, "emptyy"));
        assert_false(mp_gguf_has(g, ""));
        const mp_tensor *t = mp_gguf_tensor(g, "b");
        assert_non_null(t);
        assert_int_equal(t->ne[0] * 100 + t->ne[1] * 10 + t->ne[3], 511);
        assert_int_equal(t->bytes, 20);
        assert_int_equal(*(const uint8_t *)t->data, 96);
        assert_int_equal(mp_gguf_tensor(g, "c")->bytes, 210);
        assert_null(mp_gguf_tensor(g, "d"));
        assert_string_equal(mp_gguf_path(g), "file");
        assert_null(mp_gguf_file_id(g));
        mp_gguf_cool(g); /* nothing to do in memory */
        walk(g, copy, f.n);
        mp_gguf_close(g);
        free(copy);
    }
}

static void values_are_described_without_control_characters(void **state) {
    (void)state;
    file f;
    good_file(&f);
    mp_gguf *g;
    mepic_error err;
    void *copy;
    assert_int_equal(open_copy(f.bytes, f.n, &g, &copy, &err), MEPIC_OK);
    static const char *const want[] = { "200",  "-2",        "60000",         "-2", "4000000000", "-2", "1.5",
                                        "true", "text  [1m", "1099511627776", "-2", "1e+300" };
    mp_str key;
    char value[32];
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        assert_true(mp_gguf_describe(g, i, &key, value, sizeof value));
        assert_string_equal(value, want[i]);
    }
    assert_true(mp_gguf_describe(g, 27, &key, value, sizeof value));
    assert_string_equal(value, "[3 strings]");
    assert_false(mp_gguf_describe(g, 28, &key, value, sizeof value));
    assert_false(mp_gguf_entry(g, 28, &key, &key));
    assert_true(mp_gguf_describe(g, 8, &key, value, 3));
    assert_string_equal(value, "te");
    mp_gguf_close(g);
    free(copy);
}

static void a_value_of_another_kind_is_refused(void **state) {
    (void)state;
    file f;
    good_file(&f);
    mp_gguf *g;
    mepic_error err;
    void *copy;
    assert_int_equal(open_copy(f.bytes, f.n, &g, &copy, &err), MEPIC_OK);
    static const char *const keys[] = { "u8",   "i8",     "u16",     "i16", "u32", "i32", "f32",
                                        "bool", "string", "strings", "u64", "i64", "f64", "bad_bool" };
    /* Which getters serve a key: u = u32, f = f32, b = bool, s = str. */
    static const char *const served[] = { "uf", "f", "uf", "f", "uf", "f", "f", "b", "s", "", "f", "f", "", "" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        uint32_t u = 77;
        float v = 77;
        bool b = false;
        mp_str s = { 0 };
        for (const char *get = "ufbs"; *get; get++) {
            mepic_status status = *get == 'u'   ? mp_gguf_u32(g, keys[i], &u, &err)
                                  : *get == 'f' ? mp_gguf_f32(g, keys[i], &v, &err)
                                  : *get == 'b' ? mp_gguf_bool(g, keys[i], &b, &err)
                                                : mp_gguf_str(g, keys[i], &s, &err);
            bool serves = strchr(served[i], *get) != NULL;
            if ((status == MEPIC_OK) != serves) fail_msg("%s as %c: %s", keys[i], *get, mepic_status_name(status));
            if (serves) continue;
            assert_int_equal(status, MEPIC_ERR_FORMAT);
            assert_non_null(strstr(err.message, keys[i]));
        }
        if (!strchr(served[i], 'u')) assert_int_equal(u, 77); /* outputs on success only */
    }
    uint32_t u;
    assert_int_equal(mp_gguf_u32(g, "none", &u, &err), MEPIC_ERR_NOT_FOUND);
    assert_non_null(strstr(err.message, "none"));
    mp_gguf_close(g);
    free(copy);
}

/* V4: every array, asked for as every type. */
static void an_array_of_another_type_is_refused(void **state) {
    (void)state;
    file f;
    good_file(&f);
    mp_gguf *g;
    mepic_error err;
    void *copy;
    assert_int_equal(open_copy(f.bytes, f.n, &g, &copy, &err), MEPIC_OK);
    for (int have = 0; have < N_KINDS; have++) {
        if (have == MP_GGUF_ARRAY) continue;
        char key[32];
        snprintf(key, sizeof key, have == MP_GGUF_STRING ? "strings" : "array_%d", have);
        for (int asked = 0; asked < N_KINDS; asked++) {
            mp_gguf_array a = { .count = 77 };
            mepic_status status = mp_gguf_array_find(g, key, (mp_gguf_type)asked, &a, &err);
            assert_int_equal(status, have == asked ? MEPIC_OK : MEPIC_ERR_FORMAT);
            assert_int_equal(a.count, have == asked ? 3 : 77);
            if (have == asked && have != MP_GGUF_STRING) assert_int_equal(a.bytes, 3 * scalar_bytes[have]);
        }
        assert_int_equal(mp_gguf_array_find(g, "u8", (mp_gguf_type)have, &(mp_gguf_array){ 0 }, &err),
                         MEPIC_ERR_FORMAT);
    }
    mp_gguf_array a;
    assert_int_equal(mp_gguf_array_find(g, "strings", MP_GGUF_STRING, &a, NULL), MEPIC_OK);
    size_t at = 0;
    mp_str s;
    assert_true(mp_gguf_array_str(&a, &at, &s) && s.len == 3 && memcmp(s.data, "one", 3) == 0);
    assert_true(mp_gguf_array_str(&a, &at, &s) && s.len == 0);
    assert_true(mp_gguf_array_str(&a, &at, &s) && s.len == 5);
    assert_false(mp_gguf_array_str(&a, &at, &s));
    mp_gguf_close(g);
    free(copy);
}

/* ---- Handmade bad files ------------------------------------------------------------------------------------------ */

static void bad_headers(void **state) {
    (void)state;
    file f = { .n = 0 };
    refuse("empty file", &f, MEPIC_ERR_FORMAT, "not a GGUF file");
    begin(&f, 0, 0);
    assert_true(mp_gguf_open_memory(f.bytes + 1, f.n - 1, "file", &(mp_gguf *){ NULL }, NULL) == MEPIC_ERR_ARGUMENT);
    f.bytes[0] = 'g';
    refuse("magic", &f, MEPIC_ERR_FORMAT, "not a GGUF file");
    static const struct {
        uint32_t version;
        const char *culprit;
    } versions[] = { { 0, "version 0" },         { 1, "version 1" },
                     { 4, "version 4" },         { UINT32_MAX, "version 4294967295" },
                     { 3u << 24, "big-endian" }, { 2u << 24, "big-endian" } };
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        begin(&f, 0, 0);
        memcpy(f.bytes + 4, &versions[i].version, 4);
        refuse("version", &f, MEPIC_ERR_UNSUPPORTED, versions[i].culprit);
    }
    static const uint64_t counts[] = { 1, 65536, 65537, INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        begin(&f, counts[i], 0);
        refuse("tensors", &f, MEPIC_ERR_FORMAT, "tensors");
        begin(&f, 0, counts[i]);
        refuse("keys", &f, MEPIC_ERR_FORMAT, "keys");
    }
    begin(&f, 0, 0);
    f.n = 12;
    refuse("half a header", &f, MEPIC_ERR_FORMAT, "header field");
}

static void bad_keys(void **state) {
    (void)state;
    file f;
    begin(&f, 0, 1);
    put(&f, UINT64_MAX, 8);
    put(&f, 0, 64);
    refuse("key length", &f, MEPIC_ERR_FORMAT, "key 0");
    begin(&f, 0, 1);
    put(&f, 100, 8);
    put(&f, 0, 20);
    refuse("key longer than the file", &f, MEPIC_ERR_FORMAT, "key 0");
    begin(&f, 0, 1);
    put_scalar(&f, "", MP_GGUF_U32, 1);
    refuse("empty key", &f, MEPIC_ERR_FORMAT, "key 0");
    for (uint32_t type = N_KINDS; type != 0; type = type == N_KINDS ? 1u << 31 : type << 1) {
        begin(&f, 0, 1);
        put_str(&f, "key");
        put(&f, type, 4);
        put(&f, 0, 32);
        refuse("value type", &f, MEPIC_ERR_FORMAT, "unknown value type");
    }
    begin(&f, 0, 1);
    put_string(&f, "long", "x");
    memset(f.bytes + f.n - 9, 0xff, 8);
    refuse("string length", &f, MEPIC_ERR_FORMAT, "limit");
    begin(&f, 0, 1);
    put_scalar(&f, "some_key", MP_GGUF_U64, 1);
    f.n -= 3;
    refuse("value cut", &f, MEPIC_ERR_FORMAT, "past the end");
    begin(&f, 0, 3);
    put_scalar(&f, "twice", MP_GGUF_U32, 1);
    put_scalar(&f, "other", MP_GGUF_U32, 1);
    put_string(&f, "twice", "x");
    refuse("duplicate key", &f, MEPIC_ERR_FORMAT, "\"twice\"");
    begin(&f, 0, 1);
    put_array(&f, "nested", MP_GGUF_ARRAY, 1);
    put(&f, 0, 32);
    refuse("nested array", &f, MEPIC_ERR_UNSUPPORTED, "array of arrays");
    begin(&f, 0, 1);
    put_array(&f, "array", (mp_gguf_type)99, 1);
    put(&f, 0, 32);
    refuse("element type", &f, MEPIC_ERR_FORMAT, "unknown value type 99");
    for (int type = 0; type < N_KINDS; type++) {
        static const uint64_t counts[] = { 100,       UINT32_MAX,     1ull << 61, 1ull << 62,
                                           INT64_MAX, UINT64_MAX / 8, UINT64_MAX };
        for (size_t i = 0; i < sizeof counts / sizeof *counts && type != MP_GGUF_ARRAY; i++) {
            begin(&f, 0, 1);
            put_array(&f, "array", (mp_gguf_type)type, counts[i]);
            put(&f, 0, 64);
            refuse("count", &f, MEPIC_ERR_FORMAT, "key 0 (\"array\") is an array of");
        }
    }
    begin(&f, 0, 1);
    put_array(&f, "array", MP_GGUF_STRING, 2);
    put_str(&f, "fits");
    put(&f, 1ull << 32, 8);
    refuse("string in an array", &f, MEPIC_ERR_FORMAT, "limit");
}

/* One tensor entry with `dims` of the four sizes; data of 64 bytes follows. */
static void one_tensor(file *f, const char *name, uint32_t dims, const uint64_t ne[4], uint32_t type, uint64_t offset) {
    begin(f, 1, 0);
    put_str(f, name);
    put(f, dims, 4);
    for (uint32_t i = 0; i < dims && i < 4; i++) put(f, ne[i], 8);
    put(f, type, 4);
    put(f, offset, 8);
    align(f, 32);
    for (int i = 0; i < 64; i++) put(f, 1, 1);
}

static void bad_tensors(void **state) {
    (void)state;
    file f;
    static const uint64_t ok[4] = { 16, 1, 1, 1 };
    one_tensor(&f, "good", 1, ok, MP_DTYPE_F32, 0);
    assert_true(try_open(f.bytes, f.n));
    one_tensor(&f, "a_name_of_sixty_five_bytes_is_one_more_than_the_format_allows_____", 1, ok, MP_DTYPE_F32, 0);
    refuse("name length", &f, MEPIC_ERR_FORMAT, "tensor 0");
    one_tensor(&f, "", 1, ok, MP_DTYPE_F32, 0);
    refuse("no name", &f, MEPIC_ERR_FORMAT, "no name");
    one_tensor(&f, "t", 0, ok, MP_DTYPE_F32, 0);
    refuse("no dimensions", &f, MEPIC_ERR_FORMAT, "0 dimensions");
    one_tensor(&f, "t", 5, ok, MP_DTYPE_F32, 0);
    refuse("five dimensions", &f, MEPIC_ERR_FORMAT, "5 dimensions");
    one_tensor(&f, "t", UINT32_MAX, ok, MP_DTYPE_F32, 0);
    refuse("many dimensions", &f, MEPIC_ERR_FORMAT, "dimensions");
    static const struct {
        uint32_t type;
        const char *name;
    } types[] = { { 4, "Q4_2" }, { 10, "Q2_K" },      { 20, "IQ4_NL" },
                  { 28, "F64" }, { 99, "number 99" }, { UINT32_MAX, "unknown" } };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        one_tensor(&f, "odd", 1, ok, types[i].type, 0);
        refuse("type", &f, MEPIC_ERR_UNSUPPORTED, types[i].name);
        refuse("type", &f, MEPIC_ERR_UNSUPPORTED, "\"odd\"");
    }
    one_tensor(&f, "t", 1, ok, MP_DTYPE_Q4_0, 0);
    refuse("half a block", &f, MEPIC_ERR_FORMAT, "multiple of the 32");
    one_tensor(&f, "t", 1, ok, MP_DTYPE_F32, 16);
    refuse("offset", &f, MEPIC_ERR_FORMAT, "offset 16");
    one_tensor(&f, "t", 1, ok, MP_DTYPE_F32, 32);
    refuse("outside", &f, MEPIC_ERR_FORMAT, "outside the file");

    begin(&f, 2, 0);
    put_tensor(&f, "twin", 4, 1, MP_DTYPE_F32, 0);
    put_tensor(&f, "twin", 4, 1, MP_DTYPE_F32, 32);
    align(&f, 32);
    put(&f, 0, 64);
    refuse("duplicate tensor", &f, MEPIC_ERR_FORMAT, "\"twin\"");
    begin(&f, 3, 0);
    put_tensor(&f, "first", 4, 1, MP_DTYPE_F32, 64);
    put_tensor(&f, "second", 9, 1, MP_DTYPE_F32, 0);
    put_tensor(&f, "third", 4, 1, MP_DTYPE_F32, 32);
    align(&f, 32);
    put(&f, 0, 128);
    refuse("overlap", &f, MEPIC_ERR_FORMAT, "\"second\" and \"third\" overlap");
    begin(&f, 2, 0);
    put_tensor(&f, "one", 4, 1, MP_DTYPE_F32, 0);
    put_tensor(&f, "same", 4, 1, MP_DTYPE_F32, 0);
    align(&f, 32);
    put(&f, 0, 64);
    refuse("same place", &f, MEPIC_ERR_FORMAT, "overlap");
}

/* V2, V9, V10: products and sums that wrap. Nothing of this fits in the file, so all is refused. */
static void sizes_that_wrap(void **state) {
    (void)state;
    static const uint64_t big[] = { 1ull << 31, (1ull << 31) - 32, 1ull << 32, (1ull << 32) + 32,
                                    1ull << 60, 1ull << 61,        1ull << 62, 1ull << 63,
                                    INT64_MAX,  INT64_MAX - 31,    UINT64_MAX, UINT64_MAX - 31 };
    static const uint64_t shapes[][4] = {
        { 4194305, 4194305, 211106198978564u, 1 }, /* wraps to 4 in 64 bits */
        { 1ull << 32, 1ull << 32, 1, 1 },
        { 1ull << 31, 1ull << 31, 1ull << 31, 1ull << 31 },
        { 0, 1, 1, 1 },
        { 1, 0, 1, 1 },
        { 1, 1, 1, 0 },
    };
    static const uint32_t types[] = { MP_DTYPE_F32, MP_DTYPE_F16, MP_DTYPE_Q8_0, MP_DTYPE_Q6_K };
    file f;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            one_tensor(&f, "t", 4, shapes[i], types[t], 0);
            assert_false(try_open(f.bytes, f.n));
        }
        uint32_t len = mp_dtype_find(types[t])->len;
        for (size_t i = 0; i < sizeof big / sizeof *big; i++) {
            for (int where = 0; where < 4; where++) { /* a large dimension, or a large offset of something small */
                uint64_t ne[4] = { len, 1, 1, 1 };
                ne[where] = big[i] / len * len;
                one_tensor(&f, "t", 4, ne, types[t], 0);
                assert_false(try_open(f.bytes, f.n));
            }
            one_tensor(&f, "t", 4, (const uint64_t[4]){ len, 1, 1, 1 }, types[t], big[i]);
            assert_false(try_open(f.bytes, f.n));
            one_tensor(&f, "t", 4, (const uint64_t[4]){ len, 1, 1, 1 }, types[t], big[i] / 32 * 32);
            assert_false(try_open(f.bytes, f.n));
        }
    }
}

/* V3 */
static void alignments(void **state) {
    (void)state;
    static const struct {
        uint32_t value;
        bool good;
    } cases[] = { { 0, false },
                  { 1, false },
                  { 3, false },
                  { 4, false },
                  { 8, true },
                  { 24, false },
                  { 32, true },
                  { 64, true },
                  { 1024, true },
                  { 1u << 20, true },
                  { (1u << 20) + 1, false },
                  { 1u << 21, false },
                  { 1u << 31, false },
                  { UINT32_MAX, false } };
    size_t room = (2u << 20) + 64;
    uint8_t *bytes = calloc(1, room);
    assert_non_null(bytes);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        file f;
        begin(&f, 2, 1);
        put_scalar(&f, "general.alignment", MP_GGUF_U32, cases[i].value);
        put_tensor(&f, "a", 4, 1, MP_DTYPE_F32, 0);
        put_tensor(&f, "b", 4, 1, MP_DTYPE_F32, cases[i].value > 16 ? cases[i].value : 16);
        if (!cases[i].good) refuse("alignment", &f, MEPIC_ERR_FORMAT, "general.alignment");
        memcpy(bytes, f.bytes, f.n);
        assert_int_equal(try_open(bytes, room), cases[i].good);
    }
    free(bytes);
    for (int type = 0; type < N_KINDS; type++) {
        file f;
        begin(&f, 0, 1);
        if (type == MP_GGUF_STRING)
            put_string(&f, "general.alignment", "32");
        else if (type == MP_GGUF_ARRAY)
            put_array(&f, "general.alignment", MP_GGUF_U32, 0);
        else
            put_scalar(&f, "general.alignment", (mp_gguf_type)type, 32);
        if (type == MP_GGUF_U32)
            assert_true(try_open(f.bytes, f.n));
        else
            refuse("type of the alignment", &f, MEPIC_ERR_FORMAT, "general.alignment");
    }
}

/* ---- Systematic damage ------------------------------------------------------------------------------------------- */

/* V1 and V6: eight bytes at every place of the file, so also every 64-bit field, set to every dangerous value. Accepted
 * or refused, nothing outside the file is touched. */
static void dangerous_numbers_everywhere(void **state) {
    (void)state;
    static const uint64_t values[] = { 0,
                                       1,
                                       (1ull << 31) - 1,
                                       1ull << 31,
                                       (1ull << 31) + 1,
                                       (1ull << 32) - 1,
                                       1ull << 32,
                                       (1ull << 32) + 1,
                                       1ull << 62,
                                       (1ull << 63) - 1,
                                       1ull << 63,
                                       (1ull << 63) + 1,
                                       UINT64_MAX - 31,
                                       UINT64_MAX };
    file f;
    good_file(&f);
    size_t accepted = 0, refused = 0;
    for (size_t at = 0; at + 8 <= f.n; at++) {
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
            for (size_t width = 4; width <= 8; width += 4) {
                file g = f;
                for (size_t i = 0; i < width; i++) g.bytes[at + i] = (uint8_t)(values[v] >> 8 * i);
                *(try_open(g.bytes, g.n) ? &accepted : &refused) += 1;
            }
        }
    }
    print_message("%zu accepted, %zu refused\n", accepted, refused);
    assert_true(accepted > 1000 && refused > 1000);
}

static void random_damage(void **state) {
    (void)state;
    rng random = rng_open(20261124);
    print_message("seed %llu\n", (unsigned long long)random.state);
    file f;
    good_file(&f);
    for (int round = 0; round < 50000; round++) {
        file g = f;
        uint32_t n = 1 + rng_below(&random, 16);
        for (uint32_t i = 0; i < n; i++) g.bytes[rng_below(&random, (uint32_t)g.n)] = (uint8_t)rng_next(&random);
        try_open(g.bytes, g.n);
    }
}

/* V8, on a whole model: any truncation is refused, in the header and in the data. */
static void every_truncation(void **state) {
    (void)state;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    mp_synth_set_type(&spec, MP_DTYPE_Q8_0);
    size_t n;
    uint8_t *bytes = tiny_model_bytes(&spec, &n);
    mp_gguf *gguf;
    mepic_error err;
    assert_int_equal(mp_gguf_open_memory(bytes, n, "file", &gguf, &err), MEPIC_OK);
    size_t data = n, end = 0;
    for (size_t i = 0; i < mp_gguf_n_tensors(gguf); i++) {
        const mp_tensor *t = mp_gguf_tensor_at(gguf, i);
        size_t start = (size_t)((const uint8_t *)t->data - bytes);
        if (start < data) data = start;
        if (start + t->bytes > end) end = start + t->bytes;
    }
    mp_gguf_close(gguf);
    assert_true(data > 1000 && end > data + 1000);
    print_message("header of %zu bytes, data of %zu\n", data, end - data);
    for (size_t cut = 0; cut < data; cut++) assert_false(try_open(bytes, cut));
    for (size_t i = 0; i < 1000; i++) assert_false(try_open(bytes, data + (end - data - 1) * i / 999));
    assert_true(try_open(bytes, end)); /* the padding after the last tensor may be missing */
    free(bytes);
}

/* 65,536 keys that share a long beginning open in no time: no quadratic search for duplicates. */
static void many_keys(void **state) {
    (void)state;
    enum { N = 65536, LEN = 40, ENTRY = 8 + LEN + 4 + 1 };
    size_t n = 24 + (size_t)N * ENTRY;
    uint8_t *bytes = calloc(1, n), *p = bytes + 24;
    assert_non_null(bytes);
    file head;
    begin(&head, 0, N);
    memcpy(bytes, head.bytes, 24);
    for (uint32_t i = 0; i < N; i++, p += ENTRY) {
        p[0] = LEN;
        char key[LEN + 1];
        snprintf(key, sizeof key, "the.same.beginning.of.every.key.%08u", i * 40503 % N);
        memcpy(p + 8, key, LEN);
    }
    assert_true(try_open(bytes, n));
    memcpy(bytes + 24 + 8, bytes + n - ENTRY + 8, LEN); /* the first key is now the last one */
    assert_false(try_open(bytes, n));
    free(bytes);
}

/* The n-th allocation fails, for every n: an error, and nothing is lost (leaks are the sanitizer's to find). */
static void out_of_memory(void **state) {
    (void)state;
    file f;
    good_file(&f);
    for (uint64_t n = 1;; n++) {
        mp_gguf *gguf = NULL;
        mepic_error err;
        void *copy;
        mp_mem_fail_at(n, false);
        mepic_status status = open_copy(f.bytes, f.n, &gguf, &copy, &err);
        mp_mem_fail_at(0, false);
        if (status == MEPIC_OK) mp_gguf_close(gguf);
        free(copy);
        if (status == MEPIC_OK) break;
        assert_int_equal(status, MEPIC_ERR_NOMEM);
        assert_null(gguf);
        assert_true(n < 20);
    }
}

static void files_on_disk(void **state) {
    (void)state;
    mp_gguf *gguf;
    mepic_error err;
    assert_int_equal(mp_gguf_open("/nonexistent/model.gguf", &gguf, &err), MEPIC_ERR_IO);
    assert_non_null(strstr(err.message, "/nonexistent/model.gguf"));
    assert_int_equal(mp_gguf_open("/", &gguf, &err), MEPIC_ERR_IO);
    assert_int_equal(mp_gguf_open("/dev/null", &gguf, &err), MEPIC_ERR_IO);
    assert_non_null(strstr(err.message, "regular file"));
    assert_int_equal(mp_gguf_open(tiny_model_path(), &gguf, &err), MEPIC_OK);
    const mp_file_id *id = mp_gguf_file_id(gguf);
    assert_non_null(id);
    assert_int_equal(id->bytes, mp_gguf_file_bytes(gguf));
    walk(gguf, mp_gguf_bytes(gguf), mp_gguf_file_bytes(gguf));
    mp_gguf_cool(gguf); /* pages come back when they are read */
    walk(gguf, mp_gguf_bytes(gguf), mp_gguf_file_bytes(gguf));
    mp_gguf_close(gguf);
    mp_gguf_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_good_file),
        cmocka_unit_test(values_are_described_without_control_characters),
        cmocka_unit_test(a_value_of_another_kind_is_refused),
        cmocka_unit_test(an_array_of_another_type_is_refused),
        cmocka_unit_test(bad_headers),
        cmocka_unit_test(bad_keys),
        cmocka_unit_test(bad_tensors),
        cmocka_unit_test(sizes_that_wrap),
        cmocka_unit_test(alignments),
        cmocka_unit_test(dangerous_numbers_everywhere),
        cmocka_unit_test(random_damage),
        cmocka_unit_test(every_truncation),
        cmocka_unit_test(many_keys),
        cmocka_unit_test(out_of_memory),
        cmocka_unit_test(files_on_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
