/* The GGUF reader. Open walks the whole header once: every key, array element and tensor is checked there, so that what
 * is asked later cannot run over. Keys and tensor names are sorted once: duplicates are then neighbours and a lookup is
 * a binary search, at n log n whatever a crafted file contains (a hash table could be flooded). */
#include "model/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

enum {
    MAX_ENTRIES = 65536, /* keys, and tensors */
    MAX_STRING = 1 << 20,
    MAX_TENSOR_NAME = 64,
    MIN_ALIGNMENT = 8, /* the format's own rule; F32 data may then be read in place */
    MAX_ALIGNMENT = 1 << 20,
    DEFAULT_ALIGNMENT = 32,
    MIN_KV_BYTES = 8 + 1 + 4 + 1,
    MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8,
};

typedef struct entry {
    mp_str key, raw; /* raw: key, type and value as they stand in the file */
    mp_gguf_type type;
    const uint8_t *value; /* of a scalar or string */
    mp_str string;
    mp_gguf_array array;
} entry;

struct mp_gguf {
    char *path;
    const uint8_t *bytes;
    size_t n_bytes;
    bool mapped;
    mp_file_id id;
    uint32_t alignment;
    size_t n_entries, n_tensors;
    entry *entries;
    const entry **by_key;
    mp_tensor *tensors;
    const mp_tensor **by_name;
};

static const struct {
    const char *name;
    uint8_t bytes; /* of a scalar; 0: string, array */
} kinds[] = {
    [MP_GGUF_U8] = { "u8", 1 },       [MP_GGUF_I8] = { "i8", 1 },     [MP_GGUF_U16] = { "u16", 2 },
    [MP_GGUF_I16] = { "i16", 2 },     [MP_GGUF_U32] = { "u32", 4 },   [MP_GGUF_I32] = { "i32", 4 },
    [MP_GGUF_F32] = { "f32", 4 },     [MP_GGUF_BOOL] = { "bool", 1 }, [MP_GGUF_STRING] = { "string", 0 },
    [MP_GGUF_ARRAY] = { "array", 0 }, [MP_GGUF_U64] = { "u64", 8 },   [MP_GGUF_I64] = { "i64", 8 },
    [MP_GGUF_F64] = { "f64", 8 },
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

typedef struct reader {
    const mp_gguf *gguf;
    size_t at;        /* <= gguf->n_bytes */
    const char *what; /* for messages: reading `what` number `index` */
    size_t index;
    mp_str name; /* of it, once it is read */
    mepic_error *err;
} reader;

enum { WHERE_CAP = 160 };

/* What is being read, for messages: key 3 ("general.name"). */
static const char *where(const reader *r, char *out) {
    int n = snprintf(out, WHERE_CAP, "%s %zu", r->what, r->index);
    if (r->name.len > 0 && r->name.len < 100) {
        snprintf(out + n, WHERE_CAP - (size_t)n, " (\"%.*s\")", (int)r->name.len, r->name.data);
    }
    return out;
}

/* Bytes between `at` and the end of the file. */
static size_t left(const reader *r) {
    return r->gguf->n_bytes - r->at;
}

static mepic_status take(reader *r, size_t n, const uint8_t **out) {
    char place[WHERE_CAP];
    if (n > left(r)) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT,
                       "%s: %s runs past the end of the file (%zu bytes at offset %zu, the file has %zu); it is "
                       "damaged or was not copied completely",
                       r->gguf->path, where(r, place), n, r->at, r->gguf->n_bytes);
    }
    *out = r->gguf->bytes + r->at;
    r->at += n;
    return MEPIC_OK;
}

