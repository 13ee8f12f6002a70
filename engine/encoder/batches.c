// Threads that compute batches from a FIFO. They need no Python interpreter: they take the next
// batch at once, note that it has ended, and write to an eventfd. Python decides what is in a
// batch, and puts no more of them than the FIFO has room for.

#include "encoder.h"

#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    int32_t capacity, wake, stop;  // wake: the eventfd
    int32_t first, waiting;
    Batch *batches[];  // a ring of `capacity`, of which `waiting` from `first` on are filled
} Fifo;

// Bytes of memory for a FIFO.
long encoder_fifo_size(int capacity) {
    return (long)sizeof(Fifo) + capacity * (long)sizeof(Batch *);
}

void encoder_fifo_begin(Fifo *q, int capacity, int wake) {
    memset(q, 0, sizeof *q);
    pthread_mutex_init(&q->lock, 0);
    pthread_cond_init(&q->work, 0);
    q->capacity = capacity, q->wake = wake;
}

// Put a batch last. It and its arrays are in use until its `nanoseconds` are not 0. Returns what
// encoder_check returns; if that is not -1, the batch was not put.
int encoder_put(Fifo *q, Batch *batch) {
    int refused = encoder_check(batch);
    if (refused >= 0) return refused;
    pthread_mutex_lock(&q->lock);
    q->batches[(q->first + q->waiting++) % q->capacity] = batch;
    pthread_mutex_unlock(&q->lock);
    pthread_cond_signal(&q->work);
    return -1;
}

void encoder_stop(Fifo *q) {
    pthread_mutex_lock(&q->lock);
    q->stop = 1;
    pthread_mutex_unlock(&q->lock);
    pthread_cond_broadcast(&q->work);
}

typedef struct {
    char *bytes;
    long size;
} Mapping;

static void unmap(Mapping *m) {
    if (m->size) munmap(m->bytes, (size_t)m->size);
    m->size = 0;
}

// Make a thread's memory `size` bytes or larger. Its size is 0 if there is none to have.
static void fit(Mapping *m, long size) {
    if (m->size >= size) return;
    unmap(m);
    size = (size + (1 << 21) - 1) >> 21 << 21;
    void *made =
        mmap(0, (size_t)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) return;
    madvise(made, (size_t)size, MADV_HUGEPAGE);
    m->bytes = made, m->size = size;
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

// Returns the nanoseconds it took, or -1 if there was no memory.
static int64_t compute(const Batch *batch, Mapping *memory) {
    int64_t begun = nanoseconds();
    fit(memory, encoder_memory(batch->shape, batch->weights, batch->starts[batch->texts], longest_text(batch)));
    if (!memory->size) return -1;
    encoder_run(batch, memory->bytes);
    int64_t took = nanoseconds() - begun;
    return took > 0 ? took : 1;  // 0 would say that it has not ended
}

// What a thread runs; returns after encoder_stop. Working memory above `kept` bytes is given back
// after the batch that needed it.
void encoder_serve(Fifo *q, long kept) {
    const uint64_t one = 1;
    Mapping memory = {0, 0};
    pthread_mutex_lock(&q->lock);
    for (;;) {
        while (!q->waiting && !q->stop) pthread_cond_wait(&q->work, &q->lock);
        if (q->stop) break;
        Batch *batch = q->batches[q->first];
        q->first = (q->first + 1) % q->capacity, q->waiting--;
        pthread_mutex_unlock(&q->lock);
        int64_t took = compute(batch, &memory);
        if (memory.size > kept) unmap(&memory);
        atomic_store(&batch->nanoseconds, took);
        ssize_t written = write(q->wake, &one, sizeof one);
        (void)written;  // it fails only if 2^64 - 1 of them were not read
        pthread_mutex_lock(&q->lock);
    }
    pthread_mutex_unlock(&q->lock);
    unmap(&memory);
}
