/* Weights of bfloat16 in 12 bits, without loss: a product has the bits that it has with
 * WEIGHT_BF16. One stream reads all weights for each token, and with a quarter less to read it is
 * faster.
 *
 * The exponents of a weight are few. A panel has codes of 4 bits: 0 to 14 for the exponents
 * `top_exponent` - code, and 15 for the exponent 0 (zeros and subnormal numbers). A panel begins
 * with a header, and then has units. A unit is UNIT_STEPS steps over depth (see linear.h), which
 * are 8 inputs of 16 columns, in three vectors of 32 lanes of 16 bits. A lane is of one column, and
 * of one of the two inputs of a step:
 *
 * - the signs and mantissas of steps 0 and 1: step 0 has bit 15 and bits 0 to 6, as in bfloat16,
 *   and step 1 the same bits after the bytes of the lane are swapped;
 * - those of steps 2 and 3, in the same way;
 * - the codes of steps 0 to 3, from the lowest bits up.
 *
 * A unit with any other exponent is stored uncompressed, behind all panels, and its three vectors
 * are not read. In trained models these are less than one in a hundred.
 */

enum {
    UNIT_STEPS = 4,
    UNIT_LINES = 3, /* of 64 bytes */
    UNIT_BYTES = UNIT_LINES * PANEL_WIDTH * 4,
    UNCOMPRESSED_UNIT_BYTES = UNIT_STEPS * PANEL_WIDTH * 4,
    NUM_CODED_EXPONENTS = 15, /* without 0 */
    ZERO_CODE = 15,
    SIGNS_AND_MANTISSAS = (int)0x807f807f
};

/* The first bytes of a panel, before its units. */
typedef struct {
    int32_t top_exponent;
    int32_t n_uncompressed;    /* units */
    int64_t uncompressed_part; /* where it is, in bytes from the panel's start: the uncompressed
                                  units, then their indices and NO_UNIT */
    int32_t no_unit;           /* NO_UNIT: the indices of a panel without uncompressed units */
    char padding[COMPRESSED_HEADER_BYTES - 20];
} CompressedHeader;

enum { NO_UNIT = INT32_MAX };

/* Where a tile is in a panel. */
typedef struct {
    const char *unit;                  /* the next one */
    const char *uncompressed_unit;     /* the next uncompressed one */
    const int32_t *uncompressed_index; /* the index of that one, or NO_UNIT */
    vint exponents;                    /* of 32 codes: the 16 twice, as bit 4 of a code's lane
                                          belongs to another code */
} PanelCursor;

