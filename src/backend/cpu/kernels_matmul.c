/* Tiles of the matrix product, compiled once per instruction set (simd.h).
 *
 * One body for all quantized types; type and number of rows are constants in it, so every instance is straight code. A
 * block's weights are unpacked once and used for all rows of the tile. A row's block is one exact integer sum and is added
 * to the row's fp32 sum by one fused multiply-add, blocks in order: nothing in it depends on the number of rows. */
#include "backend/cpu/kernels_matmul.h"

#include "backend/cpu/simd.h"

#if defined(MP_ISA_AVX512VNNI) || defined(MP_ISA_AVX512)
#define TILE_ROWS 8
#define EACH_ROWS(X, type) X(type, 1) X(type, 2) X(type, 3) X(type, 4) X(type, 5) X(type, 6) X(type, 7) X(type, 8)
#elif defined(MP_ISA_AVX2)
#define TILE_ROWS 4
#define EACH_ROWS(X, type) X(type, 1) X(type, 2) X(type, 3) X(type, 4)
#else
#define TILE_ROWS 2
#define EACH_ROWS(X, type) X(type, 1) X(type, 2)
#endif

#define UNROLL _Pragma("GCC unroll 16")

/* The weights of pairs 4g..4g+3 of a block. */
MP_INLINE void unpack(mp_panel_type type, const uint8_t *codes, int g, v32w w[4]) {
    if (type == MP_PANEL_Q8_0) {
        v32w a = w_load(codes + 128 * g), b = w_load(codes + 128 * g + 64);
        w[0] = w_sra(w_sll(a, 8), 8);
        w[1] = w_sra(a, 8);
        w[2] = w_sra(w_sll(b, 8), 8);
        w[3] = w_sra(b, 8);
        return;
    }
    const v32w low = w_set(15);
    v32w p = w_load(codes + 64 * g);
    w[0] = w_and(p, low);
    w[1] = w_and(w_srl(p, 4), low);
    w[2] = w_and(w_srl(p, 8), low);
    w[3] = w_srl(p, 12);
    if (mp_panel_code_bytes(type) == 320) { /* bit 4g + i of h to bit 4 */
        const v32w bit = w_set(16);
        v32w h = w_load(codes + 256);
        w[0] = w_or_and(w[0], g == 0 ? w_sll(h, 4) : w_srl(h, g == 0 ? 0 : 4 * g - 4), bit);
        w[1] = w_or_and(w[1], g == 0 ? w_sll(h, 3) : w_srl(h, g == 0 ? 0 : 4 * g - 3), bit);
        w[2] = w_or_and(w[2], g == 0 ? w_sll(h, 2) : w_srl(h, g == 0 ? 0 : 4 * g - 2), bit);
        w[3] = w_or_and(w[3], g == 0 ? w_sll(h, 1) : w_srl(h, g == 0 ? 0 : 4 * g - 1), bit);
    } else if (mp_panel_code_bytes(type) == 384) { /* bits 2i..2i+1 of h to bits 4..5, i from 0 or from 4 */
        const v32w bits = w_set(48);
        v32w h = w_load(codes + 256 + 64 * (g / 2));
        w[0] = w_or_and(w[0], g % 2 == 0 ? w_sll(h, 4) : w_srl(h, 4), bits);
        w[1] = w_or_and(w[1], g % 2 == 0 ? w_sll(h, 2) : w_srl(h, 6), bits);
        w[2] = w_or_and(w[2], g % 2 == 0 ? h : w_srl(h, 8), bits);
        w[3] = w_or_and(w[3], g % 2 == 0 ? w_srl(h, 2) : w_srl(h, 10), bits);
    }
}

/* sum[r] += pairs 8 * half .. 8 * half + 7 of the block times row r. */
MP_INLINE void dot_half(mp_panel_type type, int rows, const uint8_t *codes, int half, const mp_qblock *q, v16i *sum) {
    UNROLL for (int g = 2 * half; g < 2 * half + 2; g++) {
        v32w w[4];
        unpack(type, codes, g, w);
        UNROLL for (int i = 0; i < 4; i++) {
            UNROLL for (int r = 0; r < rows; r++) sum[r] = w_dot(sum[r], w[i], q[r].x + 8 * g + 2 * i);
        }
    }
}

/* Where a row's integer sum begins: minus the code's offset times the sum of the inputs. */
MP_INLINE v16i sum_start(mp_panel_type type, int32_t minus) {
    switch (type) {
    case MP_PANEL_Q4_0: return i_sll(i_set(minus), 3);
    case MP_PANEL_Q5_0: return i_sll(i_set(minus), 4);
    case MP_PANEL_Q6_K: return i_sll(i_set(minus), 5);
    default: return i_zero();
    }
}

