/* Linear layers with packed weights: y[rows, cols] = inputs[rows, depth] w[depth, cols] + bias.
 *
 * A weight is packed into panels of PANEL_WIDTH columns. A panel is a sequence of words of 32 bits,
 * PANEL_WIDTH of them for each step over depth, one a column. A word holds as many consecutive
 * values of its column as fit: one float32, two bfloat16, four int8 or eight 4-bit values. Steps
 * read memory sequentially, and integer and bfloat16 instructions take words as they are. FP8 has
 * no such instructions: PANEL_WIDTH bytes are the columns of one input.
 *
 * Inputs are float32, or rounded to bfloat16 or to int8 before the product (`Linear.inputs`). FP8
 * inputs are multiplied as bfloat16 or float32, and FP4 inputs as int8, all of which hold them
 * exactly. With bfloat16 inputs, weights of 8 and 4 bits become bfloat16, which holds them exactly.
 * Integer sums are exact: every level gives the same bits. In other cases, each level adds the
 * products of a group in one order, in every tile, and then the groups in their order. Results
 * therefore do not depend on the number of rows or threads. They do depend on the level.
 */

enum {
    VECTORS = PANEL_WIDTH / VECTOR_WIDTH, /* of a step over depth, in a panel */
    MIN_PANELS = 4,                       /* the fewest panels of a piece with few rows */
    PIECES_OF_THREAD = 8, /* many, because the last ones of an operation are waited for */
    PIECE_BYTES = 1 << 18, /* the most bytes of weights of a piece with few rows */
    ROW_BLOCK = 96, /* rows of a piece are a multiple: whole tiles of every kind */
    GATE_PANELS = 4, /* of gate, and as many of up, whose outputs are in the cache */
    ROW_BLOCK_BYTES = 1 << 20, /* of inputs that stay in the larger caches while panels change */
    PREFETCH_BYTES = 2048,
    /* With float32 inputs, the most rows that are multiplied without unpacking panels first. */
    FEW_ROWS = 4,
#if defined(LEVEL_AVX512)
    /* Rows and panels of a tile of float32: its sums, the inputs of a step and a weight must fit
       into the 32 registers. */
    FLOAT_ROWS = 8,
    FLOAT_PANELS = 2,
    INT8_ROWS = 8, /* the same of int8 and bfloat16 */
    INT8_PANELS = 2,
    FEW_ROWS_PANELS = 4,
#else
    FLOAT_ROWS = 6,
    FLOAT_PANELS = 1,
    INT8_ROWS = 4,
    INT8_PANELS = 1,
    FEW_ROWS_PANELS = 2,
#endif
};

INLINE int64_t min_int64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

INLINE int64_t max_int64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

INLINE float float_of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- weights ---- */

static const int8_t TWICE_FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

#if defined(LEVEL_AVX512)
/* The values of 4-bit codes, as `word_value` has them. */
static const float FLOATS_OF_UINT4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const float FLOATS_OF_INT4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const float FLOATS_OF_FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#endif

