/* Attention over a paged KV cache, with online softmax (arXiv 1805.02867).
 *
 * A thread takes a tile: some queries of one sequence times the heads that share a key-value head.
 * It visits the keys in chunks of KV_CHUNK tokens. For each row of the tile it keeps the largest
 * score so far, the sum of the exponentials, and the weighted sum of the values.
 */

enum {
    KV_CHUNK = 64,   /* tokens in a chunk of keys and values; a multiple of the block size */
    TILE_ROWS = 48,  /* rows of a tile: queries times heads */
    ROWS_AT_ONCE = 3 /* the sums of this many rows fit into registers, beside four vectors */
};
static const float NO_SCORE = -1e30f; /* not -inf, because -inf - -inf is NaN */

/* The working memory of a thread. */
typedef struct {
    float q[TILE_ROWS * MAX_HEAD_DIM];     /* the queries, scaled */
    float acc[TILE_ROWS * MAX_HEAD_DIM];   /* weighted sums of the values */
    float scores[TILE_ROWS * KV_CHUNK];    /* of the current chunk; then their exponentials */
    float keys[KV_CHUNK * MAX_HEAD_DIM];   /* dequantized */
    float values[KV_CHUNK * MAX_HEAD_DIM]; /* dequantized */
    float max_score[TILE_ROWS];
    float exp_sum[TILE_ROWS];
} Scratch;

/* The first query of a tile. */
typedef struct {
    int64_t sequence;
    int64_t first_token; /* of the sequence, among the tokens of the step */
    int64_t first_query; /* of the tile, among the queries of the sequence */
} QueryTile;

/* scores[row, 0:4] = q[row] keys[0:4]'. */
INLINE void score_four_keys(int n_rows, const float *q, const float *keys, int64_t head_dim,
                            float *scores) {
    vfloat acc[ROWS_AT_ONCE][4];
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++)
            acc[i][t] = v_zero();
    for (int64_t d = 0; d < head_dim; d += VECTOR_WIDTH) {
        vfloat key[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++)
            key[t] = load_of_row(keys + t * head_dim, d, head_dim);
#pragma GCC unroll 3
        for (int i = 0; i < n_rows; i++) {
            vfloat query = load_of_row(q + i * head_dim, d, head_dim);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++)
                acc[i][t] = v_fma(query, key[t], acc[i][t]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++)
            scores[i * KV_CHUNK + t] = v_sum(acc[i][t]);
}

/* Vector j of n_vectors; a single one may be the last part of a row, of which `size` are left. */
INLINE vfloat load_of_part(const float *part, int j, int n_vectors, int64_t size) {
    return n_vectors == 1 ? load_of_row(part, 0, size) : v_load(part + VECTOR_WIDTH * j);
}

/* out[row, d : d + VECTOR_WIDTH n_vectors] += weights[row, begin:end] values[begin:end].
 * blocks: the address of the values of each block of the chunk. */
INLINE void accumulate_columns(int n_rows, int n_vectors, const float *weights,
                               const float *const *blocks, int64_t block_size, int64_t begin,
                               int64_t end, int64_t head_dim, int64_t d, float *out) {
    vfloat acc[ROWS_AT_ONCE][4];
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            acc[i][j] = load_of_part(out + i * head_dim + d, j, n_vectors, head_dim - d);
    for (int64_t t = begin; t < end;) {
        const float *v = blocks[t / block_size] + (t % block_size) * head_dim + d;
        int64_t block_end = (t / block_size + 1) * block_size;
        if (block_end > end)
            block_end = end;
        for (; t < block_end; t++, v += head_dim)
#pragma GCC unroll 3
            for (int i = 0; i < n_rows; i++) {
                vfloat weight = v_set(weights[i * KV_CHUNK + t]);
#pragma GCC unroll 4
                for (int j = 0; j < n_vectors; j++)
                    acc[i][j] = v_fma(
                        weight, load_of_part(v, j, n_vectors, head_dim - d), acc[i][j]);
            }
    }
#pragma GCC unroll 3
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            if (n_vectors == 1)
                store_of_row(out + i * head_dim + d, 0, head_dim - d, acc[i][j]);
            else
                v_store(out + i * head_dim + d + VECTOR_WIDTH * j, acc[i][j]);
}

/* out[row] += weights[row, begin:end] values[begin:end], for all of head_dim. */
INLINE void accumulate_values(int n_rows, const float *weights, const float *const *blocks,
                              int64_t block_size, int64_t begin, int64_t end, int64_t head_dim,
                              float *out) {
    int64_t d = 0;
    for (; d + 4 * VECTOR_WIDTH <= head_dim; d += 4 * VECTOR_WIDTH)
        accumulate_columns(n_rows, 4, weights, blocks, block_size, begin, end, head_dim, d, out);
    for (; d < head_dim; d += VECTOR_WIDTH)
        accumulate_columns(n_rows, 1, weights, blocks, block_size, begin, end, head_dim, d, out);
}

/* The first n_valid tokens of a block of keys or values, as float32. Returns an address in the
 * cache, or `to` with the dequantized tokens. */
