/* `mepic serve` as a process: its address, its options, that it answers as `mepic run` does, and how signals end it.
 * argv[1] is the program; with "model" behind it, the answer is compared on SmolLM2 alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/http.h"
#include "support/models.h"
#include "support/server.h"
#include "support/tiny.h"

enum { ARGS_MAX = 32, OUTPUT_MAX = 65536 };

static const char *program;
static char real[512]; /* a model; "": a synthetic one */

typedef struct process {
    pid_t pid;
    FILE *out, *err;
} process;

static void spawn(process *p, const char *const *args) {
    int out[2], err[2];
    assert_int_equal(pipe(out), 0);
    assert_int_equal(pipe(err), 0);
    char *argv[ARGS_MAX] = { (char *)program };
    for (int i = 0; args[i]; i++) {
        assert_true(i + 2 < ARGS_MAX);
        argv[i + 1] = (char *)args[i];
    }
    p->pid = fork();
    assert_true(p->pid >= 0);
    if (p->pid == 0) {
        dup2(out[1], STDOUT_FILENO);
        dup2(err[1], STDERR_FILENO);
        for (int fd = 3; fd < 64; fd++) close(fd);
        execv(program, argv);
        _exit(98);
    }
    close(out[1]);
    close(err[1]);
    p->out = fdopen(out[0], "r");
    p->err = fdopen(err[0], "r");
    assert_true(p->out && p->err);
}

/* The exit status. */
static int end(process *p) {
    int status;
    assert_int_equal(waitpid(p->pid, &status, 0), p->pid);
    fclose(p->out);
    fclose(p->err);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static const char *model(void) {
    static const char *path;
    if (real[0]) return real;
    if (!path) {
        mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
        spec.hp.n_ctx_train = 65536;
        path = tiny_model_write(&spec);
    }
    return path;
}

#define ENGINE "-m", model(), "--cache-dir", "none", "--pages", "8300", "-q", "-t", "1"

/* Starts a server; `port` is where it can be reached. */
static void serve(process *p, const char *const *args) {
    spawn(p, args);
    char line[512];
    unsigned number;
    if (!fgets(line, sizeof line, p->out)) {
        if (!fgets(line, sizeof line, p->err)) line[0] = 0;
        fail_msg("the server did not start: %s", line);
    }
    const char *at_url = strstr(line, "http://127.0.0.1:");
    if (!at_url || sscanf(at_url, "http://127.0.0.1:%u", &number) != 1) fail_msg("no address in: %s", line);
    port = (uint16_t)number;
}
#define SERVE(p, ...) serve(p, (const char *const[]){ "serve", "--port", "0", __VA_ARGS__, NULL })

static void expect_refused(const char *const *args, const char *word) {
    process p;
    char text[2048] = "";
    spawn(&p, args);
    size_t n = fread(text, 1, sizeof text - 1, p.err);
    text[n] = 0;
    assert_int_equal(end(&p), 2);
    if (!strstr(text, word)) fail_msg("'%s' is not in: %s", word, text);
}
#define REFUSED(word, ...) expect_refused((const char *const[]){ "serve", __VA_ARGS__, NULL }, word)

static void bad_options_are_named(void **state) {
    (void)state;
    REFUSED("no model given", "--port", "0");
    REFUSED("0 to 65535", "--port", "65536");
    REFUSED("--config: /nonexistent cannot be opened", "--config", "/nonexistent");
    setenv("MEPIC_MAX_REPLIES", "many", 1);
    REFUSED("MEPIC_MAX_REPLIES: 'many' is not a whole number from 1 to 65536", ENGINE);
    unsetenv("MEPIC_MAX_REPLIES");
    REFUSED("--api-key-file", "-m", model(), "--api-key-file", "/nonexistent");
    REFUSED("--public-documents: /nonexistent", "-m", model(), "--public-documents", "/nonexistent");
    REFUSED("API keys", ENGINE, "--host", "0.0.0.0", "--port", "0");
    REFUSED("host", ENGINE, "--host", "no host", "--port", "0");
}

/* Loading can take minutes; nobody is to wait so long to hear of it. */
static void a_port_in_use_is_told_before_the_model_is_loaded(void **state) {
    (void)state;
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0 && bind(fd, (struct sockaddr *)&address, len) == 0 && listen(fd, 1) == 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &len), 0);
    char number[8];
    snprintf(number, sizeof number, "%u", ntohs(address.sin_port));
    REFUSED("in use", "-m", "/nonexistent.gguf", "--port", number);
    close(fd);
}

/* ---- The same as `mepic run` ------------------------------------------------------------------------------------- */

