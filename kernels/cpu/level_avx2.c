/* The kernels for processors with AVX2. */

#if defined(__x86_64__)
#define LEVEL_AVX2
#define LEVEL_TABLE kernels_avx2
#define LEVEL_NAME "avx2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
