/* What the CPU kernels share: sizes, the operations, and the table of a level's functions.
 *
 * The kernels are compiled once for each level of instructions, a source file a level (level_*.c).
 * `levels.c` says which of them the processor has.
 *
 * Sums are float32, or exact 32-bit integers where the inputs of a linear layer are int8. Only
 * weights, the inputs of linear layers and the KV cache may have other types. The order of
 * summation depends neither on the number of rows nor on how a prompt is divided into steps. A
 * request therefore gets the same result, bit for bit, whatever other requests are in its batch.
 * cpu_kernels.py documents the layouts. Its callers check dtypes and strides.
 */

#ifndef LLMKIT_CPU_KERNELS_H
#define LLMKIT_CPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum {
    PANEL_WIDTH = 16,               /* columns of a panel of packed weights */
    DEPTH_MULTIPLE = 64,            /* panels of weights below 32 bits have so many steps */
    INT4_ZERO = 8,                  /* the code of 0 */
    FP8_DIVISOR = 256,              /* see WEIGHT_FP8 */
    COMPRESSED_HEADER_BYTES = 64,   /* of each panel of WEIGHT_BF16_COMPRESSED */
    MAX_HEAD_DIM = 576,             /* the largest head_dim of attention */
    MAX_EXPERTS = 1024,             /* of a layer */
    MAX_CONV_WIDTH = 8,             /* of the convolutions of recurrent layers */
    PARALLEL_MIN_ELEMENTS = 1 << 14 /* operations on at most this many elements use one thread */
};

/* How a weight is stored. The numbers are those of WEIGHT_TYPES in cpu_kernels.py. */
enum {
    WEIGHT_F32,
    WEIGHT_BF16,
    WEIGHT_F16,
    WEIGHT_INT8,
    WEIGHT_UINT4, /* codes 0 .. 15 */
    WEIGHT_INT4,  /* codes minus INT4_ZERO */
    WEIGHT_FP4,   /* codes of E2M1, which stand for twice their values */
    WEIGHT_FP8,   /* e4m3 without NaN, which stands for its value / FP8_DIVISOR */
    WEIGHT_BF16_COMPRESSED /* see compressed_bf16.h; inputs are bfloat16 */
};

/* How the scales of a weight are stored. The numbers are those of SCALE_TYPES in cpu_kernels.py. */
enum {
    SCALES_F32,
    SCALES_E4M3, /* bytes that stand for their value / FP8_DIVISOR, without NaN */
    SCALES_E8M0  /* bytes that stand for 2^(byte - 127), and 0 for 0 */
};

/* What the inputs of a linear layer are rounded to: nothing, bfloat16, or int8 with a scale for
 * each row and group of the weight; or, as activation_quant.py does it, FP8 (e4m3) or FP4 (E2M1)
 * with a scale for each row or group. The numbers are those of INPUT_TYPES in cpu_kernels.py. */
enum {
    INPUTS_F32,
    INPUTS_BF16,
    INPUTS_INT8,
    INPUTS_ROUNDED,    /* x is bfloat16 already */
    INPUTS_FP8_TOKEN,  /* a scale for each row */
    INPUTS_FP8_STATIC, /* the scale at `input_scale` */
    INPUTS_FP8_GROUP,  /* a scale for each row and group of the weight */
    INPUTS_FP8_E8M0,   /* the same, a power of two */
    INPUTS_FP4_E8M0,   /* the same; weights are FP4 */
    INPUTS_FP4_E4M3    /* the same, an e4m3 value times the scale at `input_scale` */
};

/* The types of a KV cache. The numbers are those of KV_TYPES in cpu_kernels.py. FP8 is e4m3,
 * without infinities. */
enum { KV_F32, KV_BF16, KV_F16, KV_INT8, KV_FP8 };

/* Activations. The numbers are those of ACTIVATIONS in cpu_kernels.py. */
enum { ACT_SILU, ACT_GELU_TANH, ACT_GELU, ACT_RELU2, ACT_SWIGLU_CLAMPED };

/* What a gate goes through. The numbers are those of GATE_ACTIVATIONS in cpu_kernels.py. */
enum { GATE_IDENTITY, GATE_SIGMOID, GATE_SOFTPLUS };

/* ---- operations ---- */

#pragma GCC visibility push(hidden)

