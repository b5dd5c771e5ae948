#include "cli/notify.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

mepic_status mp_notify(const char *state, mepic_error *err) {
    const char *path = getenv("NOTIFY_SOCKET");
    if (!path || !*path) return MEPIC_OK;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    size_t n = strlen(path);
    if ((path[0] != '/' && path[0] != '@') || n >= sizeof address.sun_path) {
        return mp_fail(err, MEPIC_ERR_IO, "NOTIFY_SOCKET is '%.80s', which is no socket's address", path);
    }
    memcpy(address.sun_path, path, n);
    if (path[0] == '@') address.sun_path[0] = 0; // a name without a file
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool sent = fd >= 0 && sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&address, size) >= 0;
    mepic_status status =
        sent ? MEPIC_OK : mp_fail(err, MEPIC_ERR_IO, "NOTIFY_SOCKET %.80s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return status;
}