static char directory[] = "/tmp/mepic-serve-XXXXXX";

static const char *write_document(int number) {
    static char paths[2][64];
    char *path = paths[number];
    snprintf(path, sizeof paths[0], "%s/d%d.txt", directory, number);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int i = 0; i < 60; i++) fprintf(file, "word%d %c ", i, 'a' + number);
    fputc('\n', file);
    assert_int_equal(fclose(file), 0);
    return path;
}

static json_t *read_json(FILE *file) {
    static char text[OUTPUT_MAX];
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    json_t *root = json_loads(text, JSON_ALLOW_NUL, NULL);
    if (!root) fail_msg("not JSON: %s", text);
    return root;
}

static json_t *file_json(const char *path) {
    static char text[OUTPUT_MAX];
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    size_t n = fread(text, 1, sizeof text, file);
    fclose(file);
    const char *name = strrchr(path, '/') + 1;
    return json_pack("{s:s, s:s#}", "title", name, "text", text, (int)n);
}

static void a_reply_is_what_run_gives(void **state) {
    (void)state;
    assert_non_null(mkdtemp(directory));
    const char *documents[] = { write_document(0), write_document(1) };
    process p;
    spawn(&p, (const char *const[]){ "run", ENGINE, "-s", "Be brief.", "-d", documents[0], "-d", documents[1], "-p",
                                     "What is it?", "-n", "24", "--ignore-eos", "--json", NULL });
    json_t *want = read_json(p.out);
    assert_int_equal(end(&p), 0);

    json_t *body =
        json_pack("{s:[{s:s, s:s}, {s:s, s:s}], s:[o, o], s:i, s:i, s:b}", "messages", "role", "system", "content",
                  "Be brief.", "role", "user", "content", "What is it?", "documents", file_json(documents[0]),
                  file_json(documents[1]), "max_tokens", 24, "temperature", 0, "ignore_eos", 1);
    char *text = json_dumps(body, 0);
    json_decref(body);
    SERVE(&p, ENGINE);
    static const char *const parts[] = { "prefix_tokens", "chunk_tokens", "linked_tokens", "compiled_tokens" };
    for (int i = 0; i < 2; i++) {
        json_t *got = http_ask_json(port, "POST", "/v1/chat/completions", text, 200);
        assert_string_equal(text_at(got, "choices/0/message/content"), text_at(want, "answer"));
        assert_int_equal(number_at(got, "usage/prompt_tokens"), number_at(want, "usage/prompt_tokens"));
        const json_t *details = at(got, "usage/prompt_tokens_details");
        for (size_t k = 0; i == 0 && k < 4; k++) {
            assert_int_equal(number_at(details, parts[k]), number_at(at(want, "usage"), parts[k]));
        }
        if (i == 1) {
            assert_int_equal(number_at(details, "compiled_tokens"), 0);
            assert_true(number_at(details, "chunk_tokens") > 100);
        }
        json_decref(got);
    }
    free(text);
    json_decref(want);
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
    unlink(documents[0]);
    unlink(documents[1]);
    rmdir(directory);
}

/* ---- mepic chat -------------------------------------------------------------------------------------------------- */

/* The conversation's output; `args` behind the address. Its standard input is a file with `lines`. */
static char *chat_with(const char *lines, const char *const *args, char *errors, size_t cap) {
    static char text[OUTPUT_MAX];
    char path[] = "/tmp/mepic-lines-XXXXXX", address[64];
    int fd = mkstemp(path), kept = dup(STDIN_FILENO);
    assert_int_equal(write(fd, lines, strlen(lines)), strlen(lines));
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    assert_true(dup2(fd, STDIN_FILENO) >= 0);
    snprintf(address, sizeof address, "http://127.0.0.1:%u", port);
    const char *all[ARGS_MAX] = { "chat", address };
    for (int i = 0; args[i]; i++) all[i + 2] = args[i];
    process p;
    spawn(&p, all);
    dup2(kept, STDIN_FILENO);
    close(kept);
    close(fd);
    unlink(path);
    text[fread(text, 1, sizeof text - 1, p.out)] = 0;
    errors[fread(errors, 1, cap - 1, p.err)] = 0;
    assert_int_equal(end(&p), 0);
    return text;
}

