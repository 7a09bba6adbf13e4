/* The gated delta rule (arXiv 2412.06464).
 *
 * gated_delta_net.py has the equations. Prompts and single tokens run through the same recurrence,
 * so that the result does not depend on where a prompt is cut. The columns of a state do not depend
 * on each other: a panel of PANEL_WIDTH columns stays in the first-level cache for a block of
 * tokens, and several threads may share a head.
 *
 * A token needs S^T k and S^T q of the state S before it, and then changes all of S. The change is
 * delayed: one pass over S applies that of the token before, and computes the products of this
 * token. The output follows from them without another pass:
 *
 *     update = beta (v - decay S^T k)
 *     output = decay S^T q + (k^T q) update
 *     S      = decay S + k update^T           in the next pass, or when S is written to its row
 */

enum {
    DELTA_TOKENS = 16, /* of a block */
    PANEL_VECTORS = PANEL_WIDTH / VECTOR_WIDTH,
    /* Rows of a panel whose products go to different sums: additions wait for each other. */
    DELTA_SUMS = PANEL_VECTORS < 4 ? 4 / PANEL_VECTORS : 1
};

/* The panels of a sequence's head that one thread computes. */
typedef struct {
    const GatedDeltaRule *rule;
    int64_t head;        /* of the values */
    int64_t first_panel;
    int64_t n_panels;
    float *state;        /* [n_panels, k_dim, PANEL_WIDTH], without the last token's change */
    float *updates;      /* [n_panels, PANEL_WIDTH], of the last token */
    float *q;            /* [DELTA_TOKENS, k_dim] */
    float *k;            /* [1 + DELTA_TOKENS, k_dim]: that of the token before the block first */
    float *decay;        /* [1 + DELTA_TOKENS] */
    float *beta;         /* [DELTA_TOKENS] */
    float *kq;           /* [DELTA_TOKENS]: k^T q */
} DeltaHead;

static float dot_product(const float *x, const float *y, int64_t size) {
    vfloat sums = v_zero();
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH)
        sums = v_fma(load_of_row(x, d, size), load_of_row(y, d, size), sums);
    return v_sum(sums);
}

/* y = scale x / |x| */
static void l2_norm(const float *x, float scale, float *y, int64_t size) {
    const float eps = 1e-6f; /* L2_NORM_EPS in gated_delta_net.py */
    vfloat factor = v_set(scale / sqrtf(dot_product(x, x, size) + eps));
    for (int64_t d = 0; d < size; d += VECTOR_WIDTH)
        store_of_row(y, d, size, v_mul(load_of_row(x, d, size), factor));
}

/* What all panels read of a block of tokens. */
static void prepare_delta_block(const DeltaHead *h, int64_t first_token, int64_t n_tokens) {
    const GatedDeltaRule *r = h->rule;
    int64_t k_dim = r->k_dim;
    int64_t k_head = h->head / (r->n_v_heads / r->n_k_heads);
    float rate = -expf(r->A_log[h->head]);
    for (int64_t t = 0; t < n_tokens; t++) {
        const float *q = r->qkv + (first_token + t) * r->qkv_stride + k_head * k_dim;
        const float *ba = r->ba + (first_token + t) * r->ba_stride;
        l2_norm(q, 1.0f / sqrtf((float)k_dim), h->q + t * k_dim, k_dim);
        l2_norm(q + r->n_k_heads * k_dim, 1.0f, h->k + (t + 1) * k_dim, k_dim);
        h->kq[t] = dot_product(h->q + t * k_dim, h->k + (t + 1) * k_dim, k_dim);
        h->beta[t] = 1.0f / (1.0f + expf(-ba[h->head]));
        float step = softplus(ba[r->n_v_heads + h->head] + r->dt_bias[h->head]);
        h->decay[t + 1] = expf(rate * step);
    }
}

/* A row of a panel of the state after the token whose k, decay and update these are. */
INLINE void change_row(const float *row, float k, float decay, const vfloat *update,
                       vfloat *changed) {
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) {
        vfloat decayed = v_mul(v_load(row + v * VECTOR_WIDTH), v_set(decay));
        changed[v] = v_fma(v_set(k), update[v], decayed);
    }
}

