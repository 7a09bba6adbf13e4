/* Arm's products of matrices: two rows of inputs times two columns of a weight (smmla, bfmmla).
 *
 * An instruction multiplies 8 bytes of each row with 8 bytes of each column, and adds to four sums:
 * those of the first row with both columns, then those of the second row. A panel holds words of
 * 4 bytes of each column. Two words of a column that follow each other over depth (of 4-bit values:
 * the two halves of one word) are brought together by a zip when a tile loads them, so that panels
 * are those of the other levels.
 *
 * Sums of int8 products are exact, and have the bits of sdot. bfmmla is defined as two bfdot, one
 * after the other over depth (BFMMLA in the Arm Architecture Reference Manual), so that its sums
 * have the bits of bfdot. A single row is left to sdot and bfdot.
 *
 * The tiles run in qemu (tests/kernels/test_cpu_levels.py). No Arm processor has run them. What is
 * known of their speed is how many instructions the inner loops have (docs/performance.md), and
 * that GCC 12 and clang 22 keep all sums in registers.
 */

enum {
#if defined(__clang__)
    PAIR_TILE_ROWS = 4, /* clang 22 moves the sums of 6 rows to and fro */
#else
    PAIR_TILE_ROWS = 6, /* 24 registers of sums for a panel, of 32 */
#endif
    PAIR_BYTES = 8 /* of each row and column, in an instruction */
};

/* PAIR_BYTES of two rows. */
INLINE vint load_two_rows(const char *first, const char *second) {
    return vreinterpretq_s32_s8(
        vcombine_s8(vld1_s8((const int8_t *)first), vld1_s8((const int8_t *)second)));
}

/* `bytes_of_half`. A shift of bytes needs no mask. */
INLINE vint bytes_of_low_half(int weight_type, vint words) {
    vint codes = vi_and(words, vi_set(0x0f0f0f0f));
    return weight_type == WEIGHT_FP4 ? vi_lookup(TWICE_FP4, codes) : codes;
}
INLINE vint bytes_of_high_half(int weight_type, vint words) {
    vint codes = vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(words), 4));
    return weight_type == WEIGHT_FP4 ? vi_lookup(TWICE_FP4, codes) : codes;
}

/* The sums of two rows with two columns: integers, or floats of bfloat16. */
typedef struct {
    vint ints;
    vfloat floats;
} PairSums;

/* Add the products of two rows with two columns. */
INLINE void multiply_pair(int is_bf16, PairSums *sums, vint rows, vint columns) {
    if (is_bf16)
        sums->floats = vbfmmlaq_f32(sums->floats, vreinterpretq_bf16_s32(rows),
                                    vreinterpretq_bf16_s32(columns));
    else
        sums->ints = vmmlaq_s32(sums->ints, vreinterpretq_s8_s32(rows),
                                vreinterpretq_s8_s32(columns));
}

/* The sums of a tile, floats as their bits: for each panel, pair of rows and pair of columns. */
typedef vint PairTile[FEW_ROWS_PANELS][PAIR_TILE_ROWS / 2][2 * VECTORS];

/* The sums of the first row (0) or the second (1) with four columns. */
INLINE vint sums_of_row(int second, vint columns_01, vint columns_23) {
    int64x2_t low = vreinterpretq_s64_s32(columns_01);
    int64x2_t high = vreinterpretq_s64_s32(columns_23);
    return vreinterpretq_s32_s64(second ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
}

/* Add the sums of a group to the outputs. A function, because the sums of a tile that wait for it
 * in registers would be moved to memory inside the tile's loop. */
static __attribute__((noinline)) void add_pairs(int is_bf16, int n_rows, int n_panels,
                                                const Linear *p, int64_t row, int64_t panel,
                                                int64_t group, PairTile tile,
                                                TileOutputs outputs) {
    TileSums sums;
    for (int j = 0; j < n_panels; j++)
        for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const vint *columns = &tile[j][i / 2][2 * v];
                vi_store(sums.ints[j][i] + v * VECTOR_WIDTH,
                         sums_of_row(i % 2, columns[0], columns[1]));
            }
    if (is_bf16)
        add_float_group(p, row, n_rows, panel, n_panels, group, &sums, outputs);
    else
        add_int_group(p, row, n_rows, panel, n_panels, group, &sums, outputs);
}

/* What the sums of two rows with two columns begin with: minus what the products of bytes exceed
 * them by. */
INLINE vint first_sums(const Linear *p, int surplus, int64_t first, int64_t second, int64_t group) {
    const int32_t *of_group = p->int_input_sums + group;
    return vcombine_s32(vdup_n_s32(-surplus * of_group[first * p->n_groups]),
                        vdup_n_s32(-surplus * of_group[second * p->n_groups]));
}

/* Compute n_rows rows of n_panels panels. With an odd number, the last row is its own partner.
 * weight_type: bfloat16, int8 or 4-bit values. */
