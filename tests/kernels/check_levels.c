/* Compares the CPU kernels of every level that the processor has with plain loops in double.
 *
 * It needs no Python, so that it also runs for another architecture in an emulator. It is linked
 * with kernels/cpu/level_*.c, levels.c and thread_pool.c (see test_cpu_levels.py), prints the
 * levels that passed, and exits with 1 after the first difference. With the argument "few" it
 * takes fewer sizes. Compiled with -DONLY_LEVEL=kernels_..., it checks and needs one level alone.
 */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"
#include "thread_pool.h"

static const Kernels *kernels;
static int is_few; /* sizes */

/* ---- data and comparisons ---- */

static uint32_t random_state = 1;

static uint32_t random_bits(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

/* From -1 to 1. */
static float random_float(void) {
    return (float)random_bits() / (1 << 23) - 1.0f;
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes + 1);
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return memory;
}

static float *random_floats(int64_t n, float largest) {
    float *values = allocate(n * sizeof *values);
    for (int64_t i = 0; i < n; i++)
        values[i] = largest * random_float();
    return values;
}

static void expect(int condition, const char *what, const char *message) {
    if (condition)
        return;
    printf("%s: %s: %s\n", kernels->name, what, message);
    exit(1);
}

/* magnitude: of the terms whose sum is expected. */
static void expect_close(double actual, double expected, double magnitude, const char *what) {
    char message[128];
    snprintf(message, sizeof message, "%.9g where %.9g was expected", actual, expected);
    expect(fabs(actual - expected) <= 1e-6 * magnitude + 1e-30, what, message);
}

static float bf16_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* To the nearest, ties to even. */
static uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Of normal float16. */
static float f16_to_float(uint16_t half) {
    float magnitude = ldexpf((float)(1024 + (half & 1023)), (half >> 10 & 31) - 25);
    return half >> 15 ? -magnitude : magnitude;
}

/* Of e4m3, except NaN. */
static float fp8_to_float(uint8_t byte) {
    int exponent = byte >> 3 & 15;
    int digits = (exponent ? 8 : 0) + (byte & 7);
    float magnitude = ldexpf((float)digits, (exponent ? exponent : 1) - 10);
    return byte >> 7 ? -magnitude : magnitude;
}

/* ---- linear layers ---- */

static const int TWICE_FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const char *const WEIGHT_NAMES[] = {"f32",   "bf16", "f16", "int8",
                                           "uint4", "int4", "fp4", "fp8"};
static const char *const INPUT_NAMES[] = {
    "f32",       "bf16",     "int8",     "rounded",  "fp8 token", "fp8 static",
    "fp8 group", "fp8 e8m0", "fp4 e8m0", "fp4 e4m3",
};
static const char *const SCALE_NAMES[] = {"f32", "e4m3", "e8m0"};
static const float INPUT_SCALE = 0.003f;

static int values_of_word(int weight_type) {
    return weight_type == WEIGHT_F32    ? 1
           : weight_type <= WEIGHT_F16  ? 2
           : weight_type == WEIGHT_INT8 ? 4
           : weight_type == WEIGHT_FP8  ? 4
                                        : 8;
}

/* Put a random value into a packed weight, and return what it stands for. */
static double put_random_value(int weight_type, uint32_t *words, int64_t depth_words,
                               int64_t column, int64_t k) {
    int values = values_of_word(weight_type);
    int64_t panel = column / PANEL_WIDTH;
    int i = (int)(k % values);
    uint32_t *word =
        words + (panel * depth_words + k / values) * PANEL_WIDTH + column % PANEL_WIDTH;
    if (weight_type == WEIGHT_F32) {
        float x = random_float();
        memcpy(word, &x, sizeof x);
        return x;
    }
    if (weight_type == WEIGHT_BF16) {
        uint16_t x = float_to_bf16(random_float());
        *word |= (uint32_t)x << 16 * i;
        return bf16_to_float(x);
    }
    if (weight_type == WEIGHT_F16) {
        uint16_t x = (uint16_t)((random_bits() & 0x83ff) | (10 + random_bits() % 6) << 10);
        *word |= (uint32_t)x << 16 * i;
        return f16_to_float(x);
    }
    if (weight_type == WEIGHT_FP8) { /* the columns of an input lie together */
        uint8_t x = (uint8_t)(random_bits() % 127 | (random_bits() & 0x80));
        uint8_t *step = (uint8_t *)(words + (panel * depth_words + k / values) * PANEL_WIDTH);
        step[i * PANEL_WIDTH + column % PANEL_WIDTH] = x;
        return fp8_to_float(x) / FP8_DIVISOR;
    }
    if (weight_type == WEIGHT_INT8) {
        uint8_t x = (uint8_t)random_bits();
        *word |= (uint32_t)x << 8 * i;
        return (int8_t)x;
    }
    uint32_t code = random_bits() & 15;
    *word |= code << (i < 4 ? 8 * i : 8 * (i - 4) + 4);
    return weight_type == WEIGHT_UINT4  ? (double)code
           : weight_type == WEIGHT_INT4 ? (double)code - INT4_ZERO
                                        : TWICE_FP4[code];
}

/* x, at most the largest value, rounded to a float with so many bits after the leading one. */
static double round_digits(double x, int bits, int smallest_exponent) {
    int exponent;
    frexp(x, &exponent);
    exponent = exponent - 1 < smallest_exponent ? smallest_exponent : exponent - 1;
    return ldexp(nearbyint(ldexp(x, bits - exponent)), exponent - bits);
}

/* What the inputs of a row that share a scale are rounded to: FP8 or FP4. */
static void round_to_floats(const float *x, int inputs, int64_t size, double *to) {
    int is_fp4 = inputs >= INPUTS_FP4_E8M0;
    double limit = is_fp4 ? 6 : 448;
    float largest = 0;
    for (int64_t k = 0; k < size; k++)
        largest = fmaxf(largest, fabsf(x[k]));
    float scale = fmaxf(largest / 448.0f, 1e-12f);
    if (inputs == INPUTS_FP8_STATIC)
        scale = INPUT_SCALE;
    if (inputs == INPUTS_FP8_E8M0 || inputs == INPUTS_FP4_E8M0)
        scale = ldexpf(1.0f, ilogbf(largest) - (is_fp4 ? 2 : 8));
    if (inputs == INPUTS_FP4_E4M3) {
        double steps = fminf(largest / (6.0f * INPUT_SCALE), 448.0f);
        scale = (float)round_digits(steps, 3, -6) * INPUT_SCALE;
    }
    for (int64_t k = 0; k < size; k++) {
        double steps = fmin(fmax(x[k] / scale, -limit), limit);
        to[k] = scale * (is_fp4 ? round_digits(steps, 1, 0) : round_digits(steps, 3, -6));
    }
}

/* What the inputs of a row are rounded to. */
static void round_inputs(const float *x, int inputs, int64_t depth, int64_t group_size,
                         double *to) {
    if (inputs == INPUTS_FP8_TOKEN || inputs == INPUTS_FP8_STATIC) {
        round_to_floats(x, inputs, depth, to);
        return;
    }
    for (int64_t begin = 0; begin < depth; begin += group_size) {
        float largest = 0;
        if (inputs > INPUTS_FP8_STATIC) {
            round_to_floats(x + begin, inputs, group_size, to + begin);
            continue;
        }
        for (int64_t k = begin; k < begin + group_size; k++)
            largest = fmaxf(largest, fabsf(x[k]));
        float scale = fmaxf(largest / 127.0f, 1e-12f);
        for (int64_t k = begin; k < begin + group_size; k++)
            to[k] = inputs == INPUTS_BF16   ? bf16_to_float(float_to_bf16(x[k]))
                    : inputs == INPUTS_INT8 ? (double)scale * nearbyintf(x[k] / scale)
                                            : x[k];
    }
}

