package agent

import (
	"context"
	"errors"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// base starts a Dockerfile over busybox.
const base = "FROM scratch\nCOPY busybox /bin/busybox\n"

func sh(command string) string { return `RUN ["/bin/busybox", "sh", "-c", "` + command + `"]` + "\n" }

// acknowledged is a build that an agent has accepted, with the events that its
// client has seen.
type acknowledged struct {
	request *agentv1.StartBuildRequest
	seen    []*agentv1.Event
}

func header(archive []byte) *agentv1.UploadHeader {
	return &agentv1.UploadHeader{Digest: digest.FromBytes(archive).String(), Size: int64(len(archive))}
}

func (a *agent) acknowledge(ctx context.Context, id string, archive []byte) (*acknowledged, error) {
	head := header(archive)
	if _, err := agenttest.Send(ctx, a, head, archive); err != nil {
		return nil, err
	}
	b := &acknowledged{request: &agentv1.StartBuildRequest{BuildId: id, Spec: agenttest.Uploaded(head.GetDigest())}}
	_, err := a.StartBuild(ctx, b.request)
	return b, err
}

// follow notes the events of a build until its end, and fails when it sees none.
func (a *agent) follow(ctx context.Context, b *acknowledged) error {
	stream, err := a.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: b.request.GetBuildId()})
	for err == nil {
		var msg *agentv1.WatchBuildResponse
		if msg, err = stream.Recv(); err == nil {
			b.seen = append(b.seen, msg.GetEvent())
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
