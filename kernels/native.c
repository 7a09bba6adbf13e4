/* The CPU kernels: products with packed weights, paged attention and what lies between them, for AVX2 and FMA.
 *
 * Python passes addresses and sizes (kernels/native.py says what they mean and checks them); everything here is
 * float32 but for the weights and 8-bit caches. Sums are taken in an order that depends neither on how many rows there
 * are nor on how they were cut into steps: a request's answer is the same, bit for bit, whatever runs beside it.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 16 };                            /* columns of a panel of weights */
enum { F32, BF16, F16, INT8, INT4 };            /* what weights and caches are kept as */
enum { ROWS = 6, BLOCK = 96, PIECE = 4 };       /* rows of a tile, of x and panels of weights that a thread takes at least */
enum { SHARED = 1 << 14 };                      /* elements that are worth more than one thread */
enum { CHUNK = 64, TILE = 48, MOST_DIM = 256 }; /* tokens of a chunk of keys; queries of a tile; the largest head */

/* ---- products ---- */

#define BYTES(KIND) (KIND == F32 ? 4 * WIDTH : KIND <= F16 ? 2 * WIDTH : KIND == INT8 ? WIDTH : WIDTH / 2) /* a step */

INLINE float sum_of(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

typedef struct {
    int kind;
    const float *x;
    int64_t ldx;
    const char *w; /* panels of WIDTH columns, see `panels` in native.py */
    const float *scales, *offsets; /* [k / group, columns of all panels]: w = scale * code - offset; or NULL */
    const float *sums;             /* of every group of x: [m, k / group] */
    const float *bias;
    float *y;
    int64_t ldy, m, n, k, group, stride; /* stride: bytes of a panel */
} Product;

INLINE float most_of(__m256 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/* WIDTH weights of step k of a panel (for INT4 of steps k and k + 1) as two or four vectors. */
INLINE void load(int kind, const char *w, int64_t k, __m256 *to) {
    if (kind == F32) {
        to[0] = _mm256_loadu_ps((const float *)w + k * WIDTH);
        to[1] = _mm256_loadu_ps((const float *)w + k * WIDTH + 8);
    } else if (kind == BF16) { /* columns j and j + 8 side by side */
        __m256i both = _mm256_loadu_si256((const __m256i *)(w + k * WIDTH * 2));
        to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        to[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
    } else if (kind == F16) {
        to[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + k * WIDTH * 2)));
        to[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + k * WIDTH * 2 + 16)));
    } else if (kind == INT8) {
        to[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + k * WIDTH))));
        to[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + k * WIDTH + 8))));
    } else { /* low halves of the bytes are step k, high halves step k + 1 */
        __m128i both = _mm_loadu_si128((const __m128i *)(w + k * WIDTH / 2)), mask = _mm_set1_epi8(15);
        __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        to[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
        to[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(low, low)));
        to[2] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
        to[3] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(high, high)));
    }
}

/* acc[panel][row] = x[row, from:to] w[from:to, panel], each a single chain of additions in the order of k. */
INLINE void multiply(int kind, int rows, int panels, const Product *p, const float *x, const char *w, int64_t from,
                     int64_t to, __m256 acc[][ROWS][2]) {
    const int steps = kind == INT4 ? 2 : 1;
#pragma GCC unroll 6
    for (int j = 0; j < panels; j++)
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) acc[j][i][0] = acc[j][i][1] = _mm256_setzero_ps();
    for (int64_t k = from; k < to; k += steps)
#pragma GCC unroll 6
        for (int j = 0; j < panels; j++) {
            __m256 values[4];
            if (rows <= 3) /* a stream of weights; more rows come back to this panel, and then want the next */
                _mm_prefetch(w + j * p->stride + k * BYTES(kind) + 512, _MM_HINT_T0);
            else
                _mm_prefetch(w + (j + 1) * p->stride + k * BYTES(kind), _MM_HINT_T1);
            load(kind, w + j * p->stride, k, values);
#pragma GCC unroll 2
            for (int s = 0; s < steps; s++)
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) {
                    __m256 one = _mm256_broadcast_ss(x + i * p->ldx + k + s);
                    acc[j][i][0] = _mm256_fmadd_ps(one, values[2 * s], acc[j][i][0]);
                    acc[j][i][1] = _mm256_fmadd_ps(one, values[2 * s + 1], acc[j][i][1]);
                }
        }
}