/* Scale i as the kernels read it: with bytes, times the factor of its column. */
static double scale_value(const void *scales, const float *factors, int scale_type, int64_t i,
                          int64_t col) {
    if (scale_type == SCALES_F32)
        return ((const float *)scales)[i];
    uint8_t byte = ((const uint8_t *)scales)[i];
    if (scale_type == SCALES_E4M3)
        return (double)fp8_to_float(byte) / FP8_DIVISOR * factors[col];
    return byte ? ldexp(factors[col], byte - 127) : 0;
}

/* Of the outputs of integer sums, in the order of their checks: those of the first level. */
static struct {
    const char *level;
    uint64_t digests[1024];
    int at; /* the next one, of the level that is being checked */
} integer_outputs;

/* Integer sums are exact: every level gives the same bits. */
static void expect_bits_of_first_level(const float *y, int64_t y_stride, int64_t rows,
                                       int64_t cols, const char *what) {
    char message[128];
    uint64_t digest = 0xcbf29ce484222325u; /* FNV-1a */
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < cols * (int64_t)sizeof *y; i++)
            digest = (digest ^ ((const uint8_t *)(y + row * y_stride))[i]) * 0x100000001b3u;
    int at = integer_outputs.at++;
    expect(at < (int)(sizeof integer_outputs.digests / sizeof digest), what, "too many digests");
    if (integer_outputs.level == NULL || integer_outputs.level == kernels->name) {
        integer_outputs.level = kernels->name;
        integer_outputs.digests[at] = digest;
    }
    snprintf(message, sizeof message, "other bits than those of level %s", integer_outputs.level);
    expect(integer_outputs.digests[at] == digest, what, message);
}

