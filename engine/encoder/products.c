// Matrix products C = A W^T, panel by panel: PANEL columns of W are laid out so that one load
// brings the next 2 (bf16) or 4 (int8) values of k of 16 columns. A panel is multiplied with up to
// ROWS rows of A at a time, whose sums stay in registers. Goto & van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008.

// Store two registers of sums: columns 0-15 and 16-31 of one row of a panel.
INLINE void put(int mode, void *c, long at, __m512 low, __m512 high, const float *bias) {
    if (mode == SCORES) {
        _mm512_storeu_ps((float *)c + at, low);
        _mm512_storeu_ps((float *)c + at + 16, high);
        return;
    }
    if (mode != WEIGHTED) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + 16));
    }
    if (mode == ADD_TO_FLOAT) {
        float *p = (float *)c + at;
        _mm512_storeu_ps(p, _mm512_add_ps(low, _mm512_loadu_ps(p)));
        _mm512_storeu_ps(p + 16, _mm512_add_ps(high, _mm512_loadu_ps(p + 16)));
        return;
    }
    if (mode == GELU_TO_BF16) low = gelu(low), high = gelu(high);
    store_bf16((uint16_t *)c + at, low, high);
}

// Multiply `rows` rows of A, `lda` pairs apart, with a panel of `pairs` pairs. `extra` is the bias,
// or for WEIGHTED a factor for each row. `next` is prefetched.
INLINE void tile(int mode, int rows, const uint32_t *a, long lda, const uint32_t *w, long pairs,
                 void *c, long ldc, const float *extra, const char *next) {
    __m512 sums[ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(w + k * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(w + k * PANEL + 16);
        if (mode < SCORES) {
            _mm_prefetch(next + k * 128, _MM_HINT_T1);
            _mm_prefetch(next + k * 128 + 64, _MM_HINT_T1);
        }
        for (int i = 0; i < rows; i++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[i * lda + k]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, high);
        }
    }
    for (int i = 0; i < rows; i++) {
        if (mode == WEIGHTED) {
            sums[i][0] = _mm512_mul_ps(sums[i][0], SET(extra[i]));
            sums[i][1] = _mm512_mul_ps(sums[i][1], SET(extra[i]));
        }
        put(mode, c, i * ldc, sums[i][0], sums[i][1], extra);
    }
}

// The same in int8. VPDPBUSD needs one unsigned operand, so weights are stored with 128 added.
// `start`, of each row and group, subtracts it again.
INLINE void tile_int8(int mode, int rows, const uint32_t *a, long lda, const uint32_t *w,
                      long groups, const float *scales, const int32_t *start, void *c, long ldc,
                      const float *bias, const float *columns, const char *next) {
    __m512 sums[ROWS_INT8][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i part[ROWS_INT8][2];
        for (int i = 0; i < rows; i++)
            part[i][0] = part[i][1] = _mm512_set1_epi32(start[i * groups + g]);
        for (long k = g * (GROUP / 4); k < (g + 1) * (GROUP / 4); k++) {
            __m512i low = _mm512_loadu_si512(w + k * PANEL);
            __m512i high = _mm512_loadu_si512(w + k * PANEL + 16);
            _mm_prefetch(next + k * 128, _MM_HINT_T1);
            _mm_prefetch(next + k * 128 + 64, _MM_HINT_T1);
            for (int i = 0; i < rows; i++) {
                __m512i four = _mm512_set1_epi32((int)a[i * lda + k]);
                part[i][0] = _mm512_dpbusd_epi32(part[i][0], low, four);
                part[i][1] = _mm512_dpbusd_epi32(part[i][1], high, four);
            }
        }
        for (int i = 0; i < rows; i++) {
            __m512 scale = SET(scales[i * groups + g]);
            sums[i][0] = FMA(_mm512_cvtepi32_ps(part[i][0]), scale, sums[i][0]);
            sums[i][1] = FMA(_mm512_cvtepi32_ps(part[i][1]), scale, sums[i][1]);
        }
    }
    __m512 low = _mm512_loadu_ps(columns), high = _mm512_loadu_ps(columns + 16);
    for (int i = 0; i < rows; i++)
        put(mode, c, i * ldc, _mm512_mul_ps(sums[i][0], low), _mm512_mul_ps(sums[i][1], high),
            bias);
}

