/* Sixteen lanes, four ways: the vocabulary the CPU kernels are written in.
 *
 * A kernel file is compiled once per instruction set (CMakeLists.txt of this folder), each time with one of
 * MP_ISA_AVX512VNNI, MP_ISA_AVX512, MP_ISA_AVX2 or none (portable) defined, and its external names pass through
 * MP_ISA(name). The same source gives the same order of operations everywhere; integer results are equal on every
 * instruction set, and floating ones up to the fused multiply-add, which the portable set does not use.
 *
 *   v16f  16 floats      v16i  16 int32      v32w  32 int16, as 16 lanes of one pair each */
#ifndef MEPIC_BACKEND_CPU_SIMD_H
#define MEPIC_BACKEND_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MP_ISA_JOIN2(name, isa) name##_##isa
#define MP_ISA_JOIN(name, isa) MP_ISA_JOIN2(name, isa)
#if defined(MP_ISA_AVX512VNNI)
#define MP_ISA(name) MP_ISA_JOIN(name, avx512vnni)
#elif defined(MP_ISA_AVX512)
#define MP_ISA(name) MP_ISA_JOIN(name, avx512)
#elif defined(MP_ISA_AVX2)
#define MP_ISA(name) MP_ISA_JOIN(name, avx2)
#else
#define MP_ISA(name) MP_ISA_JOIN(name, portable)
#endif

#define MP_INLINE static inline __attribute__((always_inline, unused))

#if defined(MP_ISA_AVX512VNNI) || defined(MP_ISA_AVX512)
#include <immintrin.h>

typedef __m512 v16f;
typedef __m512i v16i;
typedef __m512i v32w;

MP_INLINE v16f v_zero(void) { return _mm512_setzero_ps(); }
MP_INLINE v16f v_set(float x) { return _mm512_set1_ps(x); }
MP_INLINE v16f v_load(const float *p) { return _mm512_loadu_ps(p); }
MP_INLINE void v_store(float *p, v16f a) { _mm512_storeu_ps(p, a); }
MP_INLINE v16f v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
MP_INLINE v16f v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
MP_INLINE v16f v_add(v16f a, v16f b) { return _mm512_add_ps(a, b); }
MP_INLINE v16f v_sub(v16f a, v16f b) { return _mm512_sub_ps(a, b); }
MP_INLINE v16f v_mul(v16f a, v16f b) { return _mm512_mul_ps(a, b); }
MP_INLINE v16f v_div(v16f a, v16f b) { return _mm512_div_ps(a, b); }
MP_INLINE v16f v_fma(v16f a, v16f b, v16f c) { return _mm512_fmadd_ps(a, b, c); }
MP_INLINE v16f v_max(v16f a, v16f b) { return _mm512_max_ps(a, b); }
MP_INLINE v16f v_min(v16f a, v16f b) { return _mm512_min_ps(a, b); }
MP_INLINE v16f v_round(v16f a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* Lanes whose bit is set come from a, the others from b. */
MP_INLINE v16f v_select(uint16_t mask, v16f a, v16f b) { return _mm512_mask_blend_ps(mask, b, a); }
/* Lanes of a where x >= bound, 0 elsewhere. */
MP_INLINE v16f v_keep_ge(v16f a, v16f x, v16f bound) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), a);
}
MP_INLINE void v_store_f16(uint16_t *p, v16f a) { /* to nearest even */
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* 2^n for integral n in [-126, 127]. */
MP_INLINE v16f v_exp2i(v16f n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

MP_INLINE v16i i_zero(void) { return _mm512_setzero_si512(); }
MP_INLINE v16i i_set(int32_t x) { return _mm512_set1_epi32(x); }
MP_INLINE v16i i_load(const int32_t *p) { return _mm512_loadu_si512(p); }
MP_INLINE void i_store(int32_t *p, v16i a) { _mm512_storeu_si512(p, a); }
MP_INLINE v16i i_add(v16i a, v16i b) { return _mm512_add_epi32(a, b); }
MP_INLINE v16i i_sub(v16i a, v16i b) { return _mm512_sub_epi32(a, b); }
MP_INLINE v16i i_mul(v16i a, v16i b) { return _mm512_mullo_epi32(a, b); }
#define i_sll(a, n) _mm512_slli_epi32((a), (n)) /* n is a constant */
MP_INLINE v16f i_to_f(v16i a) { return _mm512_cvtepi32_ps(a); }
MP_INLINE v16i f_to_i(v16f a) { return _mm512_cvtps_epi32(a); } /* to nearest, ties to even */
MP_INLINE v16i i_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
MP_INLINE v16i i_load_s8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
/* Sixteen int32 that fit int16, stored as int16. */
MP_INLINE void i_store_s16(int16_t *p, v16i a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }

MP_INLINE v32w w_load(const void *p) { return _mm512_loadu_si512(p); }
MP_INLINE v32w w_set(int16_t x) { return _mm512_set1_epi16(x); }
MP_INLINE v32w w_and(v32w a, v32w b) { return _mm512_and_si512(a, b); }
MP_INLINE v32w w_or(v32w a, v32w b) { return _mm512_or_si512(a, b); }
MP_INLINE v32w w_sub(v32w a, v32w b) { return _mm512_sub_epi16(a, b); }
MP_INLINE v32w w_or_and(v32w a, v32w b, v32w c) { return _mm512_ternarylogic_epi32(a, b, c, 0xF8); } /* a | (b & c) */
#define w_srl(a, n) _mm512_srli_epi16((a), (n)) /* n is a constant */
#define w_sll(a, n) _mm512_slli_epi16((a), (n))
#define w_sra(a, n) _mm512_srai_epi16((a), (n))
/* Each lane: acc + w.lo * x[0] + w.hi * x[1], exactly. */
MP_INLINE v16i w_dot(v16i acc, v32w w, const int16_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
#if defined(MP_ISA_AVX512VNNI)
    return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(pair));
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, _mm512_set1_epi32(pair)));
#endif
}

