// Arithmetic on 16 values.

#define SET(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)

// 2^x for x <= 0, relative error 3e-6: a polynomial (minimax) for the fraction.
INLINE __m512 exp2_(__m512 x) {
    x = _mm512_max_ps(x, SET(-126.0f));
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 y = SET(0.009570102207362652f);
    y = FMA(y, f, SET(0.05591786280274391f));
    y = FMA(y, f, SET(0.240247443318367f));
    y = FMA(y, f, SET(0.6931217908859253f));
    y = FMA(y, f, SET(0.9999992847442627f));
    return _mm512_scalef_ps(y, whole);
}

// x Phi(x), error below 8e-6: Phi(x) - 1/2 as x times a polynomial (minimax) in x^2, for |x| <= 5.
INLINE __m512 gelu(__m512 x) {
    static const float terms[] = {
        -0.006278015207499266f, 0.007021220866590738f, -0.008329825475811958f,
        0.015547925606369972f, -0.02421516180038452f, 0.03174414485692978f,
        -0.04031917080283165f, 0.051488012075424194f, -0.07030051946640015f, 0.14136430621147156f};
    __m512 c = _mm512_min_ps(_mm512_max_ps(x, SET(-5.0f)), SET(5.0f));
    __m512 u = FMA(_mm512_mul_ps(c, c), SET(0.08f), SET(-1.0f)), y = SET(0.002277309773489833f);
    for (int i = 0; i < 10; i++) y = FMA(y, u, SET(terms[i]));
    y = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(c, y), SET(-0.5f)), SET(0.5f));
    return FMA(x, y, _mm512_mul_ps(x, SET(0.5f)));
}

INLINE __m512 from_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void store_bf16(uint16_t *p, __m512 low, __m512 high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
INLINE __m512 from_bf16(const uint16_t *p) {
    __m256i v = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
