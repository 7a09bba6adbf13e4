/* Vectors of floats, in the width of a level: 16 with AVX-512, 8 with AVX2, 4 with NEON.
 *
 * The kernels are written once with these types and functions. A source file of a level
 * (level_*.c) says by LEVEL_* macros what it may use, then includes the kernels.
 */

#ifndef LLMKIT_VECTORS_H
#define LLMKIT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Always inlined, because callers pass constants that unroll the loops. */
#define INLINE static inline __attribute__((always_inline))

#if defined(LEVEL_AVX512)
#include <immintrin.h>

enum { VECTOR_WIDTH = 16 };
typedef __m512 vfloat;
typedef __m512i vint;    /* 32-bit integers, or bytes */
typedef __mmask16 vmask; /* of each element: true or false */

INLINE vfloat v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vfloat x) { _mm512_storeu_ps(p, x); }
INLINE vfloat v_set(float x) { return _mm512_set1_ps(x); }
INLINE vfloat v_zero(void) { return _mm512_setzero_ps(); }
INLINE vfloat v_add(vfloat a, vfloat b) { return _mm512_add_ps(a, b); }
INLINE vfloat v_sub(vfloat a, vfloat b) { return _mm512_sub_ps(a, b); }
INLINE vfloat v_mul(vfloat a, vfloat b) { return _mm512_mul_ps(a, b); }
INLINE vfloat v_div(vfloat a, vfloat b) { return _mm512_div_ps(a, b); }
/* a b + c, a b - c and c - a b, rounded once. */
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vfloat v_fms(vfloat a, vfloat b, vfloat c) { return _mm512_fmsub_ps(a, b, c); }
INLINE vfloat v_fnma(vfloat a, vfloat b, vfloat c) { return _mm512_fnmadd_ps(a, b, c); }
/* Where one is NaN: b. */
INLINE vfloat v_min(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
INLINE vfloat v_max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
INLINE vfloat v_abs(vfloat x) { return _mm512_abs_ps(x); }
INLINE vfloat v_round(vfloat x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* The magnitude of a with the sign of b. */
INLINE vfloat v_copysign(vfloat a, vfloat b) {
    const __m512i sign_bit = _mm512_set1_epi32((int)0x80000000);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        sign_bit, _mm512_castps_si512(b), _mm512_castps_si512(a), 0xca));
}
INLINE vmask v_less(vfloat a, vfloat b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vmask v_less_equal(vfloat a, vfloat b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vmask v_is_negative(vfloat x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }
INLINE vmask v_both(vmask a, vmask b) { return a & b; }
/* yes where the mask is true, otherwise no. */
INLINE vfloat v_select(vmask mask, vfloat yes, vfloat no) {
    return _mm512_mask_blend_ps(mask, no, yes);
}
/* y 2^n, for whole n from -126 to 127; 0 where the mask is true, whatever n is. */
INLINE vfloat v_scale_unless(vmask zero, vfloat y, vfloat n) {
    return _mm512_maskz_scalef_ps((vmask)~zero, y, n);
}
INLINE float v_sum(vfloat x) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float v_largest(vfloat x) { return _mm512_reduce_max_ps(x); }
/* 0, 1, 2, ... */
INLINE vfloat v_indices(void) {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
/* The first n elements at p, then zeros; n is smaller than VECTOR_WIDTH. */
INLINE vfloat v_load_first(const float *p, int64_t n) {
    return _mm512_maskz_loadu_ps((vmask)((1u << n) - 1), p);
}
INLINE void v_store_first(float *p, vfloat x, int64_t n) {
    _mm512_mask_storeu_ps(p, (vmask)((1u << n) - 1), x);
}
/* Values of other types as floats. */
INLINE vfloat v_load_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vfloat v_load_bf16(const uint16_t *p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
INLINE vfloat v_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
/* FP8 (e4m3) divided by 256, without NaN: a float16 of the same digits. */
INLINE vfloat v_load_fp8(const void *p) {
    __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    words = _mm256_slli_epi16(words, 7); /* bits 14 and 15 are the sign */
    return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((short)0xbfff)));
}
INLINE void v_store_f16(uint16_t *p, vfloat x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
/* Rounded to the nearest; ties to even. Values beyond the range saturate. NaN becomes 0 or -128. */
INLINE void v_store_int8(int8_t *p, vfloat x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

/* Transpose a square of VECTOR_WIDTH vectors: first squares of 4, then their places. */
INLINE void v_transpose(vfloat *x) {
    __m512 y[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
        __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
        __m512d next_low = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
        __m512d next_high = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
        y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
        y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
        y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
        y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 low = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x44);
        __m512 high = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xee);
        __m512 next_low = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x44);
        __m512 next_high = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xee);
        x[i] = _mm512_shuffle_f32x4(low, next_low, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(low, next_low, 0xdd);
        x[i + 8] = _mm512_shuffle_f32x4(high, next_high, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(high, next_high, 0xdd);
    }
}

#if defined(LEVEL_BF16)
/* Rounded to bfloat16: to the nearest, ties to even. */
INLINE void v_store_bf16(uint16_t *p, vfloat x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

/* ---- 32-bit integers ---- */

INLINE vint vi_load(const void *p) { return _mm512_loadu_si512(p); }
/* Signed bytes as 32-bit integers. */
INLINE vint vi_load_bytes(const void *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE void vi_store(void *p, vint x) { _mm512_storeu_si512(p, x); }
INLINE vint vi_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vint vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vint vi_and(vint a, vint b) { return _mm512_and_si512(a, b); }
INLINE vint vi_add(vint a, vint b) { return _mm512_add_epi32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return _mm512_sub_epi32(a, b); }
INLINE vint vi_sub_bytes(vint a, int8_t b) { return _mm512_sub_epi8(a, _mm512_set1_epi8(b)); }
#define vi_shift_left(x, bits) _mm512_slli_epi32(x, bits)
#define vi_shift_right(x, bits) _mm512_srli_epi32(x, bits)
#define vi_shift_right_signed(x, bits) _mm512_srai_epi32(x, bits)
INLINE vfloat vi_to_float(vint x) { return _mm512_cvtepi32_ps(x); }
INLINE vfloat vi_as_float(vint bits) { return _mm512_castsi512_ps(bits); }
/* The float16 in the low half of each word. */
INLINE vfloat vi_f16_to_float(vint words) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
}
INLINE vint v_bits(vfloat x) { return _mm512_castps_si512(x); }
/* Of the lowest 4 bits of each word: table[bits]. */
INLINE vfloat v_lookup(const float *table, vint x) {
    return _mm512_permutexvar_ps(x, _mm512_loadu_ps(table));
}
/* Of each byte, from 0 to 15: table[byte]. */
INLINE vint vi_lookup(const int8_t *table, vint x) {
    __m128i entries = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), x);
}
/* Of the lowest 5 bits of each half of a word: table[bits]. */
INLINE vint vi_lookup_halves(const uint16_t *table, vint x) {
    return _mm512_permutexvar_epi16(x, _mm512_loadu_si512(table));
}
/* The low halves of the words of `low`, and the high halves of those of `high`. */
INLINE vint vi_halves(vint low, vint high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

#elif defined(LEVEL_AVX2)
#include <immintrin.h>

enum { VECTOR_WIDTH = 8 };
typedef __m256 vfloat;
typedef __m256i vint;
typedef __m256 vmask;

INLINE vfloat v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vfloat x) { _mm256_storeu_ps(p, x); }
INLINE vfloat v_set(float x) { return _mm256_set1_ps(x); }
INLINE vfloat v_zero(void) { return _mm256_setzero_ps(); }
INLINE vfloat v_add(vfloat a, vfloat b) { return _mm256_add_ps(a, b); }
INLINE vfloat v_sub(vfloat a, vfloat b) { return _mm256_sub_ps(a, b); }
INLINE vfloat v_mul(vfloat a, vfloat b) { return _mm256_mul_ps(a, b); }
INLINE vfloat v_div(vfloat a, vfloat b) { return _mm256_div_ps(a, b); }
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vfloat v_fms(vfloat a, vfloat b, vfloat c) { return _mm256_fmsub_ps(a, b, c); }
INLINE vfloat v_fnma(vfloat a, vfloat b, vfloat c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vfloat v_min(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
INLINE vfloat v_max(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
INLINE vfloat v_abs(vfloat x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vfloat v_round(vfloat x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vfloat v_copysign(vfloat a, vfloat b) {
    const __m256 sign_bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign_bit, a), _mm256_and_ps(sign_bit, b));
}
INLINE vmask v_less(vfloat a, vfloat b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vmask v_less_equal(vfloat a, vfloat b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE vmask v_is_negative(vfloat x) { return x; } /* v_select reads the sign bit */
INLINE vmask v_both(vmask a, vmask b) { return _mm256_and_ps(a, b); }
INLINE vfloat v_select(vmask mask, vfloat yes, vfloat no) {
    return _mm256_blendv_ps(no, yes, mask);
}
INLINE vfloat v_scale_unless(vmask zero, vfloat y, vfloat n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    __m256 factor = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_andnot_ps(zero, _mm256_mul_ps(y, factor));
}
INLINE float v_sum(vfloat x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float v_largest(vfloat x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE vfloat v_indices(void) { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
INLINE __m256i first_elements(int64_t n) {
    const __m256i indices = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), indices);
}
INLINE vfloat v_load_first(const float *p, int64_t n) {
    return _mm256_maskload_ps(p, first_elements(n));
}
INLINE void v_store_first(float *p, vfloat x, int64_t n) {
    _mm256_maskstore_ps(p, first_elements(n), x);
}
INLINE vfloat v_load_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vfloat v_load_bf16(const uint16_t *p) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
INLINE vfloat v_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE vfloat v_load_fp8(const void *p) {
    __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
    words = _mm_slli_epi16(words, 7);
    return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16((short)0xbfff)));
}
INLINE void v_store_f16(uint16_t *p, vfloat x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void v_store_int8(int8_t *p, vfloat x) {
    __m256i rounded = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded),
                                    _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}

INLINE void v_transpose(vfloat *x) {
    __m256 y[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1]));
        __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1]));
        __m256d next_low = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2], x[i + 3]));
        __m256d next_high = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2], x[i + 3]));
        y[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, next_low));
        y[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, next_low));
        y[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, next_high));
        y[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, next_high));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
    }
}

