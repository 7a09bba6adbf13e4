/* The tile instructions of AMX in C: a double for tests on processors without AMX.
 *
 * A file that is compiled with `-include amx_emulation.h` runs its tiles here and knows nothing of
 * it. The rest of kernels/cpu/level_amx.c needs AVX-512 with VNNI and BF16.
 *
 * The functions follow the pseudocode of Intel's Software Developer's Manual, volume 2 (LDTILECFG,
 * TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TDPBF16PS, TILERELEASE). What it lists as a fault (#UD,
 * #GP) ends the program with a message. Not emulated: the restart of a load or a store after a page
 * fault, and bytes of memory that the processor may not read.
 */

#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Palette 1. */
enum { EMULATED_TILES = 8, EMULATED_ROWS = 16, EMULATED_ROW_BYTES = 64 };

/* What LDTILECFG reads. */
typedef struct {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} EmulatedConfig;

typedef struct {
    int rows; /* 0: not configured */
    int row_bytes;
    uint8_t data[EMULATED_ROWS][EMULATED_ROW_BYTES]; /* 0 beyond rows and row_bytes */
} EmulatedTile;

/* Each thread has its own tiles, as each logical processor has. */
static _Thread_local struct {
    int is_configured;
    EmulatedTile tiles[EMULATED_TILES];
} emulated;

static inline void emulated_require(int condition, const char *instruction, const char *what) {
    if (condition)
        return;
    fprintf(stderr, "emulated %s: a fault, because %s\n", instruction, what);
    abort();
}

/* TILERELEASE: the initial state. */
static inline void emulated_tile_release(void) {
    memset(&emulated, 0, sizeof emulated);
}

/* LDTILECFG: new shapes, and zeros in all tiles. */
static inline void emulated_tile_loadconfig(const void *memory) {
    static const uint8_t zeros[14];
    EmulatedConfig config;
    memcpy(&config, memory, sizeof config);
    emulated_tile_release();
    if (config.palette == 0)
        return;
    emulated_require(config.palette == 1, "LDTILECFG", "the palette is neither 0 nor 1");
    emulated_require(config.start_row == 0, "LDTILECFG", "a restart is not emulated");
    emulated_require(memcmp(config.reserved, zeros, sizeof zeros) == 0, "LDTILECFG",
                     "reserved bytes are not 0");
    for (int i = 0; i < 16; i++) {
        int rows = config.rows[i];
        int row_bytes = config.row_bytes[i];
        emulated_require(i < EMULATED_TILES || (rows == 0 && row_bytes == 0), "LDTILECFG",
                         "the palette has 8 tiles");
        emulated_require(rows <= EMULATED_ROWS && row_bytes <= EMULATED_ROW_BYTES, "LDTILECFG",
                         "a tile has more than 16 rows or 64 bytes a row");
        emulated_require((rows == 0) == (row_bytes == 0), "LDTILECFG",
                         "a tile has rows without bytes, or bytes without rows");
        if (i < EMULATED_TILES) {
            emulated.tiles[i].rows = rows;
            emulated.tiles[i].row_bytes = row_bytes;
        }
    }
    emulated.is_configured = 1;
}

static inline EmulatedTile *emulated_tile(int tile, const char *instruction) {
    emulated_require(emulated.is_configured, instruction, "no tiles are configured");
    emulated_require(tile >= 0 && tile < EMULATED_TILES, instruction, "there is no such tile");
    emulated_require(emulated.tiles[tile].rows > 0, instruction, "the tile is not configured");
    return &emulated.tiles[tile];
}

/* TILEZERO */
static inline void emulated_tile_zero(int tile) {
    EmulatedTile *to = emulated_tile(tile, "TILEZERO");
    memset(to->data, 0, sizeof to->data);
}

/* TILELOADD, and TILELOADDT1, which is a hint. stride: in bytes. */
static inline void emulated_tile_loadd(int tile, const void *base, int64_t stride) {
    EmulatedTile *to = emulated_tile(tile, "TILELOADD");
    memset(to->data, 0, sizeof to->data);
    for (int row = 0; row < to->rows; row++)
        memcpy(to->data[row], (const char *)base + row * stride, to->row_bytes);
}

/* TILESTORED */
static inline void emulated_tile_stored(int tile, void *base, int64_t stride) {
    const EmulatedTile *from = emulated_tile(tile, "TILESTORED");
    for (int row = 0; row < from->rows; row++)
        memcpy((char *)base + row * stride, from->data[row], from->row_bytes);
}

/* The tiles of a product: sums [M, N], left [M, K] and right [K, N] in words of 32 bits. */
typedef struct {
    EmulatedTile *sums;
    const EmulatedTile *left;
    const EmulatedTile *right;
    int left_words;    /* of a row */
    __mmask16 columns; /* of the sums: those that exist */
} EmulatedProduct;

