package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Build is one run of a build: from a source, by a strategy, to an image.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=kb,categories=all;kiln
// +kubebuilder:printcolumn:name="Succeeded",type=string,JSONPath=`.status.conditions[?(@.type=="Succeeded")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Succeeded")].reason`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.node`
// +kubebuilder:printcolumn:name="Sandbox",type=string,JSONPath=`.status.sandbox`
// +kubebuilder:printcolumn:name="Digest",type=string,JSONPath=`.status.output.shortDigest`
// +kubebuilder:printcolumn:name="Duration",type=string,JSONPath=`.status.duration`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Image",type=string,priority=1,JSONPath=`.spec.output.image`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Succeeded")].message`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="metadata.name must have at most 63 characters"
type Build struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What to build and how.
	// +required
	Spec BuildSpec `json:"spec"`
	// How far it has come; written by the controller alone.
	// +optional
	Status BuildStatus `json:"status,omitempty"`
}

// BuildList is a list of builds.
//
// +kubebuilder:object:root=true
type BuildList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Build `json:"items"`
}

// BuildSpec says what to build and how. Only state and retention can change once the
// build exists.
//
// +kubebuilder:validation:XValidation:rule="has(self.source) == has(oldSelf.source) && (!has(self.source) || self.source == oldSelf.source)",message="source cannot change",fieldPath=.source
// +kubebuilder:validation:XValidation:rule="self.strategy == oldSelf.strategy",message="strategy cannot change",fieldPath=.strategy
// +kubebuilder:validation:XValidation:rule="has(self.output) == has(oldSelf.output) && (!has(self.output) || self.output == oldSelf.output)",message="output cannot change",fieldPath=.output
// +kubebuilder:validation:XValidation:rule="has(self.buildArgs) == has(oldSelf.buildArgs) && (!has(self.buildArgs) || self.buildArgs == oldSelf.buildArgs)",message="buildArgs cannot change",fieldPath=.buildArgs
// +kubebuilder:validation:XValidation:rule="has(self.env) == has(oldSelf.env) && (!has(self.env) || self.env == oldSelf.env)",message="env cannot change",fieldPath=.env
// +kubebuilder:validation:XValidation:rule="has(self.secrets) == has(oldSelf.secrets) && (!has(self.secrets) || self.secrets == oldSelf.secrets)",message="secrets cannot change",fieldPath=.secrets
// +kubebuilder:validation:XValidation:rule="has(self.imagePullSecrets) == has(oldSelf.imagePullSecrets) && (!has(self.imagePullSecrets) || self.imagePullSecrets == oldSelf.imagePullSecrets)",message="imagePullSecrets cannot change",fieldPath=.imagePullSecrets
// +kubebuilder:validation:XValidation:rule="has(self.runtimeClassName) == has(oldSelf.runtimeClassName) && (!has(self.runtimeClassName) || self.runtimeClassName == oldSelf.runtimeClassName)",message="runtimeClassName cannot change",fieldPath=.runtimeClassName
// +kubebuilder:validation:XValidation:rule="has(self.network) == has(oldSelf.network) && (!has(self.network) || self.network == oldSelf.network)",message="network cannot change",fieldPath=.network
// +kubebuilder:validation:XValidation:rule="has(self.resources) == has(oldSelf.resources) && (!has(self.resources) || self.resources == oldSelf.resources)",message="resources cannot change",fieldPath=.resources
// +kubebuilder:validation:XValidation:rule="has(self.timeout) == has(oldSelf.timeout) && (!has(self.timeout) || self.timeout == oldSelf.timeout)",message="timeout cannot change",fieldPath=.timeout
// +kubebuilder:validation:XValidation:rule="has(self.stepTimeout) == has(oldSelf.stepTimeout) && (!has(self.stepTimeout) || self.stepTimeout == oldSelf.stepTimeout)",message="stepTimeout cannot change",fieldPath=.stepTimeout
// +kubebuilder:validation:XValidation:rule="has(self.nodeSelector) == has(oldSelf.nodeSelector) && (!has(self.nodeSelector) || self.nodeSelector == oldSelf.nodeSelector)",message="nodeSelector cannot change",fieldPath=.nodeSelector
// +kubebuilder:validation:XValidation:rule="has(self.tolerations) == has(oldSelf.tolerations) && (!has(self.tolerations) || self.tolerations == oldSelf.tolerations)",message="tolerations cannot change",fieldPath=.tolerations
// +kubebuilder:validation:XValidation:rule="self.serviceAccountName == oldSelf.serviceAccountName",message="serviceAccountName cannot change",fieldPath=.serviceAccountName
// +kubebuilder:validation:XValidation:rule="self.onNodeLoss == oldSelf.onNodeLoss",message="onNodeLoss cannot change",fieldPath=.onNodeLoss
// +kubebuilder:validation:XValidation:rule="has(self.attestations) == has(oldSelf.attestations) && (!has(self.attestations) || self.attestations == oldSelf.attestations)",message="attestations cannot change",fieldPath=.attestations
// +kubebuilder:validation:XValidation:rule="has(self.destinations) == has(oldSelf.destinations)",message="destinations cannot change",fieldPath=.destinations
// +kubebuilder:validation:XValidation:rule="has(self.platforms) == has(oldSelf.platforms) && (!has(self.platforms) || self.platforms == oldSelf.platforms)",message="platforms cannot change",fieldPath=.platforms
// +kubebuilder:validation:XValidation:rule="has(self.cache) == has(oldSelf.cache) && (!has(self.cache) || self.cache == oldSelf.cache)",message="cache cannot change",fieldPath=.cache
// +kubebuilder:validation:XValidation:rule="has(self.noCache) == has(oldSelf.noCache) && (!has(self.noCache) || self.noCache == oldSelf.noCache)",message="noCache cannot change",fieldPath=.noCache
// +kubebuilder:validation:XValidation:rule="has(self.pull) == has(oldSelf.pull) && (!has(self.pull) || self.pull == oldSelf.pull)",message="pull cannot change",fieldPath=.pull
// +kubebuilder:validation:XValidation:rule="has(self.sourceDateEpoch) == has(oldSelf.sourceDateEpoch) && (!has(self.sourceDateEpoch) || self.sourceDateEpoch == oldSelf.sourceDateEpoch)",message="sourceDateEpoch cannot change",fieldPath=.sourceDateEpoch
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.state) || (has(self.state) && self.state == oldSelf.state)",message="a cancelled build cannot be taken back",fieldPath=.state
// +kubebuilder:validation:XValidation:rule="!has(self.env) || has(self.strategy.steps)",message="env is for the steps strategy; a Dockerfile takes buildArgs",fieldPath=.env
// +kubebuilder:validation:XValidation:rule="!has(self.buildArgs) || !has(self.strategy.steps)",message="buildArgs are for the dockerfile strategy; steps take env",fieldPath=.buildArgs
type BuildSpec struct {
	// What the build starts from. Unset: an empty directory.
	// +optional
	Source *Source `json:"source,omitempty"`
	// How the image is made. Unset: from the file Dockerfile of the source.
	// +optional
	// +kubebuilder:default={}
	Strategy Strategy `json:"strategy,omitempty"`
	// Where the image goes. Unset: the build only fills the cache of its node.
	// +optional
	Output *Output `json:"output,omitempty"`
	// Values of the Dockerfile's ARG instructions. They end up in the image's history:
	// use secrets for what nobody may see.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=256
	BuildArgs []Variable `json:"buildArgs,omitempty"`
	// Environment of every step of the steps strategy.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=256
	Env []Variable `json:"env,omitempty"`
	// Secrets that steps may mount, by ID.
	// +optional
	// +listType=map
	// +listMapKey=id
	// +kubebuilder:validation:MaxItems=64
	Secrets []BuildSecret `json:"secrets,omitempty"`
	// Secrets of type kubernetes.io/dockerconfigjson for pulling base images, beside those
	// of the service account.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=16
	ImagePullSecrets []LocalReference `json:"imagePullSecrets,omitempty"`
	// The RuntimeClass whose handler selects the sandbox. Unset: the default of the
	// namespace's SandboxPolicy, else that of the installation.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	RuntimeClassName *string `json:"runtimeClassName,omitempty"`
	// What steps can reach. Unset: the default of the namespace's SandboxPolicy, else Egress.
	// +optional
	Network *NetworkMode `json:"network,omitempty"`
	// All that steps may connect to, of what policy permits, written as in a SandboxPolicy's
	// network.destinations.allow. Unset: all of that.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=261
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="destinations cannot change"
	Destinations []string `json:"destinations,omitempty"`
	// Limits of each step; the agent reserves them for the build.
	// +optional
	Resources *Resources `json:"resources,omitempty"`
	// How long the build may run once it runs. Unset: the agent's limit.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s')",message="timeout must be at least 1s"
	Timeout *metav1.Duration `json:"timeout,omitempty"`
	// How long each step may run. Unset: as long as the build.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s')",message="stepTimeout must be at least 1s"
	StepTimeout *metav1.Duration `json:"stepTimeout,omitempty"`
	// When the Build object is deleted after it has ended. Unset: never.
	// +optional
	Retention *Retention `json:"retention,omitempty"`
	// Labels that the node must have.
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// Taints of nodes that the build accepts.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`
	// The ServiceAccount whose imagePullSecrets the build uses. A build gets no token of it.
	// +optional
	// +kubebuilder:default=default
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ServiceAccountName string `json:"serviceAccountName,omitempty"`
	// Set to Cancelled, it ends the build.
	// +optional
	State DesiredState `json:"state,omitempty"`
	// What happens when the node or its agent ends in the middle of the build.
	// +optional
	// +kubebuilder:default=Fail
	OnNodeLoss NodeLossPolicy `json:"onNodeLoss,omitempty"`
	// Attestations of the image: provenance or sbom to BuildKit's value, such as "mode=max".
	// +optional
	// +kubebuilder:validation:MaxProperties=2
	// +kubebuilder:validation:XValidation:rule="self.all(k, k in ['provenance', 'sbom'])",message="attestations are provenance and sbom"
	Attestations map[string]string `json:"attestations,omitempty"`
	// Platforms to build for, such as linux/amd64. None: that of the node.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Pattern=`^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9.]+)?$`
	// +kubebuilder:validation:items:MaxLength=64
	Platforms []string `json:"platforms,omitempty"`
	// Caches outside the node, and which builds are expected to share steps.
	// +optional
	Cache *Cache `json:"cache,omitempty"`
	// Run every step again.
	// +optional
	NoCache bool `json:"noCache,omitempty"`
	// Always ask the registry for base images.
	// +optional
	Pull bool `json:"pull,omitempty"`
	// Time stamp of what the build makes, in seconds since 1970.
	// +optional
	// +kubebuilder:validation:Minimum=0
	SourceDateEpoch *int64 `json:"sourceDateEpoch,omitempty"`
}

