package agent_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func start(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, id string, spec *agentv1.BuildSpec) {
	t.Helper()
	_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
	require.NoError(t, err)
}

// tellOne is the news of a step that goes on.
func tellOne(tell func(*client.SolveStatus)) {
	began := time.Now()
	d := digest.FromString("step")
	tell(&client.SolveStatus{
		Vertexes: []*client.Vertex{{Digest: d, Name: "[1/1] RUN x", Started: &began}},
		Logs:     []*client.VertexLog{{Vertex: d, Stream: 1, Data: []byte("out\n")}},
	})
}

// missingManifest is what exporters tell of an image whose manifest is nowhere.
var missingManifest = map[string]string{"containerimage.descriptor": base64.StdEncoding.EncodeToString(
	fmt.Appendf(nil, `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":7}`, digest.FromString("image")))}

func emptyContent(t *testing.T) content.Provider {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	return store
}

func TestEndsOfBuilds(t *testing.T) {
	agenttest.CheckGoroutines(t)
	brief := agenttest.Dockerfile("FROM scratch")
	brief.Timeout = durationpb.New(50 * time.Millisecond)
	tests := []struct {
		name    string
		engines *faultyEngines
		spec    *agentv1.BuildSpec
		cancel  bool
		state   agentv1.BuildState
		reason  agentv1.FailureReason
		message string
	}{
		{
			name: "well", engines: &faultyEngines{},
			state: agentv1.BuildState_BUILD_STATE_SUCCEEDED,
		}, {
			name: "a manifest that is gone", engines: &faultyEngines{facts: missingManifest, content: emptyContent(t)},
			state: agentv1.BuildState_BUILD_STATE_SUCCEEDED,
		}, {
			name: "no engine", engines: &faultyEngines{open: errors.New("no engine")},
			state: agentv1.BuildState_BUILD_STATE_FAILED, reason: agentv1.FailureReason_FAILURE_REASON_INTERNAL, message: "no engine",
		}, {
			name: "an error", engines: &faultyEngines{do: func(_ context.Context, tell func(*client.SolveStatus)) error {
				tellOne(tell)
				return errors.New("failed to push x: 401 Unauthorized")
			}},
			state: agentv1.BuildState_BUILD_STATE_FAILED, reason: agentv1.FailureReason_FAILURE_REASON_PUSH, message: "401",
		}, {
			name: "a panic", engines: &faultyEngines{do: func(context.Context, func(*client.SolveStatus)) error { panic("boom") }},
			state: agentv1.BuildState_BUILD_STATE_FAILED, reason: agentv1.FailureReason_FAILURE_REASON_INTERNAL, message: "has a fault",
		}, {
			name: "timeout", engines: &faultyEngines{do: blocked}, spec: brief,
			state: agentv1.BuildState_BUILD_STATE_FAILED, reason: agentv1.FailureReason_FAILURE_REASON_TIMEOUT, message: "50ms",
		}, {
			name: "cancel", engines: &faultyEngines{do: blocked}, cancel: true,
			state: agentv1.BuildState_BUILD_STATE_CANCELLED, reason: agentv1.FailureReason_FAILURE_REASON_CANCELLED, message: "enough",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			agenttest.CheckGoroutines(t)
			reg := prometheus.NewRegistry()
			c := agenttest.Serve(t, agenttest.New(t, tt.engines, func(cfg *agent.Config) { cfg.Metrics = agent.NewMetrics(reg) }))
			ctx := agenttest.Context(t, "a")
			spec := tt.spec
			if spec == nil {
				spec = agenttest.Dockerfile("FROM scratch")
			}
			start(t, ctx, c, "one", spec)
			if tt.cancel {
				for range 2 { // it is idempotent
					_, err := c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "one", Reason: "enough"})
					require.NoError(t, err)
				}
			}
			result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "one", 0), 0)
			require.Equal(t, tt.state, result.GetState(), "%v", result)
			require.Equal(t, tt.reason, result.GetFailure().GetReason(), "%v", result)
			require.Contains(t, result.GetFailure().GetMessage(), tt.message)
			got, err := c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "one"})
			require.NoError(t, err, "a cancel after the end changes nothing")
			require.Equal(t, tt.state, got.GetBuild().GetState())
			probe, err := c.Probe(ctx, &agentv1.ProbeRequest{Spec: spec})
			require.NoError(t, err)
			require.Zero(t, probe.GetRunning()+probe.GetQueued())
			require.Eventually(t, func() bool { return tt.engines.left() == 0 }, time.Second, time.Millisecond)
			n, err := testutil.GatherAndCount(reg, "kiln_agent_builds_total")
			require.NoError(t, err)
			require.Equal(t, 1, n)
		})
	}
}