/* Exchange the bytes of each half of a word. */
INLINE vint swap_bytes(vint x) {
    const vint order = _mm512_broadcast_i32x4(
        _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return _mm512_shuffle_epi8(x, order);
}

/* The exponents of the codes in their place in bfloat16. */
INLINE vint exponents_of_codes(int32_t top_exponent) {
    const __m512i codes = _mm512_and_si512(
        _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                         13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi16(15));
    const __m512i exponents =
        _mm512_sub_epi16(_mm512_set1_epi16((short)top_exponent), codes);
    const __mmask32 has_exponent = _mm512_cmplt_epi16_mask(codes, _mm512_set1_epi16(ZERO_CODE));
    return _mm512_maskz_slli_epi16(has_exponent, exponents, 7);
}

INLINE PanelCursor open_panel(const char *panel) {
    const CompressedHeader *header = (const CompressedHeader *)panel;
    const char *part = panel + header->uncompressed_part;
    const char *indices =
        header->n_uncompressed
            ? part + header->n_uncompressed * (int64_t)UNCOMPRESSED_UNIT_BYTES
            : (const char *)&header->no_unit;
    return (PanelCursor){
        .unit = panel + sizeof *header,
        .uncompressed_unit = part,
        .uncompressed_index = (const int32_t *)indices,
        .exponents = exponents_of_codes(header->top_exponent),
    };
}

/* The signs and mantissas of a step beside the exponents of its codes, which are the lowest bits of
 * the halves. */
INLINE vint join_parts(vint exponents, vint codes, vint mantissas) {
    return _mm512_ternarylogic_epi32(_mm512_permutexvar_epi16(codes, exponents), mantissas,
                                     vi_set(SIGNS_AND_MANTISSAS), 0xf8); /* a | (b & c) */
}

/* The words of the next unit, the one at `index`, as WEIGHT_BF16 has them. */
INLINE void next_unit(PanelCursor *cursor, int32_t index, vint *words) {
    const char *unit = cursor->unit;
    cursor->unit += UNIT_BYTES;
    if (__builtin_expect(index == *cursor->uncompressed_index, 0)) {
#pragma GCC unroll 4
        for (int i = 0; i < UNIT_STEPS; i++)
            words[i] = vi_load(cursor->uncompressed_unit + i * PANEL_WIDTH * 4);
        cursor->uncompressed_unit += UNCOMPRESSED_UNIT_BYTES;
        cursor->uncompressed_index++;
        return;
    }
    const vint first = vi_load(unit);
    const vint second = vi_load(unit + PANEL_WIDTH * 4);
    const vint codes = vi_load(unit + 2 * PANEL_WIDTH * 4);
    words[0] = join_parts(cursor->exponents, codes, first);
    words[1] = join_parts(cursor->exponents, vi_shift_right(codes, 4), swap_bytes(first));
    words[2] = join_parts(cursor->exponents, vi_shift_right(codes, 8), second);
    words[3] = join_parts(cursor->exponents, vi_shift_right(codes, 12), swap_bytes(second));
}

/* Convert a panel to words of two bfloat16. begin: 0, as panels are converted from their start. */
static void decompress_panel(const char *panel, int64_t begin, int64_t end, char *to) {
    PanelCursor cursor = open_panel(panel);
    (void)begin;
    for (int32_t unit = 0; unit < end / (2 * UNIT_STEPS); unit++, to += UNCOMPRESSED_UNIT_BYTES) {
        vint words[UNIT_STEPS];
        next_unit(&cursor, unit, words);
#pragma GCC unroll 4
        for (int k = 0; k < UNIT_STEPS; k++)
            vi_store(to + k * PANEL_WIDTH * 4, words[k]);
    }
}

/* ---- products with few rows ---- */

/* Compute n_rows rows of n_panels panels. The products are added in the order of `bf16_tile`. */
INLINE void compressed_tile(int n_rows, int n_panels, const Linear *p, int64_t row, int64_t panel,
                            const Prefetch *prefetch) {
    const int64_t depth = p->padded_depth;
    const uint16_t *inputs = (const uint16_t *)p->rounded_inputs + row * depth;
    PanelCursor cursors[FEW_ROWS_PANELS];
    vfloat acc[FEW_ROWS_PANELS][4];
    TileOutputs sums;
#pragma GCC unroll 16
    for (int j = 0; j < n_panels; j++) {
        cursors[j] = open_panel(p->weight + (panel + j) * p->panel_bytes);
#pragma GCC unroll 16
        for (int i = 0; i < n_rows; i++)
            acc[j][i] = v_zero();
    }
    for (int32_t unit = 0; unit < depth / (2 * UNIT_STEPS); unit++, inputs += 2 * UNIT_STEPS) {
#pragma GCC unroll 4
        for (int line = 0; line < UNIT_LINES; line++)
            prefetch_step(1, prefetch, n_panels, (int64_t)unit * UNIT_LINES + line);
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++) {
            vint words[UNIT_STEPS];
            next_unit(&cursors[j], unit, words);
#pragma GCC unroll 4
            for (int k = 0; k < UNIT_STEPS; k++)
#pragma GCC unroll 16
                for (int i = 0; i < n_rows; i++) {
                    int32_t two;
                    memcpy(&two, inputs + i * depth + 2 * k, sizeof two);
                    acc[j][i] = v_dot_bf16(acc[j][i], words[k], vi_set(two));
                }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < n_panels; j++)
#pragma GCC unroll 16
        for (int i = 0; i < n_rows; i++)
            v_store(sums[j][i], acc[j][i]);
    store_outputs(p, row, n_rows, panel, n_panels, sums);
}

/* N rows of all panels, PANELS at a time. */
#define DEFINE_COMPRESSED_ROWS(N, PANELS)                                                          \
    static void compressed_rows_##N(const Linear *p, int64_t row, int64_t panel,                   \
                                    int64_t end_panel) {                                           \
        Prefetch own = own_panels(p, panel);                                                       \
        for (; panel + PANELS <= end_panel; panel += PANELS, own.at += PANELS * own.stride)        \
            compressed_tile(N, PANELS, p, row, panel, &own);                                       \
        for (; panel < end_panel; panel++, own.at += own.stride)                                   \
            compressed_tile(N, 1, p, row, panel, &own);                                            \
    }
DEFINE_COMPRESSED_ROWS(1, FEW_ROWS_PANELS)
DEFINE_COMPRESSED_ROWS(2, FEW_ROWS_PANELS)
DEFINE_COMPRESSED_ROWS(3, INT8_PANELS)
DEFINE_COMPRESSED_ROWS(4, INT8_PANELS)

static void compressed_block(const Linear *p, int64_t row, int64_t end_row, int64_t panel,
                             int64_t end_panel) {
    for (; row < end_row; row += 4) {
        const int64_t n_rows = end_row - row;
        if (n_rows == 1)
            compressed_rows_1(p, row, panel, end_panel);
        else if (n_rows == 2)
            compressed_rows_2(p, row, panel, end_panel);
        else if (n_rows == 3)
            compressed_rows_3(p, row, panel, end_panel);
        else
            compressed_rows_4(p, row, panel, end_panel);
    }
}

/* ---- compression ---- */

INLINE int exponent_of(uint16_t value) {
    return value >> 7 & 255;
}

