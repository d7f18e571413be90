package subresources

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/build"
)

const (
	// chunk is the size of a piece of an upload.
	chunk = 256 << 10
	// uploadWait is how long an upload waits for its Build to have a node.
	uploadWait = 30 * time.Second
)

// serveUpload sends the body to the agent of the Build's node. The answer is 200 when the
// agent has it and has verified its digest.
func (s *Server) serveUpload(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength < 0 {
		writeStatus(w, http.StatusLengthRequired, metav1.StatusReasonBadRequest, "the upload must say its length")
		return
	}
	if r.ContentLength > s.config.MaxUploadBytes {
		writeStatus(w, http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge,
			fmt.Sprintf("the upload has %d bytes, at most %d are possible", r.ContentLength, s.config.MaxUploadBytes))
		return
	}
	b, err := s.awaiting(r.Context(), key(r))
	if err != nil {
		answer(w, err)
		return
	}
	digest := b.Spec.Source.Upload.Digest
	if err := s.send(r.Context(), b, digest, r.Body, r.ContentLength); err != nil {
		answer(w, err)
		return
	}
	if err := s.announce(r.Context(), b, digest); err != nil {
		answer(w, err)
		return
	}
	s.log.Info("took an upload", "namespace", b.Namespace, "build", b.Name, "node", b.Status.Node, "bytes", r.ContentLength)
	writeJSON(&metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusOK})(w, r)
}

// awaiting returns the Build once it waits for its upload.
func (s *Server) awaiting(ctx context.Context, name types.NamespacedName) (*v1alpha1.Build, error) {
	ctx, cancel := context.WithTimeout(ctx, uploadWait)
	defer cancel()
	for {
		b, err := s.read(ctx, name)
		if err != nil {
			return nil, err
		}
		switch {
		case b.Spec.Source == nil || b.Spec.Source.Upload == nil:
			return nil, &problem{http.StatusBadRequest, metav1.StatusReasonBadRequest, "spec.source.upload: the build takes no upload"}
		case b.Ended() || (b.Status.BuildID != "" && b.Status.Phase != v1alpha1.PhaseScheduled):
			return nil, &problem{http.StatusConflict, metav1.StatusReasonConflict, "the build has its source already, or has ended"}
		case b.Status.BuildID != "":
			return b, nil
		}
		select {
		case <-ctx.Done():
			return nil, &problem{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "the build has no node yet; " + notStarted(b).Error()}
		case <-time.After(pollInterval):
		}
	}
}

// send streams the body to the agent.
func (s *Server) send(ctx context.Context, b *v1alpha1.Build, digest string, body io.Reader, size int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	api, err := s.clients.Client(ctx, b.Status.Node)
	if err != nil {
		return &problem{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, err.Error()}
	}
	up, err := api.UploadSource(ctx)
	if err != nil {
		return fromGRPC(err)
	}
	err = up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: &agentv1.UploadHeader{Tenant: b.Namespace, Digest: digest, Size: size}}})
	buf := make([]byte, chunk)
	for err == nil {
		var n int
		n, err = io.ReadFull(body, buf)
		if n > 0 {
			if sendErr := up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Data{Data: buf[:n]}}); sendErr != nil {
				err = sendErr
			}
		}
	}
	// EOF is either the end of the body or the agent's refusal, which the answer tells.
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return &problem{http.StatusBadRequest, metav1.StatusReasonBadRequest, fmt.Sprintf("receive upload: %v", err)}
	}
	if _, err := up.CloseAndRecv(); err != nil {
		return fromGRPC(err)
	}
	return nil
}

// announce tells the controller that leads that the source is there.
func (s *Server) announce(ctx context.Context, b *v1alpha1.Build, digest string) error {
	patched := b.DeepCopy()
	if patched.Annotations == nil {
		patched.Annotations = map[string]string{}
	}
	patched.Annotations[build.UploadedAnnotation] = digest
	if err := s.client.Patch(ctx, patched, client.MergeFrom(b)); err != nil {
		return fmt.Errorf("record upload: %w", err)
	}
	return nil
}
