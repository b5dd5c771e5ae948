/* Weights from the file's block formats into panels (panel.h). Runs once, when a model is opened. */
#include "backend/cpu/panel.h"

#include <string.h>

/* One block of 32 weights of one row, as the file has it: codes and what scales them. */
typedef struct block {
    uint8_t codes[MP_PANEL_BLOCK]; /* Q8_0: two's complement */
    uint16_t d, m;                 /* f16; K types: of the super-block */
    uint8_t scale, min;            /* Q4_K, Q5_K: 6 bits; Q6_K: the two signed scales */
} block;

mp_panel_type mp_panel_type_of(mp_dtype type) {
    switch (type) {
    case MP_DTYPE_F32: return MP_PANEL_F32;
    case MP_DTYPE_F16: return MP_PANEL_F16;
    case MP_DTYPE_BF16: return MP_PANEL_BF16;
    case MP_DTYPE_Q4_0: return MP_PANEL_Q4_0;
    case MP_DTYPE_Q4_1: return MP_PANEL_Q4_1;
    case MP_DTYPE_Q5_0: return MP_PANEL_Q5_0;
    case MP_DTYPE_Q5_1: return MP_PANEL_Q5_1;
    case MP_DTYPE_Q8_0: return MP_PANEL_Q8_0;
    case MP_DTYPE_Q4_K: return MP_PANEL_Q4_K;
    case MP_DTYPE_Q5_K: return MP_PANEL_Q5_K;
    case MP_DTYPE_Q6_K: return MP_PANEL_Q6_K;
    }
    return MP_PANEL_TYPES;
}

static size_t float_bytes(mp_panel_type type) {
    return type == MP_PANEL_F32 ? 4 : 2;
}

size_t mp_panel_bytes(mp_panel_type type, uint32_t n_in) {
    if (mp_panel_code_bytes(type) == 0) return (size_t)n_in * MP_PANEL_LANES * float_bytes(type);
    size_t n_blocks = n_in / MP_PANEL_BLOCK, n_supers = n_blocks / MP_PANEL_SUPER;
    return 2 * (n_blocks * mp_panel_block_bytes(type) + n_supers * mp_panel_super_bytes(type));
}

static uint16_t read_u16(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

static void write_u16(uint8_t *p, uint16_t x) {
    memcpy(p, &x, sizeof x);
}

static void read_nibbles(const uint8_t *qs, uint8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = qs[i] & 15;
        codes[i + 16] = qs[i] >> 4;
    }
}

static void add_fifth_bits(const uint8_t *qh, uint8_t *codes) {
    for (int i = 0; i < 32; i++) codes[i] |= (uint8_t)((qh[i / 8] >> i % 8 & 1) << 4);
}

/* Q4_K and Q5_K: the 6-bit scale and minimum of sub-block s out of the 12 packed bytes. */
static void read_k_scale(const uint8_t *scales, uint32_t s, block *out) {
    if (s < 4) {
        out->scale = scales[s] & 63;
        out->min = scales[s + 4] & 63;
    } else {
        out->scale = (uint8_t)((scales[s + 4] & 15) | scales[s - 4] >> 6 << 4);
        out->min = (uint8_t)(scales[s + 4] >> 4 | scales[s] >> 6 << 4);
    }
}

static void read_q4_k(const uint8_t *super, uint32_t s, const uint8_t *qs, block *out) {
    out->d = read_u16(super);
    out->m = read_u16(super + 2) ^ 0x8000; /* -dmin, so that the kernels add */
    read_k_scale(super + 4, s, out);
    for (int i = 0; i < 32; i++) out->codes[i] = qs[s / 2 * 32 + i] >> s % 2 * 4 & 15;
}

static void read_q6_k(const uint8_t *super, uint32_t s, block *out) {
    const uint8_t *ql = super + s / 4 * 64 + s % 2 * 32, *qh = super + 128 + s / 4 * 32;
    for (int i = 0; i < 32; i++) {
        out->codes[i] = (uint8_t)((ql[i] >> s % 4 / 2 * 4 & 15) | (qh[i] >> s % 4 * 2 & 3) << 4);
    }
    out->scale = super[192 + 2 * s];
    out->min = super[192 + 2 * s + 1];
    out->d = read_u16(super + 208);
}

