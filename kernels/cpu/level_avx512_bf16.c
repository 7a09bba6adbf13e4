/* The kernels for processors with AVX-512 with VNNI and BF16. */

#if defined(__x86_64__)
#define LEVEL_AVX512
#define LEVEL_VNNI
#define LEVEL_BF16
#define LEVEL_COMPRESSED
#define LEVEL_TABLE kernels_avx512_bf16
#define LEVEL_NAME "avx512_bf16"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c," \
                          "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
