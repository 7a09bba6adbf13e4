/* The kernels for processors with AMX (and what its processors have besides). */

#if defined(__x86_64__)
#define LEVEL_AVX512
#define LEVEL_VNNI
#define LEVEL_BF16
#define LEVEL_AMX
#define LEVEL_TABLE kernels_amx
#define LEVEL_NAME "amx"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c," \
                          "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16," \
                          "amx-tile,amx-int8,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c", \
                   "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16", \
                   "amx-tile,amx-int8,amx-bf16")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
