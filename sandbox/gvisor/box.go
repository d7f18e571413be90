package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
)

// kind is what has to be known of a step before its sandbox can be started.
type kind struct {
	network  sandbox.NetworkMode
	hostname string
	// sockets lets the step connect to sockets of the node that are mounted.
	sockets bool
}

// box is a sandbox that runs and waits for a step, or has one. It has seen no
// input of anyone before it gets its first step, and is thrown away when no successor of
// that comes.
type box struct {
	r    *Runtime
	kind kind
	id   string
	// dir holds everything of the sandbox; tmp, a tmpfs in it, all but what may
	// grow.
	dir, tmp string
	net      sandbox.Network
	cgroup   *cgroup.Group
	ctl      control
	// conn ends when the sandbox is gone, which closes exited.
	conn   *net.UnixConn
	exited chan struct{}
	// steps counts those that it has had. next is what a further one must be; nil: it
	// gets none. releasing is what the former ones release yet.
	steps     int
	next      *successor
	expiry    *time.Timer
	releasing sync.WaitGroup
	// defers release things, the last first.
	defers []func() error
}

// newBox starts a sandbox. Its root container runs the pause program and nothing
// else; the step's container joins it later.
func (r *Runtime) newBox(ctx context.Context, k kind) (_ *box, err error) {
	b := &box{r: r, kind: k, id: r.boxID()}
	b.dir = filepath.Join(r.stepsDir(), b.id)
	b.tmp = filepath.Join(b.dir, "t")
	defer func() {
		if err != nil {
			left := b.release()
			r.pool.fail(left) // nobody may wait for this sandbox
			err = errors.Join(err, left)
		}
	}()
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of the sandbox: %w", err)
	}
	b.defers = append(b.defers, b.forget)
	if b.cgroup, err = r.cgroups.Make(r.cgroupOf(b.id)); err != nil {
		return nil, err
	}
	for _, d := range []string{b.tmp, b.runscRoot()} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount("kiln", b.tmp, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0711"); err != nil {
		return nil, fmt.Errorf("mount working files of the sandbox: %w", err)
	}
	b.defers = append(b.defers, func() error { return unix.Unmount(b.tmp, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
	if k.network != sandbox.NetworkNone {
		if r.cfg.Networks == nil {
			return nil, errors.New("this runtime has no networks for steps")
		}
		if b.net, err = r.cfg.Networks.Acquire(ctx, k.network); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
		b.defers = append(b.defers, b.net.Release)
	}
	if err := b.start(ctx); err != nil {
		return nil, err
	}
	if err := b.checkVersion(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *box) runscRoot() string { return filepath.Join(b.dir, "runsc") }

// fewCPUs is up to how many processors of a node a sandbox sleeps where gVisor would
// spin for some microseconds, on both sides of a system call: a processor that spins
// is then one that the step's other processes, or other steps, wait for. Measured with
// 2, where compiling takes a tenth less time without; with many, gVisor decides.
const fewCPUs = 4

// flags are runsc's; everything that could weaken the sandbox is at its safe
// default or named here.
func (b *box) flags() []string {
	flags := []string{
		"--root=" + b.runscRoot(), "--shared-root=" + b.r.sharedDir(),
		"--platform=systrap", "--host-settings=ignore", "--net-raw=false", "--allow-suid=true",
		"--ignore-cgroups=true", "--host-fifo=none", "--gvisor-marker-file=true", "--overlay2=none",
	}
	add := func(cond bool, yes, no string) {
		if cond {
			flags = append(flags, yes)
		} else {
			flags = append(flags, no)
		}
	}
	add(b.kind.network == sandbox.NetworkNone, "--network=none", "--network=sandbox")
	add(b.kind.sockets, "--host-uds=open", "--host-uds=none")
	if runtime.NumCPU() <= fewCPUs {
		flags = append(flags, "--systrap-disable-fast-path=true")
	}
	return flags
}

// writeSpec writes the bundle of the sandbox's own container.
func (b *box) writeSpec() (bundle string, err error) {
	netns := ""
	if b.net != nil {
		netns = b.net.Path()
	}
	bundle = filepath.Join(b.tmp, "bundle")
	root := filepath.Join(bundle, "none")
	spec := &specs.Spec{
		Version: "1.2.0", Hostname: b.kind.hostname,
		Process: &specs.Process{Args: []string{"pause"}, Cwd: "/", Capabilities: &specs.LinuxCapabilities{}, NoNewPrivileges: true,
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1 << 20}}},
		Root: &specs.Root{Path: root},
		Annotations: map[string]string{
			"dev.gvisor.spec.rootfs.source": b.r.image, "dev.gvisor.spec.rootfs.type": "erofs", "dev.gvisor.spec.rootfs.overlay": "memory",
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: netns},
		}},
	}
	return bundle, writeBundle(bundle, spec)
}

// writeBundle writes a spec and the empty directory that its root names.
func writeBundle(bundle string, spec *specs.Spec) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode the runtime spec: %w", err)
	}
	if err := os.MkdirAll(spec.Root.Path, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600)
}

// environment is that of starters. They make little garbage and collect it late; one
// processor is enough for them. The sandboxes do not inherit it.
func environment(tmp string) []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=" + tmp, "GOGC=off", "GOMEMLIMIT=64MiB", "GOMAXPROCS=1"}
}

// start starts the sandbox.
func (b *box) start(ctx context.Context) error {
	bundle, err := b.writeSpec()
	if err != nil {
		return err
	}
	enter, leave, err := b.cgroup.Entrances()
	if err != nil {
		return err
	}
	conn, err := b.r.starters.start(ctx, startRequest{
		Flags: b.flags(), ID: containerID, Bundle: bundle, Program: b.r.pause, Enter: enter, Leave: leave,
	})
	if err != nil {
		return fmt.Errorf("start the sandbox: %w", err)
	}
	b.conn, b.exited = conn, make(chan struct{})
	go func() {
		defer close(b.exited)
		_, _ = io.Copy(io.Discard, conn)
	}()
	b.defers = append(b.defers, b.waitKilled)
	b.ctl = control{socket: filepath.Join(b.runscRoot(), "runsc-"+containerID+".sock")}
	return nil
}

// alive tells whether the sandbox runs.
func (b *box) alive() bool {
	select {
	case <-b.exited:
		return false
	default:
		return true
	}
}

// kill sends the sandbox to its end without waiting for it.
func (b *box) kill() {
	if b.conn == nil {
		return
	}
	if st, err := readState(b.runscRoot()); err == nil {
		_ = signalOurs(st.Sandbox.PID, b.dir)
	}
	// In any case whoever started it ends it now.
	_ = b.conn.CloseWrite()
}

// waitKilled ends the sandbox and waits until nothing of it is left.
func (b *box) waitKilled() error {
	b.kill()
	defer b.conn.Close()
	select {
	case <-b.exited:
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("the sandbox does not end although it is killed")
	}
}

// forget removes the cgroup of the sandbox, and then its directory, by which the next
// process would find the cgroup if it could not be removed.
func (b *box) forget() error {
	if err := b.removeCgroup(); err != nil {
		return err
	}
	return os.RemoveAll(b.dir)
}

// release ends the sandbox and gives back everything that it holds.
func (b *box) release() error {
	b.kill()
	b.releasing.Wait()
	var errs []error
	for i := len(b.defers) - 1; i >= 0; i-- {
		if err := b.defers[i](); err != nil {
			errs = append(errs, err)
		}
	}
	b.defers = nil
	if len(errs) > 0 {
		return fmt.Errorf("release: %w", errors.Join(errs...))
	}
	return nil
}
