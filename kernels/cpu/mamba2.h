/* Mamba 2's selective state space (arXiv 2405.21060), and the gated norm of its output; see
 * mamba2.py.
 *
 * Prompts and single tokens run through the same recurrence, so that the result does not depend on
 * where a prompt is cut. Several tokens of a prompt share a pass over the state: a row of it is
 * loaded once, goes through all of them in registers, and is stored once. Threads share the
 * sequences, heads and columns of the states. */

enum {
    SCAN_TOKENS = VECTOR_WIDTH == 8 ? 2 : 4, /* that share a pass: AVX2 has 16 registers */
    BLOCK_VECTORS = 4 / SCAN_TOKENS,         /* of columns that share it, too */
    BLOCK_COLUMNS = BLOCK_VECTORS * VECTOR_WIDTH,
    SCAN_VECTORS = 4, /* of a panel: columns that a thread computes */
    SCAN_COLUMNS = SCAN_VECTORS * VECTOR_WIDTH,
    SCAN_TILE = 32,      /* tokens whose B and C stay in the cache while the blocks follow */
    MIN_BLOCK_TOKENS = 8 /* that are worth the copies */
};

/* Columns of the states of a sequence's head. */
typedef struct {
    const Mamba2Scan *scan;
    int64_t head;
    int64_t column;
    int64_t n_columns;
    const float *B; /* of token 0; a token every xbc_stride */
    const float *C;
    const float *x; /* of these columns */
} ScanPanel;

/* Rows of states: each a row_stride after the one before. */
typedef struct {
    float *rows;
    int64_t row_stride;
} StateRows;

/* The time steps and the decays of tokens. */
static void scan_steps(const void *operation, int64_t begin, int64_t end) {
    const Mamba2Scan *o = operation;
    const vfloat one = v_set(1.0f);
    int64_t n_heads = o->n_heads;
    for (int64_t d = 0; d < n_heads; d += VECTOR_WIDTH) {
        vfloat A_log = load_of_row(o->A_log, d, n_heads);
        vfloat e = exp_nonpositive(v_sub(v_zero(), v_abs(A_log))); /* e^A_log, or 1 / e^A_log */
        vfloat A = v_sub(v_zero(), v_select(v_is_negative(A_log), e, v_div(one, e)));
        vfloat bias = load_of_row(o->dt_bias, d, n_heads);
        for (int64_t token = begin; token < end; token++) {
            vfloat raw = load_of_row(o->dt + token * o->dt_stride, d, n_heads);
            vfloat dt = softplus_ps(v_add(raw, bias));
            dt = v_min(v_set(o->max_dt), v_max(v_set(o->min_dt), dt)); /* NaN stays NaN */
            store_of_row(o->steps + token * n_heads, d, n_heads, dt);
            store_of_row(o->decays + token * n_heads, d, n_heads, exp_nonpositive(v_mul(A, dt)));
        }
    }
}

/* n_tokens tokens from `token` on, in n_vectors vectors of columns from d on, counted in the panel.
 * from, to: the rows of these columns. n_stored: how many of their columns are in memory. is_whole:
 * all are, and the head has them all. */