/* y[rows, cols] = inputs[rows, depth] w[depth, cols] + bias, with w = scale * q - offset. */
typedef struct {
    int weight_type;
    int inputs;     /* what x is rounded to */
    /* A row every x_stride elements. INPUTS_ROUNDED: bfloat16, rows of a multiple of
       DEPTH_MULTIPLE without gaps, and memory for whole tiles of 32 rows; the weight has no
       offsets, and one group or groups of a multiple of 32 inputs (cpu_linear.py). */
    const float *x;
    int64_t x_stride;
    const char *weight;   /* panels of PANEL_WIDTH columns */
    int scale_type;
    const void *scales;   /* [depth / group_size, columns of all panels]; NULL: w = q */
    const float *scale_factors; /* [columns of all panels], of scales in bytes: what their values
                                   are multiplied by */
    const float *offsets; /* float32, the shape of `scales`; NULL: 0 */
    const float *bias;    /* [columns of all panels], or NULL */
    const float *input_scale; /* one number; see INPUTS_FP8_STATIC and INPUTS_FP4_E4M3 */
    float *y;             /* a row every y_stride elements */
    int64_t y_stride;
    int64_t rows;
    int64_t cols;
    int64_t depth;
    int64_t group_size;
    /* With a gate, the outputs are act(gate) * up: gate is the first half of the columns, up the
     * second. Each half consists of whole panels. */
    int is_gated;
    int activation;
    float limit; /* see Activation */
    float alpha;
    int rounds_outputs; /* with a gate: y is bfloat16, a row every y_stride elements of 2 bytes */
    /* ---- the rest is derived in linear.h ---- */
    int64_t panel_bytes;
    int64_t padded_cols;
    int64_t padded_depth;
    int64_t n_groups;
    int input_quant; /* INPUTS_FP8_TOKEN or one after it; `inputs` is then the type of the values */
    const float *float_inputs; /* x, or a copy whose depth is padded */
    int64_t float_stride;
    int x_is_rounded;
    char *rounded_inputs;    /* [rows, padded_depth]: bfloat16 or int8 */
    float *input_scales;     /* [rows, n_groups]: x = scale * int8, or scale * FP8 */
    float *input_sums;       /* [rows, n_groups]: sums of x, where there are offsets */
    int32_t *int_input_sums; /* [rows, n_groups]: sums of int8 inputs */
} Linear;

/* Compress the panels of a weight in bfloat16. `measure_bf16` chooses top exponents and counts the
 * units that stay uncompressed; `compress_bf16` then writes n_panels panels of
 * COMPRESSED_HEADER_BYTES and 3/4 of their size, and behind them, for each panel with uncompressed
 * units, 256 bytes for each of these, their indices and one index more, int32. */
typedef struct {
    const char *panels;
    int64_t n_panels;
    int64_t depth; /* a multiple of DEPTH_MULTIPLE */
    /* [n_panels] each; `measure_bf16` writes the first two. */
    int32_t *top_exponents;
    int32_t *n_uncompressed;            /* units */
    const int64_t *uncompressed_starts; /* of their parts: multiples of 64 bytes from `to` on */
    char *to;
} Bf16Compression;

/* For each head its own linear layer: y[:, head] = x[:, head] w[head]. */
typedef struct {
    Linear first;          /* of the first head; inputs in float32, without scales and bias */
    int64_t n_heads;
    int64_t x_head_stride; /* from head to head, in elements */
    int64_t y_head_stride;
} HeadLinear;

/* softmax(softcap(scale q k')) v over a paged KV cache, causal, within the window. */
typedef struct {
    const float *q;              /* [n_tokens, n_heads, head_dim], a token every q_stride */
    float *out;                  /* [n_tokens, n_heads, value_dim] */
    int64_t q_stride;
    int kv_type;
    const char *kv;              /* [2 n_kv_heads, n_blocks, block_size, head_dim]: first the heads
                                    of the keys; a head every head_stride elements */
    const float *scales;         /* of an 8-bit cache: [2 n_kv_heads, n_blocks, block_size], or
                                    [2 n_kv_heads] with static_scales */
    int static_scales;
    int64_t head_stride;
    int64_t block_size;
    int64_t head_dim;
    int64_t value_dim;           /* of `out`: head_dim, or less with is_latent */
    int is_latent;               /* all heads read one head of the cache, [n_blocks, block_size,
                                    head_dim] as values lie; the first value_dim elements of a token
                                    are its value. n_kv_heads: groups of query heads */
    int64_t n_heads;
    int64_t n_kv_heads;
    int64_t n_sequences;
    const int64_t *query_lens;   /* [n_sequences]: tokens of this step */
    const int64_t *seq_lens;     /* [n_sequences]: tokens in the cache, this step's included */
    const int64_t *block_tables; /* the block numbers of all sequences */
    const int64_t *table_starts; /* [n_sequences]: where a sequence's table begins in them */
    int64_t window;              /* 0: none */
    float scale;
    float softcap;               /* 0: none */
    const float *sinks;          /* [n_heads]: a logit that joins the softmax's sum; NULL: none */
} PagedAttention;

