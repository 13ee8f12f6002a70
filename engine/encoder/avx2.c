// AVX2 and FMA: Intel since Haswell, AMD since Zen.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY avx2
#define WIDTH 8
#define ROWS 6

#include <immintrin.h>

#define MADD(a, b) (I)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))

#include "kernels.h"
