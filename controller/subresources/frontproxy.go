package subresources

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// authConfigMap is where the API server says how its proxy proves itself.
var authConfigMap = types.NamespacedName{Namespace: "kube-system", Name: "extension-apiserver-authentication"}

// refreshInterval is how often it is read again.
const refreshInterval = 30 * time.Second

// frontProxy knows how the API server's proxy proves itself. Its methods may be called
// concurrently.
type frontProxy struct {
	reader client.Reader

	// mu guards the rest.
	mu    sync.Mutex
	pool  *x509.CertPool
	names []string
}

func newFrontProxy(r client.Reader) *frontProxy { return &frontProxy{reader: r} }

// run keeps the knowledge current until ctx ends.
func (f *frontProxy) run(ctx context.Context, log *slog.Logger) {
	wait := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = refreshInterval
		if err := f.refresh(ctx); err != nil && ctx.Err() == nil {
			log.Error("read how the API server's proxy proves itself", "error", err)
			wait = 2 * time.Second
		}
	}
}

func (f *frontProxy) refresh(ctx context.Context) error {
	c := &corev1.ConfigMap{}
	if err := f.reader.Get(ctx, authConfigMap, c); err != nil {
		return fmt.Errorf("read ConfigMap %s: %w", authConfigMap, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(c.Data["requestheader-client-ca-file"])) {
		return fmt.Errorf("read ConfigMap %s: requestheader-client-ca-file has no certificate; start kube-apiserver with --requestheader-client-ca-file", authConfigMap)
	}
	var names []string
	if raw := c.Data["requestheader-allowed-names"]; raw != "" {
		if err := json.Unmarshal([]byte(raw), &names); err != nil {
			return fmt.Errorf("read ConfigMap %s: requestheader-allowed-names: %w", authConfigMap, err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pool, f.names = pool, names
	return nil
}

// tls returns what to ask of a connection.
func (f *frontProxy) tls(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) (*tls.Config, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pool == nil {
		return nil, errors.New("how the API server's proxy proves itself is not known yet")
	}
	names := f.names
	return &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: certificate, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: f.pool,
		NextProtos: []string{"h2", "http/1.1"},
		VerifyConnection: func(state tls.ConnectionState) error {
			if name := state.PeerCertificates[0].Subject.CommonName; len(names) > 0 && !slices.Contains(names, name) {
				return fmt.Errorf("client certificate of %q: only the API server's proxy is served", name)
			}
			return nil
		},
	}, nil
}
