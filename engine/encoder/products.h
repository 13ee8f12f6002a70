// Matrix products C = A W^T, panel by panel: PANEL columns of W are laid out so that one load
// brings the next 1 (float32), 2 (bf16) or CODES (int8) values of k of WIDTH columns. A panel is
// multiplied with up to ROWS rows of A at a time, whose sums stay in registers. Goto & van de
// Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.

#define PANEL (2 * WIDTH)
#define UNROLL _Pragma("unroll")  // loops over sums, which are then in registers

// Store two vectors of sums: the columns of one row of a panel.
INLINE void put(int mode, void *c, long at, F low, F high, const float *bias) {
    if (mode == SCORES) {
        store((float *)c + at, low);
        store((float *)c + at + WIDTH, high);
        return;
    }
    if (mode != WEIGHTED) low += load(bias), high += load(bias + WIDTH);
    if (mode == ADD_TO_FLOAT) {
        float *p = (float *)c + at;
        store(p, low + load(p));
        store(p + WIDTH, high + load(p + WIDTH));
        return;
    }
    if (mode > WEIGHTED) return put_activated(mode, (Activation *)c + at, low, high);
    if (mode == GELU_TO_ACTIVATION) low = gelu(low), high = gelu(high);
    store_activations((Activation *)c + at, low, high);
}

// Fetch the part of the next panel that corresponds to step k of this one.
INLINE void prefetch(const char *next, long k) {
    for (int i = 0; i < 8 * WIDTH; i += 64) __builtin_prefetch(next + k * 8 * WIDTH + i, 0, 2);
}

#ifdef TILES
#include "tiles.h"
#else
#ifdef BF16_ACTIVATIONS
typedef __m512bh Pairs;
INLINE F multiply_add(F sum, uint32_t a, const uint32_t *w) {
    __m512i both = _mm512_set1_epi32((int)a);
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)_mm512_loadu_si512(w));
}
#else
INLINE F multiply_add(F sum, uint32_t a, const uint32_t *w) {
    float value;
    memcpy(&value, &a, 4);
    return sum + value * load((const float *)w);
}
#endif

// Multiply `rows` rows of A, `lda` words of 32 bits apart, with a panel of `words` of them.
// `extra` is the bias, or for WEIGHTED a factor for each row. `next` is prefetched.
INLINE void tile(int mode, int rows, const uint32_t *a, long lda, const uint32_t *w, long words,
                 void *c, long ldc, const float *extra, const char *next) {
    F sums[ROWS][2];
    UNROLL for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (F){};
    for (long k = 0; k < words; k++) {
        if (mode < SCORES) prefetch(next, k);
        UNROLL for (int i = 0; i < rows; i++) {
            sums[i][0] = multiply_add(sums[i][0], a[i * lda + k], w + k * PANEL);
            sums[i][1] = multiply_add(sums[i][1], a[i * lda + k], w + k * PANEL + WIDTH);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        if (mode == WEIGHTED) sums[i][0] *= extra[i], sums[i][1] *= extra[i];
        put(mode, c, i * ldc, sums[i][0], sums[i][1], extra);
    }
}
#endif

// int8: a code is a rounded value. VPDPBUSD needs one unsigned operand, so weights are stored with
// 128 added there; `start`, of each row, subtracts it again. Without VPDPBUSD pairs of 16 bits are
// multiplied; codes of activations are stored with 16 bits. AMX multiplies signed bytes.
#ifdef TILES
#define CODES 4
#define OFFSET 0
typedef int8_t Code;
#elif defined DPBUSD
#define CODES 4  // in 32 bits
#define OFFSET 128
typedef int8_t Code;
typedef I Weights8;
typedef I WeightsAt __attribute__((aligned(1), may_alias));
INLINE Weights8 load_codes(const char *w) { return *(const WeightsAt *)w; }
INLINE I dot(I sum, uint32_t codes, Weights8 w) {
    return (I)DPBUSD(sum, w, (U){} + codes);
}
#else
#define CODES 2
#define OFFSET 0
typedef int16_t Code;
typedef int16_t Weights8 __attribute__((vector_size(4 * WIDTH)));
typedef int8_t WeightsAt __attribute__((vector_size(2 * WIDTH), aligned(1), may_alias));
INLINE Weights8 load_codes(const char *w) {
    return __builtin_convertvector(*(const WeightsAt *)w, Weights8);
}
INLINE I dot(I sum, uint32_t codes, Weights8 w) { return sum + MADD((U){} + codes, w); }
#endif

#ifndef TILES
// Multiply in int8, `words` of 32 bits of codes a row of A. `scales` and `start` are of its rows,
// `columns` are the scales of the panel's columns.
INLINE void tile_int8(int mode, int rows, const uint32_t *a, long words, const char *w,
                      const float *scales, const int32_t *start, void *c, long ldc,
                      const float *bias, const float *columns, const char *next) {
    const long bytes = WIDTH * CODES;
    I sums[ROWS][2];
    UNROLL for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = (I){} + (OFFSET ? start[i] : 0);
    for (long k = 0; k < words; k++) {
        Weights8 low = load_codes(w + 2 * k * bytes), high = load_codes(w + (2 * k + 1) * bytes);
        for (long at = 0; at < 2 * bytes; at += 64)
            __builtin_prefetch(next + 2 * k * bytes + at, 0, 2);
        UNROLL for (int i = 0; i < rows; i++) {
            sums[i][0] = dot(sums[i][0], a[i * words + k], low);
            sums[i][1] = dot(sums[i][1], a[i * words + k], high);
        }
    }
    F low = load(columns), high = load(columns + WIDTH);
    UNROLL for (int i = 0; i < rows; i++)
        put(mode, c, i * ldc, to_float(sums[i][0]) * scales[i] * low,
            to_float(sums[i][1]) * scales[i] * high, bias);
}

typedef void Tile(const uint32_t *, long, const uint32_t *, long, void *, long, const float *,
                  const char *);
typedef void TileInt8(const uint32_t *, long, const char *, const float *, const int32_t *, void *,
                      long, const float *, const float *, const char *);

#define TILE(mode, rows)                                                                          \
    static void tile_##mode##_##rows(const uint32_t *a, long lda, const uint32_t *w, long words,  \
                                     void *c, long ldc, const float *extra, const char *next) {   \
        tile(mode, rows, a, lda, w, words, c, ldc, extra, next);                                  \
    }
