// Several cores work on one batch. Helpers sleep until a batch begins, and spin while it runs.

#include "encoder.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STOP 0x80000000u
#define FIELD 20
#define MASK ((1u << FIELD) - 1)

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, 0, 0, 0);
}

static void wake(_Atomic uint32_t *word, int threads) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, 0, 0, 0);
}

static void pause_cpu(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static void pause_briefly(int *turns) {
    if (++*turns < 2000) pause_cpu();
    else sched_yield();  // the thread that is waited for may need this core
}

// Run the next task of the current stage. Returns 0 if there is none left.
static int take(Crew *crew, char *memory) {
    uint64_t ticket = atomic_load_explicit(&crew->ticket, memory_order_acquire);
    if ((ticket & MASK) >= (ticket >> FIELD & MASK)) return 0;
    // The ticket contains the stage. If it has not changed, `task` and `argument` belong to this
    // stage, and they stay until this task is done.
    if (!atomic_compare_exchange_strong(&crew->ticket, &ticket, ticket + 1)) return 1;
    crew->task(crew->argument, (int)(ticket & MASK), memory);
    atomic_fetch_add_explicit(&crew->done, 1, memory_order_release);
    return 1;
}

// Run `tasks` tasks, on all cores of the crew, or here if there is none.
void spread(Crew *crew, Task *task, void *argument, int tasks, char *memory) {
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
        pause_briefly(&turns);
}

// Begin a batch with the crew, unless another batch has it. Returns 0 in that case.
int enlist(Crew *crew, int helpers) {
    if (atomic_exchange(&crew->taken, 1)) return 0;
    atomic_fetch_xor(&crew->active, 1);
    wake(&crew->active, helpers);
    return 1;
}

void release(Crew *crew) {
    atomic_fetch_xor(&crew->active, 1);
    atomic_store(&crew->taken, 0);
}

// What a helper thread runs. `memory` has encoder_helper_memory() bytes. Returns after
// encoder_dismiss.
void encoder_help(Crew *crew, char *memory) {
    for (;;) {
        uint32_t active = atomic_load(&crew->active);
        if (active & STOP) return;
        if (!(active & 1)) {
            sleep_while(&crew->active, active);
            continue;
        }
        int turns = 0;
        while (atomic_load_explicit(&crew->active, memory_order_relaxed) == active) {
            if (take(crew, memory)) turns = 0;
            else pause_briefly(&turns);
        }
    }
}

void encoder_dismiss(Crew *crew) {
    atomic_store(&crew->active, STOP);
    wake(&crew->active, INT32_MAX);
}
