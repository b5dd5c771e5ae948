/* The GGUF container: a memory-mapped file, its metadata and its tensor directory.
 *
 *   "GGUF" | version u32 (2, 3) | n_tensors u64 | n_kv u64 | kv... | tensor info... | pad | tensor data
 *   kv          = key string | type u32 | value
 *   string      = length u64 | bytes           array = type u32 | count u64 | elements
 *   tensor info = name string | n_dims u32 | ne u64... | type u32 | offset u64 (from the start of tensor data)
 *
 * Every length, offset, count and product is checked against the file before it is used; the file is untrusted. Limits:
 * 65,536 keys, 65,536 tensors, strings of 1 MiB, tensor names of 64 bytes, alignment a power of two from 8 bytes to
 * 1 MiB. Refused: duplicate keys and tensor names, arrays of arrays, tensors of an unsupported type (by name), of no
 * weights, outside the file, or overlapping; big-endian files. Immutable after open; any thread. Pointers are valid
 * until close. Nobody may shorten the file while it is open: it is mapped. */
#ifndef MEPIC_MODEL_GGUF_H
#define MEPIC_MODEL_GGUF_H

#include "base/status.h"
#include "model/dtype.h"

typedef enum mp_gguf_type {
    MP_GGUF_U8, MP_GGUF_I8, MP_GGUF_U16, MP_GGUF_I16, MP_GGUF_U32, MP_GGUF_I32, MP_GGUF_F32, MP_GGUF_BOOL,
    MP_GGUF_STRING, MP_GGUF_ARRAY, MP_GGUF_U64, MP_GGUF_I64, MP_GGUF_F64,
} mp_gguf_type;

typedef struct mp_gguf mp_gguf;

typedef struct mp_str {
    const char *data; /* not terminated */
    size_t len;
} mp_str;

typedef struct mp_tensor {
    mp_str name;
    mp_dtype type;
    uint32_t n_dims;
    uint64_t ne[4];   /* ne[0] is contiguous; unused ones are 1 */
    const void *data; /* in the mapping */
    size_t bytes;
} mp_tensor;

mepic_status mp_gguf_open(const char *path, mp_gguf **out, mepic_error *err);
/* The same over bytes in memory (tests, fuzzing); `bytes` starts at a multiple of 8 and is borrowed until close. `name`
 * is for messages. */
mepic_status mp_gguf_open_memory(const void *bytes, size_t n, const char *name, mp_gguf **out, mepic_error *err);
void mp_gguf_close(mp_gguf *gguf); /* NULL is a no-op */

/* Scalars. A missing key: ERR_NOT_FOUND. A value of another kind, or out of the asked type's range: ERR_FORMAT. Any
 * integer type serves an integer, F32/F64 (and integers) a float. *out is written on success only. */
bool mp_gguf_has(const mp_gguf *gguf, const char *key);
mepic_status mp_gguf_u32(const mp_gguf *gguf, const char *key, uint32_t *out, mepic_error *err);
mepic_status mp_gguf_f32(const mp_gguf *gguf, const char *key, float *out, mepic_error *err);
mepic_status mp_gguf_bool(const mp_gguf *gguf, const char *key, bool *out, mepic_error *err);
mepic_status mp_gguf_str(const mp_gguf *gguf, const char *key, mp_str *out, mepic_error *err);

/* Arrays. Element type must be exactly `type`. For strings, walk with mp_gguf_array_str. */
typedef struct mp_gguf_array {
    mp_gguf_type type;
    size_t count;
    const uint8_t *data; /* unaligned */
    size_t bytes;
} mp_gguf_array;
mepic_status mp_gguf_array_find(const mp_gguf *gguf, const char *key, mp_gguf_type type, mp_gguf_array *out,
                                mepic_error *err);
/* The string at *offset (0 for the first) of a checked string array; moves *offset on. False at the end. */
bool mp_gguf_array_str(const mp_gguf_array *array, size_t *offset, mp_str *out);

size_t mp_gguf_n_tensors(const mp_gguf *gguf);
const mp_tensor *mp_gguf_tensor_at(const mp_gguf *gguf, size_t i);
const mp_tensor *mp_gguf_tensor(const mp_gguf *gguf, const char *name); /* NULL: not there */

/* For `inspect`: the i-th key and its value as text ("[151936 strings]" for an array). False at the end. */
bool mp_gguf_describe(const mp_gguf *gguf, size_t i, mp_str *key, char *value, size_t value_cap);

/* The i-th key and its whole entry as it stands in the file (key, type, value), for writers. False at the end. */
bool mp_gguf_entry(const mp_gguf *gguf, size_t i, mp_str *key, mp_str *raw);

const char *mp_gguf_path(const mp_gguf *gguf);
size_t mp_gguf_file_bytes(const mp_gguf *gguf);
const uint8_t *mp_gguf_bytes(const mp_gguf *gguf); /* [mp_gguf_file_bytes] */
/* The file as it was when it was opened, so that what is remembered about it belongs to the mapped bytes. */
typedef struct mp_file_id {
    uint64_t device, inode, bytes;
    int64_t mtime_ns;
} mp_file_id;
const mp_file_id *mp_gguf_file_id(const mp_gguf *gguf); /* NULL: bytes in memory */
/* Lets the system drop the mapping's resident pages: after weights were repacked only embedding rows are read. */
void mp_gguf_cool(const mp_gguf *gguf);

#endif
