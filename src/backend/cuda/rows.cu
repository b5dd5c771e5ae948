/* What happens to single rows between the matrix products. A row's numbers come from that row alone, and every sum has
 * one order that depends on the row's length only, so a row has the same bits in any company and in any bucket.
 *
 * All of it is bound by memory: 16 bytes a thread and access, every value read once; with few rows by latency: norm,
 * store and SwiGLU begin before the kernels in front have ended (early.cuh). Rows behind a step's last one hold
 * whatever they held; what would write outside the activations for them (pages) does nothing. */
#include "backend/cuda/kernels.h"

#include <cuda_fp8.h>
#include <string.h>

#include "backend/cuda/early.cuh"
#include "backend/cuda/fold.cuh"
#include "backend/cuda/kv8.cuh"

#define WARP 32u
#define UNIT 8u /* bf16 values in 16 bytes */

static __device__ __forceinline__ void unpack(uint4 u, float *x) {
    const uint32_t w[4] = { u.x, u.y, u.z, u.w };
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(w[i] << 16);
        x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ uint4 pack(const float *x) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        memcpy(&w[i], &pair, sizeof w[i]);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

/* A grid's first dimension. */
static bool fits_grid(size_t blocks) {
    return blocks <= INT32_MAX;
}

/* ---- Embedding --------------------------------------------------------------------------------------------------- */

static __global__ void embed(mp_cu_work work, const int32_t *sampled, const uint4 *table, uint32_t n_units, float4 *x) {
    uint32_t r = blockIdx.x;
    mp_let_next_begin();
    if (r >= work.counts->n_rows) return;
    int32_t token = work.rows[r].token;
    if (token < 0) token = sampled[-1 - token];
    const uint4 *from = table + (size_t)token * n_units;
    for (uint32_t u = threadIdx.x; u < n_units; u += blockDim.x) {
        float v[UNIT];
        unpack(from[u], v);
        float4 *to = x + ((size_t)r * n_units + u) * 2;
        to[0] = make_float4(v[0], v[1], v[2], v[3]);
        to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

cudaError_t mp_cu_embed(const mp_cu_work *work, uint32_t n_rows, const int32_t *sampled, const mp_bf16 *table,
                        uint32_t n_embd, float *x, cudaStream_t stream) {
    if (n_rows == 0) return cudaSuccess;
    if (n_embd % UNIT) return cudaErrorInvalidValue;
    embed<<<n_rows, 128, 0, stream>>>(*work, sampled, (const uint4 *)table, n_embd / UNIT, (float4 *)x);
    return cudaGetLastError();
}

/* ---- A row a block ----------------------------------------------------------------------------------------------- */

/* Sum or maximum (of what is not negative) over a warp and over a block of up to 1024 threads, in one order. `part` has
 * 32 places, for one call. */
template <bool MOST> static __device__ __forceinline__ float warp_fold(float x) {
#pragma unroll
    for (uint32_t step = WARP / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = MOST ? fmaxf(x, other) : x + other;
    }
    return x;
}

template <bool MOST> static __device__ __forceinline__ float block_fold(float x, float *part) {
    x = warp_fold<MOST>(x);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_fold<MOST>(threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0.0f);
}

static __device__ __forceinline__ uint2 codes_of(const float *x, float inverse) {
    uint32_t w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float2 a = make_float2(x[4 * i] * inverse, x[4 * i + 1] * inverse),
                     b = make_float2(x[4 * i + 2] * inverse, x[4 * i + 3] * inverse);
        w[i] = __nv_cvt_float2_to_fp8x2(a, __NV_SATFINITE, __NV_E4M3) |
               (uint32_t)__nv_cvt_float2_to_fp8x2(b, __NV_SATFINITE, __NV_E4M3) << 16;
    }
    return make_uint2(w[0], w[1]);
}

/* Row r of a product's input, of which a thread has units threadIdx.x, + blockDim.x, ...: those past the row's end are
 * zero. All threads of the block take part. */
template <uint32_t N, bool CODES>
static __device__ __forceinline__ void put_row(mp_cu_matrix out, uint32_t r, uint32_t n_units, const float (*v)[UNIT]) {
    __shared__ float part[WARP];
    uint4 units[N];
#pragma unroll
    for (uint32_t i = 0; i < N; i++) units[i] = pack(v[i]);
    float most = 0.0f, inverse = 0.0f, x[UNIT];
    if (CODES) {
#pragma unroll
        for (uint32_t i = 0; i < N; i++) {
            unpack(units[i], x);
#pragma unroll
            for (uint32_t j = 0; j < UNIT; j++) most = fmaxf(most, fabsf(x[j]));
        }
        most = fmaxf(block_fold<true>(most, part), 1e-30f);
        inverse = __fdiv_rn(MP_CU_E4M3_MAX, most);
        if (threadIdx.x == 0) out.scales[r] = __fdiv_rn(most, MP_CU_E4M3_MAX);
    }
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        uint32_t u = i * blockDim.x + threadIdx.x;
        if (u >= n_units) continue;
        if (CODES) {
            unpack(units[i], x);
            ((uint2 *)out.data)[(size_t)r * n_units + u] = codes_of(x, inverse);
        } else {
            ((uint4 *)out.data)[(size_t)r * n_units + u] = units[i];
        }
    }
}

/* Threads a block has where each holds n of a row's units. */
static uint32_t threads_for(uint32_t n_units, uint32_t n) {
    return ((n_units + n - 1) / n + WARP - 1) / WARP * WARP;
}

/* ---- Norm -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void load_unit(const float4 *from, float *x) {
    float4 a = make_float4(0, 0, 0, 0), b = a;
    if (from) {
        a = from[0];
        b = from[1];
    }
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

/* A row a block; a thread holds N units of 8 values. */
template <uint32_t N, bool CODES>
static __global__ void __launch_bounds__(1024)
    norm(const uint32_t *rows, const uint32_t *n_real, const float4 *x, const float4 *weight, float eps,
         uint32_t n_units, mp_cu_matrix h) {
    __shared__ float part[WARP];
    float v[N][UNIT], w[N][UNIT], squares = 0.0f;
    mp_let_next_begin();
    bool real = !n_real || blockIdx.x < *n_real;
    size_t from = real && rows ? rows[blockIdx.x] : blockIdx.x;
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        uint32_t u = i * blockDim.x + threadIdx.x;
        load_unit(u < n_units ? weight + u * 2 : NULL, w[i]);
    }
    mp_wait_for_inputs();
    if (!real) return;
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        uint32_t u = i * blockDim.x + threadIdx.x;
        load_unit(u < n_units ? x + (from * n_units + u) * 2 : NULL, v[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) squares = __fmaf_rn(v[i][j], v[i][j], squares);
    }
    float scale = 1.0f / sqrtf(block_fold<false>(squares, part) / (float)(n_units * UNIT) + eps);
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) v[i][j] = v[i][j] * scale * w[i][j];
    }
    put_row<N, CODES>(h, blockIdx.x, n_units, v);
}

