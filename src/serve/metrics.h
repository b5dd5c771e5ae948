/* What /metrics says: counters and histograms of ended replies beside the engine's own numbers, as Prometheus' text.
 *
 * vllm: names where vLLM has the same thing, so that its dashboards work; mepic: names for what only exists here. The
 * loop counts, under its lock; writing works on a copy. */
#ifndef MEPIC_SERVE_METRICS_H
#define MEPIC_SERVE_METRICS_H

#include "base/mem.h"
#include "base/status.h"

enum { MP_BUCKETS_MAX = 24, MP_FINISHES = 4 };

typedef struct mp_histogram {
    uint64_t counts[MP_BUCKETS_MAX]; /* the last one: above every bound */
    double sum;
} mp_histogram;

typedef enum mp_histogram_name {
    MP_HISTOGRAM_TTFT,
    MP_HISTOGRAM_TOTAL,
    MP_HISTOGRAM_QUEUE,
    MP_HISTOGRAM_PREFILL,
    MP_HISTOGRAM_DECODE,
    MP_HISTOGRAM_PER_TOKEN,
    MP_HISTOGRAM_BETWEEN,
    MP_HISTOGRAM_PROMPT,
    MP_HISTOGRAM_GENERATION,
    MP_N_HISTOGRAMS,
} mp_histogram_name;

typedef struct mp_metrics {
    mepic_stats engine; /* after the last step */
    uint32_t choices; /* that wait or run */
    uint64_t refused; /* by the queue */
    uint64_t finished[MP_FINISHES];
    uint64_t prompt_tokens, prefix_tokens, chunk_tokens, linked_tokens, compiled_tokens, computed_tokens;
    uint64_t completion_tokens;
    mp_histogram histograms[MP_N_HISTOGRAMS];
} mp_metrics;

/* Time between two tokens of a reply. */
void mp_metrics_count_token(mp_metrics *metrics, uint64_t ns);
void mp_metrics_count_reply(mp_metrics *metrics, mepic_finish finish, const mepic_usage *usage);
bool mp_metrics_write(const mp_metrics *metrics, const mepic_model_info *info, const char *model, mp_buf *out);

#endif
