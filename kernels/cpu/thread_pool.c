/* The thread pool.
 *
 * OpenMP gives each thread its share of an operation and waits for all of them. When another
 * process runs on a core, the thread there starts its share some milliseconds late, and every
 * operation of a step waits for it. Here each thread has a share too, of consecutive pieces, but
 * takes them one by one from its beginning; one that has no more takes those of others, from the
 * ends of their shares. A thread that does not come costs nothing. The caller waits only for pieces
 * that others have taken, and helpers give up the core between two pieces, so that they are rarely
 * interrupted within one.
 *
 * As the pieces of a thread mostly follow each other, so does the memory that they read, and a
 * piece can prefetch what the next one begins with.
 *
 * A helper that has to share its core still interrupts the caller's work now and then, and one core
 * alone is faster than two of which one is shared. Helpers therefore look at how long the system
 * let them wait for a core, and rest when it was too long. They try again later.
 */

#define _GNU_SOURCE
#include "thread_pool.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

enum {
    MAX_THREADS = 256,
    PIECES_PER_THREAD = 4,
    PIECE_BITS = 20,     /* of a piece's number in a share */
    SHARE_BITS = 16,     /* of the number of shares in `current_operation` */
    SPIN_NS = 100000,    /* a helper without work looks for some for so long before it sleeps */
    CALLER_SPINS = 2000, /* how often a caller looks whether the last pieces have ended, before it
                            lets other threads run */
    YIELD_NS = 1000000,  /* a helper lets other processes run after so long */
    WINDOW_NS = 30000000, /* a helper looks at how long it waited after so long */
    /* Over a window, a helper may wait this part of the time (1 / n) for a core. The system's other
     * work, the server's own process included, takes less; another busy process takes half. */
    TOLERATED_WAIT = 3,
    MIN_REST_NS = 30000000, /* the first rest; each further one without a good window between them
                               is twice as long */
    MAX_REST_NS = 500000000
};

/* The pieces of an operation that nobody has taken yet, of one thread's share: the end of the
 * pieces, and the first one; before them the operation's number, for who looks at it. */
typedef struct {
    _Alignas(64) _Atomic uint64_t pieces;
} Share;

static struct {
    Share shares[MAX_THREADS];
    /* The number of the last operation that has begun, and how many shares it has. */
    _Atomic uint64_t current_operation;
    RunPiece run;
    const void *operation;
    _Alignas(64) _Atomic int64_t n_ended; /* pieces of the operation that have ended */
    pthread_mutex_t caller; /* held by the thread whose operation it is */
    pthread_mutex_t mutex;  /* of `work_came` */
    pthread_cond_t work_came;
    _Atomic int n_sleeping;
    _Atomic int n_threads; /* wanted, the caller included */
    int n_helpers;         /* started */
    _Atomic int caller_id; /* the system's number of the thread that began the last operation */
    _Atomic int64_t n_rests;
} pool = {
    .caller = PTHREAD_MUTEX_INITIALIZER,
    .mutex = PTHREAD_MUTEX_INITIALIZER,
    .work_came = PTHREAD_COND_INITIALIZER,
    .n_threads = 1,
};

static const uint64_t PIECE_MASK = (1 << PIECE_BITS) - 1;
static const uint64_t SHARE_MASK = (1 << SHARE_BITS) - 1;

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t share_of(uint64_t operation_number, int64_t first, int64_t end) {
    return operation_number << 2 * PIECE_BITS | (uint64_t)end << PIECE_BITS | (uint64_t)first;
}

/* Take a piece of a share: the first one if it is the thread's own, else the last one. Returns -1
 * when there is none. */
static int64_t take_piece(Share *share, int is_own) {
    uint64_t pieces = atomic_load_explicit(&share->pieces, memory_order_acquire);
    for (;;) {
        int64_t first = pieces & PIECE_MASK;
        int64_t end = pieces >> PIECE_BITS & PIECE_MASK;
        if (first >= end)
            return -1;
        uint64_t rest = is_own ? pieces + 1 : pieces - (1 << PIECE_BITS);
        if (atomic_compare_exchange_weak_explicit(&share->pieces, &pieces, rest,
                                                  memory_order_acq_rel, memory_order_acquire))
            return is_own ? first : end - 1;
    }
}

/* What a thread knows of the operation that it last took pieces of. */
static _Thread_local struct {
    uint64_t operation; /* as in `current_operation` */
    int share;          /* where it found its last piece; its own at first */
    int is_exhausted;   /* it found no more pieces */
} seen;

/* Take a piece and run it: of the thread's own share while it has some, then of others. Returns 0
 * when there is none. */
