// Whatever treats each row of activations, which is a token, alone.

INLINE void quantise_group(const F x[GROUP / WIDTH], Code *codes, float *scale, int32_t *start) {
    F most = {};
    for (int i = 0; i < GROUP / WIDTH; i++) most = max(most, max(x[i], -x[i]));
    float largest = largest_of(most);
    F factor = set(largest > 0 ? 127.0f / largest : 0.0f);
    I sum = {};
    for (int i = 0; i < GROUP / WIDTH; i++) {
        I whole = to_int(x[i] * factor);
        sum += whole;
        typedef Code CodesAt __attribute__((vector_size(sizeof(Code) * WIDTH), aligned(1), may_alias));
        typedef Code Codes __attribute__((vector_size(sizeof(Code) * WIDTH)));
        *(CodesAt *)(codes + WIDTH * i) = __builtin_convertvector(whole, Codes);
    }
    *scale = largest / 127.0f;
    *start = -OFFSET * sum_of_ints(sum);
}

static void quantise_row(const Rows *p, long row) {
    long groups = p->width / GROUP;
    for (long g = 0; g < groups; g++) {
        F x[GROUP / WIDTH];
        for (int i = 0; i < GROUP / WIDTH; i++) {
            long at = row * p->width + g * GROUP + WIDTH * i;
            x[i] = p->gain ? load(p->x + at)
                           : from_activation((const Activation *)p->activations + at);
        }
        quantise_group(x, (Code *)p->q.values + row * p->width + g * GROUP,
                       p->q.scales + row * groups + g, p->q.start + row * groups + g);
    }
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
