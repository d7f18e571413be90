package agenttwin

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
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

// UploadSource takes an archive and forgets its content.
func (t *Twin) UploadSource(stream grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	h := first.GetHeader()
	if h == nil {
		return status.Error(codes.InvalidArgument, "header: must come first")
	}
	sum, size := sha256.New(), int64(0)
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		size += int64(len(msg.GetData()))
		_, _ = sum.Write(msg.GetData())
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != h.Digest || size != h.Size {
		return status.Errorf(codes.DataLoss, "digest: the data has %s and %d bytes", got, size)
	}
	t.mu.Lock()
	t.uploads[h.Tenant+"/"+h.Digest] = true
	t.mu.Unlock()
	return stream.SendAndClose(&agentv1.UploadSourceResponse{Digest: h.Digest})
}