static void check_linear(int weight_type, int scale_type, int inputs, int64_t rows, int64_t cols,
                         int64_t depth, int64_t n_groups, int has_offsets) {
    char what[128];
    snprintf(what, sizeof what,
             "linear, %s x %s, scales in %s, %d rows, %d columns, depth %d in %d groups",
             INPUT_NAMES[inputs], WEIGHT_NAMES[weight_type], SCALE_NAMES[scale_type], (int)rows,
             (int)cols, (int)depth, (int)n_groups);
    const int has_integer_sums = inputs == INPUTS_INT8 || inputs >= INPUTS_FP4_E8M0;
    if (has_integer_sums) /* the same numbers at every level */
        random_state = (uint32_t)integer_outputs.at;
    int64_t group_size = depth / n_groups;
    int64_t padded_cols = (cols + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH;
    int64_t padded_depth = (depth + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE;
    int64_t depth_words =
        (weight_type == WEIGHT_F32 ? depth : padded_depth) / values_of_word(weight_type);
    uint32_t *words = allocate(padded_cols * depth_words * sizeof *words);
    double *weight = allocate(cols * depth * sizeof *weight);
    for (int64_t c = 0; c < cols; c++)
        for (int64_t k = 0; k < depth; k++)
            weight[c * depth + k] = put_random_value(weight_type, words, depth_words, c, k);
    int has_scales = weight_type >= WEIGHT_INT8;
    float *scales = random_floats(n_groups * padded_cols, 0.1f);
    float *factors = random_floats(padded_cols, 0.1f);
    float *offsets = random_floats(n_groups * padded_cols, 0.1f);
    float *bias = random_floats(padded_cols, 1.0f);
    for (int64_t i = 0; i < n_groups * padded_cols && scale_type != SCALES_F32; i++)
        ((uint8_t *)scales)[i] =
            (uint8_t)(scale_type == SCALES_E4M3 ? random_bits() % 127 /* all magnitudes */
                      : i % 9 == 0              ? 0
                                                : 120 + random_bits() % 14);
    int64_t x_stride = depth + 3;
    int64_t y_stride = cols + 5;
    float *x = random_floats(rows * x_stride, 2.0f);
    float *y = random_floats(rows * y_stride, 1.0f);
    float *alone = allocate(y_stride * sizeof *alone);
    float guard = y[cols];
    Linear layer = {
        .weight_type = weight_type,
        .inputs = inputs,
        .x = x,
        .x_stride = x_stride,
        .weight = (const char *)words,
        .scale_type = scale_type,
        .scales = has_scales ? scales : NULL,
        .scale_factors = factors,
        .offsets = has_offsets ? offsets : NULL,
        .bias = bias,
        .input_scale = &INPUT_SCALE,
        .y = y,
        .y_stride = y_stride,
        .rows = rows,
        .cols = cols,
        .depth = depth,
        .group_size = group_size,
    };
    expect(kernels->linear(&layer), what, "out of memory");
    double *rounded = allocate(depth * sizeof *rounded);
    /* Tiles of AMX have 32 inputs: with other groups, the level does not round. */
    const int is_kept = inputs == INPUTS_BF16 && n_groups > 1 && group_size % 32 != 0 &&
                        strcmp(kernels->name, "amx") == 0;
    for (int64_t row = 0; row < rows; row++) {
        round_inputs(x + row * x_stride, is_kept ? INPUTS_F32 : inputs, depth, group_size,
                     rounded);
        for (int64_t c = 0; c < cols; c++) {
            double sum = bias[c];
            double magnitude = fabs(sum);
            for (int64_t k = 0; k < depth; k++) {
                int64_t parameter = k / group_size * padded_cols + c;
                double w = weight[c * depth + k];
                if (has_scales)
                    w *= scale_value(scales, factors, scale_type, parameter, c);
                double offset = has_offsets ? offsets[parameter] : 0;
                sum += rounded[k] * (w - offset);
                magnitude += fabs(rounded[k]) * (fabs(w) + fabs(offset));
            }
            expect_close(y[row * y_stride + c], sum, magnitude, what);
        }
    }
    expect(y[cols] == guard, what, "it wrote beyond its columns");
    if (has_integer_sums)
        expect_bits_of_first_level(y, y_stride, rows, cols, what);
    layer.y = alone;
    layer.rows = 1;
    /* Each place that a row can have in a tile. */
    for (int64_t row = 0; row < rows; row += rows > 16 ? 7 : 1) {
        layer.x = x + row * x_stride;
        expect(kernels->linear(&layer), what, "out of memory");
        expect(memcmp(alone, y + row * y_stride, cols * sizeof *y) == 0, what,
               "a row alone has other results than in a batch");
    }
    free(words);
    free(weight);
    free(scales);
    free(factors);
    free(offsets);
    free(bias);
    free(x);
    free(y);
    free(alone);
    free(rounded);
}

/* A value of bfloat16 whose exponent is one of `n_exponents`; `special`: or any bits at all. */
static uint16_t spread_bf16(int n_exponents, int special) {
    uint32_t exponent = 100 + random_bits() % (uint32_t)n_exponents;
    if (random_bits() % 8 == 0)
        exponent = 0; /* zeros and subnormal numbers */
    if (special && random_bits() % 300 == 0)
        return (uint16_t)random_bits();
    return (uint16_t)((random_bits() & 0x807f) | exponent << 7);
}

/* Compressed weights give the bits of the same weights in bfloat16. */
static void check_compressed_linear(int n_exponents, int special, int64_t rows, int64_t cols,
                                    int64_t depth) {
    const int64_t n_panels = (cols + PANEL_WIDTH - 1) / PANEL_WIDTH;
    const int64_t padded_depth = (depth + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE;
    const int64_t panel_values = padded_depth * PANEL_WIDTH;
    const int64_t panel_bytes = COMPRESSED_HEADER_BYTES + panel_values * 3 / 2;
    uint16_t *values = allocate(n_panels * panel_values * sizeof *values);
    for (int64_t i = 0; i < n_panels * panel_values; i++)
        if (i % panel_values / (2 * PANEL_WIDTH) * 2 + i % 2 < depth) /* 0 beyond */
            values[i] = spread_bf16(n_exponents, special);
    int32_t *top_exponents = allocate(n_panels * sizeof *top_exponents);
    int32_t *n_uncompressed = allocate(n_panels * sizeof *n_uncompressed);
    int64_t *uncompressed_starts = allocate(n_panels * sizeof *uncompressed_starts);
    Bf16Compression compression = {
        .panels = (const char *)values,
        .n_panels = n_panels,
        .depth = padded_depth,
        .top_exponents = top_exponents,
        .n_uncompressed = n_uncompressed,
        .uncompressed_starts = uncompressed_starts,
    };
    kernels->measure_bf16(&compression);
    int64_t bytes = n_panels * panel_bytes;
    int64_t uncompressed = 0;
    for (int64_t panel = 0; panel < n_panels; panel++) {
        uncompressed_starts[panel] = bytes;
        uncompressed += n_uncompressed[panel];
        if (n_uncompressed[panel])
            bytes += n_uncompressed[panel] * 256 + (n_uncompressed[panel] * 4 + 4 + 63) / 64 * 64;
    }
    const int64_t n_units = n_panels * ((depth + 7) / 8); /* others have only zeros */
    const char *what = "compressed linear";
    expect(n_exponents > 15 || special || uncompressed == 0, what,
           "a unit of few exponents is not compressed");
    expect(n_exponents < 100 || uncompressed == n_units, what,
           "a unit of many exponents is compressed");
    expect(!special || n_units < 64 || (uncompressed > 0 && uncompressed < n_units), what,
           "units of one kind alone");
    compression.to = allocate(bytes);
    kernels->compress_bf16(&compression);
    float *x = random_floats(rows * depth, 2.0f);
    float *expected = random_floats(rows * cols, 1.0f);
    float *y = random_floats(rows * cols, 1.0f);
    float *bias = random_floats(n_panels * PANEL_WIDTH, 1.0f);
    Linear layer = {
        .weight_type = WEIGHT_BF16,
        .inputs = INPUTS_BF16,
        .x = x,
        .x_stride = depth,
        .weight = (const char *)values,
        .bias = bias,
        .y = expected,
        .y_stride = cols,
        .rows = rows,
        .cols = cols,
        .depth = depth,
        .group_size = depth,
    };
    expect(kernels->linear(&layer), what, "out of memory");
    layer.weight_type = WEIGHT_BF16_COMPRESSED;
    layer.weight = compression.to;
    layer.y = y;
    expect(kernels->linear(&layer), what, "out of memory");
    expect(memcmp(y, expected, rows * cols * sizeof *y) == 0, what,
           "other bits than those of bfloat16");
    free(values);
    free(top_exponents);
    free(n_uncompressed);
    free(uncompressed_starts);
    free(compression.to);
    free(x);
    free(expected);
    free(y);
    free(bias);
}

static void check_compressed_linears(void) {
    static const int64_t sizes[][3] = {/* rows, columns, depth */
                                       {1, 7, 60},  {1, 100, 200}, {2, 90, 70},  {3, 64, 200},
                                       {4, 40, 64}, {5, 17, 130},  {29, 70, 520}, {130, 40, 64}};
    if (kernels->compress_bf16 == NULL)
        return;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int64_t *size = sizes[i];
        check_compressed_linear(1, 0, size[0], size[1], size[2]);
        check_compressed_linear(15, 0, size[0], size[1], size[2]);
        check_compressed_linear(15, 1, size[0], size[1], size[2]);
        check_compressed_linear(17, 0, size[0], size[1], size[2]);
        check_compressed_linear(120, 0, size[0], size[1], size[2]);
    }
}

static void check_linears(void) {
    static const int64_t sizes[][3] = {/* rows, columns, depth */
                                       {1, 7, 5},   {2, 33, 70},  {3, 64, 96},  {4, 40, 64},
                                       {5, 17, 48}, {7, 100, 72}, {13, 16, 130}, {97, 36, 64}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (is_few && i % 4 != 1)
            continue;
        for (int type = WEIGHT_F32; type <= WEIGHT_FP8; type++)
            for (int inputs = INPUTS_F32; inputs <= INPUTS_FP4_E4M3; inputs++) {
                int64_t depth = sizes[i][2];
                int is_bf16 = type != WEIGHT_F32 && type != WEIGHT_F16; /* bfloat16 holds it */
                if (inputs == INPUTS_ROUNDED)
                    continue;
                if (inputs == INPUTS_BF16 && (!is_bf16 || !kernels->has_bfloat16))
                    continue;
                if (inputs == INPUTS_INT8 && (type < WEIGHT_INT8 || type == WEIGHT_FP8))
                    continue;
                if (inputs >= INPUTS_FP4_E8M0 && type != WEIGHT_FP4)
                    continue;
                /* Floats of 8 bits, and FP4 by FP4, have no offsets. */
                int has_offsets = type != WEIGHT_FP8 && inputs < INPUTS_FP4_E8M0;
                check_linear(type, SCALES_F32, inputs, sizes[i][0], sizes[i][1], depth, 1, 0);
                for (int64_t size = 24; type >= WEIGHT_INT8 && size <= 32; size += 8)
                    for (int scales = SCALES_F32; scales <= SCALES_E8M0; scales++)
                        if (depth % size == 0 && (scales == SCALES_F32 || type >= WEIGHT_FP4))
                            check_linear(type, scales, inputs, sizes[i][0], sizes[i][1], depth,
                                         depth / size, has_offsets && scales == SCALES_F32);
            }
    }
}

/* A layer for each head gives the bits of as many layers. depth: even. */
static void check_head_linear(int type, int64_t rows, int64_t cols, int64_t depth) {
    enum { LAYERS = 3 };
    int64_t padded_cols = (cols + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH;
    int64_t padded_depth = (depth + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE;
    int64_t words = padded_cols * (type == WEIGHT_F32 ? depth : padded_depth / 2);
    float *weight = random_floats(LAYERS * words, 1.0f);
    for (int64_t i = 0; type == WEIGHT_BF16 && i < 2 * LAYERS * words; i++)
        ((uint16_t *)weight)[i] = float_to_bf16(random_float());
    int64_t x_stride = LAYERS * (depth + 3) + 5;
    int64_t y_stride = LAYERS * (cols + 2);
    float *x = random_floats(rows * x_stride, 1.0f);
    float *together = random_floats(rows * y_stride, 1.0f);
    float *one_by_one = allocate(rows * y_stride * sizeof *one_by_one);
    memcpy(one_by_one, together, rows * y_stride * sizeof *one_by_one);
    HeadLinear heads = {
        .first = {.weight_type = type,
                  .inputs = INPUTS_F32,
                  .x = x,
                  .x_stride = x_stride,
                  .weight = (const char *)weight,
                  .y = together,
                  .y_stride = y_stride,
                  .rows = rows,
                  .cols = cols,
                  .depth = depth,
                  .group_size = depth},
        .n_heads = LAYERS,
        .x_head_stride = depth + 3,
        .y_head_stride = cols + 2,
    };
    expect(kernels->head_linear(&heads), "head_linear", "out of memory");
    for (int64_t head = 0; head < LAYERS; head++) {
        Linear layer = heads.first;
        layer.x += head * heads.x_head_stride;
        layer.weight = (const char *)(weight + head * words);
        layer.y = one_by_one + head * heads.y_head_stride;
        kernels->linear(&layer);
    }
    expect(memcmp(together, one_by_one, rows * y_stride * sizeof *together) == 0, "head_linear",
           "other bits than those of `linear`");
    free(weight);
    free(x);
    free(together);
    free(one_by_one);
}

static void check_not_finite_inputs(void) {
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        uint32_t words[DEPTH_MULTIPLE / 4 * PANEL_WIDTH];
        float x[DEPTH_MULTIPLE];
        float scales[PANEL_WIDTH];
        float y[PANEL_WIDTH];
        memset(words, 1, sizeof words);
        for (int k = 0; k < DEPTH_MULTIPLE; k++)
            x[k] = random_float();
        for (int c = 0; c < PANEL_WIDTH; c++)
            scales[c] = 1;
        x[9] = bad[i];
        kernels->linear(&(Linear){.weight_type = WEIGHT_INT8,
                                  .inputs = INPUTS_INT8,
                                  .x = x,
                                  .weight = (const char *)words,
                                  .scales = scales,
                                  .y = y,
                                  .rows = 1,
                                  .cols = PANEL_WIDTH,
                                  .depth = DEPTH_MULTIPLE,
                                  .group_size = DEPTH_MULTIPLE});
        expect(isnan(y[0]) && isnan(y[PANEL_WIDTH - 1]), "linear", "NaN is lost in int8 inputs");
    }
}

/* ---- norms, residuals, rotary embeddings, the KV cache ---- */

static void check_norm_of(const float *x, const float *weight, const float *bias, const float *y,
                          int64_t size, int subtract_mean, const char *what) {
    double mean = 0;
    double variance = 0;
    for (int64_t d = 0; d < size; d++)
        mean += subtract_mean ? x[d] / (double)size : 0;
    for (int64_t d = 0; d < size; d++)
        variance += (x[d] - mean) * (x[d] - mean) / (double)size;
    for (int64_t d = 0; d < size; d++) {
        double expected = (x[d] - mean) / sqrt(variance + 1e-5) * weight[d];
        expect_close(y[d], expected + (bias ? bias[d] : 0), 4, what);
    }
}

static void check_norms(void) {
    static const int64_t sizes[] = {1, 3, 4, 15, 48, 67, 576};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int subtract_mean = 0; subtract_mean < 2; subtract_mean++) {
            int64_t size = sizes[i];
            int64_t rows = 41;
            float *x = random_floats(rows * size, 3.0f);
            float *weight = random_floats(size, 1.0f);
            float *bias = random_floats(size, 1.0f);
            float *y = allocate(rows * size * sizeof *y);
            kernels->norm(&(Norm){.x = x,
                                  .weight = weight,
                                  .bias = subtract_mean ? bias : NULL,
                                  .y = y,
                                  .rows = rows,
                                  .hidden_size = size,
                                  .subtract_mean = subtract_mean,
                                  .eps = 1e-5f});
            for (int64_t row = 0; row < rows; row++)
                check_norm_of(x + row * size, weight, subtract_mean ? bias : NULL, y + row * size,
                              size, subtract_mean, "norm");
            memcpy(y, x, rows * size * sizeof *y);
            kernels->norm_heads(&(HeadNorm){.x = y,
                                            .x_stride = 4 * size,
                                            .n_tokens = 10,
                                            .n_heads = 3,
                                            .head_dim = size,
                                            .weight = weight,
                                            .subtract_mean = subtract_mean,
                                            .eps = 1e-5f});
            for (int64_t head = 0; head < 40; head++)
                if (head % 4 < 3)
                    check_norm_of(x + head * size, weight, NULL, y + head * size, size,
                                  subtract_mean, "norm_heads");
                else
                    expect(memcmp(x + head * size, y + head * size, size * sizeof *x) == 0,
                           "norm_heads", "a head beyond n_heads has changed");
            free(x);
            free(weight);
            free(bias);
            free(y);
        }
}

static void check_residual(int64_t size) {
    float *residual = random_floats(size, 1.0f);
    float *update = random_floats(size, 1.0f);
    float *y = allocate(size * sizeof *y);
    kernels->add_residual(&(Residual){residual, update, y, size, 0.5f});
    for (int64_t i = 0; i < size; i++)
        expect_close(y[i], residual[i] + 0.5 * update[i], 1, "add_residual");
    memcpy(y, residual, size * sizeof *y);
    if (size > 6) {
        kernels->scale_tokens(&(TokenScales){y, size, 1, size - 1, update});
        for (int64_t i = 0; i < size - 1; i++)
            expect_close(y[i], residual[i] * (double)update[0], 1, "scale_tokens");
        expect(y[size - 1] == residual[size - 1], "scale_tokens", "it wrote beyond its size");
    }
    free(residual);
    free(update);
    free(y);
}

static void check_rotary(int64_t half, int interleaved) {
    enum { TOKENS = 5, HEADS = 3 };
    int64_t head_dim = 2 * half + 3;
    int64_t stride = HEADS * head_dim;
    float *x = random_floats(TOKENS * stride, 1.0f);
    float *y = allocate(TOKENS * stride * sizeof *y);
    float *cos = random_floats(TOKENS * 2 * half, 1.0f);
    float *sin = random_floats(TOKENS * 2 * half, 1.0f);
    memcpy(y, x, TOKENS * stride * sizeof *y);
    kernels->apply_rotary_emb(&(Rotary){.x = y,
                                        .x_stride = stride,
                                        .n_tokens = TOKENS,
                                        .n_heads = HEADS,
                                        .head_stride = head_dim,
                                        .cos = cos,
                                        .sin = sin,
                                        .half = half,
                                        .interleaved = interleaved});
    for (int64_t i = 0; i < TOKENS * stride; i++) {
        int64_t d = i % head_dim;
        if (d >= 2 * half) {
            expect(y[i] == x[i], "apply_rotary_emb", "a dimension beyond 2 half has changed");
            continue;
        }
        int64_t pair = interleaved ? d / 2 : d % half;
        int is_second = interleaved ? d % 2 : d >= half;
        int64_t other = i + (is_second ? -1 : 1) * (interleaved ? 1 : half);
        int64_t angle = i / stride * 2 * half + is_second * half + pair;
        double expected = (double)x[i] * cos[angle] + (double)x[other] * sin[angle];
        expect_close(y[i], expected, 2, "apply_rotary_emb");
    }
    free(x);
    free(y);
    free(cos);
    free(sin);
}

static void check_store_kv(void) {
    enum { TOKENS = 3, HEADS = 2, DIM = 5, SLOTS = 32 };
    static const int64_t slots[TOKENS] = {6, 0, 19};
    float *kv = random_floats(TOKENS * HEADS * DIM, 1.0f);
    float cache[HEADS * SLOTS * DIM] = {0};
    kernels->store_kv(&(StoreKv){.kv = kv,
                                 .kv_stride = HEADS * DIM,
                                 .n_tokens = TOKENS,
                                 .n_heads = HEADS,
                                 .head_dim = DIM,
                                 .slot_mapping = slots,
                                 .kv_type = KV_F32,
                                 .cache = (char *)cache,
                                 .head_stride = SLOTS * DIM});
    for (int t = 0; t < TOKENS; t++)
        for (int head = 0; head < HEADS; head++)
            for (int d = 0; d < DIM; d++) {
                int64_t panel = (head * SLOTS + slots[t] / 16 * 16) * DIM;
                int64_t key = panel + d * 16 + slots[t] % 16;
                int64_t value = panel + slots[t] % 16 * DIM + d;
                expect(cache[head ? value : key] == kv[(t * HEADS + head) * DIM + d], "store_kv",
                       "other values are in the cache");
            }
    free(kv);
}

/* ---- activations ---- */

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

static double activation_of(int activation, double x) {
    if (activation == ACT_SILU)
        return x * sigmoid(x);
    if (activation == ACT_GELU_TANH)
        return x * sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x));
    if (activation == ACT_GELU)
        return x * erfc(-x / sqrt(2)) / 2;
    return x > 0 ? x * x : 0;
}

