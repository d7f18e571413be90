package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Config names what the authority makes.
type Config struct {
	// Namespace of the Secrets.
	Namespace string
	// CASecret holds the CA.
	CASecret string
	// AgentSecret holds the agents' serving certificate, its key and the CAs that they trust.
	AgentSecret string
	// AgentName is the host name in the agents' certificate.
	AgentName string
	// ClientName is the common name in the controller's client certificate.
	ClientName string
	// ServiceNames are the host names in the controller's serving certificate.
	ServiceNames []string
}

// Authority issues certificates. Its methods may be called concurrently.
type Authority struct {
	config Config
	client client.Client
	log    *slog.Logger
	now    func() time.Time
	// onChange is called with the bundle of trusted CAs whenever certificates were checked.
	onChange func(ctx context.Context, bundle []byte) error

	// mu guards the rest.
	mu         sync.Mutex
	ca         *pair
	bundle     []byte
	pool       *x509.CertPool
	controller *pair
	serving    *pair
}

// New returns an authority that has no certificates until Ensure was called. c must read
// live objects. onChange is told the trusted CAs after each Ensure; it may be nil.
func New(cfg Config, c client.Client, log *slog.Logger, onChange func(ctx context.Context, bundle []byte) error) *Authority {
	return &Authority{config: cfg, client: c, log: log, now: time.Now, onChange: onChange}
}

// Start checks the certificates every minute until ctx ends.
func (a *Authority) Start(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		if err := a.Ensure(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("check certificates", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// NeedLeaderElection says that every replica checks: each serves, and any may renew.
func (a *Authority) NeedLeaderElection() bool { return false }

// Ensure makes and renews what has to be, and takes in what other replicas made.
func (a *Authority) Ensure(ctx context.Context) error {
	data, err := a.update(ctx, a.config.CASecret, func(data map[string][]byte) (map[string][]byte, bool, error) { return advance(data, a.now()) })
	if err != nil {
		return err
	}
	ca, err := parsePair(data[keyCert], data[keyKey])
	if err != nil {
		return fmt.Errorf("read CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data[keyBundle]) {
		return errors.New("read CA bundle: it has no certificate")
	}
	a.mu.Lock()
	a.ca, a.bundle, a.pool = ca, data[keyBundle], pool
	a.mu.Unlock()
	if _, err := a.update(ctx, a.config.AgentSecret, func(data map[string][]byte) (map[string][]byte, bool, error) { return a.agentSecret(data) }); err != nil {
		return err
	}
	if a.onChange != nil {
		return a.onChange(ctx, data[keyBundle])
	}
	return nil
}

// agentSecret returns the data of the agents' Secret as they have to be.
func (a *Authority) agentSecret(data map[string][]byte) (map[string][]byte, bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old, err := parsePair(data[keyCert], data[keyKey])
	if err == nil && !a.stale(old) && slices.Contains(old.cert.DNSNames, a.config.AgentName) {
		if bytes.Equal(data[keyBundle], a.bundle) {
			return data, false, nil
		}
		out := maps.Clone(data)
		out[keyBundle] = a.bundle
		return out, true, nil
	}
	leaf, err := a.ca.leaf("kiln-agent", []string{a.config.AgentName}, a.now())
	if err != nil {
		return nil, false, err
	}
	return map[string][]byte{keyCert: leaf.certPEM, keyKey: leaf.keyPEM, keyBundle: a.bundle}, true, nil
}

// stale tells whether a certificate has to be replaced. The caller holds mu.
func (a *Authority) stale(p *pair) bool {
	return p == nil || due(p.cert, a.now()) || p.cert.CheckSignatureFrom(a.ca.cert) != nil
}

// update changes a Secret, or makes it, and returns its data. What another replica did
// first counts.
func (a *Authority) update(ctx context.Context, name string, change func(map[string][]byte) (map[string][]byte, bool, error)) (map[string][]byte, error) {
	for range 5 {
		s := &corev1.Secret{}
		err := a.client.Get(ctx, types.NamespacedName{Namespace: a.config.Namespace, Name: name}, s)
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return nil, fmt.Errorf("read Secret %q: %w", name, err)
		}
		data, changed, err := change(s.Data)
		if err != nil {
			return nil, fmt.Errorf("renew Secret %q: %w", name, err)
		}
		if !changed {
			return data, nil
		}
		s.Data = data
		if missing {
			s.ObjectMeta = metav1.ObjectMeta{Namespace: a.config.Namespace, Name: name, Labels: map[string]string{"app.kubernetes.io/part-of": "kiln"}}
			s.Type = corev1.SecretTypeTLS
			err = a.client.Create(ctx, s)
		} else {
			err = a.client.Update(ctx, s)
		}
		switch {
		case err == nil:
			a.log.Info("renewed certificates", "secret", name)
			return data, nil
		case !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err):
			return nil, fmt.Errorf("write Secret %q: %w", name, err)
		}
	}
	return nil, fmt.Errorf("write Secret %q: others changed it each time", name)
}

var errNotReady = errors.New("certificates have not been made yet")

// ClientTLS returns what the controller proves itself with to agents, and what it accepts.
func (a *Authority) ClientTLS() (*tls.Config, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ca == nil {
		return nil, errNotReady
	}
	if a.stale(a.controller) {
		leaf, err := a.ca.leaf(a.config.ClientName, nil, a.now())
		if err != nil {
			return nil, err
		}
		a.controller = leaf
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, ServerName: a.config.AgentName, RootCAs: a.pool, Certificates: []tls.Certificate{*a.controller.tls()}, NextProtos: []string{"h2"}}, nil
}

// ServingCertificate returns the controller's serving certificate; it fits
// tls.Config.GetCertificate.
func (a *Authority) ServingCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ca == nil {
		return nil, errNotReady
	}
	if a.stale(a.serving) {
		leaf, err := a.ca.leaf("kiln-controller", a.config.ServiceNames, a.now())
		if err != nil {
			return nil, err
		}
		a.serving = leaf
	}
	return a.serving.tls(), nil
}

// Ready is nil once certificates are there; it fits a readiness check.
func (a *Authority) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ca == nil {
		return errNotReady
	}
	return nil
}