#if defined(LEVEL_AVX512) && defined(LEVEL_BF16)
/* The same values in bfloat16, twice, as bit 4 of an index may be anything. */
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
static const uint16_t BF16_OF_UINT4[32] =
    TWICE(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, /* 0 .. 7 */
          0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
static const uint16_t BF16_OF_INT4[32] =
    TWICE(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, /* -8 .. -1 */
          0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
static const uint16_t BF16_OF_FP4[32] =
    TWICE(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40c0, 0x4100, 0x4140, /* 0 .. 12 */
          0x0000, 0xbf80, 0xc000, 0xc040, 0xc080, 0xc0c0, 0xc100, 0xc140);
#undef TWICE
#endif

/* Values of a word. */
INLINE int word_values(int weight_type) {
    return weight_type == WEIGHT_F32    ? 1
           : weight_type <= WEIGHT_F16  ? 2
           : weight_type == WEIGHT_INT8 ? 4
           : weight_type == WEIGHT_FP8  ? 4
           : weight_type == WEIGHT_BF16_COMPRESSED ? 2
                                                   : 8;
}

/* Convert value i of each word to float; FP4 to twice its value, which is an integer. */
INLINE vfloat word_value(int weight_type, vint words, int i) {
    if (weight_type == WEIGHT_F32)
        return vi_as_float(words);
    if (weight_type == WEIGHT_BF16)
        return vi_as_float(i ? vi_and(words, vi_set((int)0xffff0000)) : vi_shift_left(words, 16));
    if (weight_type == WEIGHT_F16)
        return vi_f16_to_float(i ? vi_shift_right(words, 16) : words);
    if (weight_type == WEIGHT_INT8)
        return vi_to_float(vi_shift_right_signed(vi_shift_left(words, 24 - 8 * i), 24));
    /* Of byte b: the low half is value b, the high half value b + 4. */
    vint codes = vi_shift_right(words, i < 4 ? 8 * i : 8 * (i - 4) + 4);
#if defined(LEVEL_AVX512)
    return v_lookup(weight_type == WEIGHT_UINT4  ? FLOATS_OF_UINT4
                    : weight_type == WEIGHT_INT4 ? FLOATS_OF_INT4
                                                 : FLOATS_OF_FP4,
                    codes);
#endif
    codes = vi_and(codes, vi_set(15));
    if (weight_type == WEIGHT_UINT4)
        return vi_to_float(codes);
    if (weight_type == WEIGHT_INT4)
        return vi_to_float(vi_sub(codes, vi_set(INT4_ZERO)));
    vint bytes = vi_lookup(TWICE_FP4, codes);
    return vi_to_float(vi_shift_right_signed(vi_shift_left(bytes, 24), 24));
}

/* Value i of the words of a step that vector v holds, as floats. */
INLINE vfloat step_value(int weight_type, const char *step, vint words, int i, int v) {
    if (weight_type == WEIGHT_FP8)
        return v_load_fp8(step + i * PANEL_WIDTH + v * VECTOR_WIDTH);
    return word_value(weight_type, words, i);
}

/* The bytes of 4-bit values 0 .. 3 (half 0) or 4 .. 7 (half 1) of each word: codes of integers,
 * values of FP4. */
INLINE vint bytes_of_half(int weight_type, vint words, int half) {
    vint codes = vi_and(half ? vi_shift_right(words, 4) : words, vi_set(0x0f0f0f0f));
    return weight_type == WEIGHT_FP4 ? vi_lookup(TWICE_FP4, codes) : codes;
}

/* The zero point of the bytes that are multiplied. */
INLINE int surplus_of_weights(int weight_type, int dot_weight_offset) {
    return weight_type == WEIGHT_UINT4  ? 0
           : weight_type == WEIGHT_INT4 ? INT4_ZERO
                                        : dot_weight_offset;
}

/* The scales of a group and of VECTOR_WIDTH columns from `col` on; 1 where the weight has none. */
INLINE vfloat load_scales(const Linear *p, int64_t group, int64_t col) {
    int64_t at = group * p->padded_cols + col;
    if (p->scales == NULL)
        return v_set(1.0f);
    if (p->scale_type == SCALES_F32)
        return v_load((const float *)p->scales + at);
    const char *bytes = (const char *)p->scales + at;
    vfloat steps;
    if (p->scale_type == SCALES_E4M3)
        steps = v_load_fp8(bytes);
    else /* the exponents of floats */
        steps = vi_as_float(vi_and(vi_shift_left(vi_load_bytes(bytes), 23), vi_set(0x7f800000)));
    return v_mul(steps, v_load(p->scale_factors + col));
}

/* ---- results ---- */

/* The outputs of a tile: for each panel, its rows. Tiles keep sums in registers only while they
 * multiply: what is done with the sums afterwards is not unrolled, and cannot take registers from
 * the products. */
typedef float TileOutputs[FEW_ROWS_PANELS][FLOAT_ROWS][PANEL_WIDTH];

/* The sums of a group, which may be integers. */
typedef union {
    TileOutputs floats;
    int32_t ints[FEW_ROWS_PANELS][FLOAT_ROWS][PANEL_WIDTH];
} TileSums;

/* Scale the sums of a group, and add them to the outputs; those of group 0 are the first. */
INLINE void add_group(int is_int, const Linear *p, int64_t row, int n_rows, int64_t panel,
                      int n_panels, int64_t group, const TileSums *sums, TileOutputs outputs) {
    for (int j = 0; j < n_panels; j++)
        for (int v = 0; v < VECTORS; v++) {
            const int lane = v * VECTOR_WIDTH;
            const int64_t col = (panel + j) * PANEL_WIDTH + lane;
            const vfloat scales = load_scales(p, group, col);
            const vfloat offsets =
                p->offsets ? v_load(p->offsets + group * p->padded_cols + col) : v_zero();
            for (int i = 0; i < n_rows; i++) {
                const int64_t of_row = (row + i) * p->n_groups + group;
                float *output = outputs[j][i] + lane;
                vfloat sum = is_int ? vi_to_float(vi_load(sums->ints[j][i] + lane))
                                    : v_load(sums->floats[j][i] + lane);
                if (p->input_scales)
                    sum = v_mul(sum, v_set(p->input_scales[of_row]));
                sum = group ? v_fma(sum, scales, v_load(output)) : v_mul(sum, scales);
                if (p->offsets) /* a group has one offset, and contributes sum(x) * offset */
                    sum = v_fnma(v_set(p->input_sums[of_row]), offsets, sum);
                v_store(output, sum);
            }
        }
}

/* Whether the sums of the only group are the outputs. */
INLINE int has_plain_sums(const Linear *p) {
    return p->n_groups == 1 && p->scales == NULL && p->offsets == NULL && p->input_scales == NULL;
}

static __attribute__((noinline)) void add_float_group(const Linear *p, int64_t row, int n_rows,
                                                      int64_t panel, int n_panels, int64_t group,
                                                      const TileSums *sums, TileOutputs outputs) {
    add_group(0, p, row, n_rows, panel, n_panels, group, sums, outputs);
}

static __attribute__((noinline)) void add_int_group(const Linear *p, int64_t row, int n_rows,
                                                    int64_t panel, int n_panels, int64_t group,
                                                    const TileSums *sums, TileOutputs outputs) {
    add_group(1, p, row, n_rows, panel, n_panels, group, sums, outputs);
}

/* Add the bias to a tile's outputs, and store them. The last panel may extend beyond y. */
static __attribute__((noinline)) void store_outputs(const Linear *p, int64_t row, int n_rows,
                                                    int64_t panel, int n_panels,
                                                    const TileOutputs outputs) {
    for (int j = 0; j < n_panels; j++)
        for (int v = 0; v < VECTORS; v++) {
            const int lane = v * VECTOR_WIDTH;
            const int64_t col = (panel + j) * PANEL_WIDTH + lane;
            const int64_t valid = min_int64(p->cols - col, VECTOR_WIDTH);
            const vfloat bias = p->bias ? v_load(p->bias + col) : v_zero();
            float *y = p->y + row * p->y_stride + col;
            for (int i = 0; i < n_rows && valid > 0; i++, y += p->y_stride) {
                vfloat output = v_load(outputs[j][i] + lane);
                if (p->bias)
                    output = v_add(output, bias);
                if (valid < VECTOR_WIDTH)
                    v_store_first(y, output, valid);
                else
                    v_store(y, output);
            }
        }
}

/* The words [*begin, *end) of a group. */
INLINE void group_words(const Linear *p, int weight_type, int64_t group, int64_t *begin,
                        int64_t *end) {
    int values = word_values(weight_type);
    *begin = group * p->group_size / values;
    *end = ((group + 1) * p->group_size + values - 1) / values;
}

/* ---- prefetches ---- */

/* What a tile prefetches: at each step over depth, the line at `at` + j * `stride` + word * `step`
 * for each of its panels j. */
typedef struct {
    const char *at;
    int64_t step;
    int64_t stride;
    int64_t own_words; /* with few rows, later steps prefetch the panels of the next tile */
} Prefetch;

/* Whether panels are prefetched past the larger caches, for a tile of so many rows. Tiles with
 * fewer rows than others are mostly the only ones, so that their panels are used once. */
INLINE int is_non_temporal(int n_rows, int most_rows) {
    return n_rows <= FEW_ROWS && n_rows < most_rows;
}

INLINE void prefetch_step(int non_temporal, const Prefetch *prefetch, int n_panels, int64_t word) {
    const char *first = prefetch->at + word * prefetch->step;
    if (non_temporal && word >= prefetch->own_words)
        first += (n_panels - 1) * prefetch->stride;
#pragma GCC unroll 16
    for (int j = 0; j < n_panels; j++) {
        const char *line = first + j * prefetch->stride;
        if (non_temporal)
            __builtin_prefetch(line, 0, 0);
        else
            __builtin_prefetch(line);
    }
}

/* With few rows: the panels themselves, which are multiplied once. */
static Prefetch own_panels(const Linear *p, int64_t panel) {
    const int64_t step = PANEL_WIDTH * 4;
    return (Prefetch){p->weight + panel * p->panel_bytes + PREFETCH_BYTES, step, p->panel_bytes,
                      (p->panel_bytes - PREFETCH_BYTES) / step};
}

/* With many rows: the panels from `next` on, a part by each of the n_tiles tiles that are
 * multiplied before them. So memory is read while the tiles multiply. words: the steps of a tile.
 */
static Prefetch next_panels(const Linear *p, int64_t next, int64_t n_tiles, int64_t words) {
    if (next * PANEL_WIDTH >= p->padded_cols) /* there is none: the first line of the weight */
        return (Prefetch){p->weight, 0, 0, 0};
    return (Prefetch){p->weight + next * p->panel_bytes,
                      (p->panel_bytes + n_tiles * words - 1) / (n_tiles * words), p->panel_bytes,
                      words};
}

/* The steps of a tile over the whole depth. */
INLINE int64_t tile_steps(const Linear *p) {
    return p->panel_bytes / (PANEL_WIDTH * 4);
}

/* ---- rows of inputs ---- */

/* The inputs that a step of a tile multiplies, of up to INPUT_BASES * ROWS_OF_BASE rows. A pointer
 * for each row would not fit into the 16 registers of x86 beside the others: a pointer is that of
 * three rows, whose distances are a register and its double. */
enum { ROWS_OF_BASE = 3, INPUT_BASES = 3 };
_Static_assert((int)FLOAT_ROWS <= ROWS_OF_BASE * INPUT_BASES &&
                   (int)INT8_ROWS <= ROWS_OF_BASE * INPUT_BASES,
               "a tile has more rows than pointers to them");
typedef struct {
    const char *bases[INPUT_BASES];
    int64_t row_bytes;
} InputRows;

INLINE InputRows input_rows(const void *first, int64_t row_bytes) {
    InputRows rows = {.row_bytes = row_bytes};
#pragma GCC unroll 3
    for (int base = 0; base < INPUT_BASES; base++)
        rows.bases[base] = (const char *)first + base * ROWS_OF_BASE * row_bytes;
    return rows;
}

INLINE const char *inputs_of_row(const InputRows *rows, int row) {
    return rows->bases[row / ROWS_OF_BASE] + row % ROWS_OF_BASE * rows->row_bytes;
}

/* Go to the inputs that are `bytes` further. The compiler must not see what the pointers are, or
 * it would make one for each row of them. */
INLINE void advance_inputs(InputRows *rows, int64_t bytes) {
#pragma GCC unroll 3
    for (int base = 0; base < INPUT_BASES; base++) {
        rows->bases[base] += bytes;
        __asm__("" : "+r"(rows->bases[base]));
    }
}

/* The inputs that a word holds, in all lanes. */
INLINE vint word_of_inputs(const char *inputs) {
    int32_t word;
    memcpy(&word, inputs, sizeof word);
    return vi_set(word);
}

/* ---- inputs as float32 ---- */

/* Compute n_rows rows of n_panels panels. */
INLINE void float_tile(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                       int64_t panel, const Prefetch *prefetch) {
    const int values = word_values(weight_type);
    const int is_plain = has_plain_sums(p);
    InputRows inputs = input_rows(p->float_inputs + row * p->float_stride,
                                  p->float_stride * (int64_t)sizeof(float));
    vfloat acc[FEW_ROWS_PANELS][FLOAT_ROWS][VECTORS];
    TileSums sums;
    TileOutputs outputs;
    for (int64_t group = 0; group < p->n_groups; group++) {
        int64_t begin;
        int64_t end;
        group_words(p, weight_type, group, &begin, &end);
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    acc[j][i][v] = v_zero();
        for (int64_t word = begin; word < end; word++) {
            prefetch_step(is_non_temporal(n_rows, FLOAT_ROWS), prefetch, n_panels, word);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++) {
                const char *step =
                    p->weight + (panel + j) * p->panel_bytes + word * PANEL_WIDTH * 4;
                vint words[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    words[v] = vi_load(step + v * VECTOR_WIDTH * 4);
#pragma GCC unroll 8
                for (int k = 0; k < values; k++) {
                    vfloat weights[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++)
                        weights[v] = step_value(weight_type, step, words[v], k, v);
#pragma GCC unroll 16
                    for (int i = 0; i < n_rows; i++) {
                        vfloat input = v_set(((const float *)inputs_of_row(&inputs, i))[k]);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; v++)
                            acc[j][i][v] = v_fma(input, weights[v], acc[j][i][v]);
                    }
                }
            }
            advance_inputs(&inputs, values * (int64_t)sizeof(float));
        }
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    v_store(sums.floats[j][i] + v * VECTOR_WIDTH, acc[j][i][v]);
        if (!is_plain)
            add_float_group(p, row, n_rows, panel, n_panels, group, &sums, outputs);
    }
    store_outputs(p, row, n_rows, panel, n_panels, is_plain ? sums.floats : outputs);
}

/* A function of some rows of the panels [panel, end_panel), which TILE computes, n_panels at a
 * time. */
#define DEFINE_ROWS(NAME, TILE)                                                                    \
    INLINE void NAME(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,      \
                     int64_t panel, int64_t end_panel, Prefetch prefetch) {                        \
        for (; panel + n_panels <= end_panel; panel += n_panels) {                                 \
            TILE(weight_type, n_rows, n_panels, p, row, panel, &prefetch);                         \
            prefetch.at += n_panels * prefetch.stride;                                             \
        }                                                                                          \
        for (; panel < end_panel; panel++, prefetch.at += prefetch.stride)                         \
            TILE(weight_type, n_rows, 1, p, row, panel, &prefetch);                                \
    }

DEFINE_ROWS(float_rows, float_tile)

/* A function for each weight type, for up to FEW_ROWS rows. A tile covers several panels, so that
 * enough independent additions run at once to hide their latency. */
#define DEFINE_FEW_ROWS(NAME, WEIGHT_TYPE)                                                         \
    static void NAME(const Linear *p, int64_t row, int64_t n_rows, int64_t panel,                  \
                     int64_t end_panel) {                                                          \
        const Prefetch own = own_panels(p, panel);                                                 \
        if (n_rows == 1)                                                                           \
            float_rows(WEIGHT_TYPE, 1, FEW_ROWS_PANELS, p, row, panel, end_panel, own);            \
        else if (n_rows == 2)                                                                      \
            float_rows(WEIGHT_TYPE, 2, FEW_ROWS_PANELS, p, row, panel, end_panel, own);            \
        else if (n_rows == 3)                                                                      \
            float_rows(WEIGHT_TYPE, 3, FLOAT_PANELS, p, row, panel, end_panel, own);               \
        else                                                                                       \
            float_rows(WEIGHT_TYPE, 4, FLOAT_PANELS, p, row, panel, end_panel, own);               \
    }
DEFINE_FEW_ROWS(few_rows_f32, WEIGHT_F32)
DEFINE_FEW_ROWS(few_rows_bf16, WEIGHT_BF16)
DEFINE_FEW_ROWS(few_rows_f16, WEIGHT_F16)
DEFINE_FEW_ROWS(few_rows_int8, WEIGHT_INT8)
DEFINE_FEW_ROWS(few_rows_uint4, WEIGHT_UINT4)
DEFINE_FEW_ROWS(few_rows_int4, WEIGHT_INT4)
DEFINE_FEW_ROWS(few_rows_fp4, WEIGHT_FP4)
DEFINE_FEW_ROWS(few_rows_fp8, WEIGHT_FP8)

typedef void (*RowsFunction)(const Linear *, int64_t row, int64_t n_rows, int64_t panel,
                             int64_t end_panel);
static const RowsFunction few_rows[] = {few_rows_f32,   few_rows_bf16, few_rows_f16, few_rows_int8,
                                        few_rows_uint4, few_rows_int4, few_rows_fp4,
                                        few_rows_fp8};

/* Up to FLOAT_ROWS rows of one or FLOAT_PANELS panels of float32. */
#define FLOAT_CASE(N)                                                                              \
    case N:                                                                                        \
        float_rows(WEIGHT_F32, N <= FLOAT_ROWS ? N : 1, FLOAT_PANELS, p, row, panel, end_panel,    \
                   prefetch);                                                                      \
        break;
static void float32_rows(const Linear *p, int64_t row, int64_t n_rows, int64_t panel,
                         int64_t end_panel, Prefetch prefetch) {
    switch (n_rows) {
        FLOAT_CASE(1)
        FLOAT_CASE(2)
        FLOAT_CASE(3)
        FLOAT_CASE(4)
        FLOAT_CASE(5)
        FLOAT_CASE(6)
#if defined(LEVEL_AVX512)
        FLOAT_CASE(7)
        FLOAT_CASE(8)
#endif
    }
}

/* Convert a panel to float32, once for many rows. */
#define DEFINE_UNPACK(NAME, WEIGHT_TYPE)                                                           \
    static void NAME(const char *panel, int64_t depth, float *to) {                                \
        const int values = word_values(WEIGHT_TYPE);                                               \
        for (int64_t word = 0; word * values < depth; word++)                                      \
            for (int v = 0; v < VECTORS; v++) {                                                    \
                const char *step = panel + word * PANEL_WIDTH * 4;                                 \
                vint words = vi_load(step + v * VECTOR_WIDTH * 4);                                 \
                for (int k = 0; k < values; k++)                                                   \
                    v_store(to + (word * values + k) * PANEL_WIDTH + v * VECTOR_WIDTH,             \
                            step_value(WEIGHT_TYPE, step, words, k, v));                           \
            }                                                                                      \
    }
DEFINE_UNPACK(unpack_bf16, WEIGHT_BF16)
DEFINE_UNPACK(unpack_f16, WEIGHT_F16)
DEFINE_UNPACK(unpack_int8, WEIGHT_INT8)
DEFINE_UNPACK(unpack_uint4, WEIGHT_UINT4)
DEFINE_UNPACK(unpack_int4, WEIGHT_INT4)
DEFINE_UNPACK(unpack_fp4, WEIGHT_FP4)
DEFINE_UNPACK(unpack_fp8, WEIGHT_FP8)
typedef void (*UnpackFunction)(const char *panel, int64_t depth, float *to);
static const UnpackFunction unpack_panel[] = {
    NULL,         unpack_bf16, unpack_f16, unpack_int8,
    unpack_uint4, unpack_int4, unpack_fp4, unpack_fp8,
};

static void float_block(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                        int64_t end_panel) {
    if (p->rows <= FEW_ROWS) {
        few_rows[p->weight_type](p, row, end_row - row, panel, end_panel);
        return;
    }
    Linear unpacked = *p; /* panels of float32, whose numbers begin with 0 */
    if (p->weight_type != WEIGHT_F32) {
        int64_t depth = (p->depth + 7) / 8 * 8; /* whole words */
        unpacked.panel_bytes = depth * PANEL_WIDTH * sizeof(float);
        unpacked.weight = thread_scratch(SCRATCH_PANELS, FLOAT_PANELS * unpacked.panel_bytes);
        unpacked.weight_type = WEIGHT_F32;
        if (unpacked.weight == NULL) { /* each tile converts them */
            for (; row < end_row; row += FEW_ROWS)
                few_rows[p->weight_type](p, row, min_int64(end_row - row, FEW_ROWS), panel,
                                         end_panel);
            return;
        }
    }
    for (; panel < end_panel; panel += FLOAT_PANELS) {
        int64_t n_panels = min_int64(end_panel - panel, FLOAT_PANELS);
        if (p->weight_type != WEIGHT_F32) {
            for (int64_t j = 0; j < n_panels; j++)
                unpack_panel[p->weight_type](p->weight + (panel + j) * p->panel_bytes, p->depth,
                                             (float *)(unpacked.weight + j * unpacked.panel_bytes));
            /* So that the panel's number stays that of its columns. */
            unpacked.weight -= panel * unpacked.panel_bytes;
        }
        const int64_t n_tiles = (end_row - row + FLOAT_ROWS - 1) / FLOAT_ROWS;
        Prefetch next = next_panels(p, panel + n_panels, n_tiles, p->depth);
        for (int64_t r = row; r < end_row; r += FLOAT_ROWS, next.at += p->depth * next.step)
            float32_rows(&unpacked, r, min_int64(end_row - r, FLOAT_ROWS), panel,
                         panel + n_panels, next);
        if (p->weight_type != WEIGHT_F32)
            unpacked.weight += panel * unpacked.panel_bytes;
    }
}

/* ---- pairs of rows and columns ---- */

#if defined(LEVEL_I8MM)
#include "neon_pairs.h"
#else
/* No rows: other levels have no such products. */
INLINE int64_t multiply_pairs(int weight_type, const Linear *p, int64_t row, int64_t end_row,
                              int64_t panel, int64_t end_panel) {
    (void)weight_type, (void)p, (void)end_row, (void)panel, (void)end_panel;
    return row;
}
#endif

/* ---- inputs as int8, products summed as integers ---- */

/* Compute n_rows rows of n_panels panels. */
INLINE void int8_tile(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                      int64_t panel, const Prefetch *prefetch) {
    const int bytes = word_values(weight_type); /* of inputs, for a word of weights */
    InputRows inputs = input_rows(p->rounded_inputs + row * p->padded_depth, p->padded_depth);
    const int surplus = surplus_of_weights(weight_type, DOT_WEIGHT_OFFSET);
    vint acc[FEW_ROWS_PANELS][INT8_ROWS][VECTORS];
    TileSums sums;
    TileOutputs outputs;
    for (int64_t group = 0; group < p->n_groups; group++) {
        int64_t begin;
        int64_t end;
        group_words(p, weight_type, group, &begin, &end);
#pragma GCC unroll 16
        for (int i = 0; i < n_rows; i++) {
            vint start = vi_zero(); /* minus what the products exceed the sums by */
            if (surplus)
                start = vi_set(-surplus * p->int_input_sums[(row + i) * p->n_groups + group]);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    acc[j][i][v] = start;
        }
        for (int64_t word = begin; word < end; word++) {
            prefetch_step(is_non_temporal(n_rows, INT8_ROWS), prefetch, n_panels, word);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++) {
                const char *step =
                    p->weight + (panel + j) * p->panel_bytes + word * PANEL_WIDTH * 4;
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    vint words = vi_load(step + v * VECTOR_WIDTH * 4);
                    if (weight_type == WEIGHT_INT8) {
                        vint weights = vi_dot_weights(words);
#pragma GCC unroll 16
                        for (int i = 0; i < n_rows; i++)
                            acc[j][i][v] = vi_dot_8bit(
                                acc[j][i][v], weights,
                                word_of_inputs(inputs_of_row(&inputs, i)));
                    } else {
#pragma GCC unroll 2
                        for (int half = 0; half < 2; half++) {
                            vint weights = bytes_of_half(weight_type, words, half);
                            if (weight_type == WEIGHT_FP4)
                                weights = vi_dot_weights(weights);
#pragma GCC unroll 16
                            for (int i = 0; i < n_rows; i++) {
                                vint four =
                                    word_of_inputs(inputs_of_row(&inputs, i) + 4 * half);
                                acc[j][i][v] =
                                    weight_type == WEIGHT_FP4
                                        ? vi_dot_8bit(acc[j][i][v], weights, four)
                                        : vi_dot_4bit(acc[j][i][v], weights, four);
                            }
                        }
                    }
                }
            }
            advance_inputs(&inputs, bytes);
        }
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    vi_store(sums.ints[j][i] + v * VECTOR_WIDTH, acc[j][i][v]);
        add_int_group(p, row, n_rows, panel, n_panels, group, &sums, outputs);
    }
    store_outputs(p, row, n_rows, panel, n_panels, outputs);
}

