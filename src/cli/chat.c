#include "cli/chat.h"

#include "cli/engine_flags.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 1 << 20 };

static const char help[] = "/docs          list the documents\n"
                           "/add FILE      add a document at the end\n"
                           "/drop N        drop document N\n"
                           "/move N M      move document N to place M\n"
                           "/system TEXT   change the system message\n"
                           "/reuse POLICY  none, prefix or mepic\n"
                           "/reset         forget the conversation, keep the documents\n"
                           "/stats         what the engine holds and did\n"
                           "/quit          end (or the end of input)\n"
                           "Anything else is a question; // starts one with a slash. Ctrl-C cancels an answer.\n";

typedef struct chat {
    const mp_partner *partner;
    mp_conversation *conversation;
    mepic_reuse reuse;
    bool quit;
    int result;
} chat;

void mp_chat_print(const char *text, size_t len) {
    fwrite(text, 1, len, stdout);
    fflush(stdout);
}

mepic_status mp_chat_ask(const mp_partner *partner, mp_conversation *conversation, mepic_reuse reuse,
                         const char *question, char *line, size_t cap, mepic_error *err) {
    mepic_status status = mp_conversation_ask(conversation, question, err);
    if (status != MEPIC_OK) return status;
    mp_buf text = { .limit = MP_ANSWER_MAX_BYTES };
    status = partner->ask(partner->user, conversation, reuse, &text, line, cap, err);
    if (status == MEPIC_OK) {
        status = mp_conversation_answer(conversation, text.data ? text.data : "", text.len, err);
    }
    if (status != MEPIC_OK) mp_conversation_unask(conversation);
    mp_buf_clear(&text);
    return status;
}

static void ask(chat *c, const char *question) {
    char line[512];
    mepic_error err;
    mepic_status status = mp_chat_ask(c->partner, c->conversation, c->reuse, question, line, sizeof line, &err);
    if (status == MEPIC_OK) {
        putchar('\n');
        fflush(stdout);
        fprintf(stderr, "[%s]\n", line);
    } else {
        const char *advice =
            status == MEPIC_ERR_TOO_LONG ? " (/reset forgets the conversation, /drop N a document)" : "";
        fprintf(stderr, "%s%s\n", err.message, advice);
        if (status == MEPIC_ERR_BROKEN) {
            c->quit = true;
            c->result = MP_EXIT_FAILURE;
        }
    }
}

/* A document's number, as /docs shows it; moves *text behind it. */
static bool read_place(const chat *c, const char **text, uint32_t *out) {
    char *end;
    errno = 0;
    unsigned long value = strtoul(*text, &end, 10);
    bool digits = **text >= '0' && **text <= '9' && errno == 0;
    if (!digits || (*end && *end != ' ') || value < 1 || value > c->conversation->n_documents) {
        fprintf(stderr, "'%s' is not the number of a document; /docs lists them\n", *text);
        return false;
    }
    *text = end + strspn(end, " ");
    *out = (uint32_t)value - 1;
    return true;
}

static void list_documents(chat *c, const char *rest) {
    (void)rest;
    if (c->conversation->n_documents == 0) printf("no documents; /add FILE adds one\n");
    for (uint32_t i = 0; i < c->conversation->n_documents; i++) {
        printf("%3u  %s, %zu bytes\n", i + 1, c->conversation->documents[i].name, c->conversation->documents[i].len);
    }
}

static void add_document(chat *c, const char *rest) {
    mepic_error err;
    if (mp_conversation_add(c->conversation, rest, &err) != MEPIC_OK) fprintf(stderr, "%s\n", err.message);
}

static void drop_document(chat *c, const char *rest) {
    uint32_t place;
    if (read_place(c, &rest, &place)) mp_conversation_drop(c->conversation, place);
}

static void move_document(chat *c, const char *rest) {
    uint32_t from, to;
    if (read_place(c, &rest, &from) && read_place(c, &rest, &to)) mp_conversation_move(c->conversation, from, to);
}

static void set_system(chat *c, const char *rest) {
    mepic_error err;
    if (mp_conversation_set_system(c->conversation, rest, &err) != MEPIC_OK) fprintf(stderr, "%s\n", err.message);
}

static void set_reuse(chat *c, const char *rest) {
    for (const mp_word *word = mp_reuse_words; word->name; word++) {
        if (strcmp(word->name, rest) == 0) {
            c->reuse = (mepic_reuse)word->value;
            return;
        }
    }
    fprintf(stderr, "'%s' is not none, prefix or mepic\n", rest);
}

static void reset(chat *c, const char *rest) {
    (void)rest;
    mp_conversation_reset(c->conversation);
}

static void print_stats(chat *c, const char *rest) {
    (void)rest;
    c->partner->print_stats(c->partner->user);
}

static void print_help(chat *c, const char *rest) {
    (void)c;
    (void)rest;
    fputs(help, stdout);
}

static void quit(chat *c, const char *rest) {
    (void)rest;
    c->quit = true;
}

static void run_command(chat *c, const char *line) {
    static const struct {
        const char *name;
        void (*run)(chat *c, const char *rest);
        bool needs_value;
    } commands[] = {
        { "docs", list_documents, false }, { "add", add_document, true },   { "drop", drop_document, true },
        { "move", move_document, true },   { "system", set_system, true },  { "reuse", set_reuse, true },
        { "reset", reset, false },         { "stats", print_stats, false }, { "help", print_help, false },
        { "quit", quit, false },
    };
    size_t len = strcspn(line, " ");
    const char *rest = line + len + strspn(line + len, " ");
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strlen(commands[i].name) != len || memcmp(commands[i].name, line, len) != 0) continue;
        if (commands[i].needs_value && !*rest)
            fprintf(stderr, "/%s needs a value; /help shows how\n", commands[i].name);
        else
            commands[i].run(c, rest);
        return;
    }
    fprintf(stderr, "there is no command /%.*s; /help lists them\n", (int)len, line);
}

/* The next line of standard input, without blanks at its end; what does not fit is dropped. False at the end. */
static bool read_line(mp_buf *buf) {
    int c = getchar();
    if (c == EOF) return false;
    buf->len = 0;
    for (; c != EOF && c != '\n'; c = getchar()) {
        char byte = (char)c;
        if (buf->len + 1 < buf->limit && !mp_buf_append(buf, &byte, 1)) return false;
    }
    while (buf->len > 0 && strchr(" \t\r", buf->data[buf->len - 1])) buf->len--;
    return mp_buf_append(buf, "", 1);
}

int mp_chat(const mp_partner *partner, mp_conversation *conversation) {
    chat c = { .partner = partner, .conversation = conversation, .reuse = partner->reuse };
    bool tty = isatty(STDIN_FILENO);
    if (tty) printf("%s; /help lists the commands\n", partner->name);
    mp_buf buf = { .limit = LINE_MAX_BYTES };
    while (!c.quit) {
        if (tty) fputs("> ", stdout);
        fflush(stdout);
        if (!read_line(&buf)) break;
        const char *line = buf.data;
        if (strlen(line) + 1 < buf.len) {
            fprintf(stderr, "a line with a NUL byte is not taken; only a document may hold such bytes\n");
            continue;
        }
        if (!line[0]) continue;
        if (line[0] == '/' && line[1] != '/')
            run_command(&c, line + 1);
        else
            ask(&c, line[0] == '/' ? line + 1 : line);
    }
    mp_buf_clear(&buf);
    return c.result;
}
