// Makes fsync and fdatasync of files in one folder slow, and notes each: see tests/slow_disk.py.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void note(const char *call, int fd) {
    const char *folder = getenv("SLOW_FOLDER"), *log = getenv("SLOW_LOG"), *pause = getenv("SLOW_MS");
    char link[64], path[4096], line[5000];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    if (folder && strncmp(path, folder, strlen(folder)) != 0) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int out = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (out >= 0) {
        int size = snprintf(line, sizeof line, "%lld.%06ld %ld %s %s\n", (long long)now.tv_sec, now.tv_nsec / 1000,
                            (long)syscall(SYS_gettid), call, path);
        if (write(out, line, size) != size) abort();
        close(out);
    }
    long ms = pause ? atol(pause) : 0;
    struct timespec rest = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&rest, 0);
}

int fsync(int fd) {
    note("fsync", fd);
    return syscall(SYS_fsync, fd);
}

int fdatasync(int fd) {
    note("fdatasync", fd);
    return syscall(SYS_fdatasync, fd);
}