/* Put a tile's sums over a group where they belong: scaled, and added to those of the groups before. */
INLINE void finish(const Product *p, int64_t row, int64_t column, int64_t group, __m256 low, __m256 high) {
    int64_t groups = p->k / p->group, columns = (p->n + WIDTH - 1) / WIDTH * WIDTH;
    float *y = p->y + row * p->ldy + column, edge[WIDTH];
    int64_t valid = p->n - column < WIDTH ? p->n - column : WIDTH;
    if (valid < WIDTH) {
        memset(edge, 0, sizeof edge);
        if (group) memcpy(edge, y, valid * sizeof(float));
        y = edge;
    }
    if (p->scales) {
        const float *scale = p->scales + group * columns + column;
        low = _mm256_mul_ps(low, _mm256_loadu_ps(scale));
        high = _mm256_mul_ps(high, _mm256_loadu_ps(scale + 8));
    }
    if (p->offsets) {
        const float *offset = p->offsets + group * columns + column;
        __m256 sum = _mm256_broadcast_ss(p->sums + row * groups + group);
        low = _mm256_fnmadd_ps(sum, _mm256_loadu_ps(offset), low);
        high = _mm256_fnmadd_ps(sum, _mm256_loadu_ps(offset + 8), high);
    }
    if (group) {
        low = _mm256_add_ps(low, _mm256_loadu_ps(y));
        high = _mm256_add_ps(high, _mm256_loadu_ps(y + 8));
    }
    if (p->bias && group + 1 == groups) {
        low = _mm256_add_ps(low, _mm256_loadu_ps(p->bias + column));
        high = _mm256_add_ps(high, _mm256_loadu_ps(p->bias + column + 8));
    }
    _mm256_storeu_ps(y, low);
    _mm256_storeu_ps(y + 8, high);
    if (valid < WIDTH) memcpy(p->y + row * p->ldy + column, edge, valid * sizeof(float));
}

INLINE void tile(int kind, int rows, int panels, const Product *p, int64_t row, int64_t panel) {
    __m256 acc[4][ROWS][2];
    for (int64_t group = 0; group * p->group < p->k; group++) {
        multiply(kind, rows, panels, p, p->x + row * p->ldx, p->w + panel * p->stride, group * p->group,
                 (group + 1) * p->group, acc);
#pragma GCC unroll 4
        for (int j = 0; j < panels; j++)
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++)
                finish(p, row + i, (panel + j) * WIDTH, group, acc[j][i][0], acc[j][i][1]);
    }
}

/* Rows [row, row + rows) of some panels: as many chains of additions at once as hide the latency of one. */
#define TILES(KIND, ROWS_, PANELS)                                                   \
    for (; panel + PANELS <= last; panel += PANELS) tile(KIND, ROWS_, PANELS, p, row, panel); \
    for (; panel < last; panel++) tile(KIND, ROWS_, 1, p, row, panel);               \
    break;
#define PRODUCT(NAME, KIND)                                                                               \
    static void NAME(const Product *p, int64_t row, int64_t rows, int64_t panel, int64_t last) {          \
        switch (rows) {                                                                                   \
            case 1: TILES(KIND, 1, 4) case 2: TILES(KIND, 2, 2) case 3: TILES(KIND, 3, 2)                 \
            case 4: TILES(KIND, 4, 1) case 5: TILES(KIND, 5, 1) default: TILES(KIND, 6, 1)                \
        }                                                                                                 \
    }
PRODUCT(product_f32, F32)
PRODUCT(product_bf16, BF16)
PRODUCT(product_f16, F16)
PRODUCT(product_int8, INT8)
PRODUCT(product_int4, INT4)

/* The sums of the groups of a row of x. */
static void sum_groups(const Product *p, const float *x, float *sums) {
    for (int64_t group = 0; group * p->group < p->k; group++) {
        int64_t k = group * p->group, end = k + p->group;
        __m256 lanes = _mm256_setzero_ps();
        float rest = 0;
        for (; k + 8 <= end; k += 8) lanes = _mm256_add_ps(lanes, _mm256_loadu_ps(x + k));
        for (; k < end; k++) rest += x[k];
        sums[group] = sum_of(lanes) + rest;
    }
}

/* A panel's codes as float32, for many rows to share. */
static void decode(const Product *p, int64_t panel, float *to) {
    const char *w = p->w + panel * p->stride;
    __m256 values[4];
    for (int64_t k = 0; k < p->k; k += p->kind == INT4 ? 2 : 1, to += p->kind == INT4 ? 2 * WIDTH : WIDTH) {
        if (p->kind == INT4) {
            load(INT4, w, k, values);
            _mm256_storeu_ps(to + 16, values[2]);
            _mm256_storeu_ps(to + 24, values[3]);
        } else
            load(INT8, w, k, values);
        _mm256_storeu_ps(to, values[0]);
        _mm256_storeu_ps(to + 8, values[1]);
    }
}

/* Panels side by side that a thread takes at a time, when each takes so many times: the next one is prefetched. */
static int64_t share(int64_t panels, int64_t times) {
    int64_t takes = times;
#ifdef _OPENMP
    takes *= omp_get_max_threads();
#endif
    return panels > PIECE * takes ? (panels + takes - 1) / takes : PIECE;
}

