/* A disk between a process and its files: it writes down, delays, fails and kills.

   Loaded by LD_PRELOAD into every process of a test's fabric. What it does is read at each call
   from the board, a file that the test has mapped too, so that a test arms a fault while the
   process works. Only paths that begin with the board's `under` and hold its `match` are touched;
   everything else goes straight through. See board.py for the fields. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct board {
    int64_t countdown, fault, fired, calls, delay_ms, lasting, pid, op, only;
    char match[184], under[256], log[256], path[256];
};
enum { KILL_BEFORE = 1, KILL_AFTER, IO, FULL, SHORT };
enum { WRITE = 1, SYNC, TRUNCATE, ALLOCATE, RENAME, UNLINK, CREATE };

static struct board *board;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("DISK_BOARD");
    if (!path) return;
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *found = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (found != MAP_FAILED) board = found;
}

static int is_ours(const char *path) {
    return board && board->under[0] && !strncmp(path, board->under, strlen(board->under));
}

static int path_of(int fd, char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
    return is_ours(path);
}

static void note(int op, int64_t offset, const char *path, const void *data, size_t size) {
    if (!board->log[0]) return;
    struct { uint32_t op, path_bytes; int64_t offset; uint64_t data_bytes; } head =
        {op, strlen(path), offset, size};
    char *whole = malloc(sizeof head + head.path_bytes + size);
    memcpy(whole, &head, sizeof head);
    memcpy(whole + sizeof head, path, head.path_bytes);
    if (size) memcpy(whole + sizeof head + head.path_bytes, data, size);
    int fd = syscall(SYS_openat, AT_FDCWD, board->log, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
    syscall(SYS_write, fd, whole, sizeof head + head.path_bytes + size);
    syscall(SYS_close, fd);
    free(whole);
}

/* The fault that strikes this call; 0: none. */
static int strikes(int op, const char *path) {
    if (board->match[0] && !strstr(path, board->match)) return 0;
    if (board->only && op != board->only) return 0;
    if (board->fault == SHORT && op != WRITE) return 0;
    __atomic_add_fetch(&board->calls, 1, __ATOMIC_SEQ_CST);
    if (op == SYNC && board->delay_ms) {
        int64_t ms = board->delay_ms;
        struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&wait, NULL);
    }
    if (board->countdown <= 0) return board->lasting && board->fired ? board->fault : 0;
    if (__atomic_sub_fetch(&board->countdown, 1, __ATOMIC_SEQ_CST) != 0) return 0;
    board->pid = getpid();
    board->op = op;
    snprintf(board->path, sizeof board->path, "%s", path);
    __atomic_store_n(&board->fired, 1, __ATOMIC_SEQ_CST);
    if (board->fault == KILL_BEFORE) kill(getpid(), SIGKILL);
    return board->fault;
}

static void after(int fault) {
    if (fault == KILL_AFTER) kill(getpid(), SIGKILL);
}

#define GUARDED(op, path, offset, data, size, call)                                \
    pthread_mutex_lock(&turn);                                                     \
    int fault = strikes(op, path), error = 0;                                      \
    __typeof__(call) result = -1;                                                  \
    if (fault == IO || fault == FULL) error = fault == IO ? EIO : ENOSPC;          \
    else { result = call; error = errno; if (result >= 0) note(op, offset, path, data, size); } \
    after(fault);                                                                  \
    pthread_mutex_unlock(&turn);                                                   \
    errno = error;                                                                 \
    return result

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!board || !path_of(fd, path)) return syscall(SYS_write, fd, data, size);
    struct stat found;
    fstat(fd, &found);
    int appends = fcntl(fd, F_GETFL) & O_APPEND;
    int64_t offset = appends ? found.st_size : (int64_t)lseek(fd, 0, SEEK_CUR);
    GUARDED(WRITE, path, offset, data, (size_t)result,
            (ssize_t)syscall(SYS_write, fd, data, fault == SHORT ? size / 2 : size));
}

static ssize_t written_at(int fd, const void *data, size_t size, int64_t offset) {
    char path[PATH_MAX];
    if (!board || !path_of(fd, path)) return syscall(SYS_pwrite64, fd, data, size, offset);
    GUARDED(WRITE, path, offset, data, (size_t)result,
            (ssize_t)syscall(SYS_pwrite64, fd, data, fault == SHORT ? size / 2 : size, offset));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return written_at(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    return written_at(fd, data, n, at);
}

static int synced(int fd, long number) {
    char path[PATH_MAX];
    if (!board || !path_of(fd, path)) return syscall(number, fd);
    GUARDED(SYNC, path, 0, "", 0, (int)syscall(number, fd));
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

static int cut(int fd, off_t size) {
    char path[PATH_MAX];
    if (!board || !path_of(fd, path)) return syscall(SYS_ftruncate, fd, size);
    GUARDED(TRUNCATE, path, size, "", 0, (int)syscall(SYS_ftruncate, fd, size));
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off_t size) { return cut(fd, size); }

static int cut_path(const char *path, off_t size) {
    if (!is_ours(path)) return syscall(SYS_truncate, path, size);
    GUARDED(TRUNCATE, path, size, "", 0, (int)syscall(SYS_truncate, path, size));
}
int truncate(const char *path, off_t size) { return cut_path(path, size); }
int truncate64(const char *path, off_t size) { return cut_path(path, size); }

static int allocated(int fd, off_t offset, off_t size) {
    char path[PATH_MAX];
    if (!board || !path_of(fd, path)) return syscall(SYS_fallocate, fd, 0, offset, size);
    GUARDED(ALLOCATE, path, offset + size, "", 0, (int)syscall(SYS_fallocate, fd, 0, offset, size));
}
int posix_fallocate(int fd, off_t offset, off_t size) {
    int before = errno, code = allocated(fd, offset, size) ? errno : 0;
    errno = before;
    return code;
}
int posix_fallocate64(int fd, off_t offset, off_t size) { return posix_fallocate(fd, offset, size); }

int rename(const char *from, const char *to) {
    if (!is_ours(from)) return syscall(SYS_rename, from, to);
    GUARDED(RENAME, from, 0, to, strlen(to), (int)syscall(SYS_rename, from, to));
}

int unlink(const char *path) {
    if (!is_ours(path)) return syscall(SYS_unlink, path);
    GUARDED(UNLINK, path, 0, "", 0, (int)syscall(SYS_unlink, path));
}

/* Making a file and emptying one are written down and not failed: both are no promise yet. */
static int opened(int folder, const char *name, int flags, mode_t mode) {
    struct stat before;
    int was = !fstatat(folder, name, &before, 0);
    int fd = syscall(SYS_openat, folder, name, flags, mode);
    if (fd < 0 || !board || !(flags & (O_CREAT | O_TRUNC))) return fd;
    int error = errno;
    char path[PATH_MAX];
    if (path_of(fd, path)) {
        pthread_mutex_lock(&turn);
        if (!was) note(CREATE, 0, path, "", 0);
        else if (flags & O_TRUNC) note(TRUNCATE, 0, path, "", 0);
        pthread_mutex_unlock(&turn);
    }
    errno = error;
    return fd;
}
#define OPENS(name, before, folder)                                                \
    int name(before const char *path, int flags, ...) {                            \
        va_list more;                                                              \
        va_start(more, flags);                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;    \
        va_end(more);                                                              \
        return opened(folder, path, flags, mode);                                  \
    }
#define NONE
#define FOLDER int at,
OPENS(open, NONE, AT_FDCWD)
OPENS(open64, NONE, AT_FDCWD)
OPENS(openat, FOLDER, at)
OPENS(openat64, FOLDER, at)
