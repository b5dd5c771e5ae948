/* Files that a crash must not leave half-written, the directories they lie in, and lists of lines.
 *
 * A file is replaced as a whole: it is written under another name beside its own, synced, and renamed. Whoever reads it
 * sees the old contents or the new ones, also after a power failure. A write that is interrupted by the end of the
 * process leaves the other name behind, which nothing reads. Of two writers the last one wins. Any thread; nothing is
 * allocated. */
#ifndef MEPIC_BASE_FILE_H
#define MEPIC_BASE_FILE_H

#include "base/status.h"

/* Makes a directory and those above it, for the user alone; one that is there is left as it is. ERR_IO names the one
 * that cannot be made. */
mepic_status mp_dir_make(const char *path, mepic_error *err);

/* Writes the contents to `fd`. False: gave up, with the reason in errno. */
typedef bool mp_file_fill(void *ctx, int fd);
/* Replaces the file, or makes it, with its directory. ERR_IO: the file is as it was (or is not there); only if syncing
 * the directory fails are the new contents in place and may be lost, and the message says so. */
mepic_status mp_file_replace(const char *path, mp_file_fill *fill, void *ctx, mepic_error *err);

/* Behind the byte order mark that some editors put in front of UTF-8. */
char *mp_text_begin(char *text);

/* A line of a list: without the blanks in front and its end; neither empty nor a comment (#). */
typedef mepic_status mp_file_line(void *ctx, const char *path, uint32_t number, const char *text, mepic_error *err);
/* Passes over the lines of a list in a file until one fails. ERR_IO; ERR_ARGUMENT for a line of over 1,022 bytes. */
mepic_status mp_file_lines(const char *path, mp_file_line *line, void *ctx, mepic_error *err);

/* All n bytes, in as many calls as it takes; false with errno. */
bool mp_write_all(int fd, const void *bytes, size_t n);

#endif
