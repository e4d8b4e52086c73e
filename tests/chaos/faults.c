/* Faults on demand for the files under one folder, and a shifted wall clock; preloaded into the processes under test.
 *
 * CHAOS_ROOT     folder whose files are ours
 * CHAOS_CONTROLS folder of control files: a process maps the one that CHAOS_NAME names, else its own `--name` or `-m`
 *
 * The layout of a control file is known here and in shim.py. Files are recognised at every call through /proc, because
 * a descriptor may come from inside libc, where no open can be intercepted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* TEAR: killed after half of a write, in whole sectors, or after the whole of another call. */
enum action { PASS, FAIL, KILL, TEAR };
enum kind { WRITE = 1, SYNC = 2, NAME = 4 };

struct control {
    _Atomic int64_t num_calls;  /* intercepted calls of the wanted kinds */
    _Atomic int64_t num_struck; /* of those, how many met a fault */
    _Atomic int64_t skip;       /* calls to let pass before the first fault */
    _Atomic int64_t repeat;     /* faults still to come; negative: until cleared */
    _Atomic int64_t clock_offset_ns;
    _Atomic int32_t action, error, kinds;
    char struck[20]; /* name of the call that met the last fault */
};

static struct control *control;
static char root[PATH_MAX];
static size_t root_length;

static void name_self(char *name, size_t size) {
    char line[8192] = {0}, *word;
    const char *given = getenv("CHAOS_NAME");
    int file = -1;
    ssize_t length = 0;
    if (given) {
        snprintf(name, size, "%s", given);
        return;
    }
    if ((file = open("/proc/self/cmdline", O_RDONLY)) >= 0) {
        length = read(file, line, sizeof line - 2);
        close(file);
    }
    for (word = line; word < line + length; word += strlen(word) + 1) {
        const char *next = word + strlen(word) + 1;
        if (strcmp(word, "--name") == 0 || (strcmp(word, "-m") == 0 && !*name)) snprintf(name, size, "%s", next);
    }
}

__attribute__((constructor)) static void attach(void) {
    char name[128] = "", path[PATH_MAX];
    const char *folder = getenv("CHAOS_CONTROLS"), *files = getenv("CHAOS_ROOT");
    name_self(name, sizeof name);
    if (!folder || !files || !*name || strchr(name, '/')) return;
    snprintf(root, sizeof root, "%s/", files);
    root_length = strlen(root);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 || ftruncate(file, 4096) != 0) return;
    void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED) control = mapped;
}

static int lies_in_root(const char *link, const char *name) {
    char path[2 * PATH_MAX];
    int saved = errno;
    ssize_t length = readlink(link, path, PATH_MAX);
    errno = saved;
    if (length < 0) return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return strncmp(path, root, root_length) == 0;
}

