package agent_test

import (
	"context"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// parted is an archive that a test sends in parts.
var parted = []byte("an archive in parts")

// partOf is the header of a part of it.
func partOf(build string, offset int) *agentv1.UploadHeader {
	return &agentv1.UploadHeader{
		Digest: digest.FromBytes(parted).String(), Size: int64(len(parted)),
		Part: &agentv1.UploadPart{BuildId: build, Offset: int64(offset)},
	}
}

// sendPart sends a part of it and returns how much is there then.
func sendPart(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, build string, from, to int) int {
	t.Helper()
	resp, err := agenttest.Send(ctx, c, partOf(build, from), parted[from:to])
	require.NoError(t, err)
	require.Equal(t, resp.GetReceived() == int64(len(parted)), resp.GetDigest() != "")
	require.NotNil(t, resp.GetExpiresAt())
	return int(resp.GetReceived())
}

func TestAnUploadGoesOnWhereItWas(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{do: blocked}, nil))
	ctx := agenttest.Context(t, "a")
	all := len(parted)
	require.Equal(t, 0, sendPart(t, ctx, c, "one", 0, 0), "nothing has arrived")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 0, 5))
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 0, 5), "a part that is there is not taken again")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 3, 8), "no overlap")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 6, 8), "no gap")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", all, all), "asked")
	require.Equal(t, 0, sendPart(t, ctx, c, "two", 5, all), "of another build nothing has arrived")
	require.Equal(t, 0, sendPart(t, agenttest.Context(t, "b"), c, "one", 5, all), "nor of another tenant")

	// Of a call that is cut off stays what has arrived.
	at := 5
	require.Eventually(t, func() bool {
		cut, cancel := context.WithCancel(ctx)
		stream, err := c.UploadSource(cut)
		require.NoError(t, err)
		require.NoError(t, stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: partOf("one", at)}}))
		require.NoError(t, stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: parted[at : at+4]}}))
		time.Sleep(20 * time.Millisecond)
		cancel()
		at = sendPart(t, ctx, c, "one", 0, 0)
		return at == 9
	}, 10*time.Second, time.Millisecond)
	require.Equal(t, all, sendPart(t, ctx, c, "one", at, all))
	require.Equal(t, all, sendPart(t, ctx, c, "two", 0, 0), "the archive is the tenant's")

	spec := agenttest.Uploaded(digest.FromBytes(parted).String())
	_, err := c.StartBuild(agenttest.Context(t, "b"), &agentv1.StartBuildRequest{BuildId: "one", Spec: spec})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	start(t, ctx, c, "one", spec)
	_, err = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "one"})
	require.NoError(t, err)
	agenttest.Watch(t, ctx, c, "one", 0)
}

func TestThePartThatBeganLastIsTaken(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, nil))
	ctx := agenttest.Context(t, "a")
	stream, err := c.UploadSource(ctx)
	require.NoError(t, err)
	require.NoError(t, stream.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: partOf("one", 0)}}))
	ended := make(chan error, 1)
	go func() { ended <- stream.RecvMsg(&agentv1.UploadSourceResponse{}) }()
	require.Eventually(t, func() bool {
		_, asked := agenttest.Send(ctx, c, partOf("one", 0), nil)
		if status.Code(asked) == codes.Aborted {
			return false // the stream began last
		}
		require.NoError(t, asked)
		select {
		case err = <-ended:
			return true
		default:
			return false
		}
	}, 5*time.Second, 10*time.Millisecond)
	require.Equal(t, codes.Aborted, status.Code(err), "%v", err)
	require.Equal(t, len(parted), sendPart(t, ctx, c, "one", 0, len(parted)))
}

func TestPartsGoWithTheirBuild(t *testing.T) {
	agenttest.CheckGoroutines(t)
	root := t.TempDir()
	open := func() *agent.Agent {
		return agenttest.New(t, &faultyEngines{do: blocked}, func(cfg *agent.Config) { cfg.Root, cfg.Uploads.TenantCount = root, 1 })
	}
	a := open()
	c, stop := agenttest.ServeUntil(t, a)
	ctx := agenttest.Context(t, "a")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 0, 5))
	_, err := agenttest.Send(ctx, c, partOf("two", 0), parted)
	require.Equal(t, codes.ResourceExhausted, status.Code(err), "%v", err)
	_, err = c.CancelBuild(agenttest.Context(t, "b"), &agentv1.CancelBuildRequest{BuildId: "one"})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 0, 0), "another tenant's build has nothing to do with it")
	_, err = c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "one"})
	require.Equal(t, codes.NotFound, status.Code(err), "it was never started: %v", err)
	require.Equal(t, 0, sendPart(t, ctx, c, "one", 0, 0))
	start(t, ctx, c, "one", agenttest.Dockerfile("FROM scratch")) // with another source
	require.Equal(t, 5, sendPart(t, ctx, c, "two", 0, 5))
	require.NoError(t, a.Close())
	stop()
	c = agenttest.Serve(t, open())
	require.Equal(t, 0, sendPart(t, ctx, c, "two", 5, len(parted)), "an agent that starts has nothing")
}

func TestPartsThatAreNotWhatTheySay(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, nil))
	ctx := agenttest.Context(t, "a")
	require.Equal(t, 5, sendPart(t, ctx, c, "one", 0, 5))
	change := func(f func(h *agentv1.UploadHeader)) *agentv1.UploadHeader {
		h := partOf("one", 5)
		f(h)
		return h
	}
	tests := []struct {
		name string
		head *agentv1.UploadHeader
		data string
		code codes.Code
	}{
		{"another total", change(func(h *agentv1.UploadHeader) { h.Size = 6 }), "x", codes.InvalidArgument},
		{"no build", change(func(h *agentv1.UploadHeader) { h.Part.BuildId = "" }), "x", codes.InvalidArgument},
		{"a path as build", change(func(h *agentv1.UploadHeader) { h.Part.BuildId = "../x" }), "x", codes.InvalidArgument},
		{"another tenant", change(func(h *agentv1.UploadHeader) { h.Tenant = "b" }), "x", codes.PermissionDenied},
		{"more than the total", partOf("one", 5), "more than nineteen bytes", codes.DataLoss},
		{"another digest", partOf("one", 5), "xxxxxxxxxxxxxx", codes.DataLoss},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := agenttest.Send(ctx, c, tt.head, []byte(tt.data))
			require.Equal(t, tt.code, status.Code(err), "%v", err)
		})
	}
	require.Equal(t, 0, sendPart(t, ctx, c, "one", 5, len(parted)), "what had another digest is gone")
}
