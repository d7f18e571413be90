package stepfs

import (
	"fmt"
	"os"

	"github.com/kiln-build/kiln/sandbox"
)

// Detached is a mount that is at no place yet. Whoever has its descriptor, also in
// another mount namespace, can attach it with move_mount.
type Detached struct {
	// File is the descriptor of the mount. Until the mount is attached, it is gone
	// when File is closed.
	File *os.File
	// Dir tells whether a directory is mounted, or a file.
	Dir bool

	work string // of a volatile overlay
}

// Open returns a detached mount of tree. Call Close, and Settle at the end.
func Open(tree sandbox.Tree, opts Options) (*Detached, error) {
	fd, dir, err := detached(tree, opts)
	if err != nil {
		return nil, fmt.Errorf("make mount: %w", err)
	}
	d := &Detached{File: os.NewFile(uintptr(fd), "mount"), Dir: dir}
	if opts.Volatile && tree.Upper != "" {
		d.work = tree.Work
	}
	return d, nil
}

// Close closes the descriptor. It may be called again.
func (d *Detached) Close() error {
	if d.File == nil {
		return nil
	}
	f := d.File
	d.File = nil
	return f.Close()
}

// Settle does what remains when the mount is nowhere any more: the work directory of
// a volatile overlay is made fit for another use.
func (d *Detached) Settle() error {
	if d.work == "" {
		return nil
	}
	return ClearVolatile(d.work)
}