/* Add the products of n_rows rows of a panel, after their change, to n_rows sums. */
INLINE void pass_rows(float *rows, const float *last_k, float last_decay, const vfloat *update,
                      const float *k, const float *q, int n_rows, int has_change,
                      vfloat held[DELTA_SUMS][PANEL_VECTORS],
                      vfloat read[DELTA_SUMS][PANEL_VECTORS]) {
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        float *row = rows + i * PANEL_WIDTH;
        vfloat changed[PANEL_VECTORS];
        if (has_change)
            change_row(row, last_k[i], last_decay, update, changed);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) {
            if (has_change)
                v_store(row + v * VECTOR_WIDTH, changed[v]);
            else
                changed[v] = v_load(row + v * VECTOR_WIDTH);
            held[i][v] = v_fma(changed[v], v_set(k[i]), held[i][v]);
            read[i][v] = v_fma(changed[v], v_set(q[i]), read[i][v]);
        }
    }
}

/* One token of a panel. `update` is that of the token before, then that of this token. */
INLINE void delta_token(const DeltaHead *h, float *state, int64_t t, const float *value,
                        float *out, int64_t n_columns, int has_change, vfloat *update) {
    int64_t k_dim = h->rule->k_dim;
    const float *last_k = h->k + t * k_dim;
    const float *k = last_k + k_dim;
    const float *q = h->q + t * k_dim;
    vfloat held[DELTA_SUMS][PANEL_VECTORS]; /* S^T k */
    vfloat read[DELTA_SUMS][PANEL_VECTORS]; /* S^T q */
#pragma GCC unroll 4
    for (int i = 0; i < DELTA_SUMS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++)
            held[i][v] = read[i][v] = v_zero();
    int64_t row = 0;
    for (; row + DELTA_SUMS <= k_dim; row += DELTA_SUMS)
        pass_rows(state + row * PANEL_WIDTH, last_k + row, h->decay[t], update, k + row, q + row,
                  DELTA_SUMS, has_change, held, read);
    for (; row < k_dim; row++)
        pass_rows(state + row * PANEL_WIDTH, last_k + row, h->decay[t], update, k + row, q + row,
                  1, has_change, held, read);
#pragma GCC unroll 4
    for (int n_sums = DELTA_SUMS / 2; n_sums; n_sums /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < n_sums; i++)
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_VECTORS; v++) {
                held[i][v] = v_add(held[i][v], held[i + n_sums][v]);
                read[i][v] = v_add(read[i][v], read[i + n_sums][v]);
            }
    vfloat decay = v_set(h->decay[t + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) {
        int64_t d = v * VECTOR_WIDTH;
        if (d >= n_columns)
            break;
        vfloat missing = v_fnma(decay, held[0][v], load_of_row(value, d, n_columns));
        update[v] = v_mul(v_set(h->beta[t]), missing);
        vfloat output = v_fma(v_set(h->kq[t]), update[v], v_mul(decay, read[0][v]));
        store_of_row(out, d, n_columns, output);
    }
}

/* A block of tokens of all panels. has_change: there was a token before them. */
static void delta_block(const DeltaHead *h, int64_t first_token, int64_t n_tokens,
                        int has_change) {
    const GatedDeltaRule *r = h->rule;
    for (int64_t panel = 0; panel < h->n_panels; panel++) {
        float *state = h->state + panel * r->k_dim * PANEL_WIDTH;
        float *last_update = h->updates + panel * PANEL_WIDTH;
        int64_t column = (h->first_panel + panel) * PANEL_WIDTH;
        int64_t left = r->v_dim - column;
        int64_t n_columns = left < PANEL_WIDTH ? left : PANEL_WIDTH;
        int64_t first_value = 2 * r->n_k_heads * r->k_dim + h->head * r->v_dim + column;
        const float *value = r->qkv + first_token * r->qkv_stride + first_value;
        float *out = r->out + (first_token * r->n_v_heads + h->head) * r->v_dim + column;
        vfloat update[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++)
            update[v] = v_load(last_update + v * VECTOR_WIDTH);
        for (int64_t t = 0; t < n_tokens; t++) {
            if (t || has_change)
                delta_token(h, state, t, value, out, n_columns, 1, update);
            else
                delta_token(h, state, t, value, out, n_columns, 0, update);
            value += r->qkv_stride;
            out += r->n_v_heads * r->v_dim;
        }
        for (int v = 0; v < PANEL_VECTORS; v++)
            v_store(last_update + v * VECTOR_WIDTH, update[v]);
    }
    /* The last token is the one before the next block. */
    memcpy(h->k, h->k + n_tokens * r->k_dim, r->k_dim * sizeof(float));
    h->decay[0] = h->decay[n_tokens];
}

