// Rotary positions (Su et al. 2021, "RoFormer"): queries and keys are turned by angles that depend on
// their positions. A pair are the values i and i + head / 2. Norms of queries and keys are here too.

// 1 / the root of the mean square of a head.
INLINE float inverse_size(const Activation *p, int head, float epsilon) {
    F squares = {};
    for (int i = 0; i < head; i += WIDTH) {
        F x = from_activation(p + i);
        squares += x * x;
    }
    return 1.0f / __builtin_sqrtf(sum_of(squares) / (float)head + epsilon);
}

INLINE void turn_head(Activation *p, int half, const float *angles, const float *gains, float size) {
    for (int i = 0; i < half; i += WIDTH) {
        F a = from_activation(p + i), b = from_activation(p + half + i);
        if (gains) a *= load(gains + i) * size, b *= load(gains + half + i) * size;
        F cosine = load(angles + i), sine = load(angles + half + i);
        store_activation(p + i, a * cosine - b * sine);
        store_activation(p + half + i, b * cosine + a * sine);
    }
}

// Turn the queries and keys of rows of activations.
static void turn(void *argument, int number, char *memory) {
    const Turn *p = argument;
    (void)memory;
    for (long row = (long)number * p->chunk; row < p->rows && row < (number + 1L) * p->chunk; row++)
        for (int i = 0; i < p->heads + p->key_heads; i++) {
            Activation *at = (Activation *)p->qkv + row * p->stride + (long)i * p->head;
            const float *gains = p->gains ? p->gains + (i < p->heads ? 0 : p->head) : 0;
            float size = gains ? inverse_size(at, p->head, p->epsilon) : 1;
            turn_head(at, p->head / 2, p->angles + (long)p->places[row] * p->head, gains, size);
        }
}
