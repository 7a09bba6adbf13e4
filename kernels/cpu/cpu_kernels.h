/* Declarations that the CPU kernels share: sizes, functions and vector helpers.
 *
 * All arithmetic is in float32 with AVX2 and FMA. Only weights, W8A8 inputs and an 8-bit KV cache
 * have other types. The order of summation depends neither on the number of rows nor on how a
 * prompt is divided into steps. A request therefore gets the same result, bit for bit, whatever
 * other requests are in its batch.
 * cpu_kernels.py checks the arguments and documents the layouts.
 */

#ifndef LLMKIT_CPU_KERNELS_H
#define LLMKIT_CPU_KERNELS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Always inlined, because callers pass constants that unroll the loops. */
#define INLINE static inline __attribute__((always_inline))

enum {
    PANEL_WIDTH = 16,               /* columns of a panel of packed weights */
    MAX_HEAD_DIM = 512,             /* the largest head_dim of attention */
    PARALLEL_MIN_ELEMENTS = 1 << 14 /* operations on at most this many elements use one thread */
};

/* How a weight is stored. The numbers are those of WEIGHT_TYPES in cpu_kernels.py. */
enum { WEIGHT_F32, WEIGHT_BF16, WEIGHT_F16, WEIGHT_INT8, WEIGHT_INT4, WEIGHT_FP4 };

/* Activations. The numbers are those of ACTIVATIONS in cpu_kernels.py. */
enum { ACT_SILU, ACT_GELU_TANH, ACT_GELU, ACT_RELU2 };

/* ---- functions that the files share ---- */

#pragma GCC visibility push(hidden)

/* y[rows, cols] = x[rows, depth] w[depth, cols] + bias, with w = scale * q - offset. */
typedef struct {
    int weight_type;
    const float *x;          /* a row every x_stride elements */
    int64_t x_stride;
    const char *weight;      /* panels of PANEL_WIDTH columns, a panel every panel_stride bytes */
    int64_t panel_stride;
    const float *scales;     /* [depth / group_size, columns of all panels]; NULL: w = q */
    const float *offsets;    /* the same; NULL: 0 */
    const float *group_sums; /* [rows, depth / group_size]: sums of x, where there are offsets */
    const float *bias;       /* [columns of all panels], or NULL */
    float *y;                /* a row every y_stride elements */
    int64_t y_stride;
    int64_t rows;
    int64_t cols;
    int64_t depth;
    int64_t group_size;
} Linear;

/* A linear layer with int8 weights and quantized inputs; products are summed as integers. */
typedef struct {
    Linear linear;           /* `x` is not used */
    const int16_t *q;        /* [rows, depth]: the quantized inputs */
    const float *row_scales; /* [rows]: x = row_scale * q */
} LinearW8A8;

/* softmax(softcap(scale q k')) v over a paged KV cache, causal, within the window. */
typedef struct {
    const float *q;              /* [n_tokens, n_heads, head_dim], a token every q_stride */
    float *out;                  /* [n_tokens, n_heads, head_dim] */
    int64_t q_stride;
    int quantized;               /* 1: the cache holds int8 values; 0: float32 */
    const char *kv;              /* [2 n_kv_heads, n_blocks, block_size, head_dim]: first the heads
                                    of the keys; a head every head_stride elements */
    const float *scales;         /* of a quantized cache: [2 n_kv_heads, n_blocks, block_size], or
                                    [2 n_kv_heads] with static_scales */
    int static_scales;
    int64_t head_stride;
    int64_t block_size;
    int64_t head_dim;
    int64_t n_heads;
    int64_t n_kv_heads;
    int64_t n_sequences;
    const int64_t *query_lens;   /* [n_sequences]: tokens of this step */
    const int64_t *seq_lens;     /* [n_sequences]: tokens in the cache, this step's included */
    const int64_t *block_tables; /* the block numbers of all sequences */
    const int64_t *table_starts; /* [n_sequences]: where a sequence's table begins in them */
    int64_t window;              /* 0: none */
    float scale;
    float softcap;               /* 0: none */
    const float *sinks;          /* [n_heads]: a logit that joins the softmax's sum; NULL: none */
} PagedAttention;

/* matmul.c */
size_t packed_panel_bytes(int weight_type, int64_t depth);
void linear(const Linear *p, float *group_sums); /* group_sums: the buffer to fill, or NULL */
void linear_w8a8(const LinearW8A8 *p);

/* quantization.c */
void quantize_rows(const float *x, int64_t x_stride, int64_t rows, int64_t depth, int16_t *q,
                   float *scales);

/* attention.c */
int paged_attention(const PagedAttention *a); /* returns 0 when out of memory */

/* elementwise.c */
void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t hidden_size,
              float eps);
void layer_norm(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
                int64_t hidden_size, float eps);
void norm_heads(float *x, int64_t x_stride, int64_t n_tokens, int64_t n_heads, int64_t head_dim,
                const float *weight, int64_t weight_stride, int subtract_mean, float eps);
void add_residual(const float *residual, const float *update, float *y, int64_t size, float scale);
void scale_tokens(float *x, int64_t x_stride, int64_t n_tokens, int64_t size, const float *factors);
void apply_rotary_emb(float *x, int64_t x_stride, int64_t n_tokens, int64_t n_heads,
                      int64_t head_dim, const float *cos, const float *sin, int64_t half,
                      int interleaved);
