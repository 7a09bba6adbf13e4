/* Attention over a paged KV cache, with online softmax (arXiv 1805.02867).
 *
 * A tile is some queries of one sequence times the heads that share a key-value head; they read its
 * keys and values once. The keys come in chunks of KV_CHUNK tokens, which are transposed first, so
 * that a vector holds the scores of several tokens and no sum goes across a vector.
 *
 * The tokens of a sequence are divided into segments. Each row of a tile gets the softmax's sums of
 * each segment, and these are merged in the order of the segments. So the segments may run on
 * different threads (one long sequence uses all of them) or one after the other: the result is the
 * same, bit for bit.
 */

#include <stdatomic.h>

enum {
    KV_CHUNK = 64,        /* tokens in a chunk of keys and values; a multiple of the block size */
    SEGMENT = 256,        /* tokens; a multiple of KV_CHUNK */
    TILE_ROWS = 48,       /* rows of a tile: queries times heads */
    ROWS_AT_ONCE = 3,     /* the sums of this many rows fit into registers, beside four vectors */
    PIECES_PER_THREAD = 4 /* a tile that would be a larger part is divided into its segments */
};
static const float NO_SCORE = -1e30f; /* not -inf, because -inf - -inf is NaN */

/* The sums of a row of a tile: the largest score, the sum of the exponentials, and the weighted sum
 * of the values. */
enum { SUMS_MAX, SUMS_EXP, SUMS_VALUES = 16, MAX_SUMS = SUMS_VALUES + MAX_HEAD_DIM };

/* The working memory of a thread. */
typedef struct {
    float q[TILE_ROWS * MAX_HEAD_DIM];     /* the queries, scaled */
    float total[TILE_ROWS * MAX_SUMS];     /* the sums of all segments */
    float segment[TILE_ROWS * MAX_SUMS];   /* the sums of a segment */
    float scores[TILE_ROWS * KV_CHUNK];    /* of the current chunk; then their exponentials */
    float keys[MAX_HEAD_DIM * KV_CHUNK];   /* transposed: [head_dim, KV_CHUNK] */
    float values[KV_CHUNK * MAX_HEAD_DIM]; /* as floats, where the cache has another type */
} Scratch;

/* Some queries of a sequence, for all heads. */
typedef struct {
    int64_t sequence;
    int64_t first_token;   /* of the sequence, among the tokens of the step */
    int64_t first_query;   /* of the tile, among the queries of the sequence */
    int64_t n_queries;
    int64_t position;      /* in the sequence, of the first query */
    int64_t first_segment; /* the first one that a query attends to */
    int64_t n_segments;
    int64_t first_piece; /* the tile's pieces: for each key-value head one, or one a segment */
    int is_divided;      /* each segment is a piece */
    float *parts;        /* is_divided: [n_kv_heads, n_segments, rows, sums] */
    atomic_int *left;    /* is_divided: [n_kv_heads], the segments that have not ended */
} QueryTile;

/* Vector j of n_vectors; a single one may be the last part of a row, of which `size` are left. */
INLINE vfloat load_of_part(const float *part, int j, int n_vectors, int64_t size) {
    return n_vectors == 1 ? load_of_row(part, 0, size) : v_load(part + VECTOR_WIDTH * j);
}

/* out[i, column : column + VECTOR_WIDTH n_vectors] += factors[i, begin:end] rows[begin:end], for
 * n_rows rows i of `factors` and `out`. Without `adds`, out is overwritten. size: of a row. */
