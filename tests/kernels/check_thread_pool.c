/* The thread pool beside a helper that does not come, as on a core that another process has.
 *
 * The program is linked with -Wl,--wrap for the functions below named __wrap_, so that it decides
 * when a helper begins to run, and, where a check wants it, what a helper reads of the time and of
 * its waiting for a core, and when its rests end. Pieces wait for each other, never for the real
 * time: a pool that waits for a helper that is held never ends, and its test fails by its time
 * limit. The argument is the check to run; it prints "passed".
 */

#define _GNU_SOURCE
#include "thread_pool.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_COUNTED = 64 };

static _Atomic int helpers_may_run; /* how many of the helpers, in the order of their start */
static _Atomic int helpers_started;

typedef struct {
    void *(*run)(void *);
    void *argument;
    int number;
} Helper;

static void *run_helper(void *argument) {
    Helper helper = *(Helper *)argument;
    free(argument);
    while (atomic_load(&helpers_may_run) <= helper.number)
        sched_yield();
    return helper.run(helper.argument);
}

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *argument) {
    Helper *helper = malloc(sizeof *helper);
    *helper = (Helper){run, argument, atomic_fetch_add(&helpers_started, 1)};
    return __real_pthread_create(thread, attributes, run_helper, helper);
}

/* The system that helpers see instead of the real one. Only a helper moves it, within a piece. */
static struct {
    _Atomic int is_used;
    _Atomic int has_schedstat;
    _Atomic int64_t now_ns;
    _Atomic int64_t helper_waited_ns;
    _Atomic int64_t caller_waited_ns;
    _Atomic int n_rests;
    _Atomic int64_t last_rest_ns;
    _Atomic int n_ended_rests; /* rests end when the check raises it */
} fake;

enum { CALLER_FILE = 100001, HELPER_FILE }; /* no real descriptors */

int __real_clock_gettime(clockid_t, struct timespec *);
int __wrap_clock_gettime(clockid_t, struct timespec *);
int __real_nanosleep(const struct timespec *, struct timespec *);
int __wrap_nanosleep(const struct timespec *, struct timespec *);
int __wrap_open(const char *, int, ...);
int __real_open(const char *, int, ...);
int __wrap_close(int);
int __real_close(int);
ssize_t __wrap_read(int, void *, size_t);
ssize_t __real_read(int, void *, size_t);

int __wrap_clock_gettime(clockid_t clock, struct timespec *time) {
    if (!atomic_load(&fake.is_used))
        return __real_clock_gettime(clock, time);
    int64_t now = atomic_load(&fake.now_ns);
    *time = (struct timespec){now / 1000000000, now % 1000000000};
    return 0;
}

int __wrap_nanosleep(const struct timespec *length, struct timespec *left) {
    if (!atomic_load(&fake.is_used))
        return __real_nanosleep(length, left);
    atomic_store(&fake.last_rest_ns, length->tv_sec * 1000000000LL + length->tv_nsec);
    int number = atomic_fetch_add(&fake.n_rests, 1);
    while (atomic_load(&fake.n_ended_rests) <= number)
        sched_yield();
    return 0;
}

int __wrap_open(const char *path, int flags, ...) {
    if (!atomic_load(&fake.is_used))
        return __real_open(path, flags);
    int id;
    if (!atomic_load(&fake.has_schedstat) || sscanf(path, "/proc/self/task/%d/schedstat", &id) != 1)
        return -1;
    return id == (int)getpid() ? CALLER_FILE : HELPER_FILE; /* the first thread calls the pool */
}

int __wrap_close(int file) {
    return file >= CALLER_FILE ? 0 : __real_close(file);
}

