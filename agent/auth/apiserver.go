package auth

import (
	"context"
	"fmt"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Reviews a second that the agent asks for at most, and in one burst: no flood of
// made-up tokens becomes one of requests to the API server.
const (
	reviewQPS   = 50
	reviewBurst = 100
)

// apiServer is the Reviewer that asks a real API server. It has a client of its own
// for two kinds: the general one brings every kind of Kubernetes into memory.
type apiServer struct {
	client rest.Interface
}

// NewAPIServer returns a Reviewer that reaches the API server as kubeconfig says, or
// as a Pod does when that is empty. It connects when it is first asked.
func NewAPIServer(kubeconfig string) (Reviewer, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("read access to the API server: %w", err)
	}
	return newAPIServer(cfg)
}

func newAPIServer(cfg *rest.Config) (Reviewer, error) {
	scheme := runtime.NewScheme()
	if err := authenticationv1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register kinds: %w", err)
	}
	if err := authorizationv1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register kinds: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.UserAgent = "kiln-agent"
	cfg.QPS, cfg.Burst = reviewQPS, reviewBurst
	cfg.Timeout = reviewTimeout
	cfg.GroupVersion = &schema.GroupVersion{}
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.UnversionedRESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("make client of the API server: %w", err)
	}
	return &apiServer{client: client}, nil
}

// ReviewToken creates a TokenReview.
func (a *apiServer) ReviewToken(ctx context.Context, spec authenticationv1.TokenReviewSpec) (authenticationv1.TokenReviewStatus, error) {
	out := &authenticationv1.TokenReview{}
	err := a.client.Post().AbsPath("/apis/authentication.k8s.io/v1/tokenreviews").
		Body(&authenticationv1.TokenReview{Spec: spec}).Do(ctx).Into(out)
	return out.Status, err
}

// ReviewAccess creates a SubjectAccessReview.
func (a *apiServer) ReviewAccess(ctx context.Context, spec authorizationv1.SubjectAccessReviewSpec) (authorizationv1.SubjectAccessReviewStatus, error) {
	out := &authorizationv1.SubjectAccessReview{}
	err := a.client.Post().AbsPath("/apis/authorization.k8s.io/v1/subjectaccessreviews").
		Body(&authorizationv1.SubjectAccessReview{Spec: spec}).Do(ctx).Into(out)
	return out.Status, err
}
