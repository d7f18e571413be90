package agent

import (
	"errors"
	"io"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/agent/upload"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// maxPiece bounds one piece of an upload, in bytes.
const maxPiece = 1 << 20

// UploadSource implements agentv1.BuildServiceServer.
func (a *Agent) UploadSource(stream grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse]) error {
	if a.Draining() {
		return unavailable()
	}
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) || err == nil && first.GetHeader() == nil {
		return invalid("header", "must be the first message")
	}
	if err != nil {
		return err
	}
	head := first.GetHeader()
	tenant, err := tenantFor(stream.Context(), head.GetTenant())
	if err != nil {
		return err
	}
	w, err := a.uploads.Create(tenant, digest.Digest(head.GetDigest()), head.GetSize())
	var mismatch *upload.MismatchError
	if errors.As(err, &mismatch) {
		return invalid("header", "%s", mismatch.Message)
	}
	if err != nil {
		return statusOf(err)
	}
	if err := receive(stream, w); err != nil {
		if abort := w.Abort(); abort != nil {
			a.cfg.Logger.Error("cannot remove what arrived of an upload", "tenant", tenant, "error", abort)
		}
		return err
	}
	expires, err := w.Commit()
	if err != nil {
		return statusOf(err)
	}
	return stream.SendAndClose(&agentv1.UploadSourceResponse{Digest: head.GetDigest(), ExpiresAt: timestamppb.New(expires)})
}

// receive writes all pieces to w.
func receive(stream grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse], w io.Writer) error {
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if msg.GetHeader() != nil {
			return invalid("header", "comes only once")
		}
		if len(msg.GetData()) > maxPiece {
			return invalid("data", "a piece has %d bytes, %d is the most", len(msg.GetData()), maxPiece)
		}
		if _, err := w.Write(msg.GetData()); err != nil {
			return statusOf(err)
		}
	}
}