static const float *load_block(const PagedAttention *a, int64_t head, int64_t block,
                               int64_t n_valid, float *to) {
    int64_t begin = head * a->head_stride + block * a->block_size * a->head_dim;
    if (!a->quantized)
        return (const float *)a->kv + begin;
    const float *scales = a->static_scales ? a->scales + head : a->scales + begin / a->head_dim;
    for (int64_t t = 0; t < n_valid; t++) {
        float scale = scales[a->static_scales ? 0 : t];
        const int8_t *q = (const int8_t *)a->kv + begin + t * a->head_dim;
        for (int64_t d = 0; d < a->head_dim; d++)
            to[t * a->head_dim + d] = (float)q[d] * scale;
    }
    return to;
}

/* Prefetch the keys and values of four tokens of the next chunk. The hardware does not, because
 * the addresses of blocks follow no pattern. */
INLINE void prefetch_four_tokens(const PagedAttention *a, int64_t head, int64_t block,
                                 int64_t offset) {
    int64_t element_size = a->quantized ? 1 : sizeof(float);
    int64_t element = head * a->head_stride + (block * a->block_size + offset) * a->head_dim;
    const char *keys = a->kv + element * element_size;
    const char *values = keys + a->n_kv_heads * a->head_stride * element_size;
    for (int64_t i = 0; i < 4 * a->head_dim * element_size; i += 64) {
        __builtin_prefetch(keys + i, 0, 2);
        __builtin_prefetch(values + i, 0, 2);
    }
}

/* One chunk of the online softmax: softcap and mask the scores, replace them by their exponentials,
 * and rescale the previous sums to the new maximum.
 * position, chunk: the positions in the sequence of the tile's first query and of the chunk's first
 * token. */
static void online_softmax(const PagedAttention *a, Scratch *s, int64_t n_rows, int64_t group,
                           int64_t position, int64_t chunk) {
    const vfloat lanes = v_indices();
    const vfloat minus_infinity = v_set(-INFINITY);
    for (int64_t row = 0; row < n_rows; row++) {
        float *scores = s->scores + row * KV_CHUNK;
        int64_t query = position + row / group; /* it attends to (query - window, query] */
        float last = (float)(query - chunk);
        float before = a->window ? (float)(query - a->window - chunk) : NO_SCORE;
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
        if (!(largest > s->max_score[row]))
            largest = s->max_score[row];
        float rescale = 1.0f;
        if (s->max_score[row] != largest)
            rescale = expf(s->max_score[row] - largest);
        vfloat sums = v_zero();
        vfloat offset = v_set(largest);
        for (int64_t t = 0; t < KV_CHUNK; t += VECTOR_WIDTH) {
            vfloat p = exp_nonpositive(v_sub(v_load(scores + t), offset));
            v_store(scores + t, p);
            sums = v_add(sums, p);
        }
        s->exp_sum[row] = s->exp_sum[row] * rescale + v_sum(sums);
        s->max_score[row] = largest;
        if (rescale != 1.0f)
            for (int64_t d = 0; d < a->head_dim; d++)
                s->acc[row * a->head_dim + d] *= rescale;
    }
}

/* The scores of all rows of the tile and four keys. */
static void score_rows(Scratch *s, int64_t n_rows, const float *keys, int64_t head_dim,
                       int64_t t) {
    int64_t row = 0;
    for (; row + 3 <= n_rows; row += 3)
        score_four_keys(3, s->q + row * head_dim, keys, head_dim, s->scores + row * KV_CHUNK + t);
    if (n_rows - row == 2)
        score_four_keys(2, s->q + row * head_dim, keys, head_dim, s->scores + row * KV_CHUNK + t);
    if (n_rows - row == 1)
        score_four_keys(1, s->q + row * head_dim, keys, head_dim, s->scores + row * KV_CHUNK + t);
}

/* Add the values [begin, end) of a chunk to the sums of all rows of the tile. */
static void accumulate_rows(Scratch *s, int64_t n_rows, const float *const *values,
                            int64_t block_size, int64_t begin, int64_t end, int64_t head_dim) {
    int64_t row = 0;
    for (; row + 3 <= n_rows; row += 3)
        accumulate_values(3, s->scores + row * KV_CHUNK, values, block_size, begin, end, head_dim,
                          s->acc + row * head_dim);
    if (n_rows - row == 2)
        accumulate_values(2, s->scores + row * KV_CHUNK, values, block_size, begin, end, head_dim,
                          s->acc + row * head_dim);
    if (n_rows - row == 1)
        accumulate_values(1, s->scores + row * KV_CHUNK, values, block_size, begin, end, head_dim,
                          s->acc + row * head_dim);
}