#elif defined(MP_ISA_AVX2)
#include <immintrin.h>

typedef struct { __m256 a, b; } v16f;
typedef struct { __m256i a, b; } v16i;
typedef v16i v32w;

MP_INLINE v16f v_zero(void) { return (v16f){ _mm256_setzero_ps(), _mm256_setzero_ps() }; }
MP_INLINE v16f v_set(float x) { return (v16f){ _mm256_set1_ps(x), _mm256_set1_ps(x) }; }
MP_INLINE v16f v_load(const float *p) { return (v16f){ _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) }; }
MP_INLINE void v_store(float *p, v16f x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
MP_INLINE v16f v_load_f16(const uint16_t *p) {
    return (v16f){ _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))) };
}
MP_INLINE __m256 v_load_bf16_half(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
MP_INLINE v16f v_load_bf16(const uint16_t *p) { return (v16f){ v_load_bf16_half(p), v_load_bf16_half(p + 8) }; }
MP_INLINE v16f v_add(v16f x, v16f y) { return (v16f){ _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b) }; }
MP_INLINE v16f v_sub(v16f x, v16f y) { return (v16f){ _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b) }; }
MP_INLINE v16f v_mul(v16f x, v16f y) { return (v16f){ _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b) }; }
MP_INLINE v16f v_div(v16f x, v16f y) { return (v16f){ _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b) }; }
MP_INLINE v16f v_fma(v16f x, v16f y, v16f z) {
    return (v16f){ _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b) };
}
MP_INLINE v16f v_max(v16f x, v16f y) { return (v16f){ _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b) }; }
MP_INLINE v16f v_min(v16f x, v16f y) { return (v16f){ _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b) }; }
MP_INLINE v16f v_round(v16f x) {
    return (v16f){ _mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) };
}
MP_INLINE __m256 v_select_half(unsigned mask, __m256 a, __m256 b) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(on));
}
MP_INLINE v16f v_select(uint16_t mask, v16f x, v16f y) {
    return (v16f){ v_select_half(mask & 255u, x.a, y.a), v_select_half(mask >> 8, x.b, y.b) };
}
MP_INLINE v16f v_keep_ge(v16f v, v16f x, v16f bound) {
    return (v16f){ _mm256_and_ps(v.a, _mm256_cmp_ps(x.a, bound.a, _CMP_GE_OQ)),
                   _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, bound.b, _CMP_GE_OQ)) };
}
MP_INLINE void v_store_f16(uint16_t *p, v16f x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MP_INLINE __m256 v_exp2i_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
MP_INLINE v16f v_exp2i(v16f n) { return (v16f){ v_exp2i_half(n.a), v_exp2i_half(n.b) }; }

MP_INLINE v16i i_zero(void) { return (v16i){ _mm256_setzero_si256(), _mm256_setzero_si256() }; }
MP_INLINE v16i i_set(int32_t x) { return (v16i){ _mm256_set1_epi32(x), _mm256_set1_epi32(x) }; }
MP_INLINE v16i i_load(const int32_t *p) {
    return (v16i){ _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8)) };
}
MP_INLINE void i_store(int32_t *p, v16i x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)(p + 8), x.b);
}
MP_INLINE v16i i_add(v16i x, v16i y) { return (v16i){ _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b) }; }
MP_INLINE v16i i_sub(v16i x, v16i y) { return (v16i){ _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b) }; }
MP_INLINE v16i i_mul(v16i x, v16i y) { return (v16i){ _mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b) }; }
#define i_sll(x, n) ((v16i){ _mm256_slli_epi32((x).a, (n)), _mm256_slli_epi32((x).b, (n)) })
MP_INLINE v16f i_to_f(v16i x) { return (v16f){ _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b) }; }
MP_INLINE v16i f_to_i(v16f x) { return (v16i){ _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b) }; }
MP_INLINE v16i i_load_u8(const uint8_t *p) {
    return (v16i){ _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                   _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))) };
}
MP_INLINE v16i i_load_s8(const int8_t *p) {
    return (v16i){ _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                   _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))) };
}
MP_INLINE void i_store_s16(int16_t *p, v16i x) {
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8));
}

