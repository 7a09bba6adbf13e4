/* Linear layers with packed weights: y[rows, cols] = x[rows, depth] w[depth, cols] + bias.
 *
 * A weight is packed into panels of PANEL_WIDTH columns, so that steps over depth read memory
 * sequentially. A tile is some rows of x times some panels; its sums stay in registers. In every
 * tile, an output is one chain of additions in the order of depth, group by group. Results
 * therefore do not depend on the number of rows or threads.
 */

#include "cpu_kernels.h"
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    TILE_ROWS = 6,      /* the most rows of a tile: 12 of the 16 registers hold sums */
    W8A8_TILE_ROWS = 4, /* for integers, whose additions have no latency for more rows to hide */
    ROW_BLOCK = 96,     /* rows in a thread's unit of work */
    MIN_PANELS = 4,     /* the fewest panels in a thread's unit of work */
    FEW_ROWS = 3        /* with at most this many rows, reading the weight is the bottleneck */
};

/* Bytes of PANEL_WIDTH weights: one step over depth. */
#define STEP_BYTES(WEIGHT_TYPE)                                                                    \
    ((WEIGHT_TYPE) == WEIGHT_F32    ? 4 * PANEL_WIDTH                                              \
     : (WEIGHT_TYPE) <= WEIGHT_F16  ? 2 * PANEL_WIDTH                                              \
     : (WEIGHT_TYPE) == WEIGHT_INT8 ? PANEL_WIDTH                                                  \
                                    : PANEL_WIDTH / 2)

size_t packed_panel_bytes(int weight_type, int64_t depth) {
    return STEP_BYTES(weight_type) * depth;
}

static int64_t count_panels(const Linear *p) {
    return (p->cols + PANEL_WIDTH - 1) / PANEL_WIDTH;
}

static int64_t min_int64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Load the weights of step k as two vectors; for 4 bits, those of steps k and k + 1 as four.
 * FP4 weights are loaded as twice their values, which are integers. */
INLINE void load_weights(int weight_type, const char *panel, int64_t k, __m256 *values) {
    if (weight_type == WEIGHT_F32) {
        values[0] = _mm256_loadu_ps((const float *)panel + k * PANEL_WIDTH);
        values[1] = _mm256_loadu_ps((const float *)panel + k * PANEL_WIDTH + 8);
    } else if (weight_type == WEIGHT_BF16) { /* each 32-bit word holds columns j and j + 8 */
        __m256i words = _mm256_loadu_si256((const __m256i *)(panel + k * PANEL_WIDTH * 2));
        __m256i high_half = _mm256_set1_epi32((int)0xffff0000);
        values[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        values[1] = _mm256_castsi256_ps(_mm256_and_si256(words, high_half));
    } else if (weight_type == WEIGHT_F16) {
        const __m128i *halves = (const __m128i *)(panel + k * PANEL_WIDTH * 2);
        values[0] = _mm256_cvtph_ps(_mm_loadu_si128(halves));
        values[1] = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
    } else if (weight_type == WEIGHT_INT8) {
        values[0] = load_int8(panel + k * PANEL_WIDTH);
        values[1] = load_int8(panel + k * PANEL_WIDTH + 8);
    } else { /* 4 bits: the low halves of the bytes are step k, the high halves step k + 1 */
        __m128i bytes = _mm_loadu_si128((const __m128i *)(panel + k * PANEL_WIDTH / 2));
        __m128i low_half = _mm_set1_epi8(15);
        __m128i low = _mm_and_si128(bytes, low_half);
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half);
        if (weight_type == WEIGHT_FP4) { /* E2M1: sign, two bits of exponent, one of mantissa */
            const __m128i twice_value =
                _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
            low = _mm_shuffle_epi8(twice_value, low);
            high = _mm_shuffle_epi8(twice_value, high);
        }
        values[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
        values[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(low, low)));
        values[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
        values[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(high, high)));
    }
}

