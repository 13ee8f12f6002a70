// Whatever treats each row of activations, which is a token, alone.

// int8: rows are rotated before they are rounded, in blocks of 128 values (64 where the width is no
// multiple of that) by a Hadamard matrix, not divided by its norm. It is orthogonal: weights that
// are rotated alike give the same products. It spreads large values over their block, so that one
// scale suits the whole row. Ashkboos et al. 2024, "QuaRot".

// Lane i of x in lane i ^ `step`, and -1 in the lanes that have this bit.
#define PAIR(i, step) (i) ^ (step), ((i) + 1) ^ (step)
#define FOUR(i, step) PAIR(i, step), PAIR((i) + 2, step)
#define EIGHT(i, step) FOUR(i, step), FOUR((i) + 4, step)
#if WIDTH == 4
#define LANES(step) FOUR(0, step)
#elif WIDTH == 8
#define LANES(step) EIGHT(0, step)
#else
#define LANES(step) EIGHT(0, step), EIGHT(8, step)
#endif
INLINE F signs(int step) {
    float lanes[WIDTH];
    for (int i = 0; i < WIDTH; i++) lanes[i] = i & step ? -1 : 1;
    return load(lanes);
}
#define ADD_LANES(step) \
    for (int i = 0; i < count; i++) \
        x[i] = x[i] * signs(step) + __builtin_shufflevector(x[i], x[i], LANES(step));

// Rotate a block of `count` vectors: the Walsh-Hadamard transform, in log2 of its size steps.
INLINE void rotate(F *x, int count) {
    UNROLL for (int step = 1; step < count; step *= 2)
        UNROLL for (int i = 0; i < count; i++)
            if (!(i & step)) {
                F sum = x[i] + x[i + step];
                x[i + step] = x[i] - x[i + step];
                x[i] = sum;
            }
    ADD_LANES(1)
    ADD_LANES(2)
#if WIDTH >= 8
    ADD_LANES(4)
#endif
#if WIDTH == 16
    ADD_LANES(8)
#endif
}

INLINE int rotation(long n) { return n % 128 ? 64 : 128; }

INLINE void rotate_block(float *to, const float *from, int size) {
    F x[128 / WIDTH];
    UNROLL for (int i = 0; i < size / WIDTH; i++) x[i] = load(from + WIDTH * i);
    rotate(x, size / WIDTH);
    UNROLL for (int i = 0; i < size / WIDTH; i++) store(to + WIDTH * i, x[i]);
}

static void rotate_row(float *to, const float *from, long n) {
    if (rotation(n) == 128)
        for (long at = 0; at < n; at += 128) rotate_block(to + at, from + at, 128);
    else
        for (long at = 0; at < n; at += 64) rotate_block(to + at, from + at, 64);
}

// Rotate and round a row, of the residual stream or of activations.
static void quantise_row(const Rows *p, long row) {
    long width = p->width;
    float rotated[width] __attribute__((aligned(64)));
    if (p->gain) {
        rotate_row(rotated, p->x + row * width, width);
    } else {
        const Activation *a = (const Activation *)p->activations + row * width;
        for (long i = 0; i < width; i += WIDTH) store(rotated + i, from_activation(a + i));
        rotate_row(rotated, rotated, width);
    }
    F most = {};
    for (long i = 0; i < width; i += WIDTH) {
        F x = load(rotated + i);
        most = max(most, max(x, -x));
    }
    float largest = largest_of(most);
    F factor = set(largest > 0 ? 127.0f / largest : 0.0f);
    I sum = {};
    Code *codes = (Code *)p->q.values + row * width;
    for (long i = 0; i < width; i += WIDTH) {
        I whole = to_int(load(rotated + i) * factor);
        sum += whole;
        typedef Code CodesAt __attribute__((vector_size(sizeof(Code) * WIDTH), aligned(1), may_alias));
        typedef Code Codes __attribute__((vector_size(sizeof(Code) * WIDTH)));
        *(CodesAt *)(codes + i) = __builtin_convertvector(whole, Codes);
    }
    p->q.scales[row] = largest / (127.0f * __builtin_sqrtf((float)rotation(width)));
    p->q.start[row] = -OFFSET * sum_of_ints(sum);
}

// `keep`, `rms`: as in Rows.
INLINE void norm_row(const Rows *p, long row, int keep, int rms) {
    int width = p->width;
    float *x = p->x + row * width;
    F sum = {}, squares = {};
    for (int i = 0; i < width; i += WIDTH) sum += load(x + i);
    F mean = set(rms ? 0 : sum_of(sum) / (float)width);
    for (int i = 0; i < width; i += WIDTH) {
        F d = load(x + i) - mean;
        squares += d * d;
    }
    F factor = set(1.0f / __builtin_sqrtf(sum_of(squares) / (float)width + p->epsilon));
    for (int i = 0; i < width; i += 2 * WIDTH) {
        F y[2];
        for (int h = 0; h < 2; h++) {
            int at = i + WIDTH * h;
            y[h] = (load(x + at) - mean) * factor * load(p->gain + at) + load(p->gain + width + at);
            if (!keep) store(x + at, y[h]);
        }
        if (p->precision != INT8 || keep)
            store_activations((Activation *)p->activations + row * width + i, y[0], y[1]);
    }
}

// Norm rows and quantise them, or only quantise them.
static void rows(void *argument, int number, char *memory) {
    const Rows *p = argument;
    Rows of = *p;  // what is quantised
    if (p->keep) of.gain = 0;
    (void)memory;
    for (long row = (long)number * p->chunk; row < p->rows && row < (number + 1L) * p->chunk;
         row++) {
        if (p->gain && !p->keep && !p->rms) norm_row(p, row, 0, 0);
        else if (p->gain) norm_row(p, row, p->keep, p->rms);
        if (p->precision == INT8) quantise_row(&of, row);
    }
}

// The sum of each token's two embeddings.
static void embed(const Shape *shape, const Weights *weights, const int64_t *ids, int length,
                  float *x) {
    int width = shape->hidden, position = shape->first_position;
    for (int i = 0; i < length; i++, x += width) {
        const uint16_t *word = weights->words + ids[i] * width;
        if (!weights->positions) {
            for (int j = 0; j < width; j += WIDTH) store(x + j, from_half(word + j));
            continue;
        }
        long at = ids[i] == shape->pad ? shape->pad : position++;
        const uint16_t *place = weights->positions + at * width;
        for (int j = 0; j < width; j += WIDTH)
            store(x + j, from_half(word + j) + from_half(place + j));
    }
}

// A text's vector: one of its rows, or their mean.
static void pool(const Shape *shape, const int64_t *ids, const float *x, int length, float *out,
                 void *activations) {
    int width = shape->hidden, first = 0;
    if (shape->pooling == LAST) first = length - 1;
    if (shape->pooling == FIRST_OF) {
        while (first < length && ids[first] != shape->pooled) first++;
        if (first == length) first = 0;
    }
    x += (long)first * width;
    for (int j = 0; j < width; j += 2 * WIDTH) {
        F sums[2];
        for (int h = 0; h < 2; h++) {
            const float *column = x + j + WIDTH * h;
            sums[h] = load(column);
            if (shape->pooling != MEAN) continue;
            for (long i = 1; i < length; i++) sums[h] += load(column + i * width);
            sums[h] *= 1.0f / (float)length;
        }
        if (activations) {
            store_activations((Activation *)activations + j, sums[0], sums[1]);
        } else {
            store(out + j, sums[0]);
            store(out + j + WIDTH, sums[1]);
        }
    }
}