static void chat_talks_to_a_server(void **state) {
    (void)state;
    char keys[] = "/tmp/mepic-keys-XXXXXX", errors[8192];
    int fd = mkstemp(keys);
    assert_int_equal(write(fd, "secret-of-chat me\n", 18), 18);
    close(fd);
    process p;
    SERVE(&p, ENGINE, "--api-key-file", keys);
    static const char body[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"What?\"}],\"max_tokens\":8,"
                               "\"temperature\":0}";
    http_reply reply;
    assert_int_equal(http_ask(port, "POST", "/v1/chat/completions", "x-api-key: secret-of-chat\r\n", body, &reply),
                     200);
    json_t *root = json_loads(reply.body, JSON_ALLOW_NUL, NULL);
    const char *want = text_at(root, "choices/0/message/content");
    const char *const with_key[] = { "--api-key-file", keys, "-n", "8", NULL };
    const char *said = chat_with("What?\n", with_key, errors, sizeof errors);
    if (strncmp(said, want, strlen(want)) != 0) fail_msg("'%s' instead of '%s'; %s", said, want, errors);
    assert_non_null(strstr(errors, "of them cached; reply 8 tokens"));
    json_decref(root);
    http_reply_clear(&reply);

    const char *const document[] = { "--api-key-file", keys, "-n", "2", "--reuse", "mepic", NULL };
    char lines[256];
    snprintf(lines, sizeof lines, "/add %s\none?\n/docs\n/reset\ntwo?\n/stats\n",
             "data/demo/documents/bicycle-workshop.txt");
    said = chat_with(lines, document, errors, sizeof errors);
    assert_non_null(strstr(said, "1  "));                     // /docs
    assert_non_null(strstr(said, "mepic:chunk_hits_total{")); // /stats
    const char *second = strstr(strstr(errors, "cached") + 1, "tokens, ");
    assert_true(second && strtol(second + strlen("tokens, "), NULL, 10) > 100); // the document of the first question

    const char *const none[] = { NULL };
    chat_with("What?\n", none, errors, sizeof errors);
    assert_non_null(strstr(errors, "the server says 401: no API key"));
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
    unlink(keys);
    chat_with("What?\n", none, errors, sizeof errors); // nobody is there any more
    assert_non_null(strstr(errors, "Connection refused"));
}

/* ---- The process ------------------------------------------------------------------------------------------------- */

/* The next line of standard error with this word. */
static const char *line_with(process *p, const char *word) {
    static char line[4096];
    do {
        if (!fgets(line, sizeof line, p->err)) fail_msg("no line with '%s'", word);
    } while (!strstr(line, word));
    return line;
}

static void a_client_cannot_forge_a_line_of_log(void **state) {
    (void)state;
    process p;
    SERVE(&p, ENGINE, "-v");
    static const char body[] = "{\"prompt\":\"x\",\"logit_bias\":{\"1\\nforged\\u001b\\u009b\":1}}";
    json_decref(http_ask_json(port, "POST", "/v1/completions", body, 400));
    assert_non_null(strstr(line_with(&p, "is not a token id"), "'1?forged?"
                                                               "?"
                                                               "?'"));
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
}

/* Starts the server behind a line of shell. */
static void serve_after(process *p, const char *shell) {
    const char *server_program = program;
    char line[128];
    snprintf(line, sizeof line, "%s; exec \"$0\" \"$@\"", shell);
    program = "/bin/sh";
    serve(p, (const char *const[]){ "-c", line, server_program, "serve", "--port", "0", ENGINE, NULL });
    program = server_program;
}

static void connections_have_descriptors(void **state) {
    (void)state;
    process p;
    char path[64], line[256] = "";
    serve_after(&p, "ulimit -Sn 200");
    snprintf(path, sizeof path, "/proc/%d/limits", (int)p.pid);
    FILE *limits = fopen(path, "r");
    assert_non_null(limits);
    while (!strstr(line, "Max open files")) assert_non_null(fgets(line, sizeof line, limits));
    fclose(limits);
    assert_true(strtol(line + strlen("Max open files"), NULL, 10) > 200);
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
    serve_after(&p, "ulimit -n 200");
    line_with(&p, "200 open files are allowed, so 100 connections are taken at a time; 4096 need");
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
}

/* A model that never comes: a pipe that nobody writes to. */
static void a_signal_ends_a_server_that_loads(void **state) {
    (void)state;
    process p;
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/tmp/mepic-pipe-%d", (int)getpid());
    assert_int_equal(mkfifo(path, 0600), 0);
    spawn(&p, (const char *const[]){ "serve", "-m", path, "--cache-dir", "none", NULL });
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/status", (int)p.pid);
    for (bool blocked = false; !blocked;) { // from here on the server wants to read them itself
        FILE *status = fopen(name, "r");
        assert_non_null(status);
        while (fgets(line, sizeof line, status)) {
            if (strncmp(line, "SigBlk:", 7) == 0) blocked = strtoull(line + 7, NULL, 16) >> (SIGTERM - 1) & 1;
        }
        fclose(status);
    }
    kill(p.pid, SIGTERM);
    int status;
    assert_int_equal(waitpid(p.pid, &status, 0), p.pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
    fclose(p.out);
    fclose(p.err);
    unlink(path);
}

/* ---- JSON lines ---------------------------------------------------------------------------------------------- */

/* The next line of standard error, which must be one object with a time and a level; drop it. */
static json_t *next_line(process *p) {
    char line[4096];
    if (!fgets(line, sizeof line, p->err)) fail_msg("no more lines");
    json_t *root = json_loads(line, 0, NULL);
    if (!root || strlen(text_at(root, "time")) != 24 || !text_at(root, "level")[0]) fail_msg("not a record: %s", line);
    return root;
}

/* The next line of that event and path; the words of the engine in between are only looked at. */
static json_t *next_event(process *p, const char *event, const char *path) {
    for (;;) {
        json_t *line = next_line(p);
        bool found = strcmp(text_at(line, "event"), event) == 0;
        if (!found) assert_string_equal(text_at(line, "event"), "message");
        if (found) {
            assert_string_equal(text_at(line, "path"), path);
            return line;
        }
        json_decref(line);
    }
}

static void logs_are_objects(void **state) {
    (void)state;
    process p;
    SERVE(&p, ENGINE, "--log", "json");
    static const char chat[] = "/v1/chat/completions", completions[] = "/v1/completions";
    json_decref(http_ask_json(port, "GET", "/v1/models", NULL, 200)); // debug: not a line without -v
    json_t *line, *reply;
    for (int i = 0; i < 2; i++) { // the second one finds what the first one computed
        reply = http_ask_json(port, "POST", completions,
                              "{\"prompt\":\"the same long text, which fills more than a page of the cache\","
                              "\"n\":2,\"max_tokens\":3,\"ignore_eos\":true}",
                              200);
        line = next_event(&p, "request", completions);
        assert_int_equal(number_at(line, "replies"), 2);
        assert_false(json_is_true(at(line, "stream")));
        char id[160];
        snprintf(id, sizeof id, "%s", text_at(line, "id"));
        json_int_t prompt_tokens = number_at(line, "prompt_tokens");
        json_decref(line);
        line = next_event(&p, "end", completions);
        assert_string_equal(text_at(line, "id"), id);
        assert_string_equal(text_at(line, "level"), "info");
        assert_int_equal(number_at(line, "status"), 200);
        assert_int_equal(number_at(line, "completion_tokens"), 6);
        static const char *const parts[] = { "prefix_tokens", "chunk_tokens", "linked_tokens", "compiled_tokens",
                                             "text_tokens" };
        json_int_t sum = 0;
        for (size_t k = 0; k < 5; k++) sum += number_at(line, parts[k]);
        assert_int_equal(sum, prompt_tokens);
        assert_int_equal(prompt_tokens, 2 * number_at(reply, "usage/prompt_tokens"));
        if (i == 1) assert_true(number_at(line, "prefix_tokens") > 0);
        assert_true(json_real_value(at(line, "total_ms")) >= json_real_value(at(line, "ttft_ms")));
        assert_null(at(line, "error"));
        json_decref(line);
        json_decref(reply);
    }
    json_decref(http_ask_json(port, "POST", chat, "{\"messages\":3}", 400));
    line = next_event(&p, "end", chat);
    assert_int_equal(number_at(line, "status"), 400);
    assert_non_null(strstr(text_at(line, "error"), "messages"));
    assert_null(at(line, "replies"));
    json_decref(line);
    http_client c; // and one that leaves
    open_stream(&c, completions, "{\"prompt\":\"x\",\"max_tokens\":60000,\"ignore_eos\":true,\"stream\":true}");
    assert_non_null(http_read_line(&c));
    line = next_event(&p, "request", completions);
    assert_true(json_is_true(at(line, "stream")));
    json_decref(line);
    http_close(&c);
    line = next_event(&p, "end", completions);
    assert_int_equal(number_at(line, "status"), 499);
    assert_true(number_at(line, "completion_tokens") > 0);
    json_decref(line);
    kill(p.pid, SIGTERM);
    line = next_line(&p);
    assert_non_null(strstr(text_at(line, "message"), "second signal"));
    json_decref(line);
    assert_int_equal(end(&p), 0);

    spawn(&p, (const char *const[]){ "serve", "-m", "/nonexistent", "--cache-dir", "none", "--log", "json", NULL });
    line = next_line(&p);
    assert_string_equal(text_at(line, "level"), "error");
    assert_non_null(strstr(text_at(line, "message"), "/nonexistent"));
    json_decref(line);
    assert_int_equal(end(&p), 2);
}

/* ---- Signals ----------------------------------------------------------------------------------------------------- */

static void a_signal_lets_replies_end(void **state) {
    (void)state;
    process p;
    SERVE(&p, ENGINE, "--alias", "mine");
    http_client c;
    open_stream(&c, "/v1/completions",
                "{\"model\":\"mine\",\"prompt\":\"x\",\"max_tokens\":3000,\"ignore_eos\":true,\"stream\":true}");
    assert_non_null(http_read_line(&c));
    kill(p.pid, SIGTERM);
    stream s;
    read_stream(&c, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "choices/0/finish_reason"), "length");
    json_decref(s.last);
    http_close(&c);
    assert_int_equal(end(&p), 0);
}

static void a_second_signal_does_not_wait(void **state) {
    (void)state;
    process p;
    SERVE(&p, ENGINE);
    http_client c;
    char line[512];
    open_stream(&c, "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":60000,\"ignore_eos\":true,\"stream\":true}");
    assert_non_null(http_read_line(&c));
    kill(p.pid, SIGTERM);
    do assert_non_null(fgets(line, sizeof line, p.err)); // it was taken when this is written
    while (!strstr(line, "second signal"));
    kill(p.pid, SIGTERM);
    stream s;
    read_stream(&c, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "error/code"), "shutting_down");
    json_decref(s.last);
    http_close(&c);
    assert_int_equal(end(&p), 0);
}