/* acc[r] += scale * (sum over the block). */
MP_INLINE void fold(int rows, const v16i *sum, v16f scale, const mp_qblock *q, v16f *acc) {
    UNROLL for (int r = 0; r < rows; r++) acc[r] = v_fma(i_to_f(sum[r]), v_mul(scale, v_set(q[r].d)), acc[r]);
}

/* One block with one scale a lane, and a minimum for the types that have one. */
MP_INLINE void block_product(mp_panel_type type, int rows, const uint8_t *codes, v16f scale, v16f min,
                             const mp_qblock *q, v16f *acc) {
    v16i sum[TILE_ROWS];
    UNROLL for (int r = 0; r < rows; r++) sum[r] = sum_start(type, q[r].minus);
    dot_half(type, rows, codes, 0, q, sum);
    dot_half(type, rows, codes, 1, q, sum);
    fold(rows, sum, scale, q, acc);
    if (type == MP_PANEL_Q4_1 || type == MP_PANEL_Q5_1 || type == MP_PANEL_Q4_K || type == MP_PANEL_Q5_K) {
        UNROLL for (int r = 0; r < rows; r++) acc[r] = v_fma(min, v_set(q[r].sum), acc[r]);
    }
}

/* One block of Q6_K: two scales, each for 16 inputs. They are folded one after the other, since scale times integer sum
 * would not always fit 32 bits. */
MP_INLINE void block_product_q6_k(int rows, const uint8_t *codes, v16f d, const mp_qblock *q, v16f *acc) {
    v16i sum[TILE_ROWS];
    v16f scale = v_mul(d, i_to_f(i_load_s8((const int8_t *)codes + 384)));
    UNROLL for (int r = 0; r < rows; r++) sum[r] = sum_start(MP_PANEL_Q6_K, q[r].minus_low);
    dot_half(MP_PANEL_Q6_K, rows, codes, 0, q, sum);
    fold(rows, sum, scale, q, acc);
    scale = v_mul(d, i_to_f(i_load_s8((const int8_t *)codes + 400)));
    UNROLL for (int r = 0; r < rows; r++) sum[r] = sum_start(MP_PANEL_Q6_K, q[r].minus - q[r].minus_low);
    dot_half(MP_PANEL_Q6_K, rows, codes, 1, q, sum);
    fold(rows, sum, scale, q, acc);
}

MP_INLINE void panel_product(mp_panel_type type, int rows, const uint8_t *p, uint32_t n_blocks, const mp_qblock *q,
                             v16f *acc) {
    const uint32_t code_bytes = mp_panel_code_bytes(type);
    switch (type) {
    case MP_PANEL_Q4_0:
    case MP_PANEL_Q5_0:
    case MP_PANEL_Q8_0:
        for (uint32_t b = 0; b < n_blocks; b++, p += code_bytes + 32, q += rows) {
            block_product(type, rows, p, v_load_f16((const uint16_t *)(p + code_bytes)), v_zero(), q, acc);
        }
        break;
    case MP_PANEL_Q4_1:
    case MP_PANEL_Q5_1:
        for (uint32_t b = 0; b < n_blocks; b++, p += code_bytes + 64, q += rows) {
            block_product(type, rows, p, v_load_f16((const uint16_t *)(p + code_bytes)),
                          v_load_f16((const uint16_t *)(p + code_bytes + 32)), q, acc);
        }
        break;
    case MP_PANEL_Q4_K:
    case MP_PANEL_Q5_K:
        for (uint32_t b = 0; b < n_blocks; b += MP_PANEL_SUPER) {
            v16f d = v_load_f16((const uint16_t *)p), minus_dmin = v_load_f16((const uint16_t *)(p + 32));
            p += 64;
            for (int s = 0; s < MP_PANEL_SUPER; s++, p += code_bytes + 32, q += rows) {
                v16f scale = v_mul(d, i_to_f(i_load_u8(p + code_bytes)));
                v16f min = v_mul(minus_dmin, i_to_f(i_load_u8(p + code_bytes + 16)));
                block_product(type, rows, p, scale, min, q, acc);
            }
        }
        break;
    default:
        for (uint32_t b = 0; b < n_blocks; b += MP_PANEL_SUPER) {
            v16f d = v_load_f16((const uint16_t *)p);
            p += 32;
            for (int s = 0; s < MP_PANEL_SUPER; s++, p += code_bytes + 32, q += rows) {
                block_product_q6_k(rows, p, d, q, acc);
            }
        }
        break;
    }
}

