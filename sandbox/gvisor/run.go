package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor/upper"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// Run implements sandbox.Runtime.
func (r *Runtime) Run(ctx context.Context, step *sandbox.Step, started func()) (_ *sandbox.Result, err error) {
	if err := step.Validate(); err != nil {
		return nil, fmt.Errorf("gvisor: step: %w", err)
	}
	s := &stepRun{r: r, step: step, dir: filepath.Join(r.stepsDir(), step.ID)}
	defer func() {
		err = errors.Join(err, s.release())
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			err = fmt.Errorf("gvisor: step %s: %w", step.ID, err)
		}
	}()
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	res, err := s.runProcess(ctx, started)
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	if err := s.collect(ctx); err != nil {
		return nil, s.explain(ctx, err)
	}
	return res, nil
}

// explain says so when err comes from the end of the sandbox.
func (s *stepRun) explain(ctx context.Context, err error) error {
	select {
	case <-s.exited:
	case <-ctx.Done():
		return err
	case <-time.After(100 * time.Millisecond):
		return err
	}
	return fmt.Errorf("the sandbox ended before what the step wrote was collected; "+
		"a step must not kill process 1, nor use more memory than its limit: %w", err)
}

// stepRun is one step on its way through Run.
type stepRun struct {
	r    *Runtime
	step *sandbox.Step
	// dir holds everything of the step; tmp, a tmpfs in it, all but what may grow.
	dir, tmp, rootfs string
	readonly         bool
	noNewPrivs       bool
	ids              sandbox.UserIDs
	// defers release things, the last first.
	defers []func() error

	cmd *exec.Cmd
	// exited is closed when runsc, and with it the sandbox, is gone.
	exited chan struct{}
	log    tail
	ctl    control
	copies *stdio
}

// overlaid tells whether the sandbox keeps writes to the root to itself.
func (s *stepRun) overlaid() bool { return len(s.step.Root.Lower) > 0 }

// collects tells whether there are writes to take out at the end.
func (s *stepRun) collects() bool { return s.step.Root.Upper != "" && !s.step.ReadonlyRoot }

