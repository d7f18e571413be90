package failure

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	solver "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// maxText bounds a message, in bytes.
const maxText = 4 << 10

// Step is what is known of a step that failed.
type Step struct {
	// Name of the step, such as "[2/3] RUN make".
	Name string
	// Error is why it failed.
	Error string
	// LogTail is the last that it wrote.
	LogTail string
}

// Steps tells about the steps of the build that failed.
type Steps interface {
	// Step returns the step with a digest.
	Step(digest string) (Step, bool)
	// Failed returns the step that failed first.
	Failed() (Step, bool)
}

// Of returns what err, with which a build ended, means.
func Of(err error, steps Steps) *agentv1.Failure {
	f := &agentv1.Failure{Message: Message(err), Location: location(err)}
	step, known := failedStep(err, steps)
	if known {
		f.Step, f.LogTail = Text(step.Name), step.LogTail
	}
	var exit *gateway.ExitError
	if errors.As(err, &exit) {
		f.ExitCode = int32(exit.ExitCode)
	}
	f.Reason = reason(err, exit, step, known)
	if advice := advice[f.Reason]; advice != "" {
		f.Message = Text(f.Message + "\n" + advice)
	}
	return f
}

func failedStep(err error, steps Steps) (Step, bool) {
	var vertex *solver.VertexError
	if errors.As(err, &vertex) {
		if s, ok := steps.Step(vertex.GetDigest()); ok {
			return s, true
		}
	}
	return steps.Failed()
}

func reason(err error, exit *gateway.ExitError, step Step, known bool) agentv1.FailureReason {
	text := err.Error()
	if exit != nil {
		for r, says := range limits {
			if says.MatchString(text) {
				return r
			}
		}
	}
	switch {
	case containsAny(text, "no space left on device", "disk quota exceeded"):
		return agentv1.FailureReason_FAILURE_REASON_DISK_FULL
	case exit != nil && exit.ExitCode != gateway.UnknownExitStatus:
		return agentv1.FailureReason_FAILURE_REASON_STEP_FAILED
	case containsAny(text, "is refused:", "are refused:", "is not allowed", "source denied by policy", "denied for builds:", "denied by rule ", "denied by SandboxPolicy ", "entitlement"):
		return agentv1.FailureReason_FAILURE_REASON_DENIED
	case strings.Contains(text, "not available on this node"):
		return agentv1.FailureReason_FAILURE_REASON_INTERNAL
	}
	if known {
		if r := byStep(step.Name, text); r != 0 {
			return r
		}
	}
	return byText(err, text)
}

// limits are what the engine says of a step that a limit has ended, and not what the
// step's command line has, which is quoted.
var limits = map[agentv1.FailureReason]*regexp.Regexp{
	agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY: regexp.MustCompile(`exit code: \d+: out of memory: [^"]*$`),
	agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT: regexp.MustCompile(`exit code: \d+: the limit of \d+ processes and threads was reached$`),
	agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT:    regexp.MustCompile(`exit code: \d+: out of disk: [^"]*$`),
	agentv1.FailureReason_FAILURE_REASON_TIMEOUT:       regexp.MustCompile(`exit code: \d+: timed out: [^"]*$`),
}

var (
	pushes  = regexp.MustCompile(`^(exporting|pushing|\[auth\] .*push|sending )`)
	pulls   = regexp.MustCompile(`load metadata for |\] FROM |^(docker-image|oci-layout)://|^resolve image config|^importing cache`)
	sources = regexp.MustCompile(`^\[internal\] load (git source|remote build context)|^(git|https?|ssh)://|^\[source\]|^git@`)
	copies  = regexp.MustCompile(`\] (COPY|ADD) `)
	runs    = regexp.MustCompile(`\] RUN |^\[step `)
)