static double swiglu_clamped(double gate, double up, double limit, double alpha) {
    gate = fmin(gate, limit);
    up = fmax(fmin(up, limit), -limit);
    return gate * sigmoid(alpha * gate) * (up + 1);
}

static void check_activations(int64_t size) {
    enum { ROWS = 3 };
    float *x = random_floats(ROWS * 2 * size, 12.0f);
    float *y = allocate(ROWS * 2 * size * sizeof *y);
    for (int activation = ACT_SILU; activation <= ACT_SWIGLU_CLAMPED; activation++) {
        Activation operation = {x, y, ROWS, size, activation, 7.0f, 1.702f};
        kernels->act_and_mul(&operation);
        for (int64_t i = 0; i < ROWS * size; i++) {
            const float *gate = x + i / size * 2 * size + i % size;
            double expected = activation == ACT_SWIGLU_CLAMPED
                                  ? swiglu_clamped(gate[0], gate[size], 7, 1.702f)
                                  : activation_of(activation, gate[0]) * gate[size];
            expect_close(y[i], expected, 3 * fabs(expected) + 1, "act_and_mul");
        }
        if (activation == ACT_SWIGLU_CLAMPED)
            continue;
        operation.size = 2 * size;
        kernels->act(&operation);
        for (int64_t i = 0; i < ROWS * 2 * size; i++) {
            double expected = activation_of(activation, x[i]);
            expect_close(y[i], expected, 3 * fabs(expected) + 1, "act");
        }
    }
    x[0] = NAN;
    for (int activation = ACT_SILU; activation <= ACT_SWIGLU_CLAMPED; activation++) {
        kernels->act_and_mul(&(Activation){x, y, 1, size, activation, 7.0f, 1.702f});
        expect(isnan(y[0]), "act_and_mul", "NaN is lost");
    }
    free(x);
    free(y);
}

