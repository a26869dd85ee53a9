/* Preloaded: lets reads of .safetensors files fail as a device does, while the file that FAILING_READS names exists.
   Its first byte says how: e EIO, s ESTALE (a network file system), t ETIMEDOUT, h half of what was asked for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int how(int fd) {
    char name[64], path[4096], mode = 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, ".safetensors")) return 0;
    int control = open(getenv("FAILING_READS"), O_RDONLY);
    if (control < 0) return 0;
    ssize_t (*plain)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    if (plain(control, &mode, 1) != 1) mode = 0;
    close(control);
    return mode;
}

static int fails(int mode) {
    errno = mode == 'e' ? EIO : mode == 's' ? ESTALE : ETIMEDOUT;
    return mode == 'e' || mode == 's' || mode == 't';
}

ssize_t read(int fd, void *into, size_t count) {
    ssize_t (*plain)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    int mode = how(fd);
    return fails(mode) ? -1 : plain(fd, into, mode == 'h' ? (count + 1) / 2 : count);
}

#define POSITIONAL(NAME, OFFSET)                                                                        \
    ssize_t NAME(int fd, const struct iovec *pieces, int count, OFFSET offset) {                        \
        ssize_t (*plain)(int, const struct iovec *, int, OFFSET) = dlsym(RTLD_NEXT, #NAME);             \
        int mode = how(fd);                                                                             \
        if (fails(mode)) return -1;                                                                     \
        struct iovec first = {pieces->iov_base, (pieces->iov_len + 1) / 2};                             \
        return mode == 'h' ? plain(fd, &first, 1, offset) : plain(fd, pieces, count, offset);           \
    }
#define POSITIONAL_2(NAME, OFFSET)                                                                      \
    ssize_t NAME(int fd, const struct iovec *pieces, int count, OFFSET offset, int flags) {             \
        ssize_t (*plain)(int, const struct iovec *, int, OFFSET, int) = dlsym(RTLD_NEXT, #NAME);        \
        int mode = how(fd);                                                                             \
        if (fails(mode)) return -1;                                                                     \
        struct iovec first = {pieces->iov_base, (pieces->iov_len + 1) / 2};                             \
        return mode == 'h' ? plain(fd, &first, 1, offset, flags) : plain(fd, pieces, count, offset, flags); \
    }
POSITIONAL(preadv, off_t)
POSITIONAL(preadv64, off64_t)
POSITIONAL_2(preadv2, off_t)
POSITIONAL_2(preadv64v2, off64_t)