INLINE vint vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vint vi_load_bytes(const void *p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
INLINE void vi_store(void *p, vint x) { _mm256_storeu_si256((__m256i *)p, x); }
INLINE vint vi_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vint vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vint vi_and(vint a, vint b) { return _mm256_and_si256(a, b); }
INLINE vint vi_add(vint a, vint b) { return _mm256_add_epi32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return _mm256_sub_epi32(a, b); }
INLINE vint vi_sub_bytes(vint a, int8_t b) { return _mm256_sub_epi8(a, _mm256_set1_epi8(b)); }
#define vi_shift_left(x, bits) _mm256_slli_epi32(x, bits)
#define vi_shift_right(x, bits) _mm256_srli_epi32(x, bits)
#define vi_shift_right_signed(x, bits) _mm256_srai_epi32(x, bits)
INLINE vfloat vi_to_float(vint x) { return _mm256_cvtepi32_ps(x); }
INLINE vfloat vi_as_float(vint bits) { return _mm256_castsi256_ps(bits); }
INLINE vfloat vi_f16_to_float(vint words) {
    __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low),
                                            _mm256_extracti128_si256(low, 1)));
}
INLINE vint v_bits(vfloat x) { return _mm256_castps_si256(x); }
INLINE vint vi_lookup(const int8_t *table, vint x) {
    __m128i entries = _mm_loadu_si128((const __m128i *)table);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), x);
}