/* A linear layer with a random weight of bfloat16. */
static ExpertLinear random_layer(int inputs, int64_t cols, int64_t depth) {
    int64_t depth_words = (depth + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE / 2;
    uint32_t *words = allocate(cols * depth_words * sizeof *words);
    for (int64_t c = 0; c < cols; c++)
        for (int64_t k = 0; k < depth; k++)
            put_random_value(WEIGHT_BF16, words, depth_words, c, k);
    return (ExpertLinear){.weight_type = WEIGHT_BF16,
                          .inputs = inputs,
                          .weight = (const char *)words,
                          .cols = cols,
                          .depth = depth,
                          .group_size = depth};
}

static void multiply(const ExpertLinear *layer, const float *x, float *y, int64_t rows) {
    kernels->linear(&(Linear){.weight_type = (int)layer->weight_type,
                              .inputs = (int)layer->inputs,
                              .x = x,
                              .x_stride = layer->depth,
                              .weight = layer->weight,
                              .y = y,
                              .y_stride = layer->cols,
                              .rows = rows,
                              .cols = layer->cols,
                              .depth = layer->depth,
                              .group_size = layer->group_size});
}

/* The three operations of the MLP, which are checked above, give the same bits. */
static void check_gated_mlp(int inputs, int activation, int64_t rows) {
    enum { HIDDEN = 48, INTERMEDIATE = 80 };
    const float limit = 1.5f;
    const float alpha = 1.7f;
    ExpertLinear layers[] = {random_layer(inputs, 2 * INTERMEDIATE, HIDDEN),
                             random_layer(inputs, HIDDEN, INTERMEDIATE)};
    float *x = random_floats(rows * HIDDEN, 2.0f);
    float *gate_up = allocate(rows * 2 * INTERMEDIATE * sizeof *gate_up);
    float *activated = allocate(rows * INTERMEDIATE * sizeof *activated);
    float *expected = allocate(rows * HIDDEN * sizeof *expected);
    float *y = allocate(rows * HIDDEN * sizeof *y);
    multiply(&layers[0], x, gate_up, rows);
    kernels->act_and_mul(
        &(Activation){gate_up, activated, rows, INTERMEDIATE, activation, limit, alpha});
    multiply(&layers[1], activated, expected, rows);
    expect(kernels->gated_mlp(&(GatedMlp){.x = x,
                                          .x_stride = HIDDEN,
                                          .y = y,
                                          .rows = rows,
                                          .linears = layers,
                                          .activation = activation,
                                          .limit = limit,
                                          .alpha = alpha}),
           "gated_mlp", "out of memory");
    expect(memcmp(y, expected, rows * HIDDEN * sizeof *y) == 0, "gated_mlp",
           "other bits than its parts");
    free(x);
    free(gate_up);
    free(activated);
    free(expected);
    free(y);
    free((void *)layers[0].weight);
    free((void *)layers[1].weight);
}

static void check_gated_mlps(void) {
    static const int64_t rows[] = {1, 3, 6, 50, 110};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int activation = ACT_SILU; activation <= ACT_SWIGLU_CLAMPED; activation++) {
            check_gated_mlp(INPUTS_F32, activation, rows[i]);
            if (kernels->has_bfloat16)
                check_gated_mlp(INPUTS_BF16, activation, rows[i]);
        }
}

static void check_xielu(int64_t size) {
    float *x = random_floats(size, 5.0f);
    float *y = allocate(size * sizeof *y);
    const float raw_p = 0.4f;
    const float raw_n = 0.3f;
    const float beta = 0.5f;
    const float eps = -1e-6f;
    kernels->xielu(&(Xielu){x, y, size, &raw_p, &raw_n, &beta, &eps});
    double alpha_p = log1p(exp(raw_p));
    double alpha_n = beta + log1p(exp(raw_n));
    for (int64_t i = 0; i < size; i++) {
        double m = fmin(x[i], eps);
        double curve = x[i] > 0 ? alpha_p * x[i] * x[i] : alpha_n * (expm1(m) - x[i]);
        expect_close(y[i], curve + beta * x[i], 3 * fabs(curve) + 4, "xielu");
    }
    free(x);
    free(y);
}

/* ---- recurrent layers ---- */

enum { STATE_ROWS = 6, STEP_TOKENS = 12 };

/* A prompt with a checkpoint, a token whose state stays in its row, and draft tokens. */
static const int64_t STEP_LENS[] = {8, 1, 3};
static const int64_t INITIAL_ROWS[] = {-1, 1, 2};
static const int64_t WRITE_STARTS[] = {0, 3, 4, 6};
static const int64_t WRITE_ENDS[] = {2, 7, 8, 1, 1, 3};
static const int64_t WRITE_ROWS[] = {3, 0, 0, 1, 4, 2};
static const RecurrentRows STEP_ROWS = {3,          STEP_LENS,  INITIAL_ROWS,
                                        WRITE_STARTS, WRITE_ENDS, WRITE_ROWS};

static float sum_of_inputs(const CausalConv *o, const float *states, int64_t sequence,
                           int64_t first_token, int64_t t, int64_t d, double *magnitude) {
    double sum = o->bias ? o->bias[d] : 0;
    *magnitude = fabs(sum) + 1;
    for (int64_t k = 0; k < o->width; k++) {
        int64_t at = t - o->width + 1 + k;
        const float *x = o->x + (first_token + at) * o->x_stride + d;
        int64_t row = INITIAL_ROWS[sequence];
        double input = 0;
        if (at >= 0)
            input = o->gated ? x[0] * x[2 * o->n_channels] : x[0];
        else if (row >= 0)
            input = states[(row * (o->width - 1) + o->width - 1 + at) * o->n_channels + d];
        sum += o->weight[d * o->width + k] * input;
        *magnitude += fabs(o->weight[d * o->width + k] * input);
    }
    return (float)sum;
}

