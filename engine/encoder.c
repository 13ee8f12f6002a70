// A BERT encoder for x86 CPUs with AVX512-BF16 and AVX512-VNNI (AMD since Zen 4, Intel since Cooper
// Lake): token ids in, one embedding a text out. engine/native.py compiles and calls it.
//
// Tokens of all texts lie one behind the other, so nothing is padded. Products are computed in bf16,
// or in int8 with a scale for every GROUP activations and for every column of the weights; sums,
// layer norms and softmax are float32. The caller brings weights' and working memory, but for what
// encoder_serve's threads work in.
//
// A product C = A W^T goes panel by panel: PANEL columns of W, laid out so that one load brings 16
// columns' next 2 (bf16) or 4 (int8) values of k, are multiplied with blocks of up to ROWS rows of
// A, whose sums stay in registers. Goto & van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008.

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PANEL 32
#define ROWS 12      // 24 of the 32 registers hold sums
#define ROWS_INT8 6  // 12 hold a group's sums, 12 those of all groups
#define GROUP 64
#define INLINE static inline __attribute__((always_inline))

typedef struct {  // all values are int32, so that ctypes and C agree
    int32_t hidden, heads, inner, layers;
    int32_t first_position;  // of a text's first token
    int32_t pad;             // RoBERTa: this token takes position `pad` and is not counted; else -1
    int32_t first_token;     // pooling: 1 takes the first token, 0 the mean of all
    int32_t int8;
    int32_t vocabulary, window;  // tokens: ids are below the one, a text has at most the other
    float epsilon;
} Shape;

typedef struct {
    const void *weights;
    const float *bias, *scale;  // scale: of each column, int8 only
} Linear;

typedef struct {
    Linear qkv, out, up, down;
    const float *norm1, *norm2;  // gains, then biases
} Layer;

typedef struct {
    const uint16_t *words, *positions, *types;  // float16, in the bundle's file
    const float *norm;
    const Layer *layers;
} Weights;

// -- several cores on one call

typedef void Task(void *argument, int number, char *memory);

typedef struct {
    _Alignas(64) _Atomic uint64_t ticket;  // stage << 40 | tasks << 20 | next task
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic uint32_t active;  // a futex: odd while a call runs; STOP for good
    _Atomic uint32_t taken;                // by the one call that may have them
    Task *task;
    void *argument;
} Crew;
_Static_assert(sizeof(Crew) <= 256, "engine/native.py makes room for so much");

#define STOP 0x80000000u
#define FIELD 20
#define MASK ((1u << FIELD) - 1)

static long system_call(long number, long a, long b, long c) {
    register long r10 __asm__("r10") = 0;
    __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return number;
}
static void futex(_Atomic uint32_t *word, int operation, uint32_t value) {
    system_call(202, (long)word, operation | 128, value);
}
static void wait_a_little(int *turns) {
    if (++*turns < 2000) _mm_pause();
    else system_call(24, 0, 0, 0);  // sched_yield: what is waited for may want this core
}

// Takes the next task of the stage that is on, if there is one.
static int take(Crew *crew, char *memory) {
    uint64_t ticket = atomic_load_explicit(&crew->ticket, memory_order_acquire);
    if ((ticket & MASK) >= (ticket >> FIELD & MASK)) return 0;
    // The ticket holds the stage: if it is still the same, so are `task` and `argument`, and they
    // stay so until this task is done.
    if (!atomic_compare_exchange_strong(&crew->ticket, &ticket, ticket + 1)) return 1;
    crew->task(crew->argument, (int)(ticket & MASK), memory);
    atomic_fetch_add_explicit(&crew->done, 1, memory_order_release);
    return 1;
}

static void spread(Crew *crew, Task *task, void *argument, int tasks, char *memory) {
    if (!crew) {
        for (int i = 0; i < tasks; i++) task(argument, i, memory);
        return;
    }
    crew->task = task;
    crew->argument = argument;
    atomic_store(&crew->done, 0);
    uint64_t stage = (atomic_load(&crew->ticket) >> (2 * FIELD)) + 1;
    atomic_store(&crew->ticket, stage << (2 * FIELD) | (uint64_t)tasks << FIELD);
    while (take(crew, memory)) {}
    int turns = 0;
    while (atomic_load_explicit(&crew->done, memory_order_acquire) < (uint32_t)tasks)
        wait_a_little(&turns);
}

