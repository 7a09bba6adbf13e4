/* All kernels, for the level that the including file describes. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"
#include "thread_pool.h"
#include "vector_math.h"
#include "vectors.h"

#include "linear.h"
#include "sampling.h"

#include "kv_types.h"

#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "gated_mlp.h"

#include "causal_conv.h"
#include "gated_delta_net.h"
#include "mamba2.h"

const Kernels LEVEL_TABLE = {
    .name = LEVEL_NAME,
#if defined(LEVEL_BF16)
    .has_bfloat16 = 1,
#endif
    .linear = linear,
#if defined(LEVEL_COMPRESSED)
    .measure_bf16 = measure_bf16,
    .compress_bf16 = compress_bf16,
#endif
    .head_linear = head_linear,
    .paged_attention = paged_attention,
    .norm = norm,
    .norm_heads = norm_heads,
    .add_residual = add_residual,
    .scale_tokens = scale_tokens,
    .apply_rotary_emb = apply_rotary_emb,
    .store_kv = store_kv,
    .act_and_mul = act_and_mul,
    .act = act,
    .xielu = xielu,
    .apply_gate = apply_gate,
    .copy_rows = copy_rows,
    .select_experts = select_experts,
    .experts = experts,
    .gated_mlp = gated_mlp,
    .causal_conv = causal_conv,
    .mamba2_scan = mamba2_scan,
    .gated_delta_rule = gated_delta_rule,
    .gated_group_rms_norm = gated_group_rms_norm,
    .argmax = argmax,
};
