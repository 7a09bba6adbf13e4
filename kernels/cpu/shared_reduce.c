/* Each rank copies its data into a slot of its own, notes that it has done so, waits until all
 * ranks have, and reads all slots. It has two slots, which it uses in turn. It writes a slot again
 * only after a wait in which every rank has noted the round in between, and a rank that notes a
 * round has read the slots of the round before. So one wait a round is enough.
 */

#include "shared_reduce.h"

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include "thread_pool.h"

enum {
    LINE_BYTES = 64,          /* what different ranks write is not in one cache line */
    SLOT_BYTES = 1 << 18,     /* larger data takes several rounds */
    SLOTS = 2,                /* of a rank */
    SPINS = 4000,             /* a waiting rank looks so often before it gives up its core */
    YIELDS = 2000,            /* and so often before it sleeps between two looks */
    SLEEP_NS = 50000,
    MAX_WAIT_S = 1800,        /* a rank that has not come then never will: as long as gloo waits */
    PARALLEL_MIN_SUMS = 1 << 14 /* a thread sums at least so many elements */
};

typedef struct {
    _Alignas(LINE_BYTES) _Atomic uint32_t stopped;
} Header;

typedef struct {
    _Alignas(LINE_BYTES) _Atomic uint64_t rounds; /* whose data the rank has written */
} Progress;

static Progress *progress_of(const SharedGroup *group, int64_t rank) {
    return (Progress *)(group->memory + sizeof(Header)) + rank;
}

static char *slot_of(const SharedGroup *group, int64_t rank, uint64_t round) {
    char *slots = group->memory + sizeof(Header) + group->num_ranks * sizeof(Progress);
    return slots + (rank * SLOTS + (int64_t)(round % SLOTS)) * SLOT_BYTES;
}

int64_t shared_memory_bytes(int64_t num_ranks) {
    int64_t of_rank = (int64_t)sizeof(Progress) + SLOTS * SLOT_BYTES;
    return (int64_t)sizeof(Header) + num_ranks * of_rank;
}

void stop_shared(char *memory) {
    atomic_store(&((Header *)memory)->stopped, 1);
}

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until a rank has written the data of this round. */
static int wait_for(const SharedGroup *group, int64_t rank, uint64_t round) {
    const Header *header = (const Header *)group->memory;
    Progress *progress = progress_of(group, rank);
    time_t start = 0;
    for (int64_t looks = 0;; looks++) {
        if (atomic_load_explicit(&progress->rounds, memory_order_acquire) > round)
            return COLLECTIVE_DONE;
        if (looks < SPINS) {
            pause_cpu();
            continue;
        }
        if (atomic_load_explicit(&header->stopped, memory_order_relaxed))
            return COLLECTIVE_STOPPED;
        if (looks < SPINS + YIELDS) {
            sched_yield();
            continue;
        }
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (start == 0)
            start = now.tv_sec;
        if (now.tv_sec - start > MAX_WAIT_S)
            return COLLECTIVE_STOPPED;
        nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
}

/* Write this rank's data of the next round, and wait for that of all ranks. */
static int exchange(const SharedGroup *group, const void *data, int64_t n_bytes, uint64_t *round) {
    Progress *own = progress_of(group, group->rank);
    *round = atomic_load_explicit(&own->rounds, memory_order_relaxed);
    memcpy(slot_of(group, group->rank, *round), data, (size_t)n_bytes);
    atomic_store_explicit(&own->rounds, *round + 1, memory_order_release);
    for (int64_t rank = 0; rank < group->num_ranks; rank++) {
        int result = wait_for(group, rank, *round);
        if (result != COLLECTIVE_DONE)
            return result;
    }
    return COLLECTIVE_DONE;
}

typedef struct {
    const SharedGroup *group;
    uint64_t round;
    float *x;
} Sum;

static void sum_range(const void *operation, int64_t begin, int64_t end) {
    const Sum *sum = operation;
    const float *first = (const float *)slot_of(sum->group, 0, sum->round);
    memcpy(sum->x + begin, first + begin, (size_t)(end - begin) * sizeof(float));
    for (int64_t rank = 1; rank < sum->group->num_ranks; rank++) {
        const float *slot = (const float *)slot_of(sum->group, rank, sum->round);
        for (int64_t i = begin; i < end; i++)
            sum->x[i] += slot[i];
    }
}

int all_reduce_shared(const SharedGroup *group, float *x, int64_t size) {
    const int64_t most = SLOT_BYTES / (int64_t)sizeof(float);
    for (int64_t start = 0; start < size; start += most) {
        int64_t count = size - start < most ? size - start : most;
        Sum sum = {group, 0, x + start};
        int result = exchange(group, sum.x, count * (int64_t)sizeof(float), &sum.round);
        if (result != COLLECTIVE_DONE)
            return result;
        run_ranges(count, PARALLEL_MIN_SUMS, sum_range, &sum);
    }
    return COLLECTIVE_DONE;
}

int all_gather_shared(const SharedGroup *group, const char *x, int64_t n_bytes, char *out) {
    for (int64_t start = 0; start < n_bytes; start += SLOT_BYTES) {
        int64_t count = n_bytes - start < SLOT_BYTES ? n_bytes - start : SLOT_BYTES;
        uint64_t round;
        int result = exchange(group, x + start, count, &round);
        if (result != COLLECTIVE_DONE)
            return result;
        for (int64_t rank = 0; rank < group->num_ranks; rank++)
            memcpy(out + rank * n_bytes + start, slot_of(group, rank, round), (size_t)count);
    }
    return COLLECTIVE_DONE;
}