func (s *stepRun) prepare(ctx context.Context) error {
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return fmt.Errorf("make directory of the step: %w", err)
	}
	s.defers = append(s.defers, func() error { return os.RemoveAll(s.dir) })
	s.tmp = filepath.Join(s.dir, "t")
	s.rootfs = filepath.Join(s.tmp, "rootfs")
	for _, d := range []string{s.tmp, s.runscRoot(), s.filestore()} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Mount("kiln", s.tmp, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0711"); err != nil {
		return fmt.Errorf("mount working files of the step: %w", err)
	}
	s.defers = append(s.defers, func() error { return unix.Unmount(s.tmp, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
	if err := s.mountRoot(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	var err error
	if s.ids, err = sandbox.ResolveUser(s.rootfs, s.step.Process.User); err != nil {
		return err
	}
	s.noNewPrivs = !sandbox.NeedsSetuid(s.rootfs)
	return s.prepareSpec(ctx)
}

func (s *stepRun) prepareSpec(ctx context.Context) error {
	var net sandbox.Network
	netns := ""
	if s.step.Network != sandbox.NetworkNone {
		if s.r.cfg.Networks == nil {
			return errors.New("this runtime has no networks for steps")
		}
		var err error
		if net, err = s.r.cfg.Networks.Acquire(ctx, s.step.Network); err != nil {
			return fmt.Errorf("network: %w", err)
		}
		s.defers = append(s.defers, net.Release)
		netns = net.Path()
	}
	var nameservers = netNameservers(net)
	mounts, err := s.prepareMounts(nameservers)
	if err != nil {
		return err
	}
	if !s.overlaid() {
		// The mount points are made in the tree itself.
		var dests []string
		for _, m := range mounts {
			dests = append(dests, m.Destination)
		}
		s.defers = append(s.defers, sandbox.RecordStubs(s.step.Root, dests).Remove)
	}
	return s.writeSpec(netns, mounts)
}

// mountRoot shows the root. Layers are shown below a scratch layer, which takes
// the mount points that the sandbox needs, and which nobody keeps.
func (s *stepRun) mountRoot() error {
	tree := s.step.Root
	s.readonly = s.step.ReadonlyRoot || s.overlaid() && tree.Upper == ""
	opts := stepfs.Options{Suid: true, Volatile: true}
	if s.overlaid() {
		lower := tree.Lower
		if tree.Upper != "" && !emptyDir(tree.Upper) {
			lower = append([]string{tree.Upper}, lower...)
		}
		u, w := filepath.Join(s.tmp, "u"), filepath.Join(s.tmp, "w")
		if err := copyRootAttrs(u, tree); err != nil {
			return err
		}
		if err := os.Mkdir(w, 0o700); err != nil {
			return err
		}
		tree = sandbox.Tree{Lower: lower, Upper: u, Work: w}
	}
	unmount, err := stepfs.Make(tree, s.rootfs, opts)
	if err != nil {
		return err
	}
	s.defers = append(s.defers, unmount)
	return nil
}

// copyRootAttrs makes the scratch layer's root like the one that it hides.
func copyRootAttrs(dir string, tree sandbox.Tree) error {
	from := tree.Upper
	if from == "" {
		from = tree.Lower[0]
	}
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("stat %s: %w", from, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Chown(dir, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(dir, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func emptyDir(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	return errors.Is(err, io.EOF)
}

func (s *stepRun) runscRoot() string { return filepath.Join(s.dir, "runsc") }
func (s *stepRun) filestore() string { return filepath.Join(s.dir, "writes") }

// flags are runsc's; everything that could weaken the sandbox is at its safe
// default or named here.
func (s *stepRun) flags() []string {
	flags := []string{
		"--root=" + s.runscRoot(), "--shared-root=" + s.r.sharedDir(),
		"--platform=systrap", "--host-settings=ignore", "--net-raw=false", "--allow-suid=true",
		"--host-fifo=none", "--gvisor-marker-file=true",
	}
	add := func(cond bool, yes, no string) {
		if cond {
			flags = append(flags, yes)
		} else {
			flags = append(flags, no)
		}
	}
	add(s.step.Network == sandbox.NetworkNone, "--network=none", "--network=sandbox")
	add(s.overlaid() && !s.readonly, "--overlay2=root:dir="+s.filestore(), "--overlay2=none")
	add(s.r.cfg.CgroupParent == "", "--ignore-cgroups=true", "--ignore-cgroups=false")
	socket := false
	for _, m := range s.step.Mounts {
		socket = socket || m.Socket
	}
	add(socket, "--host-uds=open", "--host-uds=none")
	return flags
}

// start starts the sandbox and waits until its first process runs.
func (s *stepRun) start(ctx context.Context) error {
	ready, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := append(s.flags(), "run", "--bundle="+s.bundle(), "--exec-fd=3", containerID)
	s.cmd = exec.Command(s.r.runsc, args...)
	s.cmd.Stdout, s.cmd.Stderr = w, &s.log
	s.cmd.ExtraFiles = []*os.File{s.r.pause}
	s.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=" + s.tmp}
	s.cmd.WaitDelay = time.Second
	s.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	err = startLocked(s.cmd)
	w.Close()
	if err != nil {
		return fmt.Errorf("start runsc: %w", err)
	}
	s.exited = make(chan struct{})
	go func() {
		defer close(s.exited)
		_ = s.cmd.Wait()
	}()
	s.defers = append(s.defers, s.kill)
	if err := os.WriteFile(filepath.Join(s.dir, "pid"), []byte(strconv.Itoa(s.cmd.Process.Pid)), 0o600); err != nil {
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
		s.log.Write(buf[:n])
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("start the sandbox: %s", s.log.String())
		}
	}
	s.ctl = control{socket: filepath.Join(s.runscRoot(), "runsc-"+containerID+".sock")}
	return nil
}

// kill ends the sandbox and reaps its processes. runsc reaps the others once the
// sandbox is gone; it is killed itself only when it does not.
func (s *stepRun) kill() error {
	st, err := readState(s.runscRoot())
	if err == nil {
		for _, pid := range []int{st.Sandbox.PID, st.GoferPID} {
			_ = killOurs(context.Background(), pid, s.dir)
		}
		select {
		case <-s.exited:
			return nil
		case <-time.After(500 * time.Millisecond):
		}
	}
	_ = s.cmd.Process.Kill()
	<-s.exited
	return nil
}

// collect takes the writes out of the sandbox. All its processes are stopped
// first, so that what the step left running cannot change them meanwhile.
func (s *stepRun) collect(ctx context.Context) error {
	if !s.collects() {
		return nil
	}
	if err := s.ctl.call(ctx, methodPause, struct{}{}, nil, nil); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	sent := make(chan error, 1)
	go func() {
		err := s.ctl.call(ctx, methodTar, tarArgs{containerID}, []*os.File{w}, nil)
		w.Close()
		sent <- err
	}()
	lower := s.step.Root.Lower
	err = upper.Apply(ctx, s.step.Root.Upper, r, upper.Options{Lower: lower})
	if err == nil {
		// The stream is padded; the sandbox has to get rid of all of it.
		_, err = io.Copy(io.Discard, r)
	}
	r.Close()
	if sendErr := <-sent; sendErr != nil {
		// A broken stream has its cause at the sender, unless we stopped reading.
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			err = sendErr
		}
	}
	if err != nil {
		return fmt.Errorf("collect what the step wrote: %w", err)
	}
	return nil
}

// release gives back everything that the step holds.
func (s *stepRun) release() error {
	var errs []error
	for i := len(s.defers) - 1; i >= 0; i-- {
		if err := s.defers[i](); err != nil {
			errs = append(errs, err)
		}
	}
	s.defers = nil
	if s.copies != nil {
		s.copies.finish()
	}
	if len(errs) > 0 {
		return fmt.Errorf("release: %w", errors.Join(errs...))
	}
	return nil
}

// tail keeps the last of what runsc says, for errors.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 2048

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailSize; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.buf) == 0 {
		return "runsc ended without a message"
	}
	return strings.TrimSpace(string(t.buf))
}
