// Package v1alpha1 is the Kubernetes API of kiln, group kiln.build.
//
// A Build is one run of a build; it ends once, with the condition Succeeded True or
// False, and never changes after that. A SandboxPolicy says what the builds of some
// namespaces may or must use. BuildConfig (definitions that start Builds) and
// BuildTemplate (mechanisms made of parameterised steps) will join them: the names
// are reserved, and BuildSpec is what a BuildConfig will embed.
//
// The types carry their validation as OpenAPI and CEL markers, so that the API
// server refuses what is wrong in form with the field's name. What needs a look at
// other objects (policy, RuntimeClasses) is checked by kiln's admission webhook and
// again by the controller.
//
// Everything named zz_generated and deploy/base/crds is generated from this package;
// `make generate` does it.
//
// +kubebuilder:object:generate=true
// +groupName=kiln.build
package v1alpha1

//go:generate sh -c "cd ../../.. && bin/controller-gen object paths=./api/build/... && bin/controller-gen crd:crdVersions=v1,generateEmbeddedObjectMeta=false paths=./api/build/... output:crd:dir=deploy/base/crds"