func TestCancelInTheQueue(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{do: blocked}, func(cfg *agent.Config) { cfg.Queue.Slots = 1 }))
	ctx := agenttest.Context(t, "a")
	start(t, ctx, c, "runs", agenttest.Dockerfile("FROM scratch"))
	start(t, ctx, c, "waits", agenttest.Dockerfile("FROM scratch"))
	_, err := c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "waits"})
	require.NoError(t, err)
	events := agenttest.Watch(t, ctx, c, "waits", 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_CANCELLED, agenttest.CheckEvents(t, events, 0).GetState())
	for _, ev := range events {
		require.NotEqual(t, agentv1.BuildState_BUILD_STATE_RUNNING, ev.GetStatus().GetState())
	}
}

func TestDrain(t *testing.T) {
	agenttest.CheckGoroutines(t)
	release := make(chan struct{})
	engines := &faultyEngines{do: func(ctx context.Context, _ func(*client.SolveStatus)) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}}
	a := agenttest.New(t, engines, func(cfg *agent.Config) { cfg.Queue.Slots = 2 })
	c := agenttest.Serve(t, a)
	ctx := agenttest.Context(t, "a")
	for i := range 3 {
		start(t, ctx, c, fmt.Sprint("b", i), agenttest.Dockerfile("FROM scratch"))
	}
	drain, cancel := context.WithCancel(context.Background())
	drained := make(chan error)
	go func() { drained <- a.Drain(drain) }()
	require.Eventually(t, a.Draining, time.Second, time.Millisecond)
	_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "late", Spec: agenttest.Dockerfile("FROM scratch")})
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	waiting := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "b2", 0), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, waiting.GetState())
	require.Contains(t, waiting.GetFailure().GetMessage(), "never started")
	release <- struct{}{} // one of those that run ends well
	cancel()
	require.ErrorIs(t, <-drained, context.Canceled)
	states := map[agentv1.BuildState]int{}
	for i := range 3 {
		result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, fmt.Sprint("b", i), 0), 0)
		states[result.GetState()]++
	}
	require.Equal(t, map[agentv1.BuildState]int{
		agentv1.BuildState_BUILD_STATE_SUCCEEDED: 1, agentv1.BuildState_BUILD_STATE_INTERRUPTED: 2,
	}, states)
	require.NoError(t, a.Drain(context.Background()), "nothing is left")
}

func TestAnUploadIsFreedWithItsBuild(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{do: blocked}, nil))
	ctx := agenttest.Context(t, "a")
	d := agenttest.SendAll(t, ctx, c, []byte("not a tar, which nobody reads here"))
	spec := agenttest.Uploaded(d)
	_, err := c.StartBuild(agenttest.Context(t, "b"), &agentv1.StartBuildRequest{BuildId: "one", Spec: spec})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	start(t, ctx, c, "one", spec)
	start(t, ctx, c, "two", spec)
	_, err = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "one"})
	require.NoError(t, err)
	agenttest.Watch(t, ctx, c, "one", 0)
	probe, err := c.Probe(ctx, &agentv1.ProbeRequest{Spec: spec})
	require.NoError(t, err)
	require.True(t, probe.GetRunnable(), "the other build has it")
	_, err = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "two"})
	require.NoError(t, err)
	agenttest.Watch(t, ctx, c, "two", 0)
	probe, err = c.Probe(ctx, &agentv1.ProbeRequest{Spec: spec})
	require.NoError(t, err)
	require.False(t, probe.GetRunnable())
}

func TestUploadsThatAreNotWhatTheySay(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, func(cfg *agent.Config) { cfg.Uploads.Bytes = 3 << 20 }))
	ctx := agenttest.Context(t, "a")
	data := []byte("data")
	good := digest.FromBytes(data).String()
	tests := []struct {
		name string
		head *agentv1.UploadHeader
		data []byte
		code codes.Code
	}{
		{"another digest", &agentv1.UploadHeader{Digest: digest.FromString("x").String(), Size: 4}, data, codes.DataLoss},
		{"fewer bytes", &agentv1.UploadHeader{Digest: good, Size: 5}, data, codes.DataLoss},
		{"more bytes", &agentv1.UploadHeader{Digest: good, Size: 3}, data, codes.DataLoss},
		{"no digest", &agentv1.UploadHeader{Size: 4}, data, codes.InvalidArgument},
		{"a path as digest", &agentv1.UploadHeader{Digest: "../../x", Size: 4}, data, codes.InvalidArgument},
		{"another tenant", &agentv1.UploadHeader{Tenant: "b", Digest: good, Size: 4}, data, codes.PermissionDenied},
		{"too large", &agentv1.UploadHeader{Digest: good, Size: 4 << 20}, data, codes.ResourceExhausted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := agenttest.Send(ctx, c, tt.head, tt.data)
			require.Equal(t, tt.code, status.Code(err), "%v", err)
			if tt.code != codes.PermissionDenied {
				require.NotEmpty(t, subjects(t, err))
			}
		})
	}
	stream, err := c.UploadSource(ctx)
	require.NoError(t, err)
	require.NoError(t, stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: data}}))
	_, err = stream.CloseAndRecv()
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
}

