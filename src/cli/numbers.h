/* Small statistics, and random numbers that are the same on every machine. Any thread. */
#ifndef MEPIC_CLI_NUMBERS_H
#define MEPIC_CLI_NUMBERS_H

#include <stddef.h>
#include <stdint.h>

/* The p-th quantile (0..1) by linear interpolation; sorts `values`. 0 values give 0. */
double mp_quantile(double *values, size_t n, double p);
double mp_mean(const double *values, size_t n);

typedef struct mp_random {
    uint64_t state; /* the seed, at first */
} mp_random;
uint64_t mp_random_next(mp_random *random);
uint32_t mp_random_below(mp_random *random, uint32_t n); /* uniform in 0..n-1; n > 0 */
double mp_random_unit(mp_random *random);                /* uniform in [0, 1) */
void mp_shuffle(mp_random *random, uint32_t *items, size_t n);

/* k different ranks out of 0..m-1, drawn by weights 1 / (rank + 1)^exponent without replacement; k <= m.
 * `taken` is scratch [m]. */
void mp_zipf_draw(mp_random *random, uint32_t m, double exponent, uint32_t k, uint32_t *out, unsigned char *taken);

typedef struct mp_interval {
    double mean, low, high;
} mp_interval;
/* Mean of `values` and the 95 % bootstrap interval of it (2,000 resamples). Paired differences are values. */
mp_interval mp_bootstrap(const double *values, size_t n, uint64_t seed);

#endif
