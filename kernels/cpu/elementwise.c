/* The operations between the linear layers: norms, residual additions, rotary embeddings, writes
 * to the KV cache and gated activations. */

#include "cpu_kernels.h"

/* y = x / rms(x) * weight, for each row of x [rows, hidden_size]. */
void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t hidden_size,
              float eps) {
#pragma omp parallel for if (rows * hidden_size > PARALLEL_MIN_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * hidden_size;
        float *to = y + row * hidden_size;
        float rest = 0; /* sum over the elements after the last whole vector */
        __m256 squares = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 8 <= hidden_size; d += 8) {
            __m256 v = _mm256_loadu_ps(from + d);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        for (; d < hidden_size; d++)
            rest += from[d] * from[d];
        float mean = (horizontal_sum(squares) + rest) / (float)hidden_size;
        float factor = 1.0f / sqrtf(mean + eps);
        for (d = 0; d < hidden_size; d++)
            to[d] = from[d] * factor * weight[d];
    }
}

/* y = residual + scale * update. */
void add_residual(const float *residual, const float *update, float *y, int64_t size, float scale) {
#pragma omp parallel for if (size > PARALLEL_MIN_ELEMENTS)
    for (int64_t i = 0; i < size; i++)
        y[i] = residual[i] + scale * update[i];
}

/* Rotate the first 2 `half` dimensions of the first n_heads heads of each token, in place.
 *
 * x: a token every x_stride elements. cos, sin: [n_tokens, 2 half]. The caller has negated the
 * first half of sin.
 */
void apply_rotary_emb(float *x, int64_t x_stride, int64_t n_tokens, int64_t n_heads,
                      int64_t head_dim, const float *cos, const float *sin, int64_t half) {
#pragma omp parallel for if (n_tokens * n_heads * head_dim > PARALLEL_MIN_ELEMENTS)
    for (int64_t token = 0; token < n_tokens; token++) {
        const float *c = cos + token * 2 * half;
        const float *s = sin + token * 2 * half;
        for (int64_t head = 0; head < n_heads; head++) {
            float *first = x + token * x_stride + head * head_dim;
            float *second = first + half;
            for (int64_t d = 0; d < half; d++) {
                float left = first[d];
                float right = second[d];
                first[d] = left * c[d] + right * s[d];
                second[d] = right * c[half + d] + left * s[half + d];
            }
        }
    }
}

/* Write keys and values [n_tokens, n_heads, head_dim], a token every kv_stride elements, to the
 * slots of a cache [n_heads, slots, head_dim]. */
void store_kv(const float *kv, int64_t kv_stride, int64_t n_tokens, int64_t n_heads,
              int64_t head_dim, const int64_t *slot_mapping, float *cache, int64_t head_stride) {
#pragma omp parallel for if (n_tokens * n_heads * head_dim > PARALLEL_MIN_ELEMENTS)
    for (int64_t token = 0; token < n_tokens; token++)
        for (int64_t head = 0; head < n_heads; head++) {
            float *slot = cache + head * head_stride + slot_mapping[token] * head_dim;
            memcpy(slot, kv + token * kv_stride + head * head_dim, head_dim * sizeof(float));
        }
}

/* y = act(gate) * up, with gate_up [rows, 2 size], the gate first; size is a multiple of 8. */
void act_and_mul(const float *gate_up, float *y, int64_t rows, int64_t size, int gelu) {
    const __m256 root = _mm256_set1_ps(0.7978845608028654f); /* sqrt(2 / pi) */
    const __m256 cubic = _mm256_set1_ps(0.044715f);
    int64_t n_vectors = rows * size / 8;
    /* An exponential is more expensive than the operations above, so that fewer elements justify
     * several threads. */
#pragma omp parallel for if (rows * size > PARALLEL_MIN_ELEMENTS / 4)
    for (int64_t i = 0; i < n_vectors; i++) {
        int64_t row = i * 8 / size;
        int64_t d = i * 8 % size;
        __m256 gate = _mm256_loadu_ps(gate_up + row * 2 * size + d);
        __m256 up = _mm256_loadu_ps(gate_up + row * 2 * size + size + d);
        __m256 inner = gate; /* silu(g) = g sigmoid(g) */
        if (gelu) {          /* gelu_tanh(g) = g (1 + tanh(u)) / 2 = g sigmoid(2 u) */
            __m256 cube = _mm256_mul_ps(_mm256_mul_ps(gate, gate), gate);
            __m256 u = _mm256_fmadd_ps(cube, cubic, gate);
            inner = _mm256_mul_ps(_mm256_add_ps(root, root), u);
        }
        __m256 activated = _mm256_mul_ps(gate, sigmoid_ps(inner));
        _mm256_storeu_ps(y + row * size + d, _mm256_mul_ps(activated, up));
    }
}

/* y = gate sigmoid(alpha gate) (up + 1), with gate <= limit and |up| <= limit; gate_up as above. */
void swiglu_clamped(const float *gate_up, float *y, int64_t rows, int64_t size, float limit,
                    float alpha) {
    const __m256 most = _mm256_set1_ps(limit);
    const __m256 least = _mm256_set1_ps(-limit);
    const __m256 slope = _mm256_set1_ps(alpha);
    int64_t n_vectors = rows * size / 8;
#pragma omp parallel for if (rows * size > PARALLEL_MIN_ELEMENTS / 4)
    for (int64_t i = 0; i < n_vectors; i++) {
        int64_t row = i * 8 / size;
        int64_t d = i * 8 % size;
        /* Of NaN and a number, min and max return the second operand: NaN stays NaN. */
        __m256 gate = _mm256_min_ps(most, _mm256_loadu_ps(gate_up + row * 2 * size + d));
        __m256 up = _mm256_min_ps(most, _mm256_loadu_ps(gate_up + row * 2 * size + size + d));
        up = _mm256_max_ps(least, up);
        __m256 activated = _mm256_mul_ps(gate, sigmoid_ps(_mm256_mul_ps(gate, slope)));
        _mm256_storeu_ps(y + row * size + d, _mm256_fmadd_ps(activated, up, activated));
    }
}
