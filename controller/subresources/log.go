package subresources

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// BuildIDHeader of an answer is the run whose events it holds: after the loss of a node a
// build runs again, and its events start again from 0.
const BuildIDHeader = "Kiln-Build-Id"

// pollInterval is how often a Build is read that has no node yet.
const pollInterval = 300 * time.Millisecond

// problem is an error with the answer that it is.
type problem struct {
	code    int
	reason  metav1.StatusReason
	message string
}

func (p *problem) Error() string { return p.message }

func answer(w http.ResponseWriter, err error) {
	var p *problem
	if !errors.As(err, &p) {
		p = &problem{http.StatusInternalServerError, metav1.StatusReasonInternalError, err.Error()}
	}
	writeStatus(w, p.code, p.reason, p.message)
}

// serveLog streams events as JSON, one a line. Without follow it ends with the last event
// there is.
func (s *Server) serveLog(w http.ResponseWriter, r *http.Request) {
	offset, err := strconv.ParseUint(or(r.URL.Query().Get("offset"), "0"), 10, 64)
	if err != nil {
		writeStatus(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "offset: must be a number from 0")
		return
	}
	follow, err := strconv.ParseBool(or(r.URL.Query().Get("follow"), "false"))
	if err != nil {
		writeStatus(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "follow: must be true or false")
		return
	}
	b, err := s.assigned(r.Context(), key(r), follow)
	if err != nil {
		answer(w, err)
		return
	}
	api, err := s.clients.Client(r.Context(), b.Status.Node)
	if err != nil {
		answer(w, &problem{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, err.Error()})
		return
	}
	events, err := api.WatchBuild(r.Context(), &agentv1.WatchBuildRequest{BuildId: b.Status.BuildID, Tenant: b.Namespace, Offset: offset, NoFollow: !follow})
	if err != nil {
		answer(w, fromGRPC(err))
		return
	}
	stream(w, b.Status.BuildID, events)
}

// stream writes events until they end. An error after the first can only cut the stream off:
// a client that has not seen the result comes back.
func stream(w http.ResponseWriter, buildID string, events agentv1.BuildService_WatchBuildClient) {
	flusher := http.NewResponseController(w)
	started := false
	for {
		msg, err := events.Recv()
		if !started {
			if err != nil && !errors.Is(err, io.EOF) {
				answer(w, fromGRPC(err))
				return
			}
			w.Header().Set("Content-Type", "application/x-ndjson")
			w.Header().Set(BuildIDHeader, buildID)
			w.WriteHeader(http.StatusOK)
			started = true
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // The client must not take this for the end.
		}
		line, err := protojson.MarshalOptions{}.Marshal(msg.GetEvent())
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(append(line, '\n')); err != nil {
			return
		}
		if flusher.Flush() != nil {
			return
		}
	}
}

// assigned returns the Build once it has a node and its agent knows it; it waits for that
// when wait is set.
func (s *Server) assigned(ctx context.Context, name types.NamespacedName, wait bool) (*v1alpha1.Build, error) {
	for {
		b, err := s.read(ctx, name)
		if err != nil {
			return nil, err
		}
		if b.Status.BuildID != "" && b.Status.Phase != v1alpha1.PhaseScheduled {
			return b, nil
		}
		if b.Ended() || !wait {
			return nil, notStarted(b)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pollInterval):
		}
	}
}

func notStarted(b *v1alpha1.Build) error {
	message := "the controller has not seen it yet"
	if c := meta.FindStatusCondition(b.Status.Conditions, v1alpha1.ConditionSucceeded); c != nil {
		message = c.Reason + ": " + c.Message
	}
	return &problem{http.StatusConflict, metav1.StatusReasonConflict, fmt.Sprintf("build %q has no log, because it was not started: %s", b.Name, message)}
}

func (s *Server) read(ctx context.Context, name types.NamespacedName) (*v1alpha1.Build, error) {
	b := &v1alpha1.Build{}
	err := s.client.Get(ctx, name, b)
	if apierrors.IsNotFound(err) {
		return nil, &problem{http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("builds.kiln.build %q not found", name.Name)}
	}
	if err != nil {
		return nil, fmt.Errorf("read Build: %w", err)
	}
	return b, nil
}

func key(r *http.Request) types.NamespacedName {
	return types.NamespacedName{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// fromGRPC makes an agent's refusal an answer.
func fromGRPC(err error) error {
	st := status.Convert(err)
	p := &problem{http.StatusInternalServerError, metav1.StatusReasonInternalError, "the agent answers: " + st.Message()}
	switch st.Code() {
	case codes.NotFound:
		p.code, p.reason, p.message = http.StatusGone, metav1.StatusReasonGone, "the agent no longer has the build: "+st.Message()
	case codes.OutOfRange, codes.InvalidArgument, codes.DataLoss:
		p.code, p.reason = http.StatusBadRequest, metav1.StatusReasonBadRequest
	case codes.PermissionDenied:
		p.code, p.reason = http.StatusForbidden, metav1.StatusReasonForbidden
	case codes.ResourceExhausted:
		p.code, p.reason = http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge
	case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted:
		p.code, p.reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
	}
	return p
}
