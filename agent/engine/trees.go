package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	units "github.com/docker/go-units"
	"github.com/moby/buildkit/executor"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// treeOf returns the tree that m shows and whether it may only be read. release
// gives the tree back when the step has ended.
func treeOf(ctx context.Context, m executor.Mount) (tree sandbox.Tree, readonly bool, release func() error, err error) {
	ref, err := m.Src.Mount(ctx, m.Readonly)
	if err != nil {
		return sandbox.Tree{}, false, nil, err
	}
	mounts, release, err := layersOf(ref).Mount()
	if err != nil {
		return sandbox.Tree{}, false, nil, err
	}
	if release == nil {
		release = func() error { return nil }
	}
	tree, readonly, err = parseMounts(mounts)
	if err == nil && hidesLayers(tree) {
		err = fmt.Errorf("%s is an overlay mount: BuildKit did not tell its layers", tree.Dir)
	}
	if err != nil {
		return sandbox.Tree{}, false, nil, errors.Join(err, release())
	}
	return tree, readonly || m.Readonly, release, nil
}

// layersOf returns the mountable that tells the layers of ref. BuildKit wraps a
// writable snapshot into a mountable that mounts its overlay on the node and
// hands out bind mounts of that, which hides the layers and costs a mount a
// step. There is no accessor for the snapshot's own mountable, so the embedded
// field is read; treeOf refuses what is hidden all the same.
func layersOf(ref executor.MountableRef) executor.MountableRef {
	v := reflect.ValueOf(ref)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct || v.Elem().Type().Name() != "sharableMountable" {
		return ref
	}
	field := v.Elem().FieldByName("Mountable")
	if !field.IsValid() {
		return ref
	}
	if inner, ok := field.Interface().(executor.MountableRef); ok {
		return inner
	}
	return ref
}

// hidesLayers reports whether a directory is itself an overlay, whose layers
// cannot be shifted into a user namespace.
func hidesLayers(t sandbox.Tree) bool {
	var st unix.Statfs_t
	return t.Dir != "" && unix.Statfs(t.Dir, &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// parseMounts reads the one mount that BuildKit makes for a snapshot, a cache, a
// secret, a socket or a tmpfs.
func parseMounts(mounts []mount.Mount) (sandbox.Tree, bool, error) {
	if len(mounts) != 1 {
		return sandbox.Tree{}, false, fmt.Errorf("want one mount, got %d", len(mounts))
	}
	m := mounts[0]
	readonly := m.ReadOnly()
	switch m.Type {
	case "bind", "rbind":
		return sandbox.Tree{Dir: m.Source}, readonly, nil
	case "tmpfs":
		t := &sandbox.Tmpfs{}
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "size="); ok {
				n, err := units.RAMInBytes(v)
				if err != nil {
					return sandbox.Tree{}, false, fmt.Errorf("tmpfs size %q: %w", v, err)
				}
				t.Size = n
			}
		}
		return sandbox.Tree{Tmpfs: t}, readonly, nil
	case "overlay":
		var t sandbox.Tree
		for _, o := range m.Options {
			k, v, _ := strings.Cut(o, "=")
			switch k {
			case "lowerdir":
				// The state directory has no colon; see checkedRoot.
				t.Lower = strings.Split(v, ":")
			case "upperdir":
				t.Upper = v
			case "workdir":
				t.Work = v
			}
		}
		return t, readonly || t.Upper == "", nil
	}
	return sandbox.Tree{}, false, fmt.Errorf("mount type %q is not known", m.Type)
}

// isSocket reports whether path on the node is a unix socket.
func isSocket(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode()&os.ModeSocket != 0
}
