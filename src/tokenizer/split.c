#include "tokenizer/split.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* ---- Families ---------------------------------------------------------------------------------------------------- */

/* White space as the models were trained with it: Unicode's property, which is not quite PCRE2's \s. */
#define SPACE "\\p{WSpace}"
#define SPACES SPACE "+(?!\\P{WSpace})|" SPACE "+"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|" SPACES
/* `digits`: how a run of digits is cut, the one difference between llama-bpe and qwen2. */
#define LLAMA3(digits)                                                                                                 \
    "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" SPACE        \
    "\\p{L}\\p{N}]+[\\r\\n]*|" SPACE "*[\\r\\n]+|" SPACES

static const mp_split_family families[] = {
    { "llama-bpe", { LLAMA3("\\p{N}{1,3}") }, .whole_words = true, .adds_bos = true },
    { "qwen2", { LLAMA3("\\p{N}") }, .whole_words = false },
    { "smollm", { "\\p{N}", GPT2 }, .whole_words = false },
    { "gpt-2", { GPT2 }, .whole_words = false },
    { "default", { "[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]" }, .whole_words = false },
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

const char *mp_split_family_list(void) {
    return "llama-bpe (llama3, llama-v3), qwen2, smollm, gpt-2, default";
}

static bool is(mp_str s, const char *name) {
    return s.len == strlen(name) && memcmp(s.data, name, s.len) == 0;
}

const mp_split_family *mp_split_family_find(mp_str pre) {
    for (size_t i = 0; i < N_FAMILIES; i++) {
        if (is(pre, families[i].name)) return &families[i];
    }
    return is(pre, "llama3") || is(pre, "llama-v3") ? &families[0] : NULL;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

struct mp_split {
    const mp_split_family *family;
    pcre2_general_context *memory;
    pcre2_code *codes[MP_SPLIT_PATTERNS]; /* the first n_codes */
    uint32_t n_codes;
};

static void *pcre2_alloc(PCRE2_SIZE bytes, void *user) {
    (void)user;
    return mp_alloc(bytes);
}

static void pcre2_release(void *p, void *user) {
    (void)user;
    mp_free(p);
}

mepic_status mp_split_open(const mp_split_family *family, mp_split **out, mepic_error *err) {
    mp_split *split = mp_calloc(1, sizeof *split);
    if (!split) return mp_fail_nomem(err, "the pre-tokenizer", sizeof *split);
    split->family = family;
    split->memory = pcre2_general_context_create(pcre2_alloc, pcre2_release, NULL);
    pcre2_compile_context *context = split->memory ? pcre2_compile_context_create(split->memory) : NULL;
    if (!context) goto nomem;
    for (; split->n_codes < MP_SPLIT_PATTERNS && family->patterns[split->n_codes]; split->n_codes++) {
        int code;
        PCRE2_SIZE offset;
        pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)family->patterns[split->n_codes], PCRE2_ZERO_TERMINATED,
                                             PCRE2_UTF | PCRE2_UCP, &code, &offset, context);
        if (!compiled && code == PCRE2_ERROR_HEAP_FAILED) goto nomem;
        if (!compiled) {
            mp_fail(err, MEPIC_ERR_UNSUPPORTED, "the PCRE2 library does not compile the pattern of %s (its error %d)",
                    family->name, code);
            pcre2_compile_context_free(context);
            mp_split_close(split);
            return MEPIC_ERR_UNSUPPORTED;
        }
        pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE); /* without it the interpreter does the same, slower */
        split->codes[split->n_codes] = compiled;
    }
    pcre2_compile_context_free(context);
    *out = split;
    return MEPIC_OK;
nomem:
    pcre2_compile_context_free(context);
    mp_split_close(split);
    return mp_fail_nomem(err, "the pre-tokenizer's patterns", strlen(family->patterns[0]));
}

void mp_split_close(mp_split *split) {
    if (!split) return;
    for (uint32_t i = 0; i < split->n_codes; i++) pcre2_code_free(split->codes[i]);
    pcre2_general_context_free(split->memory);
    mp_free(split);
}

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------- */

enum { REPLACEMENT = 0xFFFD };

static size_t encoded_len(uint32_t c) {
    return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
}

/* The character at p[0, left), and the bytes it takes. Lenient as the reference is: overlong forms and surrogates are
 * read; a byte that begins nothing is a replacement character of its own. */
static uint32_t decode(const uint8_t *p, size_t left, size_t *used) {
    *used = 1;
    if (p[0] < 0x80) return p[0];
    size_t n = (p[0] & 0xE0) == 0xC0 ? 2 : (p[0] & 0xF0) == 0xE0 ? 3 : (p[0] & 0xF8) == 0xF0 ? 4 : 0;
    if (n == 0 || n > left) return REPLACEMENT;
    uint32_t c = p[0] & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xC0) != 0x80) return REPLACEMENT;
        c = c << 6 | (p[i] & 0x3F);
    }
    if (c > 0x10FFFF) return REPLACEMENT;
    *used = n;
    return c;
}

static size_t encode(uint32_t c, char *out) {
    size_t n = encoded_len(c);
    if (n == 1) {
        out[0] = (char)c;
        return 1;
    }
    for (size_t i = n; --i > 0; c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((0xF00u >> n) | c); /* n ones, then a zero; the rest is cut off */
    return n;
}

/* Whether each character of text is what encode() makes of it; *total: the bytes of all of them encoded. */
static bool well_formed(const char *text, size_t len, size_t *total) {
    bool good = true;
    *total = 0;
    for (size_t i = 0, used; i < len; i += used) {
        size_t n = encoded_len(decode((const uint8_t *)text + i, len - i, &used));
        good = good && n == used;
        *total += n;
    }
    return good;
}

/* ---- Splitting --------------------------------------------------------------------------------------------------- */

typedef struct splitting {
    const mp_split *split;
    pcre2_match_data *match;
    mp_word_fn word;
    void *ctx;
} splitting;

/* Cuts one piece by the patterns from `stage` on; the depth is their number. */
static bool cut(const splitting *s, uint32_t stage, const char *piece, size_t len) {
    if (len == 0) return true;
    if (stage == s->split->n_codes) return s->word(s->ctx, piece, len);
    size_t done = 0;
    while (done < len) {
        int rc = pcre2_match(s->split->codes[stage], (PCRE2_SPTR)piece, len, done, PCRE2_NO_UTF_CHECK, s->match, NULL);
        if (rc == PCRE2_ERROR_NOMEMORY) return false;
        if (rc < 0) break; /* no more matches, or a limit */
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(s->match);
        size_t from = range[0], to = range[1];
        if (to <= from) break; /* no pattern matches nothing; if one did, this would not end */
        if (!cut(s, stage + 1, piece + done, from - done) || !cut(s, stage + 1, piece + from, to - from)) return false;
        done = to;
    }
    return cut(s, stage + 1, piece + done, len - done);
}

bool mp_split_run(const mp_split *split, const char *text, size_t len, mp_word_fn word, void *ctx) {
    if (len == 0) return true;
    char *repaired = NULL;
    size_t total;
    if (!well_formed(text, len, &total)) {
        repaired = mp_alloc(total);
        if (!repaired) return false;
        size_t n = 0;
        for (size_t i = 0, used; i < len; i += used) {
            n += encode(decode((const uint8_t *)text + i, len - i, &used), repaired + n);
        }
        text = repaired;
        len = total;
    }
    splitting s = { split, pcre2_match_data_create(1, split->memory), word, ctx };
    bool ok = s.match && cut(&s, 0, text, len);
    pcre2_match_data_free(s.match);
    mp_free(repaired);
    return ok;
}
