#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static mepic_status fail_directory(mepic_error *err, const char *path, int why) {
    return mp_fail(err, MEPIC_ERR_IO, "the directory %s cannot be made: %s", path, strerror(why));
}

mepic_status mp_dir_make(const char *path, mepic_error *err) {
    char part[PATH_MAX];
    if (strlen(path) >= sizeof part) return fail_directory(err, path, ENAMETOOLONG);
    size_t end = 0;
    do {
        end += strspn(path + end, "/");
        end += strcspn(path + end, "/");
        memcpy(part, path, end);
        part[end] = 0;
        if (is_directory(part) || mkdir(part, 0700) == 0) continue;
        int why = errno;
        if (why != EEXIST || !is_directory(part))
            return fail_directory(err, part, why); /* else: just made by another */
    } while (path[end]);
    return MEPIC_OK;
}

bool mp_write_all(int fd, const void *bytes, size_t n) {
    const char *at = bytes;
    while (n > 0) {
        ssize_t put = write(fd, at, n);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        at += put;
        n -= (size_t)put;
    }
    return true;
}

/* `dir` has room for `path`. */
static void directory_of(const char *path, char *dir) {
    const char *slash = strrchr(path, '/');
    size_t len = !slash ? 0 : slash == path ? 1 : (size_t)(slash - path);
    memcpy(dir, path, len);
    if (len == 0) dir[len++] = '.';
    dir[len] = 0;
}

static mepic_status fail_write(mepic_error *err, const char *path, int why) {
    return mp_fail(err, MEPIC_ERR_IO, "%s cannot be written: %s", path, strerror(why));
}

/* 0, or why the file under the other name is not complete. */
static int write_temporary(int fd, mp_file_fill *fill, void *ctx) {
    errno = 0;
    int why = 0;
    if (!fill(ctx, fd) || fsync(fd) != 0) why = errno ? errno : EIO;
    if (close(fd) != 0 && !why) why = errno;
    return why;
}

/* A rename lasts once its directory is on disk. */
static bool sync_directory(const char *dir) {
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return false;
    bool ok = fsync(fd) == 0;
    int why = errno;
    close(fd);
    errno = why;
    return ok;
}

mepic_status mp_file_replace(const char *path, mp_file_fill *fill, void *ctx, mepic_error *err) {
    char temporary[PATH_MAX], dir[PATH_MAX];
    if (snprintf(temporary, sizeof temporary, "%s.XXXXXX", path) >= (int)sizeof temporary) {
        return fail_write(err, path, ENAMETOOLONG);
    }
    directory_of(path, dir);
    mepic_status st = mp_dir_make(dir, err);
    if (st != MEPIC_OK) return st;
    int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0) return fail_write(err, path, errno);
    int why = write_temporary(fd, fill, ctx);
    if (!why && rename(temporary, path) != 0) why = errno;
    if (why) {
        unlink(temporary);
        return fail_write(err, path, why);
    }
    if (!sync_directory(dir)) {
        return mp_fail(err, MEPIC_ERR_IO, "%s is written, but its directory cannot be synced: %s", path,
                       strerror(errno));
    }
    return MEPIC_OK;
}

char *mp_text_begin(char *text) {
    static const char mark[] = "\xef\xbb\xbf";
    return text + (strncmp(text, mark, 3) == 0 ? 3 : 0);
}

mepic_status mp_file_lines(const char *path, mp_file_line *line, void *ctx, mepic_error *err) {
    FILE *file = fopen(path, "re");
    if (!file) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be opened: %s", path, strerror(errno));
    mepic_status status = MEPIC_OK;
    char text[1024];
    for (uint32_t number = 1; status == MEPIC_OK && fgets(text, sizeof text, file); number++) {
        if (strlen(text) == sizeof text - 1) {
            status =
                mp_fail(err, MEPIC_ERR_ARGUMENT, "%s, line %u: longer than %zu bytes", path, number, sizeof text - 2);
            break;
        }
        text[strcspn(text, "\r\n")] = 0;
        const char *from = number == 1 ? mp_text_begin(text) : text;
        from += strspn(from, " \t");
        if (*from && *from != '#') status = line(ctx, path, number, from, err);
    }
    if (status == MEPIC_OK && ferror(file)) status = mp_fail(err, MEPIC_ERR_IO, "%s cannot be read", path);
    fclose(file);
    return status;
}
