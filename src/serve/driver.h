/* A thread that runs a daemon of libmicrohttpd.
 *
 * The library has threads of its own, but behind each full batch of 128 events they wait for more before they look at
 * what came: where 128 connections of a thread, or a multiple, are ready at the same moment, none is served until
 * another one is (0.9.75). MHD_run does not wait; here the thread does, on the daemon's epoll descriptor, for as long
 * as the daemon says. MHD_resume_connection tells nobody of it then: who calls it wakes the driver. */
#ifndef MEPIC_SERVE_DRIVER_H
#define MEPIC_SERVE_DRIVER_H

#include "base/status.h"

struct MHD_Daemon;
typedef struct mp_driver mp_driver;

mepic_status mp_driver_open(mp_driver **out, mepic_error *err);
/* Of a daemon with MHD_USE_EPOLL and no thread; it belongs to the driver, whatever the status. Once. */
mepic_status mp_driver_start(mp_driver *driver, struct MHD_Daemon *daemon, mepic_error *err);
/* Any thread: has the daemon look at its connections. */
void mp_driver_wake(mp_driver *driver);
/* Ends the thread, then the daemon with its connections, of which none may be suspended for good. NULL is a no-op. */
void mp_driver_stop(mp_driver *driver);
/* When it was stopped and nobody wakes it any more. NULL is a no-op. */
void mp_driver_close(mp_driver *driver);

#endif
