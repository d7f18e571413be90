// Package buildopt turns the flags of kiln build, which are those of docker
// buildx build, into a request for BuildKit.
//
// It promises that everything that can be known to be wrong before a build
// starts is reported as an error that names the flag and the value, and that
// parsing neither writes a file nor opens a connection.
package buildopt
