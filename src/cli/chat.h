/* A conversation on the terminal: questions, and commands that change the documents in between. Who answers is the
 * caller's: an engine in this process (`mepic run`) or a server (`mepic chat`). One thread. */
#ifndef MEPIC_CLI_CHAT_H
#define MEPIC_CLI_CHAT_H

#include "cli/conversation.h"

typedef struct mp_partner {
    const char *name; /* for the greeting */
    mepic_reuse reuse;
    /* Streams the answer to the conversation's last turn to `text` and says in `line` where the prompt's tokens came
     * from. A cancelled answer is MEPIC_OK, as far as it came. */
    mepic_status (*ask)(void *user, const mp_conversation *conversation, mepic_reuse reuse, mp_buf *text, char *line,
                        size_t cap, mepic_error *err);
    void (*print_stats)(void *user);
    void *user;
} mp_partner;

enum { MP_ANSWER_MAX_BYTES = 64 << 20 };

/* Asks `question` as the next turn, which is kept only when it was answered. */
mepic_status mp_chat_ask(const mp_partner *partner, mp_conversation *conversation, mepic_reuse reuse,
                         const char *question, char *line, size_t cap, mepic_error *err);
/* Reads questions and commands from standard input until its end. Returns the exit status. */
int mp_chat(const mp_partner *partner, mp_conversation *conversation);
/* Standard output, at once. */
void mp_chat_print(const char *text, size_t len);

#endif
