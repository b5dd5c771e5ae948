#include "serve/tools.h"

#include <stdio.h>
#include <string.h>

#include "base/hash.h"
#include "serve/json.h"

enum { PATH_CAP = 64, NAME_MAX_BYTES = 64, CALL_BYTES_MAX = 8 << 20, UNDECIDED_MAX = 4 << 10 };

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

static bool is_blank(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* Names stand unescaped in the prompt. */
static bool check_name(const json_t *name, const char *path, mp_api_error *err) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.";
    size_t len = json_is_string(name) ? json_string_length(name) : 0;
    if (len > 0 && len <= NAME_MAX_BYTES && strspn(json_string_value(name), letters) == len) return true;
    return mp_refuse(err, 400, "invalid_value", path,
                     "'%s.name' must be a string of 1 to %d letters, digits, '_', '-' and '.'", path, NAME_MAX_BYTES);
}

/* As Python's json.dumps writes it: models learned their tools in this form. Free with mp_free. */
static char *dump(const json_t *value) {
    mp_buf text = { .limit = CALL_BYTES_MAX };
    if (!mp_json_dump(value, &text) || !mp_buf_append(&text, "", 1)) mp_buf_clear(&text);
    return text.data;
}

static bool check_list(const json_t *tools, mp_api_error *err) {
    if (!json_is_array(tools)) {
        return mp_refuse_type(err, "tools", tools, "an array");
    }
    if (json_array_size(tools) <= MP_TOOLS_MAX) return true;
    return mp_refuse(err, 400, "invalid_value", "tools", "'tools' has %zu items; at most %d", json_array_size(tools),
                     MP_TOOLS_MAX);
}

static bool check_object(const json_t *value, const char *path, mp_api_error *err) {
    if (json_is_object(value)) return true;
    return mp_refuse_type(err, path, value, "an object");
}

static bool add_tool(mp_prompt_draft *draft, const json_t *tool, mp_api_error *err) {
    char *text = dump(tool);
    return (text && mp_draft_add_tool(draft, text)) || mp_refuse_memory(err, "a tool");
}

/* A tool as the model is to see it: gateways put cache_control into it, which moves. NULL: out of memory. */
static json_t *without_hints(const json_t *tool, const json_t *function) {
    json_t *copy = json_copy((json_t *)tool), *inside = json_copy((json_t *)function);
    json_object_del(copy, "cache_control");
    json_object_del(inside, "cache_control");
    if (json_object_set_new(copy, "function", inside) == 0) return copy;
    json_decref(copy);
    return NULL;
}

bool mp_tools_read_openai(mp_prompt_draft *draft, const json_t *tools, mp_api_error *err) {
    if (!tools) return true;
    if (!check_list(tools, err)) return false;
    for (size_t i = 0; i < json_array_size(tools); i++) {
        char path[PATH_CAP], inside[PATH_CAP + 16];
        snprintf(path, sizeof path, "tools[%zu]", i);
        snprintf(inside, sizeof inside, "%s.function", path);
        const json_t *tool = json_array_get(tools, i);
        if (!check_object(tool, path, err)) return false;
        const json_t *function = json_object_get(tool, "function");
        if (!mp_json_is(json_object_get(tool, "type"), "function")) {
            return mp_refuse(err, 400, "unsupported", path, "'%s.type' must be \"function\"; there are no others here",
                             path);
        }
        if (!check_object(function, inside, err) || !check_name(json_object_get(function, "name"), inside, err)) {
            return false;
        }
        const json_t *parameters = json_object_get(function, "parameters");
        if (parameters && !json_is_null(parameters) && !json_is_object(parameters)) {
            return mp_refuse(err, 400, "invalid_type", inside, "'%s.parameters' is %s; it must be an object", inside,
                             mp_json_kind(parameters));
        }
        json_t *shown = without_hints(tool, function);
        bool ok = shown ? add_tool(draft, shown, err) : mp_refuse_memory(err, "a tool");
        json_decref(shown);
        if (!ok) return false;
    }
    return true;
}

