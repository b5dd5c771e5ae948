/* What `mepic run` and its interactive mode share. */
#ifndef MEPIC_CLI_RUN_H
#define MEPIC_CLI_RUN_H

#include "cli/conversation.h"
#include "cli/engine_flags.h"
#include "cli/reply.h"

/* Asks `question` as the conversation's next turn and streams the answer to standard output; the turn is kept only when
 * it was answered. `request` carries everything but the prompt. A cancelled answer is kept as far as it came. */
mepic_status mp_run_ask(mp_session *session, mp_conversation *conversation, const mepic_request *request,
                        const char *question, mp_reply *reply, mepic_error *err);

/* For mp_reply.on_text: standard output, at once. */
void mp_run_print_text(void *user, const char *text, size_t len);

/* Reads questions and commands from standard input until its end. Returns the exit status. */
int mp_chat(mp_session *session, mp_conversation *conversation, const mepic_request *request);

#endif