// A helper's whole life: to be called from a thread of its own, returns after `encoder_dismiss`.
void encoder_help(Crew *crew, char *memory) {
    for (;;) {
        uint32_t active = atomic_load(&crew->active);
        if (active & STOP) return;
        if (!(active & 1)) {
            futex(&crew->active, 0, active);
            continue;
        }
        int turns = 0;
        while (atomic_load_explicit(&crew->active, memory_order_relaxed) == active) {
            if (take(crew, memory)) turns = 0;
            else wait_a_little(&turns);
        }
    }
}

void encoder_dismiss(Crew *crew) {
    atomic_store(&crew->active, STOP);
    futex(&crew->active, 1, 1 << 30);
}

// -- arithmetic on 16 values

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

// -- products

enum { TO_BF16, GELU_TO_BF16, ADD_TO_FLOAT, SCORES, WEIGHTED };

// What becomes of two registers of sums: columns 0-15 and 16-31 of one row of a panel.
INLINE void put(int mode, void *c, long at, __m512 low, __m512 high, const float *bias) {
    if (mode == SCORES) {
        _mm512_storeu_ps((float *)c + at, low);
        _mm512_storeu_ps((float *)c + at + 16, high);
        return;
    }
    if (mode != WEIGHTED) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + 16));
    }
    if (mode == ADD_TO_FLOAT) {
        float *p = (float *)c + at;
        _mm512_storeu_ps(p, _mm512_add_ps(low, _mm512_loadu_ps(p)));
        _mm512_storeu_ps(p + 16, _mm512_add_ps(high, _mm512_loadu_ps(p + 16)));
        return;
    }
    if (mode == GELU_TO_BF16) low = gelu(low), high = gelu(high);
    store_bf16((uint16_t *)c + at, low, high);
}

// `rows` rows of A, each `lda` pairs apart, times a panel of `pairs` pairs. `extra`: the bias, or for
// WEIGHTED a factor for each row. `next` is fetched into the caches on the way.
INLINE void tile(int mode, int rows, const uint32_t *a, long lda, const uint32_t *w, long pairs,
                 void *c, long ldc, const float *extra, const char *next) {
    __m512 sums[ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(w + k * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(w + k * PANEL + 16);
        if (mode < SCORES) {
            _mm_prefetch(next + k * 128, _MM_HINT_T1);
            _mm_prefetch(next + k * 128 + 64, _MM_HINT_T1);
        }
        for (int i = 0; i < rows; i++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[i * lda + k]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, high);
        }
    }
    for (int i = 0; i < rows; i++) {
        if (mode == WEIGHTED) {
            sums[i][0] = _mm512_mul_ps(sums[i][0], SET(extra[i]));
            sums[i][1] = _mm512_mul_ps(sums[i][1], SET(extra[i]));
        }
        put(mode, c, i * ldc, sums[i][0], sums[i][1], extra);
    }
}

// The same of int8. Weights are stored with 128 added, as VPDPBUSD wants one side unsigned; `start`
// (of each row and group) takes it off again.
INLINE void tile_int8(int mode, int rows, const uint32_t *a, long lda, const uint32_t *w,
                      long groups, const float *scales, const int32_t *start, void *c, long ldc,
                      const float *bias, const float *columns, const char *next) {
    __m512 sums[ROWS_INT8][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i part[ROWS_INT8][2];
        for (int i = 0; i < rows; i++)
            part[i][0] = part[i][1] = _mm512_set1_epi32(start[i * groups + g]);
        for (long k = g * (GROUP / 4); k < (g + 1) * (GROUP / 4); k++) {
            __m512i low = _mm512_loadu_si512(w + k * PANEL);
            __m512i high = _mm512_loadu_si512(w + k * PANEL + 16);
            _mm_prefetch(next + k * 128, _MM_HINT_T1);
            _mm_prefetch(next + k * 128 + 64, _MM_HINT_T1);
            for (int i = 0; i < rows; i++) {
                __m512i four = _mm512_set1_epi32((int)a[i * lda + k]);
                part[i][0] = _mm512_dpbusd_epi32(part[i][0], low, four);
                part[i][1] = _mm512_dpbusd_epi32(part[i][1], high, four);
            }
        }
        for (int i = 0; i < rows; i++) {
            __m512 scale = SET(scales[i * groups + g]);
            sums[i][0] = FMA(_mm512_cvtepi32_ps(part[i][0]), scale, sums[i][0]);
            sums[i][1] = FMA(_mm512_cvtepi32_ps(part[i][1]), scale, sums[i][1]);
        }
    }
    __m512 low = _mm512_loadu_ps(columns), high = _mm512_loadu_ps(columns + 16);
    for (int i = 0; i < rows; i++)
        put(mode, c, i * ldc, _mm512_mul_ps(sums[i][0], low), _mm512_mul_ps(sums[i][1], high),
            bias);
}

