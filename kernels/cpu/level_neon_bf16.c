/* The kernels for Arm processors with products of bytes (sdot, smmla) and of bfloat16 (bfdot,
 * bfmmla). Armv8.6 has all of them. No processor is known that has bfdot but not smmla, or smmla
 * but not bfdot, so that there is no level between this one and neon_dotprod. */

#include "cpu_kernels.h"

#if defined(__aarch64__) && defined(HAS_NEON_EXTENSIONS)
#define LEVEL_NEON
#define LEVEL_DOTPROD
#define LEVEL_I8MM
#define LEVEL_BF16
#define LEVEL_TABLE kernels_neon_bf16
#define LEVEL_NAME "neon_bf16"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm,bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm+bf16")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
