package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// end is a way in which builds end.
type end struct {
	name   string
	steps  string // after base, each time with a step of its own before them
	change func(*agentv1.BuildSpec)
	want   agentv1.BuildState
	reason agentv1.FailureReason
	// cancelled is set when the test cancels the build once its step runs.
	cancelled bool
	// client is a client of BuildKit's that has the build end.
	client func(ctx context.Context, a *agent, i int) error
}

const (
	succeeded = agentv1.BuildState_BUILD_STATE_SUCCEEDED
	ended     = agentv1.BuildState_BUILD_STATE_FAILED
)

func limited(r *agentv1.Resources) func(*agentv1.BuildSpec) {
	return func(s *agentv1.BuildSpec) { s.Resources = r }
}

// everyEnd lists the ways. A build that its agent was killed with is one of them in
// each.
var everyEnd = []end{
	{name: "success", steps: sh("echo done > /file"), want: succeeded},
	{name: "failure", steps: sh("exit 3"), want: ended, reason: agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
	{
		name: "out of memory", steps: sh("busybox head -c 300000000 /dev/zero | busybox tail -n 1"), change: limited(&agentv1.Resources{MemoryBytes: 128 << 20}),
		want: ended, reason: agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY,
	},
	{
		name: "time-out", steps: sh("sleep 600"), change: func(s *agentv1.BuildSpec) { s.Timeout = durationpb.New(time.Second) },
		want: ended, reason: agentv1.FailureReason_FAILURE_REASON_TIMEOUT,
	},
	{
		name: "cancelled", steps: sh("echo here; sleep 600"), cancelled: true,
		want: agentv1.BuildState_BUILD_STATE_CANCELLED, reason: agentv1.FailureReason_FAILURE_REASON_CANCELLED,
	},
	{name: "client gone", client: clientGone},
	{
		name: "step daemons", steps: sh("sleep 600 & setsid sleep 600 > /dev/null 2>&1 < /dev/null & (setsid nohup sh -c 'while :; do sleep 600; done' > /dev/null 2>&1 < /dev/null &); true"),
		want: succeeded,
	},
	{
		name: "fork bomb", steps: sh("i=0; while [ $i -lt 600 ]; do sleep 600 & i=$((i+1)); done; wait"),
		want: ended, reason: agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT,
	},
	{
		name: "nested mounts", steps: `RUN --mount=type=tmpfs,target=/a --mount=type=cache,target=/a/b --mount=type=tmpfs,target=/a/b/c ["/bin/busybox", "sh", "-c", "` +
			`mkdir -p /a/b/c/d/e; mount -t tmpfs none /a/b/c/d; mount -o bind /a/b /a/b/c/d/e; unshare -m -r sh -c 'mount -t tmpfs none /mnt; sleep 600' & sleep 0.1; echo x > /a/b/c/file"]` + "\n",
		want: succeeded,
	},
	{
		name:  "odd files",
		steps: sh("mkdir -p /d/e; echo x > /d/e/f; chmod 0 /d/e/f /d/e /d; mkfifo /p; mknod /n c 0 0; ln -s /d /l; ln -s /l /l2; true"),
		want:  succeeded,
	},
	{name: "bad input", steps: "NOT AN INSTRUCTION\n", want: ended, reason: agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
	{name: "missing file", steps: "COPY no-such-file /\n", want: ended, reason: agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
	{name: "killed by itself", steps: sh("sleep 600 & kill -9 -1; sh -c 'kill -9 $$'; exit 9"), want: ended, reason: agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
}

func (e end) spec(i int) *agentv1.BuildSpec {
	s := agenttest.Dockerfile(base + "ENV PATH=/bin\n" + sh("busybox --install -s /bin && mkdir -p /mnt") + sh(fmt.Sprint("echo ", i)) + e.steps)
	if e.change != nil {
		e.change(s)
	}
	return s
}

// clientGone has a client of BuildKit's end, and its connection with it, while its step
// runs.
func clientGone(ctx context.Context, a *agent, i int) error {
	dir, err := os.MkdirTemp(a.node.dir, "context-")
	if err != nil {
		return err
	}
	program, err := os.ReadFile("/bin/busybox")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "busybox"), program, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(base+sh(fmt.Sprintf("echo %d; sleep 600", i))), 0o644)
	}
	if err != nil {
		return err
	}
	files, err := fsutil.NewFS(dir)
	if err != nil {
		return err
	}
	c, err := client.New(ctx, "unix://"+a.node.socket)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	status := make(chan *client.SolveStatus)
	seen := false
	told := make(chan struct{})
	go func() {
		defer close(told)
		for s := range status {
			if len(s.Logs) > 0 {
				seen = true
				cancel()
			}
		}
	}()
	_, err = c.Solve(ctx, nil, client.SolveOpt{Frontend: "dockerfile.v0", LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": files}}, status)
	<-told
	if !seen {
		return fmt.Errorf("its step never ran: %w", err)
	}
	return nil
}