/* sums: room for the sums of x's groups, where there are offsets. */
static void product(const Product *p, float *sums) {
    static void (*const by_kind[])(const Product *, int64_t, int64_t, int64_t, int64_t) = {
        product_f32, product_bf16, product_f16, product_int8, product_int4};
    int64_t panels = (p->n + WIDTH - 1) / WIDTH, groups = p->k / p->group;
    int64_t piece = p->m > 3 ? share(panels, 2) : panels > 32 * PIECE ? 8 * PIECE : PIECE;
    int64_t pieces = (panels + piece - 1) / piece, blocks = (p->m + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        if (sums) {
#pragma omp for
            for (int64_t row = 0; row < p->m; row++) sum_groups(p, p->x + row * p->ldx, sums + row * groups);
        }
        float *wide = p->kind >= INT8 && p->m > ROWS ? malloc(p->k * WIDTH * sizeof(float)) : NULL;
        Product decoded = *p;
        decoded.w = (const char *)wide, decoded.stride = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks * pieces; i++) {
            int64_t block = i / pieces * BLOCK, first = i % pieces * piece;
            int64_t end = block + BLOCK < p->m ? block + BLOCK : p->m;
            int64_t last = first + piece < panels ? first + piece : panels;
            if (p->m <= 3)
                by_kind[p->kind](p, 0, p->m, first, last);
            else
                for (int64_t panel = first; panel < last; panel++) {
                    if (wide) decode(p, panel, wide);
                    for (int64_t row = block; row < end; row += ROWS)
                        (wide ? product_f32 : by_kind[p->kind])(wide ? &decoded : p, row,
                                                                end - row < ROWS ? end - row : ROWS, panel, panel + 1);
                }
        }
        free(wide);
    }
}

/* ---- products of integers ---- */

enum { LINES = 4 }; /* rows of a tile: a chain of additions of integers has no latency to hide */

typedef struct {
    Product to; /* its x is not used */
    const int16_t *x;        /* [m, k] */
    const float *row_scales; /* [m] */
} Integers;

/* Steps k and k + 1 of a panel of int8: pairs of 16 bits, a column each. */
INLINE void load_pairs(const char *w, int64_t k, __m256i *to) {
    __m128i even = _mm_loadu_si128((const __m128i *)(w + k * WIDTH));
    __m128i odd = _mm_loadu_si128((const __m128i *)(w + (k + 1) * WIDTH));
    to[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(even, odd));
    to[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(even, odd));
}

/* `wide`: the panel as pairs, where it is `paired`. The sums are exact: 2^31 is out of reach below 133,000 columns. */
INLINE void tile_integers(int rows, int paired, const Integers *p, int64_t row, int64_t panel, const int16_t *wide) {
    const int16_t *x = p->x + row * p->to.k;
    const char *w = p->to.w + panel * p->to.stride;
    __m256i acc[LINES][2];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int64_t k = 0; k < p->to.k; k += 2) {
        __m256i values[2];
        if (paired) {
            _mm_prefetch(w + p->to.stride + k * WIDTH, _MM_HINT_T1);
            values[0] = _mm256_loadu_si256((const __m256i *)(wide + k * WIDTH));
            values[1] = _mm256_loadu_si256((const __m256i *)(wide + k * WIDTH + 16));
        } else {
            _mm_prefetch(w + k * WIDTH + 512, _MM_HINT_T0);
            load_pairs(w, k, values);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            int32_t both;
            memcpy(&both, x + i * p->to.k + k, sizeof both);
            __m256i pair = _mm256_set1_epi32(both);
            acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(pair, values[0]));
            acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(pair, values[1]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        __m256 scale = _mm256_broadcast_ss(p->row_scales + row + i);
        finish(&p->to, row + i, panel * WIDTH, 0, _mm256_mul_ps(_mm256_cvtepi32_ps(acc[i][0]), scale),
               _mm256_mul_ps(_mm256_cvtepi32_ps(acc[i][1]), scale));
    }
}

#define INTEGERS(NAME, PAIRED)                                                                                     \
    static void NAME(int64_t rows, const Integers *p, int64_t row, int64_t panel, const int16_t *wide) {           \
        switch (rows) {                                                                                            \
            case 1: tile_integers(1, PAIRED, p, row, panel, wide); break;                                          \
            case 2: tile_integers(2, PAIRED, p, row, panel, wide); break;                                          \
            case 3: tile_integers(3, PAIRED, p, row, panel, wide); break;                                          \
            default: tile_integers(4, PAIRED, p, row, panel, wide);                                                \
        }                                                                                                          \
    }
INTEGERS(rows_plain, 0)
INTEGERS(rows_paired, 1)