static int run_next_piece(intptr_t number) {
    uint64_t current = atomic_load_explicit(&pool.current_operation, memory_order_acquire);
    int n_shares = current & SHARE_MASK;
    if (current != seen.operation) {
        seen.operation = current;
        seen.share = (int)number;
    }
    for (int i = 0; i < n_shares; i++) {
        int share = (seen.share + i) % n_shares;
        int64_t piece = take_piece(&pool.shares[share], share == number);
        if (piece < 0)
            continue;
        seen.share = share;
        seen.is_exhausted = 0;
        /* The operation cannot end before this piece does, so that these two do not change. */
        pool.run(pool.operation, piece);
        atomic_fetch_add_explicit(&pool.n_ended, 1, memory_order_release);
        return 1;
    }
    seen.is_exhausted = 1;
    return 0;
}

/* Whether the calling helper may take a piece now, if there is one. */
static int may_help(intptr_t number) {
    if (number >= atomic_load(&pool.n_threads))
        return 0;
    return atomic_load(&pool.current_operation) != seen.operation || !seen.is_exhausted;
}

/* Sleep until an operation begins. It may have ended when the helper wakes up, but the next ones
 * follow soon. A helper that is not wanted sleeps on. */
static void sleep_until_work_comes(intptr_t number) {
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.n_sleeping, 1);
    if (!may_help(number)) {
        do
            pthread_cond_wait(&pool.work_came, &pool.mutex);
        while (number >= atomic_load(&pool.n_threads));
    }
    atomic_fetch_sub(&pool.n_sleeping, 1);
    pthread_mutex_unlock(&pool.mutex);
}

static _Thread_local int own_id; /* 0: not known yet */

/* The calling thread's number in /proc; 0 where there is none. */
static int thread_id(void) {
#if defined(__linux__)
    if (own_id == 0)
        own_id = (int)syscall(SYS_gettid);
#endif
    return own_id;
}

/* How long a thread of this process has been ready to run and had no core, in ns since it began; 0
 * where the system does not say. (Linux: the second number of schedstat.) */
static int64_t waited_ns(int id) {
    char path[64];
    char text[96];
    long long on_core;
    long long waited;
    snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", id);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0)
        return 0;
    text[length] = 0;
    return sscanf(text, "%lld %lld", &on_core, &waited) == 2 ? waited : 0;
}

/* What a helper knows of the competition for its core. */
typedef struct {
    int64_t begin_ns;  /* of the window */
    int64_t waited_ns; /* until the window's begin: `waited_for_a_core` */
    int caller_id;     /* whose waiting counts, too */
    int64_t rest_ns;   /* of the next rest */
} Window;

/* How long the helper has waited for a core so far. For the first helper, the caller's waiting
 * counts too: the caller cannot rest, and finds a core of its own when a helper does. */
static int64_t waited_for_a_core(intptr_t number, int caller_id) {
    int64_t waited = waited_ns(thread_id());
    if (number == 1 && caller_id)
        waited += waited_ns(caller_id);
    return waited;
}

static void begin_window(Window *window, intptr_t number) {
    window->begin_ns = now_ns();
    window->caller_id = atomic_load(&pool.caller_id);
    window->waited_ns = waited_for_a_core(number, window->caller_id);
}

/* At the end of a window: rest if too much of it was spent waiting for a core. */
static void rest_if_contended(Window *window, intptr_t number) {
    int64_t length = now_ns() - window->begin_ns;
    if (length < WINDOW_NS)
        return;
    if (window->caller_id == atomic_load(&pool.caller_id)) {
        int64_t waited = waited_for_a_core(number, window->caller_id) - window->waited_ns;
        if (waited * TOLERATED_WAIT > length) {
            struct timespec rest = {0, window->rest_ns};
            atomic_fetch_add(&pool.n_rests, 1);
            nanosleep(&rest, NULL);
            window->rest_ns = 2 * window->rest_ns < MAX_REST_NS ? 2 * window->rest_ns : MAX_REST_NS;
        } else
            window->rest_ns = MIN_REST_NS;
    }
    begin_window(window, number);
}

static void *help(void *argument) {
    intptr_t number = (intptr_t)argument;
    int64_t last_work = now_ns();
    int64_t last_yield = last_work;
    Window window = {.rest_ns = MIN_REST_NS};
    begin_window(&window, number);
    for (;;) {
        while (may_help(number) && run_next_piece(number)) {
            last_work = now_ns();
            if (last_work - last_yield > YIELD_NS) {
                sched_yield();
                rest_if_contended(&window, number);
                last_yield = now_ns();
            }
        }
        for (int i = 0; i < 32 && !may_help(number); i++)
            pause_cpu();
        if (now_ns() - last_work > SPIN_NS) {
            int64_t slept_from = now_ns();
            sleep_until_work_comes(number);
            last_work = last_yield = now_ns();
            window.begin_ns += last_work - slept_from; /* only time with work counts */
        }
    }
    return NULL;
}