INLINE void add_columns(int n_rows, int n_vectors, const float *factors, int64_t factors_stride,
                        const float *const *rows, int64_t begin, int64_t end, int64_t column,
                        int64_t size, float *out, int64_t out_stride, int adds) {
    vfloat sums[ROWS_AT_ONCE][4];
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            sums[i][j] = adds ? load_of_part(out + i * out_stride + column, j, n_vectors,
                                             size - column)
                              : v_zero();
    for (int64_t t = begin; t < end; t++) {
        const float *row = rows[t] + column;
#pragma GCC unroll 3
        for (int i = 0; i < n_rows; i++) {
            vfloat factor = v_set(factors[i * factors_stride + t]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                sums[i][j] = v_fma(factor, load_of_part(row, j, n_vectors, size - column),
                                   sums[i][j]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            if (n_vectors == 1)
                store_of_row(out + i * out_stride + column, 0, size - column, sums[i][j]);
            else
                v_store(out + i * out_stride + column + VECTOR_WIDTH * j, sums[i][j]);
}

INLINE void add_products_of_rows(int n_rows, const float *factors, int64_t factors_stride,
                                 const float *const *rows, int64_t begin, int64_t end,
                                 int64_t size, float *out, int64_t out_stride, int adds) {
    int64_t column = 0;
    for (; column + 4 * VECTOR_WIDTH <= size; column += 4 * VECTOR_WIDTH)
        add_columns(n_rows, 4, factors, factors_stride, rows, begin, end, column, size, out,
                    out_stride, adds);
    for (; column < size; column += VECTOR_WIDTH)
        add_columns(n_rows, 1, factors, factors_stride, rows, begin, end, column, size, out,
                    out_stride, adds);
}

/* out[i] += factors[i, begin:end] rows[begin:end], or without `adds` =, for i < n_rows. */
INLINE void add_products(int64_t n_rows, const float *factors, int64_t factors_stride,
                         const float *const *rows, int64_t begin, int64_t end, int64_t size,
                         float *out, int64_t out_stride, int adds) {
    int64_t i = 0;
    for (; i + 3 <= n_rows; i += 3)
        add_products_of_rows(3, factors + i * factors_stride, factors_stride, rows, begin, end,
                             size, out + i * out_stride, out_stride, adds);
    if (n_rows - i == 2)
        add_products_of_rows(2, factors + i * factors_stride, factors_stride, rows, begin, end,
                             size, out + i * out_stride, out_stride, adds);
    if (n_rows - i == 1)
        add_products_of_rows(1, factors + i * factors_stride, factors_stride, rows, begin, end,
                             size, out + i * out_stride, out_stride, adds);
}

static void score_tokens(int64_t n_rows, const float *q, int64_t head_dim,
                         const float *const *keys, float *scores) {
    add_products(n_rows, q, head_dim, keys, 0, head_dim, KV_CHUNK, scores, KV_CHUNK, 0);
}

static void add_values(int64_t n_rows, const float *weights, const float *const *values,
                       int64_t begin, int64_t end, int64_t head_dim, float *sums) {
    add_products(n_rows, weights, KV_CHUNK, values, begin, end, head_dim, sums + SUMS_VALUES,
                 SUMS_VALUES + head_dim, 1);
}

/* The tokens [begin, end) of a chunk in the cache. */
typedef struct {
    int64_t begin;
    int64_t end;
    int64_t slots[KV_CHUNK]; /* where each token is in the cache */
} Chunk;

static void find_chunk(const PagedAttention *a, const int64_t *block_table, int64_t first_token,
                       int64_t oldest, int64_t last, Chunk *chunk) {
    chunk->begin = oldest > first_token ? oldest - first_token : 0;
    chunk->end = last - first_token + 1 < KV_CHUNK ? last - first_token + 1 : KV_CHUNK;
    for (int64_t t = chunk->begin; t < chunk->end; t++) {
        int64_t token = first_token + t;
        chunk->slots[t] =
            block_table[token / a->block_size] * a->block_size + token % a->block_size;
    }
}

/* What the elements of a token are multiplied by. */
INLINE float scale_of_token(const PagedAttention *a, int64_t head, int64_t slot) {
    return a->static_scales ? a->scales[head]
                            : a->scales[head * (a->head_stride / a->head_dim) + slot];
}

/* Transpose the keys of a chunk, and prefetch the next chunk's keys and values: the hardware does
 * not, because the addresses of blocks follow no pattern. next: NULL: there is none. */
INLINE void load_keys(const PagedAttention *a, int64_t head, const Chunk *chunk, const Chunk *next,
                      float *to, int kv_type) {
    const int64_t size = kv_element_size(kv_type);
    const int64_t head_dim = a->head_dim;
    const char *keys = a->kv + head * a->head_stride * size;
    int64_t to_values = a->n_kv_heads * a->head_stride * size;
    for (int64_t t = chunk->begin / VECTOR_WIDTH * VECTOR_WIDTH; t < chunk->end;
         t += VECTOR_WIDTH) {
        const char *tokens[VECTOR_WIDTH];
        const char *next_tokens[VECTOR_WIDTH];
        float scales[VECTOR_WIDTH];
        for (int i = 0; i < VECTOR_WIDTH; i++) {
            /* A token outside of the chunk is replaced by one of it; its score is masked. */
            int64_t token = t + i < chunk->begin ? chunk->begin : t + i;
            token = token < chunk->end ? token : chunk->end - 1;
            tokens[i] = keys + chunk->slots[token] * head_dim * size;
            if (kv_is_quantized(kv_type))
                scales[i] = scale_of_token(a, head, chunk->slots[token]);
            next_tokens[i] = NULL;
            if (next && t + i < next->end)
                next_tokens[i] = keys + next->slots[t + i] * head_dim * size;
        }
        for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
            vfloat square[VECTOR_WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < VECTOR_WIDTH; i++) {
                square[i] = load_of_token(tokens[i], d, head_dim, kv_type);
                if (kv_is_quantized(kv_type))
                    square[i] = v_mul(square[i], v_set(scales[i]));
            }
            v_transpose(square);
            if (head_dim - d >= VECTOR_WIDTH) {
#pragma GCC unroll 16
                for (int i = 0; i < VECTOR_WIDTH; i++)
                    v_store(to + (d + i) * KV_CHUNK + t, square[i]);
            } else {
                for (int i = 0; i < head_dim - d; i++)
                    v_store(to + (d + i) * KV_CHUNK + t, square[i]);
            }
            if (next && d * size % 64 == 0)
                for (int i = 0; i < VECTOR_WIDTH && next_tokens[i]; i++) {
                    __builtin_prefetch(next_tokens[i] + d * size, 0, 2);
                    __builtin_prefetch(next_tokens[i] + to_values + d * size, 0, 2);
                }
        }
    }
}

/* The addresses of the values of each token of a chunk: in the cache, or of their copies as floats.
 */
INLINE void load_values(const PagedAttention *a, int64_t head, const Chunk *chunk, float *to,
                        const float **values, int kv_type) {
    const int64_t size = kv_element_size(kv_type);
    const int64_t head_dim = a->head_dim;
    const char *of_head = a->kv + head * a->head_stride * size;
    for (int64_t t = chunk->begin; t < chunk->end; t++) {
        const char *token = of_head + chunk->slots[t] * head_dim * size;
        if (kv_type == KV_F32) {
            values[t] = (const float *)token;
            continue;
        }
        float scale = kv_is_quantized(kv_type) ? scale_of_token(a, head, chunk->slots[t]) : 1;
        values[t] = to + t * head_dim;
        for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
            vfloat x = load_of_token(token, d, head_dim, kv_type);
            if (kv_is_quantized(kv_type))
                x = v_mul(x, v_set(scale));
            store_of_row(to + t * head_dim, d, head_dim, x);
        }
    }
}

INLINE void load_chunk_as(const PagedAttention *a, int64_t kv_head, const Chunk *chunk,
                          const Chunk *next, Scratch *s, const float **values, int kv_type) {
    load_keys(a, kv_head, chunk, next, s->keys, kv_type);
    load_values(a, a->n_kv_heads + kv_head, chunk, s->values, values, kv_type);
}

static void load_chunk(const PagedAttention *a, int64_t kv_head, const Chunk *chunk,
                       const Chunk *next, Scratch *s, const float **values) {
    if (a->kv_type == KV_F32)
        load_chunk_as(a, kv_head, chunk, next, s, values, KV_F32);
    else if (a->kv_type == KV_BF16)
        load_chunk_as(a, kv_head, chunk, next, s, values, KV_BF16);
    else if (a->kv_type == KV_F16)
        load_chunk_as(a, kv_head, chunk, next, s, values, KV_F16);
    else if (a->kv_type == KV_INT8)
        load_chunk_as(a, kv_head, chunk, next, s, values, KV_INT8);
    else
        load_chunk_as(a, kv_head, chunk, next, s, values, KV_FP8);
}

/* One chunk of the online softmax: softcap and mask the scores, replace them by their exponentials,
 * and rescale the previous sums to the new maximum.
 * position, first_token: the positions in the sequence of the tile's first query and of the chunk's
 * first token. */
static void online_softmax(const PagedAttention *a, float *chunk_scores, int64_t n_rows,
                           int64_t group, int64_t position, int64_t first_token, float *sums) {
    const vfloat lanes = v_indices();
    const vfloat minus_infinity = v_set(-INFINITY);
    for (int64_t row = 0; row < n_rows; row++, sums += SUMS_VALUES + a->head_dim) {
        float *scores = chunk_scores + row * KV_CHUNK;
        int64_t query = position + row / group; /* it attends to (query - window, query] */
        float last = (float)(query - first_token);
        float before = a->window ? (float)(query - a->window - first_token) : NO_SCORE;
        vfloat max_lanes = minus_infinity;
        for (int64_t t = 0; t < KV_CHUNK; t += VECTOR_WIDTH) {
            vfloat x = v_load(scores + t);
            vfloat token = v_add(lanes, v_set((float)t));
            if (a->softcap != 0) {
                vfloat cap = v_set(a->softcap);
                x = v_mul(tanh_ps(v_div(x, cap)), cap);
            }
            vmask not_after = v_less_equal(token, v_set(last));
            vmask in_window = v_less(v_set(before), token);
            x = v_select(v_both(not_after, in_window), x, minus_infinity);
            v_store(scores + t, x);
            max_lanes = v_max(max_lanes, x);
        }
        float largest = v_largest(max_lanes);
        if (!(largest > sums[SUMS_MAX]))
            largest = sums[SUMS_MAX];
        float rescale = 1.0f;
        if (sums[SUMS_MAX] != largest)
            rescale = expf(sums[SUMS_MAX] - largest);
        vfloat exp_sum = v_zero();
        vfloat offset = v_set(largest);
        for (int64_t t = 0; t < KV_CHUNK; t += VECTOR_WIDTH) {
            vfloat p = exp_nonpositive(v_sub(v_load(scores + t), offset));
            v_store(scores + t, p);
            exp_sum = v_add(exp_sum, p);
        }
        sums[SUMS_EXP] = sums[SUMS_EXP] * rescale + v_sum(exp_sum);
        sums[SUMS_MAX] = largest;
        if (rescale != 1.0f)
            for (int64_t d = 0; d < a->head_dim; d++)
                sums[SUMS_VALUES + d] *= rescale;
    }
}

/* The sums of a tile over the tokens of a segment. */
static void attend_segment(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                           int64_t kv_head, int64_t segment, float *sums) {
    int64_t group = a->n_heads / a->n_kv_heads; /* query heads per key-value head */
    int64_t head_dim = a->head_dim;
    int64_t n_rows = tile->n_queries * group;
    for (int64_t row = 0; row < n_rows; row++) {
        float *of_row = sums + row * (SUMS_VALUES + head_dim);
        memset(of_row, 0, (SUMS_VALUES + head_dim) * sizeof(float));
        of_row[SUMS_MAX] = NO_SCORE;
    }
    const int64_t *block_table = a->block_tables + a->table_starts[tile->sequence];
    int64_t oldest = a->window ? tile->position - a->window + 1 : 0;
    int64_t last = tile->position + tile->n_queries - 1; /* the last token of the tile */
    int64_t first = segment * SEGMENT;
    int64_t end = first + SEGMENT < last + 1 ? first + SEGMENT : last + 1;
    if (oldest > first)
        first = oldest / KV_CHUNK * KV_CHUNK;
    const float *keys[MAX_HEAD_DIM]; /* a row for each dimension */
    for (int64_t d = 0; d < head_dim; d++)
        keys[d] = s->keys + d * KV_CHUNK;
    Chunk chunks[2];
    find_chunk(a, block_table, first, oldest, last, &chunks[0]);
    for (int64_t token = first, i = 0; token < end; token += KV_CHUNK, i ^= 1) {
        const Chunk *chunk = &chunks[i];
        Chunk *next = NULL;
        if (token + KV_CHUNK < end) {
            next = &chunks[i ^ 1];
            find_chunk(a, block_table, token + KV_CHUNK, oldest, last, next);
        }
        const float *values[KV_CHUNK];
        load_chunk(a, kv_head, chunk, next, s, values);
        score_tokens(n_rows, s->q, head_dim, keys, s->scores);
        online_softmax(a, s->scores, n_rows, group, tile->position, token, sums);
        add_values(n_rows, s->scores, values, chunk->begin, chunk->end, head_dim, sums);
    }
}

/* total += the sums of a segment. A segment without any score changes nothing. */
static void merge_sums(int64_t n_rows, int64_t head_dim, const float *segment, float *total) {
    for (int64_t row = 0; row < n_rows; row++) {
        const float *part = segment + row * (SUMS_VALUES + head_dim);
        float *sums = total + row * (SUMS_VALUES + head_dim);
        if (part[SUMS_EXP] == 0)
            continue;
        float largest = part[SUMS_MAX] > sums[SUMS_MAX] ? part[SUMS_MAX] : sums[SUMS_MAX];
        float old_weight = expf(sums[SUMS_MAX] - largest);
        float new_weight = expf(part[SUMS_MAX] - largest);
        sums[SUMS_MAX] = largest;
        sums[SUMS_EXP] = fmaf(part[SUMS_EXP], new_weight, sums[SUMS_EXP] * old_weight);
        for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
            vfloat old = load_of_row(sums + SUMS_VALUES, d, head_dim);
            vfloat new = load_of_row(part + SUMS_VALUES, d, head_dim);
            vfloat sum = v_fma(new, v_set(new_weight), v_mul(old, v_set(old_weight)));
            store_of_row(sums + SUMS_VALUES, d, head_dim, sum);
        }
    }
}

static void load_queries(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                         int64_t kv_head) {
    int64_t group = a->n_heads / a->n_kv_heads;
    for (int64_t row = 0; row < tile->n_queries * group; row++) {
        int64_t token = tile->first_token + tile->first_query + row / group;
        int64_t head = kv_head * group + row % group;
        const float *q = a->q + token * a->q_stride + head * a->head_dim;
        for (int64_t d = 0; d < a->head_dim; d++)
            s->q[row * a->head_dim + d] = q[d] * a->scale;
    }
}

/* The sums before the first segment: the sink is a first score, without a value. */
static void start_total(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head) {
    int64_t group = a->n_heads / a->n_kv_heads;
    for (int64_t row = 0; row < tile->n_queries * group; row++) {
        int64_t head = kv_head * group + row % group;
        float *sums = s->total + row * (SUMS_VALUES + a->head_dim);
        memset(sums, 0, (SUMS_VALUES + a->head_dim) * sizeof(float));
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
        const float *sums = s->total + row * (SUMS_VALUES + a->head_dim);
        float *out = a->out + (token * a->n_heads + head) * a->head_dim;
        for (int64_t d = 0; d < a->head_dim; d++)
            out[d] = sums[SUMS_VALUES + d] / sums[SUMS_EXP];
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

/* All segments of a tile, for the query heads of one key-value head. */
static void attend_tile(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head) {
    int64_t n_rows = tile->n_queries * (a->n_heads / a->n_kv_heads);
    load_queries(a, s, tile, kv_head);
    start_total(a, s, tile, kv_head);
    for (int64_t i = 0; i < tile->n_segments; i++) {
        attend_segment(a, s, tile, kv_head, tile->first_segment + i, s->segment);
        merge_sums(n_rows, a->head_dim, s->segment, s->total);
    }
    write_outputs(a, s, tile, kv_head);
}

/* One segment of a tile. The thread that computes the last one merges all. */
static void attend_part(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t kv_head, int64_t segment) {
    int64_t n_rows = tile->n_queries * (a->n_heads / a->n_kv_heads);
    int64_t part_size = n_rows * (SUMS_VALUES + a->head_dim);
    float *parts = tile->parts + kv_head * tile->n_segments * part_size;
    load_queries(a, s, tile, kv_head);
    attend_segment(a, s, tile, kv_head, tile->first_segment + segment,
                   parts + segment * part_size);
    if (atomic_fetch_sub(&tile->left[kv_head], 1) > 1)
        return;
    start_total(a, s, tile, kv_head);
    for (int64_t i = 0; i < tile->n_segments; i++)
        merge_sums(n_rows, a->head_dim, parts + i * part_size, s->total);
    write_outputs(a, s, tile, kv_head);
}

static void attention_piece(const void *operation, int64_t piece) {
    const AttentionOperation *o = operation;
    Scratch *scratch = thread_scratch(SCRATCH_ATTENTION, sizeof *scratch);
    if (scratch == NULL) {
        atomic_store(o->out_of_memory, 1);
        return;
    }
    /* In reverse order: the last tiles of a prompt attend to the most tokens and run longest. */
    int64_t number = o->n_pieces - 1 - piece;
    int64_t low = 0;
    for (int64_t high = o->n_tiles; high - low > 1;) { /* the tile that has this piece */
        int64_t middle = (low + high) / 2;
        if (o->tiles[middle].first_piece <= number)
            low = middle;
        else
            high = middle;
    }
    const QueryTile *tile = &o->tiles[low];
    number -= tile->first_piece;
    if (tile->is_divided)
        attend_part(o->attention, scratch, tile, number / tile->n_segments,
                    number % tile->n_segments);
    else
        attend_tile(o->attention, scratch, tile, number);
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
            int64_t rows = a->n_kv_heads * tile->n_segments * tile->n_queries * group;
            bytes += rows * (SUMS_VALUES + a->head_dim) * sizeof(float);
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
        int64_t rows = a->n_kv_heads * tile->n_segments * tile->n_queries * group;
        tile->parts = (float *)memory;
        memory += rows * (SUMS_VALUES + a->head_dim) * sizeof(float);
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