bool mp_tools_read_anthropic(mp_prompt_draft *draft, const json_t *tools, mp_api_error *err) {
    if (!tools) return true;
    if (!check_list(tools, err)) return false;
    for (size_t i = 0; i < json_array_size(tools); i++) {
        char path[PATH_CAP];
        snprintf(path, sizeof path, "tools[%zu]", i);
        const json_t *tool = json_array_get(tools, i);
        if (!check_object(tool, path, err)) return false;
        const json_t *type = json_object_get(tool, "type"), *schema = json_object_get(tool, "input_schema");
        if (type && !json_is_null(type) && !mp_json_is(type, "custom")) {
            return mp_refuse(err, 400, "unsupported", path,
                             "'%s.type' must be \"custom\": this server has no tools of its own", path);
        }
        if (!check_name(json_object_get(tool, "name"), path, err)) return false;
        if (!json_is_object(schema)) {
            return mp_refuse(err, 400, "invalid_type", path, "'%s.input_schema' is %s; it must be an object", path,
                             schema ? mp_json_kind(schema) : "missing");
        }
        json_t *function = json_pack("{s:O}", "name", json_object_get(tool, "name"));
        json_t *description = json_object_get(tool, "description");
        if (json_is_string(description)) json_object_set(function, "description", description);
        json_object_set(function, "parameters", (json_t *)schema);
        json_t *as_openai = json_pack("{s:s, s:o}", "type", "function", "function", function);
        bool ok = as_openai ? add_tool(draft, as_openai, err) : mp_refuse_memory(err, "a tool");
        json_decref(as_openai);
        if (!ok) return false;
    }
    return true;
}

static void trim(const char **text, size_t *len) {
    while (*len > 0 && is_blank((*text)[0])) ++*text, --*len;
    while (*len > 0 && is_blank((*text)[*len - 1])) --*len;
}

/* Whether a text holds an object, or nothing; it is trimmed. */
static bool holds_object(const char **text, size_t *len) {
    trim(text, len);
    mp_api_error ignored;
    json_t *object = *len > 0 ? mp_json_parse(*text, *len, &ignored) : NULL;
    json_decref(object);
    return object || *len == 0;
}

/* No arguments are an object without members. Free with mp_free; NULL: out of memory. */
static char *copy_arguments(const char *text, size_t len) {
    trim(&text, &len);
    return len > 0 ? mp_strndup(text, len) : mp_strndup("{}", 2);
}

bool mp_tools_add_call(mp_prompt_draft *draft, const json_t *name, const json_t *id, const json_t *arguments,
                       const char *path, mp_api_error *err) {
    if (!check_name(name, path, err)) return false;
    const char *text = json_string_value(arguments);
    size_t len = json_string_length(arguments);
    if (!json_is_object(arguments) && !(text && holds_object(&text, &len))) {
        return mp_refuse(err, 400, "invalid_value", path, "'%s': a call's arguments must be a JSON object", path);
    }
    char *copy = text ? copy_arguments(text, len) : dump(arguments);
    return mp_draft_add_call(draft, json_string_value(name), json_string_value(id), copy) ||
           mp_refuse_memory(err, "a call");
}

bool mp_tools_read_choice(const json_t *choice, bool *none, mp_api_error *err) {
    *none = false;
    const json_t *type = json_is_object(choice) ? json_object_get(choice, "type") : choice;
    *none = mp_json_is(type, "none");
    if (!choice || *none || mp_json_is(type, "auto")) return true;
    static const char *const forcing[] = { "required", "any", "tool", "function", "allowed_tools" };
    for (size_t i = 0; i < sizeof forcing / sizeof *forcing; i++) {
        if (!mp_json_is(type, forcing[i])) continue;
        return mp_refuse(err, 400, "unsupported", "tool_choice",
                         "'tool_choice' that forces a call is not supported; replies cannot be held to a grammar or "
                         "schema here: ask for auto or none");
    }
    return mp_refuse(err, 400, "invalid_value", "tool_choice", "'tool_choice' must be auto or none");
}

/* ---- Marks ------------------------------------------------------------------------------------------------------- */

/* {"name": ..., "arguments": {...}} between two marks. */
struct mp_tool_marks {
    const char *format, *opening, *closing;
};

static const struct mp_tool_marks known_marks[] = { { "hermes", "<tool_call>", "</tool_call>" } };

static const struct mp_tool_marks *find_marks(const char *format) {
    for (size_t i = 0; i < sizeof known_marks / sizeof *known_marks; i++) {
        if (strcmp(known_marks[i].format, format) == 0) return &known_marks[i];
    }
    return NULL;
}

bool mp_tools_one_call(const mp_api *api, mp_generation *g, mp_api_error *err) {
    const struct mp_tool_marks *marks = find_marks(api->info->tool_format);
    if (!marks) return true;
    if (g->request.n_stop == MP_STOPS_MAX) {
        return mp_refuse(err, 400, "invalid_value", "stop",
                         "one call at most takes a stop string of its own, so give at most %d others",
                         MP_STOPS_MAX - 1);
    }
    char *stop = mp_strndup(marks->closing, strlen(marks->closing));
    if (!stop) return mp_refuse_memory(err, "a stop string");
    g->stops[g->request.n_stop++] = stop;
    return true;
}

uint64_t mp_tools_call_number(uint64_t request, uint32_t choice, uint32_t call) {
    const uint64_t parts[] = { request, choice, call };
    return mp_hash64(0, parts, sizeof parts);
}

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

