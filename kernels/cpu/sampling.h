/* Greedy sampling: the largest value of each row, and whether all values of a row are finite. */

enum { ARGMAX_BLOCK = 512, ARGMAX_PREFETCH = 1024 }; /* in values */

/* An integer in the order that torch.argmax has: -0 equals 0, and NaN is above infinity. */
static inline int32_t order_key(int32_t bits) {
    int32_t magnitude = bits & INT32_MAX;
    int32_t key = bits < 0 ? -magnitude : magnitude;
    return magnitude > 0x7f800000 ? INT32_MAX : key;
}

/* The column of the largest value, of whatever values. */
static int64_t argmax_by_bits(const float *row, int64_t cols) {
    int32_t largest = INT32_MIN;
    int64_t first = 0;
    for (int64_t i = 0; i < cols; i++) {
        int32_t bits;
        memcpy(&bits, row + i, sizeof bits);
        if (order_key(bits) > largest) {
            largest = order_key(bits);
            first = i;
        }
    }
    return first;
}

static void argmax_of_row(const float *row, int64_t cols, int64_t *id, uint8_t *is_finite) {
    enum { AT_ONCE = 4 };
    float largest = -INFINITY;
    int64_t first = 0; /* of the first block with the largest value */
    vfloat zeros[AT_ONCE] = {v_zero(), v_zero(), v_zero(), v_zero()}; /* NaN: not finite */
    for (int64_t begin = 0; begin < cols; begin += ARGMAX_BLOCK) {
        int64_t end = begin + ARGMAX_BLOCK < cols ? begin + ARGMAX_BLOCK : cols;
        vfloat lanes[AT_ONCE];
        for (int j = 0; j < AT_ONCE; j++)
            lanes[j] = v_set(-INFINITY);
        int64_t i = begin;
        for (; i + AT_ONCE * VECTOR_WIDTH <= end; i += AT_ONCE * VECTOR_WIDTH)
#pragma GCC unroll 4
            for (int j = 0; j < AT_ONCE; j++) {
                __builtin_prefetch(row + i + ARGMAX_PREFETCH + j * VECTOR_WIDTH);
                vfloat x = v_load(row + i + j * VECTOR_WIDTH);
                lanes[j] = v_max(x, lanes[j]);
                zeros[j] = v_fma(x, v_zero(), zeros[j]);
            }
        float block_largest = -INFINITY;
        for (; i < end; i++) {
            block_largest = row[i] > block_largest ? row[i] : block_largest;
            zeros[0] = v_fma(v_set(row[i]), v_zero(), zeros[0]);
        }
        vfloat both = v_max(v_max(lanes[0], lanes[1]), v_max(lanes[2], lanes[3]));
        float of_lanes = v_largest(both);
        block_largest = of_lanes > block_largest ? of_lanes : block_largest;
        if (block_largest > largest) {
            largest = block_largest;
            first = begin;
        }
    }
    float sum = v_sum(v_add(v_add(zeros[0], zeros[1]), v_add(zeros[2], zeros[3])));
    *is_finite = sum == 0;
    if (*is_finite)
        while (row[first] != largest)
            first++;
    else
        first = argmax_by_bits(row, cols);
    *id = first;
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
