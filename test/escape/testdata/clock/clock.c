// clock FILE EXECS PROGRAM ARG...: run a program whose wall clock is off by as many
// seconds as the first eight bytes of FILE say at the moment. The machine's clock
// stays as it is.
//
// Programs read the clock by a function that the kernel puts into their memory (the
// vDSO). This program puts another one in its place, which adds the difference, when
// the program is about to start, also when it executes itself again, EXECS times in
// all. What it executes otherwise has the clock of the machine.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static const uint8_t shifted[] = {
	0xb8, 0xe4, 0x00, 0x00, 0x00,             // mov  $clock_gettime, %eax
	0x0f, 0x05,                               // syscall
	0x85, 0xc0, 0x75, 0x10,                   // if it failed, or
	0x85, 0xff, 0x75, 0x0c,                   // this is not CLOCK_REALTIME: return
	0x48, 0x8b, 0x05, 0x0a, 0x00, 0x00, 0x00, // mov  difference(%rip), %rax
	0x48, 0x01, 0x06,                         // add  %rax, (%rsi)
	0x31, 0xc0,                               // xor  %eax, %eax
	0xc3, 0, 0, 0, 0,                         // ret
};

static volatile int64_t *offset;
static pid_t child;
static unsigned long function; // of the vDSO, from its start

static void die(const char *what) {
	perror(what);
	if (child > 0)
		kill(child, SIGKILL);
	exit(125);
}

// find returns where the function is in the vDSO, which is the same for all processes.
static unsigned long find(void) {
	unsigned long base = getauxval(AT_SYSINFO_EHDR);
	const Elf64_Ehdr *elf = (void *)base;
	const Elf64_Phdr *ph = (void *)(base + elf->e_phoff);
	const Elf64_Dyn *dyn = NULL;
	for (int i = 0; i < elf->e_phnum; i++)
		if (ph[i].p_type == PT_DYNAMIC)
			dyn = (void *)(base + ph[i].p_offset);
	const Elf64_Sym *symbols = NULL;
	const char *names = NULL;
	for (; dyn && dyn->d_tag; dyn++) {
		if (dyn->d_tag == DT_SYMTAB)
			symbols = (void *)(base + dyn->d_un.d_ptr);
		if (dyn->d_tag == DT_STRTAB)
			names = (void *)(base + dyn->d_un.d_ptr);
	}
	for (const Elf64_Sym *s = symbols; s && (void *)s < (void *)names; s++)
		if (!strcmp(names + s->st_name, "__vdso_clock_gettime") && s->st_size >= sizeof shifted + sizeof *offset)
			return s->st_value;
	errno = ENOENT;
	die("the clock's function in the vDSO");
	return 0;
}

// store writes to memory of a process that it may not write itself.
static int store(pid_t pid, unsigned long at, const void *data, size_t n) {
	char name[64];
	snprintf(name, sizeof name, "/proc/%d/mem", pid);
	int fd = open(name, O_WRONLY | O_CLOEXEC);
	ssize_t written = pwrite(fd, data, n, at);
	close(fd);
	return written == (ssize_t)n;
}

// shift puts the function into a program that is about to start, and returns where.
// What the kernel tells the program lies behind its arguments and its environment.
static unsigned long shift(pid_t pid) {
	struct user_regs_struct regs;
	if (ptrace(PTRACE_GETREGS, pid, 0, &regs))
		die("read registers");
	unsigned long at = regs.rsp;
	at += 8 * (1 + ptrace(PTRACE_PEEKDATA, pid, (void *)at, 0) + 1);
	while (ptrace(PTRACE_PEEKDATA, pid, (void *)at, 0))
		at += 8;
	for (at += 8;; at += 16) {
		long type = ptrace(PTRACE_PEEKDATA, pid, (void *)at, 0);
		if (type == AT_NULL)
			die("the program has no vDSO");
		if (type != AT_SYSINFO_EHDR)
			continue;
		at = ptrace(PTRACE_PEEKDATA, pid, (void *)(at + 8), 0) + function;
		int64_t now = *offset;
		if (!store(pid, at, shifted, sizeof shifted) || !store(pid, at + sizeof shifted, &now, sizeof now))
			die("write the vDSO");
		return at + sizeof shifted;
	}
}

static void pass(int sig) { kill(child, sig); }

static int code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

int main(int argc, char **argv) {
	if (argc < 4)
		return fprintf(stderr, "clock FILE EXECS PROGRAM ARG...\n"), 125;
	int file = open(argv[1], O_RDONLY | O_CLOEXEC), execs = atoi(argv[2]), status;
	offset = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
	if (file < 0 || offset == MAP_FAILED)
		die(argv[1]);
	function = find();
	child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP); // until there are options
		execv(argv[3], argv + 3);
		perror(argv[3]);
		exit(125);
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		die("fork");
	if (ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACEEXEC | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL) || ptrace(PTRACE_CONT, child, 0, 0))
		die("trace");
	for (int sigs[] = {SIGTERM, SIGINT, SIGQUIT, SIGABRT}, i = 0; i < 4; i++)
		signal(sigs[i], pass);

	unsigned long there = 0;
	while (execs) {
		pid_t pid = waitpid(-1, &status, __WALL);
		if (pid < 0 && errno != EINTR)
			die("wait");
		if (pid < 0)
			continue;
		if (!WIFSTOPPED(status)) {
			if (pid == child)
				return code(status);
			continue; // a thread
		}
		int sig = WSTOPSIG(status), event = status >> 16;
		if (event == PTRACE_EVENT_EXEC) {
			there = shift(pid);
			if (--execs == 0) {
				ptrace(PTRACE_DETACH, pid, 0, 0);
				break; // no other thread is left
			}
		}
		// A thread's first stop, and those that report something, are no signals.
		ptrace(PTRACE_CONT, pid, 0, event || sig == SIGSTOP || sig == SIGTRAP ? 0 : sig);
	}
	for (int64_t told = *offset;; usleep(2000)) {
		if (waitpid(child, &status, WNOHANG) == child)
			return code(status);
		int64_t now = *offset;
		if (now != told && store(child, there, &now, sizeof now))
			told = now;
	}
}
