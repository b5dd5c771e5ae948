/* What the host side of the CUDA backend and its kernels share: the layout of a page, a step's work as the device sees
 * it, and the launchers. A launcher puts its kernels on `stream` and returns at once; nothing here allocates, waits or
 * keeps state. Every pointer in these structs is device memory unless its comment says host.
 *
 * Row counts. Launchers that go into a CUDA graph take the graph's row bucket (grid sizes) and read the real counts
 * from mp_cu_work in device memory, so one graph serves every step of that bucket.
 *
 * Layout of a block, the KV of one (page, layer, kv head); bf16:
 *
 *   block = page_size / 8 groups
 *   group = 8 tokens: K [8, head_dim], then V [8, head_dim], each cut into panels of 64, then 32, then 16 columns
 *   panel = 8 rows of w columns; the 16-byte unit u of row r stands at unit u ^ x(r):
 *           w = 64: x = r & 7 (the tensor cores' 128-byte swizzle), w = 32: x = r >> 1 & 3, w = 16: x = r >> 2 & 1
 *
 * so a stage of 64 keys is 8 pieces of 8 tokens, wherever its pages are, and what lies in memory is what wgmma and
 * ldmatrix want in shared memory: one plain bulk copy a page and head. fp8:
 *
 *   block = page_size / 8 groups
 *   group = 8 tokens: K codes, angles int32 [8], K factors bf16 [8], V factors bf16 [8], V codes
 *   codes = panels of 16 columns, [8 tokens, 16]; of a token's 16 columns, c and c + 8 stand side by side: the bytes
 *           that ldmatrix hands to a thread are then those of which it makes its operands
 *
 * A number is code (e4m3) * factor * 2^-120, rounded to bf16; the factor makes the largest of a token's head 448, the
 * largest code: where one column is the largest in every token, its error is the factor's, 0.4 % at most. K lies there
 * without the model's bias, if it has one and no norm comes behind it; the bias turned by the token's angle is added
 * when a stage is brought to bf16 (kv8.cuh). So the few columns in which the bias of Qwen2's keys is forty times what
 * varies do not make all coarse. */
#ifndef MEPIC_BACKEND_CUDA_KERNELS_H
#define MEPIC_BACKEND_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MP_CU_CELL_TOKENS 1024u
#define MP_CU_STAGE_TOKENS 64u /* keys between two updates of a row's state */
#define MP_CU_GROUP_TOKENS 8u
#define MP_CU_KV8_MARKS 64u /* bytes of a group of fp8 that are no codes */

typedef uint16_t mp_bf16; /* bits; kernels reinterpret */

/* Rows that a product reads: bf16, or e4m3 codes that times their row's scale are the values. */
typedef struct mp_cu_matrix {
    void *data;    /* [rows, n] */
    float *scales; /* [rows]; NULL: bf16 */
} mp_cu_matrix;
#define MP_CU_E4M3_MAX 448.0f

/* What a product leaves. */
typedef enum mp_cu_out {
    MP_CU_OUT_BF16,    /* out bf16 [rows, n_out], rounded once */
    MP_CU_OUT_F32,     /* out fp32 */
    MP_CU_OUT_ADD_F32, /* out fp32 += */
} mp_cu_out;

/* ---- A step's work ----------------------------------------------------------------------------------------------- */

typedef struct mp_cu_row {
    int32_t token; /* or -1 - the sequence whose last sampled one it is */
    int32_t position;
    uint32_t index;  /* in the private stream */
    uint32_t page;   /* where its K and V go */
    uint32_t slot;   /* in the page */
} mp_cu_row;

/* A run's cell: where its pages are listed. */
typedef struct mp_cu_cell {
    uint32_t first_page; /* into mp_cu_work.pages */
    uint32_t n_tokens;
} mp_cu_cell;

/* A decode row as a cell sees it. The row sees key i when lo <= i < hi and bit (i / page_size) of mask is set. */
typedef struct mp_cu_reader {
    uint64_t mask;
    uint32_t row;  /* of the step */
    int32_t delta; /* row position - base: its queries are turned by this angle */
    uint32_t slot; /* where its partial state of this cell goes */
    uint16_t lo, hi; /* hi is cut at the causal edge and at n_tokens; lo < hi */
} mp_cu_reader;

/* Decode work: one cell for all rows that read it; a unit of work is (item, kv head). 16 bytes. */
typedef struct mp_cu_item {
    uint32_t first_page;              /* of the cell */
    uint16_t n_tokens;                /* of the cell */
    uint16_t n_before;                /* keys of the cell that were there before this step: may be read ahead */
    uint32_t first_reader;            /* into mp_cu_work.readers */
    uint32_t n_readers : 31, alone : 1; /* alone: no other item has this cell */
} mp_cu_item;