#define TILE_INT8(mode, rows)                                                                     \
    static void tile_int8_##mode##_##rows(                                                        \
        const uint32_t *a, long words, const char *w, const float *scales, const int32_t *start,  \
        void *c, long ldc, const float *bias, const float *columns, const char *next) {           \
        tile_int8(mode, rows, a, words, w, scales, start, c, ldc, bias, columns, next);           \
    }
#define TO_6(make, mode)                                                                          \
    make(mode, 1) make(mode, 2) make(mode, 3) make(mode, 4) make(mode, 5) make(mode, 6)
#define TO_12(make, mode)                                                                         \
    TO_6(make, mode)                                                                              \
    make(mode, 7) make(mode, 8) make(mode, 9) make(mode, 10) make(mode, 11) make(mode, 12)
#define NAME(mode, rows) tile_##mode##_##rows,
#define NAME_INT8(mode, rows) tile_int8_##mode##_##rows,

#if ROWS == 12
#define TO_ROWS TO_12
#else
#define TO_ROWS TO_6
#endif
TO_ROWS(TILE, TO_ACTIVATION) TO_ROWS(TILE, GELU_TO_ACTIVATION) TO_ROWS(TILE, ADD_TO_FLOAT)
TO_ROWS(TILE, SCORES) TO_ROWS(TILE, WEIGHTED)
static Tile *const tiles[][ROWS] = {
    {TO_ROWS(NAME, TO_ACTIVATION)}, {TO_ROWS(NAME, GELU_TO_ACTIVATION)},
    {TO_ROWS(NAME, ADD_TO_FLOAT)}, {TO_ROWS(NAME, SCORES)}, {TO_ROWS(NAME, WEIGHTED)}};

// Multiply up to ROWS rows of A with a panel of attention's; see `tile`.
INLINE void multiply(int mode, int rows, const Activation *a, long lda, const uint32_t *w, long k,
                     void *c, long ldc, const float *factors) {
    tiles[mode][rows - 1]((const uint32_t *)a, lda / DEPTH, w, k / DEPTH, c, ldc, factors, 0);
}
INLINE void begin_products(void) {}
INLINE void end_products(void) {}

// Rows of the next block of at most ROWS, of those left: blocks of about the same size.
INLINE int next_rows(int left) { return left / ((left + ROWS - 1) / ROWS); }

TO_ROWS(TILE_INT8, TO_ACTIVATION) TO_ROWS(TILE_INT8, GELU_TO_ACTIVATION)
TO_ROWS(TILE_INT8, ADD_TO_FLOAT)
static TileInt8 *const tiles_int8[][ROWS] = {{TO_ROWS(NAME_INT8, TO_ACTIVATION)},
                                             {TO_ROWS(NAME_INT8, GELU_TO_ACTIVATION)},
                                             {TO_ROWS(NAME_INT8, ADD_TO_FLOAT)}};

// Multiply all rows with panel `number`.
static void product(void *argument, int number, char *memory) {
    const Product *p = argument;
    (void)memory;
    int int8 = p->precision == INT8;
    long bytes = p->k * PANEL * (int8 ? 1 : (long)sizeof(Activation));
    long column = (long)number * PANEL;
    const char *w = (const char *)p->linear.weights + number * bytes, *next = w + p->ahead * bytes;
    const long size = p->mode == ADD_TO_FLOAT ? 4 : sizeof(Activation);
    char *c = (char *)p->c + (p->mode & GATED ? column / 2 : column) * size;
    const float *bias = p->linear.bias + column;
    int other = p->mode > WEIGHTED, mode = other ? ADD_TO_FLOAT : p->mode;
    long ldc = other ? PANEL : p->ldc;
    for (int row = 0, rows; row < p->rows; row += rows) {
        rows = next_rows(p->rows - row);
        const char *fetch = row + rows == p->rows ? next : w;
        long at = row * (long)p->k;
        float sums[ROWS][PANEL];
        if (other) memset(sums, 0, sizeof sums);
        void *to = other ? (void *)sums : c + row * p->ldc * size;
        if (int8)
            tiles_int8[mode][rows - 1](
                (const uint32_t *)((const Code *)p->q.values + at), p->k / CODES, w,
                p->q.scales + row, p->q.start + row, to, ldc, bias,
                p->linear.scale + column, fetch);
        else
            tiles[mode][rows - 1]((const uint32_t *)((const Activation *)p->a + at),
                                     p->k / DEPTH, (const uint32_t *)w, p->k / DEPTH, to, ldc,
                                     bias, fetch);
        for (int i = 0; other && i < rows; i++)
            put_activated(p->mode, (Activation *)c + (row + i) * p->ldc, load(sums[i]),
                          load(sums[i] + WIDTH));
    }
}
#endif
