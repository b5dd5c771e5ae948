/* engine/ on a backend that runs ahead: the next step is begun before the tokens of the last one are known. Answers,
 * caches and counts are those of an engine that waits; what a reply no longer wants is dropped. The backend is that of
 * support/ahead.h, with the argument "cuda" the first CUDA device. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "support/ahead.h"
#include "support/random.h"
#include "support/replies.h"
#include "support/tiny.h"

enum { N_REQUESTS = 60, N_PROMPTS = 5 };

static const char *cuda_model; /* with the argument: of heads that CUDA can compute */

static mepic_engine_options ahead_options(void) {
    mepic_engine_options options = tiny_options();
    options.hash_logits = false; /* which needs every row's logits on the host */
    if (cuda_model) {
        options.device = "cuda";
        options.model_path = cuda_model;
    }
    return options;
}

/* An engine that runs ahead, or one that waits. *a: NULL, or for the backend; NULL on CUDA and where it waits. */
static mepic_engine *open_ahead(const mepic_engine_options *options, bool ahead, ahead_backend **a) {
    static mp_backend_ops waits;
    mepic_engine *engine = open_engine(options);
    ahead_backend *put = ahead && !cuda_model ? ahead_put(engine) : NULL;
    if (!ahead) {
        waits = *engine->backend->ops;
        waits.ahead = false;
        engine->backend->ops = &waits;
    }
    if (a) *a = put;
    return engine;
}

/* ---- The same answers -------------------------------------------------------------------------------------------- */

/* A request of the crowd, and when it is cancelled: after so many of its tokens were seen; 0: never. */
typedef struct wish {
    mepic_request request;
    struct mepic_logit_bias bias[2];
    const char *stop[1];
    int32_t stop_token;
    uint32_t cancel_after;
} wish;

static void see(void *user, uint32_t position, const float *logits, uint32_t n_vocab) {
    (void)user; /* `submit` of support/replies.h has it */
    (void)position;
    float sum = 0;
    for (uint32_t i = 0; i < n_vocab; i++) sum += logits[i];
    assert_true(sum == sum);
}

static void make_wish(wish *w, rng *dice, mepic_prepared *const *prompts) {
    static const char *const stops[] = { "e", "qu", "a ", "\n" };
    memset(w, 0, sizeof *w);
    w->stop[0] = stops[rng_below(dice, 4)];
    w->stop_token = (int32_t)rng_below(dice, 290);
    w->bias[0] = (struct mepic_logit_bias){ (int32_t)rng_below(dice, 290), 2 };
    w->bias[1] = (struct mepic_logit_bias){ w->stop_token, 3 };
    mepic_request *r = &w->request;
    r->prompt = prompts[rng_below(dice, N_PROMPTS)];
    r->max_tokens = 1 + rng_below(dice, 60);
    r->ignore_eos = rng_below(dice, 3) > 0;
    r->reuse = (mepic_reuse)rng_below(dice, 4);
    if (rng_below(dice, 3) == 0) {
        r->stop = w->stop;
        r->n_stop = 1;
    }
    if (rng_below(dice, 3) == 0) {
        r->stop_tokens = &w->stop_token;
        r->n_stop_tokens = 1;
    }
    r->logprobs = rng_below(dice, 6) == 0;
    if (rng_below(dice, 24) == 0) r->top_logprobs = 3;
    if (rng_below(dice, 16) == 0) r->on_logits = see;
    r->logits_of_prompt = rng_below(dice, 2);
    r->sampling = (mepic_sampling){ .temperature = rng_below(dice, 3) ? 1.2f : 0,
                                    .top_k = rng_below(dice, 2) ? 40 : 0,
                                    .top_p = rng_below(dice, 2) ? 0.9f : 0,
                                    .repeat_penalty = rng_below(dice, 2) ? 1.3f : 0,
                                    .repeat_window = rng_below(dice, 8),
                                    .presence_penalty = rng_below(dice, 2) ? 0.5f : 0,
                                    .frequency_penalty = rng_below(dice, 2) ? 0.3f : 0,
                                    .seed = rng_next(dice),
                                    .logit_bias = w->bias,
                                    .n_logit_bias = 2 };
    w->cancel_after = rng_below(dice, 10) == 0 ? 1 + rng_below(dice, 10) : 0;
}

