/* Tiles of the matrix product, compiled once per instruction set (simd.h).
 *
 * One body for all quantized types; type and number of rows are constants in it, so every instance is straight code. A
 * block's weights are unpacked once and used for all rows of the tile. A row's block is one exact integer sum and is
 * added to the row's fp32 sum by one fused multiply-add, blocks in order: the number of rows does not enter. */
#include "backend/cpu/kernels_matmul.h"

#include "backend/cpu/simd.h"

/* A full tile, by the number of registers: rows, and strips side by side, which share the loads of activations. */
#if defined(MP_ISA_AVX512VNNI) || defined(MP_ISA_AVX512)
#define TILE_ROWS 4
#define STRIPS 2
#define EACH_ROWS(X, type) X(type, 1) X(type, 2) X(type, 3) X(type, 4)
#elif defined(MP_ISA_AVX2)
#define TILE_ROWS 4
#define STRIPS 1
#define EACH_ROWS(X, type) X(type, 1) X(type, 2) X(type, 3) X(type, 4)
#else
#define TILE_ROWS 2
#define STRIPS 1
#define EACH_ROWS(X, type) X(type, 1) X(type, 2)
#endif

/* With few rows memory is the limit, and the loads of a block, with the work between them, keep too few cache lines
 * under way. So weights are asked for this many bytes before they are used; at an item's end, the next item's. */
enum { FETCH_AHEAD = 8192, FETCH_ROWS = 2 };

#define UNROLL _Pragma("GCC unroll 16")

/* Shifts by a constant to the left (n > 0), to the right, or not at all. */
#define w_shift(a, n) ((n) == 0 ? (a) : (n) > 0 ? w_sll(a, (n) > 0 ? (n) : 0) : w_srl(a, (n) < 0 ? -(n) : 0))

/* The weights of pair j of a block. */
MP_INLINE v32w weights(mp_panel_type type, const uint8_t *codes, int j) {
    if (type == MP_PANEL_Q8_0) {
        v32w p = w_load(codes + 64 * (j / 2));
        return j % 2 == 0 ? w_sra(w_sll(p, 8), 8) : w_sra(p, 8);
    }
    v32w p = w_load(codes + 64 * (j / 4));
    v32w w = j % 4 == 0 ? w_and(p, w_set(15)) : j % 4 == 3 ? w_srl(p, 12) : w_and(w_srl(p, 4 * (j % 4)), w_set(15));
    if (mp_panel_code_bytes(type) == 320) { /* bit j to bit 4 */
        w = w_or_and(w, w_shift(w_load(codes + 256), 4 - j), w_set(16));
    } else if (mp_panel_code_bytes(type) == 384) { /* bits 2i..2i+1 to bits 4..5 */
        w = w_or_and(w, w_shift(w_load(codes + 256 + 64 * (j / 8)), 4 - 2 * (j % 8)), w_set(48));
    }
    return w;
}

/* Below, sums of STRIPS strips times `rows` rows are [strip][row]; all loops over them have constant bounds. */

/* sum += pairs 8 * half .. 8 * half + 7 of the block. */
MP_INLINE void dot_half(mp_panel_type type, int rows, const uint8_t *block, int half, const mp_qblock *q, v16i *sum) {
    UNROLL for (int j = 8 * half; j < 8 * half + 8; j++) {
        v32w w[STRIPS];
        UNROLL for (int c = 0; c < STRIPS; c++) w[c] =
            weights(type, block + (uint32_t)c * mp_panel_block_bytes(type), j);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int c = 0; c < STRIPS; c++) sum[c * rows + r] = w_dot(sum[c * rows + r], w[c], q[r].x + 2 * j);
        }
    }
}

/* Where a row's integer sum begins: minus the code's offset times the sum of the inputs. */
MP_INLINE v16i sum_start(mp_panel_type type, const mp_qblock *row) {
    if (type == MP_PANEL_Q4_0) return i_sll(i_add(i_set(row->minus_low), i_set(row->minus_high)), 3);
    if (type == MP_PANEL_Q5_0) return i_sll(i_add(i_set(row->minus_low), i_set(row->minus_high)), 4);
    return i_zero();
}

/* acc += scale * (sum over the block). */
MP_INLINE void fold(int rows, const v16i *sum, const v16f *scale, const mp_qblock *q, v16f *acc) {
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int c = 0; c < STRIPS; c++) {
            int i = c * rows + r;
            acc[i] = v_fma(i_to_f(sum[i]), v_mul(scale[c], v_set(q[r].d)), acc[i]);
        }
    }
}

