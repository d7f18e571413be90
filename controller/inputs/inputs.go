// Package inputs reads what a Build names: Secrets, ConfigMaps, and the pull secrets of
// its ServiceAccount.
//
// It promises to read only from the build's own namespace, only what the build names, and
// to keep nothing: what it returns is for one call to an agent. No error holds a value
// of a Secret.
package inputs

import (
	"context"
	"fmt"
	"maps"
	"path"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// GitCredential is the name under which Inputs.Credentials holds the credential of the
// git source.
const GitCredential = "source"

// MaxFiles is how many bytes inline files and files of ConfigMaps may have together.
const MaxFiles = 1 << 20

// Inputs is what a build names.
type Inputs struct {
	// Credentials for the agent's memory.
	Credentials *agentv1.Credentials
	// Files of ConfigMaps of the source.
	Files []*agentv1.InlineFile
	// Values of variables that come from ConfigMaps.
	Values map[v1alpha1.KeyReference]string
}

// Resolve reads everything that b names. r reads live objects. The error is *Missing or
// *Invalid when the user can do something about it.
func Resolve(ctx context.Context, r client.Reader, b *v1alpha1.Build) (*Inputs, error) {
	res := &resolver{ctx: ctx, reader: r, namespace: b.Namespace, secrets: map[string]*corev1.Secret{}, configMaps: map[string]*corev1.ConfigMap{}}
	in := &Inputs{
		Credentials: &agentv1.Credentials{Secrets: map[string][]byte{}, Registries: map[string]*agentv1.RegistryCredential{}, Git: map[string]*agentv1.GitCredential{}},
		Values:      map[v1alpha1.KeyReference]string{},
	}
	for _, step := range []func(*Inputs, *v1alpha1.Build) error{res.secretsOf, res.variables, res.git, res.files, res.registries} {
		if err := step(in, b); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// SecretID is the ID of the secret that a variable of a Secret becomes.
func SecretID(ref v1alpha1.KeyReference) string { return "kiln.env." + ref.Name + "." + ref.Key }

type resolver struct {
	ctx        context.Context
	reader     client.Reader
	namespace  string
	secrets    map[string]*corev1.Secret
	configMaps map[string]*corev1.ConfigMap
}

func (r *resolver) secret(field, name string) (*corev1.Secret, error) {
	if s, ok := r.secrets[name]; ok {
		return s, nil
	}
	s := &corev1.Secret{}
	if err := r.get(field, "Secret", name, s); err != nil {
		return nil, err
	}
	r.secrets[name] = s
	return s, nil
}

func (r *resolver) configMap(field, name string) (*corev1.ConfigMap, error) {
	if c, ok := r.configMaps[name]; ok {
		return c, nil
	}
	c := &corev1.ConfigMap{}
	if err := r.get(field, "ConfigMap", name, c); err != nil {
		return nil, err
	}
	r.configMaps[name] = c
	return c, nil
}

func (r *resolver) get(field, kind, name string, into client.Object) error {
	err := r.reader.Get(r.ctx, types.NamespacedName{Namespace: r.namespace, Name: name}, into)
	switch {
	case apierrors.IsNotFound(err):
		return &Missing{Field: field, Object: fmt.Sprintf("%s %q", kind, name)}
	case err != nil:
		return fmt.Errorf("read %s %q: %w", kind, name, err)
	}
	return nil
}

func (r *resolver) secretKey(field string, ref v1alpha1.KeyReference) ([]byte, error) {
	s, err := r.secret(field+".name", ref.Name)
	if err != nil {
		return nil, err
	}
	v, ok := s.Data[ref.Key]
	if !ok {
		return nil, &Missing{Field: field + ".key", Object: fmt.Sprintf("key %q of Secret %q", ref.Key, ref.Name)}
	}
	return v, nil
}

func (r *resolver) secretsOf(in *Inputs, b *v1alpha1.Build) error {
	for i, s := range b.Spec.Secrets {
		v, err := r.secretKey(fmt.Sprintf("spec.secrets[%d].secretRef", i), s.SecretRef)
		if err != nil {
			return err
		}
		in.Credentials.Secrets[s.ID] = v
	}
	return nil
}

func (r *resolver) variables(in *Inputs, b *v1alpha1.Build) error {
	lists := map[string][]v1alpha1.Variable{"spec.buildArgs": b.Spec.BuildArgs, "spec.env": b.Spec.Env}
	if s := b.Spec.Strategy.Steps; s != nil {
		for i := range s.Steps {
			lists[fmt.Sprintf("spec.strategy.steps.steps[%d].env", i)] = s.Steps[i].Env
		}
	}
	for _, field := range slices.Sorted(maps.Keys(lists)) {
		for i, v := range lists[field] {
			if err := r.variable(in, fmt.Sprintf("%s[%d].valueFrom", field, i), v.ValueFrom); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *resolver) variable(in *Inputs, field string, from *v1alpha1.VariableSource) error {
	switch {
	case from == nil:
	case from.SecretKeyRef != nil:
		v, err := r.secretKey(field+".secretKeyRef", *from.SecretKeyRef)
		if err != nil {
			return err
		}
		in.Credentials.Secrets[SecretID(*from.SecretKeyRef)] = v
	case from.ConfigMapKeyRef != nil:
		ref := *from.ConfigMapKeyRef
		c, err := r.configMap(field+".configMapKeyRef.name", ref.Name)
		if err != nil {
			return err
		}
		v, ok := c.Data[ref.Key]
		if !ok {
			return &Missing{Field: field + ".configMapKeyRef.key", Object: fmt.Sprintf("key %q of ConfigMap %q", ref.Key, ref.Name)}
		}
		in.Values[ref] = v
	}
	return nil
}

func (r *resolver) git(in *Inputs, b *v1alpha1.Build) error {
	if b.Spec.Source == nil || b.Spec.Source.Git == nil || b.Spec.Source.Git.SecretRef == nil {
		return nil
	}
	const field = "spec.source.git.secretRef"
	s, err := r.secret(field+".name", b.Spec.Source.Git.SecretRef.Name)
	if err != nil {
		return err
	}
	c := &agentv1.GitCredential{
		Username: string(s.Data[corev1.BasicAuthUsernameKey]), Password: string(s.Data[corev1.BasicAuthPasswordKey]),
		SshPrivateKey: s.Data[corev1.SSHAuthPrivateKey], SshKnownHosts: s.Data["known_hosts"],
	}
	if c.Password == "" && len(c.SshPrivateKey) == 0 {
		return &Invalid{Field: field, Message: fmt.Sprintf("Secret %q has neither the key %q nor %q", s.Name, corev1.BasicAuthPasswordKey, corev1.SSHAuthPrivateKey)}
	}
	in.Credentials.Git[GitCredential] = c
	return nil
}

func (r *resolver) files(in *Inputs, b *v1alpha1.Build) error {
	if b.Spec.Source == nil {
		return nil
	}
	total := 0
	for _, f := range b.Spec.Source.Inline {
		total += len(f.Content) + len(f.BinaryContent)
	}
	for i, src := range b.Spec.Source.ConfigMaps {
		c, err := r.configMap(fmt.Sprintf("spec.source.configMaps[%d].name", i), src.Name)
		if err != nil {
			return err
		}
		for _, key := range slices.Sorted(maps.Keys(c.Data)) {
			in.Files = append(in.Files, &agentv1.InlineFile{Path: path.Join(src.DestinationDir, key), Content: []byte(c.Data[key])})
			total += len(c.Data[key])
		}
		for _, key := range slices.Sorted(maps.Keys(c.BinaryData)) {
			in.Files = append(in.Files, &agentv1.InlineFile{Path: path.Join(src.DestinationDir, key), Content: c.BinaryData[key]})
			total += len(c.BinaryData[key])
		}
	}
	if total > MaxFiles {
		return &Invalid{Field: "spec.source", Message: fmt.Sprintf("inline files and ConfigMaps have %d bytes together, at most %d are possible", total, MaxFiles)}
	}
	return nil
}