#elif defined(LEVEL_NEON)
#include <arm_neon.h>

enum { VECTOR_WIDTH = 4 };
typedef float32x4_t vfloat;
typedef int32x4_t vint;
typedef uint32x4_t vmask;

INLINE vfloat v_load(const float *p) { return vld1q_f32(p); }
INLINE void v_store(float *p, vfloat x) { vst1q_f32(p, x); }
INLINE vfloat v_set(float x) { return vdupq_n_f32(x); }
INLINE vfloat v_zero(void) { return vdupq_n_f32(0); }
INLINE vfloat v_add(vfloat a, vfloat b) { return vaddq_f32(a, b); }
INLINE vfloat v_sub(vfloat a, vfloat b) { return vsubq_f32(a, b); }
INLINE vfloat v_mul(vfloat a, vfloat b) { return vmulq_f32(a, b); }
INLINE vfloat v_div(vfloat a, vfloat b) { return vdivq_f32(a, b); }
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return vfmaq_f32(c, a, b); }
INLINE vfloat v_fms(vfloat a, vfloat b, vfloat c) { return vfmaq_f32(vnegq_f32(c), a, b); }
INLINE vfloat v_fnma(vfloat a, vfloat b, vfloat c) { return vfmsq_f32(c, a, b); }
/* Not vminq_f32 and vmaxq_f32: where one is NaN, they return NaN. */
INLINE vfloat v_min(vfloat a, vfloat b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vfloat v_max(vfloat a, vfloat b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vfloat v_abs(vfloat x) { return vabsq_f32(x); }
INLINE vfloat v_round(vfloat x) { return vrndnq_f32(x); }
INLINE vfloat v_copysign(vfloat a, vfloat b) {
    return vbslq_f32(vdupq_n_u32(0x80000000), b, a);
}
INLINE vmask v_less(vfloat a, vfloat b) { return vcltq_f32(a, b); }
INLINE vmask v_less_equal(vfloat a, vfloat b) { return vcleq_f32(a, b); }
INLINE vmask v_is_negative(vfloat x) { return vcltzq_s32(vreinterpretq_s32_f32(x)); }
INLINE vmask v_both(vmask a, vmask b) { return vandq_u32(a, b); }
INLINE vfloat v_select(vmask mask, vfloat yes, vfloat no) { return vbslq_f32(mask, yes, no); }
INLINE vfloat v_scale_unless(vmask zero, vfloat y, vfloat n) {
    int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    float32x4_t factor = vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
    return vbslq_f32(zero, vdupq_n_f32(0), vmulq_f32(y, factor));
}
INLINE float v_sum(vfloat x) { return vaddvq_f32(x); }
INLINE float v_largest(vfloat x) { return vmaxnmvq_f32(x); }
INLINE vfloat v_indices(void) {
    const float indices[] = {0, 1, 2, 3};
    return vld1q_f32(indices);
}
INLINE vfloat v_load_first(const float *p, int64_t n) {
    vfloat x = v_zero();
    if (n > 0)
        x = vld1q_lane_f32(p, x, 0);
    if (n > 1)
        x = vld1q_lane_f32(p + 1, x, 1);
    if (n > 2)
        x = vld1q_lane_f32(p + 2, x, 2);
    return x;
}
INLINE void v_store_first(float *p, vfloat x, int64_t n) {
    if (n > 0)
        vst1q_lane_f32(p, x, 0);
    if (n > 1)
        vst1q_lane_f32(p + 1, x, 1);
    if (n > 2)
        vst1q_lane_f32(p + 2, x, 2);
}
INLINE vfloat v_load_int8(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}
INLINE vfloat v_load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
INLINE vfloat v_load_f16(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE vfloat v_load_fp8(const void *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    int16x4_t bits = vshl_n_s16(vget_low_s16(words), 7);
    return vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(bits, vdup_n_s16((int16_t)0xbfff))));
}
INLINE void v_store_int8(int8_t *p, vfloat x) {
    int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    memcpy(p, &four, sizeof four);
}
INLINE void v_store_f16(uint16_t *p, vfloat x) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
INLINE void v_transpose(vfloat *x) {
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1]));
    float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3]));
    float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
}