static uint64_t load(const uint8_t *p, size_t n) {
    uint64_t v = 0;
    for (size_t i = 0; i < n; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

static mepic_status take_u32(reader *r, uint32_t *out) {
    const uint8_t *p;
    mepic_status status = take(r, 4, &p);
    if (status == MEPIC_OK) *out = (uint32_t)load(p, 4);
    return status;
}

static mepic_status take_u64(reader *r, uint64_t *out) {
    const uint8_t *p;
    mepic_status status = take(r, 8, &p);
    if (status == MEPIC_OK) *out = load(p, 8);
    return status;
}

static mepic_status take_str(reader *r, size_t limit, mp_str *out) {
    char place[WHERE_CAP];
    uint64_t len = 0;
    mepic_status status = take_u64(r, &len);
    if (status != MEPIC_OK) return status;
    if (len > limit) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: %s has a string of %" PRIu64 " bytes; the limit is %zu",
                       r->gguf->path, where(r, place), len, limit);
    }
    const uint8_t *p;
    status = take(r, (size_t)len, &p);
    if (status == MEPIC_OK) *out = (mp_str){ (const char *)p, (size_t)len };
    return status;
}

/* ---- Keys -------------------------------------------------------------------------------------------------------- */

static mepic_status take_kind(reader *r, mp_gguf_type *out) {
    char place[WHERE_CAP];
    uint32_t kind = 0;
    mepic_status status = take_u32(r, &kind);
    if (status != MEPIC_OK) return status;
    if (kind >= N_KINDS) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: %s has the unknown value type %u", r->gguf->path, where(r, place),
                       kind);
    }
    *out = (mp_gguf_type)kind;
    return MEPIC_OK;
}

static mepic_status take_array(reader *r, mp_gguf_array *out) {
    char place[WHERE_CAP];
    uint64_t count = 0;
    mp_gguf_array array = { 0 };
    mepic_status status = take_kind(r, &array.type);
    if (status != MEPIC_OK) return status;
    if (array.type == MP_GGUF_ARRAY) {
        return mp_fail(r->err, MEPIC_ERR_UNSUPPORTED, "%s: %s is an array of arrays, which is not supported",
                       r->gguf->path, where(r, place));
    }
    status = take_u64(r, &count);
    if (status != MEPIC_OK) return status;
    size_t least = kinds[array.type].bytes ? kinds[array.type].bytes : 8; /* a string has at least its length */
    if (count > left(r) / least) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT,
                       "%s: %s is an array of %" PRIu64 " elements, more than the rest of the file holds",
                       r->gguf->path, where(r, place), count);
    }
    array.count = (size_t)count;
    array.data = r->gguf->bytes + r->at;
    if (array.type == MP_GGUF_STRING) {
        for (size_t i = 0; i < array.count; i++) {
            mp_str ignored;
            if ((status = take_str(r, MAX_STRING, &ignored)) != MEPIC_OK) return status;
        }
    } else {
        r->at += array.count * least; /* <= left, by the test above */
    }
    array.bytes = (size_t)(r->gguf->bytes + r->at - array.data);
    *out = array;
    return MEPIC_OK;
}