bool mp_reply_parser_init(mp_reply_parser *p, const char *format, const json_t *tools, const char *inside) {
    *p = (mp_reply_parser){ .marks = find_marks(format), .held = { .limit = CALL_BYTES_MAX } };
    p->names = json_array();
    bool ok = p->names != NULL;
    for (size_t i = 0; ok && i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i);
        ok = json_array_append(p->names, json_object_get(inside ? json_object_get(tool, inside) : tool, "name")) == 0;
    }
    return ok;
}

void mp_reply_parser_clear(mp_reply_parser *p) {
    json_decref(p->names);
    mp_buf_clear(&p->held);
}

static void drop_front(mp_buf *buf, size_t n) {
    memmove(buf->data, buf->data + n, buf->len - n);
    buf->len -= n;
}

static size_t find_mark(const mp_buf *buf, size_t from, const char *mark) {
    size_t len = strlen(mark);
    for (size_t i = from; i + len <= buf->len; i++) {
        if (memcmp(buf->data + i, mark, len) == 0) return i;
    }
    return buf->len;
}

/* Where the end begins that may turn out to stand in front of a call: blanks, and the beginning of a mark. Too many
 * blanks to look at again with each piece are text. */
static size_t find_undecided(const mp_buf *buf, const char *mark) {
    size_t at = buf->len, len = strlen(mark);
    for (size_t n = len - 1 < buf->len ? len - 1 : buf->len; n > 0 && at == buf->len; n--) {
        if (memcmp(buf->data + buf->len - n, mark, n) == 0) at = buf->len - n;
    }
    size_t blanks = at;
    while (blanks > 0 && is_blank(buf->data[blanks - 1])) blanks--;
    return at - blanks > UNDECIDED_MAX ? at : blanks;
}

/* The end of the string that begins at text[i], behind its quote. */
static size_t skip_string(const char *text, size_t i) {
    for (i++; text[i] != '"'; i++) i += text[i] == '\\';
    return i + 1;
}

/* The value of "arguments" as it is written in an object that was found to be JSON and to have it, spelled plainly. */
static char *slice_arguments(const char *text, size_t len) {
    static const char key[] = "\"arguments\"";
    size_t depth = 0, from = 0;
    for (size_t i = 0; i < len;) {
        char c = text[i];
        bool ends = depth == 1 && (c == ',' || c == '}');
        if (from > 0 && ends) return copy_arguments(text + from, i - from);
        depth += c == '{' || c == '[';
        depth -= c == '}' || c == ']';
        size_t next = c == '"' ? skip_string(text, i) : i + 1;
        bool is_key = depth == 1 && from == 0 && next - i == sizeof key - 1 && memcmp(text + i, key, next - i) == 0;
        if (is_key) {
            while (is_blank(text[next])) next++;
            if (text[next] == ':') from = ++next;
        }
        i = next;
    }
    return NULL;
}

/* The call in `text`, with its arguments as they are written; NULL: it is none. Some templates show models doubled
 * braces, {{"name": ...}}. */
static json_t *read_call(const char *text, size_t len, char **arguments) {
    trim(&text, &len);
    mp_api_error ignored;
    json_t *root = len > 0 ? mp_json_parse(text, len, &ignored) : NULL;
    if (!root && len > 4 && memcmp(text, "{{", 2) == 0 && memcmp(text + len - 2, "}}", 2) == 0) {
        text++, len -= 2;
        root = mp_json_parse(text, len, &ignored);
    }
    const json_t *name = json_object_get(root, "name"), *given = json_object_get(root, "arguments");
    bool is_call = check_name(name, "", &ignored) && (!given || json_is_object(given));
    if (is_call) *arguments = given ? slice_arguments(text, len) : copy_arguments("", 0);
    if (is_call && *arguments) return root;
    json_decref(root);
    return NULL;
}

/* The call held up to `end`, which the text up to `next` closes. What is none is text, marks and all. */
static bool end_call(mp_reply_parser *p, size_t end, size_t next, const mp_reply_sink *sink) {
    size_t begin = find_mark(&p->held, 0, p->marks->opening) + strlen(p->marks->opening);
    char *arguments;
    json_t *call = read_call(p->held.data + begin, end - begin, &arguments);
    bool ok;
    if (call) {
        ok = sink->call(sink->user, p->n_calls++, json_string_value(json_object_get(call, "name")), arguments);
        mp_free(arguments);
        json_decref(call);
    } else {
        ok = sink->text(sink->user, p->held.data, next);
    }
    p->in_call = false;
    p->scanned = 0;
    drop_front(&p->held, next);
    return ok;
}

