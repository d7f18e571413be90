package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
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
	full, err := isFull(dir)
	if err != nil || !full {
		return err
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

// isFull tells whether the file system of dir has next to no room.
func isFull(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); errors.Is(err, unix.ENOENT) {
		return false, nil // it was removed
	} else if err != nil {
		return false, fmt.Errorf("look at free disk: %w", err)
	}
	return st.Bavail <= st.Blocks/fullShare || (st.Files > 0 && st.Ffree <= st.Files/fullShare), nil
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

// fileOp is a step of BuildKit's own that writes files, as COPY and ADD are. It keeps
// nothing when it has filled the disk.
type fileOp struct {
	solver.Op
	trees *notedTrees
}

// Exec implements solver.Op.
func (o fileOp) Exec(ctx context.Context, j solver.JobContext, inputs []solver.Result) ([]solver.Result, error) {
	out, err := o.Op.Exec(ctx, j, inputs)
	if err != nil {
		if derr := o.trees.discardWhenFull(); derr != nil {
			err = errors.Join(err, derr)
		}
	}
	return out, err
}

// notedTrees is a cache that notes the trees that are made in it to be written to.
type notedTrees struct {
	cache.Manager

	mu    sync.Mutex // guards trees
	trees []sandbox.Tree
}

// New implements cache.Accessor.
func (n *notedTrees) New(ctx context.Context, parent cache.ImmutableRef, s session.Group, opts ...cache.RefOption) (cache.MutableRef, error) {
	ref, tree, err := newTree(ctx, n.Manager, parent, s, opts)
	if err == nil {
		n.mu.Lock()
		n.trees = append(n.trees, tree)
		n.mu.Unlock()
	}
	return ref, err
}

func (n *notedTrees) discardWhenFull() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, t := range n.trees {
		errs = append(errs, discardWhenFull(t))
	}
	n.trees = nil
	return errors.Join(errs...)
}

// newTree makes a tree in a cache, and returns where it is.
func newTree(ctx context.Context, c cache.Accessor, parent cache.ImmutableRef, s session.Group, opts []cache.RefOption) (cache.MutableRef, sandbox.Tree, error) {
	ref, err := c.New(ctx, parent, s, opts...)
	if err != nil {
		return nil, sandbox.Tree{}, err
	}
	tree, err := placeOf(ctx, ref, s)
	if err != nil {
		return nil, sandbox.Tree{}, errors.Join(err, ref.Release(context.WithoutCancel(ctx)))
	}
	return ref, tree, nil
}

func placeOf(ctx context.Context, ref cache.MutableRef, s session.Group) (sandbox.Tree, error) {
	m, err := ref.Mount(ctx, false, s)
	if err != nil {
		return sandbox.Tree{}, err
	}
	mounts, release, err := layersOf(m).Mount()
	if err != nil {
		return sandbox.Tree{}, err
	}
	tree, _, err := parseMounts(mounts)
	if release != nil {
		err = errors.Join(err, release())
	}
	return tree, err
}

// downloads is a cache for what is fetched. It keeps nothing of a download that has
// filled the disk.
type downloads struct{ cache.Accessor }

// New implements cache.Accessor.
func (d downloads) New(ctx context.Context, parent cache.ImmutableRef, s session.Group, opts ...cache.RefOption) (cache.MutableRef, error) {
	ref, tree, err := newTree(ctx, d.Accessor, parent, s, opts)
	if err != nil {
		return nil, err
	}
	return &download{MutableRef: ref, tree: tree}, nil
}

// download is a tree that a download goes to. One that fails is released without having
// been committed. It has one user.
type download struct {
	cache.MutableRef
	tree      sandbox.Tree
	committed bool
}

// Commit implements cache.MutableRef.
func (d *download) Commit(ctx context.Context) (cache.ImmutableRef, error) {
	ref, err := d.MutableRef.Commit(ctx)
	d.committed = err == nil
	return ref, err
}

// Release implements cache.Ref.
func (d *download) Release(ctx context.Context) error {
	if d.committed {
		return d.MutableRef.Release(ctx)
	}
	return errors.Join(discardWhenFull(d.tree), d.MutableRef.Release(ctx))
}