MP_INLINE v32w w_load(const void *p) {
    return (v32w){ _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1) };
}
MP_INLINE v32w w_set(int16_t x) { return (v32w){ _mm256_set1_epi16(x), _mm256_set1_epi16(x) }; }
MP_INLINE v32w w_and(v32w x, v32w y) { return (v32w){ _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b) }; }
MP_INLINE v32w w_or(v32w x, v32w y) { return (v32w){ _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b) }; }
MP_INLINE v32w w_sub(v32w x, v32w y) { return (v32w){ _mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b) }; }
MP_INLINE v32w w_or_and(v32w x, v32w y, v32w z) { return w_or(x, w_and(y, z)); } /* x | (y & z) */
#define w_srl(x, n) ((v32w){ _mm256_srli_epi16((x).a, (n)), _mm256_srli_epi16((x).b, (n)) })
#define w_sll(x, n) ((v32w){ _mm256_slli_epi16((x).a, (n)), _mm256_slli_epi16((x).b, (n)) })
#define w_sra(x, n) ((v32w){ _mm256_srai_epi16((x).a, (n)), _mm256_srai_epi16((x).b, (n)) })
MP_INLINE v16i w_dot(v16i acc, v32w w, const int16_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    __m256i p = _mm256_set1_epi32(pair);
    return (v16i){ _mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, p)),
                   _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, p)) };
}

#else /* portable: the vector types of GCC and Clang, which become whatever the target has */
#include "model/dtype.h"

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef int16_t v32w __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v32u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef int16_t v16s __attribute__((vector_size(32)));
typedef uint8_t v16b __attribute__((vector_size(16)));
typedef int8_t v16c __attribute__((vector_size(16)));

