/* Tells systemd, or whoever started a service of Type=notify, how it is: one datagram to the socket that $NOTIFY_SOCKET
 * names. */
#ifndef MEPIC_CLI_NOTIFY_H
#define MEPIC_CLI_NOTIFY_H

#include "base/status.h"

/* `state`: lines such as "READY=1". Nobody listens: MEPIC_OK. ERR_IO: somebody should, and cannot be told. */
mepic_status mp_notify(const char *state, mepic_error *err);

#endif