/* The crowd comes a few at a time. */
static void answer_all(mepic_engine *engine, const wish *wishes, result *r, bool cancel) {
    uint32_t n = 0;
    while (n < N_REQUESTS || mepic_busy(engine)) {
        for (uint32_t i = 0; i < 2 && n < N_REQUESTS; i++, n++) submit(engine, &wishes[n].request, &r[n]);
        for (uint32_t i = 0; i < 3 && mepic_busy(engine); i++) step(engine);
        mepic_stats stats;
        mepic_stats_read(engine, &stats);
        for (; stats.queued > 8 && mepic_busy(engine); mepic_stats_read(engine, &stats)) step(engine);
        for (uint32_t i = 0; i < n; i++) {
            bool now = cancel && wishes[i].cancel_after && r[i].n_tokens >= wishes[i].cancel_after;
            if (now && !r[i].done) mepic_cancel(engine, r[i].id);
        }
        mepic_error err;
        if (!mp_scheduler_check(engine->scheduler, &err)) fail_msg("%s", err.message);
    }
    mepic_stats stats;
    mepic_stats_read(engine, &stats);
    assert_int_equal(stats.pages_referenced + stats.running + stats.queued, 0);
    mepic_cache_clear(engine);
    mepic_stats_read(engine, &stats);
    assert_int_equal(stats.pages_free + stats.pages_canonical, stats.pages_total);
}

static void open_prompts(mepic_engine *engine, mepic_prepared **prompts) {
    prompts[0] = prepare_text(engine, question);
    prompts[1] = prepare_text(engine, "a");
    prompts[2] = prepare_document(engine, "Read: ");
    prompts[3] = prepare_document(engine, "");
    prompts[4] = prepare_text(engine, "Once upon a time there was a prompt that took a page and a half for itself.");
}

static void check_answer(const wish *w, const result *want, const result *got, const char *what) {
    assert_true(want->done && got->done);
    bool cancelled = got->finish == MEPIC_FINISH_CANCELLED;
    if (cancelled) assert_true(w->cancel_after > 0 && got->n_tokens <= want->n_tokens);
    if (!cancelled && got->n_tokens != want->n_tokens)
        fail_msg("%s: %u tokens, not %u", what, got->n_tokens, want->n_tokens);
    assert_memory_equal(got->tokens, want->tokens, got->n_tokens * sizeof *got->tokens);
    assert_int_equal(got->usage.completion_tokens, got->n_tokens);
    if (cancelled) return;
    assert_int_equal(got->finish, want->finish);
    assert_int_equal(got->stop, want->stop);
    assert_int_equal(want->logprobs < 0, w->request.logprobs || w->request.top_logprobs);
    if (fabs(got->logprobs - want->logprobs) > 1e-4 * want->n_tokens) {
        fail_msg("%s: log-probabilities %g, not %g", what, got->logprobs, want->logprobs);
    }
    assert_int_equal(got->text_len, want->text_len);
    assert_memory_equal(got->text, want->text, want->text_len);
    if (got->usage.preemptions == 0) assert_true(got->usage.pages_held <= want->usage.pages_unshared + 2);
}

