package escape

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/sandbox"
)

// bomber is the tenant whose steps are limited by bombLimits.
const bomber = "bomber"

// bombLimits are low, so that bombs reach them soon. gVisor's kernel needs some tens of
// megabytes and threads of them.
var bombLimits = sandbox.Limits{
	CPUMillis: 500, MemoryBytes: 256 << 20, PIDs: 200, OpenFiles: 256, DiskBytes: 64 << 20, Inodes: 2000, LogBytes: 1 << 20,
}

// A step may have more than its limit on disk for a moment: with the class userns it is
// the node that counts, and a node whose processors are taken counts late.
const (
	overshoot      = 64   // megabytes
	overshootFiles = 2000 // reported by the thousand
)

// bomb is an attack that takes all it gets of something, at most Most.
type bomb struct {
	Kind string
	Most int64
	// Limit is how much a bomb gets that is held to bombLimits. A sandbox that ends with
	// it may get to tell nothing.
	Limit int64
	// Overshoot is how much more it may get for a moment where the node counts.
	Overshoot int64
	// Error is what the build ends with, a regular expression; empty: it need not fail.
	Error string
	// Free has the bomb get all, and Most is in what it counts.
	Free int64
}

var exhaustions = map[string]bomb{
	"processes": {Kind: "processes", Most: 1000, Limit: bombLimits.PIDs, Error: `limit of 200 processes|exit code`, Free: 1000},
	"memory":    {Kind: "memory", Most: 600, Limit: bombLimits.MemoryBytes >> 20, Error: `out of memory|exit code: 137`, Free: 600},
	"files":     {Kind: "files", Most: 2000, Limit: bombLimits.OpenFiles, Error: `exit code: 1`, Free: 2000},
	"disk":      {Kind: "disk", Most: 160, Limit: bombLimits.DiskBytes>>20 + overshoot, Error: `disk|exit code`, Free: 160},
	"inodes":    {Kind: "inodes", Most: 6000, Limit: bombLimits.Inodes, Overshoot: overshootFiles, Error: `inode|exit code`, Free: 6000},
}

func exhaustion(id, threat, without string, s severity) entry {
	b := exhaustions[id]
	return entry{
		ID: "exhaustion/" + id, Severity: s, Threat: threat, Without: without,
		Test: func(t *testing.T, e *env) { e.explode(t, b) },
		Off: func(t *testing.T, e *env) bool {
			got, said := gotOf(e.rawBomb(t, b.Kind, b.Most))
			t.Logf("without limits it got %d: %s", got, said)
			return got >= b.Free
		},
	}
}

var _ = register(
	exhaustion("processes", "A step forks until the node has no process left.", "the limit of processes (runc with no limits in its place)", takesNodeDown),
	exhaustion("memory", "A step takes all memory of the node.", "the limit of memory", takesNodeDown),
	exhaustion("files", "A step raises its own limit and opens files until the node has no more.", "the limit of open files", takesNodeDown),
	exhaustion("disk", "A step fills the node's disk.", "the limit of disk space", takesNodeDown),
	exhaustion("inodes", "A step makes files until the node's file system has no inode left.", "the limit of inodes", takesNodeDown),
	entry{
		ID: "exhaustion/cpu", Severity: slowsOthers,
		Threat: "A step keeps all processors busy.",
		Test:   busyProcessors,
	},
	entry{
		ID: "exhaustion/immutable", Severity: slowsOthers,
		Threat: "A step marks files immutable, so that nobody can remove its layer.",
		Test:   immutableFiles,
		Off: func(t *testing.T, e *env) bool {
			var dir string
			out := e.runRaw(t, raw{Node: true, Change: privileged, Root: bombIn(t, &dir)}, "/bin/sh", "-c",
				"/bin/bomb immutable 1; rm -rf /fixed || echo it stays; /bin/bomb mutable 1")
			t.Logf("without the control: %s", out)
			return strings.Contains(out, "it stays")
		},
		Without: "the user namespace and its few capabilities",
	},
	entry{
		ID: "exhaustion/daemons", Severity: slowsOthers,
		Threat: "A step leaves processes behind, in sessions of their own, that go on when it has ended.",
		Test:   leftDaemons,
	},
	entry{
		ID: "exhaustion/mounts", Severity: slowsOthers,
		Threat: "A step mounts as often and as deep as it can, also in namespaces of its own.",
		Test:   nestedMounts,
	},
)

// bombProgram is the bombs' program.
func bombProgram(t *testing.T, w *world) string {
	t.Helper()
	return memo(w, "bomb", func() string {
		program := filepath.Join(t.TempDir(), "bomb")
		compile(t, "testdata/bomb/*.c", program)
		data, err := os.ReadFile(program)
		require.NoError(t, err)
		return string(data)
	})
}

// bombIn puts the program into the root of a raw container, and notes where that is.
func bombIn(t *testing.T, root *string) func(string) {
	return func(dir string) {
		*root = dir
		compile(t, "testdata/bomb/*.c", filepath.Join(dir, "bin/bomb"))
	}
}