/* ---- systemd ----------------------------------------------------------------------------------------------------- */

/* A socket as systemd's, under this name, which the server finds in its environment; its descriptor. */
static int listen_as_systemd(const char *name) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    size_t n = strlen(name);
    memcpy(address.sun_path, name, n);
    if (name[0] == '@') address.sun_path[0] = 0;
    const struct timeval patience = { .tv_sec = 60 };
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n)), 0);
    setenv("NOTIFY_SOCKET", name, 1);
    return fd;
}

static void expect_told(int fd, const char *line) {
    char text[256];
    ssize_t n = recv(fd, text, sizeof text - 1, 0);
    if (n < 0) fail_msg("%s was not told", line);
    text[n] = 0;
    if (strncmp(text, line, strlen(line)) != 0) fail_msg("'%s' instead of %s", text, line);
}

static void systemd_hears_of_start_and_end(void **state) {
    (void)state;
    char name[64];
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "%s%d", i ? "@mepic-test-notify-" : "/tmp/mepic-notify-", (int)getpid());
        int fd = listen_as_systemd(name);
        process p;
        SERVE(&p, ENGINE);
        expect_told(fd, "READY=1\n");
        json_decref(http_ask_json(port, "GET", "/v1/models", NULL, 200)); // what is ready answers
        kill(p.pid, SIGTERM);
        expect_told(fd, "STOPPING=1\n");
        assert_int_equal(end(&p), 0);
        close(fd);
        unlink(name);
    }
    setenv("NOTIFY_SOCKET", name, 1); // nobody is there any more: it serves all the same
    process p;
    char line[512];
    SERVE(&p, ENGINE);
    assert_non_null(fgets(line, sizeof line, p.err));
    assert_non_null(strstr(line, "NOTIFY_SOCKET"));
    kill(p.pid, SIGTERM);
    assert_int_equal(end(&p), 0);
    unsetenv("NOTIFY_SOCKET");
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: test_serve_program PROGRAM [model]\n");
        return 2;
    }
    program = argv[1];
    if (argc > 2) {
        if (!real_model_find("SmolLM2-135M-Instruct.Q4_1.gguf", real, sizeof real)) return 77;
        const struct CMUnitTest only[] = { cmocka_unit_test(a_reply_is_what_run_gives) };
        return cmocka_run_group_tests(only, NULL, NULL);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_options_are_named),
        cmocka_unit_test(a_port_in_use_is_told_before_the_model_is_loaded),
        cmocka_unit_test(a_reply_is_what_run_gives),
        cmocka_unit_test(chat_talks_to_a_server),
        cmocka_unit_test(a_client_cannot_forge_a_line_of_log),
        cmocka_unit_test(connections_have_descriptors),
        cmocka_unit_test(a_signal_ends_a_server_that_loads),
        cmocka_unit_test(logs_are_objects),
        cmocka_unit_test(a_signal_lets_replies_end),
        cmocka_unit_test(a_second_signal_does_not_wait),
        cmocka_unit_test(systemd_hears_of_start_and_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
