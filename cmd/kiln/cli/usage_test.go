package cli

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// TestUsageIsShownAtTheEndOfAStep replays a step as kiln logs does.
func TestUsageIsShownAtTheEndOfAStep(t *testing.T) {
	began := time.Unix(1000, 0)
	step := func(change func(*agentv1.StepResult)) *agentv1.Event {
		s := &agentv1.StepResult{Digest: "sha256:1", Name: "[1/1] RUN make", StartedAt: timestamppb.New(began)}
		change(s)
		return &agentv1.Event{Time: timestamppb.New(began.Add(2 * time.Second)), Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: s}}}
	}
	show := func(usage *agentv1.StepUsage) string {
		var out bytes.Buffer
		display, err := progressui.NewDisplay(&out, progressui.PlainMode)
		require.NoError(t, err)
		_, err = replay(t.Context(), func(_ context.Context, fn func(*agentv1.Event) error) error {
			require.NoError(t, fn(step(func(*agentv1.StepResult) {})))
			return fn(step(func(s *agentv1.StepResult) {
				s.EndedAt, s.Usage = timestamppb.New(began.Add(2*time.Second)), usage
			}))
		}, display, nil)
		require.NoError(t, err)
		return out.String()
	}
	require.Contains(t, show(&agentv1.StepUsage{
		Cpu: durationpb.New(812 * time.Millisecond), PeakMemoryBytes: 34 << 20, DiskBytes: 12 << 20, LimitsReached: []string{"log"},
	}), "#1 [1/1] RUN make\n#1 used cpu 0.8s, peak 34MiB, wrote 12MiB, reached its limit of log done\n#1 DONE 2.0s\n")
	require.Contains(t, show(nil), "#1 [1/1] RUN make\n#1 DONE 2.0s\n")
}
