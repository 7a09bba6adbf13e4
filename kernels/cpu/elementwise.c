/* The operations between the linear layers: norms, residual additions, rotary embeddings, writes
 * to the KV cache and activations. */

#include "cpu_kernels.h"

/* Activations: elements of a part that a thread computes at once; a multiple of 8. */
enum { ACT_CHUNK = 1024 };

/* The sum of a row. */
static float row_sum(const float *row, int64_t size) {
    float rest = 0; /* sum over the elements after the last whole vector */
    __m256 sums = _mm256_setzero_ps();
    int64_t d = 0;
    for (; d + 8 <= size; d += 8)
        sums = _mm256_add_ps(_mm256_loadu_ps(row + d), sums);
    for (; d < size; d++)
        rest += row[d];
    return horizontal_sum(sums) + rest;
}

/* The sum of (row - mean)^2. */
INLINE float square_sum(const float *row, int64_t size, float mean) {
    float rest = 0;
    __m256 squares = _mm256_setzero_ps();
    int64_t d = 0;
    for (; d + 8 <= size; d += 8) {
        __m256 v = _mm256_sub_ps(_mm256_loadu_ps(row + d), _mm256_set1_ps(mean));
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    for (; d < size; d++)
        rest += (row[d] - mean) * (row[d] - mean);
    return horizontal_sum(squares) + rest;
}

/* y = x / rms(x) * weight, for each row of x [rows, hidden_size]. */
void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t hidden_size,
              float eps) {
#pragma omp parallel for if (rows * hidden_size > PARALLEL_MIN_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * hidden_size;
        float *to = y + row * hidden_size;
        float mean = square_sum(from, hidden_size, 0.0f) / (float)hidden_size;
        float factor = 1.0f / sqrtf(mean + eps);
        for (int64_t d = 0; d < hidden_size; d++)
            to[d] = from[d] * factor * weight[d];
    }
}

/* y = (x - mean) / std * weight + bias, for each row of x [rows, hidden_size]; bias may be NULL. */
void layer_norm(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
                int64_t hidden_size, float eps) {
#pragma omp parallel for if (rows * hidden_size > PARALLEL_MIN_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * hidden_size;
        float *to = y + row * hidden_size;
        float mean = row_sum(from, hidden_size) / (float)hidden_size;
        float variance = square_sum(from, hidden_size, mean) / (float)hidden_size;
        float factor = 1.0f / sqrtf(variance + eps);
        if (bias)
            for (int64_t d = 0; d < hidden_size; d++)
                to[d] = (from[d] - mean) * factor * weight[d] + bias[d];
        else
            for (int64_t d = 0; d < hidden_size; d++)
                to[d] = (from[d] - mean) * factor * weight[d];
    }
}

/* The RMS norm (or, if subtract_mean, the layer norm) of each of the first n_heads heads of each
 * token, in place.
 *
 * x: a token every x_stride elements. weight: of a head every weight_stride elements; 0: all heads
 * have the same.
 */
void norm_heads(float *x, int64_t x_stride, int64_t n_tokens, int64_t n_heads, int64_t head_dim,
                const float *weight, int64_t weight_stride, int subtract_mean, float eps) {
#pragma omp parallel for if (n_tokens * n_heads * head_dim > PARALLEL_MIN_ELEMENTS)
    for (int64_t token = 0; token < n_tokens; token++)
        for (int64_t head = 0; head < n_heads; head++) {
            float *values = x + token * x_stride + head * head_dim;
            const float *w = weight + head * weight_stride;
            float mean = subtract_mean ? row_sum(values, head_dim) / (float)head_dim : 0.0f;
            float variance = square_sum(values, head_dim, mean) / (float)head_dim;
            float factor = 1.0f / sqrtf(variance + eps);
            for (int64_t d = 0; d < head_dim; d++)
                values[d] = (values[d] - mean) * factor * w[d];
        }
}

/* y = residual + scale * update. */
void add_residual(const float *residual, const float *update, float *y, int64_t size, float scale) {
#pragma omp parallel for if (size > PARALLEL_MIN_ELEMENTS)
    for (int64_t i = 0; i < size; i++)
        y[i] = residual[i] + scale * update[i];
}

/* Multiply the first `size` elements of each token by the token's factor, in place.
 * x: a token every x_stride elements. factors: [n_tokens]. */
