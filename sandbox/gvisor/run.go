package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor/upper"
)

// Run implements sandbox.Runtime.
func (r *Runtime) Run(ctx context.Context, step *sandbox.Step, started func()) (_ *sandbox.Result, err error) {
	if err := step.Validate(); err != nil {
		return nil, fmt.Errorf("gvisor: step: %w", err)
	}
	s := &stepRun{r: r, step: step}
	defer func() {
		err = errors.Join(err, s.end())
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			err = fmt.Errorf("gvisor: step %s: %w", step.ID, err)
		}
	}()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := r.reserve(step.ID); err != nil {
		return nil, err
	}
	defer r.set(step.ID, nil)
	if s.box = r.pool.resume(step); s.box == nil {
		if s.box, err = r.pool.take(ctx, kindOf(step)); err != nil {
			return nil, err
		}
	}
	res, err := s.run(ctx, started)
	if err != nil && ctx.Err() == nil {
		if res, ok := s.endedByLimit(err); ok {
			return res, s.contacts(res)
		}
	}
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	if err := s.contacts(res); err != nil {
		return nil, err
	}
	s.keep(res)
	return res, nil
}

// run runs the step in its sandbox.
func (s *stepRun) run(ctx context.Context, started func()) (*sandbox.Result, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	if err := s.makeStore(); err != nil {
		return nil, err
	}
	watched, w, err := s.watch(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	res, err := s.runProcess(watched, started)
	if err != nil {
		var ended bool
		if res, ended = sandbox.EndedBy(err); !ended || ctx.Err() != nil {
			return nil, err
		}
		s.box.kill() // it is not asked for what the step wrote
	} else if err := s.collect(ctx, s.mayKeep(res)); err != nil {
		return nil, err
	}
	return res, s.conclude(res, w)
}

// enter prepares the sandbox for the step. One that the step succeeds another in has the
// same limits and network already.
func (s *stepRun) enter() error {
	n := strconv.Itoa(s.box.steps)
	s.tmp = filepath.Join(s.box.tmp, n)
	// runsc ends a container by its ID when the connections of its mounts have gone, and
	// may see only now that those of the step before have.
	s.container = "step" + n
	first := s.box.steps == 0
	s.box.steps++
	s.next = successorOf(s.step)
	if err := os.Mkdir(s.tmp, 0o700); err != nil {
		return fmt.Errorf("make a place for the step's mounts: %w", err)
	}
	if !first {
		return nil
	}
	if err := s.limit(); err != nil {
		return err
	}
	return s.restrict()
}

// explain says so when err comes from the end of the sandbox.
func (s *stepRun) explain(ctx context.Context, err error) error {
	select {
	case <-s.box.exited:
	case <-ctx.Done():
		return err
	case <-time.After(100 * time.Millisecond):
		return err
	}
	return fmt.Errorf("the sandbox ended before the step did: %w", err)
}

// stepRun is one step on its way through Run.
type stepRun struct {
	r    *Runtime
	step *sandbox.Step
	box  *box
	// container is the ID of the step's container.
	container string
	// tmp is where the node sees what the sandbox is shown.
	tmp string
	// next is what a successor must be, and kept tells that the sandbox could have it.
	next *successor
	kept bool
	// rootfs is where the node sees the root: the sandbox sees a copy of it that
	// it cannot write to.
	rootfs     string
	readonly   bool
	noNewPrivs bool
	ids        sandbox.UserIDs
	// spec, confs and conns are what the step's container starts with.
	spec  *specs.Spec
	confs []mountConf
	conns []*os.File
	// store backs what the step writes to its root; nil: nothing does.
	store *os.File
	// wrote is how much that was when the step had ended.
	wrote sandbox.Usage
	// defers release things when the sandbox has ended, the last first.
	defers []func() error
	copies *stdio
}

// overlaid tells whether the sandbox keeps writes to the root to itself.
func (s *stepRun) overlaid() bool { return len(s.step.Root.Lower) > 0 }

// collects tells whether there are writes to take out at the end.
func (s *stepRun) collects() bool { return s.step.Root.Upper != "" && !s.step.ReadonlyRoot }

// writesThrough tells whether the step can write to files of the node while it
// runs.
func (s *stepRun) writesThrough() bool {
	if !s.overlaid() && !s.step.ReadonlyRoot {
		return true
	}
	for _, m := range s.step.Mounts {
		if m.Tree.Tmpfs == nil && !m.Readonly {
			return true
		}
	}
	return false
}

// collect takes the writes out of the sandbox, which stops all its processes
// first, so that what the step left running cannot change them meanwhile. With keep the
// sandbox is asked to get rid of the step.
func (s *stepRun) collect(ctx context.Context, keep bool) error {
	if !s.collects() {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	sent := make(chan error, 1)
	var reply layerReply
	go func() {
		err := s.box.ctl.call(ctx, methodLayer, layerArgs{s.container, keep}, []*os.File{w}, &reply)
		w.Close()
		sent <- err
	}()
	lower := s.step.Root.Lower
	size, err := upper.Apply(ctx, s.step.Root.Upper, r, upper.Options{Lower: lower})
	s.wrote.DiskBytes, s.wrote.Inodes = size.Bytes, size.Inodes
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
	s.kept = keep && reply.Kept
	return nil
}

// end ends the sandbox, unless it is kept. What the step could write to is released before it
// returns; the rest, which nothing can change any more, in the background.
func (s *stepRun) end() error {
	if s.box == nil {
		return nil
	}
	handed := s.box.next != nil
	if !handed {
		s.box.kill()
	}
	if s.copies != nil {
		s.copies.finish()
	}
	if handed {
		return s.hand()
	}
	if s.writesThrough() {
		return s.release()
	}
	s.r.pool.later(s.release)
	return nil
}

// release gives back everything that the step holds.
func (s *stepRun) release() error {
	err := errors.Join(s.box.waitKilled(), s.releaseMounts(), s.box.release())
	if err != nil {
		return fmt.Errorf("release: %w", err)
	}
	return nil
}

// releaseMounts gives back what the sandbox was shown.
func (s *stepRun) releaseMounts() error {
	var errs []error
	for i := len(s.defers) - 1; i >= 0; i-- {
		errs = append(errs, s.defers[i]())
	}
	s.defers = nil
	return errors.Join(errs...)
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
