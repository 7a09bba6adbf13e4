/* Mixtures of experts: the choice of each token's experts, and the sum of their outputs.
 *
 * Rows are sorted by expert, then multiplied by linear.h. The order of summation does not depend on
 * which other tokens are in the step: linear.h promises it for each expert, and a token's outputs
 * are added in the order of its choices.
 */

/* Of intermediate results; more tokens run one part after another. */
enum { EXPERTS_BYTES = 1 << 26 };

/* ---- the router ---- */

/* The index of the largest value that is not taken; 0 when all are. NaN is the largest, as in
 * torch. Of equal values, the first. */
static int64_t largest_index(const float *values, const uint8_t *taken, int64_t n) {
    int64_t best = 0;
    int has_best = 0;
    for (int64_t i = 0; i < n; i++) {
        if (taken[i])
            continue;
        if (!has_best || values[i] > values[best] || (isnan(values[i]) && !isnan(values[best]))) {
            best = i;
            has_best = 1;
        }
    }
    return best;
}

/* Scores of a token's experts. */
static void router_scores(const Router *o, const float *logits, float *scores) {
    int64_t n = o->n_experts;
    float largest = -INFINITY;
    int has_nan = 0;
    for (int64_t d = 0; d < n; d += VECTOR_WIDTH) {
        vfloat x = load_of_row(logits, d, n);
        if (o->softcap > 0)
            x = v_mul(tanh_ps(v_div(x, v_set(o->softcap))), v_set(o->softcap));
        store_of_row(scores, d, n, x);
    }
    for (int64_t i = 0; i < n; i++) {
        largest = scores[i] > largest ? scores[i] : largest;
        has_nan |= isnan(logits[i]);
    }
    if (has_nan || (!o->sigmoid && isinf(largest))) {
        for (int64_t i = 0; i < n; i++)
            scores[i] = NAN; /* the vector functions do not keep it */
        return;
    }
    for (int64_t d = 0; d < n; d += VECTOR_WIDTH) {
        vfloat x = load_of_row(scores, d, n);
        x = o->sigmoid ? sigmoid_ps(x) : exp_nonpositive(v_sub(x, v_set(largest)));
        store_of_row(scores, d, n, x);
    }
    if (o->sigmoid)
        return;
    vfloat sum = v_set(row_sum(scores, n));
    for (int64_t d = 0; d < n; d += VECTOR_WIDTH)
        store_of_row(scores, d, n, v_div(load_of_row(scores, d, n), sum));
}

/* Minus infinity for the experts outside the best groups. A group has two or more. Its
 * value is the sum of its two largest, or the largest one. */
static void keep_best_groups(const Router *o, float *choice) {
    float group_values[MAX_EXPERTS];
    uint8_t group_taken[MAX_EXPERTS] = {0};
    int64_t size = o->n_experts / o->n_groups;
    for (int64_t group = 0; group < o->n_groups; group++) {
        uint8_t taken[MAX_EXPERTS] = {0};
        const float *values = choice + group * size;
        int64_t first = largest_index(values, taken, size);
        taken[first] = 1;
        group_values[group] = values[first];
        if (!o->group_max)
            group_values[group] += values[largest_index(values, taken, size)];
    }
    for (int64_t i = 0; i < o->topk_groups; i++)
        group_taken[largest_index(group_values, group_taken, o->n_groups)] = 1;
    for (int64_t i = 0; i < o->n_experts; i++)
        if (!group_taken[i / size])
            choice[i] = -INFINITY;
}

static void choose_of_tokens(const void *operation, int64_t begin, int64_t end) {
    const Router *o = operation;
    for (int64_t token = begin; token < end; token++) {
        float scores[MAX_EXPERTS];
        float choice[MAX_EXPERTS];
        uint8_t taken[MAX_EXPERTS] = {0};
        float *weights = o->weights + token * o->n_chosen;
        int64_t *ids = o->ids + token * o->n_chosen;
        router_scores(o, o->logits + token * o->n_experts, scores);
        for (int64_t i = 0; i < o->n_experts; i++)
            choice[i] = o->correction_bias ? scores[i] + o->correction_bias[i] : scores[i];
        if (o->topk_groups < o->n_groups)
            keep_best_groups(o, choice);
        float sum = 0;
        for (int64_t slot = 0; slot < o->n_chosen; slot++) {
            int64_t expert = largest_index(choice, taken, o->n_experts);
            taken[expert] = 1;
            ids[slot] = expert;
            weights[slot] = scores[expert];
            sum += scores[expert];
        }
        for (int64_t slot = 0; slot < o->n_chosen; slot++) {
            if (o->normalize)
                weights[slot] /= sum;
            weights[slot] *= o->scaling_factor;
            if (o->expert_scales)
                weights[slot] *= o->expert_scales[ids[slot]];
        }
    }
}

static int select_experts(const Router *o) {
    run_ranges(o->n_tokens, 1 + PARALLEL_MIN_ELEMENTS / (4 * o->n_experts), choose_of_tokens, o);
    return 1;
}

/* ---- the experts ---- */