/* y = x / rms(x) * weight, for each row; with `bias` or `subtract_mean`, a layer norm. With
 * `update`, x + scale * update takes the place of x, and `sum` gets it. */
typedef struct {
    const float *x;      /* [rows, hidden_size] */
    const float *update; /* the same; NULL: none */
    float *sum;          /* the same */
    float scale;
    const float *weight;
    const float *bias; /* NULL: none */
    float *y;
    int64_t rows;
    int64_t hidden_size;
    int subtract_mean;
    int rounds; /* y is bfloat16; hidden_size is a multiple of DEPTH_MULTIPLE */
    float eps;
} Norm;

/* The norm of each of the first n_heads heads of each token, in place. */
typedef struct {
    float *x; /* a token every x_stride elements */
    int64_t x_stride;
    int64_t n_tokens;
    int64_t n_heads;
    int64_t head_dim;
    const float *weight;
    int64_t weight_stride; /* from head to head; 0: all heads have the same weight */
    int subtract_mean;
    float eps;
} HeadNorm;

/* y = residual + scale * update. */
typedef struct {
    const float *residual;
    const float *update;
    float *y;
    int64_t size;
    float scale;
} Residual;

/* Multiply the first `size` elements of each token by the token's factor, in place. */
typedef struct {
    float *x; /* a token every x_stride elements */
    int64_t x_stride;
    int64_t n_tokens;
    int64_t size;
    const float *factors; /* [n_tokens] */
} TokenScales;

/* Rotate the first 2 `half` dimensions of the first n_heads heads of each token, in place. */
typedef struct {
    float *x; /* a token every x_stride elements */
    int64_t x_stride;
    int64_t n_tokens;
    int64_t n_heads;
    int64_t head_stride; /* from head to head */
    const float *cos; /* [n_tokens, 2 half] */
    const float *sin; /* the same; the caller has negated the first half */
    int64_t half;
    int interleaved; /* pairs are (2 i, 2 i + 1), otherwise (i, half + i) */
} Rotary;

/* Write keys and values to the slots of a cache. */
typedef struct {
    const float *kv; /* [n_tokens, n_heads, head_dim], a token every kv_stride elements */
    int64_t kv_stride;
    int64_t n_tokens;
    int64_t n_heads;
    int64_t head_dim;
    const int64_t *slot_mapping; /* [n_tokens] */
    int kv_type;
    char *cache;         /* [n_heads, slots, head_dim], a head every head_stride elements */
    int64_t head_stride;
    float *scales;       /* of an 8-bit cache: [n_heads, slots], which are written; [n_heads] with
                            static_scales, which are read */
    int static_scales;
} StoreKv;

/* y = act(gate) * up, or y = act(x). */
typedef struct {
    const float *x; /* [rows, 2 size]: gate, then up; without `up`: [rows, size] */
    float *y;       /* [rows, size] */
    int64_t rows;
    int64_t size;
    int activation;
    float limit; /* ACT_SWIGLU_CLAMPED: of gate and of |up| */
    float alpha; /* ACT_SWIGLU_CLAMPED: the slope of the sigmoid */
} Activation;

/* y = xIELU(x) (arXiv 2411.13010). The parameters are one number each; the alphas are what softplus
 * is applied to. */
typedef struct {
    const float *x;
    float *y;
    int64_t size;
    const float *raw_alpha_p;
    const float *raw_alpha_n;
    const float *beta;
    const float *eps;
} Xielu;

/* y = x * act(gate). */
typedef struct {
    const float *x;    /* [rows, size] */
    const float *gate; /* [rows, size], or one element a row */
    int64_t gate_stride;
    float *y; /* [rows, size] */
    int64_t rows;
    int64_t size;
    int per_row; /* a row has one gate */
    int activation;
} Gate;

/* Copy the first `size` elements of each row. */
typedef struct {
    const float *from; /* a row every from_stride elements */
    int64_t from_stride;
    float *to;
    int64_t to_stride;
    int64_t rows;
    int64_t size;
} RowCopy;

