/* Weights of bfloat16 in 12 bits, without loss: every level that reads them gives the bits that it
 * gives with WEIGHT_BF16. One stream reads all weights for each token, and with a quarter less to
 * read it is faster.
 *
 * The exponents of a weight are few. A panel has codes of 4 bits for 15 consecutive exponents, from
 * the one called `top_exponent` down, and for the exponent 0 (zeros and subnormal numbers). A unit
 * is UNIT_WORDS steps over depth (see linear.h) in three vectors of 16-bit lanes, a lane for each
 * word half of a step:
 *
 * - the signs and digits of steps 0 and 1: step 0 has bit 15 and bits 0 to 6, as in bfloat16, and
 *   step 1 the same bits after the bytes of the lane are swapped;
 * - those of steps 2 and 3, in the same way;
 * - the codes of steps 0 to 3, from the lowest bits up.
 *
 * A unit with other exponents is stored plain, behind the panels, and its three vectors are not
 * read. In trained models these are less than one in a hundred.
 */

enum {
    UNIT_WORDS = 4,
    UNIT_LINES = 3, /* of 64 bytes */
    UNIT_BYTES = UNIT_LINES * PANEL_WIDTH * 4,
    PLAIN_UNIT_BYTES = UNIT_WORDS * PANEL_WIDTH * 4,
    WINDOW = 15, /* exponents with codes, without 0 */
    ZERO_CODE = 15,
    SIGNS_AND_DIGITS = (int)0x807f807f
};

/* The first bytes of a panel, before its units. */
typedef struct {
    int32_t top_exponent;
    int32_t n_plain_units;
    int64_t plain_part; /* the plain units, then their numbers and NO_UNIT; bytes from here on */
    int32_t no_unit;    /* NO_UNIT: the numbers of a panel without plain units */
    char padding[COMPRESSED_HEADER_BYTES - 20];
} CompressedHeader;

enum { NO_UNIT = INT32_MAX };

/* Where a tile is in a panel. */
typedef struct {
    const char *unit;        /* the next one */
    const char *plain_unit;  /* the next one that is stored plain, */
    const int32_t *number;   /* and its number */
    vint exponents;          /* of the codes: 32 halves, as bit 4 of an index may be anything */
} CompressedPanel;

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

INLINE CompressedPanel open_panel(const char *panel) {
    const CompressedHeader *header = (const CompressedHeader *)panel;
    const char *plain = panel + header->plain_part;
    const char *numbers = header->n_plain_units
                              ? plain + header->n_plain_units * (int64_t)PLAIN_UNIT_BYTES
                              : (const char *)&header->no_unit;
    return (CompressedPanel){
        .unit = panel + sizeof *header,
        .plain_unit = plain,
        .number = (const int32_t *)numbers,
        .exponents = exponents_of_codes(header->top_exponent),
    };
}

/* The signs and digits of a step beside the exponents of its codes, which are the lowest bits of
 * the halves. */
INLINE vint join_parts(vint exponents, vint codes, vint digits) {
    return _mm512_ternarylogic_epi32(_mm512_permutexvar_epi16(codes, exponents), digits,
                                     vi_set(SIGNS_AND_DIGITS), 0xf8); /* a | (b & c) */
}

/* The words of the next unit, whose number is `number`, as WEIGHT_BF16 has them. */
INLINE void next_unit(CompressedPanel *panel, int32_t number, vint *words) {
    const char *unit = panel->unit;
    panel->unit += UNIT_BYTES;
    if (__builtin_expect(number == *panel->number, 0)) {
#pragma GCC unroll 4
        for (int i = 0; i < UNIT_WORDS; i++)
            words[i] = vi_load(panel->plain_unit + i * PANEL_WIDTH * 4);
        panel->plain_unit += PLAIN_UNIT_BYTES;
        panel->number++;
        return;
    }
    const vint first = vi_load(unit);
    const vint second = vi_load(unit + PANEL_WIDTH * 4);
    const vint codes = vi_load(unit + 2 * PANEL_WIDTH * 4);
    words[0] = join_parts(panel->exponents, codes, first);
    words[1] = join_parts(panel->exponents, vi_shift_right(codes, 4), swap_bytes(first));
    words[2] = join_parts(panel->exponents, vi_shift_right(codes, 8), second);
    words[3] = join_parts(panel->exponents, vi_shift_right(codes, 12), swap_bytes(second));
}

/* Convert a panel to bfloat16, as WEIGHT_BF16 has it. */
static void decompress_panel(const char *panel, int64_t begin, int64_t end, char *to) {
    CompressedPanel compressed = open_panel(panel);
    (void)begin; /* 0: panels are converted whole */
    for (int32_t unit = 0; unit < end / (2 * UNIT_WORDS); unit++, to += PLAIN_UNIT_BYTES) {
        vint words[UNIT_WORDS];
        next_unit(&compressed, unit, words);
#pragma GCC unroll 4
        for (int k = 0; k < UNIT_WORDS; k++)
            vi_store(to + k * PANEL_WIDTH * 4, words[k]);
    }
}