enum { EXPERT_GATE_UP, EXPERT_DOWN };

/* A part of the tokens. A route is a token's choice: the route's number is token * n_chosen + slot.
 * A row is a route of an expert that is here; rows are sorted by expert. */
typedef struct {
    const Experts *experts; /* with the part's tokens */
    int64_t n_used;         /* experts with rows */
    int64_t n_rows;
    int64_t width;            /* outputs of gate_up */
    int64_t *first_row;       /* [n_used + 1] */
    int64_t *first_piece;     /* [n_used + 1] of the linear layer that runs */
    int64_t *route_of_row;    /* [n_rows] */
    int64_t *used_of_row;     /* [n_rows]: which of the used experts */
    int64_t *row_of_route;    /* [routes]; -1: the expert is not here */
    float *hidden;            /* [n_rows, hidden_size]: inputs, then outputs */
    float *intermediate;      /* [n_rows, width] */
    LinearOperation *layers;  /* [n_used] */
    int which;                /* EXPERT_GATE_UP or EXPERT_DOWN */
} ExpertsPart;

/* A linear layer of an expert, for `rows` rows. */
static Linear expert_layer(const ExpertLinear *linear, int64_t rows) {
    Linear layer = {
        .weight_type = (int)linear->weight_type,
        .inputs = (int)linear->inputs,
        .weight = linear->weight,
        .scale_type = (int)linear->scale_type,
        .scales = linear->scales,
        .scale_factors = linear->scale_factors,
        .offsets = linear->offsets,
        .bias = linear->bias,
        .input_scale = linear->input_scale,
        .rows = rows,
        .cols = linear->cols,
        .depth = linear->depth,
        .group_size = linear->group_size,
    };
    derive_sizes(&layer);
    return layer;
}

static void prepare_expert_rows(const void *operation, int64_t begin, int64_t end) {
    const ExpertsPart *o = operation;
    const Experts *e = o->experts;
    for (int64_t row = begin; row < end; row++) {
        int64_t used = o->used_of_row[row];
        if (o->which == EXPERT_GATE_UP) {
            int64_t token = o->route_of_row[row] / e->n_chosen;
            memcpy(o->hidden + row * e->hidden_size, e->x + token * e->hidden_size,
                   e->hidden_size * sizeof(float));
        } else { /* in place: gate and up are read before the result is stored */
            float *values = o->intermediate + row * o->width;
            Activation activation = {values,        values,   1, e->intermediate_size,
                                     e->activation, e->limit, e->alpha};
            if (e->gated)
                act_and_mul_rows(&activation, 0, 1);
            else
                act_elements(&activation, 0, e->intermediate_size);
        }
        const Linear *layer = &o->layers[used].layer;
        if (input_memory_bytes(layer))
            prepare_row(layer, row - o->first_row[used]);
    }
}

/* The last of the used experts whose `first` is at most `value`. */
static int64_t find_used(const int64_t *first, int64_t n_used, int64_t value) {
    int64_t low = 0;
    int64_t high = n_used;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first[middle] <= value)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void expert_piece(const void *operation, int64_t piece) {
    const ExpertsPart *o = operation;
    int64_t used = find_used(o->first_piece, o->n_used, piece);
    linear_piece(&o->layers[used], piece - o->first_piece[used]);
}

/* Run one linear layer of all experts. */
static void run_expert_layers(ExpertsPart *o, int which, const ExpertLinear *const *linears,
                              char *input_memory) {
    const Experts *e = o->experts;
    int64_t turns = num_threads() * PIECES_OF_THREAD / o->n_used + 1;
    o->which = which;
    o->first_piece[0] = 0;
    for (int64_t used = 0; used < o->n_used; used++) {
        int64_t row = o->first_row[used];
        LinearOperation *operation = &o->layers[used];
        Linear *layer = &operation->layer;
        float *hidden = o->hidden + row * e->hidden_size;
        float *intermediate = o->intermediate + row * o->width;
        *layer = expert_layer(&linears[used][which], o->first_row[used + 1] - row);
        layer->x = which == EXPERT_GATE_UP ? hidden : intermediate;
        layer->x_stride = which == EXPERT_GATE_UP ? e->hidden_size : o->width;
        layer->y = which == EXPERT_GATE_UP ? intermediate : hidden;
        layer->y_stride = which == EXPERT_GATE_UP ? o->width : e->hidden_size;
        size_t bytes = input_memory_bytes(layer);
        use_input_memory(layer, bytes ? input_memory : NULL);
        input_memory += bytes;
        o->first_piece[used + 1] = o->first_piece[used] + divide_layer(operation, turns);
    }
    run_ranges(o->n_rows, 1 + ACT_MIN_ELEMENTS / o->width, prepare_expert_rows, o);
    run_pieces(o->first_piece[o->n_used], expert_piece, o);
}

