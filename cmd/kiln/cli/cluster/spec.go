package cluster

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// Request is a build as the command line describes it.
type Request struct {
	// Name of the Build; empty: one is generated.
	Name string
	// Context is a directory, a git URL or the URL of an archive.
	Context                            string
	Dockerfile, Target                 string
	Tags, Platforms                    []string
	BuildArgs, Labels                  map[string]string
	Secrets                            []string // id=ID,secret=NAME[,key=KEY]
	PushSecret, GitSecret              string
	RuntimeClass, ServiceAccount       string
	CPU, Memory, Disk, PIDs, Shm       string
	Ulimits                            []string // nofile=NUMBER
	Network                            string
	Timeout, StepTimeout               metav1.Duration
	Node, Insecure, NoCache, Pull, Dry bool
	NoPush                             bool
}

// Build returns the request as a Build, and the directory that has to be uploaded
// for it; empty: none. The source of an upload is without a digest.
func (r *Request) Build() (*buildv1.Build, string, error) {
	b := &buildv1.Build{
		TypeMeta:   metav1.TypeMeta{APIVersion: buildv1.GroupVersion.String(), Kind: "Build"},
		ObjectMeta: metav1.ObjectMeta{Name: r.Name},
	}
	if r.Name == "" {
		b.GenerateName = "build-"
	}
	dir, err := r.source(&b.Spec)
	if err != nil {
		return nil, "", err
	}
	b.Spec.Strategy.Dockerfile = &buildv1.DockerfileStrategy{Path: r.Dockerfile, Target: r.Target, Labels: r.Labels}
	for k, v := range r.BuildArgs {
		b.Spec.BuildArgs = append(b.Spec.BuildArgs, buildv1.Variable{Name: k, Value: v})
	}
	if err := r.output(&b.Spec); err != nil {
		return nil, "", err
	}
	for _, s := range r.Secrets {
		secret, err := parseSecret(s)
		if err != nil {
			return nil, "", err
		}
		b.Spec.Secrets = append(b.Spec.Secrets, secret)
	}
	if r.RuntimeClass != "" {
		b.Spec.RuntimeClassName = &r.RuntimeClass
	}
	b.Spec.ServiceAccountName, b.Spec.Platforms = r.ServiceAccount, r.Platforms
	b.Spec.NoCache, b.Spec.Pull = r.NoCache, r.Pull
	if r.Timeout.Duration != 0 {
		b.Spec.Timeout = &r.Timeout
	}
	if r.StepTimeout.Duration != 0 {
		b.Spec.StepTimeout = &r.StepTimeout
	}
	switch r.Network {
	case "":
	case "default":
		network := buildv1.NetworkEgress
		b.Spec.Network = &network
	case "none":
		network := buildv1.NetworkNone
		b.Spec.Network = &network
	default:
		return nil, "", fmt.Errorf("--network %s: want default or none", r.Network)
	}
	return b, dir, r.limits(&b.Spec)
}

func (r *Request) limits(spec *buildv1.BuildSpec) error {
	files, err := openFiles(r.Ulimits)
	if err != nil {
		return err
	}
	for _, l := range []struct {
		flag  string
		name  corev1.ResourceName
		value string
	}{
		{"cpu", corev1.ResourceCPU, r.CPU}, {"memory", corev1.ResourceMemory, r.Memory}, {"disk", corev1.ResourceEphemeralStorage, r.Disk},
		{"pids-limit", buildv1.ResourcePIDs, r.PIDs}, {"shm-size", buildv1.ResourceShm, r.Shm}, {"ulimit", buildv1.ResourceOpenFiles, files},
	} {
		if l.value == "" {
			continue
		}
		q, err := resource.ParseQuantity(l.value)
		if err != nil {
			return fmt.Errorf("--%s %s: %w", l.flag, l.value, err)
		}
		if q.Sign() <= 0 {
			return fmt.Errorf("--%s %s: want more than 0", l.flag, l.value)
		}
		if spec.Resources == nil {
			spec.Resources = &buildv1.Resources{Limits: corev1.ResourceList{}}
		}
		spec.Resources.Limits[l.name] = q
	}
	return nil
}