/* ---- products with few rows ---- */

/* Compute n_rows rows of n_panels panels. The products are added in the order of `bf16_tile`. */
INLINE void compressed_tile(int n_rows, int n_panels, const Linear *p, int64_t row, int64_t panel,
                            const Prefetch *prefetch) {
    const int64_t depth = p->padded_depth;
    const uint16_t *inputs = (const uint16_t *)p->rounded_inputs + row * depth;
    CompressedPanel panels[FEW_ROWS_PANELS];
    vfloat acc[FEW_ROWS_PANELS][4];
    TileOutputs sums;
#pragma GCC unroll 16
    for (int j = 0; j < n_panels; j++) {
        panels[j] = open_panel(p->weight + (panel + j) * p->panel_bytes);
#pragma GCC unroll 16
        for (int i = 0; i < n_rows; i++)
            acc[j][i] = v_zero();
    }
    for (int32_t unit = 0; unit < depth / (2 * UNIT_WORDS); unit++, inputs += 2 * UNIT_WORDS) {
#pragma GCC unroll 4
        for (int line = 0; line < UNIT_LINES; line++)
            prefetch_step(1, prefetch, n_panels, (int64_t)unit * UNIT_LINES + line);
#pragma GCC unroll 16
        for (int j = 0; j < n_panels; j++) {
            vint words[UNIT_WORDS];
            next_unit(&panels[j], unit, words);
#pragma GCC unroll 4
            for (int k = 0; k < UNIT_WORDS; k++)
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
    int32_t best = WINDOW;
    for (int top = 1; top < 256; top++) {
        for (int j = 0; j < 4; j++) {
            covered += counts[j][top];
            if (top > WINDOW)
                covered -= counts[j][top - WINDOW];
        }
        if (covered >= most && top >= WINDOW) {
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
    const __mmask32 is_outside = _mm512_cmpge_epu16_mask(codes, _mm512_set1_epi16(WINDOW));
    *without |= is_outside & ~is_zero;
    return _mm512_mask_mov_epi16(codes, is_zero, _mm512_set1_epi16(ZERO_CODE));
}

/* Compress a unit. Returns whether all of its values have codes. */
INLINE int compress_unit(const char *words, int32_t top_exponent, char *unit) {
    const vint mask = vi_set(SIGNS_AND_DIGITS);
    __m512i values[UNIT_WORDS];
    __m512i codes = _mm512_setzero_si512();
    __mmask32 without = 0;
#pragma GCC unroll 4
    for (int i = 0; i < UNIT_WORDS; i++) {
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
        int32_t n_plain = 0;
        char unit[UNIT_BYTES];
        for (int64_t at = 0; at < panel_bytes; at += PLAIN_UNIT_BYTES)
            n_plain += !compress_unit(words + at, top, unit);
        o->top_exponents[panel] = top;
        o->n_plain_units[panel] = n_plain;
    }
}

static void compress_panels(const void *operation, int64_t begin, int64_t end) {
    const Bf16Compression *o = operation;
    const int32_t n_units = (int32_t)(o->depth / (2 * UNIT_WORDS));
    const int64_t panel_bytes = sizeof(CompressedHeader) + n_units * (int64_t)UNIT_BYTES;
    for (int64_t panel = begin; panel < end; panel++) {
        const char *words = o->panels + panel * (o->depth * PANEL_WIDTH * 2);
        char *to = o->to + panel * panel_bytes;
        const CompressedHeader header = {
            .top_exponent = o->top_exponents[panel],
            .n_plain_units = o->n_plain_units[panel],
            .plain_part = o->plain_starts[panel] - panel * panel_bytes,
            .no_unit = NO_UNIT,
        };
        char *plain = to + header.plain_part;
        char *numbers = plain + header.n_plain_units * (int64_t)PLAIN_UNIT_BYTES;
        memcpy(to, &header, sizeof header);
        to += sizeof header;
        for (int32_t unit = 0; unit < n_units; unit++) {
            const char *from = words + unit * (int64_t)PLAIN_UNIT_BYTES;
            if (compress_unit(from, header.top_exponent, to + unit * (int64_t)UNIT_BYTES))
                continue;
            memcpy(plain, from, PLAIN_UNIT_BYTES);
            memcpy(numbers, &unit, sizeof unit);
            plain += PLAIN_UNIT_BYTES;
            numbers += sizeof unit;
        }
        if (header.n_plain_units)
            memcpy(numbers, &header.no_unit, sizeof header.no_unit);
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
