package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// ready waits until as many sandboxes as are kept are ready, and returns them.
func (e *env) ready() []*box {
	e.r.pool.making.Wait()
	e.r.pool.mu.Lock()
	defer e.r.pool.mu.Unlock()
	s := e.r.pool.kinds[usual(sandbox.NetworkNone)]
	require.NotNil(e.t, s)
	return append([]*box{}, s.ready...)
}

// TestPreparedHoldsNothing looks at sandboxes that wait, and at what a step finds
// that gets one after others.
func TestPreparedHoldsNothing(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: 2})
	e.r.Warm(sandbox.NetworkNone)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/secret", []byte("secret"), 0o400))
	for i := range 5 {
		boxes := e.ready()
		require.Len(t, boxes, 2)
		for _, b := range boxes {
			require.ElementsMatch(t, []string{b.tmp}, mountsBelow(t, b.dir))
		}
		step := e.step(fmt.Sprintf(`set -e
test ! -e /mine; test ! -e /run/secret$((%d - 1)); test -z "$(ls /dev/shm)$(ls /scratch)"
grep -c . /proc/mounts; ls -d /proc/[0-9]* | grep -vx -e /proc/$$ || true
echo x >/dev/shm/mine; echo x >/scratch/mine; sleep 100 &`, i))
		step.Mounts = []sandbox.Mount{
			{Destination: fmt.Sprint("/run/secret", i), Tree: sandbox.Tree{Dir: dir + "/secret"}, Readonly: true},
			{Destination: "/scratch", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{}}},
		}
		step.Root.Upper, step.Root.Work = t.TempDir(), t.TempDir()
		e.ok(step)
	}
}

func TestCloseEndsPrepared(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: 3})
	e.r.Warm(sandbox.NetworkNone)
	require.Len(t, e.ready(), 3)
	e.ok(e.step("true"))
	e.r.Warm(sandbox.NetworkNone) // others are on their way
	require.NoError(t, e.r.Close())
	require.Empty(t, processesNaming(t, e.r.cfg.StateDir))
	require.Empty(t, mountsBelow(t, e.r.cfg.StateDir))
	entries, err := os.ReadDir(e.r.stepsDir())
	require.NoError(t, err)
	require.Empty(t, entries)
	_, err = e.r.Run(context.Background(), e.step("true"), nil)
	require.ErrorIs(t, err, errClosed)
	e.r, err = New(context.Background(), Config{RunscPath: runscPath(t), StateDir: e.r.cfg.StateDir})
	require.NoError(t, err)
}

// TestDeadPrepared ends sandboxes that wait for a step, as a full node may.
func TestDeadPrepared(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: 2})
	e.r.Warm(sandbox.NetworkNone)
	for _, b := range e.ready() {
		b.kill()
		<-b.exited
	}
	e.ok(e.step("true"))
}

// TestNothingIsShared looks at the descriptors of sandboxes that were started one
// after another and together by the same processes.
func TestNothingIsShared(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: 6})
	e.r.Warm(sandbox.NetworkNone)
	owners, kinds := map[string]string{}, map[string]bool{}
	boxes := e.ready()
	require.Len(t, boxes, 6)
	for _, b := range boxes {
		st, err := readState(b.runscRoot())
		require.NoError(t, err)
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", st.Sandbox.PID))
		require.NoError(t, err)
		have := map[string]bool{}
		for _, fd := range fds {
			link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", st.Sandbox.PID, fd.Name()))
			if errors.Is(err, os.ErrNotExist) {
				continue // a sandbox that has just started closes some
			}
			require.NoError(t, err)
			// What is written to is one sandbox's alone.
			if strings.HasPrefix(link, "socket:") || strings.HasPrefix(link, "pipe:") {
				if other, taken := owners[link]; taken {
					require.Equal(t, b.id, other, link)
				}
			}
			require.False(t, strings.HasPrefix(link, "/") && strings.Contains(link, "/steps/"), link)
			owners[link] = b.id
			kind, _, _ := strings.Cut(link, ":[")
			kind = strings.Replace(kind, e.r.cgroupOf(b.id)+"/", "/own-cgroup/", 1) // Go reads its CPU limit
			have[kind] = true
		}
		delete(have, "anon_inode") // Go's own, when it needs them
		kinds[fmt.Sprint(have)] = true
	}
	require.Len(t, kinds, 1, "kinds of descriptors")
}