static void product_integers(const Integers *p) {
    int64_t panels = (p->to.n + WIDTH - 1) / WIDTH, piece = share(panels, p->to.m > 3 ? 2 : 1);
    int64_t blocks = (p->to.m + BLOCK - 1) / BLOCK, pieces = (panels + piece - 1) / piece;
#pragma omp parallel
    {
        int16_t *wide = p->to.m > LINES ? malloc(p->to.k * WIDTH * sizeof *wide) : NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks * pieces; i++) {
            int64_t block = i / pieces * BLOCK, end = block + BLOCK < p->to.m ? block + BLOCK : p->to.m;
            int64_t first = i % pieces * piece, last = first + piece < panels ? first + piece : panels;
            for (int64_t panel = first; panel < last; panel++) {
                for (int64_t k = 0; wide && k < p->to.k; k += 2) {
                    __m256i values[2];
                    load_pairs(p->to.w + panel * p->to.stride, k, values);
                    _mm256_storeu_si256((__m256i *)(wide + k * WIDTH), values[0]);
                    _mm256_storeu_si256((__m256i *)(wide + k * WIDTH + 16), values[1]);
                }
                for (int64_t row = block; row < end; row += LINES)
                    (wide ? rows_paired : rows_plain)(end - row, p, row, panel, wide);
            }
        }
        free(wide);
    }
}

/* The codes of rows of x and their scales: the largest magnitude is 127. What is not a number makes the scale none. */
static void quantize(const float *x, int64_t ldx, int64_t rows, int64_t size, int16_t *codes, float *scales) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
#pragma omp parallel for if (rows * size > SHARED)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * ldx;
        float most = 0, bad = 0;
        int64_t d = 0;
        __m256 mosts = _mm256_setzero_ps(), bads = _mm256_setzero_ps();
        for (; d + 8 <= size; d += 8) {
            __m256 v = _mm256_loadu_ps(from + d);
            mosts = _mm256_max_ps(mosts, _mm256_and_ps(v, magnitude));
            bads = _mm256_fmadd_ps(v, _mm256_setzero_ps(), bads);
        }
        for (; d < size; d++) most = fmaxf(most, fabsf(from[d])), bad += 0 * from[d];
        most = fmaxf(most, most_of(mosts)) / 127.0f;
        float scale = (most > 1e-12f ? most : 1e-12f) + bad + sum_of(bads);
        for (d = 0; d + 8 <= size; d += 8) {
            __m256i steps = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(from + d), _mm256_set1_ps(scale)));
            __m128i low = _mm256_castsi256_si128(steps), high = _mm256_extracti128_si256(steps, 1);
            _mm_storeu_si128((__m128i *)(codes + row * size + d), _mm_packs_epi32(low, high));
        }
        for (; d < size; d++) codes[row * size + d] = (int16_t)_mm_cvtss_si32(_mm_set_ss(from[d] / scale));
        scales[row] = scale;
    }
}

/* ---- attention ---- */

typedef struct {
    const float *q; /* [T, heads, dim], a token every ldq */
    float *out;     /* [T, heads, dim] */
    int64_t ldq;
    int coded; /* the cache holds int8 codes */
    const char *kv; /* [2 kv_heads, blocks, size, dim], the keys' heads first; a head every `head` elements */
    const float *scales; /* of codes: [2 kv_heads, blocks, size], or [2 kv_heads] where `stored` */
    int stored;
    int64_t head, size, dim, heads, kv_heads, sequences;
    const int64_t *queries, *contexts, *tables, *starts; /* [sequences]: lengths, and where their blocks are */
    int64_t window;                                      /* 0: none */
    float scale, softcap;                                /* 0: none */
} Attention;

typedef struct {
    float q[TILE * MOST_DIM], sums[TILE * MOST_DIM], scores[TILE * CHUNK];
    float k[CHUNK * MOST_DIM], v[CHUNK * MOST_DIM]; /* decoded codes */
    float most[TILE], total[TILE];
} Scratch;

/* e^x of what is not above 0, to 2 units in the last place; 0 below -87. Degree 6 after Cody and Waite. */
INLINE __m256 exponential(__m256 x) {
    __m256 small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(small, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
}

/* tanh of x, by e^(-2 |x|). */
INLINE __m256 hyperbolic(__m256 x) {
    __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), one = _mm256_set1_ps(1.0f);
    __m256 e = exponential(_mm256_mul_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), _mm256_set1_ps(-2.0f)));
    return _mm256_or_ps(_mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)), sign);
}

/* 1 / (1 + e^-x). */
INLINE __m256 logistic(__m256 x) {
    __m256 one = _mm256_set1_ps(1.0f), e = exponential(_mm256_or_ps(x, _mm256_set1_ps(-0.0f)));
    __m256 right = _mm256_div_ps(one, _mm256_add_ps(one, e)); /* of |x| */
    return _mm256_blendv_ps(right, _mm256_div_ps(e, _mm256_add_ps(one, e)), x);
}