static mepic_status take_entry(reader *r, entry *e) {
    mepic_status status = take_str(r, MAX_STRING, &e->key);
    if (status != MEPIC_OK) return status;
    if (e->key.len == 0) return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: key %zu is empty", r->gguf->path, r->index);
    r->name = e->key;
    if ((status = take_kind(r, &e->type)) != MEPIC_OK) return status;
    switch (e->type) {
    case MP_GGUF_ARRAY: return take_array(r, &e->array);
    case MP_GGUF_STRING: return take_str(r, MAX_STRING, &e->string);
    default: return take(r, kinds[e->type].bytes, &e->value);
    }
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------- */

static mepic_status tensor_bytes(const mp_gguf *gguf, mp_tensor *t, mepic_error *err) {
    const mp_dtype_info *info = mp_dtype_find((uint32_t)t->type);
    if (t->ne[0] % info->len != 0) {
        return mp_fail(err, MEPIC_ERR_FORMAT,
                       "%s: tensor \"%.*s\" has rows of %" PRIu64 " weights, not a multiple of the %u in a block of %s",
                       gguf->path, (int)t->name.len, t->name.data, t->ne[0], info->len, info->name);
    }
    size_t bytes = 0;
    bool ok = mp_mul_size((size_t)(t->ne[0] / info->len), info->bytes, &bytes);
    for (uint32_t i = 1; i < 4; i++) ok = ok && mp_mul_size(bytes, (size_t)t->ne[i], &bytes);
    if (!ok || bytes > gguf->n_bytes) {
        return mp_fail(err, MEPIC_ERR_FORMAT,
                       "%s: tensor \"%.*s\" of %" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                       " %s weights is larger than the file (%zu bytes)",
                       gguf->path, (int)t->name.len, t->name.data, t->ne[0], t->ne[1], t->ne[2], t->ne[3], info->name,
                       gguf->n_bytes);
    }
    t->bytes = bytes;
    return MEPIC_OK;
}

/* Reads a directory entry; its offset goes to *offset since the data's start is known after the last one. */
static mepic_status take_tensor(reader *r, mp_tensor *t, uint64_t *offset) {
    mepic_status status = take_str(r, MAX_TENSOR_NAME, &t->name);
    if (status != MEPIC_OK) return status;
    r->name = t->name;
    const char *path = r->gguf->path, *name = t->name.data;
    int len = (int)t->name.len;
    if (len == 0) return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: tensor %zu has no name", path, r->index);
    if ((status = take_u32(r, &t->n_dims)) != MEPIC_OK) return status;
    if (t->n_dims < 1 || t->n_dims > 4) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: tensor \"%.*s\" has %u dimensions; 1 to 4 are possible", path,
                       len, name, t->n_dims);
    }
    for (uint32_t i = 0; i < 4; i++) {
        t->ne[i] = 1;
        if (i < t->n_dims && (status = take_u64(r, &t->ne[i])) != MEPIC_OK) return status;
        if (t->ne[i] == 0 || t->ne[i] > INT64_MAX) {
            return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: tensor \"%.*s\" has %" PRIu64 " as dimension %u", path, len,
                           name, t->ne[i], i);
        }
    }
    uint32_t type = 0;
    if ((status = take_u32(r, &type)) != MEPIC_OK) return status;
    if (!mp_dtype_find(type)) {
        return mp_fail(r->err, MEPIC_ERR_UNSUPPORTED,
                       "%s: tensor \"%.*s\" has type %s (number %u), which is not supported; supported: F32 F16 BF16 "
                       "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K",
                       path, len, name, mp_dtype_name(type), type);
    }
    t->type = (mp_dtype)type;
    if ((status = tensor_bytes(r->gguf, t, r->err)) != MEPIC_OK) return status;
    return take_u64(r, offset);
}

static mepic_status place_tensor(const mp_gguf *gguf, size_t data_start, mp_tensor *t, uint64_t offset,
                                 mepic_error *err) {
    size_t start, end;
    if (offset % gguf->alignment != 0) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: tensor \"%.*s\" has offset %" PRIu64 ", not a multiple of %u",
                       gguf->path, (int)t->name.len, t->name.data, offset, gguf->alignment);
    }
    if (offset > SIZE_MAX || !mp_add_size(data_start, (size_t)offset, &start) || !mp_add_size(start, t->bytes, &end) ||
        end > gguf->n_bytes) {
        return mp_fail(
            err, MEPIC_ERR_FORMAT,
            "%s: tensor \"%.*s\" lies outside the file (%zu bytes at offset %" PRIu64
            " of the data, which starts at %zu; the file has %zu); it is damaged or was not copied completely",
            gguf->path, (int)t->name.len, t->name.data, t->bytes, offset, data_start, gguf->n_bytes);
    }
    t->data = gguf->bytes + start;
    return MEPIC_OK;
}

/* ---- Order: duplicates, overlaps, lookup ------------------------------------------------------------------------- */

static int compare_str(const mp_str *a, const mp_str *b) {
    if (a->len != b->len) return a->len < b->len ? -1 : 1;
    return memcmp(a->data, b->data, a->len);
}