func TestStartFails(t *testing.T) {
	e := newEnv(t)
	e.r.runsc = "/bin/false"
	for range 3 {
		_, err := e.r.Run(context.Background(), e.step("true"), nil)
		require.ErrorContains(t, err, "start the")
	}
	e.settle()
	entries, err := os.ReadDir(e.r.stepsDir())
	require.NoError(t, err)
	require.Empty(t, entries)
}

// TestTakeIsCancelled gives up while a sandbox is being started; another step gets
// that one.
func TestTakeIsCancelled(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: 1})
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
	defer cancel()
	_, err := e.r.Run(ctx, e.step("true"), nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Len(t, e.ready(), 1)
	e.ok(e.step("true"))
}

// TestManyMounts has more than the usual sandbox has places for.
func TestManyMounts(t *testing.T) {
	e := newEnv(t)
	step := e.step("cat /many/*/f /single/*; for i in $(seq 0 9); do echo $i >/many/$i/new; done")
	dir := t.TempDir()
	for i := range 10 {
		d := filepath.Join(dir, fmt.Sprint(i))
		require.NoError(t, os.Mkdir(d, 0o755))
		require.NoError(t, os.WriteFile(d+"/f", []byte{byte('a' + i)}, 0o644))
		step.Mounts = append(step.Mounts,
			sandbox.Mount{Destination: fmt.Sprint("/many/", i), Tree: sandbox.Tree{Dir: d}},
			sandbox.Mount{Destination: fmt.Sprint("/single/", i), Tree: sandbox.Tree{Dir: d + "/f"}, Readonly: true})
	}
	require.Equal(t, "abcdefghijabcdefghij", e.ok(step))
	require.FileExists(t, dir+"/9/new")
}

func TestOneStepOfAnID(t *testing.T) {
	e := newEnv(t)
	step := e.step("sleep 0.2")
	_, err := e.r.Run(context.Background(), step, func() {
		_, err := e.r.Run(context.Background(), step, nil)
		require.ErrorContains(t, err, "runs already")
	})
	require.NoError(t, err)
	e.ok(step)
}

// TestSandboxKilledWhileItStarts wants a step to be none the wiser.
func TestSandboxKilledWhileItStarts(t *testing.T) {
	for range 5 {
		e := newEnvWith(t, Config{Prepared: -1})
		done := make(chan error, 1)
		go func() {
			res, err := e.r.Run(context.Background(), e.step("true"), nil)
			if err == nil && res.ExitCode != 0 {
				err = fmt.Errorf("exit code %d", res.ExitCode)
			}
			done <- err
		}()
		killed := false
		deadline := time.Now().Add(10 * time.Second)
		for !killed && time.Now().Before(deadline) {
			names, err := filepath.Glob("/proc/[0-9]*/cmdline")
			require.NoError(t, err)
			for _, n := range names {
				data, err := os.ReadFile(n)
				if err == nil && strings.HasPrefix(string(data), "runsc-sandbox\x00") && strings.Contains(string(data), e.r.cfg.StateDir+"/") {
					pid, err := strconv.Atoi(filepath.Base(filepath.Dir(n)))
					require.NoError(t, err)
					killed = unix.Kill(pid, unix.SIGKILL) == nil
				}
			}
		}
		require.True(t, killed, "no sandbox starts")
		err := <-done
		if err == nil {
			require.EqualValues(t, 2, e.r.boxes.Load())
			return
		}
		t.Log(err) // it had started already
	}
	t.Fatal("no step has run")
}