// openFiles returns the number of nofile=NUMBER; every other limit is refused by name.
func openFiles(ulimits []string) (string, error) {
	files := ""
	for _, u := range ulimits {
		name, value, _ := strings.Cut(u, "=")
		if name != "nofile" {
			return "", fmt.Errorf("--ulimit %s: a Build has no limit %q: only nofile", u, name)
		}
		soft, hard, both := strings.Cut(value, ":")
		if both && soft != hard {
			return "", fmt.Errorf("--ulimit %s: a Build has one limit of open files: want nofile=NUMBER", u)
		}
		if _, err := strconv.ParseUint(soft, 10, 32); err != nil {
			return "", fmt.Errorf("--ulimit %s: want nofile=NUMBER", u)
		}
		files = soft
	}
	return files, nil
}

func (r *Request) output(spec *buildv1.BuildSpec) error {
	if len(r.Tags) == 0 {
		if r.Node || r.PushSecret != "" {
			return errors.New("--node and --push-secret need the image's name: give it with --tag")
		}
		return nil
	}
	push := !r.NoPush
	if !push && !r.Node {
		return errors.New("--no-push leaves the image nowhere: add --node, or leave --tag out to fill the cache only")
	}
	spec.Output = &buildv1.Output{Image: r.Tags[0], AdditionalImages: r.Tags[1:], Push: &push, Node: r.Node, Insecure: r.Insecure}
	if r.PushSecret != "" {
		spec.Output.PushSecret = &buildv1.LocalReference{Name: r.PushSecret}
	}
	return nil
}

// source fills in what the build starts from.
func (r *Request) source(spec *buildv1.BuildSpec) (string, error) {
	if st, err := os.Stat(r.Context); err == nil && st.IsDir() {
		spec.Source = &buildv1.Source{Upload: &buildv1.UploadSource{}}
		return r.Context, nil
	}
	if ref, ok, err := dfgitutil.ParseGitRef(r.Context); ok && ref != nil {
		if err != nil {
			return "", fmt.Errorf("git URL %s: %w", redacted(r.Context), err)
		}
		git := &buildv1.GitSource{URL: ref.Remote, Revision: ref.Ref}
		if ref.Checksum != "" {
			git.Revision = ref.Checksum
		}
		if r.GitSecret != "" {
			git.SecretRef = &buildv1.LocalReference{Name: r.GitSecret}
		}
		spec.Source = &buildv1.Source{Git: git, ContextDir: strings.TrimPrefix(path.Clean("/"+ref.SubDir), "/")}
		return "", nil
	}
	if strings.HasPrefix(r.Context, "https://") || strings.HasPrefix(r.Context, "http://") {
		spec.Source = &buildv1.Source{HTTP: &buildv1.HTTPSource{URL: r.Context}}
		return "", nil
	}
	return "", fmt.Errorf("build context %s: it is no directory, git URL or URL of an archive", redacted(r.Context))
}

func redacted(s string) string {
	if u, err := url.Parse(s); err == nil && u.User != nil {
		return u.Redacted()
	}
	return s
}

// parseSecret parses id=ID,secret=NAME[,key=KEY]; the key is the ID by default.
func parseSecret(s string) (buildv1.BuildSecret, error) {
	var out buildv1.BuildSecret
	for _, part := range strings.Split(s, ",") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "id":
			out.ID = value
		case "secret":
			out.SecretRef.Name = value
		case "key":
			out.SecretRef.Key = value
		default:
			return out, fmt.Errorf("--secret %s: unknown field %q: want id=ID,secret=NAME[,key=KEY]", s, key)
		}
	}
	if out.ID == "" || out.SecretRef.Name == "" {
		return out, fmt.Errorf("--secret %s: want id=ID,secret=NAME[,key=KEY], where NAME is a Secret of the namespace", s)
	}
	if out.SecretRef.Key == "" {
		out.SecretRef.Key = out.ID
	}
	return out, nil
}