/* The floating types: inputs in order, one fused multiply-add each. */
MP_INLINE void panel_product_float(mp_panel_type type, int rows, const uint8_t *p, uint32_t n_in, const float *x,
                                   v16f *acc) {
    for (size_t k = 0; k < n_in; k++) {
        v16f w = type == MP_PANEL_F32   ? v_load((const float *)p + k * 16)
                 : type == MP_PANEL_F16 ? v_load_f16((const uint16_t *)p + k * 16)
                                        : v_load_bf16((const uint16_t *)p + k * 16);
        UNROLL for (int r = 0; r < rows; r++) acc[r] = v_fma(w, v_set(x[(size_t)r * n_in + k]), acc[r]);
    }
}

MP_INLINE void store(v16f acc, float *y, uint32_t n, bool add) {
    if (n >= MP_PANEL_LANES) {
        v_store(y, add ? v_add(v_load(y), acc) : acc);
        return;
    }
    float lanes[MP_PANEL_LANES];
    v_store(lanes, acc);
    for (uint32_t i = 0; i < n; i++) y[i] = add ? y[i] + lanes[i] : lanes[i];
}

MP_INLINE void tile_product(mp_panel_type type, int rows, const mp_tile *t) {
    uint32_t n_blocks = t->n_in / MP_PANEL_BLOCK;
    for (uint32_t i = 0; i < t->n_panels; i++) {
        const uint8_t *panel = t->panels + i * t->panel_bytes;
        v16f acc[TILE_ROWS];
        UNROLL for (int r = 0; r < rows; r++) acc[r] = v_zero();
        if (mp_panel_code_bytes(type) == 0) {
            panel_product_float(type, rows, panel, t->n_in, t->x, acc);
        } else {
            panel_product(type, rows, panel, n_blocks, t->q, acc);
        }
        uint32_t o = i * MP_PANEL_LANES;
        UNROLL for (int r = 0; r < rows; r++) store(acc[r], t->y + (size_t)r * t->y_stride + o, t->n_out - o, t->add);
    }
}

#define EACH_TYPE(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q4_K) X(Q5_K) X(Q6_K) X(F32) X(F16) X(BF16)

#define DEFINE_TILE(type, rows)                                                                                        \
    static void tile_##type##_##rows(const mp_tile *t) {                                                               \
        tile_product(MP_PANEL_##type, rows, t);                                                                        \
    }
#define DEFINE_TILES(type) EACH_ROWS(DEFINE_TILE, type)
EACH_TYPE(DEFINE_TILES)

/* x: up to 32 inputs, zero-filled. */
static void quantize_block(const float *x, mp_qblock *q) {
    v16f a = v_load(x), b = v_load(x + 16);
    v16f zero = v_zero();
    float top = v_top(v_max(v_max(a, v_sub(zero, a)), v_max(b, v_sub(zero, b))));
    bool tiny = top < 1e-30f; /* its reciprocal would overflow; as good as zero */
    v16f inverse = v_set(tiny ? 0.0f : 32767.0f / top);
    v16i low = f_to_i(v_mul(a, inverse)), high = f_to_i(v_mul(b, inverse));
    i_store_s16(q->x, low);
    i_store_s16(q->x + 16, high);
    int32_t lanes[16], low_sum = 0, sum = 0;
    i_store(lanes, low);
    for (int i = 0; i < 16; i++) low_sum += lanes[i];
    i_store(lanes, i_add(low, high));
    for (int i = 0; i < 16; i++) sum += lanes[i];
    q->d = tiny ? 0.0f : top / 32767.0f;
    q->sum = q->d * (float)sum;
    q->minus = -sum;
    q->minus_low = -low_sum;
}

static void quantize(const float *x, uint32_t n_in, mp_qblock *q, size_t stride) {
    uint32_t k = 0;
    for (; k + MP_PANEL_BLOCK <= n_in; k += MP_PANEL_BLOCK, q += stride) quantize_block(x + k, q);
    if (k < n_in) {
        float last[MP_PANEL_BLOCK] = { 0 };
        memcpy(last, x + k, (n_in - k) * sizeof *x);
        quantize_block(last, q);
    }
}

#define TILE_ENTRY(type, rows) tile_##type##_##rows,
#define TILE_LINE(type) [MP_PANEL_##type] = { EACH_ROWS(TILE_ENTRY, type) },
const mp_matmul_kernels MP_ISA(mp_matmul_kernels) = {
    .tile_rows = TILE_ROWS,
    .tile = { EACH_TYPE(TILE_LINE) },
    .quantize = quantize,
};