static void answers_do_not_change(void **state) {
    (void)state;
    static wish wishes[N_REQUESTS];
    static result want[N_REQUESTS], got[N_REQUESTS];
    uint64_t preemptions = 0, unknown = 0, dropped = 0;
    for (uint64_t seed = 1; seed <= (cuda_model ? 2 : 12); seed++) {
        mepic_engine_options options = ahead_options();
        options.pages = seed % 3 == 0 ? 256 : 72; /* most of these are too few for all */
        options.step_tokens = seed % 4 == 0 ? 5 : 64;
        options.page_size = seed % 5 == 0 ? 32 : 16;
        if (options.page_size == 32) options.pages /= 2;
        if (seed % 2) options.canonical_context = NULL;
        options.pages += seed % 2 ? 1200 / options.page_size + 1 : 0;
        for (int round = 0; round < (cuda_model ? 2 : 3); round++) {
            ahead_backend *a;
            mepic_engine *engine = open_ahead(&options, round > 0, &a);
            if (a) ahead_leave_to_host(a, round == 2 ? 7 : 0);
            mepic_prepared *prompts[N_PROMPTS];
            open_prompts(engine, prompts);
            rng dice = rng_open(seed);
            for (uint32_t i = 0; i < N_REQUESTS; i++) make_wish(&wishes[i], &dice, prompts);
            answer_all(engine, wishes, round ? got : want, round > 0);
            char what[64];
            for (uint32_t i = 0; round && i < N_REQUESTS; i++) {
                snprintf(what, sizeof what, "seed %d, round %d, request %u", (int)seed, round, i);
                check_answer(&wishes[i], &want[i], &got[i], what);
            }
            if (a) {
                mepic_stats stats;
                mepic_stats_read(engine, &stats);
                preemptions += stats.preemptions;
                unknown += ahead_look(a)->unknown;
                dropped +=
                    ahead_look(a)->rows - stats.rows_decode - stats.rows_text - stats.rows_link - stats.rows_compile;
            }
            for (uint32_t i = 0; i < N_PROMPTS; i++) mepic_prepared_free(prompts[i]);
            mepic_engine_close(engine);
        }
    }
    printf("%d preemptions, %d rows ahead of their tokens, %d of them for nothing\n", (int)preemptions, (int)unknown,
           (int)dropped);
    assert_true(cuda_model || (preemptions > 0 && unknown > 1000 && dropped > 50));
}

/* ---- Running ahead ----------------------------------------------------------------------------------------------- */

/* Where nobody looks, every step but the first begins before the one before was waited for. */
static void steps_overlap(void **state) {
    (void)state;
    const mepic_engine_options options = ahead_options();
    mepic_engine *engine = open_engine(&options);
    ahead_backend *a = ahead_put(engine);
    mepic_prepared *prompt = prepare_text(engine, question);
    const ahead_seen *seen = ahead_look(a);
    result r;
    run(engine, &(mepic_request){ .prompt = prompt, .max_tokens = 30, .ignore_eos = true }, &r);
    assert_int_equal(r.n_tokens, 30);
    assert_int_equal(seen->steps, 30); /* a reply's length is known beforehand: nothing is computed for nobody */
    assert_int_equal(seen->ahead, 29);
    assert_int_equal(seen->unknown, 29);
    ahead_seen before = *seen;
    run(engine, &(mepic_request){ .prompt = prompt, .max_tokens = 30, .ignore_eos = true, .logprobs = true }, &r);
    assert_int_equal(seen->steps - before.steps, 30);
    assert_int_equal(seen->ahead - before.ahead, 29);
    before = *seen;
    run(engine, &(mepic_request){ .prompt = prompt, .max_tokens = 30, .ignore_eos = true, .top_logprobs = 1 }, &r);
    assert_int_equal(seen->steps - before.steps, 30);
    assert_int_equal(seen->ahead, before.ahead);
    mepic_prepared_free(prompt);
    mepic_engine_close(engine);
}

static uint64_t fake_now; /* 0: the clock is the machine's */
uint64_t __real_mp_now_ns(void);
uint64_t __wrap_mp_now_ns(void);
uint64_t __wrap_mp_now_ns(void) {
    return fake_now ? fake_now : __real_mp_now_ns();
}
static void pass(uint64_t ns) {
    fake_now += ns;
}