func TestAnUploadThatStallsIsCutOff(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, func(cfg *agent.Config) {
		cfg.Uploads.Age, cfg.Uploads.TenantCount = 100*time.Millisecond, 1
	}))
	ctx := agenttest.Context(t, "a")
	stream, err := c.UploadSource(ctx)
	require.NoError(t, err)
	require.NoError(t, stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{
		Header: &agentv1.UploadHeader{Digest: digest.FromString("data").String(), Size: 4},
	}}))
	err = stream.RecvMsg(&agentv1.UploadSourceResponse{})
	require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
	require.Eventually(t, func() bool { // its place is free again
		_, err := agenttest.Send(ctx, c, &agentv1.UploadHeader{Digest: digest.FromString("data").String(), Size: 4}, []byte("data"))
		return err == nil
	}, 5*time.Second, 5*time.Millisecond)
}

func TestWatchStartsWhereTheClientLeft(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{do: func(_ context.Context, tell func(*client.SolveStatus)) error {
		tellOne(tell)
		return nil
	}}, nil))
	ctx := agenttest.Context(t, "a")
	start(t, ctx, c, "one", agenttest.Dockerfile("FROM scratch"))
	all := agenttest.Watch(t, ctx, c, "one", 0)
	agenttest.CheckEvents(t, all, 0)
	require.Equal(t, "out\n", agenttest.Output(all))
	for offset := range all {
		agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "one", uint64(offset)), uint64(offset))
	}
	stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: "one", Offset: uint64(len(all))})
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, codes.OutOfRange, status.Code(err), "%v", err)
	require.Contains(t, subjects(t, err), "offset")
}

// TestEveryBuildEndsOnce has many builds of some tenants end in every way, at the
// same time, with watchers that come and go, while the agent is closed and opened
// again: every build that was acknowledged has one result and events without gaps.
func TestEveryBuildEndsOnce(t *testing.T) {
	agenttest.CheckGoroutines(t)
	root := t.TempDir()
	engines := &faultyEngines{do: func(ctx context.Context, tell func(*client.SolveStatus)) error {
		for range rand.IntN(5) {
			tellOne(tell)
		}
		switch rand.IntN(5) {
		case 0:
			panic("boom")
		case 1:
			return errors.New("broken")
		case 2:
			<-ctx.Done()
			return context.Cause(ctx)
		}
		time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
		return nil
	}}
	open := func() *agent.Agent {
		return agenttest.New(t, engines, func(cfg *agent.Config) {
			cfg.Root, cfg.Queue = root, queue.Limits{Slots: 4, PositionInterval: time.Millisecond}
			cfg.Records = record.Limits{BuildsPerTenant: 10000, Builds: 10000}
		})
	}
	acknowledged := map[string][]string{}
	for round := range 3 {
		a := open()
		c, stop := agenttest.ServeUntil(t, a)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range 60 {
			wg.Go(func() {
				who := []string{"a", "b"}[i%2]
				ctx := agenttest.As(context.Background(), who)
				id := fmt.Sprintf("r%d-%d", round, i)
				if _, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: agenttest.Dockerfile("FROM scratch")}); err != nil {
					return
				}
				mu.Lock()
				acknowledged[who] = append(acknowledged[who], id)
				mu.Unlock()
				watchSome(ctx, c, id)
				if i%3 == 0 {
					_, _ = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id})
				}
			})
		}
		time.Sleep(time.Duration(20+rand.IntN(80)) * time.Millisecond)
		require.NoError(t, a.Close())
		stop()
		wg.Wait()
	}
	require.Zero(t, engines.left())
	c := agenttest.Serve(t, open())
	total := 0
	for who, ids := range acknowledged {
		ctx := agenttest.Context(t, who)
		for _, id := range ids {
			result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, id, 0), 0)
			got, err := c.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: id})
			require.NoError(t, err)
			require.Equal(t, result.GetState(), got.GetBuild().GetState())
			total++
		}
	}
	require.NotZero(t, total)
	t.Logf("%d builds", total)
}

// watchSome reads some events and goes.
func watchSome(ctx context.Context, c agentv1.BuildServiceClient, id string) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(rand.IntN(30))*time.Millisecond)
	defer cancel()
	stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: id})
	for err == nil {
		_, err = stream.Recv()
	}
}
