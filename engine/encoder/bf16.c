// AVX-512 with VNNI and BF16: AMD since Zen 4, Intel Cooper Lake.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY bf16
#define WIDTH 16
#define ROWS 12  // 24 of the 32 registers hold sums
#define BF16_ACTIVATIONS
#define DPBUSD(sum, w, a) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(a))

#include <immintrin.h>

#include "kernels.h"
