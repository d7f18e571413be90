package nodeengine_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// newAgent returns a client of an agent over real engines.
func newAgent(t *testing.T, root string) agentv1.BuildServiceClient {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RunscPath: agenttest.RepoBin(t, "runsc"),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	return agenttest.Serve(t, agenttest.New(t, nodeengine.New(node), func(c *agent.Config) { c.Root = root }))
}

const base = `FROM scratch
COPY busybox /bin/busybox
`

// sh is a step that runs a shell command.
func sh(command string) string { return `RUN ["/bin/busybox", "sh", "-c", "` + command + `"]` + "\n" }

// build builds a Dockerfile over busybox and returns its events.
func build(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, id string, class agentv1.SandboxClass, dockerfile string, change func(*agentv1.BuildSpec)) []*agentv1.Event {
	t.Helper()
	spec := agenttest.Uploaded(agenttest.SendAll(t, ctx, c, agenttest.BusyboxTar(t, map[string]string{"Dockerfile": dockerfile})))
	spec.Sandbox = class
	if change != nil {
		change(spec)
	}
	_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
	require.NoError(t, err)
	return agenttest.Watch(t, ctx, c, id, 0)
}

// eachClass runs a test in every class of sandbox.
func eachClass(t *testing.T, test func(t *testing.T, class agentv1.SandboxClass, name string)) {
	for _, class := range []agentv1.SandboxClass{agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, agentv1.SandboxClass_SANDBOX_CLASS_USERNS} {
		name := strings.ToLower(strings.TrimPrefix(class.String(), "SANDBOX_CLASS_"))
		t.Run(name, func(t *testing.T) { test(t, class, name) })
	}
}

func TestBuilds(t *testing.T) {
	c := newAgent(t, t.TempDir())
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		file := base + sh("echo hello from a step; echo 1 > /one")
		scoped := func(s *agentv1.BuildSpec) { s.CacheScope = name }
		events := build(t, ctx, c, "ok-"+name, class, file, scoped)
		result := agenttest.CheckEvents(t, events, 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		require.Contains(t, agenttest.Output(events), "hello from a step")
		require.Empty(t, cachedRuns(result))

		// The archive has gone with the build that named it.
		got, err := c.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "ok-" + name})
		require.NoError(t, err)
		require.Equal(t, class, got.GetBuild().GetSandbox())
		_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "gone-" + name, Spec: got.GetBuild().GetSpec()})
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)

		// Its steps are cached for its tenant, and for no other.
		result = agenttest.CheckEvents(t, build(t, ctx, c, "again-"+name, class, file, scoped), 0)
		require.Len(t, cachedRuns(result), 1, "%v", result)
		result = agenttest.CheckEvents(t, build(t, agenttest.Context(t, "b"), c, "ok-"+name, class, file, scoped), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		require.Empty(t, cachedRuns(result), "what another tenant ran is no cache hit")

		spec := agenttest.Dockerfile("FROM scratch")
		spec.CacheScope = name
		require.Eventually(t, func() bool {
			probe, err := c.Probe(ctx, &agentv1.ProbeRequest{Spec: spec})
			require.NoError(t, err)
			return probe.GetLocalCacheBytes() > 1<<20 && probe.GetLastBuiltAt() != nil
		}, 10*time.Second, 10*time.Millisecond, "it knows what the scope has here")
	})

	usage, err := c.DiskUsage(agenttest.Context(t, "controller"), &agentv1.DiskUsageRequest{})
	require.NoError(t, err)
	require.Len(t, usage.GetCaches(), 4)
	for _, u := range usage.GetCaches() {
		require.Positive(t, u.GetSize())
		require.Positive(t, u.GetRecords())
	}
	pruned, err := c.Prune(agenttest.Context(t, "a"), &agentv1.PruneRequest{All: true})
	require.NoError(t, err)
	require.Positive(t, pruned.GetFreed())
	usage, err = c.DiskUsage(agenttest.Context(t, "controller"), &agentv1.DiskUsageRequest{})
	require.NoError(t, err)
	for _, u := range usage.GetCaches() {
		require.Equal(t, u.GetTenant() == "a", u.GetSize() == 0, "%v", u)
	}
}

// cachedRuns are the RUN steps that were not run.
func cachedRuns(result *agentv1.BuildResult) []string {
	var out []string
	for _, s := range result.GetSteps() {
		if strings.Contains(s.GetName(), "RUN") && s.GetCached() {
			out = append(out, s.GetName())
		}
	}
	return out
}

