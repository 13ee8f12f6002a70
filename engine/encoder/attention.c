// Attention. Queries are scaled so that softmax takes powers of 2.

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

// Turn each row of scores into 2^(score - largest), as bf16. `factors` are 1 / their sums.
INLINE void softmax(float *scores, uint16_t *shares, float *factors, int rows, int length,
                    int width) {
    for (int i = 0; i < rows; i++) {
        float *s = scores + (long)i * width;
        __m512 most = SET(-__builtin_inff()), sum = _mm512_setzero_ps();
        for (int j = 0; j < length; j += 16) {
            __mmask16 in = length - j >= 16 ? 0xffff : (__mmask16)((1u << (length - j)) - 1);
            most = _mm512_mask_max_ps(most, in, most, _mm512_loadu_ps(s + j));
        }
        most = SET(_mm512_reduce_max_ps(most));
        for (int j = 0; j < width; j += 32) {
            __m512 e[2];
            for (int h = 0; h < 2; h++) {
                int left = length - j - 16 * h;
                __mmask16 in = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
                __m512 x = _mm512_sub_ps(_mm512_loadu_ps(s + j + 16 * h), most);
                e[h] = _mm512_maskz_mov_ps(in, exp2_(x));
                sum = _mm512_add_ps(sum, e[h]);
            }
            store_bf16(shares + (long)i * width + j, e[0], e[1]);
        }
        factors[i] = 1.0f / _mm512_reduce_add_ps(sum);
    }
}

static long attention_memory(int length, int head) {
    long width = (length + 31) / 32 * 32;
    return width * head * 4 + ROWS * width * 6;
}

// Compute one head of one text.
static void attend(void *argument, int number, char *memory) {
    const Attention *p = argument;
    int text = number / p->heads, head = p->hidden / p->heads, hidden = p->hidden;
    long first = p->starts[text];
    int length = (int)(p->starts[text + 1] - first), width = (length + 31) / 32 * 32;
    long stride = 3 * hidden;
    const uint16_t *q = p->qkv + first * stride + number % p->heads * head;
    const uint16_t *k = q + hidden, *v = k + hidden;
    uint32_t *keys = (uint32_t *)memory;              // panels of 32 keys: [head / 2][32]
    uint32_t *values = keys + (long)width * head / 2;  // panels of 32 dimensions: [width / 2][32]
    float *scores = (float *)(values + (long)width * head / 2);
    uint16_t *shares = (uint16_t *)(scores + ROWS * width);
    float factors[ROWS];
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
    const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                          8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    for (int d = 0; d < head; d += 32)
        for (int j = 0; j < length; j += 2) {
            __m512i a = _mm512_loadu_si512(v + j * stride + d), b = _mm512_setzero_si512();
            if (j + 1 < length) b = _mm512_loadu_si512(v + (j + 1) * stride + d);
            uint32_t *row = values + (long)(d / 32) * 16 * width + (long)j / 2 * 32;
            _mm512_storeu_si512(row, _mm512_permutex2var_epi16(a, even, b));
            _mm512_storeu_si512(row + 16, _mm512_permutex2var_epi16(a, odd, b));
        }
    int blocks = (length + ROWS - 1) / ROWS;
    for (int block = 0, row = 0; block < blocks; block++) {
        int rows = (length - row) / (blocks - block);
        for (int j = 0; j < width; j += 32)
            tiles[SCORES][rows - 1]((const uint32_t *)(q + row * stride), stride / 2,
                                    keys + (long)j / 2 * head, head / 2, scores + j, width, 0, 0);
        softmax(scores, shares, factors, rows, length, width);
        uint16_t *out = p->out + (first + row) * hidden + number % p->heads * head;
        for (int d = 0; d < head; d += 32)
            tiles[WEIGHTED][rows - 1]((const uint32_t *)shares, width / 2,
                                      values + (long)d / 2 * width, (length + 1) / 2, out + d,
                                      hidden, factors, 0);
        row += rows;
    }
}
