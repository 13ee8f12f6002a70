// The kernels of one CPU family: arithmetic.h has GELU, products.h and tiles.h the matrix products,
// attention.h and rows.h the rest. The file that includes this defines
//   FAMILY      the name of the exported table, encoder_FAMILY
//   WIDTH       float32 values in a vector
//   ROWS        rows of activations whose sums are in registers at a time
// and as the family has it
//   BF16_ACTIVATIONS  it multiplies bf16; else float32
//   DPBUSD            it has VPDPBUSD; else MADD multiplies pairs of 16 bits
//   TILES             it multiplies bf16 and int8 by AMX

#include "encoder.h"

#include "arithmetic.h"

#include "activations.h"

#include "products.h"

#include "attention.h"
#include "pictures.h"
#include "rows.h"
#include "turns.h"
#include "panels.h"

static void activate_all(int mode, const float *x, float *y, long n) {
    for (long i = 0; i < n; i += WIDTH) store(y + i, activate(mode, load(x + i)));
}

static void rotate_all(float *x, long n) { rotate_row(x, x, n); }

static void softmax_all(float *scores, void *shares, float *factors, int rows, int length,
                        int width) {
    const Sight all = {0, rows + length, length, length, 0};
    softmax(scores, shares, factors, rows, width, &all);
}

#define JOIN(a, b) a##b
#define TABLE(family) JOIN(encoder_, family)
const Kernels TABLE(FAMILY) = {
    sizeof(Activation), sizeof(Code), PANEL, product, attend, rows, turn, attention_memory, embed,
    unfold, pool, lay_out, lay_out_int8, activate_all, softmax_all, rotate_all};
