package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ConditionSucceeded is the one condition of a Build. Unknown: it goes on, and the
// reason tells what it waits for or does. True and False: it has ended, and nothing
// of its status changes any more.
const ConditionSucceeded = "Succeeded"

// Reasons of the condition Succeeded while it is Unknown.
const (
	// ReasonPending: the controller has seen it and chooses a node.
	ReasonPending = "Pending"
	// ReasonWaitingForInput: something that the spec names does not exist; the message names
	// the field and the object. It ends as MissingInput unless that appears within the grace period.
	ReasonWaitingForInput = "WaitingForInput"
	// ReasonNoNode: no node can take it at present; the message says why, for each node.
	ReasonNoNode = "NoNode"
	// ReasonAwaitingUpload: the node is chosen; the source has to be sent to the upload subresource.
	ReasonAwaitingUpload = "AwaitingUpload"
	// ReasonScheduled: the node is chosen, the agent has not confirmed yet.
	ReasonScheduled = "Scheduled"
	// ReasonQueued: it waits on its node.
	ReasonQueued = "Queued"
	// ReasonRunning: it runs.
	ReasonRunning = "Running"
	// ReasonCancelling: it is asked to end.
	ReasonCancelling = "Cancelling"
	// ReasonNodeUnreachable: its agent does not answer; the controller waits for it for the grace period.
	ReasonNodeUnreachable = "NodeUnreachable"
)

// ReasonSucceeded is the reason of the condition Succeeded when it is True.
const ReasonSucceeded = "Succeeded"

// Reasons of the condition Succeeded when it is False. failureDetails.reason is the same.
const (
	// ReasonStepFailed: a step's process ended with another code than 0.
	ReasonStepFailed = "StepFailed"
	// ReasonOutOfMemory: a step used more memory than its limit.
	ReasonOutOfMemory = "OutOfMemory"
	// ReasonProcessLimit: a step could not start one more process or thread, by its limit.
	ReasonProcessLimit = "ProcessLimit"
	// ReasonDiskLimit: a step wrote more bytes or files than its limit.
	ReasonDiskLimit = "DiskLimit"
	// ReasonTimeout: the build or a step took longer than its limit.
	ReasonTimeout = "Timeout"
	// ReasonInvalidInput: the spec, the Dockerfile or another input is wrong.
	ReasonInvalidInput = "InvalidInput"
	// ReasonMissingInput: something that the spec names does not exist.
	ReasonMissingInput = "MissingInput"
	// ReasonSourceFailed: the source could not be fetched.
	ReasonSourceFailed = "SourceFailed"
	// ReasonPullFailed: a base image could not be pulled.
	ReasonPullFailed = "PullFailed"
	// ReasonPushFailed: the image could not be pushed or stored.
	ReasonPushFailed = "PushFailed"
	// ReasonDenied: policy refused it; the message names the rule.
	ReasonDenied = "Denied"
	// ReasonDiskFull: the node's disk or the build's share of it is full.
	ReasonDiskFull = "DiskFull"
	// ReasonNodeLost: the node or its agent ended in the middle of the build.
	ReasonNodeLost = "NodeLost"
	// ReasonCancelled: the user cancelled it.
	ReasonCancelled = "Cancelled"
	// ReasonInternal: the fault is kiln's or the node's.
	ReasonInternal = "Internal"
)

// Phase is the condition in one word, for people and simple scripts.
//
// +kubebuilder:validation:Enum=Pending;Scheduled;Queued;Running;Succeeded;Failed;Cancelled
type Phase string

// Phases of a build.
const (
	PhasePending   Phase = "Pending"
	PhaseScheduled Phase = "Scheduled"
	PhaseQueued    Phase = "Queued"
	PhaseRunning   Phase = "Running"
	PhaseSucceeded Phase = "Succeeded"
	PhaseFailed    Phase = "Failed"
	PhaseCancelled Phase = "Cancelled"
)

// MaxStatusSteps is how many steps a status holds at most.
const MaxStatusSteps = 256

