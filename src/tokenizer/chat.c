#include "tokenizer/chat.h"

#include <string.h>

/* ---- Recognizing a template -------------------------------------------------------------------------------------- */

/* The first `needle` in text from `from` on; text.len: there is none. */
static size_t find(mp_str text, size_t from, const char *needle) {
    size_t len = strlen(needle);
    for (size_t i = from; len <= text.len && i <= text.len - len; i++) {
        if (memcmp(text.data + i, needle, len) == 0) return i;
    }
    return text.len;
}

static bool has(mp_str text, const char *needle) {
    return find(text, 0, needle) < text.len;
}

/* A literal that begins a string, in either kind of quotes. */
static bool has_quoted(mp_str text, const char *literal) {
    size_t len = strlen(literal);
    for (size_t at = find(text, 1, literal); at < text.len; at = find(text, at + len, literal)) {
        if (text.data[at - 1] == '\'' || text.data[at - 1] == '"') return true;
    }
    return false;
}

/* The system text a ChatML template writes itself: a literal between its opening and closing marks. */
static mp_str find_default_system(mp_str text) {
    static const char opening[] = "<|im_start|>system";
    for (size_t at = find(text, 0, opening); at < text.len; at = find(text, at + 1, opening)) {
        size_t from = at + sizeof opening - 1;
        if (from < text.len && text.data[from] == '\n') {
            from++;
        } else if (from + 1 < text.len && text.data[from] == '\\' && text.data[from + 1] == 'n') {
            from += 2;
        } else {
            continue;
        }
        size_t to = find(text, from, "<|im_end|>");
        if (to == text.len || to == from) continue;
        bool literal = true;
        for (size_t i = from; i < to; i++) literal = literal && !memchr("'\"\\{}", text.data[i], 5);
        if (literal) return (mp_str){ text.data + from, to - from };
    }
    return (mp_str){ "", 0 };
}

/* Whether "content" passes through "| trim", as in message['content'] | trim. */
static bool trims_content(mp_str text) {
    for (size_t at = find(text, 0, "trim"); at < text.len; at = find(text, at + 1, "trim")) {
        size_t i = at;
        while (i > 0 && text.data[i - 1] == ' ') i--;
        if (i == 0 || text.data[i - 1] != '|') continue;
        i--;
        while (i > 0 && text.data[i - 1] == ' ') i--;
        if (i > 1 && text.data[i - 1] == ']') i -= 2; /* with its quote */
        if (i >= 7 && memcmp(text.data + i - 7, "content", 7) == 0) return true;
    }
    return false;
}

/* A string of the template that ends with `end`: what stands between its quotes. len 0: there is none. */
static mp_str find_string_ending(mp_str text, const char *end) {
    for (size_t at = find(text, 0, end), len = strlen(end); at < text.len; at = find(text, at + 1, end)) {
        char quote = at + len < text.len ? text.data[at + len] : 0;
        if (quote != '\'' && quote != '"') continue;
        size_t from = at;
        while (from > 0 && !(text.data[from - 1] == quote && (from == 1 || text.data[from - 2] != '\\'))) from--;
        if (from > 0) return (mp_str){ text.data + from, at + len - from };
    }
    return (mp_str){ "", 0 };
}

/* A string that begins, behind newlines, with `start`: from there to its closing quote. */
static mp_str find_string_beginning(mp_str text, const char *start) {
    for (size_t at = find(text, 0, start); at < text.len; at = find(text, at + 1, start)) {
        size_t open = at;
        while (open > 1 && (text.data[open - 1] == '\n' || memcmp(text.data + open - 2, "\\n", 2) == 0)) {
            open -= text.data[open - 1] == '\n' ? 1 : 2;
        }
        char quote = open > 0 ? text.data[open - 1] : 0;
        if (quote != '\'' && quote != '"') continue;
        size_t to = at;
        while (to < text.len && text.data[to] != quote) to += text.data[to] == '\\' ? 2 : 1;
        if (to < text.len) return (mp_str){ text.data + at, to - at };
    }
    return (mp_str){ "", 0 };
}