typedef void Tile(const uint32_t *, long, const uint32_t *, long, void *, long, const float *,
                  const char *);
typedef void TileInt8(const uint32_t *, long, const uint32_t *, long, const float *,
                      const int32_t *, void *, long, const float *, const float *, const char *);

#define TILE(mode, rows)                                                                          \
    static void tile_##mode##_##rows(const uint32_t *a, long lda, const uint32_t *w, long pairs,  \
                                     void *c, long ldc, const float *extra, const char *next) {   \
        tile(mode, rows, a, lda, w, pairs, c, ldc, extra, next);                                  \
    }
#define TILE_INT8(mode, rows)                                                                     \
    static void tile_int8_##mode##_##rows(                                                        \
        const uint32_t *a, long lda, const uint32_t *w, long groups, const float *scales,         \
        const int32_t *start, void *c, long ldc, const float *bias, const float *columns,         \
        const char *next) {                                                                       \
        tile_int8(mode, rows, a, lda, w, groups, scales, start, c, ldc, bias, columns, next);     \
    }
#define TO_6(make, mode)                                                                          \
    make(mode, 1) make(mode, 2) make(mode, 3) make(mode, 4) make(mode, 5) make(mode, 6)
#define TO_12(make, mode)                                                                         \
    TO_6(make, mode)                                                                              \
    make(mode, 7) make(mode, 8) make(mode, 9) make(mode, 10) make(mode, 11) make(mode, 12)
TO_12(TILE, TO_BF16) TO_12(TILE, GELU_TO_BF16) TO_12(TILE, ADD_TO_FLOAT)
TO_12(TILE, SCORES) TO_12(TILE, WEIGHTED)
TO_6(TILE_INT8, TO_BF16) TO_6(TILE_INT8, GELU_TO_BF16) TO_6(TILE_INT8, ADD_TO_FLOAT)

#define NAME(mode, rows) tile_##mode##_##rows,
#define NAME_INT8(mode, rows) tile_int8_##mode##_##rows,
static Tile *const tiles[][ROWS] = {
    {TO_12(NAME, TO_BF16)}, {TO_12(NAME, GELU_TO_BF16)}, {TO_12(NAME, ADD_TO_FLOAT)},
    {TO_12(NAME, SCORES)}, {TO_12(NAME, WEIGHTED)}};
static TileInt8 *const tiles_int8[][ROWS_INT8] = {{TO_6(NAME_INT8, TO_BF16)},
                                                  {TO_6(NAME_INT8, GELU_TO_BF16)},
                                                  {TO_6(NAME_INT8, ADD_TO_FLOAT)}};

typedef struct {  // int8 activations
    int8_t *values;
    float *scales;
    int32_t *start;
} Quantised;

typedef struct {
    int mode, rows, k, int8;
    const void *a;  // bf16
    Quantised q;
    Linear linear;
    void *c;
    long ldc;
    int ahead;  // panels until the next one of this thread
} Product;

static void panel(void *argument, int number, char *memory) {
    const Product *p = argument;
    (void)memory;
    int most = p->int8 ? ROWS_INT8 : ROWS, blocks = (p->rows + most - 1) / most;
    long words = (long)p->k * PANEL / (p->int8 ? 4 : 2), groups = p->k / GROUP;
    const uint32_t *w = (const uint32_t *)p->linear.weights + number * words;
    const char *next = (const char *)(w + p->ahead * words);
    long lda = p->k / (p->int8 ? 4 : 2), column = (long)number * PANEL;
    char *c = (char *)p->c + column * (p->mode == ADD_TO_FLOAT ? 4 : 2);
    long row_size = p->ldc * (p->mode == ADD_TO_FLOAT ? 4 : 2);
    for (int block = 0, row = 0; block < blocks; block++) {
        int rows = (p->rows - row) / (blocks - block);
        const char *fetch = block + 1 == blocks ? next : (const char *)w;
        if (p->int8)
            tiles_int8[p->mode][rows - 1]((const uint32_t *)p->q.values + row * lda, lda, w, groups,
                                          p->q.scales + row * groups, p->q.start + row * groups,
                                          c + row * row_size, p->ldc, p->linear.bias + column,
                                          p->linear.scale + column, fetch);
        else
            tiles[p->mode][rows - 1]((const uint32_t *)p->a + row * lda, lda, w, p->k / 2,
                                     c + row * row_size, p->ldc, p->linear.bias + column, fetch);
        row += rows;
    }
}

