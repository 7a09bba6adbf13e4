/* Checks amx_emulation.h against figures that follow from Intel's pseudocode by hand. Needs a
 * processor with AVX-512. Prints "passed", or exits with 1 after the first difference. */

#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "amx_emulation.h"

static void expect(int condition, const char *what) {
    if (condition)
        return;
    printf("%s\n", what);
    exit(1);
}

/* Configure tile 0 for sums, 1 for the left and 2 for the right side of a product. */
static void configure(int rows, int words, int columns) {
    EmulatedConfig config = {.palette = 1,
                             .row_bytes = {(uint16_t)(4 * columns), (uint16_t)(4 * words),
                                           (uint16_t)(4 * columns)},
                             .rows = {(uint8_t)rows, (uint8_t)rows, (uint8_t)words}};
    _tile_loadconfig(&config);
}

/* A word of two bfloat16 that hold these floats exactly. */
static uint32_t pair(float low, float high) {
    uint32_t words[2];
    memcpy(&words[0], &low, sizeof low);
    memcpy(&words[1], &high, sizeof high);
    return words[0] >> 16 | words[1];
}

/* The sum of one row and one column of two words. */
static float multiply(float sum, const uint32_t *left, const uint32_t *right) {
    configure(1, 2, 1);
    _tile_loadd(0, &sum, 4);
    _tile_loadd(1, left, 8);
    _tile_loadd(2, right, 4);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, &sum, 4);
    return sum;
}

static void check_bf16(void) {
    const uint32_t ones[] = {pair(1, 1), pair(1, 1)};
    const float large = 16777216; /* 2^24: 1 is half of its last bit */
    const uint32_t separate[] = {pair(large, -large), pair(1, 0)};
    expect(multiply(0, separate, ones) == 0, "low and high halves are not summed separately");
    const uint32_t ordered[] = {pair(1, 0), pair(1, 0)};
    expect(multiply(large, ordered, ones) == large + 2, "the sums do not begin with 0");
    const float tiny = ldexpf(1, -100);
    const uint32_t tinies[] = {pair(tiny, 0), 0};
    expect(multiply(0, tinies, tinies) == 0, "a result below the smallest float is not 0");
    const uint32_t denormal[] = {1, 0};
    const uint32_t huge[] = {pair(ldexpf(1, 127), 0), 0};
    expect(multiply(0, denormal, huge) == 0, "a denormal input is not 0");
    const float denormal_sum = ldexpf(1, -130);
    expect(multiply(denormal_sum, denormal, denormal) == 0, "a denormal sum is not 0");
    volatile float denormal_float = denormal_sum;
    expect(denormal_float / 2 != 0, "MXCSR has changed");
}

static void check_int8(void) {
    int8_t left[2][4] = {{-128, 127, 3, -4}, {1, 0, 0, 0}};
    int8_t right[2][4] = {{-128, 127, -5, 6}, {0, 0, 0, 1}};
    int32_t sums[2][2] = {{10, INT32_MAX}, {0, 0}};
    configure(2, 1, 2);
    _tile_loadd(0, sums, 8);
    _tile_loadd(1, left, 4);
    _tile_loadd(2, right, 8);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, sums, 8);
    expect(sums[0][0] == 10 + 16384 + 16129 - 15 - 24, "a sum of signed bytes");
    expect(sums[0][1] == INT32_MAX - 4 && sums[1][0] == -128 && sums[1][1] == 0, "other sums");
    int8_t ones[2][4] = {{0, 0, 0, -1}, {0, 0, 0, -1}};
    sums[0][1] = INT32_MAX;
    _tile_loadd(0, sums, 8);
    _tile_loadd(1, ones, 4);
    _tile_loadd(2, ones, 8);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, sums, 8);
    expect(sums[0][1] == INT32_MIN, "sums do not wrap");
}

static void check_shapes(void) {
    uint32_t memory[16][16];
    uint32_t copy[16][16];
    memset(memory, 1, sizeof memory);
    memset(copy, 2, sizeof copy);
    configure(3, 2, 5);
    _tile_loadd(0, memory, 64);
    _tile_stored(0, copy, 64);
    expect(copy[2][4] == 0x01010101 && copy[2][5] == 0x02020202 && copy[3][0] == 0x02020202,
           "a store beyond the rows or columns");
    _tile_zero(0);
    _tile_stored(0, copy, 64);
    expect(copy[2][4] == 0, "TILEZERO");
    _tile_loadd(0, memory, 64);
    configure(16, 16, 16);
    _tile_stored(0, copy, 64);
    expect(copy[0][0] == 0, "a new configuration leaves data in tiles");
}

static void use_no_configuration(void) {
    _tile_release();
    _tile_zero(0);
}
static void use_unconfigured_tile(void) {
    _tile_zero(3);
}
static void use_missing_tile(void) {
    _tile_zero(8);
}
static void use_tile_twice(void) {
    configure(16, 16, 16);
    _tile_dpbssd(0, 1, 1);
}
static void use_other_words(void) {
    configure(2, 3, 4);
    _tile_dpbf16ps(0, 2, 1);
}
static void use_too_many_rows(void) {
    configure(17, 1, 1);
}
static void use_reserved_byte(void) {
    _tile_loadconfig(&(EmulatedConfig){.palette = 1, .reserved = {[13] = 1}});
}
static void use_rows_without_bytes(void) {
    _tile_loadconfig(&(EmulatedConfig){.palette = 1, .rows = {1}});
}
static void use_ninth_tile(void) {
    _tile_loadconfig(&(EmulatedConfig){.palette = 1, .rows = {[8] = 1}, .row_bytes = {[8] = 4}});
}

static void check_faults(void) {
    static void (*const faults[])(void) = {
        use_no_configuration, use_unconfigured_tile, use_missing_tile,
        use_tile_twice,       use_other_words,       use_too_many_rows,
        use_reserved_byte,    use_rows_without_bytes, use_ninth_tile,
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        int status = 0;
        configure(2, 2, 2);
        pid_t child = fork();
        if (child == 0) {
            close(STDERR_FILENO);
            faults[i]();
            _exit(0);
        }
        expect(waitpid(child, &status, 0) == child, "no child process");
        char what[32];
        snprintf(what, sizeof what, "no fault %d", (int)i);
        expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, what);
    }
}

int main(void) {
    check_bf16();
    check_int8();
    check_shapes();
    check_faults();
    printf("passed\n");
    return 0;
}