/* acc += min * (sum of the block's inputs). */
MP_INLINE void fold_min(int rows, const v16f *min, const mp_qblock *q, v16f *acc) {
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int c = 0; c < STRIPS; c++) acc[c * rows + r] = v_fma(min[c], v_set(q[r].sum), acc[c * rows + r]);
    }
}

/* One block with one scale a lane. */
MP_INLINE void block_product(mp_panel_type type, int rows, const uint8_t *block, const v16f *scale, const mp_qblock *q,
                             v16f *acc) {
    v16i sum[STRIPS * TILE_ROWS];
    UNROLL for (int i = 0; i < STRIPS * rows; i++) sum[i] = sum_start(type, &q[i % rows]);
    dot_half(type, rows, block, 0, q, sum);
    dot_half(type, rows, block, 1, q, sum);
    fold(rows, sum, scale, q, acc);
}

/* One block of Q6_K: two scales, each for 16 inputs. They are folded one after the other, since scale times integer sum
 * would not always fit 32 bits. */
MP_INLINE void block_product_q6_k(int rows, const uint8_t *block, const v16f *d, const mp_qblock *q, v16f *acc) {
    const uint32_t block_bytes = mp_panel_block_bytes(MP_PANEL_Q6_K), code_bytes = mp_panel_code_bytes(MP_PANEL_Q6_K);
    UNROLL for (int half = 0; half < 2; half++) {
        v16i sum[STRIPS * TILE_ROWS];
        v16f scale[STRIPS];
        UNROLL for (int c = 0; c < STRIPS; c++) {
            const uint8_t *bytes = block + (uint32_t)c * block_bytes + code_bytes + 16 * half;
            scale[c] = v_mul(d[c], i_to_f(i_load_s8((const int8_t *)bytes)));
        }
        UNROLL for (int i = 0; i < STRIPS * rows; i++) {
            const mp_qblock *row = q + i % rows;
            sum[i] = i_sll(i_set(half == 0 ? row->minus_low : row->minus_high), 5);
        }
        dot_half(MP_PANEL_Q6_K, rows, block, half, q, sum);
        fold(rows, sum, scale, q, acc);
    }
}

/* The strips' f16 scales, `stride` bytes apart. */
MP_INLINE void load_scales(const uint8_t *p, uint32_t stride, v16f *scale) {
    UNROLL for (int c = 0; c < STRIPS; c++) scale[c] = v_load_f16((const uint16_t *)(p + (uint32_t)c * stride));
}

/* The same of a K type's block: the super-block's f16 times bytes. */
MP_INLINE void scale_bytes(const v16f *d, const uint8_t *p, uint32_t stride, v16f *scale) {
    UNROLL for (int c = 0; c < STRIPS; c++) scale[c] = v_mul(d[c], i_to_f(i_load_u8(p + (uint32_t)c * stride)));
}

MP_INLINE void fetch(mp_panel_type type, int rows, const uint8_t *block) {
    if (rows > FETCH_ROWS) return;
    const uintptr_t p = (uintptr_t)block + FETCH_AHEAD; /* may lie past the matrix, where a hint does nothing */
    UNROLL for (uint32_t i = 0; i < 2 * mp_panel_block_bytes(type); i += 64) __builtin_prefetch((const void *)(p + i));
}

/* From strip `first` of the panel on. */
MP_INLINE void panel_product(mp_panel_type type, int rows, const uint8_t *panel, uint32_t first, uint32_t n_blocks,
                             const mp_qblock *q, v16f *acc) {
    const uint32_t code_bytes = mp_panel_code_bytes(type), block_bytes = mp_panel_block_bytes(type);
    const uint32_t super_bytes = mp_panel_super_bytes(type);
    const bool has_min = type == MP_PANEL_Q4_1 || type == MP_PANEL_Q5_1;
    v16f scale[STRIPS], min[STRIPS];
    if (super_bytes == 0) {
        const uint8_t *p = panel + first * block_bytes;
        for (uint32_t b = 0; b < n_blocks; b++, p += 2 * block_bytes, q += rows) {
            fetch(type, rows, p);
            load_scales(p + code_bytes, block_bytes, scale);
            block_product(type, rows, p, scale, q, acc);
            if (!has_min) continue;
            load_scales(p + code_bytes + 32, block_bytes, min);
            fold_min(rows, min, q, acc);
        }
        return;
    }
    for (uint32_t b = 0; b < n_blocks; b += MP_PANEL_SUPER) {
        v16f d[STRIPS], minus_dmin[STRIPS];
        load_scales(panel + first * super_bytes, super_bytes, d);
        if (type != MP_PANEL_Q6_K) load_scales(panel + first * super_bytes + 32, super_bytes, minus_dmin);
        panel += 2 * super_bytes;
        for (int s = 0; s < MP_PANEL_SUPER; s++, panel += 2 * block_bytes, q += rows) {
            const uint8_t *p = panel + first * block_bytes;
            fetch(type, rows, p);
            if (type == MP_PANEL_Q6_K) {
                block_product_q6_k(rows, p, d, q, acc);
                continue;
            }
            scale_bytes(d, p + code_bytes, block_bytes, scale);
            block_product(type, rows, p, scale, q, acc);
            scale_bytes(minus_dmin, p + code_bytes + 16, block_bytes, min);
            fold_min(rows, min, q, acc);
        }
    }
}

