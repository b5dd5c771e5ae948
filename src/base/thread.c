#include "base/thread.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/mem.h"

/* How long an idle worker spins before it sleeps. Long enough for the gap between two loops of a step, short enough that
 * a neighbour on the core gets it back at once. */
enum { SPIN_ROUNDS = 2000 };

struct mp_threads {
    uint32_t n;
    pthread_t *workers; /* [n - 1] */
    uint32_t n_started;
    pthread_mutex_t lock;
    pthread_cond_t wake;

    /* The current loop: published by raising `round`, left when `running` is back at 0. */
    mp_task_fn fn;
    void *ctx;
    uint32_t n_items;
    atomic_uint next;
    atomic_uint running;
    atomic_uint round;
    atomic_uint sleepers;
    atomic_bool closing;
    struct mp_worker {
        struct mp_threads *threads;
        uint32_t index;
    } * slots;
};

static void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_items(struct mp_threads *t, uint32_t thread) {
    for (;;) {
        uint32_t item = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (item >= t->n_items) return;
        t->fn(t->ctx, item, thread);
    }
}

static uint32_t wait_for_round(struct mp_threads *t, uint32_t seen) {
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        uint32_t round = atomic_load_explicit(&t->round, memory_order_acquire);
        if (round != seen || atomic_load_explicit(&t->closing, memory_order_acquire)) return round;
        cpu_relax();
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->round) == seen && !atomic_load(&t->closing)) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->lock);
    return atomic_load(&t->round);
}

static void *worker_main(void *arg) {
    struct mp_worker *w = arg;
    struct mp_threads *t = w->threads;
    uint32_t seen = 0;
    for (;;) {
        uint32_t round = wait_for_round(t, seen);
        if (atomic_load_explicit(&t->closing, memory_order_acquire)) return NULL;
        seen = round;
        take_items(t, w->index);
        atomic_fetch_sub_explicit(&t->running, 1, memory_order_release);
    }
}

mepic_status mp_threads_open(uint32_t n, mp_threads **out, mepic_error *err) {
    if (n > 256) return mp_fail(err, MEPIC_ERR_ARGUMENT, "threads: %u is more than 256", n);
    if (n == 0) {
        cpu_set_t set;
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
        if (n > 256) n = 256;
    }
    mp_threads *t = mp_calloc(1, sizeof *t);
    if (!t) return mp_fail_nomem(err, "the thread pool", sizeof *t);
    t->n = n;
    t->workers = mp_calloc(n, sizeof *t->workers);
    t->slots = mp_calloc(n, sizeof *t->slots);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
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
    pthread_mutex_destroy(&t->lock);
    mp_free(t->workers);
    mp_free(t->slots);
    mp_free(t);
}

uint32_t mp_threads_count(const mp_threads *t) {
    return t->n;
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
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->running, t->n - 1, memory_order_relaxed);
    atomic_fetch_add(&t->round, 1); /* publishes the fields above; ordered before the look at sleepers */
    if (atomic_load(&t->sleepers) > 0) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
    take_items(t, 0);
    /* Every worker passes through the round, so that none still reads the fields when the next loop writes them. */
    for (uint32_t spins = 0; atomic_load_explicit(&t->running, memory_order_acquire) > 0; spins++) {
        if (spins < SPIN_ROUNDS) {
            cpu_relax();
        } else {
            sched_yield();
        }
    }
}