/* Also where the next one has rows of other kinds, and is begun before anybody waits for this one. */
static void the_time_of_a_step_is_that_of_its_own_rows(void **state) {
    (void)state;
    mepic_engine_options options = ahead_options();
    options.step_tokens = 24;
    mepic_engine *engine = open_engine(&options);
    ahead_backend *a = ahead_put(engine);
    fake_now = 1;
    ahead_take_time(a, pass);
    mepic_prepared *prompts[2] = { prepare_document(engine, "Read: "), prepare_text(engine, question) };
    result r[6];
    for (int i = 0; i < 6; i++) {
        submit(engine, &(mepic_request){ .prompt = prompts[i % 2], .max_tokens = 9 * (uint32_t)i + 1 }, &r[i]);
    }
    drain(engine);
    const ahead_seen *seen = ahead_look(a);
    assert_true(seen->ahead > 20);
    mepic_stats s;
    mepic_stats_read(engine, &s);
    const uint64_t ns[] = { s.decode_ns, s.text_ns, s.link_ns, s.compile_ns };
    const uint64_t rows[] = { s.rows_decode, s.rows_text, s.rows_link, s.rows_compile };
    for (int kind = 0; kind < MP_ROW_KINDS; kind++) {
        assert_true(ns[kind] > 0);
        assert_int_equal(ns[kind], seen->ns_of[kind]);
        if (kind != MP_ROW_DECODE) assert_int_equal(rows[kind], seen->rows_of[kind]); /* some of which are wasted */
    }
    assert_int_equal(ns[0] + ns[1] + ns[2] + ns[3], s.forward_ns);
    fake_now = 0;
    for (int i = 0; i < 2; i++) mepic_prepared_free(prompts[i]);
    mepic_engine_close(engine);
}

/* A reply of n tokens and the conversation's next turn. */
static void two_turns(mepic_engine *engine, uint32_t n, bool surprise, result r[2]) {
    mepic_prepared *prompt = prepare_text(engine, question), *second;
    mepic_request request = { .prompt = prompt, .max_tokens = 41, .ignore_eos = true };
    request.sampling = (mepic_sampling){ .temperature = 1, .seed = n, .repeat_penalty = 1.5f };
    run(engine, &request, &r[0]); /* to know what it says */
    mepic_cache_clear(engine);
    int32_t stop = r[0].tokens[n];
    if (surprise) {
        request.stop_tokens = &stop;
        request.n_stop_tokens = 1;
    } else {
        request.max_tokens = n;
    }
    run(engine, &request, &r[0]);
    size_t n_prompt;
    const int32_t *tokens = mepic_prepared_tokens(prompt, &n_prompt);
    const mepic_segment turn[] = { { .tokens = tokens, .n_tokens = n_prompt },
                                   { .tokens = r[0].tokens, .n_tokens = r[0].n_tokens },
                                   text_of(" And then?") };
    const mepic_prompt next = { .size = sizeof next, .segments = turn, .n_segments = 3, .no_bos = true };
    assert_int_equal(mepic_prepare(engine, &next, &second, NULL), MEPIC_OK);
    run(engine, &(mepic_request){ .prompt = second, .max_tokens = 3, .ignore_eos = true }, &r[1]);
    mepic_prepared_free(prompt);
    mepic_prepared_free(second);
}

static void compare_turns(mepic_engine *const *engines, uint32_t n, bool surprise) {
    static result r[2][2];
    mepic_stats stats[2];
    for (int i = 0; i < 2; i++) {
        mepic_cache_clear(engines[i]);
        two_turns(engines[i], n, surprise, r[i]);
        mepic_stats_read(engines[i], &stats[i]);
    }
    for (int k = 0; k < 2; k++) {
        assert_int_equal(r[0][k].n_tokens, r[1][k].n_tokens);
        assert_memory_equal(r[0][k].tokens, r[1][k].tokens, r[0][k].n_tokens * sizeof(int32_t));
        assert_int_equal(r[0][k].usage.prefix_tokens, r[1][k].usage.prefix_tokens);
        assert_int_equal(r[0][k].usage.pages_held, r[1][k].usage.pages_held);
        assert_int_equal(r[0][k].usage.pages_unshared, r[1][k].usage.pages_unshared);
    }
    assert_int_equal(stats[0].rows_decode, stats[1].rows_decode);
    assert_int_equal(stats[0].rows_text, stats[1].rows_text);
    assert_int_equal(stats[0].pages_evictable, stats[1].pages_evictable);
}

/* Replies of every length around the ends of pages: the next turn of the conversation finds as much of them, and the
 * counts are the same, whether the reply ended by its length or by a token that came as a surprise. */
static void caches_and_counts_do_not_change(void **state) {
    (void)state;
    const mepic_engine_options options = ahead_options();
    mepic_engine *engines[2] = { open_ahead(&options, false, NULL), open_ahead(&options, true, NULL) };
    for (uint32_t n = 1; n < 40; n++) {
        compare_turns(engines, n, false);
        compare_turns(engines, n, true);
    }
    for (int i = 0; i < 2; i++) mepic_engine_close(engines[i]);
}

