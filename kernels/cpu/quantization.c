/* Quantizing the inputs of W8A8 linear layers: int8 values with one scale for each row. */

#include "cpu_kernels.h"

/* Quantize rows of x [rows, depth], so that the largest magnitude of a row becomes 127.
 *
 * q: int16 [rows, depth], because the matrix product multiplies pairs of 16-bit integers.
 * scales: [rows]. A row with NaN or infinity gets the scale NaN, so that its outputs are NaN.
 */
void quantize_rows(const float *x, int64_t x_stride, int64_t rows, int64_t depth, int16_t *q,
                   float *scales) {
    const __m256 magnitude_bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
#pragma omp parallel for if (rows * depth > PARALLEL_MIN_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * x_stride;
        float largest = 0;
        float not_finite = 0; /* 0 * x: 0 where x is finite, else NaN */
        __m256 largest_lanes = _mm256_setzero_ps();
        __m256 not_finite_lanes = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 8 <= depth; d += 8) {
            __m256 v = _mm256_loadu_ps(from + d);
            largest_lanes = _mm256_max_ps(largest_lanes, _mm256_and_ps(v, magnitude_bits));
            not_finite_lanes = _mm256_fmadd_ps(v, _mm256_setzero_ps(), not_finite_lanes);
        }
        for (; d < depth; d++) {
            largest = fmaxf(largest, fabsf(from[d]));
            not_finite += 0 * from[d];
        }
        largest = fmaxf(largest, horizontal_max(largest_lanes)) / 127.0f;
        /* The smallest scale avoids a division by zero for a row of zeros. */
        float scale = largest > 1e-12f ? largest : 1e-12f;
        scale = scale + not_finite + horizontal_sum(not_finite_lanes);
        for (d = 0; d + 8 <= depth; d += 8) {
            __m256 steps = _mm256_div_ps(_mm256_loadu_ps(from + d), _mm256_set1_ps(scale));
            __m256i rounded = _mm256_cvtps_epi32(steps);
            __m128i low = _mm256_castsi256_si128(rounded);
            __m128i high = _mm256_extracti128_si256(rounded, 1);
            _mm_storeu_si128((__m128i *)(q + row * depth + d), _mm_packs_epi32(low, high));
        }
        for (; d < depth; d++)
            q[row * depth + d] = (int16_t)_mm_cvtss_si32(_mm_set_ss(from[d] / scale));
        scales[row] = scale;
    }
}
