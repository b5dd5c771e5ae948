/* The matrix product's inner functions, one table an instruction set: activations to int16, and a tile = a few rows of
 * activations times a sequence of panels. Called by matmul.c; any thread. */
#ifndef MEPIC_BACKEND_CPU_KERNELS_MATMUL_H
#define MEPIC_BACKEND_CPU_KERNELS_MATMUL_H

#include <stdbool.h>

#include "backend/cpu/panel.h"

/* 32 inputs of one row. */
typedef struct mp_qblock {
    int16_t x[MP_PANEL_BLOCK];
    float d;   /* an input is x * d */
    float sum; /* d * (sum of x), for types with a minimum */
    int32_t minus_low, minus_high; /* -(sum of x) of inputs 0..15 and 16..31, for types whose codes have an offset */
} mp_qblock;

enum { MP_TILE_MAX = 4 };

/* The rows of a tile lie block by block, [block][row of the tile], so that one pointer runs through them. */
typedef struct mp_tile {
    const uint8_t *panels; /* n_panels of panel_bytes each */
    size_t panel_bytes;
    uint32_t n_panels, n_in;
    const mp_qblock *q; /* [blocks][rows of the tile] */
    const float *x;     /* [rows of the tile, n_in]: what F32, F16 and BF16 multiply */
    float *y;           /* [rows of the tile], y_stride apart: outputs of the first panel and on */
    size_t y_stride;
    uint32_t n_out; /* outputs from y on; the last panel may have fewer than its lanes */
    bool add;
} mp_tile;

typedef void (*mp_tile_fn)(const mp_tile *tile);

typedef struct mp_matmul_kernels {
    uint32_t tile_rows;                           /* rows of a full tile, at most MP_TILE_MAX */
    mp_tile_fn tile[MP_PANEL_TYPES][MP_TILE_MAX]; /* [type][rows - 1] up to tile_rows */
    /* One row: block b goes to q[b * stride]. An incomplete last block is filled up with zeros. */
    void (*quantize)(const float *x, uint32_t n_in, mp_qblock *q, size_t stride);
} mp_matmul_kernels;

extern const mp_matmul_kernels mp_matmul_kernels_portable;
#if defined(__x86_64__)
extern const mp_matmul_kernels mp_matmul_kernels_avx2, mp_matmul_kernels_avx512, mp_matmul_kernels_avx512vnni;
#endif

#endif
