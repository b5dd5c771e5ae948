/* How packed weights lie in memory: what the packer (pack.c) writes and the kernels (kernels_matmul.c) read.
 *
 * A panel is 32 outputs: two strips of 16 lanes. The last panel of a matrix has zero weights in the lanes past its end.
 * Along the inputs the strips alternate, block by block, so that whoever reads both reads memory front to back.
 *
 * Quantized types: blocks of 32 inputs. The codes of pair j = 0..15 (inputs 2j and 2j + 1) of a strip form one vector
 * of 32 words, word 2 * lane + (input & 1); several such vectors share one vector of 16-bit words in memory:
 *   4 bits   vector g = 0..3 holds pairs 4g..4g+3, pair 4g + i in bits 4i..4i+3                          256 bytes
 *   5 bits   the 4-bit vectors of the low bits, then one vector whose bit j is bit 4 of pair j              64 more
 *   6 bits   the 4-bit vectors of the low bits, then two: bits 2i..2i+1 of vector h are bits 4..5 of
 *            pair 8h + i                                                                                 128 more
 *   8 bits   vector g = 0..7 holds pairs 2g and 2g + 1 in its low and high bytes                            512
 * Codes are stored as in the file (unsigned but for Q8_0); the offset of types without a minimum (8, 16, 32) is taken
 * off the integer sums. A strip's block is its codes and then its scales, one a lane; f16 unless noted:
 *   Q4_0, Q5_0, Q8_0   d                             w = d * code
 *   Q4_1, Q5_1         d, m                          w = d * code + m
 *   Q4_K, Q5_K         u8 scale, u8 min              w = d * scale * code - dmin * min
 *   Q6_K               s8 scale of inputs 0..15, s8 scale of inputs 16..31
 * In the K types a super-block of 8 blocks begins with each strip's d and -dmin (Q6_K: d), f16.
 * That is the size of the file, but for 2 to 3 % in Q4_K and Q5_K.
 *
 * F32, F16, BF16: [input][lane of the panel] in the native type.
 *
 * Pure functions, any thread. */
#ifndef MEPIC_BACKEND_CPU_PANEL_H
#define MEPIC_BACKEND_CPU_PANEL_H

#include "model/dtype.h"

enum {
    MP_PANEL_LANES = 32,
    MP_STRIP_LANES = 16,
    MP_PANEL_BLOCK = 32, /* inputs a block */
    MP_PANEL_SUPER = 8,  /* blocks a super-block of the K types */
};

/* Index of the tables over types. */
typedef enum mp_panel_type {
    MP_PANEL_Q4_0,
    MP_PANEL_Q4_1,
    MP_PANEL_Q5_0,
    MP_PANEL_Q5_1,
    MP_PANEL_Q8_0,
    MP_PANEL_Q4_K,
    MP_PANEL_Q5_K,
    MP_PANEL_Q6_K,
    MP_PANEL_F32,
    MP_PANEL_F16,
    MP_PANEL_BF16,
    MP_PANEL_TYPES,
} mp_panel_type;

mp_panel_type mp_panel_type_of(mp_dtype type);

/* Bytes of a block's codes; 0 for the floating types. */
static inline uint32_t mp_panel_code_bytes(mp_panel_type type) {
    switch (type) {
    case MP_PANEL_Q4_0:
    case MP_PANEL_Q4_1:
    case MP_PANEL_Q4_K: return 256;
    case MP_PANEL_Q5_0:
    case MP_PANEL_Q5_1:
    case MP_PANEL_Q5_K: return 320;
    case MP_PANEL_Q6_K: return 384;
    case MP_PANEL_Q8_0: return 512;
    default: return 0;
    }
}

/* Bytes of a strip's block, and of a strip's part in front of a super-block. */
static inline uint32_t mp_panel_block_bytes(mp_panel_type type) {
    bool two_f16 = type == MP_PANEL_Q4_1 || type == MP_PANEL_Q5_1;
    return mp_panel_code_bytes(type) + (two_f16 ? 64 : 32);
}
static inline uint32_t mp_panel_super_bytes(mp_panel_type type) {
    return type == MP_PANEL_Q4_K || type == MP_PANEL_Q5_K ? 64 : type == MP_PANEL_Q6_K ? 32 : 0;
}

/* Bytes of a panel over n_in inputs. */
size_t mp_panel_bytes(mp_panel_type type, uint32_t n_in);

/* Packs `n_lanes` (1..32) rows of n_in weights, `row_bytes` apart, into a zeroed panel. */
void mp_panel_pack(mp_dtype type, const uint8_t *rows, size_t row_bytes, uint32_t n_lanes, uint32_t n_in,
                   uint8_t *panel);

#endif