/* Compute a tile: its queries before end_query, for the query heads of one key-value head. */
static void attend_tile(const PagedAttention *a, Scratch *s, const QueryTile *tile,
                        int64_t end_query, int64_t kv_head) {
    int64_t group = a->n_heads / a->n_kv_heads; /* query heads per key-value head */
    int64_t head_dim = a->head_dim;
    int64_t block_size = a->block_size;
    int64_t n_queries = end_query - tile->first_query;
    int64_t n_rows = n_queries * group;
    const int64_t *block_table = a->block_tables + a->table_starts[tile->sequence];
    int64_t n_cached = a->seq_lens[tile->sequence] - a->query_lens[tile->sequence];
    int64_t first = n_cached + tile->first_query; /* position of the first query */
    int64_t last = first + n_queries - 1;
    for (int64_t row = 0; row < n_rows; row++) {
        int64_t token = tile->first_token + tile->first_query + row / group;
        int64_t head = kv_head * group + row % group;
        const float *q = a->q + token * a->q_stride + head * head_dim;
        for (int64_t d = 0; d < head_dim; d++)
            s->q[row * head_dim + d] = q[d] * a->scale;
        /* The sink is a first score, without a value. */
        s->max_score[row] = a->sinks && a->sinks[head] > NO_SCORE ? a->sinks[head] : NO_SCORE;
        s->exp_sum[row] = a->sinks ? 1 : 0;
    }
    memset(s->acc, 0, n_rows * head_dim * sizeof(float));
    /* The first token that any query of the tile attends to. */
    int64_t oldest = a->window && first - a->window + 1 > 0 ? first - a->window + 1 : 0;
    for (int64_t chunk = oldest / KV_CHUNK * KV_CHUNK; chunk <= last; chunk += KV_CHUNK) {
        int64_t begin = oldest > chunk ? oldest - chunk : 0;
        int64_t end = last - chunk + 1 < KV_CHUNK ? last - chunk + 1 : KV_CHUNK;
        const float *keys[KV_CHUNK];
        const float *values[KV_CHUNK];
        for (int64_t t = begin / block_size * block_size; t < end; t += block_size) {
            int64_t block = block_table[(chunk + t) / block_size];
            int64_t n_valid = end - t < block_size ? end - t : block_size;
            keys[t / block_size] = load_block(a, kv_head, block, n_valid, s->keys + t * head_dim);
            values[t / block_size] =
                load_block(a, a->n_kv_heads + kv_head, block, n_valid, s->values + t * head_dim);
        }
        for (int64_t t = begin / 4 * 4; t < end; t += 4) {
            if (chunk + KV_CHUNK + t <= last) {
                int64_t next_block = block_table[(chunk + KV_CHUNK + t) / block_size];
                prefetch_four_tokens(a, kv_head, next_block, t % block_size);
            }
            score_rows(s, n_rows, keys[t / block_size] + (t % block_size) * head_dim, head_dim, t);
        }
        online_softmax(a, s, n_rows, group, first, chunk);
        accumulate_rows(s, n_rows, values, block_size, begin, end, head_dim);
    }
    for (int64_t row = 0; row < n_rows; row++) {
        int64_t token = tile->first_token + tile->first_query + row / group;
        int64_t head = kv_head * group + row % group;
        float *out = a->out + (token * a->n_heads + head) * head_dim;
        for (int64_t d = 0; d < head_dim; d++)
            out[d] = s->acc[row * head_dim + d] / s->exp_sum[row];
    }
}

/* The tiles of all sequences. */
typedef struct {
    const PagedAttention *attention;
    const QueryTile *tiles;
    int64_t n_tiles;
    int64_t tile_queries;
} AttentionOperation;

static void attention_piece(const void *operation, int64_t piece) {
    const AttentionOperation *o = operation;
    const PagedAttention *a = o->attention;
    /* In reverse order: the last tiles of a prompt attend to the most tokens and run longest. */
    const QueryTile *tile = &o->tiles[o->n_tiles - 1 - piece / a->n_kv_heads];
    int64_t end_query = tile->first_query + o->tile_queries;
    if (end_query > a->query_lens[tile->sequence])
        end_query = a->query_lens[tile->sequence];
    Scratch *scratch = thread_scratch(SCRATCH_ATTENTION, sizeof *scratch);
    if (scratch)
        attend_tile(a, scratch, tile, end_query, piece % a->n_kv_heads);
}

static int paged_attention(const PagedAttention *a) {
    int64_t tile_queries = TILE_ROWS / (a->n_heads / a->n_kv_heads);
    int64_t n_tiles = 0;
    for (int64_t i = 0; i < a->n_sequences; i++)
        n_tiles += (a->query_lens[i] + tile_queries - 1) / tile_queries;
    QueryTile *tiles = malloc((n_tiles + 1) * sizeof *tiles);
    if (tiles == NULL)
        return 0;
    int64_t n_made = 0;
    int64_t first_token = 0;
    for (int64_t i = 0; i < a->n_sequences; i++) {
        for (int64_t query = 0; query < a->query_lens[i]; query += tile_queries)
            tiles[n_made++] = (QueryTile){i, first_token, query};
        first_token += a->query_lens[i];
    }
    AttentionOperation operation = {a, tiles, n_tiles, tile_queries};
    run_pieces(n_tiles * a->n_kv_heads, attention_piece, &operation);
    free(tiles);
    return 1;
}