cudaError_t mp_cu_norm(uint32_t n_rows, const uint32_t *rows, const uint32_t *n_real, const float *x,
                       const float *weight, float eps, uint32_t n_embd, mp_cu_matrix h, uint32_t code,
                       cudaStream_t stream) {
    if (n_rows == 0) return cudaSuccess;
    uint32_t n_units = n_embd / UNIT;
    if (n_embd % UNIT || n_units > 4 * 1024) return cudaErrorInvalidValue;
    uint32_t n = n_units <= 1024 ? 1 : 4;
    auto kernel = n == 1 ? norm<1, false> : norm<4, false>;
    if (h.scales) kernel = n == 1 ? norm<1, true> : norm<4, true>;
    return mp_launch_early(code, kernel, n_rows, threads_for(n_units, n), 0, stream, rows, n_real, (const float4 *)x,
                           (const float4 *)weight, eps, n_units, h);
}

/* ---- Bias, norm of heads, rotation, store ------------------------------------------------------------------------ */

/* What is too large for bf16 becomes its largest number: an infinity would make NaN of a masked key. NaN stays. */
static __device__ __forceinline__ float saturate(float x) {
    const float most = __uint_as_float(0x7f7f0000u);
    return x > most ? most : x < -most ? -most : x;
}

/* The pair that column d belongs to, and whether it is its second; d < 2 * n_pairs. */
static __device__ __forceinline__ uint32_t pair_of(const mp_cu_rope &rope, uint32_t d, bool *second) {
    *second = rope.halves ? d >= rope.n_pairs : d & 1;
    return rope.halves ? (*second ? d - rope.n_pairs : d) : d / 2;
}

/* Turns the head in `head` (shared memory), columns c .. c + 7. turns: NULL, or of their pairs. */
static __device__ __forceinline__ void turn(const mp_cu_rope &rope, const float *head, uint32_t c, int32_t position,
                                            const uint64_t *turns, float *y) {
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) {
        uint32_t d = c + j;
        if (d >= 2 * rope.n_pairs) {
            y[j] = head[d];
            continue;
        }
        bool second;
        uint32_t pair = pair_of(rope, d, &second);
        float a = head[rope.halves ? pair : 2 * pair], b = head[rope.halves ? pair + rope.n_pairs : 2 * pair + 1];
        float2 cs = mp_turn(turns ? turns[j] : rope.turns[pair], position, rope.magnitude);
        float2 turned = mp_turned(a, b, cs);
        y[j] = second ? turned.y : turned.x;
    }
}

