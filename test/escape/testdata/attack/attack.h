// Every attack prints what it got, and exits with 0.
int sys_main(int argc, char **argv);
int fds_main(int argc, char **argv);
int fdread_main(int argc, char **argv);
int read_main(int argc, char **argv);
int write_main(int argc, char **argv);
int chroot_main(int argc, char **argv);
int handle_main(int argc, char **argv);
int exewrite_main(int argc, char **argv);
int swap_main(int argc, char **argv);
int openall_main(int argc, char **argv);
int open_main(int argc, char **argv);
int scan_main(int argc, char **argv);
int cgroup_main(int argc, char **argv);
int serve_main(int argc, char **argv);
int ipc_main(int argc, char **argv);
int tcp_main(int argc, char **argv);
int kill_main(int argc, char **argv);

// print_content prints the start of what a descriptor gives, after a name, as text.
void print_content(const char *name, int fd);
