// Other processes: looking at them, signals, System V and POSIX IPC, and sockets.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <mqueue.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attack.h"

#define KEY 0x4b494c4e
#define NAME "kiln-escape"
#define PORT 4000

// contains looks for text in a file that may have NUL bytes.
static int contains(const char *file, const char *text) {
	static char buf[1 << 16];
	int fd = open(file, O_RDONLY | O_NONBLOCK);
	if (fd < 0) return 0;
	ssize_t n = read(fd, buf, sizeof buf);
	close(fd);
	return n > 0 && memmem(buf, n, text, strlen(text)) != NULL;
}

// scan TEXT FILE looks for TEXT in what is to be seen of other processes, and in FILE
// of their roots. The text itself is not printed.
int scan_main(int argc, char **argv) {
	if (argc < 3) return 2;
	char path[8192];
	int seen = 0;
	DIR *proc = opendir("/proc");
	for (struct dirent *d; proc && (d = readdir(proc));) {
		int pid = atoi(d->d_name);
		if (pid <= 0 || pid == getpid()) continue;
		const char *files[] = {"environ", "cmdline", "root", "cwd"};
		for (int i = 0; i < 4; i++) {
			snprintf(path, sizeof path, "/proc/%d/%s%s", pid, files[i], i < 2 ? "" : argv[2]);
			// What runs the attack names the text too.
			if (pid != 1 && pid != getppid() && contains(path, argv[1])) printf("found in %s\n", files[i]);
		}
		seen++;
	}
	printf("scanned %d\n", seen);
	return 0;
}

static void on_signal(int s) { printf("got signal %d\n", s); }

static int listen_on(int family, const struct sockaddr *to, socklen_t len) {
	int fd = socket(family, SOCK_STREAM, 0), one = 1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (fd < 0 || bind(fd, to, len) < 0 || listen(fd, 16) < 0) {
		perror("listen");
		exit(1);
	}
	return fd;
}

static socklen_t abstract(struct sockaddr_un *a) {
	memset(a, 0, sizeof *a);
	a->sun_family = AF_UNIX;
	memcpy(a->sun_path + 1, NAME, sizeof NAME - 1);
	return offsetof(struct sockaddr_un, sun_path) + sizeof NAME;
}

// serve offers the text in the variable CANARY in every way that processes of one
// machine have, for ever.
int serve_main(int argc, char **argv) {
	const char *text = getenv("CANARY");
	(void)argc, (void)argv;
	if (!text) return 2;
	for (int s = 1; s < 32; s++) signal(s, on_signal);
	int id = shmget(KEY, 4096, IPC_CREAT | 0666);
	char *shared = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
	if (shared != (void *)-1) strcpy(shared, text); // it goes with its namespace
	struct mq_attr attr = {.mq_maxmsg = 4, .mq_msgsize = 256};
	mq_unlink("/" NAME);
	mqd_t q = mq_open("/" NAME, O_CREAT | O_RDWR, 0666, &attr);
	if (q >= 0) mq_send(q, text, strlen(text), 1);
	struct sockaddr_un local;
	socklen_t len = abstract(&local);
	struct sockaddr_in inet = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct pollfd fds[2] = {
		{listen_on(AF_UNIX, (struct sockaddr *)&local, len), POLLIN, 0},
		{listen_on(AF_INET, (struct sockaddr *)&inet, sizeof inet), POLLIN, 0},
	};
	struct ifaddrs *all = NULL;
	getifaddrs(&all);
	for (struct ifaddrs *a = all; a; a = a->ifa_next)
		if (a->ifa_addr && a->ifa_addr->sa_family == AF_INET)
			printf("address %s\n", inet_ntoa(((struct sockaddr_in *)a->ifa_addr)->sin_addr));
	printf("serving\n");
	for (;;) {
		if (poll(fds, 2, -1) < 0) continue;
		for (int i = 0; i < 2; i++) {
			if (!(fds[i].revents & POLLIN)) continue;
			int c = accept(fds[i].fd, NULL, NULL);
			if (c < 0) continue;
			printf("got a connection\n");
			if (write(c, text, strlen(text)) < 0) perror("write");
			close(c);
		}
	}
}

// ipc takes what serve of another process offers, but for the network.
int ipc_main(int argc, char **argv) {
	(void)argc, (void)argv;
	int id = shmget(KEY, 0, 0);
	char *shared = id < 0 ? (void *)-1 : shmat(id, NULL, SHM_RDONLY);
	if (shared == (void *)-1) printf("shm: %s\n", strerror(errno));
	else printf("shm: %.200s\n", shared);
	mqd_t q = mq_open("/" NAME, O_RDONLY | O_NONBLOCK);
	char buf[257] = "";
	if (q < 0 || mq_receive(q, buf, 256, NULL) < 0) printf("mq: %s\n", strerror(errno));
	else printf("mq: %s\n", buf);
	struct sockaddr_un local;
	socklen_t len = abstract(&local);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&local, len) < 0) printf("abstract: %s\n", strerror(errno));
	else print_content("abstract", fd);
	return 0;
}

// tcp SOURCE HOST:PORT... connects, from SOURCE when it is not -, and prints what it
// gets for a request.
int tcp_main(int argc, char **argv) {
	for (int i = 2; i < argc; i++) {
		char *host = strdup(argv[i]), *colon = strrchr(host, ':');
		if (!colon) return 2;
		*colon = 0;
		struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(colon + 1))};
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		if (strcmp(argv[1], "-")) {
			int one = 1;
			struct sockaddr_in from = {.sin_family = AF_INET};
			inet_aton(argv[1], &from.sin_addr);
			setsockopt(fd, IPPROTO_IP, 15 /* IP_FREEBIND */, &one, sizeof one);
			if (bind(fd, (struct sockaddr *)&from, sizeof from) < 0) {
				printf("bind: %s\n", strerror(errno));
				continue;
			}
		}
		inet_aton(host, &to.sin_addr);
		struct pollfd p = {fd, POLLOUT, 0};
		int err = 0;
		socklen_t len = sizeof err;
		if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) printf("%s: %s\n", argv[i], strerror(errno));
		else if (poll(&p, 1, 700) < 1) printf("%s: no answer\n", argv[i]);
		else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) < 0 || err) printf("%s: %s\n", argv[i], strerror(err));
		else {
			printf("connected to %s\n", argv[i]);
			dprintf(fd, "GET / HTTP/1.0\r\n\r\n");
			p.events = POLLIN;
			if (poll(&p, 1, 2000) > 0) print_content(argv[i], fd);
		}
		close(fd);
		free(host);
	}
	return 0;
}

// kill PID... sends signals to processes and traces them; without PID, to all.
int kill_main(int argc, char **argv) {
	if (argc < 2) {
		// Its own group is spared: what runs the step is in it.
		signal(SIGUSR1, SIG_IGN), signal(SIGTERM, SIG_IGN), signal(SIGHUP, SIG_IGN);
		kill(-1, SIGUSR1), kill(-1, SIGTERM);
		for (int pid = 2; pid < 65536; pid++)
			if (pid != getpid()) kill(pid, SIGUSR1);
		printf("sent\n");
		return 0;
	}
	for (int i = 1; i < argc; i++) {
		int pid = atoi(argv[i]);
		if (kill(pid, SIGUSR1) == 0) printf("killed %d\n", pid);
		if (ptrace(PTRACE_ATTACH, pid, 0, 0) == 0) {
			waitpid(pid, NULL, 0);
			printf("traced %d\n", pid);
			ptrace(PTRACE_DETACH, pid, 0, 0);
		}
	}
	return 0;
}