// DesiredState is what the user wants of a build.
//
// +kubebuilder:validation:Enum=Cancelled
type DesiredState string

// StateCancelled ends a build.
const StateCancelled DesiredState = "Cancelled"

// NodeLossPolicy says what happens to a build whose node is lost.
//
// +kubebuilder:validation:Enum=Fail;Retry
type NodeLossPolicy string

const (
	// FailOnNodeLoss ends the build with the reason NodeLost.
	FailOnNodeLoss NodeLossPolicy = "Fail"
	// RetryOnNodeLoss starts the build once more, on any node.
	RetryOnNodeLoss NodeLossPolicy = "Retry"
)

// NetworkMode is what a step can reach. The node's own network is no choice.
//
// +kubebuilder:validation:Enum=None;Egress
type NetworkMode string

const (
	// NetworkNone gives a step nothing but its own loopback.
	NetworkNone NetworkMode = "None"
	// NetworkEgress lets a step reach addresses outside the node and the cluster.
	NetworkEgress NetworkMode = "Egress"
)

// LocalReference names an object of the build's namespace.
type LocalReference struct {
	// The object's name.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// KeyReference names a key of a Secret or ConfigMap of the build's namespace.
type KeyReference struct {
	// The object's name.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// The key.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
}

// Variable is a name with a value.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.value) && has(self.valueFrom))",message="value and valueFrom exclude each other"
type Variable struct {
	// The name.
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_.-]*$`
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`
	// The value.
	// +optional
	// +kubebuilder:validation:MaxLength=32768
	Value string `json:"value,omitempty"`
	// Where the value comes from.
	// +optional
	ValueFrom *VariableSource `json:"valueFrom,omitempty"`
}

