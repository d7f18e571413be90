package translate

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

var reasons = map[agentv1.FailureReason]string{
	agentv1.FailureReason_FAILURE_REASON_STEP_FAILED:   v1alpha1.ReasonStepFailed,
	agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY: v1alpha1.ReasonOutOfMemory,
	agentv1.FailureReason_FAILURE_REASON_TIMEOUT:       v1alpha1.ReasonTimeout,
	agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT: v1alpha1.ReasonInvalidInput,
	agentv1.FailureReason_FAILURE_REASON_SOURCE:        v1alpha1.ReasonSourceFailed,
	agentv1.FailureReason_FAILURE_REASON_PULL:          v1alpha1.ReasonPullFailed,
	agentv1.FailureReason_FAILURE_REASON_PUSH:          v1alpha1.ReasonPushFailed,
	agentv1.FailureReason_FAILURE_REASON_DENIED:        v1alpha1.ReasonDenied,
	agentv1.FailureReason_FAILURE_REASON_DISK_FULL:     v1alpha1.ReasonDiskFull,
	agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT: v1alpha1.ReasonProcessLimit,
	agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT:    v1alpha1.ReasonDiskLimit,
	agentv1.FailureReason_FAILURE_REASON_INTERRUPTED:   v1alpha1.ReasonNodeLost,
	agentv1.FailureReason_FAILURE_REASON_CANCELLED:     v1alpha1.ReasonCancelled,
	agentv1.FailureReason_FAILURE_REASON_INTERNAL:      v1alpha1.ReasonInternal,
}

// Failure returns the agent's failure as a status has it. A reason that this version
// does not know is Internal.
func Failure(f *agentv1.Failure) *v1alpha1.FailureDetails {
	d := &v1alpha1.FailureDetails{Reason: reasons[f.GetReason()], Message: Text(f.GetMessage(), 8192), Step: name(f.GetStep()), LogTail: Text(f.GetLogTail(), 4096)}
	if d.Reason == "" {
		d.Reason = v1alpha1.ReasonInternal
	}
	if f.GetExitCode() != 0 {
		d.ExitCode = &f.ExitCode
	}
	if l := f.GetLocation(); l != nil {
		d.Location = &v1alpha1.FailureLocation{File: Text(l.File, 1024), Line: l.StartLine}
	}
	return d
}

// Output returns what a build made as a status has it; nil: nothing.
func Output(o *v1alpha1.Output, r *agentv1.BuildResult) *v1alpha1.OutputStatus {
	if r.GetImageDigest() == "" && len(r.GetImageNames()) == 0 {
		return nil
	}
	out := &v1alpha1.OutputStatus{Digest: Text(r.ImageDigest, 256), Size: r.ImageSize}
	if o != nil {
		out.Image = o.Image
	}
	if _, hex, ok := strings.Cut(out.Digest, ":"); ok && len(hex) >= 12 {
		out.ShortDigest = hex[:12]
	}
	for _, n := range r.ImageNames[:min(len(r.ImageNames), 64)] {
		out.Names = append(out.Names, Text(n, 1024))
	}
	return out
}

// Step returns a step as a status has it.
func Step(s *agentv1.StepResult) v1alpha1.StepStatus {
	out := v1alpha1.StepStatus{Name: name(s.GetName()), StartTime: Time(s.GetStartedAt()), Cached: s.GetCached(), Error: Text(s.GetError(), 256)}
	if s.GetStartedAt().IsValid() && s.GetEndedAt().IsValid() {
		ms := max(0, s.EndedAt.AsTime().Sub(s.StartedAt.AsTime()).Milliseconds())
		out.DurationMilliseconds = &ms
	}
	if u := s.GetUsage(); u != nil {
		out.Usage = &v1alpha1.StepUsage{CPUMilliseconds: u.GetCpu().AsDuration().Milliseconds(), PeakMemoryBytes: u.GetPeakMemoryBytes(), DiskBytes: u.GetDiskBytes()}
		for _, l := range u.GetLimitsReached()[:min(len(u.GetLimitsReached()), 16)] {
			out.Usage.LimitsReached = append(out.Usage.LimitsReached, Text(l, 32))
		}
	}
	return out
}

// name returns the start of a step's name.
func name(s string) string {
	for len(s) > 256 {
		_, n := utf8.DecodeLastRuneInString(s[:257])
		s = s[:257-max(n, 1)]
	}
	return Text(s, 256)
}

// Time returns t in the API's form; nil when it is unset.
func Time(t *timestamppb.Timestamp) *metav1.Time {
	if !t.IsValid() || t.AsTime().Unix() == 0 {
		return nil
	}
	return &metav1.Time{Time: t.AsTime()}
}

// Text returns s as valid UTF-8 without control characters but newline and tab, and of
// at most max bytes: what an API object can hold and a terminal can show. Of a longer
// text the end is kept, because that is where the fault is.
func Text(s string, most int) string {
	if len(s) > most {
		s = s[len(s)-most:]
		for len(s) > 0 && !utf8.RuneStart(s[0]) {
			s = s[1:]
		}
	}
	s = strings.ToValidUTF8(s, "�")
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || !unicode.IsControl(r) {
			return r
		}
		return -1
	}, s)
	for len(s) > most { // Replacement made it longer.
		_, n := utf8.DecodeRuneInString(s)
		s = s[n:]
	}
	return s
}