INLINE void scan_pass(const ScanPanel *p, StateRows from, StateRows to, int64_t n_stored,
                      int64_t token, int64_t d, int n_tokens, int n_vectors, int is_whole) {
    const Mamba2Scan *o = p->scan;
    const float *B[SCAN_TOKENS];
    const float *C[SCAN_TOKENS];
    vfloat decay[SCAN_TOKENS];
    vfloat dt_x[SCAN_TOKENS][SCAN_VECTORS];
    vfloat y[SCAN_TOKENS][SCAN_VECTORS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tokens; t++) {
        int64_t step = (token + t) * o->n_heads + p->head;
        int64_t offset = (token + t) * o->xbc_stride;
        B[t] = p->B + offset;
        C[t] = p->C + offset;
        decay[t] = v_set(o->decays[step]);
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; v++) {
            int64_t at = d + v * VECTOR_WIDTH;
            vfloat x = is_whole ? v_load(p->x + offset + at)
                                : load_of_row(p->x + offset, at, p->n_columns);
            dt_x[t][v] = v_mul(v_set(o->steps[step]), x);
            y[t][v] = v_zero();
        }
    }
    const float *old_row = from.rows;
    float *new_row = to.rows;
    for (int64_t n = 0; n < o->state_size; n++) {
        vfloat state[SCAN_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; v++) {
            int64_t at = v * VECTOR_WIDTH;
            state[v] = is_whole ? v_load(old_row + at) : load_of_row(old_row, at, n_stored);
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < n_vectors; v++) {
                state[v] = v_fma(v_set(B[t][n]), dt_x[t][v], v_mul(state[v], decay[t]));
                y[t][v] = v_fma(v_set(C[t][n]), state[v], y[t][v]);
            }
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; v++) {
            int64_t at = v * VECTOR_WIDTH;
            if (is_whole)
                v_store(new_row + at, state[v]);
            else
                store_of_row(new_row, at, n_stored, state[v]);
        }
        old_row += from.row_stride;
        new_row += to.row_stride;
    }
    vfloat D = v_set(o->D[p->head]);
#pragma GCC unroll 4
    for (int t = 0; t < n_tokens; t++) {
        const float *x = p->x + (token + t) * o->xbc_stride;
        float *out = o->y + ((token + t) * o->n_heads + p->head) * o->head_dim + p->column;
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; v++) {
            int64_t at = d + v * VECTOR_WIDTH;
            if (is_whole)
                v_store(out + at, v_fma(D, v_load(x + at), y[t][v]));
            else
                store_of_row(out, at, p->n_columns,
                             v_fma(D, load_of_row(x, at, p->n_columns), y[t][v]));
        }
    }
}

static StateRows columns_from(StateRows states, int64_t d) {
    return (StateRows){states.rows + d, states.row_stride};
}

/* One token, in all columns of the panel, from row to row of the states. */
static void scan_token(const ScanPanel *p, StateRows from, StateRows to, int64_t token) {
    if (p->n_columns == SCAN_COLUMNS) {
        scan_pass(p, from, to, SCAN_COLUMNS, token, 0, 1, SCAN_VECTORS, 1);
        return;
    }
    for (int64_t d = 0; d < p->n_columns; d += VECTOR_WIDTH) {
        int64_t n_stored = p->n_columns - d;
        if (n_stored >= VECTOR_WIDTH)
            scan_pass(p, columns_from(from, d), columns_from(to, d), n_stored, token, d, 1, 1, 1);
        else
            scan_pass(p, columns_from(from, d), columns_from(to, d), n_stored, token, d, 1, 1, 0);
    }
}

/* The tokens [begin, end) in BLOCK_COLUMNS columns from d on, whose state is a block. */
INLINE void scan_block(const ScanPanel *p, float *block, int64_t begin, int64_t end, int64_t d,
                       int is_whole) {
    StateRows rows = {block, BLOCK_COLUMNS};
    int64_t token = begin;
    for (; token + SCAN_TOKENS <= end; token += SCAN_TOKENS)
        scan_pass(p, rows, rows, BLOCK_COLUMNS, token, d, SCAN_TOKENS, BLOCK_VECTORS, is_whole);
    for (; token < end; token++)
        scan_pass(p, rows, rows, BLOCK_COLUMNS, token, d, 1, BLOCK_VECTORS, is_whole);
}

/* The tokens [begin, end) in all columns of the panel.
 *
 * The columns are copied to blocks, [state_size, BLOCK_COLUMNS] each: the rows of states are so far
 * from each other that the processor takes some for the same. */
