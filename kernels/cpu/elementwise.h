/* The operations between the linear layers: norms, residual additions, rotary embeddings, writes
 * to the KV cache and activations. */

/* An exponential is more expensive than other operations, so that fewer elements justify several
 * threads. */
enum { ACT_MIN_ELEMENTS = PARALLEL_MIN_ELEMENTS / 4 };

/* A cache is too large for the processor's caches: each token waits for memory. */
enum { STORE_MIN_ELEMENTS = PARALLEL_MIN_ELEMENTS / 8 };

static float row_sum(const float *row, int64_t size) {
    vfloat sums = v_zero();
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH)
        sums = v_add(sums, load_of_row(row, d, size));
    return v_sum(sums);
}

/* The sum of (row - mean)^2. */
static float square_sum(const float *row, int64_t size, float mean) {
    vfloat squares = v_zero();
    int64_t d = 0;
    for (; d + VECTOR_WIDTH <= size; d += VECTOR_WIDTH) {
        vfloat x = v_sub(v_load(row + d), v_set(mean));
        squares = v_fma(x, x, squares);
    }
    float rest = 0;
    for (; d < size; d++)
        rest += (row[d] - mean) * (row[d] - mean);
    return v_sum(squares) + rest;
}

/* y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias. bias: NULL: none. rounds: y is
 * bfloat16, of whole vectors. */
INLINE void norm_row_as(int rounds, const float *x, const float *weight, const float *bias,
                        void *y, int64_t size, int subtract_mean, float eps) {
    float mean = subtract_mean ? row_sum(x, size) / (float)size : 0.0f;
    float variance = square_sum(x, size, mean) / (float)size;
    vfloat factor = v_set(1.0f / sqrtf(variance + eps));
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
        vfloat centered = v_sub(load_of_row(x, d, size), v_set(mean));
        vfloat scaled = v_mul(v_mul(centered, factor), load_of_row(weight, d, size));
        if (bias)
            scaled = v_add(scaled, load_of_row(bias, d, size));
#if defined(LEVEL_BF16)
        if (rounds) {
            v_store_bf16((uint16_t *)y + d, scaled);
            continue;
        }
#endif
        (void)rounds;
        store_of_row(y, d, size, scaled);
    }
}

INLINE void norm_row(const float *x, const float *weight, const float *bias, float *y,
                     int64_t size, int subtract_mean, float eps) {
    norm_row_as(0, x, weight, bias, y, size, subtract_mean, eps);
}

/* y = x + scale * update. */
INLINE void add_scaled(const float *x, const float *update, float scale, float *y, int64_t size) {
    vfloat factor = v_set(scale);
    for (int64_t i = 0; i < size; i += VECTOR_WIDTH)
        store_of_row(y, i, size,
                     v_fma(factor, load_of_row(update, i, size), load_of_row(x, i, size)));
}

static void norm_rows(const void *operation, int64_t begin, int64_t end) {
    const Norm *o = operation;
    int64_t size = o->hidden_size;
    for (int64_t row = begin; row < end; row++) {
        const float *x = o->x + row * size;
        if (o->update) {
            add_scaled(x, o->update + row * size, o->scale, o->sum + row * size, size);
            x = o->sum + row * size;
        }
        if (o->rounds)
            norm_row_as(1, x, o->weight, o->bias, (uint16_t *)o->y + row * size, size,
                        o->subtract_mean, o->eps);
        else
            norm_row(x, o->weight, o->bias, o->y + row * size, size, o->subtract_mean, o->eps);
    }
}

static int norm(const Norm *o) {
    run_ranges(o->rows, 1 + PARALLEL_MIN_ELEMENTS / o->hidden_size, norm_rows, o);
    return 1;
}

