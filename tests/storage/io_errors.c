// Preloaded into a process: its transfers to files under HCACHE_ERRORS_UNDER fail, or are short, now and then.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BLOCK = 4096 };
enum kind { READ_ERROR, WRITE_ERROR, SHORT, SYNC_ERROR, ALLOCATE_ERROR, KINDS };

static atomic_ulong calls, injected[KINDS];
static _Atomic double probability = -1.0;
static uint64_t seed;

void errors_set(double p) { probability = p; }
unsigned long errors_injected(int kind) { return injected[kind]; }

static double chance(void) {
    uint64_t x = seed + 0x9e3779b97f4a7c15u * ++calls;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (double)((x ^ (x >> 31)) >> 11) / (double)(1ull << 53);
}

static int concerned(int fd) {
    const char *under = getenv("HCACHE_ERRORS_UNDER");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return under && n > 0 && (size_t)n > strlen(under) && !strncmp(path, under, strlen(under));
}

// A number in [0, 1) where this call is to fail, otherwise a negative one.
static double drawn(int fd) {
    if (probability < 0) {
        const char *p = getenv("HCACHE_ERRORS_P"), *s = getenv("HCACHE_ERRORS_SEED");
        seed = (s ? strtoull(s, NULL, 10) : 0) + ((uint64_t)getpid() << 32);
        probability = p ? atof(p) : 0.0;
    }
    double p = probability, got;
    int saved = errno;
    if (p <= 0 || !concerned(fd) || (got = chance()) >= p) got = -1.0, p = 1.0;
    errno = saved;
    return got / p;
}

static int fail(enum kind kind, int code) {
    injected[kind]++;
    errno = code;
    return -1;
}

// Half of it, in whole blocks where it has several.
static size_t cut(size_t size, double now) {
    if (now < 2.0 / 3 || size < 2 || (size > BLOCK / 2 && size <= BLOCK)) return size;
    injected[SHORT]++;
    return size > BLOCK ? size / 2 / BLOCK * BLOCK + (size < 2 * BLOCK) * BLOCK : size / 2;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static ssize_t transfer_v(ssize_t (*real)(int, const struct iovec *, int, off_t, int), int writes, int fd,
                          const struct iovec *iov, int n, off_t at, int flags) {
    double now = drawn(fd);
    if (now < 0) return real(fd, iov, n, at, flags);
    if (now < 1.0 / 3) return writes ? fail(WRITE_ERROR, EIO) : fail(READ_ERROR, EIO);
    if (now < 2.0 / 3 && writes) return fail(WRITE_ERROR, ENOSPC);
    struct iovec first = iov[0];
    size_t whole = first.iov_len;
    first.iov_len = cut(whole, now);
    return first.iov_len < whole ? real(fd, &first, 1, at, flags) : real(fd, iov, n, at, flags);
}

#define VECTORED(name, writes)                                                              \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t at, int flags) {             \
        return transfer_v(REAL(name), writes, fd, iov, n, at, flags);                       \
    }
VECTORED(preadv2, 0)
VECTORED(pwritev2, 1)
VECTORED(preadv64v2, 0)
VECTORED(pwritev64v2, 1)

#define PLAIN_READ(name)                                                                    \
    ssize_t name(int fd, void *data, size_t size, off_t at) {                               \
        double now = drawn(fd);                                                             \
        if (now >= 0 && now < 2.0 / 3) return fail(READ_ERROR, EIO);                        \
        return REAL(name)(fd, data, now < 0 ? size : cut(size, now), at);                   \
    }
PLAIN_READ(pread)
PLAIN_READ(pread64)

#define PLAIN_WRITE(name)                                                                   \
    ssize_t name(int fd, const void *data, size_t size, off_t at) {                         \
        double now = drawn(fd);                                                             \
        if (now >= 0 && now < 2.0 / 3) return fail(WRITE_ERROR, now < 1.0 / 3 ? EIO : ENOSPC); \
        return REAL(name)(fd, data, now < 0 ? size : cut(size, now), at);                   \
    }
PLAIN_WRITE(pwrite)
PLAIN_WRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *iov, int n) {
    double now = drawn(fd);
    if (now >= 0) return fail(WRITE_ERROR, now < 0.5 ? EIO : ENOSPC);
    return REAL(writev)(fd, iov, n);
}

#define SYNC(name)                                                                          \
    int name(int fd) {                                                                      \
        int status = REAL(name)(fd);                                                        \
        return drawn(fd) < 0 ? status : fail(SYNC_ERROR, EIO);                              \
    }
SYNC(fdatasync)
SYNC(fsync)

int fallocate(int fd, int mode, off_t at, off_t size) {
    double now = mode ? -1.0 : drawn(fd);
    return now < 0 ? REAL(fallocate)(fd, mode, at, size) : fail(ALLOCATE_ERROR, ENOSPC);
}