// -- attention

typedef struct {
    const uint16_t *qkv;  // rows of queries, keys and values
    uint16_t *out;
    const int32_t *starts;  // of each text's tokens, and one more
    int hidden, heads;
} Attention;

INLINE void transpose16(__m512i r[16]) {  // 16 x 16 values of 32 bits
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

// Each row of scores becomes 2^(score - the largest), as bf16; `factors` one over their sums.
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

// One head of one text.
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

// -- rows

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

typedef struct {
    int rows, width, int8, chunk;
    float *x;              // norm: in and out
    const float *gain;     // then biases; null: quantise `bf16` only
    uint16_t *bf16;        // norm: out, for bf16; quantise: in
    Quantised q;           // out, for int8
    float epsilon;
} Rows;

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

static void rows(void *argument, int number, char *memory) {
    const Rows *p = argument;
    (void)memory;
    for (long row = (long)number * p->chunk; row < p->rows && row < (number + 1L) * p->chunk;
         row++) {
        if (p->gain) norm_row(p, row);
        if (p->int8) quantise_row(p, row);
    }
}

static void embed(const Shape *shape, const Weights *weights, const int32_t *ids, int length,
                  float *x) {
    int width = shape->hidden, position = shape->first_position;
    for (int i = 0; i < length; i++, x += width) {
        const uint16_t *word = weights->words + (long)ids[i] * width;
        long at = ids[i] == shape->pad ? shape->pad : position++;
        const uint16_t *place = weights->positions + at * width;
        for (int j = 0; j < width; j += 16)
            _mm512_storeu_ps(x + j, _mm512_add_ps(_mm512_add_ps(from_half(word + j),
                                                                from_half(weights->types + j)),
                                                  from_half(place + j)));
    }
}

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

// -- the whole

typedef struct {  // a call's working memory
    char *local;  // attention's
    float *x;
    uint16_t *a, *attended, *qkv, *h;
    Quantised q;
} Memory;

static void *part(uintptr_t *at, long size) {
    void *here = (void *)*at;
    *at += (uintptr_t)(size + 63) / 64 * 64;
    return here;
}

// Divide what begins at `at`; returns where it ends.
static uintptr_t divide(Memory *m, uintptr_t at, const Shape *shape, long tokens, int longest) {
    long width = shape->hidden, inner = shape->inner, most = width > inner ? width : inner;
    m->local = part(&at, attention_memory(longest, shape->hidden / shape->heads));
    m->x = part(&at, tokens * width * 4);
    m->a = part(&at, tokens * width * 2);
    m->attended = part(&at, tokens * width * 2);
    m->qkv = part(&at, tokens * width * 6);
    m->h = part(&at, tokens * inner * 2);
    if (!shape->int8) return at;
    m->q.values = part(&at, tokens * most);
    m->q.scales = part(&at, tokens * most / GROUP * 4);
    m->q.start = part(&at, tokens * most / GROUP * 4);
    return at;
}

// Bytes of working memory for a call of so many tokens, the longest text so long; and for a helper.
long encoder_memory(const Shape *shape, int tokens, int longest, int helper) {
    Memory none;
    if (helper) return attention_memory(longest, shape->hidden / shape->heads);
    return (long)divide(&none, 0, shape, tokens, longest);
}

// Embed `texts` texts: ids[starts[i] .. starts[i + 1]] each. out: float32 [texts][hidden], unnormalised.
// With the crew, unless another call has it.
void encoder_run(const Shape *shape, const Weights *weights, const int32_t *ids,
                 const int32_t *starts, int texts, float *out, char *memory, Crew *crew,
                 int helpers) {
    long tokens = starts[texts], width = shape->hidden, inner = shape->inner;
    int longest = 0;
    for (int i = 0; i < texts; i++)
        if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
    Memory m = {0};
    divide(&m, (uintptr_t)memory, shape, tokens, longest);
    float *x = m.x;
    uint16_t *a = m.a, *attended = m.attended, *qkv = m.qkv, *h = m.h;
    char *local = m.local;

    if (crew && atomic_exchange(&crew->taken, 1)) crew = 0;
    if (crew) {
        atomic_fetch_xor(&crew->active, 1);
        futex(&crew->active, 1, (uint32_t)helpers);
    }
    for (int i = 0; i < texts; i++)
        embed(shape, weights, ids + starts[i], starts[i + 1] - starts[i], x + starts[i] * width);
    int chunk = crew ? 16 : (int)tokens, chunks = ((int)tokens + chunk - 1) / chunk;
    int ahead = 1 + (crew ? helpers : 0);
    Rows norm = {(int)tokens, (int)width, shape->int8, chunk, x, weights->norm, a, m.q,
                 shape->epsilon};
    Rows again = norm;  // quantises what attention and GELU give
    again.gain = 0;
    Product product = {0, (int)tokens, (int)width, shape->int8, a, m.q, {0, 0, 0}, 0, 0, ahead};
    Attention attention = {qkv, attended, starts, (int)width, shape->heads};
    spread(crew, rows, &norm, chunks, local);
    for (int i = 0; i < shape->layers; i++) {
        const Layer *layer = &weights->layers[i];
        product.mode = TO_BF16, product.k = (int)width, product.a = a;
        product.linear = layer->qkv, product.c = qkv, product.ldc = 3 * width;
        spread(crew, panel, &product, (int)(3 * width / PANEL), local);
        spread(crew, attend, &attention, texts * shape->heads, local);
        if (shape->int8) {
            again.bf16 = attended, again.width = (int)width;
            spread(crew, rows, &again, chunks, local);
        }
        product.mode = ADD_TO_FLOAT, product.a = attended;
        product.linear = layer->out, product.c = x, product.ldc = width;
        spread(crew, panel, &product, (int)(width / PANEL), local);
        norm.gain = layer->norm1;
        spread(crew, rows, &norm, chunks, local);
        product.mode = GELU_TO_BF16, product.a = a;
        product.linear = layer->up, product.c = h, product.ldc = inner;
        spread(crew, panel, &product, (int)(inner / PANEL), local);
        if (shape->int8) {
            again.bf16 = h, again.width = (int)inner;
            spread(crew, rows, &again, chunks, local);
        }
        product.mode = ADD_TO_FLOAT, product.a = h, product.k = (int)inner;
        product.linear = layer->down, product.c = x, product.ldc = width;
        spread(crew, panel, &product, (int)(width / PANEL), local);
        norm.gain = layer->norm2;
        spread(crew, rows, &norm, chunks, local);
    }
    if (crew) {
        atomic_fetch_xor(&crew->active, 1);
        atomic_store(&crew->taken, 0);
    }
    for (int i = 0; i < texts; i++)
        pool(shape, x + starts[i] * width, starts[i + 1] - starts[i], out + i * width);
}

// -- a queue

// Threads that take from it need no interpreter: they find the next call's texts without waiting for
// whoever has that, and decide what is in the call when they are free to begin it.

typedef struct {
    const int64_t *ids;
    float *out;
    int64_t ticket;
    double tag;  // the smallest is next; of equal ones, the first that came
    int32_t length, alone;
} Text;
_Static_assert(sizeof(Text) <= 64, "engine/native.py makes room for so much");

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    const Shape *shape;
    const Weights *weights;
    Crew *crew;
    int32_t threads, share, most_texts, most_tokens, capacity;  // share: tokens
    int32_t wake;       // an eventfd, written to when calls have ended
    int32_t stop, idle;
    int32_t more;  // texts that it did not take yet wait behind it
    int32_t texts, tokens;                   // that wait
    int32_t running_texts, running_tokens;
    int32_t filled, ended_texts;             // of `ended`
    int64_t *ended;  // for each call: how many texts, its nanoseconds or -1, their tickets
    Text waiting[];  // capacity
} Queue;

