package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// SandboxPolicy says what the builds of some namespaces may or must use.
//
// A namespace that no policy selects may use every class of sandbox, and every network
// and registry that the agents allow. Several policies that select a namespace all hold:
// a build is allowed when each of them allows it.
//
// It is enforced when a Build is created, again before it is sent to a node, and again by
// the node's agent, which also holds those who reach the agent without the API server.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=sbp,categories=kiln
// +kubebuilder:printcolumn:name="Required",type=string,JSONPath=`.spec.sandboxClasses.required`
// +kubebuilder:printcolumn:name="Allowed",type=string,JSONPath=`.spec.sandboxClasses.allowed`
// +kubebuilder:printcolumn:name="Network",type=string,JSONPath=`.spec.network.allowed`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type SandboxPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What it says.
	// +required
	Spec SandboxPolicySpec `json:"spec"`
}

// SandboxPolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type SandboxPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []SandboxPolicy `json:"items"`
}

// SandboxPolicySpec is what a policy says, and for whom. It selects the namespaces that
// namespaces names and those that namespaceSelector selects; with neither it selects all.
type SandboxPolicySpec struct {
	// Namespaces by name.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=1024
	// +kubebuilder:validation:items:MaxLength=63
	Namespaces []string `json:"namespaces,omitempty"`
	// Namespaces by label. An empty selector selects all.
	// +optional
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	// Classes of sandbox.
	// +optional
	SandboxClasses *SandboxClassRules `json:"sandboxClasses,omitempty"`
	// Networks of steps.
	// +optional
	Network *NetworkRules `json:"network,omitempty"`
	// Registries.
	// +optional
	Registries *RegistryRules `json:"registries,omitempty"`
	// The most that a build may ask for, in the units of a Build's resources.limits. A build
	// that names no limit gets this one.
	// +optional
	MaxResources *Resources `json:"maxResources,omitempty"`
	// The longest timeout that a build may ask for. A build that names none gets this one.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s')",message="maxTimeout must be at least 1s"
	MaxTimeout *metav1.Duration `json:"maxTimeout,omitempty"`
	// The longest time that a build may ask for its steps. A build that names none gets
	// this one.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s')",message="maxStepTimeout must be at least 1s"
	MaxStepTimeout *metav1.Duration `json:"maxStepTimeout,omitempty"`
	// Dockerfile front ends.
	// +optional
	Frontends *FrontendRules `json:"frontends,omitempty"`
	// Mounts of steps.
	// +optional
	Mounts *MountRules `json:"mounts,omitempty"`
}

// SandboxClass is a class of sandbox.
//
// +kubebuilder:validation:Enum=gvisor;userns
type SandboxClass string

// SandboxClassRules are rules about classes of sandbox.
//
// +kubebuilder:validation:XValidation:rule="!has(self.required) || !has(self.default) || self.required == self.default",message="default must be the required class",fieldPath=.default
// +kubebuilder:validation:XValidation:rule="!has(self.required) || !has(self.allowed) || self.required in self.allowed",message="required must be an allowed class",fieldPath=.required
// +kubebuilder:validation:XValidation:rule="!has(self.default) || !has(self.allowed) || self.default in self.allowed",message="default must be an allowed class",fieldPath=.default
type SandboxClassRules struct {
	// Classes that builds may use. Unset: all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=2
	Allowed []SandboxClass `json:"allowed,omitempty"`
	// The one class that builds must use.
	// +optional
	Required *SandboxClass `json:"required,omitempty"`
	// The class of builds that name none.
	// +optional
	Default *SandboxClass `json:"default,omitempty"`
}

// NetworkRules are rules about networks.
//
// +kubebuilder:validation:XValidation:rule="!has(self.default) || !has(self.allowed) || self.default in self.allowed",message="default must be an allowed network",fieldPath=.default
type NetworkRules struct {
	// Networks that builds may use. Unset: all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=2
	Allowed []NetworkMode `json:"allowed,omitempty"`
	// The network of builds that name none.
	// +optional
	Default *NetworkMode `json:"default,omitempty"`
	// What builds may connect to.
	// +optional
	Destinations *DestinationRules `json:"destinations,omitempty"`
}

// DestinationRules are rules about what builds may connect to: their steps, and what
// fetches sources and images for them. The node, its cluster's Pods and Services as the
// agent knows them, link-local addresses and metadata services are always denied, except
// what a policy's list names: an address or CIDR that lies within what is denied.
type DestinationRules struct {
	// All that may be reached: CIDRs ("198.51.100.0/24"), addresses, host names
	// ("packages.example.com") and domains of which the subdomains are meant ("*.example.org"),
	// each with a port if need be ("packages.example.com:80", "[2001:db8::1]:443"). Only these
	// names are resolved. Unset: all that is not denied.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=261
	// +kubebuilder:validation:items:Pattern=`^((\*\.)?[A-Za-z0-9_.-]+(:[0-9]{1,5})?|[0-9.]+/[0-9]{1,2}(:[0-9]{1,5})?|[0-9A-Fa-f:.]+(/[0-9]{1,3})?|\[[0-9A-Fa-f:.]+(/[0-9]{1,3})?\]:[0-9]{1,5})$`
	Allow []string `json:"allow,omitempty"`
	// CIDRs and addresses that may not be reached, besides those that always are denied.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=64
	// +kubebuilder:validation:items:Pattern=`^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$`
	Deny []string `json:"deny,omitempty"`
}

// RegistryRules are rules about registries. A pattern is a host
// ("registry.example.com:5000"), a host and the start of a path
// ("registry.example.com/team-a"), or either with "*." before it for any subdomain.
// "docker.io" is Docker Hub.
type RegistryRules struct {
	// Where base images, builder images and caches may come from. Unset: anywhere.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:MinLength=1
	Pull []string `json:"pull,omitempty"`
	// Where images and caches may be pushed to. Unset: anywhere.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:MinLength=1
	Push []string `json:"push,omitempty"`
}

// FrontendRules are rules about what reads a build's definition. They allow nothing that
// the agent's configuration, which lists front ends by digest, does not.
type FrontendRules struct {
	// "builtin", which is the Dockerfile front end that is part of kiln, and patterns of
	// images of front ends, written as in registries. Unset: all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:MinLength=1
	Allowed []string `json:"allowed,omitempty"`
}

// MountType is a type of mount of a step, besides content of the build itself.
//
// +kubebuilder:validation:Enum=Cache;Secret;SSH;Tmpfs
type MountType string

// MountRules are rules about mounts of steps.
type MountRules struct {
	// Types of mounts that steps may have. Unset: all. Content of the build (RUN
	// --mount=type=bind) is always allowed.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=4
	Allowed []MountType `json:"allowed,omitempty"`
}