static void scan_blocks(const ScanPanel *p, StateRows from, StateRows to, float *blocks,
                        int64_t begin, int64_t end) {
    int64_t state_size = p->scan->state_size;
    int64_t block_size = state_size * BLOCK_COLUMNS;
    for (int64_t n = 0; n < state_size; n++)
        for (int64_t d = 0; d < p->n_columns; d += BLOCK_COLUMNS) {
            float *row = blocks + d / BLOCK_COLUMNS * block_size + n * BLOCK_COLUMNS;
            for (int64_t i = 0; i < BLOCK_COLUMNS; i += VECTOR_WIDTH)
                v_store(row + i, d + i < p->n_columns
                                     ? load_of_row(from.rows + n * from.row_stride, d + i,
                                                   p->n_columns)
                                     : v_zero());
        }
    for (int64_t token = begin; token < end; token += SCAN_TILE) {
        int64_t end_of_tile = min_int64(token + SCAN_TILE, end);
        for (int64_t d = 0; d < p->n_columns; d += BLOCK_COLUMNS) {
            float *block = blocks + d / BLOCK_COLUMNS * block_size;
            if (d + BLOCK_COLUMNS <= p->n_columns)
                scan_block(p, block, token, end_of_tile, d, 1);
            else
                scan_block(p, block, token, end_of_tile, d, 0);
        }
    }
    for (int64_t n = 0; n < state_size; n++)
        for (int64_t d = 0; d < p->n_columns; d += BLOCK_COLUMNS) {
            const float *row = blocks + d / BLOCK_COLUMNS * block_size + n * BLOCK_COLUMNS;
            memcpy(to.rows + n * to.row_stride + d, row,
                   min_int64(p->n_columns - d, BLOCK_COLUMNS) * sizeof *row);
        }
}

/* The panel's columns in a row of states. */
static StateRows panel_state(const ScanPanel *p, int64_t row) {
    const Mamba2Scan *o = p->scan;
    float *head = o->state + (row * o->n_heads + p->head) * o->state_size * o->head_dim;
    return (StateRows){head + p->column, o->head_dim};
}

/* All new tokens of a sequence. The state goes from write to write in the rows themselves.
 * scratch: two times [state_size, SCAN_COLUMNS]: for blocks, and the state after the last write. */
static void scan_sequence(const ScanPanel *p, int64_t sequence, int64_t first_token,
                          float *scratch) {
    StateRows not_kept = {scratch + p->scan->state_size * SCAN_COLUMNS, SCAN_COLUMNS};
    static float zeros[SCAN_COLUMNS]; /* every row of a state of zeros; only read */
    const RecurrentRows *rows = &p->scan->rows;
    int64_t n_tokens = rows->query_lens[sequence];
    int64_t write = rows->write_starts[sequence];
    int64_t end_of_writes = rows->write_starts[sequence + 1];
    int64_t initial_row = rows->initial_rows[sequence];
    StateRows from = initial_row < 0 ? (StateRows){zeros, 0} : panel_state(p, initial_row);
    for (int64_t begin = 0; begin < n_tokens;) {
        int64_t end = n_tokens;
        StateRows to = not_kept;
        if (write < end_of_writes) {
            end = rows->write_ends[write];
            to = panel_state(p, rows->write_rows[write++]);
        }
        if (end - begin >= MIN_BLOCK_TOKENS)
            scan_blocks(p, from, to, scratch, first_token + begin, first_token + end);
        for (; end - begin < MIN_BLOCK_TOKENS && begin < end; begin++, from = to)
            scan_token(p, from, to, first_token + begin);
        for (; write < end_of_writes && rows->write_ends[write] == end; write++) {
            StateRows copy = panel_state(p, rows->write_rows[write]);
            for (int64_t n = 0; n < p->scan->state_size; n++)
                memmove(copy.rows + n * copy.row_stride, to.rows + n * to.row_stride,
                        p->n_columns * sizeof(float));
        }
        from = to;
        begin = end;
    }
}

typedef struct {
    const Mamba2Scan *scan;
    atomic_int *out_of_memory;
} ScanOperation;

/* Items are panels of a sequence's head. The sequences are neighbours, so that a thread rarely has
 * all panels of the longest one. */
