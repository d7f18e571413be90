// The attacks of test/escape that need system calls of their own: attack NAME ARGS.
#include <stdio.h>
#include <string.h>

#include "attack.h"

static const struct {
	const char *name;
	int (*run)(int, char **);
} attacks[] = {
	{"sys", sys_main}, {"fds", fds_main}, {"fdread", fdread_main}, {"read", read_main}, {"write", write_main},
	{"chroot", chroot_main}, {"handle", handle_main}, {"exewrite", exewrite_main}, {"swap", swap_main},
	{"open", open_main}, {"scan", scan_main}, {"cgroup", cgroup_main}, {"serve", serve_main}, {"ipc", ipc_main},
	{"openall", openall_main}, {"tcp", tcp_main}, {"kill", kill_main},
};

int main(int argc, char **argv) {
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; argc > 1 && i < sizeof attacks / sizeof *attacks; i++)
		if (!strcmp(argv[1], attacks[i].name)) return attacks[i].run(argc - 1, argv + 1);
	fprintf(stderr, "no such attack\n");
	return 2;
}