/* The sums of four vectors, side by side. */
INLINE __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* scores[row, 0:4] = q[row] k[0:4]' for up to three rows. */
INLINE void dots(int rows, const float *q, const float *k, int64_t dim, float *scores) {
    __m256 acc[3][4];
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) acc[i][t] = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += 8) {
        __m256 keys[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) keys[t] = _mm256_loadu_ps(k + t * dim + d);
#pragma GCC unroll 3
        for (int i = 0; i < rows; i++) {
            __m256 one = _mm256_loadu_ps(q + i * dim + d);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) acc[i][t] = _mm256_fmadd_ps(one, keys[t], acc[i][t]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
        _mm_storeu_ps(scores + i * CHUNK, sums_of(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
}

/* sums[row, 0:8 wide] += p[row, from:to] v[from:to] for up to three rows; values of a chunk are in pages. */
INLINE void weigh(int rows, int wide, const float *p, const float *const *pages, int64_t size, int64_t from,
                  int64_t to, int64_t dim, int64_t d, float *sums) {
    __m256 acc[3][4];
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) acc[i][j] = _mm256_loadu_ps(sums + i * dim + d + 8 * j);
    for (int64_t t = from; t < to;) {
        const float *v = pages[t / size] + (t % size) * dim + d;
        for (int64_t end = (t / size + 1) * size < to ? (t / size + 1) * size : to; t < end; t++, v += dim)
#pragma GCC unroll 3
            for (int i = 0; i < rows; i++) {
                __m256 one = _mm256_broadcast_ss(p + i * CHUNK + t);
#pragma GCC unroll 4
                for (int j = 0; j < wide; j++) acc[i][j] = _mm256_fmadd_ps(one, _mm256_loadu_ps(v + 8 * j), acc[i][j]);
            }
    }
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) _mm256_storeu_ps(sums + i * dim + d + 8 * j, acc[i][j]);
}

INLINE void weigh_row(int rows, const float *p, const float *const *pages, int64_t size, int64_t from, int64_t to,
                      int64_t dim, float *sums) {
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) weigh(rows, 4, p, pages, size, from, to, dim, d, sums);
    for (; d < dim; d += 8) weigh(rows, 1, p, pages, size, from, to, dim, d, sums);
}

/* One page of keys or values in float32, decoded into `to` where it is coded. */
static const float *page(const Attention *a, int64_t head, int64_t block, int64_t valid, float *to) {
    int64_t at = head * a->head + block * a->size * a->dim;
    if (!a->coded) return (const float *)a->kv + at;
    const float *scales = a->stored ? a->scales + head : a->scales + at / a->dim;
    for (int64_t t = 0; t < valid; t++) {
        __m256 scale = _mm256_set1_ps(scales[a->stored ? 0 : t]);
        for (int64_t d = 0; d < a->dim; d += 8) {
            __m128i codes = _mm_loadl_epi64((const __m128i *)(a->kv + at + t * a->dim + d));
            __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            _mm256_storeu_ps(to + t * a->dim + d, _mm256_mul_ps(values, scale));
        }
    }
    return to;
}

/* Begin to read four tokens of a block that comes next: blocks lie anywhere. */
INLINE void fetch(const Attention *a, int64_t head, int64_t block, int64_t token) {
    int64_t width = a->coded ? 1 : sizeof(float), at = (head * a->head + (block * a->size + token) * a->dim) * width;
    for (int64_t i = 0; i < 4 * a->dim * width; i += 64) {
        _mm_prefetch(a->kv + at + i, _MM_HINT_T1);
        _mm_prefetch(a->kv + at + i + a->kv_heads * a->head * width, _MM_HINT_T1);
    }
}

/* Turn scores into weights, and what was summed up to now to the new largest score. */
static void soften(const Attention *a, Scratch *s, int64_t rows, int64_t group, int64_t first, int64_t chunk) {
    const __m256 lanes = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t row = 0; row < rows; row++) {
        float *scores = s->scores + row * CHUNK;
        int64_t at = first + row / group; /* the query's position: it sees (at - window, at] */
        float last = (float)(at - chunk), before = a->window ? (float)(at - a->window - chunk) : -1e30f;
        __m256 most = _mm256_set1_ps(-INFINITY);
        for (int64_t t = 0; t < CHUNK; t += 8) {
            __m256 x = _mm256_loadu_ps(scores + t), token = _mm256_add_ps(lanes, _mm256_set1_ps((float)t));
            if (a->softcap != 0) {
                __m256 cap = _mm256_set1_ps(a->softcap);
                x = _mm256_mul_ps(hyperbolic(_mm256_div_ps(x, cap)), cap);
            }
            __m256 seen = _mm256_and_ps(_mm256_cmp_ps(token, _mm256_set1_ps(last), _CMP_LE_OQ),
                                        _mm256_cmp_ps(token, _mm256_set1_ps(before), _CMP_GT_OQ));
            x = _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, seen);
            _mm256_storeu_ps(scores + t, x);
            most = _mm256_max_ps(most, x);
        }
        float largest = most_of(most);
        if (!(largest > s->most[row])) largest = s->most[row];
        float shrunk = s->most[row] == largest ? 1.0f : expf(s->most[row] - largest);
        __m256 total = _mm256_setzero_ps(), offset = _mm256_set1_ps(largest);
        for (int64_t t = 0; t < CHUNK; t += 8) {
            __m256 p = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + t), offset));
            _mm256_storeu_ps(scores + t, p);
            total = _mm256_add_ps(total, p);
        }
        s->total[row] = s->total[row] * shrunk + sum_of(total);
        s->most[row] = largest;
        if (shrunk != 1.0f)
            for (int64_t d = 0; d < a->dim; d += 8) {
                float *sums = s->sums + row * a->dim + d;
                _mm256_storeu_ps(sums, _mm256_mul_ps(_mm256_loadu_ps(sums), _mm256_set1_ps(shrunk)));
            }
    }
}

