// Sizes and offsets that library.py has to agree with.

#include "encoder.h"

// The first number says how many follow.
#define AT(type, field) (int32_t)offsetof(type, field)
const int32_t encoder_layout[] = {
    63,
    sizeof(Shape), AT(Shape, hidden), AT(Shape, heads), AT(Shape, inner), AT(Shape, layers),
    AT(Shape, key_heads), AT(Shape, head),
    AT(Shape, first_position), AT(Shape, pad), AT(Shape, pooling), AT(Shape, pooled),
    AT(Shape, precision), AT(Shape, vocabulary), AT(Shape, window), AT(Shape, rms),
    AT(Shape, activation),
    AT(Shape, norm_before), AT(Shape, patch), AT(Shape, across),
    AT(Shape, patch_values), AT(Shape, outputs), AT(Shape, distances), AT(Shape, epsilon),
    sizeof(Linear), AT(Linear, weights), AT(Linear, bias), AT(Linear, scale),
    sizeof(Layer), AT(Layer, qkv), AT(Layer, out), AT(Layer, up), AT(Layer, down),
    AT(Layer, norm1), AT(Layer, norm2), AT(Layer, angles), AT(Layer, gains), AT(Layer, behind),
    AT(Layer, ahead),
    sizeof(Weights), AT(Weights, kernels), AT(Weights, words), AT(Weights, positions),
    AT(Weights, norm), AT(Weights, last), AT(Weights, distances), AT(Weights, pixels),
    AT(Weights, patches), AT(Weights, head), AT(Weights, layers),
    sizeof(Batch), AT(Batch, shape), AT(Batch, weights), AT(Batch, ids), AT(Batch, pixels),
    AT(Batch, starts), AT(Batch, out), AT(Batch, crew), AT(Batch, nanoseconds), AT(Batch, texts),
    AT(Batch, helpers),
    sizeof(Kernels), AT(Kernels, panel), AT(Kernels, lay_out),
};
_Static_assert(sizeof encoder_layout == 64 * sizeof(int32_t), "the first number is wrong");
const int32_t encoder_crew_size = sizeof(Crew);
