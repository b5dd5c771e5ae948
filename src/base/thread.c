#include "base/thread.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/mem.h"

/* How long somebody spins before he sleeps: a worker without items, and the caller whose last items others hold. Some
 * 20 to 80 microseconds, by processor: longer than the gap between two loops of a step, and much shorter than a time
 * slice, so that a thread which waits for one that the system took away gives up its processor to it. */
enum { SPIN_ROUNDS = 2000 };

/* A thread's share of the items, less what was taken: end << 32 | begin. The first is taken next, by its owner or by
 * who has none left, so that everybody walks upwards through neighbours, which is what memory likes. A word that is not
 * empty belongs to the current loop, since a loop ends when all its items are done: who takes from it by
 * compare-and-swap, however late, has a valid item, and nobody but the caller ever fills a word, so none is lost. */
struct range {
    _Alignas(64) _Atomic uint64_t items;
};

struct mp_threads {
    /* The current loop: written before its ranges, and read only by holders of an item, who keep it open. */
    mp_task_fn fn;
    void *ctx;
    struct range *ranges; /* [n] */
    uint32_t n;
    /* Loops so far: what workers watch. */
    _Alignas(64) atomic_uint round;
    atomic_uint idle; /* workers that sleep or are about to */
    atomic_bool closing;
    /* Items of this loop that workers have finished. */
    _Alignas(64) atomic_uint done;
    atomic_bool waiting; /* the caller sleeps or is about to */
    pthread_mutex_t lock;
    pthread_cond_t wake;  /* workers: there are items, or the end */
    pthread_cond_t ready; /* caller: items were finished */

    uint32_t n_started;
    pthread_t *workers;   /* [n - 1] */
    struct worker *slots; /* [n - 1] */
};

struct worker {
    struct mp_threads *threads;
    uint32_t index;
};

static void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static bool take(struct range *range, uint32_t *item) {
    uint64_t items = atomic_load_explicit(&range->items, memory_order_relaxed);
    while ((uint32_t)items != (uint32_t)(items >> 32)) {
        *item = (uint32_t)items;
        if (atomic_compare_exchange_weak_explicit(&range->items, &items, items + 1, memory_order_acquire,
                                                  memory_order_relaxed)) {
            return true;
        }
    }
    return false;
}

/* Runs items until there are none to take; returns how many it ran. */
static uint32_t run_items(struct mp_threads *t, uint32_t thread) {
    uint32_t n = 0, item;
    for (uint32_t k = 0; k < t->n; k++) { /* its own share, then the others' */
        struct range *range = &t->ranges[(thread + k) % t->n];
        for (; take(range, &item); n++) t->fn(t->ctx, item, thread);
    }
    return n;
}

static bool has_news(struct mp_threads *t, uint32_t seen) {
    return atomic_load(&t->round) != seen || atomic_load(&t->closing);
}

static void wait_for_news(struct mp_threads *t, uint32_t seen) {
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (has_news(t, seen)) return;
        cpu_relax();
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->idle, 1); /* before the last look at the round; the caller does it the other way round */
    while (!has_news(t, seen)) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->idle, 1);
    pthread_mutex_unlock(&t->lock);
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct mp_threads *t = w->threads;
    while (!atomic_load(&t->closing)) {
        uint32_t seen = atomic_load(&t->round);
        uint32_t n = run_items(t, w->index);
        if (n > 0) {
            atomic_fetch_add(&t->done, n);
            if (atomic_load(&t->waiting)) {
                pthread_mutex_lock(&t->lock);
                pthread_cond_signal(&t->ready);
                pthread_mutex_unlock(&t->lock);
            }
        }
        wait_for_news(t, seen);
    }
    return NULL;
}

mepic_status mp_threads_open(uint32_t n, mp_threads **out, mepic_error *err) {
    if (n > 256) return mp_fail(err, MEPIC_ERR_ARGUMENT, "threads: %u is more than 256", n);
    if (n == 0) {
        cpu_set_t set;
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
        if (n > 256) n = 256;
    }
    mp_threads *t = mp_alloc_aligned(64, sizeof *t);
    if (!t) return mp_fail_nomem(err, "the thread pool", sizeof *t);
    t->n = n;
    t->workers = mp_calloc(n, sizeof *t->workers);
    t->slots = mp_calloc(n, sizeof *t->slots);
    t->ranges = mp_alloc_aligned(64, n * sizeof *t->ranges);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    pthread_cond_init(&t->ready, NULL);
    if (!t->workers || !t->slots || !t->ranges) {
        mp_threads_close(t);
        return mp_fail_nomem(err, "the thread pool", n * sizeof *t->ranges);
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        t->slots[i] = (struct worker){ t, i + 1 };
        if (pthread_create(&t->workers[i], NULL, worker_main, &t->slots[i]) != 0) {
            mp_threads_close(t);
            return mp_fail(err, MEPIC_ERR_NOMEM, "thread %u of %u could not be started; ask for fewer threads", i + 2,
                           n);
        }
        t->n_started++;
    }
    *out = t;
    return MEPIC_OK;
}

void mp_threads_close(mp_threads *t) {
    if (!t) return;
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->closing, true);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
    for (uint32_t i = 0; i < t->n_started; i++) pthread_join(t->workers[i], NULL);
    pthread_cond_destroy(&t->wake);
    pthread_cond_destroy(&t->ready);
    pthread_mutex_destroy(&t->lock);
    mp_free(t->workers);
    mp_free(t->slots);
    mp_free_aligned(t->ranges, t->n * sizeof *t->ranges);
    mp_free_aligned(t, sizeof *t);
}

uint32_t mp_threads_count(const mp_threads *t) {
    return t->n;
}

static void wait_for_done(struct mp_threads *t, uint32_t n) {
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (atomic_load_explicit(&t->done, memory_order_acquire) == n) return;
        cpu_relax();
    }
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->waiting, true); /* before the last look at `done`; workers the other way round */
    while (atomic_load(&t->done) != n) pthread_cond_wait(&t->ready, &t->lock);
    atomic_store(&t->waiting, false);
    pthread_mutex_unlock(&t->lock);
}

void mp_threads_run(mp_threads *t, uint32_t n_items, mp_task_fn fn, void *ctx) {
    if (n_items == 0) return;
    if (t->n == 1 || n_items == 1) {
        for (uint32_t i = 0; i < n_items; i++) fn(ctx, i, 0);
        return;
    }
    t->fn = fn;
    t->ctx = ctx;
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    for (uint32_t i = 0, begin = 0; i < t->n; i++) {
        uint32_t end = (uint32_t)((uint64_t)n_items * (i + 1) / t->n);
        atomic_store_explicit(&t->ranges[i].items, (uint64_t)end << 32 | begin, memory_order_release);
        begin = end;
    }
    atomic_fetch_add(&t->round, 1); /* ordered before the look at `idle` */
    if (atomic_load(&t->idle) > 0) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
    wait_for_done(t, n_items - run_items(t, 0));
}