long encoder_queue_size(int capacity) {
    return (long)sizeof(Queue) + capacity * ((long)sizeof(Text) + 3 * (long)sizeof(int64_t));
}

void encoder_queue_begin(Queue *q, const Shape *shape, const Weights *weights, Crew *crew,
                         int threads, int share, int most_texts, int most_tokens, int capacity,
                         int wake) {
    memset(q, 0, sizeof *q);
    pthread_mutex_init(&q->lock, 0);
    pthread_cond_init(&q->work, 0);
    q->shape = shape, q->weights = weights, q->crew = crew;
    q->threads = threads, q->share = share, q->most_texts = most_texts;
    q->most_tokens = most_tokens, q->capacity = capacity, q->wake = wake;
    q->ended = (int64_t *)(q->waiting + capacity);
}

static int places(const Queue *q) {
    return q->capacity - q->texts - q->running_texts - q->ended_texts;
}

// Whether a text of so many tokens should be put now: so that no thread has to wait for its next one,
// and little is decided early.
int encoder_takes(Queue *q, int length) {
    pthread_mutex_lock(&q->lock);
    int little = length <= q->most_tokens / 2 && q->tokens + length <= q->most_tokens;
    int takes = places(q) > 0 && (little || q->texts < q->idle);
    q->more = !takes;
    pthread_mutex_unlock(&q->lock);
    return takes;
}