func TestFailures(t *testing.T) {
	c := newAgent(t, t.TempDir())
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		tests := []struct {
			id, file string
			change   func(*agentv1.BuildSpec)
			want     *agentv1.Failure
			message  string
		}{
			{
				id: "exit", file: base + sh("echo it broke; exit 3"),
				want: &agentv1.Failure{
					Reason: agentv1.FailureReason_FAILURE_REASON_STEP_FAILED, ExitCode: 3, LogTail: "it broke\n",
					Location: &agentv1.SourceLocation{File: "Dockerfile", StartLine: 3, EndLine: 3},
				},
				message: "exit code: 3",
			}, {
				id: "no-program", file: base + "RUN [\"/nope\"]\n",
				want: &agentv1.Failure{
					Reason: agentv1.FailureReason_FAILURE_REASON_STEP_FAILED,
				},
				message: "/nope",
			}, {
				id: "syntax", file: "FROM scratch\nFORM x\n",
				want: &agentv1.Failure{
					Reason:   agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT,
					Location: &agentv1.SourceLocation{File: "Dockerfile", StartLine: 2, EndLine: 2},
				},
				message: "FORM",
			}, {
				id: "no-file", file: "FROM scratch\nCOPY nope /\n",
				want: &agentv1.Failure{
					Reason:   agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT,
					Location: &agentv1.SourceLocation{File: "Dockerfile", StartLine: 2, EndLine: 2},
				},
				message: "nope",
			}, {
				id: "no-dockerfile", file: base,
				change:  func(s *agentv1.BuildSpec) { s.GetDockerfile().Path = "other" },
				want:    &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
				message: "other",
			}, {
				id: "base", file: "FROM 127.0.0.1:1/nope:1\n",
				want:    &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_PULL},
				message: "connection refused",
			}, {
				id: "push", file: base,
				change: func(s *agentv1.BuildSpec) {
					s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: "127.0.0.1:1/x:1"}}}}
				},
				want:    &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_PUSH},
				message: "connection refused",
			}, {
				id: "host-network", file: base + strings.Replace(sh("true"), "RUN", "RUN --network=host", 1),
				want:    &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_DENIED},
				message: "not allowed",
			}, {
				id: "timeout", file: base + sh("sleep 60"),
				change:  func(s *agentv1.BuildSpec) { s.Timeout = durationpb.New(2 * time.Second) },
				want:    &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_TIMEOUT},
				message: "timeout of 2s",
			},
		}
		for _, tt := range tests {
			t.Run(tt.id, func(t *testing.T) {
				began := time.Now()
				result := agenttest.CheckEvents(t, build(t, ctx, c, tt.id+"-"+name, class, tt.file, tt.change), 0)
				require.Less(t, time.Since(began), 30*time.Second)
				require.Equal(t, agentv1.BuildState_BUILD_STATE_FAILED, result.GetState(), "%v", result)
				got := result.GetFailure()
				require.Equal(t, tt.want.GetReason(), got.GetReason(), "%v", got)
				require.Equal(t, tt.want.GetExitCode(), got.GetExitCode(), "%v", got)
				require.Equal(t, tt.want.GetLogTail(), got.GetLogTail())
				require.Contains(t, got.GetMessage(), tt.message)
				if tt.want.GetLocation() != nil {
					require.Equal(t, tt.want.GetLocation().String(), got.GetLocation().String(), "%v", got)
				}
			})
		}
	})
}

func TestCancel(t *testing.T) {
	c := newAgent(t, t.TempDir())
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		go func() {
			// As soon as the step runs.
			for {
				time.Sleep(20 * time.Millisecond)
				stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: name})
				if err != nil {
					return
				}
				for {
					msg, err := stream.Recv()
					if err != nil {
						break
					}
					if msg.GetEvent().GetLog() != nil {
						_, _ = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: name, Reason: "enough"})
						return
					}
				}
			}
		}()
		began := time.Now()
		events := build(t, ctx, c, name, class, base+sh("echo runs; sleep 60"), nil)
		result := agenttest.CheckEvents(t, events, 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_CANCELLED, result.GetState(), "%v", result)
		require.Contains(t, result.GetFailure().GetMessage(), "enough")
		require.Less(t, time.Since(began), 15*time.Second)
	})
}

func TestStepsBuild(t *testing.T) {
	c := newAgent(t, t.TempDir())
	ctx := agenttest.Context(t, "a")
	spec := &agentv1.BuildSpec{
		Strategy: &agentv1.BuildSpec_Steps{Steps: &agentv1.StepsStrategy{Steps: []*agentv1.BuilderStep{{Name: "x", Image: "127.0.0.1:1/nope:1"}}}},
	}
	_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "steps", Spec: spec})
	require.NoError(t, err)
	result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "steps", 0), 0)
	require.Equal(t, agentv1.FailureReason_FAILURE_REASON_PULL, result.GetFailure().GetReason(), "%v", result)
}
