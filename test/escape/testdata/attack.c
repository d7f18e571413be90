// The attacks of test/escape that need system calls of their own: attack NAME ARGS.
// Each prints what it got, and exits with 0 when it did get something.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// fds lists the descriptors that the process has, with what they are of.
static int fds(int argc, char **argv) {
	char name[64], to[4096];
	(void)argc, (void)argv;
	for (int fd = 0; fd < 65536; fd++) {
		if (fcntl(fd, F_GETFD) < 0) continue;
		snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
		ssize_t n = readlink(name, to, sizeof to - 1);
		to[n < 0 ? 0 : n] = 0;
		printf("fd %d %s\n", fd, to);
	}
	return 0;
}

static const struct {
	const char *name;
	int (*run)(int, char **);
} attacks[] = {
	{"fds", fds},
};

int main(int argc, char **argv) {
	setvbuf(stdout, NULL, _IONBF, 0);
	for (size_t i = 0; argc > 1 && i < sizeof attacks / sizeof *attacks; i++)
		if (!strcmp(argv[1], attacks[i].name)) return attacks[i].run(argc - 1, argv + 1);
	fprintf(stderr, "no such attack\n");
	return 2;
}