// What `ids` and `out` point to has to be there until the ticket has come back. Returns 0; -1 for what
// the model has no embedding of; -2 where there is no place for it.
int encoder_put(Queue *q, const int64_t *ids, int length, float *out, int64_t ticket, double tag,
                int alone) {
    if (length < 1 || length > q->shape->window) return -1;
    for (int i = 0; i < length; i++)
        if ((uint64_t)ids[i] >= (uint64_t)q->shape->vocabulary) return -1;
    pthread_mutex_lock(&q->lock);
    int place = places(q) > 0;
    if (place) {
        int at = q->texts++;
        while (at && q->waiting[at - 1].tag > tag) q->waiting[at] = q->waiting[at - 1], at--;
        q->waiting[at] = (Text){ids, out, ticket, tag, length, alone};
        q->tokens += length;
    }
    pthread_mutex_unlock(&q->lock);
    return place ? 0 : -2;
}

// Wake as many threads as there is work for.
void encoder_go(Queue *q) {
    pthread_mutex_lock(&q->lock);
    int wanted = q->tokens / q->share, wake = q->texts ? q->idle : 0;
    if (wanted < 1) wanted = 1;
    if (wake > wanted) wake = wanted;
    pthread_mutex_unlock(&q->lock);
    for (; wake > 0; wake--) pthread_cond_signal(&q->work);
}

// What has ended since the last time, as in `ended`, which `to` has to be as large as. Returns how
// many numbers.
int encoder_ended(Queue *q, int64_t *to) {
    pthread_mutex_lock(&q->lock);
    int filled = q->filled;
    memcpy(to, q->ended, (size_t)filled * sizeof *to);
    q->filled = q->ended_texts = 0;
    pthread_mutex_unlock(&q->lock);
    return filled;
}

void encoder_stop(Queue *q) {
    pthread_mutex_lock(&q->lock);
    q->stop = 1;
    pthread_cond_broadcast(&q->work);
    pthread_mutex_unlock(&q->lock);
}

// Take the next call's texts off the queue, one or more; returns how many.
static int take_texts(Queue *q, Text *call, int *tokens, int *longest) {
    // A part for each thread, and one that is left for whoever is free next: callers send their next
    // texts only when they have their answers, and meanwhile this one would stand still. Of long
    // texts, behind which more wait, as many as may be: a short one among them costs little then.
    int parts = q->threads > 1 ? q->threads + 1 : 1, texts = 0;
    int share = (q->tokens + q->running_tokens + parts - 1) / parts;
    if (share < q->share) share = q->share;
    if (share > q->most_tokens || (q->more && q->waiting[0].length > q->most_tokens / 4))
        share = q->most_tokens;
    *tokens = *longest = 0;
    while (texts < q->texts && texts < q->most_texts) {
        const Text *text = &q->waiting[texts];
        if (texts && *tokens + text->length > share) break;
        *tokens += text->length;
        if (text->length > *longest) *longest = text->length;
        call[texts++] = *text;
    }
    q->texts -= texts, q->tokens -= *tokens;
    q->running_texts += texts, q->running_tokens += *tokens;
    memmove(q->waiting, q->waiting + texts, (size_t)q->texts * sizeof *call);
    return texts;
}