MP_INLINE v16f v_blend(v16i mask, v16f a, v16f b) { return (v16f)(((v16i)a & mask) | ((v16i)b & ~mask)); }
MP_INLINE v16f v_zero(void) { return (v16f){ 0 }; }
MP_INLINE v16f v_set(float x) { return x - (v16f){ 0 }; } /* keeps -0 */
MP_INLINE v16f v_load(const float *p) { v16f r; memcpy(&r, p, sizeof r); return r; }
MP_INLINE void v_store(float *p, v16f a) { memcpy(p, &a, sizeof a); }
MP_INLINE v16u u_load_u16(const uint16_t *p) {
    v16h h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, v16u);
}
MP_INLINE v16f v_load_bf16(const uint16_t *p) { return (v16f)(u_load_u16(p) << 16); }
/* Exponent and fraction go to their places; a product moves the exponent's bias and makes subnormals normal. */
MP_INLINE v16f v_load_f16(const uint16_t *p) {
    v16u h = u_load_u16(p), sign = (h & 0x8000u) << 16;
    v16i is_special = (v16i)((h & 0x7c00u) == 0x7c00u);
    v16f finite = (v16f)((h & 0x7fffu) << 13) * 0x1p112f;
    return (v16f)((v16u)finite | ((v16u)is_special & 0x7f800000u) | sign);
}
MP_INLINE v16f v_add(v16f a, v16f b) { return a + b; }
MP_INLINE v16f v_sub(v16f a, v16f b) { return a - b; }
MP_INLINE v16f v_mul(v16f a, v16f b) { return a * b; }
MP_INLINE v16f v_div(v16f a, v16f b) { return a / b; }
MP_INLINE v16f v_fma(v16f a, v16f b, v16f c) { return a * b + c; }
MP_INLINE v16f v_max(v16f a, v16f b) { return v_blend(a > b, a, b); }
MP_INLINE v16f v_min(v16f a, v16f b) { return v_blend(a < b, a, b); }
/* Adding 1.5 * 2^23 leaves no bits for a fraction; from 2^22 on numbers stay as they are, nearly integral. */
MP_INLINE v16f v_round(v16f a) {
    v16f r = (a + 12582912.0f) - 12582912.0f;
    return v_blend((a < 4194304.0f) & (a > -4194304.0f), r, a);
}
MP_INLINE v16f v_select(uint16_t mask, v16f a, v16f b) {
    const v16i bit = { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768 };
    return v_blend((bit & (int32_t)mask) != 0, a, b);
}
MP_INLINE v16f v_keep_ge(v16f a, v16f x, v16f bound) { return (v16f)((v16i)a & (x >= bound)); }
MP_INLINE void v_store_f16(uint16_t *p, v16f a) {
    for (int i = 0; i < 16; i++) p[i] = mp_f32_to_f16(a[i]);
}
MP_INLINE v16f v_exp2i(v16f n) { return (v16f)((__builtin_convertvector(n, v16i) + 127) << 23); }

MP_INLINE v16i i_zero(void) { return (v16i){ 0 }; }
MP_INLINE v16i i_set(int32_t x) { return x + (v16i){ 0 }; }
MP_INLINE v16i i_load(const int32_t *p) { v16i r; memcpy(&r, p, sizeof r); return r; }
MP_INLINE void i_store(int32_t *p, v16i a) { memcpy(p, &a, sizeof a); }
MP_INLINE v16i i_add(v16i a, v16i b) { return a + b; }
MP_INLINE v16i i_sub(v16i a, v16i b) { return a - b; }
MP_INLINE v16i i_mul(v16i a, v16i b) { return a * b; }
MP_INLINE v16i i_sll(v16i a, int n) { return (v16i)((v16u)a << n); }
MP_INLINE v16f i_to_f(v16i a) { return __builtin_convertvector(a, v16f); }
MP_INLINE v16i f_to_i(v16f a) { return __builtin_convertvector(v_round(a), v16i); }
MP_INLINE v16i i_load_u8(const uint8_t *p) {
    v16b b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, v16i);
}
MP_INLINE v16i i_load_s8(const int8_t *p) {
    v16c c;
    memcpy(&c, p, sizeof c);
    return __builtin_convertvector(c, v16i);
}
MP_INLINE void i_store_s16(int16_t *p, v16i a) {
    v16s s = __builtin_convertvector(a, v16s);
    memcpy(p, &s, sizeof s);
}

