/* A file layer for tests, loaded with LD_PRELOAD: it records what a process does to the
 * files of one directory, and lets chosen calls fail.
 *
 * DISK_DIR      the directory; calls on other files pass.
 * DISK_LOG      where calls are recorded; without it, nothing is.
 * DISK_FAIL     "write" or "sync": the kind of call that fails.
 * DISK_FAIL_AT  the number of the first one that fails, from 1 on.
 * DISK_ERRNO    the error, as a number.
 * DISK_FAIL_FOR how many of them fail; without it, all further ones.
 *
 * A record is: kind (1 byte), length of the name (1 byte), name, offset (8 bytes), length
 * of the data (4 bytes), data; the numbers in the machine's order. Kinds: o created,
 * w written, t cut to offset, s synced, u removed, d directory synced.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name)) dlsym(RTLD_NEXT, #name)

static int log_fd = -2;
static long calls[2];

/* Return the name of an open file below DISK_DIR, "." for the directory; else NULL. */
static const char *name_of(int fd, char *path) {
    const char *dir = getenv("DISK_DIR");
    char link[64];
    ssize_t size;
    size_t length;
    if (!dir)
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, 4095);
    if (size < 0)
        return NULL;
    path[size] = 0;
    length = strlen(dir);
    if (strncmp(path, dir, length))
        return NULL;
    if (!path[length])
        return ".";
    return path[length] == '/' ? path + length + 1 : NULL;
}

static void record(char kind, const char *name, uint64_t offset, const void *data, uint32_t size) {
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    uint8_t length = (uint8_t) strlen(name);
    static char buffer[1 << 22];
    size_t used = 0;
    if (log_fd == -2) {
        const char *path = getenv("DISK_LOG");
        int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
        log_fd = path ? real_open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    }
    if (log_fd < 0)
        return;
    buffer[used++] = kind;
    buffer[used++] = (char) length;
    memcpy(buffer + used, name, length);
    used += length;
    memcpy(buffer + used, &offset, 8);
    memcpy(buffer + used + 8, &size, 4);
    used += 12;
    memcpy(buffer + used, data, size);
    if (real_write(log_fd, buffer, used + size) < 0)
        abort();
}

/* Return whether this call fails; errno is set then. */
static int fails(int kind) {
    const char *which = getenv("DISK_FAIL");
    long at, count;
    if (!which || strcmp(which, kind ? "sync" : "write"))
        return 0;
    at = atol(getenv("DISK_FAIL_AT"));
    count = getenv("DISK_FAIL_FOR") ? atol(getenv("DISK_FAIL_FOR")) : 1L << 60;
    calls[kind]++;
    if (calls[kind] < at || calls[kind] >= at + count)
        return 0;
    errno = atoi(getenv("DISK_ERRNO"));
    return 1;
}

static ssize_t wrote(int fd, const void *data, size_t size, off64_t offset, ssize_t result) {
    char path[4096];
    const char *name = name_of(fd, path);
    (void) size;
    if (name && result > 0)
        record('w', name, (uint64_t) offset, data, (uint32_t) result);
    return result;
}

#define CHECK_WRITE(fd) \
    do { \
        char path[4096]; \
        if (name_of(fd, path) && fails(0)) \
            return -1; \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    off64_t offset;
    CHECK_WRITE(fd);
    offset = lseek64(fd, 0, SEEK_CUR);
    return wrote(fd, data, size, offset, real(fd, data, size));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    CHECK_WRITE(fd);
    return wrote(fd, data, size, offset, real(fd, data, size, offset));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return pwrite64(fd, data, size, offset);
}

static int synced(int fd, int result) {
    char path[4096];
    const char *name = name_of(fd, path);
    if (name && !result)
        record(strcmp(name, ".") ? 's' : 'd', name, 0, "", 0);
    return result;
}

int fsync(int fd) {
    REAL(fsync);
    char path[4096];
    if (name_of(fd, path) && fails(1))
        return -1;
    return synced(fd, real(fd));
}

int fdatasync(int fd) {
    REAL(fdatasync);
    char path[4096];
    if (name_of(fd, path) && fails(1))
        return -1;
    return synced(fd, real(fd));
}

int ftruncate64(int fd, off64_t length) {
    REAL(ftruncate64);
    char path[4096];
    const char *name = name_of(fd, path);
    int result = real(fd, length);
    if (name && !result)
        record('t', name, (uint64_t) length, "", 0);
    return result;
}

int ftruncate(int fd, off_t length) {
    return ftruncate64(fd, length);
}

static const char *below(const char *path) {
    const char *dir = getenv("DISK_DIR");
    size_t length = dir ? strlen(dir) : 0;
    return dir && !strncmp(path, dir, length) && path[length] == '/' ? path + length + 1 : NULL;
}

int unlink(const char *path) {
    REAL(unlink);
    int result = real(path);
    if (!result && below(path))
        record('u', below(path), 0, "", 0);
    return result;
}

static int opened(const char *path, int flags, mode_t mode, const char *function) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, function);
    struct stat status;
    int is_new = (flags & O_CREAT) && below(path) && stat(path, &status);
    int fd = real(path, flags, mode);
    if (fd >= 0 && is_new)
        record('o', below(path), 0, "", 0);
    return fd;
}

#define OPEN(function) \
    int function(const char *path, int flags, ...) { \
        va_list arguments; \
        mode_t mode; \
        va_start(arguments, flags); \
        mode = (mode_t) va_arg(arguments, int); \
        va_end(arguments); \
        return opened(path, flags, mode, #function); \
    }

OPEN(open)
OPEN(open64)
