package gvisor

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// chain makes steps of one build, each on what the one before has made.
type chain struct {
	e     *env
	build string
	lower []string
}

func (e *env) chain(build string) *chain { return &chain{e, build, []string{e.lower}} }

// step returns the next step. Its result becomes part of the chain.
func (c *chain) step(script string) *sandbox.Step {
	step := c.e.step(script)
	dir := c.e.t.TempDir()
	step.Build = c.build
	step.Root = sandbox.Tree{Lower: c.lower, Upper: filepath.Join(dir, "u"), Work: filepath.Join(dir, "w")}
	for _, d := range []string{step.Root.Upper, step.Root.Work} {
		require.NoError(c.e.t, os.Mkdir(d, 0o755))
	}
	c.lower = append([]string{step.Root.Upper}, c.lower...)
	return step
}

// parked tells how many steps each sandbox had that waits for another.
func (e *env) parked() (steps []int) {
	e.r.pool.mu.Lock()
	defer e.r.pool.mu.Unlock()
	for _, b := range e.r.pool.parked {
		steps = append(steps, b.steps)
	}
	return steps
}

// TestSuccessorFindsNothing has steps of a build follow each other in one sandbox. All
// that one finds of those before is in its root.
func TestSuccessorFindsNothing(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.program("leave")
	c := e.chain("a")
	secret := t.TempDir()
	require.NoError(t, os.WriteFile(secret+"/s", []byte("secret"), 0o400))
	for i := range 4 {
		step := c.step(fmt.Sprintf(`set -e; n=%d
test "$(ls /made 2>/dev/null | wc -l)" = $n
test ! -e /dev/mine; test -z "$(ls /dev/shm)$(ls /scratch)"; test ! -e /run/s$((n-1))
ps | grep -c .
mkdir -p /made; echo x >/made/$n
touch /dev/mine /dev/shm/mine /scratch/mine; leave; echo again; leave
(while :; do :; done) & sleep 100 & mkfifo /fifo$n; cat /fifo$n &`, i))
		step.Mounts = []sandbox.Mount{
			{Destination: fmt.Sprint("/run/s", i), Tree: sandbox.Tree{Dir: secret + "/s"}, Readonly: true},
			{Destination: "/scratch", Tree: sandbox.Tree{Tmpfs: &sandbox.Tmpfs{}}},
		}
		said, again, _ := strings.Cut(e.ok(step), "again")
		require.NotContains(t, said, "found", "step %d", i)
		for _, object := range []string{"shared memory", "message queue", "semaphore"} {
			require.Contains(t, again, "found "+object, "the step itself finds what it has made")
		}
		require.Equal(t, "4", said[:1], "it has its shell, ps and grep alone: %s", said)
		require.Equal(t, []int{i + 1}, e.parked())
	}
	require.EqualValues(t, 1, e.r.boxes.Load())
	require.Eventually(t, func() bool { return len(e.parked()) == 0 }, 2*patience, 10*time.Millisecond, "it waits no longer")
	require.Eventually(t, func() bool { return len(sandboxProcesses(t, e.r.cfg.StateDir)) == 0 }, 5*time.Second, 10*time.Millisecond)
}

// TestSuccessorHasAContainerOfItsOwn ends the container of a step while the next one runs in
// its sandbox. runsc does so when it notices that the connections of the container's mounts
// have gone, which may be that late.
func TestSuccessorHasAContainerOfItsOwn(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	c := e.chain("a")
	var container string
	run := func(script string, started func(*running)) {
		step := c.step(script)
		var out bytes.Buffer
		step.Process.Stdout, step.Process.Stderr = &out, &out
		res, err := e.r.Run(context.Background(), step, func() { started(e.r.lookup(step.ID)) })
		require.NoError(t, err)
		require.Zero(t, res.ExitCode, out.String())
	}
	run("true", func(r *running) { container = r.container })
	run("sleep 0.3", func(r *running) {
		const all = 1 // DeliverToAllProcesses
		args := signalArgs{CID: container, Signo: int32(unix.SIGKILL), Mode: all}
		_ = r.ctl.call(context.Background(), methodSignal, args, nil, nil) // there is no such container
	})
	require.EqualValues(t, 1, e.r.boxes.Load())
}

