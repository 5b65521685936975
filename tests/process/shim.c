/* Preloaded: calls on files below a folder fail at random, by a seed. Nothing fails before shim_set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, FSYNC = 2, RENAME = 4, CLOSE = 8, MANY = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long long state;
static int calls, per_million;
static long failed;
static char root[4096];
static char ours[MANY]; /* by descriptor: whether it is of a file below the folder */

/* calls: which fail, as a sum of the names above; 0 to stop. */
void shim_set(unsigned long long seed, int which, int probability, const char *folder) {
    pthread_mutex_lock(&lock);
    state = seed * 0x9E3779B97F4A7C15ull + 1;
    calls = which;
    per_million = probability;
    strncpy(root, folder, sizeof root - 1);
    failed = 0;
    pthread_mutex_unlock(&lock);
}

long shim_failed(void) { return failed; }

static int is_below(const char *path) { return root[0] && !strncmp(path, root, strlen(root)); }

static int is_ours(int fd) { return fd >= 0 && fd < MANY && ours[fd]; }

static int fails(int call) {
    static const int errors[] = {EIO, ENOSPC, EDQUOT};
    pthread_mutex_lock(&lock);
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    int number = (int)((state >> 11) % 1000000);
    int yes = (calls & call) && number < per_million;
    failed += yes;
    pthread_mutex_unlock(&lock);
    if (yes) errno = errors[number % 3];
    return yes;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

static int note(int fd, const char *path) {
    if (fd >= 0 && fd < MANY) ours[fd] = is_below(path);
    return fd;
}

static int mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = mode_of(flags, rest); \
        va_end(rest); \
        return note(real(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return is_ours(fd) && fails(WRITE) ? -1 : real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return is_ours(fd) && fails(WRITE) ? -1 : real(fd, parts, count);
}

int fsync(int fd) {
    REAL(fsync);
    return is_ours(fd) && fails(FSYNC) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return is_below(to) && fails(RENAME) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    return is_below(to) && fails(RENAME) ? -1 : real(from_folder, from, to_folder, to);
}

/* As on NFS: the descriptor is closed all the same. */
int close(int fd) {
    REAL(close);
    int below = is_ours(fd);
    if (fd >= 0 && fd < MANY) ours[fd] = 0;
    int result = real(fd);
    return below && fails(CLOSE) ? -1 : result;
}