INLINE void pair_tile(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                      int64_t panel) {
    const int is_bf16 = weight_type == WEIGHT_BF16;
    const int n_pairs = (n_rows + 1) / 2;
    const int words_at_once = word_values(weight_type) == 8 ? 1 : 2;
    const int64_t row_bytes = p->padded_depth * (is_bf16 ? 2 : 1);
    const int surplus = is_bf16 ? 0 : surplus_of_weights(weight_type, DOT_WEIGHT_OFFSET);
    TileOutputs outputs;
    const char *weights[FEW_ROWS_PANELS];
    PairSums acc[FEW_ROWS_PANELS][PAIR_TILE_ROWS / 2][2 * VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < n_panels; j++)
        weights[j] = p->weight + (panel + j) * p->panel_bytes;
    for (int64_t group = 0; group < p->n_groups; group++) {
        int64_t word;
        int64_t end;
        group_words(p, weight_type, group, &word, &end);
        const char *inputs = p->rounded_inputs + row * row_bytes;
        inputs += word / words_at_once * PAIR_BYTES;
#pragma GCC unroll 16
        for (int i = 0; i < n_pairs; i++) {
            const int64_t first = row + 2 * i;
            vint start = vi_zero();
            if (surplus)
                start = first_sums(p, surplus, first, first + (2 * i + 1 < n_rows), group);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 8
                for (int v = 0; v < 2 * VECTORS; v++)
                    acc[j][i][v] = (PairSums){start, v_zero()};
        }
        for (; word < end; word += words_at_once, inputs += PAIR_BYTES) {
            vint rows[PAIR_TILE_ROWS / 2];
#pragma GCC unroll 16
            for (int i = 0; i < n_pairs; i++)
                rows[i] = load_two_rows(inputs + 2 * i * row_bytes,
                                        inputs + (2 * i + (2 * i + 1 < n_rows)) * row_bytes);
#pragma GCC unroll 16
            for (int j = 0; j < n_panels; j++) {
                const char *step = weights[j] + word * PANEL_WIDTH * 4;
                if (n_rows <= FEW_ROWS)
#pragma GCC unroll 2
                    for (int line = 0; line < words_at_once; line++)
                        __builtin_prefetch(step + PREFETCH_BYTES + line * PANEL_WIDTH * 4);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    /* So that the loads of the next columns, which need registers, stay behind. */
                    __asm__ volatile("" : : : "memory");
                    vint first = vi_load(step + v * VECTOR_WIDTH * 4);
                    vint second;
                    if (words_at_once == 2) {
                        second = vi_load(step + (PANEL_WIDTH + v * VECTOR_WIDTH) * 4);
                    } else {
                        second = bytes_of_high_half(weight_type, first);
                        first = bytes_of_low_half(weight_type, first);
                    }
                    vint columns_01 = vzip1q_s32(first, second);
                    vint columns_23 = vzip2q_s32(first, second);
#pragma GCC unroll 16
                    for (int i = 0; i < n_pairs; i++) {
                        multiply_pair(is_bf16, &acc[j][i][2 * v], rows[i], columns_01);
                        multiply_pair(is_bf16, &acc[j][i][2 * v + 1], rows[i], columns_23);
                    }
                }
            }
        }
        PairTile sums;
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
            for (int i = 0; i < n_pairs; i++)
#pragma GCC unroll 8
                for (int v = 0; v < 2 * VECTORS; v++)
                    sums[j][i][v] = is_bf16 ? v_bits(acc[j][i][v].floats) : acc[j][i][v].ints;
        add_pairs(is_bf16, n_rows, n_panels, p, row, panel, group, sums, outputs);
    }
    store_outputs(p, row, n_rows, panel, n_panels, outputs);
}

INLINE void pair_rows(int weight_type, int n_rows, int n_panels, const Linear *p, int64_t row,
                      int64_t panel, int64_t end_panel) {
    for (; panel + n_panels <= end_panel; panel += n_panels)
        pair_tile(weight_type, n_rows, n_panels, p, row, panel);
    for (; panel < end_panel; panel++)
        pair_tile(weight_type, n_rows, 1, p, row, panel);
}

/* Whether groups consist of whole PAIR_BYTES. Zeros after the depth change no sum of integers, but
 * the sign of a float that is zero. */
INLINE int has_whole_pairs(int is_bf16, const Linear *p) {
    return is_bf16 ? p->group_size % 4 == 0 : p->group_size % 8 == 0 || p->n_groups == 1;
}

/* Compute the rows [row, end_row) of some panels, except a single row at the end. Returns the first
 * row that is left. */
INLINE int64_t multiply_pairs(int weight_type, const Linear *p, int64_t row, int64_t end_row,
                              int64_t panel, int64_t end_panel) {
    const int is_bf16 = p->inputs == INPUTS_BF16;
    if ((is_bf16 && weight_type != WEIGHT_BF16) || !has_whole_pairs(is_bf16, p))
        return row;
    for (; end_row - row >= PAIR_TILE_ROWS; row += PAIR_TILE_ROWS)
        pair_rows(weight_type, PAIR_TILE_ROWS, 1, p, row, panel, end_panel);
    if (end_row - row == 5) /* only where tiles have more rows */
        pair_rows(weight_type, PAIR_TILE_ROWS > 5 ? 5 : 1, 1, p, row, panel, end_panel);
    else if (end_row - row == 4)
        pair_rows(weight_type, 4, 1, p, row, panel, end_panel);
    else if (end_row - row == 3)
        pair_rows(weight_type, 3, 1, p, row, panel, end_panel);
    else if (end_row - row == 2)
        pair_rows(weight_type, 2, FEW_ROWS_PANELS, p, row, panel, end_panel);
    else
        return row;
    return end_row;
}
