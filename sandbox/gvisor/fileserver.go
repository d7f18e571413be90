package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// fileServer is the process that opens the step's files for the sandbox: runsc's
// gofer, in namespaces of its own, of which only the slots are left.
//
// It is started before the step is known. What the step needs is mounted on the
// slots later; the mounts propagate to the server, which looks into a slot when
// the sandbox first asks for it and not before.
type fileServer struct {
	cmd    *exec.Cmd
	exited chan struct{}
	log    tail
	// ready holds what the server says when its slots are in place.
	ready *os.File
	// slots are all slots; root, which comes first, and dirs and files are the free
	// ones.
	slots       []slot
	root        slot
	dirs, files []slot
}

// slot is a place of the node that a mount of the step is shown at, and the
// sandbox's end of the connection that serves it.
type slot struct {
	path string
	conn *os.File
}

// startFiles makes the slots and starts the server of the sandbox.
func (b *box) startFiles() (err error) {
	s := &fileServer{exited: make(chan struct{})}
	dir := filepath.Join(b.tmp, "slots")
	theirs, err := s.makeSlots(dir, b.kind)
	b.defers = append(b.defers, s.closeSlots)
	defer closeAll(theirs)
	if err != nil {
		return err
	}
	// Only what is below dir propagates, to the server's copy of it.
	for _, flags := range []uintptr{unix.MS_BIND, unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, unix.MS_SHARED} {
		if err := unix.Mount(dir, dir, "", flags, ""); err != nil {
			return fmt.Errorf("prepare %s: %w", dir, err)
		}
	}
	bundle := filepath.Join(b.tmp, "slots-bundle")
	spec := &specs.Spec{
		Version: "1.2.0", Root: &specs.Root{Path: filepath.Join(bundle, "none")},
		Process: &specs.Process{Args: []string{"none"}, Cwd: "/"},
		Linux:   &specs.Linux{},
	}
	for i, m := range s.slots {
		mode := "rw"
		if i == 0 {
			mode = "ro" // a sandbox never writes to layers
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/" + filepath.Base(m.path), Type: "bind", Source: m.path, Options: []string{"bind", mode}})
	}
	if err := writeBundle(bundle, spec); err != nil {
		return err
	}
	if err := s.start(b, bundle, theirs); err != nil {
		return err
	}
	b.files = s
	b.defers = append(b.defers, s.waitKilled)
	// One limit holds for the sandbox and its file server.
	if err := b.cgroup.Add(s.cmd.Process.Pid); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, "files-pid"), []byte(strconv.Itoa(s.cmd.Process.Pid)), 0o600)
}

// makeSlots makes the places below dir and a connection for each. It returns the
// server's ends.
func (s *fileServer) makeSlots(dir string, k kind) (theirs []*os.File, err error) {
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, err
	}
	add := func(name string, file bool) (slot, error) {
		p := filepath.Join(dir, name)
		if file {
			if err := os.WriteFile(p, nil, 0o444); err != nil {
				return slot{}, err
			}
		} else if err := os.Mkdir(p, 0o555); err != nil {
			return slot{}, err
		}
		sandbox, server, err := socketPair(unix.SOCK_STREAM)
		if err != nil {
			return slot{}, err
		}
		theirs = append(theirs, server)
		m := slot{path: p, conn: sandbox}
		s.slots = append(s.slots, m)
		return m, nil
	}
	if s.root, err = add("root", false); err != nil {
		return theirs, err
	}
	for i := range k.dirs + k.files {
		m, err := add(fmt.Sprintf("m%d", i), i >= k.dirs)
		if err != nil {
			return theirs, err
		}
		if i < k.dirs {
			s.dirs = append(s.dirs, m)
		} else {
			s.files = append(s.files, m)
		}
	}
	return theirs, nil
}

// take hands out a free slot.
func (s *fileServer) take(file bool) (slot, error) {
	free := &s.dirs
	if file {
		free = &s.files
	}
	if len(*free) == 0 {
		return slot{}, errors.New("no free place for a mount")
	}
	m := (*free)[0]
	*free = (*free)[1:]
	return m, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// start starts the server with its ends of the connections.
func (s *fileServer) start(b *box, bundle string, theirs []*os.File) error {
	spec, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return err
	}
	defer spec.Close()
	ready, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer readyW.Close()
	// The server could ask for files that it may not open itself; it gets none.
	nobody, rpc, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		ready.Close()
		return err
	}
	nobody.Close()
	defer rpc.Close()

	confs, io := []string{"none:memory"}, []string{}
	for i := range theirs {
		confs = append(confs, "lisafs:none")
		io = append(io, strconv.Itoa(6+i))
	}
	args := append(b.flags(), "gofer", "--bundle="+bundle, "--gofer-mount-confs="+strings.Join(confs, ","),
		"--spec-fd=3", "--mounts-fd=4", "--rpc-fd=5", "--io-fds="+strings.Join(io, ","), containerID)
	s.cmd = exec.Command(b.r.runsc, args...)
	s.cmd.Stderr = &s.log
	s.cmd.ExtraFiles = append([]*os.File{spec, readyW, rpc}, theirs...)
	s.cmd.Env = environment(b.tmp)
	s.cmd.WaitDelay = time.Second
	s.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, Pdeathsig: unix.SIGKILL,
		// The identity in a user namespace takes away all power over the node's.
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: identity("uid"), GidMappings: identity("gid"), GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{},
	}
	if err := startOffline(s.cmd); err != nil {
		ready.Close()
		return err
	}
	s.ready = ready
	go func() {
		defer close(s.exited)
		_ = s.cmd.Wait()
	}()
	return nil
}

// identity maps every ID that this process knows to itself.
func identity(which string) []syscall.SysProcIDMap {
	data, err := os.ReadFile("/proc/self/" + which + "_map")
	if err != nil {
		return nil
	}
	var out []syscall.SysProcIDMap
	for line := range strings.Lines(string(data)) {
		var inside, outside, size int
		if n, _ := fmt.Sscan(line, &inside, &outside, &size); n == 3 {
			out = append(out, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: size})
		}
	}
	return out
}

// offline starts processes from one thread that is in a network namespace of its
// own, which has nothing in it.
var offline = sync.OnceValues(func() (chan func(), error) {
	calls := make(chan func())
	made := make(chan error)
	go func() {
		// The thread never leaves, so no other code runs on it.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		made <- err
		if err != nil {
			return
		}
		for f := range calls {
			f()
		}
	}()
	return calls, <-made
})

func startOffline(cmd *exec.Cmd) error {
	calls, err := offline()
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	done := make(chan error)
	calls <- func() { done <- cmd.Start() }
	return <-done
}

// wait waits until the slots are in place.
func (s *fileServer) wait(ctx context.Context) error {
	defer s.ready.Close()
	stop := context.AfterFunc(ctx, func() { _ = s.ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(s.ready, 1<<20))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil && len(said) == 0 {
		err = errors.New(s.log.String())
	}
	return err
}

func (s *fileServer) kill() { _ = s.cmd.Process.Kill() }

func (s *fileServer) waitKilled() error {
	s.kill()
	<-s.exited
	s.ready.Close()
	return nil
}

func (s *fileServer) closeSlots() error {
	for _, m := range s.slots {
		m.conn.Close()
	}
	return nil
}
