/* The kernels for processors with AVX2 and AVX-VNNI. */

#if defined(__x86_64__)
#define LEVEL_AVX2
#define LEVEL_VNNI
#define LEVEL_TABLE kernels_avx_vnni
#define LEVEL_NAME "avx_vnni"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
