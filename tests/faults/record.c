/* LD_PRELOAD: writes down, in order, everything this process and its children do to the files below a directory.
 *
 * RECORD_ROOT names the directory, RECORD_TRACE the file the records are appended to. A record is made when the call
 * has returned; its layout is `struct record`, then the path (relative to the root), then the data.
 * Calls that could change a file in a way not followed here are recorded as kind 'U', which the reader refuses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record {
    char kind;      /* w write, t truncate, s sync, c create, d mkdir, r rename, u unlink or rmdir, M writable map */
    uint8_t synced; /* the write was durable when it returned (O_DSYNC, O_SYNC) */
    uint16_t path;
    uint32_t data;
    uint64_t offset; /* or the new size of a truncation */
};

static int trace = -1;
static char root[PATH_MAX];
static size_t root_length;

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("RECORD_ROOT"), *file = getenv("RECORD_TRACE");
    if (!where || !file || !realpath(where, root))
        return;
    root_length = strlen(root);
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    /* out of the way of programs that count their descriptors */
    trace = fcntl(fd, F_DUPFD_CLOEXEC, 700);
    close(fd);
}

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}
#define NEXT(name) \
    static __typeof__(name) *real; \
    if (!real) \
    real = (__typeof__(name) *)next(#name)

/* The part of `path` below the root, empty for the root itself, or NULL. */
static const char *inside(const char *path)
{
    if (trace < 0 || strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/'))
        return NULL;
    return path + root_length + (path[root_length] == '/');
}

static const char *path_of(int fd, char *buffer)
{
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = trace < 0 ? -1 : readlink(link, buffer, PATH_MAX - 1);
    if (length <= 0)
        return NULL;
    buffer[length] = 0;
    return inside(buffer);
}

static const char *path_at(int directory, const char *path, char *buffer)
{
    char base[PATH_MAX] = "";
    if (path[0] != '/') {
        char link[40];
        if (directory == AT_FDCWD)
            strcpy(link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    snprintf(buffer, PATH_MAX, "%s%s%s", base, base[0] ? "/" : "", path);
    return inside(buffer);
}

static void record(char kind, int synced, const char *path, uint64_t offset, const struct iovec *data, int count,
                   size_t bytes)
{
    struct iovec parts[2 + 64];
    struct record head = {kind, synced, strlen(path), bytes, offset};
    int saved = errno, used = 2;
    parts[0] = (struct iovec){&head, sizeof head};
    parts[1] = (struct iovec){(void *)path, head.path};
    for (; count > 0 && bytes > 0 && used < 66; count--, data++, used++) {
        size_t taken = data->iov_len < bytes ? data->iov_len : bytes;
        parts[used] = (struct iovec){data->iov_base, taken};
        bytes -= taken;
    }
    /* one call: records of several threads and processes stay whole */
    if (syscall(SYS_writev, trace, parts, used) < 0 || bytes)
        abort();
    errno = saved;
}

static void note(char kind, const char *path, uint64_t offset)
{
    if (path)
        record(kind, 0, path, offset, NULL, 0, 0);
}

static void note_fd(char kind, int fd, uint64_t offset)
{
    char buffer[PATH_MAX];
    note(kind, path_of(fd, buffer), offset);
}

/* -- data ---------------------------------------------------------------------------------------------------------- */

static ssize_t wrote(ssize_t done, int fd, off_t offset, const struct iovec *data, int count)
{
    char buffer[PATH_MAX];
    const char *path = done > 0 ? path_of(fd, buffer) : NULL;
    if (path) {
        int flags = fcntl(fd, F_GETFL);
        if (offset < 0) /* the place it was written to, now that the file position is behind it */
            offset = lseek(fd, 0, SEEK_CUR) - done;
        record('w', (flags & O_DSYNC) != 0, path, offset, data, count, done);
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t length)
{
    NEXT(write);
    struct iovec one = {(void *)data, length};
    return wrote(real(fd, data, length), fd, -1, &one, 1);
}

ssize_t writev(int fd, const struct iovec *data, int count)
{
    NEXT(writev);
    return wrote(real(fd, data, count), fd, -1, data, count);
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t length, off_t offset) \
    { \
        NEXT(name); \
        struct iovec one = {(void *)data, length}; \
        return wrote(real(fd, data, length, offset), fd, offset, &one, 1); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name) \
    ssize_t name(int fd, const struct iovec *data, int count, off_t offset) \
    { \
        NEXT(name); \
        return wrote(real(fd, data, count, offset), fd, offset, data, count); \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define SYNC(name) \
    int name(int fd) \
    { \
        NEXT(name); \
        int result = real(fd); \
        if (!result) \
            note_fd('s', fd, 0); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name) \
    int name(int fd, off_t size) \
    { \
        NEXT(name); \
        int result = real(fd, size); \
        if (!result) \
            note_fd('t', fd, size); \
        return result; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

/* An allocation that does not punch holes changes nothing but the size. */
#define ALLOCATE(name) \
    int name(int fd, off_t offset, off_t length) \
    { \
        NEXT(name); \
        off_t size = lseek(fd, 0, SEEK_END); \
        int result = real(fd, offset, length); \
        if (!result && offset + length > size) \
            note_fd('t', fd, offset + length); \
        return result; \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define MAP(name) \
    void *name(void *address, size_t length, int protection, int flags, int fd, off_t offset) \
    { \
        NEXT(name); \
        void *result = real(address, length, protection, flags, fd, offset); \
        if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED) && result != MAP_FAILED) \
            note_fd('M', fd, 0); \
        return result; \
    }
MAP(mmap)
MAP(mmap64)

#define UNFOLLOWED(type, name, parameters, arguments, fd) \
    type name parameters \
    { \
        NEXT(name); \
        note_fd('U', fd, 0); \
        return real arguments; \
    }
UNFOLLOWED(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), fd)
UNFOLLOWED(int, fallocate64, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), fd)
UNFOLLOWED(ssize_t, sendfile, (int to, int from, off_t *at, size_t n), (to, from, at, n), to)
UNFOLLOWED(ssize_t, sendfile64, (int to, int from, off_t *at, size_t n), (to, from, at, n), to)
UNFOLLOWED(ssize_t, copy_file_range, (int from, off_t *at, int to, off_t *there, size_t n, unsigned flags),
           (from, at, to, there, n, flags), to)

/* -- names --------------------------------------------------------------------------------------------------------- */

static int opened(int (*real)(int, const char *, int, ...), int directory, const char *name, int flags, int mode)
{
    char buffer[PATH_MAX];
    const char *path = (flags & (O_CREAT | O_TRUNC)) ? path_at(directory, name, buffer) : NULL;
    int existed = path && syscall(SYS_faccessat, directory, name, F_OK) == 0;
    int fd = real(directory, name, flags, mode);
    if (fd >= 0 && path && !existed)
        note('c', path, 0);
    else if (fd >= 0 && path && (flags & O_TRUNC))
        note('t', path, 0);
    return fd;
}

#define OPEN(name, at) \
    int name(const char *path, int flags, ...) \
    { \
        static int (*real)(int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (!real) \
            real = (int (*)(int, const char *, int, ...))next(#at); \
        return opened(real, AT_FDCWD, path, flags, mode); \
    } \
    int at(int directory, const char *path, int flags, ...) \
    { \
        static int (*real)(int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (!real) \
            real = (int (*)(int, const char *, int, ...))next(#at); \
        return opened(real, directory, path, flags, mode); \
    }
OPEN(open, openat)
OPEN(open64, openat64)

int mkdir(const char *name, mode_t mode)
{
    NEXT(mkdir);
    char buffer[PATH_MAX];
    int result = real(name, mode);
    if (!result)
        note('d', path_at(AT_FDCWD, name, buffer), 0);
    return result;
}

#define REMOVE(name) \
    int name(const char *path) \
    { \
        NEXT(name); \
        char buffer[PATH_MAX]; \
        int result = real(path); \
        if (!result) \
            note('u', path_at(AT_FDCWD, path, buffer), 0); \
        return result; \
    }
REMOVE(unlink)
REMOVE(rmdir)

int unlinkat(int directory, const char *name, int flags)
{
    NEXT(unlinkat);
    char buffer[PATH_MAX];
    const char *path = path_at(directory, name, buffer);
    int result = real(directory, name, flags);
    if (!result)
        note('u', path, 0);
    return result;
}

int rename(const char *from, const char *to)
{
    NEXT(rename);
    char buffer[PATH_MAX], other[PATH_MAX];
    const char *old = path_at(AT_FDCWD, from, buffer), *new = path_at(AT_FDCWD, to, other);
    int result = real(from, to);
    if (!result && old && new) {
        struct iovec one = {(void *)new, strlen(new)};
        record('r', 0, old, 0, &one, 1, one.iov_len);
    } else if (!result && (old || new)) {
        note('U', old ? old : new, 0);
    }
    return result;
}