/* acc[panel][row] = x[row, begin:end] w[begin:end, panel]. */
INLINE void multiply_tile(int weight_type, int n_rows, int n_panels, const Linear *p,
                          const float *x, const char *weight, int64_t begin, int64_t end,
                          __m256 acc[][TILE_ROWS][2]) {
    const int steps = weight_type >= WEIGHT_INT4 ? 2 : 1; /* steps per load */
#pragma GCC unroll 6
    for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 6
        for (int i = 0; i < n_rows; i++) {
            acc[j][i][0] = _mm256_setzero_ps();
            acc[j][i][1] = _mm256_setzero_ps();
        }
    for (int64_t k = begin; k < end; k += steps)
#pragma GCC unroll 6
        for (int j = 0; j < n_panels; j++) {
            const char *panel = weight + j * p->panel_stride;
            __m256 values[4];
            /* With few rows, prefetch further on in this panel, which is read once. With more rows,
             * this panel is read several times, so prefetch the next panel. */
            if (n_rows <= FEW_ROWS)
                _mm_prefetch(panel + k * STEP_BYTES(weight_type) + 512, _MM_HINT_T0);
            else
                _mm_prefetch(panel + p->panel_stride + k * STEP_BYTES(weight_type), _MM_HINT_T1);
            load_weights(weight_type, panel, k, values);
#pragma GCC unroll 2
            for (int s = 0; s < steps; s++)
#pragma GCC unroll 6
                for (int i = 0; i < n_rows; i++) {
                    __m256 input = _mm256_broadcast_ss(x + i * p->x_stride + k + s);
                    acc[j][i][0] = _mm256_fmadd_ps(input, values[2 * s], acc[j][i][0]);
                    acc[j][i][1] = _mm256_fmadd_ps(input, values[2 * s + 1], acc[j][i][1]);
                }
        }
}

