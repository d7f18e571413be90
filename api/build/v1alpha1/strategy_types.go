package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Strategy is how the image is made. With neither member set it is a Dockerfile.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.dockerfile) && has(self.steps))",message="dockerfile and steps exclude each other"
type Strategy struct {
	// From a Dockerfile.
	// +optional
	Dockerfile *DockerfileStrategy `json:"dockerfile,omitempty"`
	// By builder containers that share the directory /workspace.
	// +optional
	Steps *StepsStrategy `json:"steps,omitempty"`
}

// DockerfileStrategy builds a Dockerfile.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.path) && has(self.inline))",message="path and inline exclude each other"
type DockerfileStrategy struct {
	// Path below the context. Unset: Dockerfile.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('^/|(^|/)[.][.](/|$)')",message="path must be relative and without \"..\""
	Path string `json:"path,omitempty"`
	// The Dockerfile itself, in place of a file of the source.
	// +optional
	// +kubebuilder:validation:MaxLength=524288
	Inline string `json:"inline,omitempty"`
	// The stage to build. Unset: the last.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	Target string `json:"target,omitempty"`
	// Labels of the image.
	// +optional
	// +kubebuilder:validation:MaxProperties=128
	Labels map[string]string `json:"labels,omitempty"`
	// Entries of /etc/hosts: host name to IP address.
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	ExtraHosts map[string]string `json:"extraHosts,omitempty"`
}

// StepsStrategy runs builder containers one after the other. They share /workspace,
// which holds the source at first.
type StepsStrategy struct {
	// The containers, in order.
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	Steps []Step `json:"steps"`
	// What becomes the image. Unset: nothing; the build only fills the cache.
	// +optional
	Image *StepsImage `json:"image,omitempty"`
}

// Step is one builder container.
type Step struct {
	// For people and failures.
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// Image that it runs in.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image"`
	// Program and arguments. None: those of the image.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Command []string `json:"command,omitempty"`
	// Arguments that are added to the command.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Args []string `json:"args,omitempty"`
	// Environment, beside and over that of the build.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=256
	Env []Variable `json:"env,omitempty"`
	// Below /workspace when relative. Unset: /workspace.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	WorkingDir string `json:"workingDir,omitempty"`
	// User, as in a Dockerfile's USER. Unset: that of the image.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	User string `json:"user,omitempty"`
	// Secrets of spec.secrets that it may read.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Secrets []StepSecret `json:"secrets,omitempty"`
	// Directories that outlive the build.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Caches []StepCache `json:"caches,omitempty"`
	// How long it may run. Unset: as long as the build.
	// +optional
	Timeout *metav1.Duration `json:"timeout,omitempty"`
}

// StepSecret gives a step a secret, as a file or in the environment.
type StepSecret struct {
	// ID of spec.secrets.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ID string `json:"id"`
	// Absolute path. Unset: /run/secrets/<id> when env is unset too.
	// +optional
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=1024
	Path string `json:"path,omitempty"`
	// Name of an environment variable.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	Env string `json:"env,omitempty"`
}

// StepCache is a directory that outlives the build.
type StepCache struct {
	// Name of the cache, among those of the namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	ID string `json:"id"`
	// Absolute path in the step.
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=1024
	Path string `json:"path"`
}

// StepsImage says what the image of a steps build is.
type StepsImage struct {
	// Image that it is based on. Unset: an empty one.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Base string `json:"base,omitempty"`
	// What is copied from the workspace, in order.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Copies []WorkspaceCopy `json:"copies,omitempty"`
	// Environment of the image; only plain values.
	// +optional
	// +kubebuilder:validation:MaxProperties=256
	Env map[string]string `json:"env,omitempty"`
	// Entry point of the image. None: that of the base.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Entrypoint []string `json:"entrypoint,omitempty"`
	// Arguments of the entry point. None: those of the base.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Cmd []string `json:"cmd,omitempty"`
	// Working directory. Unset: that of the base.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	WorkingDir string `json:"workingDir,omitempty"`
	// User. Unset: that of the base.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	User string `json:"user,omitempty"`
	// Labels of the image.
	// +optional
	// +kubebuilder:validation:MaxProperties=128
	Labels map[string]string `json:"labels,omitempty"`
}

// WorkspaceCopy copies from the workspace into the image.
type WorkspaceCopy struct {
	// Path below /workspace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('(^|/)[.][.](/|$)')",message="source must be without \"..\""
	Source string `json:"source"`
	// Absolute path in the image.
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=1024
	Destination string `json:"destination"`
	// Owner as "uid:gid". Unset: 0:0.
	// +optional
	// +kubebuilder:validation:Pattern=`^[0-9]+:[0-9]+$`
	Chown string `json:"chown,omitempty"`
}

// Output is where the image goes.
//
// +kubebuilder:validation:XValidation:rule="self.push || (has(self.node) && self.node)",message="push or node must be true"
type Output struct {
	// Name of the image, with a tag.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image"`
	// Further names of the same image.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=1024
	AdditionalImages []string `json:"additionalImages,omitempty"`
	// Push it to the registry that its name has.
	// +optional
	// +kubebuilder:default=true
	Push *bool `json:"push,omitempty"`
	// Put it into the image store of the node's container runtime, where a Pod can use it at once.
	// +optional
	Node bool `json:"node,omitempty"`
	// A Secret of type kubernetes.io/dockerconfigjson to push with.
	// +optional
	PushSecret *LocalReference `json:"pushSecret,omitempty"`
	// Accept plain HTTP and certificates that do not verify.
	// +optional
	Insecure bool `json:"insecure,omitempty"`
	// How new layers are compressed. Unset: gzip.
	// +optional
	// +kubebuilder:validation:Enum=gzip;zstd;estargz;uncompressed
	Compression string `json:"compression,omitempty"`
	// Also compress layers of the base image that are compressed otherwise.
	// +optional
	ForceCompression bool `json:"forceCompression,omitempty"`
	// Annotations of the manifest.
	// +optional
	// +kubebuilder:validation:MaxProperties=128
	Annotations map[string]string `json:"annotations,omitempty"`
}