static void norm_heads_of_tokens(const void *operation, int64_t begin, int64_t end) {
    const HeadNorm *o = operation;
    for (int64_t token = begin; token < end; token++)
        for (int64_t head = 0; head < o->n_heads; head++) {
            float *values = o->x + token * o->x_stride + head * o->head_dim;
            norm_row(values, o->weight + head * o->weight_stride, NULL, values, o->head_dim,
                     o->subtract_mean, o->eps);
        }
}

static int norm_heads(const HeadNorm *o) {
    int64_t elements = o->n_heads * o->head_dim;
    run_ranges(o->n_tokens, 1 + PARALLEL_MIN_ELEMENTS / elements, norm_heads_of_tokens, o);
    return 1;
}

static void add_elements(const void *operation, int64_t begin, int64_t end) {
    const Residual *o = operation;
    add_scaled(o->residual + begin, o->update + begin, o->scale, o->y + begin, end - begin);
}

static int add_residual(const Residual *o) {
    run_ranges(o->size, PARALLEL_MIN_ELEMENTS, add_elements, o);
    return 1;
}

static void scale_range_of_tokens(const void *operation, int64_t begin, int64_t end) {
    const TokenScales *o = operation;
    for (int64_t token = begin; token < end; token++) {
        float *x = o->x + token * o->x_stride;
        vfloat factor = v_set(o->factors[token]);
        for (int64_t i = 0; i < o->size; i += VECTOR_WIDTH)
            store_of_row(x, i, o->size, v_mul(load_of_row(x, i, o->size), factor));
    }
}

static int scale_tokens(const TokenScales *o) {
    run_ranges(o->n_tokens, 1 + PARALLEL_MIN_ELEMENTS / o->size, scale_range_of_tokens, o);
    return 1;
}

/* Rotate the pairs (i, half + i) of a head. */
INLINE void rotate_halves(float *head, const float *c, const float *s, int64_t half) {
    for (int64_t d = 0; d < half; d += VECTOR_WIDTH) {
        vfloat left = load_of_row(head, d, half);
        vfloat right = load_of_row(head + half, d, half);
        vfloat first = v_mul(right, load_of_row(s, d, half));
        vfloat second = v_mul(left, load_of_row(s + half, d, half));
        store_of_row(head, d, half, v_fma(left, load_of_row(c, d, half), first));
        store_of_row(head + half, d, half, v_fma(right, load_of_row(c + half, d, half), second));
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

static void rotate_tokens(const void *operation, int64_t begin, int64_t end) {
    const Rotary *o = operation;
    for (int64_t token = begin; token < end; token++) {
        const float *c = o->cos + token * 2 * o->half;
        const float *s = o->sin + token * 2 * o->half;
        float *heads = o->x + token * o->x_stride;
        for (int64_t head = 0; head < o->n_heads; head++)
            if (o->interleaved)
                rotate_pairs(heads + head * o->head_stride, c, s, o->half);
            else
                rotate_halves(heads + head * o->head_stride, c, s, o->half);
    }
}

static int apply_rotary_emb(const Rotary *o) {
    int64_t elements = o->n_heads * 2 * o->half;
    run_ranges(o->n_tokens, 1 + PARALLEL_MIN_ELEMENTS / elements, rotate_tokens, o);
    return 1;
}

/* The scale of a token: its largest magnitude / largest_value, as in activation_quant.py. */
static float token_scale(const float *x, int64_t size, float largest_value) {
    vfloat largest = v_zero();
    vfloat zeros = v_zero(); /* or NaN, where the token has NaN or infinity */
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
        vfloat part = load_of_row(x, d, size);
        largest = v_max(largest, v_abs(part));
        zeros = v_fma(part, v_zero(), zeros);
    }
    float scale = v_largest(largest) / largest_value;
    return (scale < 1e-12f ? 1e-12f : scale) + v_sum(zeros);
}

/* Write the elements of a token of one head, as kv_types.h describes. */
INLINE void store_head(const float *x, int64_t slot, int64_t head_dim, int is_key, float scale,
                       char *cache, int kv_type) {
    const int values = kv_word_values(kv_type);
    char elements[4 * (MAX_HEAD_DIM + VECTOR_WIDTH)];
    for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH)
        store_elements(elements + d * kv_element_size(kv_type), load_of_row(x, d, head_dim),
                       kv_type, scale);
    if (is_key) { /* whole words */
        char *to = cache + first_key_element(slot, head_dim, values) * kv_element_size(kv_type);
        for (int64_t d = 0; d < head_dim; d += values)
            memcpy(to + d / values * PANEL_WIDTH * 4, elements + d / values * 4, 4);
    } else if (kv_type == KV_F32) {
        memcpy(cache + slot * head_dim * 4, elements, head_dim * 4);
    } else {
        char *to = cache + first_value_element(slot, head_dim, values) * kv_element_size(kv_type);
        for (int64_t d = 0; d < head_dim; d++)
            memcpy(to + d * 4, elements + d * kv_element_size(kv_type), kv_element_size(kv_type));
    }
}