/* The part of a row of states that has the panels. */
static float *delta_columns(const DeltaHead *h, int64_t row) {
    const GatedDeltaRule *r = h->rule;
    return r->state + row * r->row_stride + h->head * r->k_dim * r->v_dim +
           h->first_panel * PANEL_WIDTH;
}

static void read_delta_state(const DeltaHead *h, int64_t row) {
    const GatedDeltaRule *r = h->rule;
    int64_t panel_size = r->k_dim * PANEL_WIDTH;
    int64_t n_columns = r->v_dim - h->first_panel * PANEL_WIDTH;
    memset(h->updates, 0, h->n_panels * PANEL_WIDTH * sizeof(float));
    if (row < 0) {
        memset(h->state, 0, h->n_panels * panel_size * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < r->k_dim; i++) { /* in the order of the memory */
        const float *from = delta_columns(h, row) + i * r->v_dim;
        for (int64_t d = 0; d < h->n_panels * PANEL_WIDTH; d += VECTOR_WIDTH) {
            float *to = h->state + d / PANEL_WIDTH * panel_size + i * PANEL_WIDTH;
            vfloat values = d < n_columns ? load_of_row(from, d, n_columns) : v_zero();
            v_store(to + d % PANEL_WIDTH, values);
        }
    }
}

/* Write the state after the last token. */
static void write_delta_state(const DeltaHead *h, int64_t row) {
    const GatedDeltaRule *r = h->rule;
    int64_t n_columns = r->v_dim - h->first_panel * PANEL_WIDTH;
    for (int64_t i = 0; i < r->k_dim; i++) {
        float *to = delta_columns(h, row) + i * r->v_dim;
        for (int64_t panel = 0; panel < h->n_panels; panel++) {
            const float *from = h->state + (panel * r->k_dim + i) * PANEL_WIDTH;
            vfloat update[PANEL_VECTORS];
            vfloat changed[PANEL_VECTORS];
            for (int v = 0; v < PANEL_VECTORS; v++)
                update[v] = v_load(h->updates + panel * PANEL_WIDTH + v * VECTOR_WIDTH);
            change_row(from, h->k[i], h->decay[0], update, changed);
            for (int v = 0; v < PANEL_VECTORS; v++) {
                int64_t d = panel * PANEL_WIDTH + v * VECTOR_WIDTH;
                if (d < n_columns)
                    store_of_row(to, d, n_columns, changed[v]);
            }
        }
    }
}

/* All new tokens of a sequence. The blocks end at the writes. */
static void delta_sequence(const DeltaHead *h, int64_t sequence) {
    const RecurrentRows *rows = &h->rule->rows;
    int64_t first_token = 0;
    for (int64_t i = 0; i < sequence; i++)
        first_token += rows->query_lens[i];
    int64_t n_tokens = rows->query_lens[sequence];
    int64_t write = rows->write_starts[sequence];
    int64_t end_of_writes = rows->write_starts[sequence + 1];
    read_delta_state(h, rows->initial_rows[sequence]);
    for (int64_t begin = 0; begin < n_tokens;) {
        int64_t end = begin + DELTA_TOKENS < n_tokens ? begin + DELTA_TOKENS : n_tokens;
        if (write < end_of_writes && rows->write_ends[write] < end)
            end = rows->write_ends[write];
        prepare_delta_block(h, first_token + begin, end - begin);
        delta_block(h, first_token + begin, end - begin, begin > 0);
        for (; write < end_of_writes && rows->write_ends[write] == end; write++)
            write_delta_state(h, rows->write_rows[write]);
        begin = end;
    }
}

typedef struct {
    const GatedDeltaRule *rule;
    int64_t panels_per_piece;
    int64_t pieces_per_head;
    atomic_int *out_of_memory;
} DeltaOperation;

static void delta_piece(const void *operation, int64_t piece) {
    const DeltaOperation *o = operation;
    const GatedDeltaRule *r = o->rule;
    int64_t n_panels = (r->v_dim + PANEL_WIDTH - 1) / PANEL_WIDTH;
    int64_t pieces_per_sequence = r->n_v_heads * o->pieces_per_head;
    int64_t head_piece = piece % pieces_per_sequence;
    DeltaHead h = {
        .rule = r,
        .head = head_piece / o->pieces_per_head,
        .first_panel = head_piece % o->pieces_per_head * o->panels_per_piece,
        .n_panels = o->panels_per_piece,
    };
    if (h.n_panels > n_panels - h.first_panel)
        h.n_panels = n_panels - h.first_panel;
    int64_t panel_floats = (r->k_dim + 1) * PANEL_WIDTH; /* the state and the updates */
    int64_t token_floats = 2 * r->k_dim + 3;             /* q, k, decay, beta, kq */
    int64_t n_floats = n_panels * panel_floats + (1 + DELTA_TOKENS) * token_floats;
    float *memory = thread_scratch(SCRATCH_RECURRENCE, n_floats * sizeof(float));
    if (memory == NULL) {
        atomic_store(o->out_of_memory, 1);
        return;
    }
    h.state = memory;
    h.updates = h.state + n_panels * r->k_dim * PANEL_WIDTH;
    h.q = h.updates + n_panels * PANEL_WIDTH;
    h.k = h.q + DELTA_TOKENS * r->k_dim;
    h.decay = h.k + (1 + DELTA_TOKENS) * r->k_dim;
    h.beta = h.decay + 1 + DELTA_TOKENS;
    h.kq = h.beta + DELTA_TOKENS;
    /* The last sequence first: prompts, which run longest, come after the decodes. */
    delta_sequence(&h, r->rows.n_sequences - 1 - piece / pieces_per_sequence);
}

static int gated_delta_rule(const GatedDeltaRule *r) {
    int64_t n_tokens = 0;
    int64_t longest = 1;
    for (int64_t i = 0; i < r->rows.n_sequences; i++) {
        int64_t length = r->rows.query_lens[i];
        n_tokens += length;
        longest = length > longest ? length : longest;
    }
    /* Heads are divided where the longest sequence would run on a part of the threads. */
    int64_t n_panels = (r->v_dim + PANEL_WIDTH - 1) / PANEL_WIDTH;
    int64_t heads_at_once = n_tokens * r->n_v_heads / longest;
    int64_t wanted = num_threads() > 1 ? 2 * num_threads() : 1;
    int64_t pieces_per_head = (wanted + heads_at_once - 1) / (heads_at_once + !heads_at_once);
    int is_small = n_tokens * r->n_v_heads * r->k_dim * r->v_dim <= PARALLEL_MIN_ELEMENTS;
    if (is_small)
        pieces_per_head = 1;
    if (pieces_per_head > n_panels)
        pieces_per_head = n_panels;
    int64_t panels_per_piece = (n_panels + pieces_per_head - 1) / pieces_per_head;
    pieces_per_head = (n_panels + panels_per_piece - 1) / panels_per_piece;
    atomic_int out_of_memory = 0;
    DeltaOperation operation = {r, panels_per_piece, pieces_per_head, &out_of_memory};
    int64_t n_pieces = r->rows.n_sequences * r->n_v_heads * pieces_per_head;
    if (is_small)
        for (int64_t piece = 0; piece < n_pieces; piece++)
            delta_piece(&operation, piece);
    else
        run_pieces(n_pieces, delta_piece, &operation);
    return !atomic_load(&out_of_memory);
}
