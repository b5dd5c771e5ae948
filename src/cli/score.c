#include "cli/score.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { WORDS_MAX = 256, WORD_MAX = 64 };

typedef struct words {
    char items[WORDS_MAX][WORD_MAX];
    uint32_t n;
} words;

static bool is_article(const char *word) {
    return strcmp(word, "a") == 0 || strcmp(word, "an") == 0 || strcmp(word, "the") == 0;
}

static bool is_punctuation(unsigned char c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

/* Punctuation is dropped without a gap, as SQuAD's script does: "Warner's" is "warners". */
static void split(const char *text, size_t len, words *out) {
    out->n = 0;
    for (size_t i = 0; i < len && out->n < WORDS_MAX;) {
        char *word = out->items[out->n];
        size_t n = 0;
        for (; i < len && !strchr(" \t\r\n\v\f", text[i]); i++) {
            unsigned char c = (unsigned char)text[i];
            if (is_punctuation(c) || n + 1 == WORD_MAX) continue;
            word[n++] = (char)(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
        }
        word[n] = 0;
        if (n > 0 && !is_article(word)) out->n++;
        if (i < len) i++;
    }
}

static uint32_t count_common(const words *a, const words *b) {
    bool used[WORDS_MAX] = { false };
    uint32_t common = 0;
    for (uint32_t i = 0; i < a->n; i++) {
        for (uint32_t j = 0; j < b->n; j++) {
            if (used[j] || strcmp(a->items[i], b->items[j]) != 0) continue;
            used[j] = true;
            common++;
            break;
        }
    }
    return common;
}

double mp_score_f1(const char *answer, size_t len, const char *const *references, uint32_t n) {
    words given, wanted;
    split(answer, len, &given);
    double best = 0.0;
    for (uint32_t r = 0; r < n; r++) {
        split(references[r], strlen(references[r]), &wanted);
        double f1;
        if (given.n == 0 || wanted.n == 0) {
            f1 = given.n == wanted.n ? 1.0 : 0.0;
        } else {
            /* 2 * precision * recall / (precision + recall) */
            f1 = 2.0 * (double)count_common(&given, &wanted) / (double)(given.n + wanted.n);
        }
        if (f1 > best) best = f1;
    }
    return best;
}

void mp_log_softmax(float *logits, size_t n) {
    double max = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (size_t i = 0; i < n; i++) sum += exp(logits[i] - max);
    double shift = max + log(sum);
    for (size_t i = 0; i < n; i++) logits[i] = (float)(logits[i] - shift);
}

double mp_kl_divergence(const float *log_p, const float *log_q, size_t n) {
    double kl = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (log_p[i] > -80.0f) kl += exp(log_p[i]) * ((double)log_p[i] - (double)log_q[i]);
    }
    return kl;
}