/* A row of elements of a token, with room for whole vectors. */
typedef float TokenElements[MAX_HEAD_DIM + VECTOR_WIDTH];

/* Write a panel of keys: the words of PANEL_WIDTH tokens, transposed. */
INLINE void store_key_panel(const TokenElements *tokens, int64_t n_words, float *to) {
    int64_t word = 0;
    for (; word + VECTOR_WIDTH <= n_words; word += VECTOR_WIDTH)
        for (int64_t t = 0; t < PANEL_WIDTH; t += VECTOR_WIDTH) {
            vfloat square[VECTOR_WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < VECTOR_WIDTH; i++)
                square[i] = v_load(tokens[t + i] + word);
            v_transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VECTOR_WIDTH; i++)
                v_store(to + (word + i) * PANEL_WIDTH + t, square[i]);
        }
    for (; word < n_words; word++)
        for (int64_t t = 0; t < PANEL_WIDTH; t++)
            memcpy(to + word * PANEL_WIDTH + t, tokens[t] + word, sizeof *to);
}

/* Write the values of PANEL_WIDTH tokens: of each word's tokens, one dimension after the other. */
INLINE void store_value_panel(const TokenElements *tokens, int64_t head_dim, char *to,
                              int kv_type) {
    const int values = kv_word_values(kv_type);
    for (int64_t t = 0; t < PANEL_WIDTH; t += values, to += head_dim * 4)
        if (kv_type == KV_F32)
            memcpy(to, tokens[t], head_dim * 4);
        else
            for (int64_t d = 0; d < head_dim; d++)
#pragma GCC unroll 4
                for (int k = 0; k < values; k++)
                    if (kv_element_size(kv_type) == 2)
                        ((uint16_t *)to)[d * values + k] = ((const uint16_t *)tokens[t + k])[d];
                    else
                        ((uint8_t *)to)[d * values + k] = ((const uint8_t *)tokens[t + k])[d];
}

/* The scale of a token of a head; a new one is written to the cache. */
INLINE float store_scale(const StoreKv *o, const float *x, int64_t head, int64_t slot,
                         int kv_type) {
    if (!kv_is_quantized(kv_type))
        return 1;
    if (o->static_scales)
        return o->scales[head];
    float scale = token_scale(x, o->head_dim, kv_type == KV_INT8 ? 127.0f : 448.0f);
    o->scales[head * (o->head_stride / o->head_dim) + slot] = scale;
    return scale;
}

/* Whether PANEL_WIDTH tokens take the slots of a panel. */
static int is_panel(const int64_t *slots, int64_t n_tokens) {
    if (n_tokens < PANEL_WIDTH || slots[0] % PANEL_WIDTH != 0)
        return 0;
    for (int64_t t = 1; t < PANEL_WIDTH; t++)
        if (slots[t] != slots[0] + t)
            return 0;
    return 1;
}

