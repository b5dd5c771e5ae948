#include "serve/line.h"

typedef struct tenant {
    mp_feed *first, *last;
    uint32_t next; /* in the ring of those who wait */
} tenant;

struct mp_line {
    uint32_t n_tenants;
    uint32_t last; /* of the ring: whose turn was last; its next is next. n_tenants: nobody waits */
    tenant tenants[];
};

mp_line *mp_line_open(uint32_t n_tenants) {
    mp_line *line = mp_calloc(1, sizeof *line + n_tenants * sizeof(tenant));
    if (line) line->n_tenants = line->last = n_tenants;
    return line;
}

void mp_line_close(mp_line *line) {
    mp_free(line);
}

bool mp_line_empty(const mp_line *line) {
    return line->last == line->n_tenants;
}

void mp_line_push(mp_line *line, mp_feed *feed) {
    tenant *t = &line->tenants[feed->tenant];
    feed->behind = NULL;
    if (t->first) {
        t->last->behind = feed;
        t->last = feed;
        return;
    }
    t->first = t->last = feed;
    if (mp_line_empty(line)) {
        t->next = feed->tenant;
    } else {
        t->next = line->tenants[line->last].next;
        line->tenants[line->last].next = feed->tenant;
    }
    line->last = feed->tenant; // behind everybody
}

mp_feed *mp_line_pop(mp_line *line) {
    if (mp_line_empty(line)) return NULL;
    uint32_t turn = line->tenants[line->last].next;
    tenant *t = &line->tenants[turn];
    mp_feed *feed = t->first;
    t->first = feed->behind;
    feed->behind = NULL;
    if (t->first) {
        line->last = turn;
    } else if (turn == line->last) {
        line->last = line->n_tenants; // it was alone
    } else {
        line->tenants[line->last].next = t->next;
    }
    return feed;
}

/* Popping all and pushing them again keeps every tenant's order. */
mp_feed *mp_line_take_left(mp_line *line) {
    mp_feed *left = NULL, *stay = NULL, **end = &stay;
    for (mp_feed *feed = mp_line_pop(line); feed; feed = mp_line_pop(line)) {
        if (feed->stopped || mp_feed_left(feed)) {
            feed->behind = left;
            left = feed;
        } else {
            *end = feed;
            end = &feed->behind;
        }
    }
    while (stay) {
        mp_feed *next = stay->behind;
        mp_line_push(line, stay);
        stay = next;
    }
    return left;
}
