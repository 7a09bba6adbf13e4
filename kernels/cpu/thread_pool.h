/* A pool of threads that divide the pieces of an operation among themselves. */

#ifndef LLMKIT_THREAD_POOL_H
#define LLMKIT_THREAD_POOL_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_PIECES = 1 << 19 }; /* of one operation */

/* Computes one piece of an operation. Pieces may run at the same time and in any order. */
typedef void (*RunPiece)(const void *operation, int64_t piece);

/* Run the pieces 0 .. n_pieces - 1 of an operation, and return when all have ended. The calling
 * thread takes pieces, too. It never waits for a thread that has not taken one. A thread mostly
 * takes consecutive pieces. More than MAX_PIECES run on the calling thread alone.
 */
void run_pieces(int64_t n_pieces, RunPiece run, const void *operation);

/* Computes the items [begin, end) of an operation. */
typedef void (*RunRange)(const void *operation, int64_t begin, int64_t end);

/* Run all of n_items in pieces of at least min_items. */
void run_ranges(int64_t n_items, int64_t min_items, RunRange run, const void *operation);

/* The number of threads that take pieces, the calling thread included. */
void set_num_threads(int n);
int num_threads(void);

/* How often a thread of the pool has rested because it had to share its core. */
int64_t num_rests(void);

/* What a thread needs memory for at the same time. */
enum {
    SCRATCH_INPUTS,
    SCRATCH_PANELS,
    SCRATCH_ATTENTION,
    SCRATCH_PARTS,
    SCRATCH_EXPERTS,
    SCRATCH_MLP,
    SCRATCH_RECURRENCE,
    SCRATCH_KINDS
};

/* Memory of the calling thread, until its next call for the same kind. NULL when there is none. */
void *thread_scratch(int kind, size_t bytes);

#endif
