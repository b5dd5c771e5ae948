/* `mepic serve` when the device fails in the middle of replies: each is told, and the program ends with a failure, so
 * that a supervisor starts it again.
 *
 * The linker puts this program's mepic_step in the place of the library's. As a child it is the server. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/commands.h"
#include "support/server.h"
#include "support/tiny.h"

mepic_status __real_mepic_step(mepic_engine *e, mepic_error *err);
mepic_status __wrap_mepic_step(mepic_engine *e, mepic_error *err);

static atomic_bool gone; /* by a signal from the parent */

static void lose_device(int signal) {
    (void)signal;
    atomic_store(&gone, true);
}

mepic_status __wrap_mepic_step(mepic_engine *e, mepic_error *err) {
    if (!atomic_load(&gone)) return __real_mepic_step(e, err);
    *err = (mepic_error){ .status = MEPIC_ERR_BROKEN, .message = "the device is gone" };
    return MEPIC_ERR_BROKEN;
}

typedef struct child {
    pid_t pid;
    FILE *out, *err;
} child;

static void start_child(child *c) {
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.n_ctx_train = 65536;
    const char *model = tiny_model_write(&spec);
    int out[2], err[2];
    assert_int_equal(pipe(out), 0);
    assert_int_equal(pipe(err), 0);
    c->pid = fork();
    assert_true(c->pid >= 0);
    if (c->pid == 0) {
        dup2(out[1], STDOUT_FILENO);
        dup2(err[1], STDERR_FILENO);
        execl("/proc/self/exe", "test_serve_broken", "serve", "-m", model, "--port", "0", "--cache-dir", "none",
              "--pages", "8300", "-t", "1", "--alias", "tiny", NULL);
        _exit(98);
    }
    close(out[1]);
    close(err[1]);
    c->out = fdopen(out[0], "r");
    c->err = fdopen(err[0], "r");
    char line[512] = "";
    unsigned number = 0;
    assert_non_null(fgets(line, sizeof line, c->out));
    const char *url = strstr(line, "http://127.0.0.1:");
    assert_true(url && sscanf(url, "http://127.0.0.1:%u", &number) == 1);
    port = (uint16_t)number;
}

#define LONG "\"max_tokens\":60000,\"ignore_eos\":true"

static void a_failing_device_is_told_and_ends_the_program(void **state) {
    (void)state;
    child c;
    start_child(&c);
    http_client openai, anthropic, whole;
    open_stream(&openai, "/v1/completions", "{\"prompt\":\"x\"," LONG ",\"stream\":true}");
    open_stream(&anthropic, "/v1/messages",
                "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]," LONG ",\"stream\":true}");
    http_open(&whole, port);
    http_send_request(&whole, "POST", "/v1/completions", "", "{\"prompt\":\"x\"," LONG "}");
    while (metric("vllm:num_requests_running{model_name=\"tiny\"} ") < 3.0) assert_non_null(http_read_line(&openai));
    kill(c.pid, SIGUSR1);

    stream s;
    read_stream(&openai, &s);
    assert_true(s.done);
    assert_string_equal(text_at(s.last, "error/code"), "engine_failed");
    assert_non_null(strstr(text_at(s.last, "error/message"), "the device is gone"));
    json_decref(s.last);
    http_close(&openai);

    char event[64] = "", data[512] = "";
    for (const char *line = http_read_line(&anthropic); line; line = http_read_line(&anthropic)) {
        if (strncmp(line, "event: ", 7) == 0) snprintf(event, sizeof event, "%s", line + 7);
        if (strncmp(line, "data: ", 6) == 0) snprintf(data, sizeof data, "%s", line + 6);
    }
    assert_string_equal(event, "error");
    assert_non_null(strstr(data, "the device is gone"));
    http_close(&anthropic);

    http_reply reply;
    assert_true(http_read(&whole, &reply));
    assert_int_equal(reply.status, 500);
    assert_non_null(strstr(reply.body, "the device is gone"));
    http_reply_clear(&reply);
    http_close(&whole);

    int status;
    assert_int_equal(waitpid(c.pid, &status, 0), c.pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    char said[2048];
    said[fread(said, 1, sizeof said - 1, c.err)] = 0;
    assert_non_null(strstr(said, "the engine is broken"));
    fclose(c.out);
    fclose(c.err);
}

int main(int argc, char **argv) {
    if (argc > 1) {
        signal(SIGUSR1, lose_device);
        return mp_cli_serve(argc - 1, argv + 1);
    }
    const struct CMUnitTest tests[] = { cmocka_unit_test(a_failing_device_is_told_and_ends_the_program) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
