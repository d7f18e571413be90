// Package netns makes the network namespaces of build steps.
//
// A namespace is held by an open file of this process and by nothing on the
// node's file system, so it goes away when the process dies, however it dies. A
// step in mode none sees a loopback device. A step in mode egress can connect to
// the world outside the node, and to nothing that the node itself offers: none of
// its addresses, no link-local address such as a metadata service, no other step.
// The one exception is port 53 of the node's own resolvers.
//
// Every process that uses the package claims a subnet with a locked file. The
// devices and the packet filter table carry the subnet in their name, so that
// the next process finds and removes what a killed one left.
package netns