/* Scale the sums of one row, panel and group, add the previous groups and the bias, and store. */
INLINE void store_sums(const Linear *p, int64_t row, int64_t col, int64_t group, __m256 low,
                       __m256 high) {
    int64_t n_groups = p->depth / p->group_size;
    int64_t padded_cols = (p->cols + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH;
    float *y = p->y + row * p->y_stride + col;
    float edge[PANEL_WIDTH]; /* used for the last panel, which may extend beyond y */
    int64_t valid = p->cols - col < PANEL_WIDTH ? p->cols - col : PANEL_WIDTH;
    if (valid < PANEL_WIDTH) {
        memset(edge, 0, sizeof edge);
        if (group)
            memcpy(edge, y, valid * sizeof(float));
        y = edge;
    }
    if (p->scales) {
        const float *scales = p->scales + group * padded_cols + col;
        low = _mm256_mul_ps(low, _mm256_loadu_ps(scales));
        high = _mm256_mul_ps(high, _mm256_loadu_ps(scales + 8));
    }
    if (p->offsets) { /* a group has one offset, so its contribution is sum(x) * offset */
        const float *offsets = p->offsets + group * padded_cols + col;
        __m256 sum = _mm256_broadcast_ss(p->group_sums + row * n_groups + group);
        low = _mm256_fnmadd_ps(sum, _mm256_loadu_ps(offsets), low);
        high = _mm256_fnmadd_ps(sum, _mm256_loadu_ps(offsets + 8), high);
    }
    if (group) {
        low = _mm256_add_ps(low, _mm256_loadu_ps(y));
        high = _mm256_add_ps(high, _mm256_loadu_ps(y + 8));
    }
    if (p->bias && group + 1 == n_groups) {
        low = _mm256_add_ps(low, _mm256_loadu_ps(p->bias + col));
        high = _mm256_add_ps(high, _mm256_loadu_ps(p->bias + col + 8));
    }
    _mm256_storeu_ps(y, low);
    _mm256_storeu_ps(y + 8, high);
    if (valid < PANEL_WIDTH)
        memcpy(p->y + row * p->y_stride + col, edge, valid * sizeof(float));
}

/* Compute the outputs of n_rows rows and n_panels panels. */
INLINE void compute_tile(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                         int64_t panel) {
    __m256 acc[4][TILE_ROWS][2];
    for (int64_t group = 0; group * p->group_size < p->depth; group++) {
        multiply_tile(weight_type, n_rows, n_panels, p, p->x + row * p->x_stride,
                      p->weight + panel * p->panel_stride, group * p->group_size,
                      (group + 1) * p->group_size, acc);
#pragma GCC unroll 4
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 6
            for (int i = 0; i < n_rows; i++)
                store_sums(p, row + i, (panel + j) * PANEL_WIDTH, group, acc[j][i][0],
                           acc[j][i][1]);
    }
}

/* Compute n_rows rows of the panels [panel, end_panel), n_panels at a time. */
INLINE void compute_rows(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                         int64_t panel, int64_t end_panel) {
    for (; panel + n_panels <= end_panel; panel += n_panels)
        compute_tile(weight_type, n_rows, n_panels, p, row, panel);
    for (; panel < end_panel; panel++)
        compute_tile(weight_type, n_rows, 1, p, row, panel);
}

/* A function for each weight type, with a tile for each number of rows. A tile of few rows covers
 * several panels, so that enough independent additions run at once to hide their latency. */
#define DEFINE_LINEAR_ROWS(NAME, WEIGHT_TYPE)                                                      \
    static void NAME(const Linear *p, int64_t row, int64_t n_rows, int64_t panel,                  \
                     int64_t end_panel) {                                                          \
        switch (n_rows) {                                                                          \
            case 1:                                                                                \
                compute_rows(WEIGHT_TYPE, 1, 4, p, row, panel, end_panel);                         \
                break;                                                                             \
            case 2:                                                                                \
                compute_rows(WEIGHT_TYPE, 2, 2, p, row, panel, end_panel);                         \
                break;                                                                             \
            case 3:                                                                                \
                compute_rows(WEIGHT_TYPE, 3, 2, p, row, panel, end_panel);                         \
                break;                                                                             \
            case 4:                                                                                \
                compute_rows(WEIGHT_TYPE, 4, 1, p, row, panel, end_panel);                         \
                break;                                                                             \
            case 5:                                                                                \
                compute_rows(WEIGHT_TYPE, 5, 1, p, row, panel, end_panel);                         \
                break;                                                                             \
            default:                                                                               \
                compute_rows(WEIGHT_TYPE, 6, 1, p, row, panel, end_panel);                         \
        }                                                                                          \
    }
DEFINE_LINEAR_ROWS(linear_rows_f32, WEIGHT_F32)
DEFINE_LINEAR_ROWS(linear_rows_bf16, WEIGHT_BF16)
DEFINE_LINEAR_ROWS(linear_rows_f16, WEIGHT_F16)
DEFINE_LINEAR_ROWS(linear_rows_int8, WEIGHT_INT8)
DEFINE_LINEAR_ROWS(linear_rows_int4, WEIGHT_INT4)
DEFINE_LINEAR_ROWS(linear_rows_fp4, WEIGHT_FP4)

typedef void (*LinearRows)(const Linear *, int64_t row, int64_t n_rows, int64_t panel,
                           int64_t end_panel);

/* The sums of a row of x over each group. */
static void sum_groups(const Linear *p, const float *x, float *sums) {
    for (int64_t group = 0; group * p->group_size < p->depth; group++) {
        int64_t k = group * p->group_size;
        int64_t end = k + p->group_size;
        __m256 lanes = _mm256_setzero_ps();
        float rest = 0;
        for (; k + 8 <= end; k += 8)
            lanes = _mm256_add_ps(lanes, _mm256_loadu_ps(x + k));
        for (; k < end; k++)
            rest += x[k];
        sums[group] = horizontal_sum(lanes) + rest;
    }
}

/* Convert a panel of 4-bit weights to float32. */
INLINE void unpack_4bit_panel(int weight_type, const Linear *p, const char *weight, float *to) {
    __m256 values[4];
    for (int64_t k = 0; k < p->depth; k += 2, to += 2 * PANEL_WIDTH) {
        load_weights(weight_type, weight, k, values);
        _mm256_storeu_ps(to, values[0]);
        _mm256_storeu_ps(to + 8, values[1]);
        _mm256_storeu_ps(to + 16, values[2]);
        _mm256_storeu_ps(to + 24, values[3]);
    }
}

/* Convert a panel of int8 or 4-bit weights to float32, once for many rows. */
static void unpack_panel(const Linear *p, int64_t panel, float *to) {
    const char *weight = p->weight + panel * p->panel_stride;
    __m256 values[4];
    if (p->weight_type == WEIGHT_INT4)
        unpack_4bit_panel(WEIGHT_INT4, p, weight, to);
    else if (p->weight_type == WEIGHT_FP4)
        unpack_4bit_panel(WEIGHT_FP4, p, weight, to);
    else
        for (int64_t k = 0; k < p->depth; k++, to += PANEL_WIDTH) {
            load_weights(WEIGHT_INT8, weight, k, values);
            _mm256_storeu_ps(to, values[0]);
            _mm256_storeu_ps(to + 8, values[1]);
        }
}

/* The number of panels in a thread's unit of work, such that each thread gets about `turns` units.
 * The panels of a unit are neighbours, because the next panel is prefetched. */
static int64_t panels_per_turn(int64_t n_panels, int64_t turns) {
#ifdef _OPENMP
    turns *= omp_get_max_threads();
#endif
    return n_panels > MIN_PANELS * turns ? (n_panels + turns - 1) / turns : MIN_PANELS;
}

void linear(const Linear *p, float *group_sums) {
    static const LinearRows by_weight_type[] = {linear_rows_f32, linear_rows_bf16, linear_rows_f16,
                                                linear_rows_int8, linear_rows_int4,
                                                linear_rows_fp4};
    LinearRows linear_rows = by_weight_type[p->weight_type];
    int64_t n_panels = count_panels(p);
    int64_t n_groups = p->depth / p->group_size;
    int64_t chunk_panels; /* panels in a thread's unit of work */
    if (p->rows > FEW_ROWS)
        chunk_panels = panels_per_turn(n_panels, 2);
    else
        chunk_panels = n_panels > 32 * MIN_PANELS ? 8 * MIN_PANELS : MIN_PANELS;
    int64_t n_chunks = (n_panels + chunk_panels - 1) / chunk_panels;
    int64_t n_blocks = (p->rows + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel
    {
        if (group_sums) {
#pragma omp for
            for (int64_t row = 0; row < p->rows; row++)
                sum_groups(p, p->x + row * p->x_stride, group_sums + row * n_groups);
        }
        /* With more rows than one tile, integer weights are unpacked once for all rows. If malloc
         * fails, each tile unpacks them. */
        float *unpacked = NULL;
        if (p->weight_type >= WEIGHT_INT8 && p->rows > TILE_ROWS)
            unpacked = malloc(p->depth * PANEL_WIDTH * sizeof(float));
        Linear with_unpacked = *p;
        with_unpacked.weight = (const char *)unpacked;
        with_unpacked.panel_stride = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_blocks * n_chunks; i++) {
            int64_t first_row = i / n_chunks * ROW_BLOCK;
            int64_t end_row = min_int64(first_row + ROW_BLOCK, p->rows);
            int64_t first_panel = i % n_chunks * chunk_panels;
            int64_t end_panel = min_int64(first_panel + chunk_panels, n_panels);
            if (p->rows <= FEW_ROWS) {
                linear_rows(p, 0, p->rows, first_panel, end_panel);
                continue;
            }
            for (int64_t panel = first_panel; panel < end_panel; panel++) {
                if (unpacked)
                    unpack_panel(p, panel, unpacked);
                for (int64_t row = first_row; row < end_row; row += TILE_ROWS) {
                    int64_t n_rows = min_int64(end_row - row, TILE_ROWS);
                    if (unpacked)
                        linear_rows_f32(&with_unpacked, row, n_rows, panel, panel + 1);
                    else
                        linear_rows(p, row, n_rows, panel, panel + 1);
                }
            }
        }
        free(unpacked);
    }
}

/* ---- W8A8: int8 weights, quantized inputs, sums of integers ---- */

/* Load steps k and k + 1 of a panel of int8 as a pair of 16-bit integers for each column. */
INLINE void load_pairs(const char *panel, int64_t k, __m256i *pairs) {
    __m128i even = _mm_loadu_si128((const __m128i *)(panel + k * PANEL_WIDTH));
    __m128i odd = _mm_loadu_si128((const __m128i *)(panel + (k + 1) * PANEL_WIDTH));
    pairs[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(even, odd));
    pairs[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(even, odd));
}

/* Compute n_rows rows of one panel. unpacked: the panel as pairs, if `is_unpacked`.
 *
 * The sums are exact: only a depth above 130,000 could overflow 32 bits.
 */
INLINE void compute_w8a8_tile(int n_rows, int is_unpacked, const LinearW8A8 *p, int64_t row,
                              int64_t panel, const int16_t *unpacked) {
    const Linear *linear = &p->linear;
    const int16_t *q = p->q + row * linear->depth;
    const char *weight = linear->weight + panel * linear->panel_stride;
    __m256i acc[W8A8_TILE_ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        acc[i][0] = _mm256_setzero_si256();
        acc[i][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < linear->depth; k += 2) {
        __m256i pairs[2];
        if (is_unpacked) {
            _mm_prefetch(weight + linear->panel_stride + k * PANEL_WIDTH, _MM_HINT_T1);
            pairs[0] = _mm256_loadu_si256((const __m256i *)(unpacked + k * PANEL_WIDTH));
            pairs[1] = _mm256_loadu_si256((const __m256i *)(unpacked + k * PANEL_WIDTH + 16));
        } else {
            _mm_prefetch(weight + k * PANEL_WIDTH + 512, _MM_HINT_T0);
            load_pairs(weight, k, pairs);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n_rows; i++) {
            int32_t two_inputs;
            memcpy(&two_inputs, q + i * linear->depth + k, sizeof two_inputs);
            __m256i inputs = _mm256_set1_epi32(two_inputs);
            acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(inputs, pairs[0]));
            acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(inputs, pairs[1]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        __m256 row_scale = _mm256_broadcast_ss(p->row_scales + row + i);
        __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[i][0]), row_scale);
        __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[i][1]), row_scale);
        store_sums(linear, row + i, panel * PANEL_WIDTH, 0, low, high);
    }
}