/* The rows of states that a step reads and writes, see RecurrentBatch in recurrent_state.py. */
typedef struct {
    int64_t n_sequences;
    const int64_t *query_lens;   /* [n_sequences]: tokens of this step */
    const int64_t *initial_rows; /* [n_sequences]; -1: a state of zeros */
    const int64_t *write_starts; /* [n_sequences + 1]: the first write of each sequence */
    const int64_t *write_ends;   /* a write comes after so many tokens of the sequence */
    const int64_t *write_rows;   /* where to */
} RecurrentRows;

/* y = bias + the sum over k of weight[:, k] x[token - width + 1 + k], or SiLU of it. With `gated`,
 * c conv(b x). */
typedef struct {
    const float *x; /* [n_tokens, n_channels], a token every x_stride elements; gated: b, c, x */
    int64_t x_stride;
    const float *weight; /* [n_channels, width] */
    const float *bias;   /* [n_channels], or NULL */
    float *state;        /* [rows, width - 1, n_channels]: the last inputs, the oldest first */
    float *y;            /* [n_tokens, n_channels] */
    int64_t n_tokens;
    int64_t n_channels;
    int64_t width; /* from 1 to MAX_CONV_WIDTH */
    int silu;
    int gated;
    RecurrentRows rows;
} CausalConv;

/* Mamba 2's recurrence over the tokens of each sequence. */
typedef struct {
    const float *xbc; /* x [n_heads, head_dim], B and C [n_groups, state_size] of each token */
    int64_t xbc_stride;
    const float *dt; /* [n_heads] of each token */
    int64_t dt_stride;
    const float *A_log;   /* [n_heads] */
    const float *D;       /* the same */
    const float *dt_bias; /* the same */
    float *state;         /* [rows, n_heads, state_size, head_dim] */
    float *y;             /* [n_tokens, n_heads, head_dim] */
    int64_t n_tokens;
    int64_t n_heads;
    int64_t head_dim;
    int64_t state_size;
    int64_t n_groups;
    float min_dt; /* of the time steps, after softplus */
    float max_dt;
    RecurrentRows rows;
    /* ---- the rest is derived in mamba2.h ---- */
    float *steps;  /* [n_tokens, n_heads]: the time steps */
    float *decays; /* the same */
} Mamba2Scan;

/* The gated delta rule over the tokens of each sequence. */
typedef struct {
    const float *qkv; /* queries and keys [n_k_heads, k_dim], then values [n_v_heads, v_dim] */
    int64_t qkv_stride;
    const float *ba; /* [n_v_heads]: b, then a */
    int64_t ba_stride;
    const float *A_log;   /* [n_v_heads] */
    const float *dt_bias; /* [n_v_heads] */
    float *out;           /* [n_tokens, n_v_heads, v_dim] */
    float *state;         /* [n_v_heads, k_dim, v_dim], a row every row_stride elements */
    int64_t row_stride;
    int64_t n_k_heads;
    int64_t n_v_heads;
    int64_t k_dim;
    int64_t v_dim;
    RecurrentRows rows;
} GatedDeltaRule;

/* y = norm(x silu(gate)) weight, with an RMS norm of each group, or norm(x) weight silu(gate). */
typedef struct {
    const float *x;    /* [rows, size] */
    const float *gate; /* a row every gate_stride elements */
    int64_t gate_stride;
    const float *weight; /* [size]; NULL: y = x silu(gate) */
    float *y;            /* [rows, size] */
    int64_t rows;
    int64_t size;
    int64_t n_groups;
    int64_t weight_stride; /* from group to group; 0: all groups have the same weight */
    int norm_before_gate;
    float eps;
} GatedGroupNorm;

/* The experts of each token, and their weights. */
typedef struct {
    const float *logits;          /* [n_tokens, n_experts] */
    const float *correction_bias; /* [n_experts], added to scores to choose; NULL: none */
    const float *expert_scales;   /* [n_experts], of the weights; NULL: none */
    float *weights;               /* [n_tokens, n_chosen] */
    int64_t *ids;                 /* the same */
    int64_t n_tokens;
    int64_t n_experts; /* at most MAX_EXPERTS */
    int64_t n_chosen;
    int64_t n_groups;
    int64_t topk_groups; /* experts of so many groups may be chosen */
    int group_max;       /* a group's value is its largest one, otherwise the sum of two */
    int sigmoid;         /* scores are sigmoids, otherwise a softmax */
    int normalize;       /* weights are scaled to a sum of one */
    float softcap;       /* of the logits; 0: none */
    float scaling_factor;
} Router;