static bool ends_with(mp_str text, const char *end) {
    size_t len = strlen(end);
    return text.len >= len && memcmp(text.data + text.len - len, end, len) == 0;
}

/* <tools>, a line each, </tools>, and a call is a JSON object in <tool_call> marks. */
static void find_tools(mp_str text, mp_chat_template *out) {
    mp_str before = find_string_ending(text, "<tools>"), after = find_string_beginning(text, "</tools>");
    bool calls_are_json = has(after, "<tool_call>") && has(after, "name") && has(after, "arguments");
    if (before.len == 0 || !calls_are_json || !ends_with(after, "<|im_end|>\\n")) return;
    while (before.len >= 2 && memcmp(before.data, "\\n", 2) == 0) before = (mp_str){ before.data + 2, before.len - 2 };
    out->tools_before = before;
    out->tools_after = after;
}

void mp_chat_template_find(const mp_gguf *gguf, mp_chat_template *out) {
    *out = (mp_chat_template){ .family = MP_CHAT_NONE, .default_system = { "", 0 } };
    mp_str text;
    if (mp_gguf_str(gguf, "tokenizer.chat_template", &text, NULL)) return;
    out->trim = trims_content(text);
    if (has(text, "<|im_start|>")) {
        out->family = MP_CHAT_CHATML;
        out->default_system = find_default_system(text);
        out->tool_response = has(text, "<tool_response>");
        if (out->tool_response) find_tools(text, out);
    } else if (has(text, "<|start_header_id|>")) {
        out->family = MP_CHAT_LLAMA3;
    } else if (has(text, "<start_of_turn>")) {
        out->family = MP_CHAT_GEMMA;
    } else if (has(text, "[INST]") && !has(text, "<<SYS>>")) { /* <<SYS>>: Llama 2, another family */
        out->family = MP_CHAT_MISTRAL;
        out->system_prompt = has(text, "[SYSTEM_PROMPT]");
        out->system_last = has(text, "loop.last and system_message");
        out->space_before = has_quoted(text, " [INST]");
        out->space_end = has_quoted(text, " [/INST]");
        out->space_after = has(text, "[INST] ");
        out->space_reply = has_quoted(text, " ' + message") || has_quoted(text, " \" + message");
    }
}

const char *mp_chat_family_name(mp_chat_family family) {
    switch (family) {
    case MP_CHAT_NONE: return "none";
    case MP_CHAT_CHATML: return "chatml";
    case MP_CHAT_LLAMA3: return "llama3";
    case MP_CHAT_MISTRAL: return "mistral";
    case MP_CHAT_GEMMA: return "gemma";
    }
    return "none";
}

const char *mp_chat_tool_format(const mp_chat_template *chat) {
    return chat->tools_before.len > 0 ? "hermes" : "none";
}

/* ---- Pieces ------------------------------------------------------------------------------------------------------ */

static bool push(mp_pieces *pieces, mp_piece piece) {
    if (pieces->n == pieces->cap) {
        size_t cap = pieces->cap ? 2 * pieces->cap : 16;
        mp_piece *items = mp_realloc(pieces->items, cap * sizeof *items);
        if (!items) return false;
        pieces->items = items;
        pieces->cap = cap;
    }
    pieces->items[pieces->n++] = piece;
    return true;
}

static bool push_literal(mp_pieces *pieces, const char *literal) {
    size_t len = strlen(literal);
    return len == 0 || push(pieces, (mp_piece){ MP_PIECE_TEMPLATE, { literal, len }, NULL });
}

