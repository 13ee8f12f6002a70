// A whole batch through all layers of the model.

#include "encoder.h"

typedef struct {  // a batch's working memory
    char *local;  // of this thread's attention
    float *x;     // [tokens][hidden], as all that follows
    void *a, *attended, *qkv, *h;  // activations
    Quantised q;
    int32_t *places;  // of each token: its position in its text
} Memory;

static long qkv_width(const Shape *s) { return (s->heads + 2L * s->key_heads) * s->head; }


// `size` bytes from `at` on, which moves to the next cache line behind them.
static void *carve(uintptr_t *at, long size) {
    void *here = (void *)*at;
    *at += (uintptr_t)(size + 63) / 64 * 64;
    return here;
}

// Divide the memory that begins at `at`. Returns its end.
static uintptr_t divide(Memory *m, uintptr_t at, const Shape *shape, const Kernels *kernels,
                        long tokens, int longest) {
    long width = shape->hidden, inner = shape->inner, attended = (long)shape->heads * shape->head;
    long either = width > attended ? width : attended, most = either > inner ? either : inner;
    long rows = tokens + SPARE_ROWS, row = either * kernels->activation_size;
    m->local = carve(&at, kernels->attention_memory(longest, shape->head));
    long widest = qkv_width(shape) > inner ? qkv_width(shape) : inner;
    if (shape->patch_values > widest) widest = shape->patch_values;
    long most_row = widest * kernels->activation_size;
    m->x = carve(&at, tokens * width * 4);
    // Attention's output replaces its input, and the inner activations replace queries and keys.
    // Patches of pictures are there before these.
    m->a = m->attended = carve(&at, rows * row);
    m->qkv = m->h = carve(&at, rows * most_row);
    m->places = carve(&at, tokens * 4);
    if (shape->precision != INT8) return at;
    m->q.values = carve(&at, rows * most * kernels->code_size);
    m->q.scales = carve(&at, tokens * 4);
    m->q.start = carve(&at, tokens * 4);
    return at;
}

// Bytes of working memory for a batch of so many tokens, the longest text so long.
long encoder_memory(const Shape *shape, const Weights *weights, int tokens, int longest) {
    Memory none;
    return (long)divide(&none, 0, shape, weights->kernels, tokens, longest);
}

// Bytes of working memory of a helper.
long encoder_helper_memory(const Shape *shape, const Weights *weights) {
    return weights->kernels->attention_memory(shape->window, shape->head);
}

// Returns the first text that the model cannot embed, for its length or its ids; -1 if there is
// none.
int encoder_check(const Batch *b) {
    for (int i = 0; i < b->texts; i++) {
        int first = b->starts[i], end = b->starts[i + 1];
        if (end == first || end - first > b->shape->window) return i;
        if (b->pixels) continue;
        for (int j = first; j < end; j++)
            if ((uint64_t)b->ids[j] >= (uint64_t)b->shape->vocabulary) return i;
    }
    return -1;
}

int longest_text(const Batch *b) {
    int longest = 0;
    for (int i = 0; i < b->texts; i++)
        if (b->starts[i + 1] - b->starts[i] > longest) longest = b->starts[i + 1] - b->starts[i];
    return longest;
}

// Norm all rows of `work`; keep: leaves the sums as they are, and only its output is normed.
static void run_norm(Crew *crew, const Kernels *kernels, Rows *work, const float *gain, int keep,
                     char *local) {
    work->gain = gain, work->keep = keep;
    spread(crew, kernels->rows, work, (work->rows + work->chunk - 1) / work->chunk, local);
}

