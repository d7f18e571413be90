package auth

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// stampOf follows symbolic links, which is how Kubernetes replaces the files of a
// secret.
func stampOf(path string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return stamp{}, &pathError{path, err}
	}
	return stamp{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, modify: time.Unix(st.Mtim.Unix()), chg: time.Unix(st.Ctim.Unix())}, nil
}

type pathError struct {
	path string
	err  error
}

func (e *pathError) Error() string { return e.path + ": " + e.err.Error() }
func (e *pathError) Unwrap() error { return e.err }

func equal(a, b []stamp) bool {
	return slices.EqualFunc(a, b, func(x, y stamp) bool {
		return x.dev == y.dev && x.ino == y.ino && x.size == y.size && x.modify.Equal(y.modify) && x.chg.Equal(y.chg)
	})
}
