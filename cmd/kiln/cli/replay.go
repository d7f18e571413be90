package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// eventSource gives a build's events, in order, to fn, until the build's result
// was given or there are no more.
type eventSource func(ctx context.Context, fn func(*agentv1.Event) error) error

// replay shows a build's events as the progress of kiln build, and returns its
// result; nil: the events ended without one.
func replay(ctx context.Context, events eventSource, display progressui.Display, notice io.Writer) (*agentv1.BuildResult, error) {
	ch := make(chan *client.SolveStatus)
	var result *agentv1.BuildResult
	eg := errgroup.Group{}
	eg.Go(func() error {
		defer close(ch)
		return events(ctx, func(ev *agentv1.Event) error {
			if r := ev.GetResult(); r != nil {
				result = r
				return nil
			}
			if s := ev.GetStatus(); s != nil && s.GetState() == agentv1.BuildState_BUILD_STATE_QUEUED && notice != nil {
				fmt.Fprintf(notice, "kiln: waits in the queue of its node, at place %d\n", s.GetQueuePosition())
			}
			if s := solveStatus(ev); s != nil {
				ch <- s
			}
			return nil
		})
	})
	eg.Go(func() error {
		// It drains the channel also when ctx has ended.
		_, err := display.UpdateFrom(context.WithoutCancel(ctx), ch)
		return err
	})
	return result, eg.Wait()
}

// solveStatus returns an event as BuildKit's client would tell it; nil when there
// is nothing to show.
func solveStatus(ev *agentv1.Event) *client.SolveStatus {
	at := ev.GetTime().AsTime()
	switch kind := ev.GetKind().(type) {
	case *agentv1.Event_Step:
		s := kind.Step.GetStep()
		v := &client.Vertex{
			Digest: digest.Digest(s.GetDigest()), Name: s.GetName(), Cached: s.GetCached(), Error: s.GetError(),
			Started: timeOf(s.GetStartedAt()), Completed: timeOf(s.GetEndedAt()),
		}
		for _, in := range kind.Step.GetInputs() {
			v.Inputs = append(v.Inputs, digest.Digest(in))
		}
		if g := kind.Step.GetGroup(); g != "" {
			v.ProgressGroup = &pb.ProgressGroup{Id: g, Name: g}
		}
		out := &client.SolveStatus{Vertexes: []*client.Vertex{v}}
		if st := usageStatus(v, s.GetUsage()); st != nil {
			out.Statuses = []*client.VertexStatus{st}
		}
		return out
	case *agentv1.Event_Log:
		stream := 1
		if kind.Log.GetStream() == agentv1.LogStream_LOG_STREAM_STDERR {
			stream = 2
		}
		return &client.SolveStatus{Logs: []*client.VertexLog{{
			Vertex: digest.Digest(kind.Log.GetStep()), Stream: stream, Data: kind.Log.GetData(), Timestamp: at,
		}}}
	case *agentv1.Event_Progress:
		p := kind.Progress
		return &client.SolveStatus{Statuses: []*client.VertexStatus{{
			ID: p.GetId(), Vertex: digest.Digest(p.GetStep()), Name: p.GetAction(), Current: p.GetCurrent(), Total: p.GetTotal(),
			Timestamp: at, Started: timeOf(p.GetStartedAt()), Completed: timeOf(p.GetCompletedAt()),
		}}}
	case *agentv1.Event_Warning:
		w := &client.VertexWarning{Vertex: digest.Digest(kind.Warning.GetStep()), Short: []byte(kind.Warning.GetMessage()), URL: kind.Warning.GetUrl()}
		for _, d := range kind.Warning.GetDetail() {
			w.Detail = append(w.Detail, []byte(d))
		}
		return &client.SolveStatus{Warnings: []*client.VertexWarning{w}}
	}
	return nil
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	v := t.AsTime()
	return &v
}

// resultError returns what went wrong; nil when the build succeeded.
func resultError(r *agentv1.BuildResult) error {
	if r.GetState() == agentv1.BuildState_BUILD_STATE_SUCCEEDED {
		return nil
	}
	f := r.GetFailure()
	state := strings.ToLower(strings.TrimPrefix(r.GetState().String(), "BUILD_STATE_"))
	if f.GetMessage() == "" {
		return fmt.Errorf("the build is %s", state)
	}
	where := ""
	if l := f.GetLocation(); l.GetFile() != "" {
		where = fmt.Sprintf("%s:%d: ", l.GetFile(), l.GetStartLine())
	}
	return fmt.Errorf("the build is %s: %s%s", state, where, f.GetMessage())
}