INLINE void store_tokens_as(const StoreKv *o, int64_t begin, int64_t end, int kv_type) {
    for (int64_t head = 0; head < o->n_heads; head++) {
        char *cache = o->cache + head * o->head_stride * kv_element_size(kv_type);
        const int is_key = head < o->n_heads / 2;
        for (int64_t token = begin; token < end;) {
            const float *x = o->kv + token * o->kv_stride + head * o->head_dim;
            int64_t slot = o->slot_mapping[token];
            if (!is_panel(o->slot_mapping + token, end - token)) {
                float scale = store_scale(o, x, head, slot, kv_type);
                store_head(x, slot, o->head_dim, is_key, scale, cache, kv_type);
                token++;
                continue;
            }
            TokenElements tokens[PANEL_WIDTH];
            for (int64_t t = 0; t < PANEL_WIDTH; t++, x += o->kv_stride) {
                float scale = store_scale(o, x, head, slot + t, kv_type);
                for (int64_t d = 0; d < o->head_dim; d += VECTOR_WIDTH)
                    store_elements((char *)tokens[t] + d * kv_element_size(kv_type),
                                   load_of_row(x, d, o->head_dim), kv_type, scale);
            }
            char *to = cache + slot * o->head_dim * kv_element_size(kv_type);
            if (is_key)
                store_key_panel(tokens, o->head_dim / kv_word_values(kv_type), (float *)to);
            else
                store_value_panel(tokens, o->head_dim, to, kv_type);
            token += PANEL_WIDTH;
        }
    }
}

static void store_tokens(const void *operation, int64_t begin, int64_t end) {
    const StoreKv *o = operation;
    if (o->kv_type == KV_F32)
        store_tokens_as(o, begin, end, KV_F32);
    else if (o->kv_type == KV_BF16)
        store_tokens_as(o, begin, end, KV_BF16);
    else if (o->kv_type == KV_F16)
        store_tokens_as(o, begin, end, KV_F16);
    else if (o->kv_type == KV_INT8)
        store_tokens_as(o, begin, end, KV_INT8);
    else
        store_tokens_as(o, begin, end, KV_FP8);
}

static int store_kv(const StoreKv *o) {
    int64_t elements = o->n_heads * o->head_dim;
    run_ranges(o->n_tokens, 1 + STORE_MIN_ELEMENTS / elements, store_tokens, o);
    return 1;
}

INLINE void act_and_mul_rows_with(const Activation *o, int64_t begin, int64_t end,
                                  int activation) {
    int64_t size = o->size;
    for (int64_t row = begin; row < end; row++) {
        const float *gates = o->x + row * 2 * size;
        for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
            vfloat gate = load_of_row(gates, d, size);
            vfloat up = load_of_row(gates + size, d, size);
            vfloat y = activate_gate(gate, up, activation, o->limit, o->alpha);
            store_of_row(o->y + row * size, d, size, y);
        }
    }
}

static void act_and_mul_rows(const void *operation, int64_t begin, int64_t end) {
    const Activation *o = operation;
    if (o->activation == ACT_SILU)
        act_and_mul_rows_with(o, begin, end, ACT_SILU);
    else if (o->activation == ACT_GELU_TANH)
        act_and_mul_rows_with(o, begin, end, ACT_GELU_TANH);
    else if (o->activation == ACT_GELU)
        act_and_mul_rows_with(o, begin, end, ACT_GELU);
    else if (o->activation == ACT_SWIGLU_CLAMPED)
        act_and_mul_rows_with(o, begin, end, ACT_SWIGLU_CLAMPED);
    else
        act_and_mul_rows_with(o, begin, end, ACT_RELU2);
}

static int act_and_mul(const Activation *o) {
    run_ranges(o->rows, 1 + ACT_MIN_ELEMENTS / o->size, act_and_mul_rows, o);
    return 1;
}

INLINE void act_elements_with(const Activation *o, int64_t begin, int64_t end, int activation) {
    for (int64_t i = begin; i < end; i += VECTOR_WIDTH)
        store_of_row(o->y, i, end, activate(load_of_row(o->x, i, end), activation));
}