DEFINE_ROWS(int8_rows, int8_tile)

/* The last N rows, at most 4. PANELS: of a tile where there are so many, else INT8_PANELS. */
#define FEW_ROWS_CASE(ROWS, WEIGHT_TYPE, N, PANELS)                                                \
    case N:                                                                                        \
        if (end_panel - panel >= PANELS)                                                           \
            ROWS(WEIGHT_TYPE, N, PANELS, p, r, panel, end_panel, prefetch);                        \
        else if (PANELS > INT8_PANELS)                                                             \
            ROWS(WEIGHT_TYPE, N, INT8_PANELS, p, r, panel, end_panel, prefetch);                   \
        else                                                                                       \
            ROWS(WEIGHT_TYPE, N, 1, p, r, panel, end_panel, prefetch);                             \
        break;
/* A function of some rows and panels: panel by panel, so that a panel stays in the cache while all
 * rows are multiplied with it. */
#define DEFINE_BLOCK(NAME, ROWS, WEIGHT_TYPE)                                                      \
    static void NAME##_panels(const Linear *p, int64_t row, int64_t end_row, int64_t panel,        \
                              int64_t end_panel, Prefetch prefetch) {                              \
        const int64_t tile_bytes = tile_steps(p) * prefetch.step;                                  \
        int64_t r = multiply_pairs(WEIGHT_TYPE, p, row, end_row, panel, end_panel);                \
        for (; end_row - r >= INT8_ROWS; r += INT8_ROWS, prefetch.at += tile_bytes)                \
            ROWS(WEIGHT_TYPE, INT8_ROWS, INT8_PANELS, p, r, panel, end_panel, prefetch);           \
        for (; end_row - r > 4; r += 4, prefetch.at += tile_bytes)                                 \
            ROWS(WEIGHT_TYPE, 4, INT8_PANELS, p, r, panel, end_panel, prefetch);                   \
        switch (end_row - r) {                                                                     \
            FEW_ROWS_CASE(ROWS, WEIGHT_TYPE, 1, FEW_ROWS_PANELS)                                   \
            FEW_ROWS_CASE(ROWS, WEIGHT_TYPE, 2, FEW_ROWS_PANELS)                                   \
            FEW_ROWS_CASE(ROWS, WEIGHT_TYPE, 3, INT8_PANELS)                                       \
            FEW_ROWS_CASE(ROWS, WEIGHT_TYPE, 4, INT8_PANELS)                                       \
        }                                                                                          \
    }                                                                                              \
    static void NAME(const Linear *p, int64_t row, int64_t end_row, int64_t panel,                 \
                     int64_t end_panel) {                                                          \
        if (end_row - row <= 4) {                                                                  \
            NAME##_panels(p, row, end_row, panel, end_panel, own_panels(p, panel));                \
            return;                                                                                \
        }                                                                                          \
        for (; panel < end_panel; panel += INT8_PANELS)                                            \
            NAME##_panels(                                                                         \
                p, row, end_row, panel, min_int64(panel + INT8_PANELS, end_panel),                 \
                next_panels(p, panel + INT8_PANELS, tiles_of_rows(end_row - row), tile_steps(p)));\
    }

/* The tiles of more than 4 rows. */
static int64_t tiles_of_rows(int64_t rows) {
    return rows / INT8_ROWS + (rows % INT8_ROWS + 3) / 4;
}

DEFINE_BLOCK(int8_block_int8, int8_rows, WEIGHT_INT8)
DEFINE_BLOCK(int8_block_uint4, int8_rows, WEIGHT_UINT4)
DEFINE_BLOCK(int8_block_int4, int8_rows, WEIGHT_INT4)
DEFINE_BLOCK(int8_block_fp4, int8_rows, WEIGHT_FP4)

/* Computes some rows of some panels. */
typedef void (*BlockFunction)(const Linear *, int64_t row, int64_t end_row, int64_t panel,
                              int64_t end_panel);