static void check_causal_conv(int64_t n_channels, int64_t width, int gated) {
    int64_t x_stride = (gated ? 3 : 1) * n_channels + 5;
    int64_t state_size = STATE_ROWS * (width - 1) * n_channels;
    float *x = random_floats(STEP_TOKENS * x_stride, 2.0f);
    float *weight = random_floats(n_channels * width, 1.0f);
    float *bias = random_floats(n_channels, 1.0f);
    float *state = random_floats(state_size, 1.0f);
    float *before = allocate(state_size * sizeof *before);
    memcpy(before, state, state_size * sizeof *before);
    float *y = allocate(STEP_TOKENS * n_channels * sizeof *y);
    CausalConv o = {
        .x = x,
        .x_stride = x_stride,
        .weight = weight,
        .bias = gated ? NULL : bias,
        .state = state,
        .y = y,
        .n_tokens = STEP_TOKENS,
        .n_channels = n_channels,
        .width = width,
        .silu = !gated,
        .gated = gated,
        .rows = STEP_ROWS,
    };
    expect(kernels->causal_conv(&o), "causal_conv", "out of memory");
    int64_t first_token = 0;
    for (int64_t sequence = 0; sequence < 3; first_token += STEP_LENS[sequence++])
        for (int64_t t = 0; t < STEP_LENS[sequence]; t++)
            for (int64_t d = 0; d < n_channels; d++) {
                double magnitude;
                double sum = sum_of_inputs(&o, before, sequence, first_token, t, d, &magnitude);
                double c = x[(first_token + t) * x_stride + n_channels + d];
                double expected = gated ? c * sum : sum * sigmoid(sum);
                expect_close(y[(first_token + t) * n_channels + d], expected, 3 * magnitude,
                             "causal_conv");
            }
    /* The last input of the state after the prompt, and an older one from the initial row. */
    for (int64_t d = 0; d < n_channels; d++) {
        const float *last = x + (STEP_LENS[0] - 1) * x_stride + d;
        double input = gated ? last[0] * last[2 * n_channels] : last[0];
        expect_close(state[(width - 2) * n_channels + d], input, 2, "causal_conv's state");
        const float *older = before + (2 * (width - 1) + 1) * n_channels + d;
        expect(state[4 * (width - 1) * n_channels + d] == *older, "causal_conv's state",
               "an older input was expected");
    }
    free(x);
    free(weight);
    free(bias);
    free(state);
    free(before);
    free(y);
}

/* One column of a head's state, token by token in double. */
static void check_scan_column(const Mamba2Scan *o, const float *before, int64_t sequence,
                              int64_t first_token, int64_t head, int64_t column) {
    double state[64] = {0};
    double largest = 1;
    int64_t row = INITIAL_ROWS[sequence];
    int64_t offset = head * o->state_size * o->head_dim + column;
    int64_t row_size = o->n_heads * o->state_size * o->head_dim;
    for (int64_t n = 0; row >= 0 && n < o->state_size; n++)
        state[n] = before[row * row_size + offset + n * o->head_dim];
    int64_t write = WRITE_STARTS[sequence];
    for (int64_t t = 0; t < STEP_LENS[sequence]; t++) {
        const float *xbc = o->xbc + (first_token + t) * o->xbc_stride;
        double x = xbc[head * o->head_dim + column];
        const float *B = xbc + o->n_heads * o->head_dim +
                         head / (o->n_heads / o->n_groups) * o->state_size;
        const float *C = B + o->n_groups * o->state_size;
        double raw = o->dt[(first_token + t) * o->dt_stride + head] + o->dt_bias[head];
        double dt = fmin(fmax(log1p(exp(raw)), o->min_dt), o->max_dt);
        double decay = exp(-exp(o->A_log[head]) * dt);
        double y = o->D[head] * x;
        double magnitude = fabs(y);
        for (int64_t n = 0; n < o->state_size; n++) {
            state[n] = decay * state[n] + B[n] * dt * x;
            y += C[n] * state[n];
            magnitude += fabs(C[n] * state[n]);
            largest = fmax(largest, fabs(state[n]));
        }
        expect_close(o->y[((first_token + t) * o->n_heads + head) * o->head_dim + column], y,
                     3 * (magnitude + largest), "mamba2_scan");
        for (; write < WRITE_STARTS[sequence + 1] && WRITE_ENDS[write] == t + 1; write++) {
            int is_last = 1; /* of the writes to this row */
            for (int64_t other = write + 1; other < WRITE_STARTS[sequence + 1]; other++)
                is_last &= WRITE_ROWS[other] != WRITE_ROWS[write];
            const float *written = o->state + WRITE_ROWS[write] * row_size + offset;
            for (int64_t n = 0; is_last && n < o->state_size; n++)
                expect_close(written[n * o->head_dim], state[n], 3 * largest,
                             "mamba2_scan's state");
        }
    }
}

static void check_mamba2_scan(int64_t n_heads, int64_t head_dim, int64_t state_size,
                              int64_t n_groups) {
    int64_t xbc_stride = n_heads * head_dim + 2 * n_groups * state_size + 3;
    int64_t dt_stride = n_heads + 2;
    int64_t all_states = STATE_ROWS * n_heads * state_size * head_dim;
    float *xbc = random_floats(STEP_TOKENS * xbc_stride, 1.0f);
    float *dt = random_floats(STEP_TOKENS * dt_stride, 3.0f);
    float *A_log = random_floats(n_heads, 2.0f);
    float *D = random_floats(n_heads, 1.0f);
    float *dt_bias = random_floats(n_heads, 1.0f);
    float *state = random_floats(all_states, 1.0f);
    float *before = allocate(all_states * sizeof *before);
    memcpy(before, state, all_states * sizeof *before);
    float *y = allocate(STEP_TOKENS * n_heads * head_dim * sizeof *y);
    Mamba2Scan o = {
        .xbc = xbc,
        .xbc_stride = xbc_stride,
        .dt = dt,
        .dt_stride = dt_stride,
        .A_log = A_log,
        .D = D,
        .dt_bias = dt_bias,
        .state = state,
        .y = y,
        .n_tokens = STEP_TOKENS,
        .n_heads = n_heads,
        .head_dim = head_dim,
        .state_size = state_size,
        .n_groups = n_groups,
        .min_dt = 0.1f,
        .max_dt = 2.0f,
        .rows = STEP_ROWS,
    };
    expect(kernels->mamba2_scan(&o), "mamba2_scan", "out of memory");
    int64_t first_token = 0;
    for (int64_t sequence = 0; sequence < 3; first_token += STEP_LENS[sequence++])
        for (int64_t head = 0; head < n_heads; head++)
            for (int64_t column = 0; column < head_dim; column++)
                check_scan_column(&o, before, sequence, first_token, head, column);
    free(xbc);
    free(dt);
    free(A_log);
    free(D);
    free(dt_bias);
    free(state);
    free(before);
    free(y);
}

static void check_gated_group_norm(int64_t size, int64_t n_groups, int norm_before_gate) {
    enum { ROWS = 3 };
    int64_t group_size = size / n_groups;
    float *x = random_floats(ROWS * size, 2.0f);
    float *gate = random_floats(ROWS * (size + 1), 4.0f);
    float *weight = random_floats(size, 1.0f);
    float *y = allocate(ROWS * size * sizeof *y);
    kernels->gated_group_rms_norm(&(GatedGroupNorm){
        .x = x,
        .gate = gate,
        .gate_stride = size + 1,
        .weight = weight,
        .y = y,
        .rows = ROWS,
        .size = size,
        .n_groups = n_groups,
        .weight_stride = group_size,
        .norm_before_gate = norm_before_gate,
        .eps = 1e-5f,
    });
    for (int64_t i = 0; i < ROWS * size; i++) {
        int64_t column = i % size;
        const float *gates = gate + i / size * (size + 1);
        int64_t first = column / group_size * group_size;
        double squares = 0;
        for (int64_t d = first; d < first + group_size; d++) {
            double value = x[i - column + d];
            if (!norm_before_gate)
                value *= gates[d] * sigmoid(gates[d]);
            squares += value * value;
        }
        double gated = x[i] * (gates[column] * sigmoid(gates[column]));
        double factor = weight[column] / sqrt(squares / group_size + 1e-5);
        expect_close(y[i], gated * factor, 5 * fabs(gated * factor) + 1e-3,
                     "gated_group_rms_norm");
    }
    free(x);
    free(gate);
    free(weight);
    free(y);
}

/* ---- the gated delta rule ---- */

enum { DELTA_K_HEADS = 2, DELTA_V_HEADS = 4, DELTA_SEQUENCES = 3, DELTA_ROWS = 4 };

