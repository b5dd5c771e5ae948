#include "serve/metrics.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- Histograms -------------------------------------------------------------------------------------------------- */

/* Ends with 0. */
static const double seconds[] = { .001, .005, .01, .02, .04, .06, .08, .1,  .25, .5,   .75, 1,
                                  2.5,  5,    7.5, 10,  20,  40,  80,  160, 640, 2560, 0 };
static const double tokens[] = { 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 0 };

static const struct {
    const char *name, *help;
    const double *bounds;
} histograms[MP_N_HISTOGRAMS] = {
    [MP_HISTOGRAM_TTFT] = { "vllm:time_to_first_token_seconds", "From submission to the first token.", seconds },
    [MP_HISTOGRAM_TOTAL] = { "vllm:e2e_request_latency_seconds", "From submission to the last token.", seconds },
    [MP_HISTOGRAM_QUEUE] = { "vllm:request_queue_time_seconds", "From submission to the first computed row.", seconds },
    [MP_HISTOGRAM_PREFILL] = { "vllm:request_prefill_time_seconds", "From the first row to the first token.", seconds },
    [MP_HISTOGRAM_DECODE] = { "vllm:request_decode_time_seconds", "From the first token to the last.", seconds },
    [MP_HISTOGRAM_PER_TOKEN] = { "vllm:request_time_per_output_token_seconds",
                                 "Decoding, by each token after the first; a request's mean.", seconds },
    [MP_HISTOGRAM_BETWEEN] = { "vllm:inter_token_latency_seconds", "From one token of a reply to the next.", seconds },
    [MP_HISTOGRAM_PROMPT] = { "vllm:request_prompt_tokens", "Tokens of a prompt.", tokens },
    [MP_HISTOGRAM_GENERATION] = { "vllm:request_generation_tokens", "Tokens of a reply.", tokens },
};

static void observe(mp_metrics *m, mp_histogram_name name, double value) {
    const double *bounds = histograms[name].bounds;
    uint32_t i = 0;
    while (bounds[i] != 0.0 && value > bounds[i]) i++;
    m->histograms[name].counts[i]++;
    m->histograms[name].sum += value;
}

void mp_metrics_count_token(mp_metrics *m, uint64_t ns) {
    observe(m, MP_HISTOGRAM_BETWEEN, (double)ns * 1e-9);
}

void mp_metrics_count_reply(mp_metrics *m, mepic_finish finish, const mepic_usage *u) {
    m->finished[finish]++;
    m->prompt_tokens += u->prompt_tokens;
    m->prefix_tokens += u->prefix_tokens;
    m->chunk_tokens += u->chunk_tokens;
    m->linked_tokens += u->linked_tokens;
    m->compiled_tokens += u->compiled_tokens;
    m->computed_tokens += u->computed_tokens;
    m->completion_tokens += u->completion_tokens;
    if (finish > MEPIC_FINISH_LENGTH) return; // how long it took says when somebody left, or something failed
    observe(m, MP_HISTOGRAM_TTFT, (double)u->ttft_ns * 1e-9);
    observe(m, MP_HISTOGRAM_TOTAL, (double)u->total_ns * 1e-9);
    observe(m, MP_HISTOGRAM_QUEUE, (double)u->queue_ns * 1e-9);
    observe(m, MP_HISTOGRAM_PREFILL, (double)(u->ttft_ns - u->queue_ns) * 1e-9);
    observe(m, MP_HISTOGRAM_DECODE, (double)(u->total_ns - u->ttft_ns) * 1e-9);
    if (u->completion_tokens > 1) {
        observe(m, MP_HISTOGRAM_PER_TOKEN,
                (double)(u->total_ns - u->ttft_ns) * 1e-9 / (double)(u->completion_tokens - 1));
    }
    observe(m, MP_HISTOGRAM_PROMPT, (double)u->prompt_tokens);
    observe(m, MP_HISTOGRAM_GENERATION, (double)u->completion_tokens);
}

/* ---- Text -------------------------------------------------------------------------------------------------------- */

typedef struct page {
    mp_buf *out;
    char model[128]; /* escaped */
    bool ok;
} page;

static void line(page *p, const char *format, ...) MP_PRINTF(2, 3);
static void line(page *p, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    p->ok = p->ok && n >= 0 && (size_t)n < sizeof text && mp_buf_append(p->out, text, (size_t)n);
}