typedef enum match { MATCH_NO, MATCH_MAYBE, MATCH_YES } match;

static size_t skip_blanks(const char *text, size_t i, size_t len) {
    while (i < len && is_blank(text[i])) i++;
    return i;
}

/* Whether a reply begins like a call without marks: a code block's fence or none, then {"name" or {"arguments". */
static match begins_without_marks(const char *text, size_t len) {
    static const char *const keys[] = { "\"name\"", "\"arguments\"" };
    size_t i = skip_blanks(text, 0, len), fence = i;
    while (i < len && i < fence + 3 && text[i] == '`') i++;
    if (i > fence && i < len && i < fence + 3) return MATCH_NO;
    if (i == fence + 3) {
        while (i < len && text[i] >= 'a' && text[i] <= 'z') i++;
        i = skip_blanks(text, i, len);
    }
    for (uint32_t braces = 0; i < len && text[i] == '{' && braces < 2; braces++) {
        i = skip_blanks(text, i + 1, len);
        if (i == len || text[i] == '{') continue;
        for (size_t k = 0; k < 2; k++) {
            size_t n = strlen(keys[k]), there = len - i < n ? len - i : n;
            if (memcmp(text + i, keys[k], there) == 0) return there == n ? MATCH_YES : MATCH_MAYBE;
        }
    }
    return i == len ? MATCH_MAYBE : MATCH_NO;
}

/* The whole reply is such a call, or text. */
static bool end_without_marks(mp_reply_parser *p, const mp_reply_sink *sink) {
    const char *text = p->held.data;
    size_t from = 0, to = p->held.len;
    while (text[from] != '{') from++;
    while (to > from && (is_blank(text[to - 1]) || (text[to - 1] == '`' && from > 0))) to--;
    char *arguments;
    json_t *call = read_call(text + from, to - from, &arguments);
    if (call && !json_object_get(call, "arguments")) { // too little to go by
        mp_free(arguments);
        json_decref(call);
        call = NULL;
    }
    if (!call) return sink->text(sink->user, text, p->held.len);
    const json_t *name = json_object_get(call, "name");
    bool known = false;
    for (size_t i = 0; !known && i < json_array_size(p->names); i++) {
        known = json_equal((json_t *)name, json_array_get(p->names, i));
    }
    bool ok = known ? sink->call(sink->user, p->n_calls++, json_string_value(name), arguments)
                    : sink->text(sink->user, text, p->held.len);
    mp_free(arguments);
    json_decref(call);
    return ok;
}

/* Does one thing with what is held; *again: there may be more to do. */
static bool advance(mp_reply_parser *p, const mp_reply_sink *sink, bool *again) {
    mp_buf *held = &p->held;
    *again = false;
    if (!p->begun) {
        match m = begins_without_marks(held->data, held->len);
        if (m == MATCH_MAYBE && held->len > UNDECIDED_MAX) m = MATCH_NO;
        p->begun = m != MATCH_MAYBE;
        p->without_marks = m == MATCH_YES;
    }
    if (!p->begun || p->without_marks) return true;
    if (p->in_call) {
        size_t len = strlen(p->marks->closing), end = find_mark(held, p->scanned, p->marks->closing);
        p->scanned = held->len >= len ? held->len - len + 1 : 0;
        *again = end < held->len;
        return !*again || end_call(p, end, end + len, sink);
    }
    size_t at = find_mark(held, 0, p->marks->opening);
    p->in_call = *again = at < held->len;
    if (!p->in_call) at = find_undecided(held, p->marks->opening);
    while (p->in_call && at > 0 && is_blank(held->data[at - 1])) at--; // they belong to the call
    if (at == 0) return true;
    bool ok = sink->text(sink->user, held->data, at);
    drop_front(held, at);
    return ok;
}

bool mp_reply_parser_push(mp_reply_parser *p, const char *text, size_t len, const mp_reply_sink *sink) {
    if (len == 0) return true;
    if (!p->marks) return sink->text(sink->user, text, len);
    bool again = true, ok = mp_buf_append(&p->held, text, len);
    while (ok && again) ok = advance(p, sink, &again);
    return ok;
}

bool mp_reply_parser_end(mp_reply_parser *p, const mp_reply_sink *sink) {
    size_t len = p->held.len;
    if (len == 0) return true;
    if (p->in_call) return end_call(p, len, len, sink);
    if (p->without_marks) return end_without_marks(p, sink);
    /* Blanks between calls and behind the last are no text. */
    bool blank = p->n_calls > 0;
    for (size_t i = 0; blank && i < len; i++) blank = is_blank(p->held.data[i]);
    bool ok = blank || sink->text(sink->user, p->held.data, len);
    drop_front(&p->held, len);
    return ok;
}