/* Compute a token of a value head, from the state [k_dim, v_dim] of the tokens before it. */
static void check_delta_token(const GatedDeltaRule *r, int64_t token, int64_t head,
                              double *state) {
    const float *q = r->qkv + token * r->qkv_stride + head / 2 * r->k_dim;
    const float *k = q + DELTA_K_HEADS * r->k_dim;
    const float *v = r->qkv + token * r->qkv_stride + 2 * DELTA_K_HEADS * r->k_dim +
                     head * r->v_dim;
    double b = r->ba[token * r->ba_stride + head];
    double a = r->ba[token * r->ba_stride + DELTA_V_HEADS + head];
    double decay = exp(-exp(r->A_log[head]) * log1p(exp(a + r->dt_bias[head])));
    double q_squares = 1e-6;
    double k_squares = 1e-6;
    for (int64_t i = 0; i < r->k_dim; i++) {
        q_squares += (double)q[i] * q[i];
        k_squares += (double)k[i] * k[i];
    }
    for (int64_t d = 0; d < r->v_dim; d++) {
        double held = 0;
        double out = 0;
        for (int64_t i = 0; i < r->k_dim; i++)
            held += decay * state[i * r->v_dim + d] * k[i] / sqrt(k_squares);
        for (int64_t i = 0; i < r->k_dim; i++) {
            double *value = &state[i * r->v_dim + d];
            *value = decay * *value + k[i] / sqrt(k_squares) * sigmoid(b) * (v[d] - held);
            out += *value * q[i] / sqrt(q_squares * (double)r->k_dim);
        }
        expect_close(r->out[(token * DELTA_V_HEADS + head) * r->v_dim + d], out, 4,
                     "gated_delta_rule");
    }
}

static void check_gated_delta_rule(int64_t k_dim, int64_t v_dim) {
    static const int64_t query_lens[DELTA_SEQUENCES] = {1, 3, 20};
    static const int64_t initial_rows[DELTA_SEQUENCES] = {2, 3, -1};
    static const int64_t write_starts[DELTA_SEQUENCES + 1] = {0, 1, 1, 3};
    static const int64_t write_ends[] = {1, 5, 20};
    static const int64_t write_rows[] = {2, 0, 1};
    int64_t qkv_size = 2 * DELTA_K_HEADS * k_dim + DELTA_V_HEADS * v_dim;
    int64_t row_size = DELTA_V_HEADS * k_dim * v_dim;
    float *qkv = random_floats(24 * qkv_size, 1.0f);
    float *ba = random_floats(24 * 2 * DELTA_V_HEADS, 2.0f);
    float *A_log = random_floats(DELTA_V_HEADS, 1.0f);
    float *dt_bias = random_floats(DELTA_V_HEADS, 1.0f);
    float *state = random_floats(DELTA_ROWS * row_size, 1.0f);
    float *before = allocate(DELTA_ROWS * row_size * sizeof *before);
    memcpy(before, state, DELTA_ROWS * row_size * sizeof *before);
    GatedDeltaRule r = {
        .qkv = qkv,
        .qkv_stride = qkv_size,
        .ba = ba,
        .ba_stride = 2 * DELTA_V_HEADS,
        .A_log = A_log,
        .dt_bias = dt_bias,
        .out = allocate(24 * DELTA_V_HEADS * v_dim * sizeof *r.out),
        .state = state,
        .row_stride = row_size,
        .n_k_heads = DELTA_K_HEADS,
        .n_v_heads = DELTA_V_HEADS,
        .k_dim = k_dim,
        .v_dim = v_dim,
        .rows = {DELTA_SEQUENCES, query_lens, initial_rows, write_starts, write_ends, write_rows},
    };
    expect(kernels->gated_delta_rule(&r), "gated_delta_rule", "out of memory");
    double *expected = allocate(k_dim * v_dim * sizeof *expected);
    int64_t first_token = 0;
    for (int64_t sequence = 0; sequence < DELTA_SEQUENCES; sequence++) {
        for (int64_t head = 0; head < DELTA_V_HEADS; head++) {
            int64_t head_state = head * k_dim * v_dim;
            int64_t write = write_starts[sequence];
            for (int64_t i = 0; i < k_dim * v_dim; i++)
                expected[i] = initial_rows[sequence] < 0
                                  ? 0
                                  : before[initial_rows[sequence] * row_size + head_state + i];
            for (int64_t token = 0; token < query_lens[sequence]; token++) {
                check_delta_token(&r, first_token + token, head, expected);
                if (write == write_starts[sequence + 1] || write_ends[write] != token + 1)
                    continue;
                const float *written = state + write_rows[write++] * row_size + head_state;
                for (int64_t i = 0; i < k_dim * v_dim; i++)
                    expect_close(written[i], expected[i], 4, "a state of gated_delta_rule");
            }
        }
        first_token += query_lens[sequence];
    }
    expect(memcmp(state + 3 * row_size, before + 3 * row_size, row_size * sizeof *state) == 0,
           "gated_delta_rule", "a row without a write changed");
    free(qkv);
    free(ba);
    free(A_log);
    free(dt_bias);
    free(state);
    free(before);
    free(r.out);
    free(expected);
}

static void check_gated_norm(int64_t size) {
    enum { TOKENS = 3, HEADS = 2 };
    int64_t gate_stride = HEADS * size + 5;
    float *x = random_floats(TOKENS * HEADS * size, 2.0f);
    float *gates = random_floats(TOKENS * gate_stride, 5.0f);
    float *weight = random_floats(size, 1.0f);
    float *y = allocate(TOKENS * HEADS * size * sizeof *y);
    kernels->gated_group_rms_norm(&(GatedGroupNorm){
        .x = x,
        .gate = gates,
        .gate_stride = gate_stride,
        .weight = weight,
        .y = y,
        .rows = TOKENS,
        .size = HEADS * size,
        .n_groups = HEADS,
        .norm_before_gate = 1,
        .eps = 1e-5f,
    });
    for (int64_t i = 0; i < TOKENS * HEADS; i++) {
        double squares = 0;
        for (int64_t d = 0; d < size; d++)
            squares += (double)x[i * size + d] * x[i * size + d];
        double rms = sqrt(squares / (double)size + 1e-5);
        for (int64_t d = 0; d < size; d++) {
            double gate = gates[i / HEADS * gate_stride + i % HEADS * size + d];
            double expected = x[i * size + d] / rms * weight[d] * gate * sigmoid(gate);
            expect_close(y[i * size + d], expected, fabs(expected) + 1, "gated_group_rms_norm");
        }
    }
    free(x);
    free(gates);
    free(weight);
    free(y);
}

static void check_recurrent_layers(void) {
    check_causal_conv(300, 4, 0);
    check_causal_conv(75, 3, 1);
    check_causal_conv(33, 6, 1);
    check_mamba2_scan(2, 64, 32, 1);
    check_mamba2_scan(6, 20, 9, 2);
    check_mamba2_scan(3, 100, 16, 3);
    check_gated_group_norm(96, 1, 0);
    check_gated_group_norm(75, 3, 0);
    check_gated_group_norm(64, 4, 1);
}

/* ---- attention ---- */

enum {
    N_HEADS = 6,
    N_KV_HEADS = 2,
    BLOCK_SIZE = 16,
    N_BLOCKS = 40,
    SLOTS = N_BLOCKS * BLOCK_SIZE,
    N_SEQUENCES = 3
};

/* The element d of a key (head < N_KV_HEADS) or value. */
static double cached(const PagedAttention *a, int64_t head, int64_t slot, int64_t d) {
    int64_t width = a->kv_type == KV_F32 ? 1 : a->kv_type <= KV_F16 ? 2 : 4; /* of a word */
    int64_t element = head * a->head_stride + slot / 16 * 16 * a->head_dim;
    if (head < N_KV_HEADS && !a->is_latent)
        element += (d / width * 16 + slot % 16) * width + d % width;
    else
        element += (slot % 16 / width * a->head_dim + d) * width + slot % width;
    if (a->kv_type == KV_F32)
        return ((const float *)a->kv)[element];
    if (a->kv_type == KV_BF16)
        return bf16_to_float(((const uint16_t *)a->kv)[element]);
    if (a->kv_type == KV_F16)
        return f16_to_float(((const uint16_t *)a->kv)[element]);
    double scale = a->scales[a->static_scales ? head : head * SLOTS + slot];
    if (a->kv_type == KV_INT8)
        return scale * ((const int8_t *)a->kv)[element];
    return scale * fp8_to_float(((const uint8_t *)a->kv)[element]);
}

