// The layout of weights in panels, which products.c reads.

// Lay out n rows of k float16 values (n a multiple of PANEL, k of 32) in bf16, multiplied by
// `factor`: n * k * 2 bytes.
void encoder_lay_out_bf16(uint32_t *to, const uint16_t *from, long n, long k, float factor) {
    for (long column = 0; column < n; column++)
        for (long i = 0; i < k; i += 32) {
            uint32_t pairs[16];
            const uint16_t *p = from + column * k + i;
            store_bf16((uint16_t *)pairs, _mm512_mul_ps(from_half(p), SET(factor)),
                       _mm512_mul_ps(from_half(p + 16), SET(factor)));
            uint32_t *panel = to + column / PANEL * PANEL * (k / 2) + column % PANEL;
            for (int j = 0; j < 16; j++) panel[(i / 2 + j) * PANEL] = pairs[j];
        }
}

// The same in int8 (k a multiple of GROUP): n * k bytes, and a scale for each row.
void encoder_lay_out_int8(uint32_t *to, float *scales, const uint16_t *from, long n, long k,
                           float factor) {
    for (long column = 0; column < n; column++) {
        __m512 most = _mm512_setzero_ps();
        for (long i = 0; i < k; i += 16)
            most = _mm512_max_ps(most, _mm512_abs_ps(from_half(from + column * k + i)));
        float largest = _mm512_reduce_max_ps(most);
        __m512 inverse = SET(largest > 0 ? 127.0f / largest : 0.0f);
        scales[column] = largest / 127.0f * factor;
        uint32_t *panel = to + column / PANEL * PANEL * (k / 4) + column % PANEL;
        for (long i = 0; i < k; i += 16) {
            uint32_t fours[4];
            __m512i whole =
                _mm512_cvtps_epi32(_mm512_mul_ps(from_half(from + column * k + i), inverse));
            _mm_storeu_si128((__m128i *)fours,
                             _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(-128)));
            for (int j = 0; j < 4; j++) panel[(i / 4 + j) * PANEL] = fours[j];
        }
    }
}
