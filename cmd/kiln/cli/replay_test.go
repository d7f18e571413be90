package cli

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestReplayShowsStepsAndOutput(t *testing.T) {
	now := timestamppb.New(time.Unix(1000, 0))
	const step = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	events := []*agentv1.Event{
		{Kind: &agentv1.Event_Status{Status: &agentv1.StatusEvent{State: agentv1.BuildState_BUILD_STATE_QUEUED, QueuePosition: 3}}},
		{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: &agentv1.StepResult{Digest: step, Name: "[1/1] RUN make", StartedAt: now}}}},
		{Time: now, Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{Step: step, Data: []byte("compiled\n")}}},
		{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: &agentv1.StepResult{Digest: step, Name: "[1/1] RUN make", StartedAt: now, EndedAt: now}}}},
		{Kind: &agentv1.Event_Result{Result: &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_FAILED, Failure: &agentv1.Failure{
			Message: "no luck", Location: &agentv1.SourceLocation{File: "Dockerfile", StartLine: 7}}}}},
	}
	var out, notice bytes.Buffer
	display, err := newDisplay(&out, string(progressui.PlainMode))
	require.NoError(t, err)
	r, err := replay(context.Background(), func(_ context.Context, fn func(*agentv1.Event) error) error {
		for _, ev := range events {
			if err := fn(ev); err != nil {
				return err
			}
		}
		return nil
	}, display, &notice)
	require.NoError(t, err)
	require.Contains(t, out.String(), "[1/1] RUN make")
	require.Contains(t, out.String(), "compiled")
	require.Contains(t, notice.String(), "at place 3")
	require.EqualError(t, resultError(r), "the build is failed: Dockerfile:7: no luck")
	require.NoError(t, resultError(&agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED}))

	broken := errors.New("broken")
	display, err = newDisplay(&out, string(progressui.PlainMode))
	require.NoError(t, err)
	_, err = replay(context.Background(), func(context.Context, func(*agentv1.Event) error) error { return broken }, display, nil)
	require.ErrorIs(t, err, broken)
}