static void check_query(const PagedAttention *a, int64_t sequence, int64_t token, int64_t position,
                        int64_t head) {
    int64_t kv_head = head / (N_HEADS / N_KV_HEADS);
    /* queries and probabilities */
    int rounds = a->kv_type == KV_BF16 && kernels->has_bfloat16 && !a->is_latent;
    int64_t value_head = a->is_latent ? kv_head : N_KV_HEADS + kv_head;
    const float *q = a->q + token * a->q_stride + head * a->head_dim;
    double *out = allocate(a->head_dim * sizeof *out);
    double total = a->sinks ? exp(a->sinks[head]) : 0;
    int64_t first = a->window && position >= a->window ? position - a->window + 1 : 0;
    for (int64_t t = first; t <= position; t++) {
        int64_t block = a->block_tables[a->table_starts[sequence] + t / BLOCK_SIZE];
        int64_t slot = block * BLOCK_SIZE + t % BLOCK_SIZE;
        double score = 0;
        for (int64_t d = 0; d < a->head_dim; d++) {
            float scaled = q[d] * a->scale;
            if (rounds)
                scaled = bf16_to_float(float_to_bf16(scaled));
            score += scaled * cached(a, kv_head, slot, d);
        }
        if (a->softcap != 0)
            score = a->softcap * tanh(score / a->softcap);
        total += exp(score);
        for (int64_t d = 0; d < a->value_dim; d++)
            out[d] += exp(score) * cached(a, value_head, slot, d);
    }
    for (int64_t d = 0; d < a->value_dim; d++)
        expect_close(a->out[(token * N_HEADS + head) * a->value_dim + d], out[d] / total,
                     rounds ? 3000 : 2, "paged_attention");
    free(out);
}

/* latent_dim: of the values of a latent cache; 0: the cache has keys and values. */
static void check_attention(int64_t head_dim, int64_t latent_dim, int kv_type, int static_scales,
                            int64_t window, float softcap, int has_sinks) {
    static const int64_t query_lens[N_SEQUENCES] = {1, 19, 5};
    static const int64_t seq_lens[N_SEQUENCES] = {131, 19, 70};
    static const int64_t table_starts[N_SEQUENCES] = {0, 12, 20};
    int64_t block_tables[N_BLOCKS];
    for (int64_t i = 0; i < N_BLOCKS; i++)
        block_tables[i] = i * 7 % N_BLOCKS;
    int64_t elements = 2 * N_KV_HEADS * SLOTS * head_dim;
    float *kv = random_floats(elements, 1.0f);
    for (int64_t i = 0; i < elements; i++)
        if (kv_type == KV_BF16)
            ((uint16_t *)kv)[i] = float_to_bf16(random_float());
        else if (kv_type == KV_F16)
            ((uint16_t *)kv)[i] = (uint16_t)((random_bits() & 0x83ff) | 14 << 10);
        else if (kv_type == KV_INT8)
            ((uint8_t *)kv)[i] = (uint8_t)random_bits();
        else if (kv_type == KV_FP8)
            ((uint8_t *)kv)[i] = (uint8_t)(random_bits() & 0xbf); /* below 2, also subnormal */
    int quantized = kv_type == KV_INT8 || kv_type == KV_FP8;
    float *scales = random_floats(2 * N_KV_HEADS * SLOTS, 0.01f);
    float sinks[N_HEADS];
    for (int i = 0; i < N_HEADS; i++)
        sinks[i] = random_float();
    int64_t q_stride = N_HEADS * head_dim + 7;
    float *q = random_floats(25 * q_stride, 2.0f);
    float *out = allocate(25 * N_HEADS * head_dim * sizeof *out);
    PagedAttention a = {
        .q = q,
        .out = out,
        .q_stride = q_stride,
        .kv_type = kv_type,
        .kv = (const char *)kv,
        .scales = quantized ? scales : NULL,
        .static_scales = static_scales,
        .head_stride = latent_dim ? 0 : SLOTS * head_dim,
        .value_dim = latent_dim ? latent_dim : head_dim,
        .is_latent = latent_dim != 0,
        .block_size = BLOCK_SIZE,
        .head_dim = head_dim,
        .n_heads = N_HEADS,
        .n_kv_heads = N_KV_HEADS,
        .n_sequences = N_SEQUENCES,
        .query_lens = query_lens,
        .seq_lens = seq_lens,
        .block_tables = block_tables,
        .table_starts = table_starts,
        .window = window,
        .scale = 0.3f,
        .softcap = softcap,
        .sinks = has_sinks ? sinks : NULL,
    };
    expect(kernels->paged_attention(&a), "paged_attention", "out of memory");
    int64_t token = 0;
    for (int64_t sequence = 0; sequence < N_SEQUENCES; sequence++)
        for (int64_t i = 0; i < query_lens[sequence]; i++, token++)
            for (int64_t head = 0; head < N_HEADS; head++)
                check_query(&a, sequence, token, seq_lens[sequence] - query_lens[sequence] + i,
                            head);
    free(kv);
    free(scales);
    free(q);
    free(out);
}

static void check_level(void) {
    integer_outputs.at = 0;
    static const int64_t sizes[] = {1, 2, 3, 4, 7, 8, 16, 33, 100};
    check_linears();
    check_compressed_linears();
    check_head_linear(WEIGHT_F32, 1, 20, 6);
    check_head_linear(WEIGHT_F32, 40, 33, 70);
    check_head_linear(WEIGHT_BF16, 1, 64, 16);
    check_head_linear(WEIGHT_BF16, 13, 48, 130);
    check_not_finite_inputs();
    check_norms();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_residual(sizes[i]);
        check_rotary(sizes[i], 0);
        check_rotary(sizes[i], 1);
        check_activations(sizes[i]);
        check_xielu(sizes[i]);
        check_gated_norm(sizes[i]);
    }
    check_gated_mlps();
    check_residual(3 * PARALLEL_MIN_ELEMENTS + 1); /* several threads */
    check_xielu(PARALLEL_MIN_ELEMENTS + 1);
    check_gated_delta_rule(7, 5);
    check_gated_delta_rule(16, 40);
    check_store_kv();
    check_recurrent_layers();
    check_attention(64, 0, KV_F32, 0, 0, 0.0f, 0);
    check_attention(30, 0, KV_F32, 0, 33, 5.0f, 1);
    check_attention(20, 0, KV_INT8, 0, 0, 0.0f, 0);
    check_attention(48, 0, KV_INT8, 1, 70, 0.0f, 1);
    check_attention(18, 0, KV_BF16, 0, 0, 0.0f, 0);
    check_attention(64, 0, KV_BF16, 0, 50, 0.0f, 1);
    check_attention(96, 0, KV_BF16, 0, 0, 0.0f, 0);
    check_attention(22, 0, KV_F16, 0, 0, 0.0f, 0);
    check_attention(24, 0, KV_FP8, 0, 0, 0.0f, 0);
    check_attention(72, 64, KV_F32, 0, 0, 0.0f, 0);
    check_attention(29, 20, KV_F32, 0, 0, 0.0f, 0);
    check_attention(40, 24, KV_BF16, 0, 0, 0.0f, 0);
    check_attention(24, 16, KV_F16, 0, 0, 0.0f, 0);
}

int main(int count, char **arguments) {
    is_few = count > 1 && strcmp(arguments[1], "few") == 0;
    set_num_threads(3);
#if defined(ONLY_LEVEL)
    kernels = &ONLY_LEVEL;
    check_level();
    printf("%s\n", kernels->name);
#else
    for (const Level *level = levels; level->kernels; level++)
        if (level->is_supported()) {
            kernels = level->kernels;
            check_level();
            printf("%s\n", kernels->name);
        }
#endif
    return 0;
}