/* Lanes `at` and on of a panel of a floating type. */
MP_INLINE v16f load_weights(mp_panel_type type, const uint8_t *p, size_t at) {
    if (type == MP_PANEL_F32) return v_load((const float *)p + at);
    if (type == MP_PANEL_F16) return v_load_f16((const uint16_t *)p + at);
    return v_load_bf16((const uint16_t *)p + at);
}

/* The floating types: inputs in order, one fused multiply-add each. */
MP_INLINE void panel_product_float(mp_panel_type type, int rows, const uint8_t *panel, uint32_t first, uint32_t n_in,
                                   const float *x, v16f *acc) {
    for (size_t k = 0; k < n_in; k++) {
        v16f w[STRIPS];
        UNROLL for (int c = 0; c < STRIPS; c++) {
            w[c] = load_weights(type, panel, k * MP_PANEL_LANES + (first + (uint32_t)c) * MP_STRIP_LANES);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            v16f xk = v_set(x[(size_t)r * n_in + k]);
            UNROLL for (int c = 0; c < STRIPS; c++) acc[c * rows + r] = v_fma(w[c], xk, acc[c * rows + r]);
        }
    }
}

/* The first n of the strip's outputs. */
MP_INLINE void store(v16f acc, float *y, uint32_t n, bool add) {
    if (n >= MP_STRIP_LANES) {
        v_store(y, add ? v_add(v_load(y), acc) : acc);
        return;
    }
    float lanes[MP_STRIP_LANES];
    v_store(lanes, acc);
    for (uint32_t i = 0; i < n; i++) y[i] = add ? y[i] + lanes[i] : lanes[i];
}

MP_INLINE void tile_product(mp_panel_type type, int rows, const mp_tile *t) {
    for (uint32_t strip = 0; strip < 2 * t->n_panels; strip += STRIPS) {
        const uint8_t *panel = t->panels + strip / 2 * t->panel_bytes;
        v16f acc[STRIPS * TILE_ROWS];
        UNROLL for (int i = 0; i < STRIPS * rows; i++) acc[i] = v_zero();
        if (mp_panel_code_bytes(type) == 0) {
            panel_product_float(type, rows, panel, strip % 2, t->n_in, t->x, acc);
        } else {
            panel_product(type, rows, panel, strip % 2, t->n_in / MP_PANEL_BLOCK, t->q, acc);
        }
        UNROLL for (int c = 0; c < STRIPS; c++) {
            uint32_t o = (strip + (uint32_t)c) * MP_STRIP_LANES;
            if (o >= t->n_out) continue;
            UNROLL for (int r = 0; r < rows; r++)
                store(acc[c * rows + r], t->y + (size_t)r * t->y_stride + o, t->n_out - o, t->add);
        }
    }
}

#define EACH_TYPE(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q4_K) X(Q5_K) X(Q6_K) X(F32) X(F16) X(BF16)

#define DEFINE_TILE(type, rows)                                                                                        \
    static void tile_##type##_##rows(const mp_tile *t) {                                                               \
        tile_product(MP_PANEL_##type, rows, t);                                                                        \
    }
#define DEFINE_TILES(type) EACH_ROWS(DEFINE_TILE, type)
EACH_TYPE(DEFINE_TILES)

static void quantize_block(const float *x, mp_qblock *q) {
    v16f a = v_load(x), b = v_load(x + 16);
    float top = v_top(v_max(v_max(a, v_sub(v_zero(), a)), v_max(b, v_sub(v_zero(), b))));
    bool tiny = top < 1e-30f; /* its reciprocal would overflow; as good as zero */
    v16f inverse = v_set(tiny ? 0.0f : 32767.0f / top);
    v16i low = f_to_i(v_mul(a, inverse)), high = f_to_i(v_mul(b, inverse));
    i_store_s16(q->x, low);
    i_store_s16(q->x + 16, high);
    int32_t low_sum = i_sum(low), high_sum = i_sum(high);
    q->d = tiny ? 0.0f : top / 32767.0f;
    q->sum = q->d * (float)(low_sum + high_sum);
    q->minus_low = -low_sum;
    q->minus_high = -high_sum;
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
