package agenttwin

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func noUpload(digest string) error {
	st, err := status.New(codes.FailedPrecondition, "spec.source.upload.digest: "+digest+" was not uploaded").WithDetails(&errdetails.ErrorInfo{Reason: "NO_UPLOAD", Domain: "kiln.build"})
	if err != nil {
		return err
	}
	return st.Err()
}

// arriving is an archive of which parts have arrived. Of the content only the hash is kept.
type arriving struct {
	sum      hash.Hash
	received int64
}

// UploadSource takes an archive, or a part of one, and forgets its content.
func (t *Twin) UploadSource(stream grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	h := first.GetHeader()
	if h == nil {
		return status.Error(codes.InvalidArgument, "header: must come first")
	}
	a := t.arriving(h)
	if p := h.GetPart(); p != nil && (t.has(h) || p.Offset != a.received) {
		return stream.SendAndClose(t.partAnswer(h, a))
	}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		t.mu.Lock()
		a.received += int64(len(msg.GetData()))
		_, _ = a.sum.Write(msg.GetData())
		t.mu.Unlock()
	}
	if h.GetPart() != nil && a.received < h.Size {
		return stream.SendAndClose(t.partAnswer(h, a))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.parts, h.GetPart().GetBuildId())
	if got := "sha256:" + hex.EncodeToString(a.sum.Sum(nil)); got != h.Digest || a.received != h.Size {
		return status.Errorf(codes.DataLoss, "digest: the data has %s and %d bytes", got, a.received)
	}
	t.uploads[h.Tenant+"/"+h.Digest] = true
	return stream.SendAndClose(&agentv1.UploadSourceResponse{Digest: h.Digest, Received: a.received})
}

// arriving returns what has arrived of the archive.
func (t *Twin) arriving(h *agentv1.UploadHeader) *arriving {
	t.mu.Lock()
	defer t.mu.Unlock()
	build := h.GetPart().GetBuildId()
	a := t.parts[build]
	if a == nil {
		a = &arriving{sum: sha256.New()}
		if build != "" {
			t.parts[build] = a
		}
	}
	return a
}

func (t *Twin) has(h *agentv1.UploadHeader) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.uploads[h.Tenant+"/"+h.Digest]
}

func (t *Twin) partAnswer(h *agentv1.UploadHeader, a *arriving) *agentv1.UploadSourceResponse {
	if t.has(h) {
		return &agentv1.UploadSourceResponse{Digest: h.Digest, Received: h.Size}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return &agentv1.UploadSourceResponse{Received: a.received}
}
