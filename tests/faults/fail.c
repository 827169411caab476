/* LD_PRELOAD: lets the disk calls of a bus fail on demand.
 *
 * FAIL_ROOT is a prefix of paths, FAIL_ORDERS a file of one `struct orders`, mapped by the test and by every process of
 * the bus: faults are ordered while the bus runs, and what came of them is seen at once. Of the calls that `which`
 * names, on files below the root, number `nth` and the following `times - 1` end with `error` and do nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DATA = 1, META = 2, SYNC = 4 }; /* META: a write through a descriptor with O_DSYNC */
enum { SHORT = -1 };                   /* instead of an errno: half of the bytes are written */

static volatile struct orders {
    int64_t which, error, nth, times;
    int64_t seen, failed; /* answers */
} *orders;

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("FAIL_ORDERS");
    int fd = file && getenv("FAIL_ROOT") ? open(file, O_RDWR | O_CLOEXEC) : -1;
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    orders = map == MAP_FAILED ? NULL : map;
    if (fd >= 0)
        close(fd);
}

/* The error this call must end with, 0 for none. */
static int fault(int fd, int kind)
{
    char link[40], path[4096];
    if (!orders || !orders->which)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (strncmp(path, getenv("FAIL_ROOT"), strlen(getenv("FAIL_ROOT"))))
        return 0;
    if (kind == DATA && (fcntl(fd, F_GETFL) & O_DSYNC))
        kind = META;
    if (!(orders->which & kind))
        return 0;
    int64_t number = __atomic_add_fetch(&orders->seen, 1, __ATOMIC_SEQ_CST);
    if (number < orders->nth || number >= orders->nth + orders->times)
        return 0;
    __atomic_add_fetch(&orders->failed, 1, __ATOMIC_SEQ_CST);
    return orders->error;
}

#define GUARD(type, name, parameters, whole, half, kind) \
    type name parameters \
    { \
        static __typeof__(name) *real; \
        if (!real) \
            real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); \
        int error = fault(fd, kind); \
        if (error > 0) { \
            errno = error; \
            return -1; \
        } \
        return error == SHORT ? real half : real whole; \
    }

GUARD(ssize_t, write, (int fd, const void *p, size_t n), (fd, p, n), (fd, p, n / 2), DATA)
GUARD(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2 ? n / 2 : 1), DATA)
GUARD(ssize_t, pwrite, (int fd, const void *p, size_t n, off_t at), (fd, p, n, at), (fd, p, n / 2, at), DATA)
GUARD(ssize_t, pwrite64, (int fd, const void *p, size_t n, off_t at), (fd, p, n, at), (fd, p, n / 2, at), DATA)
GUARD(int, fsync, (int fd), (fd), (fd), SYNC)
GUARD(int, fdatasync, (int fd), (fd), (fd), SYNC)
GUARD(int, ftruncate, (int fd, off_t n), (fd, n), (fd, n), DATA)
GUARD(int, ftruncate64, (int fd, off_t n), (fd, n), (fd, n), DATA)