void scale_tokens(float *x, int64_t x_stride, int64_t n_tokens, int64_t size,
                  const float *factors) {
#pragma omp parallel for if (n_tokens * size > PARALLEL_MIN_ELEMENTS)
    for (int64_t token = 0; token < n_tokens; token++)
        for (int64_t i = 0; i < size; i++)
            x[token * x_stride + i] *= factors[token];
}

/* Rotate the pairs (i, half + i) of a head. */
INLINE void rotate_halves(float *head, const float *c, const float *s, int64_t half) {
    float *first = head;
    float *second = head + half;
    for (int64_t d = 0; d < half; d++) {
        float left = first[d];
        float right = second[d];
        first[d] = left * c[d] + right * s[d];
        second[d] = right * c[half + d] + left * s[half + d];
    }
}

/* Rotate the pairs (2 i, 2 i + 1) of a head. */
INLINE void rotate_pairs(float *head, const float *c, const float *s, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float left = head[2 * i];
        float right = head[2 * i + 1];
        head[2 * i] = left * c[i] + right * s[i];
        head[2 * i + 1] = right * c[half + i] + left * s[half + i];
    }
}

/* Rotate the first 2 `half` dimensions of the first n_heads heads of each token, in place.
 *
 * x: a token every x_stride elements. cos, sin: [n_tokens, 2 half]. The caller has negated the
 * first half of sin. interleaved: pairs are (2 i, 2 i + 1), otherwise (i, half + i).
 */
void apply_rotary_emb(float *x, int64_t x_stride, int64_t n_tokens, int64_t n_heads,
                      int64_t head_dim, const float *cos, const float *sin, int64_t half,
                      int interleaved) {
#pragma omp parallel for if (n_tokens * n_heads * head_dim > PARALLEL_MIN_ELEMENTS)
    for (int64_t token = 0; token < n_tokens; token++) {
        const float *c = cos + token * 2 * half;
        const float *s = sin + token * 2 * half;
        float *heads = x + token * x_stride;
        if (interleaved)
            for (int64_t head = 0; head < n_heads; head++)
                rotate_pairs(heads + head * head_dim, c, s, half);
        else
            for (int64_t head = 0; head < n_heads; head++)
                rotate_halves(heads + head * head_dim, c, s, half);
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

/* act(x). The activation is a constant, so that no loop tests it. */
INLINE __m256 activate(__m256 x, int activation) {
    if (activation == ACT_SILU) /* x sigmoid(x) */
        return _mm256_mul_ps(x, sigmoid_ps(x));
    if (activation == ACT_GELU_TANH) { /* x (1 + tanh(u)) / 2 = x sigmoid(2 u) */
        const __m256 root = _mm256_set1_ps(0.7978845608028654f); /* sqrt(2 / pi) */
        __m256 cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
        __m256 u = _mm256_fmadd_ps(cube, _mm256_set1_ps(0.044715f), x);
        return _mm256_mul_ps(x, sigmoid_ps(_mm256_mul_ps(_mm256_add_ps(root, root), u)));
    }
    if (activation == ACT_GELU) { /* x - x q for x >= 0, x q below; q = erfc(|x| / sqrt(2)) / 2 */
        __m256 q = _mm256_mul_ps(x, half_erfc(x));
        return _mm256_blendv_ps(_mm256_sub_ps(x, q), q, x);
    }
    __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), x); /* in this order, NaN stays NaN */
    return _mm256_mul_ps(positive, positive);
}

/* The vectors [begin, end) of `act_and_mul`. */
INLINE void act_and_mul_vectors(const float *gate_up, float *y, int64_t size, int64_t begin,
                                int64_t end, int activation) {
    for (int64_t i = begin; i < end; i++) {
        int64_t row = i * 8 / size;
        int64_t d = i * 8 % size;
        __m256 gate = _mm256_loadu_ps(gate_up + row * 2 * size + d);
        __m256 up = _mm256_loadu_ps(gate_up + row * 2 * size + size + d);
        _mm256_storeu_ps(y + row * size + d, _mm256_mul_ps(activate(gate, activation), up));
    }
}