static BlockFunction int8_block(int weight_type) {
    return weight_type == WEIGHT_INT8    ? int8_block_int8
           : weight_type == WEIGHT_UINT4 ? int8_block_uint4
           : weight_type == WEIGHT_INT4  ? int8_block_int4
                                         : int8_block_fp4;
}

/* Quantize one row, with a scale for each group: the largest magnitude of a group becomes 127.
 * A group with NaN or infinity gets the scale NaN, so that its outputs are NaN. */
static void quantize_row(const Linear *p, int64_t row) {
    const float *x = p->x + row * p->x_stride;
    int8_t *q = (int8_t *)p->rounded_inputs + row * p->padded_depth;
    for (int64_t group = 0; group < p->n_groups; group++) {
        int64_t begin = group * p->group_size;
        int64_t end = begin + p->group_size;
        vfloat largest_lanes = v_zero();
        vfloat not_finite = v_zero(); /* 0 * x: 0 where x is finite, else NaN */
        for (int64_t k = begin; k < end; k += VECTOR_WIDTH) {
            vfloat v = end - k < VECTOR_WIDTH ? v_load_first(x + k, end - k) : v_load(x + k);
            largest_lanes = v_max(largest_lanes, v_abs(v));
            not_finite = v_fma(v, v_zero(), not_finite);
        }
        /* The smallest scale avoids a division by zero for a group of zeros. */
        float scale = v_largest(largest_lanes) / 127.0f;
        scale = (scale > 1e-12f ? scale : 1e-12f) + v_sum(not_finite);
        int32_t sum = 0;
        for (int64_t k = begin; k < end; k += VECTOR_WIDTH) {
            int8_t edge[VECTOR_WIDTH];
            int64_t valid = end - k < VECTOR_WIDTH ? end - k : VECTOR_WIDTH;
            vfloat v = valid < VECTOR_WIDTH ? v_load_first(x + k, valid) : v_load(x + k);
            v_store_int8(edge, v_div(v, v_set(scale)));
            memcpy(q + k, edge, valid);
        }
        for (int64_t k = begin; k < end; k++)
            sum += q[k];
        p->input_scales[row * p->n_groups + group] = scale;
        p->int_input_sums[row * p->n_groups + group] = sum;
        p->input_sums[row * p->n_groups + group] = scale * (float)sum;
    }
    memset(q + p->depth, 0, p->padded_depth - p->depth);
}

/* ---- inputs as FP8 and FP4 ---- */

/* x rounded to a float of fewer digits, to the nearest, ties to even. smallest: the smallest normal
 * number. shift: 1.5 * 2^23 quanta of the numbers from 1 to 2. */
INLINE vfloat round_digits(vfloat x, float smallest, float shift) {
    vfloat leading = vi_as_float(vi_and(v_bits(x), vi_set(0x7f800000)));
    vfloat shifts = v_mul(v_max(leading, v_set(smallest)), v_set(shift));
    return v_sub(v_add(x, shifts), shifts);
}

/* Numbers of at most 448 rounded to FP8 (e4m3). */
INLINE vfloat round_to_fp8(vfloat x) {
    return round_digits(x, 0.015625f, 1572864.0f);
}

/* Numbers of at most 6 rounded to FP4 (E2M1). */
INLINE vfloat round_to_fp4(vfloat x) {
    return round_digits(x, 1.0f, 6291456.0f);
}

/* The scale of inputs whose largest magnitude is `largest`, as activation_quant.py has it. */
static float float_input_scale(const Linear *p, float largest) {
    if (p->input_quant == INPUTS_FP8_STATIC)
        return *p->input_scale;
    if (p->input_quant == INPUTS_FP8_E8M0 || p->input_quant == INPUTS_FP4_E8M0) {
        int exponent;
        frexpf(largest, &exponent);
        exponent -= p->input_quant == INPUTS_FP8_E8M0 ? 9 : 3; /* of 448 and 6, and one more */
        return ldexpf(1.0f, exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
    }
    if (p->input_quant == INPUTS_FP4_E4M3) {
        float lanes[VECTOR_WIDTH];
        float steps = largest / (6.0f * *p->input_scale);
        v_store(lanes, round_to_fp8(v_set(steps < 448.0f ? steps : 448.0f)));
        return lanes[0] * *p->input_scale;
    }
    float scale = largest / 448.0f;
    return scale > 1e-12f ? scale : 1e-12f; /* avoids a division by zero */
}

/* Quantize one row to FP8, or to FP4, whose int8 are twice the values. The scale of a group with
 * NaN or infinity is NaN, so that its outputs are NaN; with one stored scale NaN stays NaN. */
static void quantize_row_to_float(const Linear *p, int64_t row) {
    const float *x = p->x + row * p->x_stride;
    char *values = p->rounded_inputs;
    const int is_fp4 = p->input_quant >= INPUTS_FP4_E8M0;
    const int is_static = p->input_quant == INPUTS_FP8_STATIC;
    const int has_groups = !is_static && p->input_quant != INPUTS_FP8_TOKEN;
    const int64_t size = has_groups ? p->group_size : p->depth; /* inputs that share a scale */
    const int64_t value_bytes = p->inputs == INPUTS_INT8 ? 1 : p->inputs == INPUTS_F32 ? 4 : 2;
    const vfloat limit = v_set(is_fp4 ? 6.0f : 448.0f);
    values += row * p->padded_depth * value_bytes;
    for (int64_t begin = 0; begin < p->depth; begin += size) {
        const int64_t end = min_int64(begin + size, p->depth);
        vfloat largest = v_zero();
        vfloat not_finite = v_zero(); /* 0 * x: 0 where x is finite, else NaN */
        for (int64_t k = begin; k < end && !is_static; k += VECTOR_WIDTH) {
            vfloat v = end - k < VECTOR_WIDTH ? v_load_first(x + k, end - k) : v_load(x + k);
            largest = v_max(largest, v_abs(v));
            not_finite = v_fma(v, v_zero(), not_finite);
        }
        float scale = float_input_scale(p, v_largest(largest)) + v_sum(not_finite);
        const vfloat divisor = v_set(scale != 0.0f ? scale : 1.0f);
        const float kept = is_fp4 ? 0.5f * scale : scale; /* of what is multiplied */
        for (int64_t k = begin; k < end; k += VECTOR_WIDTH) {
            const int64_t valid = min_int64(end - k, VECTOR_WIDTH);
            vfloat v = valid < VECTOR_WIDTH ? v_load_first(x + k, valid) : v_load(x + k);
            v = v_div(v, divisor);
            v = v_max(v_sub(v_zero(), limit), v_min(limit, v)); /* in this order, NaN stays NaN */
            if (p->inputs == INPUTS_INT8) {
                int8_t edge[VECTOR_WIDTH];
                v = round_to_fp4(v);
                v_store_int8(edge, v_add(v, v));
                memcpy(values + k, edge, valid);
            } else if (p->inputs == INPUTS_F32) {
                store_of_row((float *)values, k, end, round_to_fp8(v));
            } else {
#if defined(LEVEL_BF16)
                uint16_t edge[VECTOR_WIDTH];
                v_store_bf16(edge, round_to_fp8(v));
                memcpy(values + 2 * k, edge, 2 * valid);
#endif
            }
        }
        /* Groups of the weight within these inputs. */
        for (int64_t first = begin; first < end; first += p->group_size) {
            const int64_t at = row * p->n_groups + first / p->group_size;
            p->input_scales[at] = kept;
            if (p->inputs == INPUTS_INT8) {
                int32_t sum = 0;
                for (int64_t k = first; k < first + p->group_size; k++)
                    sum += ((const int8_t *)values)[k];
                p->int_input_sums[at] = sum;
            } else if (p->offsets) {
                float sum = 0;
                for (int64_t k = first; k < first + p->group_size; k++)
                    sum += p->inputs == INPUTS_F32 ? ((const float *)values)[k]
                                                   : float_of_bf16(((const uint16_t *)values)[k]);
                p->input_sums[at] = kept * sum;
            }
        }
    }
    memset(values + p->depth * value_bytes, 0, (p->padded_depth - p->depth) * value_bytes);
}

/* ---- inputs as bfloat16 ---- */

#if defined(LEVEL_BF16)
/* Round a row to bfloat16: to the nearest, ties to even. */
static void round_to_bf16(const float *x, int64_t size, uint16_t *to) {
    int64_t k = 0;
    for (; k + VECTOR_WIDTH <= size; k += VECTOR_WIDTH)
        v_store_bf16(to + k, v_load(x + k));
    if (k < size) {
        uint16_t edge[VECTOR_WIDTH];
        v_store_bf16(edge, v_load_first(x + k, size - k));
        memcpy(to + k, edge, (size - k) * sizeof *to);
    }
}

static void round_row_to_bf16(const Linear *p, int64_t row) {
    uint16_t *to = (uint16_t *)p->rounded_inputs + row * p->padded_depth;
    round_to_bf16(p->x + row * p->x_stride, p->depth, to);
    memset(to + p->depth, 0, (p->padded_depth - p->depth) * sizeof *to);
}

static float sum_bf16(const uint16_t *values, int64_t size) {
    vfloat lanes = v_zero();
    int64_t k = 0;
    for (; k + VECTOR_WIDTH <= size; k += VECTOR_WIDTH)
        lanes = v_add(lanes, v_load_bf16(values + k));
    float sum = v_sum(lanes);
    for (; k < size; k++)
        sum += float_of_bf16(values[k]);
    return sum;
}
#endif

#if defined(LEVEL_BF16)
/* The values 2 i and 2 i + 1 of the words of a step that vector v holds, as words of two bfloat16.
 * Weights are bfloat16, or of 8 or 4 bits. */
INLINE vint step_bf16(int weight_type, const char *step, vint words, int i, int v) {
    if (weight_type == WEIGHT_BF16)
        return words;
#if defined(LEVEL_AVX512)
    if (weight_type == WEIGHT_UINT4 || weight_type == WEIGHT_INT4 || weight_type == WEIGHT_FP4) {
        /* Bytes 0 and 1 hold values 0 and 1, 4 and 5; bytes 2 and 3 hold values 2 and 3, 6 and 7:
           each pair of codes moves to the lowest bits of the halves. */
        vint codes = i == 0   ? vi_halves(words, vi_shift_left(words, 8))
                     : i == 1 ? vi_halves(vi_shift_right(words, 16), vi_shift_right(words, 8))
                     : i == 2 ? vi_halves(vi_shift_right(words, 4), vi_shift_left(words, 4))
                              : vi_halves(vi_shift_right(words, 20), vi_shift_right(words, 12));
        return vi_lookup_halves(weight_type == WEIGHT_UINT4  ? BF16_OF_UINT4
                                : weight_type == WEIGHT_INT4 ? BF16_OF_INT4
                                                             : BF16_OF_FP4,
                                codes);
    }
#endif
    vint low = v_bits(step_value(weight_type, step, words, 2 * i, v));
    vint high = v_bits(step_value(weight_type, step, words, 2 * i + 1, v));
    return vi_add(vi_shift_right(low, 16), vi_and(high, vi_set((int)0xffff0000)));
}

/* Convert the inputs [begin, end) of a panel, whole words, to words of two bfloat16. */
#define DEFINE_UNPACK_TO_BF16(NAME, WEIGHT_TYPE)                                                   \
    static void NAME(const char *panel, int64_t begin, int64_t end, char *to) {                    \
        const int values = word_values(WEIGHT_TYPE);                                               \
        for (int64_t word = begin / values; word * values < end; word++) {                         \
            const char *step = panel + word * PANEL_WIDTH * 4;                                     \
            for (int i = 0; i < values / 2; i++)                                                   \
                for (int v = 0; v < VECTORS; v++, to += VECTOR_WIDTH * 4) {                        \
                    vint words = vi_load(step + v * VECTOR_WIDTH * 4);                             \
                    vi_store(to, step_bf16(WEIGHT_TYPE, step, words, i, v));                       \
                }                                                                                  \
        }                                                                                          \
    }
DEFINE_UNPACK_TO_BF16(unpack_int8_to_bf16, WEIGHT_INT8)
DEFINE_UNPACK_TO_BF16(unpack_uint4_to_bf16, WEIGHT_UINT4)
DEFINE_UNPACK_TO_BF16(unpack_int4_to_bf16, WEIGHT_INT4)
DEFINE_UNPACK_TO_BF16(unpack_fp4_to_bf16, WEIGHT_FP4)
DEFINE_UNPACK_TO_BF16(unpack_fp8_to_bf16, WEIGHT_FP8)
#if defined(LEVEL_COMPRESSED)
#include "compressed_bf16.h"
#endif
typedef void (*UnpackInputs)(const char *panel, int64_t begin, int64_t end, char *to);
static const UnpackInputs unpack_to_bf16[] = {
    NULL,
    NULL,
    NULL,
    unpack_int8_to_bf16,
    unpack_uint4_to_bf16,
    unpack_int4_to_bf16,
    unpack_fp4_to_bf16,
    unpack_fp8_to_bf16,
#if defined(LEVEL_COMPRESSED)
    decompress_panel,
#endif
};
#endif

#if defined(LEVEL_BF16) && !defined(LEVEL_AMX)
INLINE void bf16_tile(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                      int64_t panel, const Prefetch *prefetch) {
    const int values = word_values(weight_type);
    const int is_plain = has_plain_sums(p);
    InputRows inputs =
        input_rows(p->rounded_inputs + row * p->padded_depth * 2, p->padded_depth * 2);
    vfloat acc[FEW_ROWS_PANELS][INT8_ROWS][VECTORS];
    TileSums sums;
    TileOutputs outputs;
    for (int64_t group = 0; group < p->n_groups; group++) {
        int64_t begin;
        int64_t end;
        group_words(p, weight_type, group, &begin, &end);
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    acc[j][i][v] = v_zero();
        for (int64_t word = begin; word < end; word++) {
            prefetch_step(is_non_temporal(n_rows, INT8_ROWS), prefetch, n_panels, word);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++) {
                const char *step =
                    p->weight + (panel + j) * p->panel_bytes + word * PANEL_WIDTH * 4;
                vint words[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    words[v] = vi_load(step + v * VECTOR_WIDTH * 4);
#pragma GCC unroll 4
                for (int k = 0; k < values / 2; k++) {
                    vint weights[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++)
                        weights[v] = step_bf16(weight_type, step, words[v], k, v);
#pragma GCC unroll 16
                    for (int i = 0; i < n_rows; i++) {
                        const vint two = word_of_inputs(inputs_of_row(&inputs, i) + 4 * k);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; v++)
                            acc[j][i][v] = v_dot_bf16(acc[j][i][v], weights[v], two);
                    }
                }
            }
            advance_inputs(&inputs, values * 2);
        }
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    v_store(sums.floats[j][i] + v * VECTOR_WIDTH, acc[j][i][v]);
        if (!is_plain)
            add_float_group(p, row, n_rows, panel, n_panels, group, &sums, outputs);
    }
    store_outputs(p, row, n_rows, panel, n_panels, is_plain ? sums.floats : outputs);
}

