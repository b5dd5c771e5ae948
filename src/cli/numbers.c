#include "cli/numbers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RESAMPLES = 2000 };

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double mp_quantile(double *values, size_t n, double p) {
    if (n == 0) return 0.0;
    qsort(values, n, sizeof *values, compare_doubles);
    double at = p * (double)(n - 1);
    size_t i = (size_t)at;
    if (i + 1 >= n) return values[n - 1];
    return values[i] + (at - (double)i) * (values[i + 1] - values[i]);
}

double mp_mean(const double *values, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += values[i];
    return n ? sum / (double)n : 0.0;
}

/* SplitMix64: a counter through a mixing function, so every seed is as good as another. */
uint64_t mp_random_next(mp_random *random) {
    uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint32_t mp_random_below(mp_random *random, uint32_t n) {
    return (uint32_t)(((mp_random_next(random) >> 32) * (uint64_t)n) >> 32);
}

double mp_random_unit(mp_random *random) {
    return (double)(mp_random_next(random) >> 11) * 0x1.0p-53;
}

void mp_shuffle(mp_random *random, uint32_t *items, size_t n) {
    for (size_t i = n; i > 1; i--) {
        uint32_t j = mp_random_below(random, (uint32_t)i), t = items[i - 1];
        items[i - 1] = items[j];
        items[j] = t;
    }
}

void mp_zipf_draw(mp_random *random, uint32_t m, double exponent, uint32_t k, uint32_t *out, unsigned char *taken) {
    memset(taken, 0, m);
    for (uint32_t i = 0; i < k; i++) {
        double total = 0.0;
        for (uint32_t r = 0; r < m; r++) total += taken[r] ? 0.0 : pow((double)r + 1.0, -exponent);
        double left = mp_random_unit(random) * total;
        uint32_t choice = m;
        for (uint32_t r = 0; r < m; r++) {
            if (taken[r]) continue;
            choice = r; // the last free one, should rounding leave something over
            left -= pow((double)r + 1.0, -exponent);
            if (left < 0.0) break;
        }
        taken[choice] = 1;
        out[i] = choice;
    }
}

mp_interval mp_bootstrap(const double *values, size_t n, uint64_t seed) {
    mp_interval interval = { .mean = mp_mean(values, n) };
    interval.low = interval.high = interval.mean;
    if (n == 0) return interval;
    mp_random random = { .state = seed };
    double means[RESAMPLES];
    for (size_t r = 0; r < RESAMPLES; r++) {
        double sum = 0.0;
        for (size_t i = 0; i < n; i++) sum += values[mp_random_below(&random, (uint32_t)n)];
        means[r] = sum / (double)n;
    }
    interval.low = mp_quantile(means, RESAMPLES, 0.025);
    interval.high = mp_quantile(means, RESAMPLES, 0.975);
    return interval;
}