/* A child process has no helpers; it starts its own. Its only thread has another number. */
static void forget_helpers(void) {
    own_id = 0;
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work_came, NULL);
    for (int share = 0; share < MAX_THREADS; share++)
        atomic_store(&pool.shares[share].pieces, 0);
    atomic_store(&pool.current_operation, 0);
    atomic_store(&pool.n_sleeping, 0);
    pool.n_helpers = 0;
}

static void start_helpers(void) {
    static int is_registered = 0;
    if (!is_registered)
        pthread_atfork(NULL, NULL, forget_helpers);
    is_registered = 1;
    while (pool.n_helpers + 1 < atomic_load(&pool.n_threads)) {
        pthread_t thread;
        intptr_t number = pool.n_helpers + 1;
        if (pthread_create(&thread, NULL, help, (void *)number))
            return;
        pthread_detach(thread);
        pool.n_helpers++;
    }
}

void set_num_threads(int n) {
    atomic_store(&pool.n_threads, n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n);
}

int num_threads(void) {
    return atomic_load(&pool.n_threads);
}

int64_t num_rests(void) {
    return atomic_load(&pool.n_rests);
}

void run_pieces(int64_t n_pieces, RunPiece run, const void *operation) {
    /* Another thread's operation may have the helpers; then this one has no help. */
    int has_helpers = n_pieces > 1 && n_pieces <= MAX_PIECES && num_threads() > 1;
    if (!has_helpers || pthread_mutex_trylock(&pool.caller)) {
        for (int64_t piece = 0; piece < n_pieces; piece++)
            run(operation, piece);
        return;
    }
    if (pool.n_helpers + 1 < num_threads())
        start_helpers();
    atomic_store_explicit(&pool.caller_id, thread_id(), memory_order_relaxed);
    pool.run = run;
    pool.operation = operation;
    atomic_store_explicit(&pool.n_ended, 0, memory_order_relaxed);
    uint64_t operation_number = (atomic_load(&pool.current_operation) >> SHARE_BITS) + 1;
    int64_t n_shares = n_pieces < num_threads() ? n_pieces : num_threads();
    for (int64_t share = 0; share < n_shares; share++)
        atomic_store_explicit(&pool.shares[share].pieces,
                              share_of(operation_number, share * n_pieces / n_shares,
                                       (share + 1) * n_pieces / n_shares),
                              memory_order_release);
    atomic_store(&pool.current_operation, operation_number << SHARE_BITS | (uint64_t)n_shares);
    if (atomic_load(&pool.n_sleeping)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.work_came);
        pthread_mutex_unlock(&pool.mutex);
    }
    while (run_next_piece(0))
        continue;
    for (int spins = 0; atomic_load_explicit(&pool.n_ended, memory_order_acquire) < n_pieces;) {
        if (spins++ < CALLER_SPINS)
            pause_cpu();
        else
            sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}

typedef struct {
    RunRange run;
    const void *operation;
    int64_t n_items;
    int64_t items_per_piece;
} Ranges;

static void run_range(const void *operation, int64_t piece) {
    const Ranges *ranges = operation;
    int64_t begin = piece * ranges->items_per_piece;
    int64_t end = begin + ranges->items_per_piece;
    ranges->run(ranges->operation, begin, end < ranges->n_items ? end : ranges->n_items);
}

void run_ranges(int64_t n_items, int64_t min_items, RunRange run, const void *operation) {
    int64_t wanted = num_threads() * PIECES_PER_THREAD;
    Ranges ranges = {run, operation, n_items, (n_items + wanted - 1) / wanted};
    if (ranges.items_per_piece < min_items)
        ranges.items_per_piece = min_items;
    if (ranges.items_per_piece >= n_items)
        run(operation, 0, n_items);
    else
        run_pieces((n_items + ranges.items_per_piece - 1) / ranges.items_per_piece, run_range,
                   &ranges);
}

void *thread_scratch(int kind, size_t bytes) {
    static _Thread_local void *memory[SCRATCH_KINDS];
    static _Thread_local size_t size[SCRATCH_KINDS];
    if (bytes > size[kind]) {
        free(memory[kind]);
        size[kind] = (bytes + 4095) / 4096 * 4096;
        memory[kind] = aligned_alloc(64, size[kind]);
        if (memory[kind] == NULL)
            size[kind] = 0;
    }
    return memory[kind];
}
