// System calls that would be a way to the node, or to more of its kernel. Each is
// tried in a process of its own; "sys NAME ok" or the number of its error is printed.
// They are chosen such that one that succeeds does nothing to the node.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timex.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attack.h"

#define CALL(...) (syscall(__VA_ARGS__) < 0 ? errno : 0)
#define RESULT(call) ((call) < 0 ? errno : 0)

static int newuser(void) { return CALL(SYS_unshare, CLONE_NEWUSER); }
static int newns(void) { return CALL(SYS_unshare, CLONE_NEWNS); }
static int newnet(void) { return CALL(SYS_unshare, CLONE_NEWNET); }
static int newpid(void) { return CALL(SYS_unshare, CLONE_NEWPID); }
static int newcgroup(void) { return CALL(SYS_unshare, CLONE_NEWCGROUP); }

static int ended(long pid) {
	if (pid < 0) return errno;
	if (pid == 0) _exit(0);
	return waitpid(pid, NULL, __WALL) < 0 ? errno : 0;
}
static int cloneuser(void) { return ended(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)); }
static int clone3user(void) {
	unsigned long long args[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
	return ended(syscall(SYS_clone3, args, sizeof args));
}

static int mounttmpfs(void) { return RESULT(mount("none", "/tmp", "tmpfs", 0, NULL)); }
static int mountproc(void) { return RESULT(mount("none", "/tmp", "proc", 0, NULL)); }
static int mountsys(void) { return RESULT(mount("none", "/tmp", "sysfs", 0, NULL)); }
static int mountcgroup(void) { return RESULT(mount("none", "/tmp", "cgroup", 0, "none,name=kilntest")); }
static int mountbind(void) { return RESULT(mount("/proc", "/tmp", NULL, MS_BIND | MS_REC, NULL)); }
static int mountbinfmt(void) { return RESULT(mount("none", "/tmp", "binfmt_misc", 0, NULL)); }
static int mountbpf(void) { return RESULT(mount("none", "/tmp", "bpf", 0, NULL)); }
static int remount(void) { return RESULT(mount(NULL, "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL)); }
static int uncover(void) { return RESULT(umount2("/proc/sys", MNT_DETACH)); }
static int fsopen_(void) { return CALL(SYS_fsopen, "tmpfs", 0); }
static int opentree(void) { return CALL(SYS_open_tree, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */); }
static int pivot(void) { return CALL(SYS_pivot_root, "/tmp", "/tmp"); }
static int setns_(void) {
	int fd = open("/proc/1/ns/mnt", O_RDONLY);
	return fd < 0 ? errno : RESULT(setns(fd, CLONE_NEWNS));
}

// nftables makes a table of the packet filter.
static int nftables(void) {
	static const unsigned char batch[] = {
		20, 0, 0, 0, 0x10, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, // begin
		32, 0, 0, 0, 0, 10, 5, 4, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 10, 0, 1, 0, 'k', 'i', 'l', 'n', 't', 0, 0, 0, // new table, acknowledged
		20, 0, 0, 0, 0x11, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, // end
	};
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	if (fd < 0) return errno;
	struct sockaddr_nl to = {.nl_family = AF_NETLINK};
	if (sendto(fd, batch, sizeof batch, 0, (struct sockaddr *)&to, sizeof to) < 0) return errno;
	char buf[4096];
	ssize_t n = recv(fd, buf, sizeof buf, 0);
	if (n < 20) return n < 0 ? errno : EIO;
	int code;
	memcpy(&code, buf + 16, sizeof code);
	return -code;
}

static int iouring(void) {
	char params[120] = {0};
	return CALL(SYS_io_uring_setup, 8, params);
}
static int bpf(void) {
	unsigned attr[32] = {2 /* array */, 4, 4, 1};
	return CALL(SYS_bpf, 0 /* BPF_MAP_CREATE */, attr, sizeof attr);
}
static int addkey(void) { return CALL(SYS_add_key, "user", "kiln", "x", 1, -3 /* session */); }
static int keyctl(void) { return CALL(SYS_keyctl, 0 /* get ID */, -4 /* user's keyring */, 1); }
static int perf(void) {
	unsigned attr[32] = {1 /* software */, sizeof attr};
	return CALL(SYS_perf_event_open, attr, 0, -1, -1, 0);
}
static int userfaultfd(void) { return CALL(SYS_userfaultfd, 0); }
static int fanotify(void) { return CALL(SYS_fanotify_init, 4 /* FAN_CLASS_CONTENT */, 0); }
static int mem(void) { return RESULT(mknod("/tmp/mem", S_IFCHR | 0600, makedev(1, 1))); }
static int disk(void) { return RESULT(mknod("/tmp/disk", S_IFBLK | 0600, makedev(254, 0))); }
static int devdisk(void) { return RESULT(mknod("/dev/disk", S_IFBLK | 0600, makedev(254, 0))); }
static int kexec(void) { return CALL(SYS_kexec_load, 0L, 1L, NULL, ~0UL); }
static int module(void) { return CALL(SYS_init_module, "none", 4L, ""); }
static int unmodule(void) { return CALL(SYS_delete_module, "kiln_no_such_module", O_NONBLOCK); }
static int rebooting(void) { return CALL(SYS_reboot, 1, 2, 3, NULL); }
static int swap(void) { return CALL(SYS_swapon, "/no-such-file", 0); }
static int acct_(void) { return CALL(SYS_acct, "/no-such-file"); }
static int timex(void) {
	struct timex t = {0};
	if (adjtimex(&t) < 0) return errno;
	t.modes = ADJ_TICK;
	return adjtimex(&t) < 0 ? errno : 0;
}
static int ports(void) { return RESULT(iopl(3)); }
static int kernellog(void) {
	char buf[64];
	return CALL(SYS_syslog, 3, buf, sizeof buf);
}
static int packet(void) { return RESULT(socket(AF_PACKET, SOCK_RAW, 0)); }
static int raw(void) { return RESULT(socket(AF_INET, SOCK_RAW, 1)); }
static int vsock(void) { return RESULT(socket(AF_VSOCK, SOCK_STREAM, 0)); }
static int alg(void) { return RESULT(socket(AF_ALG, SOCK_SEQPACKET, 0)); }
static int link_(void) {
	struct ifreq r = {.ifr_name = "lo"};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &r) < 0) return errno;
	return RESULT(ioctl(fd, SIOCSIFFLAGS, &r));
}
static int hostname(void) {
	struct utsname u;
	uname(&u);
	return RESULT(sethostname(u.nodename, strlen(u.nodename)));
}
static int realtime(void) {
	struct sched_param p = {.sched_priority = 1};
	return RESULT(sched_setscheduler(0, SCHED_FIFO, &p));
}
static int unkillable(void) {
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);
	if (fd < 0) return errno;
	return write(fd, "-1000", 5) < 0 ? errno : 0;
}

static const struct {
	const char *name;
	int (*call)(void);
} calls[] = {
	{"unshare-user", newuser}, {"unshare-mount", newns}, {"unshare-net", newnet}, {"unshare-pid", newpid},
	{"unshare-cgroup", newcgroup}, {"clone-user", cloneuser}, {"clone3-user", clone3user}, {"setns", setns_},
	{"mknod-mem", mem}, {"mknod-disk", disk}, {"mknod-dev", devdisk}, {"nf-tables", nftables},
	{"io-uring", iouring}, {"bpf", bpf}, {"add-key", addkey}, {"keyctl", keyctl}, {"perf-event", perf},
	{"userfaultfd", userfaultfd}, {"fanotify", fanotify},
	{"kexec", kexec}, {"init-module", module}, {"delete-module", unmodule}, {"reboot", rebooting}, {"swapon", swap},
	{"acct", acct_}, {"adjtimex", timex}, {"iopl", ports}, {"syslog", kernellog}, {"af-packet", packet}, {"raw-socket", raw},
	{"af-vsock", vsock}, {"af-alg", alg}, {"link-flags", link_}, {"sethostname", hostname}, {"realtime", realtime},
	{"oom-score", unkillable}, {"fsopen", fsopen_}, {"open-tree", opentree},
	// What changes the mounts comes last.
	{"remount", remount}, {"umount", uncover}, {"mount-tmpfs", mounttmpfs}, {"mount-proc", mountproc}, {"mount-sysfs", mountsys},
	{"mount-cgroup", mountcgroup}, {"mount-bind", mountbind}, {"mount-binfmt", mountbinfmt}, {"mount-bpf", mountbpf}, {"pivot-root", pivot},
};

int sys_main(int argc, char **argv) {
	struct utsname u;
	(void)argc, (void)argv;
	uname(&u);
	printf("sys kernel %s\n", u.release);
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
		pid_t pid = fork();
		if (pid == 0) {
			alarm(5);
			_exit(calls[i].call());
		}
		int status = 0;
		waitpid(pid, &status, 0);
		if (WIFSIGNALED(status)) printf("sys %s signal %d\n", calls[i].name, WTERMSIG(status));
		else if (WEXITSTATUS(status) == 0) printf("sys %s ok\n", calls[i].name);
		else printf("sys %s %d\n", calls[i].name, WEXITSTATUS(status));
	}
	return 0;
}
