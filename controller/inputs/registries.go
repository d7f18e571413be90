package inputs

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// registries collects the credentials for registries. Of several for one host the push
// secret's counts, then those of imagePullSecrets in order, then those of the service
// account. A pull secret of the service account that does not exist is left out, as
// kubelet does.
func (r *resolver) registries(in *Inputs, b *v1alpha1.Build) error {
	into := in.Credentials.Registries
	if b.Spec.Output != nil && b.Spec.Output.PushSecret != nil {
		if err := r.registrySecret(into, "spec.output.pushSecret", b.Spec.Output.PushSecret.Name); err != nil {
			return err
		}
	}
	for i, ref := range b.Spec.ImagePullSecrets {
		if err := r.registrySecret(into, fmt.Sprintf("spec.imagePullSecrets[%d]", i), ref.Name); err != nil {
			return err
		}
	}
	return r.serviceAccount(into, b.Spec.ServiceAccountName)
}

func (r *resolver) serviceAccount(into map[string]*agentv1.RegistryCredential, name string) error {
	if name == "" {
		name = "default"
	}
	sa := &corev1.ServiceAccount{}
	err := r.reader.Get(r.ctx, types.NamespacedName{Namespace: r.namespace, Name: name}, sa)
	switch {
	case apierrors.IsNotFound(err) && name == "default":
		return nil // A namespace without one has no pull secrets either.
	case apierrors.IsNotFound(err):
		return &Missing{Field: "spec.serviceAccountName", Object: fmt.Sprintf("ServiceAccount %q", name)}
	case err != nil:
		return fmt.Errorf("read ServiceAccount %q: %w", name, err)
	}
	for _, ref := range sa.ImagePullSecrets {
		s, err := r.secret("", ref.Name)
		if _, missing := err.(*Missing); missing {
			continue
		} else if err != nil {
			return err
		}
		// What others put there is not the build's fault.
		if hosts, err := parseRegistrySecret(s); err == nil {
			merge(into, hosts)
		}
	}
	return nil
}

func (r *resolver) registrySecret(into map[string]*agentv1.RegistryCredential, field, name string) error {
	s, err := r.secret(field+".name", name)
	if err != nil {
		return err
	}
	hosts, err := parseRegistrySecret(s)
	if err != nil {
		return &Invalid{Field: field, Message: fmt.Sprintf("Secret %q: %v", name, err)}
	}
	merge(into, hosts)
	return nil
}

func merge(into, from map[string]*agentv1.RegistryCredential) {
	for host, c := range from {
		if _, ok := into[host]; !ok {
			into[host] = c
		}
	}
}

func parseRegistrySecret(s *corev1.Secret) (map[string]*agentv1.RegistryCredential, error) {
	if data, ok := s.Data[corev1.DockerConfigJsonKey]; ok {
		return ParseDockerConfig(data)
	}
	return nil, fmt.Errorf("has no key %q: it must be of type %s", corev1.DockerConfigJsonKey, corev1.SecretTypeDockerConfigJson)
}

// ParseDockerConfig reads the credentials of a Docker configuration file by registry
// host. Errors hold nothing of its content. Where entries for one host differ by path the
// one without a path counts, else the first in the order of the file's keys.
func ParseDockerConfig(data []byte) (map[string]*agentv1.RegistryCredential, error) {
	var file struct {
		Auths map[string]struct {
			Username      string `json:"username"`
			Password      string `json:"password"`
			Auth          string `json:"auth"`
			IdentityToken string `json:"identitytoken"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("is not a Docker configuration in JSON")
	}
	out := make(map[string]*agentv1.RegistryCredential, len(file.Auths))
	origin := make(map[string]string, len(file.Auths))
	for key, a := range file.Auths {
		c := &agentv1.RegistryCredential{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken}
		if c.Username == "" && a.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(a.Auth)
			user, password, ok := strings.Cut(string(plain), ":")
			if err != nil || !ok {
				return nil, fmt.Errorf("auth of a registry is not base64 of user:password")
			}
			c.Username, c.Password = user, strings.TrimRight(password, "\x00")
		}
		host, rest := registryHost(key)
		if host == "" {
			continue
		}
		// Shorter is less specific; among equals the alphabet decides, so that the result is
		// the same each time.
		rank := fmt.Sprintf("%08d%s", len(rest), key)
		if was, ok := origin[host]; ok && was < rank {
			continue
		}
		origin[host], out[host] = rank, c
	}
	return out, nil
}

// registryHost takes the host and the rest from a key of a Docker configuration.
func registryHost(key string) (host, rest string) {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, rest, _ = strings.Cut(key, "/")
	switch host {
	case "index.docker.io", "registry-1.docker.io", "docker.io":
		return "docker.io", strings.TrimPrefix(strings.Trim(rest, "/"), "v1")
	}
	rest = strings.Trim(rest, "/")
	if rest == "v1" || rest == "v2" {
		rest = ""
	}
	return host, rest
}
