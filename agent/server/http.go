package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Limits of HTTP pages, which nobody authenticates for.
const (
	httpTimeout   = 30 * time.Second
	httpIdle      = 2 * time.Minute
	httpMaxHeader = 16 << 10
	// maxScrapes is how many collections of metrics run at one time.
	maxScrapes = 4
	// httpStop bounds the end of the last answers.
	httpStop = 2 * time.Second
)

// MetricsHandler serves /metrics.
func MetricsHandler(reg prometheus.Gatherer, log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError), ErrorHandling: promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes, Timeout: httpTimeout / 2,
	})
}

// LivenessHandler serves /healthz: that it answers is the answer.
func LivenessHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
}

// ReadinessHandler serves /readyz. ready says why the agent takes no builds, or nil.
func ReadinessHandler(ready func() error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
}

// ServeHTTP serves handler on l, and closes l, until ctx ends.
func ServeHTTP(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler: handler, ReadTimeout: httpTimeout, ReadHeaderTimeout: httpTimeout, WriteTimeout: httpTimeout,
		IdleTimeout: httpIdle, MaxHeaderBytes: httpMaxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan struct{})
	end := context.AfterFunc(ctx, func() {
		defer close(stopped)
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), httpStop)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(l)
	if !end() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}
