// AVX2 with AVX-VNNI: Intel since Alder Lake, AMD since Zen 5, where AVX-512 is missing.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY avxvnni
#define WIDTH 8
#define ROWS 6
#define DPBUSD(sum, w, a) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(a))

#include <immintrin.h>

#include "kernels.h"