static int compare_keys(const void *a, const void *b) {
    return compare_str(&(*(const entry *const *)a)->key, &(*(const entry *const *)b)->key);
}

static int compare_names(const void *a, const void *b) {
    return compare_str(&(*(const mp_tensor *const *)a)->name, &(*(const mp_tensor *const *)b)->name);
}

static int compare_places(const void *a, const void *b) {
    const uint8_t *x = (*(const mp_tensor *const *)a)->data, *y = (*(const mp_tensor *const *)b)->data;
    return (x > y) - (x < y);
}

static mepic_status index_keys(mp_gguf *gguf, mepic_error *err) {
    for (size_t i = 0; i < gguf->n_entries; i++) gguf->by_key[i] = &gguf->entries[i];
    qsort(gguf->by_key, gguf->n_entries, sizeof *gguf->by_key, compare_keys);
    for (size_t i = 1; i < gguf->n_entries; i++) {
        if (compare_keys(&gguf->by_key[i - 1], &gguf->by_key[i]) == 0) {
            const mp_str *key = &gguf->by_key[i]->key;
            return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%.*s\" is there twice", gguf->path, (int)key->len,
                           key->data);
        }
    }
    return MEPIC_OK;
}

static mepic_status index_tensors(mp_gguf *gguf, mepic_error *err) {
    const mp_tensor **order = gguf->by_name;
    for (size_t i = 0; i < gguf->n_tensors; i++) order[i] = &gguf->tensors[i];
    qsort(order, gguf->n_tensors, sizeof *order, compare_places);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        const mp_tensor *a = order[i - 1], *b = order[i];
        if ((const uint8_t *)a->data + a->bytes > (const uint8_t *)b->data) {
            return mp_fail(err, MEPIC_ERR_FORMAT, "%s: tensors \"%.*s\" and \"%.*s\" overlap", gguf->path,
                           (int)a->name.len, a->name.data, (int)b->name.len, b->name.data);
        }
    }
    qsort(order, gguf->n_tensors, sizeof *order, compare_names);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        if (compare_names(&order[i - 1], &order[i]) == 0) {
            return mp_fail(err, MEPIC_ERR_FORMAT, "%s: tensor \"%.*s\" is there twice", gguf->path,
                           (int)order[i]->name.len, order[i]->name.data);
        }
    }
    return MEPIC_OK;
}

static const entry *find(const mp_gguf *gguf, const char *key) {
    entry probe = { .key = { key, strlen(key) } };
    const entry *wanted = &probe;
    const entry **hit = bsearch(&wanted, gguf->by_key, gguf->n_entries, sizeof *gguf->by_key, compare_keys);
    return hit ? *hit : NULL;
}

/* ---- Open -------------------------------------------------------------------------------------------------------- */

static mepic_status read_alignment(mp_gguf *gguf, mepic_error *err) {
    const entry *e = find(gguf, "general.alignment");
    gguf->alignment = DEFAULT_ALIGNMENT;
    if (!e) return MEPIC_OK;
    if (e->type != MP_GGUF_U32) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"general.alignment\" is of type %s, not u32", gguf->path,
                       kinds[e->type].name);
    }
    uint32_t a = (uint32_t)load(e->value, 4);
    if (a < MIN_ALIGNMENT || a > MAX_ALIGNMENT || (a & (a - 1)) != 0) {
        return mp_fail(err, MEPIC_ERR_FORMAT,
                       "%s: key \"general.alignment\" is %u; it must be a power of two from %d to %d", gguf->path, a,
                       MIN_ALIGNMENT, MAX_ALIGNMENT);
    }
    gguf->alignment = a;
    return MEPIC_OK;
}

static mepic_status check_count(const reader *r, const char *what, uint64_t n, size_t least_bytes) {
    if (n > MAX_ENTRIES) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: %" PRIu64 " %s; the limit is %d", r->gguf->path, n, what,
                       MAX_ENTRIES);
    }
    if (n > left(r) / least_bytes) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s: %" PRIu64 " %s cannot be in the %zu bytes after the header",
                       r->gguf->path, n, what, left(r));
    }
    return MEPIC_OK;
}

