// Products in bf16 by AMX: eight tiles of 16 rows of 64 bytes. Tiles 0 to 3 hold sums of 32 rows
// and 32 columns, 4 and 5 rows of A, 6 and 7 a panel's columns.

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

// The tiles' registers are in use from here to end_products.
INLINE void begin_products(void) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}
INLINE void end_products(void) { _tile_release(); }

// Add the products of columns `step` to `step` + 31 of A, of 32 rows or the first 16, and a panel.
INLINE void multiply_step(int both, const Activation *a, long lda, const uint32_t *w, long step) {
    const uint32_t *columns = w + step / 2 * PANEL;
    _tile_loadd(6, columns, 4 * PANEL);
    _tile_loadd(7, columns + WIDTH, 4 * PANEL);
    _tile_loadd(4, a + step, 2 * lda);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) return;
    _tile_loadd(5, a + 16 * lda + step, 2 * lda);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Store sums, `ldc` apart: of 32 rows, or the first 16.
INLINE void store_sums(int both, float *c, long ldc) {
    _tile_stored(0, c, 4 * ldc);
    _tile_stored(1, c + WIDTH, 4 * ldc);
    if (!both) return;
    _tile_stored(2, c + 16 * ldc, 4 * ldc);
    _tile_stored(3, c + 16 * ldc + WIDTH, 4 * ldc);
}

// Rows of the next block, of those left. Full blocks first: 17 rows cost as much as 32.
INLINE int next_rows(int left) { return left < ROWS ? left : ROWS; }

// Multiply all rows with a panel. The sums of a block of rows are finished (bias, GELU, rounding)
// while the tiles multiply the next block.
INLINE void all_rows(int mode, const Product *p, const uint32_t *w, void *c, const float *bias,
                     const char *next) {
    float sums[2][ROWS][PANEL] __attribute__((aligned(64)));
    const Activation *a = p->a;
    long k = p->k, first = 0;           // row of the block whose sums are to be finished
    int waiting = 0, share = (int)((ROWS * 32 + k - 1) / k);  // rows to be finished in a step
    for (int row = 0, number = 0; row < p->rows || waiting; number ^= 1) {
        int rows = next_rows(p->rows - row), both = rows > 16, done = 0;
        const float(*ready)[PANEL] = sums[number ^ 1];
        if (rows) clear_sums();
        for (long step = 0; rows && step < k; step += 32) {
            if (both) multiply_step(1, a + row * k, k, w, step);
            else multiply_step(0, a + row * k, k, w, step);
            if (row + rows == p->rows)
                for (long i = step / 2; i < step / 2 + 16; i++) prefetch(next, i);
            for (int end = done + share; done < end && done < waiting; done++)
                put(mode, c, (first + done) * p->ldc, load(ready[done]),
                    load(ready[done] + WIDTH), bias);
        }
        for (; done < waiting; done++)
            put(mode, c, (first + done) * p->ldc, load(ready[done]), load(ready[done] + WIDTH),
                bias);
        if (rows) store_sums(both, sums[number][0], PANEL);
        first = row, waiting = rows, row += rows;
    }
}

// Multiply all rows with panel `number`.
static void product(void *argument, int number, char *memory) {
    const Product *p = argument;
    (void)memory;
    long column = (long)number * PANEL, words = (long)p->k * PANEL / 2;
    const uint32_t *w = (const uint32_t *)p->linear.weights + number * words;
    const char *next = (const char *)(w + p->ahead * words);
    const float *bias = p->linear.bias + column;
    Activation *c = (Activation *)p->c + (p->mode & GATED ? column / 2 : column);
    begin_products();
    if (p->mode == TO_ACTIVATION) all_rows(TO_ACTIVATION, p, w, c, bias, next);
    else if (p->mode == GELU_TO_ACTIVATION) all_rows(GELU_TO_ACTIVATION, p, w, c, bias, next);
    else if (p->mode == ADD_TO_FLOAT) all_rows(ADD_TO_FLOAT, p, w, (float *)p->c + column, bias, next);
    else all_rows(p->mode, p, w, c, bias, next);
    end_products();
}

// Multiply up to ROWS rows of A, `lda` values apart, with a panel of attention's: to SCORES, or
// WEIGHTED by a factor for each row. Rows are read to a multiple of 16; see SPARE_ROWS. SCORES are
// also written so.
INLINE void multiply(int mode, int rows, const Activation *a, long lda, const uint32_t *w, long k,
                     void *c, long ldc, const float *factors) {
    float sums[ROWS][PANEL] __attribute__((aligned(64)));
    int both = rows > 16;
    clear_sums();
    for (long step = 0; step < k; step += 32)
        if (both) multiply_step(1, a, lda, w, step);
        else multiply_step(0, a, lda, w, step);
    if (mode == SCORES) return store_sums(both, c, ldc);
    store_sums(both, sums[0], PANEL);
    for (int i = 0; i < rows; i++)
        put(mode, c, i * ldc, load(sums[i]) * factors[i], load(sums[i] + WIDTH) * factors[i], 0);
}