// rawBomb runs a bomb in a container of runc's that has no limits.
func (e *env) rawBomb(t *testing.T, kind string, most int64) string {
	t.Helper()
	var dir string
	return e.runRaw(t, raw{Root: bombIn(t, &dir)}, "/bin/bomb", kind, strconv.FormatInt(most, 10))
}

var gotLine = regexp.MustCompile(`(?m)^got (\d+): (.*)$`)

// gotOf returns how much a bomb had at last, and what it said then.
func gotOf(log string) (int64, string) {
	all := gotLine.FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		return 0, "nothing"
	}
	last := all[len(all)-1]
	n, err := strconv.ParseInt(last[1], 10, 64)
	if err != nil {
		return 0, err.Error()
	}
	return n, last[2]
}

// limitedNode is a node whose tenant bomber is held to bombLimits.
// Its state is in root.
func (e *env) limitedNode(t *testing.T) (node *engine.Node, root string) {
	t.Helper()
	return e.observedNode(t, nil)
}

// observedNode is a limitedNode that tells of steps.
func (e *env) observedNode(t *testing.T, onStep func(engine.StepReport)) (node *engine.Node, root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "root")
	return e.open(t, root, func(c *engine.NodeConfig) {
		c.OnStep = onStep
		c.Limits = func(d engine.Domain) sandbox.Limits {
			if d.Tenant == bomber {
				return bombLimits
			}
			return sandbox.Limits{}
		}
	}), root
}

// explode has a bomb go off beside a build of another tenant, which must end well. The
// bomb gets what it is allowed, and nothing of it is left.
func (e *env) explode(t *testing.T, b bomb) {
	t.Helper()
	node, _ := e.limitedNode(t)
	bombed, healthy := make(chan result, 1), make(chan result, 1)
	program := bombProgram(t, e.world)
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	start := time.Now()
	go func() {
		bombed <- e.BuildContext(t, ctx, build{
			Tenant: bomber, Node: node, NoExport: true, Files: map[string]string{"bomb": program},
			Dockerfile: fmt.Sprintf("FROM tools\nCOPY bomb /bin/\nRUN [\"/bin/bomb\", %q, \"%d\"]\n", b.Kind, b.Most),
		})
	}()
	go func() {
		healthy <- e.BuildContext(t, ctx, build{
			Tenant: victim, Node: node,
			Dockerfile: "FROM tools\nRUN sleep 0.5; echo one > /one\nRUN i=0; while [ $i -lt 50 ]; do true & i=$((i+1)); done; wait; echo two > /two\nRUN head -c 50000000 /dev/zero > /three\n",
		})
	}()
	neighbour, r := <-healthy, <-bombed
	t.Logf("both took %v", time.Since(start).Round(time.Millisecond))
	require.NoError(t, neighbour.Err, neighbour.Log)
	require.Equal(t, "two\n", neighbour.Read(t, "two"))

	got, said := gotOf(r.Log)
	t.Logf("it got %d: %s; %v", got, said, r.Err)
	limit := b.Limit
	if e.Class == sandbox.Userns {
		limit += b.Overshoot
	}
	require.LessOrEqual(t, got, limit)
	if b.Error != "" {
		require.Error(t, r.Err)
		require.Regexp(t, b.Error, r.Err.Error())
	}
	// The tenant can go on.
	after := e.MustBuild(t, build{Tenant: bomber, Node: node, Dockerfile: "FROM tools\nRUN echo after > /after\n"})
	require.Equal(t, "after\n", after.Read(t, "after"))
	noProcess(t, "/bin/bomb")
}

// busyProcessors has a step keep processors busy, and looks at what the node counts.
func busyProcessors(t *testing.T, e *env) {
	var mu sync.Mutex
	var last engine.StepReport
	node, _ := e.observedNode(t, func(r engine.StepReport) {
		mu.Lock()
		defer mu.Unlock()
		last = r
	})
	e.MustBuild(t, build{
		Tenant: bomber, Node: node, NoExport: true, Files: map[string]string{"bomb": bombProgram(t, e.world)},
		Dockerfile: "FROM tools\nCOPY bomb /bin/\nRUN [\"/bin/bomb\", \"cpu\", \"16\"]\n",
	})
	mu.Lock()
	defer mu.Unlock()
	require.NotNil(t, last.Result)
	u := last.Result.Usage
	t.Logf("in %v it used %v of CPU time, and was made to wait %d times", last.Duration, u.CPU, u.Throttled)
	require.NotZero(t, u.Throttled)
	// What it had of a sandbox that was prepared counts, and periods are not exact.
	require.Less(t, u.CPU, time.Duration(float64(last.Duration)*float64(bombLimits.CPUMillis)/1000*1.3)+300*time.Millisecond)
}

// noProcess waits until no process of the machine has a word in its command line.
func noProcess(t *testing.T, word string) {
	t.Helper()
	var found []string
	require.Eventually(t, func() bool {
		found = nil
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		require.NoError(t, err)
		for _, f := range lines {
			if data, _ := os.ReadFile(f); strings.Contains(string(data), word) {
				found = append(found, fmt.Sprintf("%s %q", f, data))
			}
		}
		return len(found) == 0
	}, 10*time.Second, 20*time.Millisecond, "processes are left: %v", found)
}
