// AMX in bf16, beside AVX-512 with VNNI and BF16: Intel since Sapphire Rapids.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY amx
#define WIDTH 16
#define ROWS 32
#define TILES
#define BF16_ACTIVATIONS
#define DPBUSD(sum, w, a) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(a))

#include <immintrin.h>

#include "kernels.h"
