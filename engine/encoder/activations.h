// Activations other than GELU's exact form, which products.h has in its inner loops' ends.

// 1 / (1 + 2^-x).
INLINE F logistic2(F x) {
    F power = exp2_(min(x, -x));  // at most 1, so that nothing overflows
    return choose(x < 0, power, set(1.0f)) / (power + 1.0f);
}

INLINE F activate(int mode, F x) {
    const float log2e = 1.44269504f;
    switch (mode & ~GATED) {
        case GELU_TO_ACTIVATION: return gelu(x);
        case TANH_GELU_TO_ACTIVATION:  // 1/2 (1 + tanh(u)) is the logistic function of 2u
            return x * logistic2((x + x * x * x * 0.044715f) * (2 * 0.7978845608f * log2e));
        case QUICK_GELU_TO_ACTIVATION: return x * logistic2(x * (1.702f * log2e));
        case SILU_TO_ACTIVATION: return x * logistic2(x * log2e);
        default: return max(x, (F){});  // RELU_TO_ACTIVATION
    }
}

// Store two vectors of sums, activated; GATED: the first, times the second.
static __attribute__((noinline)) void put_activated(int mode, Activation *c, F low, F high) {
    if (mode & GATED) store_activation(c, activate(mode, low) * high);
    else store_activations(c, activate(mode, low), activate(mode, high));
}
