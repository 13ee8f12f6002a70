// Attention. Queries are scaled so that softmax takes powers of 2.

typedef struct {  // which keys a block of rows sees
    int row;            // the first row's place in its text
    int behind, ahead;  // how far it sees
    int length;         // of the text
    int first;          // the key of the first score
} Sight;

// Turn each row of scores into 2^(score - largest), and those of keys that it does not see into 0.
// `factors` are 1 / their sums. `all`: all keys behind are seen.
INLINE void softmax_rows(int all, float *scores, Activation *shares, float *factors, int rows,
                         int width, const Sight *sight) {
    for (int i = 0; i < rows; i++) {
        float *s = scores + (long)i * width;
        int end = sight->row + i + sight->ahead + 1;
        end = (end < sight->length ? end : sight->length) - sight->first;
        int begin = all ? 0 : sight->row + i - sight->behind - sight->first;
        if (begin < 0) begin = 0;
        F most = set(-__builtin_inff()), sum = {};
        for (int j = begin / WIDTH * WIDTH; j < end; j += WIDTH) {
            F x = load(s + j);
            if (j + WIDTH > end) x = choose(first_lanes(end - j), x, most);
            if (j < begin) x = choose(first_lanes(begin - j), most, x);
            most = max(most, x);
        }
        most = set(largest_of(most));
        for (int j = 0; j < width; j += 2 * WIDTH) {
            F e[2];
            for (int h = 0; h < 2; h++) {
                int at = j + WIDTH * h;
                e[h] = exp2_(load(s + at) - most);
                if (at + WIDTH > end) e[h] = choose(first_lanes(end - at), e[h], (F){});
                if (at < begin) e[h] = choose(first_lanes(begin - at), (F){}, e[h]);
                sum += e[h];
            }
            store_activations(shares + (long)i * width + j, e[0], e[1]);
        }
        factors[i] = 1.0f / sum_of(sum);
    }
}

INLINE void softmax(float *scores, Activation *shares, float *factors, int rows, int width,
                    const Sight *sight) {
    if (sight->row + rows <= sight->behind + 1)
        softmax_rows(1, scores, shares, factors, rows, width, sight);
    else softmax_rows(0, scores, shares, factors, rows, width, sight);
}

#ifdef BF16_ACTIVATIONS
// Transpose 16 x 16 values of 32 bits.
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            t[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0x88);
            t[8 * j + 4 + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// Lay out `length` keys as panels [head / 2][PANEL] of pairs. `width`: `length` rounded up to PANEL.
INLINE void lay_out_keys(uint32_t *keys, const Activation *k, long stride, int length, int width,
                         int head) {
    for (int j = 0; j < width; j += 16)
        for (int d = 0; d < head / 2; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = j + i < length ? _mm512_loadu_si512(k + (j + i) * stride + 2 * d)
                                      : _mm512_setzero_si512();
            transpose16(r);
            uint32_t *panel = keys + (long)(j / 32) * 16 * head + j % 32;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (d + i) * 32, r[i]);
        }
}

// Lay out values as panels [width / 2][PANEL] of pairs.
INLINE void lay_out_values(uint32_t *values, const Activation *v, long stride, int length,
                           int width, int head) {
    const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                          8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    for (int d = 0; d < head; d += 32)
        for (int j = 0; j < width; j += 2) {
            __m512i a = _mm512_setzero_si512(), b = a;
            if (j < length) a = _mm512_loadu_si512(v + j * stride + d);
            if (j + 1 < length) b = _mm512_loadu_si512(v + (j + 1) * stride + d);
            uint32_t *row = values + (long)(d / 32) * 16 * width + (long)j / 2 * 32;
            _mm512_storeu_si512(row, _mm512_permutex2var_epi16(a, even, b));
            _mm512_storeu_si512(row + 16, _mm512_permutex2var_epi16(a, odd, b));
        }
}
#else
INLINE void lay_out_keys(uint32_t *keys, const Activation *k, long stride, int length, int width,
                         int head) {
    for (int j = 0; j < width; j++) {
        float *panel = (float *)keys + (long)(j / PANEL) * PANEL * head + j % PANEL;
        for (int d = 0; d < head; d++) panel[d * PANEL] = j < length ? k[j * stride + d] : 0;
    }
}

INLINE void lay_out_values(uint32_t *values, const Activation *v, long stride, int length,
                           int width, int head) {
    for (int d = 0; d < head; d += PANEL)
        for (int j = 0; j < width; j++)
            for (int h = 0; h < PANEL; h += WIDTH)
                store((float *)values + (long)d * width + (long)j * PANEL + h,
                      j < length ? load(v + j * stride + d + h) : (F){});
}
#endif

// Add what keys at a distance get. `distances`: the first row's of the first key.
INLINE void add_distances(float *scores, const float *distances, int rows, int width) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < width; j += WIDTH) {
            float *s = scores + i * width + j;
            store(s, load(s) + load(distances + j - i));
        }
}

static int attention_width(int length) { return (length + PANEL - 1) / PANEL * PANEL; }

static long attention_memory(int length, int head) {
    long width = attention_width(length), size = sizeof(Activation);
    return 2 * width * head * size + ROWS * width * (4 + size);
}

// Compute one head of one text.
static void attend(void *argument, int number, char *memory) {
    const Attention *p = argument;
    int text = number / p->heads, of = number % p->heads, head = p->head;
    int key = of / (p->heads / p->key_heads);
    long first = p->starts[text], outputs = (long)p->heads * head;
    long stride = (p->heads + 2L * p->key_heads) * head;
    int length = (int)(p->starts[text + 1] - first), width = attention_width(length);
    const Activation *row0 = (const Activation *)p->qkv + first * stride, *q = row0 + of * head;
    const Activation *k = row0 + outputs + key * head, *v = k + p->key_heads * head;
    const long size = sizeof(Activation), words = (long)width * head * size / 4;
    uint32_t *keys = (uint32_t *)memory, *values = keys + words;
    float *scores = (float *)(values + words);
    Activation *shares = (Activation *)(scores + ROWS * width);
    float factors[ROWS];
    lay_out_keys(keys, k, stride, length, width, head);
    lay_out_values(values, v, stride, length, width, head);
    begin_products();
    for (int row = 0, rows; row < length; row += rows) {
        rows = next_rows(length - row);
        int begin = row - p->behind, end = row + rows + p->ahead;
        begin = begin > 0 ? begin / PANEL * PANEL : 0;
        int columns = attention_width((end < length ? end : length) - begin);
        for (int j = 0; j < columns; j += PANEL)
            multiply(SCORES, rows, q + row * stride, stride, keys + (begin + j) * head * size / 4,
                     head, scores + j, columns, 0);
        const Sight sight = {row, p->behind, p->ahead, length, begin};
        if (p->distances)
            add_distances(scores, p->distances + (long)of * p->apart + begin - row, rows, columns);
        softmax(scores, shares, factors, rows, columns, &sight);
        Activation *out = (Activation *)p->out + (first + row) * outputs + of * head;
        for (int d = 0; d < head; d += PANEL)
            multiply(WEIGHTED, rows, shares, columns,
                     values + ((long)d * width + (long)begin * PANEL) * size / 4, columns, out + d,
                     outputs, factors);
    }
    end_products();
}
