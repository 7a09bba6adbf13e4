/* The kernels for Arm processors that multiply and sum four bytes in one instruction (sdot). */

#include "cpu_kernels.h"

#if defined(__aarch64__) && defined(HAS_NEON_EXTENSIONS)
#define LEVEL_NEON
#define LEVEL_DOTPROD
#define LEVEL_TABLE kernels_neon_dotprod
#define LEVEL_NAME "neon_dotprod"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