static void sum_experts_of_tokens(const void *operation, int64_t begin, int64_t end) {
    const ExpertsPart *o = operation;
    const Experts *e = o->experts;
    int64_t size = e->hidden_size;
    for (int64_t token = begin; token < end; token++)
        for (int64_t d = 0; d < size; d += VECTOR_WIDTH) {
            vfloat sum = v_zero();
            for (int64_t route = token * e->n_chosen; route < (token + 1) * e->n_chosen; route++) {
                if (o->row_of_route[route] < 0)
                    continue;
                const float *out = o->hidden + o->row_of_route[route] * size;
                sum = v_fma(v_set(e->weights[route]), load_of_row(out, d, size), sum);
            }
            store_of_row(e->y + token * size, d, size, sum);
        }
}

/* Round up to the size of a cache line. */
INLINE size_t whole_lines(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* Compute a part of the tokens. Returns 0 when out of memory. */
static int run_experts_part(const Experts *e) {
    const ExpertLinear *linears[MAX_EXPERTS]; /* of the used experts */
    int64_t used_of_expert[MAX_EXPERTS];
    int64_t next_row[MAX_EXPERTS] = {0}; /* of an expert; first: its number of rows */
    int64_t n_routes = e->n_tokens * e->n_chosen;
    ExpertsPart o = {.experts = e, .width = e->intermediate_size * (e->gated ? 2 : 1)};
    for (int64_t route = 0; route < n_routes; route++)
        next_row[e->ids[route]]++;
    size_t input_bytes[2] = {0, 0};
    for (int64_t expert = 0; expert < e->n_experts; expert++) {
        used_of_expert[expert] = -1;
        if (next_row[expert] == 0 || e->linears[expert][0].cols == 0)
            continue;
        for (int which = 0; which < 2; which++) {
            Linear layer = expert_layer(&e->linears[expert][which], next_row[expert]);
            input_bytes[which] += input_memory_bytes(&layer);
        }
        used_of_expert[expert] = o.n_used;
        linears[o.n_used++] = e->linears[expert];
        o.n_rows += next_row[expert];
    }
    if (o.n_used == 0) {
        memset(e->y, 0, e->n_tokens * e->hidden_size * sizeof(float));
        return 1;
    }
    size_t indices = whole_lines((2 * (o.n_used + 1) + 2 * o.n_rows + n_routes) * sizeof(int64_t));
    size_t layers = whole_lines(o.n_used * sizeof(LinearOperation));
    size_t hidden = whole_lines(o.n_rows * e->hidden_size * sizeof(float));
    size_t intermediate = whole_lines(o.n_rows * o.width * sizeof(float));
    size_t inputs = input_bytes[0] > input_bytes[1] ? input_bytes[0] : input_bytes[1];
    size_t bytes = indices + layers + hidden + intermediate + inputs;
    char *memory = thread_scratch(SCRATCH_EXPERTS, bytes);
    if (memory == NULL)
        return 0;
    o.first_row = (int64_t *)memory;
    o.first_piece = o.first_row + o.n_used + 1;
    o.route_of_row = o.first_piece + o.n_used + 1;
    o.used_of_row = o.route_of_row + o.n_rows;
    o.row_of_route = o.used_of_row + o.n_rows;
    o.layers = (LinearOperation *)(memory + indices);
    o.hidden = (float *)(memory + indices + layers);
    o.intermediate = (float *)(memory + indices + layers + hidden);
    int64_t row = 0;
    for (int64_t expert = 0; expert < e->n_experts; expert++) {
        int64_t n_rows = next_row[expert];
        if (used_of_expert[expert] < 0)
            continue;
        o.first_row[used_of_expert[expert]] = row;
        next_row[expert] = row;
        row += n_rows;
    }
    o.first_row[o.n_used] = row;
    for (int64_t route = 0; route < n_routes; route++) {
        int64_t expert = e->ids[route];
        o.row_of_route[route] = -1;
        if (used_of_expert[expert] < 0)
            continue;
        row = next_row[expert]++;
        o.row_of_route[route] = row;
        o.route_of_row[row] = route;
        o.used_of_row[row] = used_of_expert[expert];
    }
    char *input_memory = memory + indices + layers + hidden + intermediate;
    run_expert_layers(&o, EXPERT_GATE_UP, linears, input_memory);
    run_expert_layers(&o, EXPERT_DOWN, linears, input_memory);
    run_ranges(e->n_tokens, 1 + PARALLEL_MIN_ELEMENTS / (e->hidden_size * e->n_chosen),
               sum_experts_of_tokens, &o);
    return 1;
}

static int experts(const Experts *e) {
    int64_t width = e->intermediate_size * (e->gated ? 2 : 1);
    int64_t token_bytes = e->n_chosen * (e->hidden_size + width) * (int64_t)sizeof(float);
    int64_t part_tokens = max_int64(EXPERTS_BYTES / token_bytes, 1);
    for (int64_t token = 0; token < e->n_tokens; token += part_tokens) {
        Experts part = *e;
        part.x += token * e->hidden_size;
        part.y += token * e->hidden_size;
        part.ids += token * e->n_chosen;
        part.weights += token * e->n_chosen;
        part.n_tokens = min_int64(part_tokens, e->n_tokens - token);
        if (!run_experts_part(&part))
            return 0;
    }
    return 1;
}
