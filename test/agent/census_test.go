package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/snapshot"
)

const (
	// ends is how many builds end, phases how many agents do them: all but the last
	// are killed with their last builds.
	ends, phases = 500, 4
	// endsAtOnce is how many of them run at a time.
	endsAtOnce = 8
)

// TestNothingIsLeftOfAnyEnd has builds end in every way that there is, in both
// sandboxes, and wants nothing to be left of them: on the node, in the agent that did
// the last of them, and in the store.
func TestNothingIsLeftOfAnyEnd(t *testing.T) {
	n := newNodeOf(t, endsAtOnce, "userns", "gvisor")
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	r := &endRun{ctx: ctx, states: map[string]int{}}
	var a *agent
	var settled figures
	var opened map[string]int
	for phase := range phases {
		a = n.start(t)
		from, to := ends*phase/phases, ends*(phase+1)/phases
		if phase < phases-1 {
			r.run(t, a, from, to, to-endsAtOnce/2)
			continue
		}
		// Engines and sandboxes that the agent keeps on purpose are there after a while.
		warm := from + 2*len(everyEnd)
		r.run(t, a, from, warm, 0)
		settled = a.settled(t, func(figures) bool { return false })
		opened = a.descriptors(t)
		r.run(t, a, warm, to, 0)
	}
	t.Logf("%d builds: %v", ends, r.states)
	for _, e := range everyEnd {
		for _, class := range []string{"gvisor", "userns"} {
			require.NotZero(t, r.states[e.name+" "+class], "%s in %s never ended as it should", e.name, class)
		}
	}
	// The agent collects its garbage then, in which the pipes are that Go keeps.
	a.pruneAll(t, ctx)
	now := a.settled(t, func(f figures) bool { return f.within(settled) })
	for kind, count := range a.descriptors(t) {
		if count != opened[kind] {
			t.Logf("the agent had %d descriptors of %s when it was warm, and has %d", opened[kind], kind, count)
		}
	}
	t.Logf("the agent had %+v when it was warm, and has %+v", settled, now)
	require.True(t, now.within(settled), "the agent had %+v when it was warm, and has %+v", settled, now)

	a.end(t, syscall.SIGTERM)
	n.checkNothingLeft(t)
	// A result that is committed in the moment in which nobody wants it any more is held,
	// with what it is built on, by the agent that has it. The next one lets it go.
	held := n.leases(t)
	t.Logf("the agent held %d references", len(held))
	require.Less(t, len(held), ends/50)
	a = n.start(t)
	a.pruneAll(t, ctx)
	a.end(t, syscall.SIGTERM)
	n.checkNothingLeft(t)
	n.checkStoreEmpty(t)
}

func (a *agent) pruneAll(t *testing.T, ctx context.Context) {
	t.Helper()
	for range 2 { // what the first lets go goes the second time
		_, err := a.Prune(ctx, &agentv1.PruneRequest{All: true})
		require.NoError(t, err)
	}
}

// endRun is the builds of the test so far.
type endRun struct {
	ctx    context.Context
	source string // the digest of the upload of the agent that runs

	mu     sync.Mutex
	states map[string]int // guarded by mu; builds that ended as they should, by kind
}

// run has builds end in the way of their numbers. With kill, the agent is killed when
// the build of that number has begun, and the next one must know how all ended.
func (r *endRun) run(t *testing.T, a *agent, from, to, kill int) {
	t.Helper()
	// An upload goes with the last build that has it.
	r.source = agenttest.SendAll(t, r.ctx, a, agenttest.BusyboxTar(t, nil))
	var next atomic.Int64
	var dead atomic.Bool
	next.Store(int64(from))
	dying := make(chan struct{})
	var wg sync.WaitGroup
	for range endsAtOnce {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= to || dead.Load() {
					return
				}
				if kill > 0 && i == kill {
					close(dying)
				}
				if err := r.one(a, i); err != nil && !dead.Load() {
					t.Errorf("build %d: %v", i, err)
				}
			}
		})
	}
	if kill > 0 {
		select {
		case <-dying:
		case <-r.ctx.Done():
		}
		time.Sleep(150 * time.Millisecond)
		dead.Store(true)
		a.end(t, syscall.SIGKILL)
	}
	wg.Wait()
	require.False(t, t.Failed())
}

