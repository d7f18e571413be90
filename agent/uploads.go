package agent

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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
	done := make(chan taken, 1)
	go func() { done <- a.take(stream, w, tenant) }()
	// A client that sends nothing more is cut off: returning ends its stream, and
	// with that what takes it.
	late := time.NewTimer(a.uploads.Limits().Age)
	defer late.Stop()
	select {
	case got := <-done:
		if got.err != nil {
			return got.err
		}
		return stream.SendAndClose(&agentv1.UploadSourceResponse{Digest: head.GetDigest(), ExpiresAt: timestamppb.New(got.expires)})
	case <-late.C:
		return ruled(codes.DeadlineExceeded, "UPLOAD_TOO_SLOW", "", fmt.Sprintf("data: the upload took longer than %s", a.uploads.Limits().Age))
	}
}

// taken is how an upload ended.
type taken struct {
	expires time.Time
	err     error // a status
}

// take stores what arrives, or nothing.
func (a *Agent) take(stream grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse], w *upload.Writer, tenant string) taken {
	err := receive(stream, w)
	if err == nil {
		expires, err := w.Commit()
		return taken{expires, statusOf(err)}
	}
	if abort := w.Abort(); abort != nil {
		a.cfg.Logger.Error("cannot remove what arrived of an upload", "tenant", tenant, "error", abort)
	}
	return taken{err: err}
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
