/* The levels of instructions, and whether the processor has them. */

#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__x86_64__)
static int has_avx2(void) {
    unsigned eax, ebx, ecx, edx; /* clang of some versions does not know the name of f16c */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 29 & 1;
}

static int has_avx_vnni(void) {
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

static int has_avx512_vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

static int has_avx512_bf16(void) {
    unsigned eax, ebx, ecx, edx;
    return has_avx512_vnni() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
}

/* Linux gives a process the tiles of AMX when it asks for them. */
static int has_amx(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        return 0;
    int has_tiles = edx >> 22 & edx >> 24 & edx >> 25 & 1; /* bf16, tile, int8 */
    return has_tiles && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

#if defined(__aarch64__)
static int has_neon(void) {
    return 1; /* every aarch64 processor has it */
}

#if !defined(HAS_NEON_EXTENSIONS)
#elif defined(__APPLE__)
static int has_feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}

static int has_neon_dotprod(void) {
    return has_feature("hw.optional.arm.FEAT_DotProd");
}

static int has_neon_bf16(void) {
    return has_neon_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM") &&
           has_feature("hw.optional.arm.FEAT_BF16");
}
#elif defined(__linux__)
static int has_neon_dotprod(void) {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

static int has_neon_bf16(void) {
    const unsigned long products = HWCAP2_I8MM | HWCAP2_BF16;
    return has_neon_dotprod() && (getauxval(AT_HWCAP2) & products) == products;
}
#else
static int has_neon_dotprod(void) {
    return 0;
}

static int has_neon_bf16(void) {
    return 0;
}
#endif
#endif

const Level levels[] = {
#if defined(__x86_64__)
    {&kernels_avx2, has_avx2},
    {&kernels_avx_vnni, has_avx_vnni},
    {&kernels_avx512, has_avx512},
    {&kernels_avx512_vnni, has_avx512_vnni},
    {&kernels_avx512_bf16, has_avx512_bf16},
    {&kernels_amx, has_amx},
#endif
#if defined(__aarch64__)
    {&kernels_neon, has_neon},
#if defined(HAS_NEON_EXTENSIONS)
    {&kernels_neon_dotprod, has_neon_dotprod},
    {&kernels_neon_bf16, has_neon_bf16},
#endif
#endif
    {NULL, NULL},
};