DEFINE_ROWS(bf16_rows, bf16_tile)

DEFINE_BLOCK(bf16_block, bf16_rows, WEIGHT_BF16)
DEFINE_BLOCK(bf16_block_int8, bf16_rows, WEIGHT_INT8)
DEFINE_BLOCK(bf16_block_uint4, bf16_rows, WEIGHT_UINT4)
DEFINE_BLOCK(bf16_block_int4, bf16_rows, WEIGHT_INT4)
DEFINE_BLOCK(bf16_block_fp4, bf16_rows, WEIGHT_FP4)
DEFINE_BLOCK(bf16_block_fp8, bf16_rows, WEIGHT_FP8)
static const BlockFunction bf16_blocks[] = {
    NULL,
    bf16_block,
    NULL,
    bf16_block_int8,
    bf16_block_uint4,
    bf16_block_int4,
    bf16_block_fp4,
    bf16_block_fp8,
#if defined(LEVEL_COMPRESSED)
    compressed_block,
#endif
};

/* Whether panels are made bfloat16 before the products, for so many rows. Compressed panels have
 * tiles of at most 4 rows. */
static int unpacks_panels(const Linear *p, int64_t rows) {
    if (p->weight_type == WEIGHT_BF16)
        return 0;
    return rows > (p->weight_type == WEIGHT_BF16_COMPRESSED ? 4 : INT8_ROWS);
}

static int64_t unpacked_panel_bytes(const Linear *p) {
    return p->padded_depth * PANEL_WIDTH * 2;
}

/* Make some panels bfloat16, at `to`. Returns the layer of these panels, which keep their numbers.
 */
static Linear unpack_panels(const Linear *p, int64_t panel, int64_t n_panels, char *to) {
    Linear unpacked = *p;
    unpacked.weight_type = WEIGHT_BF16;
    unpacked.panel_bytes = unpacked_panel_bytes(p);
    for (int64_t j = 0; j < n_panels; j++)
        unpack_to_bf16[p->weight_type](p->weight + (panel + j) * p->panel_bytes, 0,
                                       p->padded_depth, to + j * unpacked.panel_bytes);
    unpacked.weight = to - panel * unpacked.panel_bytes;
    return unpacked;
}

/* Some rows of panels that are bfloat16. next: what is prefetched meanwhile. */
static void multiply_unpacked(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                              int64_t end_panel, Prefetch next) {
    for (; panel < end_panel; panel += INT8_PANELS, next.at += INT8_PANELS * next.stride)
        bf16_block_panels(p, row, end_row, panel, min_int64(panel + INT8_PANELS, end_panel), next);
}

/* Other weights than bfloat16: with many rows, a few panels of it are made first. */
static void unpacked_bf16_block(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                                int64_t end_panel) {
    char *panels = NULL;
    if (unpacks_panels(p, end_row - row))
        panels = thread_scratch(SCRATCH_PANELS, INT8_PANELS * unpacked_panel_bytes(p));
    if (panels == NULL) { /* the same results */
        bf16_blocks[p->weight_type](p, row, end_row, panel, end_panel);
        return;
    }
    for (; panel < end_panel; panel += INT8_PANELS) {
        const int64_t n_panels = min_int64(end_panel - panel, INT8_PANELS);
        const Linear unpacked = unpack_panels(p, panel, n_panels, panels);
        multiply_unpacked(&unpacked, row, end_row, panel, panel + n_panels,
                          next_panels(p, panel + n_panels, tiles_of_rows(end_row - row),
                                      tile_steps(&unpacked)));
    }
}

/* Make some panels of gate, and those of up, bfloat16 for all rows of a piece. Returns 0 where each
 * block of rows does that itself. next: the packed panels after them, which are prefetched. */
static int unpack_gate_and_up(BlockFunction block, const Linear *p, int64_t rows, int64_t panel,
                              int64_t n_panels, Linear *layers, Prefetch *next) {
    const int64_t bytes = n_panels * unpacked_panel_bytes(p);
    char *panels = NULL;
    if (block == unpacked_bf16_block && unpacks_panels(p, rows) && rows > ROW_BLOCK)
        panels = thread_scratch(SCRATCH_PANELS, 2 * bytes);
    if (panels == NULL)
        return 0;
    for (int half = 0; half < 2; half++) {
        const int64_t first = panel + half * (p->padded_cols / PANEL_WIDTH / 2);
        layers[half] = unpack_panels(p, first, n_panels, panels + half * bytes);
        next[half] = next_panels(p, first + n_panels, tiles_of_rows(rows),
                                 tile_steps(&layers[half]));
    }
    return 1;
}
#else
/* Never: the products of other levels convert weights themselves. */
INLINE int unpack_gate_and_up(BlockFunction block, const Linear *p, int64_t rows, int64_t panel,
                              int64_t n_panels, Linear *layers, Prefetch *next) {
    (void)block, (void)p, (void)rows, (void)panel, (void)n_panels, (void)layers, (void)next;
    return 0;
}

INLINE void multiply_unpacked(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                              int64_t end_panel, Prefetch next) {
    (void)p, (void)row, (void)end_row, (void)panel, (void)end_panel, (void)next;
}
#endif

/* ---- outputs of a gate ---- */

/* act(gate) * up for the activations that are rarer than silu. */
static __attribute__((noinline)) vfloat other_gate(const Linear *p, vfloat gate, vfloat up) {
    if (p->activation == ACT_GELU_TANH)
        return activate_gate(gate, up, ACT_GELU_TANH, 0, 0);
    if (p->activation == ACT_GELU)
        return activate_gate(gate, up, ACT_GELU, 0, 0);
    if (p->activation == ACT_SWIGLU_CLAMPED)
        return activate_gate(gate, up, ACT_SWIGLU_CLAMPED, p->limit, p->alpha);
    return activate_gate(gate, up, ACT_RELU2, 0, 0);
}

/* Store act(gate) * up for the columns from `col` on. */
INLINE void store_gated(const Linear *p, int64_t row, int64_t col, vfloat gate, vfloat up) {
    vfloat y = p->activation == ACT_SILU ? activate_gate(gate, up, ACT_SILU, 0, 0)
                                         : other_gate(p, gate, up);
#if defined(LEVEL_BF16)
    if (p->rounds_outputs) {
        v_store_bf16((uint16_t *)p->y + row * p->y_stride + col, y);
        return;
    }
#endif
    v_store(p->y + row * p->y_stride + col, y);
}

/* Some rows of n_panels panels of gate, and of those of up. With `layers`, gate and up are these
 * two layers, and `next`, one for each, is prefetched meanwhile. */
