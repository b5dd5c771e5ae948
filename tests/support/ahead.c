#include "support/ahead.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 1024, MAX_SEQS = 128 };

struct ahead_backend {
    mp_backend base;
    mp_backend_ops ops;
    mp_backend *cpu;
    mp_sampler *sampler;
    uint32_t n_vocab;
    mp_step step; /* as the CPU sees it: every token is known */
    mp_row *rows;
    int32_t sampled[MAX_SEQS];       /* by sequence; -1: nothing */
    mp_sampled drawn[2][MAX_TOKENS]; /* of the last two steps, in turn */
    uint32_t n_tokens[2];
    uint32_t n_of_kind[2][MP_ROW_KINDS];
    uint64_t number[2]; /* of the step */
    bool waited[2];
    void (*pass)(uint64_t ns);
    uint32_t host_every, n_drawn;
    ahead_failure failure;
    uint64_t fails_at;
    ahead_seen seen;
};

static ahead_backend *self(mp_backend *b) {
    return (ahead_backend *)b;
}

static bool fails(const ahead_backend *a, ahead_failure how) {
    return a->failure == how && a->seen.steps >= a->fails_at;
}

static mepic_status failure(mepic_error *err) {
    return mp_fail(err, MEPIC_ERR_BROKEN, "the device is gone");
}

static void ahead_close(mp_backend *b) {
    ahead_backend *a = self(b);
    mp_sampler_close(a->sampler);
    a->cpu->ops->close(a->cpu);
    free(a->rows);
    free(a);
}

static const char *ahead_numerics(const mp_backend *b) {
    const ahead_backend *a = (const ahead_backend *)b;
    return a->cpu->ops->numerics(a->cpu);
}

static void ahead_step_begin(mp_backend *b, const mp_step *step) {
    ahead_backend *a = self(b);
    uint32_t turn = a->seen.steps++ % 2;
    assert_true(a->seen.steps <= 2 || a->waited[turn]); /* not necessary, but then the host is never far behind */
    a->seen.ahead += a->seen.steps > 1 && !a->waited[1 - turn];
    a->waited[turn] = false;
    a->n_tokens[turn] = 0;
    a->number[turn] = a->seen.steps;
    memcpy(a->n_of_kind[turn], step->n_of_kind, sizeof step->n_of_kind);
    for (uint32_t i = 0; i < step->n_rows; i++) {
        a->rows[i] = step->rows[i];
        int32_t *token = &a->rows[i].token;
        a->seen.unknown += *token == MP_TOKEN_SAMPLED;
        if (*token == MP_TOKEN_SAMPLED) *token = a->sampled[step->rows[i].seq];
        assert_true(*token >= 0);
    }
    a->seen.rows += step->n_rows;
    a->step = *step;
    a->step.rows = a->rows;
    a->cpu->ops->step_begin(a->cpu, &a->step);
}

static mepic_status ahead_step_end(mp_backend *b, mepic_error *err) {
    ahead_backend *a = self(b);
    mepic_status st = a->cpu->ops->step_end(a->cpu, err);
    return fails(a, AHEAD_FAILS_TO_END) ? failure(err) : st;
}

static mepic_status ahead_sample(mp_backend *b, const mp_sample_row *rows, uint32_t n, mp_sampled *out,
                                 mepic_error *err) {
    ahead_backend *a = self(b);
    uint32_t turn = (a->seen.steps - 1) % 2;
    if (fails(a, AHEAD_FAILS_TO_SAMPLE)) return failure(err);
    assert_true(a->n_tokens[turn] == 0 && n <= MAX_TOKENS);
    a->n_tokens[turn] = n;
    for (uint32_t i = 0; i < n; i++) {
        const mp_sample_row *row = &rows[i];
        int32_t history[4096], *token = &a->drawn[turn][i].token;
        assert_true(row->n_tokens > 0 && row->n_tokens <= 4096 && row->seq < MAX_SEQS);
        memcpy(history, row->tokens, row->n_tokens * sizeof *history);
        for (uint32_t k = 0; k < row->n_tokens; k++) {
            if (history[k] == MP_TOKEN_SAMPLED && k + 1 == row->n_tokens) history[k] = a->sampled[row->seq];
            assert_true(history[k] >= 0);
        }
        const float *logits = a->cpu->ops->logits_row(a->cpu, row->logits);
        bool ok = mp_sample(a->sampler, row->sampling, logits, history, row->n_tokens, row->n_prompt, token);
        if (!ok) *token = -1;
        if (ok && row->logprob) {
            mp_logprobs(logits, a->n_vocab, *token, &a->drawn[turn][i].logprob, NULL, 0);
        }
        a->sampled[row->seq] = ok ? *token : 0;
        bool on_host = a->host_every && ++a->n_drawn % a->host_every == 0;
        if (on_host) a->sampled[row->seq] = -1; /* nobody may ask for it */
        out[i].token = on_host ? MP_SAMPLE_ON_HOST : MP_SAMPLE_UNDER_WAY;
    }
    return MEPIC_OK;
}