static void scan_items(const void *operation, int64_t begin, int64_t end) {
    const ScanOperation *operation_of_scan = operation;
    const Mamba2Scan *o = operation_of_scan->scan;
    float *scratch =
        thread_scratch(SCRATCH_RECURRENCE, 2 * o->state_size * SCAN_COLUMNS * sizeof(float));
    if (scratch == NULL) {
        atomic_store(operation_of_scan->out_of_memory, 1);
        return;
    }
    int64_t n_panels = (o->head_dim + SCAN_COLUMNS - 1) / SCAN_COLUMNS;
    int64_t sequence = begin % o->rows.n_sequences;
    int64_t first_token = 0;
    for (int64_t i = 0; i < sequence; i++)
        first_token += o->rows.query_lens[i];
    for (int64_t item = begin; item < end; item++) {
        int64_t panel = item / o->rows.n_sequences;
        int64_t head = panel / n_panels;
        int64_t column = panel % n_panels * SCAN_COLUMNS;
        int64_t group = head / (o->n_heads / o->n_groups);
        const float *B = o->xbc + o->n_heads * o->head_dim + group * o->state_size;
        ScanPanel p = {
            .scan = o,
            .head = head,
            .column = column,
            .n_columns = min_int64(o->head_dim - column, SCAN_COLUMNS),
            .B = B,
            .C = B + o->n_groups * o->state_size,
            .x = o->xbc + head * o->head_dim + column,
        };
        scan_sequence(&p, sequence, first_token, scratch);
        first_token += o->rows.query_lens[sequence];
        if (++sequence == o->rows.n_sequences)
            sequence = first_token = 0;
    }
}

static int mamba2_scan(const Mamba2Scan *scan) {
    Mamba2Scan o = *scan;
    int64_t n_steps = o.n_tokens * o.n_heads;
    o.steps = thread_scratch(SCRATCH_INPUTS, 2 * n_steps * sizeof(float));
    if (o.steps == NULL)
        return 0;
    o.decays = o.steps + n_steps;
    run_ranges(o.n_tokens, 1 + ACT_MIN_ELEMENTS / o.n_heads, scan_steps, &o);
    atomic_int out_of_memory = 0;
    ScanOperation operation = {&o, &out_of_memory};
    int64_t n_panels = (o.head_dim + SCAN_COLUMNS - 1) / SCAN_COLUMNS;
    int64_t n_items = o.n_heads * n_panels * o.rows.n_sequences;
    int64_t n_elements = n_steps * o.state_size * o.head_dim;
    run_ranges(n_items, 1 + n_items * PARALLEL_MIN_ELEMENTS / (n_elements + 1), scan_items,
               &operation);
    return !atomic_load(&out_of_memory);
}

/* Items are groups of a row. */
static void gated_norm_groups(const void *operation, int64_t begin, int64_t end) {
    const GatedGroupNorm *o = operation;
    int64_t size = o->size / o->n_groups;
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item / o->n_groups;
        int64_t group = item % o->n_groups;
        int64_t column = group * size;
        const float *x = o->x + row * o->size + column;
        const float *gate = o->gate + row * o->gate_stride + column;
        float *y = o->y + row * o->size + column;
        vfloat squares = v_zero();
        for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
            vfloat value = load_of_row(x, d, size);
            if (!o->norm_before_gate)
                value = v_mul(value, activate(load_of_row(gate, d, size), ACT_SILU));
            squares = v_fma(value, value, squares);
            store_of_row(y, d, size, value);
        }
        if (o->weight == NULL)
            continue;
        const float *weight = o->weight + group * o->weight_stride;
        vfloat factor = v_set(1.0f / sqrtf(v_sum(squares) / (float)size + o->eps));
        for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
            vfloat value = v_mul(load_of_row(y, d, size), factor);
            value = v_mul(value, load_of_row(weight, d, size));
            if (o->norm_before_gate)
                value = v_mul(value, activate(load_of_row(gate, d, size), ACT_SILU));
            store_of_row(y, d, size, value);
        }
    }
}

static int gated_group_rms_norm(const GatedGroupNorm *o) {
    int64_t n_items = o->rows * o->n_groups;
    run_ranges(n_items, 1 + ACT_MIN_ELEMENTS * o->n_groups / o->size, gated_norm_groups, o);
    return 1;
}
