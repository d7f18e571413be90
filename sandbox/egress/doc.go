// Package egress says which addresses may be connected to on behalf of a build,
// and connects to no other.
//
// A build chooses what is fetched for it: sources by HTTP and git, images, where a
// registry's tokens come from, and where a server redirects to. None of it may
// reach what only the node can: its loopback, its own addresses, metadata
// services. The package promises that every connection of a Policy's dialer is
// judged by the address that the kernel is about to connect to, after names were
// resolved, so that neither a name that changes its address, nor a redirect, nor
// another way to write an address, gets around it. An IPv6 address in which an
// IPv4 address is wrapped is judged as both.
//
// The same list of denied ranges makes the packet filter of build steps; see
// package netns.
package egress