enum { STORE_THREADS = 128 };

/* Turns per position of the pairs of columns c .. c + 7, of the first n. */
static __device__ __forceinline__ void load_turns(const mp_cu_rope &rope, uint32_t c, uint32_t n, uint64_t *turns) {
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) {
        bool second;
        turns[j] = c + j < n ? rope.turns[pair_of(rope, c + j, &second)] : 0;
    }
}

static __device__ __forceinline__ bool has_nan(const float *x) {
    bool any = false;
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) any = any || x[j] != x[j];
    return any;
}

/* A NaN in a token's value becomes one in its key, and the value 0: rows that see the token end as NaN, and rows that
 * give it weight 0 do not. */
static __device__ __forceinline__ void keep_nan(bool is_v, bool in_value, float *x) {
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) {
        if (is_v) x[j] = x[j] == x[j] ? x[j] : 0.0f;
        else if (in_value) x[j] = __uint_as_float(0x7fc00000u);
    }
}

/* 8 columns of a head as fp8, by LANES threads with a head; lanes behind head_dim hold zeros. Only for a token that is
 * `here` something is written: to is its group, token its place there. */
template <uint32_t LANES>
static __device__ __forceinline__ void store_fp8(const float *v, uint32_t head_dim, uint8_t *to, uint32_t token,
                                                 bool is_v, int32_t angle, bool here) {
    uint32_t lane = threadIdx.x % LANES, top = 0;
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) top = max(top, __float_as_uint(v[j]) & 0x7fffffffu); /* NaN is above all */
#pragma unroll
    for (uint32_t step = LANES / 2; step > 0; step /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    uint32_t factor = mp_kv8_factor(top);
    uint2 codes = mp_kv8_codes(v, factor);
    /* Columns c and c + 8 are this lane's and its neighbour's: one takes the first four pairs, one the others. */
    uint32_t other = __shfl_xor_sync(0xffffffffu, lane % 2 ? codes.x : codes.y, 1);
    uint32_t low = lane % 2 ? other : codes.x, high = lane % 2 ? codes.y : other;
    codes = make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
    if (!here) return;
    uint8_t *marks = to + 8 * head_dim;
    *(uint2 *)((is_v ? marks + MP_CU_KV8_MARKS : to) + lane / 2 * 128 + token * 16 + lane % 2 * 8) = codes;
    if (lane) return;
    ((uint16_t *)marks)[(is_v ? 24 : 16) + token] = (uint16_t)factor;
    if (!is_v) ((int32_t *)marks)[token] = angle;
}

/* LANES neighbouring threads have a head of q, k or v, 8 columns each. LANES: a power of two, head_dim / 8 or more.
 * FEW rows wait for one load after the other, so what can be loaded is, first; many rows want few registers. */
template <uint32_t LANES, bool FEW, bool FP8>
static __global__ void __launch_bounds__(STORE_THREADS, FEW ? 1 : 16) store_rows(mp_cu_store s, uint32_t n_rows) {
    __shared__ float heads[STORE_THREADS / LANES][LANES * UNIT];
    uint32_t per_row = s.n_heads + 2 * s.n_kv_heads, lane = threadIdx.x % LANES, c = lane * UNIT;
    uint32_t unit = blockIdx.x * (STORE_THREADS / LANES) + threadIdx.x / LANES;
    uint32_t r = unit / per_row, h = unit % per_row;
    bool here = r < n_rows && c < s.head_dim, is_q = h < s.n_heads, is_v = h >= s.n_heads + s.n_kv_heads;
    float v[UNIT] = { 0 }, value[UNIT] = { 0 }; /* value: of a key's token */
    uint64_t turns[UNIT];
    size_t at = (size_t)h * s.head_dim + c;
    uint32_t turned = is_q || is_v ? 0 : 2 * s.rope.n_pairs; /* columns */
    size_t to_value = is_q || is_v ? 0 : (size_t)s.n_kv_heads * s.head_dim;
    const mp_bf16 *from = s.qkv + (size_t)r * per_row * s.head_dim + at;
    mp_let_next_begin();
    here = here && r < s.work.counts->n_rows;
    mp_cu_row row = {};
    if (FEW && here) load_turns(s.rope, c, turned, turns);
    if (FEW && here) row = s.work.rows[r];
    mp_wait_for_inputs();
    if (here) unpack(*(const uint4 *)from, v);
    if (here && to_value) unpack(*(const uint4 *)(from + to_value), value);
    if (here && s.bias) {
        bool add = !FP8 || is_q || is_v || !s.k_minus_bias;
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) {
            if (add) v[j] += s.bias[at + j];
            if (to_value) value[j] += s.bias[at + to_value + j];
        }
    }
    const float *weight = is_q ? s.q_norm : s.k_norm;
    if (s.q_norm || s.k_norm) { /* the same for the whole grid: everybody shuffles */
        float squares = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < UNIT; j++) squares = __fmaf_rn(v[j], v[j], squares);
