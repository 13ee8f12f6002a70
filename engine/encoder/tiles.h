// Products in bf16 and int8 by AMX: eight tiles of 16 rows of 64 bytes. Tiles 0 to 3 hold sums of 32 rows
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

// Add a tile's product of rows of A and columns of a panel.
#define DOT(int8, sums, a, w) \
    if (int8) _tile_dpbssd(sums, a, w); \
    else _tile_dpbf16ps(sums, a, w);

// Add the products of 64 bytes from `step` on of each of 32 rows of A, or of the first 16, and a
// panel. Rows are `stride` bytes apart.
INLINE void multiply_step(int both, int int8, const void *a, long stride, const uint32_t *w,
                          long step) {
    const uint32_t *columns = w + step / 4 * PANEL;
    const char *row = (const char *)a + step;
    _tile_loadd(6, columns, 4 * PANEL);
    _tile_loadd(7, columns + WIDTH, 4 * PANEL);
    _tile_loadd(4, row, stride);
    DOT(int8, 0, 4, 6)
    DOT(int8, 1, 4, 7)
    if (!both) return;
    _tile_loadd(5, row + 16 * stride, stride);
    DOT(int8, 2, 5, 6)
    DOT(int8, 3, 5, 7)
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

// Finish the sums of one row of a panel that begins at `column`. In int8 they are integers.
INLINE void finish(int mode, int int8, const Product *p, long column, long row, const float *sums,
                   void *c) {
    F low = load(sums), high = load(sums + WIDTH);
    if (int8) {
        const float *columns = p->linear.scale + column;
        F scale = set(p->q.scales[row]);
        low = to_float((I)low) * scale * load(columns);
        high = to_float((I)high) * scale * load(columns + WIDTH);
    }
    put(mode, c, row * p->ldc, low, high, p->linear.bias + column);
}

// Multiply all rows with the panel of columns from `column` on. The sums of a block of rows are
// finished (bias, GELU, rounding) while the tiles multiply the next block.
INLINE void all_rows(int mode, int int8, const Product *p, long column, const uint32_t *w, void *c,
                     const char *next) {
    float sums[2][ROWS][PANEL] __attribute__((aligned(64)));
    const char *a = int8 ? p->q.values : p->a;
    long k = p->k * (int8 ? 1L : 2L);  // bytes of a row
    long first = 0;                    // row of the block whose sums are to be finished
    int waiting = 0, share = (int)((ROWS * 64 + k - 1) / k);  // rows to be finished in a step
    for (int row = 0, number = 0; row < p->rows || waiting; number ^= 1) {
        int rows = next_rows(p->rows - row), both = rows > 16, done = 0;
        const float(*ready)[PANEL] = sums[number ^ 1];
        if (rows) clear_sums();
        for (long step = 0; rows && step < k; step += 64) {
            if (both) multiply_step(1, int8, a + row * k, k, w, step);
            else multiply_step(0, int8, a + row * k, k, w, step);
            if (row + rows == p->rows)
                for (long i = step / 4; i < step / 4 + 16; i++) prefetch(next, i);
            for (int end = done + share; done < end && done < waiting; done++)
                finish(mode, int8, p, column, first + done, ready[done], c);
        }
        for (; done < waiting; done++) finish(mode, int8, p, column, first + done, ready[done], c);
        if (rows) store_sums(both, sums[number][0], PANEL);
        first = row, waiting = rows, row += rows;
    }
}

// Multiply all rows with panel `number`.
static void product(void *argument, int number, char *memory) {
    const Product *p = argument;
    (void)memory;
    int int8 = p->precision == INT8;
    long column = (long)number * PANEL, words = (long)p->k * PANEL / (int8 ? 4 : 2);
    const uint32_t *w = (const uint32_t *)p->linear.weights + number * words;
    const char *next = (const char *)(w + p->ahead * words);
    Activation *c = (Activation *)p->c + (p->mode & GATED ? column / 2 : column);
    float *sum = (float *)p->c + column;
    begin_products();
    if (int8 && p->mode == TO_ACTIVATION) all_rows(TO_ACTIVATION, 1, p, column, w, c, next);
    else if (p->mode == TO_ACTIVATION) all_rows(TO_ACTIVATION, 0, p, column, w, c, next);
    else if (int8 && p->mode == ADD_TO_FLOAT) all_rows(ADD_TO_FLOAT, 1, p, column, w, sum, next);
    else if (p->mode == ADD_TO_FLOAT) all_rows(ADD_TO_FLOAT, 0, p, column, w, sum, next);
    else if (int8 && p->mode == GELU_TO_ACTIVATION)
        all_rows(GELU_TO_ACTIVATION, 1, p, column, w, c, next);
    else if (p->mode == GELU_TO_ACTIVATION) all_rows(GELU_TO_ACTIVATION, 0, p, column, w, c, next);
    else if (int8) all_rows(p->mode, 1, p, column, w, c, next);
    else all_rows(p->mode, 0, p, column, w, c, next);
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
    for (long step = 0; step < 2 * k; step += 64)
        if (both) multiply_step(1, 0, a, 2 * lda, w, step);
        else multiply_step(0, 0, a, 2 * lda, w, step);
    if (mode == SCORES) return store_sums(both, c, ldc);
    store_sums(both, sums[0], PANEL);
    for (int i = 0; i < rows; i++)
        put(mode, c, i * ldc, load(sums[i]) * factors[i], load(sums[i] + WIDTH) * factors[i], 0);
}