/* A linear layer of an expert or of an MLP; see Linear. Python fills it as int64. */
typedef struct {
    int64_t weight_type;
    int64_t inputs;
    int64_t scale_type;
    const char *weight;
    const void *scales;
    const float *scale_factors;
    const float *offsets;
    const float *bias;
    const float *input_scale;
    int64_t cols; /* 0: the expert is on another rank */
    int64_t depth;
    int64_t group_size;
} ExpertLinear;

/* The weighted sum of the outputs of each token's experts. */
typedef struct {
    const float *x; /* [n_tokens, hidden_size] */
    float *y;       /* the same */
    const int64_t *ids; /* [n_tokens, n_chosen] */
    const float *weights;
    int64_t n_tokens;
    int64_t n_chosen;
    int64_t hidden_size;
    int64_t intermediate_size;
    const ExpertLinear (*linears)[2]; /* [n_experts]: gate_up (or up), and down */
    int64_t n_experts;                /* at most MAX_EXPERTS */
    int gated;                        /* act(gate) * up, otherwise act(up) */
    int activation;
    float limit; /* see Activation */
    float alpha;
} Experts;

/* y = down(act(gate(x)) * up(x)). */
typedef struct {
    const float *x; /* a row every x_stride elements */
    int64_t x_stride;
    int x_is_rounded; /* x is as INPUTS_ROUNDED says */
    float *y;         /* [rows, columns of down] */
    int64_t rows;
    const ExpertLinear *linears; /* gate_up, whose halves are whole panels, and down */
    int activation;
    float limit; /* see Activation */
    float alpha;
} GatedMlp;

/* The column of the largest value of each row, the first one on a tie, and whether all values are
 * finite. NaN counts as the largest. */
typedef struct {
    const float *x; /* [rows, cols], a row every x_stride elements */
    int64_t x_stride;
    int64_t rows;
    int64_t cols;       /* at least 1 */
    int64_t *ids;       /* [rows] */
    uint8_t *is_finite; /* [rows] */
} Argmax;

/* The functions of a level. They return 0 when out of memory. */
typedef struct {
    const char *name;
    int has_bfloat16; /* `linear` takes INPUTS_BF16 */
    int (*linear)(const Linear *);
    /* NULL: the level does not take WEIGHT_BF16_COMPRESSED. */
    int (*measure_bf16)(const Bf16Compression *);
    int (*compress_bf16)(const Bf16Compression *);
    int (*head_linear)(const HeadLinear *);
    int (*paged_attention)(const PagedAttention *);
    int (*norm)(const Norm *);
    int (*norm_heads)(const HeadNorm *);
    int (*add_residual)(const Residual *);
    int (*scale_tokens)(const TokenScales *);
    int (*apply_rotary_emb)(const Rotary *);
    int (*store_kv)(const StoreKv *);
    int (*act_and_mul)(const Activation *);
    int (*act)(const Activation *);
    int (*xielu)(const Xielu *);
    int (*apply_gate)(const Gate *);
    int (*copy_rows)(const RowCopy *);
    int (*select_experts)(const Router *);
    int (*experts)(const Experts *);
    int (*gated_mlp)(const GatedMlp *);
    int (*causal_conv)(const CausalConv *);
    int (*mamba2_scan)(const Mamba2Scan *);
    int (*gated_delta_rule)(const GatedDeltaRule *);
    int (*gated_group_rms_norm)(const GatedGroupNorm *);
    int (*argmax)(const Argmax *);
} Kernels;

typedef struct {
    const Kernels *kernels;
    int (*is_supported)(void); /* by this processor */
} Level;

/* The levels of this architecture, from the slowest to the fastest; at the end one of NULLs. */
extern const Level levels[];

/* In arm_neon.h of an older clang, the compiler's options decide which instructions there are. */
#if !defined(__clang__) || __clang_major__ >= 17 || (defined(__APPLE__) && __clang_major__ >= 16)
#define HAS_NEON_EXTENSIONS
#endif

extern const Kernels kernels_avx2, kernels_avx_vnni, kernels_avx512, kernels_avx512_vnni,
    kernels_avx512_bf16, kernels_amx, kernels_neon, kernels_neon_dotprod, kernels_neon_bf16;

#pragma GCC visibility pop

#endif
