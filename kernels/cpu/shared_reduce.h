/* Collective operations of processes on one machine, over memory that they share.
 *
 * The memory begins with zeros. Every process makes the same calls in the same order. */

#ifndef LLMKIT_SHARED_REDUCE_H
#define LLMKIT_SHARED_REDUCE_H

#include <stdint.h>

/* A process as one of the ranks. */
typedef struct {
    char *memory; /* of shared_memory_bytes(num_ranks) bytes */
    int64_t rank;
    int64_t num_ranks;
} SharedGroup;

/* How a collective operation ends. */
enum { COLLECTIVE_DONE = 1, COLLECTIVE_STOPPED = -1 };

int64_t shared_memory_bytes(int64_t num_ranks);

/* x[size] = the sum over the ranks, in their order: the same bits on all of them. */
int all_reduce_shared(const SharedGroup *group, float *x, int64_t size);

/* out[num_ranks, n_bytes] = the x[n_bytes] of all ranks. */
int all_gather_shared(const SharedGroup *group, const char *x, int64_t n_bytes, char *out);

/* Let the operations of all ranks return COLLECTIVE_STOPPED from now on. */
void stop_shared(char *memory);

#endif
