package userns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// checkTimeout bounds the step that Check runs.
const checkTimeout = 20 * time.Second

// Check tells whether this node can run steps of this class, by running one in a
// directory of its own below cfg.StateDir, or below the directory for temporary
// files when that is empty. What the node lacks is a *sandbox.UnavailableError.
//
// What most nodes lack is looked at first, so that it gets a name.
func Check(ctx context.Context, cfg Config) (err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return unavailable("CAP_SYS_ADMIN", "Run as root, or give the agent's container CAP_SYS_ADMIN.", err)
	}
	ns, err := newUserNS(FirstID)
	if err != nil {
		return unavailable("user namespaces", "Set the sysctl user.max_user_namespaces above 0.", err)
	}
	defer ns.Close()
	dir, err := os.MkdirTemp(cfg.StateDir, "kiln-userns-check-")
	if err != nil {
		return fmt.Errorf("userns: make directory for the check: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root, err := checkRoot(dir)
	if err != nil {
		return fmt.Errorf("userns: make files for the check: %w", err)
	}
	if err := tryOverlay(root, filepath.Join(dir, "target"), ns); err != nil {
		return unavailable("overlays of idmapped mounts", "Use Linux 6.13 or later, and ext4, xfs, btrfs or tmpfs for the state directory.", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, fmt.Errorf("no step within %v", checkTimeout))
	defer cancel()
	cgroups, err := openCgroups()
	if err != nil {
		return unavailable("the unified cgroup hierarchy (cgroup2)", "Use a kernel that has it, and let the agent mount.", err)
	}
	if err := cgroups.Close(); err != nil {
		return fmt.Errorf("userns: close cgroups: %w", err)
	}
	if err := runCheck(ctx, Config{StateDir: filepath.Join(dir, "state"), CgroupParent: cfg.CgroupParent, UIDRangeDir: cfg.UIDRangeDir}, root); err != nil {
		return unavailable("a sandbox that starts", "Run as root, unconfined by seccomp and AppArmor, or use the gvisor sandbox.", err)
	}
	return nil
}

func unavailable(missing, fix string, err error) error {
	return &sandbox.UnavailableError{Class: sandbox.Userns, Missing: missing, Fix: fix, Err: err}
}

// checkProgram is the program in the root of the step.
const checkProgram = "/init"

// checkRoot makes a root file system in dir with the only program that is always at
// hand: the one that runs scripts, which ends at once where nobody tells it any.
func checkRoot(dir string) (tree sandbox.Tree, err error) {
	tree = sandbox.Tree{Upper: filepath.Join(dir, "fs"), Work: filepath.Join(dir, "work"), Lower: []string{filepath.Join(dir, "lower")}}
	for _, d := range []string{tree.Upper, tree.Work, tree.Lower[0]} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return tree, err
		}
	}
	program, err := script.Program()
	if err != nil {
		return tree, err
	}
	defer program.Close()
	to, err := os.OpenFile(filepath.Join(tree.Lower[0], checkProgram), os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return tree, err
	}
	_, err = io.Copy(to, program)
	return tree, errors.Join(err, to.Close())
}

// tryOverlay mounts an overlay with shifted IDs at target, and tells whether the kernel
// would write to it.
func tryOverlay(tree sandbox.Tree, target string, ns *os.File) error {
	unmount, err := stepfs.Make(tree, target, stepfs.Options{IDMap: &stepfs.IDMap{UserNS: int(ns.Fd()), UID: FirstID, GID: FirstID}})
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	err = unix.Statfs(target, &st)
	if err == nil && st.Flags&unix.ST_RDONLY != 0 {
		err = errors.New("the overlay is read-only")
	}
	return errors.Join(err, unmount())
}

// runCheck runs a step.
func runCheck(ctx context.Context, cfg Config, root sandbox.Tree) (err error) {
	r, err := New(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	res, err := r.Run(ctx, &sandbox.Step{
		ID: "check", Root: root, Network: sandbox.NetworkNone,
		Process: sandbox.Process{Args: []string{checkProgram}, Cwd: "/"},
	}, nil)
	if err == nil && res.ExitCode != script.ExitUntold {
		err = fmt.Errorf("the step ended with exit code %d", res.ExitCode)
	}
	return err
}