typedef void Tile(const uint32_t *, long, const uint32_t *, long, void *, long, const float *,
                  const char *);
typedef void TileInt8(const uint32_t *, long, const uint32_t *, long, const float *,
                      const int32_t *, void *, long, const float *, const float *, const char *);

#define TILE(mode, rows)                                                                          \
    static void tile_##mode##_##rows(const uint32_t *a, long lda, const uint32_t *w, long pairs,  \
                                     void *c, long ldc, const float *extra, const char *next) {   \
        tile(mode, rows, a, lda, w, pairs, c, ldc, extra, next);                                  \
    }
#define TILE_INT8(mode, rows)                                                                     \
    static void tile_int8_##mode##_##rows(                                                        \
        const uint32_t *a, long lda, const uint32_t *w, long groups, const float *scales,         \
        const int32_t *start, void *c, long ldc, const float *bias, const float *columns,         \
        const char *next) {                                                                       \
        tile_int8(mode, rows, a, lda, w, groups, scales, start, c, ldc, bias, columns, next);     \
    }
#define TO_6(make, mode)                                                                          \
    make(mode, 1) make(mode, 2) make(mode, 3) make(mode, 4) make(mode, 5) make(mode, 6)
#define TO_12(make, mode)                                                                         \
    TO_6(make, mode)                                                                              \
    make(mode, 7) make(mode, 8) make(mode, 9) make(mode, 10) make(mode, 11) make(mode, 12)
TO_12(TILE, TO_BF16) TO_12(TILE, GELU_TO_BF16) TO_12(TILE, ADD_TO_FLOAT)
TO_12(TILE, SCORES) TO_12(TILE, WEIGHTED)
TO_6(TILE_INT8, TO_BF16) TO_6(TILE_INT8, GELU_TO_BF16) TO_6(TILE_INT8, ADD_TO_FLOAT)

#define NAME(mode, rows) tile_##mode##_##rows,
#define NAME_INT8(mode, rows) tile_int8_##mode##_##rows,
static Tile *const tiles[][ROWS] = {
    {TO_12(NAME, TO_BF16)}, {TO_12(NAME, GELU_TO_BF16)}, {TO_12(NAME, ADD_TO_FLOAT)},
    {TO_12(NAME, SCORES)}, {TO_12(NAME, WEIGHTED)}};
static TileInt8 *const tiles_int8[][ROWS_INT8] = {{TO_6(NAME_INT8, TO_BF16)},
                                                  {TO_6(NAME_INT8, GELU_TO_BF16)},
                                                  {TO_6(NAME_INT8, ADD_TO_FLOAT)}};

// Multiply all rows with panel `number`.
static void panel(void *argument, int number, char *memory) {
    const Product *p = argument;
    (void)memory;
    int most = p->int8 ? ROWS_INT8 : ROWS, blocks = (p->rows + most - 1) / most;
    long words = (long)p->k * PANEL / (p->int8 ? 4 : 2), groups = p->k / GROUP;
    const uint32_t *w = (const uint32_t *)p->linear.weights + number * words;
    const char *next = (const char *)(w + p->ahead * words);
    long lda = p->k / (p->int8 ? 4 : 2), column = (long)number * PANEL;
    char *c = (char *)p->c + column * (p->mode == ADD_TO_FLOAT ? 4 : 2);
    long row_size = p->ldc * (p->mode == ADD_TO_FLOAT ? 4 : 2);
    for (int block = 0, row = 0; block < blocks; block++) {
        int rows = (p->rows - row) / (blocks - block);
        const char *fetch = block + 1 == blocks ? next : (const char *)w;
        if (p->int8)
            tiles_int8[p->mode][rows - 1]((const uint32_t *)p->q.values + row * lda, lda, w, groups,
                                          p->q.scales + row * groups, p->q.start + row * groups,
                                          c + row * row_size, p->ldc, p->linear.bias + column,
                                          p->linear.scale + column, fetch);
        else
            tiles[p->mode][rows - 1]((const uint32_t *)p->a + row * lda, lda, w, p->k / 2,
                                     c + row * row_size, p->ldc, p->linear.bias + column, fetch);
        row += rows;
    }
}
