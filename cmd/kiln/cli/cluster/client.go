// Package cluster is the client of kiln on a Kubernetes cluster, for the command.
//
// It uses what kubectl uses: the kubeconfig, the Build resources, and their
// subresources for logs and uploads, which the API server authorises like any
// other. It never talks to a node.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// Config says which cluster, as kubectl's flags of the same names do. Everything
// may be empty.
type Config struct {
	Kubeconfig, Context, Namespace string
}

// Client works on the builds of one namespace. Its methods may be called
// concurrently.
type Client struct {
	namespace string
	builds    rest.Interface
	streams   rest.Interface
	http      *http.Client
}

// New reads the kubeconfig. It does not connect.
func New(cfg Config) (*Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = cfg.Kubeconfig
	overrides := &clientcmd.ConfigOverrides{CurrentContext: cfg.Context}
	overrides.Context.Namespace = cfg.Namespace
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := buildv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	codecs := serializer.NewCodecFactory(scheme)
	config.NegotiatedSerializer = codecs.WithoutConversion()
	config.APIPath = "/apis"
	config.UserAgent = "kiln"
	c := &Client{namespace: namespace}
	group := buildv1.GroupVersion
	config.GroupVersion = &group
	if c.builds, err = rest.RESTClientFor(config); err != nil {
		return nil, fmt.Errorf("use kubeconfig: %w", err)
	}
	group.Group = buildv1.SubresourcesGroup
	config.GroupVersion = &group
	// A stream may take as long as the build.
	config.Timeout = 0
	if c.http, err = rest.HTTPClientFor(config); err != nil {
		return nil, fmt.Errorf("use kubeconfig: %w", err)
	}
	if c.streams, err = rest.RESTClientForConfigAndClient(config, c.http); err != nil {
		return nil, fmt.Errorf("use kubeconfig: %w", err)
	}
	return c, nil
}

// Namespace is the namespace that the client works in.
func (c *Client) Namespace() string { return c.namespace }

const buildsResource = "builds"

// Create creates a build.
func (c *Client) Create(ctx context.Context, b *buildv1.Build) (*buildv1.Build, error) {
	created := &buildv1.Build{}
	err := c.builds.Post().Namespace(c.namespace).Resource(buildsResource).Body(b).Do(ctx).Into(created)
	if err != nil {
		return nil, fmt.Errorf("create build in namespace %s: %w", c.namespace, err)
	}
	return created, nil
}

// Get returns a build.
func (c *Client) Get(ctx context.Context, name string) (*buildv1.Build, error) {
	b := &buildv1.Build{}
	if err := c.builds.Get().Namespace(c.namespace).Resource(buildsResource).Name(name).Do(ctx).Into(b); err != nil {
		return nil, fmt.Errorf("get build %s: %w", name, err)
	}
	return b, nil
}

// List returns the builds of the namespace, or of all namespaces.
func (c *Client) List(ctx context.Context, all bool) ([]buildv1.Build, error) {
	list := &buildv1.BuildList{}
	req := c.builds.Get().Resource(buildsResource)
	if !all {
		req = req.Namespace(c.namespace)
	}
	if err := req.Do(ctx).Into(list); err != nil {
		return nil, fmt.Errorf("list builds: %w", err)
	}
	return list.Items, nil
}

// Cancel asks a build to end.
func (c *Client) Cancel(ctx context.Context, name string) error {
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"state": buildv1.StateCancelled}})
	if err != nil {
		return err
	}
	err = c.builds.Patch(types.MergePatchType).Namespace(c.namespace).Resource(buildsResource).Name(name).Body(patch).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("cancel build %s: %w", name, err)
	}
	return nil
}

const (
	// pollInterval is how often a build is looked at while it is waited for.
	pollInterval = 300 * time.Millisecond
	// maxFailures is how many times in a row it may not be readable, so that a
	// short absence of the API server is not the end.
	maxFailures = 100
)

// Wait returns the build as soon as done says so. seen, if not nil, is given every
// state before that.
func (c *Client) Wait(ctx context.Context, name string, done func(*buildv1.Build) bool, seen func(*buildv1.Build)) (*buildv1.Build, error) {
	for failures := 0; ; {
		b, err := c.Get(ctx, name)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err == nil:
			failures = 0
			if done(b) {
				return b, nil
			}
			if seen != nil {
				seen(b)
			}
		case !transient(err) || failures == maxFailures:
			return nil, err
		default:
			failures++
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return nil, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// status returns the HTTP status of an answer of the API server; 0: it did not
// answer.
func status(err error) int {
	var s interface{ Status() metav1.Status }
	if asError(err, &s) {
		return int(s.Status().Code)
	}
	return 0
}

// transient tells whether the same request may succeed later.
func transient(err error) bool {
	switch code := status(err); code {
	case 0, http.StatusTooManyRequests:
		return true
	default:
		return code >= 500
	}
}