#if defined(LEVEL_BF16)
INLINE void v_store_bf16(uint16_t *p, vfloat x) {
    vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32(x)));
}
#endif

INLINE vint vi_load_bytes(const void *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
INLINE vint vi_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE void vi_store(void *p, vint x) { vst1q_u8(p, vreinterpretq_u8_s32(x)); }
INLINE vint vi_set(int32_t x) { return vdupq_n_s32(x); }
INLINE vint vi_zero(void) { return vdupq_n_s32(0); }
INLINE vint vi_and(vint a, vint b) { return vandq_s32(a, b); }
INLINE vint vi_add(vint a, vint b) { return vaddq_s32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return vsubq_s32(a, b); }
INLINE vint vi_sub_bytes(vint a, int8_t b) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(a), vdupq_n_s8(b)));
}
/* Operators, because the intrinsics with immediate counts refuse those of unrolled loops. */
#define vi_shift_left(x, bits) ((vint)((uint32x4_t)(x) << (bits)))
#define vi_shift_right(x, bits) ((vint)((uint32x4_t)(x) >> (bits)))
#define vi_shift_right_signed(x, bits) ((vint)(x) >> (bits))
INLINE vfloat vi_to_float(vint x) { return vcvtq_f32_s32(x); }
INLINE vfloat vi_as_float(vint bits) { return vreinterpretq_f32_s32(bits); }
INLINE vfloat vi_f16_to_float(vint words) {
    return vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(words)));
}
INLINE vint v_bits(vfloat x) { return vreinterpretq_s32_f32(x); }
INLINE vint vi_lookup(const int8_t *table, vint x) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(table), vreinterpretq_u8_s32(x)));
}