static void gated_rows(BlockFunction block, const Linear *p, int64_t row, int64_t end_row,
                       int64_t panel, int64_t n_panels, const Linear *layers,
                       const Prefetch *next) {
    const int64_t stride = 2 * GATE_PANELS * PANEL_WIDTH;
    const int64_t n_cols = n_panels * PANEL_WIDTH;
    float outputs[ROW_BLOCK * 2 * GATE_PANELS * PANEL_WIDTH];
    for (int half = 0; half < 2; half++) {
        const int64_t first = panel + half * (p->padded_cols / PANEL_WIDTH / 2);
        Linear part = layers ? layers[half] : *p;
        part.y_stride = stride;
        /* So that rows and columns keep their numbers. */
        part.y = outputs + half * n_cols - row * stride - first * PANEL_WIDTH;
        if (layers)
            multiply_unpacked(&part, row, end_row, first, first + n_panels, next[half]);
        else
            block(&part, row, end_row, first, first + n_panels);
    }
    for (int64_t r = row; r < end_row; r++) {
        const float *gate = outputs + (r - row) * stride;
        for (int64_t d = 0; d < n_cols; d += VECTOR_WIDTH)
            store_gated(p, r, panel * PANEL_WIDTH + d, v_load(gate + d),
                        v_load(gate + n_cols + d));
    }
}

/* Some rows of the panels [panel, end_panel) of gate, and of those of up. */
static void gated_block(BlockFunction block, const Linear *p, int64_t row, int64_t end_row,
                        int64_t panel, int64_t end_panel) {
    for (; panel < end_panel; panel += GATE_PANELS) {
        const int64_t n_panels = min_int64(end_panel - panel, GATE_PANELS);
        Linear layers[2];
        Prefetch next[2];
        const int is_unpacked =
            unpack_gate_and_up(block, p, end_row - row, panel, n_panels, layers, next);
        for (int64_t first = row; first < end_row; first += ROW_BLOCK) {
            const int64_t end = min_int64(first + ROW_BLOCK, end_row);
            gated_rows(block, p, first, end, panel, n_panels, is_unpacked ? layers : NULL, next);
            for (int half = 0; half < 2 && is_unpacked; half++)
                next[half].at += tiles_of_rows(end - first) * tile_steps(&layers[half]) *
                                 next[half].step;
        }
    }
}

/* ---- AMX: products of tiles of 16 rows ---- */

#if defined(LEVEL_AMX)
enum {
    AMX_ROWS = 16,  /* of a tile */
    AMX_WORDS = 16, /* of 32 bits, in a row of a tile */
    AMX_TILE_BYTES = AMX_ROWS * AMX_WORDS * 4,
    AMX_PREFETCH_WORDS = 3 * AMX_WORDS /* how far ahead weights are prefetched */
};

typedef struct {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

/* Tiles have rows of 64 bytes. The first n_left hold sums and inputs of `rows` rows; the others, up
 * to n_tiles, hold weights, keys or values, of 16 rows. */
static void configure_tiles(int n_left, int n_tiles, int64_t rows) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < n_tiles; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = (uint8_t)(tile < n_left ? min_int64(rows, AMX_ROWS) : AMX_ROWS);
    }
    /* GCC's intrinsic names only the first bytes as its input: without this the stores to the
       others may be left out. */
    __asm__ volatile("" : : "m"(config));
    _tile_loadconfig(&config);
}

/* Sums of two blocks of 16 rows of two panels: floats of bfloat16 inputs, otherwise integers. */
typedef int32_t AmxSums[2][2][AMX_ROWS][PANEL_WIDTH];

/* Some words of up to 32 rows of two panels: what the tiles compute at once. */
typedef struct {
    int64_t row;
    int64_t n_rows;
    int64_t panel;
    int64_t n_panels; /* 1: the second panel is not there, and the first is multiplied twice */
    int64_t distance; /* of the second panel from the first: 1, or from gate to up */
    int64_t group;
    const char *panels;     /* of weights that tiles take, or that are converted */
    int64_t distance_bytes; /* from the first panel to the second */
} AmxStep;

/* What tiles multiply. AMX_CONVERTED: weights of 8 or 4 bits become bfloat16 a tile at a time. */
enum { AMX_INT8, AMX_BF16, AMX_CONVERTED };

/* How weights come into the cache before the tiles load them. */
typedef struct {
    const char *own;  /* the panels themselves, a few words ahead; NULL: they are in the cache */
    const char *next; /* the two panels after them, a few lines at a time */
    int64_t next_at;  /* the bytes of each of the next panels that have been prefetched */
    int64_t lines;    /* of each of the next panels, at a time */
    int64_t distance_bytes;
} AmxPrefetch;

/* The sums of the step before. They become outputs while the tiles multiply: a few rows at a time,
 * so that the processor sees both kinds of instructions at once. */
typedef struct AmxPending AmxPending;
typedef void (*FinishRows)(const Linear *, AmxPending *, int64_t n_rows);
struct AmxPending {
    AmxSums sums;
    float previous[2][2 * AMX_ROWS][PANEL_WIDTH]; /* outputs of the groups before */
    AmxStep step;
    int64_t next_row; /* of the step: the first one that is not finished */
    FinishRows finish_rows;
};

INLINE void amx_prefetch(const Linear *p, AmxPrefetch *prefetch, int64_t word) {
    const int64_t panel_bytes = p->panel_bytes;
    if (prefetch->own) {
        int64_t ahead = (word + AMX_PREFETCH_WORDS) * PANEL_WIDTH * 4;
        const char *lines = ahead < panel_bytes ? prefetch->own + ahead
                                                : prefetch->next + (ahead - panel_bytes);
#pragma GCC unroll 16
        for (int line = 0; line < AMX_TILE_BYTES; line += 64) {
            __builtin_prefetch(lines + line);
            __builtin_prefetch(lines + prefetch->distance_bytes + line);
        }
    } else if (prefetch->lines && prefetch->next_at < panel_bytes) {
        const char *lines = prefetch->next + prefetch->next_at;
        for (int64_t i = 0; i < prefetch->lines; i++, lines += 64) {
            __builtin_prefetch(lines, 0, 2);
            __builtin_prefetch(lines + prefetch->distance_bytes, 0, 2);
        }
        prefetch->next_at += prefetch->lines * 64;
    }
}

/* Multiply the words of a step's group, and finish the step before. Tiles 0 .. 3 hold the sums, 4
 * and 5 inputs, 6 and 7 weights. */
INLINE void amx_multiply(int type, int two_row_blocks, const Linear *p, const AmxStep *step,
                         AmxPrefetch *prefetch, AmxPending *pending) {
    const int is_bf16 = type != AMX_INT8;
    const int64_t row_bytes = p->padded_depth * (is_bf16 ? 2 : 1);
    int64_t begin;
    int64_t end;
    group_words(p, is_bf16 ? WEIGHT_BF16 : WEIGHT_INT8, step->group, &begin, &end);
    int n_tiles = (int)(end - begin + AMX_WORDS - 1) / AMX_WORDS; /* padded with zeros */
    int rows_at_once = ((int)pending->step.n_rows + n_tiles - 1) / n_tiles;
    const char *inputs = p->rounded_inputs + step->row * row_bytes;
    _tile_zero(0);
    _tile_zero(1);
    if (two_row_blocks) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t word = begin; word < end; word += AMX_WORDS) {
        if (type == AMX_CONVERTED) {
            char tiles[2][AMX_TILE_BYTES] __attribute__((aligned(64)));
            const UnpackInputs unpack = unpack_to_bf16[p->weight_type];
            const char *second = step->panels + step->distance_bytes;
            const int64_t stored = 2 * word / word_values(p->weight_type); /* words */
            const int64_t ahead = (stored + AMX_PREFETCH_WORDS) * PANEL_WIDTH * 4;
#pragma GCC unroll 8
            for (int line = 0; line < AMX_TILE_BYTES / 2; line += 64) {
                __builtin_prefetch(step->panels + ahead + line);
                __builtin_prefetch(second + ahead + line);
            }
            unpack(step->panels, 2 * word, 2 * (word + AMX_WORDS), tiles[0]);
            if (step->distance_bytes)
                unpack(second, 2 * word, 2 * (word + AMX_WORDS), tiles[1]);
            __asm__ volatile("" : : "m"(tiles)); /* see `configure_tiles` */
            _tile_loadd(6, tiles[0], 64);
            _tile_loadd(7, tiles[step->distance_bytes != 0], 64);
        } else {
            const char *weights = step->panels + word * PANEL_WIDTH * 4;
            amx_prefetch(p, prefetch, word);
            _tile_loadd(6, weights, 64);
            _tile_loadd(7, weights + step->distance_bytes, 64);
        }
        /* Inputs do not fit into the first cache beside two panels, which are used again sooner. */
        _tile_stream_loadd(4, inputs + word * 4, row_bytes);
        if (is_bf16) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        } else {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
        }
        if (two_row_blocks) {
            _tile_stream_loadd(5, inputs + AMX_ROWS * row_bytes + word * 4, row_bytes);
            if (is_bf16) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        if (pending->next_row < pending->step.n_rows)
            pending->finish_rows(p, pending, rows_at_once);
    }
}

/* How the sums of a group become outputs. */
enum { SUMS_PLAIN, SUMS_SCALED, SUMS_WITH_OFFSETS };

/* What the sums of a panel are multiplied with or added to. */
typedef struct {
    int64_t col;
    vfloat scales;
    vfloat offsets;
    vfloat bias;
} AmxColumns;

INLINE AmxColumns amx_columns(const Linear *p, const AmxStep *step, int64_t j) {
    int64_t col = (step->panel + j * step->distance) * PANEL_WIDTH;
    int64_t column = step->group * p->padded_cols + col;
    return (AmxColumns){
        .col = col,
        .scales = load_scales(p, step->group, col),
        .offsets = p->offsets ? v_load(p->offsets + column) : v_zero(),
        .bias = p->bias ? v_load(p->bias + col) : v_zero(),
    };
}

/* Row i of panel j of a step: scale the sums and add them to those of the previous groups; after
 * the last group they are outputs. The operations and their order are those of `add_group`, so
 * that the number of rows does not change a result. */
INLINE vfloat amx_outputs(int is_bf16, int form, const Linear *p, AmxPending *pending,
                          const AmxColumns *columns, int64_t j, int64_t i) {
    const AmxStep *step = &pending->step;
    const int32_t *sums = pending->sums[i / AMX_ROWS][j][i % AMX_ROWS];
    const int64_t of_row = (step->row + i) * p->n_groups + step->group;
    vfloat sum;
    sum = is_bf16 ? v_load((const float *)sums) : vi_to_float(vi_load(sums));
    if (!is_bf16 || p->input_scales)
        sum = v_mul(sum, v_set(p->input_scales[of_row]));
    if (form >= SUMS_SCALED && step->group)
        sum = v_fma(sum, columns->scales, v_load(pending->previous[j][i]));
    else if (form >= SUMS_SCALED)
        sum = v_mul(sum, columns->scales);
    if (form == SUMS_WITH_OFFSETS)
        sum = v_fnma(v_set(p->input_sums[of_row]), columns->offsets, sum);
    if (form >= SUMS_SCALED && step->group + 1 < p->n_groups)
        v_store(pending->previous[j][i], sum);
    else if (p->bias)
        sum = v_add(sum, columns->bias);
    return sum;
}

