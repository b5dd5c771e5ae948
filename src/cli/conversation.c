#include "cli/conversation.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- Files ------------------------------------------------------------------------------------------------------- */

static mepic_status read_descriptor(int fd, const char *path, mp_buf *buf, mepic_error *err) {
    char block[65536];
    for (;;) {
        ssize_t n = read(fd, block, sizeof block);
        if (n == 0) return MEPIC_OK;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be read: %s", path, strerror(errno));
        /* One byte of the limit is for the end of the string. */
        if ((size_t)n >= buf->limit - buf->len) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s is larger than %zu MiB, the most that is read; split it", path,
                           buf->limit >> 20);
        }
        if (!mp_buf_append(buf, block, (size_t)n)) return mp_fail_nomem(err, path, buf->len + (size_t)n);
    }
}

mepic_status mp_file_read(const char *path, size_t limit, char **out, size_t *len, mepic_error *err) {
    bool is_stdin = strcmp(path, "-") == 0;
    int fd = is_stdin ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be opened: %s", path, strerror(errno));
    mp_buf buf = { .limit = limit + 1 };
    mepic_status status = read_descriptor(fd, is_stdin ? "standard input" : path, &buf, err);
    if (!is_stdin) close(fd);
    if (status == MEPIC_OK && !mp_buf_append(&buf, "", 1)) status = mp_fail_nomem(err, path, buf.len + 1);
    if (status != MEPIC_OK) {
        mp_buf_clear(&buf);
        return status;
    }
    *out = buf.data;
    *len = buf.len - 1;
    return MEPIC_OK;
}

static bool is_blank(const char *text, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (!strchr(" \t\r\n", text[i]) || text[i] == 0) return false;
    }
    return true;
}

mepic_status mp_document_read(const char *path, mp_document *out, mepic_error *err) {
    char *content;
    size_t len;
    mepic_status status = mp_file_read(path, MP_DOCUMENT_MAX_BYTES, &content, &len, err);
    if (status != MEPIC_OK) return status;
    if (is_blank(content, len)) {
        mp_free(content);
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "document %s is empty", path);
    }
    const char *slash = strrchr(path, '/');
    const char *name = slash && slash[1] ? slash + 1 : path;
    size_t name_len = strlen(name);
    mp_document document = { .name = mp_strndup(name, name_len), .text = mp_alloc(name_len + 1 + len) };
    if (!document.name || !document.text) {
        mp_free(content);
        mp_document_clear(&document);
        return mp_fail_nomem(err, path, name_len + 1 + len);
    }
    memcpy(document.text, name, name_len);
    document.text[name_len] = '\n';
    memcpy(document.text + name_len + 1, content, len);
    document.len = name_len + 1 + len;
    /* Editors end a file with a newline; the text behind the chunk brings its own. */
    while (document.text[document.len - 1] == '\n') document.len--;
    mp_free(content);
    *out = document;
    return MEPIC_OK;
}

void mp_document_clear(mp_document *document) {
    mp_free(document->name);
    mp_free(document->text);
    *document = (mp_document){ 0 };
}

/* ---- The conversation -------------------------------------------------------------------------------------------- */

void mp_conversation_reset(mp_conversation *c) {
    while (c->n_turns > 0) mp_conversation_unask(c);
}

void mp_conversation_clear(mp_conversation *c) {
    mp_conversation_reset(c);
    for (uint32_t i = 0; i < c->n_documents; i++) mp_document_clear(&c->documents[i]);
    mp_free(c->documents);
    mp_free(c->turns);
    mp_free(c->system);
    *c = (mp_conversation){ 0 };
}

mepic_status mp_conversation_add(mp_conversation *c, const char *path, mepic_error *err) {
    if (c->n_documents == MP_DOCUMENTS_MAX) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT, "%s: there are %d documents already, the most there may be", path,
                       MP_DOCUMENTS_MAX);
    }
    mp_document document;
    mepic_status status = mp_document_read(path, &document, err);
    if (status != MEPIC_OK) return status;
    mp_document *grown = mp_realloc(c->documents, (c->n_documents + 1) * sizeof *grown);
    if (!grown) {
        mp_document_clear(&document);
        return mp_fail_nomem(err, path, (c->n_documents + 1) * sizeof *grown);
    }
    c->documents = grown;
    c->documents[c->n_documents++] = document;
    return MEPIC_OK;
}

void mp_conversation_drop(mp_conversation *c, uint32_t index) {
    mp_document_clear(&c->documents[index]);
    c->n_documents--;
    memmove(&c->documents[index], &c->documents[index + 1], (c->n_documents - index) * sizeof *c->documents);
}

void mp_conversation_move(mp_conversation *c, uint32_t from, uint32_t to) {
    mp_document document = c->documents[from];
    if (from < to) memmove(&c->documents[from], &c->documents[from + 1], (to - from) * sizeof document);
    if (from > to) memmove(&c->documents[to + 1], &c->documents[to], (from - to) * sizeof document);
    c->documents[to] = document;
}

mepic_status mp_conversation_set_system(mp_conversation *c, const char *text, mepic_error *err) {
    char *copy = mp_strndup(text, strlen(text));
    if (!copy) return mp_fail_nomem(err, "the system message", strlen(text));
    mp_free(c->system);
    c->system = copy;
    return MEPIC_OK;
}