// VariableSource is where the value of a variable comes from.
//
// +kubebuilder:validation:XValidation:rule="has(self.configMapKeyRef) != has(self.secretKeyRef)",message="exactly one of configMapKeyRef and secretKeyRef must be set"
type VariableSource struct {
	// A key of a ConfigMap.
	// +optional
	ConfigMapKeyRef *KeyReference `json:"configMapKeyRef,omitempty"`
	// A key of a Secret. Only env takes it: a build argument would show it in the image's history.
	// +optional
	SecretKeyRef *KeyReference `json:"secretKeyRef,omitempty"`
}

// BuildSecret gives steps a secret that no layer, log or cache key holds.
type BuildSecret struct {
	// What RUN --mount=type=secret,id=… or a step's secrets name.
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`
	// +kubebuilder:validation:MaxLength=253
	ID string `json:"id"`
	// Where its value is.
	SecretRef KeyReference `json:"secretRef"`
}

// Resources are limits in Kubernetes' units.
type Resources struct {
	// Of each step: cpu, memory, ephemeral-storage (bytes that it may write),
	// kiln.build/pids (processes and threads), kiln.build/inodes (files that it may make),
	// kiln.build/open-files (of a process), kiln.build/log-bytes and kiln.build/log-rate
	// (bytes of output that are kept, and bytes a second), and kiln.build/shm (bytes of
	// /dev/shm).
	// +optional
	// +kubebuilder:validation:MaxProperties=9
	// +kubebuilder:validation:XValidation:rule="self.all(k, k in ['cpu', 'memory', 'ephemeral-storage', 'kiln.build/pids', 'kiln.build/inodes', 'kiln.build/open-files', 'kiln.build/log-bytes', 'kiln.build/log-rate', 'kiln.build/shm'])",message="limits are cpu, memory, ephemeral-storage, kiln.build/pids, kiln.build/inodes, kiln.build/open-files, kiln.build/log-bytes, kiln.build/log-rate and kiln.build/shm"
	Limits corev1.ResourceList `json:"limits,omitempty"`
}

// Limits in Resources that only kiln has.
const (
	// ResourcePIDs is processes and threads.
	ResourcePIDs corev1.ResourceName = "kiln.build/pids"
	// ResourceInodes is files and directories that a step may make.
	ResourceInodes corev1.ResourceName = "kiln.build/inodes"
	// ResourceOpenFiles is files that a process may have open.
	ResourceOpenFiles corev1.ResourceName = "kiln.build/open-files"
	// ResourceLogBytes is bytes of output that are kept.
	ResourceLogBytes corev1.ResourceName = "kiln.build/log-bytes"
	// ResourceLogRate is bytes of output a second that are kept.
	ResourceLogRate corev1.ResourceName = "kiln.build/log-rate"
	// ResourceShm is the size of /dev/shm in bytes.
	ResourceShm corev1.ResourceName = "kiln.build/shm"
)

// Retention says when a Build object is deleted after it has ended.
type Retention struct {
	// For a build that succeeded, after its end. Unset: never.
	// +optional
	TTLAfterSucceeded *metav1.Duration `json:"ttlAfterSucceeded,omitempty"`
	// For every other build, after its end. Unset: never.
	// +optional
	TTLAfterFailed *metav1.Duration `json:"ttlAfterFailed,omitempty"`
}

// Cache says which caches outside the node a build uses.
type Cache struct {
	// Builds of a namespace that share a scope are expected to have steps in common and are
	// sent to the same nodes when that saves work. Unset: the source's repository, else the
	// output's image.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Scope string `json:"scope,omitempty"`
	// Caches to read from.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	From []CacheReference `json:"from,omitempty"`
	// Caches to write to.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	To []CacheReference `json:"to,omitempty"`
}

// CacheReference is a cache outside the node.
type CacheReference struct {
	// The kind of cache.
	// +kubebuilder:validation:Enum=registry;inline
	Type string `json:"type"`
	// BuildKit's attributes of that kind, such as ref and mode.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	Attributes map[string]string `json:"attributes,omitempty"`
}