static bool is_blank(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* What to skip at the front of a text part and at its end; tokens cannot be trimmed. */
static size_t blank_front(const mepic_segment *part) {
    size_t n = 0;
    while (!part->tokens && n < part->len && is_blank(part->text[n])) n++;
    return n;
}

static size_t blank_end(const mepic_segment *part) {
    size_t n = 0;
    while (!part->tokens && n < part->len && is_blank(part->text[part->len - 1 - n])) n++;
    return n;
}

static bool push_content(mp_pieces *pieces, const mepic_message *message, bool trim) {
    const mepic_segment *parts = message->parts;
    size_t first = 0, end = message->n_parts;
    if (trim) {
        while (first < end && !parts[first].tokens && blank_front(&parts[first]) == parts[first].len) first++;
        while (first < end && !parts[end - 1].tokens && blank_end(&parts[end - 1]) == parts[end - 1].len) end--;
    }
    for (size_t i = first; i < end; i++) {
        mp_str text = { parts[i].text, parts[i].tokens ? 0 : parts[i].len };
        if (trim && i == end - 1) text.len -= blank_end(&parts[i]);
        if (trim && i == first) {
            size_t skip = blank_front(&parts[i]);
            if (skip) text = (mp_str){ text.data + skip, text.len - skip };
        }
        if (text.len == 0 && !(parts[i].tokens && parts[i].n_tokens)) continue;
        if (!push(pieces, (mp_piece){ MP_PIECE_PART, text, &parts[i] })) return false;
    }
    return true;
}

/* Room for a text of the pieces' own. */
static char *own_text(mp_pieces *pieces, size_t len) {
    if (pieces->n_texts == pieces->cap_texts) {
        size_t cap = pieces->cap_texts ? 2 * pieces->cap_texts : 8;
        char **texts = mp_realloc(pieces->texts, cap * sizeof *texts);
        if (!texts) return NULL;
        pieces->texts = texts;
        pieces->cap_texts = cap;
    }
    char *text = mp_alloc(len);
    if (text) pieces->texts[pieces->n_texts++] = text;
    return text;
}

static bool join(mp_pieces *pieces, const mp_str *texts, size_t n, mp_str *out) {
    size_t len = 0;
    for (size_t i = 0; i < n; i++) len += texts[i].len;
    char *joined = own_text(pieces, len), *to = joined;
    if (!joined) return false;
    for (size_t i = 0; i < n; i++) {
        if (texts[i].len > 0) memcpy(to, texts[i].data, texts[i].len);
        to += texts[i].len;
    }
    *out = (mp_str){ joined, len };
    return true;
}

static mp_str str(const char *text) {
    return (mp_str){ text, strlen(text) };
}

/* Puts `end` behind the last piece: into it where it is text, since a word's tokens depend on what follows. */
static bool extend_last(mp_pieces *pieces, const char *end) {
    mp_piece *last = &pieces->items[pieces->n - 1];
    mp_str parts[] = { last->text, str(end) };
    bool joins = last->kind == MP_PIECE_TEMPLATE || (last->part->kind == MEPIC_TEXT && !last->part->tokens);
    return joins ? join(pieces, parts, 2, &last->text) : push_literal(pieces, end);
}

/* What is not template text and no part of a message either: special tokens are not parsed in it. */
static bool push_text(mp_pieces *pieces, mp_str text) {
    static const mepic_segment plain = { .kind = MEPIC_TEXT };
    return push(pieces, (mp_piece){ MP_PIECE_PART, text, &plain });
}

/* A string of the template as it reads: \n and quotes behind a backslash. */
static bool push_string(mp_pieces *pieces, mp_str written, const char *end) {
    char *text = own_text(pieces, written.len + strlen(end));
    if (!text) return false;
    size_t n = 0;
    for (size_t i = 0; i < written.len; i++) {
        bool escaped = written.data[i] == '\\' && i + 1 < written.len;
        if (escaped) i++;
        text[n++] = (char)(escaped && written.data[i] == 'n' ? '\n' : written.data[i]);
    }
    memcpy(text + n, end, strlen(end));
    return push(pieces, (mp_piece){ MP_PIECE_TEMPLATE, { text, n + strlen(end) }, NULL });
}

void mp_pieces_clear(mp_pieces *pieces) {
    for (size_t i = 0; i < pieces->n_texts; i++) mp_free(pieces->texts[i]);
    mp_free(pieces->texts);
    mp_free(pieces->items);
    *pieces = (mp_pieces){ 0 };
}

/* ---- Rendering --------------------------------------------------------------------------------------------------- */

typedef enum role { SYSTEM, USER, ASSISTANT, TOOL, N_ROLES } role;

static role find_role(const char *name) {
    static const char *const names[N_ROLES] = { "system", "user", "assistant", "tool" };
    role r = SYSTEM;
    while (r < N_ROLES && !(name && strcmp(name, names[r]) == 0)) r++;
    return r;
}

/* The system turn, with the tools behind its text. */
static bool chatml_system(const mp_chat_template *chat, const mp_chat *c, bool has_system, mp_pieces *out) {
    bool has_text = has_system || chat->default_system.len > 0, ok = push_literal(out, "<|im_start|>system\n");
    if (has_system)
        ok = ok && push_content(out, &c->messages[0], chat->trim);
    else if (has_text)
        ok = ok && push(out, (mp_piece){ MP_PIECE_TEMPLATE, chat->default_system, NULL });
    if (c->n_tools == 0) return ok && push_literal(out, "<|im_end|>\n");
    ok = ok && (!has_text || extend_last(out, "\n\n")) && push_string(out, chat->tools_before, "\n");
    for (size_t i = 0; ok && i < c->n_tools; i++) {
        mp_str line, parts[] = { str(c->tools[i]), str("\n") };
        ok = join(out, parts, 2, &line) && push_text(out, line);
    }
    return ok && push_string(out, chat->tools_after, "");
}

/* Newlines go where a reply's tokens have them: behind the text, and inside the marks with the call. */
static bool chatml_calls(const mepic_message *message, bool has_text, mp_pieces *out) {
    bool ok = message->n_calls == 0 || !has_text || extend_last(out, "\n");
    for (size_t i = 0; ok && i < message->n_calls; i++) {
        const mepic_tool_call *call = &message->calls[i];
        mp_str text, parts[] = { str("\n{\"name\": \""), str(call->name), str("\", \"arguments\": "),
                                 str(call->arguments), str("}\n") };
        ok = push_literal(out, i > 0 ? "\n<tool_call>" : "<tool_call>") && join(out, parts, 5, &text) &&
             push_text(out, text) && push_literal(out, "</tool_call>");
    }
    return ok;
}

static bool render_chatml(const mp_chat_template *chat, const mp_chat *c, bool generate, mp_pieces *out) {
    static const char *const openings[] = { "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n" };
    const mepic_message *messages = c->messages;
    size_t n = c->n;
    bool has_system = find_role(messages[0].role) == SYSTEM, ok = true;
    if (has_system || chat->default_system.len > 0 || c->n_tools > 0) ok = chatml_system(chat, c, has_system, out);
    for (size_t i = has_system ? 1 : 0; ok && i < n; i++) {
        role r = find_role(messages[i].role);
        if (r != TOOL) {
            ok = push_literal(out, openings[r]);
            size_t before = out->n;
            ok = ok && push_content(out, &messages[i], chat->trim) &&
                 chatml_calls(&messages[i], out->n > before, out) && push_literal(out, "<|im_end|>\n");
            continue;
        }
        bool first = i == 0 || find_role(messages[i - 1].role) != TOOL;
        bool last = i + 1 == n || find_role(messages[i + 1].role) != TOOL;
        ok = push_literal(out, first ? "<|im_start|>user\n<tool_response>\n" : "\n<tool_response>\n") &&
             push_content(out, &messages[i], false) &&
             push_literal(out, last ? "\n</tool_response><|im_end|>\n" : "\n</tool_response>");
    }
    return ok && (!generate || push_literal(out, openings[ASSISTANT]));
}

static bool render_llama3(const mp_chat_template *chat, const mepic_message *messages, size_t n, bool generate,
                          mp_pieces *out) {
    static const char *const openings[] = { "<|start_header_id|>system<|end_header_id|>\n\n",
                                            "<|start_header_id|>user<|end_header_id|>\n\n",
                                            "<|start_header_id|>assistant<|end_header_id|>\n\n" };
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) {
        ok = push_literal(out, openings[find_role(messages[i].role)]) && push_content(out, &messages[i], chat->trim) &&
             push_literal(out, "<|eot_id|>");
    }
    return ok && (!generate || push_literal(out, openings[ASSISTANT]));
}