// byStep tells the reason by the kind of step, or 0.
func byStep(name, text string) agentv1.FailureReason {
	switch {
	case pushes.MatchString(name):
		return agentv1.FailureReason_FAILURE_REASON_PUSH
	case pulls.MatchString(name):
		return agentv1.FailureReason_FAILURE_REASON_PULL
	case sources.MatchString(name):
		return agentv1.FailureReason_FAILURE_REASON_SOURCE
	case copies.MatchString(name) && containsAny(text, "not found", "no such file", "failed to calculate checksum", "failed to compute cache key"):
		return agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT
	case runs.MatchString(name) && containsAny(text, "failed to calculate checksum", "failed to compute cache key"):
		return agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT
	case runs.MatchString(name) && containsAny(text, "executable file not found", "no such file or directory", "permission denied"):
		return agentv1.FailureReason_FAILURE_REASON_STEP_FAILED
	case runs.MatchString(name):
		// Its process could not be run: that is no fault of the Dockerfile's line.
		return agentv1.FailureReason_FAILURE_REASON_INTERNAL
	}
	return 0
}

// byText tells the reason by what the error says.
func byText(err error, text string) agentv1.FailureReason {
	switch {
	case containsAny(text, "failed to push", "push access denied", "failed to export", "error writing manifest"):
		return agentv1.FailureReason_FAILURE_REASON_PUSH
	case containsAny(text, "failed to resolve source metadata", "pull access denied", "failed to resolve reference"):
		return agentv1.FailureReason_FAILURE_REASON_PULL
	case containsAny(text, "failed to fetch remote", "repository does not contain ref", "failed to load cache key: invalid response status", "git error"):
		return agentv1.FailureReason_FAILURE_REASON_SOURCE
	case containsAny(text, "dockerfile parse error", "failed to read dockerfile", "target stage", "failed to calculate checksum", "unknown instruction", "failed to parse", "circular dependency"),
		len(solver.Sources(err)) > 0,
		grpcerrors.Code(err) == codes.InvalidArgument,
		errdefs.IsInvalidArgument(err):
		return agentv1.FailureReason_FAILURE_REASON_INVALID_INPUT
	}
	return agentv1.FailureReason_FAILURE_REASON_INTERNAL
}

func containsAny(s string, parts ...string) bool {
	for _, p := range parts {
		if strings.Contains(s, p) {
			return true
		}
	}
	return false
}

// advice says what to do about a class of failures.
var advice = map[agentv1.FailureReason]string{
	agentv1.FailureReason_FAILURE_REASON_DISK_FULL:     "Free disk on the node by pruning its caches, give the build more disk, or make it write less.",
	agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY: "Give the build more memory, or make the step use less.",
	agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT: "Give the build more processes (pids), or make the step use fewer.",
	agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT:    "Give the build more disk, or make the step write less.",
}

// location returns the place in a file that err is about.
func location(err error) *agentv1.SourceLocation {
	for _, s := range solver.Sources(err) {
		if s.GetInfo() == nil || len(s.GetRanges()) == 0 {
			continue
		}
		loc := &agentv1.SourceLocation{File: Text(s.GetInfo().GetFilename())}
		for _, r := range s.GetRanges() {
			start, end := r.GetStart().GetLine(), max(r.GetStart().GetLine(), r.GetEnd().GetLine())
			if loc.StartLine == 0 || start < loc.StartLine {
				loc.StartLine = start
			}
			loc.EndLine = max(loc.EndLine, end)
		}
		return loc
	}
	return nil
}

// Message returns the text of err without what only says which remote call carried
// it, and without credentials.
func Message(err error) string {
	s := strings.TrimPrefix(err.Error(), "failed to solve: ")
	if st, ok := grpcerrors.AsGRPCStatus(err); ok && st.Message() != "" {
		s = strings.ReplaceAll(s, fmt.Sprintf("rpc error: code = %s desc = ", st.Code()), "")
	}
	return Text(strings.TrimRight(s, "\n"))
}

// userinfo is the part of a URL that may hold a password.
var userinfo = regexp.MustCompile(`(://)[^/\s@"']+@`)

// Text makes s fit for a record: without credentials of URLs, valid UTF-8 and not
// too long.
func Text(s string) string {
	s = userinfo.ReplaceAllString(strings.ToValidUTF8(s, "\uFFFD"), "$1")
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText-3], "") + "…"
}
