#include "backend/cuda/key_bias.h"

#include <math.h>

static const double TWO_PI = 6.283185307179586477;
static const uint32_t HALF_A_TURN = 0x80000000u;

/* Column d of a head: amplitude * cos(angle * turns + phase). A pair (x, y) turned is
 * (r cos(angle + p), r sin(angle + p)) where r is its length and p its direction. */
static mp_cu_key_bias column(const mp_cu_rope *rope, const float *head, uint32_t d) {
    uint32_t n = rope->n_pairs;
    if (d >= 2 * n) return (mp_cu_key_bias){ .phase = HALF_A_TURN, .amplitude = head[d] };
    bool second = rope->halves ? d >= n : d & 1;
    uint32_t pair = !rope->halves ? d / 2 : second ? d - n : d;
    double x = (double)head[rope->halves ? pair : 2 * pair], y = (double)head[rope->halves ? pair + n : 2 * pair + 1];
    double phase = atan2(y, x) / TWO_PI - (second ? 0.25 : 0);
    return (mp_cu_key_bias){ .turns_high = (uint32_t)(rope->turns[pair] >> 32),
                             .turns_low = (uint32_t)rope->turns[pair],
                             .phase = (uint32_t)llrint((phase - floor(phase)) * 0x1p32) + HALF_A_TURN,
                             .amplitude = (float)(hypot(x, y) * (double)rope->magnitude) };
}

void mp_cu_key_bias_table(const mp_cu_rope *rope, const float *bias, uint32_t n_kv_heads, uint32_t head_dim,
                          mp_cu_key_bias *out) {
    for (uint32_t h = 0; h < n_kv_heads; h++) {
        for (uint32_t d = 0; d < head_dim; d++) {
            out[h * head_dim + d] = column(rope, bias + h * head_dim, d);
        }
    }
}