static void run_layers(const Batch *b, const Memory *m, Crew *crew) {
    const Shape *shape = b->shape;
    int tokens = b->starts[b->texts], width = shape->hidden, inner = shape->inner;
    int chunk = crew ? 16 : tokens, chunks = (tokens + chunk - 1) / chunk;
    int precision = shape->precision, int8 = precision == INT8, before = shape->norm_before;
    const Kernels *kernels = b->weights->kernels;
    Rows norm = {.rows = tokens, .width = width, .precision = precision, .chunk = chunk, .x = m->x,
                 .activations = m->a, .q = m->q, .epsilon = shape->epsilon, .rms = shape->rms};
    Rows again = norm;  // quantises the outputs of attention and of the activation
    Product product = {.rows = tokens, .k = width, .precision = precision, .a = m->a, .q = m->q};
    product.ahead = 1 + (crew ? b->helpers : 0);
    const float *distances = b->weights->distances;
    int attended = shape->heads * shape->head, wide = (int)qkv_width(shape);
    Attention attention = {.qkv = m->qkv, .out = m->attended, .starts = b->starts,
                           .heads = shape->heads, .key_heads = shape->key_heads,
                           .head = shape->head, .apart = shape->distances,
                           .distances = distances ? distances + shape->window - 1 : 0};
    Turn turn = {.rows = tokens, .chunk = chunk, .heads = shape->heads, .stride = wide,
                 .key_heads = shape->key_heads, .head = shape->head, .qkv = m->qkv,
                 .places = m->places, .epsilon = shape->epsilon};
    int gated = shape->activation & GATED ? 2 : 1;
    if (b->weights->norm) run_norm(crew, kernels, &norm, b->weights->norm, 0, m->local);
    for (int i = 0; i < shape->layers; i++) {
        const Layer *layer = &b->weights->layers[i];
        if (before && layer->norm1) run_norm(crew, kernels, &norm, layer->norm1, 1, m->local);
        product.mode = TO_ACTIVATION, product.k = width, product.a = m->a;
        product.linear = layer->qkv, product.c = m->qkv, product.ldc = wide;
        spread(crew, kernels->product, &product, wide / kernels->panel, m->local);
        if (layer->angles) {
            turn.angles = layer->angles, turn.gains = layer->gains;
            spread(crew, kernels->turn, &turn, chunks, m->local);
        }
        attention.behind = layer->behind, attention.ahead = layer->ahead;
        spread(crew, kernels->attend, &attention, b->texts * shape->heads, m->local);
        if (int8) {
            again.activations = m->attended, again.width = attended;
            spread(crew, kernels->rows, &again, chunks, m->local);
        }
        product.mode = ADD_TO_FLOAT, product.a = m->attended, product.k = attended;
        product.linear = layer->out, product.c = m->x, product.ldc = width;
        spread(crew, kernels->product, &product, width / kernels->panel, m->local);
        run_norm(crew, kernels, &norm, before ? layer->norm2 : layer->norm1, before, m->local);
        product.mode = shape->activation, product.a = m->a, product.k = width;
        product.linear = layer->up, product.c = m->h, product.ldc = inner;
        spread(crew, kernels->product, &product, gated * inner / kernels->panel, m->local);
        if (int8) {
            again.activations = m->h, again.width = inner;
            spread(crew, kernels->rows, &again, chunks, m->local);
        }
        product.mode = ADD_TO_FLOAT, product.a = m->h, product.k = inner;
        product.linear = layer->down, product.c = m->x, product.ldc = width;
        spread(crew, kernels->product, &product, width / kernels->panel, m->local);
        if (!before) run_norm(crew, kernels, &norm, layer->norm2, 0, m->local);
    }
    if (b->weights->last) run_norm(crew, kernels, &norm, b->weights->last, 0, m->local);
}

// A product whose weights are not in int8.
static void run_float_product(Crew *crew, const Kernels *kernels, Product *work, int columns,
                              char *local) {
    work->mode = ADD_TO_FLOAT, work->precision = kernels->activation_size == 2 ? BF16 : FLOAT32;
    work->ldc = columns, work->ahead = 1;
    spread(crew, kernels->product, work, columns / kernels->panel, local);
}

static void run_embeddings(const Batch *b, const Memory *m, Crew *crew) {
    const Shape *shape = b->shape;
    const Weights *weights = b->weights;
    const Kernels *kernels = weights->kernels;
    long width = shape->hidden, values = shape->patch_values;
    long pixels = (long)(shape->window - 1) * shape->patch * shape->patch * 3;
    for (int i = 0; i < b->texts; i++) {
        int first = b->starts[i];
        float *x = m->x + first * width;
        for (int j = first; j < b->starts[i + 1]; j++) m->places[j] = j - first;
        if (b->pixels)
            kernels->unfold(shape, weights, b->pixels + i * pixels, x,
                            (char *)m->h + first * values * kernels->activation_size);
        else kernels->embed(shape, weights, b->ids + first, b->starts[i + 1] - first, x);
    }
    if (!b->pixels) return;
    Product product = {.rows = b->starts[b->texts], .k = shape->patch_values, .a = m->h,
                       .linear = weights->patches, .c = m->x};
    run_float_product(crew, kernels, &product, shape->hidden, m->local);
}

static void run_pooling(const Batch *b, const Memory *m) {
    const Shape *shape = b->shape;
    const Kernels *kernels = b->weights->kernels;
    long width = shape->hidden, outputs = shape->outputs;
    for (int i = 0; i < b->texts; i++) {
        int first = b->starts[i];
        void *pooled = outputs ? (char *)m->a + i * width * kernels->activation_size : 0;
        kernels->pool(shape, b->pixels ? 0 : b->ids + first, m->x + first * width, b->starts[i + 1] - first,
                      b->out + i * width, pooled);
    }
    if (!outputs) return;
    memset(b->out, 0, (size_t)(b->texts * outputs) * 4);
    Product product = {.rows = b->texts, .k = shape->hidden, .a = m->a,
                       .linear = b->weights->head, .c = b->out};
    run_float_product(0, kernels, &product, shape->outputs, m->local);
}

// Embed a batch, with its crew unless another batch has that. `memory` begins at a cache line and
// has encoder_memory() bytes.
void encoder_run(const Batch *b, char *memory) {
    Memory m = {0};
    divide(&m, (uintptr_t)memory, b->shape, b->weights->kernels, b->starts[b->texts],
           longest_text(b));
    Crew *crew = b->crew && enlist(b->crew, b->helpers) ? b->crew : 0;
    run_embeddings(b, &m, crew);
    run_layers(b, &m, crew);
    if (crew) release(crew);
    run_pooling(b, &m);
}
