// AVX-512 without VNNI: Intel since Skylake-SP.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY avx512
#define WIDTH 16
#define ROWS 12

#include <immintrin.h>

#define MADD(a, b) (I)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))

#include "kernels.h"
