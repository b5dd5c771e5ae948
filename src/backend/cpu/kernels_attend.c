#include "backend/cpu/kernels_attend.h"

#include "backend/cpu/simd.h"

/* Registers: a tile of R queries keeps R x G score vectors (G groups of keys) and then R x D value vectors (D x 16
 * dimensions) in flight: enough independent sums to hide the latency of an addition, few enough to stay in registers.
 * R, G and D are constants in every copy of the code but the portable one, which has no vectors to save. */
#if defined(MP_ISA_AVX512)
enum { WIDTH = 8 };
#define GROUPS_AT_ONCE(R) ((R) == 1 ? 8 : (R) <= 4 ? 4 : 2)
#define VALUES_AT_ONCE(R) ((R) <= 2 ? 8 : (R) <= 4 ? 4 : 2)
#elif defined(MP_ISA_AVX2)
enum { WIDTH = 4 };
#define GROUPS_AT_ONCE(R) ((R) == 1 ? 4 : (R) == 2 ? 2 : 1)
#define VALUES_AT_ONCE(R) ((R) == 1 ? 4 : (R) == 2 ? 2 : 1)
#else
enum { WIDTH = 4 };
#define GROUPS_AT_ONCE(R) 1
#define VALUES_AT_ONCE(R) 1
#endif

#if defined(MP_ISA_AVX512) || defined(MP_ISA_AVX2)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

MP_INLINE size_t element_bytes(const mepic_kv_type type) {
    return type == MEPIC_KV_F32 ? 4 : 2;
}

/* Sixteen elements of K or V from element i on. */
MP_INLINE v16f load_kv(const mepic_kv_type type, const uint8_t *p, size_t i) {
    switch (type) {
    case MEPIC_KV_F32: return v_load((const float *)p + i);
    case MEPIC_KV_BF16: return v_load_bf16((const uint16_t *)p + i);
    default: return v_load_f16((const uint16_t *)p + i);
    }
}

/* The keys of group g that a range shows, as lane bits. */
MP_INLINE uint16_t visible_lanes(const mp_key_range *range, uint32_t g) {
    if (!(range->groups >> g & 1)) return 0;
    uint32_t start = g * MP_GROUP_TOKENS;
    uint32_t lanes = 0xffff;
    if (range->lo > start) lanes &= 0xffffu << (range->lo - start);
    if (range->hi < start + MP_GROUP_TOKENS) lanes &= 0xffffu >> (start + MP_GROUP_TOKENS - range->hi);
    return (uint16_t)lanes;
}

/* Scores of R queries against the first G of n groups; `list` names the groups, and the results go side by side to
 * `column`. Meanwhile the V of these groups and the K of the next ones are fetched: groups lie in different pages,
 * where no hardware looks ahead, and without it a few queries wait for memory half of the time. */