// one has build i end.
func (r *endRun) one(a *agent, i int) error {
	e := everyEnd[i%len(everyEnd)]
	class, name := agentv1.SandboxClass_SANDBOX_CLASS_USERNS, "userns"
	if i/len(everyEnd)%2 == 1 {
		class, name = agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, "gvisor"
	}
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	if e.client != nil {
		if err := e.client(ctx, a, i); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		r.ended(e.name+" gvisor", e.name+" userns") // it runs in the default one
		return nil
	}
	spec := e.spec(i)
	spec.Sandbox = class
	spec.Source = agenttest.Uploaded(r.source).GetSource()
	b := &acknowledged{request: &agentv1.StartBuildRequest{BuildId: fmt.Sprint("end-", i), Spec: spec}}
	if _, err := a.StartBuild(ctx, b.request); err != nil {
		return fmt.Errorf("%s: %w", e.name, err)
	}
	if e.cancelled {
		if err := a.cancelWhenSeen(ctx, b.request.GetBuildId()); err != nil {
			return fmt.Errorf("%s: cancel: %w", e.name, err)
		}
	}
	if err := a.follow(ctx, b); err != nil {
		return fmt.Errorf("%s: %w", e.name, err)
	}
	result := b.seen[len(b.seen)-1].GetResult()
	if result.GetState() != e.want || result.GetFailure().GetReason() != e.reason {
		return fmt.Errorf("%s in %s ended as %v\n%s", e.name, name, result, agenttest.Output(b.seen))
	}
	r.ended(e.name + " " + name)
	return nil
}

func (r *endRun) ended(kinds ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range kinds {
		r.states[k]++
	}
}

// cancelWhenSeen cancels a build when one of its steps has written something.
func (a *agent) cancelWhenSeen(ctx context.Context, id string) error {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	stream, err := a.WatchBuild(watching, &agentv1.WatchBuildRequest{BuildId: id})
	if err != nil {
		return err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		if msg.GetEvent().GetLog() != nil {
			_, err = a.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id})
			return err
		}
	}
}

// figures are what an agent holds.
type figures struct{ Goroutines, Files int }

// within tells whether f is no more than f0, but for what comes and goes: sandboxes and
// networks that are being prepared, connections, and pipes, which Go keeps for splice
// until it collects garbage. It is less than one for each of the last agent's builds.
func (f figures) within(f0 figures) bool {
	return f.Goroutines <= f0.Goroutines+50 && f.Files <= f0.Files+80
}

// settled returns what the agent holds once it does not change any more or is enough.
func (a *agent) settled(t *testing.T, enough func(figures) bool) (now figures) {
	t.Helper()
	for same, deadline := 0, time.Now().Add(20*time.Second); same < 4 && time.Now().Before(deadline); time.Sleep(250 * time.Millisecond) {
		before := now
		if now = a.figures(t); enough(now) {
			return now
		}
		if same++; now != before {
			same = 0
		}
	}
	return now
}

func (a *agent) figures(t *testing.T) figures {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+a.node.netns, "/bin/busybox", "wget", "-q", "-O", "-", "http://"+metricsAddress+"/metrics").Output()
	require.NoError(t, err)
	read := func(name string) int {
		_, rest, ok := strings.Cut(string(out), "\n"+name+" ")
		require.True(t, ok, "metric %s", name)
		value, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
		require.NoError(t, err)
		return int(value)
	}
	return figures{read("go_goroutines"), read("process_open_fds")}
}

// descriptors counts what the agent has open by what it is, without numbers.
func (a *agent) descriptors(t *testing.T) map[string]int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid)
	fds, err := os.ReadDir(dir)
	require.NoError(t, err)
	kinds := map[string]int{}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil { // or it is closed
			kinds[numbers.ReplaceAllString(target, "N")]++
		}
	}
	return kinds
}

var numbers = regexp.MustCompile("[0-9]+")

// leases returns those in the store of a node without an agent.
func (n *node) leases(t *testing.T) []leases.Lease {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	s, err := snapshot.Open(ctx, filepath.Join(n.dir, "root", "store"))
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	list, err := metadata.NewLeaseManager(s.DB).List(ctx)
	require.NoError(t, err)
	return list
}

// checkStoreEmpty looks into the store of a node without an agent, whose caches were
// pruned.
func (n *node) checkStoreEmpty(t *testing.T) {
	t.Helper()
	root := filepath.Join(n.dir, "root")
	// Unfinished blobs are kept for a day for who resumes them, and are not looked at.
	for _, dir := range []string{"tmp", "uploads/incoming"} {
		entries, err := os.ReadDir(filepath.Join(root, dir))
		if !os.IsNotExist(err) {
			require.NoError(t, err)
		}
		require.Empty(t, entries, "in %s", dir)
	}
	require.Empty(t, n.leases(t))
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	s, err := snapshot.Open(ctx, filepath.Join(root, "store"))
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	require.NoError(t, s.Snapshots().Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		t.Errorf("snapshot %s of %s is left", info.Name, info.Created)
		return nil
	}))
	dirs, err := os.ReadDir(filepath.Join(root, "store/snapshots/snapshots"))
	require.NoError(t, err)
	require.Empty(t, dirs)
}
