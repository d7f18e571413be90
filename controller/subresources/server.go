// Package subresources is the aggregated API subresources.kiln.build: a Build's log as a
// stream of events, and the upload of its source.
//
//	GET /apis/subresources.kiln.build/v1alpha1/namespaces/{namespace}/builds/{name}/log?offset=N&follow=true
//	PUT /apis/subresources.kiln.build/v1alpha1/namespaces/{namespace}/builds/{name}/upload
//
// It promises to serve the API server's proxy and nobody else: a connection must show a
// client certificate of the front-proxy CA with an allowed name. Who the user is and
// what it may do (get builds/log, update builds/upload) the API server has decided then. It
// holds no state: every replica serves, and a client that was cut off goes on elsewhere
// from the offset that it has seen, or that the agent tells.
package subresources

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// Config of the server.
type Config struct {
	// Address to listen on.
	Address string
	// MaxUploadBytes bounds one upload.
	MaxUploadBytes int64
	// Certificate is the serving certificate.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
}

// Clients connects to the agent of a node.
type Clients interface {
	// Client returns the API of a node's agent.
	Client(ctx context.Context, node string) (agentv1.BuildServiceClient, error)
}

// Server serves the API.
type Server struct {
	config  Config
	client  client.Client
	clients Clients
	proxy   *frontProxy
	log     *slog.Logger
}

// New returns a server. c must read live objects.
func New(cfg Config, c client.Client, clients Clients, log *slog.Logger) (*Server, error) {
	if cfg.Certificate == nil {
		return nil, errors.New("assemble subresources: no certificate")
	}
	return &Server{config: cfg, client: c, clients: clients, proxy: newFrontProxy(c), log: log}, nil
}

// NeedLeaderElection says that every replica serves.
func (s *Server) NeedLeaderElection() bool { return false }

// Start serves until ctx ends.
func (s *Server) Start(ctx context.Context) error {
	listener, err := net.Listen("tcp", s.config.Address)
	if err != nil {
		return fmt.Errorf("serve subresources: %w", err)
	}
	return s.Serve(ctx, listener)
}

// Serve serves on a listener until ctx ends, and closes it. Streams that are open end
// then: clients take them up again elsewhere.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	refreshed := make(chan struct{})
	go func() {
		defer close(refreshed)
		s.proxy.run(ctx, s.log)
	}()
	server := &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return s.proxy.tls(s.config.Certificate)
		}, GetCertificate: s.config.Certificate},
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(listener, "", "") }()
	var err error
	select {
	case <-ctx.Done():
	case err = <-served:
	}
	cancel()
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer done()
	if server.Shutdown(stop) != nil {
		_ = server.Close()
	}
	<-refreshed
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve subresources: %w", err)
	}
	return nil
}

const prefix = "/apis/" + v1alpha1.SubresourcesGroup

// Handler returns the API without TLS and without a check of who calls.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	base := prefix + "/v1alpha1"
	mux.HandleFunc("GET /apis", writeJSON(groups()))
	mux.HandleFunc("GET "+prefix, writeJSON(group()))
	mux.HandleFunc("GET "+base, writeJSON(resources()))
	mux.HandleFunc("GET "+base+"/namespaces/{namespace}/builds/{name}/log", s.serveLog)
	mux.HandleFunc("PUT "+base+"/namespaces/{namespace}/builds/{name}/upload", s.serveUpload)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeStatus(w, http.StatusNotFound, metav1.StatusReasonNotFound, "there is nothing at "+r.URL.Path)
	})
	return mux
}
