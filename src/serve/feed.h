/* A feed carries one HTTP request's replies from the thread that owns the engine to the HTTP thread that writes them.
 *
 * The engine's side pushes events and never waits: they are bytes in a bounded buffer, and a reader that is stuck and
 * lets it fill up loses the request, not the engine's time. The HTTP side takes everything there is at once; when there
 * is nothing, it pauses its connection under the feed's lock, so the wake that follows cannot come before the pause.
 *
 *     HTTP thread   open ... mp_loop_submit ... ready or take, paused in between ... leave
 *     loop          started ... push ... (each choice ends with a DONE event, or the feed fails as a whole)
 *
 * Both hold a reference. Any thread may call leave and
 * poke_if_silent. */
#ifndef MEPIC_SERVE_FEED_H
#define MEPIC_SERVE_FEED_H

#include "serve/error.h"
#include "serve/generation.h"

typedef struct mp_feed mp_feed;

/* One of the replies that an HTTP request asked for; the engine's request has it as `user`. */
typedef struct mp_choice {
    mp_feed *feed;
    uint32_t index;
    bool submitted, done;    /* the loop's */
    uint64_t waited_ns;      /* the loop's: how long it stood in the line */
    uint64_t last_ns;        /* the loop's: when its last token came; 0 = none came */
    mepic_request_id id;     /* under the feed's lock, valid once submitted */
} mp_choice;

/* The connection behind a feed. pause is called by the HTTP thread under the lock; wake by any thread, once a pause. */
typedef struct mp_feed_reader {
    void (*pause)(void *connection);
    void (*wake)(void *connection);
    void *connection;
    size_t limit;         /* bytes of events that may wait for a reader who has not moved for patience_ns: */
    uint64_t patience_ns; /* past it the feed fails */
    size_t most;          /* past so many it fails in any case */
    size_t wake_at;       /* a paused reader is woken at so many bytes, or at the end; 0: at the first event */
} mp_feed_reader;

/* Owned by the loop, but for what its comments say. */
struct mp_feed {
    mp_generation *generation; /* owned */
    const char *scope;         /* of the client's key, outlives the feed; NULL = the common one */
    uint32_t tenant;           /* whose requests take turns with others'; 0 = nobody's in particular */
    mp_choice *choices;        /* [n_choices] */
    uint32_t n_choices, n_started, n_ended;
    bool stopped;             /* the loop's: its choices were cancelled; those that have not begun never do */
    uint64_t n_tokens;        /* of the prompts; set by submit */
    uint64_t submitted_ns;    /* when it came into the line */
    mp_feed *behind;          /* in the line, while choices have not begun */
    mp_feed *next, *previous; /* in the loop's lists: of those that came, then of the live */
    struct mp_feed_shared *shared;
};

/* Takes `generation` over on success. The caller holds the one reference. */
mepic_status mp_feed_open(mp_generation *generation, const mp_feed_reader *reader, mp_feed **out, mepic_error *err);
void mp_feed_hold(mp_feed *feed);
void mp_feed_drop(mp_feed *feed);

/* ---- Of the loop --------------------------------------------------------------------------------------------------*/

/* Notes the engine's id. False: the reader has left, cancel it. */
bool mp_feed_started(mp_feed *feed, mp_choice *choice, mepic_request_id id);
bool mp_feed_left(mp_feed *feed);
/* False: too much waits, or there is no memory; the feed has failed, its requests should be cancelled. Events of a
 * feed that has failed or was left are dropped. */
bool mp_feed_push(mp_feed *feed, uint32_t choice, const mepic_event *event);
/* Ends the feed with an error behind the events that wait. The first one counts. */
void mp_feed_fail(mp_feed *feed, const mp_api_error *error);

/* ---- Of the HTTP thread ------------------------------------------------------------------------------------------ */

typedef enum mp_feed_state {
    MP_FEED_PAUSED, /* nothing to do: the connection was paused */
    MP_FEED_MORE,   /* events */
    MP_FEED_POKED,  /* nothing came, but somebody poked */
    MP_FEED_END,    /* all choices are done, everything was taken */
    MP_FEED_FAILED, /* *err says why; everything was taken */
} mp_feed_state;
/* Moves the waiting events into `taken`, which is emptied first. */
mp_feed_state mp_feed_take(mp_feed *feed, mp_buf *taken, mp_api_error *err);
/* What take would say, without taking. */
mp_feed_state mp_feed_ready(mp_feed *feed, mp_api_error *err);

/* The reader got rid of something that it had taken: it is not stuck. */
void mp_feed_moved(mp_feed *feed);

/* An event as it was pushed. The pointers lead into the buffer it was read from. */
typedef struct mp_feed_event {
    mepic_event_kind kind;
    uint32_t choice;
    int32_t token;
    float logprob;
    uint32_t n_top, text_len;
    mepic_finish finish;
    int32_t stop; /* with DONE: which of the request's stop strings ended it; -1: none */
    const char *text;
    const mepic_logprob *top;
    mepic_usage usage; /* with DONE, and with a reply's first TOKEN (of counts only); else zero */
} mp_feed_event;
/* Reads the event at *offset and moves it on; false at the end. */
bool mp_feed_event_next(const mp_buf *taken, size_t *offset, mp_feed_event *out);

/* ---- Of any thread ----------------------------------------------------------------------------------------------- */

/* The status of a feed that was left: nobody is there to read it. */
enum { MP_STATUS_CLIENT_GONE = 499 };
/* The reader goes away: what runs is cancelled, what waits is forgotten. `engine` is the loop's. */
void mp_feed_leave(mp_feed *feed, mepic_engine *engine);
/* Wakes a reader that has been paused for `silence_ns` although nothing came. */
void mp_feed_poke_if_silent(mp_feed *feed, uint64_t now_ns, uint64_t silence_ns);

#endif
