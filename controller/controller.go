// Package controller assembles the cluster's controller from its parts.
//
// It promises that everything that it starts ends when Run returns, and that only the
// leader acts on Builds, while every replica answers the API server. It talks to agents only
// through the API of package agentv1.
package controller

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	ctrladmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/admission"
	"github.com/kiln-build/kiln/controller/agents"
	"github.com/kiln-build/kiln/controller/build"
	"github.com/kiln-build/kiln/controller/config"
	"github.com/kiln-build/kiln/controller/follow"
	"github.com/kiln-build/kiln/controller/pki"
	"github.com/kiln-build/kiln/controller/placement"
	"github.com/kiln-build/kiln/controller/subresources"
	"github.com/kiln-build/kiln/controller/sweep"
)

// Scheme knows the types that the controller reads and writes.
func Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(s))
	utilruntime.Must(v1alpha1.AddToScheme(s))
	return s
}

// Controller is the cluster's controller.
type Controller struct {
	manager manager.Manager
	pool    *agents.Pool
}

// New assembles a controller. It reads from the API server that rest names and makes the
// certificates that are missing there, but serves and acts only in Run. reg takes the metrics
// of Builds.
func New(ctx context.Context, cfg *config.Controller, restConfig *rest.Config, log *slog.Logger, reg prometheus.Registerer) (*Controller, error) {
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	scheme := Scheme()
	live, err := client.New(restConfig, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("connect to API server: %w", err)
	}
	authority := pki.New(pki.Config{
		Namespace: cfg.Namespace, CASecret: "kiln-ca", AgentSecret: "kiln-agent-tls", AgentName: cfg.Agents.ServerName, ClientName: "kiln-controller",
		ServiceNames: []string{cfg.Webhook.Service + "." + cfg.Namespace + ".svc", cfg.Webhook.Service + "." + cfg.Namespace + ".svc.cluster.local", "localhost"},
	}, live, log, publisher(live, cfg))
	if err := authority.Ensure(ctx); err != nil {
		return nil, fmt.Errorf("make certificates: %w", err)
	}
	mgr, err := newManager(cfg, restConfig, scheme, authority, log)
	if err != nil {
		return nil, err
	}
	pool := agents.New(agents.Config{Namespace: cfg.Namespace, Labels: cfg.Agents.Labels, Port: cfg.Agents.Port}, mgr.GetClient(), agents.Credentials(authority.ClientTLS))
	evaluator := &admission.Evaluator{Reader: mgr.GetClient(), Handlers: cfg.Sandboxes.Handlers, DefaultClass: cfg.Sandboxes.Default}
	mgr.GetWebhookServer().Register(admission.Path, &ctrladmission.Webhook{Handler: admission.NewWebhook(evaluator, scheme)})
	streams, err := subresources.New(subresources.Config{
		Address: cfg.Subresources.Address, MaxUploadBytes: cfg.Subresources.MaxUploadBytes, Certificate: authority.ServingCertificate,
	}, live, pool, log)
	if err != nil {
		return nil, err
	}
	sweeper := &sweep.Sweeper{Pool: pool, Live: live, Interval: cfg.Builds.SweepInterval.Duration, Log: log}
	for _, r := range []manager.Runnable{authority, sweeper, streams} {
		if err := mgr.Add(r); err != nil {
			return nil, fmt.Errorf("assemble controller: %w", err)
		}
	}
	if err := addBuilds(mgr, cfg, live, evaluator, pool, log, reg); err != nil {
		return nil, err
	}
	if err := addChecks(mgr, authority); err != nil {
		return nil, err
	}
	return &Controller{manager: mgr, pool: pool}, nil
}

// Run runs the controller until ctx ends, or it loses the leadership, which is an error.
func (c *Controller) Run(ctx context.Context) error {
	defer c.pool.Close()
	return c.manager.Start(ctx)
}

