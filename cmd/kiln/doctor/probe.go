package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor"
	"github.com/kiln-build/kiln/sandbox/userns"
)

// overlay mounts an overlay on the file system of root.
func overlay(root string) (_ string, err error) {
	const fix = "put the state directory on ext4 or xfs with --root; an overlay cannot lie on another overlay or on NFS."
	dir, remove, err := scratch(root)
	if err != nil {
		return "", problem(fix, "%w", err)
	}
	defer remove()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return "", problem(fix, "%w", err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	merged := filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		return "", problem(fix, "mount overlay: %w", err)
	}
	defer func() {
		if uerr := unix.Unmount(merged, unix.MNT_DETACH); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount overlay: %w", uerr))
		}
	}()
	if err := os.WriteFile(filepath.Join(merged, "file"), nil, 0o600); err != nil {
		return "", problem(fix, "write to overlay: %w", err)
	}
	return "overlay mounts work below " + filepath.Dir(dir), nil
}

// unavailable turns what a runtime lacks into a problem.
func unavailable(err error) error {
	var ua *sandbox.UnavailableError
	if !errors.As(err, &ua) {
		return err
	}
	cause := "missing " + ua.Missing
	if ua.Err != nil {
		return problem(ua.Fix, "%s: %w", cause, ua.Err)
	}
	return problem(ua.Fix, "%s", cause)
}

// usernsStep runs a step in a user namespace, on the file system of root.
func usernsStep(ctx context.Context, root string) (string, error) {
	dir, remove, err := scratch(root)
	if err != nil {
		return "", problem("choose a directory that can be written with --root.", "%w", err)
	}
	defer remove()
	if err := userns.Check(ctx, userns.Config{StateDir: dir}); err != nil {
		return "", unavailable(err)
	}
	return "a step ran in a user namespace over idmapped layers", nil
}

// gvisorStep starts a sandbox of gVisor.
func gvisorStep(ctx context.Context, runsc string) (string, error) {
	if runsc == "" {
		return "", problem("install runsc first.", "there is no runsc")
	}
	if err := gvisor.Check(ctx, gvisor.Config{RunscPath: runsc}); err != nil {
		return "", unavailable(err)
	}
	return "a sandbox of gVisor started", nil
}