typedef struct {
    char *memory;
    long size;
} Own;

static void fit(Own *own, long size) {
    if (own->size >= size) return;
    if (own->size) munmap(own->memory, (size_t)own->size);
    own->size = (size + (1 << 21) - 1) >> 21 << 21;
    own->memory =
        mmap(0, (size_t)own->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own->memory == MAP_FAILED) own->size = 0;
    else madvise(own->memory, (size_t)own->size, MADV_HUGEPAGE);
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

// Returns how long it took, or -1 if there was no memory for it.
static int64_t compute(const Queue *q, const Text *call, int texts, int tokens, int longest,
                       int alone, Own *own) {
    int64_t begun = nanoseconds();
    const Shape *shape = q->shape;
    long width = shape->hidden, size = encoder_memory(shape, tokens, longest, 0);
    uintptr_t at = 0;
    part(&at, size), part(&at, texts * width * 4), part(&at, tokens * 4), part(&at, texts * 4 + 4);
    fit(own, (long)at);
    if (!own->size) return -1;
    at = (uintptr_t)own->memory;
    char *memory = part(&at, size);
    float *out = part(&at, texts * width * 4);
    int32_t *ids = part(&at, tokens * 4L), *starts = part(&at, texts * 4L + 4);
    starts[0] = 0;
    for (int i = 0; i < texts; i++) {
        for (int j = 0; j < call[i].length; j++) ids[starts[i] + j] = (int32_t)call[i].ids[j];
        starts[i + 1] = starts[i] + call[i].length;
    }
    encoder_run(shape, q->weights, ids, starts, texts, out, memory, alone ? q->crew : 0,
                q->threads - 1);
    for (int i = 0; i < texts; i++)
        memcpy(call[i].out, out + i * width, (size_t)width * sizeof *out);
    return nanoseconds() - begun;
}

// Call for Python; releases the lock for that.
static void call_python(Queue *q) {
    const uint64_t one = 1;
    pthread_mutex_unlock(&q->lock);
    system_call(1, q->wake, (long)&one, sizeof one);
    pthread_mutex_lock(&q->lock);
}

// A thread's whole life: returns after `encoder_stop`. Working memory over `kept` bytes is given back
// after the call that needed it; `call` has room for a call's texts.
void encoder_serve(Queue *q, Text *call, long kept) {
    Own own = {0, 0};
    pthread_mutex_lock(&q->lock);
    for (;;) {
        if (q->stop) break;
        if (!q->texts) {
            q->idle++;
            if (q->more) q->more = 0, call_python(q);
            if (!q->texts && !q->stop) pthread_cond_wait(&q->work, &q->lock);
            q->idle--;
            continue;
        }
        int tokens, longest, others = q->running_texts;
        int texts = take_texts(q, call, &tokens, &longest);
        int alone = call->alone && texts == 1 && !q->texts && !others;
        pthread_mutex_unlock(&q->lock);
        int64_t took = compute(q, call, texts, tokens, longest, alone, &own);
        if (own.size > kept) munmap(own.memory, (size_t)own.size), own.size = 0;
        pthread_mutex_lock(&q->lock);
        q->running_texts -= texts, q->running_tokens -= tokens;
        int told = q->filled != 0;
        int64_t *record = q->ended + q->filled;
        record[0] = texts, record[1] = took;
        for (int i = 0; i < texts; i++) record[2 + i] = call[i].ticket;
        q->filled += 2 + texts, q->ended_texts += texts;
        if (!told) call_python(q);
    }
    pthread_mutex_unlock(&q->lock);
    if (own.size) munmap(own.memory, (size_t)own.size);
}

// -- weights

// Lay out n rows of k float16 values (n a multiple of PANEL, k of 32), multiplied by `factor`, as
// `tile` wants them: n * k * 2 bytes.
void encoder_pack_bf16(uint32_t *to, const uint16_t *from, long n, long k, float factor) {
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

// The same as `tile_int8` wants them (k a multiple of GROUP): n * k bytes, and a scale a column.
void encoder_pack_int8(uint32_t *to, float *scales, const uint16_t *from, long n, long k,
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