/* y = act(gate) * up, with gate_up [rows, 2 size], the gate first; size is a multiple of 8. */
void act_and_mul(const float *gate_up, float *y, int64_t rows, int64_t size, int activation) {
    int64_t n_vectors = rows * size / 8;
    /* An exponential is more expensive than the operations above, so that fewer elements justify
     * several threads. */
#pragma omp parallel for if (rows * size > PARALLEL_MIN_ELEMENTS / 4)
    for (int64_t begin = 0; begin < n_vectors; begin += ACT_CHUNK / 8) {
        int64_t end = begin + ACT_CHUNK / 8 < n_vectors ? begin + ACT_CHUNK / 8 : n_vectors;
        if (activation == ACT_SILU)
            act_and_mul_vectors(gate_up, y, size, begin, end, ACT_SILU);
        else if (activation == ACT_GELU_TANH)
            act_and_mul_vectors(gate_up, y, size, begin, end, ACT_GELU_TANH);
        else if (activation == ACT_GELU)
            act_and_mul_vectors(gate_up, y, size, begin, end, ACT_GELU);
        else
            act_and_mul_vectors(gate_up, y, size, begin, end, ACT_RELU2);
    }
}

/* The elements [begin, end) of `act`. */
INLINE void act_range(const float *x, float *y, int64_t begin, int64_t end, int activation) {
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
        _mm256_storeu_ps(y + i, activate(_mm256_loadu_ps(x + i), activation));
    if (i < end) {
        float rest[8] = {0};
        memcpy(rest, x + i, (end - i) * sizeof(float));
        _mm256_storeu_ps(rest, activate(_mm256_loadu_ps(rest), activation));
        memcpy(y + i, rest, (end - i) * sizeof(float));
    }
}

/* y = act(x), for `size` elements. */
void act(const float *x, float *y, int64_t size, int activation) {
#pragma omp parallel for if (size > PARALLEL_MIN_ELEMENTS / 4)
    for (int64_t begin = 0; begin < size; begin += ACT_CHUNK) {
        int64_t end = begin + ACT_CHUNK < size ? begin + ACT_CHUNK : size;
        if (activation == ACT_SILU)
            act_range(x, y, begin, end, ACT_SILU);
        else if (activation == ACT_GELU_TANH)
            act_range(x, y, begin, end, ACT_GELU_TANH);
        else if (activation == ACT_GELU)
            act_range(x, y, begin, end, ACT_GELU);
        else
            act_range(x, y, begin, end, ACT_RELU2);
    }
}

/* log(1 + e^x); from 20 on, x itself, as in torch. */
static float softplus(float x) {
    return x > 20 ? x : log1pf(expf(x));
}

/* alpha_p x^2 + beta x for x > 0, otherwise alpha_n (e^m - 1 - x) + beta x with m = min(x, eps). */
INLINE __m256 xielu_ps(__m256 x, float alpha_p, float alpha_n, float beta, float eps) {
    __m256 square = _mm256_mul_ps(x, x);
    __m256 positive = _mm256_mul_ps(_mm256_set1_ps(alpha_p), square);
    __m256 m = _mm256_min_ps(_mm256_set1_ps(eps), x); /* in this order, NaN stays NaN */
    __m256 difference = _mm256_add_ps(exp_minus_one_minus(m), _mm256_sub_ps(m, x));
    __m256 negative = _mm256_mul_ps(_mm256_set1_ps(alpha_n), difference);
    __m256 is_positive = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
    __m256 y = _mm256_blendv_ps(negative, positive, is_positive);
    return _mm256_fmadd_ps(_mm256_set1_ps(beta), x, y);
}

/* y = xIELU(x) (arXiv 2411.13010), for `size` elements. The parameters are one number each; the
 * alphas are what softplus is applied to. */
void xielu(const float *x, float *y, int64_t size, const float *raw_alpha_p,
           const float *raw_alpha_n, const float *beta, const float *eps) {
    float alpha_p = softplus(*raw_alpha_p);
    float alpha_n = *beta + softplus(*raw_alpha_n);
    int64_t n_whole = size / 8 * 8;
#pragma omp parallel for if (size > PARALLEL_MIN_ELEMENTS / 4)
    for (int64_t i = 0; i < n_whole; i += 8)
        _mm256_storeu_ps(y + i,
                         xielu_ps(_mm256_loadu_ps(x + i), alpha_p, alpha_n, *beta, *eps));
    if (n_whole < size) {
        float rest[8] = {0};
        memcpy(rest, x + n_whole, (size - n_whole) * sizeof(float));
        _mm256_storeu_ps(rest, xielu_ps(_mm256_loadu_ps(rest), alpha_p, alpha_n, *beta, *eps));
        memcpy(y + n_whole, rest, (size - n_whole) * sizeof(float));
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