ssize_t __wrap_read(int file, void *text, size_t size) {
    if (file < CALLER_FILE)
        return __real_read(file, text, size);
    int64_t waited =
        atomic_load(file == CALLER_FILE ? &fake.caller_waited_ns : &fake.helper_waited_ns);
    return snprintf(text, size, "123 %lld 4\n", (long long)waited);
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* An operation that counts its pieces, and holds those that its caller does not run. */
typedef struct {
    pthread_t caller;
    int64_t n_pieces;
    int64_t n_meeting;        /* the first so many pieces wait until all of them run */
    _Atomic int *is_open;     /* NULL, or what pieces of helpers wait for */
    _Atomic int64_t n_begun;
    _Atomic int64_t n_of_caller;
    _Atomic int64_t n_of_helpers;
    _Atomic int n_runs[MAX_COUNTED]; /* of each piece */
} Counting;

static void count_piece(const void *operation, int64_t piece) {
    Counting *counting = (Counting *)operation;
    atomic_fetch_add(&counting->n_begun, 1);
    while (piece < counting->n_meeting && atomic_load(&counting->n_begun) < counting->n_meeting)
        sched_yield();
    int is_caller = pthread_equal(pthread_self(), counting->caller);
    while (!is_caller && counting->is_open != NULL && !atomic_load(counting->is_open))
        sched_yield();
    atomic_fetch_add(&counting->n_runs[piece % MAX_COUNTED], 1);
    atomic_fetch_add(is_caller ? &counting->n_of_caller : &counting->n_of_helpers, 1);
}

static void run_counting(Counting *counting) {
    counting->caller = pthread_self();
    run_pieces(counting->n_pieces, count_piece, counting);
    for (int64_t piece = 0; piece < counting->n_pieces && piece < MAX_COUNTED; piece++)
        if (counting->n_pieces <= MAX_COUNTED)
            CHECK(atomic_load(&counting->n_runs[piece]) == 1);
    CHECK(atomic_load(&counting->n_of_caller) + atomic_load(&counting->n_of_helpers) ==
          counting->n_pieces);
}

/* An operation of two pieces that run at the same time: it ends only if a helper comes. */
static void meet_helper(void) {
    Counting meeting = {.n_pieces = 2, .n_meeting = 2};
    run_counting(&meeting);
    CHECK(atomic_load(&meeting.n_of_caller) == 1);
    CHECK(atomic_load(&meeting.n_of_helpers) == 1);
}

/* No helper begins to run: the caller computes all pieces of many operations, and then the helper
 * comes and takes its part. */
static void check_absent_helpers(void) {
    set_num_threads(4);
    for (int i = 0; i < 100; i++) {
        Counting counting = {.n_pieces = 40};
        run_counting(&counting);
        CHECK(atomic_load(&counting.n_of_caller) == 40);
    }
    CHECK(atomic_load(&helpers_started) == 3);
    atomic_store(&helpers_may_run, 1);
    meet_helper();
    /* Two helpers are still absent, so that three pieces never meet. All pieces run anyway. */
    Counting counting = {.n_pieces = 40, .n_meeting = 2};
    run_counting(&counting);
    CHECK(atomic_load(&counting.n_of_helpers) >= 1);
    atomic_store(&helpers_may_run, 3);
    Counting all = {.n_pieces = 4, .n_meeting = 4};
    run_counting(&all);
    CHECK(atomic_load(&all.n_of_helpers) == 3);
}

/* The helper is held in a piece until the caller has run all others. The operation does not end
 * before that piece has. */
typedef struct {
    Counting counting;
    int64_t piece_of_helper;
    _Atomic int has_helper_ended;
} Held;

static void count_held_piece(const void *operation, int64_t piece) {
    Held *held = (Held *)operation;
    Counting *counting = &held->counting;
    int64_t n_begun = atomic_fetch_add(&counting->n_begun, 1) + 1;
    while (piece < 2 && n_begun < 2 && atomic_load(&counting->n_begun) < 2)
        sched_yield();
    if (pthread_equal(pthread_self(), counting->caller)) {
        atomic_fetch_add(&counting->n_of_caller, 1);
        return;
    }
    while (atomic_load(&counting->n_of_caller) < counting->n_pieces - 1)
        sched_yield();
    atomic_fetch_add(&counting->n_of_helpers, 1);
    atomic_store(&held->has_helper_ended, 1);
}

static void check_held_helper(void) {
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    for (int i = 0; i < 20; i++) {
        Held held = {.counting = {.n_pieces = 30, .caller = pthread_self()}};
        run_pieces(30, count_held_piece, &held);
        CHECK(atomic_load(&held.has_helper_ended));
        CHECK(atomic_load(&held.counting.n_of_caller) == 29);
        CHECK(atomic_load(&held.counting.n_of_helpers) == 1);
    }
}

/* The helpers and the caller of another thread's operation are held in its pieces: this thread's
 * operation has no help, and ends. */
static _Atomic int is_other_open;

static void hold_piece(const void *operation, int64_t piece) {
    (void)piece;
    atomic_fetch_add((_Atomic int *)operation, 1);
    while (!atomic_load(&is_other_open))
        sched_yield();
}

static void *hold_pool(void *n_held) {
    run_pieces(2, hold_piece, n_held);
    return NULL;
}

static void check_busy_pool(void) {
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    meet_helper(); /* now the helper has been started: the thread below is none of the pool's */
    pthread_t other;
    _Atomic int n_held = 0;
    CHECK(__real_pthread_create(&other, NULL, hold_pool, &n_held) == 0);
    while (atomic_load(&n_held) < 2)
        sched_yield();
    Counting counting = {.n_pieces = 50};
    run_counting(&counting);
    CHECK(atomic_load(&counting.n_of_caller) == 50);
    atomic_store(&is_other_open, 1);
    pthread_join(other, NULL);
    meet_helper();
}

/* A piece that runs an operation itself computes it alone. */
static void run_inner(const void *operation, int64_t piece) {
    (void)piece;
    Counting inner = {.n_pieces = 20};
    run_counting(&inner);
    CHECK(atomic_load(&inner.n_of_caller) == 20);
    atomic_fetch_add((_Atomic int *)operation, 1);
}

static void check_nested(void) {
    set_num_threads(3);
    atomic_store(&helpers_may_run, 2);
    _Atomic int n_ended = 0;
    run_pieces(10, run_inner, &n_ended);
    CHECK(atomic_load(&n_ended) == 10);
}

/* Fewer threads are wanted: a helper that exists takes no more pieces, until it is wanted again. */
static void check_fewer_threads(void) {
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    meet_helper();
    set_num_threads(1);
    for (int i = 0; i < 100; i++) {
        Counting counting = {.n_pieces = 40};
        run_counting(&counting);
        CHECK(atomic_load(&counting.n_of_caller) == 40);
    }
    set_num_threads(2);
    meet_helper();
    CHECK(atomic_load(&helpers_started) == 1);
}

/* The order in which the caller alone runs pieces: those of its share follow each other, and those
 * of absent helpers are taken from the ends of theirs. */
typedef struct {
    int64_t n_run;
    int64_t order[11];
} Order;

static void note_piece(const void *operation, int64_t piece) {
    Order *order = (Order *)operation;
    order->order[order->n_run++] = piece;
}

static void check_shares(void) {
    static const int64_t expected[11] = {0, 1, 2, 6, 5, 4, 3, 10, 9, 8, 7};
    set_num_threads(3);
    Order order = {.n_run = 0};
    run_pieces(11, note_piece, &order);
    CHECK(order.n_run == 11);
    CHECK(memcmp(order.order, expected, sizeof expected) == 0);
}

/* More pieces than the pool divides run on the calling thread. */
static void check_many_pieces(void) {
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    Counting counting = {.n_pieces = MAX_PIECES + 1LL};
    run_counting(&counting);
    CHECK(atomic_load(&counting.n_of_caller) == MAX_PIECES + 1LL);
    Counting most = {.n_pieces = MAX_PIECES, .n_meeting = 2};
    run_counting(&most);
    CHECK(atomic_load(&most.n_of_helpers) >= 1);
}

/* A child process has none of its parent's helpers and starts its own. */
static void check_fork(void) {
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    meet_helper();
    pid_t child = fork();
    if (child == 0) {
        atomic_store(&helpers_may_run, 2);
        meet_helper();
        _exit(atomic_load(&helpers_started) == 2 ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    meet_helper();
}

/* Ranges: every item belongs to one piece, whatever the sizes. */
typedef struct {
    _Atomic int n_runs[200];
    int64_t min_items;
    int64_t n_items;
} Items;

static void count_items(const void *operation, int64_t begin, int64_t end) {
    Items *items = (Items *)operation;
    CHECK(0 <= begin && begin < end && end <= items->n_items);
    CHECK(end - begin >= items->min_items || end == items->n_items);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&items->n_runs[i], 1);
}

static void check_ranges(void) {
    set_num_threads(3);
    atomic_store(&helpers_may_run, 2);
    for (int64_t n_items = 1; n_items <= 200; n_items++)
        for (int64_t min_items = 1; min_items <= 64; min_items *= 4) {
            Items items = {.min_items = min_items, .n_items = n_items};
            run_ranges(n_items, min_items, count_items, &items);
            for (int64_t i = 0; i < 200; i++)
                CHECK(atomic_load(&items.n_runs[i]) == (i < n_items));
        }
}

/* A piece of the caller and one of the helper, in which the fake system moves on. */
typedef struct {
    Counting counting;
    int64_t length_ns;
    int64_t helper_waited_ns;
    int64_t caller_waited_ns;
} Moving;

static void move_system(const void *operation, int64_t piece) {
    Moving *moving = (Moving *)operation;
    if (!pthread_equal(pthread_self(), moving->counting.caller)) {
        atomic_fetch_add(&fake.helper_waited_ns, moving->helper_waited_ns);
        atomic_fetch_add(&fake.caller_waited_ns, moving->caller_waited_ns);
        atomic_fetch_add(&fake.now_ns, moving->length_ns);
    }
    count_piece(&moving->counting, piece);
}

static const int64_t MS = 1000000;

/* The helper works for 40 ms, in which it and the caller waited for a core for so long. */
static void work_40_ms(int64_t helper_waited_ms, int64_t caller_waited_ms) {
    Moving moving = {.counting = {.caller = pthread_self(), .n_pieces = 2, .n_meeting = 2},
                     .length_ns = 40 * MS,
                     .helper_waited_ns = helper_waited_ms * MS,
                     .caller_waited_ns = caller_waited_ms * MS};
    run_pieces(2, move_system, &moving);
    CHECK(atomic_load(&moving.counting.n_of_helpers) == 1);
}

/* The helper is resting, for so long; operations have no help until the rest ends. */
static void check_rest(int64_t expected_ms) {
    int number = atomic_load(&fake.n_ended_rests);
    while (atomic_load(&fake.n_rests) <= number)
        sched_yield();
    CHECK(atomic_load(&fake.last_rest_ns) == expected_ms * MS);
    CHECK(num_rests() == number + 1);
    for (int i = 0; i < 20; i++) {
        Counting counting = {.n_pieces = 40};
        run_counting(&counting);
        CHECK(atomic_load(&counting.n_of_caller) == 40);
    }
    atomic_fetch_add(&fake.n_ended_rests, 1);
}

static void use_fake_system(int has_schedstat) {
    atomic_store(&fake.is_used, 1);
    atomic_store(&fake.has_schedstat, has_schedstat);
    set_num_threads(2);
    atomic_store(&helpers_may_run, 1);
    work_40_ms(0, 0); /* before it, the helper does not know the caller */
}

/* A helper that waited for more than a third of a window rests, twice as long each time. */
static void check_rests(void) {
    use_fake_system(1);
    int64_t lengths_ms[] = {30, 60, 120, 240, 480, 500, 500};
    for (size_t i = 0; i < sizeof lengths_ms / sizeof *lengths_ms; i++) {
        work_40_ms(14, 0);
        check_rest(lengths_ms[i]);
    }
    work_40_ms(13, 0); /* a good window: the next rest is short again */
    work_40_ms(14, 0);
    check_rest(30);
    meet_helper();
}

/* The caller cannot rest: the first helper does when the two together waited too long. */
static void check_rests_for_caller(void) {
    use_fake_system(1);
    work_40_ms(0, 14);
    check_rest(30);
    work_40_ms(7, 7);
    check_rest(60);
    work_40_ms(6, 7);
    work_40_ms(0, 0);
    CHECK(num_rests() == 2);
}

/* Without the system's figures there are no rests. */
static void check_no_schedstat(void) {
    use_fake_system(0);
    for (int i = 0; i < 10; i++)
        work_40_ms(40, 40);
    CHECK(num_rests() == 0);
}

static const struct {
    const char *name;
    void (*run)(void);
} CHECKS[] = {
    {"absent_helpers", check_absent_helpers},
    {"held_helper", check_held_helper},
    {"busy_pool", check_busy_pool},
    {"nested", check_nested},
    {"fewer_threads", check_fewer_threads},
    {"shares", check_shares},
    {"many_pieces", check_many_pieces},
    {"fork", check_fork},
    {"ranges", check_ranges},
    {"rests", check_rests},
    {"rests_for_caller", check_rests_for_caller},
    {"no_schedstat", check_no_schedstat},
};

int main(int argc, char **argv) {
    for (size_t i = 0; argc == 2 && i < sizeof CHECKS / sizeof *CHECKS; i++)
        if (strcmp(argv[1], CHECKS[i].name) == 0) {
            CHECKS[i].run();
            puts("passed");
            return 0;
        }
    fprintf(stderr, "usage: check_thread_pool CHECK\n");
    return 2;
}