static mepic_status read_header(reader *r, uint64_t *n_tensors, uint64_t *n_kv) {
    const uint8_t *magic;
    uint32_t version = 0;
    mepic_status status;
    if (r->gguf->n_bytes < 4 || memcmp(r->gguf->bytes, "GGUF", 4) != 0) {
        return mp_fail(r->err, MEPIC_ERR_FORMAT, "%s is not a GGUF file (it does not start with \"GGUF\")",
                       r->gguf->path);
    }
    if ((status = take(r, 4, &magic)) != MEPIC_OK) return status;
    if ((status = take_u32(r, &version)) != MEPIC_OK) return status;
    if (version == 2u << 24 || version == 3u << 24) {
        return mp_fail(r->err, MEPIC_ERR_UNSUPPORTED, "%s is a big-endian GGUF file; convert it to little-endian",
                       r->gguf->path);
    }
    if (version != 2 && version != 3) {
        return mp_fail(r->err, MEPIC_ERR_UNSUPPORTED, "%s has GGUF version %u; supported: 2, 3", r->gguf->path,
                       version);
    }
    if ((status = take_u64(r, n_tensors)) != MEPIC_OK) return status;
    if ((status = take_u64(r, n_kv)) != MEPIC_OK) return status;
    if ((status = check_count(r, "tensors", *n_tensors, MIN_TENSOR_BYTES)) != MEPIC_OK) return status;
    return check_count(r, "keys", *n_kv, MIN_KV_BYTES);
}

static mepic_status read_keys(mp_gguf *gguf, reader *r, size_t n) {
    gguf->entries = mp_calloc(n, sizeof *gguf->entries);
    gguf->by_key = mp_calloc(n, sizeof *gguf->by_key);
    if (!gguf->entries || !gguf->by_key) return mp_fail_nomem(r->err, "the keys of a model file", n * sizeof(entry));
    gguf->n_entries = n;
    r->what = "key";
    for (r->index = 0; r->index < n; r->index++) {
        size_t start = r->at;
        r->name = (mp_str){ 0 };
        mepic_status status = take_entry(r, &gguf->entries[r->index]);
        if (status != MEPIC_OK) return status;
        gguf->entries[r->index].raw = (mp_str){ (const char *)gguf->bytes + start, r->at - start };
    }
    return index_keys(gguf, r->err);
}

static mepic_status read_tensors(mp_gguf *gguf, reader *r, size_t n) {
    uint64_t *offsets = mp_calloc(n, sizeof *offsets);
    gguf->tensors = mp_calloc(n, sizeof *gguf->tensors);
    gguf->by_name = mp_calloc(n, sizeof *gguf->by_name);
    mepic_status status = MEPIC_OK;
    if (!offsets || !gguf->tensors || !gguf->by_name) {
        status = mp_fail_nomem(r->err, "the tensors of a model file", n * sizeof(mp_tensor));
        goto out;
    }
    gguf->n_tensors = n;
    r->what = "tensor";
    for (r->index = 0; r->index < n; r->index++) {
        r->name = (mp_str){ 0 };
        if ((status = take_tensor(r, &gguf->tensors[r->index], &offsets[r->index])) != MEPIC_OK) goto out;
    }
    /* at <= n_bytes <= SSIZE_MAX, so rounding up to at most 1 MiB cannot wrap */
    size_t data_start = (r->at + gguf->alignment - 1) / gguf->alignment * gguf->alignment;
    for (size_t i = 0; i < n; i++) {
        if ((status = place_tensor(gguf, data_start, &gguf->tensors[i], offsets[i], r->err)) != MEPIC_OK) goto out;
    }
    status = index_tensors(gguf, r->err);
out:
    mp_free(offsets);
    return status;
}