/* The top exponent with which the codes cover the most values of a panel. */
static int32_t choose_top_exponent(const uint16_t *values, int64_t n_values) {
    int32_t counts[4][256] = {{0}}; /* four, as neighbours often have one exponent */
    for (int64_t i = 0; i < n_values; i += 4)
        for (int j = 0; j < 4; j++)
            counts[j][exponent_of(values[i + j])]++;
    int32_t covered = 0;
    int32_t most = -1;
    int32_t best = NUM_CODED_EXPONENTS;
    for (int top = 1; top < 256; top++) {
        for (int j = 0; j < 4; j++) {
            covered += counts[j][top];
            if (top > NUM_CODED_EXPONENTS)
                covered -= counts[j][top - NUM_CODED_EXPONENTS];
        }
        if (covered >= most && top >= NUM_CODED_EXPONENTS) {
            most = covered;
            best = top;
        }
    }
    return best;
}

/* The codes of 32 values, and a bit for each value that has none. */
INLINE __m512i codes_of_values(__m512i values, int32_t top_exponent, __mmask32 *without) {
    const __m512i exponents =
        _mm512_and_si512(_mm512_srli_epi16(values, 7), _mm512_set1_epi16(255));
    const __m512i codes = _mm512_sub_epi16(_mm512_set1_epi16((short)top_exponent), exponents);
    const __mmask32 is_zero = _mm512_testn_epi16_mask(exponents, exponents);
    const __mmask32 is_outside =
        _mm512_cmpge_epu16_mask(codes, _mm512_set1_epi16(NUM_CODED_EXPONENTS));
    *without |= is_outside & ~is_zero;
    return _mm512_mask_mov_epi16(codes, is_zero, _mm512_set1_epi16(ZERO_CODE));
}

/* Compress a unit. Returns whether all of its values have codes. */
INLINE int compress_unit(const char *words, int32_t top_exponent, char *unit) {
    const vint mask = vi_set(SIGNS_AND_MANTISSAS);
    __m512i values[UNIT_STEPS];
    __m512i codes = _mm512_setzero_si512();
    __mmask32 without = 0;
#pragma GCC unroll 4
    for (int i = 0; i < UNIT_STEPS; i++) {
        values[i] = vi_load(words + i * PANEL_WIDTH * 4);
        codes = _mm512_or_si512(
            codes, _mm512_slli_epi16(codes_of_values(values[i], top_exponent, &without),
                                     (unsigned)(4 * i)));
        values[i] = vi_and(values[i], mask);
    }
    vi_store(unit, _mm512_or_si512(values[0], swap_bytes(values[1])));
    vi_store(unit + PANEL_WIDTH * 4, _mm512_or_si512(values[2], swap_bytes(values[3])));
    vi_store(unit + 2 * PANEL_WIDTH * 4, codes);
    return without == 0;
}

static void measure_panels(const void *operation, int64_t begin, int64_t end) {
    const Bf16Compression *o = operation;
    const int64_t panel_bytes = o->depth * PANEL_WIDTH * 2;
    for (int64_t panel = begin; panel < end; panel++) {
        const char *words = o->panels + panel * panel_bytes;
        const int32_t top =
            choose_top_exponent((const uint16_t *)words, o->depth * PANEL_WIDTH);
        int32_t n_uncompressed = 0;
        char unit[UNIT_BYTES];
        for (int64_t at = 0; at < panel_bytes; at += UNCOMPRESSED_UNIT_BYTES)
            n_uncompressed += !compress_unit(words + at, top, unit);
        o->top_exponents[panel] = top;
        o->n_uncompressed[panel] = n_uncompressed;
    }
}

static void compress_panels(const void *operation, int64_t begin, int64_t end) {
    const Bf16Compression *o = operation;
    const int32_t n_units = (int32_t)(o->depth / (2 * UNIT_STEPS));
    const int64_t panel_bytes = sizeof(CompressedHeader) + n_units * (int64_t)UNIT_BYTES;
    for (int64_t panel = begin; panel < end; panel++) {
        const char *words = o->panels + panel * (o->depth * PANEL_WIDTH * 2);
        char *to = o->to + panel * panel_bytes;
        const CompressedHeader header = {
            .top_exponent = o->top_exponents[panel],
            .n_uncompressed = o->n_uncompressed[panel],
            .uncompressed_part = o->uncompressed_starts[panel] - panel * panel_bytes,
            .no_unit = NO_UNIT,
        };
        char *part = to + header.uncompressed_part;
        char *indices = part + header.n_uncompressed * (int64_t)UNCOMPRESSED_UNIT_BYTES;
        memcpy(to, &header, sizeof header);
        to += sizeof header;
        for (int32_t unit = 0; unit < n_units; unit++) {
            const char *from = words + unit * (int64_t)UNCOMPRESSED_UNIT_BYTES;
            if (compress_unit(from, header.top_exponent, to + unit * (int64_t)UNIT_BYTES))
                continue;
            memcpy(part, from, UNCOMPRESSED_UNIT_BYTES);
            memcpy(indices, &unit, sizeof unit);
            part += UNCOMPRESSED_UNIT_BYTES;
            indices += sizeof unit;
        }
        if (header.n_uncompressed)
            memcpy(indices, &header.no_unit, sizeof header.no_unit);
    }
}

static int measure_bf16(const Bf16Compression *o) {
    run_ranges(o->n_panels, 1, measure_panels, o);
    return 1;
}

static int compress_bf16(const Bf16Compression *o) {
    run_ranges(o->n_panels, 1, compress_panels, o);
    return 1;
}