// BuildStatus is how far a build has come.
type BuildStatus struct {
	// The generation of the spec that the rest was computed from.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// The condition Succeeded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// The condition in one word.
	// +optional
	Phase Phase `json:"phase,omitempty"`
	// The node that was chosen. It is written before the node's agent is asked to build.
	// +optional
	Node string `json:"node,omitempty"`
	// The class of sandbox of its steps.
	// +optional
	// +kubebuilder:validation:Enum=gvisor;userns
	Sandbox string `json:"sandbox,omitempty"`
	// The build's name on the agent: the UID of this object, with "-1" after it when it runs
	// for the second time.
	// +optional
	BuildID string `json:"buildID,omitempty"`
	// How often it was started again after its node was lost.
	// +optional
	Retries int32 `json:"retries,omitempty"`
	// Place in the queue of its node, from 1.
	// +optional
	QueuePosition int32 `json:"queuePosition,omitempty"`
	// When its node was chosen.
	// +optional
	ScheduledTime *metav1.Time `json:"scheduledTime,omitempty"`
	// When it left the queue.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// When it ended.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// From startTime to completionTime.
	// +optional
	Duration string `json:"duration,omitempty"`
	// Since when its agent does not answer.
	// +optional
	UnreachableSince *metav1.Time `json:"unreachableSince,omitempty"`
	// What was made.
	// +optional
	Output *OutputStatus `json:"output,omitempty"`
	// What was built.
	// +optional
	Source *SourceStatus `json:"source,omitempty"`
	// Its steps in the order in which they started; the first 256.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Steps []StepStatus `json:"steps,omitempty"`
	// Number of its steps, also of those that are left out above.
	// +optional
	StepCount int32 `json:"stepCount,omitempty"`
	// What went wrong.
	// +optional
	FailureDetails *FailureDetails `json:"failureDetails,omitempty"`
}

// OutputStatus is what a build made.
type OutputStatus struct {
	// The name as it was asked for.
	// +optional
	Image string `json:"image,omitempty"`
	// Digest of the image's index or manifest.
	// +optional
	Digest string `json:"digest,omitempty"`
	// The first 12 digits of the digest.
	// +optional
	ShortDigest string `json:"shortDigest,omitempty"`
	// Size of the image's configuration and layers in bytes, as they are pushed. Of an
	// index it is the sum for all its platforms, without attestations.
	// +optional
	Size int64 `json:"size,omitempty"`
	// Names under which it was pushed or stored.
	// +optional
	// +listType=atomic
	Names []string `json:"names,omitempty"`
}

// SourceStatus is what a build was made from.
type SourceStatus struct {
	// The git repository.
	// +optional
	Git *GitStatus `json:"git,omitempty"`
}

// GitStatus is what was taken from a git repository.
type GitStatus struct {
	// The commit.
	Revision string `json:"revision"`
}

// StepStatus is how one step went.
type StepStatus struct {
	// Its name, such as "[build 2/5] RUN make"; at most 256 bytes.
	Name string `json:"name"`
	// When it started.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// From its start to its end, in milliseconds.
	// +optional
	DurationMilliseconds *int64 `json:"durationMilliseconds,omitempty"`
	// Whether its result was there already.
	// +optional
	Cached bool `json:"cached,omitempty"`
	// Why it failed.
	// +optional
	Error string `json:"error,omitempty"`
	// What its process used; unset without a process, and when the result was there already.
	// +optional
	Usage *StepUsage `json:"usage,omitempty"`
}

// StepUsage is what the processes of a step used of the node.
type StepUsage struct {
	// CPU time in milliseconds.
	// +optional
	CPUMilliseconds int64 `json:"cpuMilliseconds,omitempty"`
	// The most memory at a time, in bytes.
	// +optional
	PeakMemoryBytes int64 `json:"peakMemoryBytes,omitempty"`
	// Bytes that it left on disk.
	// +optional
	DiskBytes int64 `json:"diskBytes,omitempty"`
	// Limits that it ran into: memory, pids, timeout, disk, inodes, log.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	LimitsReached []string `json:"limitsReached,omitempty"`
}

// FailureDetails tells what went wrong.
type FailureDetails struct {
	// The same as the reason of the condition.
	Reason string `json:"reason"`
	// What was wrong and what to do.
	// +optional
	Message string `json:"message,omitempty"`
	// Name of the step that failed.
	// +optional
	Step string `json:"step,omitempty"`
	// Exit code of the step's process.
	// +optional
	ExitCode *int32 `json:"exitCode,omitempty"`
	// Where in a file of the source the fault is.
	// +optional
	Location *FailureLocation `json:"location,omitempty"`
	// The last lines of the step's output, at most 4 KiB.
	// +optional
	LogTail string `json:"logTail,omitempty"`
}

// FailureLocation is a place in a file.
type FailureLocation struct {
	// The file's name.
	// +optional
	File string `json:"file,omitempty"`
	// The line, from 1.
	// +optional
	Line int32 `json:"line,omitempty"`
}

// Ended tells whether the build has ended.
func (b *Build) Ended() bool {
	for i := range b.Status.Conditions {
		if c := &b.Status.Conditions[i]; c.Type == ConditionSucceeded {
			return c.Status != metav1.ConditionUnknown
		}
	}
	return false
}
