/* Documents that the operator made public: what one key's requests computed of them, all others read.
 *
 * A file lists them by the SHA-256 of a chunk's text as it stands in the prompt (with its title), without newlines at
 * its end: 64 hexadecimal digits a line, optionally followed by blanks and a name; # begins a comment. A hash names a
 * text that is no secret, so a client learns nothing by finding it computed. Immutable after reading; any thread. */
#ifndef MEPIC_SERVE_PUBLIC_H
#define MEPIC_SERVE_PUBLIC_H

#include "base/status.h"

enum { MP_PUBLIC_MAX = 1 << 20 };

typedef struct mp_public mp_public;

/* ERR_IO, ERR_ARGUMENT (names the line), ERR_NOMEM. */
mepic_status mp_public_read(const char *path, mp_public **out, mepic_error *err);
void mp_public_free(mp_public *list); /* NULL is a no-op */
/* Without memory for the question the answer is no. */
bool mp_public_has(const mp_public *list, const char *text, size_t len);

#endif
