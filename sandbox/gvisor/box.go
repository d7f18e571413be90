package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// kind is what has to be known of a step before its sandbox can be started.
type kind struct {
	network  sandbox.NetworkMode
	hostname string
	// sockets lets the step connect to sockets of the node that are mounted.
	sockets bool
	// dirs and files are how many places there are for mounts.
	dirs, files int
}

// box is a sandbox that runs and waits for a step, or has one. It has seen no
// input of anyone before it gets the step, and is thrown away after it.
type box struct {
	r    *Runtime
	kind kind
	id   string
	// dir holds everything of the sandbox; tmp, a tmpfs in it, all but what may
	// grow.
	dir, tmp string
	net      sandbox.Network
	ctl      control
	cmd      *exec.Cmd
	// exited is closed when runsc, and with it the sandbox, is gone.
	exited chan struct{}
	log    tail
	files  *fileServer
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
			err = errors.Join(err, b.release())
		}
	}()
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of the sandbox: %w", err)
	}
	b.defers = append(b.defers, func() error { return os.RemoveAll(b.dir) })
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
	if err := b.startFiles(); err != nil {
		return nil, fmt.Errorf("start the file server: %w", err)
	}
	if err := b.start(ctx); err != nil {
		return nil, err
	}
	if err := b.files.wait(ctx); err != nil {
		return nil, fmt.Errorf("start the file server: %w", err)
	}
	if err := b.checkVersion(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *box) runscRoot() string { return filepath.Join(b.dir, "runsc") }

// flags are runsc's; everything that could weaken the sandbox is at its safe
// default or named here.
func (b *box) flags() []string {
	flags := []string{
		"--root=" + b.runscRoot(), "--shared-root=" + b.r.sharedDir(),
		"--platform=systrap", "--host-settings=ignore", "--net-raw=false", "--allow-suid=true",
		"--host-fifo=none", "--gvisor-marker-file=true", "--overlay2=none",
	}
	add := func(cond bool, yes, no string) {
		if cond {
			flags = append(flags, yes)
		} else {
			flags = append(flags, no)
		}
	}
	add(b.kind.network == sandbox.NetworkNone, "--network=none", "--network=sandbox")
	add(b.r.cfg.CgroupParent == "", "--ignore-cgroups=true", "--ignore-cgroups=false")
	add(b.kind.sockets, "--host-uds=open", "--host-uds=none")
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
	if parent := b.r.cfg.CgroupParent; parent != "" {
		spec.Linux.CgroupsPath = path.Join("/", parent, b.id)
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

// environment is that of runsc. It collects no garbage while a sandbox starts; the
// start of the step's container ends that for the sandbox, and the limit for the
// others. One processor is enough for all but the sandbox, which does not take
// that from here.
func (b *box) environment() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=" + b.tmp, "GOGC=off", "GOMEMLIMIT=64MiB", "GOMAXPROCS=1"}
}

// start starts the sandbox and waits until its first process runs.
func (b *box) start(ctx context.Context) error {
	bundle, err := b.writeSpec()
	if err != nil {
		return err
	}
	ready, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := append(b.flags(), "run", "--bundle="+bundle, "--exec-fd=3", containerID)
	b.cmd = exec.Command(b.r.runsc, args...)
	b.cmd.Stdout, b.cmd.Stderr = w, &b.log
	b.cmd.ExtraFiles = []*os.File{b.r.pause}
	b.cmd.Env = b.environment()
	b.cmd.WaitDelay = time.Second
	b.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	err = startLocked(b.cmd)
	w.Close()
	if err != nil {
		return fmt.Errorf("start runsc: %w", err)
	}
	b.exited = make(chan struct{})
	go func() {
		defer close(b.exited)
		_ = b.cmd.Wait()
	}()
	b.defers = append(b.defers, b.waitKilled)
	if err := os.WriteFile(filepath.Join(b.dir, "pid"), []byte(strconv.Itoa(b.cmd.Process.Pid)), 0o600); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	// The pipe also closes when the sandbox does not start. What comes before
	// the byte of the first process is text of runsc.
	buf := make([]byte, 512)
	for {
		n, err := ready.Read(buf)
		if n > 0 && strings.IndexByte(string(buf[:n]), 1) >= 0 {
			break
		}
		b.log.Write(buf[:n])
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("start the sandbox: %s", b.log.String())
		}
	}
	b.ctl = control{socket: filepath.Join(b.runscRoot(), "runsc-"+containerID+".sock")}
	return nil
}

// alive tells whether the sandbox and its file server run.
func (b *box) alive() bool {
	select {
	case <-b.exited:
		return false
	case <-b.files.exited:
		return false
	default:
		return true
	}
}

// kill sends the sandbox and its file server to their end without waiting for it.
func (b *box) kill() {
	if b.files != nil {
		b.files.kill()
	}
	if b.cmd == nil {
		return
	}
	st, err := readState(b.runscRoot())
	if err == nil {
		err = signalOurs(st.Sandbox.PID, b.dir)
	}
	if err != nil {
		_ = b.cmd.Process.Kill()
	}
}

// waitKilled ends the sandbox and reaps its processes. runsc reaps the others
// once the sandbox is gone; it is killed itself only when it does not.
func (b *box) waitKilled() error {
	b.kill()
	select {
	case <-b.exited:
	case <-time.After(2 * time.Second):
		_ = b.cmd.Process.Kill()
		<-b.exited
	}
	return nil
}

// release ends the sandbox and gives back everything that it holds.
func (b *box) release() error {
	b.kill()
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
