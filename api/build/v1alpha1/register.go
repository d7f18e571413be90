package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of the types of this package.
var GroupVersion = schema.GroupVersion{Group: "kiln.build", Version: "v1alpha1"}

// SubresourcesGroup is the aggregated API that streams a build's log and takes its
// upload; its version is that of this package.
const SubresourcesGroup = "subresources.kiln.build"

// UploadOffsetHeader is the header of an answer to a part of an upload: how many bytes have
// arrived, which is where the next part begins.
const UploadOffsetHeader = "Upload-Offset"

// AddToScheme registers the types of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Build{}, &BuildList{}, &SandboxPolicy{}, &SandboxPolicyList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
