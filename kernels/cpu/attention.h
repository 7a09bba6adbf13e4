/* Attention over a paged KV cache, with online softmax (arXiv 1805.02867).
 *
 * A tile is some queries of one sequence times the heads that share a key-value head; they read its
 * keys and values once. Keys and values come in chunks of KV_CHUNK tokens, in words as kv_types.h
 * describes. A vector holds the scores of several tokens, or the sums of several dimensions: no sum
 * goes across a vector.
 *
 * Products are of float32 numbers: caches of other types are converted chunk by chunk. Where the
 * level has bfloat16 products, a bfloat16 cache is multiplied as it is, and queries and
 * probabilities are rounded to bfloat16.
 *
 * A latent cache (multi-head latent attention) has one head, which all query heads read: groups of
 * query heads have the place of key-value heads. A token's row holds its key, and the first part of
 * it is its value. Rows lie as those of values, so scores are products along them.
 *
 * The tokens of a sequence are divided into segments. Each row of a tile gets the softmax's sums of
 * each segment, and these are merged in the order of the segments. So the segments may run on
 * different threads (one long sequence uses all of them) or one after the other: the result is the
 * same, bit for bit.
 */

#include <stdatomic.h>

enum {
    KV_CHUNK = 64, /* tokens in a chunk of keys and values; a multiple of the block size */
    CHUNK_PANELS = KV_CHUNK / PANEL_WIDTH,
    SEGMENT = 256,        /* tokens; a multiple of KV_CHUNK */
    TILE_ROWS = 48,       /* rows of a tile: queries times heads */
#if defined(LEVEL_AVX512)
    ROWS_AT_ONCE = 6, /* the sums of this many rows fit into registers, beside four vectors */
#else
    ROWS_AT_ONCE = 3,
#endif
    VECTORS_AT_ONCE = 4,
    LINE_WORDS = 16, /* words of 32 bits in a line of the processor's caches */
    PIECES_PER_THREAD = 4 /* a tile that would be a larger part is divided into its segments */
};
static const float NO_SCORE = -1e30f; /* not -inf, because -inf - -inf is NaN */
static const float LARGEST_EXPONENT = 8; /* of an exponential in the sums of a row */

/* The sums of a row of a tile: the score that exponentials are relative to, the sum of the
 * exponentials, and the weighted sum of the values. */
enum { SUMS_MAX, SUMS_EXP, SUMS_VALUES = 16, MAX_SUMS = SUMS_VALUES + MAX_HEAD_DIM };

/* What products multiply: words of one float32 or of two bfloat16. */
enum { PRODUCTS_F32, PRODUCTS_BF16 };

#if defined(LEVEL_BF16)
INLINE int products_of(int kv_type) {
    return kv_type == KV_BF16 ? PRODUCTS_BF16 : PRODUCTS_F32;
}
#else
INLINE int products_of(int kv_type) {
    (void)kv_type;
    return PRODUCTS_F32;
}
#endif

/* A latent cache is multiplied as float32. */
INLINE int attention_products(const PagedAttention *a) {
    return a->is_latent ? PRODUCTS_F32 : products_of(a->kv_type);
}

/* The words of a row of probabilities. */
INLINE int64_t words_of_chunk(int products) {
    return products == PRODUCTS_BF16 ? KV_CHUNK / 2 : KV_CHUNK;
}

/* The working memory of a thread. Rows of queries and probabilities are words of products. */
typedef struct {
    float q[TILE_ROWS * MAX_HEAD_DIM];     /* the queries, scaled */
    float total[TILE_ROWS * MAX_SUMS];     /* the sums of all segments */
    float segment[TILE_ROWS * MAX_SUMS];   /* the sums of a segment */
    float exp_sums[TILE_ROWS * VECTOR_WIDTH]; /* the sums of the exponentials of a segment */
    float scores[TILE_ROWS * KV_CHUNK];    /* of the current chunk; then their exponentials */
    float weights[TILE_ROWS * KV_CHUNK];   /* the exponentials in bfloat16 */
    float keys[MAX_HEAD_DIM * KV_CHUNK];   /* panels of keys, where they are converted */
    float values[KV_CHUNK * MAX_HEAD_DIM]; /* rows of values, where they are copied */
} Scratch;

/* Some queries of a sequence, for all heads. */
typedef struct {
    int64_t sequence;
    int64_t first_token;   /* of the sequence, among the tokens of the step */
    int64_t first_query;   /* of the tile, among the queries of the sequence */
    int64_t n_queries;
    int is_only; /* the step has no other queries of the sequence */
    int64_t position;      /* in the sequence, of the first query */
    int64_t first_segment; /* the first one that a query attends to */
    int64_t n_segments;
    int64_t first_piece; /* the tile's pieces: for each key-value head one, or one a segment */
    int is_divided;      /* each segment is a piece */
    float *parts;        /* is_divided: [n_kv_heads, n_segments, part_rows, sums] */
    atomic_int *left;    /* is_divided: [n_kv_heads], the segments that have not ended */
} QueryTile;

/* ---- products ---- */

/* Decode steps read all keys and values once, from memory: while a chunk is multiplied, the same
 * parts of the next one are prefetched. The hardware does not, because the addresses of blocks
 * follow no pattern. A whole chunk at once would stop the products until most of it has come; that
 * is done only where keys and values are converted, where AMX multiplies, and for prompts, whose
 * other tiles have brought most chunks into the caches. */
INLINE void prefetch_line(const float *address) {
    __builtin_prefetch(address, 0, 3);
}

/* sum + the product of words, or of both halves of them. */
INLINE vfloat add_product(int products, vfloat factor, vfloat words, vfloat sum) {
#if defined(LEVEL_BF16)
    if (products == PRODUCTS_BF16)
        return v_dot_bf16(sum, v_bits(words), v_bits(factor));
#endif
    (void)products;
    return v_fma(factor, words, sum);
}

/* scores[i, j PANEL_WIDTH:] = the products of row i of q with panel j, for n_rows rows and n_panels
 * panels. q: n_words words a row. next: as many panels, which are prefetched; NULL: none are. */