static mepic_status read_all(mp_gguf *gguf, mepic_error *err) {
    reader r = { .gguf = gguf, .what = "header field", .err = err };
    uint64_t n_tensors = 0, n_kv = 0;
    mepic_status status = read_header(&r, &n_tensors, &n_kv);
    if (status == MEPIC_OK) status = read_keys(gguf, &r, (size_t)n_kv);
    if (status == MEPIC_OK) status = read_alignment(gguf, err);
    if (status == MEPIC_OK) status = read_tensors(gguf, &r, (size_t)n_tensors);
    return status;
}

mepic_status mp_gguf_open_memory(const void *bytes, size_t n, const char *name, mp_gguf **out, mepic_error *err) {
    if ((uintptr_t)bytes % MIN_ALIGNMENT != 0 || n > PTRDIFF_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: the bytes of a model must start at a multiple of %d", name,
                       MIN_ALIGNMENT);
    }
    mp_gguf *gguf = mp_calloc(1, sizeof *gguf);
    if (!gguf) return mp_fail_nomem(err, "a model file", sizeof *gguf);
    gguf->bytes = bytes;
    gguf->n_bytes = n;
    gguf->path = mp_strndup(name, strlen(name));
    mepic_status status = gguf->path ? read_all(gguf, err) : mp_fail_nomem(err, "a file name", strlen(name));
    if (status != MEPIC_OK) {
        mp_gguf_close(gguf);
        return status;
    }
    *out = gguf;
    return MEPIC_OK;
}

/* Maps a regular file; *bytes is NULL when it is empty. */
static mepic_status map_file(const char *path, const uint8_t **bytes, mp_file_id *id, mepic_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return mp_fail(err, MEPIC_ERR_IO, "%s: %s", path, strerror(errno));
    mepic_status status = MEPIC_OK;
    struct stat st;
    void *map = NULL;
    if (fstat(fd, &st) != 0) {
        status = mp_fail(err, MEPIC_ERR_IO, "%s: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        status = mp_fail(err, MEPIC_ERR_IO, "%s is not a regular file", path);
    } else if (st.st_size > 0) {
        map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) status = mp_fail(err, MEPIC_ERR_IO, "%s: mapping it: %s", path, strerror(errno));
    }
    close(fd);
    if (status != MEPIC_OK) return status;
    *bytes = map;
    *id = (mp_file_id){ .device = (uint64_t)st.st_dev,
                        .inode = (uint64_t)st.st_ino,
                        .bytes = (uint64_t)st.st_size,
                        .mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec };
    return MEPIC_OK;
}

mepic_status mp_gguf_open(const char *path, mp_gguf **out, mepic_error *err) {
    const uint8_t *bytes = NULL;
    mp_file_id id = { 0 };
    mepic_status status = map_file(path, &bytes, &id, err);
    if (status != MEPIC_OK) return status;
    mp_gguf *gguf;
    status = mp_gguf_open_memory(bytes, (size_t)id.bytes, path, &gguf, err);
    if (status != MEPIC_OK) {
        if (bytes) munmap((void *)(uintptr_t)bytes, (size_t)id.bytes);
        return status;
    }
    gguf->mapped = bytes != NULL;
    gguf->id = id;
    *out = gguf;
    return MEPIC_OK;
}

void mp_gguf_close(mp_gguf *gguf) {
    if (!gguf) return;
    if (gguf->mapped) munmap((void *)(uintptr_t)gguf->bytes, gguf->n_bytes);
    mp_free(gguf->entries);
    mp_free(gguf->by_key);
    mp_free(gguf->tensors);
    mp_free(gguf->by_name);
    mp_free(gguf->path);
    mp_free(gguf);
}

void mp_gguf_cool(const mp_gguf *gguf) {
    if (gguf->mapped) madvise((void *)(uintptr_t)gguf->bytes, gguf->n_bytes, MADV_DONTNEED); /* best effort */
}

/* ---- Values ------------------------------------------------------------------------------------------------------ */

