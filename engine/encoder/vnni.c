// AVX-512 with VNNI: Intel since Cascade Lake.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY vnni
#define WIDTH 16
#define ROWS 12
#define DPBUSD(sum, w, a) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(a))

#include <immintrin.h>

#include "kernels.h"
