// The layout of weights in panels, which products.h reads; see Kernels.

static void lay_out(void *to, const uint16_t *from, long n, long k) {
    for (long column = 0; column < n; column++) {
        Activation *panel = (Activation *)to + column / PANEL * PANEL * k;
        for (long i = 0; i < k; i += 2 * WIDTH) {
            Activation values[2 * WIDTH];
            const uint16_t *p = from + column * k + i;
            store_activations(values, from_half(p), from_half(p + WIDTH));
            for (long j = 0; j < 2 * WIDTH / DEPTH; j++)
                memcpy(panel + ((i / DEPTH + j) * PANEL + column % PANEL) * DEPTH,
                       values + j * DEPTH, DEPTH * sizeof(Activation));
        }
    }
}

static void lay_out_int8(void *to, const int8_t *from, long n, long k) {
    for (long column = 0; column < n; column++) {
        int8_t *panel = (int8_t *)to + column / PANEL * PANEL * k + column % PANEL * CODES;
        for (long i = 0; i < k; i += CODES)
            for (long j = 0; j < CODES; j++)
                panel[i * PANEL + j] = (int8_t)(from[column * k + i + j] + OFFSET);
    }
}