/* The queries [from, to) of a sequence, for the heads that share one key-value head. */
static void attend(const Attention *a, Scratch *s, int64_t sequence, int64_t token, int64_t head, int64_t from,
                   int64_t to) {
    int64_t group = a->heads / a->kv_heads, rows = (to - from) * group, dim = a->dim, size = a->size;
    const int64_t *blocks = a->tables + a->starts[sequence];
    int64_t first = a->contexts[sequence] - a->queries[sequence] + from, last = first + to - from - 1;
    for (int64_t row = 0; row < rows; row++) {
        const float *q = a->q + (token + from + row / group) * a->ldq + (head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; d++) s->q[row * dim + d] = q[d] * a->scale;
        s->most[row] = -1e30f; /* not -inf, whose difference with itself is no number */
        s->total[row] = 0;
    }
    memset(s->sums, 0, rows * dim * sizeof(float));
    int64_t oldest = a->window && first - a->window + 1 > 0 ? first - a->window + 1 : 0;
    for (int64_t chunk = oldest / CHUNK * CHUNK; chunk <= last; chunk += CHUNK) {
        int64_t begin = oldest > chunk ? oldest - chunk : 0, end = last - chunk + 1 < CHUNK ? last - chunk + 1 : CHUNK;
        const float *keys[CHUNK], *values[CHUNK];
        for (int64_t t = begin / size * size; t < end; t += size) {
            int64_t block = blocks[(chunk + t) / size], valid = end - t < size ? end - t : size;
            keys[t / size] = page(a, head, block, valid, s->k + t * dim);
            values[t / size] = page(a, a->kv_heads + head, block, valid, s->v + t * dim);
        }
        for (int64_t t = begin / 4 * 4; t < end; t += 4) {
            const float *k = keys[t / size] + (t % size) * dim;
            if (chunk + CHUNK + t <= last) fetch(a, head, blocks[(chunk + CHUNK + t) / size], t % size);
            int64_t row = 0;
            for (; row + 3 <= rows; row += 3) dots(3, s->q + row * dim, k, dim, s->scores + row * CHUNK + t);
            if (rows - row == 2) dots(2, s->q + row * dim, k, dim, s->scores + row * CHUNK + t);
            if (rows - row == 1) dots(1, s->q + row * dim, k, dim, s->scores + row * CHUNK + t);
        }
        soften(a, s, rows, group, first, chunk);
        int64_t row = 0;
        for (; row + 3 <= rows; row += 3)
            weigh_row(3, s->scores + row * CHUNK, values, size, begin, end, dim, s->sums + row * dim);
        if (rows - row == 2) weigh_row(2, s->scores + row * CHUNK, values, size, begin, end, dim, s->sums + row * dim);
        if (rows - row == 1) weigh_row(1, s->scores + row * CHUNK, values, size, begin, end, dim, s->sums + row * dim);
    }
    for (int64_t row = 0; row < rows; row++) {
        float *out = a->out + ((token + from + row / group) * a->heads + head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; d++) out[d] = s->sums[row * dim + d] / s->total[row];
    }
}

/* Returns 0 when there is no memory. */
static int attention(const Attention *a) {
    static _Thread_local Scratch scratch;
    int64_t group = a->heads / a->kv_heads, tokens = TILE / group, items = 0, at = 0, token = 0;
    for (int64_t s = 0; s < a->sequences; s++) items += (a->queries[s] + tokens - 1) / tokens;
    int64_t(*item)[3] = malloc((items + 1) * sizeof *item); /* sequence, its first token, where the tile begins */
    if (item == NULL) return 0;
    for (int64_t s = 0; s < a->sequences; token += a->queries[s++])
        for (int64_t from = 0; from < a->queries[s]; from += tokens, at++)
            item[at][0] = s, item[at][1] = token, item[at][2] = from;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < items * a->kv_heads; i++) { /* the last tiles of a prompt, which see most, come first */
        const int64_t *it = item[items - 1 - i / a->kv_heads];
        int64_t to = it[2] + tokens < a->queries[it[0]] ? it[2] + tokens : a->queries[it[0]];
        attend(a, &scratch, it[0], it[1], i % a->kv_heads, it[2], to);
    }
    free(item);
    return 1;
}

/* ---- between the products ---- */

