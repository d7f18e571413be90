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
func (a *Agent) UploadSource(stream uploadStream) error {
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
	in, err := a.beginUpload(stream, first.GetHeader())
	if err != nil {
		return err
	}
	done := make(chan taken, 1)
	go func() { done <- in.take() }()
	// A client that sends nothing more is cut off: returning ends its stream, and
	// with that what takes it.
	late := time.NewTimer(a.uploads.Limits().Age)
	defer late.Stop()
	select {
	case got := <-done:
		if got.err != nil {
			return got.err
		}
		return stream.SendAndClose(got.answer)
	case <-in.takenOver:
		return statusOf(upload.ErrTakenOver)
	case <-late.C:
		return ruled(codes.DeadlineExceeded, "UPLOAD_TOO_SLOW", "", fmt.Sprintf("data: the upload took longer than %s", a.uploads.Limits().Age))
	}
}

// uploadStream is the stream of one upload.
type uploadStream = grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse]

// incoming is what is about to be taken: an archive or a part of one.
type incoming struct {
	take      func() taken
	takenOver <-chan struct{} // nil: it cannot be
}

// taken is how an upload ended.
type taken struct {
	answer *agentv1.UploadSourceResponse
	err    error // a status
}

// beginUpload prepares to take what the header announces.
func (a *Agent) beginUpload(stream uploadStream, head *agentv1.UploadHeader) (incoming, error) {
	d := digest.Digest(head.GetDigest())
	if part := head.GetPart(); part != nil {
		key, err := keyFor(stream.Context(), head.GetTenant(), part.GetBuildId())
		if err != nil {
			return incoming{}, err
		}
		p, err := a.uploads.Resume(key.Tenant, key.ID, d, head.GetSize())
		if err != nil {
			return incoming{}, headerStatus(err)
		}
		return incoming{func() taken { return takePart(stream, p, head) }, p.TakenOver()}, nil
	}
	tenant, err := tenantFor(stream.Context(), head.GetTenant())
	if err != nil {
		return incoming{}, err
	}
	w, err := a.uploads.Create(tenant, d, head.GetSize())
	if err != nil {
		return incoming{}, headerStatus(err)
	}
	return incoming{take: func() taken { return a.takeWhole(stream, w, tenant) }}, nil
}

// headerStatus makes a status of an error about a header.
func headerStatus(err error) error {
	var mismatch *upload.MismatchError
	if errors.As(err, &mismatch) {
		return invalid("header", "%s", mismatch.Message)
	}
	return statusOf(err)
}

// takeWhole stores what arrives, or nothing.
func (a *Agent) takeWhole(stream uploadStream, w *upload.Writer, tenant string) taken {
	err := receive(stream, w)
	if err == nil {
		expires, err := w.Commit()
		return taken{&agentv1.UploadSourceResponse{Digest: w.Digest().String(), ExpiresAt: timestamppb.New(expires)}, statusOf(err)}
	}
	if abort := w.Abort(); abort != nil {
		a.cfg.Logger.Error("cannot remove what arrived of an upload", "tenant", tenant, "error", abort)
	}
	return taken{err: err}
}

// takePart stores what arrives, as much as that is, if it begins where the last part
// ended.
func takePart(stream uploadStream, p *upload.Part, head *agentv1.UploadHeader) taken {
	var err error
	if head.GetPart().GetOffset() == p.Arrived().Bytes {
		err = receive(stream, p)
	}
	arrived, endErr := p.End()
	if err == nil {
		err = statusOf(endErr)
	}
	if err != nil {
		return taken{err: err}
	}
	answer := &agentv1.UploadSourceResponse{Received: arrived.Bytes, ExpiresAt: timestamppb.New(arrived.Expires)}
	if arrived.Whole {
		answer.Digest = head.GetDigest()
	}
	return taken{answer: answer}
}

// receive writes all pieces to w.
func receive(stream uploadStream, w io.Writer) error {
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
