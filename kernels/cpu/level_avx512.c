/* The kernels for processors with AVX-512 (F, BW, VL and DQ). */

#if defined(__x86_64__)
#define LEVEL_AVX512
#define LEVEL_TABLE kernels_avx512
#define LEVEL_NAME "avx512"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c," \
                          "avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