MP_INLINE v32w w_load(const void *p) { v32w r; memcpy(&r, p, sizeof r); return r; }
MP_INLINE v32w w_set(int16_t x) { return x + (v32w){ 0 }; }
MP_INLINE v32w w_and(v32w a, v32w b) { return a & b; }
MP_INLINE v32w w_or(v32w a, v32w b) { return a | b; }
MP_INLINE v32w w_sub(v32w a, v32w b) { return a - b; }
MP_INLINE v32w w_or_and(v32w a, v32w b, v32w c) { return a | (b & c); }
MP_INLINE v32w w_srl(v32w a, int n) { return (v32w)((v32u)a >> n); }
MP_INLINE v32w w_sll(v32w a, int n) { return (v32w)((v32u)a << n); }
MP_INLINE v32w w_sra(v32w a, int n) { return a >> n; }
/* Little-endian: the first word of a pair is the low half of its lane. */
MP_INLINE v16i w_dot(v16i acc, v32w w, const int16_t *x) {
    v16i low = (v16i)((v16u)w << 16) >> 16, high = (v16i)w >> 16;
    return acc + low * x[0] + high * x[1];
}
#endif

/* The lanes' sum and maximum, always in the same order: pairs at distance 8, 4, 2, 1. */
#if defined(MP_ISA_AVX512) || defined(MP_ISA_AVX512VNNI) || defined(MP_ISA_AVX2)
#if defined(MP_ISA_AVX2)
MP_INLINE __m256 v_low(v16f x) { return x.a; }
MP_INLINE __m256 v_high(v16f x) { return x.b; }
MP_INLINE __m256i i_low(v16i x) { return x.a; }
MP_INLINE __m256i i_high(v16i x) { return x.b; }
#else
MP_INLINE __m256 v_low(v16f x) { return _mm512_castps512_ps256(x); }
MP_INLINE __m256 v_high(v16f x) { return _mm512_extractf32x8_ps(x, 1); }
MP_INLINE __m256i i_low(v16i x) { return _mm512_castsi512_si256(x); }
MP_INLINE __m256i i_high(v16i x) { return _mm512_extracti32x8_epi32(x, 1); }
#endif
MP_INLINE float v_sum(v16f x) {
    __m256 e = _mm256_add_ps(v_low(x), v_high(x));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
MP_INLINE float v_top(v16f x) {
    __m256 e = _mm256_max_ps(v_low(x), v_high(x));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
MP_INLINE int32_t i_sum(v16i x) {
    __m256i e = _mm256_add_epi32(i_low(x), i_high(x));
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
#else
MP_INLINE float v_sum(v16f a) {
    for (int d = 8; d > 0; d /= 2) {
        for (int i = 0; i < d; i++) a[i] += a[i + d];
    }
    return a[0];
}
MP_INLINE float v_top(v16f a) {
    for (int d = 8; d > 0; d /= 2) {
        for (int i = 0; i < d; i++) a[i] = a[i] > a[i + d] ? a[i] : a[i + d];
    }
    return a[0];
}
MP_INLINE int32_t i_sum(v16i a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += a[i];
    return sum;
}
#endif

/* e^x: Cody and Waite reduction by ln 2 in two parts, then a polynomial of degree 6. Relative error under 2e-7 for x in
 * [-87, 88]; below, 0. */
MP_INLINE v16f v_exp(v16f x) {
    v16f clamped = v_min(v_max(x, v_set(-87.0f)), v_set(88.0f));
    v16f n = v_round(v_mul(clamped, v_set(1.44269504088896341f)));
    v16f r = v_fma(n, v_set(-0.693359375f), clamped);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    v16f p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    v16f e = v_add(v_fma(v_mul(r, r), p, r), v_set(1.0f));
    e = v_mul(e, v_exp2i(n));
    /* lanes under the range are exact zeros, so a masked key has no weight at all */
    return v_keep_ge(e, x, v_set(-87.0f));
}

#endif