#pragma unroll
        for (uint32_t step = LANES / 2; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
        float scale = 1.0f / sqrtf(squares / (float)s.head_dim + s.norm_eps);
        if (here && !is_v && weight) {
#pragma unroll
            for (uint32_t j = 0; j < UNIT; j++) v[j] = v[j] * scale * weight[c + j];
        }
    }
    if (here && is_q) *(uint4 *)(s.q + ((size_t)r * s.n_heads + h) * s.head_dim + c) = pack(v);
    float *head = heads[threadIdx.x / LANES];
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) head[c + j] = v[j];
    __syncwarp(); /* head is there; the vote orders no memory */
    uint32_t in_value = __ballot_sync(0xffffffffu, has_nan(value)) >> (threadIdx.x % WARP / LANES * LANES);
    bool spoiled = (in_value & (0xffffffffu >> (WARP - LANES))) != 0;
    here = here && !is_q;
    if (!FP8 && !here) return;
    if (!FEW && here) row = s.work.rows[r];
    uint32_t kv_head = h - s.n_heads - (is_v ? s.n_kv_heads : 0), token = row.slot % MP_CU_GROUP_TOKENS;
    uint8_t *to = s.slab + row.page * s.page_bytes + s.layer_offset + kv_head * s.block_bytes +
                  row.slot / MP_CU_GROUP_TOKENS * (FP8 ? 16 * s.head_dim + MP_CU_KV8_MARKS : 32 * s.head_dim);
    if (here && !is_v) turn(s.rope, head, c, row.position, FEW ? turns : NULL, v);
    if (FP8) { /* everybody shuffles */
        keep_nan(is_v, spoiled, v);
        store_fp8<LANES>(v, s.head_dim, to, token, is_v, row.position, here);
        return;
    }
    to += (is_v ? MP_CU_GROUP_TOKENS * s.head_dim * sizeof(mp_bf16) : 0) + mp_kv_offset(s.head_dim, token, c);
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) v[j] = saturate(v[j]);
    keep_nan(is_v, spoiled, v);
    *(uint4 *)to = pack(v);
}

template <bool FP8> static void (*store_kernel(uint32_t lanes, bool few))(mp_cu_store, uint32_t) {
    if (lanes == 8) return few ? store_rows<8, true, FP8> : store_rows<8, false, FP8>;
    if (lanes == 16) return few ? store_rows<16, true, FP8> : store_rows<16, false, FP8>;
    return few ? store_rows<32, true, FP8> : store_rows<32, false, FP8>;
}

cudaError_t mp_cu_store_rows(const mp_cu_store *s, uint32_t n_rows, cudaStream_t stream) {
    if (n_rows == 0) return cudaSuccess;
    if (s->head_dim % 16 || s->head_dim > 256) return cudaErrorInvalidValue;
    size_t heads = (size_t)n_rows * (s->n_heads + 2 * s->n_kv_heads);
    uint32_t lanes = s->head_dim <= 64 ? 8 : s->head_dim <= 128 ? 16 : 32;
    size_t grid = (heads * lanes + STORE_THREADS - 1) / STORE_THREADS;
    if (!fits_grid(grid) || heads > UINT32_MAX) return cudaErrorInvalidValue;
    bool few = n_rows <= 256;
    auto kernel = s->fp8 ? store_kernel<true>(lanes, few) : store_kernel<false>(lanes, few);
    return mp_launch_early(s->code, kernel, (uint32_t)grid, STORE_THREADS, 0, stream, *s, n_rows);
}

