package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// fullShare is the share of a disk's blocks or inodes, as a divisor, below which
// it counts as full.
const fullShare = 50

// discardWhenFull removes what a failed step wrote when its disk is full.
//
// BuildKit keeps the files of a failed step for clients that look into it, until
// the next collection. On a full disk they would make every later step fail too.
func discardWhenFull(root sandbox.Tree) error {
	dir := root.Upper
	if dir == "" {
		dir = root.Dir
	}
	if dir == "" {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at free disk: %w", err)
	}
	if st.Bavail > st.Blocks/fullShare && (st.Files == 0 || st.Ffree > st.Files/fullShare) {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("discard the failed step's files on a full disk: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// layerApplier unpacks layers, and keeps nothing of one that has filled the disk: its
// snapshot stays until the next collection, and until then every build would fail.
type layerApplier struct{ diff.Applier }

// Apply implements diff.Applier.
func (a layerApplier) Apply(ctx context.Context, desc ocispecs.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispecs.Descriptor, error) {
	d, err := a.Applier.Apply(ctx, desc, mounts, opts...)
	if err == nil {
		return d, nil
	}
	if tree, readonly, perr := parseMounts(mounts); perr == nil && !readonly {
		err = errors.Join(err, discardWhenFull(tree))
	}
	return d, err
}
