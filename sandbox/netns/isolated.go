package netns

import "os"

// Isolated makes a network namespace that has nothing but a loopback device, and
// calls inside on a thread that is in it: a socket that it opens stays in the
// namespace, whoever uses it later. inside must not start goroutines that are to
// be there too. The namespace lasts as long as the file, a process or a socket is
// open that belongs to it.
func Isolated(inside func() error) (*os.File, error) {
	return newNamespace(func(*os.File) error { return inside() })
}
