package escape

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// busybox is the base of builds whose context is agenttest.BusyboxTar.
const busybox = "FROM scratch\nCOPY busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\n"

// process is kiln-agent in a process of its own, for what happens to processes.
type process struct {
	agentv1.BuildServiceClient
	cmd *exec.Cmd
	log string
	// ended is closed when the process is no more.
	ended chan struct{}
}

// agentFiles makes a configuration in dir, with more lines, whose state is dir/root.
func (e *env) agentFiles(t *testing.T, dir, more string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "agent.yaml"), fmt.Appendf(nil, `apiVersion: config.kiln.build/v1alpha1
kind: AgentConfiguration
root: %[1]s/root
nodeName: node-1
listeners: {unix: {path: %[1]s/s}}
sandboxes: {default: %[2]s, enabled: [%[2]s]}
builds: {slots: 2, minFreeDisk: 10Mi}
gc: {reserved: 5Gi, maxUsed: 10Gi, minFree: 10Mi}
fetch: {allow: [%[3]s]}
metrics: {address: "0"}
health: {address: "0"}
%[4]s`, dir, e.Class, allowedLoopback, more), 0o600))
}

// startAgent runs an agent, by way of the command wrap, and waits until it answers. It
// ends with the test.
func (e *env) startAgent(t *testing.T, dir string, wrap ...string) *process {
	t.Helper()
	argv := append(wrap, agenttest.RepoBin(t, "kiln-agent"), "--config", filepath.Join(dir, "agent.yaml"))
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Dir = dir
	require.NoError(t, startBound(p.cmd))
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait()
	}()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	p.BuildServiceClient = agentv1.NewBuildServiceClient(conn)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		late := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
		p.end(syscall.SIGTERM) // one that is killed leaves packet filters to its next life
		require.True(t, late.Stop(), "the agent does not end")
		if t.Failed() {
			t.Logf("end of the agent's log:\n%s", p.output(t))
		}
		noProcess(t, dir)
	})
	require.Eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		conn.ResetConnectBackoff()
		_, err := p.GetInfo(ctx, &agentv1.GetInfoRequest{})
		return err == nil
	}, time.Minute, 20*time.Millisecond, "the agent does not answer: %s", p.output(t))
	return p
}

// end sends the process a signal and waits for its end.
func (p *process) end(s syscall.Signal) {
	_ = p.cmd.Process.Signal(s) // it may have ended
	<-p.ended
}

// output is the end of what it has written.
func (p *process) output(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(p.log)
	require.NoError(t, err)
	return string(text[max(0, len(text)-16000):])
}

// begin starts a build of a Dockerfile that may use busybox, and returns its ID.
func (p *process) begin(t *testing.T, ctx context.Context, dockerfile string, change func(*agentv1.StartBuildRequest)) string {
	t.Helper()
	return p.beginOf(t, ctx, agenttest.SendAll(t, ctx, p, agenttest.BusyboxTar(t, map[string]string{"Dockerfile": dockerfile})), change)
}

func (p *process) beginOf(t *testing.T, ctx context.Context, upload string, change func(*agentv1.StartBuildRequest)) string {
	t.Helper()
	req := &agentv1.StartBuildRequest{BuildId: "b-" + random(t)[6:], Spec: agenttest.Uploaded(upload)}
	if change != nil {
		change(req)
	}
	_, err := p.StartBuild(ctx, req)
	require.NoError(t, err)
	return req.GetBuildId()
}

// until follows a build until a step has written text.
func (p *process) until(t *testing.T, ctx context.Context, id, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	stream, err := p.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: id})
	require.NoError(t, err)
	for {
		msg, err := stream.Recv()
		require.NoError(t, err)
		require.Nil(t, msg.GetEvent().GetResult(), "it has ended: %v", msg.GetEvent())
		if strings.Contains(string(msg.GetEvent().GetLog().GetData()), text) {
			return
		}
	}
}

// result waits for the end of a build, which there is once.
func (p *process) result(t *testing.T, ctx context.Context, id string) *agentv1.BuildResult {
	t.Helper()
	return agenttest.CheckEvents(t, agenttest.Watch(t, ctx, p, id, 0), 0)
}

// succeeds wants a build to end well.
func (p *process) succeeds(t *testing.T, ctx context.Context, id string) *agentv1.BuildResult {
	t.Helper()
	r := p.result(t, ctx, id)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, r.GetState(), "%s", prototext.Format(r))
	return r
}
