/* The left fold of a decode row's partial states, in the order of its cells. A thread has some columns of one head: 4,
 * and many states under way, while all threads fit the GPU at once (what counts is the time memory takes to answer);
 * else 8 and fewer (what counts is how many threads wait for it). */
#include "backend/cuda/attend_item.cuh"
#include "backend/cuda/early.cuh"

enum { THREADS = 128 };

template <int N> struct columns { /* of a partial state, f16 */
    uint2 x[N / 4];
};

template <int N>
static __device__ __forceinline__ void fold_slot(mp_running *state, float o[N], const columns<N> &bits, float2 ml) {
    if (!mp_saw(ml.y)) return;
    float keep, add;
    mp_fold(state, ml.x, ml.y, &keep, &add);
    const __half2 *x = (const __half2 *)bits.x;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float2 pair = __half22float2(x[i]);
        o[2 * i] = mp_fold_o(o[2 * i], keep, pair.x, add);
        o[2 * i + 1] = mp_fold_o(o[2 * i + 1], keep, pair.y, add);
    }
}

template <int N> static __device__ __forceinline__ columns<N> load(const uint16_t *from) {
    columns<N> c;
    if (N == 4) {
        c.x[0] = *(const uint2 *)from;
    } else {
        uint4 x = *(const uint4 *)from;
        c.x[0] = make_uint2(x.x, x.y);
        c.x[N / 4 - 1] = make_uint2(x.z, x.w);
    }
    return c;
}

/* N columns a thread, AHEAD states under way. */
template <int N, int AHEAD>
static __global__ void __launch_bounds__(THREADS) attend_fold(const __grid_constant__ mp_cu_attend a) {
    uint32_t units = a.head_dim / N, width = a.n_heads * units;
    uint32_t index = blockIdx.x * THREADS + threadIdx.x, i = index / width, in = index - i * width;
    mp_cu_fold fold = { 0, 0, 0 };
    bool there = i < a.work.counts->n_folds;
    if (there) fold = a.work.folds[i];
    mp_let_next_begin();
    mp_wait_for_inputs(); /* the decode kernel has ended; the lists were there before */
    if (!there) return;
    size_t step = (size_t)a.n_heads * a.head_dim;
    const uint16_t *partial = a.partial_o + fold.first_slot * step + in * N;
    const float2 *ml = (const float2 *)a.partial_ml + (size_t)fold.first_slot * a.n_heads + in / units;
    mp_running state = { 0.0f, 0.0f };
    float o[N] = { 0.0f };
    for (uint32_t s = 0; s < fold.n_slots; s += AHEAD) {
        columns<N> bits[AHEAD];
        float2 pair[AHEAD];
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++) {
            pair[k] = make_float2(0.0f, 0.0f);
            if (s + k < fold.n_slots) {
                pair[k] = ml[(size_t)(s + k) * a.n_heads];
                bits[k] = load<N>(partial + (s + k) * step);
            }
        }
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++) fold_slot<N>(&state, o, bits[k], pair[k]);
    }
    __nv_bfloat162 out[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        out[k] = __halves2bfloat162(mp_output(o[2 * k], state.l), mp_output(o[2 * k + 1], state.l));
    }
#pragma unroll
    for (int k = 0; k < N / 4; k++) *(uint2 *)(a.out + fold.row * step + in * N + 4 * k) = ((const uint2 *)out)[k];
}

template <int N, int AHEAD> static cudaError_t launch(const mp_cu_attend *a, cudaStream_t stream) {
    uint32_t threads = a->max_folds * a->n_heads * (a->head_dim / N);
    uint32_t blocks = (threads + THREADS - 1) / THREADS;
    return mp_launch_early(a->arch, attend_fold<N, AHEAD>, blocks, THREADS, 0, stream, *a);
}

cudaError_t mp_cu_attend_fold(const mp_cu_attend *a, cudaStream_t stream) {
    if (!a->max_folds) return cudaSuccess;
    bool at_once = a->max_folds * a->n_heads * (a->head_dim / 4) <= a->n_sm * 512;
    return at_once ? launch<4, 20>(a, stream) : launch<8, 8>(a, stream);
}