/* Block b of a row. */
static void read_block(mp_panel_type type, const uint8_t *row, uint32_t b, block *out) {
    const uint8_t *super = row, *p;
    uint32_t s = b % MP_PANEL_SUPER;
    switch (type) {
    case MP_PANEL_Q4_0:
        p = row + (size_t)b * 18;
        out->d = read_u16(p);
        read_nibbles(p + 2, out->codes);
        break;
    case MP_PANEL_Q4_1:
        p = row + (size_t)b * 20;
        out->d = read_u16(p);
        out->m = read_u16(p + 2);
        read_nibbles(p + 4, out->codes);
        break;
    case MP_PANEL_Q5_0:
        p = row + (size_t)b * 22;
        out->d = read_u16(p);
        read_nibbles(p + 6, out->codes);
        add_fifth_bits(p + 2, out->codes);
        break;
    case MP_PANEL_Q5_1:
        p = row + (size_t)b * 24;
        out->d = read_u16(p);
        out->m = read_u16(p + 2);
        read_nibbles(p + 8, out->codes);
        add_fifth_bits(p + 4, out->codes);
        break;
    case MP_PANEL_Q8_0:
        p = row + (size_t)b * 34;
        out->d = read_u16(p);
        memcpy(out->codes, p + 2, 32);
        break;
    case MP_PANEL_Q4_K:
        super += (size_t)(b / MP_PANEL_SUPER) * 144;
        read_q4_k(super, s, super + 16, out);
        break;
    case MP_PANEL_Q5_K:
        super += (size_t)(b / MP_PANEL_SUPER) * 176;
        read_q4_k(super, s, super + 48, out);
        for (int i = 0; i < 32; i++) out->codes[i] |= (uint8_t)((super[16 + i] >> s & 1) << 4);
        break;
    default: read_q6_k(super + (size_t)(b / MP_PANEL_SUPER) * 210, s, out); break;
    }
}

/* Puts one lane's codes into the block's vectors. */
static void write_codes(uint32_t code_bytes, const uint8_t *c, uint32_t lane, uint8_t *codes) {
    uint8_t *word = codes + 4 * lane; /* 64 bytes a vector, two words a lane */
    if (code_bytes == 512) {
        for (int g = 0; g < 8; g++) {
            for (int h = 0; h < 2; h++) {
                write_u16(word + 64 * g + 2 * h, (uint16_t)(c[4 * g + h] | c[4 * g + 2 + h] << 8));
            }
        }
        return;
    }
    for (int g = 0; g < 4; g++) {
        for (int h = 0; h < 2; h++) {
            unsigned bits = 0;
            for (int i = 0; i < 4; i++) bits |= (c[8 * g + 2 * i + h] & 15u) << 4 * i;
            write_u16(word + 64 * g + 2 * h, (uint16_t)bits);
        }
    }
    if (code_bytes == 256) return;
    for (int h = 0; h < 2; h++) {
        uint32_t bits = 0; /* one bit a pair, or two */
        if (code_bytes == 320) {
            for (int j = 0; j < 16; j++) bits |= (uint32_t)(c[2 * j + h] >> 4 & 1) << j;
        } else {
            for (int j = 0; j < 16; j++) bits |= (uint32_t)(c[2 * j + h] >> 4 & 3) << 2 * j;
            write_u16(word + 320 + 2 * h, (uint16_t)(bits >> 16));
        }
        write_u16(word + 256 + 2 * h, (uint16_t)bits);
    }
}

static void pack_floats(mp_panel_type type, const uint8_t *row, uint32_t lane, uint32_t n_in, uint8_t *panel) {
    size_t size = float_bytes(type);
    for (size_t k = 0; k < n_in; k++) memcpy(panel + (k * MP_PANEL_LANES + lane) * size, row + k * size, size);
}

/* Writes one lane of a strip's block; `super`: the strip's part in front of the super-block, in its first block. */
static void write_block(mp_panel_type type, const block *in, uint32_t lane, uint8_t *codes, uint8_t *super) {
    uint32_t code_bytes = mp_panel_code_bytes(type);
    uint8_t *scales = codes + code_bytes;
    write_codes(code_bytes, in->codes, lane, codes);
    if (mp_panel_super_bytes(type) > 0) {
        // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): of a type with scales of a block
        scales[lane] = in->scale;
        scales[MP_STRIP_LANES + lane] = in->min;
        if (!super) return;
        scales = super;
    }
    bool has_min = type == MP_PANEL_Q4_1 || type == MP_PANEL_Q5_1 || type == MP_PANEL_Q4_K || type == MP_PANEL_Q5_K;
    write_u16(scales + 2 * lane, in->d);
    if (has_min) write_u16(scales + 2 * (MP_STRIP_LANES + lane), in->m);
}

void mp_panel_pack(mp_dtype dtype, const uint8_t *rows, size_t row_bytes, uint32_t n_lanes, uint32_t n_in,
                   uint8_t *panel) {
    mp_panel_type type = mp_panel_type_of(dtype);
    if (mp_panel_code_bytes(type) == 0) {
        for (uint32_t lane = 0; lane < n_lanes; lane++) pack_floats(type, rows + lane * row_bytes, lane, n_in, panel);
        return;
    }
    uint32_t block_bytes = mp_panel_block_bytes(type), super_bytes = mp_panel_super_bytes(type);
    uint8_t *p = panel;
    for (uint32_t b = 0; b < n_in / MP_PANEL_BLOCK; b++) {
        uint8_t *super = NULL;
        if (super_bytes > 0 && b % MP_PANEL_SUPER == 0) {
            super = p;
            p += 2 * super_bytes;
        }
        for (uint32_t i = 0; i < n_lanes; i++) {
            uint32_t strip = i / MP_STRIP_LANES, lane = i % MP_STRIP_LANES;
            block in = { 0 };
            read_block(type, rows + i * row_bytes, b, &in);
            write_block(type, &in, lane, p + strip * block_bytes, super ? super + strip * super_bytes : NULL);
        }
        p += 2 * block_bytes;
    }
}