/* Gemma has no system turn: its text stands in front of the first user turn. */
static bool render_gemma(const mp_chat_template *chat, const mepic_message *messages, size_t n, bool generate,
                         mp_pieces *out) {
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) {
        role r = find_role(messages[i].role);
        bool folded = i == 1 && find_role(messages[0].role) == SYSTEM; /* its turn is open already */
        if (!folded) ok = push_literal(out, r == ASSISTANT ? "<start_of_turn>model\n" : "<start_of_turn>user\n");
        ok = ok && push_content(out, &messages[i], chat->trim && r != SYSTEM) &&
             push_literal(out, r == SYSTEM ? "\n\n" : "<end_of_turn>\n");
    }
    return ok && (!generate || push_literal(out, "<start_of_turn>model\n"));
}

static const char *mistral_user_opening(const mp_chat_template *chat) {
    static const char *const openings[2][2] = { { "[INST]", "[INST] " }, { " [INST]", " [INST] " } };
    return openings[chat->space_before][chat->space_after];
}

static const char *mistral_system_opening(const mp_chat_template *chat) {
    if (!chat->system_prompt) return mistral_user_opening(chat);
    return chat->space_after ? "[SYSTEM_PROMPT] " : "[SYSTEM_PROMPT]";
}

static bool render_mistral(const mp_chat_template *chat, const mepic_message *messages, size_t n, mp_pieces *out) {
    const mepic_message *system = find_role(messages[0].role) == SYSTEM ? &messages[0] : NULL;
    bool ok = true;
    if (system && chat->system_prompt) {
        ok = push_literal(out, mistral_system_opening(chat)) && push_content(out, system, false) &&
             push_literal(out, "[/SYSTEM_PROMPT]");
    }
    size_t first = system ? 1 : 0;
    for (size_t i = first; ok && i < n; i++) {
        if (find_role(messages[i].role) == ASSISTANT) {
            ok = push_literal(out, chat->space_reply ? " " : "") && push_content(out, &messages[i], chat->trim) &&
                 push_literal(out, "</s>");
            continue;
        }
        ok = push_literal(out, mistral_user_opening(chat));
        if (system && !chat->system_prompt && i == (chat->system_last ? n - 1 : first)) {
            ok = ok && push_content(out, system, false) && push_literal(out, "\n\n");
        }
        ok =
            ok && push_content(out, &messages[i], false) && push_literal(out, chat->space_end ? " [/INST]" : "[/INST]");
    }
    return ok; /* the reply begins right after [/INST] */
}