/* Finish the next rows of a step. */
INLINE void amx_finish_rows(int is_bf16, int form, int is_gated, const Linear *p,
                            AmxPending *pending, int64_t n_rows) {
    const AmxStep *step = &pending->step;
    const int64_t begin = pending->next_row;
    const int64_t end = min_int64(begin + n_rows, step->n_rows);
    const int is_last = step->group + 1 == p->n_groups;
    pending->next_row = end;
    if (is_gated) {
        const AmxColumns gates = amx_columns(p, step, 0);
        const AmxColumns ups = amx_columns(p, step, 1);
        for (int64_t i = begin; i < end; i++) {
            vfloat gate = amx_outputs(is_bf16, form, p, pending, &gates, 0, i);
            vfloat up = amx_outputs(is_bf16, form, p, pending, &ups, 1, i);
            if (is_last)
                store_gated(p, step->row + i, gates.col, gate, up);
        }
        return;
    }
    for (int64_t j = 0; j < step->n_panels; j++) {
        const AmxColumns columns = amx_columns(p, step, j);
        const int64_t n_cols = min_int64(p->cols - columns.col, PANEL_WIDTH);
        for (int64_t i = begin; i < end; i++) {
            vfloat sum = amx_outputs(is_bf16, form, p, pending, &columns, j, i);
            float *y = p->y + (step->row + i) * p->y_stride + columns.col;
            if (!is_last)
                continue;
            if (n_cols < PANEL_WIDTH)
                v_store_first(y, sum, n_cols);
            else
                v_store(y, sum);
        }
    }
}

/* A function for each type of inputs and form of sums, without and with a gate. */
#define DEFINE_FINISH_ROWS(NAME, IS_BF16, FORM)                                                    \
    static void NAME(const Linear *p, AmxPending *pending, int64_t n_rows) {                       \
        amx_finish_rows(IS_BF16, FORM, 0, p, pending, n_rows);                                     \
    }                                                                                              \
    static void NAME##_gated(const Linear *p, AmxPending *pending, int64_t n_rows) {               \
        amx_finish_rows(IS_BF16, FORM, 1, p, pending, n_rows);                                     \
    }
DEFINE_FINISH_ROWS(finish_int8_plain, 0, SUMS_PLAIN)
DEFINE_FINISH_ROWS(finish_int8_scaled, 0, SUMS_SCALED)
DEFINE_FINISH_ROWS(finish_int8_with_offsets, 0, SUMS_WITH_OFFSETS)
DEFINE_FINISH_ROWS(finish_bf16_plain, 1, SUMS_PLAIN)
DEFINE_FINISH_ROWS(finish_bf16_scaled, 1, SUMS_SCALED)
DEFINE_FINISH_ROWS(finish_bf16_with_offsets, 1, SUMS_WITH_OFFSETS)
static const FinishRows finish_rows_of[2][2][3] = {
    {{finish_int8_plain, finish_int8_scaled, finish_int8_with_offsets},
     {finish_int8_plain_gated, finish_int8_scaled_gated, finish_int8_with_offsets_gated}},
    {{finish_bf16_plain, finish_bf16_scaled, finish_bf16_with_offsets},
     {finish_bf16_plain_gated, finish_bf16_scaled_gated, finish_bf16_with_offsets_gated}},
};

/* The next step after `step`: the groups of some rows, then other rows. Returns 0 after the last.
 */
INLINE int next_amx_step(const Linear *p, int64_t end_row, AmxStep *step) {
    if (++step->group < p->n_groups)
        return 1;
    step->group = 0;
    step->row += step->n_rows;
    step->n_rows = min_int64(end_row - step->row, 2 * AMX_ROWS);
    return step->row < end_row;
}

/* All rows of one or two panels, beginning with `step`. */
INLINE void amx_rows(int type, const Linear *p, int64_t end_row, AmxStep step,
                     AmxPrefetch prefetch, AmxPending *pending) {
    int more;
    do {
        if (step.n_rows > AMX_ROWS)
            amx_multiply(type, 1, p, &step, &prefetch, pending);
        else
            amx_multiply(type, 0, p, &step, &prefetch, pending);
        _tile_stored(0, pending->sums[0][0], 64);
        _tile_stored(1, pending->sums[0][1], 64);
        if (step.n_rows > AMX_ROWS) {
            _tile_stored(2, pending->sums[1][0], 64);
            _tile_stored(3, pending->sums[1][1], 64);
        }
        pending->step = step;
        pending->next_row = 0;
        more = next_amx_step(p, end_row, &step);
        if (step.group == 0)
            prefetch.own = NULL; /* other rows */
    } while (more);
}

/* The weights of a half of each word as int8. */
INLINE vint int8_of_half(int weight_type, vint words, int half) {
    vint bytes = bytes_of_half(weight_type, words, half);
    return weight_type == WEIGHT_INT4 ? vi_sub_bytes(bytes, INT4_ZERO) : bytes;
}

/* Convert the inputs [begin, end) of a panel of 4-bit values, whole words, to int8. */
#define DEFINE_UNPACK_TO_INT8(NAME, WEIGHT_TYPE)                                                   \
    static void NAME(const char *panel, int64_t begin, int64_t end, char *to) {                    \
        for (int64_t word = begin / 8; word < end / 8; word++, to += 2 * PANEL_WIDTH * 4) {        \
            vint words = vi_load(panel + word * PANEL_WIDTH * 4);                                  \
            vi_store(to, int8_of_half(WEIGHT_TYPE, words, 0));                                     \
            vi_store(to + PANEL_WIDTH * 4, int8_of_half(WEIGHT_TYPE, words, 1));                   \
        }                                                                                          \
    }
DEFINE_UNPACK_TO_INT8(unpack_uint4_to_int8, WEIGHT_UINT4)
DEFINE_UNPACK_TO_INT8(unpack_int4_to_int8, WEIGHT_INT4)
DEFINE_UNPACK_TO_INT8(unpack_fp4_to_int8, WEIGHT_FP4)
static const UnpackInputs unpack_to_int8[] = {
    NULL, NULL, NULL, NULL, unpack_uint4_to_int8, unpack_int4_to_int8, unpack_fp4_to_int8, NULL,
};

/* Whether groups consist of whole tiles. */
static int amx_supports(const Linear *p) {
    int values = p->inputs == INPUTS_BF16 ? 2 : 4;
    return p->n_groups == 1 || p->group_size % (AMX_WORDS * values) == 0;
}