#define DEFINE_W8A8_ROWS(NAME, IS_UNPACKED)                                                        \
    static void NAME(int64_t n_rows, const LinearW8A8 *p, int64_t row, int64_t panel,              \
                     const int16_t *unpacked) {                                                    \
        switch (n_rows) {                                                                          \
            case 1:                                                                                \
                compute_w8a8_tile(1, IS_UNPACKED, p, row, panel, unpacked);                        \
                break;                                                                             \
            case 2:                                                                                \
                compute_w8a8_tile(2, IS_UNPACKED, p, row, panel, unpacked);                        \
                break;                                                                             \
            case 3:                                                                                \
                compute_w8a8_tile(3, IS_UNPACKED, p, row, panel, unpacked);                        \
                break;                                                                             \
            default:                                                                               \
                compute_w8a8_tile(4, IS_UNPACKED, p, row, panel, unpacked);                        \
        }                                                                                          \
    }
DEFINE_W8A8_ROWS(w8a8_rows_packed, 0)
DEFINE_W8A8_ROWS(w8a8_rows_unpacked, 1)

/* Convert a panel of int8 to pairs of 16-bit integers, once for many rows. */
static void unpack_pairs(const Linear *p, int64_t panel, int16_t *to) {
    const char *weight = p->weight + panel * p->panel_stride;
    for (int64_t k = 0; k < p->depth; k += 2) {
        __m256i pairs[2];
        load_pairs(weight, k, pairs);
        _mm256_storeu_si256((__m256i *)(to + k * PANEL_WIDTH), pairs[0]);
        _mm256_storeu_si256((__m256i *)(to + k * PANEL_WIDTH + 16), pairs[1]);
    }
}

