// Transformers that encode texts and pictures, on CPUs: one vector each. library.py declares the same
// structures for Python and compares sizes and offsets when it loads the library.
//
// The tokens of all texts of a batch lie one behind the other, so nothing is padded. Matrix
// products are computed in float32, in bf16, or in int8 with a scale for every row of activations and
// for every column of the weights; both are rotated before they are rounded, see rows.h. Sums, layer
// norms and softmax are float32.
//
// Each CPU family has a file of its own (portable.c, avx2.c, avxvnni.c, avx512.c, vnni.c, bf16.c,
// amx.c), which is compiled with that family's instructions. It sets a few macros and includes
// kernels.h, which includes the code that all families share:
//   arithmetic.h  on WIDTH values at once: GELU, powers of 2, conversions
//   products.h    matrix products, tiles.h those by AMX, activations.h what becomes of their sums
//   attention.h   attention of one head of one text
//   rows.h        layer norm, quantisation, embedding, pooling: row by row
//   turns.h       rotary positions, norms of queries and keys
//   pictures.h    pixels to rows of activations
//   panels.h      the layout of the weights
// These files belong to no family:
//   crew.c        several cores work on one batch
//   model.c       a whole batch through all layers
//   batches.c     threads that compute batches from a FIFO
//   structures.c  sizes and offsets of the structures, for library.py

#pragma once

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SPARE_ROWS 16  // rows behind the last that kernels may read

enum { FLOAT32, BF16, INT8 };  // precision of products

typedef struct {
    int32_t hidden, heads, inner, layers;
    int32_t key_heads;       // of keys and values: each serves heads / key_heads heads of queries
    int32_t head;            // values of one
    int32_t first_position;  // of a text's first token
    int32_t pad;             // RoBERTa: this token has position `pad` and is not counted; else -1
    int32_t pooling;
    int32_t pooled;          // for FIRST_OF: the first token of this id, or the first of all
    int32_t precision;
    int32_t vocabulary;      // ids are below this; 0 for pictures
    int32_t window;          // most tokens of a text, or those of each picture
    int32_t rms;             // norms do not subtract the mean
    int32_t activation;      // what becomes of the sums between the two products behind attention
    int32_t norm_before;     // layers norm their inputs; else their sums with the outputs
    int32_t patch, across;   // pictures: pixels of a patch's side, patches side by side; or 0
    int32_t patch_values;    // 3 * patch * patch, and zeros up to a multiple of 64
    int32_t outputs;         // of Weights.head; 0 without it
    int32_t distances;       // values of Weights.distances for a head; 0 without them
    float epsilon;           // of layer norms
} Shape;

typedef struct {
    const void *weights;  // panel by panel, see products.h
    const float *bias;
    const float *scale;  // of each column, int8 only
} Linear;

typedef struct {
    Linear qkv, out, up, down;
    const float *norm1, *norm2;  // gains, then biases; norm1 null: its input is normed already
    // For each position, the cosines of head / 2 angles by which queries and keys are turned, then
    // the sines; or null. `gains` of their norms, of a query, then of a key; or null.
    const float *angles, *gains;
    int32_t behind, ahead;  // how far a token sees
} Layer;

typedef struct {
    const struct Kernels *kernels;
    const uint16_t *words, *positions;  // float16, in the bundle's file; positions or null
    const float *norm;  // of embeddings: gains, then biases; or null
    const float *last;  // behind the last layer, the same
    // For each head, what is added to the score of a query for the key at a distance, times log2(e):
    // of -(window - 1) first, of window - 1, and values that kernels may read behind it. Or null.
    const float *distances;
    const float *pixels;  // pictures: a factor for each value of a patch, then what is added
    // Not in int8: patches of pictures to embeddings; pooled vectors to the results.
    Linear patches, head;
    const Layer *layers;
} Weights;

// A batch of `texts` texts: text i has the ids ids[starts[i]] to ids[starts[i + 1] - 1]. Or of
// pictures, which are treated as texts of `window` tokens.
typedef struct {
    const Shape *shape;
    const Weights *weights;
    const int64_t *ids;
    const uint8_t *pixels;  // pictures: [texts][height][width][3]
    const int32_t *starts;  // texts + 1 of them
    float *out;             // [texts][outputs, or hidden], not normalised
    struct Crew *crew;      // helps with this batch; null: one core computes it
    _Atomic int64_t nanoseconds;  // 0 until the batch has ended; -1: there was no memory for it
    int32_t texts, helpers;
} Batch;

