// Sizes and offsets that library.py has to agree with, and what it asks of a CPU.

#include "encoder.h"

#include <sys/syscall.h>
#include <unistd.h>

// The first number says how many follow.
#define AT(type, field) (int32_t)offsetof(type, field)
const int32_t encoder_layout[] = {
    42,
    sizeof(Shape), AT(Shape, hidden), AT(Shape, heads), AT(Shape, inner), AT(Shape, layers),
    AT(Shape, first_position), AT(Shape, pad), AT(Shape, first_token), AT(Shape, precision),
    AT(Shape, vocabulary), AT(Shape, window), AT(Shape, epsilon),
    sizeof(Linear), AT(Linear, weights), AT(Linear, bias), AT(Linear, scale),
    sizeof(Layer), AT(Layer, qkv), AT(Layer, out), AT(Layer, up), AT(Layer, down),
    AT(Layer, norm1), AT(Layer, norm2),
    sizeof(Weights), AT(Weights, kernels), AT(Weights, words), AT(Weights, positions), AT(Weights, types),
    AT(Weights, norm), AT(Weights, layers),
    sizeof(Batch), AT(Batch, shape), AT(Batch, weights), AT(Batch, ids), AT(Batch, starts),
    AT(Batch, out), AT(Batch, crew), AT(Batch, nanoseconds), AT(Batch, texts), AT(Batch, helpers),
    AT(Kernels, panel), AT(Kernels, lay_out),
};
_Static_assert(sizeof encoder_layout == 43 * sizeof(int32_t), "the first number is wrong");
const int32_t encoder_crew_size = sizeof(Crew);

// Ask the kernel for AMX's tile registers, once in a process. Returns 0 if it may use them.
int encoder_allow_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };  // Documentation/arch/x86/xstate.rst
#ifdef SYS_arch_prctl
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 ? 0 : -1;
#else
    return -1;
#endif
}