static bool is_integer(mp_gguf_type type) {
    switch (type) {
    case MP_GGUF_U8:
    case MP_GGUF_I8:
    case MP_GGUF_U16:
    case MP_GGUF_I16:
    case MP_GGUF_U32:
    case MP_GGUF_I32:
    case MP_GGUF_U64:
    case MP_GGUF_I64: return true;
    default: return false;
    }
}

static bool is_signed(mp_gguf_type type) {
    return type == MP_GGUF_I8 || type == MP_GGUF_I16 || type == MP_GGUF_I32 || type == MP_GGUF_I64;
}

/* An integer entry as two's complement of 64 bits. */
static uint64_t integer(const entry *e) {
    size_t n = kinds[e->type].bytes;
    uint64_t v = load(e->value, n);
    // NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult): n > 0
    if (is_signed(e->type) && n < 8 && v >> (8 * n - 1)) v |= ~(uint64_t)0 << 8 * n;
    return v;
}

static bool is_negative(const entry *e) {
    return is_signed(e->type) && integer(e) >> 63;
}

static double real(const entry *e) {
    if (e->type == MP_GGUF_F32) {
        uint32_t bits = (uint32_t)load(e->value, 4);
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    if (e->type == MP_GGUF_F64) {
        uint64_t bits = load(e->value, 8);
        double v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    return is_negative(e) ? -(double)(0 - integer(e)) : (double)integer(e);
}

static mepic_status missing(const mp_gguf *gguf, const char *key, mepic_error *err) {
    return mp_fail(err, MEPIC_ERR_NOT_FOUND, "%s: key \"%s\" is missing", gguf->path, key);
}

static mepic_status wrong_kind(const mp_gguf *gguf, const entry *e, const char *wanted, mepic_error *err) {
    bool array = e->type == MP_GGUF_ARRAY;
    return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%.*s\" is of type %s%s, not %s", gguf->path, (int)e->key.len,
                   e->key.data, array ? "array of " : "", kinds[array ? e->array.type : e->type].name, wanted);
}

bool mp_gguf_has(const mp_gguf *gguf, const char *key) {
    return find(gguf, key) != NULL;
}

mepic_status mp_gguf_u32(const mp_gguf *gguf, const char *key, uint32_t *out, mepic_error *err) {
    const entry *e = find(gguf, key);
    if (!e) return missing(gguf, key, err);
    if (!is_integer(e->type)) return wrong_kind(gguf, e, "an integer", err);
    if (is_negative(e)) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is %" PRId64 "; it must not be negative", gguf->path, key,
                       (int64_t)integer(e));
    }
    if (integer(e) > UINT32_MAX) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is %" PRIu64 ", too large", gguf->path, key, integer(e));
    }
    *out = (uint32_t)integer(e);
    return MEPIC_OK;
}

mepic_status mp_gguf_f32(const mp_gguf *gguf, const char *key, float *out, mepic_error *err) {
    const entry *e = find(gguf, key);
    if (!e) return missing(gguf, key, err);
    if (!is_integer(e->type) && e->type != MP_GGUF_F32 && e->type != MP_GGUF_F64) {
        return wrong_kind(gguf, e, "a number", err);
    }
    double v = real(e);
    if (isfinite(v) && fabs(v) > FLT_MAX) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is %g, too large", gguf->path, key, v);
    }
    *out = (float)v;
    return MEPIC_OK;
}

mepic_status mp_gguf_bool(const mp_gguf *gguf, const char *key, bool *out, mepic_error *err) {
    const entry *e = find(gguf, key);
    if (!e) return missing(gguf, key, err);
    if (e->type != MP_GGUF_BOOL) return wrong_kind(gguf, e, "bool", err);
    if (*e->value > 1) {
        return mp_fail(err, MEPIC_ERR_FORMAT, "%s: key \"%s\" is the byte %u, not a bool", gguf->path, key, *e->value);
    }
    *out = *e->value == 1;
    return MEPIC_OK;
}

mepic_status mp_gguf_str(const mp_gguf *gguf, const char *key, mp_str *out, mepic_error *err) {
    const entry *e = find(gguf, key);
    if (!e) return missing(gguf, key, err);
    if (e->type != MP_GGUF_STRING) return wrong_kind(gguf, e, "string", err);
    *out = e->string;
    return MEPIC_OK;
}

