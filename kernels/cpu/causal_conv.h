/* The short causal convolutions of recurrent layers; see causal_conv.py.
 *
 * Threads share the channels and the sequences. A token's output depends only on its own inputs and
 * the few before it, in one order of sums, so that it does not depend on where a prompt is cut. */

enum { CONV_BLOCK = 128 }; /* channels that are computed together */

/* A block of channels: the filters by tap, and the inputs that are not in memory as they are. */
typedef struct {
    int64_t first_channel;
    int64_t n_channels;
    float taps[MAX_CONV_WIDTH][CONV_BLOCK];
    float bias[CONV_BLOCK];
    float inputs[MAX_CONV_WIDTH][CONV_BLOCK];
} ConvBlock;

INLINE void load_taps(const float *weight, ConvBlock *block, int64_t width) {
    for (int64_t k = 0; k < width; k++)
        for (int64_t d = 0; d < block->n_channels; d++)
            block->taps[k][d] = weight[d * width + k];
}

static void load_filters(const CausalConv *o, int64_t first_channel, ConvBlock *block) {
    block->first_channel = first_channel;
    block->n_channels = min_int64(o->n_channels - first_channel, CONV_BLOCK);
    const float *weight = o->weight + first_channel * o->width;
    if (o->width == 4)
        load_taps(weight, block, 4);
    else if (o->width == 3)
        load_taps(weight, block, 3);
    else
        load_taps(weight, block, o->width);
    if (o->bias)
        memcpy(block->bias, o->bias + first_channel, block->n_channels * sizeof(float));
    else
        memset(block->bias, 0, sizeof block->bias);
}

/* The inputs before a sequence's first new token. They are copied: the row may be written before
 * all of them are read. */
static void load_initial_inputs(const CausalConv *o, int64_t row, ConvBlock *block) {
    size_t bytes = block->n_channels * sizeof(float);
    for (int64_t k = 0; k < o->width - 1; k++) {
        const float *from = o->state + (row * (o->width - 1) + k) * o->n_channels;
        if (row < 0)
            memset(block->inputs[k], 0, bytes);
        else
            memcpy(block->inputs[k], from + block->first_channel, bytes);
    }
}

/* The output of a token. inputs: [width], the oldest first. c: NULL, or what multiplies it. */
INLINE void conv_token(const ConvBlock *block, const float *const *inputs, const float *c, float *y,
                       int64_t width, int silu) {
    int64_t n_channels = block->n_channels;
    for (int64_t d = 0; d < n_channels; d += VECTOR_WIDTH) {
        vfloat sum = v_load(block->bias + d);
#pragma GCC unroll 4
        for (int64_t k = 0; k < width; k++)
            sum = v_fma(load_of_row(inputs[k], d, n_channels), v_load(block->taps[k] + d), sum);
        if (silu)
            sum = activate(sum, ACT_SILU);
        if (c)
            sum = v_mul(sum, load_of_row(c, d, n_channels));
        store_of_row(y, d, n_channels, sum);
    }
}

/* A block of channels of all new tokens of a sequence. width: o->width. */
INLINE void conv_sequence_with(const CausalConv *o, int64_t sequence, int64_t first_token,
                               ConvBlock *block, int64_t width) {
    const RecurrentRows *rows = &o->rows;
    int64_t n_channels = block->n_channels;
    int64_t write = rows->write_starts[sequence];
    int64_t end_of_writes = rows->write_starts[sequence + 1];
    load_initial_inputs(o, rows->initial_rows[sequence], block);
    const float *inputs[MAX_CONV_WIDTH];
    for (int64_t k = 0; k < width - 1; k++)
        inputs[k] = block->inputs[k];
    for (int64_t t = 0; t < rows->query_lens[sequence]; t++) {
        const float *x = o->x + (first_token + t) * o->x_stride + block->first_channel;
        float *y = o->y + (first_token + t) * o->n_channels + block->first_channel;
        const float *c = NULL;
        if (o->gated) {
            c = x + o->n_channels;
            float *product = block->inputs[(width - 1 + t) % width];
            for (int64_t d = 0; d < n_channels; d += VECTOR_WIDTH) {
                vfloat b = load_of_row(x, d, n_channels);
                vfloat gated = load_of_row(x + 2 * o->n_channels, d, n_channels);
                v_store(product + d, v_mul(b, gated));
            }
            x = product;
        }
        inputs[width - 1] = x;
        conv_token(block, inputs, c, y, width, o->silu);
        for (; write < end_of_writes && rows->write_ends[write] == t + 1; write++) {
            float *row = o->state + rows->write_rows[write] * (width - 1) * o->n_channels;
            for (int64_t k = 1; k < width; k++)
                memcpy(row + (k - 1) * o->n_channels + block->first_channel, inputs[k],
                       n_channels * sizeof(float));
        }
        for (int64_t k = 1; k < width; k++)
            inputs[k - 1] = inputs[k];
    }
}

/* Items are blocks of channels of a sequence. The sequences of a block are neighbours, so that a
 * thread rarely has all blocks of the longest one. */
static void conv_items(const void *operation, int64_t begin, int64_t end) {
    const CausalConv *o = operation;
    ConvBlock block;
    int64_t sequence = begin % o->rows.n_sequences;
    int64_t first_token = 0;
    for (int64_t i = 0; i < sequence; i++)
        first_token += o->rows.query_lens[i];
    for (int64_t item = begin; item < end; item++) {
        if (item == begin || sequence == 0)
            load_filters(o, item / o->rows.n_sequences * CONV_BLOCK, &block);
        if (o->width == 4)
            conv_sequence_with(o, sequence, first_token, &block, 4);
        else if (o->width == 3)
            conv_sequence_with(o, sequence, first_token, &block, 3);
        else
            conv_sequence_with(o, sequence, first_token, &block, o->width);
        first_token += o->rows.query_lens[sequence];
        if (++sequence == o->rows.n_sequences)
            sequence = first_token = 0;
    }
}

static int causal_conv(const CausalConv *o) {
    int64_t n_blocks = (o->n_channels + CONV_BLOCK - 1) / CONV_BLOCK;
    int64_t n_items = n_blocks * o->rows.n_sequences;
    int64_t n_elements = o->n_tokens * o->n_channels;
    run_ranges(n_items, 1 + n_items * ACT_MIN_ELEMENTS / (n_elements + 1), conv_items, o);
    return 1;
}