// -- what a family's file exports. Activations are bf16 in families that compute in bf16, else
// float32: "activation" below.

typedef void Task(void *argument, int number, char *memory);

// What becomes of sums. Those from TANH_GELU_TO_ACTIVATION on take a longer way, see activations.h.
enum {
    TO_ACTIVATION, GELU_TO_ACTIVATION, ADD_TO_FLOAT, SCORES, WEIGHTED,
    TANH_GELU_TO_ACTIVATION, QUICK_GELU_TO_ACTIVATION, RELU_TO_ACTIVATION, SILU_TO_ACTIVATION,
    GATED = 16  // with one of the others: the first half of a panel's columns, activated, times the
                // second
};
enum { MEAN, FIRST, LAST, FIRST_OF };  // pooling: of all tokens, or that of one

typedef struct {   // int8 activations
    void *values;  // of Kernels.code_size bytes each
    float *scales;   // [rows]
    int32_t *start;  // [rows]: what sums begin with, see products.h
} Quantised;

typedef struct {  // A times the weights; a task is one panel
    int mode, rows, k, precision;
    const void *a;  // activations
    Quantised q;    // int8
    Linear linear;
    void *c;
    long ldc;
    int ahead;  // panels until the next one of this thread
} Product;

typedef struct {      // a task is one head of one text
    const void *qkv;  // activations: rows of queries, keys and values
    void *out;        // activations
    const int32_t *starts;
    int heads, key_heads, head;
    int behind, ahead;  // how far a token sees
    const float *distances;  // of a head's distance 0, the next head's `apart` behind it; or null
    int apart;
} Attention;

typedef struct {  // queries and keys; a task is `chunk` rows
    int rows, chunk, heads, key_heads, head;
    long stride;
    void *qkv;  // activations
    const int32_t *places;  // of each row: its position
    const float *angles, *gains;  // see Layer
    float epsilon;
} Turn;

typedef struct {  // layer norm, or quantisation only; a task is `chunk` rows
    int rows, width, precision;
    int chunk;
    int rms;            // norm: the mean is not subtracted
    int keep;           // norm: `x` stays as it is
    float *x;           // norm: in and out
    const float *gain;  // then biases; null: quantise `activations` only
    void *activations;  // norm: out, unless int8 and not `keep`; quantise: in
    Quantised q;        // out, for int8
    float epsilon;
} Rows;

typedef struct Kernels {
    int32_t activation_size, code_size;  // bytes
    int32_t panel;                       // columns of weights that are multiplied together
    Task *product, *attend, *rows, *turn;
    long (*attention_memory)(int length, int head);
    void (*embed)(const Shape *, const Weights *, const int64_t *ids, int length, float *x);
    void (*unfold)(const Shape *, const Weights *, const uint8_t *pixels, float *x, void *rows);
    // To floats, or to activations where those are given.
    void (*pool)(const Shape *, const int64_t *ids, const float *x, int length, float *out,
                 void *activations);
    // n rows of k float16 values (n a multiple of 32, k of 64) to panels of float32 or bf16 (the
    // activations' type), and codes of weights to panels of codes.
    void (*lay_out)(void *to, const uint16_t *from, long n, long k);
    void (*lay_out_int8)(void *to, const int8_t *from, long n, long k);
    // Kernels one by one, for tests: n is a multiple of 2 * the vector's width.
    void (*activate)(int mode, const float *x, float *y, long n);
    void (*softmax)(float *scores, void *shares, float *factors, int rows, int length, int width);
    void (*rotate)(float *x, long n);  // n values in place, see rows.h
} Kernels;

// -- crew.c

typedef struct Crew {
    _Alignas(64) _Atomic uint64_t ticket;  // stage << 40 | tasks << 20 | next task
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic uint32_t active;  // a futex: odd while a batch is computed; STOP: for good
    _Atomic uint32_t taken;                // 1: a batch has the crew
    Task *task;
    void *argument;
} Crew;

void spread(Crew *crew, Task *task, void *argument, int tasks, char *memory);
int enlist(Crew *crew, int helpers);
void release(Crew *crew);

// -- model.c

long encoder_memory(const Shape *shape, const Weights *weights, int tokens, int longest);
int longest_text(const Batch *b);
int encoder_check(const Batch *b);
void encoder_run(const Batch *b, char *memory);