// TestNoSuccessor has steps that must have a sandbox of their own.
func TestNoSuccessor(t *testing.T) {
	same := func(*sandbox.Step) {}
	tests := []struct {
		name          string
		script        string // of the first step
		first, second func(*sandbox.Step)
		// kept tells that the sandbox of the first step waits for another one.
		kept bool
	}{
		{"another build", "true", same, func(s *sandbox.Step) { s.Build = "b" }, true},
		{"no build", "true", func(s *sandbox.Step) { s.Build = "" }, func(s *sandbox.Step) { s.Build = "" }, false},
		{"another root", "true", same, func(s *sandbox.Step) { s.Root.Lower = s.Root.Lower[1:] }, true},
		{"another base", "true", same, func(s *sandbox.Step) { s.Root.Lower = append(s.Root.Lower, t.TempDir()) }, true},
		{"other limits", "true", same, func(s *sandbox.Step) { s.Limits.PIDs = 50 }, true},
		{"another host name", "true", same, func(s *sandbox.Step) { s.Hostname = "x" }, true},
		{"another policy", "true", same, func(s *sandbox.Step) {
			s.Egress = &egress.Policy{Deny: []egress.Range{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}}
		}, true},
		{"a failure", "exit 3", same, same, false},
		{"a setting of the kernel", "echo 1024 >/proc/sys/fs/nr_open", same, same, false},
		{"a limit that was reached", "(i=0; while [ $i -lt 100 ]; do sleep 1 & i=$((i+1)); done) 2>/dev/null; true",
			func(s *sandbox.Step) { s.Limits.PIDs = 60 }, func(s *sandbox.Step) { s.Limits.PIDs = 60 }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := newEnvWith(t, Config{Prepared: -1})
			c := e.chain("a")
			step := c.step(tt.script)
			tt.first(step)
			_, err := e.r.Run(context.Background(), step, nil)
			require.NoError(t, err)
			require.Equal(t, tt.kept, len(e.parked()) == 1)
			step = c.step("cat /proc/sys/fs/nr_open; ps")
			tt.second(step)
			require.NotContains(t, e.ok(step), "\n1024\n")
			require.EqualValues(t, 2, e.r.boxes.Load())
		})
	}
}

// TestSuccessorCountsItsOwn wants nothing of an earlier step in the usage of a later one.
func TestSuccessorCountsItsOwn(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	c := e.chain("a")
	limits := sandbox.Limits{CPUMillis: 900, MemoryBytes: 512 << 20, PIDs: 200, DiskBytes: 100 << 20}
	run := func(script string) *sandbox.Result {
		step := c.step(script)
		step.Limits = limits
		var out bytes.Buffer
		step.Process.Stdout, step.Process.Stderr = &out, &out
		res, err := e.r.Run(context.Background(), step, nil)
		require.NoError(t, err, out.String())
		require.Zero(t, res.ExitCode, out.String())
		require.Empty(t, res.Reached)
		return res
	}
	first := run(eat + "eat 100; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; busybox dd if=/dev/zero of=/big bs=1M count=60 2>/dev/null; rm /big")
	second := run("echo x >/small")
	require.EqualValues(t, 1, e.r.boxes.Load())
	require.Greater(t, first.Usage.CPU, 2*second.Usage.CPU)
	require.Greater(t, first.Usage.PeakMemory, int64(100<<20))
	require.Less(t, second.Usage.PeakMemory, int64(maxKeptMemory+(32<<20)))
	require.Less(t, second.Usage.DiskBytes, int64(1<<20))
	// The disk that an earlier step had is there for a later one.
	run("busybox dd if=/dev/zero of=/big bs=1M count=90 2>/dev/null")
}

func TestCloseEndsParked(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	for _, build := range []string{"a", "b"} {
		e.ok(e.chain(build).step("true"))
	}
	require.Len(t, e.parked(), 2)
	require.NoError(t, e.r.Close())
	require.Empty(t, processesNaming(t, e.r.cfg.StateDir))
	require.Empty(t, mountsBelow(t, e.r.cfg.StateDir))
	var err error
	e.r, err = New(context.Background(), Config{RunscPath: runscPath(t), StateDir: e.r.cfg.StateDir})
	require.NoError(t, err)
}

