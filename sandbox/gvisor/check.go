package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// checkTimeout bounds the start of a sandbox by Check. On some machines a sandbox
// does not fail to start, but hangs.
const checkTimeout = 20 * time.Second

// Check tells whether this node can run gVisor sandboxes, by starting one in a
// directory of its own below cfg.StateDir, or below the directory for temporary
// files when that is empty. What the node lacks is a *sandbox.UnavailableError.
func Check(ctx context.Context, cfg Config) (err error) {
	if _, err := findRunsc(cfg); err != nil {
		return err
	}
	if _, err := pauseProgram(); err != nil {
		return unavailable("support for this processor", "Use the userns sandbox on this node.", err)
	}
	if os.Geteuid() != 0 {
		return unavailable("root privileges", "Start the agent as root.", nil)
	}
	if err := probeMount(); err != nil {
		return unavailable("the right to mount (CAP_SYS_ADMIN)", "Give the agent's container CAP_SYS_ADMIN and no profile that denies mount.", err)
	}
	dir, err := os.MkdirTemp(cfg.StateDir, "kiln-gvisor-check-")
	if err != nil {
		return fmt.Errorf("gvisor: make directory for the check: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, fmt.Errorf("no sandbox within %v", checkTimeout))
	defer cancel()
	r, err := New(ctx, Config{RunscPath: cfg.RunscPath, StateDir: dir, CgroupParent: cfg.CgroupParent, Prepared: -1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	b, err := r.pool.take(ctx, usual(sandbox.NetworkNone))
	var missing *sandbox.UnavailableError
	if errors.As(err, &missing) {
		return err
	}
	if err != nil {
		return unavailable("a sandbox that starts", "Run as root, unconfined by seccomp and AppArmor, or use the userns sandbox.", err)
	}
	r.pool.discard(b)
	return nil
}

// probeMount asks for a file system without attaching it.
func probeMount() error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// stepVersion is the version of kiln's addition to runsc that this package knows.
const stepVersion = 4

const fixAddition = "Use the runsc that `make build` makes; gVisor's own lacks what kiln needs."

// endTime is how long it may take until the end of a sandbox that does not answer is known.
const endTime = 100 * time.Millisecond

// checkVersion asks a sandbox whether its runsc has kiln's addition.
func (b *box) checkVersion(ctx context.Context) error {
	var version int
	err := b.ctl.call(ctx, methodProbe, struct{}{}, nil, &version)
	if err == nil && version != stepVersion {
		err = fmt.Errorf("it has version %d, and %d is needed", version, stepVersion)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	select {
	case <-b.exited:
		return fmt.Errorf("the sandbox ended while it started: %w", err)
	case <-time.After(endTime):
		return unavailable("kiln's addition to runsc ("+methodProbe+" in "+b.r.runsc+")", fixAddition, err)
	}
}

func unavailable(missing, fix string, err error) error {
	return &sandbox.UnavailableError{Class: sandbox.GVisor, Missing: missing, Fix: fix, Err: err}
}

func findRunsc(cfg Config) (string, error) {
	name := cfg.RunscPath
	if name == "" {
		name = "runsc"
	}
	p, err := exec.LookPath(name)
	if err == nil {
		p, err = filepath.Abs(p)
	}
	if err != nil {
		missing := "runsc on the PATH"
		if cfg.RunscPath != "" {
			missing = "runsc at " + cfg.RunscPath
		}
		return "", unavailable(missing, "Build it with `make build`.", err)
	}
	return p, nil
}