/* ---- SwiGLU, e4m3 and pages -------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void gate(uint4 g, uint4 u, float *y) {
    float b[UNIT];
    unpack(g, y);
    unpack(u, b);
#pragma unroll
    for (uint32_t j = 0; j < UNIT; j++) y[j] = __fdividef(y[j], 1.0f + __expf(-y[j])) * b[j];
}

/* Blocks of a row follow each other in a grid of one dimension: the others end at 65,535. */
static __global__ void swiglu(const uint4 *gu, uint32_t n_units, uint32_t blocks_a_row, uint4 *g) {
    size_t r = blockIdx.x / blocks_a_row;
    uint32_t u = blockIdx.x % blocks_a_row * blockDim.x + threadIdx.x;
    float y[UNIT];
    mp_let_next_begin();
    mp_wait_for_inputs();
    if (u >= n_units) return;
    const uint4 *row = gu + r * 2 * n_units;
    gate(row[u], row[n_units + u], y);
    g[r * n_units + u] = pack(y);
}

/* Rows in e4m3: x, or with GATED swiglu of it. */
template <uint32_t N, bool GATED>
static __global__ void __launch_bounds__(1024) quantize(const uint4 *x, uint32_t n_units, mp_cu_matrix out) {
    mp_let_next_begin(); /* a product fetches its weights */
    const uint4 zero = make_uint4(0, 0, 0, 0), *row = x + (size_t)blockIdx.x * n_units * (GATED ? 2 : 1);
    float v[N][UNIT];
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        uint32_t u = i * blockDim.x + threadIdx.x;
        bool here = u < n_units;
        if (GATED) {
            gate(here ? row[u] : zero, here ? row[n_units + u] : zero, v[i]);
        } else {
            unpack(here ? row[u] : zero, v[i]);
        }
    }
    put_row<N, true>(out, blockIdx.x, n_units, v);
}

template <bool GATED>
static cudaError_t quantize_rows(uint32_t n_rows, const mp_bf16 *x, uint32_t n, mp_cu_matrix out, cudaStream_t stream) {
    uint32_t n_units = n / UNIT, each = n_units <= 1024 ? 1 : n_units <= 2048 ? 2 : 4;
    if (n_rows == 0) return cudaSuccess;
    if (n % UNIT || n > MP_CU_MAX_QUANTIZED) return cudaErrorInvalidValue;
    auto kernel = each == 1 ? quantize<1, GATED> : each == 2 ? quantize<2, GATED> : quantize<4, GATED>;
    kernel<<<n_rows, threads_for(n_units, each), 0, stream>>>((const uint4 *)x, n_units, out);
    return cudaGetLastError();
}

cudaError_t mp_cu_quantize(uint32_t n_rows, const mp_bf16 *x, uint32_t n, mp_cu_matrix out, cudaStream_t stream) {
    return quantize_rows<false>(n_rows, x, n, out, stream);
}

cudaError_t mp_cu_swiglu(uint32_t n_rows, const mp_bf16 *gu, uint32_t n_ff, mp_cu_matrix g, uint32_t code,
                         cudaStream_t stream) {
    if (n_rows == 0) return cudaSuccess;
    if (g.scales) return quantize_rows<true>(n_rows, gu, n_ff, g, stream);
    uint32_t n_units = n_ff / UNIT, blocks_a_row = (n_units + 127) / 128;
    if (n_ff % UNIT || !fits_grid((size_t)blocks_a_row * n_rows)) return cudaErrorInvalidValue;
    return mp_launch_early(code, swiglu, blocks_a_row * n_rows, 128, 0, stream, (const uint4 *)gu, n_units,
                           blocks_a_row, (uint4 *)g.data);
}

/* All blocks walk over all pages: how many there are is not known when the grid is. */
static __global__ void zero_pages(const uint32_t *pages, const uint32_t *n, uint32_t max_pages, uint8_t *slab,
                                  size_t page_bytes) {
    size_t n_units = page_bytes / sizeof(uint4), total = (*n < max_pages ? *n : max_pages) * n_units;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < total; i += (size_t)gridDim.x * blockDim.x) {
        ((uint4 *)(slab + pages[i / n_units] * page_bytes))[i % n_units] = make_uint4(0, 0, 0, 0);
    }
}

cudaError_t mp_cu_zero_pages(const uint32_t *pages, const uint32_t *n, uint32_t max_pages, uint8_t *slab,
                             size_t page_bytes, cudaStream_t stream) {
    if (max_pages == 0) return cudaSuccess;
    if (page_bytes % sizeof(uint4)) return cudaErrorInvalidValue;
    size_t blocks = (max_pages * (page_bytes / sizeof(uint4)) + 1023) / 1024;
    zero_pages<<<blocks < 512 ? (uint32_t)blocks : 512, 256, 0, stream>>>(pages, n, max_pages, slab, page_bytes);
    return cudaGetLastError();
}

cudaError_t mp_cu_kernels_arch(uint32_t *arch) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, zero_pages);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* a build without code for a device is no fault of the device */
    } else {
        *arch = (uint32_t)attributes.ptxVersion;
    }
    return error;
}