mepic_status mp_conversation_ask(mp_conversation *c, const char *question, mepic_error *err) {
    char *copy = mp_strndup(question, strlen(question));
    mp_turn *grown = mp_realloc(c->turns, (c->n_turns + 1) * sizeof *grown);
    if (grown) c->turns = grown;
    if (!copy || !grown) {
        mp_free(copy);
        return mp_fail_nomem(err, "a question", strlen(question));
    }
    c->turns[c->n_turns++] = (mp_turn){ .question = copy };
    return MEPIC_OK;
}

mepic_status mp_conversation_answer(mp_conversation *c, const char *text, size_t len, mepic_error *err) {
    char *copy = mp_strndup(text, len);
    if (!copy) return mp_fail_nomem(err, "an answer", len);
    c->turns[c->n_turns - 1].answer = copy;
    return MEPIC_OK;
}

void mp_conversation_unask(mp_conversation *c) {
    mp_turn *turn = &c->turns[--c->n_turns];
    mp_free(turn->question);
    mp_free(turn->answer);
}

/* ---- The prompt -------------------------------------------------------------------------------------------------- */

typedef struct label {
    char text[MP_DOCUMENT_LABEL_CAP];
} label;

/* Everything that a prompt's segments point to, until mepic_prepare has copied it. */
typedef struct prompt_parts {
    label *labels;           /* [n_documents] */
    char **questions;        /* [n_turns], with their wrapper */
    mepic_segment *segments; /* [1 + 2 * n_documents + 2 * n_turns] */
    uint32_t n_segments;
    mepic_message *messages; /* [1 + 2 * n_turns] */
    uint32_t n_messages;
} prompt_parts;

static void parts_clear(prompt_parts *parts, uint32_t n_turns) {
    for (uint32_t i = 0; parts->questions && i < n_turns; i++) mp_free(parts->questions[i]);
    mp_free(parts->labels);
    mp_free(parts->questions);
    mp_free(parts->segments);
    mp_free(parts->messages);
}

static void add_segment(prompt_parts *parts, mepic_segment_kind kind, const char *text, size_t len) {
    parts->segments[parts->n_segments++] = (mepic_segment){ .kind = kind, .text = text, .len = len };
}

/* A message of the segments added since `first`. */
static void add_message(prompt_parts *parts, const char *role, uint32_t first) {
    parts->messages[parts->n_messages++] =
        (mepic_message){ .role = role, .parts = &parts->segments[first], .n_parts = parts->n_segments - first };
}

static char *wrap_question(const mp_conversation *c, uint32_t turn, bool plain) {
    const char *question = c->turns[turn].question;
    bool about_documents = c->n_documents > 0;
    const char *before = about_documents ? mp_question_opening(turn == 0, plain) : "";
    const char *after = about_documents ? mp_question_ending(plain) : "";
    size_t cap = strlen(before) + strlen(question) + strlen(after) + 1;
    char *out = mp_alloc(cap);
    if (out) snprintf(out, cap, "%s%s%s", before, question, after);
    return out;
}

static bool parts_build(prompt_parts *parts, const mp_conversation *c, bool plain) {
    parts->labels = mp_calloc(c->n_documents, sizeof *parts->labels);
    parts->questions = mp_calloc(c->n_turns, sizeof *parts->questions);
    parts->segments = mp_calloc(2 + 2 * (size_t)c->n_documents + 2 * (size_t)c->n_turns, sizeof *parts->segments);
    parts->messages = mp_calloc(1 + 2 * (size_t)c->n_turns, sizeof *parts->messages);
    if (!parts->labels || !parts->questions || !parts->segments || !parts->messages) return false;
    if (c->system) {
        add_segment(parts, MEPIC_TEXT, c->system, strlen(c->system));
        add_message(parts, "system", 0);
        if (plain) add_segment(parts, MEPIC_TEXT, "\n\n", 2);
    }
    for (uint32_t t = 0; t < c->n_turns; t++) {
        uint32_t first = parts->n_segments;
        for (uint32_t d = 0; t == 0 && d < c->n_documents; d++) {
            mp_document_label(d, parts->labels[d].text);
            add_segment(parts, MEPIC_TEXT, parts->labels[d].text, strlen(parts->labels[d].text));
            add_segment(parts, MEPIC_CHUNK, c->documents[d].text, c->documents[d].len);
        }
        parts->questions[t] = wrap_question(c, t, plain);
        if (!parts->questions[t]) return false;
        add_segment(parts, MEPIC_TEXT, parts->questions[t], strlen(parts->questions[t]));
        add_message(parts, "user", first);
        if (c->turns[t].answer) {
            add_segment(parts, MEPIC_TEXT, c->turns[t].answer, strlen(c->turns[t].answer));
            add_message(parts, "assistant", parts->n_segments - 1);
        }
    }
    return true;
}

mepic_status mp_conversation_prepare(const mp_conversation *c, const mepic_engine *engine, mepic_prepared **out,
                                     mepic_error *err) {
    mepic_model_info info;
    mepic_model_info_read(engine, &info);
    bool plain = strcmp(info.chat_family, "none") == 0;
    prompt_parts parts = { 0 };
    mepic_status status;
    if (parts_build(&parts, c, plain)) {
        mepic_prompt prompt = { .size = sizeof prompt };
        if (plain) {
            prompt.segments = parts.segments;
            prompt.n_segments = parts.n_segments;
        } else {
            prompt.messages = parts.messages;
            prompt.n_messages = parts.n_messages;
        }
        status = mepic_prepare(engine, &prompt, out, err);
    } else {
        status = mp_fail_nomem(err, "the prompt", sizeof parts);
    }
    parts_clear(&parts, c->n_turns);
    return status;
}