static void a_step_allocates_nothing(void **state) {
    (void)state;
    mepic_engine_options options = ahead_options();
    options.pages = 72;
    mepic_engine *engine = open_ahead(&options, true, NULL);
    mepic_prepared *prompts[2] = { prepare_document(engine, "Read: "), prepare_text(engine, question) };
    for (int round = 0; round < 2; round++) {
        result r[12];
        for (int i = 0; i < 12; i++) {
            mepic_request request = { .prompt = prompts[i % 2], .max_tokens = 100, .ignore_eos = true };
            request.logprobs = i == 11;
            submit(engine, &request, &r[i]);
        }
        while (mepic_busy(engine)) {
            uint64_t before = mp_mem_count();
            step(engine);
            assert_int_equal(mp_mem_count(), before);
        }
    }
    for (int i = 0; i < 2; i++) mepic_prepared_free(prompts[i]);
    mepic_engine_close(engine);
}

/* ---- Ends -------------------------------------------------------------------------------------------------------- */

/* Cancelled after every number of steps, with a step under way that computes rows for it; its slot, sequence and pages
 * go to the next one at once. */
static void a_request_is_cancelled_under_way(void **state) {
    (void)state;
    mepic_engine_options options = ahead_options();
    options.max_running = 1;
    options.max_queued = 2;
    options.step_tokens = 8;
    mepic_engine *engine = open_ahead(&options, true, NULL);
    mepic_prepared *prompts[2] = { prepare_text(engine, question), prepare_document(engine, "Read: ") };
    result want, r, next;
    run(engine, &(mepic_request){ .prompt = prompts[0], .max_tokens = 9, .ignore_eos = true }, &want);
    for (int steps = 0; steps < 90; steps++) {
        mepic_cache_clear(engine);
        submit(engine, &(mepic_request){ .prompt = prompts[steps % 2], .max_tokens = 300, .ignore_eos = true }, &r);
        for (int i = 0; i < steps; i++) step(engine);
        mepic_cancel(engine, r.id);
        submit(engine, &(mepic_request){ .prompt = prompts[0], .max_tokens = 9, .ignore_eos = true }, &next);
        step(engine);
        assert_true(r.done);
        assert_int_equal(r.finish, MEPIC_FINISH_CANCELLED);
        uint32_t n = r.n_tokens;
        drain(engine);
        assert_int_equal(r.n_tokens, n);
        assert_true(next.done && next.n_tokens == want.n_tokens);
        assert_memory_equal(next.tokens, want.tokens, 9 * sizeof *want.tokens);
    }
    mepic_cancel(engine, r.id);
    mepic_cache_clear(engine);
    mepic_stats stats;
    mepic_stats_read(engine, &stats);
    assert_int_equal(stats.pages_free, stats.pages_total);
    for (int i = 0; i < 2; i++) mepic_prepared_free(prompts[i]);
    mepic_engine_close(engine);
}

/* The last reply's end is told at once, although a step that nobody needs is under way; what comes then is not hurt. */
static void the_end_does_not_wait_for_a_step_of_nobody(void **state) {
    (void)state;
    const mepic_engine_options options = ahead_options();
    mepic_engine *engine = open_engine(&options);
    const ahead_seen *seen = ahead_look(ahead_put(engine));
    mepic_prepared *prompt = prepare_text(engine, question);
    result whole, r;
    run(engine, &(mepic_request){ .prompt = prompt, .max_tokens = 20, .ignore_eos = true }, &whole);
    for (uint32_t n = 1; n < 19; n++) {
        uint32_t first = 0;
        while (whole.tokens[first] != whole.tokens[n]) first++;
        ahead_seen before = *seen;
        run(engine,
            &(mepic_request){
                .prompt = prompt, .stop_tokens = &whole.tokens[n], .n_stop_tokens = 1, .ignore_eos = true },
            &r);
        assert_int_equal(r.finish, MEPIC_FINISH_STOP);
        assert_int_equal(r.n_tokens, first + 1);
        assert_memory_equal(r.tokens, whole.tokens, r.n_tokens * sizeof *r.tokens);
        assert_int_equal(seen->steps - before.steps, first + 2);
        assert_false(mepic_busy(engine));
    }
    mepic_prepared_free(prompt);
    mepic_engine_close(engine); /* with a step under way */
}