// TestSuccessorsGatherNoMemory has steps whose layers together are more than a sandbox may
// have to be kept.
func TestSuccessorsGatherNoMemory(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	c := e.chain("a")
	for i := range 6 {
		e.ok(c.step(fmt.Sprintf("mkdir -p /data/%[1]d/deep && busybox dd if=/dev/zero of=/data/%[1]d/deep/big bs=1M count=25 2>/dev/null && ls -R /data", i)))
		require.Equal(t, []int{i + 1}, e.parked())
	}
}

// TestDirectories uses, renames, removes and replaces directories that the sandbox keeps in
// mind, more of them than it does.
func TestDirectories(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	require.NoError(t, os.MkdirAll(e.lower+"/old/deep/er", 0o755))
	require.NoError(t, os.WriteFile(e.lower+"/old/deep/file", nil, 0o644))
	c := e.chain("a")
	e.ok(c.step(`set -e
mkdir -p /a/b/c; ls /a/b/c; mv /a/b /a/d
test ! -e /a/b; test -d /a/d/c
echo x >/a/b; test -f /a/b; test -d /a/d/c
rm /a/b; mkdir -p /a/b/c; chmod 700 /a/b; test "$(stat -c %a /a/b)" = 700
rmdir /a/d/c; test ! -e /a/d/c; echo y >/a/d/c; test -f /a/d/c
ls -R /old; mv /old/deep/er /old/er; test -d /old/er; test ! -e /old/deep/er
rm -r /old/deep; test ! -e /old/deep/file; mkdir /old/deep; test -z "$(ls /old/deep)"
i=0; while [ $i -lt 1500 ]; do mkdir -p /many/$i/x; test -d /many/$i/x; i=$((i+1)); done
test "$(ls /many | wc -l)" = 1500
rm -r /many/1; test ! -e /many/1/x; mv /many/2 /many/1; test -d /many/1/x; test ! -e /many/2`))
	e.ok(c.step(`set -e
test "$(stat -c %a /a/b)" = 700; test -d /a/b/c; test -f /a/d/c
test -d /old/er; test -z "$(ls /old/deep)"
test "$(ls /many | wc -l)" = 1499; test -d /many/1/x; test ! -e /many/2
rm -r /many /a; test ! -e /many/3; mkdir /many; test -z "$(ls /many)"`))
	e.ok(c.step(`set -e; test -z "$(ls /many)"; test ! -e /a; test -d /old/er`))
	require.EqualValues(t, 1, e.r.boxes.Load())
}

// Files that nobody uses are kept too, up to a number, and are then replaced by others.
func TestFilesThatAreKept(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	for i := range 3000 {
		dir := fmt.Sprintf("%s/many/%d", e.lower, i%30)
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), fmt.Appendf(nil, "%d\n", i), 0o644))
	}
	require.NoError(t, os.Symlink("30", e.lower+"/many/0/link"))
	c := e.chain("a")
	e.ok(c.step(`set -e
sum() { cat $(find /many -type f) | sort -n | md5sum; }
before=$(sum); test "$before" = "$(sum)"; stat /many/0/30 /many/0/link >/dev/null
echo changed >/many/0/30; test "$(cat /many/0/30)" = changed; test "$(cat /many/0/link)" = changed
chmod 600 /many/1/1; test "$(stat -c %a /many/1/1)" = 600
rm /many/2/2; test ! -e /many/2/2; ln -s gone /many/2/2; test "$(readlink /many/2/2)" = gone
mv /many/3/3 /many/4/4; test "$(cat /many/4/4)" = 3; test ! -e /many/3/3
ln /many/5/5 /many/5/same; echo more >>/many/5/5; test "$(cat /many/5/same)" = "$(printf '5\nmore')"
rm -r /many/6; test ! -e /many/6/6; mkdir /many/6; test ! -e /many/6/6
sum >/dev/null; test "$(cat /many/0/30)" = changed`))
	e.ok(c.step(`set -e
test "$(cat /many/0/30)" = changed; test "$(stat -c %a /many/1/1)" = 600; test "$(readlink /many/2/2)" = gone
test "$(cat /many/4/4)" = 3; test ! -e /many/3/3; test "$(cat /many/5/same)" = "$(printf '5\nmore')"; test -z "$(ls /many/6)"
test "$(find /many -type f | wc -l)" = 2899`))
	require.EqualValues(t, 1, e.r.boxes.Load())
}
