/* Greedy sampling: the largest value of each row, and whether all values of a row are finite.
 *
 * Plain loops over integers, which compilers vectorize. */

enum { ARGMAX_BLOCK = 512 };

/* An integer in the order that torch.argmax has: -0 equals 0, and NaN is above infinity. */
static inline int32_t order_key(int32_t bits) {
    int32_t magnitude = bits & INT32_MAX;
    int32_t key = bits < 0 ? -magnitude : magnitude;
    return magnitude > 0x7f800000 ? INT32_MAX : key;
}

static void argmax_of_row(const int32_t *row, int64_t cols, int64_t *id, uint8_t *is_finite) {
    int32_t largest = INT32_MIN;
    int32_t largest_magnitude = 0;
    int64_t first = 0; /* of the first block with the largest value */
    for (int64_t begin = 0; begin < cols; begin += ARGMAX_BLOCK) {
        int64_t end = begin + ARGMAX_BLOCK < cols ? begin + ARGMAX_BLOCK : cols;
        int32_t block_largest = INT32_MIN;
        for (int64_t i = begin; i < end; i++) {
            int32_t key = order_key(row[i]);
            int32_t magnitude = row[i] & INT32_MAX;
            block_largest = key > block_largest ? key : block_largest;
            largest_magnitude = magnitude > largest_magnitude ? magnitude : largest_magnitude;
        }
        if (block_largest > largest) {
            largest = block_largest;
            first = begin;
        }
    }
    while (order_key(row[first]) != largest)
        first++;
    *id = first;
    *is_finite = largest_magnitude < 0x7f800000;
}

static void argmax_of_rows(const void *operation, int64_t begin, int64_t end) {
    const Argmax *o = operation;
    for (int64_t row = begin; row < end; row++)
        argmax_of_row(o->x + row * o->x_stride, o->cols, o->ids + row, o->is_finite + row);
}

static int argmax(const Argmax *o) {
    run_ranges(o->rows, 1 + PARALLEL_MIN_ELEMENTS / o->cols, argmax_of_rows, o);
    return 1;
}