void linear_w8a8(const LinearW8A8 *p) {
    int64_t rows = p->linear.rows;
    int64_t n_panels = count_panels(&p->linear);
    int64_t chunk_panels = panels_per_turn(n_panels, rows > FEW_ROWS ? 2 : 1);
    int64_t n_chunks = (n_panels + chunk_panels - 1) / chunk_panels;
    int64_t n_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel
    {
        int16_t *unpacked = NULL;
        if (rows > W8A8_TILE_ROWS)
            unpacked = malloc(p->linear.depth * PANEL_WIDTH * sizeof *unpacked);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_blocks * n_chunks; i++) {
            int64_t first_row = i / n_chunks * ROW_BLOCK;
            int64_t end_row = min_int64(first_row + ROW_BLOCK, rows);
            int64_t first_panel = i % n_chunks * chunk_panels;
            int64_t end_panel = min_int64(first_panel + chunk_panels, n_panels);
            for (int64_t panel = first_panel; panel < end_panel; panel++) {
                if (unpacked)
                    unpack_pairs(&p->linear, panel, unpacked);
                for (int64_t row = first_row; row < end_row; row += W8A8_TILE_ROWS) {
                    if (unpacked)
                        w8a8_rows_unpacked(end_row - row, p, row, panel, unpacked);
                    else
                        w8a8_rows_packed(end_row - row, p, row, panel, NULL);
                }
            }
        }
        free(unpacked);
    }
}