INLINE void score_panels(int products, int n_rows, int n_panels, const float *q, int64_t n_words,
                         const float *const *panels, const float *const *next, float *scores) {
    vfloat sums[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels * VECTORS; j++)
            sums[i][j] = v_zero();
    for (int64_t word = 0; word < n_words; word++) {
        vfloat keys[VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (int j = 0; j < n_panels * VECTORS; j++)
            keys[j] = v_load(panels[j / VECTORS] + word * PANEL_WIDTH + j % VECTORS * VECTOR_WIDTH);
        if (next != NULL)
#pragma GCC unroll 4
            for (int j = 0; j < n_panels; j++)
                prefetch_line(next[j] + word * PANEL_WIDTH);
#pragma GCC unroll 6
        for (int i = 0; i < n_rows; i++) {
            vfloat factor = v_set(q[i * n_words + word]);
#pragma GCC unroll 4
            for (int j = 0; j < n_panels * VECTORS; j++)
                sums[i][j] = add_product(products, factor, keys[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_panels * VECTORS; j++)
            v_store(scores + i * KV_CHUNK + j * VECTOR_WIDTH, sums[i][j]);
}

/* The scores of n_rows rows, for the panels [panel, end_panel). */
INLINE void score_rows(int products, int n_rows, const float *q, int64_t n_words,
                       const float *const *panels, const float *const *next, int64_t panel,
                       int64_t end_panel, float *scores) {
    const int at_once = VECTORS_AT_ONCE / VECTORS;
    for (; panel + at_once <= end_panel; panel += at_once)
        score_panels(products, n_rows, at_once, q, n_words, panels + panel,
                     next == NULL ? NULL : next + panel, scores + panel * PANEL_WIDTH);
    for (; panel < end_panel; panel++)
        score_panels(products, n_rows, 1, q, n_words, panels + panel,
                     next == NULL ? NULL : next + panel, scores + panel * PANEL_WIDTH);
}

/* next: the panels of the next chunk, which are prefetched once; NULL: they are not. */
INLINE void score_tokens(int products, int64_t n_rows, const float *q, int64_t n_words,
                         const float *const *panels, const float *const *next, int64_t panel,
                         int64_t end_panel, float *scores) {
    int64_t i = 0;
    for (; i + ROWS_AT_ONCE <= n_rows; i += ROWS_AT_ONCE)
        score_rows(products, ROWS_AT_ONCE, q + i * n_words, n_words, panels, i == 0 ? next : NULL,
                   panel, end_panel, scores + i * KV_CHUNK);
    for (; i + 3 <= n_rows; i += 3)
        score_rows(products, 3, q + i * n_words, n_words, panels, i == 0 ? next : NULL, panel,
                   end_panel, scores + i * KV_CHUNK);
    if (n_rows - i == 2)
        score_rows(products, 2, q + i * n_words, n_words, panels, i == 0 ? next : NULL, panel,
                   end_panel, scores + i * KV_CHUNK);
    if (n_rows - i == 1)
        score_rows(products, 1, q + i * n_words, n_words, panels, i == 0 ? next : NULL, panel,
                   end_panel, scores + i * KV_CHUNK);
}

/* Vector j of n_vectors; a single one may be the last part of a row, of which `size` are left. */
INLINE vfloat load_of_part(const float *part, int j, int n_vectors, int64_t size) {
    return n_vectors == 1 ? load_of_row(part, 0, size) : v_load(part + VECTOR_WIDTH * j);
}

/* Rows of values in a panel: of tokens, or of pairs of them. */
INLINE int64_t rows_of_panel(int products) {
    return products == PRODUCTS_BF16 ? PANEL_WIDTH / 2 : PANEL_WIDTH;
}

/* out[i, column : column + VECTOR_WIDTH n_vectors] += weights[i, begin:end] rows[begin:end], for
 * n_rows rows i of `weights` and `out`. size: of a row. next: see `add_values`. */
INLINE void add_columns(int products, int n_rows, int n_vectors, const float *weights,
                        const float *const *rows, const float *const *next, int64_t begin,
                        int64_t end, int64_t column, int64_t size, float *out) {
    const int64_t out_stride = SUMS_VALUES + size;
    const int64_t weights_stride = words_of_chunk(products);
    vfloat sums[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            sums[i][j] = load_of_part(out + i * out_stride + column, j, n_vectors, size - column);
    for (int64_t t = begin; t < end; t++) {
        const float *row = rows[t] + column;
        vfloat values[VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            values[j] = load_of_part(row, j, n_vectors, size - column);
        if (next != NULL) {
            const float *panel = next[t / rows_of_panel(products)];
            const float *next_row = panel + t % rows_of_panel(products) * size + column;
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors * VECTOR_WIDTH; j += LINE_WORDS)
                prefetch_line(next_row + j);
        }
#pragma GCC unroll 6
        for (int i = 0; i < n_rows; i++) {
            vfloat factor = v_set(weights[i * weights_stride + t]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                sums[i][j] = add_product(products, factor, values[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            if (n_vectors == 1)
                store_of_row(out + i * out_stride + column, 0, size - column, sums[i][j]);
            else
                v_store(out + i * out_stride + column + VECTOR_WIDTH * j, sums[i][j]);
}

INLINE void add_values_of_rows(int products, int n_rows, const float *weights,
                               const float *const *rows, const float *const *next, int64_t begin,
                               int64_t end, int64_t size, float *out) {
    int64_t column = 0;
    for (; column + VECTORS_AT_ONCE * VECTOR_WIDTH <= size;
         column += VECTORS_AT_ONCE * VECTOR_WIDTH)
        add_columns(products, n_rows, VECTORS_AT_ONCE, weights, rows, next, begin, end, column,
                    size, out);
    for (; column < size; column += VECTOR_WIDTH)
        add_columns(products, n_rows, 1, weights, rows, next, begin, end, column, size, out);
}

/* The sums of the values += weights[:, begin:end] rows[begin:end]: rows of tokens, or of pairs.
 * next: the panels of values of the next chunk, which are prefetched once; NULL: they are not. */
INLINE void add_values(int products, int64_t n_rows, const float *weights,
                       const float *const *rows, const float *const *next, int64_t begin,
                       int64_t end, int64_t head_dim, float *sums) {
    const int64_t weights_stride = words_of_chunk(products);
    const int64_t sums_stride = SUMS_VALUES + head_dim;
    float *out = sums + SUMS_VALUES;
    int64_t i = 0;
    for (; i + ROWS_AT_ONCE <= n_rows; i += ROWS_AT_ONCE)
        add_values_of_rows(products, ROWS_AT_ONCE, weights + i * weights_stride, rows,
                           i == 0 ? next : NULL, begin, end, head_dim, out + i * sums_stride);
    for (; i + 3 <= n_rows; i += 3)
        add_values_of_rows(products, 3, weights + i * weights_stride, rows, i == 0 ? next : NULL,
                           begin, end, head_dim, out + i * sums_stride);
    if (n_rows - i == 2)
        add_values_of_rows(products, 2, weights + i * weights_stride, rows, i == 0 ? next : NULL,
                           begin, end, head_dim, out + i * sums_stride);
    if (n_rows - i == 1)
        add_values_of_rows(products, 1, weights + i * weights_stride, rows, i == 0 ? next : NULL,
                           begin, end, head_dim, out + i * sums_stride);
}

#if defined(LEVEL_AMX)
/* Whether AMX tiles multiply: they take the depth of a head in steps of 32. */
INLINE int uses_amx(int products, int64_t head_dim) {
    return products == PRODUCTS_BF16 && head_dim % 32 == 0;
}

/* Tiles 0 .. 3 hold sums and 4 queries or probabilities, of up to 16 rows; 5 and 6 hold keys or
 * values. More than 16 rows run in tiles of 16: what the last one has beyond is not used. */
static void configure_attention_tiles(int64_t rows) {
    configure_tiles(5, 7, rows);
}

/* The scores of up to 16 rows for all panels of a chunk. */
static void amx_scores(const char *q, int64_t row_bytes, const float *const *panels,
                       int64_t panel, int64_t end_panel, float *scores) {
    const int64_t tile_words = AMX_ROWS * AMX_WORDS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < row_bytes / 64; i++) {
        _tile_loadd(4, q + i * 64, row_bytes);
#define ADD_PANEL(N)                                                                               \
    if (panel <= N && N < end_panel) {                                                             \
        _tile_loadd(5, panels[N] + i * tile_words, 64);                                            \
        _tile_dpbf16ps(N, 4, 5);                                                                   \
    }
        ADD_PANEL(0)
        ADD_PANEL(1)
        ADD_PANEL(2)
        ADD_PANEL(3)
#undef ADD_PANEL
    }
    _tile_stored(0, scores, KV_CHUNK * 4);
    _tile_stored(1, scores + PANEL_WIDTH, KV_CHUNK * 4);
    _tile_stored(2, scores + 2 * PANEL_WIDTH, KV_CHUNK * 4);
    _tile_stored(3, scores + 3 * PANEL_WIDTH, KV_CHUNK * 4);
}

/* Add the values of the pairs [0, end) to the sums of up to 16 rows, for n_panels panels of
 * dimensions. */
INLINE void amx_add_values(int n_panels, const float *weights, const float *values, int64_t end,
                           int64_t head_dim, float *out, int64_t out_bytes) {
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + PANEL_WIDTH, out_bytes);
    if (n_panels == 4) {
        _tile_loadd(2, out + 2 * PANEL_WIDTH, out_bytes);
        _tile_loadd(3, out + 3 * PANEL_WIDTH, out_bytes);
    }
    for (int64_t pair = 0; pair < end; pair += AMX_ROWS) {
        const float *rows = values + pair * head_dim;
        _tile_loadd(4, weights + pair, KV_CHUNK * 2);
        _tile_loadd(5, rows, head_dim * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, rows + PANEL_WIDTH, head_dim * 4);
        _tile_dpbf16ps(1, 4, 6);
        if (n_panels == 4) {
            _tile_loadd(5, rows + 2 * PANEL_WIDTH, head_dim * 4);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, rows + 3 * PANEL_WIDTH, head_dim * 4);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + PANEL_WIDTH, out_bytes);
    if (n_panels == 4) {
        _tile_stored(2, out + 2 * PANEL_WIDTH, out_bytes);
        _tile_stored(3, out + 3 * PANEL_WIDTH, out_bytes);
    }
}

static void amx_values(const float *weights, const float *values, int64_t end, int64_t head_dim,
                       float *sums) {
    const int64_t out_bytes = (SUMS_VALUES + head_dim) * 4;
    float *out = sums + SUMS_VALUES;
    int64_t d = 0;
    for (; d + 4 * PANEL_WIDTH <= head_dim; d += 4 * PANEL_WIDTH)
        amx_add_values(4, weights, values + d, end, head_dim, out + d, out_bytes);
    if (d < head_dim)
        amx_add_values(2, weights, values + d, end, head_dim, out + d, out_bytes);
}
#endif

/* scores[i, t] = the product of row i of q with row t of VECTORS_AT_ONCE tokens, along the rows. */
INLINE void score_row_block(int n_rows, const float *q, int64_t size, const float *const *rows,
                            float *scores) {
    vfloat sums[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int t = 0; t < VECTORS_AT_ONCE; t++)
            sums[i][t] = v_zero();
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
        vfloat keys[VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (int t = 0; t < VECTORS_AT_ONCE; t++)
            keys[t] = load_of_row(rows[t], d, size);
#pragma GCC unroll 6
        for (int i = 0; i < n_rows; i++) {
            vfloat factor = load_of_row(q + i * size, d, size);
#pragma GCC unroll 4
            for (int t = 0; t < VECTORS_AT_ONCE; t++)
                sums[i][t] = v_fma(factor, keys[t], sums[i][t]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int t = 0; t < VECTORS_AT_ONCE; t++)
            scores[i * KV_CHUNK + t] = v_sum(sums[i][t]);
}

/* The scores of all rows for the tokens [begin, end) of a chunk, whose keys are rows. */
INLINE void score_latents(int64_t n_rows, const float *q, int64_t size, const float *const *rows,
                          int64_t begin, int64_t end, float *scores) {
    for (int64_t t = begin / VECTORS_AT_ONCE * VECTORS_AT_ONCE; t < end; t += VECTORS_AT_ONCE) {
        const float *tokens[VECTORS_AT_ONCE]; /* others are masked later */
        for (int64_t j = 0; j < VECTORS_AT_ONCE; j++)
            tokens[j] = rows[t + j < begin ? begin : t + j < end ? t + j : end - 1];
        int64_t i = 0;
        for (; i + 3 <= n_rows; i += 3)
            score_row_block(3, q + i * size, size, tokens, scores + i * KV_CHUNK + t);
        if (n_rows - i == 2)
            score_row_block(2, q + i * size, size, tokens, scores + i * KV_CHUNK + t);
        if (n_rows - i == 1)
            score_row_block(1, q + i * size, size, tokens, scores + i * KV_CHUNK + t);
    }
}

/* ---- chunks of the cache ---- */

/* The oldest token that a query of the tile attends to; negative: all of them. */
INLINE int64_t oldest_token(const PagedAttention *a, const QueryTile *tile) {
    return a->window ? tile->position - a->window + 1 : 0;
}

/* The tokens [begin, end) of a chunk in the cache, of one key-value head. */
typedef struct {
    int64_t kv_head;
    int64_t begin;
    int64_t end;
    int64_t slots[CHUNK_PANELS]; /* where the first token of each panel is in the cache */
} Chunk;

INLINE int64_t first_panel(const Chunk *chunk) {
    return chunk->begin / PANEL_WIDTH;
}

INLINE int64_t end_panel(const Chunk *chunk) {
    return (chunk->end + PANEL_WIDTH - 1) / PANEL_WIDTH;
}

/* The chunk of a tile that begins with first_token. */
static void find_chunk(const PagedAttention *a, const QueryTile *tile, int64_t kv_head,
                       int64_t first_token, Chunk *chunk) {
    const int64_t *block_table = a->block_tables + a->table_starts[tile->sequence];
    int64_t oldest = oldest_token(a, tile);
    int64_t after_last = tile->position + tile->n_queries;
    chunk->kv_head = kv_head;
    chunk->begin = oldest > first_token ? oldest - first_token : 0;
    chunk->end = min_int64(after_last - first_token, KV_CHUNK);
    for (int64_t panel = first_panel(chunk); panel < end_panel(chunk); panel++) {
        int64_t token = first_token + panel * PANEL_WIDTH;
        chunk->slots[panel] =
            block_table[token / a->block_size] * a->block_size + token % a->block_size;
    }
}

/* The words of PANEL_WIDTH tokens of a head. */
INLINE const char *panel_words(const PagedAttention *a, int64_t head, int64_t slot, int kv_type) {
    return a->kv + (head * a->head_stride + slot * a->head_dim) * kv_element_size(kv_type);
}

/* Prefetch a panel. non_temporal: it is read once, and does not take the place of others in the
 * larger caches. */
INLINE void prefetch_panel(int non_temporal, const PagedAttention *a, int64_t head, int64_t slot,
                           int kv_type) {
    const char *words = panel_words(a, head, slot, kv_type);
    const char *end = words + PANEL_WIDTH * a->head_dim * kv_element_size(kv_type);
    for (; words < end; words += 4 * 64)
#pragma GCC unroll 4
        for (int line = 0; line < 4; line++)
            if (non_temporal)
                __builtin_prefetch(words + line * 64, 0, 0);
            else
                __builtin_prefetch(words + line * 64, 0, 2);
}

/* The head of a chunk's keys or values in the cache. */
INLINE int64_t cache_head(const PagedAttention *a, const Chunk *chunk, int is_values) {
    return chunk->kv_head + (is_values ? a->n_kv_heads : 0);
}

/* Prefetch the keys or values of a tile's next chunk. next: NULL: there is none. */
INLINE void prefetch_chunk(const PagedAttention *a, const QueryTile *tile, int is_values,
                           const Chunk *next, int kv_type) {
    if (next == NULL)
        return;
    const int64_t head = cache_head(a, next, is_values);
    for (int64_t panel = first_panel(next); panel < end_panel(next); panel++)
        if (tile->is_only)
            prefetch_panel(1, a, head, next->slots[panel], kv_type);
        else
            prefetch_panel(0, a, head, next->slots[panel], kv_type);
}

/* The panels of the next chunk that are prefetched while those of `chunk` are multiplied: panel by
 * panel, or the same ones again where the next chunk has none. Panels that `chunk` does not have,
 * or has only some tokens of, are prefetched at once. */
INLINE void find_next_panels(const PagedAttention *a, int is_values, const Chunk *chunk,
                             const Chunk *next, const float **panels, int kv_type) {
    const int64_t head = cache_head(a, next, is_values);
    for (int64_t panel = 0; panel < CHUNK_PANELS; panel++) {
        int is_multiplied = first_panel(chunk) <= panel && panel < end_panel(chunk);
        int is_whole = chunk->begin <= panel * PANEL_WIDTH &&
                       (panel + 1) * PANEL_WIDTH <= chunk->end;
        int is_next = first_panel(next) <= panel && panel < end_panel(next);
        if (is_next && !(is_values ? is_whole : is_multiplied))
            prefetch_panel(0, a, head, next->slots[panel], kv_type);
        if (is_multiplied)
            panels[panel] = (const float *)panel_words(
                a, is_next ? head : cache_head(a, chunk, is_values),
                is_next ? next->slots[panel] : chunk->slots[panel], kv_type);
    }
}

/* What the elements of PANEL_WIDTH tokens are multiplied by. */
INLINE void panel_scales(const PagedAttention *a, int64_t head, int64_t slot, float *scales) {
    const float *of_head = a->scales + head * (a->head_stride / a->head_dim);
    for (int i = 0; i < PANEL_WIDTH; i++)
        scales[i] = a->static_scales ? a->scales[head] : of_head[slot + i];
}

/* The panels of keys of a chunk as words of products: in the cache, or their copies as floats. */
INLINE void load_keys(const PagedAttention *a, int64_t head, const Chunk *chunk, float *to,
                      const float **panels, int kv_type) {
    const int values = kv_word_values(kv_type);
    for (int64_t panel = first_panel(chunk); panel < end_panel(chunk); panel++) {
        const char *words = panel_words(a, head, chunk->slots[panel], kv_type);
        panels[panel] = (const float *)words;
        if (kv_type == KV_F32 || products_of(kv_type) == PRODUCTS_BF16)
            continue;
        float *copy = to + panel * PANEL_WIDTH * a->head_dim;
        panels[panel] = copy;
        float scales[PANEL_WIDTH];
        if (kv_is_quantized(kv_type))
            panel_scales(a, head, chunk->slots[panel], scales);
        for (int64_t d = 0; d < a->head_dim; d += values)
            for (int v = 0; v < PANEL_WIDTH; v += VECTOR_WIDTH) {
                vint word = vi_load(words + (d / values * PANEL_WIDTH + v) * 4);
#pragma GCC unroll 4
                for (int k = 0; k < values; k++) {
                    vfloat x = kv_word_value(kv_type, word, k);
                    if (kv_is_quantized(kv_type))
                        x = v_mul(x, v_load(scales + v));
                    v_store(copy + (d + k) * PANEL_WIDTH + v, x);
                }
            }
    }
}

/* The rows of values of each token of a chunk as floats: in the cache, or their copies. */
INLINE void load_values(const PagedAttention *a, int64_t head, const Chunk *chunk, float *to,
                        const float **rows, int kv_type) {
    const int values = kv_word_values(kv_type);
    const int64_t head_dim = a->head_dim;
    for (int64_t panel = first_panel(chunk); panel < end_panel(chunk); panel++) {
        const char *words = panel_words(a, head, chunk->slots[panel], kv_type);
        int64_t first = panel * PANEL_WIDTH;
        if (kv_type == KV_F32) {
            for (int64_t t = 0; t < PANEL_WIDTH; t++)
                rows[first + t] = (const float *)words + t * head_dim;
            continue;
        }
        float scales[PANEL_WIDTH];
        if (kv_is_quantized(kv_type))
            panel_scales(a, head, chunk->slots[panel], scales);
        for (int64_t t = 0; t < PANEL_WIDTH; t += values, words += head_dim * 4)
            for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
                vint word = v_bits(load_of_row((const float *)words, d, head_dim));
#pragma GCC unroll 4
                for (int k = 0; k < values; k++) {
                    vfloat x = kv_word_value(kv_type, word, k);
                    if (kv_is_quantized(kv_type))
                        x = v_mul(x, v_set(scales[t + k]));
                    store_of_row(to + (first + t + k) * head_dim, d, head_dim, x);
                }
            }
        for (int64_t t = first; t < first + PANEL_WIDTH; t++)
            rows[t] = to + t * head_dim;
    }
}

#if defined(LEVEL_BF16)
/* Copy a panel of values. Tokens outside the chunk become zeros, because 0 times NaN is NaN. */
static void copy_value_panel(const PagedAttention *a, int64_t head, const Chunk *chunk,
                             int64_t panel, float *to) {
    const int64_t head_dim = a->head_dim;
    const int64_t first = panel * PANEL_WIDTH;
    memcpy(to, panel_words(a, head, chunk->slots[panel], KV_BF16),
           PANEL_WIDTH / 2 * head_dim * sizeof *to);
    if (first >= chunk->begin && first + PANEL_WIDTH <= chunk->end)
        return;
    uint16_t *halves = (uint16_t *)to;
    for (int64_t t = 0; t < PANEL_WIDTH; t++)
        if (first + t < chunk->begin || first + t >= chunk->end)
            for (int64_t d = 0; d < head_dim; d++)
                halves[(t / 2 * head_dim + d) * 2 + t % 2] = 0;
}

#if defined(LEVEL_AMX)
/* Copy the values of a chunk, which tiles take. Returns the end of the pairs of tokens that are
 * written, a multiple of 16. */
static int64_t copy_value_pairs(const PagedAttention *a, int64_t head, const Chunk *chunk,
                                float *to) {
    const int64_t panel_size = PANEL_WIDTH / 2 * a->head_dim; /* in words */
    int64_t n_panels = (chunk->end + 31) / 32 * 2;
    for (int64_t panel = 0; panel < n_panels; panel++)
        if (panel < first_panel(chunk) || panel >= end_panel(chunk))
            memset(to + panel * panel_size, 0, panel_size * sizeof *to);
        else
            copy_value_panel(a, head, chunk, panel, to + panel * panel_size);
    return n_panels * PANEL_WIDTH / 2;
}
#endif

/* The rows of values of each pair of tokens of a chunk: in the cache, or copied to `to` where a
 * panel has tokens outside the chunk. */
static void find_value_pairs(const PagedAttention *a, int64_t head, const Chunk *chunk, float *to,
                             const float **rows) {
    const int64_t head_dim = a->head_dim;
    for (int64_t panel = first_panel(chunk); panel < end_panel(chunk); panel++) {
        const int64_t first = panel * PANEL_WIDTH;
        const float *values = (const float *)panel_words(a, head, chunk->slots[panel], KV_BF16);
        if (first < chunk->begin || first + PANEL_WIDTH > chunk->end) {
            float *copy = to + first / 2 * head_dim;
            copy_value_panel(a, head, chunk, panel, copy);
            values = copy;
        }
        for (int64_t pair = 0; pair < PANEL_WIDTH / 2; pair++)
            rows[first / 2 + pair] = values + pair * head_dim;
    }
}
#endif

/* The scores of a chunk for some rows, as vectors. */
enum { SCORE_VECTORS = KV_CHUNK / VECTOR_WIDTH };

/* Keep the scores of the tokens that a query attends to; those of others become minus infinity.
 * query: its position, counted from the chunk's first token. */
INLINE void mask_scores(vfloat *scores, int64_t query, int64_t window) {
    const vfloat last = v_set((float)query); /* it attends to (query - window, query] */
    const vfloat before = v_set(window ? (float)(query - window) : NO_SCORE);
#pragma GCC unroll 16
    for (int i = 0; i < SCORE_VECTORS; i++) {
        vfloat token = v_add(v_indices(), v_set((float)(i * VECTOR_WIDTH)));
        vmask is_seen = v_both(v_less_equal(token, last), v_less(before, token));
        scores[i] = v_select(is_seen, scores[i], v_set(-INFINITY));
    }
}

/* What the softmax of a chunk works on. */
typedef struct {
    const PagedAttention *attention;
    Scratch *scratch;
    int64_t position;    /* in the sequence, of the tile's first query */
    int64_t first_token; /* of the chunk, in the sequence */
    int is_masked;       /* not all rows attend to all tokens of the chunk */
    float *sums;         /* of all rows */
} SoftmaxChunk;

/* One chunk of the online softmax, for the rows [row, end_row): softcap and mask the scores, and
 * replace them by their exponentials relative to the row's reference, which `products` multiply.
 * The reference is a score of the row. A larger one takes its place only where exponentials would
 * become large: then the previous sums are rescaled. Neither depends on other rows. */
INLINE void softmax_rows(int is_masked, int products, const SoftmaxChunk *chunk, int64_t row,
                         int64_t end_row) {
    const PagedAttention *a = chunk->attention;
    Scratch *s = chunk->scratch;
    const int64_t group = a->n_heads / a->n_kv_heads;
    for (; row < end_row; row++) {
        float *sums = chunk->sums + row * (SUMS_VALUES + a->value_dim);
        float *scores = s->scores + row * KV_CHUNK;
        float *exp_sums = s->exp_sums + row * VECTOR_WIDTH;
        vfloat x[SCORE_VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < SCORE_VECTORS; i++)
            x[i] = v_load(scores + i * VECTOR_WIDTH);
        if (a->softcap != 0)
            for (int i = 0; i < SCORE_VECTORS; i++)
                x[i] = v_mul(tanh_ps(v_div(x[i], v_set(a->softcap))), v_set(a->softcap));
        if (is_masked)
            mask_scores(x, chunk->position + row / group - chunk->first_token, a->window);
        vfloat max_lanes = x[0];
#pragma GCC unroll 16
        for (int i = 1; i < SCORE_VECTORS; i++)
            max_lanes = v_max(max_lanes, x[i]);
        float largest = v_largest(max_lanes);
        vfloat exp_sum = v_load(exp_sums);
        if (largest > sums[SUMS_MAX] + LARGEST_EXPONENT) {
            vfloat rescale = exp_nonpositive(v_set(sums[SUMS_MAX] - largest));
            sums[SUMS_MAX] = largest;
            exp_sum = v_mul(exp_sum, rescale);
            for (int64_t d = 0; d < a->value_dim; d += VECTOR_WIDTH) {
                vfloat values = load_of_row(sums + SUMS_VALUES, d, a->value_dim);
                store_of_row(sums + SUMS_VALUES, d, a->value_dim, v_mul(values, rescale));
            }
        }
        const vfloat reference = v_set(sums[SUMS_MAX]);
#pragma GCC unroll 16
        for (int i = 0; i < SCORE_VECTORS; i++) {
            vfloat p = exp_nonpositive(v_sub(x[i], reference));
            exp_sum = v_add(exp_sum, p);
#if defined(LEVEL_BF16)
            if (products == PRODUCTS_BF16) {
                uint16_t *weights = (uint16_t *)s->weights + row * KV_CHUNK;
                v_store_bf16(weights + i * VECTOR_WIDTH, p);
                continue;
            }
#endif
            (void)products;
            v_store(scores + i * VECTOR_WIDTH, p);
        }
        v_store(exp_sums, exp_sum);
    }
}

INLINE void online_softmax(int products, const SoftmaxChunk *chunk, int64_t row,
                           int64_t end_row) {
    if (chunk->is_masked)
        softmax_rows(1, products, chunk, row, end_row);
    else
        softmax_rows(0, products, chunk, row, end_row);
}

/* A chunk of keys and values, for all rows of a tile: scores, softmax, sums of the values.
 * next: the chunk after it, which is prefetched; NULL: there is none. */
INLINE void attend_chunk_as(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                            int64_t first_token, const Chunk *chunk, const Chunk *next,
                            float *sums, int kv_type) {
    const int products = products_of(kv_type);
    const int64_t kv_head = chunk->kv_head;
    const int64_t head_dim = a->head_dim;
    const int64_t group = a->n_heads / a->n_kv_heads;
    const int64_t n_rows = tile->n_queries * group;
    const int64_t value_head = a->n_kv_heads + kv_head;
    const float *panels[CHUNK_PANELS] = {NULL};
    const float *rows[KV_CHUNK];
    const int64_t last_query = tile->position + tile->n_queries - 1;
    const int is_masked = first_token + KV_CHUNK > tile->position + 1 ||
                          (a->window && first_token <= last_query - a->window);
    const SoftmaxChunk softmax = {a, s, tile->position, first_token, is_masked, sums};
    if (a->is_latent) {
        load_values(a, kv_head, chunk, s->values, rows, kv_type);
        prefetch_chunk(a, tile, 0, next, kv_type);
        score_latents(n_rows, s->q, head_dim, rows, chunk->begin, chunk->end, s->scores);
        online_softmax(PRODUCTS_F32, &softmax, 0, n_rows);
        add_values(PRODUCTS_F32, n_rows, s->scores, rows, NULL, chunk->begin, chunk->end,
                   a->value_dim, sums);
        return;
    }
    load_keys(a, kv_head, chunk, s->keys, panels, kv_type);
#if defined(LEVEL_AMX)
    if (uses_amx(products, head_dim)) {
        /* The tiles multiply the next rows while vectors compute the exponentials. */
        prefetch_chunk(a, tile, 0, next, kv_type);
        int64_t end = 0;
        for (int64_t row = -AMX_ROWS; row < n_rows; row += AMX_ROWS) {
            int64_t next_row = row + AMX_ROWS;
            if (next_row < n_rows)
                amx_scores((const char *)(s->q + next_row * head_dim / 2), head_dim * 2, panels,
                           first_panel(chunk), end_panel(chunk), s->scores + next_row * KV_CHUNK);
            if (row < 0) {
                prefetch_chunk(a, tile, 1, next, kv_type);
                end = copy_value_pairs(a, value_head, chunk, s->values);
                continue;
            }
            online_softmax(products, &softmax, row, min_int64(next_row, n_rows));
            amx_values(s->weights + row * KV_CHUNK / 2, s->values, end, head_dim,
                       sums + row * (SUMS_VALUES + head_dim));
        }
        return;
    }
#endif
    /* The panels of the cache are multiplied as they are. */
    const int is_direct = kv_type == KV_F32 || products == PRODUCTS_BF16;
    const int prefetches_lines = is_direct && tile->is_only && next != NULL;
    const float *next_keys[CHUNK_PANELS];
    const float *next_values[CHUNK_PANELS];
    if (prefetches_lines)
        find_next_panels(a, 0, chunk, next, next_keys, kv_type);
    else
        prefetch_chunk(a, tile, 0, next, kv_type);
    score_tokens(products, n_rows, s->q, products == PRODUCTS_BF16 ? head_dim / 2 : head_dim,
                 panels, prefetches_lines ? next_keys : NULL, first_panel(chunk), end_panel(chunk),
                 s->scores);
    online_softmax(products, &softmax, 0, n_rows);
    if (prefetches_lines)
        find_next_panels(a, 1, chunk, next, next_values, kv_type);
    else
        prefetch_chunk(a, tile, 1, next, kv_type);
#if defined(LEVEL_BF16)
    if (products == PRODUCTS_BF16) {
        find_value_pairs(a, value_head, chunk, s->values, rows);
        add_values(products, n_rows, s->weights, rows, prefetches_lines ? next_values : NULL,
                   chunk->begin / 2, (chunk->end + 1) / 2, head_dim, sums);
        return;
    }
#endif
    load_values(a, value_head, chunk, s->values, rows, kv_type);
    add_values(products, n_rows, s->scores, rows, prefetches_lines ? next_values : NULL,
               chunk->begin, chunk->end, head_dim, sums);
}

static void attend_chunk(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                         int64_t first_token, const Chunk *chunk, const Chunk *next,
                         float *sums) {
    if (a->kv_type == KV_F32)
        attend_chunk_as(a, s, tile, first_token, chunk, next, sums, KV_F32);
    else if (a->kv_type == KV_BF16)
        attend_chunk_as(a, s, tile, first_token, chunk, next, sums, KV_BF16);
    else if (a->kv_type == KV_F16)
        attend_chunk_as(a, s, tile, first_token, chunk, next, sums, KV_F16);
    else if (a->kv_type == KV_INT8)
        attend_chunk_as(a, s, tile, first_token, chunk, next, sums, KV_INT8);
    else
        attend_chunk_as(a, s, tile, first_token, chunk, next, sums, KV_FP8);
}

/* Where a tile begins to read a segment: with the first token of a chunk. */
INLINE int64_t segment_begin(const PagedAttention *a, const QueryTile *tile, int64_t segment) {
    int64_t oldest = oldest_token(a, tile);
    return oldest > segment * SEGMENT ? oldest / KV_CHUNK * KV_CHUNK : segment * SEGMENT;
}

/* The sums of a tile over the tokens of a segment. following: the chunk that the thread probably
 * reads after all segments that it computes of the tile; NULL: it is not known. */
static void attend_segment(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                           int64_t kv_head, int64_t segment, const Chunk *following,
                           float *sums) {
    int64_t value_dim = a->value_dim;
    int64_t n_rows = tile->n_queries * (a->n_heads / a->n_kv_heads);
    for (int64_t row = 0; row < n_rows; row++) {
        float *of_row = sums + row * (SUMS_VALUES + value_dim);
        memset(of_row, 0, (SUMS_VALUES + value_dim) * sizeof(float));
        of_row[SUMS_MAX] = NO_SCORE;
        v_store(s->exp_sums + row * VECTOR_WIDTH, v_zero());
    }
    int64_t last = tile->position + tile->n_queries - 1; /* the last token of the tile */
    int64_t first = segment_begin(a, tile, segment);
    int64_t end = min_int64((segment + 1) * SEGMENT, last + 1);
#if defined(LEVEL_AMX)
    if (uses_amx(attention_products(a), a->head_dim))
        configure_attention_tiles(n_rows);
#endif
    Chunk chunks[2];
    find_chunk(a, tile, kv_head, first, &chunks[0]);
    int64_t end_of_piece = tile->is_divided ? end : last + 1;
    for (int64_t token = first, i = 0; token < end; token += KV_CHUNK, i ^= 1) {
        const Chunk *next = following;
        if (token + KV_CHUNK < end_of_piece) { /* perhaps of the next segment */
            find_chunk(a, tile, kv_head, token + KV_CHUNK, &chunks[i ^ 1]);
            next = &chunks[i ^ 1];
        }
        attend_chunk(a, s, tile, token, &chunks[i], next, sums);
    }
    for (int64_t row = 0; row < n_rows; row++)
        sums[row * (SUMS_VALUES + value_dim) + SUMS_EXP] =
            v_sum(v_load(s->exp_sums + row * VECTOR_WIDTH));
#if defined(LEVEL_AMX)
    if (uses_amx(attention_products(a), a->head_dim))
        _tile_release();
#endif
}

/* total += the sums of a segment. A segment without any score changes nothing. */
static void merge_sums(int64_t n_rows, int64_t value_dim, const float *segment, float *total) {
    for (int64_t row = 0; row < n_rows; row++) {
        const float *part = segment + row * (SUMS_VALUES + value_dim);
        float *sums = total + row * (SUMS_VALUES + value_dim);
        if (part[SUMS_EXP] == 0)
            continue;
        float largest = part[SUMS_MAX] > sums[SUMS_MAX] ? part[SUMS_MAX] : sums[SUMS_MAX];
        vfloat old_weight = exp_nonpositive(v_set(sums[SUMS_MAX] - largest));
        vfloat new_weight = exp_nonpositive(v_set(part[SUMS_MAX] - largest));
        vfloat old_sum = v_mul(v_set(sums[SUMS_EXP]), old_weight);
        float exp_sum[VECTOR_WIDTH];
        v_store(exp_sum, v_fma(v_set(part[SUMS_EXP]), new_weight, old_sum));
        sums[SUMS_MAX] = largest;
        sums[SUMS_EXP] = exp_sum[0];
        for (int64_t d = 0; d < value_dim; d += VECTOR_WIDTH) {
            vfloat old = load_of_row(sums + SUMS_VALUES, d, value_dim);
            vfloat new = load_of_row(part + SUMS_VALUES, d, value_dim);
            vfloat sum = v_fma(new, new_weight, v_mul(old, old_weight));
            store_of_row(sums + SUMS_VALUES, d, value_dim, sum);
        }
    }
}

static void load_queries(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                         int64_t kv_head) {
    const int64_t group = a->n_heads / a->n_kv_heads;
    const int64_t head_dim = a->head_dim;
    for (int64_t row = 0; row < tile->n_queries * group; row++) {
        int64_t token = tile->first_token + tile->first_query + row / group;
        int64_t head = kv_head * group + row % group;
        const float *q = a->q + token * a->q_stride + head * head_dim;
        for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
            vfloat scaled = v_mul(load_of_row(q, d, head_dim), v_set(a->scale));
#if defined(LEVEL_BF16)
            if (attention_products(a) == PRODUCTS_BF16) {
                uint16_t *to = (uint16_t *)s->q + row * head_dim + d;
                uint16_t edge[VECTOR_WIDTH];
                v_store_bf16(head_dim - d < VECTOR_WIDTH ? edge : to, scaled);
                if (head_dim - d < VECTOR_WIDTH)
                    memcpy(to, edge, (head_dim - d) * sizeof *to);
                continue;
            }
#endif
            store_of_row(s->q + row * head_dim, d, head_dim, scaled);
        }
    }
}

/* The sums before the first segment: the sink is a first score, without a value. */
static void start_total(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head) {
    int64_t group = a->n_heads / a->n_kv_heads;
    for (int64_t row = 0; row < tile->n_queries * group; row++) {
        int64_t head = kv_head * group + row % group;
        float *sums = s->total + row * (SUMS_VALUES + a->value_dim);
        memset(sums, 0, (SUMS_VALUES + a->value_dim) * sizeof(float));
        sums[SUMS_MAX] = a->sinks && a->sinks[head] > NO_SCORE ? a->sinks[head] : NO_SCORE;
        sums[SUMS_EXP] = a->sinks ? 1 : 0;
    }
}

static void write_outputs(const PagedAttention *a, const Scratch *s, const QueryTile *tile,
                          int64_t kv_head) {
    int64_t group = a->n_heads / a->n_kv_heads;
    for (int64_t row = 0; row < tile->n_queries * group; row++) {
        int64_t token = tile->first_token + tile->first_query + row / group;
        int64_t head = kv_head * group + row % group;
        const float *sums = s->total + row * (SUMS_VALUES + a->value_dim);
        float *out = a->out + (token * a->n_heads + head) * a->value_dim;
        const vfloat exp_sum = v_set(sums[SUMS_EXP]);
        for (int64_t d = 0; d < a->value_dim; d += VECTOR_WIDTH) {
            vfloat values = load_of_row(sums + SUMS_VALUES, d, a->value_dim);
            store_of_row(out, d, a->value_dim, v_div(values, exp_sum));
        }
    }
}

/* The tiles of all sequences. */
typedef struct {
    const PagedAttention *attention;
    const QueryTile *tiles;
    int64_t n_tiles;
    int64_t n_pieces;
    atomic_int *out_of_memory;
} AttentionOperation;

/* What a thread does at once: a tile, or one segment of it, for the query heads of one key-value
 * head. */
typedef struct {
    const QueryTile *tile;
    int64_t kv_head;
    int64_t segment; /* counted from the tile's first one */
} Piece;

static Piece find_piece(const AttentionOperation *o, int64_t number) {
    int64_t low = 0;
    for (int64_t high = o->n_tiles; high - low > 1;) { /* the tile that has this piece */
        int64_t middle = (low + high) / 2;
        if (o->tiles[middle].first_piece <= number)
            low = middle;
        else
            high = middle;
    }
    const QueryTile *tile = &o->tiles[low];
    int64_t n_segments = tile->is_divided ? tile->n_segments : 1;
    number -= tile->first_piece;
    return (Piece){tile, number / n_segments, number % n_segments};
}

/* All segments of a tile, for the query heads of one key-value head. */
static void attend_tile(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head, const Chunk *following) {
    int64_t n_rows = tile->n_queries * (a->n_heads / a->n_kv_heads);
    load_queries(a, s, tile, kv_head);
    start_total(a, s, tile, kv_head);
    for (int64_t i = 0; i < tile->n_segments; i++) {
        attend_segment(a, s, tile, kv_head, tile->first_segment + i, following, s->segment);
        merge_sums(n_rows, a->value_dim, s->segment, s->total);
    }
    write_outputs(a, s, tile, kv_head);
}

/* The rows of a divided tile's part, as many as tiles of AMX write. */
static int64_t part_rows(int64_t rows) {
    return (rows + 15) / 16 * 16;
}

/* One segment of a tile. The thread that computes the last one merges all. */
static void attend_part(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head, int64_t segment, const Chunk *following) {
    int64_t n_rows = tile->n_queries * (a->n_heads / a->n_kv_heads);
    int64_t part_size = part_rows(n_rows) * (SUMS_VALUES + a->value_dim);
    float *parts = tile->parts + kv_head * tile->n_segments * part_size;
    load_queries(a, s, tile, kv_head);
    attend_segment(a, s, tile, kv_head, tile->first_segment + segment, following,
                   parts + segment * part_size);
    if (atomic_fetch_sub(&tile->left[kv_head], 1) > 1)
        return;
    start_total(a, s, tile, kv_head);
    for (int64_t i = 0; i < tile->n_segments; i++)
        merge_sums(n_rows, a->value_dim, parts + i * part_size, s->total);
    write_outputs(a, s, tile, kv_head);
}

static void attention_piece(const void *operation, int64_t piece) {
    const AttentionOperation *o = operation;
    Scratch *scratch = thread_scratch(SCRATCH_ATTENTION, sizeof *scratch);
    if (scratch == NULL) {
        atomic_store(o->out_of_memory, 1);
        return;
    }
    /* In reverse order: the last tiles of a prompt attend to the most tokens and run longest, and
       what threads take of the shares of others are shorter ones. */
    int64_t number = o->n_pieces - 1 - piece;
    Piece own = find_piece(o, number);
    Chunk chunk;
    const Chunk *following = NULL;
    /* In a decode step, the piece before is the thread's next one, unless it takes others'. A
       prompt's next tile reads chunks that are in the caches. */
    if (number > 0 && own.tile->is_only) {
        Piece next = find_piece(o, number - 1);
        find_chunk(o->attention, next.tile, next.kv_head,
                   segment_begin(o->attention, next.tile, next.tile->first_segment + next.segment),
                   &chunk);
        following = &chunk;
    }
    if (own.tile->is_divided)
        attend_part(o->attention, scratch, own.tile, own.kv_head, own.segment, following);
    else
        attend_tile(o->attention, scratch, own.tile, own.kv_head, following);
}

static void cut_into_tiles(const PagedAttention *a, int64_t tile_queries, QueryTile *tiles) {
    int64_t n_tiles = 0;
    int64_t first_token = 0;
    for (int64_t i = 0; i < a->n_sequences; i++) {
        for (int64_t query = 0; query < a->query_lens[i]; query += tile_queries) {
            QueryTile *tile = &tiles[n_tiles++];
            int64_t left = a->query_lens[i] - query;
            int64_t position = a->seq_lens[i] - left;
            int64_t n_queries = left < tile_queries ? left : tile_queries;
            int64_t oldest = a->window && position >= a->window ? position - a->window + 1 : 0;
            int64_t first_segment = oldest / SEGMENT;
            *tile = (QueryTile){
                .sequence = i,
                .first_token = first_token,
                .first_query = query,
                .n_queries = n_queries,
                .is_only = n_queries == a->query_lens[i],
                .position = position,
                .first_segment = first_segment,
                .n_segments = (position + n_queries - 1) / SEGMENT + 1 - first_segment,
            };
        }
        first_token += a->query_lens[i];
    }
}

/* Divide the tiles that are a large part of all the work, so that all threads have some, and number
 * the pieces. Returns the number of pieces, or -1 when out of memory. */
static int64_t divide_tiles(const PagedAttention *a, QueryTile *tiles, int64_t n_tiles) {
    int64_t group = a->n_heads / a->n_kv_heads;
    int64_t work = 0;
    for (int64_t i = 0; i < n_tiles; i++)
        work += tiles[i].n_queries * tiles[i].n_segments * a->n_kv_heads;
    int64_t largest = work / (PIECES_PER_THREAD * num_threads());
    int64_t n_pieces = 0;
    size_t bytes = 0;
    for (int64_t i = 0; i < n_tiles; i++) {
        QueryTile *tile = &tiles[i];
        tile->is_divided = num_threads() > 1 && tile->n_segments > 1 &&
                           tile->n_queries * tile->n_segments > largest;
        tile->first_piece = n_pieces;
        n_pieces += a->n_kv_heads * (tile->is_divided ? tile->n_segments : 1);
        if (tile->is_divided) {
            int64_t rows = a->n_kv_heads * tile->n_segments * part_rows(tile->n_queries * group);
            bytes += rows * (SUMS_VALUES + a->value_dim) * sizeof(float);
            bytes += a->n_kv_heads * sizeof(atomic_int);
        }
    }
    if (bytes == 0)
        return n_pieces;
    char *memory = thread_scratch(SCRATCH_PARTS, bytes);
    if (memory == NULL)
        return -1;
    for (int64_t i = 0; i < n_tiles; i++) {
        QueryTile *tile = &tiles[i];
        if (!tile->is_divided)
            continue;
        int64_t rows = a->n_kv_heads * tile->n_segments * part_rows(tile->n_queries * group);
        tile->parts = (float *)memory;
        memory += rows * (SUMS_VALUES + a->value_dim) * sizeof(float);
        tile->left = (atomic_int *)memory;
        memory += a->n_kv_heads * sizeof(atomic_int);
        for (int64_t head = 0; head < a->n_kv_heads; head++)
            atomic_init(&tile->left[head], (int)tile->n_segments);
    }
    return n_pieces;
}

static int paged_attention(const PagedAttention *a) {
    int64_t tile_queries = TILE_ROWS / (a->n_heads / a->n_kv_heads);
    int64_t n_tiles = 0;
    for (int64_t i = 0; i < a->n_sequences; i++)
        n_tiles += (a->query_lens[i] + tile_queries - 1) / tile_queries;
    QueryTile *tiles = malloc((n_tiles + 1) * sizeof *tiles);
    if (tiles == NULL)
        return 0;
    cut_into_tiles(a, tile_queries, tiles);
    int64_t n_pieces = divide_tiles(a, tiles, n_tiles);
    atomic_int out_of_memory = n_pieces < 0;
    AttentionOperation operation = {a, tiles, n_tiles, n_pieces, &out_of_memory};
    run_pieces(n_pieces, attention_piece, &operation);
    free(tiles);
    return !atomic_load(&out_of_memory);
}