static mepic_status ahead_wait(mp_backend *b, uint32_t ago, mp_sampled *out, uint32_t n, mepic_error *err) {
    ahead_backend *a = self(b);
    assert_true(ago < 2 && ago < a->seen.steps);
    uint32_t turn = (a->seen.steps - 1 - ago) % 2;
    assert_false(a->waited[turn]);
    assert_int_equal(n, a->n_tokens[turn]);
    a->waited[turn] = true;
    for (int kind = 0; kind < MP_ROW_KINDS; kind++) {
        uint64_t rows = a->n_of_kind[turn][kind], ns = rows * a->number[turn];
        a->seen.rows_of[kind] += rows;
        a->seen.ns_of[kind] += ns;
        if (a->pass) a->pass(ns);
    }
    if (fails(a, AHEAD_FAILS_TO_WAIT)) return failure(err);
    for (uint32_t i = 0; i < n; i++) {
        if (out[i].token == MP_SAMPLE_UNDER_WAY) out[i] = a->drawn[turn][i];
    }
    return MEPIC_OK;
}

/* Only the last step's are there. */
static const float *ahead_logits_row(mp_backend *b, uint32_t i) {
    ahead_backend *a = self(b);
    assert_true(a->waited[(a->seen.steps - 1) % 2]);
    return a->cpu->ops->logits_row(a->cpu, i);
}

static void ahead_embed(mp_backend *b) {
    self(b)->cpu->ops->embed(self(b)->cpu);
}

static void ahead_norm(mp_backend *b, mp_norm which, uint32_t layer) {
    self(b)->cpu->ops->norm(self(b)->cpu, which, layer);
}

static void ahead_project(mp_backend *b, mp_proj which, uint32_t layer) {
    self(b)->cpu->ops->project(self(b)->cpu, which, layer);
}

static void ahead_store(mp_backend *b, uint32_t layer) {
    self(b)->cpu->ops->store(self(b)->cpu, layer);
}

static void ahead_attend(mp_backend *b, uint32_t layer) {
    self(b)->cpu->ops->attend(self(b)->cpu, layer);
}

static void ahead_activate(mp_backend *b) {
    self(b)->cpu->ops->activate(self(b)->cpu);
}

static void ahead_logits(mp_backend *b) {
    self(b)->cpu->ops->logits(self(b)->cpu);
}

static size_t ahead_page_bytes(const mp_backend *b) {
    const ahead_backend *a = (const ahead_backend *)b;
    return a->cpu->ops->page_bytes(a->cpu);
}

static bool ahead_page_read(mp_backend *b, mp_page page, void *dst) {
    return self(b)->cpu->ops->page_read(self(b)->cpu, page, dst);
}

static bool ahead_page_write(mp_backend *b, mp_page page, const void *src) {
    return self(b)->cpu->ops->page_write(self(b)->cpu, page, src);
}

ahead_backend *ahead_put(mepic_engine *engine) {
    ahead_backend *a = calloc(1, sizeof *a);
    assert_non_null(a);
    a->cpu = engine->backend;
    a->ops = *engine->backend->ops;
    a->ops.ahead = true;
    a->ops.close = ahead_close;
    a->ops.numerics = ahead_numerics;
    a->ops.step_begin = ahead_step_begin;
    a->ops.step_end = ahead_step_end;
    a->ops.embed = ahead_embed;
    a->ops.norm = ahead_norm;
    a->ops.project = ahead_project;
    a->ops.store = ahead_store;
    a->ops.attend = ahead_attend;
    a->ops.activate = ahead_activate;
    a->ops.logits = ahead_logits;
    a->ops.sample = ahead_sample;
    a->ops.wait = ahead_wait;
    a->ops.logits_row = ahead_logits_row;
    a->ops.page_bytes = ahead_page_bytes;
    a->ops.page_read = ahead_page_read;
    a->ops.page_write = ahead_page_write;
    a->rows = calloc(engine->options.step_tokens, sizeof *a->rows);
    assert_non_null(a->rows);
    a->n_vocab = engine->model->hp.n_vocab;
    assert_int_equal(mp_sampler_open(a->n_vocab, &a->sampler, NULL), MEPIC_OK);
    assert_true(engine->options.max_running + MP_MAX_JOBS <= MAX_SEQS);
    for (uint32_t i = 0; i < MAX_SEQS; i++) a->sampled[i] = -1;
    a->base.ops = &a->ops;
    engine->backend = &a->base;
    engine->ops = &a->ops;
    return a;
}

void ahead_fail(ahead_backend *a, ahead_failure how, uint64_t n) {
    a->failure = how;
    a->fails_at = n;
}

void ahead_take_time(ahead_backend *a, void (*pass)(uint64_t ns)) {
    a->pass = pass;
}

void ahead_leave_to_host(ahead_backend *a, uint32_t n) {
    a->host_every = n;
}

const ahead_seen *ahead_look(const ahead_backend *a) {
    return &a->seen;
}