static void an_engine_closes_in_the_middle(void **state) {
    (void)state;
    mepic_engine_options options = ahead_options();
    options.step_tokens = 8;
    for (int steps = 0; steps < (cuda_model ? 2 : 12); steps++) {
        mepic_engine *engine = open_ahead(&options, true, NULL);
        mepic_prepared *prompt = prepare_document(engine, "Read: ");
        result r[3];
        for (int i = 0; i < 3; i++) {
            submit(engine, &(mepic_request){ .prompt = prompt, .max_tokens = 300, .ignore_eos = true }, &r[i]);
        }
        for (int i = 0; i < 7 * steps; i++) step(engine);
        mepic_prepared_free(prompt);
        mepic_engine_close(engine);
    }
}

/* Wherever a device fails, the engine says so from then on, and closes. */
static void a_device_that_fails_breaks_the_engine(void **state) {
    (void)state;
    static const ahead_failure kinds[] = { AHEAD_FAILS_TO_END, AHEAD_FAILS_TO_SAMPLE, AHEAD_FAILS_TO_WAIT };
    const mepic_engine_options options = ahead_options();
    for (int kind = 0; kind < 3; kind++) {
        for (uint64_t n = 1; n < 6; n++) {
            mepic_engine *engine = open_engine(&options);
            ahead_fail(ahead_put(engine), kinds[kind], n);
            mepic_prepared *prompt = prepare_text(engine, question);
            mepic_request request = { .size = sizeof request, .prompt = prompt, .max_tokens = 50, .ignore_eos = true };
            mepic_request_id id;
            mepic_error err = { 0 };
            mepic_event event;
            for (int i = 0; i < 3; i++) assert_int_equal(mepic_submit(engine, &request, &id, NULL), MEPIC_OK);
            uint64_t n_steps = 0;
            while (mepic_step(engine, &err) == MEPIC_OK) {
                assert_true(n_steps++ <= n); /* one step later than on the CPU */
                while (mepic_poll(engine, &event)) continue;
            }
            expect(err.status, MEPIC_ERR_BROKEN, &err, "the device is gone");
            while (mepic_poll(engine, &event)) continue;
            expect(mepic_step(engine, &err), MEPIC_ERR_BROKEN, &err, "the device is gone");
            expect(mepic_submit(engine, &request, &id, &err), MEPIC_ERR_BROKEN, &err, "the device is gone");
            assert_false(mepic_busy(engine));
            mepic_prepared_free(prompt);
            mepic_engine_close(engine);
        }
    }
}

int main(int argc, char **argv) {
    bool on_cuda = argc > 1 && !strcmp(argv[1], "cuda");
    const mp_backend_ops *ops;
    uint32_t device;
    if (on_cuda && (mp_backend_find("cuda", &ops, &device, NULL) != MEPIC_OK || ops->n_devices() == 0)) return 77;
    mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
    spec.hp.head_dim = spec.hp.rope.n_rot = 64;
    if (on_cuda) cuda_model = tiny_model_write(&spec);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_do_not_change),
        cmocka_unit_test(caches_and_counts_do_not_change),
        cmocka_unit_test(a_step_allocates_nothing),
        cmocka_unit_test(a_request_is_cancelled_under_way),
        cmocka_unit_test(an_engine_closes_in_the_middle),
        /* Of support/ahead.h. */
        cmocka_unit_test(steps_overlap),
        cmocka_unit_test(the_time_of_a_step_is_that_of_its_own_rows),
        cmocka_unit_test(the_end_does_not_wait_for_a_step_of_nobody),
        cmocka_unit_test(a_device_that_fails_breaks_the_engine),
    };
    size_t n = sizeof tests / sizeof *tests - (on_cuda ? 4 : 0);
    return _cmocka_run_group_tests("ahead", tests, n, NULL, NULL);
}