static void act_elements(const void *operation, int64_t begin, int64_t end) {
    const Activation *o = operation;
    if (o->activation == ACT_SILU)
        act_elements_with(o, begin, end, ACT_SILU);
    else if (o->activation == ACT_GELU_TANH)
        act_elements_with(o, begin, end, ACT_GELU_TANH);
    else if (o->activation == ACT_GELU)
        act_elements_with(o, begin, end, ACT_GELU);
    else
        act_elements_with(o, begin, end, ACT_RELU2);
}

static int act(const Activation *o) {
    run_ranges(o->rows * o->size, ACT_MIN_ELEMENTS, act_elements, o);
    return 1;
}

/* log(1 + e^x); from 20 on, x itself, as in torch. */
static float softplus(float x) {
    return x > 20 ? x : log1pf(expf(x));
}

/* alpha_p x^2 + beta x for x > 0, otherwise alpha_n (e^m - 1 - x) + beta x with m = min(x, eps). */
INLINE vfloat xielu_of(vfloat x, float alpha_p, float alpha_n, float beta, float eps) {
    vfloat positive = v_mul(v_set(alpha_p), v_mul(x, x));
    vfloat m = v_min(v_set(eps), x); /* in this order, NaN stays NaN */
    vfloat difference = v_add(exp_minus_one_minus(m), v_sub(m, x));
    vfloat negative = v_mul(v_set(alpha_n), difference);
    vfloat y = v_select(v_less(v_zero(), x), positive, negative);
    return v_fma(v_set(beta), x, y);
}

static void xielu_elements(const void *operation, int64_t begin, int64_t end) {
    const Xielu *o = operation;
    float alpha_p = softplus(*o->raw_alpha_p);
    float alpha_n = *o->beta + softplus(*o->raw_alpha_n);
    for (int64_t i = begin; i < end; i += VECTOR_WIDTH) {
        vfloat x = load_of_row(o->x, i, end);
        store_of_row(o->y, i, end, xielu_of(x, alpha_p, alpha_n, *o->beta, *o->eps));
    }
}

static int xielu(const Xielu *o) {
    run_ranges(o->size, ACT_MIN_ELEMENTS, xielu_elements, o);
    return 1;
}

static void gate_rows(const void *operation, int64_t begin, int64_t end) {
    const Gate *o = operation;
    for (int64_t row = begin; row < end; row++) {
        const float *x = o->x + row * o->size;
        const float *gates = o->gate + row * o->gate_stride;
        float *y = o->y + row * o->size;
        for (int64_t d = 0; d < o->size; d += VECTOR_WIDTH) {
            vfloat gate = o->per_row ? v_set(*gates) : load_of_row(gates, d, o->size);
            if (o->activation == GATE_SIGMOID) {
                gate = sigmoid_ps(gate);
            } else if (o->activation == GATE_SOFTPLUS) {
                float values[VECTOR_WIDTH];
                v_store(values, gate);
                for (int i = 0; i < VECTOR_WIDTH; i++)
                    values[i] = softplus(values[i]);
                gate = v_load(values);
            }
            store_of_row(y, d, o->size, v_mul(load_of_row(x, d, o->size), gate));
        }
    }
}

static int apply_gate(const Gate *o) {
    run_ranges(o->rows, 1 + ACT_MIN_ELEMENTS / o->size, gate_rows, o);
    return 1;
}

static void copy_range_of_rows(const void *operation, int64_t begin, int64_t end) {
    const RowCopy *o = operation;
    for (int64_t row = begin; row < end; row++)
        memcpy(o->to + row * o->to_stride, o->from + row * o->from_stride, o->size * sizeof(float));
}

static int copy_rows(const RowCopy *o) {
    run_ranges(o->rows, 1 + PARALLEL_MIN_ELEMENTS / o->size, copy_range_of_rows, o);
    return 1;
}