/* Refuses what the family cannot express. */
static mepic_status check_roles(const mp_chat_template *chat, const mepic_message *messages, size_t n,
                                mepic_error *err) {
    const char *family = mp_chat_family_name(chat->family);
    bool alternates = chat->family == MP_CHAT_GEMMA || chat->family == MP_CHAT_MISTRAL;
    role expected = USER;
    for (size_t i = 0; i < n; i++) {
        role r = find_role(messages[i].role);
        if (r == N_ROLES) {
            return mp_fail(err, MEPIC_ERR_ARGUMENT,
                           "message %zu has the role \"%.32s\"; system, user, assistant and tool are known", i,
                           messages[i].role ? messages[i].role : "");
        }
        if (messages[i].n_calls > 0 && (r != ASSISTANT || chat->tools_before.len == 0)) {
            return mp_fail(err, r != ASSISTANT ? MEPIC_ERR_ARGUMENT : MEPIC_ERR_UNSUPPORTED,
                           "message %zu calls tools; %s", i,
                           r != ASSISTANT ? "only an assistant does"
                                          : "this model's chat template has no tools, or calls them in a way that is "
                                            "not known");
        }
        if (r == TOOL && !chat->tool_response) {
            return mp_fail(
                err, MEPIC_ERR_ARGUMENT,
                "message %zu: this model's chat template (%s) has no turn for tool results; send them as user text", i,
                family);
        }
        if (!alternates || (i == 0 && r == SYSTEM)) continue;
        if (r != expected) {
            return mp_fail(
                err, MEPIC_ERR_ARGUMENT,
                "message %zu has the role \"%s\"; this model's chat template (%s) needs user and assistant in turns "
                "after an optional system message",
                i, messages[i].role, family);
        }
        expected = r == USER ? ASSISTANT : USER;
    }
    if (alternates && n == 1 && find_role(messages[0].role) == SYSTEM) {
        return mp_fail(err, MEPIC_ERR_ARGUMENT,
                       "a system message alone: this model's chat template (%s) needs a user turn", family);
    }
    return MEPIC_OK;
}