func newManager(cfg *config.Controller, restConfig *rest.Config, scheme *runtime.Scheme, authority *pki.Authority, log *slog.Logger) (manager.Manager, error) {
	host, port, err := config.SplitAddress(cfg.Webhook.Address)
	if err != nil {
		return nil, fmt.Errorf("webhook.address: %w", err)
	}
	duration := func(d metav1.Duration) *time.Duration { return &d.Duration }
	drain := 20 * time.Second
	mgr, err := ctrl.NewManager(restConfig, ctrl.Options{
		Scheme: scheme,
		Logger: logr.FromSlogHandler(log.Handler()),
		Cache: cache.Options{ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}: {Namespaces: map[string]cache.Config{cfg.Namespace: {}}},
		}},
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}, &corev1.ConfigMap{}, &corev1.ServiceAccount{}}}},
		WebhookServer: webhook.NewServer(webhook.Options{Host: host, Port: port, TLSOpts: []func(*tls.Config){func(t *tls.Config) {
			t.MinVersion, t.GetCertificate = tls.VersionTLS12, authority.ServingCertificate
		}}}),
		Metrics:                metricsserver.Options{BindAddress: cfg.Metrics.Address},
		HealthProbeBindAddress: cfg.Health.Address,
		LeaderElection:         !cfg.LeaderElection.Disabled, LeaderElectionID: cfg.LeaderElection.LeaseName, LeaderElectionNamespace: cfg.Namespace,
		LeaseDuration: duration(cfg.LeaderElection.LeaseDuration), RenewDeadline: duration(cfg.LeaderElection.RenewDeadline), RetryPeriod: duration(cfg.LeaderElection.RetryPeriod),
		// The process ends when the manager does, so the next leader need not wait.
		LeaderElectionReleaseOnCancel: true,
		GracefulShutdownTimeout:       &drain,
		Controller:                    ctrlconfig.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		return nil, fmt.Errorf("assemble controller: %w", err)
	}
	return mgr, nil
}

// addBuilds adds the reconciler of Builds with what brings it to life.
func addBuilds(mgr manager.Manager, cfg *config.Controller, live client.Reader, evaluator *admission.Evaluator, pool *agents.Pool, log *slog.Logger, reg prometheus.Registerer) error {
	news := newMailbox()
	follower := &follow.Follower{Clients: pool, Interval: cfg.Builds.StatusInterval.Duration, RetryDelay: 500 * time.Millisecond, Notify: news.put}
	r := &build.Reconciler{
		Client: mgr.GetClient(), Live: live, Evaluator: evaluator, Agents: pool, Follower: follower,
		Chooser: &placement.Chooser{Agents: pool, Reader: mgr.GetClient(), Timeout: cfg.Builds.ProbeTimeout.Duration},
		Events:  mgr.GetEventRecorder("kiln-controller"),
		Timing: build.Timing{
			MissingInput: cfg.Builds.MissingInputGrace.Duration, NodeLoss: cfg.Builds.NodeLossGrace.Duration, Retry: cfg.Builds.RetryInterval.Duration, Call: 15 * time.Second,
		},
		Metrics: build.NewMetrics(reg, follower.Count), Log: log, Now: time.Now,
	}
	for _, runnable := range []manager.Runnable{follower, news} {
		if err := mgr.Add(runnable); err != nil {
			return fmt.Errorf("assemble controller: %w", err)
		}
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("build").For(&v1alpha1.Build{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(waitingBuilds(mgr.GetClient()))).
		WatchesRawSource(source.Channel(news.events, handler.TypedFuncs[types.NamespacedName, reconcile.Request]{GenericFunc: enqueueName})).
		WithOptions(ctrlcontroller.Options{MaxConcurrentReconciles: cfg.Builds.MaxConcurrentReconciles}).
		Complete(r)
	if err != nil {
		return fmt.Errorf("assemble controller: %w", err)
	}
	return nil
}

// waitingBuilds returns the Builds that wait for a node, or that are on the Pod's node: an
// agent that comes or goes concerns them.
func waitingBuilds(reader client.Reader) handler.MapFunc {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		pod, ok := o.(*corev1.Pod)
		if !ok {
			return nil
		}
		all := &v1alpha1.BuildList{}
		if err := reader.List(ctx, all); err != nil {
			return nil // They are looked at again after the retry interval anyway.
		}
		var out []reconcile.Request
		for i := range all.Items {
			b := &all.Items[i]
			if !b.Ended() && (b.Status.Node == "" || b.Status.Node == pod.Spec.NodeName) {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(b)})
			}
		}
		return out
	}
}

func addChecks(mgr manager.Manager, authority *pki.Authority) error {
	for name, check := range map[string]healthz.Checker{
		"certificates": func(*http.Request) error { return authority.Ready() },
		"webhook":      mgr.GetWebhookServer().StartedChecker(),
	} {
		if err := mgr.AddReadyzCheck(name, check); err != nil {
			return fmt.Errorf("assemble controller: %w", err)
		}
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return fmt.Errorf("assemble controller: %w", err)
	}
	return nil
}
