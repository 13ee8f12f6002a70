// Any CPU: what the compiler makes of vectors of four values.
// kernels.h says what each macro means, and where the code is that all families share.

#define FAMILY portable
#define WIDTH 4
#define ROWS 6

#include <stdint.h>

typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

// Multiply 16 bits by 16 and add neighbours.
static inline Ints madd(Shorts a, Shorts b) {
    Ints x = (Ints)a, y = (Ints)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
}
#define MADD(a, b) madd((Shorts)(a), b)

#include "kernels.h"
