// A BERT encoder for x86 CPUs with AVX512-BF16 and AVX512-VNNI (AMD since Zen 4, Intel since Cooper
// Lake): token ids in, one vector a text out. library.py declares the same structures for Python
// and compares sizes and offsets when it loads the library.
//
// The tokens of all texts of a batch lie one behind the other, so nothing is padded. Matrix
// products are computed in bf16, or in int8 with a scale for every GROUP activations and for every
// column of the weights. Sums, layer norms and softmax are float32.
//
// encoder.c includes all other files, so that the compiler sees one unit and can inline the
// kernels:
//   crew.c        several cores work on one batch
//   arithmetic.c  exp2, GELU and conversions of 16 values
//   products.c    matrix products
//   attention.c   attention of one head of one text
//   rows.c        layer norm, quantisation, embedding, pooling: row by row
//   model.c       a whole batch through all layers
//   batches.c     threads that compute batches from a FIFO
//   weights.c     the layout of the weights

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PANEL 32     // columns of weights that are multiplied together
#define ROWS 12      // rows of activations in a tile: 24 of the 32 registers hold sums
#define ROWS_INT8 6  // 12 registers hold the sums of a group, 12 those of all groups
#define GROUP 64     // activations with one scale, int8 only
#define INLINE static inline __attribute__((always_inline))

typedef struct {  // int32 throughout, so that ctypes and C agree
    int32_t hidden, heads, inner, layers;
    int32_t first_position;  // of a text's first token
    int32_t pad;             // RoBERTa: this token has position `pad` and is not counted; else -1
    int32_t first_token;     // pooling: 1 takes the first token, 0 the mean of all
    int32_t int8;            // 1: products in int8, 0: in bf16
    int32_t vocabulary;      // ids are below this
    int32_t window;          // most tokens of a text
    float epsilon;           // of layer norms
} Shape;

typedef struct {
    const void *weights;  // panel by panel, see products.c
    const float *bias;
    const float *scale;  // of each column, int8 only
} Linear;

typedef struct {
    Linear qkv, out, up, down;
    const float *norm1, *norm2;  // gains, then biases
} Layer;

typedef struct {
    const uint16_t *words, *positions, *types;  // float16, in the bundle's file
    const float *norm;                          // gains, then biases
    const Layer *layers;
} Weights;

// A batch of `texts` texts: text i has the ids ids[starts[i]] to ids[starts[i + 1] - 1].
typedef struct {
    const Shape *shape;
    const Weights *weights;
    const int64_t *ids;
    const int32_t *starts;  // texts + 1 of them
    float *out;             // [texts][hidden], not normalised
    struct Crew *crew;      // helps with this batch; null: one core computes it
    _Atomic int64_t nanoseconds;  // 0 until the batch has ended; -1: there was no memory for it
    int32_t texts, helpers;
} Batch;

// -- crew.c

typedef void Task(void *argument, int number, char *memory);

typedef struct Crew {
    _Alignas(64) _Atomic uint64_t ticket;  // stage << 40 | tasks << 20 | next task
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic uint32_t active;  // a futex: odd while a batch is computed; STOP: for good
    _Atomic uint32_t taken;                // 1: a batch has the crew
    Task *task;
    void *argument;
} Crew;

// -- products.c

enum { TO_BF16, GELU_TO_BF16, ADD_TO_FLOAT, SCORES, WEIGHTED };  // what becomes of the sums

typedef struct {  // int8 activations
    int8_t *values;
    float *scales;   // [rows][groups]
    int32_t *start;  // [rows][groups], see tile_int8
} Quantised;

typedef struct {  // A times the weights
    int mode, rows, k, int8;
    const void *a;  // bf16
    Quantised q;    // int8
    Linear linear;
    void *c;
    long ldc;
    int ahead;  // panels until the next one of this thread
} Product;

// -- attention.c

typedef struct {
    const uint16_t *qkv;  // rows of queries, keys and values
    uint16_t *out;
    const int32_t *starts;
    int hidden, heads;
} Attention;

// -- rows.c

typedef struct {
    int rows, width, int8;
    int chunk;          // rows of a task
    float *x;           // norm: in and out
    const float *gain;  // then biases; null: quantise `bf16` only
    uint16_t *bf16;     // norm: out, for bf16; quantise: in
    Quantised q;        // out, for int8
    float epsilon;
} Rows;
