// Whatever treats each row of activations, which is a token, alone.

INLINE void quantise_group(const __m512 x[GROUP / 16], int8_t *values, float *scale,
                           int32_t *start) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < GROUP / 16; i++) most = _mm512_max_ps(most, _mm512_abs_ps(x[i]));
    float largest = _mm512_reduce_max_ps(most);
    __m512 factor = SET(largest > 0 ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < GROUP / 16; i++) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], factor));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128((__m128i *)(values + 16 * i), _mm512_cvtepi32_epi8(whole));
    }
    *scale = largest / 127.0f;
    *start = -128 * _mm512_reduce_add_epi32(sum);
}

static void quantise_row(const Rows *p, long row) {
    long groups = p->width / GROUP;
    for (long g = 0; g < groups; g++) {
        __m512 x[GROUP / 16];
        for (int i = 0; i < GROUP / 16; i++) {
            long at = row * p->width + g * GROUP + 16 * i;
            x[i] = p->gain ? _mm512_loadu_ps(p->x + at) : from_bf16(p->bf16 + at);
        }
        quantise_group(x, p->q.values + row * p->width + g * GROUP, p->q.scales + row * groups + g,
                       p->q.start + row * groups + g);
    }
}

static void norm_row(const Rows *p, long row) {
    int width = p->width;
    float *x = p->x + row * width;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    __m512 mean = SET(_mm512_reduce_add_ps(sum) / (float)width);
    for (int i = 0; i < width; i += 16) {
        __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
        squares = FMA(d, d, squares);
    }
    __m128 variance = _mm_set_ss(_mm512_reduce_add_ps(squares) / (float)width + p->epsilon);
    __m512 factor = SET(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(variance)));
    for (int i = 0; i < width; i += 32) {
        __m512 y[2];
        for (int h = 0; h < 2; h++) {
            int at = i + 16 * h;
            y[h] = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + at), mean), factor);
            y[h] = FMA(y[h], _mm512_loadu_ps(p->gain + at), _mm512_loadu_ps(p->gain + width + at));
            _mm512_storeu_ps(x + at, y[h]);
        }
        if (!p->int8) store_bf16(p->bf16 + row * width + i, y[0], y[1]);
    }
}

// Norm rows and quantise them, or only quantise them.
static void rows(void *argument, int number, char *memory) {
    const Rows *p = argument;
    (void)memory;
    for (long row = (long)number * p->chunk; row < p->rows && row < (number + 1L) * p->chunk;
         row++) {
        if (p->gain) norm_row(p, row);
        if (p->int8) quantise_row(p, row);
    }
}

// The sum of each token's three embeddings.
static void embed(const Shape *shape, const Weights *weights, const int64_t *ids, int length,
                  float *x) {
    int width = shape->hidden, position = shape->first_position;
    for (int i = 0; i < length; i++, x += width) {
        const uint16_t *word = weights->words + ids[i] * width;
        long at = ids[i] == shape->pad ? shape->pad : position++;
        const uint16_t *place = weights->positions + at * width;
        for (int j = 0; j < width; j += 16)
            _mm512_storeu_ps(x + j, _mm512_add_ps(_mm512_add_ps(from_half(word + j),
                                                                from_half(weights->types + j)),
                                                  from_half(place + j)));
    }
}

// A text's vector: its first row, or the mean of its rows.
static void pool(const Shape *shape, const float *x, int length, float *out) {
    int width = shape->hidden;
    __m512 share = SET(1.0f / (float)length);
    for (int j = 0; j < width; j += 16) {
        __m512 sum = _mm512_loadu_ps(x + j);
        if (!shape->first_token) {
            for (long i = 1; i < length; i++)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i * width + j));
            sum = _mm512_mul_ps(sum, share);
        }
        _mm512_storeu_ps(out + j, sum);
    }
}
