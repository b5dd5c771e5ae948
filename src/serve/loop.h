/* The thread that owns the engine: it takes feeds from a bounded queue, by tenant in turn (line.h), steps, and hands
 * out events.
 *
 * Submissions come from HTTP threads; cancels need no queue, since mepic_cancel may be called from any thread and a
 * feed that was left before it was submitted is dropped when its turn comes. The loop waits for nobody but its queue:
 * pushing to a feed never blocks. When the engine breaks, every feed ends with an error and the loop refuses what
 * comes. */
#ifndef MEPIC_SERVE_LOOP_H
#define MEPIC_SERVE_LOOP_H

#include "serve/feed.h"
#include "serve/metrics.h"

typedef struct mp_loop mp_loop;

typedef struct mp_loop_options {
    uint32_t max_choices;    /* replies that wait or run; more are refused */
    uint64_t max_tokens;     /* of their prompts; 0 = no bound */
    uint32_t n_tenants;      /* feeds have tenants 0 .. n_tenants - 1 */
    uint32_t max_per_tenant; /* replies of one tenant but 0 that wait or run; 0 = no bound of its own */
    void (*on_broken)(void *user); /* called once, on the loop's thread */
    void (*on_idle)(void *user);   /* whenever the last feed has ended, on the loop's thread; NULL = none */
    void *user;
} mp_loop_options;

/* Starts the thread. From here on the engine belongs to it, until close. */
mepic_status mp_loop_open(mepic_engine *engine, const mp_loop_options *options, mp_loop **out, mepic_error *err);
/* Ends every feed with `reason`, and then the thread. What is submitted later is refused with it. */
void mp_loop_stop(mp_loop *loop, const mp_api_error *reason);
void mp_loop_close(mp_loop *loop); /* stops if need be; NULL is a no-op */

/* Any thread. Holds a reference while it needs the feed. False: *err is a 503, a 429 for the tenant's own bound,
 * or a 400: more replies than there is ever room for. */
bool mp_loop_submit(mp_loop *loop, mp_feed *feed, mp_api_error *err);
/* What submit would say to one reply, before work is put into it. */
bool mp_loop_welcome(mp_loop *loop, uint32_t tenant, mp_api_error *err);
/* From now on submissions are refused with `reason`; what is there goes on. */
void mp_loop_refuse(mp_loop *loop, const mp_api_error *reason);
/* The state after the last step. */
void mp_loop_metrics(mp_loop *loop, mp_metrics *out);
uint32_t mp_loop_choices(mp_loop *loop); /* that wait or run */
bool mp_loop_broken(mp_loop *loop);

#endif
