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
// agent has all of the archive and has verified its digest; 202 when it has taken a part;
// 416 when it has not, because the part does not begin where the last one ended.
func (s *Server) serveUpload(w http.ResponseWriter, r *http.Request) {
	c, err := contentOf(r)
	if err != nil {
		answer(w, err)
		return
	}
	if c.total > s.config.MaxUploadBytes {
		writeStatus(w, http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge,
			fmt.Sprintf("the upload has %d bytes, at most %d are possible", c.total, s.config.MaxUploadBytes))
		return
	}
	b, err := s.awaiting(r.Context(), key(r))
	if err != nil {
		answer(w, err)
		return
	}
	digest := b.Spec.Source.Upload.Digest
	head := &agentv1.UploadHeader{Tenant: b.Namespace, Digest: digest, Size: c.total}
	send := s.send
	if c.part {
		head.Part = &agentv1.UploadPart{BuildId: b.Status.BuildID, Offset: c.offset}
		send = s.sendPart
	}
	taken, err := send(r.Context(), b.Status.Node, head, r.Body)
	if err != nil {
		answer(w, err)
		return
	}
	if taken.GetDigest() == "" {
		answerPart(w, c, taken.GetReceived())
		return
	}
	if err := s.announce(r.Context(), b, digest); err != nil {
		answer(w, err)
		return
	}
	s.log.Info("took an upload", "namespace", b.Namespace, "build", b.Name, "node", b.Status.Node, "bytes", c.total)
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
		case b.Ended() || b.DeletionTimestamp != nil || b.Spec.State == v1alpha1.StateCancelled || (b.Status.BuildID != "" && b.Status.Phase != v1alpha1.PhaseScheduled):
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

// send streams the body to the agent of a node.
func (s *Server) send(ctx context.Context, node string, head *agentv1.UploadHeader, body io.Reader) (*agentv1.UploadSourceResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	up, cut, err := s.pour(ctx, node, head, body)
	if err != nil {
		return nil, err
	}
	if cut != nil {
		return nil, &problem{http.StatusBadRequest, metav1.StatusReasonBadRequest, fmt.Sprintf("receive upload: %v", cut)}
	}
	taken, err := up.CloseAndRecv()
	if err != nil {
		return nil, fromGRPC(err)
	}
	return taken, nil
}

// pour sends the header and the body until that ends, is cut off, which cut tells, or the
// agent has no use for more, which its answer tells.
func (s *Server) pour(ctx context.Context, node string, head *agentv1.UploadHeader, body io.Reader) (up agentv1.BuildService_UploadSourceClient, cut, err error) {
	api, err := s.clients.Client(ctx, node)
	if err != nil {
		return nil, nil, &problem{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, err.Error()}
	}
	if up, err = api.UploadSource(ctx); err != nil {
		return nil, nil, fromGRPC(err)
	}
	err = up.Send(&agentv1.UploadSourceRequest{Part: &agentv1.UploadSourceRequest_Header{Header: head}})
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
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return up, err, nil
	}
	return up, nil, nil
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