void store_kv(const float *kv, int64_t kv_stride, int64_t n_tokens, int64_t n_heads,
              int64_t head_dim, const int64_t *slot_mapping, float *cache, int64_t head_stride);
void act_and_mul(const float *gate_up, float *y, int64_t rows, int64_t size, int activation);
void act(const float *x, float *y, int64_t size, int activation);
void xielu(const float *x, float *y, int64_t size, const float *raw_alpha_p,
           const float *raw_alpha_n, const float *beta, const float *eps);
void swiglu_clamped(const float *gate_up, float *y, int64_t rows, int64_t size, float limit,
                    float alpha);

#pragma GCC visibility pop

/* ---- vectors of eight floats ---- */

/* The sum of the eight elements. */
INLINE float horizontal_sum(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* The largest of the eight elements. */
INLINE float horizontal_max(__m256 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/* The sums of the elements of each of four vectors. */
INLINE __m128 horizontal_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

/* Eight int8 values as floats. */
INLINE __m256 load_int8(const char *q) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)q);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

/* e^x for x <= 0, to 2 units in the last place; 0 below -87.
 * The range is reduced by multiples of ln 2 after Cody and Waite; the polynomial has degree 7. */
INLINE __m256 exp_nonpositive(__m256 x) {
    const __m256 smallest = _mm256_set1_ps(-87.0f);
    const __m256 log2_e = _mm256_set1_ps(1.44269504088896341f);
    __m256 underflows = _mm256_cmp_ps(x, smallest, _CMP_LT_OQ);
    x = _mm256_max_ps(x, smallest);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, log2_e),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* r = x - n ln 2, with ln 2 in two parts. The first part has few bits, so that n times it is
     * exact. */
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 720));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 120));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 24));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 6));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.5f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    /* 2^n, by its exponent bits. */
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_andnot_ps(underflows, _mm256_mul_ps(y, power));
}

/* e^x - 1 - x for x <= 0. Near 0, where that would cancel, the first terms of its series. */
INLINE __m256 exp_minus_one_minus(__m256 x) {
    __m256 far = _mm256_sub_ps(_mm256_sub_ps(exp_nonpositive(x), _mm256_set1_ps(1.0f)), x);
    __m256 near = _mm256_set1_ps(1.0f / 362880);
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 40320));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 5040));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 720));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 120));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 24));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(1.0f / 6));
    near = _mm256_fmadd_ps(near, x, _mm256_set1_ps(0.5f));
    near = _mm256_mul_ps(near, _mm256_mul_ps(x, x));
    __m256 is_near = _mm256_cmp_ps(x, _mm256_set1_ps(-0.7f), _CMP_GT_OQ);
    return _mm256_blendv_ps(far, near, is_near);
}

/* erfc(|x| / sqrt(2)) / 2, to 2e-7; relative to the value, to 2e-6 for |x| < 6.
 * erfc(z) = t e^(P(1 - t) - z^2) with t = 1 / (1 + z / 2). P is a Chebyshev fit of
 * log(erfc(z) e^(z^2) / t) for z < 10, of degree 9 and without a constant term. */
INLINE __m256 half_erfc(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    __m256 half_z = _mm256_mul_ps(magnitude, _mm256_set1_ps(0.35355339f));
    __m256 t = _mm256_div_ps(one, _mm256_add_ps(one, half_z));
    __m256 u = _mm256_mul_ps(half_z, t); /* 1 - t, without its rounding error */
    __m256 p = _mm256_set1_ps(-0.13956807f);
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.60322278f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(-0.89523341f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.48371802f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(-0.15399206f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.24056208f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.15549326f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(-0.30287368f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(-1.256766f));
    __m256 z_squared = _mm256_mul_ps(_mm256_mul_ps(magnitude, magnitude), _mm256_set1_ps(0.5f));
    __m256 e = exp_nonpositive(_mm256_fmsub_ps(p, u, z_squared));
    return _mm256_mul_ps(_mm256_mul_ps(t, e), _mm256_set1_ps(0.5f));
}

/* tanh(x) = (1 - e) / (1 + e) with e = e^(-2 |x|), and the sign of x. */
INLINE __m256 tanh_ps(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 sign_bit = _mm256_set1_ps(-0.0f);
    __m256 sign = _mm256_and_ps(x, sign_bit);
    __m256 magnitude = _mm256_andnot_ps(sign_bit, x);
    __m256 e = exp_nonpositive(_mm256_mul_ps(magnitude, _mm256_set1_ps(-2.0f)));
    return _mm256_or_ps(_mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)), sign);
}

/* sigmoid(x) = 1 / (1 + e) for x >= 0 and e / (1 + e) below, with e = e^(-|x|). */
INLINE __m256 sigmoid_ps(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 e = exp_nonpositive(_mm256_or_ps(x, _mm256_set1_ps(-0.0f)));
    __m256 positive = _mm256_div_ps(one, _mm256_add_ps(one, e));
    __m256 negative = _mm256_div_ps(e, _mm256_add_ps(one, e));
    return _mm256_blendv_ps(positive, negative, x);
}

#endif