/* A decode row's partial states, in fold order: slots [first_slot, first_slot + n_slots). */
typedef struct mp_cu_fold {
    uint32_t row, first_slot, n_slots;
} mp_cu_fold;

/* A block of rows of one sequence (prefill): consecutive rows of the step, all of whose cells are walked in order. */
typedef struct mp_cu_block {
    uint32_t first_row, n_rows;
    uint32_t first_ref, n_refs; /* into mp_cu_work.refs */
} mp_cu_block;

/* A cell as a block sees it. Row r sees key i when lo <= i < hi, bit (i / page_size) of mask is set, and
 * first + i < (shared ? position of r : index of r + 1). Its queries are turned by position - base. */
typedef struct mp_cu_ref {
    uint64_t mask;
    uint32_t cell;
    int32_t base, first;
    uint16_t lo, hi; /* hi <= n_tokens */
    uint32_t shared;
} mp_cu_ref;

typedef struct mp_cu_counts {
    uint32_t n_rows, n_logits, n_items, n_folds, n_blocks;
    uint32_t n_back; /* blocks of the decode grid that begin at the end of the list, where items of few readers are */
    /* Work counters of persistent grids; 0 when a step starts and when a launch has ended. next_unit and next_back are
     * one 64-bit word to those that take from both ends. */
    uint32_t next_unit, next_back;
    uint32_t next_block;
    uint32_t done;
} mp_cu_counts;

typedef struct mp_cu_work {
    mp_cu_counts *counts;
    const mp_cu_row *rows;         /* [n_rows] */
    const uint32_t *logit_rows;    /* [n_logits] step rows, ascending */
    const uint32_t *pages;         /* page lists of the cells */
    const mp_cu_cell *cells;
    const mp_cu_item *items;       /* [n_items], the most expensive first */
    const mp_cu_reader *readers;
    const mp_cu_fold *folds;       /* [n_folds] */
    const mp_cu_block *blocks;     /* [n_blocks], the most expensive first */
    const mp_cu_ref *refs;
} mp_cu_work;

/* ---- Attention --------------------------------------------------------------------------------------------------- */

/* Rotation by exact fixed-point turns: the angle of pair i at delta is the fraction of delta * turns[i] / 2^64,
 * whatever the size of delta; keys (at store) and queries use the same function. */
typedef struct mp_cu_rope {
    const uint64_t *turns; /* [n_pairs] turns per position, times 2^64 */
    uint32_t n_pairs;      /* dimensions 2 * n_pairs and up are not turned */
    bool halves;           /* pairs (i, i + n_pairs); else (2i, 2i + 1) */
    float magnitude;
} mp_cu_rope;

/* One column of a key's bias at any angle: amplitude * cos(2 pi * (angle * turns + phase)), turns and phase as
 * fractions of 2^64 and of 2^32. 16 bytes, read as one. */
typedef struct mp_cu_key_bias {
    uint32_t turns_high, turns_low;
    uint32_t phase; /* and half a turn */
    float amplitude;
} mp_cu_key_bias;

typedef struct mp_cu_attend {
    uint32_t head_dim, n_heads, n_kv_heads, page_size;
    float scale; /* 1 / sqrt(head_dim) */
    bool fp8;    /* pages are fp8 */
    const mp_cu_key_bias *key_bias; /* [n_kv_heads, head_dim] of this layer, what fp8 K is stored without; or NULL */
    mp_cu_rope rope;
    const uint8_t *slab;
    size_t page_bytes;   /* of all layers */
    size_t block_bytes;  /* of one (layer, kv head) */
    size_t layer_offset; /* of this layer in a page */
    const mp_bf16 *q;    /* [rows, n_heads * head_dim], not turned */
    mp_bf16 *out;        /* [rows, n_heads * head_dim] */
    uint16_t *partial_o; /* f16 [slots, n_heads, head_dim]: normalized */
    float *partial_ml;   /* [slots, n_heads, 2]: maximum (base-2 logits, scaled), sum of weights */
    mp_cu_work work;
    uint32_t arch; /* which kernels and instructions may be used: mp_cu_device.code */
    uint32_t n_sm;
    uint32_t max_items; /* of this launch: how many the grid is made for, the counts may say more; 0: none */
    uint32_t max_folds, max_blocks; /* upper bounds of what the counts say; 0: none */
} mp_cu_attend;

