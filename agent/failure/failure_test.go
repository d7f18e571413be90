package failure

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	solver "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// steps are steps by digest; the first that failed has the name "".
type steps map[string]Step

func (s steps) Step(digest string) (Step, bool) { st, ok := s[digest]; return st, ok }
func (s steps) Failed() (Step, bool)            { st, ok := s[""]; return st, ok }

// sent returns err as a client of the engine gets it.
func sent(err error) error {
	return fmt.Errorf("failed to solve: %w", grpcerrors.FromGRPC(grpcerrors.ToGRPC(context.Background(), err)))
}

func TestReasons(t *testing.T) {
	d := digest.FromString("x")
	run := steps{d.String(): {Name: "[2/2] RUN false", LogTail: "tail"}}
	exit := func(code uint32, err error) error {
		return solver.WrapVertex(&gateway.ExitError{ExitCode: code, Err: err}, d)
	}
	failedStep := func(name string) steps { return steps{"": {Name: name}} }
	tests := []struct {
		name  string
		err   error
		steps steps
		want  agentv1.FailureReason
	}{
		{"exit code", exit(3, nil), run, agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
		{"memory", exit(137, errors.New("exit code: 137: out of memory: the limit of 64MiB was reached")), run, agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY},
		{"memory of a command line", exit(1, errors.New(`process "sh -c echo exit code: 1: out of memory: x" did not complete successfully: exit code: 1`)), run, agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
		{"processes", exit(2, errors.New("exit code: 2: the limit of 7 processes and threads was reached")), run, agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT},
		{"a step's disk", exit(1, errors.New("exit code: 1: out of disk: the limit of 1MiB was reached")), run, agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT},
		{"a step's files", exit(1, errors.New("exit code: 1: out of disk: the limit of 99 files was reached")), run, agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT},
		{"a step's time", exit(137, errors.New("exit code: 137: timed out: the limit of 1m0s was reached")), run, agentv1.FailureReason_FAILURE_REASON_TIMEOUT},
		{"time of a command line", exit(1, errors.New(`process "sh -c echo exit code: 1: timed out: x" did not complete successfully: exit code: 1`)), run, agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
		{"disk", solver.WrapVertex(errors.New("write /x: no space left on device"), d), run, agentv1.FailureReason_FAILURE_REASON_DISK_FULL},
		{"network mode", solver.WrapVertex(errors.New(`step.network: denied by rule network-mode: network mode "host" is refused`), d), run, agentv1.FailureReason_FAILURE_REASON_DENIED},
		{"front end", errors.New(`front end "x" is not allowed: …`), nil, agentv1.FailureReason_FAILURE_REASON_DENIED},
		{"source", errors.New(`failed to resolve source metadata for r/x: source "docker-image://r/x:latest" denied by policy: source denied by policy`), nil, agentv1.FailureReason_FAILURE_REASON_DENIED},
		{"address", errors.New(`failed to do request: Head "https://r/v2/": dial tcp 127.0.0.1:443: connection to r (127.0.0.1:443) denied for builds: 127.0.0.0/8 is the loopback of the node`), nil, agentv1.FailureReason_FAILURE_REASON_DENIED},
		{"sandbox", solver.WrapVertex(errors.New("sandbox gvisor is not available on this node: missing runsc"), d), run, agentv1.FailureReason_FAILURE_REASON_INTERNAL},
		{"metadata of a base", errors.New("base: failed to resolve source metadata for x: not found"), failedStep("[internal] load metadata for docker.io/library/base:1"), agentv1.FailureReason_FAILURE_REASON_PULL},
		{"a base's layer", errors.New("unexpected EOF"), failedStep("[stage-0 1/2] FROM docker.io/library/base:1@sha256:1"), agentv1.FailureReason_FAILURE_REASON_PULL},
		{"git", errors.New("exit status 128"), failedStep("[internal] load git source https://example.com/x.git"), agentv1.FailureReason_FAILURE_REASON_SOURCE},
		{"archive", errors.New("invalid response status 404"), failedStep("https://example.com/x.tar"), agentv1.FailureReason_FAILURE_REASON_SOURCE},
		{"push", errors.New("unexpected status 401"), failedStep("exporting to image"), agentv1.FailureReason_FAILURE_REASON_PUSH},
		{"push, told by text", errors.New("failed to push r/x: denied"), nil, agentv1.FailureReason_FAILURE_REASON_PUSH},
		{"a file that is not there", errors.New(`failed to calculate checksum of ref x: "/nope": not found`), failedStep("[1/1] COPY nope /"), agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
		{"syntax", solver.WithSource(errors.New("unknown instruction: FORM"), &solver.Source{}), nil, agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
		{"argument", status.Error(codes.InvalidArgument, "bad"), nil, agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
		{"a program that is not there", solver.WithSource(solver.WrapVertex(errors.New("exec: \"/nope\": no such file or directory"), d), &solver.Source{}), run, agentv1.FailureReason_FAILURE_REASON_STEP_FAILED},
		{"a mount of a file that is not there", solver.WithSource(solver.WrapVertex(errors.New("failed to calculate checksum of ref x: not found"), d), &solver.Source{}), run, agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT},
		{"a sandbox that does not start", solver.WithSource(solver.WrapVertex(errors.New("start the sandbox: EOF"), d), &solver.Source{}), run, agentv1.FailureReason_FAILURE_REASON_INTERNAL},
		{"anything else", errors.New("panic in the engine"), nil, agentv1.FailureReason_FAILURE_REASON_INTERNAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := Of(sent(tt.err), tt.steps)
			require.Equal(t, tt.want, f.GetReason(), "%v", f)
			require.NotContains(t, f.GetMessage(), "failed to solve")
			require.NotContains(t, f.GetMessage(), "rpc error")
		})
	}
}

func TestDetails(t *testing.T) {
	d := digest.FromString("x")
	err := solver.WithSource(
		solver.WrapVertex(&gateway.ExitError{ExitCode: 3}, d),
		&solver.Source{
			Info:   &pb.SourceInfo{Filename: "Dockerfile"},
			Ranges: []*pb.Range{{Start: &pb.Position{Line: 4}, End: &pb.Position{Line: 6}}, {Start: &pb.Position{Line: 2}}},
		})
	f := Of(sent(err), steps{d.String(): {Name: "[2/2] RUN false", LogTail: "tail"}})
	require.Equal(t, "[2/2] RUN false", f.GetStep())
	require.Equal(t, "tail", f.GetLogTail())
	require.EqualValues(t, 3, f.GetExitCode())
	require.Equal(t, "Dockerfile", f.GetLocation().GetFile())
	require.EqualValues(t, 2, f.GetLocation().GetStartLine())
	require.EqualValues(t, 6, f.GetLocation().GetEndLine())
}

func TestText(t *testing.T) {
	tests := map[string]string{
		"plain":                         "plain",
		"https://user:pw@host/x failed": "https://host/x failed",
		`Get "ssh://key@h": no`:         `Get "ssh://h": no`,
		"https://host/a@b":              "https://host/a@b",
		"bad \xff byte":                 "bad \uFFFD byte",
	}
	for in, want := range tests {
		require.Equal(t, want, Text(in))
	}
	long := Text(strings.Repeat("é", maxText))
	require.LessOrEqual(t, len(long), maxText)
	require.True(t, utf8.ValidString(long))
}

func TestByCause(t *testing.T) {
	tests := []struct {
		cause  error
		state  agentv1.BuildState
		reason agentv1.FailureReason
		text   string
	}{
		{&Cancelled{}, agentv1.BuildState_BUILD_STATE_CANCELLED, agentv1.FailureReason_FAILURE_REASON_CANCELLED, "was cancelled."},
		{&Cancelled{"mine"}, agentv1.BuildState_BUILD_STATE_CANCELLED, agentv1.FailureReason_FAILURE_REASON_CANCELLED, "was cancelled: mine"},
		{&TimedOut{time.Minute}, agentv1.BuildState_BUILD_STATE_FAILED, agentv1.FailureReason_FAILURE_REASON_TIMEOUT, "1m0s"},
		{&Interrupted{Waiting: true}, agentv1.BuildState_BUILD_STATE_INTERRUPTED, agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, "never started"},
		{&Interrupted{}, agentv1.BuildState_BUILD_STATE_INTERRUPTED, agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, "The agent ended"},
	}
	for _, tt := range tests {
		ctx, cancel := context.WithCancelCause(context.Background())
		_, _, ok := ByCause(ctx)
		require.False(t, ok)
		cancel(fmt.Errorf("wrapped: %w", tt.cause))
		state, f, ok := ByCause(ctx)
		require.True(t, ok)
		require.Equal(t, tt.state, state)
		require.Equal(t, tt.reason, f.GetReason())
		require.Contains(t, f.GetMessage(), tt.text)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _, ok := ByCause(ctx)
	require.False(t, ok, "nobody said why")
}
