// Arithmetic on WIDTH values at once, in clang's vector types: the compiler makes of them what the
// family's instructions offer.

#define INLINE static inline __attribute__((always_inline))

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
// The same in memory, at any address.
typedef float FloatsAt __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef _Float16 HalvesAt __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef uint16_t WordsAt __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef int8_t BytesAt __attribute__((vector_size(WIDTH), aligned(1), may_alias));

INLINE F load(const float *p) { return *(const FloatsAt *)p; }
INLINE void store(float *p, F x) { *(FloatsAt *)p = x; }
INLINE F set(float x) { return (F){} + x; }
INLINE F max(F a, F b) { return __builtin_elementwise_max(a, b); }
INLINE F min(F a, F b) { return __builtin_elementwise_min(a, b); }
// The nearest whole number, for |x| < 2^22: 1.5 * 2^23 leaves no bits for a fraction, and its last
// bits are the number.
#define WHOLE 12582912.0f
INLINE I to_int(F x) { return (I)(x + WHOLE) - 0x4b400000; }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
INLINE F from_half(const uint16_t *p) { return __builtin_convertvector(*(const HalvesAt *)p, F); }
INLINE float largest_of(F x) { return __builtin_reduce_max(x); }
INLINE int32_t sum_of_ints(I x) { return __builtin_reduce_add(x); }

INLINE float sum_of(F x) {
    float v[WIDTH];
    store(v, x);
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}

// All ones in the first `n` lanes.
INLINE I first_lanes(int n) {
    int32_t lanes[WIDTH];
    for (int i = 0; i < WIDTH; i++) lanes[i] = i;
    I at;
    memcpy(&at, lanes, sizeof at);
    return at < n;
}
// x in those lanes, else y.
INLINE F choose(I lanes, F x, F y) { return (F)(((I)x & lanes) | ((I)y & ~lanes)); }

// 2^x for x <= 0, relative error 3e-6: a polynomial (minimax) for the fraction.
INLINE F exp2_(F x) {
    x = max(x, set(-125.0f));  // so that no result is subnormal
    F moved = x + WHOLE, f = x - (moved - WHOLE);
    F y = set(0.009570102207362652f);
    y = y * f + 0.05591786280274391f;
    y = y * f + 0.240247443318367f;
    y = y * f + 0.6931217908859253f;
    y = y * f + 0.9999992847442627f;
    return (F)((I)y + ((I)moved << 23));
}

// x Phi(x), error below 8e-6: Phi(x) - 1/2 as x times a polynomial (minimax) in x^2, for |x| <= 5.
INLINE F gelu(F x) {
    static const float terms[] = {
        -0.006278015207499266f, 0.007021220866590738f, -0.008329825475811958f,
        0.015547925606369972f, -0.02421516180038452f, 0.03174414485692978f,
        -0.04031917080283165f, 0.051488012075424194f, -0.07030051946640015f, 0.14136430621147156f};
    F c = min(max(x, set(-5.0f)), set(5.0f));
    F u = c * c * 0.08f - 1.0f, y = set(0.002277309773489833f);
    for (int i = 0; i < 10; i++) y = y * u + terms[i];
    y = min(max(c * y, set(-0.5f)), set(0.5f));
    return x * y + x * 0.5f;
}

// Activations: bf16 where the family computes in it, else float32.
#ifdef BF16_ACTIVATIONS
typedef uint16_t Activation;
#define DEPTH 2  // of them in 32 bits

INLINE F from_activation(const Activation *p) {
    return (F)(__builtin_convertvector(*(const WordsAt *)p, U) << 16);
}
INLINE void store_activations(Activation *p, F low, F high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
INLINE void store_activation(Activation *p, F x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
typedef float Activation;
#define DEPTH 1

INLINE F from_activation(const Activation *p) { return load(p); }
INLINE void store_activations(Activation *p, F low, F high) {
    store(p, low);
    store(p + WIDTH, high);
}
INLINE void store_activation(Activation *p, F x) { store(p, x); }
#endif