mepic_status mp_gguf_array_find(const mp_gguf *gguf, const char *key, mp_gguf_type type, mp_gguf_array *out,
                                mepic_error *err) {
    const entry *e = find(gguf, key);
    if (!e) return missing(gguf, key, err);
    if (e->type != MP_GGUF_ARRAY || e->array.type != type) {
        char wanted[32];
        snprintf(wanted, sizeof wanted, "array of %s", kinds[type].name);
        return wrong_kind(gguf, e, wanted, err);
    }
    *out = e->array;
    return MEPIC_OK;
}

bool mp_gguf_array_str(const mp_gguf_array *array, size_t *offset, mp_str *out) {
    if (array->type != MP_GGUF_STRING || *offset >= array->bytes) return false;
    size_t len = (size_t)load(array->data + *offset, 8); /* open has walked this array: it fits */
    *out = (mp_str){ (const char *)array->data + *offset + 8, len };
    *offset += 8 + len;
    return true;
}

size_t mp_gguf_n_tensors(const mp_gguf *gguf) {
    return gguf->n_tensors;
}

const mp_tensor *mp_gguf_tensor_at(const mp_gguf *gguf, size_t i) {
    return &gguf->tensors[i];
}

const mp_tensor *mp_gguf_tensor(const mp_gguf *gguf, const char *name) {
    mp_tensor probe = { .name = { name, strlen(name) } };
    const mp_tensor *wanted = &probe;
    const mp_tensor **hit = bsearch(&wanted, gguf->by_name, gguf->n_tensors, sizeof *gguf->by_name, compare_names);
    return hit ? *hit : NULL;
}

/* A file's text on a terminal or in a log: no control characters, cut at the end of a character. */
static void printable(mp_str s, char *out, size_t cap) {
    size_t n = s.len < cap ? s.len : cap - 1;
    if (n < s.len) {
        while (n > 0 && ((unsigned char)s.data[n] & 0xc0) == 0x80) n--;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s.data[i];
        out[i] = c < 0x20 || c == 0x7f ? ' ' : s.data[i];
    }
    out[n] = 0;
}

bool mp_gguf_describe(const mp_gguf *gguf, size_t i, mp_str *key, char *value, size_t value_cap) {
    if (i >= gguf->n_entries || value_cap == 0) return false;
    const entry *e = &gguf->entries[i];
    *key = e->key;
    if (e->type == MP_GGUF_STRING) {
        printable(e->string, value, value_cap);
    } else if (e->type == MP_GGUF_ARRAY) {
        snprintf(value, value_cap, "[%zu %ss]", e->array.count, kinds[e->array.type].name);
    } else if (e->type == MP_GGUF_BOOL) {
        snprintf(value, value_cap, "%s", *e->value ? "true" : "false");
    } else if (is_negative(e)) {
        snprintf(value, value_cap, "%" PRId64, (int64_t)integer(e));
    } else if (is_integer(e->type)) {
        snprintf(value, value_cap, "%" PRIu64, integer(e));
    } else {
        snprintf(value, value_cap, "%.9g", real(e));
    }
    return true;
}

bool mp_gguf_entry(const mp_gguf *gguf, size_t i, mp_str *key, mp_str *raw) {
    if (i >= gguf->n_entries) return false;
    *key = gguf->entries[i].key;
    *raw = gguf->entries[i].raw;
    return true;
}

const char *mp_gguf_path(const mp_gguf *gguf) {
    return gguf->path;
}

size_t mp_gguf_file_bytes(const mp_gguf *gguf) {
    return gguf->n_bytes;
}

const uint8_t *mp_gguf_bytes(const mp_gguf *gguf) {
    return gguf->bytes;
}

const mp_file_id *mp_gguf_file_id(const mp_gguf *gguf) {
    return gguf->mapped ? &gguf->id : NULL;
}