mepic_status mp_chat_render(const mp_chat_template *chat, const mp_chat *c, bool generate, mp_pieces *out,
                            mepic_error *err) {
    if (chat->family == MP_CHAT_NONE) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "the model file has no chat template of a known family (chatml, llama3, mistral, gemma); "
                       "give segments instead of messages");
    }
    if (c->n == 0) return mp_fail(err, MEPIC_ERR_ARGUMENT, "there are no messages");
    if (c->n_tools > 0 && chat->tools_before.len == 0) {
        return mp_fail(err, MEPIC_ERR_UNSUPPORTED,
                       "this model's chat template (%s) has no tools, or calls them in a way that is not known; "
                       "leave them out",
                       mp_chat_family_name(chat->family));
    }
    mepic_status status = check_roles(chat, c->messages, c->n, err);
    if (status) return status;
    mp_pieces pieces = { 0 };
    bool ok = false;
    switch (chat->family) {
    case MP_CHAT_NONE: break;
    case MP_CHAT_CHATML: ok = render_chatml(chat, c, generate, &pieces); break;
    case MP_CHAT_LLAMA3: ok = render_llama3(chat, c->messages, c->n, generate, &pieces); break;
    case MP_CHAT_GEMMA: ok = render_gemma(chat, c->messages, c->n, generate, &pieces); break;
    case MP_CHAT_MISTRAL: ok = render_mistral(chat, c->messages, c->n, &pieces); break;
    }
    if (!ok) {
        mp_pieces_clear(&pieces);
        return mp_fail_nomem(err, "a rendered conversation", c->n * sizeof *pieces.items);
    }
    *out = pieces;
    return MEPIC_OK;
}

mp_str mp_chat_system_opening(const mp_chat_template *chat) {
    const char *opening = "";
    switch (chat->family) {
    case MP_CHAT_NONE: break;
    case MP_CHAT_CHATML: opening = "<|im_start|>system\n"; break;
    case MP_CHAT_LLAMA3: opening = "<|start_header_id|>system<|end_header_id|>\n\n"; break;
    case MP_CHAT_GEMMA: opening = "<start_of_turn>user\n"; break;
    case MP_CHAT_MISTRAL: opening = mistral_system_opening(chat); break;
    }
    return (mp_str){ opening, strlen(opening) };
}
