/* The kernels for every aarch64 processor. */

#if defined(__aarch64__)
#define LEVEL_NEON
#define LEVEL_TABLE kernels_neon
#define LEVEL_NAME "neon"

#include "level.h"
#endif
