// The bombs of test/escape: bomb KIND NUMBER takes as much of one thing as it gets, at
// most NUMBER, and prints how much that was.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char piece[1 << 20];

static int processes(long most) {
	long n = 0;
	for (pid_t p; n < most && (p = fork()) >= 0; n++)
		if (p == 0) {
			pause();
			_exit(0);
		}
	printf("got %ld: %s\n", n, strerror(errno));
	return n < most;
}

static int memory(long most) {
	for (long n = 0; n < most; n++) {
		char *p = malloc(sizeof piece);
		if (!p) return 1;
		memset(p, 1, sizeof piece);
		if ((n + 1) % 16 == 0) printf("got %ld: so far\n", n + 1);
	}
	printf("got %ld: all\n", most);
	return 0;
}

static int disk(long most) {
	int fd = open("/big", O_CREAT | O_WRONLY, 0600);
	long n = 0;
	errno = 0;
	memset(piece, 1, sizeof piece);
	for (; n < most && write(fd, piece, sizeof piece) == sizeof piece; n++)
		if ((n + 1) % 16 == 0) printf("got %ld: so far\n", n + 1);
	printf("got %ld: %s\n", n, strerror(errno));
	return n < most;
}

static int inodes(long most) {
	long n = 0;
	char name[32];
	mkdir("/many", 0700);
	errno = 0;
	for (int fd; n < most; n++) {
		snprintf(name, sizeof name, "/many/%ld", n);
		if ((fd = open(name, O_CREAT | O_WRONLY, 0600)) < 0) break;
		close(fd);
		if ((n + 1) % 500 == 0) printf("got %ld: so far\n", n + 1);
	}
	printf("got %ld: %s\n", n, strerror(errno));
	return n < most;
}

static int files(long most) {
	struct rlimit all = {most + 16, most + 16};
	setrlimit(RLIMIT_NOFILE, &all);
	long n = 0;
	errno = 0;
	while (n < most && open("/dev/null", O_RDONLY) >= 0) n++;
	printf("got %ld: %s\n", n, strerror(errno));
	return n < most;
}

static void *spin(void *end) {
	struct timespec now;
	do clock_gettime(CLOCK_MONOTONIC, &now);
	while (now.tv_sec < *(time_t *)end);
	return NULL;
}

// cpu spins for two to three seconds in many threads, and prints their time in milliseconds.
static int cpu(long threads) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	time_t end = now.tv_sec + 3;
	pthread_t t[64];
	if (threads > 64) threads = 64;
	for (long i = 0; i < threads; i++) pthread_create(&t[i], NULL, spin, &end);
	for (long i = 0; i < threads; i++) pthread_join(t[i], NULL);
	struct rusage u;
	getrusage(RUSAGE_SELF, &u);
	printf("got %ld: all\n", u.ru_utime.tv_sec * 1000 + u.ru_utime.tv_usec / 1000 + u.ru_stime.tv_sec * 1000 + u.ru_stime.tv_usec / 1000);
	return 0;
}

// line writes megabytes without an end of line.
static int line(long most) {
	memset(piece, 'x', sizeof piece);
	for (long n = 0; n < most; n++)
		for (size_t done = 0; done < sizeof piece;) {
			ssize_t w = write(1, piece + done, sizeof piece - done);
			if (w <= 0) return 1;
			done += w;
		}
	return 0;
}

// immutable makes a file that cannot be changed nor removed, if it gets it.
static int immutable(long most) {
	long n = 0;
	mkdir("/fixed", 0755);
	for (; n < most; n++) {
		int fd = open(n ? "/fixed/file" : "/fixed", n ? O_CREAT | O_RDONLY : O_RDONLY | O_DIRECTORY, 0644);
		int flags = 0x30; // FS_IMMUTABLE_FL and FS_APPEND_FL
		if (fd < 0 || ioctl(fd, 0x40086602, &flags)) break; // FS_IOC_SETFLAGS
	}
	printf("got %ld: %s\n", n, strerror(errno));
	return 0;
}

// movable undoes it.
static int movable(long most) {
	(void)most;
	int fd = open("/fixed", O_RDONLY | O_DIRECTORY), flags = 0;
	return fd < 0 || ioctl(fd, 0x40086602, &flags);
}

static const struct {
	const char *name;
	int (*run)(long);
} bombs[] = {
	{"processes", processes}, {"memory", memory}, {"disk", disk}, {"inodes", inodes},
	{"files", files}, {"cpu", cpu}, {"line", line}, {"immutable", immutable}, {"mutable", movable},
};

int main(int argc, char **argv) {
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; argc > 2 && i < sizeof bombs / sizeof *bombs; i++)
		if (!strcmp(argv[1], bombs[i].name)) return bombs[i].run(atol(argv[2]));
	fprintf(stderr, "no such bomb\n");
	return 2;
}
