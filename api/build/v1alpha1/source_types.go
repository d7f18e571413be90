package v1alpha1

// Source is the build context: files that the strategy uses.
//
// +kubebuilder:validation:XValidation:rule="(has(self.git) ? 1 : 0) + (has(self.http) ? 1 : 0) + (has(self.upload) ? 1 : 0) + (has(self.inline) || has(self.configMaps) ? 1 : 0) <= 1",message="git, http, upload and files (inline, configMaps) exclude each other"
type Source struct {
	// A git repository.
	// +optional
	Git *GitSource `json:"git,omitempty"`
	// An archive on an HTTP server.
	// +optional
	HTTP *HTTPSource `json:"http,omitempty"`
	// An archive that the user sends to the upload subresource once a node is chosen.
	// +optional
	Upload *UploadSource `json:"upload,omitempty"`
	// Files in this object.
	// +optional
	// +listType=map
	// +listMapKey=path
	// +kubebuilder:validation:MaxItems=256
	Inline []InlineFile `json:"inline,omitempty"`
	// ConfigMaps whose keys become files.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	ConfigMaps []ConfigMapSource `json:"configMaps,omitempty"`
	// Paths of images that are copied over the other sources, in order.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Images []ImageSource `json:"images,omitempty"`
	// Further named contexts, as docker buildx's --build-context: name to
	// "docker-image://ref", a git URL or an HTTP URL.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	NamedContexts map[string]string `json:"namedContexts,omitempty"`
	// The directory of the source that is the context. Unset: its root.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('^/|(^|/)[.][.](/|$)')",message="contextDir must be relative and without \"..\""
	ContextDir string `json:"contextDir,omitempty"`
}

// GitSource is a revision of a git repository.
type GitSource struct {
	// HTTPS or SSH URL without credentials.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.matches('^(https?|ssh)://[^/]+/.+') || self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[^-/].*$')",message="url must be an https, http or ssh URL, or user@host:path"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^https?://[^/]*@')",message="url must have no credentials; use secretRef"
	URL string `json:"url"`
	// Branch, tag or commit. Unset: the default branch.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_][A-Za-z0-9_./+-]*$`
	Revision string `json:"revision,omitempty"`
	// A Secret of type kubernetes.io/basic-auth (username, password) or
	// kubernetes.io/ssh-auth (ssh-privatekey, and known_hosts with the server's keys).
	// +optional
	SecretRef *LocalReference `json:"secretRef,omitempty"`
}

// HTTPSource is an archive (tar, with gzip, bzip2, xz or zstd) on an HTTP server.
//
// +kubebuilder:validation:XValidation:rule="self.url.startsWith('https://') || has(self.digest)",message="an http URL needs a digest",fieldPath=.url
type HTTPSource struct {
	// Where it is.
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.matches('^https?://[^/@]+/')",message="url must be an https or http URL without credentials"
	URL string `json:"url"`
	// What it must be.
	// +optional
	// +kubebuilder:validation:Pattern=`^sha256:[0-9a-f]{64}$`
	Digest string `json:"digest,omitempty"`
}

// UploadSource is a tar archive that the user uploads.
type UploadSource struct {
	// Digest of the archive, compressed as it is sent.
	// +kubebuilder:validation:Pattern=`^sha256:[0-9a-f]{64}$`
	Digest string `json:"digest"`
}

// InlineFile is one file.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.content) && has(self.binaryContent))",message="content and binaryContent exclude each other"
type InlineFile struct {
	// Relative, slash-separated, without "..".
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('^/|/$|//|(^|/)[.][.]?(/|$)')",message="path must be relative, clean and without \"..\""
	Path string `json:"path"`
	// What is in it.
	// +optional
	// +kubebuilder:validation:MaxLength=1048576
	Content string `json:"content,omitempty"`
	// What is in it, when that is not text.
	// +optional
	// +kubebuilder:validation:MaxLength=1398104
	BinaryContent []byte `json:"binaryContent,omitempty"`
	// Permission bits. Unset: 0644.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=511
	Mode *int32 `json:"mode,omitempty"`
}

// ConfigMapSource makes a file of each key of a ConfigMap.
type ConfigMapSource struct {
	// The ConfigMap's name.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// Directory of the source for the files. Unset: its root.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('^/|(^|/)[.][.](/|$)')",message="destinationDir must be relative and without \"..\""
	DestinationDir string `json:"destinationDir,omitempty"`
}

// ImageSource takes content from an image.
type ImageSource struct {
	// Name of the image.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image"`
	// What to take.
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	Paths []ImagePath `json:"paths"`
}

// ImagePath copies a path of an image.
type ImagePath struct {
	// Absolute path in the image. With "/." at its end the content of a directory is copied,
	// and not the directory.
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=1024
	SourcePath string `json:"sourcePath"`
	// Directory of the source for the copy. Unset: its root.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.matches('^/|(^|/)[.][.](/|$)')",message="destinationDir must be relative and without \"..\""
	DestinationDir string `json:"destinationDir,omitempty"`
}
