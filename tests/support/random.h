/* Random numbers for tests: SplitMix64 (Steele, Lea, Flood 2014), the same on every machine. */
#ifndef MEPIC_TESTS_RANDOM_H
#define MEPIC_TESTS_RANDOM_H

#include <stdint.h>

typedef struct rng {
    uint64_t state;
} rng;

static inline rng rng_open(uint64_t seed) {
    return (rng){ seed };
}

static inline uint64_t rng_next(rng *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint32_t rng_below(rng *r, uint32_t n) {
    return (uint32_t)((rng_next(r) >> 32) * n >> 32);
}

/* low <= x <= high, even: high only by rounding. */
static inline float rng_float(rng *r, float low, float high) {
    return low + (high - low) * ((float)(rng_next(r) >> 40) / 16777216.0f);
}

#endif
