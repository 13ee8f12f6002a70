// AMX in bf16 and int8, beside AVX-512 with VNNI and BF16: Intel since Sapphire Rapids.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY amx
#define WIDTH 16
#define ROWS 32
#define TILES
#define BF16_ACTIVATIONS

#include <immintrin.h>

#include "kernels.h"