static void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > SHARED)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        float *to = y + row * size, rest = 0;
        __m256 squares = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 8 <= size; d += 8) {
            __m256 v = _mm256_loadu_ps(from + d);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        for (; d < size; d++) rest += from[d] * from[d];
        float factor = 1.0f / sqrtf((sum_of(squares) + rest) / (float)size + eps);
        for (d = 0; d < size; d++) to[d] = from[d] * factor * weight[d];
    }
}

static void add(const float *x, const float *update, float *y, int64_t size, float scale) {
#pragma omp parallel for if (size > SHARED)
    for (int64_t i = 0; i < size; i++) y[i] = x[i] + scale * update[i];
}

/* Rotates, in place, the first 2 `half` dimensions of the first heads of each token; and writes keys and values. */
static void rotate(float *x, int64_t ldx, int64_t tokens, int64_t heads, int64_t dim, const float *cosines,
                   const float *sines, int64_t half) {
#pragma omp parallel for if (tokens * heads * dim > SHARED)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cosines + token * 2 * half, *s = sines + token * 2 * half;
        for (int64_t head = 0; head < heads; head++) {
            float *a = x + token * ldx + head * dim, *b = a + half;
            for (int64_t d = 0; d < half; d++) {
                float left = a[d], right = b[d];
                a[d] = left * c[d] + right * s[d];
                b[d] = right * c[half + d] + left * s[half + d];
            }
        }
    }
}

static void store(const float *kv, int64_t ldkv, int64_t tokens, int64_t heads, int64_t dim, const int64_t *slots,
                  float *to, int64_t head) {
#pragma omp parallel for if (tokens * heads * dim > SHARED)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t h = 0; h < heads; h++)
            memcpy(to + h * head + slots[token] * dim, kv + token * ldkv + h * dim, dim * sizeof(float));
}

/* y = act(gate) up, for x = gate, up side by side; size is a multiple of 8. */
static void gate(const float *x, float *y, int64_t rows, int64_t size, int gelu) {
    const __m256 root = _mm256_set1_ps(0.7978845608028654f), cubic = _mm256_set1_ps(0.044715f);
    int64_t pieces = rows * size / 8;
#pragma omp parallel for if (rows * size > SHARED / 4)
    for (int64_t i = 0; i < pieces; i++) {
        int64_t row = i * 8 / size, d = i * 8 % size;
        __m256 g = _mm256_loadu_ps(x + row * 2 * size + d), up = _mm256_loadu_ps(x + row * 2 * size + size + d);
        __m256 inner = g;
        if (gelu) { /* g (1 + tanh(u)) / 2 = g logistic(2 u) */
            __m256 u = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_mul_ps(g, g), g), cubic, g);
            inner = _mm256_mul_ps(_mm256_add_ps(root, root), u);
        }
        _mm256_storeu_ps(y + row * size + d, _mm256_mul_ps(_mm256_mul_ps(g, logistic(inner)), up));
    }
}

/* ---- what Python calls ---- */

/* Arguments are whole numbers, addresses among them, and floats. */
static int numbers(PyObject *const *args, Py_ssize_t given, int64_t *to, int count, double *floats, int more) {
    if (given != count + more) {
        PyErr_Format(PyExc_TypeError, "%d numbers were expected, %zd were given", count + more, given);
        return 0;
    }
    for (int i = 0; i < count; i++) to[i] = PyLong_AsLongLong(args[i]);
    for (int i = 0; i < more; i++) floats[i] = PyFloat_AsDouble(args[count + i]);
    return !PyErr_Occurred();
}

enum { NUMBERS = 18, FLOATS = 2 };                                   /* the most that a kernel takes */
typedef struct {
    int (*run)(const int64_t *n, const double *f); /* 0 when there is no memory */
    int64_t n[NUMBERS];
    double f[FLOATS];
} Call;

