#include "base/thread.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/mem.h"

/* How long somebody spins before he sleeps: a worker without items, and the caller whose last items others hold. Some 20
 * to 80 microseconds, by processor: longer than the gap between two loops of a step, and much shorter than a time slice, so
 * that a thread which waits for one that the system took away gives up its processor to it. */
enum { SPIN_ROUNDS = 2000 };

struct mp_threads {
    /* Round << 32 | items of the round that nobody has taken yet. An item is taken by compare-and-swap, so nobody who
     * slept through a round can take from the next one by mistake, and nobody needs to be waited for who took nothing. */
    _Alignas(64) _Atomic uint64_t ticket;
    /* The round's loop: written before its ticket, and read only by holders of an item, who keep the round open. */
    mp_task_fn fn;
    void *ctx;
    uint32_t n_items;
    /* Items that workers have finished in this round. */
    _Alignas(64) atomic_uint done;
    atomic_uint idle;    /* workers that sleep or are about to */
    atomic_bool waiting; /* the caller sleeps or is about to */
    atomic_bool closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;  /* workers: there are items, or the end */
    pthread_cond_t ready; /* caller: items were finished */

    uint32_t n, n_started;
    pthread_t *workers; /* [n - 1] */
    struct mp_worker {
        struct mp_threads *threads;
        uint32_t index;
    } * slots;
};

static void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Runs items until none is left to take; returns how many it ran. All of them belong to one round: the round cannot end
 * before the caller knows of them. */
static uint32_t take_items(struct mp_threads *t, uint32_t thread) {
    uint32_t n = 0;
    uint64_t ticket = atomic_load_explicit(&t->ticket, memory_order_relaxed);
    while ((uint32_t)ticket > 0) {
        if (!atomic_compare_exchange_weak_explicit(&t->ticket, &ticket, ticket - 1, memory_order_acquire,
                                                   memory_order_relaxed)) {
            continue;
        }
        t->fn(t->ctx, t->n_items - (uint32_t)ticket, thread);
        n++;
        ticket = atomic_load_explicit(&t->ticket, memory_order_relaxed);
    }
    return n;
}

static bool has_work(struct mp_threads *t) {
    return (uint32_t)atomic_load(&t->ticket) > 0 || atomic_load(&t->closing);
}

static void wait_for_work(struct mp_threads *t) {
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (has_work(t)) return;
        cpu_relax();
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->idle,
                     1); /* before the last look at the ticket; the caller writes and looks the other way round */
    while (!has_work(t)) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->idle, 1);
    pthread_mutex_unlock(&t->lock);
}

static void *worker_main(void *arg) {
    struct mp_worker *w = arg;
    struct mp_threads *t = w->threads;
    while (!atomic_load(&t->closing)) {
        uint32_t n = take_items(t, w->index);
        if (n > 0) {
            atomic_fetch_add(&t->done, n);
            if (atomic_load(&t->waiting)) {
                pthread_mutex_lock(&t->lock);
                pthread_cond_signal(&t->ready);
                pthread_mutex_unlock(&t->lock);
            }
        }
        wait_for_work(t);
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
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    pthread_cond_init(&t->ready, NULL);
    if (!t->workers || !t->slots) {
        mp_threads_close(t);
        return mp_fail_nomem(err, "the thread pool", n * sizeof *t->slots);
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        t->slots[i] = (struct mp_worker){ t, i + 1 };
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
    t->n_items = n_items;
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    uint64_t round = (atomic_load_explicit(&t->ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&t->ticket, round << 32 | n_items); /* publishes the above; ordered before the look at `idle` */
    if (atomic_load(&t->idle) > 0) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
    wait_for_done(t, n_items - take_items(t, 0));
}
