// AVX2 and FMA: Intel since Haswell, AMD since Zen.

#define FAMILY avx2
#define WIDTH 8
#define ROWS 6
#define ROWS_INT8 6

#include <immintrin.h>

#define MADD(a, b) (I)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))

#include "kernels.h"
