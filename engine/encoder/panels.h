// The layout of weights in panels, which products.h reads; see Kernels.

static void lay_out(void *to, const uint16_t *from, long n, long k, float factor) {
    for (long column = 0; column < n; column++) {
        Activation *panel = (Activation *)to + column / PANEL * PANEL * k;
        for (long i = 0; i < k; i += 2 * WIDTH) {
            Activation values[2 * WIDTH];
            const uint16_t *p = from + column * k + i;
            store_activations(values, from_half(p) * factor, from_half(p + WIDTH) * factor);
            for (long j = 0; j < 2 * WIDTH / DEPTH; j++)
                memcpy(panel + ((i / DEPTH + j) * PANEL + column % PANEL) * DEPTH,
                       values + j * DEPTH, DEPTH * sizeof(Activation));
        }
    }
}

static void lay_out_int8(void *to, float *scales, const uint16_t *from, long n, long k,
                         float factor) {
    for (long column = 0; column < n; column++) {
        F most = {};
        for (long i = 0; i < k; i += WIDTH) {
            F x = from_half(from + column * k + i);
            most = max(most, max(x, -x));
        }
        float largest = largest_of(most);
        F inverse = set(largest > 0 ? 127.0f / largest : 0.0f);
        scales[column] = largest / 127.0f * factor;
        char *panel = (char *)to + column / PANEL * PANEL * k + column % PANEL * CODES;
        for (long i = 0; i < k; i += WIDTH) {
            I whole = to_int(from_half(from + column * k + i) * inverse) + OFFSET;
            typedef int8_t Codes __attribute__((vector_size(WIDTH)));
            Codes codes = __builtin_convertvector(whole, Codes);
            for (long j = 0; j < WIDTH / CODES; j++)
                memcpy(panel + (i / CODES + j) * PANEL * CODES, (char *)&codes + j * CODES, CODES);
        }
    }
}