#define KERNEL(NAME, COUNT, MORE)                                                                     \
    enum { NAME##_count = COUNT, NAME##_more = MORE };                                                \
    static int run_##NAME(const int64_t *n, const double *f);                                         \
    static PyObject *py_##NAME(PyObject *self, PyObject *const *args, Py_ssize_t given) {             \
        Call call = {run_##NAME, {0}, {0}};                                                           \
        (void)self;                                                                                   \
        return numbers(args, given, call.n, COUNT, call.f, MORE) ? called(&call, 1) : NULL;           \
    }                                                                                                 \
    static int run_##NAME(const int64_t *n, const double *f)
#define AT(TYPE, I) ((TYPE *)(intptr_t)n[I])

static PyObject *called(const Call *calls, int64_t count) {
    int done = 1;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; done && i < count; i++) done = calls[i].run(calls[i].n, calls[i].f);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

KERNEL(product, 13, 0) {
    int64_t m = n[9], k = n[11], group = n[12], groups = k / group, panel = BYTES(n[0]) * k;
    Product p = {(int)n[0], AT(const float, 1), n[2], AT(const char, 3), AT(const float, 4), AT(const float, 5), NULL,
                 AT(const float, 6), AT(float, 7), n[8], m, n[10], k, group, panel};
    float *sums = p.offsets ? malloc((m * groups + 1) * sizeof *sums) : NULL;
    (void)f;
    if (p.offsets && sums == NULL) return 0;
    p.sums = sums;
    product(&p, sums);
    free(sums);
    return 1;
}

KERNEL(product_integers, 10, 0) {
    int64_t m = n[7], k = n[9];
    Integers p = {{INT8, NULL, 0, AT(const char, 2), AT(const float, 3), NULL, NULL, AT(const float, 4), AT(float, 5), n[6],
                   m, n[8], k, k, BYTES(INT8) * k}, NULL, NULL};
    int16_t *codes = malloc(m * k * sizeof *codes + 64);
    float *scales = malloc(m * sizeof *scales + 64);
    int enough = codes && scales;
    (void)f;
    if (enough) {
        p.x = codes, p.row_scales = scales;
        quantize(AT(const float, 0), n[1], m, k, codes, scales);
        product_integers(&p);
    }
    free(codes);
    free(scales);
    return enough;
}

KERNEL(attention, 18, 2) {
    Attention a = {AT(const float, 0), AT(float, 1), n[2], (int)n[3], AT(const char, 4), AT(const float, 5), (int)n[6],
                   n[7], n[8], n[9], n[10], n[11], n[12], AT(const int64_t, 13), AT(const int64_t, 14),
                   AT(const int64_t, 15), AT(const int64_t, 16), n[17], (float)f[0], (float)f[1]};
    return attention(&a);
}

KERNEL(rms_norm, 5, 1) {
    rms_norm(AT(const float, 0), AT(const float, 1), AT(float, 2), n[3], n[4], (float)f[0]);
    return 1;
}

KERNEL(add, 4, 1) {
    add(AT(const float, 0), AT(const float, 1), AT(float, 2), n[3], (float)f[0]);
    return 1;
}

KERNEL(rotate, 8, 0) {
    (void)f;
    rotate(AT(float, 0), n[1], n[2], n[3], n[4], AT(const float, 5), AT(const float, 6), n[7]);
    return 1;
}

KERNEL(store, 8, 0) {
    (void)f;
    store(AT(const float, 0), n[1], n[2], n[3], n[4], AT(const int64_t, 5), AT(float, 6), n[7]);
    return 1;
}

KERNEL(gate, 5, 0) {
    (void)f;
    gate(AT(const float, 0), AT(float, 1), n[2], n[3], (int)n[4]);
    return 1;
}

#define KERNELS(DO) DO(product) DO(product_integers) DO(attention) DO(rms_norm) DO(add) DO(rotate) DO(store) DO(gate)

/* program([(name, arguments), ...]): the calls as bytes that `run` goes through, with no Python in between. */
static PyObject *py_program(PyObject *self, PyObject *list) {
    static const struct {
        const char *name;
        int (*run)(const int64_t *, const double *);
        int count, more;
    } known[] = {
#define ROW(NAME) {#NAME, run_##NAME, NAME##_count, NAME##_more},
        KERNELS(ROW)};
    (void)self;
    if (!PyList_Check(list)) return PyErr_Format(PyExc_TypeError, "a list of calls was expected");
    Py_ssize_t count = PyList_GET_SIZE(list);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(Call));
    for (Py_ssize_t i = 0; bytes && i < count; i++) {
        Call *call = (Call *)PyBytes_AS_STRING(bytes) + i;
        const char *name = NULL;
        PyObject *given = NULL;
        int ok = 0;
        memset(call, 0, sizeof *call);
        if (PyArg_ParseTuple(PyList_GET_ITEM(list, i), "sO!", &name, &PyTuple_Type, &given))
            for (size_t j = 0; j < sizeof known / sizeof *known; j++)
                if (strcmp(known[j].name, name) == 0) {
                    PyObject *const *items = PySequence_Fast_ITEMS(given);
                    call->run = known[j].run;
                    ok = numbers(items, PyTuple_GET_SIZE(given), call->n, known[j].count, call->f, known[j].more);
                }
        if (!ok) {
            if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "there is no kernel %s", name);
            Py_CLEAR(bytes);
        }
    }
    return bytes;
}

/* run(program) */
static PyObject *py_run(PyObject *self, PyObject *program) {
    (void)self;
    if (!PyBytes_Check(program)) return PyErr_Format(PyExc_TypeError, "a program was expected");
    return called((const Call *)PyBytes_AS_STRING(program), PyBytes_GET_SIZE(program) / (Py_ssize_t)sizeof(Call));
}

static PyObject *py_supported(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
}

#define METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL, NULL},
static PyMethodDef methods[] = {KERNELS(METHOD){"program", py_program, METH_O, NULL},
                                {"run", py_run, METH_O, NULL},
                                {"supported", py_supported, METH_NOARGS, NULL},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
