/* Random attention problems for the CUDA kernels: built on the host, uploaded, and solved again there in double.
 *
 * A world has sequences with rows at the end of their private streams, and cells that several sequences read at
 * different bases. The same rows are there as decode work (items, readers, folds) and as prefill work (blocks, refs),
 * so both must give the bits that cuda_world_expect approximates. Pages are of two layers and lie in random order; the
 * kernels get the second. What no cell uses is NaN: a page, the other layer, slots behind a cell's last token in its
 * last page. An error of CUDA or of memory ends the program with a message.
 *
 * Typical use:  cuda_world_open(&spec, &w); mp_cu_attend_open(0); cuda_world_poison(w);
 *               mp_cu_attend_decode(cuda_world_attend(w), 0);
 *               cuda_world_read(w, out); cuda_world_error(w, out, &worst); cuda_world_close(w); */
#ifndef MEPIC_TESTS_SUPPORT_CUDA_WORLD_H
#define MEPIC_TESTS_SUPPORT_CUDA_WORLD_H

#include "backend/cuda/kernels.h"

typedef struct cuda_world_spec {
    uint64_t seed;
    uint32_t n_heads, n_kv_heads, head_dim, page_size;
    uint32_t n_pairs; /* dimensions turned / 2 */
    bool halves;
    float magnitude;         /* 0: 1 */
    uint32_t n_sequences;
    uint32_t seq_rows;       /* rows of each sequence, consecutive, at the end of its private stream */
    uint32_t private_tokens; /* of each sequence, the rows among them: up to this many, at least half of it */
    uint32_t n_shared;       /* cells that sequences share */
    uint32_t n_refs;         /* of them, read by each sequence; at most n_shared */
    uint32_t cell_tokens;    /* of a shared cell at most, of private ones but the last; 0: MP_CU_CELL_TOKENS */
    uint32_t max_readers;    /* of an item, 0: no limit */
    uint32_t block_rows;     /* rows of a prefill block; 0: 16 */
    bool plain;              /* no masks and windows, all shared tokens before all rows */
    bool fp8;                /* pages of fp8; what is expected is of the numbers as they are read */
    bool biased;             /* of fp8: keys lie there without their bias */
} cuda_world_spec;

typedef struct cuda_world cuda_world;

/* True when there is a device that the kernels run on; mp_cu_device.code. */
bool cuda_world_device(uint32_t *arch);
void cuda_world_open(const cuda_world_spec *spec, cuda_world **out);
void cuda_world_close(cuda_world *w);

/* Device pointers of this world, and arch of the device: lower it to take the general kernels. Borrowed. */
mp_cu_attend *cuda_world_attend(cuda_world *w);
uint32_t cuda_world_rows(const cuda_world *w);
/* Items of at most max_readers (0: no limit) in a new random order, readers shuffled: the results must not change. */
void cuda_world_regroup(cuda_world *w, uint32_t max_readers);

/* Fills outputs and partial states with NaN. */
void cuda_world_poison(cuda_world *w);
/* Waits for the device; the outputs, bf16 [rows, n_heads * head_dim]. Fails when a work counter is not 0. */
void cuda_world_read(cuda_world *w, uint16_t *out);
/* Outputs in double [rows, n_heads * head_dim]; computed at the first call, by all processors; the world's. */
const double *cuda_world_expect(cuda_world *w);
/* ||out - expected|| / ||expected|| over everything; *worst: the largest of one (row, head). NaN if there is one. */
double cuda_world_error(cuda_world *w, const uint16_t *out, double *worst);
/* Makes NaN of keys, values or both in the private cells of a sequence, and says what that is to each row. */
enum { CUDA_SPOIL_KEYS = 1, CUDA_SPOIL_VALUES = 2 };
typedef enum cuda_world_touch {
    CUDA_WORLD_UNTOUCHED, /* of another sequence: must have the same bits */
    CUDA_WORLD_BESIDE,    /* of the sequence, but sees none of it: anything */
    CUDA_WORLD_SEES,      /* must be NaN, all of it */
} cuda_world_touch;
void cuda_world_spoil(cuda_world *w, uint32_t sequence, uint32_t kinds, cuda_world_touch *touched); /* [rows] */
/* Whether outputs before and after are so; else a line on stderr. */
bool cuda_world_contained(const cuda_world *w, const cuda_world_touch *touched, const uint16_t *before,
                          const uint16_t *after);

/* Prefill blocks again, with this many rows each. */
void cuda_world_reblock(cuda_world *w, uint32_t block_rows);

#endif