static int owns_at(int folder, const char *path) {
    char link[64];
    if (!control || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, root_length) == 0;
    if (folder == AT_FDCWD) return lies_in_root("/proc/self/cwd", path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    return lies_in_root(link, path);
}

static int owns(int fd) {
    char link[64];
    if (!control) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return lies_in_root(link, "");
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* What this call meets; sets errno where it is to fail. */
static enum action strike(enum kind kind, const char *call) {
    enum action action = control->action;
    if (control->kinds && !(control->kinds & kind)) return PASS;
    control->num_calls++;
    if (action == PASS || atomic_fetch_sub(&control->skip, 1) > 0) return PASS;
    if (control->repeat >= 0 && atomic_fetch_sub(&control->repeat, 1) <= 0) {
        control->repeat = 0;
        return PASS;
    }
    control->num_struck++;
    strncpy(control->struck, call, sizeof control->struck - 1);
    if (action == KILL) die();
    errno = control->error;
    return action;
}

/* One intercepted function: who it concerns, and what is left of it when it is torn. */
#define INTERCEPT(type, name, kind, is_ours, parameters, arguments, torn) \
    type name parameters {                                                \
        static type(*real) parameters;                                    \
        if (!real) real = dlsym(RTLD_NEXT, #name);                        \
        enum action action = (is_ours) ? strike(kind, #name) : PASS;      \
        if (action == FAIL) return -1;                                    \
        if (action == TEAR) {                                             \
            (void)!real torn;                                             \
            die();                                                        \
        }                                                                 \
        return real arguments;                                            \
    }

#define INTERCEPT_OPEN(name)                                                                    \
    int name(const char *path, int flags, ...) {                                                \
        static int (*real)(const char *, int, ...);                                             \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                 \
        va_end(rest);                                                                           \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                              \
        enum action action = flags & O_CREAT && owns_at(AT_FDCWD, path) ? strike(NAME, #name) : PASS; \
        if (action == FAIL) return -1;                                                          \
        int file = real(path, flags, mode);                                                     \
        if (action == TEAR) die();                                                              \
        return file;                                                                            \
    }

#define INTERCEPT_OPENAT(name)                                                                  \
    int name(int folder, const char *path, int flags, ...) {                                    \
        static int (*real)(int, const char *, int, ...);                                        \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                 \
        va_end(rest);                                                                           \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                              \
        enum action action = flags & O_CREAT && owns_at(folder, path) ? strike(NAME, #name) : PASS; \
        if (action == FAIL) return -1;                                                          \
        int file = real(folder, path, flags, mode);                                             \
        if (action == TEAR) die();                                                              \
        return file;                                                                            \
    }

#define AT AT_FDCWD
#define HALF(n) ((n) / 2 / 512 * 512)

INTERCEPT(ssize_t, write, WRITE, owns(fd), (int fd, const void *data, size_t n), (fd, data, n), (fd, data, HALF(n)))
INTERCEPT(ssize_t, pwrite, WRITE, owns(fd), (int fd, const void *data, size_t n, off_t at), (fd, data, n, at),
          (fd, data, HALF(n), at))
INTERCEPT(ssize_t, pwrite64, WRITE, owns(fd), (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at),
          (fd, data, HALF(n), at))
INTERCEPT(ssize_t, writev, WRITE, owns(fd), (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2))
INTERCEPT(ssize_t, pwritev, WRITE, owns(fd), (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at),
          (fd, v, n / 2, at))
INTERCEPT(ssize_t, sendfile, WRITE, owns(to), (int to, int from, off_t *at, size_t n), (to, from, at, n),
          (to, from, at, HALF(n)))
INTERCEPT(ssize_t, sendfile64, WRITE, owns(to), (int to, int from, off64_t *at, size_t n), (to, from, at, n),
          (to, from, at, HALF(n)))
INTERCEPT(int, fsync, SYNC, owns(fd), (int fd), (fd), (fd))
INTERCEPT(int, fdatasync, SYNC, owns(fd), (int fd), (fd), (fd))
INTERCEPT(int, ftruncate, NAME, owns(fd), (int fd, off_t n), (fd, n), (fd, n))
INTERCEPT(int, ftruncate64, NAME, owns(fd), (int fd, off64_t n), (fd, n), (fd, n))
INTERCEPT(int, rename, NAME, owns_at(AT, to), (const char *from, const char *to), (from, to), (from, to))
INTERCEPT(int, renameat, NAME, owns_at(b, to), (int a, const char *from, int b, const char *to), (a, from, b, to),
          (a, from, b, to))
INTERCEPT(int, renameat2, NAME, owns_at(b, to), (int a, const char *from, int b, const char *to, unsigned f),
          (a, from, b, to, f), (a, from, b, to, f))
INTERCEPT(int, unlink, NAME, owns_at(AT, path), (const char *path), (path), (path))
INTERCEPT(int, unlinkat, NAME, owns_at(folder, path), (int folder, const char *path, int f), (folder, path, f),
          (folder, path, f))
INTERCEPT(int, rmdir, NAME, owns_at(AT, path), (const char *path), (path), (path))
INTERCEPT(int, mkdir, NAME, owns_at(AT, path), (const char *path, mode_t mode), (path, mode), (path, mode))
INTERCEPT_OPEN(open)
INTERCEPT_OPEN(open64)
INTERCEPT_OPENAT(openat)
INTERCEPT_OPENAT(openat64)

/* A disk that refuses every write for want of room also says so when it is asked. */
#define INTERCEPT_ROOM(name, structure)                                                              \
    int name(const char *path, struct structure *room) {                                             \
        static int (*real)(const char *, struct structure *);                                        \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                   \
        int result = real(path, room);                                                               \
        if (control && control->action == FAIL && control->error == ENOSPC) room->f_bavail = room->f_bfree = 0; \
        return result;                                                                               \
    }
INTERCEPT_ROOM(statvfs, statvfs)
INTERCEPT_ROOM(statvfs64, statvfs64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (control && control->clock_offset_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = now->tv_sec * 1000000000LL + now->tv_nsec + control->clock_offset_ns;
        now->tv_sec = ns / 1000000000LL;
        now->tv_nsec = ns % 1000000000LL;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec at;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (now) *now = at.tv_sec;
    return at.tv_sec;
}