#else
#error "a source file of a level must define what it may use"
#endif

/* The elements [d, d + VECTOR_WIDTH) of a row; zeros beyond its end. */
INLINE vfloat load_of_row(const float *row, int64_t d, int64_t size) {
    return size - d < VECTOR_WIDTH ? v_load_first(row + d, size - d) : v_load(row + d);
}

INLINE void store_of_row(float *row, int64_t d, int64_t size, vfloat x) {
    if (size - d < VECTOR_WIDTH)
        v_store_first(row + d, x, size - d);
    else
        v_store(row + d, x);
}

/* ---- products of bytes, summed as 32-bit integers ---- */

#if defined(LEVEL_NEON)
/* sums + the products of signed bytes, four neighbours a sum; inputs from -127 to 127. */
INLINE vint vi_dot_bytes(vint sums, vint weights, vint inputs) {
    int8x16_t a = vreinterpretq_s8_s32(weights);
    int8x16_t b = vreinterpretq_s8_s32(inputs);
#if defined(LEVEL_DOTPROD)
    return vdotq_s32(sums, a, b);
#else
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    int16x8_t high = vmull_high_s8(a, b);
    return vpadalq_s16(sums, vpaddq_s16(low, high)); /* pairs are at most 2 x 128 x 127 */
#endif
}
#endif

/* sums + the products of unsigned bytes 0 .. 15 and signed bytes, four neighbours a sum. */
INLINE vint vi_dot_4bit(vint sums, vint weights, vint inputs) {
#if defined(LEVEL_NEON)
    return vi_dot_bytes(sums, weights, inputs);
#elif defined(LEVEL_AVX512) && defined(LEVEL_VNNI)
    return _mm512_dpbusd_epi32(sums, weights, inputs);
#elif defined(LEVEL_AVX512)
    __m512i pairs = _mm512_maddubs_epi16(weights, inputs); /* at most 2 x 15 x 127 */
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(LEVEL_VNNI)
    return _mm256_dpbusd_avx_epi32(sums, weights, inputs);
#else
    __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/* sums + the products of signed bytes; inputs from -127 to 127. With VNNI, the weights are
 * unsigned: `vi_dot_weights` added 128 to each of them, and the caller subtracts
 * DOT_WEIGHT_OFFSET times the sum of the inputs. */
#if defined(LEVEL_VNNI)
enum { DOT_WEIGHT_OFFSET = 128 };
#else
enum { DOT_WEIGHT_OFFSET = 0 };
#endif
INLINE vint vi_dot_weights(vint weights) {
#if defined(LEVEL_AVX512) && defined(LEVEL_VNNI)
    return _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
#elif defined(LEVEL_VNNI)
    return _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
#else
    return weights;
#endif
}
INLINE vint vi_dot_8bit(vint sums, vint weights, vint inputs) {
#if defined(LEVEL_NEON)
    return vi_dot_bytes(sums, weights, inputs);
#elif defined(LEVEL_AVX512) && defined(LEVEL_VNNI)
    return _mm512_dpbusd_epi32(sums, weights, inputs);
#elif defined(LEVEL_AVX512)
    __mmask64 negative = _mm512_movepi8_mask(weights);
    __m512i magnitude = _mm512_abs_epi8(weights);
    __m512i zero = _mm512_setzero_si512();
    __m512i with_sign = _mm512_mask_sub_epi8(inputs, negative, zero, inputs);
    __m512i pairs = _mm512_maddubs_epi16(magnitude, with_sign); /* at most 2 x 128 x 127 */
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(LEVEL_VNNI)
    return _mm256_dpbusd_avx_epi32(sums, weights, inputs);
#else
    __m256i with_sign = _mm256_sign_epi8(inputs, weights);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), with_sign);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

#if defined(LEVEL_BF16)
/* sums + the products of two pairs of bfloat16. */
INLINE vfloat v_dot_bf16(vfloat sums, vint weights, vint inputs) {
#if defined(LEVEL_NEON)
    return vbfdotq_f32(sums, vreinterpretq_bf16_s32(weights), vreinterpretq_bf16_s32(inputs));
#else
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)inputs);
#endif
}
#endif

#endif
