// Pictures: their pixels as rows of activations, one a patch, which a product makes to embeddings.

typedef uint8_t PixelsAt __attribute__((vector_size(WIDTH), aligned(1), may_alias));

// Begin the embeddings `x` of a picture with their positions, and write its patches to rows of
// `patch_values` activations: zeros first, for the class token, then by rows of patches. A patch is
// its rows of pixels one behind the other, each value times a factor and moved, then zeros.
static void unfold(const Shape *shape, const Weights *weights, const uint8_t *pixels, float *x,
                   void *rows) {
    const int side = 3 * shape->patch, values = shape->patch_values;
    const float *factors = weights->pixels, *shifts = factors + values;
    Activation *to = rows;
    uint8_t bytes[values];
    memset(bytes, 0, (size_t)values);
    memset(to, 0, (size_t)values * sizeof *to);
    for (long i = 0; i < (long)shape->window * shape->hidden; i += WIDTH)
        store(x + i, from_half(weights->positions + i));
    for (int number = 0; number < shape->window - 1; number++) {
        const uint8_t *from = pixels + (long)(number / shape->across) * shape->patch *
                                           shape->across * side +
                              number % shape->across * side;
        for (int i = 0; i < shape->patch; i++)
            memcpy(bytes + i * side, from + (long)i * shape->across * side, (size_t)side);
        to += values;
        for (int i = 0; i < values; i += 2 * WIDTH) {
            F y[2];
            for (int h = 0; h < 2; h++) {
                int at = i + WIDTH * h;
                F pixel = __builtin_convertvector(*(const PixelsAt *)(bytes + at), F);
                y[h] = pixel * load(factors + at) + load(shifts + at);
            }
            store_activations(to + i, y[0], y[1]);
        }
    }
}