static void amx_block(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                      int64_t end_panel) {
    const int converts = p->inputs == INPUTS_BF16 && p->weight_type != WEIGHT_BF16;
    int type = converts ? AMX_CONVERTED : p->inputs == INPUTS_BF16 ? AMX_BF16 : AMX_INT8;
    UnpackInputs unpack = type == AMX_INT8 ? unpack_to_int8[p->weight_type] : NULL;
    int64_t tile_bytes = p->padded_depth * PANEL_WIDTH; /* of a panel for the tiles */
    char *unpacked = NULL;
    if (converts && end_row - row > 2 * AMX_ROWS) { /* tiles take each panel several times */
        unpack = unpack_to_bf16[p->weight_type];
        tile_bytes *= 2;
    }
    if (unpack)
        unpacked = thread_scratch(SCRATCH_PANELS, 2 * tile_bytes);
    if (unpacked && converts)
        type = AMX_BF16;
    if (unpack && unpacked == NULL && type == AMX_INT8) { /* the same results */
        if (p->is_gated)
            gated_block(int8_block(p->weight_type), p, row, end_row, panel, end_panel);
        else
            int8_block(p->weight_type)(p, row, end_row, panel, end_panel);
        return;
    }
    int form = p->offsets                        ? SUMS_WITH_OFFSETS
               : (p->scales || p->n_groups > 1) ? SUMS_SCALED
                                                 : SUMS_PLAIN;
    AmxPending pending __attribute__((aligned(64)));
    pending.step.n_rows = 0;
    pending.next_row = 0;
    pending.finish_rows = finish_rows_of[p->inputs == INPUTS_BF16][p->is_gated][form];
    const int64_t row_blocks = (end_row - row + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
    const int64_t distance = p->is_gated ? p->padded_cols / PANEL_WIDTH / 2 : 1;
    const int64_t pair = p->is_gated ? 1 : 2; /* from two panels to the next two */
    configure_tiles(6, 8, end_row - row);
    for (int64_t first = panel; panel < end_panel; panel += pair) {
        int64_t n_panels = p->is_gated ? 2 : min_int64(end_panel - panel, 2);
        const char *panels = p->weight + panel * p->panel_bytes;
        int64_t distance_bytes = distance * p->panel_bytes;
        AmxPrefetch prefetch = {.own = NULL};
        if (unpacked) {
            for (int64_t j = 0; j < n_panels; j++)
                unpack(panels + j * distance_bytes, 0, p->padded_depth, unpacked + j * tile_bytes);
            panels = unpacked;
            distance_bytes = tile_bytes;
        } else {
            prefetch.distance_bytes = distance_bytes;
            prefetch.next = panels + pair * p->panel_bytes;
            if (panel == first || row_blocks == 1)
                prefetch.own = panels;
            if (row_blocks > 1)
                prefetch.lines = (AMX_WORDS + row_blocks - 1) / row_blocks;
        }
        AmxStep step = {
            .row = row,
            .n_rows = min_int64(end_row - row, 2 * AMX_ROWS),
            .panel = panel,
            .n_panels = n_panels,
            .distance = distance,
            .panels = panels,
            .distance_bytes = n_panels == 1 ? 0 : distance_bytes,
        };
        if (type == AMX_CONVERTED)
            amx_rows(AMX_CONVERTED, p, end_row, step, prefetch, &pending);
        else if (type == AMX_BF16)
            amx_rows(AMX_BF16, p, end_row, step, prefetch, &pending);
        else
            amx_rows(AMX_INT8, p, end_row, step, prefetch, &pending);
    }
    pending.finish_rows(p, &pending, pending.step.n_rows);
    _tile_release();
}
#endif

/* ---- the layer ---- */

/* The operation that the threads divide among themselves. */
typedef struct {
    Linear layer;
    BlockFunction block;
    int64_t block_rows; /* of a piece */
    int64_t block_panels; /* with a gate: of gate, and as many of up */
    int64_t n_chunks;     /* of panels */
} LinearOperation;

/* The panels of outputs. */
static int64_t output_panels(const Linear *p) {
    return p->padded_cols / PANEL_WIDTH / (p->is_gated ? 2 : 1);
}

static void linear_piece(const void *operation, int64_t piece) {
    const LinearOperation *o = operation;
    int64_t row = piece / o->n_chunks * o->block_rows;
    int64_t panel = piece % o->n_chunks * o->block_panels;
    int64_t n_panels = output_panels(&o->layer);
    int64_t end_row = min_int64(row + o->block_rows, o->layer.rows);
    int64_t end_panel = min_int64(panel + o->block_panels, n_panels);
#if defined(LEVEL_AMX)
    if (o->block == amx_block) { /* it computes gates itself */
        amx_block(&o->layer, row, end_row, panel, end_panel);
        return;
    }
#endif
    if (o->layer.is_gated)
        gated_block(o->block, &o->layer, row, end_row, panel, end_panel);
    else
        o->block(&o->layer, row, end_row, panel, end_panel);
}

static float sum_floats(const float *values, int64_t size) {
    vfloat lanes = v_zero();
    int64_t k = 0;
    for (; k + VECTOR_WIDTH <= size; k += VECTOR_WIDTH)
        lanes = v_add(lanes, v_load(values + k));
    if (k < size)
        lanes = v_add(lanes, v_load_first(values + k, size - k));
    return v_sum(lanes);
}

/* The sum of the inputs of a group: of the rounded ones, where they are bfloat16. */
static float group_sum(const Linear *p, int64_t row, int64_t group) {
    const int64_t first = group * p->group_size;
#if defined(LEVEL_BF16)
    if (p->inputs == INPUTS_BF16) {
        const uint16_t *rounded = (const uint16_t *)p->rounded_inputs + row * p->padded_depth;
        return sum_bf16(rounded + first, p->group_size);
    }
#endif
    return sum_floats(p->x + row * p->x_stride + first, p->group_size);
}

static void prepare_row(const Linear *p, int64_t row) {
    if (p->input_quant) {
        quantize_row_to_float(p, row);
        return;
    }
    if (p->inputs == INPUTS_INT8) {
        quantize_row(p, row);
        return;
    }
#if defined(LEVEL_BF16)
    if (p->inputs == INPUTS_BF16)
        round_row_to_bf16(p, row);
#endif
    if (p->inputs == INPUTS_F32 && p->float_inputs != p->x) { /* a copy, padded with zeros */
        float *copy = (float *)p->float_inputs + row * p->float_stride;
        memcpy(copy, p->x + row * p->x_stride, p->depth * sizeof(float));
        memset(copy + p->depth, 0, (p->float_stride - p->depth) * sizeof(float));
    }
    if (p->offsets)
        for (int64_t group = 0; group < p->n_groups; group++)
            p->input_sums[row * p->n_groups + group] = group_sum(p, row, group);
}

static void prepare_rows(const void *operation, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        prepare_row(operation, row);
}

/* Whether `prepare_row` writes inputs of float32: values of FP8, and a copy where the depth must be
 * padded. */
static int copies_inputs(const Linear *p) {
    return p->inputs == INPUTS_F32 &&
           (p->input_quant || p->depth % word_values(p->weight_type) != 0);
}

/* Rows of memory for inputs. */
static int64_t padded_rows(const Linear *p) {
    return (p->rows + 31) / 32 * 32; /* AMX reads whole tiles */
}

/* Bytes of rounded or copied inputs. */
static size_t rounded_input_bytes(const Linear *p) {
    size_t bytes = 0;
    if (p->x_is_rounded)
        return 0;
    if (p->inputs != INPUTS_F32)
        bytes = padded_rows(p) * p->padded_depth * (p->inputs == INPUTS_BF16 ? 2 : 1);
    else if (copies_inputs(p))
        bytes = p->rows * p->padded_depth * sizeof(float);
    return (bytes + 63) / 64 * 64;
}

/* Bytes of memory that `prepare_row` fills, a multiple of 64; 0: it has nothing to do. */
static size_t input_memory_bytes(const Linear *p) {
    size_t bytes = rounded_input_bytes(p);
    if (bytes == 0 && p->offsets == NULL)
        return 0;
    return bytes + (3 * padded_rows(p) * p->n_groups * sizeof(float) + 63) / 64 * 64;
}

/* Have `prepare_row` fill this memory, of `input_memory_bytes`. */
static void use_input_memory(Linear *p, char *memory) {
    size_t per_group = padded_rows(p) * p->n_groups * sizeof(float);
    p->float_inputs = p->x;
    p->float_stride = p->x_stride;
    if (p->x_is_rounded)
        p->rounded_inputs = (char *)p->x;
    if (memory == NULL)
        return;
    p->rounded_inputs = memory;
    memory += rounded_input_bytes(p);
    p->input_sums = (float *)memory;
    if (p->inputs == INPUTS_INT8 || p->input_quant) {
        p->input_scales = (float *)(memory + per_group);
        p->int_input_sums = (int32_t *)(memory + 2 * per_group);
    }
    if (copies_inputs(p)) {
        p->float_inputs = (float *)p->rounded_inputs;
        p->float_stride = p->padded_depth;
    }
}

/* Allocate and fill what `p` needs of its inputs. Returns 0 when out of memory. */
static int prepare_inputs(Linear *p) {
    size_t bytes = input_memory_bytes(p);
    char *memory = bytes ? thread_scratch(SCRATCH_INPUTS, bytes) : NULL;
    if (bytes && memory == NULL)
        return 0;
    use_input_memory(p, memory);
    if (bytes)
        run_ranges(p->rows, 1 + PARALLEL_MIN_ELEMENTS / p->depth, prepare_rows, p);
    return 1;
}

static BlockFunction block_function(const Linear *p) {
#if defined(LEVEL_AMX)
    if (p->inputs == INPUTS_BF16 || (p->inputs == INPUTS_INT8 && p->rows > FEW_ROWS))
        if (amx_supports(p))
            return amx_block;
#endif
#if defined(LEVEL_BF16) && !defined(LEVEL_AMX)
    if (p->inputs == INPUTS_BF16)
        return p->weight_type == WEIGHT_BF16 ? bf16_block : unpacked_bf16_block;
#endif
    return p->inputs == INPUTS_INT8 ? int8_block(p->weight_type) : float_block;
}

/* Set the fields that follow from the layer's sizes. */
static void derive_sizes(Linear *p) {
    if (p->inputs == INPUTS_ROUNDED) {
        p->inputs = INPUTS_BF16;
        p->x_is_rounded = 1;
    } else if (p->inputs >= INPUTS_FP4_E8M0) {
        p->input_quant = p->inputs;
        p->inputs = INPUTS_INT8;
    } else if (p->inputs >= INPUTS_FP8_TOKEN) {
        p->input_quant = p->inputs;
        p->inputs = INPUTS_F32;
#if defined(LEVEL_BF16)
        if (p->weight_type != WEIGHT_F32 && p->weight_type != WEIGHT_F16)
            p->inputs = INPUTS_BF16;
#endif
    }
    p->padded_cols = (p->cols + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH;
    p->padded_depth = (p->depth + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE;
    p->panel_bytes = (p->weight_type == WEIGHT_F32 ? p->depth : p->padded_depth) /
                     word_values(p->weight_type) * PANEL_WIDTH * 4;
    if (p->weight_type == WEIGHT_BF16_COMPRESSED)
        p->panel_bytes = COMPRESSED_HEADER_BYTES + p->panel_bytes / 4 * 3;
    p->n_groups = p->depth / p->group_size;
#if defined(LEVEL_AMX)
    if (p->inputs == INPUTS_BF16 && !amx_supports(p))
        p->inputs = INPUTS_F32;
#endif
}

/* Choose the blocks of a layer whose inputs are prepared, for about `turns` pieces. Returns how
 * many pieces they are. */
static int64_t divide_layer(LinearOperation *o, int64_t turns) {
    const Linear *p = &o->layer;
    int64_t n_panels = output_panels(p);
    int64_t of_output = p->is_gated ? 2 : 1; /* panels of weights for each */
    int64_t n_row_blocks = 1;
    o->block = block_function(p);
    o->block_rows = p->rows;
    if (p->rows <= FEW_ROWS) {
        o->block_panels = max_int64((n_panels + turns - 1) / turns, MIN_PANELS / of_output);
        o->block_panels =
            min_int64(o->block_panels, PIECE_BYTES / (of_output * p->panel_bytes) + 1);
    } else {
        int64_t row_bytes = p->depth * (p->inputs == INPUTS_F32 ? 4 : 2);
        int64_t most_rows = max_int64(ROW_BLOCK_BYTES / row_bytes / ROW_BLOCK, 1) * ROW_BLOCK;
        n_row_blocks = (p->rows + most_rows - 1) / most_rows;
        o->block_rows = (p->rows + n_row_blocks - 1) / n_row_blocks;
        o->block_rows = (o->block_rows + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK;
        n_row_blocks = (p->rows + o->block_rows - 1) / o->block_rows;
        o->block_panels = max_int64(n_panels * n_row_blocks / turns, 2);
        o->block_panels = min_int64(o->block_panels, 32 / of_output);
    }
    o->block_panels = (o->block_panels + 1) / 2 * 2; /* tiles are of two panels */
    o->n_chunks = (n_panels + o->block_panels - 1) / o->block_panels;
    return n_row_blocks * o->n_chunks;
}

static int linear(const Linear *layer) {
    LinearOperation o = {.layer = *layer};
    if (layer->rows == 0)
        return 1;
    derive_sizes(&o.layer);
    if (!prepare_inputs(&o.layer))
        return 0;
    run_pieces(divide_layer(&o, num_threads() * PIECES_OF_THREAD), linear_piece, &o);
    return 1;
}

/* ---- a layer for each head ---- */

/* The heads have equal sizes, and so equal pieces. */
typedef struct {
    const HeadLinear *heads;
    LinearOperation first;
    int64_t n_pieces; /* of a head */
} HeadLinearOperation;

static void head_linear_piece(const void *operation, int64_t piece) {
    const HeadLinearOperation *o = operation;
    const HeadLinear *heads = o->heads;
    LinearOperation own = o->first;
    Linear *p = &own.layer;
    int64_t head = piece / o->n_pieces;
    p->x += head * heads->x_head_stride;
    p->float_inputs = p->x;
    p->weight += head * p->padded_cols / PANEL_WIDTH * p->panel_bytes;
    p->y += head * heads->y_head_stride;
    linear_piece(&own, piece % o->n_pieces);
}

static int head_linear(const HeadLinear *heads) {
    HeadLinearOperation o = {.heads = heads, .first = {.layer = heads->first}};
    Linear *p = &o.first.layer;
    if (p->rows == 0)
        return 1;
    derive_sizes(p);
    use_input_memory(p, NULL); /* the caller promises that inputs need none */
    o.n_pieces = divide_layer(&o.first, num_threads() * PIECES_OF_THREAD / heads->n_heads + 1);
    run_pieces(o.n_pieces * heads->n_heads, head_linear_piece, &o);
    return 1;
}