static inline EmulatedProduct emulated_product(int sums, int left, int right,
                                               const char *instruction) {
    emulated_require(sums != left && sums != right && left != right, instruction,
                     "two of its tiles are the same");
    EmulatedProduct p = {
        .sums = emulated_tile(sums, instruction),
        .left = emulated_tile(left, instruction),
        .right = emulated_tile(right, instruction),
    };
    emulated_require(p.sums->row_bytes % 4 == 0 && p.left->row_bytes % 4 == 0 &&
                         p.right->row_bytes % 4 == 0,
                     instruction, "rows do not consist of whole words");
    emulated_require(p.sums->rows == p.left->rows, instruction, "the left rows are not the sums'");
    emulated_require(p.sums->row_bytes == p.right->row_bytes, instruction,
                     "the right columns are not the sums'");
    emulated_require(p.left->row_bytes / 4 == p.right->rows, instruction,
                     "the left tile has other words in a row than the right tile has rows");
    p.left_words = p.left->row_bytes / 4;
    p.columns = (__mmask16)((1u << p.sums->row_bytes / 4) - 1);
    return p;
}

/* The word `word` of a row of a tile, for all columns. */
__attribute__((target("avx512f"))) static inline __m512i
emulated_word(const EmulatedTile *tile, int row, int word) {
    int32_t bits;
    memcpy(&bits, tile->data[row] + 4 * word, sizeof bits);
    return _mm512_set1_epi32(bits);
}

/* TDPBSSD: the products of four signed bytes at a time, summed modulo 2^32. */
__attribute__((target("avx512f"))) static inline void
emulated_tile_dpbssd(int sums, int left, int right) {
    const EmulatedProduct p = emulated_product(sums, left, right, "TDPBSSD");
    for (int m = 0; m < p.sums->rows; m++) {
        __m512i row = _mm512_loadu_si512(p.sums->data[m]);
        for (int k = 0; k < p.left_words; k++) {
            __m512i a = emulated_word(p.left, m, k);
            __m512i b = _mm512_loadu_si512(p.right->data[k]);
            for (unsigned shift = 0; shift < 32; shift += 8) { /* bytes 3 .. 0, with their sign */
                __m512i a_byte = _mm512_srai_epi32(_mm512_slli_epi32(a, shift), 24);
                __m512i b_byte = _mm512_srai_epi32(_mm512_slli_epi32(b, shift), 24);
                row = _mm512_add_epi32(row, _mm512_mullo_epi32(a_byte, b_byte));
            }
        }
        _mm512_storeu_si512(p.sums->data[m], _mm512_maskz_mov_epi32(p.columns, row));
    }
}

/* The low half (0) or the high half (1) of each word, a bfloat16, as a float. */
__attribute__((target("avx512f"))) static inline __m512 emulated_bf16(__m512i words, int half) {
    __m512i high = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_castsi512_ps(half ? _mm512_and_si512(words, high)
                                    : _mm512_slli_epi32(words, 16));
}

/* The sums of a row: those of the low halves and those of the high halves are chains of fused
 * multiply-adds that begin with 0, over the words of the row. Their sum is added. */
__attribute__((target("avx512f"), noinline)) static void
emulated_bf16_row(const EmulatedProduct *p, int m) {
    __m512 low = _mm512_setzero_ps();
    __m512 high = _mm512_setzero_ps();
    for (int k = 0; k < p->left_words; k++) {
        __m512i a = emulated_word(p->left, m, k);
        __m512i b = _mm512_loadu_si512(p->right->data[k]);
        low = _mm512_fmadd_ps(emulated_bf16(a, 0), emulated_bf16(b, 0), low);
        high = _mm512_fmadd_ps(emulated_bf16(a, 1), emulated_bf16(b, 1), high);
    }
    __m512 row = _mm512_loadu_ps(p->sums->data[m]);
    row = _mm512_add_ps(row, _mm512_add_ps(low, high));
    _mm512_storeu_ps(p->sums->data[m], _mm512_maskz_mov_ps(p->columns, row));
}

/* TDPBF16PS: rounds to the nearest, ties to even, takes denormal inputs as 0 and writes 0 for
 * denormal results, whatever MXCSR says. */
static inline void emulated_tile_dpbf16ps(int sums, int left, int right) {
    const EmulatedProduct p = emulated_product(sums, left, right, "TDPBF16PS");
    const unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* no exceptions; denormals are 0 as inputs and as results */
    for (int m = 0; m < p.sums->rows; m++)
        emulated_bf16_row(&p, m);
    _mm_setcsr(mxcsr);
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_loadd emulated_tile_loadd
#define _tile_stream_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_zero emulated_tile_zero
#define _tile_dpbssd emulated_tile_dpbssd
#define _tile_dpbf16ps emulated_tile_dpbf16ps

#endif
