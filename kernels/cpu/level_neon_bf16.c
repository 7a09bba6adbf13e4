/* The kernels for Arm processors with sdot and products of bfloat16 (bfdot). */

#include "cpu_kernels.h"

#if defined(__aarch64__) && defined(HAS_NEON_EXTENSIONS)
#define LEVEL_NEON
#define LEVEL_DOTPROD
#define LEVEL_BF16
#define LEVEL_TABLE kernels_neon_bf16
#define LEVEL_NAME "neon_bf16"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+bf16")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
