// Package gitcmd puts a git on the PATH that reaches only what an egress.Policy
// allows.
//
// What a build fetches by git is fetched by the program git, with a URL, submodules
// and redirects that others write. The package promises that this program, and
// whatever it starts, runs in a network namespace in which there is nothing but a
// proxy of this process, which connects by the policy's dialer. HTTP and HTTPS go
// to the proxy by themselves, ssh and git:// by a command that asks it for a
// connection; all else finds no network.
//
// The git on the PATH is this process's own program, started again: it enters the
// namespace before main and becomes the real git. So a program that calls Install
// needs no other file, and needs the right to enter network namespaces
// (CAP_SYS_ADMIN).
package gitcmd
