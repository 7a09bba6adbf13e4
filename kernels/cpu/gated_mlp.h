/* An MLP with a gate: gate and up, the activation, and down, without the outputs of gate and up in
 * memory. The bits of the result are those of the three operations one after another.
 */

/* Of intermediate results; more rows run one part after another. */
enum { MLP_BYTES = 1 << 26 };

/* Some rows. x, y: of the first. Returns 0 when out of memory. */
static int gated_mlp_part(const GatedMlp *o, const float *x, float *y, int64_t rows) {
    LinearOperation first = {.layer = expert_layer(&o->linears[0], rows)};
    LinearOperation second = {.layer = expert_layer(&o->linears[1], rows)};
    Linear *gate_up = &first.layer;
    Linear *down = &second.layer;
    /* The activation's results are rounded when they are stored, unless their sums are wanted. */
    int rounds = down->inputs == INPUTS_BF16 && !down->input_quant && down->offsets == NULL;
    size_t intermediate_bytes = rounds ? 0 : whole_lines(rows * down->depth * sizeof(float));
    gate_up->x_is_rounded = o->x_is_rounded;
    size_t input_bytes = input_memory_bytes(gate_up);
    size_t down_input_bytes = input_memory_bytes(down);
    char *memory = NULL;
    if (intermediate_bytes + input_bytes + down_input_bytes) {
        memory =
            thread_scratch(SCRATCH_MLP, intermediate_bytes + input_bytes + down_input_bytes);
        if (memory == NULL)
            return 0;
    }
    gate_up->x = x;
    gate_up->x_stride = o->x_stride;
    gate_up->is_gated = 1;
    gate_up->activation = o->activation;
    gate_up->limit = o->limit;
    gate_up->alpha = o->alpha;
    use_input_memory(gate_up, input_bytes ? memory : NULL);
    down->x = rounds ? NULL : (float *)(memory + input_bytes);
    down->x_stride = down->depth;
    down->y = y;
    down->y_stride = down->cols;
    use_input_memory(down, down_input_bytes ? memory + input_bytes + intermediate_bytes : NULL);
    gate_up->y = (float *)down->x;
    gate_up->y_stride = down->x_stride;
    if (rounds) {
        gate_up->rounds_outputs = 1;
        gate_up->y = (float *)down->rounded_inputs;
        gate_up->y_stride = down->padded_depth;
        for (int64_t row = 0; down->depth < down->padded_depth && row < rows; row++)
            memset(down->rounded_inputs + (row * down->padded_depth + down->depth) * 2, 0,
                   (down->padded_depth - down->depth) * 2);
    }
    int64_t turns = num_threads() * PIECES_OF_THREAD;
    if (input_bytes)
        run_ranges(rows, 1 + PARALLEL_MIN_ELEMENTS / gate_up->depth, prepare_rows, gate_up);
    run_pieces(divide_layer(&first, turns), linear_piece, &first);
    if (down_input_bytes && !rounds)
        run_ranges(rows, 1 + PARALLEL_MIN_ELEMENTS / down->depth, prepare_rows, down);
    run_pieces(divide_layer(&second, turns), linear_piece, &second);
    return 1;
}

static int gated_mlp(const GatedMlp *o) {
    int64_t part_rows = MLP_BYTES / (o->linears[1].depth * (int64_t)sizeof(float));
    /* Tiles read whole blocks of rows: a part that began within one would read past the memory of
       rounded inputs (see INPUTS_ROUNDED). */
    part_rows = max_int64(part_rows / ROW_BLOCK, 1) * ROW_BLOCK;
    int64_t element_size = o->x_is_rounded ? 2 : 4;
    for (int64_t row = 0; row < o->rows; row += part_rows) {
        const char *x = (const char *)o->x + row * o->x_stride * element_size;
        if (!gated_mlp_part(o, (const float *)x, o->y + row * o->linears[1].cols,
                            min_int64(part_rows, o->rows - row)))
            return 0;
    }
    return 1;
}