/* Decode items with the fold of their partial states; prefill blocks. `a` is host memory, copied at the call. */
cudaError_t mp_cu_attend_open(int device); /* sets kernel attributes; again for the same device is harmless */
cudaError_t mp_cu_attend_decode(const mp_cu_attend *a, cudaStream_t stream);
cudaError_t mp_cu_attend_prefill(const mp_cu_attend *a, cudaStream_t stream);
/* Rows a block may have for this shape (a power of two >= 1, n_rows * heads per kv head is at most 128). */
uint32_t mp_cu_attend_block_rows(uint32_t n_heads, uint32_t n_kv_heads);
/* Readers an item should have at most for this shape. Of one with more, a single block reads the keys several times. */
uint32_t mp_cu_attend_item_readers(uint32_t arch, uint32_t head_dim, uint32_t n_heads, uint32_t n_kv_heads);

/* What the kernels that run on the current device were compiled for, as a capability times 10: 80 where the driver made
 * them from PTX for 8.0, whatever the device is. An error: this build has none for the device. */
cudaError_t mp_cu_kernels_arch(uint32_t *arch);

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

/* x[r] = embedding of the row's token; sampled [sequences], table bf16 [n_vocab, n_embd], x fp32. */
cudaError_t mp_cu_embed(const mp_cu_work *work, uint32_t n_rows, const int32_t *sampled, const mp_bf16 *table,
                        uint32_t n_embd, float *x, cudaStream_t stream);
/* h = x / rms(x) * weight. rows: NULL, or the step rows to take (logit_rows): h[i] = norm(x[rows[i]]). code:
 * mp_cu_device.code, by which a launch may be early. */
cudaError_t mp_cu_norm(uint32_t n_rows, const uint32_t *rows, const uint32_t *n_real, const float *x,
                       const float *weight, float eps, uint32_t n_embd, mp_cu_matrix h, uint32_t code,
                       cudaStream_t stream);

typedef struct mp_cu_store {
    uint32_t head_dim, n_heads, n_kv_heads;
    uint32_t code; /* of mp_cu_device: whether it may be launched early */
    mp_cu_rope rope;
    const float *bias;             /* [(n_heads + 2 n_kv_heads) * head_dim] or NULL */
    const float *q_norm, *k_norm;  /* [head_dim] or NULL */
    float norm_eps;
    bool fp8;                      /* pages are fp8 */
    bool k_minus_bias;             /* k gets no bias; attention adds it */
    mp_bf16 *qkv; /* [rows, (n_heads + 2 n_kv_heads) * head_dim] from the product */
    mp_bf16 *q;   /* [rows, n_heads * head_dim] with bias and norm, not turned */
    uint8_t *slab;
    size_t page_bytes, block_bytes, layer_offset;
    mp_cu_work work;
} mp_cu_store;
/* Bias and norm on q, k, v where given; k turned by the row's position; k and v to the row's slot. qkv and q have
 * n_rows rows; of those from counts->n_rows on nothing is written. */
cudaError_t mp_cu_store_rows(const mp_cu_store *s, uint32_t n_rows, cudaStream_t stream);

/* g[r, i] = silu(gu[r, i]) * gu[r, n_ff + i]; gu bf16 [rows, 2 n_ff], g [rows, n_ff]. */
cudaError_t mp_cu_swiglu(uint32_t n_rows, const mp_bf16 *gu, uint32_t n_ff, mp_cu_matrix g, uint32_t code,
                         cudaStream_t stream);
/* x bf16 [rows, n] in e4m3: a row's scale is its largest magnitude / 448 (of 1e-30 at least), codes are to nearest
 * even. Where norm and swiglu write codes they are those of their bf16 results. n a multiple of 8, at most
 * MP_CU_MAX_QUANTIZED. */
#define MP_CU_MAX_QUANTIZED 32768u
cudaError_t mp_cu_quantize(uint32_t n_rows, const mp_bf16 *x, uint32_t n, mp_cu_matrix out, cudaStream_t stream);

/* A part of a step's lists: from pinned host memory, which the kernel reads over the bus, to the device. */
typedef struct mp_cu_piece {
    const void *from; /* both start at multiples of 16 bytes */
    void *to;
    uint32_t n_words; /* of 4 bytes */
} mp_cu_piece;

enum { MP_CU_PIECES_MAX = 12 };

typedef struct mp_cu_pieces {
    uint32_t n;
    mp_cu_piece pieces[MP_CU_PIECES_MAX];
} mp_cu_pieces;

/* Copies all pieces in one launch. */
cudaError_t mp_cu_copy_pieces(const mp_cu_pieces *p, cudaStream_t stream);
/* Zeroes pages; n from device memory, at most max_pages. */
cudaError_t mp_cu_zero_pages(const uint32_t *pages, const uint32_t *n, uint32_t max_pages, uint8_t *slab,
                             size_t page_bytes, cudaStream_t stream);

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* dst bf16 [n] = dequantized GGUF blocks (type: mp_dtype); n is a multiple of the type's block length. */
cudaError_t mp_cu_dequantize(uint32_t type, const void *src, mp_bf16 *dst, size_t n, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