MP_INLINE void score_groups(const mepic_kv_type type, const int R, const int G, const mp_query_tile *tile,
                            const uint8_t *list, uint32_t n, float *column) {
    const size_t k_bytes = (size_t)tile->head_dim * MP_GROUP_TOKENS * element_bytes(type);
    const v16f hidden = v_set(-INFINITY);
    const uint8_t *k[8], *next[8];
    v16f sum[8][8];
    UNROLL for (int g = 0; g < G; g++) {
        k[g] = tile->groups[list[g]];
        next[g] = tile->groups[list[(uint32_t)(g + G) < n ? g + G : g]];
        UNROLL for (int r = 0; r < R; r++) sum[r][g] = v_zero();
    }
    for (uint32_t d = 0; d < tile->head_dim; d++) {
        v16f key[8];
        if (d % 2 == 0) { // two dimensions of 16-bit keys are a cache line
            size_t line = (size_t)d * MP_GROUP_TOKENS * element_bytes(type);
            UNROLL for (int g = 0; g < G; g++) {
                __builtin_prefetch(k[g] + k_bytes + line, 0, 3);
                __builtin_prefetch(next[g] + line, 0, 3);
            }
        }
        UNROLL for (int g = 0; g < G; g++) key[g] = load_kv(type, k[g], (size_t)d * MP_GROUP_TOKENS);
        UNROLL for (int r = 0; r < R; r++) {
            v16f q = v_set(tile->q[(size_t)r * tile->head_dim + d]);
            UNROLL for (int g = 0; g < G; g++) sum[r][g] = v_fma(q, key[g], sum[r][g]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int g = 0; g < G; g++) {
            uint16_t lanes = visible_lanes(&tile->ranges[r], list[g]);
            v_store(column + (size_t)r * MP_CPU_CELL_TOKENS + (size_t)g * 16, v_select(lanes, sum[r][g], hidden));
        }
    }
}

/* Scores of one query [n groups * 16] become weights in place; m and l go to its state. */
MP_INLINE void weigh(float *score, uint32_t n, float *m, float *l) {
    v16f top = v_set(-INFINITY);
    for (uint32_t c = 0; c < n; c++) top = v_max(top, v_load(score + c * 16));
    *m = v_top(top);
    v16f sum = v_zero();
    if (*m == -INFINITY) {
        for (uint32_t c = 0; c < n; c++) v_store(score + c * 16, sum);
    } else {
        for (uint32_t c = 0; c < n; c++) {
            v16f p = v_exp(v_sub(v_load(score + c * 16), v_set(*m)));
            v_store(score + c * 16, p);
            sum = v_add(sum, p);
        }
    }
    *l = v_sum(sum);
}

/* o of R queries in dimensions [dim, dim + 16 * D). */
MP_INLINE void value_dims(const mepic_kv_type type, const int R, const int D, const mp_query_tile *tile,
                          const uint8_t *list, uint32_t n, uint32_t dim) {
    v16f sum[8][8];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int i = 0; i < D; i++) sum[r][i] = v_zero();
    }
    for (uint32_t c = 0; c < n; c++) {
        const uint8_t *v = tile->groups[list[c]] + (size_t)tile->head_dim * MP_GROUP_TOKENS * element_bytes(type);
        const float *p = tile->weights + (size_t)c * 16;
        for (uint32_t t = 0; t < MP_GROUP_TOKENS; t++) {
            v16f value[8];
            UNROLL for (int i = 0; i < D; i++) {
                value[i] = load_kv(type, v, (size_t)t * tile->head_dim + dim + (size_t)i * 16);
            }
            UNROLL for (int r = 0; r < R; r++) {
                v16f weight = v_set(p[(size_t)r * MP_CPU_CELL_TOKENS + t]);
                UNROLL for (int i = 0; i < D; i++) sum[r][i] = v_fma(weight, value[i], sum[r][i]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int i = 0; i < D; i++) v_store(tile->states[r] + dim + i * 16, sum[r][i]);
    }
}

MP_INLINE void attend_tile(const mepic_kv_type type, const int R, const mp_query_tile *tile) {
    uint32_t seen = 0;
    for (int r = 0; r < R; r++) seen |= tile->ranges[r].groups;
    uint8_t list[MP_CELL_GROUPS];
    uint32_t n = 0;
    for (uint32_t g = 0; g < MP_CELL_GROUPS; g++) {
        if (seen >> g & 1) list[n++] = (uint8_t)g;
    }

    uint32_t c = 0;
    for (; c + GROUPS_AT_ONCE(R) <= n; c += GROUPS_AT_ONCE(R)) {
        score_groups(type, R, GROUPS_AT_ONCE(R), tile, list + c, n - c, tile->weights + c * 16);
    }
    for (; c < n; c++) score_groups(type, R, 1, tile, list + c, n - c, tile->weights + c * 16);

    for (int r = 0; r < R; r++) {
        float *state = tile->states[r];
        weigh(tile->weights + (size_t)r * MP_CPU_CELL_TOKENS, n, &state[tile->head_dim], &state[tile->head_dim + 1]);
    }

    uint32_t dim = 0;
    for (; dim + VALUES_AT_ONCE(R) * 16 <= tile->head_dim; dim += VALUES_AT_ONCE(R) * 16) {
        value_dims(type, R, VALUES_AT_ONCE(R), tile, list, n, dim);
    }
    if (VALUES_AT_ONCE(R) > 4 && dim + 64 <= tile->head_dim) {
        value_dims(type, R, 4, tile, list, n, dim);
        dim += 64;
    }
    for (; dim < tile->head_dim; dim += 16) value_dims(type, R, 1, tile, list, n, dim);
}

/* One function a KV type; the tile's height is a constant in each case. */
/* clang-format off */
#define HEIGHT(R) case R: attend_tile(type, R, tile); break;
#if defined(MP_ISA_AVX512)
#define HEIGHTS HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6) HEIGHT(7) HEIGHT(8)
#elif defined(MP_ISA_AVX2)
#define HEIGHTS HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4)
#else
#define HEIGHTS default: attend_tile(type, (int)tile->n, tile);
#endif
/* clang-format on */

static void attend_f16(const mp_query_tile *tile) {
    const mepic_kv_type type = MEPIC_KV_F16;
    switch (tile->n) { HEIGHTS }
}

static void attend_bf16(const mp_query_tile *tile) {
    const mepic_kv_type type = MEPIC_KV_BF16;
    switch (tile->n) { HEIGHTS }
}

static void attend_f32(const mp_query_tile *tile) {
    const mepic_kv_type type = MEPIC_KV_F32;
    switch (tile->n) { HEIGHTS }
}

static void merge(float *into, const float *from, uint32_t head_dim) {
    float m1 = into[head_dim], m2 = from[head_dim];
    if (m2 == -INFINITY) return;
    if (m1 == -INFINITY) {
        memcpy(into, from, (head_dim + 2) * sizeof *into);
        return;
    }
    float m = m1 > m2 ? m1 : m2;
    v16f a = v_exp(v_set(m1 - m)), b = v_exp(v_set(m2 - m));
    for (uint32_t d = 0; d < head_dim; d += 16) {
        v_store(into + d, v_fma(v_load(from + d), b, v_mul(v_load(into + d), a)));
    }
    float l[16];
    v_store(l, v_fma(v_set(from[head_dim + 1]), b, v_mul(v_set(into[head_dim + 1]), a)));
    into[head_dim] = m;
    into[head_dim + 1] = l[0];
}

static void finish(const float *state, float *out, uint32_t head_dim) {
    if (state[head_dim] == -INFINITY) {
        memset(out, 0, head_dim * sizeof *out);
        return;
    }
    v16f l = v_set(state[head_dim + 1]);
    for (uint32_t d = 0; d < head_dim; d += 16) v_store(out + d, v_div(v_load(state + d), l));
}

const struct mp_attend_kernels MP_ISA(mp_attend_kernels) = {
    .width = WIDTH,
    .tile = { [MEPIC_KV_F16] = attend_f16, [MEPIC_KV_BF16] = attend_bf16, [MEPIC_KV_F32] = attend_f32 },
    .merge = merge,
    .finish = finish,
};