static void head(page *p, const char *name, const char *type, const char *help) {
    line(p, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void gauge(page *p, const char *name, double value, const char *help) {
    head(p, name, "gauge", help);
    line(p, "%s{model_name=\"%s\"} %.10g\n", name, p->model, value);
}

static void counter(page *p, const char *name, uint64_t value, const char *help) {
    head(p, name, "counter", help);
    line(p, "%s{model_name=\"%s\"} %llu\n", name, p->model, (unsigned long long)value);
}

static void duration(page *p, const char *name, uint64_t ns, const char *help) {
    head(p, name, "counter", help);
    line(p, "%s{model_name=\"%s\"} %.17g\n", name, p->model, (double)ns * 1e-9);
}

/* One value of a metric with a label. */
static void labelled(page *p, const char *name, const char *label, const char *word, double value) {
    line(p, "%s{model_name=\"%s\",%s=\"%s\"} %.17g\n", name, p->model, label, word, value);
}

static void write_histogram(page *p, const mp_metrics *m, mp_histogram_name h, const char *name, const char *help) {
    const double *bounds = histograms[h].bounds;
    uint64_t count = 0;
    head(p, name, "histogram", help);
    for (uint32_t i = 0;; i++) {
        char bound[24] = "+Inf";
        if (bounds[i] != 0.0) snprintf(bound, sizeof bound, "%g", bounds[i]);
        count += m->histograms[h].counts[i];
        line(p, "%s_bucket{model_name=\"%s\",le=\"%s\"} %llu\n", name, p->model, bound, (unsigned long long)count);
        if (bounds[i] == 0.0) break;
    }
    line(p, "%s_sum{model_name=\"%s\"} %.10g\n", name, p->model, m->histograms[h].sum);
    line(p, "%s_count{model_name=\"%s\"} %llu\n", name, p->model, (unsigned long long)count);
}

static void write_vllm(page *p, const mp_metrics *m, const mepic_model_info *info) {
    const mepic_stats *e = &m->engine;
    uint32_t used = e->pages_total - e->pages_free - e->pages_evictable;
    gauge(p, "vllm:num_requests_running", e->running, "Requests that are computed.");
    gauge(p, "vllm:num_requests_waiting", m->choices > e->running ? m->choices - e->running : 0, "Requests that wait.");
    double usage = e->pages_total ? (double)used / e->pages_total : 0.0;
    gauge(p, "vllm:kv_cache_usage_perc", usage, "Pages in use, as a share of all: 0 to 1.");
    gauge(p, "vllm:gpu_cache_usage_perc", usage, "The same, by its older name.");
    counter(p, "vllm:prefix_cache_queries_total", m->prompt_tokens, "Prompt tokens looked up.");
    counter(p, "vllm:prefix_cache_hits_total", m->prefix_tokens + m->chunk_tokens, "Prompt tokens that were there.");
    counter(p, "vllm:prompt_tokens_total", m->prompt_tokens, "Prompt tokens of ended requests.");
    counter(p, "vllm:prompt_tokens_cached_total", m->prefix_tokens + m->chunk_tokens, "Of these, not computed.");
    counter(p, "vllm:generation_tokens_total", m->completion_tokens, "Tokens of replies.");
    counter(p, "vllm:num_preemptions_total", e->preemptions, "Requests that gave their pages back and started again.");
    head(p, "vllm:prompt_tokens_by_source_total", "counter", "Prompt tokens, by where they came from.");
    labelled(p, "vllm:prompt_tokens_by_source_total", "source", "local_cache_hit",
             (double)(m->prefix_tokens + m->chunk_tokens));
    labelled(p, "vllm:prompt_tokens_by_source_total", "source", "local_compute",
             (double)(m->linked_tokens + m->compiled_tokens + m->computed_tokens));
    static const char *const finishes[MP_FINISHES] = { "stop", "length", "abort", "error" };
    head(p, "vllm:request_success_total", "counter", "Ended requests, by what ended them.");
    for (uint32_t i = 0; i < MP_FINISHES; i++) {
        labelled(p, "vllm:request_success_total", "finished_reason", finishes[i], (double)m->finished[i]);
    }
    head(p, "vllm:cache_config_info", "gauge", "The pool.");
    line(p, "vllm:cache_config_info{model_name=\"%s\",block_size=\"%u\",num_gpu_blocks=\"%u\"} 1\n", p->model,
         info->page_size, info->pages);
    for (uint32_t h = 0; h < MP_N_HISTOGRAMS; h++) {
        write_histogram(p, m, (mp_histogram_name)h, histograms[h].name, histograms[h].help);
    }
    write_histogram(p, m, MP_HISTOGRAM_BETWEEN, "vllm:time_per_output_token_seconds",
                    "vllm:inter_token_latency_seconds by its older name.");
}

static void write_kinds(page *p, const char *name, const char *type, const char *help, const char *const *words,
                        const uint64_t *values, size_t n) {
    head(p, name, type, help);
    for (size_t i = 0; i < n; i++) labelled(p, name, "kind", words[i], (double)values[i]);
}

static void write_mepic(page *p, const mp_metrics *m, const mepic_model_info *info) {
    const mepic_stats *e = &m->engine;
    static const char *const page_words[] = { "free", "private", "prefix", "chunk", "evictable", "canonical" };
    const uint64_t pages[] = { e->pages_free,      e->pages_referenced - e->pages_prefix - e->pages_chunk,
                               e->pages_prefix,    e->pages_chunk,
                               e->pages_evictable, e->pages_canonical };
    write_kinds(p, "mepic:pages", "gauge", "Pages of KV, by kind; each is of one.", page_words, pages, 6);
    gauge(p, "mepic:page_bytes", info->page_bytes, "Bytes of a page, in all layers.");
    static const char *const source_words[] = { "prefix", "chunk", "linked", "compiled", "text" };
    const uint64_t sources[] = { m->prefix_tokens, m->chunk_tokens, m->linked_tokens, m->compiled_tokens,
                                 m->computed_tokens };
    write_kinds(p, "mepic:prompt_tokens_total", "counter", "Prompt tokens, by where their KV came from.", source_words,
                sources, 5);
    static const char *const row_words[] = { "decode", "text", "link", "compile" };
    const uint64_t rows[] = { e->rows_decode, e->rows_text, e->rows_link, e->rows_compile };
    write_kinds(p, "mepic:rows_total", "counter", "Rows computed, by kind.", row_words, rows, 4);
    const uint64_t rows_ns[] = { e->decode_ns, e->text_ns, e->link_ns, e->compile_ns };
    head(p, "mepic:rows_seconds_total", "counter", "Time of passes through the model, shared out to their rows.");
    for (uint32_t i = 0; i < 4; i++) {
        labelled(p, "mepic:rows_seconds_total", "kind", row_words[i], (double)rows_ns[i] * 1e-9);
    }
    gauge(p, "mepic:sharing_factor", e->pages_referenced ? (double)e->pages_unshared / e->pages_referenced : 1.0,
          "Pages that running requests would hold without sharing, by those they hold.");
    counter(p, "mepic:loaded_pages_total", e->loaded_pages, "Pages of KV read from storage instead of computed.");
    duration(p, "mepic:load_seconds_total", e->load_ns, "Time that took.");
    counter(p, "mepic:steps_total", e->steps, "Steps of the engine.");
    counter(p, "mepic:chunk_lookups_total", e->chunk_lookups, "Chunks that requests asked for.");
    counter(p, "mepic:chunk_hits_total", e->chunk_hits, "Of these, resident.");
    counter(p, "mepic:chunks_as_text_total", e->short_chunks, "Chunks too short or too long to share.");
    counter(p, "mepic:compiles_total", e->compiles, "Chunks computed.");
    counter(p, "mepic:evicted_pages_total", e->evicted_pages, "Cached pages that made room.");
    counter(p, "mepic:requests_refused_total", m->refused, "Requests the queue had no room for.");
    head(p, "mepic:step_seconds_total", "counter", "Time in steps, by part.");
    labelled(p, "mepic:step_seconds_total", "part", "schedule", (double)e->schedule_ns * 1e-9);
    labelled(p, "mepic:step_seconds_total", "part", "forward", (double)e->forward_ns * 1e-9);
    labelled(p, "mepic:step_seconds_total", "part", "sample", (double)e->sample_ns * 1e-9);
}

bool mp_metrics_write(const mp_metrics *metrics, const mepic_model_info *info, const char *model, mp_buf *out) {
    page p = { .out = out, .ok = true };
    size_t n = 0;
    for (; *model && n + 2 < sizeof p.model; model++) {
        if (*model == '"' || *model == '\\') p.model[n++] = '\\';
        p.model[n++] = *model == '\n' ? ' ' : *model;
    }
    p.model[n] = 0;
    write_vllm(&p, metrics, info);
    write_mepic(&p, metrics, info);
    return p.ok;
}
